"""The background: a bilinear interpolation between the nodes of a coarse mesh, compiled.

Nodes lie evenly from the first pixel to the last. A pixel between the nodes n and n + 1, at the part t of the way, is
(1 - t) of the one and t of the other, along rows and columns alike: four nodes in all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from stemloop.describe.finding.gaussians import Floats, Image, Integers, axis


class MeshOverlaps(NamedTuple):
    """M^T W M of a mesh (rows, cols), M being the interpolation: a node's product with ``itself``, with the node on its
    ``right``, the one ``below``, and across (with the one below on the right, which is the same as of those two's
    other neighbours)."""

    itself: Floats
    right: Floats
    below: Floats
    across: Floats


def nodes(shape: tuple[int, ...], pitch: float) -> tuple[int, int]:
    """Nodes of a mesh over ``shape`` that are at least ``pitch`` [px] apart, two at least on each side."""
    return max(2, int((shape[0] - 1) / pitch) + 1), max(2, int((shape[1] - 1) / pitch) + 1)


@njit(cache=True, nogil=True)
def _hats(size: int, nodes: int) -> tuple[Integers, NDArray[Any]]:
    """For each of ``size`` pixels the node before it and how far it is past that node."""
    place = np.arange(size) * ((nodes - 1) / (size - 1))
    left: Integers = np.minimum(place.astype(np.int64), nodes - 2)
    return left, place - left


@njit(cache=True, nogil=True, fastmath=True)
def paint(mesh: Floats, image: Image) -> None:
    """Set ``image`` to the interpolation of ``mesh`` (at least 2 x 2 nodes)."""
    top, down = _hats(image.shape[0], mesh.shape[0])
    left, along = _hats(image.shape[1], mesh.shape[1])
    across = np.empty((mesh.shape[0], image.shape[1]), np.float32)
    for node in range(mesh.shape[0]):
        for j in range(image.shape[1]):
            across[node, j] = (1 - along[j]) * mesh[node, left[j]] + along[j] * mesh[node, left[j] + 1]
    for i in range(image.shape[0]):
        low, high = np.float32(1 - down[i]), np.float32(down[i])
        one, other, row = across[top[i]], across[top[i] + 1], image[i]
        for j in range(len(row)):
            row[j] = low * one[j] + high * other[j]


@njit(cache=True, nogil=True, fastmath=True)
def gather(image: Image, rows: int, cols: int) -> Floats:
    """(rows, cols): M^T ``image``."""
    top, down = _hats(image.shape[0], rows)
    left, along = _hats(image.shape[1], cols)
    lines = np.zeros((rows, image.shape[1]), np.float32)
    for i in range(image.shape[0]):
        low, high = np.float32(1 - down[i]), np.float32(down[i])
        one, other, row = lines[top[i]], lines[top[i] + 1], image[i]
        for j in range(len(row)):
            one[j] += low * row[j]
            other[j] += high * row[j]
    out = np.zeros((rows, cols))
    for node in range(rows):
        for j in range(image.shape[1]):
            out[node, left[j]] += (1 - along[j]) * lines[node, j]
            out[node, left[j] + 1] += along[j] * lines[node, j]
    return out


@njit(cache=True, nogil=True, fastmath=True)
def _overlaps(weight: Image, rows: int, cols: int) -> tuple[Floats, Floats, Floats, Floats]:
    top, down = _hats(weight.shape[0], rows)
    left, along = _hats(weight.shape[1], cols)
    same = np.zeros((rows, weight.shape[1]), np.float32)  # the node with itself, and with the one below
    next_ = np.zeros((rows, weight.shape[1]), np.float32)
    for i in range(weight.shape[0]):
        low, high = np.float32((1 - down[i]) ** 2), np.float32(down[i] ** 2)
        mixed = np.float32(down[i] * (1 - down[i]))
        one, other, both, row = same[top[i]], same[top[i] + 1], next_[top[i]], weight[i]
        for j in range(len(row)):
            one[j] += low * row[j]
            other[j] += high * row[j]
            both[j] += mixed * row[j]
    itself, right = np.zeros((rows, cols)), np.zeros((rows, cols))
    below, across = np.zeros((rows, cols)), np.zeros((rows, cols))
    for node in range(rows):
        for j in range(weight.shape[1]):
            t, c = along[j], left[j]
            itself[node, c] += (1 - t) ** 2 * same[node, j]
            itself[node, c + 1] += t**2 * same[node, j]
            right[node, c] += t * (1 - t) * same[node, j]
            below[node, c] += (1 - t) ** 2 * next_[node, j]
            below[node, c + 1] += t**2 * next_[node, j]
            across[node, c] += t * (1 - t) * next_[node, j]
    return itself, right, below, across


def overlaps(weight: Image, rows: int, cols: int) -> MeshOverlaps:
    """The products of a mesh's nodes with themselves and their neighbours, pixels weighted by ``weight``."""
    return MeshOverlaps(*_overlaps(weight, rows, cols))


