"""How often a vector turns along closed loops of a grid: topological charges that noise cannot make.

The winding number of a loop is the sum of the smallest turns from each vector to the next, over 2 pi. It is that of
the polygon that the vectors draw around zero, so it stays as it is until noise pushes an edge of that polygon across
zero: the polygon's distance from zero, in deviations, says how sure it is (N. D. Mermin, Rev. Mod. Phys. 51 (1979)
591, doi:10.1103/RevModPhys.51.591, for the topology).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]


def smallest(angle: Floats) -> Floats:
    """``angle`` [rad] brought to -pi ... pi."""
    return np.asarray((angle + np.pi) % (2 * np.pi) - np.pi)


def along(angle: Floats) -> int:
    """Winding number of the vectors whose directions [rad] are met on a closed loop, in order.

    >>> along(np.deg2rad([10.0, 100.0, 190.0, 280.0]))
    1
    """
    return round(float(smallest(np.diff(angle, append=angle[:1])).sum()) / (2 * np.pi))


def plaquettes(angle: Floats) -> Integers:
    """(n - 1, m - 1) winding numbers around the squares of four neighbours of a grid (n, m) of directions [rad].

    A loop runs from the first axis towards the second. Squares with a NaN have 0. The sum over a block of squares is
    the winding along its rim (inner edges are passed both ways).
    """
    return _Edges(np.stack([np.sin(angle), np.cos(angle)], axis=-1), np.ones((*angle.shape, 2))).rings(1)[0]


def smooth(vector: Floats, sigma: Floats, width: float) -> tuple[Floats, Floats]:
    """Average of a grid of vectors (n, m, 2) over a Gaussian of ``width`` [cells], weighted by its deviations.

    Returns the average and its deviation; NaN where less than two fifths of the Gaussian holds vectors, so that single
    holes are filled and rims do not grow.
    """
    reach = int(np.ceil(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(width, 1e-9)) ** 2)
    kernel /= kernel.sum()

    def spread(values: Floats, by: Floats) -> Floats:
        return np.asarray(
            ndimage.convolve1d(ndimage.convolve1d(values, by, axis=0, mode="constant"), by, axis=1, mode="constant")
        )

    known: Bools = np.asarray(np.isfinite(vector + sigma).all(axis=-1) & (sigma > 0).all(axis=-1))
    weight = np.where(known[..., None], 1 / np.where(known[..., None], sigma, 1.0) ** 2, 0.0)
    total = spread(weight, kernel)
    held = (spread(known.astype(np.float64), kernel) > 0.4)[..., None]
    safe = np.where(total > 0, total, 1.0)
    mean = np.where(held, spread(weight * np.where(known[..., None], vector, 0.0), kernel) / safe, np.nan)
    left = np.where(held, np.sqrt(spread(weight, kernel**2)) / safe, np.nan)
    return mean, left


class Charge(NamedTuple):
    """A topological charge: ``winding`` along the rim of the square of ``size`` cells whose first corner is the grid
    point ``corner`` (2,); ``margin`` is the distance of the rim's polygon from zero in deviations."""

    winding: int
    corner: tuple[int, int]
    size: int
    margin: float


class _Edges:
    """Turns [rad] and distances from zero [deviations] of the edges between neighbours of a grid of vectors."""

    def __init__(self, vector: Floats, sigma: Floats) -> None:
        angle = np.arctan2(vector[..., 0], vector[..., 1])
        scaled = vector / sigma
        self.shape = angle.shape
        self.turn, self.far = [], []
        for axis in (0, 1):
            turn = smallest(np.diff(angle, axis=axis))
            before, after = np.delete(scaled, -1, axis), np.delete(scaled, 0, axis)
            self.turn.append(np.where(np.isfinite(turn), turn, 0.0))
            far = _distance_from_zero(before, after)
            self.far.append(np.where(np.isfinite(far), far, 0.0))

    def rings(self, size: int) -> tuple[Integers, Floats]:
        """Winding numbers (n - size, m - size) along the rims of all squares of ``size``, and their margins."""
        sums = [sliding_window_view(t, size, axis=k).sum(-1) for k, t in enumerate(self.turn)]
        least = [sliding_window_view(f, size, axis=k).min(-1) for k, f in enumerate(self.far)]
        total = sums[0][:, :-size] + sums[1][size:] - sums[0][:, size:] - sums[1][:-size]
        sides = (least[0][:, :-size], least[1][size:], least[0][:, size:], least[1][:-size])
        margin = np.minimum.reduce(sides)
        return np.where(margin > 0, np.rint(total / (2 * np.pi)), 0).astype(np.int64), margin


