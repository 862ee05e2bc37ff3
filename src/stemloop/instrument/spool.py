"""What the instrument's side never forgets: every intent to expose and every result.

The :class:`Spool` is an append-only file of framed records. Before an exposure its *intent* is made durable
(fdatasync), after it its *result* with the frames; only then is the reply sent. So a repeated command id answers the
first result, also after the process was killed, and an intent without a result says that the outcome is unknown.

A record is a header ``magic, length, synced, crc32c of the payload, crc32c of the header`` and a msgpack payload.
``synced`` is the size of the file that was known to be durable when the record was written: a broken record that no
later record calls durable is the torn end of a crash and is cut off; any other is an ``IntegrityError``.
"""

from __future__ import annotations

import os
import shutil
import struct
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c

from stemloop.core.durable import sync_folder
from stemloop.core.errors import IntegrityError, OutcomeUnknown, StorageError
from stemloop.core.protocols import Exposure
from stemloop.instrument import wire
from stemloop.instrument.files import sync_data, write_all

_HEADER = struct.Struct("<4sIQI")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CRC.size
_MAGIC = b"SLS1"

#: Room [bytes] that an exposure leaves on the disk beside its frames: for the audit, and for what is written next.
_SPARE_BYTES = 2**24

#: Epochs are made durable so many at a time; those that are left when a server ends are never given.
_EPOCHS = 1024


def _crc(data: bytes | memoryview) -> int:
    return int(google_crc32c.value(bytes(data)))


