"""The journal of a run: what was decided, asked, exposed and found, in order. It is the truth of the run.

One line a record: eight hexadecimal digits (CRC32C of the rest), a space, and a JSON object with at least ``kind``,
``key`` and ``at_s`` (when it was written [s since 1970]). A line is on the disk (fdatasync) before
:meth:`Journal.append` returns. A run resumes by reading its journal: what stands there is not done again. A last line
that was torn by a crash is cut off; any other damage is an :class:`~stemloop.core.errors.IntegrityError`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c

from stemloop.core.durable import sync_folder
from stemloop.core.errors import IntegrityError, StorageError


def _line(record: dict[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (google_crc32c.value(body), body)


def _record(line: bytes) -> dict[str, Any] | None:
    head, _, body = line.rstrip(b"\n").partition(b" ")
    try:
        if line.endswith(b"\n") and int(head, 16) == google_crc32c.value(body):
            found = json.loads(body)
            return found if isinstance(found, dict) else None
    except ValueError:
        pass
    return None


class Journal:
    """An append-only, durable list of records, each known by ``(kind, key)``; ``readonly`` repairs nothing.

    >>> import tempfile
    >>> journal = Journal(Path(tempfile.mkdtemp()) / "journal.jsonl")
    >>> journal.once("decision", "0", lambda: {"positions_m": [[0.0, 0.0]]})["positions_m"]
    [[0.0, 0.0]]
    >>> journal.find("decision", "0") is not None, journal.find("decision", "1") is None
    (True, True)
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = Path(path)
        self.records = self._recover(readonly)
        self._index = {(r["kind"], r["key"]): r for r in self.records}
        self._file = -1
        self._torn = False
        if readonly:
            return
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(f"the journal {self.path} cannot be written: {error.strerror}.") from None
        self._size = os.fstat(self._file).st_size

    def _recover(self, readonly: bool) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        records: list[dict[str, Any]] = []
        good = 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            record = _record(line)
            if record is None:
                if number < len(lines):
                    raise IntegrityError(f"{self.path} is damaged at line {number}; the run cannot be resumed from it.")
                if readonly and line.endswith(b"\n"):
                    raise IntegrityError(f"{self.path} is damaged at its last line; resuming does that part again.")
                if not readonly:
                    os.truncate(self.path, good)
                break
            records.append(record)
            good += len(line)
        return records

    def find(self, kind: str, key: str) -> dict[str, Any] | None:
        """The record ``(kind, key)``, or None."""
        return self._index.get((kind, key))

    def append(self, kind: str, key: str, /, **content: Any) -> dict[str, Any]:
        """Make a new record durable and return it. A full disk is a :class:`StorageError` and leaves no torn line."""
        if self._file < 0:
            raise StorageError(f"the journal {self.path} is not open for writing.")
        record = {"kind": kind, "key": key, "at_s": time.time(), **content}
        line = _line(record)
        try:
            if self._torn:
                os.ftruncate(self._file, self._size)
            self._torn = True
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fdatasync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # a read-only disk: done before the next record
                os.ftruncate(self._file, self._size)
            raise StorageError(
                f"the journal {self.path} cannot be written: {error.strerror}. All that was acknowledged is kept; "
                f"make room and continue with: stemloop resume {self.path.parent}"
            ) from None
        self._torn = False
        self._size += len(line)
        self.records.append(record)
        self._index[kind, key] = record
        return record

    def once(self, kind: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record ``(kind, key)`` if it is there; otherwise call ``make``, append what it returns, and return it."""
        return self.find(kind, key) or self.append(kind, key, **make())

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
