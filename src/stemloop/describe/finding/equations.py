"""The normal equations of all columns and the background together, as a sparse matrix of small blocks.

J^T W J has a block of 4 x 4 for each column, one for each pair of columns that overlap, one of 4 x 9 between a column
and the nodes of the background under it, and the nodes' own products. Summed once from the pixels, it is solved by
conjugate gradients without looking at a pixel again.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from scipy.spatial import cKDTree

from stemloop.describe.finding import gaussians, mesh
from stemloop.describe.finding.gaussians import Floats, Image, Integers

#: Gaussians farther apart than this many widths do not overlap (their product is under 2e-4 of either's square).
_FAR = 6.0
#: Most neighbours that a column's deviations take as free.
_NEIGHBOURS = 8


class Equations:
    """J^T W J of ``columns`` (n, 4) on a background of ``nodes``, with the ``precision`` (n, 4) of what is known
    beforehand on its diagonal."""

    def __init__(
        self, columns: Floats, nodes: tuple[int, int], weight: Image, reach: int, width: float, precision: Floats
    ) -> None:
        everyone = np.arange(len(columns))
        self.own = gaussians.overlaps(columns, everyone, everyone, weight, reach)
        self.own[:, range(4), range(4)] += precision
        pairs = cKDTree(columns[:, :2]).query_pairs(_FAR * width, output_type="ndarray").astype(np.int64)
        self.first, self.second = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
        self.pair = gaussians.overlaps(columns, self.first, self.second, weight, max(2, int(np.ceil(0.75 * reach))))
        self.node, self.under = mesh.with_columns(columns, weight, reach, *nodes)
        self.mesh = mesh.overlaps(weight, *nodes)

    def solve(self, right: Floats, lift: Floats, damping: float, accuracy: float = 0.01) -> tuple[Floats, Floats]:
        """The changes of columns (n, 4) and background that ``right`` (n, 4) and ``lift`` (nodes) ask for, to a
        relative ``accuracy``, with ``damping`` of the diagonal added to it."""
        own = self.own.copy()
        own[:, range(4), range(4)] *= 1 + damping
        scale = np.sqrt(np.diagonal(own, axis1=1, axis2=2))
        scale = np.maximum(scale, 1e-6 * scale.max(axis=0) + 1e-30)
        both = scale[:, :, None] * scale[:, None, :]
        roughly = np.linalg.inv(own / both + 1e-9 * np.eye(4)) / both
        itself = self.mesh.itself * (1 + damping)
        itself = np.maximum(itself, 1e-9 * itself.max() + 1e-300)
        return _conjugate_gradients(
            own, self.first, self.second, self.pair, self.node, self.under,
            itself, self.mesh.right, self.mesh.below, self.mesh.across,
            roughly, right, lift, accuracy,
        )  # fmt: skip

    def deviations(self) -> Floats:
        """(n, 4) 1-sigma deviations: each column with its neighbours and the background under it unknown too."""
        both = np.concatenate([self.first, self.second])
        other = np.concatenate([self.second, self.first])
        block = np.concatenate([np.arange(len(self.first)), -1 - np.arange(len(self.first))])
        order = np.lexsort((other, both))
        start = np.searchsorted(both[order], np.arange(len(self.own) + 1))
        m = self.mesh
        return _deviations(
            self.own, self.pair, start, other[order], block[order], self.node, self.under,
            m.itself, m.right, m.below, m.across,
        )  # fmt: skip


@njit(cache=True, nogil=True, fastmath=True)
def _times(
    own: Floats, first: Integers, second: Integers, pair: Floats, node: Integers, under: Floats,
    itself: Floats, right: Floats, below: Floats, across: Floats,
    v: Floats, m: Floats, out: Floats, lift: Floats,
) -> None:  # fmt: skip
    """The matrix times columns' changes ``v`` (n, 4) and the mesh's ``m``, into ``out`` and ``lift``."""
    _times_blocks(own, v, out)
    for p in range(len(first)):
        a, b = first[p], second[p]
        for i in range(4):
            for j in range(4):
                out[a, i] += pair[p, i, j] * v[b, j]
                out[b, j] += pair[p, i, j] * v[a, i]
    _times_mesh(itself, right, below, across, m, lift)
    for k in range(len(own)):
        for s in range(min(3, m.shape[0] - node[k, 0])):
            for t in range(min(3, m.shape[1] - node[k, 1])):
                r, c = node[k, 0] + s, node[k, 1] + t
                total = 0.0
                for i in range(4):
                    out[k, i] += under[k, i, s, t] * m[r, c]
                    total += under[k, i, s, t] * v[k, i]
                lift[r, c] += total


@njit(cache=True, nogil=True, fastmath=True)
def _times_blocks(block: Floats, v: Floats, out: Floats) -> None:
    """Each of ``v`` (n, 4) times its own ``block`` (n, 4, 4)."""
    for k in range(len(v)):
        for i in range(4):
            total = 0.0
            for j in range(4):
                total += block[k, i, j] * v[k, j]
            out[k, i] = total


@njit(cache=True, nogil=True, fastmath=True)
def _times_mesh(itself: Floats, right: Floats, below: Floats, across: Floats, m: Floats, lift: Floats) -> None:
    """The mesh's own part of the matrix times ``m``."""
    lift[:] = itself * m
    lift[:, :-1] += right[:, :-1] * m[:, 1:]
    lift[:, 1:] += right[:, :-1] * m[:, :-1]
    lift[:-1] += below[:-1] * m[1:]
    lift[1:] += below[:-1] * m[:-1]
    lift[:-1, :-1] += across[:-1, :-1] * m[1:, 1:]
    lift[1:, 1:] += across[:-1, :-1] * m[:-1, :-1]
    lift[:-1, 1:] += across[:-1, :-1] * m[1:, :-1]
    lift[1:, :-1] += across[:-1, :-1] * m[:-1, 1:]


