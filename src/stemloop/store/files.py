"""Sealed files: the frames of a run in one HDF5 file that many programs open.

One copy of the bytes in several dialects, by attributes and hard links alone: NeXus (``/entry``, an NXentry in the
manner of NXem, with one NXdata a stream), EMD 1.0 (``emd_group_type`` ``root`` and ``array``, ``dim0`` ...) and NCEM's
EMD 0.2 (``/ncem``, ``emd_group_type`` 1, ``dim1`` ...). Only filters that every HDF5 library has (shuffle, deflate).

A row of a stream's ``data`` is a frame that was recorded; ``/entry/frames/<stream>`` says which: ``sequence`` (its
number), ``crc32c`` (of its bytes), ``position`` ((y, x) [m], NaN where none was given) and, as an attribute,
``missing`` (ranges of numbers that never came). An empty frame and a missing one are never confused.

The file is written by a child process, because the HDF5 library takes its process with it when the disk is full. It
is written under another name, read back and compared, flushed, and only then renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import h5py
import msgpack
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, IntegrityError, StorageError, UnreadableFile
from stemloop.core.protocols import Batch
from stemloop.core.signal import Axis, Signal
from stemloop.store import guard, sandbox

VERSION = 1
_MARK = "stemloop_sealed"
_DIGEST = "content_sha256"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LENGTHS = struct.Struct("<IQ")
_CHUNK_BYTES = 1 << 20
_CACHE_BYTES = 64 << 20
_FRAME_AXES = {0: (), 1: ("energy_loss",), 2: ("y", "x"), 3: ("channel", "y", "x")}


def seal(
    batches: Iterable[Batch],
    path: str | os.PathLike[str],
    *,
    run: Mapping[str, Any],
    calibrations: Mapping[str, Mapping[str, Any]] | None = None,
    positions: Mapping[str, NDArray[np.float64]] | None = None,
    overwrite: bool = False,
    timeout_s: float = 3600.0,
) -> dict[str, Any]:
    """Copy frames into one open HDF5 file.

    Parameters
    ----------
    batches : the frames, checked by whoever yields them (a landing log does). Of repeated numbers the first is kept.
    path : the file to make. It appears only when it is whole.
    run : what is known of the run, JSON-able. ``start_time`` (ISO 8601), ``title``, ``sample`` (``is_simulation``,
        ``preparation_date``, ``atom_types``) go where NXem wants them; all of it is kept as JSON.
    calibrations : for each stream a dictionary. ``axes`` has one entry a dimension of a frame: an
        :class:`~stemloop.core.signal.Axis` or ``{"name", "scale", "offset", "unit"}``; or one of ``pixel_m`` (images,
        [m]), ``pixel_rad`` with ``centre_px`` (CBED), ``energy_loss`` (offset, scale, size) [eV] is enough. Everything
        else in it is kept as JSON.
    positions : for each stream (n, 2) (y, x) [m]; row k belongs to the frame with sequence number k.
    overwrite : replace a file that is there.

    Returns
    -------
    ``path``, ``bytes``, ``sha256`` of the file, and ``streams``: what :func:`verify` says.

    Errors: :class:`StorageError` (full, read-only, not writable), :class:`InputError`, :class:`IntegrityError` (what
    was read back differs; nothing appears under ``path``).
    """
    target = Path(path)
    _writable(target, overwrite)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    arguments = {"path": str(part.absolute()), "run": _plain(run)}
    feed = _feed(batches, calibrations or {}, positions or {})
    try:
        with sandbox.scratch() as folder:
            streams = sandbox.call(
                "stemloop.store.files:write",
                arguments,
                folder,
                timeout_s=timeout_s,
                memory_MB=4096,
                feed=feed,
                grow=True,
            )
        digest = _sha256(part)
        os.replace(part, target)
        _sync_folder(target.absolute().parent)
    except sandbox.ChildDied as death:
        if death.why.startswith(("ValueError", "TypeError", "KeyError")):
            raise InputError(f"{target} was not sealed: {death.why}.") from None
        free = shutil.disk_usage(target.absolute().parent).free
        raise StorageError(
            f"cannot write {target}: {death.why[:160]}. {free / 1e6:.0f} MB are free there; "
            "the landing log is untouched: make room and seal again."
        ) from None
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}. Choose another folder, or make room.") from None
    finally:
        part.unlink(missing_ok=True)
    return {"path": str(target), "bytes": target.stat().st_size, "sha256": digest, "streams": streams}


def verify(path: str | os.PathLike[str], *, timeout_s: float = 3600.0) -> dict[str, dict[str, Any]]:
    """Read every frame of a sealed file and compare it with its checksum, and everything else with the file's digest.

    Returns for each dataset ``frames``, ``missing`` (ranges (first, stop)), ``dtype`` and ``shape``. Anything that is
    not as it was written is an :class:`IntegrityError` that says what; a file that is not a sealed one an
    :class:`UnreadableFile`. The reading is done by a child process, since damaged HDF5 can crash its library.
    """
    with sandbox.scratch() as folder:
        arguments = {"path": str(Path(path).absolute())}
        try:
            found: dict[str, dict[str, Any]] = sandbox.call(
                "stemloop.store.files:check", arguments, folder, timeout_s=timeout_s, memory_MB=4096
            )
        except sandbox.ChildDied as death:
            raise IntegrityError(f"{path} is damaged: its reader broke ({death.why}).") from None
    return found


def is_sealed(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a file that :func:`seal` made."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _MARK in file.attrs
    except OSError:
        return False


def read_sealed(path: str | os.PathLike[str], *, checked: bool = True) -> list[Signal]:
    """The streams of a sealed file, (frame, ...) each, sorted by sequence number.

    ``metadata`` has ``stream``, ``sequence`` (n,), ``missing``, ``position_m`` (n, 2), ``calibration``, ``run`` and
    ``meta`` (what travelled with the batches). ``checked`` compares everything with its checksums first.
    """
    if checked:
        check(os.fspath(path))
    signals = []
    with _open(path) as file:
        run = json.loads(file["entry/run"][()])
        for name in sorted(file["entry/frames"]):
            group, book = file["entry"][name], file["entry/frames"][name]
            sequence = book["sequence"][:]
            order = np.argsort(sequence, kind="stable")
            data = group["data"][:]
            if np.any(np.diff(order) != 1):
                data, sequence = data[order], sequence[order]
            frame = Axis("frame", len(data), 1.0, 0.0, "")
            axes = (frame, *(Axis(**axis) for axis in json.loads(book.attrs["axes"])))
            metadata = {
                "title": name,
                "reader": "stemloop",
                "stream": str(book.attrs["stream"]),
                "sequence": sequence,
                "missing": book.attrs["missing"].tolist(),
                "position_m": book["position"][:][order],
                "calibration": json.loads(book.attrs["calibration"]),
                "meta": json.loads(book["meta"][()]),
                "run": run,
            }
            signals.append(Signal(data, axes, metadata))
    return signals


# ------------------------------------------------------------------------------------------------ in the parent


def _writable(target: Path, overwrite: bool) -> None:
    folder = target.absolute().parent
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}; make it first.")
    if target.exists() and not overwrite:
        raise InputError(f"{target} is there already; choose another name, or overwrite=True.")
    probe = folder / f".{target.name}.{os.getpid()}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(f"cannot write in {folder}: {error.strerror}. Choose another folder.") from None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Axis):
        return _plain(vars(value))
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _message(head: dict[str, Any], payload: bytes) -> bytes:
    body = msgpack.packb(head)
    return _LENGTHS.pack(len(body), len(payload)) + body + payload


def _feed(
    batches: Iterable[Batch],
    calibrations: Mapping[str, Mapping[str, Any]],
    positions: Mapping[str, NDArray[np.float64]],
) -> Iterator[bytes]:
    """What the child reads: what is known of the streams, then the batches, then an end mark."""
    for stream, calibration in calibrations.items():
        yield _message({"kind": "calibration", "stream": stream, "calibration": _plain(calibration)}, b"")
    for stream, places in positions.items():
        table = np.ascontiguousarray(places, "<f8")
        if table.ndim != 2 or table.shape[1] != 2:
            raise InputError(f"positions of stream {stream!r} are (n, 2); got shape {table.shape}.")
        yield _message({"kind": "positions", "stream": stream}, table.tobytes())
    for batch in batches:
        if not _NAME.fullmatch(batch.stream):
            raise InputError(f"a stream's name is letters, digits, '_', '-' and '.'; got {batch.stream!r}.")
        head = {
            "kind": "frames",
            "stream": batch.stream,
            "first": int(batch.first),
            "dtype": batch.frames.dtype.str,
            "shape": list(batch.frames.shape),
            "meta": _plain(batch.meta),
            "crc32c": [_crc32c(frame) for frame in batch.frames],
        }
        yield _message(head, batch.frames.tobytes())
    yield _message({"kind": "end"}, b"")


def _crc32c(frame: NDArray[Any]) -> int:
    return int(google_crc32c.value(frame.tobytes()))


# ------------------------------------------------------------------------------------------------- in the child


def write(path: str, run: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Write the sealed file ``path`` from the messages on standard input, read it back, and flush it to the disk."""
    with h5py.File(path, "w", libver=("v108", "v110"), rdcc_nbytes=_CACHE_BYTES) as file:
        _Writer(file, run).take(sys.stdin.buffer)
    found = check(path)
    with open(path, "rb") as written:
        os.fsync(written.fileno())
    return found


