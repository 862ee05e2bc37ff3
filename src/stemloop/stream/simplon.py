"""Frames of a DECTRIS detector: the SIMPLON stream over ZeroMQ, version 1 (JSON) and version 2 (CBOR).

Version 1: ``dheader-1.0`` (and the detector's configuration), one multipart message a frame (``dimage-1.0``,
``dimage_d-1.0`` with shape (columns, rows), type and encoding, the pixels, times), ``dseries_end-1.0``. Version 2: maps
of type ``start``, ``image`` and ``end``; pixels are a tagged array (RFC 8746), within it DECTRIS's tag 56500 with the
compression. Which one it is shows in each message. Encodings: none, ``lz4``, ``bslz4``.
"""

# pyzmq collects its names with star imports, which mypy does not follow here
# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import zmq
from numpy.typing import NDArray

from stemloop.core.errors import InputError, InstrumentError
from stemloop.core.protocols import Batch
from stemloop.stream import bslz4, cbor

_TYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}
_TYPED_ARRAYS = {64: "<u1", 69: "<u2", 70: "<u4"}
_MOST_PIXELS = 1 << 28


class Frame(NamedTuple):
    """One frame (rows, columns) and its number."""

    number: int
    pixels: NDArray[Any]


class _Packed(NamedTuple):
    algorithm: str
    width: int
    data: bytes


def unpack(data: bytes, encoding: str, dtype: str, shape: tuple[int, int]) -> NDArray[Any]:
    """Pixels (rows, columns) from ``data`` in an encoding of version 1 such as ``bs16-lz4<``, ``lz4<`` or ``<``."""
    count = math.prod(shape)
    if not 0 < count <= _MOST_PIXELS:
        raise InputError(f"a detector has no frames of shape {shape}.")
    kind = np.dtype(dtype)
    if encoding == "<":
        if len(data) != count * kind.itemsize:
            raise InputError(f"a frame of {shape} {kind} has {len(data)} bytes.")
        return np.frombuffer(data, kind).reshape(shape)
    if encoding == "lz4<":
        return bslz4.lz4(data, count * kind.itemsize).view(kind).reshape(shape)
    if encoding == f"bs{8 * kind.itemsize}-lz4<":
        return bslz4.bslz4(data, count, kind).reshape(shape)
    raise InputError(f"frames of {kind} in the encoding {encoding!r} cannot be read; set bslz4, lz4 or none.")


def _tagged(number: int, value: Any) -> Any:
    """What a tag of version 2 stands for."""
    if number == 56500:
        algorithm, width, data = value
        return _Packed(str(algorithm), int(width), bytes(data))
    if number in _TYPED_ARRAYS:
        return number, value
    if number == 40:
        shape, array = value
        return (int(shape[0]), int(shape[1])), array
    return value


def _pixels(value: Any) -> NDArray[Any]:
    """Pixels of a tagged array of version 2."""
    try:
        shape, (number, data) = value
        dtype = _TYPED_ARRAYS[number]
    except (TypeError, ValueError, KeyError):
        raise InputError("a frame of the detector is no array of 8, 16 or 32 bits.") from None
    if isinstance(data, _Packed):
        if data.width != np.dtype(dtype).itemsize:
            raise InputError(f"a frame of {dtype} is packed as elements of {data.width} bytes.")
        encoding = {"bslz4": f"bs{8 * data.width}-lz4<", "lz4": "lz4<"}.get(data.algorithm, data.algorithm)
        return unpack(data.data, encoding, dtype, shape)
    return unpack(data, "<", dtype, shape)


