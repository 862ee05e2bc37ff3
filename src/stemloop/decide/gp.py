"""An exact Gaussian process over a scalar field f(y, x).

The model is ``value_i = f(position_i) + noise_i`` with ``f = mean + amplitude * g``, ``g`` a stationary process of unit
variance and ``noise_i ~ N(0, sigma_i^2 + noise^2)``: the deviation that came with each value, and an extra one that is
learned. The constant mean is not fixed but integrated over its normal prior ``N(mean, mean_sigma^2)``, so its doubt is
part of every predicted deviation. See C. E. Rasmussen and C. K. I. Williams, *Gaussian Processes for Machine Learning*
(2006), doi:10.7551/mitpress/3206.001.0001; equation numbers below are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import blas, lapack
from scipy.optimize import minimize

from stemloop.core.errors import CalculationError, InputError
from stemloop.core.registry import Registry

Array = NDArray[np.float64]

#: (correlation k(r), slope k'(r)/r) as functions of r^2, the squared distance in length scales. The slope gives the
#: gradient by a length: dk/d(log l_j) = -(k'(r)/r) (d_j/l_j)^2.
KERNELS: Registry[Callable[[Array], tuple[Array, Array]]] = Registry("kernel")

#: Share of the amplitude's variance that is added to the diagonal so that coincident points stay soluble.
JITTER = 1e-9
#: Covariances computed at a time: few enough that every temporary stays in the cache (six times faster).
BLOCK = 8192


@KERNELS.register("matern52")
def matern52(r2: Array) -> tuple[Array, Array]:
    """Twice differentiable: (1 + a + a^2/3) exp(-a) with a = sqrt(5) r, (4.17)."""
    a = np.sqrt(5.0 * r2)
    fall = np.exp(-a)
    slope = (1.0 + a) * fall
    return slope + (5.0 / 3.0) * r2 * fall, (-5.0 / 3.0) * slope


@KERNELS.register("matern32")
def matern32(r2: Array) -> tuple[Array, Array]:
    """Once differentiable: (1 + a) exp(-a) with a = sqrt(3) r, (4.17)."""
    a = np.sqrt(3.0 * r2)
    fall = np.exp(-a)
    return (1.0 + a) * fall, -3.0 * fall


@KERNELS.register("rbf")
def rbf(r2: Array) -> tuple[Array, Array]:
    """Infinitely smooth: exp(-r^2/2), (4.9)."""
    k = np.exp(-0.5 * r2)
    return k, -k


@dataclass(frozen=True)
class Hyperparameters:
    """All that a :class:`GaussianProcess` is besides its data: plain numbers that go into a journal.

    lengths_m : length scales (along y, along x) [m], > 0. amplitude : deviation of the field about its mean, > 0.
    noise : deviation of the extra noise, >= 0. mean, mean_sigma : normal prior of the constant mean. All but the
    lengths are in the unit of the values. trust : factor on the deviations that came with the values, > 0.
    """

    lengths_m: tuple[float, float]
    amplitude: float
    noise: float
    mean: float
    mean_sigma: float
    kernel: str = "matern52"
    trust: float = 1.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) and v > 0 for v in (*self.lengths_m, self.amplitude, self.trust)):
            raise InputError(f"lengths_m, amplitude and trust must be finite and above zero; got {self}.")
        if not all(math.isfinite(v) and v >= 0 for v in (self.noise, self.mean_sigma)):
            raise InputError(f"noise and mean_sigma must be finite and not below zero; got {self}.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary; :meth:`from_dict` is its exact inverse."""
        return {**asdict(self), "lengths_m": list(self.lengths_m)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Hyperparameters:
        """Rebuild from :meth:`to_dict`."""
        try:
            y, x = plain["lengths_m"]
            return cls(**{**plain, "lengths_m": (float(y), float(x))})
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"these are no hyperparameters of a Gaussian process: {error}.") from None


def _points(positions: ArrayLike, name: str = "positions") -> Array:
    points = np.array(positions, dtype=np.float64, order="C")
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise InputError(f"{name} must be finite pairs (y, x) [m] of shape (n, 2); got shape {points.shape}.")
    return points


