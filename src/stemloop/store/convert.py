"""Any file that the readers open, as one sealed HDF5 file, in constant memory.

One child process with limits opens the file lazily, packs a few frames at a time and writes them; the sealed file is
read back against its checksums, flushed, and only then gets its name. It is killed when it makes no progress.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.chunk import SHUFFLE_DEFLATE
from stemloop.core.durable import sync_folder
from stemloop.core.errors import StorageError
from stemloop.core.protocols import Encoded
from stemloop.store import files, lazy, pipelines, readers, sandbox, sealing

Progress = Callable[[int, int], None]
_CHUNK_BYTES = 1 << 20
#: A frame of a stack that is at least so large is a chunk of its own.
_OWN_CHUNK_BYTES = 1 << 15
_WAITING_BYTES = 16 << 20
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    memory_MB: float = 1024.0,
    stall_s: float = 120.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Copy what is in ``path`` into the sealed file ``out`` (see :mod:`stemloop.store.files`, profile ``portable``).

    Each dataset becomes a stream, ``data``, ``2_data`` ...: an image is one frame, a stack a frame each, a scan of
    patterns or spectra a scan. Axes keep their calibration in SI units. What the reader found besides (title, beam
    energy ...) is in the stream's calibration.

    Parameters
    ----------
    overwrite : replace ``out`` if it is there. It is replaced in one step, or not at all.
    memory_MB : most memory [MB] of the child, besides the file that it maps.
    stall_s : the child is killed when it gets no further in this time.
    progress : called now and then with (bytes done, bytes in all).

    Returns
    -------
    ``path``, ``bytes``, ``raw_bytes`` and ``streams``, as :func:`stemloop.store.files.verify` says.

    Errors: :class:`UnreadableFile`, :class:`StorageError`, :class:`InputError`, :class:`IntegrityError`. None leaves
    a file behind.
    """
    readers.look(Path(path))
    target = Path(out)
    files.writable(target, overwrite)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    _sweep(target)
    room = memory_MB + lazy.mapped_MB(path)
    try:
        with sandbox.scratch() as folder, lazy.refusing(Path(path).name, stall_s, memory_MB):
            watch = _Watch(folder / "progress", stall_s, progress)
            arguments = {"path": str(part.absolute()), "source": str(Path(path).absolute())}
            made: dict[str, Any] = sandbox.call(
                "stemloop.store.convert:write",
                arguments,
                folder,
                timeout_s=1e6,
                memory_MB=room,
                grow=True,
                alive=watch,
            )
        os.replace(part, target)
        sync_folder(target.absolute().parent)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}. Choose another folder, or make room.") from None
    finally:
        part.unlink(missing_ok=True)
    if progress is not None:
        progress(made["raw_bytes"], made["raw_bytes"])
    return {"path": str(target), "bytes": target.stat().st_size, **made}


def _sweep(target: Path) -> None:
    """Remove what conversions to the same name left that were killed."""
    for part in target.absolute().parent.glob(f".{target.name}.*.part"):
        owner = re.fullmatch(re.escape(f".{target.name}.") + r"(\d+)\.part", part.name)
        if owner and not Path("/proc", owner[1]).exists() and Path("/proc/self").exists():
            part.unlink(missing_ok=True)


