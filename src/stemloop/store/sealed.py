"""Reading a sealed file by its chart: every chunk is compared with its checksum before a frame of it is served."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, IntegrityError, UnreadableFile
from stemloop.core.protocols import Batch, Encoded
from stemloop.core.spans import Span
from stemloop.store import chart as charts
from stemloop.store import pipelines
from stemloop.store.chart import Flaw, Set

Decoder = Callable[[Encoded], NDArray[Any]]


class Sealed:
    """An open sealed file.

    It does not use HDF5's own tables: a damaged chunk takes no other frame with it. ``decode`` unpacks blocks of
    codecs that HDF5 does not know (profile ``working``).

    Attributes
    ----------
    chart : where each byte belongs. chart_flaws : what is wrong with the chart's copies, or with the file's length.
    """

    def __init__(self, path: str | os.PathLike[str], decode: Decoder | None = None) -> None:
        self.path = os.fspath(path)
        self._decode = decode
        try:
            self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UnreadableFile(f"there is no file {self.path}.") from None
        except OSError as error:
            raise UnreadableFile(f"{self.path} cannot be read: {error.strerror}.") from None
        try:
            self.chart, self.chart_flaws = charts.find(self._file, self.path)
        except OSError as error:
            os.close(self._file)
            raise UnreadableFile(f"{self.path} cannot be read: {error.strerror}.") from None
        except BaseException:
            os.close(self._file)
            raise
        self._sets = {entry.name: entry for entry in self.chart.sets}

    @property
    def names(self) -> list[str]:
        """The datasets."""
        return list(self._sets)

    def set(self, name: str) -> Set:
        """What the dataset ``name`` is."""
        if name not in self._sets:
            raise InputError(f"{self.path} has no dataset {name!r}; it has {', '.join(self._sets)}.")
        return self._sets[name]

    def flaws(self) -> list[Flaw]:
        """Every stretch of bytes of the file that is not what was written."""
        return [*charts.flaws(self._file, self.chart), *self.chart_flaws]

    def encoded(self, name: str, chunk: Any) -> Encoded:
        """A chunk as it is stored, checked; its first frame is the first that it unpacks to."""
        entry = self.set(name)
        offset, size = int(chunk["offset"]), int(chunk["size"])
        payload = os.pread(self._file, size, offset)
        if len(payload) != size or google_crc32c.value(payload) != chunk["crc"]:
            raise IntegrityError(
                f"{self.path}: {entry.holds(chunk)} (bytes {offset} to {offset + size - 1}) are damaged; "
                "they are not served."
            )
        first = entry.number(int(chunk["row"])) - int(chunk["skip"])
        return Encoded(entry.stream, first, int(chunk["frames"]), entry.shape, entry.dtype, entry.codec, payload)

    def _unpack(self, name: str, chunk: Any) -> NDArray[Any]:
        """The frames of the rows of a chunk."""
        entry, block = self.set(name), self.encoded(name, chunk)
        if not entry.opaque:
            dtype, shape = np.dtype(entry.dtype), (block.n, *entry.shape)
            frames = pipelines.unpack(block.payload, shape, dtype, entry.codec)
        elif self._decode is None:
            raise InputError(f"{name!r} is written with the codec {entry.codec!r}; give its decoder.")
        else:
            frames = np.asarray(self._decode(block))
        skip = int(chunk["skip"])
        return frames[skip : skip + int(chunk["n"])]

    def batches(self, name: str, *, skip_corrupt: bool = False) -> Iterator[Batch]:
        """The frames that are stored, by sequence number; a damaged chunk is an :class:`IntegrityError` that names
        it, or is left out (``skip_corrupt``)."""
        entry = self.set(name)
        numbers = _Numbers(entry)
        for chunk in np.sort(entry.chunks, order="row"):
            try:
                frames = self._unpack(name, chunk)
            except IntegrityError:
                if not skip_corrupt:
                    raise
                continue
            row = int(chunk["row"])
            for first, begin, n in numbers.runs(row, row + int(chunk["n"])):
                yield Batch(entry.stream, first, frames[begin - row : begin - row + n])

    def frames(self, name: str, first: int, n: int) -> NDArray[Any]:
        """Frames ``first .. first + n`` by sequence number, (n, ...). Numbers that are not stored are an
        :class:`InputError`, damaged ones an :class:`IntegrityError`; no other chunk is looked at."""
        entry = self.set(name)
        absent = entry.stored.absent(first, first + n)
        if n < 1 or absent:
            raise InputError(f"{name!r} has no frames {absent or n} in {self.path}.")
        rows = _Numbers(entry).rows(np.arange(first, first + n))
        chunks = np.sort(entry.chunks, order="row")
        which = np.searchsorted(chunks["row"], rows, side="right") - 1
        parts = [
            self._unpack(name, chunks[k])[rows[which == k] - int(chunks[k]["row"])]
            for k in dict.fromkeys(which.tolist())
        ]
        return np.concatenate(parts)

    def numbers(self, name: str, row: int, stop: int) -> list[Span]:
        """The sequence numbers of the stored frames in rows ``row .. stop``, as ranges."""
        return [(first, first + n) for first, _, n in _Numbers(self.set(name)).runs(row, stop)]

    def salvage(self, name: str) -> Iterator[Batch | Encoded]:
        """Everything that fits its checksum: whole chunks as they are, others unpacked."""
        entry = self.set(name)
        for chunk in np.sort(entry.chunks, order="row"):
            row, n = int(chunk["row"]), int(chunk["n"])
            spans = self.numbers(name, row, row + n)
            with contextlib.suppress(IntegrityError):
                if entry.opaque or (n == int(chunk["frames"]) and len(spans) == 1 and spans[0][1] - spans[0][0] == n):
                    yield self.encoded(name, chunk)
                    continue
                frames = self._unpack(name, chunk)
                for first, begin, count in _Numbers(entry).runs(row, row + n):
                    yield Batch(entry.stream, first, frames[begin - row : begin - row + count])

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Sealed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Numbers:
    """From rows to sequence numbers and back."""

    def __init__(self, entry: Set) -> None:
        self._stored = entry.stored
        spans = np.array(list(entry.numbers), np.int64).reshape(-1, 2)
        self._firsts, self._stops = spans[:, 0], spans[:, 1]
        self._before = np.concatenate([[0], np.cumsum(self._stops - self._firsts)])

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        k = np.searchsorted(self._firsts, numbers, side="right") - 1
        return np.asarray(self._before[k] + numbers - self._firsts[k])

    def runs(self, row: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(first number, its row, how many) of the stored frames in rows ``row .. stop``."""
        k = int(np.searchsorted(self._before, row, side="right")) - 1
        while row < stop:
            n = min(stop, int(self._before[k + 1])) - row
            first = int(self._firsts[k]) + row - int(self._before[k])
            place = first
            for gone, after in [*self._stored.absent(first, first + n), (first + n, first + n)]:
                if gone > place:
                    yield place, row + place - first, gone - place
                place = after
            row, k = row + n, k + 1
