"""Sealed files: the frames of a run in one HDF5 file that many programs open.

One copy of the bytes in the dialects of :mod:`stemloop.store.dialects`, and each byte under a checksum by
:mod:`stemloop.store.chart`. The profile ``portable`` uses filters that every HDF5 library has (shuffle, deflate);
``working`` keeps blocks as they were landed, whatever their codec, so that nothing is packed twice.

A row of a stream's ``data`` is a frame that was recorded; ``/entry/frames/<stream>`` says which: ``sequence`` (its
number), ``position`` ((y, x) [m], NaN where none was given) and, as attributes, ``missing`` (ranges of numbers that
never came) and ``declared_lost``. If the calibration names a ``scan``, ``data`` is (rows, columns, ...) of the scan
instead, and the places of missing frames are zeros. An empty frame and a missing one are never confused.

The file is written by a child process, because the HDF5 library takes its process with it when the disk is full. It
is written under another name, read back and compared, flushed, and only then renamed.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np
from numpy.typing import NDArray

from stemloop.core.durable import replacing
from stemloop.core.errors import InputError, IntegrityError, StorageError, UnreadableFile
from stemloop.core.protocols import Batch, Encoded
from stemloop.core.signal import Axis, Signal
from stemloop.core.spans import Span
from stemloop.store import sandbox, sealing
from stemloop.store.chart import Flaw, Set
from stemloop.store.sealed import Sealed
from stemloop.store.sealing import Known, frame_axes, summary

PROFILES = ("portable", "working")
_LENGTHS = struct.Struct("<IQ")
_RAW = "raw"

Decoder = Callable[[Encoded], NDArray[Any]]


def seal(
    blocks: Iterable[Batch | Encoded],
    path: str | os.PathLike[str],
    *,
    run: Mapping[str, Any],
    calibrations: Mapping[str, Mapping[str, Any]] | None = None,
    positions: Mapping[str, NDArray[np.float64]] | None = None,
    logs: Mapping[str, Mapping[str, Any]] | None = None,
    lost: Mapping[str, Sequence[Span]] | None = None,
    meta: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    profile: str = "portable",
    overwrite: bool = False,
    timeout_s: float = 3600.0,
) -> dict[str, Any]:
    """Copy frames into one open HDF5 file.

    Parameters
    ----------
    blocks : the frames, checked by whoever yields them (a landing log does), unpacked or not. Of repeated numbers the
        first is kept. Blocks of a codec that HDF5 does not know can only be sealed with the profile ``working``.
    path : the file to make. It appears only when it is whole.
    run : what is known of the run, JSON-able. ``start_time`` (ISO 8601), ``title``, ``sample`` (``is_simulation``,
        ``preparation_date``, ``atom_types``) go where NXem wants them; all of it is kept as JSON.
    calibrations : for each stream a dictionary. ``axes`` has one entry a dimension of a frame: an
        :class:`~stemloop.core.signal.Axis` or ``{"name", "scale", "offset", "unit"}``; or one of ``pixel_m`` (images,
        [m]), ``pixel_rad`` with ``centre_px`` (CBED), ``energy_loss`` (offset, scale, size) [eV] is enough. ``scan``
        (``{"shape": (rows, columns), "axes": two entries}``) says that frame k belongs to place k of a scan, row by
        row. Everything else in it is kept as JSON.
    positions : for each stream (n, 2) (y, x) [m]; row k belongs to the frame with sequence number k.
    logs : the state and sensors as time series: ``time`` (n,) [s] after ``start`` (ISO 8601), ``value`` (n,),
        ``unit``, ``description``; each becomes an NXlog.
    lost : for each stream the ranges of numbers that were declared lost.
    meta : what travelled with the blocks, by dataset, if it is not in the blocks any more.
    profile : ``portable`` or ``working``.
    overwrite : replace a file that is there.

    Returns
    -------
    ``path``, ``bytes``, and ``streams``: what :func:`verify` says.

    Errors: :class:`StorageError` (full, read-only, not writable), :class:`InputError`, :class:`IntegrityError` (what
    was read back differs; nothing appears under ``path``).
    """
    told = known(run, calibrations, positions, logs, lost, meta, profile)
    return seal_in_child("stemloop.store.files:write", {}, path, told, blocks, overwrite, timeout_s)


def known(
    run: Mapping[str, Any],
    calibrations: Mapping[str, Mapping[str, Any]] | None = None,
    positions: Mapping[str, NDArray[np.float64]] | None = None,
    logs: Mapping[str, Mapping[str, Any]] | None = None,
    lost: Mapping[str, Sequence[Span]] | None = None,
    meta: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    profile: str = "portable",
) -> Known:
    """What :func:`seal` is told besides the frames, as plain numbers and words."""
    return Known(
        run=_plain(run),
        calibrations=_plain(calibrations or {}),
        positions={stream: _table(stream, places) for stream, places in (positions or {}).items()},
        logs=_plain(logs or {}),
        lost=_plain(lost or {}),
        meta=_plain(meta or {}),
        profile=profile,
    )


def seal_in_child(
    function: str,
    arguments: dict[str, Any],
    path: str | os.PathLike[str],
    told: Known,
    blocks: Iterable[Batch | Encoded] = (),
    overwrite: bool = False,
    timeout_s: float = 3600.0,
) -> dict[str, Any]:
    """Seal with ``function`` (``module:name``), called in a child process as :func:`write` is; see :func:`seal`."""
    target = Path(path)
    writable(target, overwrite, told.profile)
    try:
        with replacing(target) as part, sandbox.scratch() as folder:
            streams = sandbox.call(
                function,
                {"path": str(part.absolute()), **arguments},
                folder,
                timeout_s=timeout_s,
                memory_MB=4096,
                feed=_feed(told, blocks),
                grow=True,
            )
    except sandbox.ChildDied as death:
        if death.why.startswith(("ValueError", "TypeError", "KeyError")):
            raise InputError(f"{target} was not sealed: {death.why}.") from None
        free = shutil.disk_usage(target.absolute().parent).free
        raise StorageError(
            f"cannot write {target}: {death.why[:160]}. {free / 1e6:.0f} MB are free there; "
            "the landing log is untouched: make room and seal again."
        ) from None
    return {"path": str(target), "bytes": target.stat().st_size, "streams": streams}


def verify(path: str | os.PathLike[str], *, timeout_s: float = 3600.0) -> dict[str, dict[str, Any]]:
    """Compare every byte of a sealed file with its checksum.

    Returns for each dataset ``frames``, ``missing`` (ranges (first, stop)), ``dtype``, ``shape`` and ``codec``.
    Anything that is not as it was written is an :class:`IntegrityError` that names the place; a file that is not a
    sealed one an :class:`UnreadableFile`. A child process does the reading, since a file may be hostile.
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