def _data(positions: ArrayLike, values: ArrayLike, sigmas: ArrayLike) -> tuple[Array, Array, Array]:
    points = _points(positions)
    y = np.array(values, dtype=np.float64)
    s = np.array(sigmas, dtype=np.float64)
    if len(points) == 0:
        raise InputError("no measurement was given: a Gaussian process needs at least one.")
    if y.shape != (len(points),) or s.shape != (len(points),):
        raise InputError(f"{len(points)} positions need as many values and sigmas; got {y.shape} and {s.shape}.")
    if bad := np.flatnonzero(~(np.isfinite(y) & np.isfinite(s) & (s >= 0))).tolist():
        raise InputError(f"values must be finite and sigmas finite and >= 0; look at measurements {bad[:8]}.")
    return points, y, s


def _squares(a: Array, b: Array) -> tuple[Array, Array]:
    """Squared differences along y and along x, (n, m) each."""
    return np.square(a[:, :1] - b[:, 0]), np.square(a[:, 1:] - b[:, 1])


def _cholesky(matrix: Array) -> Array:
    """The lower factor; ``matrix`` is symmetric and is overwritten."""
    factor, info = lapack.dpotrf(matrix.T, lower=1, clean=1, overwrite_a=1)
    if info != 0:
        raise CalculationError(
            "the covariance of the measurements is singular: give them a sigma above zero or remove repeated positions."
        )
    return factor


