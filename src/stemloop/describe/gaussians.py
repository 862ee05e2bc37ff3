"""Sums of many Gaussian columns on an image and their derivatives, compiled.

A column is (row, column, amplitude A, ln w); its Gaussian ``g = exp(-r^2 / 2 w^2)`` lives on a square of ``reach``
pixels around its nearest pixel. The derivatives of ``A g`` by the four parameters are, with ``p = 1/w^2``,
``A g dy p``, ``A g dx p``, ``g`` and ``A g r^2 p``. The Gaussian is a product of one factor a row and one a column, so
that a square of n pixels a side costs 2 n exponentials.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@njit(cache=True, nogil=True)
def _axis(place: float, per: float, reach: int, size: int, g: Floats, d: Floats) -> tuple[int, int]:
    """Fill ``g`` and the distances ``d`` along one axis; (first, one past the last) pixel inside the image."""
    middle = round(place)
    first, stop = max(0, middle - reach), min(size, middle + reach + 1)
    for i in range(first, stop):
        d[i - first] = i - place
        g[i - first] = np.exp(-0.5 * per * (i - place) ** 2)
    return first, stop


@njit(cache=True, nogil=True)
def paint(columns: Floats, steps: Floats, reach: int, image: Floats) -> None:
    """Add J ``steps`` to ``image``: ``steps`` (n, 4) are changes of the columns' parameters (n, 4).

    With ``steps`` zero but for the amplitudes it adds the columns themselves.
    """
    gy, gx, dy, dx = np.empty((4, 2 * reach + 1))
    for k in range(len(columns)):
        per = np.exp(-2 * columns[k, 3])
        top, bottom = _axis(columns[k, 0], per, reach, image.shape[0], gy, dy)
        left, right = _axis(columns[k, 1], per, reach, image.shape[1], gx, dx)
        bright = columns[k, 2] * per
        sy, sx, sa, sw = bright * steps[k, 0], bright * steps[k, 1], steps[k, 2], bright * steps[k, 3]
        for i in range(bottom - top):
            along = sa + dy[i] * (sy + sw * dy[i])
            row = image[top + i, left:right]
            for j in range(right - left):
                row[j] += gy[i] * gx[j] * (along + dx[j] * (sx + sw * dx[j]))


@njit(cache=True, nogil=True)
def gather(columns: Floats, image: Floats, reach: int) -> Floats:
    """(n, 4): J^T ``image``."""
    out = np.zeros((len(columns), 4))
    gy, gx, dy, dx = np.empty((4, 2 * reach + 1))
    for k in range(len(columns)):
        per = np.exp(-2 * columns[k, 3])
        top, bottom = _axis(columns[k, 0], per, reach, image.shape[0], gy, dy)
        left, right = _axis(columns[k, 1], per, reach, image.shape[1], gx, dx)
        y = x = a = w = 0.0
        for i in range(bottom - top):
            row = image[top + i, left:right]
            s0 = s1 = s2 = 0.0
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


@njit(cache=True, nogil=True)
def normal(columns: Floats, weight: Floats, reach: int) -> Floats:
    """(n, 4, 4): each column's own block of J^T W J."""
    out = np.zeros((len(columns), 4, 4))
    gy, gx, dy, dx = np.empty((4, 2 * reach + 1))
    slope = np.empty(4)
    for k in range(len(columns)):
        per = np.exp(-2 * columns[k, 3])
        top, bottom = _axis(columns[k, 0], per, reach, weight.shape[0], gy, dy)
        left, right = _axis(columns[k, 1], per, reach, weight.shape[1], gx, dx)
        # moments of W g^2: rows by powers of dy, columns by powers of dx
        m = np.zeros((5, 5))
        for i in range(bottom - top):
            row = weight[top + i, left:right]
            s0 = s1 = s2 = s3 = s4 = 0.0
            for j in range(right - left):
                u = gx[j] * gx[j] * row[j]
                s0 += u
                u *= dx[j]
                s1 += u
                u *= dx[j]
                s2 += u
                u *= dx[j]
                s3 += u
                s4 += u * dx[j]
            v = gy[i] * gy[i]
            for power in range(5):
                m[power, 0] += v * s0
                m[power, 1] += v * s1
                m[power, 2] += v * s2
                m[power, 3] += v * s3
                m[power, 4] += v * s4
                v *= dy[i]
        r2 = m[2, 0] + m[0, 2]
        bright = columns[k, 2] * per
        slope[0], slope[1], slope[2], slope[3] = bright, bright, 1.0, bright
        block = out[k]
        block[0, 0], block[0, 1], block[0, 2] = m[2, 0], m[1, 1], m[1, 0]
        block[0, 3] = m[3, 0] + m[1, 2]
        block[1, 1], block[1, 2], block[1, 3] = m[0, 2], m[0, 1], m[2, 1] + m[0, 3]
        block[2, 2], block[2, 3] = m[0, 0], r2
        block[3, 3] = m[4, 0] + 2 * m[2, 2] + m[0, 4]
        for i in range(4):
            for j in range(i, 4):
                block[i, j] *= slope[i] * slope[j]
                block[j, i] = block[i, j]
    return out


