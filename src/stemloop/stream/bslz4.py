"""Unpacking what DECTRIS detectors send: LZ4 blocks, and bit-shuffled ones (``bslz4``).

LZ4's block format: sequences of a token, literals, and a copy from what came before (github.com/lz4/lz4, doc/
lz4_Block_format.md). ``bslz4``: the number of bytes (8, big-endian) and the bytes of a block (4), then for each block
its compressed length (4) and LZ4 of its bits transposed: all lowest bits of its elements first. What is left of eight
elements at the end stands there as it is.
"""

from __future__ import annotations

import struct
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError

_BLOCK = 8192


def lz4(data: bytes, size: int) -> NDArray[np.uint8]:
    """The ``size`` bytes in an LZ4 block. Errors: InputError if it is damaged."""
    out = np.empty(size, np.uint8)
    if _lz4(np.frombuffer(data, np.uint8), out) != size:
        raise InputError("a compressed frame of the detector is damaged.")
    return out


def bslz4(data: bytes, count: int, dtype: Any) -> NDArray[Any]:
    """The ``count`` numbers of ``dtype`` in bit-shuffled LZ4. Errors: InputError if they are not there."""
    kind = np.dtype(dtype)
    if len(data) < 12:
        raise InputError("a compressed frame of the detector is cut short.")
    size, block = struct.unpack_from(">QI", data)
    block = block or _BLOCK
    if size not in (0, count * kind.itemsize) or block % (8 * kind.itemsize):
        raise InputError(f"a compressed frame of the detector holds {size} bytes in blocks of {block}.")
    out = np.zeros(count * kind.itemsize, np.uint8)
    scratch = np.empty(min(block, len(out) + 8), np.uint8)
    if not _bslz4(np.frombuffer(data, np.uint8), out, scratch, block, kind.itemsize):
        raise InputError("a compressed frame of the detector is damaged.")
    return out.view(kind)


@numba.njit(cache=True, nogil=True)
def _length(data, i, nibble):  # type: ignore[no-untyped-def]
    """A length of LZ4 (15 in ``nibble`` says that more bytes follow) and where it ends; past the end if it does not."""
    length = np.int64(nibble)
    more = np.int64(255 if nibble == 15 else 0)
    while more == 255:
        if i >= len(data):
            return length, len(data) + 1
        more = np.int64(data[i])
        length += more
        i += 1
    return length, i


@numba.njit(cache=True, nogil=True)
def _lz4(data, out):  # type: ignore[no-untyped-def]
    """Bytes written, or -1."""
    i = 0
    o = 0
    while i < len(data):
        token = data[i]
        literals, i = _length(data, i + 1, token >> 4)
        if i + literals > len(data) or o + literals > len(out):
            return -1
        for _ in range(literals):
            out[o] = data[i]
            o += 1
            i += 1
        if i == len(data):
            return o
        if i + 2 > len(data):
            return -1
        back = np.int64(data[i]) | np.int64(data[i + 1]) << 8
        length, i = _length(data, i + 2, token & 15)
        length += 4
        if i > len(data) or back == 0 or back > o or o + length > len(out):
            return -1
        for _ in range(length):
            out[o] = out[o - back]
            o += 1
    return -1


@numba.njit(cache=True, nogil=True)
def _bslz4(data, out, scratch, block, width):  # type: ignore[no-untyped-def]
    i = 12
    o = 0
    while True:
        size = min(block, len(out) - o)
        size -= size % (8 * width)
        if size == 0:
            break
        if i + 4 > len(data):
            return False
        length: Any = np.int64(0)
        for k in range(4):
            length = np.int64(length << 8 | np.int64(data[i + k]))
        i += 4
        if i + length > len(data) or _lz4(data[i : i + length], scratch[:size]) != size:
            return False
        i += length
        row = size // (8 * width)  # bytes that hold one bit of each element
        for bit in range(8 * width):
            byte, shift = bit >> 3, bit & 7
            for k in range(row):
                bits = scratch[bit * row + k]
                if bits:
                    for e in range(8):
                        out[o + (8 * k + e) * width + byte] |= ((bits >> e) & 1) << shift
        o += size
    rest = len(out) - o
    if len(data) - i != rest:
        return False
    out[o:] = data[i:]
    return True
