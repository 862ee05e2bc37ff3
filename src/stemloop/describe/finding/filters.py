"""Filters of an image and its local maxima, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from stemloop.describe.finding.gaussians import Floats, Image, Integers

#: A Gaussian is cut at this many sigma.
_CUT = 4.0


@njit(cache=True, nogil=True)
def _mirrored(i: int, size: int) -> int:
    """Where row ``i`` is read: (d c b a | a b c d | d c b a), the same as scipy.ndimage's ``reflect``."""
    i %= 2 * size
    return i if i < size else 2 * size - 1 - i


@njit(cache=True, nogil=True, fastmath=True)
def _correlate(image: Image, along_y: Image, along_x: Image, out: Image) -> None:
    """Add to ``out`` the correlation with two even kernels (given by their halves), mirrored at the edges."""
    rows, cols = image.shape
    reach = len(along_x) - 1
    line, padded = np.empty(cols, np.float32), np.empty(cols + 2 * reach, np.float32)
    for i in range(rows):
        first, here = along_y[0], image[i]
        for j in range(cols):
            line[j] = first * here[j]
        for k in range(1, len(along_y)):
            one, other, weight = image[_mirrored(i - k, rows)], image[_mirrored(i + k, rows)], along_y[k]
            for j in range(cols):
                line[j] += weight * (one[j] + other[j])
        padded[reach : reach + cols] = line
        for k in range(reach):
            padded[reach - 1 - k] = line[_mirrored(-1 - k, cols)]
            padded[reach + cols + k] = line[_mirrored(cols + k, cols)]
        goal, first = out[i], along_x[0]
        for j in range(cols):
            goal[j] += first * padded[reach + j]
        for k in range(1, reach + 1):
            weight = along_x[k]
            before, after = padded[reach - k : reach - k + cols], padded[reach + k : reach + k + cols]
            for j in range(cols):
                goal[j] += weight * (before[j] + after[j])


def _kernels(sigma: float) -> tuple[Floats, Floats]:
    """Half of a Gaussian of unit sum, and of its second derivative."""
    x = np.arange(int(_CUT * sigma + 0.5) + 1, dtype=np.float64)
    g = np.exp(-0.5 * (x / sigma) ** 2)
    g /= g[0] + 2 * g[1:].sum()
    curved = g * (x**2 / sigma**4 - 1 / sigma**2)
    curved[0] -= curved[0] + 2 * curved[1:].sum()  # blind to constants, however coarsely it is sampled
    return g, curved


def smooth(image: Image, sigma: float) -> Image:
    """The image convolved with a Gaussian of ``sigma`` [px], mirrored at the edges."""
    g = _kernels(sigma)[0].astype(np.float32)
    out = np.zeros(image.shape, np.float32)
    _correlate(image, g, g, out)
    return out


def negative_laplacian(image: Image, sigma: float) -> Image:
    """Minus the Laplacian of the image convolved with a Gaussian of ``sigma`` [px], mirrored at the edges."""
    g, curved = (half.astype(np.float32) for half in _kernels(sigma))
    out = np.zeros(image.shape, np.float32)
    _correlate(image, -curved, g, out)
    _correlate(image, g, -curved, out)
    return out


def laplacian_gain(sigma: float) -> float:
    """Variance of :func:`negative_laplacian` of white noise of unit variance."""
    g, curved = (np.concatenate([half[:0:-1], half]) for half in _kernels(sigma))
    kernel = np.outer(curved, g) + np.outer(g, curved)
    return float((kernel**2).sum())


def outstanding(image: Image, variance: Image, width: float) -> Image:
    """:func:`negative_laplacian` over its own spread around each pixel (within some six widths), which is that of noise
    of ``variance`` or more: how far a spot stands out from noise and from a support's waves alike."""
    z = negative_laplacian(image, width) / np.sqrt(variance * np.float32(laplacian_gain(width)))
    return np.asarray(z / np.sqrt(np.maximum(smooth(z * z, 6 * width), 1)))


@njit(cache=True, nogil=True)
def maxima(image: Image, reach: int, least: float) -> Integers:
    """(n, 2) pixels above ``least`` that are the largest of the square ``reach`` pixels around them, but none of the
    image's rim."""
    rows, cols = image.shape
    found = [(0, 0)]
    for i in range(1, rows - 1):
        for j in range(1, cols - 1):
            here = image[i, j]
            if here <= least or here < image[i, j - 1] or here < image[i, j + 1]:
                continue
            top = True
            for k in range(max(0, i - reach), min(rows, i + reach + 1)):
                for m in range(max(0, j - reach), min(cols, j + reach + 1)):
                    other = image[k, m]
                    if other > here or (other == here and (k < i or (k == i and m < j))):
                        top = False
                        break
                if not top:
                    break
            if top:
                found.append((i, j))
    out = np.empty((len(found) - 1, 2), np.int64)
    for n in range(1, len(found)):
        out[n - 1, 0], out[n - 1, 1] = found[n]
    return out


@njit(cache=True, nogil=True)
def around(image: Image, places: Integers, reach: int) -> tuple[Floats, Floats]:
    """(n,) the mean and (n,) the least of the square ``reach`` pixels around each of ``places`` (n, 2)."""
    mean, least = np.empty(len(places)), np.empty(len(places))
    for n in range(len(places)):
        i, j = places[n]
        total, low, count = 0.0, np.inf, 0
        for k in range(max(0, i - reach), min(image.shape[0], i + reach + 1)):
            for m in range(max(0, j - reach), min(image.shape[1], j + reach + 1)):
                total += image[k, m]
                low = min(low, image[k, m])
                count += 1
        mean[n], least[n] = total / count, low
    return mean, least


def filled(image: NDArray[np.float32], measured: NDArray[np.bool_]) -> Image:
    """The image with what was not ``measured`` filled in from around, from as near as there is something."""
    out = np.where(measured, image, np.float32(0))
    empty = ~measured
    weight = measured.astype(np.float32)
    for sigma in (1.0, 4.0, 16.0):
        if not empty.any():
            return out
        there = smooth(weight, sigma)
        ready = empty & (there > 0.05)
        out[ready] = smooth(np.where(measured, image, np.float32(0)), sigma)[ready] / there[ready]
        empty &= ~ready
    out[empty] = np.median(image[measured]) if measured.any() else 0.0
    return out
