"""Writing a sealed file; runs in a child process, because the HDF5 library takes its process with it on a full disk.

The blocks are looked at twice: first their heads, from which the datasets are planned, then their bytes. A block that
is a whole chunk of its dataset already is copied as it is; any other is unpacked and packed again, or repacked at once
where a packer for its codec is given.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import google_crc32c
import h5py
import numpy as np
from numpy.typing import NDArray

from stemloop.core.chunk import SHUFFLE_DEFLATE
from stemloop.core.errors import InputError, IntegrityError
from stemloop.core.protocols import Encoded
from stemloop.core.signal import Axis
from stemloop.core.spans import Span, Spans
from stemloop.store import chart as charts
from stemloop.store import dialects, pipelines
from stemloop.store.chart import CHUNK, Chart, Set

_CHUNK_BYTES = 1 << 20
_PENDING_BYTES = 512 << 20
_CACHE_BYTES = 64 << 20
_CHART_SLACK = 1 << 14
_WINDOW = 1 << 22
#: How much [bytes] is left to gather before it is flushed, and how often [s] that is looked at.
_DRAIN_BYTES, _DRAIN_S = 32 << 20, 0.05
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FRAME_AXES = {0: (), 1: ("energy_loss",), 2: ("y", "x"), 3: ("channel", "y", "x")}

Decoder = Callable[[Encoded], NDArray[Any]]
#: Makes the chunk (:mod:`stemloop.core.chunk`) of so many frames straight from a block, or None if it cannot.
Packer = Callable[[Encoded, int], bytes | None]


class Source(Protocol):
    """Where the blocks come from: both give the same blocks in the same order, ``heads`` without their payload but
    with its size [bytes]."""

    def heads(self) -> Iterator[tuple[Encoded, int]]: ...

    def blocks(self) -> Iterator[Encoded]: ...


@dataclass
class Known:
    """What is known besides the frames; see :func:`stemloop.store.files.seal`."""

    run: dict[str, Any] = field(default_factory=dict)
    calibrations: dict[str, dict[str, Any]] = field(default_factory=dict)
    positions: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    logs: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[str, list[Span]] = field(default_factory=dict)
    meta: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    profile: str = "portable"

    def story(self) -> dict[str, Any]:
        """What a chart keeps of it."""
        positions = {stream: np.asarray(table).tolist() for stream, table in self.positions.items()}
        return {**vars(self), "positions": positions}

    @classmethod
    def from_story(cls, story: Mapping[str, Any]) -> Known:
        """What :meth:`story` gave."""
        positions = {stream: np.array(table, float).reshape(-1, 2) for stream, table in story["positions"].items()}
        return cls(**{**story, "positions": positions})


# ------------------------------------------------------------------------------------------------------ planning


@dataclass
class _Plan:
    """A dataset to be: which numbers it holds, how many of its blocks have which size and codec."""

    name: str
    stream: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    opaque: str | None
    stored: Spans = field(default_factory=Spans)
    sizes: Counter[tuple[str, int]] = field(default_factory=Counter)
    bytes: int = 0
    pieces: int = 0
    meta: list[dict[str, Any]] = field(default_factory=list)


def _plan(source: Source, known: Known) -> list[_Plan]:
    plans: dict[tuple[Any, ...], _Plan] = {}
    seen: dict[str, Spans] = {}
    for head, size in source.heads():
        fresh = seen.setdefault(head.stream, Spans()).add(head.first, head.first + head.n)
        if not fresh:
            continue
        opaque = head.codec if known.profile == "working" and head.codec not in pipelines.KNOWN else None
        key = (head.stream, head.dtype, head.shape, opaque)
        if key not in plans:
            if not _NAME.fullmatch(head.stream):
                raise InputError(f"a stream's name is letters, digits, '_', '-' and '.'; got {head.stream!r}.")
            count = sum(1 for other in plans if other[0] == head.stream)
            name = head.stream if not count else f"{count + 1}_{head.stream}"  # readers stack names that begin alike
            plans[key] = _Plan(name, head.stream, np.dtype(head.dtype), head.shape, opaque)
        plan = plans[key]
        for first, stop in fresh:
            plan.stored.add(first, stop)
        plan.sizes[head.codec, head.n] += 1
        plan.bytes += size
        plan.pieces += len(fresh)
        if head.meta:
            plan.meta.append({"first": head.first, "n": head.n, **head.meta})
    if not plans:
        raise InputError("there are no frames to seal.")
    return list(plans.values())


def _side(plan: _Plan, scan: tuple[int, int] | None) -> tuple[int, str]:
    """Frames a chunk and codec: those of most blocks, so that most are copied."""
    (codec, n), _ = plan.sizes.most_common(1)[0]
    frame = plan.dtype.itemsize * math.prod(plan.shape)
    if codec not in pipelines.KNOWN or codec == pipelines.RAW:
        codec = SHUFFLE_DEFLATE
        if not _CHUNK_BYTES // 4 <= n * frame <= _CHUNK_BYTES * 4:
            n = max(1, _CHUNK_BYTES // max(1, frame))
    n = min(n, len(plan.stored))
    if scan is not None and n % scan[1] and scan[1] % n:
        n = max(k for k in range(1, min(n, scan[1]) + 1) if scan[1] % k == 0)
    return n, codec


def _scan(plan: _Plan, calibration: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) of the scan that the frames are, if that is known and they fit into it."""
    told = calibration.get("scan")
    if not told or plan.opaque:
        return None
    rows, columns = (int(side) for side in told["shape"])
    return (rows, columns) if plan.stored.stop <= rows * columns else None


