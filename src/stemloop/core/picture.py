"""A small picture of an array, for a notebook: PNG and SVG out of numpy alone."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIZE_PX = 256


def _shrunk(image: NDArray[Any]) -> NDArray[np.float64]:
    """``image`` by means over whole blocks to at most 256 pixels a side, or grown by repeating to at least 64."""
    image = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    block = -(-max(image.shape) // _SIZE_PX)
    rows, columns = (max(1, size // block) for size in image.shape)
    cut = image[: rows * block, : columns * block]
    if block > 1 and min(image.shape) >= block:
        cut = cut.reshape(rows, block, columns, block).mean(axis=(1, 3))
    grow = max(1, 64 // max(cut.shape))
    return np.repeat(np.repeat(cut, grow, axis=0), grow, axis=1)


def png(image: NDArray[Any]) -> bytes:
    """A grey PNG of an image (y, x), black at its 0.5th and white at its 99.5th percentile.

    >>> png(np.eye(3))[:8]
    b'\\x89PNG\\r\\n\\x1a\\n'
    """
    small = _shrunk(image)
    low, high = np.percentile(small, [0.5, 99.5])
    grey = np.clip((small - low) / (high - low or 1.0) * 255, 0, 255).astype(np.uint8)
    lines = b"".join(b"\0" + row.tobytes() for row in grey)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def picture(data: NDArray[Any]) -> str:
    """HTML of an array: a curve of one axis, an image of two, of more the mean over the first ones."""
    data = np.asarray(data)
    if not data.size or not np.issubdtype(data.dtype, np.number) or np.iscomplexobj(data):
        return ""
    if data.ndim > 2:
        data = data.reshape(-1, *data.shape[-2:]).mean(axis=0)
    if data.ndim == 2:
        return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png(data)).decode()}">'
    values = _shrunk(np.atleast_1d(data)[None])[0]
    low, high = float(values.min()), float(values.max())
    y = 98 - 96 * (values - low) / (high - low or 1.0)
    points = " ".join(f"{256 * i / max(1, len(y) - 1):.1f},{v:.1f}" for i, v in enumerate(y))
    line = f'<polyline points="{points}" fill="none" stroke="currentColor"/>'
    return f'<svg width="256" height="100" viewBox="0 0 256 100">{line}</svg>'
