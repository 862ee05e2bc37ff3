"""Frames as electrons: for each frame the sorted list of the pixels that were hit (compressed sparse rows).

At some hundred electrons a frame this is tens of times smaller than the frames, and every linear question (sums under
masks, moments, rings) costs one table look-up and one addition an electron.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.protocols import Block
from stemloop.stream import lanes
from stemloop.stream import masks as m
from stemloop.stream.dense import as_counts

#: Electrons that may always be listed one by one.
_MOST_SINGLE = 1 << 24


class EventBlock:
    """A :class:`~stemloop.core.protocols.Block` of electron events.

    Parameters
    ----------
    indptr : (frames + 1,) where each frame's events begin in ``index``; the last entry is the number of events.
    index : flat pixel numbers (row x columns + column), sorted within a frame; kept as uint16 where the frame has at
        most 65536 pixels, else as uint32. Without ``counts`` a pixel that was hit twice stands there twice.
    shape : (rows, columns) of a frame.
    counts : None, or the counts (>= 1) of each entry of ``index``; then no pixel stands twice in a frame.
    trusted : True leaves out the checks, for arrays that were checked before.
    """

    def __init__(
        self,
        indptr: NDArray[Any],
        index: NDArray[Any],
        shape: tuple[int, int],
        counts: NDArray[Any] | None = None,
        *,
        trusted: bool = False,
    ) -> None:
        rows, columns = (int(n) for n in shape)
        if not trusted:
            _check(indptr, index, counts, rows, columns)
        self._shape = (rows, columns)
        self.indptr = np.ascontiguousarray(indptr, np.int64)
        self.index = np.ascontiguousarray(index, index_dtype(rows * columns))
        self.counts = None if counts is None else np.ascontiguousarray(counts, _count_dtype(counts))

    @classmethod
    def from_dense(cls, frames: NDArray[Any]) -> EventBlock:
        """The events of ``frames`` (n, rows, columns) of whole numbers from 0 to 2^32 - 1.

        Counts are kept apart where a hit pixel has more than two electrons on the average.

        >>> EventBlock.from_dense(np.array([[[0, 2], [1, 0]]])).index
        array([1, 1, 2], dtype=uint16)
        """
        frames = as_counts(frames)
        number, rows, columns = frames.shape
        flat = frames.reshape(number, rows * columns)
        hits = np.empty(number, np.int64)
        electrons = np.empty(number, np.int64)
        _measure(flat, hits, electrons)
        apart = int(electrons.sum()) > 2 * int(hits.sum())
        indptr = np.concatenate([[0], np.cumsum(hits if apart else electrons)]).astype(np.int64)
        index = np.empty(int(indptr[-1]), index_dtype(rows * columns))
        if not apart:
            _fill(flat, indptr, index)
            return cls(indptr, index, (rows, columns), trusted=True)
        counts = np.empty(len(index), np.uint32 if flat.dtype == np.uint32 else np.uint16)
        _fill_counted(flat, indptr, index, counts)
        return cls(indptr, index, (rows, columns), counts, trusted=True)

    @classmethod
    def of(cls, block: Block) -> EventBlock:
        """``block`` as events; itself where it is that already."""
        if isinstance(block, cls):
            return block
        as_events = getattr(block, "events", None)
        return as_events() if as_events is not None else cls.from_dense(block.dense())

    @classmethod
    def concatenate(cls, blocks: Sequence[EventBlock]) -> EventBlock:
        """All frames of ``blocks`` of one shape, one after the other."""
        if not blocks or len({block.shape for block in blocks}) != 1:
            raise InputError("concatenate takes at least one block, all with frames of one shape.")
        ends = np.cumsum([0] + [len(block.index) for block in blocks])
        indptr = np.concatenate([[0]] + [block.indptr[1:] + end for block, end in zip(blocks, ends[:-1], strict=True)])
        if all(block.counts is None for block in blocks):
            return cls(indptr, np.concatenate([b.index for b in blocks]), blocks[0].shape, trusted=True)
        counted = [block.counted() for block in blocks]
        if any(block.counts is None for block in blocks):
            return cls.concatenate(counted)
        index, counts = (np.concatenate(parts) for parts in zip(*((b.index, b.counts) for b in counted), strict=True))
        return cls(indptr, index, blocks[0].shape, counts, trusted=True)

    @property
    def frames(self) -> int:
        return len(self.indptr) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def nbytes(self) -> int:
        return self.indptr.nbytes + self.index.nbytes + (0 if self.counts is None else self.counts.nbytes)

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, key: slice) -> EventBlock:
        """Consecutive frames ``block[a:b]``; the arrays are views."""
        first, stop, step = key.indices(self.frames)
        if step != 1:
            raise InputError("a block is cut into consecutive frames: block[a:b].")
        ends = self.indptr[first : max(stop, first) + 1]
        part = slice(int(ends[0]), int(ends[-1]))
        counts = None if self.counts is None else self.counts[part]
        return EventBlock(ends - ends[0], self.index[part], self.shape, counts, trusted=True)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same counts in the same frames."""
        if not isinstance(other, EventBlock) or self.shape != other.shape or self.frames != other.frames:
            return NotImplemented if not isinstance(other, EventBlock) else False
        one, two = (
            (self, other) if (self.counts is None) == (other.counts is None) else (self.counted(), other.counted())
        )
        return bool(
            np.array_equal(one.indptr, two.indptr)
            and np.array_equal(one.index, two.index)
            and (one.counts is None or np.array_equal(one.counts, two.counts))  # type: ignore[arg-type]
        )

    __hash__ = None  # type: ignore[assignment]

    def electrons(self) -> NDArray[np.int64]:
        """(frames,): the electrons of each frame."""
        if self.counts is None:
            return np.diff(self.indptr)
        sums = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        return np.diff(sums[self.indptr])

    def counted(self) -> EventBlock:
        """The same frames with counts apart: each hit pixel stands there once."""
        if self.counts is not None:
            return self
        indptr = np.zeros(self.frames + 1, np.int64)
        index, counts = np.empty_like(self.index), np.empty(len(self.index), np.uint32)
        used = _merge_repeats(self.indptr, self.index, indptr, index, counts)
        return EventBlock(indptr, index[:used], self.shape, counts[:used], trusted=True)

    def single(self) -> EventBlock:
        """The same frames without counts apart: a pixel stands there once for each of its electrons."""
        if self.counts is None:
            return self
        indptr = np.concatenate([[0], np.cumsum(self.electrons())])
        if indptr[-1] > max(_MOST_SINGLE, 64 * len(self.index)):
            raise InputError(
                f"{indptr[-1]} electrons in {len(self.index)} pixels are too many to list one by one; keep them as "
                "counts (codec 'events') or as dense frames."
            )
        return EventBlock(indptr, np.repeat(self.index, self.counts.astype(np.int64)), self.shape, trusted=True)

    def frame(self, index: int) -> NDArray[Any]:
        if not -self.frames <= index < self.frames:
            raise InputError(f"frame {index} is not among the {self.frames} of this block.")
        index %= self.frames
        return self[index : index + 1].dense()[0]

    def dense(self) -> NDArray[Any]:
        """(frames, rows, columns) of uint16, or of uint32 where a pixel has more than 65535 electrons."""
        flat = np.zeros((self.frames, self.shape[0] * self.shape[1]), np.uint16 if self._fits_u16() else np.uint32)
        if self.counts is None:
            _spread(self.indptr, self.index, flat)
        else:
            _spread_counted(self.indptr, self.index, self.counts, flat)
        return flat.reshape(self.frames, *self.shape)

    def dot(self, masks: NDArray[Any]) -> NDArray[np.float64]:
        """(frames, k): sums under ``masks``, several masks of whole numbers with one look-up an electron."""
        masks = m.checked(masks, self.shape)
        if self.counts is None and self.index.dtype == np.uint16:
            sums = lanes.dot(self.indptr, self.index, masks, self._one_by_one)
            if sums is not None:
                return sums.T
        return self._one_by_one(masks).T

    def _one_by_one(self, masks: NDArray[Any]) -> NDArray[np.float64]:
        """(k, frames): the same, an electron after the other."""
        electrons = self.electrons()
        most = int(electrons.max(initial=0))
        rows, columns = self.shape
        ramp = m.ramp_numbers(masks)
        many = len(self.index) >= 100 * self.frames and most * rows * columns < 2**32
        if self.counts is not None or max(ramp, default=0) < 1 or columns & (columns - 1) or not many:
            return self._dot(masks, electrons, most)
        sums = np.empty((3, self.frames))  # row and column are bits of the pixel's number
        sums[0] = electrons
        low, bits = self.index.dtype.type(columns - 1), columns.bit_length() - 1
        _rows_and_columns(self.indptr, self.index, low, bits, sums[1], sums[2])
        if ramp == [0, 1, 2]:
            return sums
        others = iter(self._dot(masks[np.array(ramp) < 0], electrons, most))
        return np.stack([sums[i] if i >= 0 else next(others) for i in ramp])

    def _dot(self, masks: NDArray[Any], electrons: NDArray[np.int64], most: int) -> NDArray[np.float64]:
        """(k, frames): sums under ``masks``."""
        packs = m.pack(masks, most)
        if packs is None:
            out = np.zeros((self.frames, len(masks)))
            table = np.ascontiguousarray(masks.reshape(len(masks), -1).T, np.float64)
            if self.counts is None:
                _dot(self.indptr, self.index, table, out)
            else:
                _dot_counted(self.indptr, self.index, self.counts, table, out)
            return out.T
        out = np.zeros((len(masks), self.frames))
        sums = np.empty(self.frames, np.uint64)
        for packed in packs:
            if self.counts is None:
                _packed(self.indptr, self.index, packed.table, sums)
            else:
                _packed_counted(self.indptr, self.index, self.counts, packed.table.astype(np.uint64), sums)
            packed.unpack(sums, electrons, out)
        return out

    def moments(self) -> NDArray[np.float64]:
        return self.dot(m.ramps(self.shape))

    def total(self) -> NDArray[np.uint64]:
        weights = None if self.counts is None else self.counts
        out = np.zeros(self.shape[0] * self.shape[1], np.uint64)
        if weights is None:
            _total(self.index, out)
        else:
            _total_counted(self.index, weights, out)
        return out.reshape(self.shape)

    def azimuthal(self, labels: NDArray[Any], count: int) -> NDArray[np.float64]:
        """(frames, count): the counts of each frame under each label 0 .. ``count`` - 1 of ``labels`` (rows, columns),
        such as the rings of :func:`stemloop.stream.masks.rings`; other labels are left out."""
        out = np.zeros((self.frames, count + 1), np.uint64)
        flat = m.labelled(labels, count, self.shape)
        if self.counts is None:
            _azimuthal(self.indptr, self.index, flat, out)
        else:
            _azimuthal_counted(self.indptr, self.index, self.counts, flat, out)
        return out[:, :count].astype(np.float64)

    def _fits_u16(self) -> bool:
        if self.counts is not None:
            return int(self.counts.max(initial=0)) < 2**16
        few = int(np.diff(self.indptr).max(initial=0)) < 2**16
        return few or self.counted()._fits_u16()