# ------------------------------------------------------------------------------------------------------- writing


def write(
    path: str, source: Source, known: Known, decode: Decoder | None = None, packer: Packer | None = None
) -> dict[str, dict[str, Any]]:
    """Write the sealed file ``path``, look at all its bytes once more, and flush it to the disk."""
    plans = _plan(source, known)
    known = replace(known, meta={**{plan.name: plan.meta for plan in plans}, **known.meta})
    with _draining(path):
        with h5py.File(path, "w", libver=("v108", "v110"), rdcc_nbytes=_CACHE_BYTES) as file:
            writer = _Writer(file, plans, known, decode, packer)
            for block in source.blocks():
                writer.take(block)
            writer.finish()
            sets, front, room = writer.sets(), writer.front, writer.room
        return _chart(path, sets, known, front, room)


@contextlib.contextmanager
def _draining(path: str) -> Iterator[None]:
    """Flush the file that is being written at ``path`` all along, so that the disk works while chunks are packed and
    the last flush has little left to wait for."""
    flush = getattr(os, "fdatasync", os.fsync)
    over, failures = threading.Event(), list[OSError]()

    def drain(file: int) -> None:
        flushed = 0
        while not over.wait(_DRAIN_S):
            size = os.fstat(file).st_size
            if size - flushed >= _DRAIN_BYTES:
                try:
                    flush(file)
                except OSError as error:  # the disk tells of a lost page only once, and it told it here
                    failures.append(error)
                    return
                flushed = size

    with open(path, "ab") as file:
        thread = threading.Thread(target=drain, args=(file.fileno(),), name="drain")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
    if failures:
        raise failures[0]


def _chart(path: str, sets: list[Set], known: Known, front: int, room: int) -> dict[str, dict[str, Any]]:
    """Write the chart into its two places, after reading each byte of the file back."""
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        taken = [(int(c["offset"]), int(c["size"])) for entry in sets for c in entry.chunks]
        rest, digest = _rest(file.fileno(), size, sorted({*taken, (front, room)}), front)
        chart = Chart(size, sets, known.story(), rest, digest, (front, room))
        wrong = charts.flaws(file, chart)
        if wrong:
            raise IntegrityError(
                f"{path} was not sealed: the disk gave back other bytes than were written ({wrong[0]})."
            )
        raw = chart.pack()
        if len(raw) > room:
            raw = replace(chart, front=(front, 0)).pack()
        else:
            os.pwrite(file.fileno(), raw, front)
        os.pwrite(file.fileno(), charts.tail(raw, size), size)
        os.fsync(file.fileno())
    return {entry.name: summary(entry) for entry in sets}


