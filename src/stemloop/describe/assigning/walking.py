"""From neighbour to neighbour through a lattice, compiled.

A column that is known to sit at place s of cell (i, j) expects its neighbours by its own local lattice vectors; each
neighbour that is there gets its cell and place, and corrects the vectors for the way ahead. So strain and curvature are
followed however far they lead, and no error reaches further than the columns that vote against it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Rounds: how far a column may lie from where it is expected, in distances of nearest neighbours (near ones come
#: first), and how many known neighbours must agree on its cell for each one that does not. The last round closes up to
#: the cuts that start at dislocations.
LEVELS = np.array([[0.15, 1.01], [0.25, 1.01], [0.34, 1.01], [0.34, 0.4]])
#: Share of the columns around that must fit into the column's own lattice.
SUPPORT = 0.55
#: How far a column looks for neighbours, in the longer lattice vector: the diagonal of a square cell is still seen.
REACH = 1.5
#: Weight of the vectors that a column inherits, in squared steps of the lattice.
_INHERITED = 6.0
_FIT = 0.25
#: Principal stretches, against the lattice where the walk began, between which a lattice is still the same one.
STRETCH = (0.89, 1.12)


@njit(cache=True, nogil=True)
def _nearest_place(y: float, x: float, frame: Floats, basis: Floats, first: int) -> tuple[int, int, int, float]:
    """The place of the lattice nearest to (y, x) [px] from a column at place ``first`` of cell (0, 0): its kind, its
    cell and the distance [px]."""
    det = frame[0, 0] * frame[1, 1] - frame[0, 1] * frame[1, 0]
    u = (y * frame[1, 1] - x * frame[1, 0]) / det + basis[first, 0]
    v = (x * frame[0, 0] - y * frame[0, 1]) / det + basis[first, 1]
    kind, ci, cj, best = -1, 0, 0, 1e300
    for s in range(len(basis)):
        a, b = u - basis[s, 0], v - basis[s, 1]
        i, j = int(np.rint(a)), int(np.rint(b))
        da, db = a - i, b - j
        dy, dx = da * frame[0, 0] + db * frame[1, 0], da * frame[0, 1] + db * frame[1, 1]
        far = np.sqrt(dy * dy + dx * dx)
        if far < best:
            kind, ci, cj, best = s, i, j, far
    return kind, ci, cj, best


@njit(cache=True, nogil=True)
def _support(
    k: int, position: Floats, near: Integers, frame: Floats, basis: Floats, place: int, reach: float, fit: float
) -> float:
    """Share of the columns within ``reach`` of column ``k`` that lie within ``fit`` of a place of its lattice."""
    met, all_of = 0, 0
    for m in near[k]:
        if m < 0:
            break
        y, x = position[m, 0] - position[k, 0], position[m, 1] - position[k, 1]
        if y * y + x * x > reach * reach:
            break
        all_of += 1
        if _nearest_place(y, x, frame, basis, place)[3] < fit:
            met += 1
    return met / all_of if all_of else 0.0


@njit(cache=True, nogil=True)
def _agreed(
    m: int,
    s: int,
    i: int,
    j: int,
    position: Floats,
    near: Integers,
    site: Integers,
    cell: Integers,
    frames: Floats,
    basis: Floats,
    reach: float,
    tolerance: float,
    majority: float,
    frame: Floats,
) -> bool:
    """Whether the known columns around ``m`` agree that it is place ``s`` of cell (i, j); their mean vectors go into
    ``frame``."""
    agree, against = 0, 0
    frame[:] = 0.0
    for q in near[m]:
        if q < 0:
            break
        if site[q] < 0:
            continue
        y, x = position[m, 0] - position[q, 0], position[m, 1] - position[q, 1]
        if y * y + x * x > reach * reach:
            break
        if site[q] == s and cell[q, 0] == i and cell[q, 1] == j:
            if majority >= 1 or y * y + x * x < (2 * tolerance) ** 2:
                return False  # this place is taken
            against += 1  # another column of that number, beyond a cut
            continue
        t, di, dj, far = _nearest_place(y, x, frames[q], basis, site[q])
        if far > 1.5 * tolerance:
            continue
        if t == s and cell[q, 0] + di == i and cell[q, 1] + dj == j:
            agree += 1
            frame += frames[q]
        else:
            against += 1
    if agree < majority * against:
        return False
    frame /= agree
    return True


@njit(cache=True, nogil=True)
def _adapt(
    m: int,
    s: int,
    i: int,
    j: int,
    position: Floats,
    near: Integers,
    site: Integers,
    cell: Integers,
    reach: float,
    tolerance: float,
    frame: Floats,
) -> None:
    """Correct the inherited vectors ``frame`` by the known columns of the same kind around ``m`` (least squares)."""
    aa, ab, bb = _INHERITED, 0.0, _INHERITED
    r = np.zeros((2, 2))
    for q in near[m]:
        if q < 0:
            break
        if site[q] != s:
            continue
        y, x = position[m, 0] - position[q, 0], position[m, 1] - position[q, 1]
        if y * y + x * x > 1.2 * reach * reach:
            break
        a, b = float(i - cell[q, 0]), float(j - cell[q, 1])
        if abs(a) > 2 or abs(b) > 2:
            continue  # beyond a cut
        y -= a * frame[0, 0] + b * frame[1, 0]
        x -= a * frame[0, 1] + b * frame[1, 1]
        if y * y + x * x > 2 * tolerance * tolerance:
            continue
        aa, ab, bb = aa + a * a, ab + a * b, bb + b * b
        r[0, 0] += a * y
        r[0, 1] += a * x
        r[1, 0] += b * y
        r[1, 1] += b * x
    det = aa * bb - ab * ab
    for c in range(2):
        frame[0, c] += (bb * r[0, c] - ab * r[1, c]) / det
        frame[1, c] += (aa * r[1, c] - ab * r[0, c]) / det


@njit(cache=True, nogil=True)
def _alike(frame: Floats, vectors: Floats) -> bool:
    """Whether the deformation of ``vectors`` into ``frame`` is, but for a turn, a small strain (not, say, a twin)."""
    det = vectors[0, 0] * vectors[1, 1] - vectors[0, 1] * vectors[1, 0]
    a = (vectors[1, 1] * frame[0, 0] - vectors[0, 1] * frame[1, 0]) / det
    b = (vectors[1, 1] * frame[0, 1] - vectors[0, 1] * frame[1, 1]) / det
    c = (vectors[0, 0] * frame[1, 0] - vectors[1, 0] * frame[0, 0]) / det
    d = (vectors[0, 0] * frame[1, 1] - vectors[1, 0] * frame[0, 1]) / det
    square, area = a * a + b * b + c * c + d * d, abs(a * d - b * c)
    plus, minus = np.sqrt(square + 2 * area), np.sqrt(max(square - 2 * area, 0.0))
    return bool(plus + minus < 2 * STRETCH[1] and plus - minus > 2 * STRETCH[0])


@njit(cache=True, nogil=True)
def walk(
    position: Floats, near: Integers, vectors: Floats, basis: Floats, start: int, nearest: float, levels: Floats
) -> tuple[Any, Any, Any, Any]:
    """Cells and places of all columns that can be reached from ``start``.

    Parameters
    ----------
    position : (n, 2) [px]. near : (n, m) numbers of the neighbours of each column by distance, -1 where there are none.
    vectors : (2, 2) [px] and basis : (k, 2), the lattice at column ``start``, which sits at place 0 of cell (0, 0).
    nearest : distance of neighbouring columns [px]. levels : (rounds, 2), see :data:`LEVELS`.

    Returns
    -------
    cell : (n, 2) int. site : (n,) int, -1 where not reached. frame : (n, 2, 2) local vectors [px]. support : (n,) share
    of the columns around that fit.
    """
    n = len(position)
    cell = np.zeros((n, 2), np.int64)
    site = np.full(n, -1, np.int64)
    frames = np.zeros((n, 2, 2))
    support = np.zeros(n)
    frames[start], site[start] = vectors, 0
    queue = np.zeros(n, np.int64)
    queue[0] = start
    known = 1
    reach = REACH * np.sqrt(max((vectors[0] ** 2).sum(), (vectors[1] ** 2).sum()))
    frame = np.zeros((2, 2))
    for level in range(len(levels)):
        tolerance, majority = levels[level, 0] * nearest, levels[level, 1]
        head = 0
        while head < known:
            k = queue[head]
            head += 1
            for m in near[k]:
                if m < 0:
                    break
                if site[m] >= 0:
                    continue
                y, x = position[m, 0] - position[k, 0], position[m, 1] - position[k, 1]
                if y * y + x * x > reach * reach:
                    break
                s, i, j, far = _nearest_place(y, x, frames[k], basis, site[k])
                if far > tolerance:
                    continue
                i += cell[k, 0]
                j += cell[k, 1]
                if not _agreed(
                    m, s, i, j, position, near, site, cell, frames, basis, reach, tolerance, majority, frame
                ):
                    continue
                _adapt(m, s, i, j, position, near, site, cell, reach, tolerance, frame)
                support[m] = _support(m, position, near, frame, basis, s, reach, _FIT * nearest)
                if support[m] < SUPPORT or not _alike(frame, vectors):
                    continue
                site[m], cell[m, 0], cell[m, 1] = s, i, j
                frames[m] = frame
                queue[known] = m
                known += 1
    for k in range(n):
        if site[k] >= 0:
            support[k] = _support(k, position, near, frames[k], basis, site[k], reach, _FIT * nearest)
    return cell, site, frames, support
