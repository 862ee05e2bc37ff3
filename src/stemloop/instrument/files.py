"""Files of an instrument's server: written as a whole, locked against another process, made durable."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from stemloop.core.durable import write_whole
from stemloop.core.errors import StorageError

#: Make the data of a file durable (without its times, where the system can).
sync_data = getattr(os, "fdatasync", os.fsync)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``, however many calls it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_atomically(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON, durably and as a whole; only the owner may read it."""
    write_whole(path, json.dumps(value, indent=1), mode=0o600)


class FileLock:
    """Holds a file for one process; waits for it, or with ``wait=False`` raises ``OSError`` if another has it.

    The system frees it with the process.
    """

    def __init__(self, path: Path, wait: bool = True) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock(self._descriptor, wait)
        except OSError:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go."""
        os.close(self._descriptor)


def _lock(descriptor: int, wait: bool) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


class DirectoryLock:
    """Holds a directory for one process: a second server on it is refused."""

    def __init__(self, directory: Path) -> None:
        try:
            self._lock = FileLock(directory / "lock", wait=False)
        except BlockingIOError:
            raise StorageError(
                f"another instrument server runs on {directory}: stop it, or choose another directory."
            ) from None

    def close(self) -> None:
        """Let the directory go."""
        self._lock.close()
