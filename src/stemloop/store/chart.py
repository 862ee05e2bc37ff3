"""The chart of a sealed file: where each byte belongs, and its checksum.

The chart lists every chunk of frames (place, size, CRC32C, which frames) and every stretch of bytes between them, so
that each byte of the file is under one checksum. It lies in the file twice: at its front, as an ordinary HDF5 dataset,
and behind HDF5's own end, where no HDF5 library looks. So a damaged place can be named, and the frames of all other
chunks be served, without trusting HDF5's own tables; also when the file was cut short, or lost its beginning.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import google_crc32c
import msgpack
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import IntegrityError, UnreadableFile
from stemloop.core.spans import Span, Spans

MAGIC = b"STEMMAP2"
_LEAD = struct.Struct("<8sQI")
_TAIL = struct.Struct("<8sQ")
_WINDOW = 1 << 22
_MAX_BYTES = 1 << 30

#: One chunk: its bytes in the file, the rows ``row .. row + n`` of its dataset that it holds, how many ``frames`` it
#: unpacks to, and how many of them to ``skip``.
CHUNK = np.dtype(
    [(name, "<u8") for name in ("offset", "row")] + [(name, "<u4") for name in ("size", "crc", "n", "frames", "skip")]
)
#: Bytes that are no frames.
REST = np.dtype([("offset", "<u8"), ("size", "<u8"), ("crc", "<u4")])


@dataclass
class Set:
    """The frames of one dataset. ``numbers``: sequence numbers of its rows; ``stored``: those of them that came;
    ``side``: rows a chunk. ``opaque``: chunks are blocks of a codec that HDF5 does not know."""

    name: str
    stream: str
    dtype: str
    shape: tuple[int, ...]
    side: int
    codec: str
    numbers: Spans
    stored: Spans
    missing: list[Span]
    opaque: bool = False
    scan: tuple[int, int] | None = None
    chunks: NDArray[Any] = field(default_factory=lambda: np.zeros(0, CHUNK))

    @property
    def rows(self) -> int:
        return len(self.numbers)

    def number(self, row: int) -> int:
        """The sequence number of the frame in ``row``."""
        for first, stop in self.numbers:
            if row < stop - first:
                return first + row
            row -= stop - first
        raise IndexError(row)

    def holds(self, chunk: Any) -> str:
        """Which frames a chunk has, in words."""
        first, last = self.number(int(chunk["row"])), self.number(int(chunk["row"]) + int(chunk["n"]) - 1)
        return f"{self.name}, frames {first} to {last}"

    def wire(self) -> dict[str, Any]:
        plain = {**vars(self), "shape": list(self.shape), "chunks": self.chunks.tobytes()}
        return {**plain, "numbers": list(self.numbers), "stored": list(self.stored)}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Set:
        spans = {key: Spans(tuple(span) for span in wire[key]) for key in ("numbers", "stored")}
        chunks = np.frombuffer(wire["chunks"], CHUNK)
        missing = [tuple(span) for span in wire["missing"]]
        scan = tuple(wire["scan"]) if wire["scan"] else None
        shape = tuple(wire["shape"])
        return cls(**{**wire, **spans, "shape": shape, "scan": scan, "chunks": chunks, "missing": missing})


@dataclass
class Chart:
    """``size``: bytes of the file without the chart behind its end; ``front``: place and room of the other one;
    ``sha256``: of all bytes but those of the charts; ``story``: what else is needed to make the file
    again (run, calibrations, positions, what travelled with the frames, logs)."""

    size: int
    sets: list[Set]
    story: dict[str, Any]
    rest: NDArray[Any]
    sha256: str = ""
    front: tuple[int, int] = (0, 0)

    def pack(self) -> bytes:
        """The chart as bytes: magic, length, CRC32C, content."""
        content = {
            "size": self.size,
            "sets": [entry.wire() for entry in self.sets],
            "story": json.dumps(self.story, sort_keys=True),
            "rest": self.rest.tobytes(),
            "sha256": self.sha256,
            "front": list(self.front),
        }
        body = zlib.compress(msgpack.packb(content), 1)
        return _LEAD.pack(MAGIC, len(body), google_crc32c.value(body)) + body

    @classmethod
    def unpack(cls, raw: bytes) -> Chart:
        """The chart that ``raw`` begins with; ValueError if it is none."""
        magic, length, crc = _LEAD.unpack_from(raw)
        body = raw[_LEAD.size : _LEAD.size + length]
        if magic != MAGIC or len(body) != length or google_crc32c.value(body) != crc:
            raise ValueError("no chart, or a damaged one")
        content = msgpack.unpackb(zlib.decompress(body, bufsize=1 << 16))
        return cls(
            content["size"],
            [Set.from_wire(wire) for wire in content["sets"]],
            json.loads(content["story"]),
            np.frombuffer(content["rest"], REST),
            content["sha256"],
            tuple(content["front"]),
        )


@dataclass(frozen=True)
class Flaw:
    """Bytes ``offset .. offset + size`` that are not what was written; ``what`` says what they are for. ``frames``:
    the dataset and its rows, if they are frames."""

    offset: int
    size: int
    what: str
    frames: tuple[str, int, int] | None = None

    def __str__(self) -> str:
        return f"bytes {self.offset} to {self.offset + self.size - 1}: {self.what}"


def crc(file: int, offset: int, size: int) -> int:
    """CRC32C of bytes of an open file, read in small pieces."""
    found = 0
    for place in range(offset, offset + size, _WINDOW):
        found = google_crc32c.extend(found, os.pread(file, min(_WINDOW, offset + size - place), place))
    return int(found)


def tail(chart: bytes, offset: int) -> bytes:
    """What is written behind HDF5's end at ``offset``: the chart, and where it begins."""
    return chart + _TAIL.pack(MAGIC, offset)