def _rest(file: int, size: int, taken: list[tuple[int, int]], front: int) -> tuple[NDArray[Any], str]:
    """The stretches between ``taken``, and the SHA-256 of all bytes but the chart."""
    digest, found, place = hashlib.sha256(), [], 0
    for offset, length in [*taken, (size, 0)]:
        if offset > place:
            found.append((place, offset - place, charts.crc(file, place, offset - place)))
        place = max(place, offset + length)
    room = dict(taken)[front]
    for begin, stop in ((0, front), (front + room, size)):
        for offset in range(begin, stop, _WINDOW):
            digest.update(os.pread(file, min(_WINDOW, stop - offset), offset))
    return np.array(found, charts.REST), digest.hexdigest()


def summary(entry: Set) -> dict[str, Any]:
    """What is told of a dataset."""
    return {
        "frames": len(entry.stored),
        "missing": entry.missing,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "codec": entry.codec,
    }


class _Writer:
    """Lays out the file and takes the blocks."""

    def __init__(
        self, file: h5py.File, plans: list[_Plan], known: Known, decode: Decoder | None, packer: Packer | None
    ) -> None:
        self.file, self.known, self.decode = file, known, decode
        dialects.begin(file, known.run)
        self.front, self.room = self._make_room(plans)
        self.seen: dict[str, Spans] = {}
        self.books: dict[tuple[Any, ...], _Book] = {}
        for plan in plans:
            calibration = known.calibrations.get(plan.stream, {})
            if plan.name in file["entry"]:
                raise InputError(f"a stream cannot be called {plan.name!r}; that name is taken in the file.")
            scan = _scan(plan, calibration)
            key = (plan.stream, plan.dtype.str, plan.shape, plan.opaque)
            self.books[key] = _Opaque(file, plan) if plan.opaque else _Dense(file, plan, scan, known, packer)
        file["entry"].attrs["default"] = plans[0].name

    def _make_room(self, plans: list[_Plan]) -> tuple[int, int]:
        """Set space aside near the front of the file for the chart: (offset, bytes)."""
        blocks = sum(min(plan.pieces, len(plan.stored)) + 16 for plan in plans)
        words = len(json.dumps(self.known.story()))
        room = _CHART_SLACK + 2 * (CHUNK.itemsize + charts.REST.itemsize) * min(blocks, 1 << 20) + words
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((room,))
        data = h5py.h5d.create(self.file["entry/frames"].id, b"chart", h5py.h5t.STD_U8LE, space, plan)
        return int(data.get_offset()), room

    def take(self, block: Encoded) -> None:
        fresh = self.seen.setdefault(block.stream, Spans()).add(block.first, block.first + block.n)
        if not fresh:
            return
        opaque = block.codec if self.known.profile == "working" and block.codec not in pipelines.KNOWN else None
        book = self.books[block.stream, np.dtype(block.dtype).str, block.shape, opaque]
        book.take(block, fresh, self._frames)

    def _frames(self, block: Encoded) -> NDArray[Any]:
        if block.codec in pipelines.KNOWN:
            dtype = np.dtype(block.dtype)
            return pipelines.unpack(block.payload, (block.n, *block.shape), dtype, block.codec)
        if self.decode is None:
            raise InputError(f"stream {block.stream!r} is written with the codec {block.codec!r}; give its decoder.")
        return np.asarray(self.decode(block), np.dtype(block.dtype)).reshape(block.n, *block.shape)

    def finish(self) -> None:
        for book in self.books.values():
            book.finish(self.known, self.seen[book.plan.stream])
        for name, record in self.known.logs.items():
            dialects.log(self.file, name, record)
        self.file.flush()

    def sets(self) -> list[Set]:
        return [book.set() for book in self.books.values()]


