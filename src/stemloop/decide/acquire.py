"""Which positions to measure next, and in which order to visit them.

Every acquisition answers indices into the candidates, along a short path from where the beam is. A batch is chosen
greedily: after each choice the belief is conditioned on a *fantasy* of it, which moves the deviations as the real
measurement will (they do not depend on the value).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import qmc

from stemloop.core.errors import InputError
from stemloop.core.instruction import Position
from stemloop.core.protocols import Acquisition
from stemloop.core.registry import Registry

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

ACQUISITIONS: Registry[Acquisition] = Registry("acquisition")

#: Power of the posterior variance whose sum over the field "uncertainty" brings down: 1 would be the mean variance,
#: infinity the largest. See ``benchmarks/coverage.py`` for how many points each power needs.
SHARPNESS = 6
#: How many places stand for the field, and how many candidates are looked at closely, in each greedy choice.
PLACES = 400
SHORTLIST = 256


def _asked(candidates: Array, n: int) -> int:
    if candidates.ndim != 2 or candidates.shape[1] != 2 or len(candidates) == 0:
        raise InputError(f"candidates must have shape (m, 2) with m > 0; got {candidates.shape}.")
    if n < 1:
        raise InputError(f"at least one position must be asked for; got {n}.")
    return min(n, len(candidates))


# ---------------------------------------------------------------------------------------------------------- path


def path_length(points: Array, start: Position) -> float:
    """Length of the open path from ``start`` through ``points`` (n, 2) in their order, in their unit."""
    return float(np.linalg.norm(np.diff(np.vstack([start, points]), axis=0), axis=1).sum())


def short_path(points: Array, start: Position) -> Indices:
    """An order (n,) of ``points`` (n, 2) that makes a short open path from ``start``: nearest neighbour, then 2-opt.

    Turning a stretch round is taken while it shortens the path (G. A. Croes, Operations Research 6 (1958) 791,
    doi:10.1287/opre.6.6.791); the last point is free, so a stretch may also end there.
    """
    n = len(points)
    stops = np.vstack([start, points])
    apart = np.linalg.norm(stops[:, None] - stops[None], axis=2)
    order = [0]
    left = set(range(1, n + 1))
    while left:
        order.append(min(left, key=lambda j: (apart[order[-1], j], j)))
        left.remove(order[-1])
    path = np.array(order)
    while True:
        # turning path[i..j] round swaps the edges (i-1, i), (j, j+1) for (i-1, j), (i, j+1); the last has none after it
        edge = apart[path[:-1], path[1:]]
        after = np.append(edge[1:], 0.0)
        before_far = apart[path[:-1][:, None], path[1:][None]]
        near_after = np.hstack([apart[path[1:][:, None], path[2:][None]], np.zeros((n, 1))])
        gain = np.triu(edge[:, None] + after[None] - before_far - near_after, 1)
        i, j = divmod(int(gain.argmax()), n)
        if gain[i, j] <= 1e-12 * edge.sum():
            return (path[1:] - 1).astype(np.int64)
        path[i + 1 : j + 2] = path[i + 1 : j + 2][::-1]


def _visited(chosen: Indices, candidates: Array, start: Position) -> Indices:
    return chosen[short_path(candidates[chosen], start)]


# ----------------------------------------------------------------------------------------------- space-filling


def _nearest_free(wanted: Array, candidates: Array) -> Indices:
    """For each wanted place in turn, the nearest candidate that is not yet taken."""
    free = np.ones(len(candidates), bool)
    chosen = np.empty(len(wanted), np.int64)
    for k, place in enumerate(wanted):
        distance = np.where(free, np.square(candidates - place).sum(axis=1), np.inf)
        chosen[k] = distance.argmin()
        free[chosen[k]] = False
    return chosen


def _corners(candidates: Array) -> tuple[Array, Array]:
    return candidates.min(axis=0), candidates.max(axis=0)


def grid_places(low: Array, high: Array, n: int) -> Array:
    """About ``n`` places (k, 2), k >= n, at the centres of nearly square cells that fill the rectangle."""
    height, width = np.maximum(high - low, 1e-30 + 1e-9 * np.max(high - low))
    rows = max(1, round(math.sqrt(n * height / width)))
    columns = math.ceil(n / rows)
    y = low[0] + (np.arange(rows) + 0.5) * height / rows
    x = low[1] + (np.arange(columns) + 0.5) * width / columns
    return np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1).reshape(-1, 2)


def initial_design(candidates: Array, n: int, start: Position, rng: np.random.Generator) -> Indices:
    """The first ``n`` positions, before anything is known: a scrambled Sobol set over the candidates' rectangle.

    I. M. Sobol', USSR Comp. Math. Math. Phys. 7 (1967) 86, doi:10.1016/0041-5553(67)90144-9, with A. B. Owen's
    scrambling, doi:10.1006/jcom.1998.0487.
    """
    n = _asked(candidates, n)
    low, high = _corners(candidates)
    unit = qmc.Sobol(2, scramble=True, rng=rng).random_base2(max(1, math.ceil(math.log2(n))))[:n]
    return _visited(_nearest_free(low + unit * (high - low), candidates), candidates, start)


@ACQUISITIONS.register("random")
def random(belief: Any, candidates: Array, n: int, start: Position, rng: np.random.Generator) -> Indices:
    """Candidates drawn without looking at the belief: the baseline of baselines."""
    n = _asked(candidates, n)
    return _visited(rng.choice(len(candidates), n, replace=False).astype(np.int64), candidates, start)


@ACQUISITIONS.register("grid")
def grid(belief: Any, candidates: Array, n: int, start: Position, rng: np.random.Generator) -> Indices:
    """A regular grid of ``n`` positions over the candidates: a raster, as sparse as the budget. Asks no belief."""
    n = _asked(candidates, n)
    places = grid_places(*_corners(candidates), n)
    if len(places) > n:
        places = places[np.unique(np.linspace(0, len(places) - 1, n).round().astype(int))]
    return _visited(_nearest_free(places, candidates), candidates, start)


# ------------------------------------------------------------------------------------------------- from a belief


class Fantasies:
    """Posterior variances over fixed points that follow each imagined measurement, one rank-1 update each.

    belief : a :class:`~stemloop.decide.gp.GaussianProcess`. points : (m, 2) [m]. The imagined measurements have the
    median deviation of the real ones.
    """

    def __init__(self, belief: Any, points: Array) -> None:
        h = belief.hyperparameters
        self.belief, self.points = belief, points
        self.noise_variance = float(np.median(belief.sigmas)) ** 2 + h.noise**2 + 1e-9 * h.amplitude**2
        self.whitened = belief.whiten(points)
        self.variance = h.amplitude**2 + h.mean_sigma**2 - np.einsum("ij,ij->j", self.whitened, self.whitened)
        self._rows: list[Array] = []

    def covariance(self, a: Any, b: Any) -> Array:
        """Posterior covariance between ``points[a]`` and ``points[b]``, all imagined measurements included."""
        joint = self.belief.prior(self.points[a], self.points[b]) - self.whitened[:, a].T @ self.whitened[:, b]
        for row in self._rows:
            joint -= np.outer(row[a], row[b])
        return joint

    def measure(self, index: int) -> None:
        """Imagine a measurement at ``points[index]``."""
        everywhere = slice(None)
        row = self.covariance(np.array([index]), everywhere)[0]
        row /= math.sqrt(max(self.variance[index], 0.0) + self.noise_variance)
        self._rows.append(row)
        self.variance = self.variance - row**2


@ACQUISITIONS.register("uncertainty")
def uncertainty(
    belief: Any,
    candidates: Array,
    n: int,
    start: Position,
    rng: np.random.Generator,
    *,
    sharpness: float = SHARPNESS,
) -> Indices:
    """The batch that most reduces what is not known.

    Brings down ``sum_x var(x)^p``: a measurement at c changes var(x) by ``-cov(x, c)^2 / (var(c) + noise^2)``, so the
    score of c is the drop of that sum. With a large power p it is the largest deviations, those that the stop rule
    looks at, that count; a point a little inside a corner serves the corner and its neighbours.
    A. Krause et al., JMLR 9 (2008) 235; D. A. Cohn, Neural Networks 9 (1996) 1071, doi:10.1016/0893-6080(95)00137-9.
    """
    n = _asked(candidates, n)
    fantasies = Fantasies(belief, candidates)
    low, high = _corners(candidates)
    stride = max(1, len(candidates) // PLACES)
    free = np.ones(len(candidates), bool)
    chosen = []
    for _ in range(n):
        best = _best(fantasies, free, sharpness, stride)
        chosen.append(best)
        free[best] = False
        fantasies.measure(best)
    return _visited(np.array(chosen, dtype=np.int64), candidates, start)


def _best(fantasies: Fantasies, free: NDArray[np.bool_], sharpness: float, stride: int) -> int:
    variance = np.maximum(fantasies.variance, 0.0)
    eligible = np.flatnonzero(free)
    if math.isinf(sharpness):
        return int(eligible[variance[eligible].argmax()])
    top = variance.max() or 1.0
    weight = (variance / top) ** sharpness
    k = min(PLACES, len(weight))
    places = np.argpartition(-weight, k - 1)[:k]
    k = min(SHORTLIST, len(eligible))
    short = eligible[np.argpartition(-variance[eligible], k - 1)[:k]]
    joint = fantasies.covariance(places, short)
    drop = joint**2 / (variance[short] + fantasies.noise_variance)
    after = np.maximum(variance[places][:, None] - drop, 0.0)
    score = (weight[places][:, None] - (after / top) ** sharpness).sum(axis=0)
    return int(short[score.argmax()])