class Simplon:
    """A DECTRIS stream: iterating gives :class:`~stemloop.core.protocols.Batch` of one series.

    Parameters
    ----------
    address : the detector's stream, such as ``tcp://10.42.41.10:9999`` (version 1) or ``:31001`` (version 2).
    stream : the stream's name.
    channel : which threshold (version 2 names them; None: the only one).
    per_block : most frames a batch. delay_s : how long [s] a batch waits to be full.
    timeout_s : silence [s] after which the detector is given up (InstrumentError).

    Attributes
    ----------
    header : what the detector says of the series, once it came. skipped : messages before it, which belong to none.

    The iteration ends with the detector's word that the series ended. Numbers that did not come are gaps, which
    :func:`~stemloop.stream.sources.forward` declares. A frame that cannot be read is an InputError.
    """

    def __init__(
        self,
        address: str,
        *,
        stream: str = "simplon",
        channel: str | None = None,
        per_block: int = 256,
        delay_s: float = 0.005,
        timeout_s: float = 30.0,
    ) -> None:
        self.header: dict[str, Any] = {}
        self.skipped = 0
        self._series: Any = None
        self._stream, self._channel, self._per_block = stream, channel, per_block
        self._delay_s, self._timeout_s = delay_s, timeout_s
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 4096)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise InputError(f"{address!r} is no address of a detector's stream: {error}.") from None

    def __enter__(self) -> Simplon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close(0)
        self._context.term()

    def __iter__(self) -> Iterator[Batch]:
        held: list[Frame] = []
        until = 0.0
        while True:
            wait = max(until - time.monotonic(), 0.0) if held else self._timeout_s
            if not self._socket.poll(int(1e3 * wait) + 1):
                if not held:
                    raise InstrumentError(f"the detector sent nothing for {self._timeout_s:g} s; was it triggered?")
                yield self._batch(held)
                held = []
                continue
            found = self._read(self._socket.recv_multipart())
            if isinstance(found, Frame):
                if held and (found.number != held[-1].number + 1 or found.pixels.dtype != held[-1].pixels.dtype):
                    yield self._batch(held)
                    held = []
                if not held:
                    until = time.monotonic() + self._delay_s
                held.append(found)
            if held and (found is False or len(held) == self._per_block):
                yield self._batch(held)
                held = []
            if found is False:
                return

    def _batch(self, frames: list[Frame]) -> Batch:
        return Batch(self._stream, frames[0].number, np.stack([frame.pixels for frame in frames]))

    def _read(self, parts: list[bytes]) -> Frame | bool | None:
        """A frame, False at the end of the series, None for what is neither."""
        try:
            return self._json(parts) if parts[0][:1] == b"{" else self._cbor(parts[0])
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"a message of the detector cannot be read: {type(error).__name__} {error}.") from None

    def _json(self, parts: list[bytes]) -> Frame | bool | None:
        words = json.loads(parts[0])
        kind = words.get("htype")
        if kind == "dheader-1.0":
            self._series = words["series"]
            self.header = words | (json.loads(parts[1]) if len(parts) > 1 else {})
        elif kind is None and self._series is not None:  # some send the configuration as a message of its own
            self.header |= words
        elif self._series is None or words.get("series") != self._series:
            self.skipped += 1
        elif kind == "dimage-1.0":
            how = json.loads(parts[1])
            columns, rows = (int(n) for n in how["shape"][:2])
            if how["type"] not in _TYPES:
                raise InputError(f"frames of {how['type']!r} cannot be read.")
            return Frame(int(words["frame"]), unpack(parts[2], how["encoding"], _TYPES[how["type"]], (rows, columns)))
        elif kind == "dseries_end-1.0":
            return False
        return None

    def _cbor(self, data: bytes) -> Frame | bool | None:
        words = cbor.loads(data, _tagged)
        kind = words["type"]
        if kind == "start":
            self._series = words["series_id"]
            self.header = words
        elif self._series is None or words.get("series_id") != self._series:
            self.skipped += 1
        elif kind == "image":
            channels = words["data"]
            if self._channel is None and len(channels) != 1:
                raise InputError(f"the detector sends {', '.join(channels)}; say which with channel=...")
            name = self._channel or next(iter(channels))
            return Frame(int(words["image_id"]), _pixels(channels[name]))
        elif kind == "end":
            return False
        return None
