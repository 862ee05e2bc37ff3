"""Frames as plain arrays, with kernels that read them once.

A row's worth of running sums gives the totals and both first moments with additions only: with ``S_r`` the sum of
rows 0 .. r of a column and ``T`` the sum of all ``S_r``, the sum of row number x counts is ``rows S - T``.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.stream import lanes, strips
from stemloop.stream import masks as m

#: Frames that are turned into float64 at a time, where a mask is neither a ramp nor of zeros and ones [bytes].
_CHUNK = 1 << 22


def as_counts(frames: NDArray[Any]) -> NDArray[Any]:
    """``frames`` (n, rows, columns) as unsigned counts of 8, 16 or 32 bits, without a copy where they are."""
    frames = np.asarray(frames)
    if frames.ndim != 3 or frames.dtype.kind not in "bui" or min(frames.shape[1:]) < 1:
        raise InputError(f"frames are whole numbers (n, rows, columns); got {frames.dtype} {frames.shape}.")
    if frames.dtype in (np.uint8, np.uint16, np.uint32):
        return np.ascontiguousarray(frames)
    low, high = (int(frames.min()), int(frames.max())) if frames.size else (0, 0)
    if low < 0 or high >= 2**32:
        raise InputError(f"counts are from 0 to 2^32 - 1; got {low} to {high}.")
    kind = np.uint8 if high < 2**8 else np.uint16 if high < 2**16 else np.uint32
    return frames.astype(kind, order="C")


class DenseBlock:
    """A :class:`~stemloop.core.protocols.Block` of plain frames (n, rows, columns) of uint8, uint16 or uint32."""

    def __init__(self, frames: NDArray[Any]) -> None:
        self._frames = as_counts(frames)

    @property
    def frames(self) -> int:
        return len(self._frames)

    @property
    def shape(self) -> tuple[int, int]:
        return self._frames.shape[1], self._frames.shape[2]

    @property
    def nbytes(self) -> int:
        return self._frames.nbytes

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, key: slice) -> DenseBlock:
        return DenseBlock(self._frames[key])

    def frame(self, index: int) -> NDArray[Any]:
        return self._frames[index]

    def dense(self) -> NDArray[Any]:
        return self._frames

    def dot(self, masks: NDArray[Any]) -> NDArray[np.float64]:
        """(frames, k): sums under ``masks``; ramps (ones, row, column number) and masks of zeros and ones are summed
        as whole numbers in one pass, others in float64."""
        masks = m.checked(masks, self.shape)
        out = np.empty((self.frames, len(masks)))
        ramp = m.ramp_numbers(masks)
        binary = [k for k, mask in enumerate(masks) if ramp[k] < 0 and np.all((mask == 0) | (mask == 1))]
        general = [k for k in range(len(masks)) if ramp[k] < 0 and k not in binary]
        wanted = [(k, i) for k, i in enumerate(ramp) if i >= 0]
        if wanted or binary:
            sums = self._fused(masks[binary])
            for k, i in wanted:
                out[:, k] = sums[:, i]
            out[:, binary] = sums[:, 3:]
        if general:
            matrix = masks[general].reshape(len(general), -1).T.astype(np.float64)
            step = max(1, _CHUNK // (8 * len(matrix)))
            flat = self._frames.reshape(self.frames, self.shape[0] * self.shape[1])
            for first_frame in range(0, self.frames, step):
                part = slice(first_frame, first_frame + step)
                out[part, general] = flat[part].astype(np.float64) @ matrix
        return out

    def moments(self) -> NDArray[np.float64]:
        return self._fused(np.zeros((0, *self.shape)))

    def total(self) -> NDArray[np.uint64]:
        out = np.zeros(self.shape, np.uint64)
        _total(self._frames, out)
        return out

    def azimuthal(self, labels: NDArray[Any], count: int) -> NDArray[np.float64]:
        """(frames, count): the counts of each frame under each label 0 .. ``count`` - 1 of ``labels`` (rows, columns),
        such as the rings of :func:`stemloop.stream.masks.rings`; other labels are left out."""
        out = np.zeros((self.frames, count + 1), np.uint64)
        _azimuthal(
            self._frames.reshape(self.frames, self.shape[0] * self.shape[1]), m.labelled(labels, count, self.shape), out
        )
        return out[:, :count].astype(np.float64)

    def _fused(self, masks: NDArray[Any]) -> NDArray[np.float64]:
        """(frames, 3 + k): sum, sum of row x counts, sum of column x counts, sums under ``masks`` (k) of 0 and 1."""
        dtype = self._frames.dtype
        rows, columns = self.shape
        fits = rows * max(rows + 1, 2 * columns) // 2 * np.iinfo(dtype).max < 2**32
        sums = np.zeros((3, columns), np.uint32 if fits else np.uint64)
        select = np.where(masks != 0, np.iinfo(dtype).max, 0).astype(dtype).reshape(len(masks), rows * columns)
        out = np.empty((self.frames, 3 + len(masks)))
        flat = self._frames.reshape(self.frames, rows * columns)
        if lanes.READY and fits and dtype == np.uint16 and columns % strips.STRIP == 0:
            first = select[0] if len(masks) else np.zeros(rows * columns, dtype)
            bits = np.packbits(first != 0, bitorder="little").view(np.uint32)
            _moments_and_masks_in_strips(self._frames, flat, bits, select, *sums, out)
            return out
        _moments_and_masks(self._frames, flat, select, sums[0], sums[1], sums.dtype.type(0), out)
        return out


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _finished(s, t, rows, out):  # type: ignore[no-untyped-def]
    whole = np.uint64(0)
    below = np.uint64(0)
    across = np.uint64(0)
    for c in range(len(s)):
        whole += np.uint64(s[c])
        below += np.uint64(t[c])
        across += np.uint64(s[c]) * np.uint64(c)
    out[0] = whole
    out[1] = whole * np.uint64(rows) - below
    out[2] = across


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _under(counts, select, zero, out):  # type: ignore[no-untyped-def]
    for k in range(len(select)):  # the frame is in the cache now
        under = zero
        for p in range(len(counts)):
            under += counts[p] & select[k, p]
        out[k] = under


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _moments_and_masks_in_strips(frames, flat, bits, select, s, t, u, out):  # type: ignore[no-untyped-def]
    for f in range(len(frames)):
        strips.column_sums(frames, f, bits, s, t, u)
        _finished(s, t, frames.shape[1], out[f])
        if len(select):
            out[f, 3] = u.sum()
            _under(flat[f], select[1:], np.uint32(0), out[f, 4:])


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _moments_and_masks(frames, flat, select, s, t, zero, out):  # type: ignore[no-untyped-def]
    number, rows, columns = frames.shape
    fours = rows - rows % 4
    for f in range(number):
        s[:] = 0
        t[:] = 0
        for r in range(0, fours, 4):
            for c in range(columns):
                s0 = s[c] + frames[f, r, c]
                s1 = s0 + frames[f, r + 1, c]
                s2 = s1 + frames[f, r + 2, c]
                s3 = s2 + frames[f, r + 3, c]
                s[c] = s3
                t[c] += s0 + s1 + s2 + s3
        for r in range(fours, rows):
            for c in range(columns):
                s[c] += frames[f, r, c]
                t[c] += s[c]
        _finished(s, t, rows, out[f])
        _under(flat[f], select, zero, out[f, 3:])


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _total(frames, out):  # type: ignore[no-untyped-def]
    number, rows, columns = frames.shape
    for f in range(number):
        for r in range(rows):
            for c in range(columns):
                out[r, c] += np.uint64(frames[f, r, c])


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _azimuthal(flat, labels, out):  # type: ignore[no-untyped-def]
    number, pixels = flat.shape
    for f in range(number):
        for p in range(pixels):
            out[f, labels[p]] += np.uint64(flat[f, p])