@njit(cache=True, nogil=True, fastmath=True)
def with_columns(columns: Floats, weight: Image, reach: int, rows: int, cols: int) -> tuple[NDArray[np.int64], Floats]:
    """Products of each column with the mesh: (n, 2) the first node under its square, and (n, 4, 3, 3) J^T W M of its
    four parameters with that node and the two next along each axis (nodes are a square apart or more)."""
    n = len(columns)
    first, out = np.zeros((n, 2), np.int64), np.zeros((n, 4, 3, 3))
    tops, down = _hats(weight.shape[0], rows)
    lefts, along = _hats(weight.shape[1], cols)
    gy, gx, dy, dx = np.empty((4, 2 * reach + 1), np.float32)
    hats = np.zeros((3, 2 * reach + 1), np.float32)
    part = np.zeros((3, 3))
    for k in range(n):
        per = np.exp(-2 * columns[k, 3])
        top, bottom = axis(columns[k, 0], per, reach, weight.shape[0], gy, dy)
        left, right = axis(columns[k, 1], per, reach, weight.shape[1], gx, dx)
        if bottom <= top or right <= left:
            continue
        r0, c0 = tops[top], lefts[left]
        first[k, 0], first[k, 1] = r0, c0
        hats[:] = 0
        for j in range(right - left):
            c = min(lefts[left + j] - c0, 1)
            hats[c, j] = gx[j] * (1 - along[left + j])
            hats[c + 1, j] = gx[j] * along[left + j]
        bright = columns[k, 2] * per
        for i in range(bottom - top):
            row = weight[top + i, left:right]
            for c in range(3):
                hat = hats[c]
                s0 = s1 = s2 = np.float32(0)
                for j in range(right - left):
                    u = hat[j] * row[j]
                    s0 += u
                    s1 += u * dx[j]
                    s2 += u * dx[j] * dx[j]
                part[c, 0], part[c, 1], part[c, 2] = s0, s1, s2
            r = min(tops[top + i] - r0, 1)
            for near in range(2):
                share = gy[i] * (down[top + i] if near else 1 - down[top + i])
                for c in range(3):
                    out[k, 0, r + near, c] += share * bright * dy[i] * part[c, 0]
                    out[k, 1, r + near, c] += share * bright * part[c, 1]
                    out[k, 2, r + near, c] += share * part[c, 0]
                    out[k, 3, r + near, c] += share * bright * (dy[i] * dy[i] * part[c, 0] + part[c, 2])
    return first, out


def values(mesh: Floats, place: Floats, shape: tuple[int, ...]) -> Floats:
    """(n,) the interpolation at each ``place`` (n, 2) [px] of an image of ``shape``."""
    at = np.clip(place, 0, np.array(shape) - 1) * (np.array(mesh.shape) - 1) / (np.array(shape) - 1)
    low = np.minimum(at.astype(np.int64), np.array(mesh.shape) - 2)
    (r, c), (s, t) = low.T, (at - low).T
    upper = (1 - t) * mesh[r, c] + t * mesh[r, c + 1]
    lower = (1 - t) * mesh[r + 1, c] + t * mesh[r + 1, c + 1]
    return np.asarray((1 - s) * upper + s * lower)