class _Book:
    """What is kept about the frames of a dataset while it is written."""

    def __init__(self, file: h5py.File, plan: _Plan) -> None:
        self.file, self.plan = file, plan
        self.numbers = plan.stored
        self.crcs: list[int] = []
        self.missing: list[Span] = []

    def take(self, block: Encoded, fresh: list[Span], frames: Decoder) -> None:
        raise NotImplementedError

    def set(self) -> Set:
        raise NotImplementedError

    def rows(self, numbers: Any) -> NDArray[np.int64]:
        """The rows of sequence numbers."""
        spans = np.array(list(self.numbers), np.int64)
        before = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
        k = np.searchsorted(spans[:, 0], numbers, side="right") - 1
        return np.asarray(before[k] + numbers - spans[k, 0])

    def finish(self, known: Known, seen: Spans) -> None:
        """The shelf of the dataset: what its rows are."""
        plan = self.plan
        self.missing = Spans([*seen]).gaps()
        if self.numbers.stop > seen.stop:
            self.missing.append((seen.stop, self.numbers.stop))
        shelf = self.file["entry/frames"].create_group(plan.name)
        sequence = np.concatenate([np.arange(first, stop) for first, stop in self.numbers])
        shelf["sequence"] = sequence
        shelf["position"] = places(known.positions.get(plan.stream), sequence)
        shelf["position"].attrs["units"] = "m"
        shelf["meta"] = json.dumps(known.meta.get(plan.name, []))
        shelf.attrs["NX_class"] = "NXcollection"
        shelf.attrs["stream"] = plan.stream
        shelf.attrs["missing"] = np.array(self.missing, np.int64).reshape(-1, 2)
        shelf.attrs["declared_lost"] = np.array(known.lost.get(plan.stream, []), np.int64).reshape(-1, 2)
        shelf.attrs["calibration"] = json.dumps(known.calibrations.get(plan.stream, {}), sort_keys=True)
        shelf["chunk_crc32c"] = np.array(self.crcs, np.uint32)


