"""A batch of frames as bytes: a small header and one raw buffer.

The header is msgpack, led by a magic word and the CRC32C of everything after it; it carries the CRC32C of the raw
buffer. So each changed byte of either part is found. The same two parts travel (:func:`encode`, :func:`decode`) and
rest in the landing log.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import google_crc32c
import msgpack
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.protocols import Batch

VERSION = 1
MAGIC = b"SLP1"
_LEAD = struct.Struct("<4sI")
_FIELDS = {"version", "run", "stream", "first", "dtype", "shape", "meta", "crc32c"}


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


def encode(batch: Batch, run: str) -> tuple[bytes, bytes]:
    """``(header, payload)`` of ``batch``, which belongs to ``run``.

    ``batch.frames`` is (n, ...) of booleans, whole, real or complex numbers, with at least one frame and one number.
    """
    frames = batch.frames
    if frames.ndim < 1 or frames.size < 1 or frames.dtype.kind not in "biufc":
        raise InputError(f"a batch holds at least one frame of numbers; got {frames.dtype} of shape {frames.shape}.")
    if batch.first < 0:
        raise InputError(f"sequence numbers start at 0; stream {batch.stream!r} begins with {batch.first}.")
    payload = frames.tobytes()
    fields = {
        "version": VERSION,
        "run": run,
        "stream": batch.stream,
        "first": int(batch.first),
        "dtype": frames.dtype.str,
        "shape": list(frames.shape),
        "meta": batch.meta,
        "crc32c": crc32c(payload),
    }
    body: bytes = msgpack.packb(fields, default=_plain)
    return _LEAD.pack(MAGIC, crc32c(body)) + body, payload


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
    if not isinstance(fields, dict) or set(fields) != _FIELDS or fields["version"] != VERSION:
        raise InputError(f"the header of a packet is not of version {VERSION}.")
    words = (fields["run"], fields["stream"], fields["dtype"])
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


def frames(fields: dict[str, Any], payload: bytes) -> NDArray[Any]:
    """The frames that ``payload`` holds according to a checked header; a wrong size or CRC is an InputError."""
    dtype, shape = _dtype(fields["dtype"]), tuple(fields["shape"])
    if len(payload) == 0 or math.prod(shape) * dtype.itemsize != len(payload):
        raise InputError(f"a packet of {len(payload)} bytes cannot hold {dtype} of shape {shape}.")
    if crc32c(payload) != fields["crc32c"]:
        raise InputError("the frames of a packet were damaged on their way (CRC32C differs).")
    return np.frombuffer(payload, dtype).reshape(shape)


def decode(lead: bytes, payload: bytes) -> tuple[str, Batch]:
    """``(run, batch)`` of an encoded batch; anything malformed or damaged is an :class:`InputError`.

    The frames are a read-only view of ``payload``.
    """
    fields = header(lead)
    return fields["run"], Batch(fields["stream"], fields["first"], frames(fields, payload), fields["meta"])
