"""Strain from nano-beam diffraction: a lattice is fitted to the disks of each pattern and compared with a reference.

A displacement gradient F = 1 + du/dr of the crystal turns its reciprocal lattice vectors into ``F^-T g``. With the
reference vectors as the columns of G0 and the measured ones of G, ``F = (G G0^-1)^-T``. Its polar decomposition
``F = R U`` gives the rotation R and the strain ``U - 1``, in the convention of :mod:`stemloop.core.structure`
(M. J. Hÿtch, E. Snoeck and R. Kilaas, Ultramicroscopy 74 (1998) 131, doi:10.1016/S0304-3991(98)00035-7, give the same
matrix for images).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.protocols import Block
from stemloop.reduce.disks import Disks, Template, find_disks
from stemloop.reduce.engine import Maps, Rows

Array = NDArray[np.float64]

#: What :func:`strain` returns, in this order.
COMPONENTS = ("e_xx", "e_yy", "e_xy", "rotation")


@dataclass(frozen=True)
class DiskLattice:
    """``origin + h g1 + k g2`` fitted to disks: (row, col) [px].

    vectors : (3, 2): origin, g1, g2. covariance : (6, 6) of their six numbers in that order. index : (n, 2) (h, k) of
    each disk and ``used`` (n,) whether it took part. chi2, freedom : misfit [deviations^2] and its degrees of freedom.
    """

    vectors: Array
    covariance: Array
    index: NDArray[np.int64]
    used: NDArray[np.bool_]
    chi2: float
    freedom: int


def fit_disks(disks: Disks, guess: NDArray[Any], tolerance_px: float = 2.0) -> DiskLattice:
    """Fit a lattice to the disks of one frame by least squares, each weighted by its own covariance.

    ``guess`` (3, 2) is the origin, g1 and g2 (row, col) [px], good to ``tolerance_px`` at every disk used (disks are
    indexed by rounding, from the origin outwards, with a fit in between, so a guess good near the origin is enough).
    InputError if fewer than three disks that span the plane fit.
    """
    value = np.asarray(guess, dtype=np.float64).reshape(3, 2)
    if len(disks) < 3:
        raise InputError(f"a lattice needs at least three disks; there are {len(disks)}.")
    precision = np.linalg.inv(disks.covariance)
    far = np.linalg.norm(disks.position - value[0], axis=1)
    reach = np.linalg.norm(value[1:], axis=1).max() * 1.3
    index, used = np.zeros((len(disks), 2), dtype=np.int64), np.zeros(len(disks), dtype=bool)
    covariance = np.zeros((6, 6))
    while True:
        for _ in range(2):
            index = np.rint((disks.position - value[0]) @ np.linalg.inv(value[1:])).astype(np.int64)
            residual = disks.position - value[0] - index @ value[1:]
            used = (np.linalg.norm(residual, axis=1) <= tolerance_px) & (far <= reach)
            design = np.column_stack([np.ones(len(index)), index])[used]
            if np.linalg.matrix_rank(design) < 3:
                break
            normal = np.einsum("ni,nab,nj->iajb", design, precision[used], design).reshape(6, 6)
            right = np.einsum("ni,nab,nb->ia", design, precision[used], disks.position[used]).reshape(6)
            covariance = np.linalg.inv(normal)
            value = (covariance @ right).reshape(3, 2)
        if reach > far.max():
            break
        reach *= 1.5
    design = np.column_stack([np.ones(len(index)), index])[used]
    if np.linalg.matrix_rank(design) < 3:
        raise InputError("fewer than three disks that span the plane lie on the lattice: give a better guess.")
    residual = (disks.position - value[0] - index @ value[1:])[used]
    chi2 = float(np.einsum("na,nab,nb->", residual, precision[used], residual))
    return DiskLattice(value, covariance, index, used, chi2, 2 * int(used.sum()) - 6)


def strain(
    vectors: NDArray[Any], reference: NDArray[Any], covariance: NDArray[Any] | None = None
) -> tuple[Array, Array]:
    """Strain and rotation (4,) as :data:`COMPONENTS` from g1, g2 (2, 2) rows of (row, col), and their deviations (4,).

    reference : (2, 2) of the unstrained crystal. covariance : (4, 4) of the four numbers of ``vectors`` (zeros if not
    given); it is propagated by the derivative of the result, taken numerically. The reference's own deviation is
    common to a whole map and is not part of it.
    """
    g, g0 = np.asarray(vectors, np.float64)[:, ::-1].T, np.asarray(reference, np.float64)[:, ::-1].T
    if abs(np.linalg.det(g0)) < 1e-12 or abs(np.linalg.det(g)) < 1e-12:
        raise InputError("the two lattice vectors are parallel: they span no plane.")
    value = _polar(g, g0)
    if covariance is None:
        return value, np.zeros(4)
    h = 1e-6 * np.abs(g).max()
    slopes = []
    for i in range(4):
        change = np.zeros(4)
        change[i] = h
        change = change.reshape(2, 2)[:, ::-1].T
        slopes.append((_polar(g + change, g0) - _polar(g - change, g0)) / (2 * h))
    jacobian = np.array(slopes).T
    return value, np.sqrt(np.maximum(np.diag(jacobian @ covariance @ jacobian.T), 0))


def _polar(g: Array, g0: Array) -> Array:
    """e_xx, e_yy, e_xy, rotation from matrices whose columns are reciprocal vectors (x, y)."""
    f = np.linalg.inv(g @ np.linalg.inv(g0)).T
    w, s, vt = np.linalg.svd(f)
    u, r = vt.T @ np.diag(s) @ vt, w @ vt
    return np.array([u[0, 0] - 1, u[1, 1] - 1, u[0, 1], np.arctan2(r[1, 0], r[0, 0])])


@dataclass(frozen=True)
class StrainMap:
    """A fold from patterns to ``e_xx``, ``e_yy``, ``e_xy``, ``rotation`` [rad], their ``_sigma``, ``disks`` (how many
    took part) and ``misfit`` (chi2 a degree of freedom; near 1 where the lattice explains the disks).

    template : the probe's image. reference : (3, 2) origin, g1, g2 (row, col) [px] of the unstrained crystal, as
    :func:`reference_lattice` finds it. The deviations hold for counted electrons; those of misfitting patterns are
    widened by ``sqrt(misfit)``. Patterns in which no lattice is found give NaN.
    """

    template: Template
    reference: NDArray[np.float64]
    threshold: float = 6.0
    tolerance_px: float = 2.0
    most: int = 100

    def init(self, scan: tuple[int, int], shape: tuple[int, int]) -> Rows:
        return Rows(scan)

    def step(self, part: Rows, block: Block, first: int) -> Rows:
        return part.add(first, np.stack([self.one(block.frame(i)) for i in range(block.frames)]))

    def one(self, pattern: NDArray[Any]) -> Array:
        """(10,): the strain's four components, their deviations, the number of disks and the misfit of a pattern."""
        disks = find_disks(pattern, self.template, self.threshold, self.most)
        try:
            lattice = fit_disks(disks, self.reference, self.tolerance_px)
            value, sigma = strain(lattice.vectors[1:], self.reference[1:], lattice.covariance[2:, 2:])
        except (InputError, np.linalg.LinAlgError):
            return np.array([np.nan] * 8 + [len(disks), np.nan])
        misfit = lattice.chi2 / lattice.freedom if lattice.freedom > 0 else np.nan
        sigma = sigma * np.sqrt(np.fmax(misfit, 1.0))
        return np.concatenate([value, sigma, [lattice.used.sum(), misfit]])

    def merge(self, one: Rows, other: Rows) -> Rows:
        return one.join(other)

    def finish(self, part: Rows) -> Maps:
        table = part.table(10)
        names = [*COMPONENTS, *(f"{name}_sigma" for name in COMPONENTS), "disks", "misfit"]
        return {name: table[..., i] for i, name in enumerate(names)}