def check(path: str, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """:func:`verify` in this very process."""
    with Sealed(path) as file:
        flaws = file.flaws()
        if flaws:
            more = f" (and {len(flaws) - 1} more places)" if len(flaws) > 1 else ""
            raise IntegrityError(f"{path}: {flaws[0]}{more}. Save what is good with: stemloop file repair")
        return {entry.name: summary(entry) for entry in file.chart.sets}


def flaws(path: str | os.PathLike[str]) -> list[Flaw]:
    """Every damaged place of a sealed file."""
    with Sealed(path) as file:
        return file.flaws()


def is_sealed(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a file that :func:`seal` made."""
    try:
        Sealed(path).close()
    except UnreadableFile:
        return False
    except IntegrityError:
        return True
    return True


def repair(path: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, Any]:
    """Copy all frames of a damaged sealed file that fit their checksums into a new one; the others are declared lost.

    Returns what :func:`seal` returns, and ``lost``: for each dataset the ranges of numbers that were given up. The
    damaged file stays as it is.
    """
    given_up: dict[str, list[Span]] = {}
    with Sealed(path) as file:
        known = Known.from_story(file.chart.story)
        lost = {stream: [tuple(span) for span in spans] for stream, spans in known.lost.items()}
        for flaw in file.flaws():
            if flaw.frames is not None:
                name, row, stop = flaw.frames
                gone = file.numbers(name, row, stop)
                given_up.setdefault(name, []).extend(gone)
                lost.setdefault(file.set(name).stream, []).extend(gone)
        if all(len(entry.stored) == _size(given_up.get(entry.name, [])) for entry in file.chart.sets):
            raise IntegrityError(f"{path}: no frame of it is left that fits its checksum.")
        known = replace(known, lost=_plain(lost), run={**known.run, "repaired_from": os.path.basename(os.fspath(path))})
        made = seal_in_child("stemloop.store.files:write", {}, out, known, _salvaged(file), overwrite)
    return {**made, "lost": given_up}


def _size(spans: list[Span]) -> int:
    return sum(stop - first for first, stop in spans)


def _salvaged(file: Sealed) -> Iterator[Batch | Encoded]:
    for entry in file.chart.sets:
        yield from file.salvage(entry.name)


def read_sealed(path: str | os.PathLike[str], *, checked: bool = True, decode: Decoder | None = None) -> list[Signal]:
    """The streams of a sealed file, (frame, ...) each, sorted by sequence number; (rows, columns, ...) of a scan that
    is complete.

    ``metadata`` has ``stream``, ``sequence`` (n,), ``missing``, ``position_m`` (n, 2), ``calibration``, ``run`` and
    ``meta`` (what travelled with the batches). ``checked`` compares everything with its checksums first; the frames
    themselves are always compared.
    """
    if checked:
        check(os.fspath(path))
    with Sealed(path, decode) as file:
        known = Known.from_story(file.chart.story)
        return [_signal(file, entry, known) for entry in file.chart.sets]


def _signal(file: Sealed, entry: Set, known: Known) -> Signal:
    parts = list(file.batches(entry.name))
    data = np.concatenate([batch.frames for batch in parts])
    sequence = np.concatenate([np.arange(b.first, b.first + len(b.frames)) for b in parts])
    calibration = known.calibrations.get(entry.stream, {})
    lead = sealing.lead_axes(calibration, entry.scan if entry.scan and not entry.missing else (len(data),))
    axes = (*lead, *frame_axes(calibration, entry.shape))
    metadata = {
        **told(entry, known),
        "sequence": sequence,
        "position_m": sealing.places(known.positions.get(entry.stream), sequence),
    }
    return Signal(data.reshape([axis.size for axis in lead] + list(entry.shape)), axes, metadata)


def told(entry: Set, known: Known) -> dict[str, Any]:
    """What is known of a dataset of a sealed file, besides its frames."""
    return {
        "title": entry.name,
        "reader": "stemloop",
        "stream": entry.stream,
        "missing": [list(span) for span in entry.missing],
        "calibration": known.calibrations.get(entry.stream, {}),
        "meta": known.meta.get(entry.name, []),
        "run": known.run,
    }


# ------------------------------------------------------------------------------------------------ in the parent


def writable(target: Path, overwrite: bool, profile: str = "portable") -> None:
    """Whether ``target`` can be made: an error that says why, if not."""
    if profile not in PROFILES:
        raise InputError(f"{profile!r} is no profile of a sealed file; choose one of {', '.join(PROFILES)}.")
    folder = target.absolute().parent
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}; make it first.")
    if target.exists() and not overwrite:
        raise InputError(f"{target} is there already; choose another name, or overwrite it (--overwrite).")
    probe = folder / f".{target.name}.{os.getpid()}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(f"cannot write in {folder}: {error.strerror}. Choose another folder.") from None


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


def _table(stream: str, places: Any) -> NDArray[np.float64]:
    table = np.ascontiguousarray(places, "<f8")
    if table.ndim != 2 or table.shape[1] != 2:
        raise InputError(f"positions of stream {stream!r} are (n, 2); got shape {table.shape}.")
    return table


def _message(head: dict[str, Any], payload: bytes = b"") -> bytes:
    body = msgpack.packb(head)
    return _LENGTHS.pack(len(body), len(payload)) + body + payload


def _feed(known: Known, blocks: Iterable[Batch | Encoded]) -> Iterator[bytes]:
    """What the child reads: what is known, then the blocks, then an end mark."""
    yield _message({**vars(known), "positions": {}})
    for stream, table in known.positions.items():
        yield _message({"stream": stream}, table.tobytes())
    yield _message({})
    for block in blocks:
        entry = _raw(block) if isinstance(block, Batch) else block
        head = {**vars(entry), "first": int(entry.first), "shape": list(entry.shape), "meta": _plain(entry.meta)}
        payload = head.pop("payload")
        yield _message(head, payload)
    yield _message({})


def _raw(batch: Batch) -> Encoded:
    frames = batch.frames
    first, n, shape = int(batch.first), len(frames), frames.shape[1:]
    return Encoded(batch.stream, first, n, shape, frames.dtype.str, _RAW, frames.tobytes(), batch.meta)


# ------------------------------------------------------------------------------------------------- in the child


def write(path: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the sealed file ``path`` from the messages on standard input, read it back, and flush it to the disk."""
    known = read_known(sys.stdin.buffer)
    with _Spool(sys.stdin.buffer, os.path.dirname(path)) as spool:
        return sealing.write(path, spool, known)


def read_known(source: BinaryIO) -> Known:
    """What :func:`seal_in_child` knows, from the messages that come first."""
    (head, _), *places = list(_messages(source))
    tables = {place["stream"]: np.frombuffer(raw, "<f8").reshape(-1, 2) for place, raw in places}
    return Known(**{**head, "positions": tables})


def _messages(source: BinaryIO) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Messages up to the next empty one."""
    while True:
        lengths = source.read(_LENGTHS.size)
        if len(lengths) < _LENGTHS.size:
            raise InputError("the frames ended too early; nothing was sealed.")
        head_length, length = _LENGTHS.unpack(lengths)
        head = msgpack.unpackb(source.read(head_length))
        if not head:
            return
        yield head, source.read(length)


class _Spool:
    """Blocks from a pipe, kept in a nameless file beside the one to be made, since they are looked at twice."""

    def __init__(self, source: BinaryIO, folder: str) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._heads: list[tuple[dict[str, Any], int]] = []
        for head, payload in _messages(source):
            self._file.write(payload)
            self._heads.append((head, len(payload)))
        self._file.flush()

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def heads(self) -> Iterator[tuple[Encoded, int]]:
        for head, size in self._heads:
            yield Encoded(**{**head, "shape": tuple(head["shape"])}, payload=b""), size

    def blocks(self) -> Iterator[Encoded]:
        offset = 0
        for block, size in self.heads():
            yield replace(block, payload=os.pread(self._file.fileno(), size, offset))
            offset += size
