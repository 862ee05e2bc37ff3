"""From a source of frames into the channel: detectors and files give batches, blocks go out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from stemloop.core.errors import InputError, UnreadableFile
from stemloop.core.protocols import Batch, Encoded
from stemloop.stream import cut, packet
from stemloop.stream.channel import Sender
from stemloop.stream.dense import DenseBlock
from stemloop.stream.landing import LandingLog
from stemloop.stream.merlin import mib_frames


def encode(batch: Batch, codec: str = "gaps") -> Encoded:
    """``batch`` written with ``codec`` (``raw``: as it is), which takes frames (rows, columns) of whole numbers."""
    if codec == packet.RAW:
        return packet.raw(batch)
    frames = np.ascontiguousarray(batch.frames)
    return cut.encoded(DenseBlock(frames), batch.stream, int(batch.first), codec, batch.meta, dtype=frames.dtype.str)


def forward(
    source: Iterable[Batch | Encoded], sender: Sender, *, codec: str = "gaps", first: int = 0, stop: int | None = None
) -> int:
    """Send all that ``source`` gives, plain frames written with ``codec``; returns how many frames were sent.

    Numbers of a stream that ``source`` passes over (from ``first`` on, and up to ``stop`` if that is given) are
    declared lost. Numbers that it goes back to are an InputError.
    """
    reached: dict[str, int] = {}
    sent = 0
    for batch in source:
        block = encode(batch, codec) if isinstance(batch, Batch) else batch
        expected = reached.get(block.stream, first)
        if block.first < expected:
            raise InputError(f"stream {block.stream!r} goes back from frame {expected} to {block.first}.")
        if block.first > expected:
            sender.declare_lost(block.stream, expected, block.first, "the source passed over these numbers")
        sent += block.n if sender.send(block) else 0
        reached[block.stream] = block.first + block.n
    for stream, number in reached.items():
        if stop is not None and number < stop:
            sender.declare_lost(stream, number, stop, "the source ended before these numbers")
    return sent


def playback(
    path: str | os.PathLike[str], *, stream: str = "frames", per_block: int = 256, rate: float | None = None
) -> Iterator[Batch | Encoded]:
    """The frames of a file as if they came from a detector, ``rate`` frames a second (None: as fast as they go).

    ``.npy`` (n, rows, columns), ``.mib``, and landing logs (``.flog``, whose blocks come as they are, with the names
    and numbers that they have). Nothing is held but the block that is being given. Errors: UnreadableFile.
    """
    begin, given = time.monotonic(), 0
    for batch in _file(Path(path), stream, per_block):
        given += batch.n if isinstance(batch, Encoded) else len(batch.frames)
        if rate is not None and (early := begin + given / rate - time.monotonic()) > 0:
            time.sleep(early)
        yield batch


def _file(path: Path, stream: str, per_block: int) -> Iterator[Batch | Encoded]:
    if path.suffix == ".mib":
        yield from mib_frames(path, stream, per_block)
    elif path.suffix == ".npy":
        try:
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UnreadableFile(f"{path} holds no frames: {error}.") from None
        if frames.ndim < 2 or frames.dtype.kind not in "biufc":
            raise UnreadableFile(f"{path} holds {frames.dtype} {frames.shape}; frames are numbers (n, rows, columns).")
        for first in range(0, len(frames), per_block):
            yield Batch(stream, first, np.array(frames[first : first + per_block]))
    elif path.suffix == ".flog":
        with LandingLog(path, readonly=True) as log:
            yield from log.blocks()
    else:
        raise UnreadableFile(f"{path} is none of .npy, .mib and .flog; convert it first (stemloop convert).")
