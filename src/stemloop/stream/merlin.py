"""Frames of a Quantum Detectors Merlin: MIB messages over TCP, and MIB files.

The detector's computer sends ``MPX,`` + ten digits + ``,`` and then that many bytes less one: first the acquisition's
header (``HDR,``, lines of ``name:<tab>value``), then one message a frame: a header of comma-separated fields
(``MQ1,000001,00384,01,0256,0256,U16,...``: sequence number from 1, bytes of the header, chips, columns, rows, type)
and the pixels, big-endian. A MIB file holds the frames without the ``MPX`` prefix. Frames in the detector's raw order
(``R64``) are refused: have it send counts (U08, U16, U32).
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, InstrumentError, UnreadableFile
from stemloop.core.protocols import Batch

PORT = 6342
_PREFIX = 15  # of a message: MPX,0000000000,
_MOST_HEADER = 1 << 14
_TYPES = {"U08": ">u1", "U16": ">u2", "U32": ">u4"}


class Layout(NamedTuple):
    """How one frame lies in its message: ``header`` bytes, then (rows, columns) of ``dtype``."""

    header: int
    shape: tuple[int, int]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of a frame with its header."""
        return self.header + self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize


def layout(head: bytes) -> Layout:
    """The layout that the beginning of a frame's header tells; anything else is an InputError.

    >>> layout(b"MQ1,000001,00384,01,0256,0128,U16,   1x1,01,")
    Layout(header=384, shape=(128, 256), dtype='>u2')
    """
    words = head.split(b",")
    try:
        kind, _, header, _, columns, rows, dtype = words[:7]
        found = int(header), (int(rows), int(columns)), dtype.decode("ascii").strip()
    except ValueError:
        raise InputError(f"a frame of a Merlin begins with MQ1 and six numbers; got {head[:40]!r}.") from None
    if kind != b"MQ1" or not 32 <= found[0] <= _MOST_HEADER or not 1 <= min(found[1]) <= max(found[1]) <= 1 << 14:
        raise InputError(f"a frame of a Merlin begins with MQ1 and six numbers; got {head[:40]!r}.")
    if found[2] not in _TYPES:
        raise InputError(f"this Merlin sends pixels as {found[2]}; have it send counts ({', '.join(_TYPES)}).")
    return Layout(found[0], found[1], _TYPES[found[2]])


def acquisition(header: bytes) -> dict[str, str]:
    """The acquisition's header as words by name.

    >>> acquisition(b"HDR,\\nFrames in Acquisition (Number):\\t9\\r\\nEnd\\t")
    {'Frames in Acquisition (Number)': '9'}
    """
    pairs = (line.partition("\t") for line in header.decode("latin-1").splitlines())
    return {name.strip().rstrip(":"): value.strip() for name, _, value in pairs if value.strip()}


def _unpack(rows: NDArray[np.uint8], lay: Layout) -> tuple[NDArray[Any], list[int]]:
    """Frames and sequence numbers of ``rows`` (n, header and pixels)."""
    pixels = np.ascontiguousarray(rows[:, lay.header :]).view(lay.dtype).reshape(len(rows), *lay.shape)
    numbers = [int(bytes(row).split(b",")[1]) for row in rows[:, :24]]
    return pixels.astype(np.dtype(lay.dtype).newbyteorder("=")), numbers


def _batches(stream: str, frames: NDArray[Any], numbers: list[int]) -> Iterator[Batch]:
    """Batches of consecutive numbers: a detector that skipped begins a new one."""
    edges = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1), len(numbers)]
    for a, b in itertools.pairwise(edges):
        yield Batch(stream, numbers[a] - 1, frames[a:b])


