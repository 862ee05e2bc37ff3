"""The landing log: where frames touch the disk first, and what an acknowledgement means.

One append-only file. A file header (magic, version, run) and then records; a record is a fixed part (magic, kind,
lengths, its own offset, two CRC32C and the CRC32C of the fixed part itself), a msgpack header and the payload: raw
frames, or what a codec made of them, which the log never unpacks. :meth:`LandingLog.append_many` returns after
``fdatasync``; what it returned from survives the death of the process and of the machine. A record that was being
written when the process died is cut off when the log is opened again; a record that was whole and is damaged now is
never cut off, never served, and is named by its offset. Frames that will never come are declared lost, durably too,
so that :meth:`LandingLog.ledger` can say: acknowledged = stored + declared lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import threading
import uuid
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import msgpack
import numpy as np
from numpy.typing import NDArray

from stemloop.core.durable import sync_folder
from stemloop.core.errors import InputError, IntegrityError, StorageError
from stemloop.core.protocols import Batch, Encoded
from stemloop.core.spans import Span, Spans
from stemloop.stream import packet
from stemloop.stream.ledger import Account

VERSION = 1
_FILE = struct.Struct("<8sHH112sI")
_FILE_MAGIC = b"STEMLOG\n"
_RECORD = struct.Struct("<4sB3xIQQIII")
_RECORD_MAGIC = b"SLR1"
_FRAMES, _END, _LOST = 1, 2, 3
_MAX_BUFFERS = 512
_WINDOW = 1 << 22
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of <linux/falloc.h>

#: What turns a block into its frames (n, ...).
Decoder = Callable[[Encoded], NDArray[Any]]


@dataclass(frozen=True)
class Damage:
    """Bytes ``offset .. offset + length`` of the log that are no valid record. ``torn`` is an unfinished last
    record, which was never acknowledged; anything else was whole once."""

    offset: int
    length: int
    torn: bool


@dataclass(frozen=True)
class _Place:
    """Frames ``first .. stop`` of a stream are in the record at ``offset``."""

    first: int
    stop: int
    offset: int


def storage_error(what: str, path: Path, error: OSError) -> StorageError:
    """A :class:`StorageError` that says what to do about ``error``."""
    remedy = {
        errno.ENOSPC: "Free some space; what was acknowledged is safe and the rest is sent again.",
        errno.EDQUOT: "The quota is used up; free some space.",
        errno.EFBIG: "The file may not grow further (file size limit); what was acknowledged is safe.",
        errno.EROFS: "The file system is read-only; mount it writable, or choose another folder.",
        errno.EACCES: "You may not write there; choose another folder or change its permissions.",
        errno.ENOENT: "The folder does not exist; make it first.",
    }.get(error.errno or 0, "Check the disk.")
    return StorageError(f"cannot {what} {path}: {error.strerror or error}. {remedy}")


def _dead(file: int) -> bool:
    """Whether the file system of an open file takes nothing any more."""
    try:
        if os.fstatvfs(file).f_flag & os.ST_RDONLY:
            return True
        os.fsync(file)
    except OSError as error:
        return error.errno in (errno.EIO, errno.EROFS, errno.ESTALE)
    return False


def _reserve(file: int, offset: int, length: int) -> None:
    """Have the file system set ``length`` bytes at ``offset`` aside without growing the file; where it cannot, no
    harm is done. A disk that has not that much room raises the OSError of a write."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call is None:
        return
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if call(file, _KEEP_SIZE, offset, length) and (code := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(code, os.strerror(code))


def _block(fields: dict[str, Any], payload: bytes) -> Encoded:
    n, *shape = fields["shape"]
    return Encoded(
        fields["stream"],
        fields["first"],
        n,
        tuple(shape),
        fields["dtype"],
        fields["codec"],
        payload,
        fields["meta"],
    )


class LandingLog:
    """A durable :class:`~stemloop.core.protocols.FrameLog` in the file ``path``.

    Parameters
    ----------
    path : the file; made if it is not there, else opened and gone on with.
    run : the run's id (at most 112 bytes). A log of another run is an :class:`InputError`. None takes the file's own,
        or a new random one.
    readonly : open for reading alone; nothing is repaired.
    decode : unpacks blocks of codecs other than ``raw`` for :meth:`batches` and :meth:`read`.
    limit_bytes : most bytes that the file may have; an append beyond is a :class:`StorageError`.
    reserve_bytes : how much space is set aside ahead of the writing (given back on closing; 0: none).

    Attributes
    ----------
    run : the run's id.
    damage : list of :class:`Damage` found on opening.
    closed_cleanly : whether the file ended with an end mark when it was opened. A closed log that has been cut short,
        at whatever byte, has lost its end mark.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        run: str | None = None,
        *,
        readonly: bool = False,
        decode: Decoder | None = None,
        limit_bytes: int | None = None,
        reserve_bytes: int = 32 << 20,
    ) -> None:
        self.path = Path(path)
        self.readonly = readonly
        self._decode = decode
        self._limit = limit_bytes
        self._reserve_bytes = reserve_bytes
        self._reserved = 0
        self._acked: dict[str, Spans] = {}
        self._lost: dict[str, Spans] = {}
        self.damage: list[Damage] = []
        self.closed_cleanly = False
        self._lock = threading.Lock()
        self._index_lock = threading.Lock()
        self._spans: dict[str, Spans] = {}
        self._places: dict[str, list[_Place]] = {}
        self._records: list[int] = []
        self._broken = False
        self._away = False
        try:
            flags = os.O_RDONLY if readonly else os.O_RDWR | os.O_CREAT
            self._file = os.open(self.path, flags | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise storage_error("open" if readonly else "write", self.path, error) from None
        try:
            self._open(run)
        except BaseException:
            os.close(self._file)
            raise

    # ------------------------------------------------------------------------------------------------ opening

    def _open(self, run: str | None) -> None:
        if not self.readonly:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StorageError(f"{self.path} is being written by another process; end that first.") from None
        size = os.fstat(self._file).st_size
        if size < _FILE.size and not self.readonly:
            self._create(run, size)
            return
        self.run = self._read_run()
        if run is not None and run != self.run:
            raise InputError(f"{self.path} belongs to run {self.run!r}, not to {run!r}; choose another file.")
        self._scan(size)
        if not self.readonly:
            self._cut_tail()

    def _create(self, run: str | None, size: int) -> None:
        """Write the file header. A shorter file can only be one whose header was being written (or an alien)."""
        self.run = run or str(uuid.uuid4())
        name = self.run.encode()
        if len(name) > 112:
            raise InputError("the id of a run has at most 112 bytes.")
        head = _FILE.pack(_FILE_MAGIC, VERSION, len(name), name, 0)
        self._header = head = head[:-4] + struct.pack("<I", packet.crc32c(head[:-4]))
        if os.pread(self._file, size, 0)[: len(_FILE_MAGIC)] != _FILE_MAGIC[:size]:
            raise InputError(f"{self.path} is there already and is no landing log; choose another file.")
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, head, 0)
            os.fsync(self._file)
            sync_folder(self.path.absolute().parent)
        except OSError as error:
            raise storage_error("write", self.path, error) from None
        self._end = _FILE.size

    def _read_run(self) -> str:
        self._header = head = os.pread(self._file, _FILE.size, 0)
        if len(head) < _FILE.size or not head.startswith(_FILE_MAGIC):
            raise InputError(f"{self.path} is no landing log.")
        _, version, length, name, crc = _FILE.unpack(head)
        if crc != packet.crc32c(head[:-4]):
            raise IntegrityError(f"{self.path}: the file header (offset 0) is damaged.")
        if version != VERSION:
            raise InputError(f"{self.path} is a landing log of version {version}; this is version {VERSION}.")
        return str(name[:length].decode())

    def _fixed(self, offset: int) -> tuple[int, int, int, int, int] | None:
        """(kind, header length, payload length, header CRC, payload CRC) of a record, if its fixed part is good."""
        raw = os.pread(self._file, _RECORD.size, offset)
        if len(raw) < _RECORD.size or not raw.startswith(_RECORD_MAGIC):
            return None
        _, kind, head, load, place, head_crc, load_crc, crc = _RECORD.unpack(raw)
        if crc != packet.crc32c(raw[:-4]) or place != offset or head > packet.MAX_HEADER or load > packet.MAX_PAYLOAD:
            return None
        return kind, head, load, head_crc, load_crc

    def _head(self, offset: int, size: int) -> tuple[int, dict[str, Any], int, int, int] | None:
        """(kind, header fields, where the payload begins, its length, its CRC) if all but the payload is good."""
        fixed = self._fixed(offset)
        if fixed is None:
            return None
        kind, head_length, load_length, head_crc, load_crc = fixed
        begin = offset + _RECORD.size + head_length
        if begin + load_length > size:
            return None
        raw = os.pread(self._file, head_length, offset + _RECORD.size)
        if packet.crc32c(raw) != head_crc:
            return None
        fields = packet.header(raw) if kind == _FRAMES else msgpack.unpackb(raw) if raw else {}
        return kind, fields, begin, load_length, load_crc

    def _valid(self, offset: int, size: int) -> tuple[int, dict[str, Any], int] | None:
        """(kind, header fields, offset of the next) of a valid record, read in small pieces; None if not valid."""
        head = self._head(offset, size)
        if head is None:
            return None
        kind, fields, begin, length, wanted = head
        crc = 0
        for place in range(begin, begin + length, _WINDOW):
            crc = google_crc32c.extend(crc, os.pread(self._file, min(_WINDOW, begin + length - place), place))
        return (kind, fields, begin + length) if crc == wanted else None

    def _torn(self, offset: int, size: int) -> bool:
        """Whether the bytes from ``offset`` to the end are the beginning of a longer record."""
        fixed = self._fixed(offset)
        if fixed is None:
            return size - offset < _RECORD.size
        return offset + _RECORD.size + fixed[1] + fixed[2] > size

    def _find(self, offset: int, size: int) -> int | None:
        """Where the next valid record begins at or after ``offset``."""
        while offset < size:
            window = os.pread(self._file, _WINDOW, offset)
            at = window.find(_RECORD_MAGIC)
            while at >= 0:
                if self._valid(offset + at, size) is not None:
                    return offset + at
                at = window.find(_RECORD_MAGIC, at + 1)
            offset += max(len(window) - len(_RECORD_MAGIC) + 1, 1)
        return None

    def _scan(self, size: int) -> None:
        offset, kind = _FILE.size, _FRAMES
        while offset < size:
            record = self._valid(offset, size)
            if record is None:
                following = self._find(offset + 1, size)
                stop = size if following is None else following
                torn = following is None and self._torn(offset, size)
                self.damage.append(Damage(offset, stop - offset, torn))
                self._remember(offset, size)
                offset, kind = stop, _FRAMES
                continue
            kind, fields, stop = record
            if kind == _FRAMES:
                self._note(fields["stream"], fields["first"], fields["shape"][0], offset)
            elif kind == _LOST:
                self._lost.setdefault(fields["stream"], Spans()).add(fields["first"], fields["stop"])
            elif kind == _END:
                for stream, spans in fields.get("acknowledged", {}).items():
                    for first, after in spans:
                        self._acked.setdefault(stream, Spans()).add(first, after)
            offset = stop
        self._end = size
        self.closed_cleanly = kind == _END and not self.damage

    def _remember(self, offset: int, size: int) -> None:
        """Count the frames of a record whose payload alone is damaged: they were acknowledged once."""
        head = self._head(offset, size)
        if head is not None and head[0] == _FRAMES:
            fields = head[1]
            acked = self._acked.setdefault(fields["stream"], Spans())
            acked.add(fields["first"], fields["first"] + fields["shape"][0])

    def _cut_tail(self) -> None:
        """Cut off a torn last record. Damage that was whole once stays where it is, and new records follow it."""
        if self.damage and self.damage[-1].torn:
            self._end = self.damage[-1].offset
            self._broken = True
            self._mend()

    def _note(self, stream: str, first: int, n: int, offset: int) -> None:
        with self._index_lock:
            self._records.append(offset)
            self._acked.setdefault(stream, Spans()).add(first, first + n)
            places = self._places.setdefault(stream, [])
            for begin, stop in self._spans.setdefault(stream, Spans()).add(first, first + n):
                insort(places, _Place(begin, stop, offset), key=lambda place: place.first)

    # ------------------------------------------------------------------------------------------------ writing

    def append(self, batch: Batch | Encoded) -> None:
        """Write ``batch``; it is on the disk when this returns."""
        self.append_many([batch])

    def append_many(self, batches: Sequence[Batch | Encoded]) -> None:
        """Write all ``batches`` with one ``fdatasync``: all are on the disk when this returns, none if it raises.

        After a :class:`StorageError` the log is as it was before the call, and may be tried again: also when the
        folder was unmounted, mended and mounted anew meanwhile.
        """
        self._writable()
        with self._lock:
            self._mend()
            parts: list[bytes] = []
            notes = []
            offset = self._end
            for batch in batches:
                head, payload = packet.encode(batch, self.run)
                parts += [self._pack(_FRAMES, head, payload, offset), payload]
                n = len(batch.frames) if isinstance(batch, Batch) else batch.n
                notes.append((batch.stream, batch.first, n, offset))
                offset += len(parts[-2]) + len(payload)
            self._commit(parts, offset)
            for note in notes:
                self._note(*note)

    def declare_lost(self, stream: str, first: int, stop: int, why: str) -> None:
        """Write down, durably, that the frames ``first .. stop`` of ``stream`` that are not here will never come."""
        if not 0 <= first < stop:
            raise InputError(f"frames {first} to {stop} are no range; give first < stop.")
        self._writable()
        with self._lock:
            self._mend()
            absent = self._spans.get(stream, Spans()).absent(int(first), int(stop))
            marks, end = [], self._end
            for begin, after in absent:
                head = msgpack.packb({"stream": stream, "first": begin, "stop": after, "why": why})
                marks.append(self._pack(_LOST, head, b"", end))
                end += len(marks[-1])
            self._commit(marks, end)
            with self._index_lock:
                for begin, after in absent:
                    self._lost.setdefault(stream, Spans()).add(begin, after)

    def _writable(self) -> None:
        if self.readonly:
            raise StorageError(f"{self.path} was opened for reading alone.")

    @staticmethod
    def _pack(kind: int, head: bytes, payload: bytes, offset: int) -> bytes:
        crcs = packet.crc32c(head), packet.crc32c(payload)
        fixed = _RECORD.pack(_RECORD_MAGIC, kind, len(head), len(payload), offset, *crcs, 0)[:-4]
        return fixed + struct.pack("<I", packet.crc32c(fixed)) + head

    def _commit(self, parts: list[bytes], end: int) -> None:
        if self._limit is not None and end > self._limit:
            raise StorageError(
                f"{self.path} may have {self._limit} bytes and would grow to {end}; what was acknowledged is safe. "
                "Allow more, or go on with another log."
            )
        self._broken = True  # until all of it is known to be on the disk
        try:
            self._make_room(end)
            self._write(parts)
            os.fdatasync(self._file)
        except OSError as error:
            failure = storage_error("write", self.path, error)
            with contextlib.suppress(StorageError):  # tried again before the next write
                self._mend()
            raise failure from None
        self._broken = False
        self._end = end

    def _make_room(self, end: int) -> None:
        if end <= self._reserved or not self._reserve_bytes:
            return
        try:
            _reserve(self._file, self._end, end - self._end + self._reserve_bytes)
            self._reserved = end + self._reserve_bytes
        except OSError:  # not that much room any more: what is needed now
            _reserve(self._file, self._end, end - self._end)
            self._reserved = end

    def _write(self, parts: list[bytes]) -> None:
        offset = self._end
        waiting = [memoryview(part) for part in parts if part]
        while waiting:
            written = os.pwritev(self._file, waiting[:_MAX_BUFFERS], offset)
            offset += written
            while waiting and written >= len(waiting[0]):
                written -= len(waiting.pop(0))
            if written:
                waiting[0] = waiting[0][written:]

    def _mend(self) -> None:
        """Cut off what a failed write left behind, so that a retry starts from the last durable byte."""
        if not self._broken:
            return
        try:
            self._reopen()
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)
        except OSError as error:
            raise storage_error("mend", self.path, error) from None
        self._reserved = 0
        self._broken = False

    def _reopen(self) -> None:
        """Let go of a file system that takes nothing any more, so that it can be unmounted and mended, and follow the
        path to the file when it is there again."""
        if not self._away:
            with contextlib.suppress(FileNotFoundError):
                there, here = os.stat(self.path), os.fstat(self._file)
                if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino) and not _dead(self._file):
                    return
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, self._file, inheritable=False)
            os.close(nothing)
            self._away = True
        fresh = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fresh, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.pread(fresh, _FILE.size, 0) != self._header or os.fstat(fresh).st_size < self._end:
                raise OSError(errno.ESTALE, "it is not the file that was being written")
            os.dup2(fresh, self._file, inheritable=False)
        finally:
            os.close(fresh)
        self._away = False

    def close(self) -> None:
        """Write the end mark and close the file. Closing twice is harmless."""
        if self._file < 0:
            return
        try:
            if not self.readonly:
                with self._lock:
                    self._mend()
                    with self._index_lock:
                        acked = {stream: list(spans) for stream, spans in self._acked.items()}
                    mark = self._pack(_END, msgpack.packb({"acknowledged": acked}), b"", self._end)
                    self._commit([mark], self._end + len(mark))
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._file, self._end)  # gives the space back that was set aside
        finally:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> LandingLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ reading

    @property
    def index(self) -> dict[str, list[Span]]:
        """What is durable: for each stream the ranges ``(first, stop)`` of sequence numbers."""
        with self._index_lock:
            return {stream: list(spans) for stream, spans in self._spans.items()}

    def ledger(self) -> dict[str, Account]:
        """What became of the frames of each stream: acknowledged, stored, declared lost, and never seen."""
        with self._index_lock:
            names = sorted({*self._acked, *self._lost})
            nothing = Spans()
            return {
                name: Account.of(
                    self._acked.get(name, nothing), self._spans.get(name, nothing), self._lost.get(name, nothing)
                )
                for name in names
            }

    def _load(self, offset: int) -> Encoded:
        if self._away:
            raise StorageError(f"{self.path} cannot be read until its disk is mounted and writable again.")
        head = self._head(offset, self._end)
        if head is not None:
            _, fields, begin, length, wanted = head
            payload = os.pread(self._file, length, begin)
            if packet.crc32c(payload) == wanted:
                return _block(fields, payload)
        raise IntegrityError(f"{self.path}: the record at offset {offset} is damaged; it is not served.")

    def _unpack(self, block: Encoded) -> Batch:
        if block.codec == packet.RAW or self._decode is None:
            return packet.unpacked(block)
        return Batch(block.stream, block.first, self._decode(block), block.meta)

    def heads(self) -> Iterator[tuple[Encoded, int]]:
        """What :meth:`blocks` yields, without its payload but with its size [bytes]; damaged ones are left out."""
        for offset in list(self._records):
            head = self._head(offset, self._end)
            if head is not None:
                yield _block(head[1], b""), head[3]

    def blocks(self, stream: str | None = None, *, skip_corrupt: bool = False) -> Iterator[Encoded]:
        """All blocks (of ``stream``) in the order in which they were written, not unpacked.

        A damaged record is an :class:`IntegrityError` that names its offset, raised where the record would have come;
        ``skip_corrupt`` leaves it out and goes on. An unfinished last record was never acknowledged and is no block.
        """
        bad = [damage.offset for damage in self.damage if not damage.torn]
        for offset in sorted([*self._records, *bad]):
            try:
                block = self._load(offset)
            except IntegrityError:
                if skip_corrupt:
                    continue
                raise
            if stream is None or block.stream == stream:
                yield block

    def batches(self, stream: str | None = None, *, skip_corrupt: bool = False) -> Iterator[Batch]:
        """As :meth:`blocks`, unpacked."""
        for block in self.blocks(stream, skip_corrupt=skip_corrupt):
            yield self._unpack(block)

    def read(self, stream: str, first: int, n: int) -> NDArray[Any]:
        """Frames ``first .. first + n`` of ``stream``, read back from the disk and checked; of numbers that were
        written twice, the first copy."""
        with self._index_lock:
            places = self._places.get(stream, [])
            absent = self._spans.get(stream, Spans()).absent(first, first + n)
            begin = bisect_right(places, first, key=lambda place: place.first) - 1
            stop = bisect_left(places, first + n, key=lambda place: place.first)
            places = places[max(begin, 0) : stop]
        if n < 1 or absent:
            raise InputError(f"stream {stream!r} has no frames {absent or n} in {self.path}.")
        parts = []
        for place in places:
            batch = self._unpack(self._load(place.offset))
            begin, stop = max(first, place.first), min(first + n, place.stop)
            parts.append(batch.frames[begin - batch.first : stop - batch.first])
        if len({(part.shape[1:], part.dtype) for part in parts}) > 1:
            raise InputError(f"frames {first} to {first + n - 1} of {stream!r} differ in shape or type; ask for less.")
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