@njit(cache=True, nogil=True, fastmath=True)
def _roughly(inverse: Floats, itself: Floats, v: Floats, m: Floats, out: Floats, lift: Floats) -> None:
    """Each column by its own block, each node by itself."""
    _times_blocks(inverse, v, out)
    lift[:] = m / itself


@njit(cache=True, nogil=True)
def _conjugate_gradients(
    own: Floats, first: Integers, second: Integers, pair: Floats, node: Integers, under: Floats,
    itself: Floats, right: Floats, below: Floats, across: Floats,
    inverse: Floats, target: Floats, lift: Floats, accuracy: float,
) -> tuple[Floats, Floats]:  # fmt: skip
    x, mx = np.zeros_like(target), np.zeros_like(lift)
    r, mr = target.copy(), lift.copy()
    z, mz, q, mq = np.empty_like(r), np.empty_like(mr), np.empty_like(r), np.empty_like(mr)
    _roughly(inverse, itself, r, mr, z, mz)
    p, mp = z.copy(), mz.copy()
    rz = (r * z).sum() + (mr * mz).sum()
    enough = rz * accuracy**2
    for _ in range(200):
        if rz <= enough or rz == 0:
            break
        _times(own, first, second, pair, node, under, itself, right, below, across, p, mp, q, mq)
        along = (p * q).sum() + (mp * mq).sum()
        if along <= 0:
            break
        step = rz / along
        x += step * p
        mx += step * mp
        r -= step * q
        mr -= step * mq
        _roughly(inverse, itself, r, mr, z, mz)
        old = rz
        rz = (r * z).sum() + (mr * mz).sum()
        p = z + rz / old * p
        mp = mz + rz / old * mp
    return x, mx