class _Watch:
    """Whether the child still gets on; tells the progress by the way."""

    def __init__(self, path: Path, stall_s: float, progress: Progress | None) -> None:
        self._path, self._stall_s, self._progress = path, stall_s, progress
        self._last, self._since = "", time.monotonic()

    def __call__(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            said = self._path.read_text()
            if said != self._last:
                self._last, self._since = said, time.monotonic()
                done, total = (int(word) for word in said.split())
                if self._progress is not None:
                    self._progress(done, total)
        return time.monotonic() - self._since < self._stall_s


# ------------------------------------------------------------------------------------------------- in the child


def write(path: str, source: str, folder: Path) -> dict[str, Any]:
    """Write the sealed file ``path`` from the recorded file ``source``."""
    found = lazy.open_rows(source)
    name = os.path.basename(source)
    sets = [_Set("data" if not k else f"{k + 1}_data", rows) for k, rows in enumerate(found)]
    total = sum(entry.bytes for entry in sets)
    calibrations = {entry.stream: entry.calibration for entry in sets}
    known = sealing.Known(
        run={"title": str(found[0].metadata.get("title") or name), "converted_from": name},
        calibrations=calibrations,
    )
    try:
        with ThreadPoolExecutor(2) as packers:
            streams = sealing.write(path, _Blocks(sets, packers, _Teller(folder, total)), known)
    except OSError as error:
        if error.errno in _DISK or "No space left" in str(error):
            raise StorageError(f"the disk took no more of {name}; make room, or choose another folder.") from None
        raise
    return {"raw_bytes": total, "streams": streams}


class _Teller:
    """Writes how far it is where the parent looks."""

    def __init__(self, folder: Path, total: int) -> None:
        self._folder, self._total, self._done, self._told = folder, total, 0, 0.0

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        if time.monotonic() - self._told > 0.1:
            self._told = time.monotonic()
            (self._folder / "progress.part").write_text(f"{self._done} {self._total}")
            os.replace(self._folder / "progress.part", self._folder / "progress")


class _Set:
    """A dataset to be: which frames its rows are."""

    def __init__(self, stream: str, rows: lazy.Rows) -> None:
        self.stream, self.rows = stream, rows
        axes, shape = rows.axes, rows.shape
        spectra = axes[-1].name in ("energy", "energy_loss")
        least = 1 if spectra else min(2, len(shape))
        lead = min(2, len(shape) - least)
        self.shape = shape[lead:]
        self.dtype = np.dtype("u1") if rows.dtype.kind == "b" else rows.dtype
        self.n = math.prod(shape[:lead])
        self.per_row = self.n // shape[0] if lead else 1
        self.bytes = math.prod(shape) * self.dtype.itemsize
        frame = max(1, math.prod(self.shape) * self.dtype.itemsize)
        wanted = max(1, _CHUNK_BYTES // frame)
        if lead == 2:
            across = shape[1]
            divisors = (k for k in range(1, min(wanted, across) + 1) if across % k == 0)
            self.side = max(divisors) if wanted < across else across * min(wanted // across, shape[0])
        elif lead and not spectra and frame >= _OWN_CHUNK_BYTES:
            self.side = 1  # images are wanted one by one
        else:
            self.side = min(wanted, self.n)
        self.whole = lead == 0
        self.codec = SHUFFLE_DEFLATE
        self.calibration: dict[str, Any] = {
            "axes": [vars(axis) for axis in axes[lead:]],
            "metadata": readers.jsonable(rows.metadata),
        }
        if lead == 2:
            self.calibration["scan"] = {"shape": list(shape[:2]), "axes": [vars(axis) for axis in axes[:2]]}

    def block(self, k: int, frames: NDArray[Any]) -> Encoded:
        """The ``k``-th chunk, packed."""
        n = len(frames)
        payload = pipelines.pack(frames, self.side, self.codec) if n == self.side else frames.tobytes()
        codec = self.codec if n == self.side else pipelines.RAW
        return Encoded(self.stream, k * self.side, n, self.shape, self.dtype.str, codec, payload)

    def head(self, k: int) -> Encoded:
        n = min(self.side, self.n - k * self.side)
        codec = self.codec if n == self.side else pipelines.RAW
        return Encoded(self.stream, k * self.side, n, self.shape, self.dtype.str, codec, b"")

    @property
    def count(self) -> int:
        return -(-self.n // self.side)

    def chunks(self) -> Iterator[NDArray[Any]]:
        """(n, ...) frames of each chunk, in order."""
        if self.whole:
            yield self.rows.read(0, self.rows.shape[0]).reshape(1, *self.shape).astype(self.dtype, copy=False)
            return
        row, step = 0, max(1, self.side // self.per_row)
        while row < self.rows.shape[0]:
            stop = min(row + step, self.rows.shape[0])
            frames = self.rows.read(row, stop).reshape(-1, *self.shape).astype(self.dtype, copy=False)
            for first in range(0, len(frames), self.side):
                yield frames[first : first + self.side]
            row = stop


class _Blocks:
    """The chunks of all datasets, packed by two threads a little ahead of the writer."""

    def __init__(self, sets: list[_Set], packers: ThreadPoolExecutor, tell: _Teller) -> None:
        self._sets, self._packers, self._tell = sets, packers, tell

    def heads(self) -> Iterator[tuple[Encoded, int]]:
        for entry in self._sets:
            for k in range(entry.count):
                yield entry.head(k), 0

    def blocks(self) -> Iterator[Encoded]:
        waiting: deque[tuple[int, Future[Encoded]]] = deque()
        for entry in self._sets:
            for k, frames in enumerate(entry.chunks()):
                waiting.append((frames.nbytes, self._packers.submit(entry.block, k, frames)))
                while sum(size for size, _ in waiting) > _WAITING_BYTES:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)

    def _next(self, waiting: deque[tuple[int, Future[Encoded]]]) -> Encoded:
        size, block = waiting.popleft()
        self._tell(size)
        return block.result()