class Merlin:
    """The data socket of a Merlin: iterating gives :class:`~stemloop.core.protocols.Batch` of one acquisition.

    Parameters
    ----------
    host, port : the detector's computer and its data port.
    stream : the stream's name.
    per_block : most frames a batch. delay_s : how long [s] a batch waits to be full.
    timeout_s : silence [s] after which the detector is given up (InstrumentError).

    Attributes
    ----------
    header : the acquisition's header, once it came (iterate to get it). skipped : bytes that were no message.

    The sequence number of a frame, less one, is its place in the stream: what the detector skipped is a gap, which
    :func:`~stemloop.stream.sources.forward` declares. The iteration ends with the last frame that the acquisition's
    header names, or where the detector closes the connection.
    """

    def __init__(
        self,
        host: str,
        port: int = PORT,
        *,
        stream: str = "merlin",
        per_block: int = 256,
        delay_s: float = 0.005,
        timeout_s: float = 30.0,
    ) -> None:
        self.header: dict[str, str] = {}
        self.skipped = 0
        self._stream, self._per_block, self._delay_s, self._timeout_s = stream, per_block, delay_s, timeout_s
        try:
            self._socket = socket.create_connection((host, port), timeout_s)
        except OSError as error:
            raise InstrumentError(f"no Merlin answers at {host}:{port}: {error}.") from None
        self._held = bytearray()

    def __enter__(self) -> Merlin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __iter__(self) -> Iterator[Batch]:
        left: int | None = None
        lay: Layout | None = None
        while left is None or left > 0:
            if not self._have(_PREFIX) or not self._align():
                return
            length = int(self._held[4:14]) - 1
            if lay is None or length != lay.size or not self._is_frame():
                if not self._have(_PREFIX + min(length, 64)):
                    return
                body = bytes(self._held[_PREFIX : _PREFIX + 64])
                if not body.startswith(b"HDR,"):
                    lay = self._layout(body, length)
                    continue
                if not self._have(_PREFIX + length):
                    return
                self.header = acquisition(bytes(self._held[_PREFIX : _PREFIX + length]))
                left = int(self.header.get("Frames in Acquisition (Number)", 0)) or None
                del self._held[: _PREFIX + length]
                continue
            frames, numbers = self._frames(lay, left)
            if not numbers:
                return
            left = None if left is None else left - len(numbers)
            yield from _batches(self._stream, frames, numbers)

    def _layout(self, body: bytes, length: int) -> Layout:
        lay = layout(body)
        if lay.size != length:
            raise InputError(f"a frame of a Merlin has {length} bytes and its header says {lay.size}.")
        return lay

    def _is_frame(self) -> bool:
        return self._have(_PREFIX + 4) and self._held[_PREFIX : _PREFIX + 4] == b"MQ1,"

    def _more(self) -> bool:
        """Receive something; False at the end of the connection."""
        try:
            got = self._socket.recv(1 << 20)
        except TimeoutError:
            raise InstrumentError(f"the Merlin sent nothing for {self._timeout_s:g} s; was it triggered?") from None
        except OSError as error:
            raise InstrumentError(f"the connection to the Merlin broke: {error}.") from None
        self._held += got
        return bool(got)

    def _have(self, length: int) -> bool:
        while len(self._held) < length:
            if not self._more():
                return False
        return True

    def _align(self) -> bool:
        """Have the next message begin at the beginning of what is held: anything before is skipped and counted."""
        while not (self._held.startswith(b"MPX,") and self._held[4:14].isdigit() and self._held[14:15] == b","):
            at = self._held.find(b"MPX,", 1)
            drop = at if at > 0 else max(len(self._held) - 3, 1)
            self.skipped += drop
            del self._held[:drop]
            if not self._have(_PREFIX):
                return False
        return True

    def _frames(self, lay: Layout, left: int | None) -> tuple[NDArray[Any], list[int]]:
        """Whole frames that lie one after the other: at most a block of them, at least one unless the end came."""
        size = _PREFIX + lay.size
        most = self._per_block if left is None else min(self._per_block, left)
        until = time.monotonic() + self._delay_s
        while len(self._held) < size or (len(self._held) < most * size and time.monotonic() < until):
            if not self._more():
                break
        count = min(len(self._held) // size, most)
        rows = np.frombuffer(bytes(self._held[: count * size]), np.uint8).reshape(count, size)
        begin = np.frombuffer(bytes(self._held[: _PREFIX + 4]), np.uint8)
        same = (rows[:, : _PREFIX + 4] == begin).all(axis=1)
        count = count if same.all() else int(np.argmin(same))
        del self._held[: count * size]
        return _unpack(rows[:count, _PREFIX:], lay)


def mib_frames(path: str | os.PathLike[str], stream: str = "merlin", per_block: int = 256) -> Iterator[Batch]:
    """The frames of a MIB file, in batches; an unfinished last frame is left out. Errors: UnreadableFile."""
    try:
        lay = layout(_head(path))
        data = np.memmap(path, np.uint8, "r")
    except (InputError, OSError, ValueError) as error:
        raise UnreadableFile(f"{path} is no MIB file: {error}") from None
    rows = data[: len(data) // lay.size * lay.size].reshape(-1, lay.size)
    for first in range(0, len(rows), per_block):
        try:
            yield from _batches(stream, *_unpack(rows[first : first + per_block], lay))
        except (ValueError, IndexError):
            raise UnreadableFile(f"{path}: a frame after number {first} has no header.") from None


def _head(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)
