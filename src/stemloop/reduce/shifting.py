"""Images displaced by parts of a pixel, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Thin = NDArray[np.float32]

#: Pixels on either side that a displaced value is made of.
REACH = 6


def _kernel(part: float, slope: bool) -> Thin:
    """Samples of a sinc under a raised cosine, ``part`` off the middle: what moves a signal by ``part`` (at most half
    a pixel), true to 1 % up to 0.4 / px. With ``slope`` its derivative by the signal's place."""
    x = np.arange(-REACH, REACH + 1) - part
    window = np.cos(np.pi * x / (2 * REACH + 1.2)) ** 2
    if not slope:
        value = np.sinc(x) * window
        return np.asarray(value / value.sum(), dtype=np.float32)
    near = np.abs(x) < 1e-6
    safe = np.where(near, 1.0, x)
    steep = np.where(near, 0.0, (np.cos(np.pi * safe) - np.sinc(safe)) / safe)
    value = steep * window
    value -= value.mean()
    return np.asarray(-value / (value * x).sum(), dtype=np.float32)


@njit(cache=True, nogil=True, fastmath=True)
def _convolved(image: Thin, down: Thin, across: Thin, out: Thin) -> None:
    """Convolve with one kernel along each axis; beyond the border the image is its nearest pixel."""
    rows, columns = image.shape
    reach = len(down) // 2
    line = np.empty(columns + 2 * reach, dtype=np.float32)
    for i in range(rows):
        line[:] = 0
        for t in range(len(down)):
            source = image[min(max(i - (t - reach), 0), rows - 1)]
            weight = down[t]
            for j in range(columns):
                line[reach + j] += weight * source[j]
        for j in range(reach):
            line[j] = line[reach]
            line[reach + columns + j] = line[reach + columns - 1]
        goal = out[i]
        goal[:] = 0
        for t in range(len(across)):
            weight = across[t]
            start = 2 * reach - t
            for j in range(columns):
                goal[j] += weight * line[start + j]


def moved(image: NDArray[Any], part: tuple[float, float], slope: int | None = None) -> Thin:
    """The image (rows, columns) displaced by ``part`` (down, across) [px], each at most half a pixel, or the
    derivative of that along the axis ``slope``. :data:`REACH` pixels at the border are not to be used."""
    pixels = np.ascontiguousarray(image, dtype=np.float32)
    out = np.empty_like(pixels)
    _convolved(pixels, _kernel(part[0], slope == 0), _kernel(part[1], slope == 1), out)
    return out


@njit(cache=True, nogil=True)
def remembered(
    value: NDArray[Any], variance: NDArray[Any], spread: float, memory: float
) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Kalman filter of a stationary first-order autoregression of variance ``spread`` and correlation ``memory``,
    observed as ``value`` with noise of ``variance`` (both (n,)): (mean, variance, log-likelihood)."""
    n = len(value)
    mean, left = np.empty(n), np.empty(n)
    m, p, likelihood = 0.0, spread, 0.0
    for k in range(n):
        if k > 0:
            m, p = memory * m, memory * memory * p + (1 - memory * memory) * spread
        total = p + variance[k]
        away = value[k] - m
        likelihood -= 0.5 * (np.log(2 * np.pi * total) + away * away / total)
        m += p / total * away
        p *= variance[k] / total
        mean[k], left[k] = m, p
    return mean, left, likelihood