def index_dtype(pixels: int) -> type[np.uint16] | type[np.uint32]:
    """The type that a flat pixel number of a frame of ``pixels`` pixels is kept in."""
    if not 1 <= pixels <= 2**32:
        raise InputError(f"a frame has from 1 to 2^32 pixels; got {pixels}.")
    return np.uint16 if pixels <= 2**16 else np.uint32


def _count_dtype(counts: NDArray[Any]) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if counts.dtype.itemsize <= 2 else np.uint32


def _check(indptr: NDArray[Any], index: NDArray[Any], counts: NDArray[Any] | None, rows: int, columns: int) -> None:
    indptr, index = np.asarray(indptr), np.asarray(index)
    if indptr.ndim != 1 or len(indptr) < 1 or indptr.dtype.kind not in "ui" or index.dtype.kind not in "ui":
        raise InputError(
            "indptr and index are lists of whole numbers; indptr has one entry more than there are frames."
        )
    if rows < 1 or columns < 1:
        raise InputError(f"a frame has at least one row and one column; got ({rows}, {columns}).")
    ends = indptr.astype(np.int64)
    if ends[0] != 0 or ends[-1] != len(index) or np.any(ends[1:] < ends[:-1]):
        raise InputError(f"indptr grows from 0 to the {len(index)} events; got {ends[0]} to {ends[-1]}.")
    if len(index) == 0:
        return
    if int(index.min()) < 0 or int(index.max()) >= rows * columns:
        raise InputError(f"pixel numbers are below {rows * columns} for frames of ({rows}, {columns}).")
    step = np.diff(index.astype(np.int64))
    step[ends[1:-1][(ends[1:-1] > 0) & (ends[1:-1] < len(index))] - 1] = 1  # from one frame to the next
    if np.any(step < (0 if counts is None else 1)):
        raise InputError("the pixel numbers of a frame grow; sort them (and merge repeats where there are counts).")
    if counts is not None:
        counts = np.asarray(counts)
        if counts.shape != index.shape or counts.dtype.kind not in "ui" or counts.min() < 1 or counts.max() >= 2**32:
            raise InputError("counts has one whole number from 1 to 2^32 - 1 for each entry of index.")


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _measure(flat, hits, electrons):  # type: ignore[no-untyped-def]
    for f in range(flat.shape[0]):
        number = np.int64(0)
        whole = np.int64(0)
        for p in range(flat.shape[1]):
            number += flat[f, p] != 0
            whole += np.int64(flat[f, p])
        hits[f] = number
        electrons[f] = whole


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _fill(flat, indptr, index):  # type: ignore[no-untyped-def]
    pixels = flat.shape[1]
    eights = pixels - pixels % 8
    for f in range(flat.shape[0]):
        i = indptr[f]
        for p in range(0, eights, 8):
            any_hit = (
                flat[f, p] | flat[f, p + 1] | flat[f, p + 2] | flat[f, p + 3]
                | flat[f, p + 4] | flat[f, p + 5] | flat[f, p + 6] | flat[f, p + 7]
            )  # fmt: skip
            if any_hit:
                for q in range(p, p + 8):
                    for _ in range(flat[f, q]):
                        index[i] = q
                        i += 1
        for q in range(eights, pixels):
            for _ in range(flat[f, q]):
                index[i] = q
                i += 1


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _fill_counted(flat, indptr, index, counts):  # type: ignore[no-untyped-def]
    for f in range(flat.shape[0]):
        i = indptr[f]
        for p in range(flat.shape[1]):
            if flat[f, p]:
                index[i] = p
                counts[i] = flat[f, p]
                i += 1


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _merge_repeats(indptr, index, new_indptr, new_index, counts):  # type: ignore[no-untyped-def]
    used = 0
    for f in range(len(indptr) - 1):
        first = used
        for i in range(indptr[f], indptr[f + 1]):
            if used > first and new_index[used - 1] == index[i]:
                counts[used - 1] += np.uint32(1)
            else:
                new_index[used] = index[i]
                counts[used] = 1
                used += 1
        new_indptr[f + 1] = used
    return used


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _spread(indptr, index, flat):  # type: ignore[no-untyped-def]
    for f in range(len(indptr) - 1):
        for i in range(indptr[f], indptr[f + 1]):
            flat[f, index[i]] += 1


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _spread_counted(indptr, index, counts, flat):  # type: ignore[no-untyped-def]
    for f in range(len(indptr) - 1):
        for i in range(indptr[f], indptr[f + 1]):
            flat[f, index[i]] = counts[i]


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _rows_and_columns(indptr, index, low, bits, rows, columns):  # type: ignore[no-untyped-def]
    for f in range(len(indptr) - 1):
        part = index[indptr[f] : indptr[f + 1]]
        whole = np.uint32(0)
        right = np.uint32(0)
        for i in range(len(part)):
            whole += np.uint32(part[i])
            right += np.uint32(part[i] & low)
        rows[f] = (whole - right) >> bits
        columns[f] = right


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _packed(indptr, index, table, sums):  # type: ignore[no-untyped-def]
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)  # unsigned: no look for i < 0
    for f in range(len(indptr) - 1):
        i, stop = np.uint64(indptr[f]), np.uint64(indptr[f + 1])
        fours = stop - ((stop - i) & three)
        a = np.uint64(0)
        b = np.uint64(0)
        c = np.uint64(0)
        d = np.uint64(0)
        while i < fours:  # four sums, so that no addition waits for the one before
            a += np.uint64(table[index[i]])
            b += np.uint64(table[index[i + one]])
            c += np.uint64(table[index[i + two]])
            d += np.uint64(table[index[i + three]])
            i += four
        while i < stop:
            a += np.uint64(table[index[i]])
            i += one
        sums[f] = a + b + c + d


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _packed_counted(indptr, index, counts, table, sums):  # type: ignore[no-untyped-def]
    for f in range(len(indptr) - 1):
        a = np.uint64(0)
        for i in range(indptr[f], indptr[f + 1]):
            a += table[index[i]] * np.uint64(counts[i])
        sums[f] = a


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _dot(indptr, index, table, out):  # type: ignore[no-untyped-def]
    for f in range(len(indptr) - 1):
        for i in range(indptr[f], indptr[f + 1]):
            for k in range(table.shape[1]):
                out[f, k] += table[index[i], k]


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _dot_counted(indptr, index, counts, table, out):  # type: ignore[no-untyped-def]
    for f in range(len(indptr) - 1):
        for i in range(indptr[f], indptr[f + 1]):
            for k in range(table.shape[1]):
                out[f, k] += table[index[i], k] * counts[i]


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _total(index, out):  # type: ignore[no-untyped-def]
    for i in range(len(index)):
        out[index[i]] += np.uint64(1)


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _total_counted(index, counts, out):  # type: ignore[no-untyped-def]
    for i in range(len(index)):
        out[index[i]] += np.uint64(counts[i])


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _azimuthal(indptr, index, labels, out):  # type: ignore[no-untyped-def]
    for f in range(len(indptr) - 1):
        for i in range(indptr[f], indptr[f + 1]):
            out[f, labels[index[i]]] += np.uint64(1)


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _azimuthal_counted(indptr, index, counts, labels, out):  # type: ignore[no-untyped-def]
    for f in range(len(indptr) - 1):
        for i in range(indptr[f], indptr[f + 1]):
            out[f, labels[index[i]]] += np.uint64(counts[i])
