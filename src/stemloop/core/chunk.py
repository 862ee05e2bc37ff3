"""Frames as one deflated chunk, byte for byte what HDF5's own filters ``shuffle`` and ``deflate`` make of them.

So a block that was compressed once, at the edge, is later copied into an HDF5 file as it is, and every HDF5 library
unpacks it without a plugin. Shuffling puts the first bytes of all numbers together, then the second ones; ISA-L's
deflate [1]_ makes the same kind of stream as zlib (RFC 1950), several times faster.

.. [1] Intel Intelligent Storage Acceleration Library, https://github.com/intel/isa-l
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

#: The codec's name in an :class:`~stemloop.core.protocols.Encoded` block.
SHUFFLE_DEFLATE = "hdf5-deflate"


def deflate(frames: NDArray[Any], rows: int | None = None) -> bytes:
    """``frames`` (n, ...) shuffled and deflated; with zeros at its end up to ``rows`` frames, if given.

    >>> counts = np.arange(12, dtype=np.uint16).reshape(3, 2, 2)
    >>> inflate(deflate(counts, 4), np.dtype("<u2"), (4, 2, 2))[2].tolist()
    [[8, 9], [10, 11]]
    """
    width = frames.dtype.itemsize
    words = np.ascontiguousarray(frames).reshape(-1).view(_words(width))
    size = words.shape[0] if rows is None else rows * math.prod(frames.shape[1:])
    shuffled = np.empty((width, size), np.uint8)
    shuffled[:, len(words) :] = 0
    for k in range(width):
        shuffled[k, : len(words)] = words[:, k] if words.ndim == 2 else words >> (8 * k)
    return bytes(isal_zlib.compress(shuffled, 1))


def _words(width: int) -> np.dtype[Any]:
    """Numbers of ``width`` bytes whose bytes are got by shifting, which is much faster than by striding; bytes where
    there are no such numbers."""
    return np.dtype(f"<u{width}") if width in (1, 2, 4, 8) else np.dtype((np.uint8, width))


def inflate(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The frames of ``shape`` and ``dtype`` in ``data``; ValueError if it holds anything else."""
    size = math.prod(shape) * dtype.itemsize
    unpacker = isal_zlib.decompressobj()
    try:
        raw = unpacker.decompress(data, size + 1)
    except Exception as error:
        raise ValueError(f"it cannot be inflated: {error}") from None
    if len(raw) != size:
        raise ValueError(f"{size} bytes were expected and {len(raw)} came")
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
    width = dtype.itemsize
    if width not in (1, 2, 4, 8):
        return np.ascontiguousarray(planes.T).reshape(-1).view(dtype).reshape(shape)
    words = planes[0].astype(f"<u{width}")
    for k in range(1, width):
        words |= planes[k].astype(words.dtype) << words.dtype.type(8 * k)
    return words.view(dtype).reshape(shape)
