"""Dislocations: where the steps around a loop of bonds do not add up to nothing.

The Burgers vector is ``b = closed integral of du`` over a loop from +x towards +y, u the displacement from the perfect
lattice: the right-handed circuit around a line that runs along the beam (J. P. Hirth and J. Lothe, *Theory of
Dislocations*, 2nd ed. (1982), section 1.3). With steps m in lattice vectors a it is ``b = - sum m a``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stemloop.core.structure import Defect
from stemloop.describe.faults.bonds import Net, holes, islands

Floats = NDArray[np.float64]

#: Bonds of the loop around a core that are farther than this part of a cell from a lattice vector tell nothing.
_LARGEST_MISS = 0.4
#: Bonds around a hole in the net, where columns were lost in a core; larger holes are no cores.
_LARGEST_HOLE = 16
#: Most rings of triangles by which the loop is widened until its bonds are clear.
_RINGS = 3


def burgers(whole: Net, vectors: Floats, chosen: NDArray[np.bool_] | None = None) -> Floats:
    """(row, col) [px] Burgers vector of all that lies in the triangles ``chosen`` (t,) of a net, by default in all.

    It is read along their border. The sum over parts is that of the whole, for a bond between two parts is walked once
    in each sense.
    """
    border, sense = whole.around(np.ones(len(whole.triangle), bool) if chosen is None else chosen)
    return np.asarray(-(whole.step[border] * sense[:, None]).sum(axis=0) @ vectors)


def dislocations(position: Floats, vectors: Floats, whole: Net) -> tuple[Defect, ...]:
    """The dislocations of a net.

    Triangles whose steps do not add up to nothing are joined where they touch (a column that is out of place opens
    several that close together); what stays open is a dislocation, if the loop around it consists of bonds that are
    lattice vectors beyond doubt (it is widened by up to three rings for that). A core may be a hole, where columns were
    lost or are too far apart to be neighbours. Cores inside one loop count as one. A core at the rim of the crystal,
    around which no loop runs, is left out.

    Parameters
    ----------
    position : (n, 2) the net's points [px]. vectors : (2, 2) the lattice's vectors far from any core. whole : the net.

    Returns
    -------
    Defects of kind ``dislocation``: place (1, 2) of the core, good to about a cell; detail ``burgers`` (row, col) [px]
    and ``loop``, the number of bonds around it. p : the chance that no bond of the loop
    was rounded wrongly.
    """
    opened = (whole.closure != 0).any(axis=1)
    spread = max(0.03, 1.4826 * float(np.median(np.abs(whole.miss)))) if len(whole.miss) else 0.03
    gaps = [hole for hole in holes(whole, position) if len(hole) <= _LARGEST_HOLE]
    rim = whole.rim.copy()
    for hole in gaps:
        rim[hole] = False
    outer = np.zeros(len(position), dtype=bool)
    outer[whole.bond[rim].ravel()] = True
    seen = np.zeros(len(opened), dtype=bool)
    found: list[tuple[NDArray[np.int64], Defect]] = []
    for triangles, points, edge in _cores(whole, opened, gaps, len(position)):
        if seen[triangles].any() or outer[points].any():
            continue
        inside = np.zeros(len(opened), dtype=bool)
        inside[triangles] = True
        touched = np.zeros(len(position), dtype=bool)
        touched[points] = True
        for _ in range(_RINGS):
            inside |= touched[whole.triangle].any(axis=1)
            touched[whole.triangle[inside].ravel()] = True
            border, sense = whole.around(inside)
            loop = ~np.isin(border, edge)
            border, sense = border[loop], sense[loop]
            worst = np.abs(whole.miss[border]).max(axis=1)
            if worst.max() <= _LARGEST_MISS:
                break
        if worst.max() > _LARGEST_MISS:
            continue
        within = np.flatnonzero(inside & opened)
        found = [(known, defect) for known, defect in found if not inside[known].any()]  # a wider loop holds them
        seen[within] = True
        cells = -(whole.step[border] * sense[:, None]).sum(axis=0)
        if not cells.any():
            continue
        share = np.maximum(whole.closure[within] @ -cells, 0)
        if share.any() and not len(edge):
            core = (position[whole.triangle[within]].mean(axis=1) * (share / share.sum())[:, None]).sum(axis=0)
        else:
            core = position[points].mean(axis=0)
        sure = float(np.prod(1 - stats.norm.sf((0.5 - worst) / spread) - stats.norm.sf((0.5 + worst) / spread)))
        detail = {"burgers": tuple((cells @ vectors).tolist()), "loop": len(border)}
        found.append((within, Defect("dislocation", core[None, :], sure, detail)))
    return tuple(defect for _, defect in found)


def _cores(
    whole: Net, opened: NDArray[np.bool_], gaps: list[NDArray[np.int64]], count: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Opened triangles that touch, joined with the holes they touch; and holes alone: triangles, points, rim bonds."""
    free = dict(enumerate(gaps))
    for island in islands(whole.triangle, opened, count):
        points = np.unique(whole.triangle[island])
        edge = [np.zeros(0, np.int64)]
        for k, hole in list(free.items()):
            if np.isin(whole.bond[hole], points).any():
                edge.append(free.pop(k))
        edges = np.concatenate(edge)
        yield island, np.union1d(points, whole.bond[edges].ravel()), edges
    for hole in free.values():
        yield np.zeros(0, np.int64), np.unique(whole.bond[hole]), hole
