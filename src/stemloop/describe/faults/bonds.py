"""The net of bonds of a lattice: which columns are neighbours, and how many lattice vectors apart.

A bond's length in lattice vectors is read in the local frame and rounded to whole numbers; ``miss`` is what was rounded
away. Nothing is counted from far, so the net is right around dislocations too, where running cell indices are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import Delaunay, QhullError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Net(NamedTuple):
    """Delaunay triangles of points and their bonds.

    bond : (e, 2) the two points of each. cells : (e, 2) the way from the first to the second in lattice vectors, and
    step : (e, 2) the same in whole numbers; miss is the difference. triangle : (t, 3) its points, round from +x
    towards +y; side : (t, 3) its bonds, from point k to point k + 1, and sense : (t, 3) +1 where the bond runs that
    way, else -1. rim : (e,) bonds that belong to one triangle only.
    """

    bond: Integers
    cells: Floats
    step: Integers
    triangle: Integers
    side: Integers
    sense: Integers
    rim: Mask

    @property
    def miss(self) -> Floats:
        """(e, 2) [cells]: how far each bond is from a lattice vector."""
        return self.cells - self.step

    @property
    def closure(self) -> Integers:
        """(t, 2) sum of the steps around each triangle: zero in a crystal without dislocations."""
        return np.asarray((self.step[self.side] * self.sense[:, :, None]).sum(axis=1))

    def around(self, chosen: Mask) -> tuple[Integers, Integers]:
        """Bonds on the border of the triangles ``chosen`` (t,), and the sense in which a round from +x towards +y runs
        through them."""
        side, sense = self.side[chosen].ravel(), self.sense[chosen].ravel()
        total = np.bincount(side, sense, minlength=len(self.bond)).astype(np.int64)
        border = np.flatnonzero(total)
        return border, total[border]


def net(position: Floats, vectors: Floats, longest: float = 2.6) -> Net:
    """The net of the points ``position`` (n, 2) [px] of a lattice.

    Parameters
    ----------
    position : (n, 2) (row, col) [px], one to a cell.
    vectors : (n, 2, 2) or (2, 2) rows a1, a2 [px] around each point.
    longest : triangles with a bond that is longer in either lattice vector are left out (holes, the hull's slivers).
    """
    n = len(position)
    try:
        triangle = Delaunay(position).simplices.astype(np.int64) if n >= 3 else np.zeros((0, 3), np.int64)
    except QhullError:  # all points in a line
        triangle = np.zeros((0, 3), np.int64)
    a, b, c = (position[triangle[:, k]] for k in range(3))
    doubled = (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0]) - (c[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
    triangle[doubled < 0] = triangle[doubled < 0][:, ::-1]
    start, end = triangle, np.roll(triangle, -1, axis=1)
    key, side = np.unique(np.minimum(start, end) * n + np.maximum(start, end), return_inverse=True)
    side = side.reshape(triangle.shape).astype(np.int64)
    bond = np.column_stack([key // max(n, 1), key % max(n, 1)]).astype(np.int64)
    inverse = np.linalg.inv(np.broadcast_to(vectors, (n, 2, 2)))
    frame = (inverse[bond[:, 0]] + inverse[bond[:, 1]]) / 2
    cells = np.einsum("ea,eab->eb", position[bond[:, 1]] - position[bond[:, 0]], frame)
    short = (np.abs(cells) < longest).all(axis=1)
    whole = short[side].all(axis=1)
    sense = np.where(start < end, 1, -1)[whole]
    used, again = np.unique(side[whole], return_inverse=True)
    side = again.reshape(-1, 3).astype(np.int64)
    count = np.bincount(side.ravel(), minlength=len(used))
    step = np.rint(cells[used]).astype(np.int64)
    return Net(bond[used], cells[used], step, triangle[whole], side, sense, count == 1)


#: Hermite's normal forms: every sublattice of index 2, 3 and 4 once.
_SPARSER = np.array(
    [[[a, b], [0, d // a]] for d in (4, 3, 2) for a in range(1, d + 1) if d % a == 0 for b in range(d // a)]
)
#: Share of the bonds that a lattice must explain.
_NEARLY_ALL = 0.85


def sparsest(whole: Net) -> Integers:
    """(2, 2) the change of vectors into those of the sparsest lattice, of index up to 4, of which nearly all steps are.

    A lattice that two halves of a faulted crystal share is finer than that of either; only bonds across the fault need
    its additional points.
    """
    for change in _SPARSER:
        steps = whole.step @ np.linalg.inv(change)
        if len(steps) and (np.abs(steps - np.rint(steps)) < 1e-6).all(axis=1).mean() > _NEARLY_ALL:
            return np.asarray(change)
    return np.eye(2, dtype=np.int64)


def holes(whole: Net, position: Floats) -> list[Integers]:
    """Rim bonds around each hole of the net, where no triangles are: every rim but the outer ones.

    Seen with the net on its left, an outer rim runs around a positive area and a hole's around a negative one. A hole
    that touches an outer rim is part of it.
    """
    border = np.flatnonzero(whole.rim)
    if len(border) == 0:
        return []
    sense = np.zeros(len(whole.bond), dtype=np.int64)
    np.add.at(sense, whole.side.ravel(), whole.sense.ravel())
    ends = whole.bond[border]
    way = np.where((sense[border] > 0)[:, None], ends, ends[:, ::-1])
    start, end = position[way[:, 0]], position[way[:, 1]]
    area = (start[:, 1] * end[:, 0] - start[:, 0] * end[:, 1]) / 2
    n = len(position)
    joined = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(n, n))
    label = connected_components(joined, directed=False)[1][ends[:, 0]]
    return [border[label == k] for k in np.unique(label) if area[label == k].sum() < 0]


def islands(triangle: Integers, chosen: Mask, points: int) -> Iterator[Integers]:
    """Groups (triangle numbers) of the ``chosen`` triangles that share a point."""
    some = np.flatnonzero(chosen)
    if len(some) == 0:
        return
    rows = np.repeat(np.arange(len(some)), 3)
    table = coo_matrix((np.ones(len(rows)), (rows, triangle[some].ravel())), shape=(len(some), points)).tocsr()
    count, label = connected_components(table @ table.T, directed=False)
    for k in range(count):
        yield some[label == k]


def crossings(whole: Net, crossed: Mask) -> Iterator[tuple[Integers, Integers]]:
    """Lines through the net that cut the bonds ``crossed`` (e,), one after the other.

    Two crossed bonds follow each other where a triangle has just these two. Yields the bonds in order and a sign for
    each, so that times their signs they all run from one side of the line to the other.
    """
    cut = crossed[whole.side]
    passing = np.flatnonzero(cut.sum(axis=1) == 2)
    beside: dict[int, list[tuple[int, int]]] = {}
    for t in passing:
        first, second = whole.side[t][cut[t]].tolist()
        beside.setdefault(first, []).append((second, int(t)))
        beside.setdefault(second, []).append((first, int(t)))
    left = set(beside)
    ends = [e for e in beside if len(beside[e]) == 1]
    for start in [*ends, *beside]:
        if start not in left:
            continue
        line, here = [start], start
        left.discard(start)
        while True:
            onward = [e for e, _ in beside[here] if e in left]
            if not onward:
                break
            here = onward[0]
            left.discard(here)
            line.append(here)
        order = np.array(line, dtype=np.int64)
        yield order, _sides(whole.bond[order])


def _sides(bond: Integers) -> Integers:
    """+1 or -1 for each bond of a line so that all begin on one side: neighbours share a point, which is on one."""
    sense = np.ones(len(bond), dtype=np.int64)
    for k in range(1, len(bond)):
        same_start = bond[k, 0] == bond[k - 1, 0] or bond[k, 1] == bond[k - 1, 1]
        sense[k] = sense[k - 1] if same_start else -sense[k - 1]
    return sense