class Journal:
    """An append-only file of framed records; see the module's page for what a crash may do to it.

    Parameters
    ----------
    path : Path
        The file; made if it is not there. Its torn end, if it has one, is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
            sync_folder(path.parent)
            self.size = os.fstat(self._descriptor).st_size
            self._synced = 0
            self._failed = ""
            self._end = self._scan()
            self._cut(self._end)
        except OSError as error:
            raise StorageError(f"cannot open {path}: {error.strerror}. Choose a writable directory.") from None

    def _scan(self) -> int:
        """Where the first record that cannot be read begins; raises if it was ever durable."""
        offset = 0
        while offset < self.size:
            found = self._parse(offset)
            if found is None:
                self._judge(offset)
                return offset
            offset = found[1]
        return offset

    def _parse(self, offset: int) -> tuple[int, int, bytes] | None:
        """(synced, end, payload) of the record at ``offset``, or None if there is no whole record."""
        if offset + _HEADER_BYTES > self.size:
            return None
        head = self._read(offset, _HEADER_BYTES)
        if _CRC.unpack(head[_HEADER.size :])[0] != _crc(head[: _HEADER.size]):
            return None
        magic, length, synced, crc = _HEADER.unpack(head[: _HEADER.size])
        begin = offset + _HEADER_BYTES
        if magic != _MAGIC or begin + length > self.size:
            return None
        payload = self._read(begin, length)
        return (synced, begin + length, payload) if _crc(payload) == crc else None

    def _read(self, offset: int, length: int) -> bytes:
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        parts = []
        while length:
            part = os.read(self._descriptor, length)
            if not part:
                raise IntegrityError(f"{self.path} is shorter than its records say.")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _judge(self, broken: int) -> None:
        """Raise if any whole record after ``broken`` was written when the bytes at ``broken`` were durable."""
        rest = self._read(broken, self.size - broken)
        at = rest.find(_MAGIC, 1)
        while at >= 0:
            found = self._parse(broken + at)
            if found is not None and found[0] > broken:
                raise IntegrityError(
                    f"{self.path}: the record at byte {broken} is not what was written, and it was durable. "
                    "Keep the file for an inspection and start the server on a new directory."
                )
            at = rest.find(_MAGIC, at + 1)

    def _cut(self, end: int) -> None:
        if self.size != end:
            os.ftruncate(self._descriptor, end)
        os.fsync(self._descriptor)
        self.size = self._synced = end

    def __iter__(self) -> Any:
        """(offset, record) of every record in the file, in order."""
        offset = 0
        while offset < self.size:
            found = self._parse(offset)
            if found is None:
                raise IntegrityError(f"{self.path}: the record at byte {offset} is not what was written.")
            yield offset, wire.decode(found[2])
            offset = found[1]

    def read(self, offset: int) -> dict[str, Any]:
        """The record at ``offset``."""
        with self._lock:
            found = self._parse(offset)
        if found is None:
            raise IntegrityError(f"{self.path}: the record at byte {offset} is not what was written.")
        return wire.decode(found[2])

    def append(self, record: dict[str, Any], durable: bool) -> int:
        """Write a record, durably or not; returns its offset. A ``StorageError`` if the disk refuses. Any thread."""
        with self._lock:
            return self._append(record, durable)

    def _append(self, record: dict[str, Any], durable: bool) -> int:
        if self._failed:
            raise StorageError(f"{self.path} cannot be written any more ({self._failed}): restart the server.")
        payload = wire.encode(record)
        head = _HEADER.pack(_MAGIC, len(payload), self._synced, _crc(payload))
        offset = self.size
        try:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            write_all(self._descriptor, head + _CRC.pack(_crc(head)))
            write_all(self._descriptor, payload)
        except OSError as error:
            self._undo(offset, error)
            raise StorageError(f"cannot write {self.path}: {error.strerror}. Make room on the disk.") from None
        self.size = offset + _HEADER_BYTES + len(payload)
        if durable:
            self.sync()
        return offset

    def sync(self) -> None:
        """Make every record durable that was written before. A ``StorageError`` if the disk refuses. Any thread."""
        with self._lock:
            if self._failed:
                raise StorageError(f"{self.path} cannot be made durable ({self._failed}): restart the server.")
            try:
                sync_data(self._descriptor)
            except OSError as error:  # what is on the disk is unknown now, and a second fdatasync would not tell
                self._failed = f"fdatasync failed: {error.strerror}"
                raise StorageError(f"cannot make {self.path} durable: {error.strerror}. Check the disk.") from None
            self._synced = self.size

    def _undo(self, offset: int, error: OSError) -> None:
        try:
            os.ftruncate(self._descriptor, offset)
        except OSError:
            self._failed = f"a write failed: {error.strerror}"

    def close(self) -> None:
        """Make everything durable and close the file."""
        if self._descriptor >= 0:
            if not self._failed:
                sync_data(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


class Spool:
    """The durable memory of an instrument server.

    Attributes
    ----------
    spent : int
        Electrons of all exposures so far, those with an unknown outcome included.
    fencing : int
        The last fencing number given.
    state : dict or None
        The instrument's state after the last command that is known, or None at the very beginning.
    counts : dict
        The next sequence number of each stream.

    Leases may be given from any thread; everything else is for one thread, but for :meth:`find`, which only reads.
    """

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path)
        self._syncer = ThreadPoolExecutor(1, "spool")
        self._results: dict[str, int] = {}
        self._streamed: dict[str, dict[str, Any]] = {}
        self._lost: dict[str, dict[str, Any]] = {}
        self.spent = 0
        self.fencing = 0
        self.state: dict[str, Any] | None = None
        self.counts: dict[str, int] = {}
        self._epoch = self._epochs_until = 0
        self._past: list[dict[str, Any]] | None = []
        open_intents: dict[str, dict[str, Any]] = {}
        for offset, record in self._journal:
            if record["record"] == "intent":
                open_intents[record["id"]] = record
            else:
                open_intents.pop(record.get("id", ""), None)
                self._learn(offset, record)
        self._epoch = self._epochs_until
        for intent in open_intents.values():
            self.result(intent["id"], intent["instruction"], intent["reserved"], error=self._unknown(intent["id"]))

    @staticmethod
    def _unknown(command_id: str) -> OutcomeUnknown:
        return OutcomeUnknown(
            f"the exposure {command_id!r} was begun and the server stopped before its end: it counts as exposed and is "
            "not repeated. Ask for the same with a new command id if the dose allows it."
        )

    def _learn(self, offset: int, record: dict[str, Any]) -> None:
        kind = record["record"]
        if kind == "lease":
            self.fencing = record["fencing"]
            return
        if kind == "epochs":
            self._epochs_until = record["until"]
            return
        if stream := record.get("stream"):
            self._streamed[record["id"]] = stream
            self.counts[stream["stream"]] = stream["first"] + stream["count"]
        if kind == "result":
            self._results[record["id"]] = offset
            self.spent += record["settled"]
            if record["exposure"] is not None:
                self.state = record["exposure"]["state"]
            if self._past is not None and record["settled"]:
                kept = {name: record.get(name) for name in ("instruction", "settled", "exposed")}
                self._past.append({**kept, "state": self.state or {}})

    def past(self) -> list[dict[str, Any]]:
        """``instruction``, ``settled`` electrons, ``exposed`` positions (None: all) and ``state`` of every exposure
        that was on the disk at the start. They are handed out once and forgotten."""
        past, self._past = self._past or [], None
        return past

    def raise_if_no_room(self, frame_bytes: int) -> None:
        """Raise ``StorageError`` if frames of so many bytes might not fit: they would be exposed for nothing."""
        folder = self._journal.path.parent
        free, needed = shutil.disk_usage(folder).free, frame_bytes + _SPARE_BYTES
        if free < needed:
            raise StorageError(
                f"{folder} has {free / 1e6:.0f} MB left, and the exposure may need {needed / 1e6:.0f} MB: nothing was "
                "exposed. Make room on the disk, or ask for fewer frames at a time."
            )

    def lease(self, fencing: int) -> None:
        """Make a new fencing number durable."""
        self._append({"record": "lease", "fencing": fencing}, durable=True)

    def intent(self, command_id: str, instruction: dict[str, Any], fencing: int, reserved: int, who: str) -> None:
        """Make it durable that an exposure is about to begin."""
        self._append(
            {
                "record": "intent",
                "id": command_id,
                "instruction": instruction,
                "fencing": fencing,
                "reserved": reserved,
                "who": who,
                "utc": time.time(),
            },
            durable=True,
        )

    def cancel(self, command_id: str) -> None:
        """The intent came to nothing before the instrument was asked; the id is free again."""
        self._append({"record": "cancelled", "id": command_id}, durable=False)

    def epoch(self) -> int:
        """The number of the next command that the instrument is given; never given twice, restarts included."""
        if self._epoch == self._epochs_until:
            self._append({"record": "epochs", "until": self._epoch + _EPOCHS}, durable=True)
        self._epoch += 1
        return self._epoch

    @property
    def epoch_at_hand(self) -> bool:
        """Whether :meth:`epoch` answers without the disk."""
        return self._epoch < self._epochs_until

    def result(
        self,
        command_id: str,
        instruction: dict[str, Any],
        settled: int,
        exposure: Exposure | None = None,
        error: Exception | None = None,
        stream: dict[str, Any] | None = None,
        durable: bool = True,
        exposed: int | None = None,
    ) -> None:
        """Keep how a command ended: its ``exposure``, or the ``error`` that it will answer whenever it is repeated.

        ``exposed`` is the number of positions that were exposed, from the first on, of a command that ended early.
        """
        self._append(
            {
                "record": "result",
                "id": command_id,
                "instruction": instruction,
                "settled": settled,
                "exposure": exposure and wire.exposure_to_message(exposure),
                "error": error and [getattr(error, "code", "instrument"), str(error)],
                "stream": stream,
                "exposed": exposed,
                "utc": time.time(),
            },
            durable,
        )

    def sync(self) -> Future[None]:
        """Make what was kept durable in another thread; the future has a ``StorageError`` if the disk refuses."""
        return self._syncer.submit(self._journal.sync)

    def knows(self, command_id: str) -> bool:
        """Whether the command was carried out before."""
        return command_id in self._results or command_id in self._lost

    def find(self, command_id: str) -> dict[str, Any] | None:
        """How the command ended (``instruction``, ``exposure``, ``error``), read back from the disk, or None."""
        if command_id in self._lost:
            return self._lost[command_id]
        offset = self._results.get(command_id)
        return None if offset is None else self._journal.read(offset)

    def lost(self, command_id: str, instruction: dict[str, Any], settled: int, error: OutcomeUnknown) -> None:
        """The exposure was made and its frames could not be kept: the id answers ``error`` from now on."""
        try:
            self.result(command_id, instruction, settled, error=error)
        except StorageError:  # after a restart the intent without a result says the same
            kept = {"instruction": instruction, "exposure": None, "error": [error.code, str(error)]}
            self._lost[command_id] = kept

    def number(self, stream: str, count: int) -> dict[str, Any]:
        """The sequence numbers that the next ``count`` frames of ``stream`` will have; not yet taken."""
        return {"stream": stream, "first": self.counts.get(stream, 0), "count": count}

    def streamed(self, command_id: str, stream: str, count: int) -> dict[str, Any]:
        """The sequence numbers of a command's frames: always the same ones, durable before they are returned."""
        if command_id not in self._streamed:
            numbers = self.number(stream, count)
            self._append({"record": "streamed", "id": command_id, "stream": numbers}, durable=True)
        return self._streamed[command_id]

    def _append(self, record: dict[str, Any], durable: bool) -> None:
        self._learn(self._journal.append(record, durable), record)

    def close(self) -> None:
        """Make everything durable and close the file."""
        self._syncer.shutdown()
        self._journal.close()
