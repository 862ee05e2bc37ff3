"""A mixture of Gaussians for measured points with deviations, on a smooth trend over the image.

Each point has ``d`` coordinates, some of which may not be known (NaN). Coordinate ``c`` of a point at ``t`` that is of
class ``k`` is ``mean[k, c] + slope[:, c] . f(t)`` plus a Gaussian of ``spread[c]`` and of the point's own deviation.
The trend f is of second order over the image: slopes of thickness and distortions of the scan are no classes.
The first ``shared`` coordinates have one trend in common (a thickness makes the columns of all sites brighter alike).
(J. Bovy, D. W. Hogg, S. T. Roweis, Ann. Appl. Stat. 5 (2011) 1657, doi:10.1214/10-AOAS439, for the deviations.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Points of no class: their share, and how much wider than all points their Gaussian is.
_STRAY, _STRAY_WIDE = 0.01, 3.0


class Points(NamedTuple):
    """``value``, ``sigma`` (n, d), NaN where not known; ``trend`` (n, t) the smooth functions at each; ``shared``
    coordinates have one trend."""

    value: Floats
    sigma: Floats
    trend: Floats
    shared: int

    def take(self, index: NDArray[np.int64] | slice) -> Points:
        """The points at ``index``."""
        return self._replace(value=self.value[index], sigma=self.sigma[index], trend=self.trend[index])


class Mixture(NamedTuple):
    """``share`` (k,), ``mean`` (k, d), ``spread`` (d,), ``slope`` (t, d); ``price`` is twice the negative
    log-likelihood, ``middle`` and ``wide`` (d,) those of the stray points."""

    share: Floats
    mean: Floats
    spread: Floats
    slope: Floats
    middle: Floats
    wide: Floats
    price: float


def smooth_functions(position: Floats) -> Floats:
    """(n, 5) x, y, x^2, xy, y^2 of places scaled to -1 ... 1, each with mean zero."""
    middle, half = (position.max(axis=0) + position.min(axis=0)) / 2, np.ptp(position, axis=0) / 2 + 1e-9
    y, x = ((position - middle) / half).T
    functions = np.column_stack([x, y, x * x, x * y, y * y])
    return np.asarray(functions - functions.mean(axis=0))


def log_densities(points: Points, mixture: Mixture) -> Floats:
    """(n, k + 1) of each class times its share, and of the stray points last."""
    known = np.isfinite(points.value)
    flat = np.where(known, points.value - points.trend @ mixture.slope, 0.0)
    noise = np.where(known, points.sigma, 0.0) ** 2
    variance = mixture.spread**2 + noise
    constant = -0.5 * np.where(known, np.log(2 * np.pi * variance), 0.0).sum(axis=1)
    weight = np.where(known, 1 / variance, 0.0)
    out = np.empty((len(flat), len(mixture.share) + 1))
    for k, (share, mean) in enumerate(zip(mixture.share, mixture.mean, strict=True)):
        out[:, k] = np.log(share * (1 - _STRAY)) + constant - 0.5 * (weight * (flat - mean) ** 2).sum(axis=1)
    wide = mixture.wide**2 + noise
    stray = (flat - mixture.middle) ** 2 / wide + np.log(2 * np.pi * wide)
    out[:, -1] = np.log(_STRAY) - 0.5 * np.where(known, stray, 0.0).sum(axis=1)
    return out


def fitted(points: Points, member: Floats, steps: int = 40) -> Mixture:
    """Expectation maximisation from the probabilities ``member`` (n, k) of each point's class."""
    known = np.isfinite(points.value)
    value, noise = np.where(known, points.value, 0.0), np.where(known, points.sigma, 1.0)
    spread = np.array([v[m].std() if m.any() else 1.0 for v, m in zip(value.T, known.T, strict=True)]) + 1e-9
    middle = np.array([np.median(v[m]) if m.any() else 0.0 for v, m in zip(value.T, known.T, strict=True)])
    least = np.array([0.1 * np.median(s[m]) if m.any() else 1.0 for s, m in zip(noise.T, known.T, strict=True)]) + 1e-9
    k = member.shape[1]
    mixture = Mixture(
        np.full(k, 1 / k), np.zeros((k, len(spread))), spread / 2, np.zeros((points.trend.shape[1], len(spread))),
        middle, _STRAY_WIDE * spread, np.inf,
    )  # fmt: skip
    for _ in range(steps):
        mean, slope, width = _maximised(value, noise, known, points, member, mixture.spread, least)
        share = np.maximum(member.sum(axis=0), 1e-3)
        before = mixture.price
        mixture = mixture._replace(share=share / share.sum(), mean=mean, slope=slope, spread=width)
        logs = log_densities(points, mixture)
        top = logs.max(axis=1, keepdims=True)
        part = np.exp(logs - top)
        total = part.sum(axis=1, keepdims=True)
        mixture = mixture._replace(price=-2 * float((top + np.log(total)).sum()))
        member = (part / total)[:, :k]
        if abs(before - mixture.price) < 1e-2:
            break
    return mixture


def _maximised(
    value: Floats,
    noise: Floats,
    known: NDArray[np.bool_],
    points: Points,
    member: Floats,
    spread: Floats,
    least: Floats,
) -> tuple[Floats, Floats, Floats]:
    """Means and slopes together by weighted least squares, coordinates with one trend together, then the spreads."""
    k, d, functions = member.shape[1], value.shape[1], points.trend.shape[1]
    mean, slope, width = np.zeros((k, d)), np.zeros((functions, d)), spread.copy()
    for group in (list(range(points.shared)), *([c] for c in range(points.shared, d))):
        size = k * len(group) + functions
        normal, right = np.zeros((size, size)), np.zeros(size)
        for g, c in enumerate(group):
            weight = member * (known[:, c] / (spread[c] ** 2 + noise[:, c] ** 2))[:, None]
            whole = weight.sum(axis=1)
            own = slice(k * g, k * g + k)
            normal[own, own] = np.diag(weight.sum(axis=0))
            normal[own, -functions:] = weight.T @ points.trend
            normal[-functions:, own] = normal[own, -functions:].T
            normal[-functions:, -functions:] += points.trend.T @ (whole[:, None] * points.trend)
            right[own] = weight.T @ value[:, c]
            right[-functions:] += points.trend.T @ (whole * value[:, c])
        normal += 1e-6 * np.trace(normal) / size * np.eye(size)
        solved = np.linalg.solve(normal, right)
        mean[:, group] = solved[:-functions].reshape(len(group), k).T
        slope[:, group] = solved[-functions:, None]
    for c in range(d):
        variance = noise[:, c] ** 2
        pull = spread[c] ** 2 / (spread[c] ** 2 + variance)
        left = (value[:, c] - points.trend @ slope[:, c])[:, None] - mean[:, c]
        mass = member * known[:, c, None]
        rest = (mass * ((pull[:, None] * left) ** 2 + (pull * variance)[:, None])).sum() / max(mass.sum(), 1e-9)
        width[c] = max(float(np.sqrt(rest)), float(least[c]))
    return mean, slope, width
