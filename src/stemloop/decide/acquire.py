"""Which positions to measure next, and in which order to visit them.

Every acquisition answers indices into the candidates, along a short path from where the beam is. A batch is chosen
greedily: after each choice the belief is conditioned on a *fantasy* of it, which moves the deviations as the real
measurement will (they do not depend on the value).
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """The posterior variance of fixed points as it will be after each imagined measurement, one rank-1 update each.

    belief : a :class:`~stemloop.decide.gp.GaussianProcess`. points : (m, 2) [m]. An imagined measurement has the median
    deviation of the real ones. ``variance`` (m,) is the field's, without noise. Each update costs O(m n).
    """

    def __init__(self, belief: Any, points: Array) -> None:
        h = belief.hyperparameters
        self.belief, self.points = belief, points
        self.noise_variance = (h.trust * float(np.median(belief.sigmas))) ** 2 + h.noise**2 + 1e-9 * h.amplitude**2
        self._whitened = belief.whiten(points)
        explained = np.einsum("ij,ij->j", self._whitened, self._whitened)
        self.variance = np.maximum(h.amplitude**2 + h.mean_sigma**2 - explained, 0.0)
        self._rows: list[Array] = []

    def measure(self, index: int) -> None:
        """Imagine a measurement at ``points[index]``: ``var(x) -= cov(x, c)^2 / (var(c) + noise^2)``."""
        row = self.belief.prior(self.points[index : index + 1], self.points)[0]
        row -= self._whitened[:, index] @ self._whitened
        for earlier in self._rows:
            row -= earlier[index] * earlier
        row /= math.sqrt(self.variance[index] + self.noise_variance)
        self._rows.append(row)
        self.variance = np.maximum(self.variance - row**2, 0.0)


def _imagine(belief: Any, points: Array) -> Any:
    """Fantasies of a belief: of its own kind if it has one (``imagine``), else those of a Gaussian process."""
    return belief.imagine(points) if hasattr(belief, "imagine") else Fantasies(belief, points)


def _greedy(fantasies: Any, n: int, score: Callable[[Array], Array]) -> Indices:
    """``n`` different candidates, each the best by ``score(variance)`` after those before it were imagined."""
    chosen = np.empty(n, dtype=np.int64)
    for k in range(n):
        worth = score(fantasies.variance)
        worth[chosen[:k]] = -np.inf
        chosen[k] = worth.argmax()
        if k + 1 < n:
            fantasies.measure(int(chosen[k]))
    return chosen


@ACQUISITIONS.register("uncertainty")
def uncertainty(belief: Any, candidates: Array, n: int, start: Position, rng: np.random.Generator) -> Indices:
    """The places where least is known, each after the ones before it are imagined as measured.

    It brings down the largest deviation over the field, which the stop rule looks at, corners and edges included, with
    fewer points than greedy drops of the mean variance or of a power of it, and the mean variance falls as fast.
    A. Krause, A. Singh and C. Guestrin, JMLR 9 (2008) 235 (greedy choice by entropy).
    """
    n = _asked(candidates, n)
    return _visited(_greedy(_imagine(belief, candidates), n, np.copy), candidates, start)


def expected_improvement_of(mean: Array, sigma: Array, best: float) -> Array:
    """E[max(f - best, 0)] for f ~ N(mean, sigma^2): ``(mean - best) Phi(z) + sigma phi(z)``, z = (mean - best)/sigma.

    D. R. Jones, M. Schonlau and W. J. Welch, J. Global Optim. 13 (1998) 455, doi:10.1023/A:1008306431147.
    """
    gain = np.asarray(mean) - best
    z = np.clip(gain / np.maximum(sigma, 1e-300), -1e3, 1e3)
    improvement = gain * ndtr(z) + sigma * np.exp(-0.5 * np.square(z)) / math.sqrt(2 * math.pi)
    return np.where(sigma > 0, np.maximum(improvement, 0.0), np.maximum(gain, 0.0))


@ACQUISITIONS.register("expected-improvement")
def expected_improvement(belief: Any, candidates: Array, n: int, start: Position, rng: np.random.Generator) -> Indices:
    """Where the field is most likely to exceed, by most, the highest mean at the places measured so far.

    In a batch each choice is believed to answer its own mean ("kriging believer": the means stay, the deviations
    fall); D. Ginsbourger, R. Le Riche and L. Carraro (2010), doi:10.1007/978-3-642-10701-6_6.
    """
    n = _asked(candidates, n)
    best = float(belief.predict(belief.positions)[0].max())
    mean, _ = belief.predict(candidates)

    def score(variance: Array) -> Array:
        return expected_improvement_of(mean, np.sqrt(variance), best)

    return _visited(_greedy(_imagine(belief, candidates), n, score), candidates, start)
