"""Dislocations: where the steps around a loop of bonds do not add up to nothing.

The Burgers vector is ``b = closed integral of du`` over a loop from +x towards +y, u the displacement from the perfect
lattice: the right-handed circuit around a line that runs along the beam (J. P. Hirth and J. Lothe, *Theory of
Dislocations*, 2nd ed. (1982), section 1.3). With steps m in lattice vectors a it is ``b = - sum m a``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stemloop.core.structure import Defect
from stemloop.describe.faults.bonds import Net, islands

Floats = NDArray[np.float64]

#: Bonds of the loop around a core that are farther than this part of a cell from a lattice vector tell nothing.
_LARGEST_MISS = 0.4
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
    lattice vectors beyond doubt (it is widened by up to three rings for that). Cores inside one loop count as one. A
    core at the rim of the crystal, around which no loop runs, is left out.

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
    outer = np.zeros(len(position), dtype=bool)
    outer[whole.bond[whole.rim].ravel()] = True
    seen = np.zeros(len(opened), dtype=bool)
    found: list[tuple[NDArray[np.int64], Defect]] = []
    for island in islands(whole.triangle, opened, len(position)):
        inside = np.zeros(len(opened), dtype=bool)
        inside[island] = True
        for _ in range(_RINGS):
            inside = _grown(whole, inside, len(position))
            border, sense = whole.around(inside)
            worst = np.abs(whole.miss[border]).max(axis=1)
            if worst.max() <= _LARGEST_MISS:
                break
        if seen[island].any() or outer[whole.triangle[island]].any() or worst.max() > _LARGEST_MISS:
            continue
        within = np.flatnonzero(inside & opened)
        found = [(known, defect) for known, defect in found if not inside[known].any()]  # a wider loop holds them
        seen[within] = True
        cells = -(whole.step[border] * sense[:, None]).sum(axis=0)
        if not cells.any():
            continue
        share = np.maximum(whole.closure[within] @ -cells, 0)
        core = (position[whole.triangle[within]].mean(axis=1) * (share / share.sum())[:, None]).sum(axis=0)
        sure = float(np.prod(1 - stats.norm.sf((0.5 - worst) / spread) - stats.norm.sf((0.5 + worst) / spread)))
        detail = {"burgers": tuple((cells @ vectors).tolist()), "loop": len(border)}
        found.append((within, Defect("dislocation", core[None, :], sure, detail)))
    return tuple(defect for _, defect in found)


def _grown(whole: Net, chosen: NDArray[np.bool_], points: int) -> NDArray[np.bool_]:
    """The triangles ``chosen`` (t,) and all that share a point with them."""
    near = np.zeros(points, dtype=bool)
    near[whole.triangle[chosen].ravel()] = True
    return np.asarray(near[whole.triangle].any(axis=1))
