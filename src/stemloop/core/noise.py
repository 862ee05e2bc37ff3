"""Noise of counted images: what it is, read from the image itself, and the transform that makes it even.

A detector's grey level ``z = gain * counts + read noise`` has the variance ``gain * mean + floor``. The generalised
Anscombe transform turns it into a number of unit variance; its inverse here is exactly unbiased: it maps the mean of
transformed levels to the mean of the levels (M. Mäkitalo and A. Foi, IEEE Trans. Image Process. 22 (2013) 91,
doi:10.1109/TIP.2012.2202675).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_TILE = 512
_BINS = 16
#: Above this mean number of counts the transform's mean is known in closed form to better than 1e-4.
_MANY = 60.0


class Noise(NamedTuple):
    """Variance of the noise, ``gain * intensity + floor`` [grey levels squared]; counts have gain 1 and floor 0."""

    gain: float
    floor: float

    def variance(self, intensity: NDArray[Any]) -> Floats:
        """Variance at each ``intensity``, nowhere under a twentieth of its mean."""
        level = np.asarray(intensity, dtype=np.float64)
        whole = self.gain * level + self.floor
        return np.asarray(np.maximum(whole, 0.05 * whole.mean()))


def noise_of(image: NDArray[Any]) -> Noise:
    """White noise of an image (rows, columns), from its spectrum's corners (above 0.5 / px), where a probe transfers
    nothing. (``describe.finding.noise`` reads parts of an image with holes by short differences; here the whole
    spectrum tells, which needs a full image and no compiled code.)

    The variance there is fitted as a line in the local intensity. Where the slope is not positive the noise is taken
    as even (gain 0). Pixels that are not finite count as the mean of the others. An image with a side under 8 px, or
    without any variation, has ``Noise(0, 0)``.
    """
    pixels = np.asarray(image, dtype=np.float64)
    finite = np.isfinite(pixels)
    if pixels.ndim != 2 or min(pixels.shape) < 8 or not finite.any() or np.ptp(pixels[finite]) == 0:
        return Noise(0.0, 0.0)
    if not finite.all():
        pixels = np.where(finite, pixels, pixels[finite].mean())
    local, square = _corners(pixels)
    order = np.array_split(np.argsort(_blurred(local), axis=None), _BINS)
    x = np.array([local.flat[b].mean() for b in order])
    y = np.array([square.flat[b].mean() for b in order])
    least = (1e-4 * np.ptp(pixels)) ** 2
    if np.ptp(x) == 0:
        return Noise(0.0, max(float(y.mean()), least))
    gain, floor = np.polyfit(x, y, 1, w=1 / np.maximum(y, least))
    if gain <= 0 or gain * x.min() + floor <= 0:
        return Noise(0.0, max(float(y.mean()), least))
    return Noise(float(gain), float(floor))


def _corners(pixels: Floats) -> tuple[Floats, Floats]:
    """Of up to four tiles side by side: the intensity averaged as the noise is, and the squared noise."""
    rows, columns = (min(_TILE, size) for size in pixels.shape)
    places = [
        (top, left)
        for top in range(0, pixels.shape[0] - rows + 1, rows)
        for left in range(0, pixels.shape[1] - columns + 1, columns)
    ]
    chosen = places[:: -(-len(places) // 4)]
    corner = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None, :]) > 0.5
    kernel = np.fft.irfft2(corner.astype(np.float64), (rows, columns)) ** 2
    averaging = np.fft.rfft2(kernel / kernel.sum())
    share = float(np.fft.irfft2(corner.astype(np.float64), (rows, columns))[0, 0])
    local, square = [], []
    for top, left in chosen:
        spectrum = np.fft.rfft2(pixels[top : top + rows, left : left + columns])
        local.append(np.fft.irfft2(spectrum * averaging, (rows, columns)))
        square.append(np.fft.irfft2(spectrum * corner, (rows, columns)) ** 2 / share)
    return np.concatenate(local, axis=1), np.concatenate(square, axis=1)


def _blurred(image: Floats) -> Floats:
    """The image convolved with a Gaussian of 2 px (periodic)."""
    down, across = np.fft.fftfreq(image.shape[0])[:, None], np.fft.rfftfreq(image.shape[1])[None, :]
    passed = np.exp(-2 * np.pi**2 * 4.0 * (down**2 + across**2))
    return np.asarray(np.fft.irfft2(np.fft.rfft2(image) * passed, image.shape))


def stabilised(image: NDArray[Any], noise: Noise) -> Floats:
    """The generalised Anscombe transform of an image: its noise has about unit variance everywhere.

    ``2 sqrt(z / gain + 3/8 + floor / gain^2)``; for noise without a gain ``z / sqrt(floor)``. It is close to unit
    variance from about 3 counts a pixel; under that the variance falls (0.4 at half a count).
    """
    level = np.asarray(image, dtype=np.float64)
    if noise.gain <= 0:
        return np.asarray(level / np.sqrt(noise.floor)) if noise.floor > 0 else level
    return np.asarray(2 * np.sqrt(np.maximum(level / noise.gain + 0.375 + noise.floor / noise.gain**2, 0.0)))


def restored(mean: NDArray[Any], noise: Noise) -> Floats:
    """The grey level whose transformed counts have the given ``mean``: the exact unbiased inverse of
    :func:`stabilised`. What lies below the transform of no counts at all becomes zero counts."""
    level = np.asarray(mean, dtype=np.float64)
    if noise.gain <= 0:
        return np.asarray(level * np.sqrt(noise.floor)) if noise.floor > 0 else level
    floor = noise.floor / noise.gain**2
    read, pedestal = max(floor, 0.0), min(floor, 0.0)  # a negative floor is a level that no electron made
    counts, transformed = _table(round(read, 9))
    inner = np.interp(level, transformed, counts)
    d = np.maximum(level, transformed[-1])
    outer = d**2 / 4 - 1 / 8 - read + 0.25 * np.sqrt(1.5) / d - 1.375 / d**2
    return np.asarray(noise.gain * (np.where(level <= transformed[-1], inner, outer) - pedestal))


@lru_cache(maxsize=32)
def _table(read: float) -> tuple[Floats, Floats]:
    """Mean counts, and the mean of their transform at read noise of variance ``read`` [counts squared]."""
    counts = np.concatenate([np.linspace(0, 2, 81), np.linspace(2.05, 10, 160), np.linspace(10.2, _MANY, 250)])
    k = np.arange(0, int(_MANY + 12 * np.sqrt(_MANY)))
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(k[1:], 1)))])
    with np.errstate(divide="ignore"):
        logarithm = np.where(counts > 0, np.log(np.maximum(counts, 1e-300)), -np.inf)
    power = np.where((k == 0)[None, :], 0.0, k[None, :] * np.where(np.isfinite(logarithm), logarithm, -1e9)[:, None])
    chance = np.exp(power - counts[:, None] - factorial[None, :])
    node, weight = np.polynomial.hermite_e.hermegauss(41)
    level = k[:, None] + np.sqrt(read) * node[None, :] + 0.375 + read
    mean = (2 * np.sqrt(np.maximum(level, 0.0)) * weight).sum(axis=1) / weight.sum()
    return counts, chance @ mean