def places(table: NDArray[np.float64] | None, sequence: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, 2): the position [m] of each frame of ``sequence``; NaN where none was given."""
    found = np.full((len(sequence), 2), np.nan)
    if table is not None:
        known = sequence < len(table)
        found[known] = table[sequence[known]]
    return found


class _Dense(_Book):
    """Frames that every reader sees: a chunked dataset (frame, ...), or (rows, columns, ...) of a whole scan."""

    def __init__(
        self, file: h5py.File, plan: _Plan, scan: tuple[int, int] | None, known: Known, packer: Packer | None
    ) -> None:
        super().__init__(file, plan)
        self.packer = packer
        calibration = known.calibrations.get(plan.stream, {})
        self.scan = scan
        if scan is not None:
            self.numbers = Spans([(0, math.prod(scan))])
        self.side, codec = _side(plan, scan)
        self.codec = codec if known.profile == "working" else SHUFFLE_DEFLATE
        lead = scan or (len(self.numbers),)
        chunk = (self.side,) if scan is None else (max(1, self.side // scan[1]), min(self.side, scan[1]))
        axes = [*lead_axes(calibration, lead), *frame_axes(calibration, plan.shape)]
        group = file["entry"].create_group(plan.name)
        self.data = group.create_dataset(
            "data", (*lead, *plan.shape), plan.dtype, chunks=(*chunk, *plan.shape), **pipelines.options(self.codec)
        )
        dialects.describe(file, plan.name, self.data, axes, known.run)
        self.pending: dict[int, tuple[NDArray[Any], int]] = {}
        self.crc_of: dict[int, int] = {}

    def take(self, block: Encoded, fresh: list[Span], frames: Decoder) -> None:
        row = int(self.rows(block.first)) if fresh[0][0] == block.first else -1
        whole = fresh == [(block.first, block.first + block.n)] and block.n == self.side and row % self.side == 0
        if whole and block.codec == self.codec:
            self._put(row // self.side, block.payload)
            return
        chunk = self._packed(block, frames) if whole and self.codec == SHUFFLE_DEFLATE else None
        if chunk is not None:
            self._put(row // self.side, chunk)
            return
        unpacked = frames(block)
        if whole:
            self._put(row // self.side, pipelines.pack(unpacked, self.side, self.codec))
            return
        for first, stop in fresh:
            self._fill(int(self.rows(first)), unpacked[first - block.first : stop - block.first])

    def _packed(self, block: Encoded, frames: Decoder) -> bytes | None:
        """The block's chunk from the packer, or None. Every 64th is unpacked and compared; should a packer ever be
        wrong, nothing is sealed."""
        chunk = None if self.packer is None else self.packer(block, self.side)
        if chunk is not None and block.first // self.side % 64 == 0:
            unpacked = pipelines.unpack(chunk, (self.side, *self.plan.shape), self.plan.dtype, self.codec)
            if not np.array_equal(unpacked[: block.n], frames(block)) or unpacked[block.n :].any():
                raise IntegrityError(
                    f"frames {block.first} to {block.first + block.n - 1} of stream {self.plan.stream!r} would be "
                    "packed wrongly; nothing was sealed. Report this with the log."
                )
        return chunk

    def _fill(self, row: int, frames: NDArray[Any]) -> None:
        """Gather frames until a chunk is whole."""
        while len(frames):
            k, begin = divmod(row, self.side)
            n = min(len(frames), self.side - begin)
            chunk, count = self.pending.pop(k, (None, 0))
            if chunk is None:
                chunk = np.zeros((self.side, *self.plan.shape), self.plan.dtype)
            chunk[begin : begin + n] = frames[:n]
            if count + n == min(self.side, len(self.numbers) - k * self.side):
                self._put(k, pipelines.pack(chunk, self.side, self.codec))
            else:
                self.pending[k] = chunk, count + n
            row, frames = row + n, frames[n:]
        if len(self.pending) * self.side * self.plan.dtype.itemsize * math.prod(self.plan.shape) > _PENDING_BYTES:
            raise InputError(
                f"the frames of stream {self.plan.stream!r} came in too wild an order to be sealed in bounded memory."
            )

    def _put(self, k: int, payload: bytes) -> None:
        self.crc_of[k] = google_crc32c.value(payload)
        self.data.id.write_direct_chunk(self._corner(k), payload)

    def _corner(self, k: int) -> tuple[int, ...]:
        row = k * self.side
        lead = (row,) if self.scan is None else divmod(row, self.scan[1])
        return (*lead, *(0 for _ in self.plan.shape))

    def finish(self, known: Known, seen: Spans) -> None:
        for k, (chunk, _) in sorted(self.pending.items()):  # chunks of which some frames are missing
            self._put(k, pipelines.pack(chunk, self.side, self.codec))
        self.crcs = [self.crc_of[k] for k in sorted(self.crc_of)]
        super().finish(known, seen)

    def set(self) -> Set:
        found: dict[int, tuple[int, int]] = {}

        def visit(info: Any) -> None:
            lead = info.chunk_offset
            row = lead[0] if self.scan is None else lead[0] * self.scan[1] + lead[1]
            found[row // self.side] = info.byte_offset, info.size

        self.data.id.chunk_iter(visit)
        chunks = np.zeros(len(found), CHUNK)
        for chunk, k in zip(chunks, sorted(found), strict=True):
            row = k * self.side
            n = min(self.side, len(self.numbers) - row)
            chunk["offset"], chunk["size"] = found[k]
            chunk["crc"], chunk["row"], chunk["n"], chunk["frames"] = self.crc_of[k], row, n, self.side
        plan = self.plan
        return Set(
            plan.name,
            plan.stream,
            plan.dtype.str,
            plan.shape,
            self.side,
            self.codec,
            self.numbers,
            plan.stored,
            self.missing,
            scan=self.scan,
            chunks=chunks,
        )


class _Opaque(_Book):
    """Blocks of a codec that HDF5 does not know, byte after byte; for the profile ``working`` alone."""

    def __init__(self, file: h5py.File, plan: _Plan) -> None:
        super().__init__(file, plan)
        group = file["entry"].create_group(plan.name)
        group.attrs.update(NX_class="NXcollection", codec=str(plan.opaque), dtype=plan.dtype.str)
        group.attrs["frame_shape"] = np.array(plan.shape, np.int64)
        self.data = group.create_dataset("blocks", (plan.bytes,), "u1")
        self.end = 0
        self.chunks: list[tuple[int, ...]] = []

    def take(self, block: Encoded, fresh: list[Span], frames: Decoder) -> None:
        size, crc = len(block.payload), google_crc32c.value(block.payload)
        self.data[self.end : self.end + size] = np.frombuffer(block.payload, np.uint8)
        self.crcs.append(crc)
        for first, stop in fresh:
            row = int(self.rows(first))
            self.chunks.append((self.end, row, size, crc, stop - first, block.n, first - block.first))
        self.end += size

    def set(self) -> Set:
        plan = self.plan
        chunks = np.array(self.chunks, CHUNK)
        chunks["offset"] += self.data.id.get_offset()
        return Set(
            plan.name,
            plan.stream,
            plan.dtype.str,
            plan.shape,
            0,
            str(plan.opaque),
            self.numbers,
            plan.stored,
            self.missing,
            opaque=True,
            chunks=chunks,
        )


# ---------------------------------------------------------------------------------------------------------- axes


def lead_axes(calibration: Mapping[str, Any], lead: tuple[int, ...]) -> list[Axis]:
    """The axes of the frames' numbers: one, or the two of a scan."""
    if len(lead) == 1:
        return [Axis("frame", lead[0], 1.0, 0.0, "")]
    given = calibration["scan"].get("axes")
    if given is None:
        return [Axis("scan_y", lead[0]), Axis("scan_x", lead[1])]
    return [_axis(entry, size) for entry, size in zip(given, lead, strict=True)]