def _distance_from_zero(one: Floats, other: Floats) -> Floats:
    """Distance of zero from the straight lines between points ``one`` and ``other`` (..., 2)."""
    along_it = other - one
    length = (along_it**2).sum(-1)
    part = np.clip(-(one * along_it).sum(-1) / np.where(length > 0, length, 1.0), 0, 1)
    return np.asarray(np.hypot(*np.moveaxis(one + part[..., None] * along_it, -1, 0)))


def charges(vector: Floats, sigma: Floats, least: float = 3.0) -> list[Charge]:
    """All charges of a grid of vectors (n, m, 2) whose margin is at least ``least`` deviations.

    Squares are asked from the smallest on. A larger one counts only for what is not yet explained by charges inside
    it, so each charge is found on the smallest loop on which it is sure.
    """
    edges = _Edges(vector, sigma)
    found: list[Charge] = []
    for size in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32):
        if size >= min(edges.shape):
            break
        winding, margin = edges.rings(size)
        rows, columns = np.nonzero((winding != 0) & (margin >= least))
        for k in np.argsort(-margin[rows, columns], kind="stable"):
            i, j = int(rows[k]), int(columns[k])
            inside = [c for c in found if _within(c, i, j, size)]
            if any(_across(c, i, j, size) for c in found if c not in inside):
                continue
            left = int(winding[i, j]) - sum(c.winding for c in inside)
            if left:
                found.append(Charge(left, (i, j), size, float(margin[i, j])))
    return found


def _within(charge: Charge, i: int, j: int, size: int) -> bool:
    (a, b), s = charge.corner, charge.size
    return i <= a and j <= b and a + s <= i + size and b + s <= j + size


def _across(charge: Charge, i: int, j: int, size: int) -> bool:
    (a, b), s = charge.corner, charge.size
    return a < i + size and i < a + s and b < j + size and j < b + s


def held(
    sigma: Floats, width: float, smoothed: Floats, found: list[Charge], draws: int, rng: np.random.Generator
) -> Floats:
    """(charges,) share of ``draws`` repetitions that keep the winding along the rim of each of ``found`` when noise of
    ``sigma`` (n, m, 2) is smoothed as the vectors were and added to them (one success and one failure more are
    counted, so it is never 0 or 1)."""
    rims = [_rim(charge, smoothed.shape[1]) for charge in found]
    before = _turns(smoothed, rims)
    kept = np.ones(len(found))
    for _ in range(draws):
        noise = smooth(sigma * rng.standard_normal(sigma.shape), sigma, width)[0]
        kept += _turns(smoothed + noise, rims) == before
    return np.asarray(kept / (draws + 2))


def _rim(charge: Charge, columns: int) -> Integers:
    """Flat indices of the grid points around a charge, in order, from the first axis towards the second."""
    (i, j), s = charge.corner, charge.size
    way = np.arange(s)
    rows = np.concatenate([i + way, np.full(s, i + s), i + s - way, np.full(s, i)])
    across = np.concatenate([np.full(s, j), j + way, np.full(s, j + s), j + s - way])
    return rows * columns + across


def _turns(vector: Floats, rims: list[Integers]) -> Integers:
    """Winding numbers along ``rims``."""
    angle = np.arctan2(vector[..., 0], vector[..., 1]).ravel()
    if not rims:
        return np.zeros(0, dtype=np.int64)
    ends = np.cumsum([len(r) for r in rims])
    flat = angle[np.concatenate(rims)]
    after = np.concatenate([np.roll(r, -1) for r in rims])
    total = np.add.reduceat(smallest(angle[after] - flat), np.concatenate([[0], ends[:-1]]))
    return np.rint(np.nan_to_num(total) / (2 * np.pi)).astype(np.int64)
