"""Where a column should be, by the lattice of the columns around it and without the column itself."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from stemloop.describe.assigning.decoration import Indexing

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_ROUNDS = 4
_AT_ONCE = 20000
_TUKEY = 4.685


class SmoothLattice(NamedTuple):
    """The lattice around each of n columns, by its neighbours alone.

    origin : (n, 2) [px] place 0 of the column's own cell. frame : (n, 2, 2) [px] lattice vectors. bend : (n, 0 or 3,
    2) [px] second order. covariance : (n, q, q) [px^2] of the terms 1, b, c (and b^2, b c, c^2) of one coordinate. Rows
    are NaN where too few neighbours were there.
    """

    origin: Floats
    frame: Floats
    bend: Floats
    covariance: Floats

    def at(self, place: Floats) -> tuple[Floats, Floats]:
        """Predicted places (n, 2) [px] of the fractional ``place`` (n, 2) and their variance (n,)."""
        terms = _terms(place, self.covariance.shape[-1])
        answer = self.origin + np.einsum("ni,nik->nk", place, self.frame)
        if self.bend.shape[1]:
            answer = answer + np.einsum("ni,nik->nk", terms[:, 3:], self.bend)
        return answer, np.einsum("ni,nij,nj->n", terms, self.covariance, terms)


def _terms(x: Floats, q: int) -> Floats:
    """(..., q): 1, x, y and, for q = 6, x^2, x y, y^2."""
    u, v = x[..., 0], x[..., 1]
    columns = [np.ones_like(u), u, v] + ([u * u, u * v, v * v] if q == 6 else [])
    return np.stack(columns, axis=-1)


def local(
    position: Floats,
    variance: Floats,
    cells: Indexing,
    sources: Integers,
    order: int = 1,
    asked: Integers | None = None,
) -> SmoothLattice:
    """Robust fit of a smooth lattice to the nearest columns of one kind, for every column and without it.

    Positions of the neighbours are a polynomial (``order`` 1: affine, the lattice with its strain; 2: bent) of their
    cell relative to the column's own, told by the local vectors, not by a walk, so that no error comes from afar.
    Tukey's biweight takes out those that do not fit (beyond a wall, at a dislocation's core).

    Parameters
    ----------
    position : (n, 2) [px]. variance : (n,) [px^2] of one coordinate of each. sources : numbers of the columns of the
        primary kind (site 0). asked : numbers of the columns for which it is wanted; all if left out.
    """
    asked = np.arange(len(position)) if asked is None else asked
    if len(asked) > _AT_ONCE:  # to bound the memory
        blocks = np.array_split(asked, -(-len(asked) // _AT_ONCE))
        parts = [local(position, variance, cells, sources, order, block) for block in blocks]
        return SmoothLattice(*(np.concatenate(field) for field in zip(*parts, strict=True)))
    n, q = len(asked), 3 if order == 1 else 6
    most = 12 if order == 1 else 20
    nothing = SmoothLattice(
        np.full((n, 2), np.nan), np.full((n, 2, 2), np.nan), np.full((n, q - 3, 2), np.nan), np.full((n, q, q), np.nan)
    )
    if len(sources) < q + 3:
        return nothing
    distance, index = (
        np.asarray(v) for v in cKDTree(position[sources]).query(position[asked], min(most + 1, len(sources)))
    )
    neighbour = sources[index]
    other = neighbour != asked[:, None]
    other[:, -1] &= ~other.all(axis=1)  # the same number for all: a source leaves itself out
    frame = cells.frame[asked]
    inverse = np.linalg.inv(frame)
    longest = np.sqrt((frame**2).sum(axis=2).max(axis=1))
    step = position[neighbour] - position[asked][:, None]
    own = cells.basis[cells.site[asked]]
    x = np.rint(np.einsum("nmi,nij->nmj", step, inverse) + own[:, None])
    base = other & (distance < 3.2 * longest[:, None])
    terms = _terms(x, q)
    prior = base / variance[neighbour]
    solution, normal, used = _fitted(terms, step, prior, base)
    enough = used >= q + 2
    normal[~enough] = np.eye(q)
    covariance: Floats = np.asarray(np.linalg.inv(normal), dtype=np.float64)
    enough &= np.diagonal(covariance, axis1=1, axis2=2)[:, 0] < np.maximum(4 * variance[asked], 1e-12)
    covariance[~enough], solution[~enough] = np.nan, np.nan
    return SmoothLattice(solution[:, 0] + position[asked], solution[:, 1:3], solution[:, 3:], covariance)


def _fitted(terms: Floats, step: Floats, prior: Floats, base: NDArray[np.bool_]) -> tuple[Floats, Floats, Integers]:
    """Iteratively reweighted least squares of ``step`` (n, m, 2) on ``terms`` (n, m, q)."""
    weight = np.ones(prior.shape)
    q = terms.shape[-1]
    tiny = 1e-9 * np.eye(q) * np.maximum(prior.max(axis=1), 1e-300)[:, None, None]
    count = base.sum(axis=1)
    solution, normal = np.zeros((len(step), q, 2)), np.zeros((len(step), q, q))
    for turn in range(_ROUNDS):
        weighted = terms * (weight * prior)[..., None]
        normal = np.swapaxes(weighted, 1, 2) @ terms + tiny
        solution = np.linalg.solve(normal, np.swapaxes(weighted, 1, 2) @ step)
        if turn == _ROUNDS - 1:
            break
        left = np.sqrt(((step - terms @ solution) ** 2).sum(axis=2) * prior)
        ordered = np.sort(np.where(base, left, np.inf), axis=1)
        # the median of those that a fit with q terms leaves free, at least the noise itself
        middle = ordered[np.arange(len(left)), np.minimum((count + q) // 2, left.shape[1] - 1)]
        scale = np.maximum(np.where(np.isfinite(middle), middle, 1.0) / 1.1774, 1.0)
        weight = np.clip(1 - (left / (_TUKEY * scale[:, None])) ** 2, 0, 1) ** 2
    return solution, normal, np.asarray(((weight * base) > 0.1).sum(axis=1))
