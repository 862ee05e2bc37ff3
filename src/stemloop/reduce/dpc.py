"""Where the diffraction pattern's weight lies, and what that says of the object's phase.

Centre of mass (COM): K. Müller et al., Nature Communications 5 (2014) 5653, doi:10.1038/ncomms6653.
Segmented detectors, iDPC and iCOM: I. Lazić, E. G. T. Bosch and S. Lazar, Ultramicroscopy 160 (2016) 265,
doi:10.1016/j.ultramic.2015.10.011. Integration in Fourier space: R. T. Frankot and R. Chellappa, IEEE TPAMI 10 (1988)
439, doi:10.1109/34.3909.

Directions are those of the scan: y down, x right. A camera that is turned against the scan by ``rotation_rad``
(positive from +x towards +y) sees the deflection turned by that angle; :func:`turn` undoes it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core import units
from stemloop.core.errors import InputError
from stemloop.core.protocols import Block, Camera
from stemloop.reduce.detectors import grid, weigh
from stemloop.reduce.engine import Maps, Rows

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CentreOfMass:
    """``com_y``, ``com_x`` [rad] from the camera's centre, with ``com_y_sigma``, ``com_x_sigma``, and ``counts``.

    mask : (rows, columns) weights, or None for the whole frame. Without a mask and with ``sigma=False`` only the
        block's own moments are asked for, which is fastest. Frames without counts give NaN.

    With whole-number moments ``S``, ``S_y``, ``S_yy`` of n counted electrons ``var(com_y) = sum w^2 (y - com)^2 / S^2``
    (for w = 1: the variance of the pattern along y, over n).
    """

    camera: Camera
    mask: NDArray[np.float64] | None = None
    sigma: bool = True

    @functools.cached_property
    def _weights(self) -> Array:
        """w times 1, y, x, yy, xx, and the same of w^2 where w is not only 0 and 1."""
        if self.mask is not None and np.shape(self.mask) != tuple(self.camera.shape):
            raise InputError(f"the mask is {np.shape(self.mask)}, the camera has {self.camera.shape} pixels.")
        y, x = np.indices(self.camera.shape).astype(np.float64)
        w = np.ones(self.camera.shape) if self.mask is None else grid(self.mask)
        powers = [np.ones_like(y), y, x] + ([y * y, x * x] if self.sigma else [])
        squared = self.sigma and not np.array_equal(w * w, w)
        return np.stack([v * power for v in ([w, grid(w * w)] if squared else [w]) for power in powers])

    def init(self, scan: tuple[int, int], shape: tuple[int, int]) -> Rows:
        if tuple(shape) != tuple(self.camera.shape):
            raise InputError(f"the camera has {self.camera.shape} pixels, the frames {tuple(shape)}.")
        return Rows(scan)

    def step(self, part: Rows, block: Block, first: int) -> Rows:
        if self.mask is None and not self.sigma:
            return part.add(first, block.moments())
        return part.add(first, weigh(block, self._weights))

    def merge(self, one: Rows, other: Rows) -> Rows:
        return one.join(other)

    def finish(self, part: Rows) -> Maps:
        table = part.table(len(self._weights))
        s = np.where(table[..., 0] > 0, table[..., 0], np.nan)
        maps: Maps = {"counts": table[..., 0]}
        squares = table[..., -5:]
        for i, name in enumerate(("com_y", "com_x")):
            com = table[..., 1 + i] / s
            maps[name] = (com - self.camera.centre_px[i]) * self.camera.pixel_rad
            if self.sigma:
                spread = squares[..., 3 + i] - 2 * com * squares[..., 1 + i] + com**2 * squares[..., 0]
                maps[f"{name}_sigma"] = np.sqrt(np.maximum(spread, 0)) / s * self.camera.pixel_rad
        return maps


def quadrant_deflection(quadrants: NDArray[np.float64], semiangle_rad: float) -> tuple[Array, Array, Array, Array]:
    """Deflection (y, x) [rad] of a round, evenly filled disk from four sectors, and its deviations (y, x).

    ``quadrants`` (4, ...) are the counts of sectors that begin at -pi/4 and turn from +x towards +y (right, down, left,
    up), as :func:`~stemloop.reduce.detectors.segments` makes them with ``start_rad=-pi/4``. A small shift d of a disk
    of radius a moves ``S_right - S_left = S 2 sqrt(2) d / (pi a)`` (the chord of the shifted edge seen within +-pi/4),
    so ``d = pi a / (2 sqrt 2) (S_right - S_left)/S``; its variance is ``(pi a / (2 sqrt 2))^2 (S_right + S_left)/S^2``.
    """
    right, down, left, up = np.asarray(quadrants, dtype=np.float64)
    total = right + down + left + up
    total = np.where(total > 0, total, np.nan)
    scale = np.pi * semiangle_rad / (2 * np.sqrt(2))
    return (
        scale * (down - up) / total,
        scale * (right - left) / total,
        scale * np.sqrt(down + up) / total,
        scale * np.sqrt(right + left) / total,
    )


def descan(
    com_y: Array, com_x: Array, order: int = 1, where: NDArray[np.bool_] | None = None
) -> tuple[Array, Array, Array]:
    """Take away what the scan itself moves: a plane (``order=1``) or a quadratic surface (2) fitted to each map.

    Least squares over the positions ``where`` (vacuum if there is some; default all finite ones). The surfaces are
    ``c0 + c1 v + c2 u (+ c3 v^2 + c4 v u + c5 u^2)`` of the scan row v and column u, each running from -1 to 1.

    Returns the corrected maps (y, x) and the coefficients (2, 3 or 6) [rad]. A real field with a mean, a slope or a
    bend over the whole scan is taken away too.
    """
    if order not in (0, 1, 2):
        raise InputError(f"descan takes away a surface of order 0, 1 or 2; got {order}.")
    rows, columns = com_y.shape
    v = np.linspace(-1, 1, rows)[:, None] * np.ones((1, columns))
    u = np.ones((rows, 1)) * np.linspace(-1, 1, columns)[None, :]
    terms = [v**i * u ** (n - i) for n in range(order + 1) for i in range(n, -1, -1)]
    basis = np.stack([np.ones_like(v) * term for term in terms], axis=-1)
    use = np.isfinite(com_y) & np.isfinite(com_x) & (True if where is None else where)
    if np.count_nonzero(use) < len(terms):
        raise InputError(f"{np.count_nonzero(use)} positions are too few for a surface of {len(terms)} coefficients.")
    found = np.linalg.lstsq(basis[use], np.stack([com_y[use], com_x[use]], axis=1), rcond=None)[0]
    surface = basis @ found
    return com_y - surface[..., 0], com_x - surface[..., 1], np.asarray(found.T, dtype=np.float64)


def turn(com_y: Array, com_x: Array, rotation_rad: float) -> tuple[Array, Array]:
    """The deflection in the scan's axes, where the camera is turned by ``rotation_rad`` against the scan."""
    c, s = np.cos(rotation_rad), np.sin(rotation_rad)
    return c * com_y - s * com_x, c * com_x + s * com_y