def _messages(source: BinaryIO) -> Iterator[tuple[dict[str, Any], bytes]]:
    while True:
        lengths = source.read(_LENGTHS.size)
        if len(lengths) < _LENGTHS.size:
            raise InputError("the frames ended too early; nothing was sealed.")
        head_length, length = _LENGTHS.unpack(lengths)
        head = msgpack.unpackb(source.read(head_length))
        if head["kind"] == "end":
            return
        yield head, source.read(length)


class _Writer:
    """Lays out the file. ``books`` has for each dataset what is kept about its frames."""

    def __init__(self, file: h5py.File, run: dict[str, Any]) -> None:
        self.file = file
        self.calibrations: dict[str, dict[str, Any]] = {}
        self.positions: dict[str, NDArray[np.float64]] = {}
        self.books: dict[tuple[str, str, tuple[int, ...]], dict[str, Any]] = {}
        self.seen: dict[str, set[int]] = {}
        file.attrs.update(NX_class="NXroot", default="entry", creator="stemloop")
        file.attrs.update(emd_group_type="file", version_major=1, version_minor=0)
        file.attrs.update(authoring_program="stemloop", authoring_user="", UUID=str(run.get("id", "")))
        file.attrs[_MARK] = VERSION
        entry = file.create_group("entry")
        entry.attrs.update(NX_class="NXentry", emd_group_type="root", python_class="Root")
        entry["definition"] = "NXem"
        entry["title"] = str(run.get("title", ""))
        entry["start_time"] = str(run.get("start_time") or time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()))
        entry["run"] = json.dumps(run, sort_keys=True)
        sample = run.get("sample")
        if isinstance(sample, dict):
            group = entry.create_group("sampleID")
            group.attrs["NX_class"] = "NXsample"
            for key in ("is_simulation", "preparation_date", "atom_types", "name"):
                if isinstance(sample.get(key), (str, bool)):
                    group[key] = sample[key]
        entry.create_group("frames").attrs["NX_class"] = "NXcollection"
        file.create_group("ncem")

    def take(self, source: BinaryIO) -> None:
        for head, payload in _messages(source):
            if head["kind"] == "calibration":
                self.calibrations[head["stream"]] = head["calibration"]
            elif head["kind"] == "positions":
                self.positions[head["stream"]] = np.frombuffer(payload, "<f8").reshape(-1, 2)
            else:
                frames = np.frombuffer(payload, head["dtype"]).reshape(head["shape"])
                self._add(head, frames)
        if not self.books:
            raise InputError("there are no frames to seal.")
        for (stream, _, _), book in self.books.items():
            self._finish(stream, book)
        self.file["entry"].attrs["default"] = next(iter(self.books.values()))["name"]
        self.file.attrs[_DIGEST] = _digest(self.file)

    def _add(self, head: dict[str, Any], frames: NDArray[Any]) -> None:
        stream, first = head["stream"], head["first"]
        seen = self.seen.setdefault(stream, set())
        new = [k for k in range(len(frames)) if first + k not in seen]
        if not new:
            return
        seen.update(first + k for k in new)
        book = self._book(stream, frames)
        data, row = book["data"], len(book["sequence"])
        data.resize(row + len(new), 0)
        data[row:] = frames if len(new) == len(frames) else frames[new]
        book["sequence"] += [first + k for k in new]
        book["crc32c"] += [head["crc32c"][k] for k in new]
        if head["meta"]:
            book["meta"].append({"first": first, "n": len(frames), **head["meta"]})

    def _book(self, stream: str, frames: NDArray[Any]) -> dict[str, Any]:
        """A stream whose frames change shape or type (images of several sizes) becomes several datasets."""
        shape = frames.shape[1:]
        key = (stream, frames.dtype.str, shape)
        if key not in self.books:
            count = sum(1 for other, _, _ in self.books if other == stream)
            name = stream if not count else f"{count + 1}_{stream}"  # readers stack groups whose names begin alike
            if name in self.file["entry"]:
                raise InputError(f"a stream cannot be called {name!r}; that name is taken in the file.")
            group = self.file["entry"].create_group(name)
            side = max(1, _CHUNK_BYTES // max(1, frames.dtype.itemsize * math.prod(shape)))
            data = group.create_dataset(
                "data",
                (0, *shape),
                frames.dtype,
                maxshape=(None, *shape),
                chunks=(side, *shape),
                shuffle=True,
                compression="gzip",
                compression_opts=1,
            )
            self.books[key] = {"name": name, "data": data, "sequence": [], "crc32c": [], "meta": []}
        return self.books[key]

    def _finish(self, stream: str, book: dict[str, Any]) -> None:
        name, data = book["name"], book["data"]
        calibration = self.calibrations.get(stream, {})
        axes = frame_axes(calibration, data.shape[1:])
        self._dialects(name, data, [Axis("frame", len(data), 1.0, 0.0, ""), *axes])
        shelf = self.file["entry/frames"].create_group(name)
        sequence = np.array(book["sequence"], np.int64)
        shelf["sequence"] = sequence
        shelf["crc32c"] = np.array(book["crc32c"], np.uint32)
        shelf["position"] = self._places(stream, sequence)
        shelf["position"].attrs["units"] = "m"
        shelf["meta"] = json.dumps(book["meta"])
        shelf.attrs["NX_class"] = "NXcollection"
        shelf.attrs["stream"] = stream
        shelf.attrs["missing"] = _missing(self.seen[stream])
        shelf.attrs["calibration"] = json.dumps(calibration, sort_keys=True)
        shelf.attrs["axes"] = json.dumps([vars(axis) for axis in axes])

    def _places(self, stream: str, sequence: NDArray[np.int64]) -> NDArray[np.float64]:
        table = self.positions.get(stream, np.empty((0, 2)))
        places = np.full((len(sequence), 2), np.nan)
        known = sequence < len(table)
        places[known] = table[sequence[known]]
        return places

    def _dialects(self, name: str, data: h5py.Dataset, axes: list[Axis]) -> None:
        group = data.parent
        group.attrs.update(NX_class="NXdata", signal="data", emd_group_type="array", python_class="Array", title=name)
        group.attrs["axes"] = [axis.name for axis in axes]
        data.attrs.update(units="counts", long_name=name)
        ncem = self.file["ncem"].create_group(name)
        ncem.attrs["emd_group_type"] = 1
        ncem["data"] = data
        for i, axis in enumerate(axes):
            unit = "" if axis.unit == "px" else axis.unit
            values = group.create_dataset(axis.name, data=axis.values)
            values.attrs.update(units=unit, name=axis.name, long_name=axis.name)
            values.make_scale(axis.name)
            data.dims[i].attach_scale(values)
            group.attrs[f"{axis.name}_indices"] = i
            ncem[f"dim{i + 1}"] = values
            ends = group.create_dataset(f"dim{i}", data=axis.offset + axis.scale * np.arange(2.0))
            ends.attrs.update(name=axis.name, units=unit)


def frame_axes(calibration: Mapping[str, Any], shape: tuple[int, ...]) -> list[Axis]:
    """The axes of one frame of ``shape`` as a stream's ``calibration`` tells them (see :func:`seal`)."""
    given = calibration.get("axes")
    if given is not None:
        if len(given) != len(shape):
            raise InputError(f"the calibration has {len(given)} axes; a frame of shape {shape} has {len(shape)}.")
        made = []
        for entry, size in zip(given, shape, strict=True):
            fields = {**(vars(entry) if isinstance(entry, Axis) else entry), "size": size}
            made.append(Axis(**fields))
        return made
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


def _missing(numbers: set[int]) -> NDArray[np.int64]:
    """Ranges (first, stop) between 0 and the largest number that are not in ``numbers``."""
    there = np.array(sorted(numbers), np.int64)
    before = np.concatenate([[-1], there[:-1]])
    holes = there - before > 1
    return np.stack([before[holes] + 1, there[holes]], axis=1)


# ------------------------------------------------------------------------------------------------------ checking


def _open(path: str | os.PathLike[str]) -> h5py.File:
    name = os.path.basename(os.fspath(path))
    if not os.path.isfile(path):
        raise UnreadableFile(f"there is no file {path}.")
    if not is_sealed(path):
        raise UnreadableFile(f"{name} is no sealed file, or its beginning is damaged.")
    guard.check(os.fspath(path))
    return h5py.File(path, "r", locking=False)


def check(path: str, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """:func:`verify` in this very process."""
    try:
        with _open(path) as file:
            return _check(file, path)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is damaged: {' '.join(str(error).split())[:160]}.") from None


def _check(file: h5py.File, path: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name in file["entry/frames"]:
        data, book = file["entry"][name]["data"], file["entry/frames"][name]
        wanted, sequence = book["crc32c"][:], book["sequence"][:]
        if not len(data) == len(wanted) == len(sequence):
            raise IntegrityError(f"{path}: {name} has {len(data)} frames and {len(wanted)} checksums.")
        step = data.chunks[0]
        for row in range(0, len(data), step):
            numbers = f"{name}, frames {sequence[row]} to {sequence[min(row + step, len(data)) - 1]}"
            try:
                frames = data[row : row + step]
            except OSError as error:
                raise IntegrityError(f"{path}: {numbers} cannot be unpacked ({error}).") from None
            for k, frame in enumerate(frames, row):
                if _crc32c(frame) != wanted[k]:
                    raise IntegrityError(f"{path}: {name}, frame {sequence[k]} is not what was recorded.")
        missing = [tuple(span) for span in book.attrs["missing"].tolist()]
        found[name] = {"frames": len(data), "missing": missing, "dtype": data.dtype.str, "shape": list(data.shape[1:])}
    if file.attrs.get(_DIGEST) != _digest(file):
        raise IntegrityError(f"{path}: positions, axes or metadata are not what was written.")
    return found


def _digest(file: h5py.File) -> str:
    """SHA-256 of everything but the frames (which have their own checksums) and this digest itself."""
    digest = hashlib.sha256()

    def note(*words: Any) -> None:
        for word in words:
            raw = word if isinstance(word, bytes) else str(word).encode()
            digest.update(struct.pack("<Q", len(raw)) + raw)

    def attributes(item: Any) -> None:
        for key in sorted(item.attrs):
            if key in (_DIGEST, "REFERENCE_LIST", "DIMENSION_LIST"):  # references to places in the file
                continue
            value = np.asarray(item.attrs[key])
            note(key, value.dtype, value.shape, value.tolist())

    def visit(name: str, item: Any) -> None:
        note(name)
        attributes(item)
        if isinstance(item, h5py.Dataset):
            note(item.dtype, item.shape)
            if item.chunks is None:
                value = item[()]
                note(value.tobytes() if isinstance(value, (np.ndarray, np.generic)) else value)

    attributes(file)

    def walk(group: Any, prefix: str) -> None:
        for key in sorted(group):
            visit(prefix + key, group[key])
            if isinstance(group[key], h5py.Group):
                walk(group[key], f"{prefix}{key}/")

    walk(file, "/")
    return digest.hexdigest()
