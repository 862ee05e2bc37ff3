"""Recorded files that are larger than the memory, a few frames at a time.

A child process with limits (:mod:`stemloop.store.sandbox`) opens the file as :func:`stemloop.store.readers.read` does,
but touches only what it is asked for: neither it nor the one who asks ever holds the whole.

Orientation: row 0 of a frame is the first row that the detector sends, at the top. Most readers of RosettaSciIO keep
it so; that for Merlin (``.mib``) turns frames upside down, and is turned back here and in ``read``.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, IntegrityError, StemloopError, StorageError, UnreadableFile
from stemloop.core.signal import Axis, Signal
from stemloop.store import blockfile, guard, readers, sandbox
from stemloop.store.sealed import Sealed

BLOCK_BYTES = 8 << 20
#: Pages of a mapped file that were looked at are given back after so many bytes.
_KEPT_BYTES = 32 << 20


@dataclass(frozen=True)
class Found:
    """One dataset of an open file: what it is, without its data."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: tuple[Axis, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


class Opened:
    """An open recorded file. ``found`` are its datasets; :meth:`blocks` reads one of them.

    Parameters
    ----------
    path : of any kind that :func:`~stemloop.store.readers.read` takes.
    timeout_s : the reader is killed when one answer takes longer.
    memory_MB : most memory [MB] that the reader may take.

    Errors: :class:`UnreadableFile` for every way in which reading can fail, also later, from :meth:`blocks`.
    """

    def __init__(self, path: str | os.PathLike[str], timeout_s: float = 60.0, memory_MB: float = 1024.0) -> None:
        self._name, self._limits = Path(path).name, (timeout_s, memory_MB)
        readers.look(Path(path))
        arguments = {"path": str(Path(path).absolute())}
        room = memory_MB + mapped_MB(path)
        self._child = sandbox.Conversation(
            "stemloop.store.lazy:answers", arguments, timeout_s=timeout_s, memory_MB=room
        )
        described, _ = self._ask(0, what="found")
        self.found = [
            Found(tuple(d["shape"]), np.dtype(d["dtype"]), tuple(Axis(**a) for a in d["axes"]), d["metadata"])
            for d in described
        ]

    def blocks(self, which: int = 0, rows: int | None = None) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first, data[first : first + rows]) of dataset ``which`` through its first axis; a few megabytes at a time
        if ``rows`` is None."""
        found = self.found[which]
        row = math.prod(found.shape[1:]) * found.dtype.itemsize
        step = rows or max(1, BLOCK_BYTES // max(1, row))
        for first in range(0, found.shape[0], step):
            stop = min(first + step, found.shape[0])
            yield first, self.rows(which, first, stop)

    def rows(self, which: int, first: int, stop: int) -> NDArray[Any]:
        """data[first : stop] of dataset ``which`` (parts along its first axis)."""
        found = self.found[which]
        shape = (stop - first, *found.shape[1:])
        nbytes = math.prod(shape) * found.dtype.itemsize
        _, payload = self._ask(nbytes, what="rows", which=which, first=first, stop=stop)
        if len(payload) != nbytes:
            raise UnreadableFile(f"{self._name} ended early: rows {first} to {stop - 1} are not all there.")
        return np.frombuffer(payload, found.dtype).reshape(shape)

    def frames(self, which: int = 0, step: int = 1) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first, frames (n, rows, columns)) through dataset ``which`` (three axes or four), at most about ``step``
        frames at a time: the frames of a scan are counted row by row."""
        found = self.found[which]
        if len(found.shape) not in (3, 4) or step < 1:
            raise InputError(
                f"{self._name} holds data of {found.shape}, {step} at a time; frames have three axes or four."
            )
        lead, size = found.shape[:-2], math.prod(found.shape[-2:]) * found.dtype.itemsize
        across = math.prod(lead[1:])
        if step >= across:
            for row, block in self.blocks(which, max(1, step // max(1, across))):
                yield row * across, block.reshape(-1, *found.shape[-2:])
            return
        for row in range(lead[0]):
            for first in range(0, across, step):
                stop = min(first + step, across)
                question = {"which": which, "first": row, "stop": row + 1, "within": [first, stop]}
                _, payload = self._ask((stop - first) * size, what="rows", **question)
                if len(payload) != (stop - first) * size:
                    raise UnreadableFile(f"{self._name} ended early: row {row} is not all there.")
                yield (
                    row * across + first,
                    np.frombuffer(payload, found.dtype).reshape(stop - first, *found.shape[-2:]),
                )

    def _ask(self, most_bytes: int, **question: Any) -> tuple[Any, bytes]:
        with refusing(self._name, *self._limits):
            return self._child.ask(most_bytes, **question)

    def close(self) -> None:
        """End the reader. Closing twice is harmless."""
        self._child.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def mapped_MB(path: str | os.PathLike[str]) -> float:
    """Room [MB] for the file itself in the address space of a child that maps it."""
    return 1.1 * os.path.getsize(path) / 1e6


@contextlib.contextmanager
def refusing(name: str, timeout_s: float, memory_MB: float) -> Iterator[None]:
    """Whatever goes wrong in a reading child as an :class:`UnreadableFile`."""
    try:
        yield
    except sandbox.ChildDied as death:
        raise UnreadableFile(readers.obituary(name, death.why, timeout_s, memory_MB)) from None
    except (StorageError, IntegrityError):
        raise
    except UnreadableFile as error:
        if name in str(error):
            raise
        raise UnreadableFile(f"{name} could not be read: {error}") from None
    except StemloopError as error:
        raise UnreadableFile(f"{name} could not be read: {error}") from None


# ------------------------------------------------------------------------------------------------- in the child


class Rows:
    """A dataset of which rows (parts along its first axis) are read when they are wanted."""

    def __init__(self, signal: Signal) -> None:
        self._data, self.axes = signal.data, signal.axes
        self.metadata = signal.metadata
        self._map = _mapping(self._data)
        self._touched = 0
        self.shape = tuple(int(side) for side in self._data.shape)
        self.dtype = self._read(0, 0).dtype

    def _read(self, first: int, stop: int, within: slice | None = None) -> NDArray[Any]:
        part = self._data[first:stop] if within is None else self._data[first:stop, within]
        if hasattr(part, "compute"):
            part = part.compute(scheduler="synchronous")
        return np.ascontiguousarray(readers.numbers(np.asarray(part)))

    def read(self, first: int, stop: int, within: slice | None = None) -> NDArray[Any]:
        """Rows ``first .. stop``, as they are in memory; of their second axis only ``within``, if it is given."""
        part = self._read(first, stop, within)
        self._touched += part.nbytes
        if self._map is not None and self._touched > _KEPT_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return part


class _SealedRows(Rows):
    """A dataset of a sealed file."""

    def __init__(self, file: Sealed, name: str) -> None:
        from stemloop.store import files, sealing

        entry, known = file.set(name), sealing.Known.from_story(file.chart.story)
        if entry.opaque:
            raise UnreadableFile(f"{name!r} is written with the codec {entry.codec!r}, which readers do not unpack.")
        self._file, self._entry = file, entry
        lead = entry.scan if entry.scan and not entry.missing else (len(entry.stored),)
        calibration = known.calibrations.get(entry.stream, {})
        self.axes = (*sealing.lead_axes(calibration, lead), *sealing.frame_axes(calibration, entry.shape))
        self.shape, self.dtype = (*lead, *entry.shape), np.dtype(entry.dtype)
        self._numbers = np.concatenate([np.arange(first, stop) for first, stop in entry.stored])
        self.metadata = files.told(entry, known)

    def read(self, first: int, stop: int, within: slice | None = None) -> NDArray[Any]:
        lead = self.shape[1 : len(self.shape) - len(self._entry.shape)]
        across = math.prod(lead)
        wanted = self._numbers[first * across : stop * across]
        if within is not None:
            wanted, lead = wanted.reshape(stop - first, *lead)[:, within].ravel(), (within.stop - within.start,)
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)
        parts = [self._file.frames(self._entry.name, int(run[0]), len(run)) for run in runs if len(run)]
        return np.ascontiguousarray(np.concatenate(parts)).reshape(stop - first, *lead, *self._entry.shape)


def _mapping(data: Any) -> mmap.mmap | None:
    """The mapped file under an array."""
    while data is not None and not isinstance(data, mmap.mmap):
        data = getattr(data, "base", None)
    return data


def open_rows(path: str) -> list[Rows]:
    """The datasets of ``path``, of which only what describes them has been read."""
    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        signals = readers.map_array(Path(path))
    elif suffix == ".blo":
        signals = [blockfile.read(path)]
    else:
        from stemloop.store import files

        if h5py.is_hdf5(path):
            guard.check(path)
            if files.is_sealed(path):
                file = Sealed(path)
                return [_SealedRows(file, name) for name in file.names]
        plain_maps()
        signals = readers.signals(path, lazy=True)
    if not signals:
        raise UnreadableFile(f"{os.path.basename(path)} holds no data.")
    found = [Rows(signal) for signal in signals]
    if bad := [rows.dtype for rows in found if rows.dtype.kind not in "biufc"]:
        raise UnreadableFile(f"{os.path.basename(path)} holds {bad[0]}; only numbers are read.")
    return found


def plain_maps() -> None:
    """Let RosettaSciIO's plugins map a file as one array: they would cut it into blocks that cross all its frames, so
    that reading frame after frame reads everything many times."""
    from rsciio.utils import file

    def plain(
        filename: str,
        dtype: Any,
        positions: Any = None,
        offset: int = 0,
        shape: Any = None,
        order: Any = "C",
        key: str | None = None,
        **_: Any,
    ) -> NDArray[Any]:
        if positions is not None:
            raise NotImplementedError("places of a free scan")
        data = np.memmap(filename, dtype, "r", offset=offset, shape=shape, order=order)
        return data if key is None else data[key]

    file.memmap_distributed = plain


def describe(rows: Rows, path: str) -> dict[str, Any]:
    """What is told of a dataset."""
    return {
        "shape": list(rows.shape),
        "dtype": rows.dtype.str,
        "axes": [{**vars(axis)} for axis in rows.axes],
        "metadata": {**readers.jsonable(rows.metadata), "file": os.path.basename(path)},
    }


def answers(path: str, folder: Path) -> Any:
    """What :class:`Opened` asks."""
    found: list[Rows] = []

    def answer(
        what: str, which: int = 0, first: int = 0, stop: int = 0, within: tuple[int, int] | None = None
    ) -> tuple[Any, Any]:
        if what == "found":
            found.extend(open_rows(path))
            return [describe(rows, path) for rows in found], b""
        if what != "rows":
            raise InputError(f"unknown question {what!r}.")
        return None, found[which].read(first, stop, slice(*within) if within else None).tobytes()

    return answer