class GaussianProcess:
    """A Gaussian process with fixed hyperparameters, conditioned on its data. Immutable; build it with :func:`fit`.

    positions : (n, 2) (y, x) [m]. values, sigmas : (n,) measurements and their known deviations. A process without
    ``values`` (from :meth:`condition`) knows its deviations only.
    """

    def __init__(
        self,
        positions: ArrayLike,
        values: ArrayLike,
        sigmas: ArrayLike,
        hyperparameters: Hyperparameters,
    ) -> None:
        self.positions, self.values, self.sigmas = _data(positions, values, sigmas)
        self.hyperparameters = hyperparameters
        covariance = self.prior(self.positions, self.positions)
        h = hyperparameters
        covariance.flat[:: len(covariance) + 1] += (h.trust * self.sigmas) ** 2 + h.noise**2 + JITTER * h.amplitude**2
        self._factor = _cholesky(covariance)
        self._root = lapack.dtrtri(self._factor, lower=1)[0]
        self._half_weights: Array | None = self._root @ (self.values - h.mean)
        self._kept: tuple[Array, Array] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def prior(self, a: Array, b: Array) -> Array:
        """Covariance (n, m) of the field between ``a`` (n, 2) and ``b`` (m, 2) [m] before any measurement."""
        h = self.hyperparameters
        kernel, amplitude2, mean2 = KERNELS[h.kernel], h.amplitude**2, h.mean_sigma**2
        ay, ax = (a / h.lengths_m).T
        by, bx = (b / h.lengths_m).T
        covariance = np.empty((len(a), len(b)))
        rows = max(1, BLOCK // max(1, len(b)))
        for first in range(0, len(a), rows):
            block = slice(first, first + rows)
            r2 = np.square(ay[block, None] - by)
            r2 += np.square(ax[block, None] - bx)
            k = kernel(r2)[0]
            k *= amplitude2
            k += mean2
            covariance[block] = k
        return covariance

    def whiten(self, points: Array) -> Array:
        """V (n, m) = L^-1 k(data, points), so that the posterior covariance is ``prior(a, b) - V(a).T V(b)``.

        The last answer is kept: the map, the stop rule and the next batch all ask about the same candidates.
        """
        if self._kept is None or not np.array_equal(self._kept[0], points):
            # (m, n) in C order is (n, m) in BLAS's order: multiplied in place, a third of the time of a solution
            cross = self.prior(points, self.positions).T
            self._kept = points.copy(), blas.dtrmm(1.0, self._root, cross, lower=1, overwrite_b=1)
        return self._kept[1]

    def predict(self, positions: ArrayLike) -> tuple[Array, Array]:
        """Mean (m,) and 1-sigma deviation (m,) of the field itself, without measurement noise, (2.25) and (2.26)."""
        if self._half_weights is None:
            raise InputError("this process was conditioned without values: it has deviations, not a mean.")
        whitened = self.whiten(_points(positions))
        return self.hyperparameters.mean + self._half_weights @ whitened, self._sigma(whitened)

    def deviation(self, positions: ArrayLike) -> Array:
        """The 1-sigma deviation (m,) alone; it needs no values."""
        return self._sigma(self.whiten(_points(positions)))

    def _sigma(self, whitened: Array) -> Array:
        h = self.hyperparameters
        explained = np.einsum("ij,ij->j", whitened, whitened)
        return np.sqrt(np.maximum(h.amplitude**2 + h.mean_sigma**2 - explained, 0.0))

    def covariance(self, a: ArrayLike, b: ArrayLike) -> Array:
        """Posterior covariance (n, m) of the field between ``a`` (n, 2) and ``b`` (m, 2) [m], (2.24)."""
        a, b = _points(a, "a"), _points(b, "b")
        return self.prior(a, b) - self.whiten(a).T @ self.whiten(b)

    def condition(self, positions: ArrayLike, sigmas: ArrayLike) -> GaussianProcess:
        """The process as if also measured at ``positions`` (k, 2) [m] with deviations ``sigmas`` (k,), values unknown.

        The deviations of a Gaussian process do not depend on the values, so a batch can be chosen before it is
        measured. The factor grows by k rows.
        """
        points = _points(positions)
        points, _, s = _data(points, np.zeros(len(points)), sigmas)
        h, n, k = self.hyperparameters, len(self), len(points)
        side = self.whiten(points)
        corner = self.prior(points, points) - side.T @ side
        corner.flat[:: k + 1] += (h.trust * s) ** 2 + h.noise**2 + JITTER * h.amplitude**2
        grown = object.__new__(GaussianProcess)
        grown.hyperparameters = h
        grown.positions = np.vstack([self.positions, points])
        grown.sigmas = np.concatenate([self.sigmas, s])
        grown.values = np.concatenate([self.values, np.full(k, np.nan)])
        grown._factor = np.zeros((n + k, n + k), order="F")
        grown._factor[:n, :n], grown._factor[n:, :n], grown._factor[n:, n:] = self._factor, side.T, _cholesky(corner)
        grown._root = lapack.dtrtri(grown._factor, lower=1)[0]
        grown._half_weights, grown._kept = None, None
        return grown

    def loo(self) -> tuple[Array, Array]:
        """Mean (n,) and deviation (n,) of each *measurement* (noise included) given all others.

        ``mean_i = y_i - [K^-1 y]_i / [K^-1]_ii``, ``var_i = 1 / [K^-1]_ii``; S. Sundararajan and S. S. Keerthi,
        Neural Computation 13 (2001) 1103, doi:10.1162/08997660151134343.
        """
        if self._half_weights is None:
            raise InputError("this process was conditioned without values: nothing can be left out.")
        precision = np.square(self._root).sum(axis=0)
        weights = self._root.T @ self._half_weights
        return self.values - weights / precision, 1.0 / np.sqrt(precision)

    @property
    def log_marginal_likelihood(self) -> float:
        """log p(values | positions, hyperparameters), (2.30)."""
        if self._half_weights is None:
            raise InputError("this process was conditioned without values: they have no likelihood.")
        misfit = float(self._half_weights @ self._half_weights)
        logdet = 2.0 * float(np.log(self._factor.diagonal()).sum())
        return -0.5 * (misfit + logdet + len(self) * math.log(2 * math.pi))


# ------------------------------------------------------------------------------------------------------ learning


@dataclass(frozen=True)
class LogNormal:
    """A prior: the logarithm is normal about ``log(median)`` with deviation ``width``."""

    median: float
    width: float


@dataclass(frozen=True)
class Prior:
    """Weak priors in the field's own measure: lengths in its larger side, deviations in the spread of the values.

    The length's median is 0.15 of the field and lies within a factor 2.7 with 95 %; ten points then never give a
    length beyond the field or far below their spacing unless they say so clearly. The mean's prior has the deviation
    ``mean_sigma`` spreads. With ``trust``, a factor on the given deviations is learned too (for deviations that are
    alike but too large or too small throughout); without, they are taken as they are.
    """

    length: LogNormal = LogNormal(0.15, 0.5)
    amplitude: LogNormal = LogNormal(1.0, 0.7)
    noise: LogNormal = LogNormal(0.03, 1.0)
    mean_sigma: float = 1.0
    trust: LogNormal | None = None


class _Objective:
    """-(log marginal likelihood + log prior) of standardised data over u = log(lengths..., amplitude,
    noise[, trust])."""

    def __init__(
        self, positions: Array, y: Array, sigmas: Array, *, kernel: str, anisotropic: bool, prior: Prior, field_m: float
    ) -> None:
        dy2, dx2 = _squares(positions / field_m, positions / field_m)
        self.squares = (dy2, dx2) if anisotropic else (dy2 + dx2,)
        self.y, self.variances, self.kernel = y, sigmas**2, KERNELS[kernel]
        self.mean_variance = prior.mean_sigma**2
        priors = [prior.length] * len(self.squares) + [prior.amplitude, prior.noise]
        priors += [prior.trust] if prior.trust is not None else []
        self.learns_trust = prior.trust is not None
        self.centre = np.log([p.median for p in priors])
        self.width = np.array([p.width for p in priors])
        self.bounds = [(c - 5 * w, c + 5 * w) for c, w in zip(self.centre, self.width, strict=True)]

    def __call__(self, u: Array) -> tuple[float, Array]:
        """The value and its gradient, (5.9): d(lml)/du = tr((a a^T - K^-1) dK/du) / 2 with a = K^-1 y."""
        n = len(self.y)
        first = len(self.squares)
        scales = np.exp(-2.0 * u[:first])
        amplitude2, noise2 = math.exp(2 * u[first]), math.exp(2 * u[first + 1])
        given = self.variances * (math.exp(2 * u[first + 2]) if self.learns_trust else 1.0)
        r2 = self.squares[0] * scales[0]
        for square, scale in zip(self.squares[1:], scales[1:], strict=True):
            r2 = r2 + square * scale
        k, slope = self.kernel(r2)
        covariance = amplitude2 * k
        covariance += self.mean_variance
        covariance.flat[:: n + 1] += given + noise2 + JITTER * amplitude2
        factor, info = lapack.dpotrf(covariance.T, lower=1, overwrite_a=1)
        away = (u - self.centre) / self.width
        if info != 0:
            return 1e10 + float(away @ away), 2 * away / self.width
        logdet = 2.0 * np.log(factor.diagonal()).sum()
        # the lower triangle of K^-1 over zeros; its transpose lies in memory as k does
        precision = lapack.dpotri(factor, lower=1, overwrite_c=1)[0]
        a = blas.dsymv(1.0, precision, self.y, lower=1)
        traced = np.trace(precision)

        def half_trace(m: Array, diagonal: float) -> float:
            return float(0.5 * (a @ (m @ a) - 2.0 * np.vdot(precision.T, m) + diagonal * traced))

        gradient = np.empty_like(u)
        for j, (square, scale) in enumerate(zip(self.squares, scales, strict=True)):
            gradient[j] = -amplitude2 * scale * half_trace(slope * square, 0.0)
        noise = a @ a - traced
        gradient[first] = amplitude2 * (2.0 * half_trace(k, 1.0) + JITTER * noise)
        gradient[first + 1] = noise2 * noise
        if self.learns_trust:
            gradient[first + 2] = given @ (a**2 - precision.diagonal())
        value = 0.5 * (self.y @ a + logdet + n * math.log(2 * math.pi) + away @ away)
        return float(value), away / self.width - gradient

    def deviation(self, u: Array, direction: Array) -> Array:
        """How u moves when it goes one posterior deviation along ``direction``: C e / sqrt(e C e).

        C is the inverse of the Hessian at the maximum (Laplace's approximation). Where the data say less than the
        widest prior, that prior's deviation is taken.
        """
        step = 1e-3
        rows = np.array([(self(u + d)[1] - self(u - d)[1]) / (2 * step) for d in step * np.eye(len(u))])
        curvature, axes = np.linalg.eigh(0.5 * (rows + rows.T))
        moved = axes @ ((axes.T @ direction) / np.maximum(curvature, self.width.max() ** -2))
        return np.asarray(moved / math.sqrt(direction @ moved))


def fit(
    positions: ArrayLike,
    values: ArrayLike,
    sigmas: ArrayLike,
    *,
    field_m: tuple[float, float],
    kernel: str = "matern52",
    start: Hyperparameters | None = None,
    anisotropic: bool = False,
    caution: float = 1.0,
    prior: Prior = Prior(),
    iterations: int = 50,
) -> GaussianProcess:
    """Learn the hyperparameters by maximising the log marginal likelihood plus log :class:`Prior`, and condition.

    Parameters
    ----------
    positions : (n, 2) (y, x) [m]. values, sigmas : (n,) measurements and their 1-sigma deviations (>= 0).
    field_m : (height, width) [m] of the field; it sets the measure of the prior length scale.
    kernel : "matern52", "matern32" or "rbf".
    start : where L-BFGS-B begins (the last fit's, when data are added); the prior's medians if None.
    anisotropic : learn one length scale along y and another along x.
    caution : how many posterior deviations the hyperparameters are taken from their most probable values in the
        direction in which the field's deviations rise most: shorter lengths, a larger amplitude. The most probable
        values alone promise too much while they rest on few points; ``benchmarks/belief_coverage.py`` measures it.

    Returns
    -------
    GaussianProcess
        A pure function of the arguments: the same data and start give the same bits.
    """
    points, y, s = _data(positions, values, sigmas)
    field = max(field_m)
    if not (math.isfinite(field) and min(field_m) > 0):
        raise InputError(f"field_m must be two finite lengths above zero [m]; got {field_m!r}.")
    centre, spread = float(y.mean()), max(float(y.std()), float(s.mean()))
    if spread <= 1e-12 * abs(centre):
        spread = abs(centre) or 1.0
    objective = _Objective(
        points, (y - centre) / spread, s / spread, kernel=kernel, anisotropic=anisotropic, prior=prior, field_m=field
    )
    u = objective.centre
    if start is not None:
        lengths = start.lengths_m if anisotropic else start.lengths_m[:1]
        known = [*(v / field for v in lengths), start.amplitude / spread, max(start.noise / spread, 1e-6)]
        u = np.log(known + [start.trust] * objective.learns_trust)
        u = np.clip(u, *np.array(objective.bounds).T)
    found = minimize(
        objective,
        u,
        jac=True,
        method="L-BFGS-B",
        bounds=objective.bounds,
        options={"maxiter": iterations, "ftol": 1e-6, "gtol": 1e-3},
    ).x

    def process(u: Array) -> GaussianProcess:
        learned = [float(v) for v in np.exp(u)]
        trust = learned.pop() if objective.learns_trust else 1.0
        *lengths, amplitude, noise = learned
        lengths_m = (field * lengths[0], field * lengths[-1])
        mean_sigma = spread * prior.mean_sigma
        known = Hyperparameters(lengths_m, spread * amplitude, spread * noise, centre, mean_sigma, kernel, trust)
        return GaussianProcess(points, y, s, known)

    if caution:
        rise = _rise_of_doubt(process, found, field_m)
        found = np.clip(found + caution * objective.deviation(found, rise), *np.array(objective.bounds).T)
    return process(found)


def _rise_of_doubt(process: Callable[[Array], GaussianProcess], u: Array, field_m: tuple[float, float]) -> Array:
    """Gradient by u of the log of the root mean variance over 8 x 8 places of the field."""
    cells = (np.arange(8) + 0.5) / 8
    places = np.stack(np.meshgrid(cells * field_m[0], cells * field_m[1], indexing="ij"), axis=-1).reshape(-1, 2)

    def doubt(v: Array) -> float:
        return 0.5 * math.log(np.square(process(v).deviation(places)).mean())

    step = 1e-3
    here = doubt(u)
    return np.array([(doubt(u + d) - here) / step for d in step * np.eye(len(u))])