@njit(cache=True, nogil=True)
def _hats(size: int, nodes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """For each of ``size`` pixels the node before it and how far it is past that node; nodes lie evenly, end to end."""
    place = np.arange(size) * ((nodes - 1) / (size - 1))
    left = np.minimum(place.astype(np.int64), nodes - 2)
    return left, place - left


@njit(cache=True, nogil=True)
def paint_mesh(mesh: Floats, image: Floats) -> None:
    """Add the bilinear interpolation of ``mesh`` (at least 2 x 2 nodes) to ``image``."""
    top, down = _hats(image.shape[0], mesh.shape[0])
    left, along = _hats(image.shape[1], mesh.shape[1])
    slope = np.empty(mesh.shape[1])
    for i in range(image.shape[0]):
        line = (1 - down[i]) * mesh[top[i]] + down[i] * mesh[top[i] + 1]
        slope[:-1] = line[1:] - line[:-1]
        row = image[i]
        for j in range(len(row)):
            row[j] += line[left[j]] + along[j] * slope[left[j]]


@njit(cache=True, nogil=True)
def gather_mesh(image: Floats, rows: int, cols: int, squared: bool) -> Floats:
    """(rows, cols): the transposed of :func:`paint_mesh`, on wish with its weights ``squared``."""
    top, down = _hats(image.shape[0], rows)
    left, along = _hats(image.shape[1], cols)
    up, back = 1 - down, 1 - along
    if squared:
        down, along, up, back = down**2, along**2, up**2, back**2
    mesh = np.zeros((rows, cols))
    line = np.empty(image.shape[1])
    for node in range(rows):  # the pixels are first summed along the columns, a node at a time
        line[:] = 0.0
        for i in range(image.shape[0]):
            weight = up[i] if top[i] == node else (down[i] if top[i] == node - 1 else 0.0)
            if weight != 0.0:
                line += weight * image[i]
        for j in range(len(line)):
            mesh[node, left[j]] += back[j] * line[j]
            mesh[node, left[j] + 1] += along[j] * line[j]
    return mesh


@njit(cache=True, nogil=True)
def core_mean(columns: Floats, image: Floats, radius: Floats) -> tuple[Floats, Floats]:
    """(n,) mean of ``image`` within ``radius`` (n,) [px] of each column, and (n,) how many pixels that are."""
    mean, count = np.zeros(len(columns)), np.zeros(len(columns))
    for k in range(len(columns)):
        y, x, r = columns[k, 0], columns[k, 1], radius[k]
        total = n = 0.0
        for i in range(max(0, int(y - r)), min(image.shape[0], int(y + r) + 2)):
            for j in range(max(0, int(x - r)), min(image.shape[1], int(x + r) + 2)):
                if (i - y) ** 2 + (j - x) ** 2 <= r * r:
                    total += image[i, j]
                    n += 1
        mean[k], count[k] = total / max(n, 1.0), n
    return mean, count


@njit(cache=True, nogil=True)
def _mirrored(i: int, size: int) -> int:
    """Where row ``i`` is read: (d c b a | a b c d | d c b a), the same as scipy.ndimage's ``reflect``."""
    i %= 2 * size
    return i if i < size else 2 * size - 1 - i


@njit(cache=True, nogil=True, fastmath=True)
def _correlate(image: Floats, along_y: Floats, along_x: Floats, out: Floats) -> None:
    """Add to ``out`` the correlation with two even kernels (given by their halves), mirrored at the edges."""
    rows, cols = image.shape
    reach = len(along_x) - 1
    line, padded = np.empty(cols), np.empty(cols + 2 * reach)
    for i in range(rows):
        line[:] = along_y[0] * image[i]
        for k in range(1, len(along_y)):
            one, other, weight = image[_mirrored(i - k, rows)], image[_mirrored(i + k, rows)], along_y[k]
            for j in range(cols):
                line[j] += weight * (one[j] + other[j])
        padded[reach : reach + cols] = line
        for k in range(reach):
            padded[reach - 1 - k] = line[_mirrored(-1 - k, cols)]
            padded[reach + cols + k] = line[_mirrored(cols + k, cols)]
        goal = out[i]
        for j in range(cols):
            goal[j] += along_x[0] * padded[reach + j]
        for k in range(1, reach + 1):
            weight = along_x[k]
            for j in range(cols):
                goal[j] += weight * (padded[reach + j - k] + padded[reach + j + k])


def _kernels(sigma: float) -> tuple[Floats, Floats]:
    """Half of a Gaussian of unit sum, and of its second derivative, to four sigma."""
    x = np.arange(int(4.0 * sigma + 0.5) + 1, dtype=np.float64)
    g = np.exp(-0.5 * (x / sigma) ** 2)
    g /= g[0] + 2 * g[1:].sum()
    return g, g * (x**2 / sigma**4 - 1 / sigma**2)


def smooth(image: Floats, sigma: float) -> Floats:
    """The image convolved with a Gaussian of ``sigma`` [px], mirrored at the edges."""
    g, _ = _kernels(sigma)
    out = np.zeros(image.shape)
    _correlate(image, g, g, out)
    return out


def negative_laplacian(image: Floats, sigma: float) -> Floats:
    """Minus the Laplacian of the image convolved with a Gaussian of ``sigma`` [px], mirrored at the edges."""
    g, curved = _kernels(sigma)
    out = np.zeros(image.shape)
    _correlate(image, -curved, g, out)
    _correlate(image, g, -curved, out)
    return out
