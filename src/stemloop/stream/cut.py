"""Encoded blocks as frames, frames as encoded blocks, and parts of either."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.protocols import Batch, Block, Encoded
from stemloop.stream import codec, packet
from stemloop.stream.dense import DenseBlock


def encoded(
    block: Block, stream: str, first: int, name: str, meta: dict[str, Any] | None = None, *, dtype: str = "<u2"
) -> Encoded:
    """``block``, whose first frame is number ``first`` of ``stream``, written with the codec ``name``; ``dtype`` is
    what its frames become when they are unpacked."""
    return Encoded(stream, first, block.frames, block.shape, dtype, name, codec.encode(block, name), meta or {})


def block_of(packed: Encoded) -> Block:
    """The block in ``packed``: plain frames (rows, columns) of counts, or what any codec wrote."""
    if packed.codec != packet.RAW:
        block = codec.decode(packed.payload)
        if block.frames != packed.n or tuple(block.shape) != tuple(packed.shape):
            raise InputError(f"a packet of {packed.stream!r} holds other frames than its header says.")
        return block
    frames = packet.unpacked(packed).frames
    if frames.ndim != 3:
        raise InputError(f"stream {packed.stream!r} has frames of shape {packed.shape}; a block has (rows, columns).")
    return DenseBlock(frames)


def frames_of(packed: Encoded) -> NDArray[Any]:
    """(n, ...) the frames in ``packed``, plain or written by any codec: a decoder for a landing log."""
    if packed.codec == packet.RAW:
        return packet.unpacked(packed).frames
    frames = block_of(packed).dense()
    if frames.dtype != packed.dtype and frames.max(initial=0) > np.iinfo(packed.dtype).max:
        raise InputError(f"counts up to {frames.max()} of stream {packed.stream!r} do not fit into {packed.dtype}.")
    return frames.astype(packed.dtype, copy=False)


def part(packed: Encoded, first: int, stop: int) -> Encoded:
    """The frames numbered ``first .. stop`` of ``packed``; itself if these are all."""
    if (first, stop) == (packed.first, packed.first + packed.n):
        return packed
    if packed.codec == packet.RAW:
        frames = packet.unpacked(packed).frames[first - packed.first : stop - packed.first]
        return packet.raw(Batch(packed.stream, first, np.ascontiguousarray(frames), packed.meta))
    block = block_of(packed)
    frames = np.stack([block.frame(number - packed.first) for number in range(first, stop)])
    name = packed.codec if packed.codec in codec.CODECS else "bitshuffle-zstd"
    return Encoded(
        packed.stream,
        first,
        stop - first,
        packed.shape,
        packed.dtype,
        name,
        codec.encode(DenseBlock(frames), name),
        packed.meta,
    )