def find(file: int, path: str | os.PathLike[str]) -> tuple[Chart, list[Flaw]]:
    """The chart of an open file, and what is wrong with its copies.

    Errors: :class:`UnreadableFile` if there is no trace of one, :class:`IntegrityError` if all copies are damaged.
    """
    size = os.fstat(file).st_size
    behind = _load(file, size, _behind(file, size))
    front = _load(file, size, behind.front[0] if behind else _front(file, size))
    chart = behind or front
    if chart is None:
        if _behind(file, size) is None and _front(file, size) is None:
            name = os.path.basename(os.fspath(path))
            raise UnreadableFile(f"{name} is no sealed file, or its beginning and its end are damaged.")
        raise IntegrityError(f"{path}: both charts of the file are damaged; nothing in it can be vouched for.")
    found: list[Flaw] = []
    if chart.front[1] and (front is None or not _empty_behind(file, *chart.front)):
        found.append(Flaw(*chart.front, "the chart at the front is damaged"))
    if size < chart.size:
        found.append(Flaw(size, chart.size - size, "the file was cut short"))
    elif behind is None:
        found.append(Flaw(chart.size, size - chart.size, "the chart behind the end is damaged"))
    return chart, found


def _empty_behind(file: int, offset: int, room: int) -> bool:
    """Whether the room for the chart at the front has nothing but zeros behind the chart."""
    raw = os.pread(file, room, offset)
    used = _LEAD.size + int(_LEAD.unpack_from(raw)[1])
    return not raw[used:].strip(b"\0")


def _load(file: int, size: int, offset: int | None) -> Chart | None:
    """The chart at ``offset``, if there is a whole one."""
    if offset is None:
        return None
    lead = os.pread(file, _LEAD.size, offset)
    if len(lead) < _LEAD.size:
        return None
    length = min(_LEAD.unpack(lead)[1], _MAX_BYTES, size - offset)
    try:
        return Chart.unpack(os.pread(file, _LEAD.size + length, offset))
    except (ValueError, KeyError, TypeError, struct.error, zlib.error):
        return None


def _behind(file: int, size: int) -> int | None:
    raw = os.pread(file, _TAIL.size, max(0, size - _TAIL.size))
    if len(raw) == _TAIL.size:
        magic, offset = _TAIL.unpack(raw)
        if magic == MAGIC and offset < size:
            return int(offset)
    return None


def _front(file: int, size: int) -> int | None:
    if not size:
        return None
    with mmap.mmap(file, min(size, _WINDOW), access=mmap.ACCESS_READ) as front:
        at = front.find(MAGIC)
    return at if at >= 0 else None


def flaws(file: BinaryIO | int, chart: Chart) -> list[Flaw]:
    """Every stretch of bytes that does not fit its checksum."""
    handle = file if isinstance(file, int) else file.fileno()
    found = [
        Flaw(int(part["offset"]), int(part["size"]), "axes, positions, metadata or HDF5's own tables are damaged")
        for part in chart.rest
        if crc(handle, int(part["offset"]), int(part["size"])) != part["crc"]
    ]
    for entry in chart.sets:
        for chunk in entry.chunks:
            offset, size = int(chunk["offset"]), int(chunk["size"])
            if crc(handle, offset, size) != chunk["crc"]:
                rows = (entry.name, int(chunk["row"]), int(chunk["row"]) + int(chunk["n"]))
                found.append(Flaw(offset, size, f"{entry.holds(chunk)} are damaged", rows))
    return sorted(found, key=lambda flaw: flaw.offset)