@njit(cache=True, nogil=True)
def _deviations(
    own: Floats, pair: Floats, start: Integers, other: Integers, block: Integers, node: Integers, under: Floats,
    itself: Floats, right: Floats, below: Floats, across: Floats,
) -> Floats:  # fmt: skip
    """For each column, the root of the diagonal of the inverse of the matrix of it, its neighbours and nine nodes."""
    out = np.empty((len(own), 4))
    most = 4 * (1 + _NEIGHBOURS) + 9
    whole, whom = np.zeros((most, most)), np.empty(1 + _NEIGHBOURS, np.int64)
    for k in range(len(own)):
        count = min(1 + _NEIGHBOURS, 1 + start[k + 1] - start[k])
        whom[0], whom[1:count] = k, other[start[k] : start[k] + count - 1]
        size = 4 * count + 9
        whole[:size, :size] = 0.0
        for a in range(count):
            ka = whom[a]
            whole[4 * a : 4 * a + 4, 4 * a : 4 * a + 4] = own[ka]
            for n in range(start[ka], start[ka + 1]):
                for b in range(count):
                    if whom[b] == other[n]:
                        piece = pair[block[n]] if block[n] >= 0 else pair[-1 - block[n]].T
                        whole[4 * a : 4 * a + 4, 4 * b : 4 * b + 4] = piece
            _enter_under(whole, 4 * a, 4 * count, under[ka], node[ka] - node[k])
        _enter_mesh(whole[4 * count : size, 4 * count : size], node[k], itself, right, below, across)
        _first_deviations(whole[:size, :size], out[k])
    return out


@njit(cache=True, nogil=True)
def _enter_under(whole: Floats, row: int, col: int, under: Floats, off: Integers) -> None:
    """Put a column's products with the nodes ``off`` from the first of nine at ``row``, ``col`` of the matrix."""
    for s in range(3):
        for t in range(3):
            r, c = s + off[0], t + off[1]
            if 0 <= r < 3 and 0 <= c < 3:
                for i in range(4):
                    whole[row + i, col + 3 * r + c] = under[i, s, t]
                    whole[col + 3 * r + c, row + i] = under[i, s, t]


@njit(cache=True, nogil=True)
def _enter_mesh(nine: Floats, node: Integers, itself: Floats, right: Floats, below: Floats, across: Floats) -> None:
    """Fill the matrix (9, 9) of the nodes from ``node`` on; those beyond the mesh stand alone."""
    for s in range(3):
        for t in range(3):
            i, r, c = 3 * s + t, node[0] + s, node[1] + t
            inside = r < itself.shape[0] and c < itself.shape[1]
            nine[i, i] = itself[r, c] + 1e-300 if inside else 1.0
            if not inside:
                continue
            on_right, on_below = t < 2 and c + 1 < itself.shape[1], s < 2 and r + 1 < itself.shape[0]
            if on_right:
                nine[i, i + 1] = nine[i + 1, i] = right[r, c]
            if on_below:
                nine[i, i + 3] = nine[i + 3, i] = below[r, c]
            if on_right and on_below:
                nine[i, i + 4] = nine[i + 4, i] = across[r, c]
                nine[i + 1, i + 3] = nine[i + 3, i + 1] = across[r, c]


@njit(cache=True, nogil=True, fastmath=True)
def _first_deviations(matrix: Floats, out: Floats) -> None:
    """Roots of the first four diagonal elements of the inverse of a symmetric positive ``matrix``, which is used up.

    By elimination from the last unknown to the fifth; what remains of the first four is inverted.
    """
    size = len(matrix)
    scale = np.empty(size)
    for i in range(size):
        scale[i] = 1 / np.sqrt(max(matrix[i, i], 1e-300))
    for i in range(size):
        for j in range(size):
            matrix[i, j] *= scale[i] * scale[j]
        matrix[i, i] += 1e-9
    for last in range(size - 1, 3, -1):
        for i in range(last):
            part = matrix[last, i] / matrix[last, last]
            if part != 0.0:
                for j in range(i + 1):
                    matrix[i, j] -= part * matrix[last, j]
    for i in range(4):
        for j in range(i):
            matrix[j, i] = matrix[i, j]
    inverse = np.linalg.inv(matrix[:4, :4].copy())
    for i in range(4):
        out[i] = np.sqrt(max(inverse[i, i], 0.0)) * scale[i]
