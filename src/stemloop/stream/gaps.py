"""Events as one byte each: the gap to the pixel of the electron before.

A gap of 0 .. 254 is one byte; 255 stands for "255 pixels on, no electron yet". A frame begins at pixel 0. Sums under
masks, moments and totals are taken while walking over the bytes; nothing is decoded in between.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.protocols import Block
from stemloop.stream import lanes
from stemloop.stream import masks as m
from stemloop.stream.events import EventBlock, index_dtype

#: The byte that moves on without an electron.
ESCAPE = 255


class GapBlock:
    """A :class:`~stemloop.core.protocols.Block` of gap-coded electron events.

    Parameters
    ----------
    ends : (frames + 1,) where each frame's bytes begin in ``gaps``; the last entry is the number of bytes.
    gaps : uint8, the gaps of all frames.
    shape : (rows, columns) of a frame.
    trusted : True leaves out the check that every electron lies in its frame.
    """

    def __init__(
        self, ends: NDArray[Any], gaps: NDArray[np.uint8], shape: tuple[int, int], *, trusted: bool = False
    ) -> None:
        self._shape = (int(shape[0]), int(shape[1]))
        self.ends = np.ascontiguousarray(ends, np.int64)
        self.gaps = np.ascontiguousarray(gaps, np.uint8)
        self._electrons: NDArray[np.int64] | None = None
        if not trusted:
            if (
                len(self.ends) < 1
                or self.ends[0] != 0
                or self.ends[-1] != len(self.gaps)
                or np.any(
                    self.ends[1:] < self.ends[:-1]  # a difference may wrap around
                )
            ):
                raise InputError(f"ends grows from 0 to the {len(self.gaps)} bytes of gaps.")
            if not _inside(self.ends, self.gaps, self._shape[0] * self._shape[1]):
                raise InputError(f"an electron of these gaps lies outside its frame of {self._shape}.")

    @classmethod
    def of(cls, block: Block) -> GapBlock:
        """``block`` gap-coded; itself where it is that already."""
        if isinstance(block, cls):
            return block
        events = EventBlock.of(block).single()
        ends = np.zeros(events.frames + 1, np.int64)
        np.cumsum(_bytes_needed(events.indptr, events.index), out=ends[1:])
        gaps = np.empty(int(ends[-1]), np.uint8)
        _write(events.indptr, events.index, ends, gaps)
        return cls(ends, gaps, events.shape, trusted=True)

    @property
    def frames(self) -> int:
        return len(self.ends) - 1

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def nbytes(self) -> int:
        return self.ends.nbytes + self.gaps.nbytes

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, key: slice) -> GapBlock:
        """Consecutive frames ``block[a:b]``; the bytes are a view."""
        first, stop, step = key.indices(self.frames)
        if step != 1:
            raise InputError("a block is cut into consecutive frames: block[a:b].")
        ends = self.ends[first : max(stop, first) + 1]
        return GapBlock(ends - ends[0], self.gaps[int(ends[0]) : int(ends[-1])], self.shape, trusted=True)

    def electrons(self) -> NDArray[np.int64]:
        """(frames,): the electrons of each frame; counted at the first call."""
        if self._electrons is None:
            self._electrons = _electrons(self.ends, self.gaps)
        return self._electrons

    def events(self) -> EventBlock:
        """The same frames as an event list."""
        indptr = np.concatenate([[0], np.cumsum(self.electrons())])
        index = np.empty(int(indptr[-1]), index_dtype(self.shape[0] * self.shape[1]))
        _read(self.ends, self.gaps, index)
        return EventBlock(indptr, index, self.shape, trusted=True)

    def frame(self, index: int) -> NDArray[Any]:
        if not -self.frames <= index < self.frames:
            raise InputError(f"frame {index} is not among the {self.frames} of this block.")
        index %= self.frames
        return self[index : index + 1].dense()[0]

    def dense(self) -> NDArray[Any]:
        return self.events().dense()

    def dot(self, masks: NDArray[Any]) -> NDArray[np.float64]:
        """(frames, k): sums under ``masks``, from the bytes as they are."""
        masks = m.checked(masks, self.shape)
        sums = lanes.dot(self.ends, self.gaps, masks, self._one_by_one)
        return self._one_by_one(masks).T if sums is None else sums.T

    def _one_by_one(self, masks: NDArray[Any]) -> NDArray[np.float64]:
        """(k, frames): the same, a gap after the other."""
        most = int(np.diff(self.ends).max(initial=0))  # no frame has more electrons than bytes
        packs = m.pack(masks, most)
        if packs is None:
            out = np.zeros((self.frames, len(masks)))
            _dot(self.ends, self.gaps, np.ascontiguousarray(masks.reshape(len(masks), -1).T, np.float64), out)
            return out.T
        out = np.zeros((len(masks), self.frames))
        negative = any(lowest for packed in packs for *_, lowest in packed.fields)
        electrons = self.electrons() if negative else np.zeros(self.frames, np.int64)
        sums = np.empty(self.frames, np.uint64)
        for packed in packs:
            table = np.append(packed.table.astype(np.uint64), np.uint64(0))
            _packed(self.ends, self.gaps, table, sums)
            packed.unpack(sums, electrons, out)
        return out

    def moments(self) -> NDArray[np.float64]:
        return self.dot(m.ramps(self.shape))

    def total(self) -> NDArray[np.uint64]:
        out = np.zeros(self.shape[0] * self.shape[1], np.uint64)
        _total(self.ends, self.gaps, out)
        return out.reshape(self.shape)

    def azimuthal(self, labels: NDArray[Any], count: int) -> NDArray[np.float64]:
        """(frames, count): the counts of each frame under each label 0 .. ``count`` - 1 of ``labels`` (rows, columns),
        such as the rings of :func:`stemloop.stream.masks.rings`; other labels are left out."""
        out = np.zeros((self.frames, count + 1), np.uint64)
        _azimuthal(self.ends, self.gaps, m.labelled(labels, count, self.shape), out)
        return out[:, :count].astype(np.float64)


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _bytes_needed(indptr, index):  # type: ignore[no-untyped-def]
    out = np.empty(len(indptr) - 1, np.int64)
    for f in range(len(out)):
        needed = np.int64(0)
        before = np.int64(0)
        for i in range(indptr[f], indptr[f + 1]):
            gap = np.int64(index[i]) - before
            before = np.int64(index[i])
            needed += 1 if gap < ESCAPE else 1 + gap // ESCAPE
        out[f] = needed
    return out


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _write(indptr, index, ends, gaps):  # type: ignore[no-untyped-def]
    for f in range(len(indptr) - 1):
        o = ends[f]
        before = np.int64(0)
        for i in range(indptr[f], indptr[f + 1]):
            gap = np.int64(index[i]) - before
            before = np.int64(index[i])
            while gap >= ESCAPE:
                gaps[o] = ESCAPE
                o += 1
                gap -= ESCAPE
            gaps[o] = gap
            o += 1


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _inside(ends, gaps, pixels):  # type: ignore[no-untyped-def]
    for f in range(len(ends) - 1):
        at = np.int64(0)
        for o in range(ends[f], ends[f + 1]):
            at += gaps[o]
        if at >= pixels and ends[f + 1] > ends[f]:
            return False
    return True


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _electrons(ends, gaps):  # type: ignore[no-untyped-def]
    out = np.empty(len(ends) - 1, np.int64)
    for f in range(len(out)):
        number = np.int64(0)
        for o in range(ends[f], ends[f + 1]):
            number += gaps[o] != ESCAPE
        out[f] = number
    return out


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _read(ends, gaps, index):  # type: ignore[no-untyped-def]
    i = 0
    for f in range(len(ends) - 1):
        at = 0
        for o in range(ends[f], ends[f + 1]):
            at += gaps[o]
            if gaps[o] != ESCAPE:
                index[i] = at
                i += 1


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _packed(ends, gaps, table, sums):  # type: ignore[no-untyped-def]
    # the table ends with a zero, where escapes look; so no branch depends on the data
    one, two, three, four, escape = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4), np.uint64(ESCAPE)
    nothing = np.uint64(len(table) - 1)
    for f in range(len(ends) - 1):
        o, stop = np.uint64(ends[f]), np.uint64(ends[f + 1])
        fours = stop - ((stop - o) & three)
        at = np.uint64(0)
        a = np.uint64(0)
        b = np.uint64(0)
        while o < fours:
            g0, g1, g2, g3 = (
                np.uint64(gaps[o]), np.uint64(gaps[o + one]), np.uint64(gaps[o + two]), np.uint64(gaps[o + three])
            )  # fmt: skip
            p0 = at + g0
            p1 = p0 + g1
            p2 = p1 + g2
            at = p1 + (g2 + g3)
            a += table[nothing if g0 == escape else p0]
            b += table[nothing if g1 == escape else p1]
            a += table[nothing if g2 == escape else p2]
            b += table[nothing if g3 == escape else at]
            o += four
        while o < stop:
            g0 = np.uint64(gaps[o])
            at += g0
            a += table[nothing if g0 == escape else at]
            o += one
        sums[f] = a + b


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _dot(ends, gaps, table, out):  # type: ignore[no-untyped-def]
    for f in range(len(ends) - 1):
        at = 0
        for o in range(ends[f], ends[f + 1]):
            at += gaps[o]
            if gaps[o] != ESCAPE:
                for k in range(table.shape[1]):
                    out[f, k] += table[at, k]


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _total(ends, gaps, out):  # type: ignore[no-untyped-def]
    for f in range(len(ends) - 1):
        at = 0
        for o in range(ends[f], ends[f + 1]):
            at += gaps[o]
            out[at] += np.uint64(gaps[o] != ESCAPE)


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _azimuthal(ends, gaps, labels, out):  # type: ignore[no-untyped-def]
    for f in range(len(ends) - 1):
        at = 0
        for o in range(ends[f], ends[f + 1]):
            at += gaps[o]
            out[f, labels[at]] += np.uint64(gaps[o] != ESCAPE)