def _axis(entry: Any, size: int) -> Axis:
    return Axis(**{**(vars(entry) if isinstance(entry, Axis) else entry), "size": size})


def frame_axes(calibration: Mapping[str, Any], shape: tuple[int, ...]) -> list[Axis]:
    """The axes of one frame of ``shape`` as a stream's ``calibration`` tells them."""
    given = calibration.get("axes")
    if given is not None:
        if len(given) != len(shape):
            raise InputError(f"the calibration has {len(given)} axes; a frame of shape {shape} has {len(shape)}.")
        return [_axis(entry, size) for entry, size in zip(given, shape, strict=True)]
    if len(shape) == 1 and "energy_loss" in calibration:
        offset, scale = calibration["energy_loss"][:2]
        return [Axis("energy_loss", shape[0], float(scale), float(offset), "eV")]
    if len(shape) == 2 and "pixel_rad" in calibration:
        pixel = float(calibration["pixel_rad"])
        centre = calibration.get("centre_px") or (0.0, 0.0)
        dets = ("det_y", "det_x")
        return [Axis(n, s, pixel, -pixel * float(c), "rad") for n, s, c in zip(dets, shape, centre, strict=True)]
    if len(shape) == 2 and "pixel_m" in calibration:
        pixels = np.broadcast_to(np.asarray(calibration["pixel_m"], float), 2)
        return [Axis(n, s, float(p), 0.0, "m") for n, s, p in zip(("y", "x"), shape, pixels, strict=True)]
    names = _FRAME_AXES.get(len(shape), tuple(f"axis_{i}" for i in range(len(shape))))
    return [Axis("channel" if name == "energy_loss" else name, size) for name, size in zip(names, shape, strict=True)]