def _frequencies(shape: tuple[int, ...], step_m: tuple[float, float]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Angular frequencies (y, x) [rad/m] of first derivatives; the one at the Nyquist limit has none."""
    both = []
    for n, step in zip(shape, step_m, strict=True):
        k = 2 * np.pi * np.fft.fftfreq(n, step)
        if n % 2 == 0:
            k[n // 2] = 0.0
        both.append(k)
    return both[0][:, None], both[1][None, :]


def _mirrored(y: Array, x: Array) -> tuple[Array, Array]:
    """The gradient of a function that is mirrored at the edges, so that it is periodic whatever it was."""
    y = np.concatenate([y, -y[::-1]], axis=0)
    x = np.concatenate([x, x[::-1]], axis=0)
    return np.concatenate([y, y[:, ::-1]], axis=1), np.concatenate([x, -x[:, ::-1]], axis=1)


def _kernels(shape: tuple[int, ...], step_m: tuple[float, float]) -> tuple[NDArray[Any], NDArray[Any]]:
    ky, kx = _frequencies(shape, step_m)
    square = ky**2 + kx**2
    square[square == 0] = np.inf
    return -1j * ky / square, -1j * kx / square


def integrate(
    gradient_y: Array, gradient_x: Array, step_m: float | tuple[float, float], periodic: bool = False
) -> Array:
    """The function whose gradient is nearest to (``gradient_y``, ``gradient_x``) [1/m], with mean zero.

    ``f_k = -i (k . g_k) / k^2``: least squares over all frequencies (Frankot and Chellappa, 1988). ``step_m`` is the
    scan's step, one number or (y, x) [m]. Fields that are not periodic are mirrored at their edges first.
    """
    y, x, steps = _gradient(gradient_y, gradient_x, step_m)
    rows, columns = y.shape
    if not periodic:
        y, x = _mirrored(y, x)
    over_y, over_x = _kernels(y.shape, steps)
    found = np.fft.ifft2(over_y * np.fft.fft2(y) + over_x * np.fft.fft2(x)).real[:rows, :columns]
    return np.asarray(found - found.mean())


def integrated_sigma(
    sigma_y: Array, sigma_x: Array, step_m: float | tuple[float, float], periodic: bool = False
) -> Array:
    """Deviation of :func:`integrate` for independent deviations ``sigma_y``, ``sigma_x`` [1/m] of the gradient.

    The integral is a convolution, so its variance is that of the squared kernels with the variances. At the edges of
    a mirrored field an error meets its own mirror image, and the deviation there is up to sqrt 2 larger than stated.
    """
    y, x, steps = _gradient(sigma_y, sigma_x, step_m)
    rows, columns = y.shape
    if not periodic:
        y, x = _mirrored(y, x)
    over_y, over_x = (np.fft.fft2(np.fft.ifft2(kernel).real ** 2) for kernel in _kernels(y.shape, steps))
    variance = np.fft.ifft2(over_y * np.fft.fft2(y**2) + over_x * np.fft.fft2(x**2)).real[:rows, :columns]
    return np.asarray(np.sqrt(np.maximum(variance, 0)))


def _gradient(y: Array, x: Array, step_m: float | tuple[float, float]) -> tuple[Array, Array, tuple[float, float]]:
    steps = (step_m, step_m) if isinstance(step_m, (int, float)) else (float(step_m[0]), float(step_m[1]))
    if y.shape != x.shape or y.ndim != 2 or min(y.shape) < 2:
        raise InputError(f"a gradient has two maps of one shape of at least 2 x 2; got {y.shape} and {x.shape}.")
    if not (min(steps) > 0 and np.isfinite(y).all() and np.isfinite(x).all()):
        raise InputError("integration needs a step above zero and maps without gaps: fill or crop them first.")
    return np.asarray(y, np.float64), np.asarray(x, np.float64), steps


def phase(
    com_y: Array, com_x: Array, step_m: float | tuple[float, float], energy_eV: float, periodic: bool = False
) -> Array:
    """The object's phase [rad] from the deflection [rad]: :func:`integrate` of ``2 pi / lambda`` x deflection.

    For a thin object the mean transverse momentum is the gradient of the phase, averaged over the probe's intensity
    (Lazić 2016): the result is the phase convolved with the probe (iCOM; from segments, iDPC).
    """
    k = 2 * np.pi / units.wavelength_m(energy_eV)
    return integrate(k * com_y, k * com_x, step_m, periodic)


def phase_sigma(
    sigma_y: Array, sigma_x: Array, step_m: float | tuple[float, float], energy_eV: float, periodic: bool = False
) -> Array:
    """Deviation [rad] of :func:`phase` from those of the deflection [rad]."""
    k = 2 * np.pi / units.wavelength_m(energy_eV)
    return integrated_sigma(k * sigma_y, k * sigma_x, step_m, periodic)


def rotation(
    com_y: Array, com_x: Array, sigma_y: Array | None = None, sigma_x: Array | None = None
) -> tuple[float, float]:
    """Rotation [rad] of the camera against the scan, and its deviation (NaN without ``sigma_y`` and ``sigma_x``).

    A phase's gradient has no curl. Turning the field by t turns ``curl`` into ``cos t curl - sin t div``; the mean
    square of that is least in closed form at ``tan 2t = 2 <curl div> / (<div^2> - <curl^2>)``. Two angles half a turn
    apart fit equally; the one is returned whose integral has its sharp extremes upwards (atoms are bright: positive
    skewness). Both maps must be free of descan. A camera that mirrors its frames has to be put right before.

    The deviation is that of the counting noise, to first order: ``var t = sum s_y^2 (d_x div)^2 + s_x^2 (d_y div)^2
    over (sum div^2 - sum curl^2)^2`` in the turned field. Derivatives are those of the maps mirrored at their edges,
    of which a border of two positions is left out.
    """
    _gradient(com_y, com_x, 1.0)
    inside = np.zeros(com_y.shape)
    inside[tuple(slice(2, -2) if n > 8 else slice(None) for n in com_y.shape)] = 1.0
    div = inside * (_slope(com_y, 0) + _slope(com_x, 1))
    curl = inside * (_slope(com_y, 1) - _slope(com_x, 0))
    # of a field that was turned by +t the curl is sin t and the divergence cos t of the divergence that it had
    dd, cc, cd = np.vdot(div, div), np.vdot(curl, curl), np.vdot(curl, div)
    if dd + cc == 0:
        raise InputError("the deflection is the same everywhere: it does not show how the camera is turned.")
    angle = 0.5 * np.arctan2(2 * cd, dd - cc)
    straight = integrate(*turn(com_y - np.mean(com_y), com_x - np.mean(com_x), angle), 1.0)
    if np.mean(straight**3) < 0:
        angle += np.pi
    angle = float((angle + np.pi) % (2 * np.pi) - np.pi)
    if sigma_y is None or sigma_x is None:
        return angle, float("nan")
    turned = np.cos(angle) * div + np.sin(angle) * curl
    noise = np.sum(sigma_y**2 * _slope(turned, 1) ** 2 + sigma_x**2 * _slope(turned, 0) ** 2)
    return angle, float(np.sqrt(noise) / np.hypot(dd - cc, 2 * cd))


def _slope(values: Array, axis: int) -> Array:
    """Derivative along an axis, a step, of what is mirrored at its ends."""
    n = values.shape[axis]
    twice = np.concatenate([values, np.flip(values, axis)], axis=axis)
    k = 2 * np.pi * np.fft.fftfreq(2 * n)
    k[n] = 0.0
    spectrum = np.fft.fft(twice, axis=axis) * (1j * (k[:, None] if axis == 0 else k))
    return np.asarray(np.fft.ifft(spectrum, axis=axis).real.take(np.arange(n), axis=axis))
