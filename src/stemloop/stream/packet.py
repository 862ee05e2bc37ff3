"""A batch of frames as bytes: a small header and one raw buffer.

The header is msgpack, led by a magic word and the CRC32C of everything after it; it carries the CRC32C of the raw
buffer. So each changed byte of either part is found. The same two parts travel (:func:`encode`, :func:`decode`) and
rest in the landing log. The buffer is the frames themselves, or whatever the named codec made of them
(:class:`~stemloop.core.protocols.Encoded`), which is never unpacked on its way.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import google_crc32c
import msgpack
import numpy as np

from stemloop.core.errors import InputError
from stemloop.core.protocols import Batch, Encoded

VERSION = 2
RAW = "raw"
MAX_HEADER = 1 << 24
MAX_PAYLOAD = 2 << 30
MAGIC = b"SLP1"
_LEAD = struct.Struct("<4sI")
_FIELDS = {"version", "run", "stream", "first", "dtype", "shape", "meta", "crc32c"}
_BY_VERSION = {1: _FIELDS, 2: _FIELDS | {"codec"}}


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of ``data``; of ``b"123456789"`` it is 0xE3069283 (RFC 3720, B.4).

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    return int(google_crc32c.value(data))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise InputError(f"the meta of a batch takes plain numbers, strings, lists and dictionaries; got {type(value)!r}.")


def raw(batch: Batch) -> Encoded:
    """The frames of ``batch`` as raw bytes.

    ``batch.frames`` is (n, ...) of booleans, whole, real or complex numbers, with at least one frame and one number.
    """
    frames = batch.frames
    if frames.ndim < 1 or frames.size < 1 or frames.dtype.kind not in "biufc":
        raise InputError(f"a batch holds at least one frame of numbers; got {frames.dtype} of shape {frames.shape}.")
    return Encoded(
        batch.stream,
        int(batch.first),
        len(frames),
        tuple(frames.shape[1:]),
        frames.dtype.str,
        RAW,
        frames.tobytes(),
        batch.meta,
    )


def encode(batch: Batch | Encoded, run: str) -> tuple[bytes, bytes]:
    """``(header, payload)`` of ``batch``, which belongs to ``run``."""
    block = raw(batch) if isinstance(batch, Batch) else batch
    if block.first < 0:
        raise InputError(f"sequence numbers start at 0; stream {block.stream!r} begins with {block.first}.")
    if block.n < 1 or not 0 < len(block.payload) <= MAX_PAYLOAD:
        raise InputError(
            f"a packet holds at least one frame and 1 to {MAX_PAYLOAD} bytes; stream {block.stream!r} "
            f"gave {block.n} frames in {len(block.payload)} bytes. Send smaller batches."
        )
    fields = {
        "version": VERSION,
        "run": run,
        "stream": block.stream,
        "first": int(block.first),
        "dtype": block.dtype,
        "shape": [int(block.n), *(int(side) for side in block.shape)],
        "meta": block.meta,
        "codec": block.codec,
        "crc32c": crc32c(block.payload),
    }
    body: bytes = msgpack.packb(fields, default=_plain)
    if len(body) > MAX_HEADER:
        raise InputError(f"the meta of a batch of stream {block.stream!r} takes {len(body)} bytes; give less of it.")
    return _LEAD.pack(MAGIC, crc32c(body)) + body, block.payload


def header(lead: bytes) -> dict[str, Any]:
    """The fields of an encoded header, checked; anything else is an :class:`InputError`."""
    if len(lead) < _LEAD.size or not lead.startswith(MAGIC):
        raise InputError(f"a packet begins with {MAGIC!r}; got {lead[:4]!r}.")
    body = lead[_LEAD.size :]
    if _LEAD.unpack_from(lead)[1] != crc32c(body):
        raise InputError("the header of a packet was damaged on its way (CRC32C differs).")
    try:
        fields = msgpack.unpackb(body)
    except Exception as error:
        raise InputError(f"the header of a packet is not msgpack: {error}.") from None
    version = fields.get("version") if isinstance(fields, dict) else None
    if not isinstance(version, int) or set(fields) != _BY_VERSION.get(version):
        raise InputError(f"the header of a packet is not of version 1 to {VERSION}.")
    fields.setdefault("codec", RAW)
    words = (fields["run"], fields["stream"], fields["dtype"], fields["codec"])
    numbers = (fields["first"], fields["crc32c"], *(fields["shape"] if isinstance(fields["shape"], list) else [None]))
    if not all(isinstance(word, str) for word in words) or not isinstance(fields["meta"], dict):
        raise InputError("the header of a packet has a field of a wrong type.")
    if not fields["shape"] or not all(type(number) is int and number >= 0 for number in numbers):
        raise InputError("the header of a packet has a wrong number.")
    return fields


def _dtype(word: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(word)
    except Exception:
        raise InputError(f"a packet has the data type {word!r}, which is none.") from None
    if dtype.kind not in "biufc":
        raise InputError(f"a packet has the data type {word!r}; frames are numbers.")
    return dtype


def _checked(fields: dict[str, Any], payload: bytes) -> Encoded:
    """What a checked header and its payload stand for; a wrong size or CRC is an InputError."""
    dtype, (n, *shape) = _dtype(fields["dtype"]), fields["shape"]
    size = n * math.prod(shape) * dtype.itemsize
    if len(payload) == 0 or n < 1 or (fields["codec"] == RAW and size != len(payload)):
        raise InputError(f"a packet of {len(payload)} bytes cannot hold {dtype} of shape {(n, *shape)}.")
    if crc32c(payload) != fields["crc32c"]:
        raise InputError("the frames of a packet were damaged on their way (CRC32C differs).")
    return Encoded(
        fields["stream"], fields["first"], n, tuple(shape), fields["dtype"], fields["codec"], payload, fields["meta"]
    )


def unpacked(block: Encoded) -> Batch:
    """The frames of a raw block, as a read-only view of its payload. Another codec is an :class:`InputError`."""
    if block.codec != RAW:
        raise InputError(f"stream {block.stream!r} is written with the codec {block.codec!r}; give its decoder.")
    frames = np.frombuffer(block.payload, block.dtype).reshape(block.n, *block.shape)
    return Batch(block.stream, block.first, frames, block.meta)


def open_packet(lead: bytes, payload: bytes) -> tuple[str, Encoded]:
    """``(run, block)`` of an encoded batch, not unpacked; anything damaged is an :class:`InputError`."""
    fields = header(lead)
    return fields["run"], _checked(fields, payload)


def decode(lead: bytes, payload: bytes) -> tuple[str, Batch]:
    """``(run, batch)`` of an encoded batch of raw frames; anything malformed or damaged is an :class:`InputError`.

    The frames are a read-only view of ``payload``.
    """
    run, block = open_packet(lead, payload)
    return run, unpacked(block)
