"""The audit log: who asked for what, and what came of it. Append-only, chained by hashes, durable.

Each line is a JSON object. It ends with ``previous``, the ``sha256`` of the line before, and its own ``sha256``, that
of all its bytes before this last field. So a changed, lost or inserted line shows, the last line included. Lines cut
off at the end show only against a head (count and hash) that was kept elsewhere: ``GET /audit/head`` gives it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from stemloop.core.durable import sync_folder
from stemloop.core.errors import IntegrityError, StorageError, UnreadableFile
from stemloop.instrument import wire
from stemloop.instrument.files import sync_data, write_all

_log = logging.getLogger(__name__)

#: Lines that no reply waits for are made durable together, at most so late [s].
GROUP_COMMIT_S = 0.2

_SEAL = b', "sha256": "'
_SEAL_BYTES = len(_SEAL) + 64 + len(b'"}')


class Head(NamedTuple):
    """The end of the chain: number of lines, and the ``sha256`` (hex) of the last."""

    lines: int
    sha256: str


class Audit:
    """Appends to an audit log. May be called from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._failed = ""
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
            sync_folder(path.parent)
            count, last, end = self._whole_lines()
            os.ftruncate(self._descriptor, end)
            os.lseek(self._descriptor, 0, os.SEEK_END)
        except OSError as error:
            raise StorageError(f"cannot open {path}: {error.strerror}. Choose a writable directory.") from None
        self._head = Head(count, last[-66:-2].decode("ascii", "replace") if last else "")
        self._dirty = threading.Event()
        self._closed = threading.Event()
        self._committer = threading.Thread(target=self._commit_groups, name="audit", daemon=True)
        self._committer.start()

    def _whole_lines(self) -> tuple[int, bytes, int]:
        """Number of lines, the last one, and where it ends; what follows was torn by a crash."""
        count, end, last, rest, offset = 0, 0, b"", b"", 0
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        while part := os.read(self._descriptor, 2**20):
            *lines, rest_ = (rest + part).split(b"\n")
            offset += len(part)
            rest = rest_
            if lines:
                count, last, end = count + len(lines), lines[-1], offset - len(rest)
        return count, last, end

    @property
    def head(self) -> Head:
        """Where the chain ends now."""
        return self._head

    def raise_if_failed(self) -> None:
        """A ``StorageError`` if nothing can be written any more."""
        if self._failed:
            raise StorageError(f"{self._path} cannot be written any more ({self._failed}): restart the server.")

    def write(self, durable: bool = False, **entry: Any) -> None:
        """Append one entry; with ``durable`` it is on the disk when this returns, else within ``GROUP_COMMIT_S``.

        A ``StorageError`` if the disk refuses.
        """
        with self._lock:
            self.raise_if_failed()
            line, sha256 = seal({"utc": time.time(), **entry, "previous": self._head.sha256})
            try:
                write_all(self._descriptor, line + b"\n")
            except OSError as error:
                self._failed = str(error.strerror)  # part of a line may be there; nothing is appended to it
                raise StorageError(f"cannot write {self._path}: {error.strerror}. Make room on the disk.") from None
            self._head = Head(self._head.lines + 1, sha256)
        if durable:
            self.sync()
        elif not self._dirty.is_set():
            self._dirty.set()

    def sync(self) -> None:
        """Make every line durable that was written before."""
        try:
            sync_data(self._descriptor)
        except OSError as error:
            self._failed = f"fdatasync failed: {error.strerror}"
            raise StorageError(f"cannot make {self._path} durable: {error.strerror}. Check the disk.") from None

    def _commit_groups(self) -> None:
        while not self._closed.is_set():
            self._dirty.wait()
            self._closed.wait(GROUP_COMMIT_S)
            self._dirty.clear()
            if self._descriptor >= 0 and not self._closed.is_set():
                try:
                    self.sync()
                except StorageError as error:  # the next line is refused
                    _log.error("%s", error)

    def close(self) -> None:
        """Make everything durable and close the file."""
        if self._descriptor >= 0:
            self._closed.set()
            self._dirty.set()
            self._committer.join()
            descriptor, self._descriptor = self._descriptor, -1
            if not self._failed:
                sync_data(descriptor)
            os.close(descriptor)


def _plain(value: Any) -> Any:
    plain = wire.plain(value)
    return str(value) if plain is value else plain


_encode = json.JSONEncoder(default=_plain).encode


def seal(entry: dict[str, Any]) -> tuple[bytes, str]:
    """The line of an entry: its JSON, closed by the hash of all bytes before; and that hash."""
    body = _encode(entry)[:-1].encode()
    sha256 = hashlib.sha256(body).hexdigest()
    return body + _SEAL + sha256.encode() + b'"}', sha256


def verify_audit(path: str | Path, head: Head | None = None) -> Head:
    """Check every byte of an audit log and return its head.

    Raises ``IntegrityError`` naming the first line and byte that is not what was written; with ``head`` (kept from an
    earlier look) also if lines up to that one were cut off or written anew.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror}.") from None
    last, offset = "", 0
    lines = data.split(b"\n")
    torn = lines.pop()
    if head is not None and head.lines == 0:
        head = None
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number} (bytes {offset} to {offset + len(line)})"
        body, seal_ = line[:-_SEAL_BYTES], line[-_SEAL_BYTES:]
        sha256 = hashlib.sha256(body).hexdigest()
        if seal_ != _SEAL + sha256.encode() + b'"}':
            raise IntegrityError(f"{where}: it is not what was written; every line after it is in doubt.")
        if json.loads(line)["previous"] != last:
            raise IntegrityError(f"{where}: it does not follow from the line before; lines were lost or changed there.")
        last = sha256
        offset += len(line) + 1
        if head is not None and number == head.lines and last != head.sha256:
            raise IntegrityError(f"{where}: its hash is not that of the head; the log up to here was written anew.")
    if torn:
        raise IntegrityError(
            f"{path}, line {len(lines) + 1} (byte {offset} on): it has no end. If the server was killed while it "
            "wrote, it cuts this line off when it starts again; nothing was answered on it."
        )
    if head is not None and len(lines) < head.lines:
        raise IntegrityError(f"{path} has {len(lines)} lines, {head.lines} were there: the end was cut off.")
    return Head(len(lines), last)
