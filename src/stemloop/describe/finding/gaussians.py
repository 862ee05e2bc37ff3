"""Sums of many Gaussian columns on an image and their derivatives, compiled.

A column is (row, column, amplitude A, ln w); its Gaussian ``g = exp(-r^2 / 2 w^2)`` lives on a square of ``reach``
pixels around its nearest pixel. The derivatives of ``A g`` by the four parameters are, with ``p = 1/w^2``,
``A p dy g``, ``A p dx g``, ``g`` and ``A p r^2 g``. The Gaussian is a product of one factor a row and one a column, so
that a square of n pixels a side costs 2 n exponentials. Images are float32, sums are kept in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Image = NDArray[np.float32]
Integers = NDArray[np.int64]


@njit(cache=True, nogil=True)
def axis(place: float, per: float, reach: int, size: int, g: Image, d: Image) -> tuple[int, int]:
    """Fill ``g`` and the distances ``d`` along one axis; (first, one past the last) pixel inside the image."""
    middle = round(place)
    first, stop = max(0, middle - reach), min(size, middle + reach + 1)
    for i in range(first, stop):
        d[i - first] = i - place
        g[i - first] = np.exp(-0.5 * per * (i - place) ** 2)
    return first, stop


@njit(cache=True, nogil=True, fastmath=True)
def paint(columns: Floats, reach: int, image: Image) -> None:
    """Add ``columns`` (n, 4) to ``image``."""
    gy, gx, dy, dx = np.empty((4, 2 * reach + 1), np.float32)
    for k in range(len(columns)):
        per = np.exp(-2 * columns[k, 3])
        top, bottom = axis(columns[k, 0], per, reach, image.shape[0], gy, dy)
        left, right = axis(columns[k, 1], per, reach, image.shape[1], gx, dx)
        for i in range(bottom - top):
            height = np.float32(columns[k, 2] * gy[i])
            row = image[top + i, left:right]
            for j in range(right - left):
                row[j] += height * gx[j]


@njit(cache=True, nogil=True, fastmath=True)
def gather(columns: Floats, image: Image, reach: int) -> Floats:
    """(n, 4): J^T ``image``, J being the derivatives of the sum by the parameters of ``columns`` (n, 4)."""
    out = np.zeros((len(columns), 4))
    gy, gx, dy, dx = np.empty((4, 2 * reach + 1), np.float32)
    for k in range(len(columns)):
        per = np.exp(-2 * columns[k, 3])
        top, bottom = axis(columns[k, 0], per, reach, image.shape[0], gy, dy)
        left, right = axis(columns[k, 1], per, reach, image.shape[1], gx, dx)
        y = x = a = w = 0.0
        for i in range(bottom - top):
            row = image[top + i, left:right]
            s0 = s1 = s2 = np.float32(0)
            for j in range(right - left):
                u = gx[j] * row[j]
                s0 += u
                s1 += u * dx[j]
                s2 += u * dx[j] * dx[j]
            a += gy[i] * s0
            y += gy[i] * dy[i] * s0
            x += gy[i] * s1
            w += gy[i] * (dy[i] * dy[i] * s0 + s2)
        bright = columns[k, 2] * per
        out[k, 0], out[k, 1], out[k, 2], out[k, 3] = bright * y, bright * x, a, bright * w
    return out


@njit(cache=True, nogil=True, fastmath=True)
def overlaps(columns: Floats, first: Integers, second: Integers, weight: Image, reach: int) -> Floats:
    """(p, 4, 4): the blocks J_a^T W J_b of the pairs a = ``first`` (p,), b = ``second`` (p,) of ``columns`` (n, 4).

    The product of two Gaussians is one between them; its moments about ``a`` give the block of ``a``'s own powers
    (dy, dx, 1, r^2), and those of ``b`` are the same powers shifted.
    """
    out = np.zeros((len(first), 4, 4))
    gy, gx, dy, dx = np.empty((4, 2 * reach + 1), np.float32)
    m, basis, shifted = np.zeros((5, 5)), np.zeros((4, 4)), np.zeros((4, 4))
    for k in range(len(first)):
        a, b = columns[first[k]], columns[second[k]]
        per_a, per_b = np.exp(-2 * a[3]), np.exp(-2 * b[3])
        per = per_a + per_b
        y, x = (per_a * a[0] + per_b * b[0]) / per, (per_a * a[1] + per_b * b[1]) / per
        top, bottom = axis(y, per, reach, weight.shape[0], gy, dy)
        left, right = axis(x, per, reach, weight.shape[1], gx, dx)
        off_y, off_x = b[0] - a[0], b[1] - a[1]
        share = np.exp(-0.5 * per_a * per_b / per * (off_y**2 + off_x**2))
        dy += np.float32(y - a[0])
        dx += np.float32(x - a[1])
        m[:] = 0.0
        for i in range(bottom - top):
            row = weight[top + i, left:right]
            s0 = s1 = s2 = s3 = s4 = np.float32(0)
            for j in range(right - left):
                u = gx[j] * row[j]
                square = dx[j] * dx[j]
                s0 += u
                s1 += u * dx[j]
                s2 += u * square
                s3 += u * square * dx[j]
                s4 += u * square * square
            v = share * gy[i]
            for power in range(5):
                m[power, 0] += v * s0
                m[power, 1] += v * s1
                m[power, 2] += v * s2
                m[power, 3] += v * s3
                m[power, 4] += v * s4
                v *= dy[i]
        r2 = m[2, 0] + m[0, 2]
        basis[0, 0], basis[0, 1], basis[0, 2], basis[0, 3] = m[2, 0], m[1, 1], m[1, 0], m[3, 0] + m[1, 2]
        basis[1, 1], basis[1, 2], basis[1, 3] = m[0, 2], m[0, 1], m[2, 1] + m[0, 3]
        basis[2, 2], basis[2, 3] = m[0, 0], r2
        basis[3, 3] = m[4, 0] + 2 * m[2, 2] + m[0, 4]
        for i in range(4):
            for j in range(i):
                basis[i, j] = basis[j, i]
        for i in range(4):
            shifted[i, 0] = basis[i, 0] - off_y * basis[i, 2]
            shifted[i, 1] = basis[i, 1] - off_x * basis[i, 2]
            shifted[i, 2] = basis[i, 2]
            shifted[i, 3] = (
                basis[i, 3] - 2 * off_y * basis[i, 0] - 2 * off_x * basis[i, 1] + (off_y**2 + off_x**2) * basis[i, 2]
            )
        for i in range(4):
            slope = 1.0 if i == 2 else a[2] * per_a
            for j in range(4):
                out[k, i, j] = slope * shifted[i, j] * (1.0 if j == 2 else b[2] * per_b)
    return out


@njit(cache=True, nogil=True, fastmath=True)
def core_means(columns: Floats, image: Image, measured: Image, radius: Floats) -> tuple[Floats, Floats, Floats]:
    """Within ``radius`` (n,) [px] of each column: (n,) mean of ``image`` over the ``measured`` pixels, (n,) how many
    these are, and (n,) how many pixels there are."""
    mean, count, whole = np.zeros(len(columns)), np.zeros(len(columns)), np.zeros(len(columns))
    for k in range(len(columns)):
        y, x, r = columns[k, 0], columns[k, 1], radius[k]
        total = n = m = 0.0
        for i in range(max(0, int(y - r)), min(image.shape[0], int(y + r) + 2)):
            for j in range(max(0, int(x - r)), min(image.shape[1], int(x + r) + 2)):
                if (i - y) ** 2 + (j - x) ** 2 <= r * r:
                    total += image[i, j] * measured[i, j]
                    n += measured[i, j]
                    m += 1
        mean[k], count[k], whole[k] = total / max(n, 1.0), n, m
    return mean, count, whole


def pixels_of(image: NDArray[Any]) -> Image:
    """The image as the compiled sums take it."""
    return np.ascontiguousarray(image, dtype=np.float32)
