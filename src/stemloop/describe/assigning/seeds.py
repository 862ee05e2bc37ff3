"""The lattice of a neighbourhood: which shifts take its columns to columns, and which places a cell holds.

Nothing is known before: no crystal, no direction, no number of columns a cell. A few dozen neighbouring columns are
enough, so that a grain, a film or a particle is asked by itself.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from stemloop.describe.assigning.decoration import Indexing, finest
from stemloop.describe.vectors import standard, wrapped

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: A shift belongs to the lattice if it takes this share of the columns to columns.
_SHARED = 0.72
#: A place of the cell counts if it holds columns in this share of the fullest place's cells.
_FILLED = 0.25
_NEIGHBOURS = 48
_FEWEST = 8


class Seed(NamedTuple):
    """Lattice around one column: ``vectors`` (2, 2) [px] and ``basis`` (k, 2), fractional; ``column`` is its number
    and it sits at place 0 of the basis, (0, 0). ``nearest`` [px] is the distance of neighbouring columns, ``share`` the
    part of the columns that the lattice vectors take to columns."""

    column: int
    vectors: Floats
    basis: Floats
    nearest: float
    share: float


def seed(position: Floats, tree: cKDTree, around: Integers, shape: tuple[int, ...]) -> Seed | None:
    """The lattice of the columns ``around`` (their numbers, from the middle outwards), or None if they show none."""
    if len(around) < _FEWEST or len(position) <= _FEWEST:
        return None
    places = position[around]
    distance, neighbour = (np.asarray(v) for v in tree.query(places, min(_NEIGHBOURS + 1, len(position))))
    nearest = float(np.median(distance[:, 1]))
    shell = min(12, distance.shape[1] - 1)
    side = float(np.sqrt(np.pi / (shell + 0.5)) * np.percentile(distance[:, shell], 30))  # of the square of one column
    reach = min(0.2 * side, 0.35 * nearest)
    difference = (position[neighbour[:, 1:]] - places[:, None]).reshape(-1, 2)
    difference = difference[np.hypot(*difference.T) < 4.2 * side]
    shifts, share = _shifts(places, difference, tree, shape, reach, side)
    chosen = _generators(shifts, reach, side)
    if chosen is None:
        return None
    basis, start = _places(places, chosen, nearest)
    nobody = np.zeros(0, np.int64)
    cells = finest(Indexing(chosen, basis, nobody.reshape(0, 2), nobody, np.zeros((0, 2, 2))), nearest)
    return Seed(int(around[start]), cells.vectors, cells.basis, nearest, float(share.mean()))


def _shifts(
    places: Floats, difference: Floats, tree: cKDTree, shape: tuple[int, ...], reach: float, side: float
) -> tuple[Floats, Floats]:
    """(m, 2) shifts that take most of ``places`` to columns, and which share of them.

    Places that a shift takes out of the image, or where there is no column far and wide, say nothing.
    """
    if len(difference) == 0:
        return np.zeros((0, 2)), np.zeros(0)
    cloud = cKDTree(difference)
    size = np.asarray(cloud.query_ball_point(difference, reach, return_length=True))
    free = size > 0.25 * len(places)
    found, shares = [], []
    for i in np.argsort(-size, kind="stable"):
        if not free[i]:
            continue
        middle = difference[cloud.query_ball_point(difference[i], reach)].mean(axis=0)
        middle = difference[cloud.query_ball_point(middle, reach)].mean(axis=0)
        free[cloud.query_ball_point(middle, 2 * reach)] = False
        free[i] = False
        goal = places + middle
        far = np.asarray(tree.query(goal)[0])
        asked = ((goal > reach) & (goal < np.array(shape) - 1 - reach)).all(axis=1) & (far < 1.2 * side)
        if asked.sum() >= 5 and (far[asked] < reach).mean() >= _SHARED:
            found.append(middle)
            shares.append(float((far[asked] < reach).mean()))
    return np.array(found).reshape(-1, 2), np.array(shares)


def _generators(shifts: Floats, reach: float, side: float) -> Floats | None:
    """Two of the shifts whose whole multiples make the others, fitted to all, reduced and in standard order."""
    if len(shifts) < 4:
        return None
    short = shifts[np.argsort(np.hypot(*shifts.T))][:12]
    best, pair = np.inf, None
    for u, v in itertools.combinations(short, 2):
        area = abs(u[0] * v[1] - u[1] * v[0])
        if area < 0.5 * side**2 or area < 0.3 * np.hypot(*u) * np.hypot(*v) or area > 0.95 * best:
            continue
        fraction = shifts @ np.linalg.inv([u, v])
        if np.mean(np.hypot(*wrapped(fraction, np.array([u, v])).T) < 2 * reach) >= 0.85:
            best, pair = area, np.array([u, v])
    if pair is None:
        return None
    pair = standard(pair) @ pair
    for _ in range(2):
        fraction = shifts @ np.linalg.inv(pair)
        whole = np.rint(fraction)
        good = np.hypot(*((fraction - whole) @ pair).T) < 2 * reach
        if np.linalg.matrix_rank(whole[good]) < 2:
            return None
        pair = np.linalg.lstsq(whole[good], shifts[good], rcond=None)[0]
    return np.asarray(standard(pair, 1.12) @ pair)


def _places(places: Floats, vectors: Floats, nearest: float) -> tuple[Floats, int]:
    """Fractional places (k, 2) of a cell that hold columns, the fullest first at (0, 0), and a column that is there."""
    inverse = np.linalg.inv(vectors)
    off = wrapped((places[None] - places[:, None]) @ inverse, vectors)  # of the second column from the first
    near = np.hypot(off[..., 0], off[..., 1]) < 0.42 * nearest
    free = np.ones(len(places), bool)
    middles: list[Floats] = []
    counts: list[int] = []
    start = 0
    while free.any():
        count = (near & free).sum(axis=1) * free
        i = int(count.argmax())
        members = near[i] & free
        if counts and count[i] < max(3, _FILLED * counts[0]):
            break
        middle = places[i] + off[i][members].mean(axis=0)
        if not counts:
            start = int(np.flatnonzero(members)[0])
        if all(np.hypot(*wrapped((middle - other) @ inverse, vectors)) > 0.6 * nearest for other in middles):
            middles.append(middle)
            counts.append(int(count[i]))
        free &= ~near[i]
    fraction = (np.array(middles) - middles[0]) @ inverse
    return np.asarray(fraction - np.floor(fraction + 1e-6)), start


def common_place(fraction: Floats, vectors: Floats, reach: float) -> Floats | None:
    """The place of the cell (2,) at which at least half of ``fraction`` (n, 2), and eight, meet within ``reach`` [px].

    ``reach`` must be small: a circle of that radius may not cover more than a quarter of the cell.
    """
    if len(fraction) < _FEWEST:
        return None
    reach = min(reach, float(np.sqrt(abs(np.linalg.det(vectors)) / (4 * np.pi))))
    sample = fraction[:: -(-len(fraction) // 800)]
    off = wrapped(sample[None] - sample[:, None], vectors)
    near = np.hypot(off[..., 0], off[..., 1]) < reach
    i = int(near.sum(axis=1).argmax())
    if near[i].sum() < max(_FEWEST, 0.5 * len(sample)):
        return None
    place = sample[i] + off[i][near[i]].mean(axis=0) @ np.linalg.inv(vectors)
    return np.asarray(place - np.floor(place))