def reference_lattice(pattern: NDArray[Any], template: Template, threshold: float = 6.0) -> Array:
    """(3, 2): origin (the brightest disk), g1 and g2 (row, col) [px] of a mean pattern without strain.

    g1 and g2 are the two shortest differences, not parallel, that lead from disk to disk most often. g1 is the one
    nearest to +x; g2 follows it towards +y.
    """
    disks = find_disks(pattern, template, threshold)
    if len(disks) < 4:
        raise InputError(f"only {len(disks)} disks stand out of the mean pattern: lower the threshold.")
    points, brightest = disks.position, int(np.argmax(disks.height))
    steps = (points[:, None] - points).reshape(-1, 2)
    steps = steps[np.linalg.norm(steps, axis=1) > 1.0]
    close = np.linalg.norm(steps[:, None] - steps, axis=2) < 2.0
    often = close.sum(axis=1)
    candidates = steps[often >= 0.5 * often.max()]
    candidates = candidates[np.argsort(np.linalg.norm(candidates, axis=1).round(0), kind="stable")]
    first = candidates[0]
    size = np.linalg.norm(first)
    across = [c for c in candidates if abs(first[0] * c[1] - first[1] * c[0]) > 0.4 * size * np.linalg.norm(c)]
    if not across:
        raise InputError("the disks of the mean pattern lie on one line: no lattice can be fitted.")
    pair = np.stack([first, across[0]])
    guess = np.concatenate([points[brightest : brightest + 1], _ordered(pair)])
    return fit_disks(disks, guess).vectors


def _ordered(pair: Array) -> Array:
    """The two vectors, turned so that the first is nearest to +x and the second follows towards +y."""
    both = np.concatenate([pair, -pair])
    angle = np.arctan2(both[:, 0], both[:, 1])
    first = both[np.argmin(np.abs(angle))]
    second = next(v for v in both if first[1] * v[0] - first[0] * v[1] > 1e-9)
    return np.stack([first, second])
