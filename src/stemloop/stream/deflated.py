"""Electron events as the chunk that HDF5's filters ``shuffle`` and ``deflate`` would make of their frames.

The frames are never made. Nearly all of a sparse frame is zeros, and DEFLATE (P. Deutsch, RFC 1951) says a run of
them with a zero and copies of it from one byte back; so the stream is written from electron to electron, with a
Huffman code that is made for the chunk (D. A. Huffman, Proc. IRE 40 (1952) 1098, doi:10.1109/JRPROC.1952.273898). The
checksum (Adler-32, RFC 1950) of the zeros is known without them too.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.stream.events import EventBlock

#: Above this share of hit pixels the frames are better deflated as they are.
SPARSE = 0.1
#: Longest code, and that of the zero. Then a run of zeros (three zeros at most, or a zero and a copy of at most 258
#: more) takes no more than 32 bits.
_MOST_BITS, _MOST_ZERO_BITS = 13, 10
#: Longest run of zeros that is written at once.
_AT_ONCE = 259
_END = 256
#: Bits of the codes of the header: 0..15 (lengths) have five, 17 and 18 (rows of zeros) two, 16 none.
_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)


def _lengths() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For each length 0..258 of a copy: its symbol, its extra bits' number and value (RFC 1951, 3.2.5)."""
    symbol, extra, value = (np.zeros(259, np.int64) for _ in range(3))
    base = 3
    for code in range(257, 285):
        bits = max(0, (code - 261) // 4)
        for k in range(1 << bits):
            if base + k < 258:
                symbol[base + k], extra[base + k], value[base + k] = code, bits, k
        base += 1 << bits
    symbol[258] = 285
    return symbol, extra, value


_SYMBOL, _EXTRA, _VALUE = _lengths()


def deflated(events: EventBlock, dtype: Any, rows: int | None = None) -> bytes | None:
    """The chunk of ``rows`` frames (default: as many as there are) of ``dtype`` that begins with ``events`` and ends
    with zeros, as :func:`stemloop.core.chunk.deflate` would make it (other bytes, the same numbers); None where the
    frames are not sparse or do not fit ``dtype``, or its bytes are turned round. InputError if there are more than
    ``rows``."""
    kind = np.dtype(dtype)
    if rows is not None and rows < events.frames:
        raise InputError(f"{events.frames} frames do not fit into a chunk of {rows}.")
    pixels = events.shape[0] * events.shape[1]
    most = 1 if events.counts is None and len(events.index) == 0 else _most(events)
    whole = (events.frames if rows is None else rows) * pixels
    if (
        kind.kind != "u"
        or kind != kind.newbyteorder("<")
        or whole == 0
        or len(events.index) > SPARSE * whole
        or most >> (8 * kind.itemsize)
    ):
        return None
    counts = np.zeros(0, np.uint16) if events.counts is None else events.counts
    planes = max(1, (int(most).bit_length() + 7) // 8)
    place = np.empty(planes * len(events.index), np.int64)
    byte = np.empty(len(place), np.uint8)
    used = 0
    for plane in range(planes):
        used = _bytes(events.indptr, events.index, counts, pixels, plane, plane * whole, place, byte, used)
    size = whole * kind.itemsize
    out = np.empty(2 * used + size // 258 + 512, np.dtype("<u4"))
    length = _write(place[:used], byte[:used], size, _SYMBOL, _EXTRA, _VALUE, out)
    return out.view(np.uint8)[:length].tobytes()


def _most(events: EventBlock) -> int:
    """The largest count of a pixel."""
    if events.counts is not None:
        return int(events.counts.max(initial=1))
    return int(_longest(events.indptr, events.index))


@numba.njit(cache=True, nogil=True)
def _longest(indptr, index):  # type: ignore[no-untyped-def]
    most = 1
    for f in range(len(indptr) - 1):
        run = 1
        for i in range(indptr[f] + 1, indptr[f + 1]):
            run = run + 1 if index[i] == index[i - 1] else 1
            most = max(most, run)
    return most


@numba.njit(cache=True, nogil=True)
def _bytes(indptr, index, counts, pixels, plane, offset, place, byte, used):  # type: ignore[no-untyped-def]
    """Append the places and values of the bytes of ``plane`` that are not zero."""
    single = len(counts) == 0
    for f in range(len(indptr) - 1):
        begin = offset + f * pixels
        i = indptr[f]
        stop = indptr[f + 1]
        while i < stop:
            n = 1
            if single:
                while i + n < stop and index[i + n] == index[i]:
                    n += 1
                count = np.int64(n)
            else:
                count = np.int64(counts[i])
            value = (count >> (8 * plane)) & 255
            if value:
                place[used] = begin + np.int64(index[i])
                byte[used] = value
                used += 1
            i += n
    return used


@numba.njit(cache=True, nogil=True)
def _tally(place, byte, size, symbol):  # type: ignore[no-untyped-def]
    """How often each symbol is written, and the checksum of the bytes."""
    weight = np.zeros(286, np.int64)
    runs = np.zeros(_AT_ONCE + 1, np.int64)
    low, high, at = np.int64(1), np.int64(size), np.int64(0)
    for k in range(len(place)):
        zeros = place[k] - at
        at = place[k] + 1
        if zeros > _AT_ONCE:
            weight[285] += (zeros - 1) // 258
            zeros = 1 + (zeros - 1) % 258
        runs[zeros] += 1
        weight[byte[k]] += 1
        low += np.int64(byte[k])
        high += np.int64(byte[k]) * (size - place[k])
        if k % 65536 == 0:
            high %= 65521
    zeros = size - at
    weight[285] += max(zeros - 1, 0) // 258
    runs[1 + (zeros - 1) % 258 if zeros > 0 else 0] += 1
    for zeros in range(1, _AT_ONCE + 1):
        weight[0] += runs[zeros]
        if zeros > 3:
            weight[symbol[zeros - 1]] += runs[zeros]
        else:
            weight[0] += runs[zeros] * (zeros - 1)
    weight[_END] = 1
    weight[0] += 1  # a code has two symbols at least
    return weight, high % 65521 << 16 | low % 65521


@numba.njit(cache=True, nogil=True)
def _tree(weight):  # type: ignore[no-untyped-def]
    """Parent of each node of Huffman's tree (-1: the root); the first ones are the symbols."""
    count = len(weight)
    mass = np.zeros(2 * count, np.int64)
    parent = np.full(2 * count, -1, np.int64)
    mass[:count] = weight
    alive = [k for k in range(count) if weight[k] > 0]
    free = count
    while len(alive) > 1:
        for last in range(2):  # the lightest goes to the end, twice
            lightest = 0
            for k in range(1, len(alive) - last):
                if mass[alive[k]] < mass[alive[lightest]]:
                    lightest = k
            alive[lightest], alive[-1 - last] = alive[-1 - last], alive[lightest]
        for _ in range(2):
            node = alive.pop()
            parent[node] = free
            mass[free] += mass[node]
        alive.append(free)
        free += 1
    return parent


@numba.njit(cache=True, nogil=True)
def _code(weight):  # type: ignore[no-untyped-def]
    """Bits of each symbol in Huffman's code, at most _MOST_BITS, of the zero _MOST_ZERO_BITS: weights are halved until
    no code is longer. That ends: 286 symbols of weights 1 and 2 have no code of more than 10 bits."""
    bits = np.zeros(len(weight), np.int64)
    while True:
        parent = _tree(weight)
        for k in range(len(weight)):
            bits[k] = 0
            node = k
            while weight[k] > 0 and parent[node] >= 0:
                bits[k] += 1
                node = parent[node]
        if bits.max() <= _MOST_BITS and bits[0] <= _MOST_ZERO_BITS:
            return bits
        for k in range(len(weight)):
            if weight[k] > 0:
                weight[k] = weight[k] // 2 + 1


@numba.njit(cache=True, nogil=True)
def _words(bits):  # type: ignore[no-untyped-def]
    """The canonical codes of these lengths, their first bit lowest (RFC 1951, 3.2.2)."""
    number = np.zeros(_MOST_BITS + 2, np.int64)
    for b in bits:
        if b:
            number[b + 1] += 1
    start = np.zeros(_MOST_BITS + 2, np.int64)
    for b in range(1, _MOST_BITS + 1):
        start[b] = (start[b - 1] + number[b]) << 1
    word = np.zeros(len(bits), np.uint64)
    for k in range(len(bits)):
        b = bits[k]
        if b:
            code = start[b]
            start[b] += 1
            turned = 0
            for i in range(b):
                turned |= ((code >> i) & 1) << (b - 1 - i)
            word[k] = turned
    return word


@numba.njit(cache=True, nogil=True, inline="always")
def _put(out, o, held, n, word, bits):  # type: ignore[no-untyped-def]
    """Append ``bits`` (at most 32) of ``word`` to the ``n`` bits held back; write 32 when there are."""
    held |= word << n
    n += bits
    full = n >> np.uint64(5)  # 0 or 1
    out[o] = held & np.uint64(0xFFFFFFFF)
    held >>= full << np.uint64(5)
    return o + full, held, n & np.uint64(31)


@numba.njit(cache=True, nogil=True)
def _head(out, o, held, n, bits):  # type: ignore[no-untyped-def]
    """One last block with a code of its own; the only distance is one."""
    u = np.uint64
    last = 285
    while bits[last] == 0:
        last -= 1
    o, held, n = _put(out, o, held, n, u(1 | 2 << 1), u(3))
    o, held, n = _put(out, o, held, n, u(last + 1 - 257), u(5))
    o, held, n = _put(out, o, held, n, u(0 | 15 << 5), u(9))
    sizes = np.full(19, 5, np.int64)
    sizes[16], sizes[17], sizes[18] = 0, 2, 2
    for k in _ORDER:
        o, held, n = _put(out, o, held, n, u(sizes[k]), u(3))
    word = _words(sizes)
    k = 0
    while k <= last:
        run = 0
        while k + run <= last and bits[k + run] == 0:
            run += 1
        if run >= 11:
            run = min(run, 138)
            o, held, n = _put(out, o, held, n, word[18] | u(run - 11) << u(2), u(9))
        elif run >= 3:
            o, held, n = _put(out, o, held, n, word[17] | u(run - 3) << u(2), u(5))
        else:
            run = 1
            o, held, n = _put(out, o, held, n, word[bits[k]], u(5))
        k += run
    return _put(out, o, held, n, word[1], u(5))


@numba.njit(cache=True, nogil=True)
def _runs(word, bits, symbol, extra, value):  # type: ignore[no-untyped-def]
    """For each run of zeros up to _AT_ONCE, and for the copy of 258 alone in the last place, its word and bits."""
    u = np.uint64
    run = np.zeros(_AT_ONCE + 2, np.uint64)
    run_bits = np.zeros(_AT_ONCE + 2, np.uint64)
    for zeros in range(1, _AT_ONCE + 2):
        more = zeros - 1
        w, b = (word[0], u(bits[0])) if zeros <= _AT_ONCE else (u(0), u(0))
        if zeros > _AT_ONCE:
            more = 258
        if more >= 3:  # the symbol, its extra bits, and one bit for the distance: zero
            code = symbol[more]
            w |= (word[code] | u(value[more]) << u(bits[code])) << b
            b += u(bits[code] + extra[more] + 1)
        else:
            for _ in range(more):
                w |= word[0] << b
                b += u(bits[0])
        run[zeros], run_bits[zeros] = w, b
    return run, run_bits


@numba.njit(cache=True, nogil=True)
def _write(place, byte, size, symbol, extra, value, out):  # type: ignore[no-untyped-def]
    """The zlib stream of ``size`` bytes, zero but for ``byte`` at ``place`` (ascending), in words of 32 bits; returns
    its length in bytes."""
    u = np.uint64
    weight, checksum = _tally(place, byte, size, symbol)
    bits = _code(weight)
    word = _words(bits)
    run, run_bits = _runs(word, bits, symbol, extra, value)
    o, held, n = _put(out, u(0), u(0), u(0), u(0x0178), u(16))
    o, held, n = _head(out, o, held, n, bits)
    at = 0
    for k in range(len(place) + 1):
        end = place[k] if k < len(place) else size
        zeros = end - at
        at = end + 1
        if zeros > _AT_ONCE:
            o, held, n = _put(out, o, held, n, run[1], run_bits[1])
            zeros -= 1
            copies = zeros // 258
            for _ in range(copies):
                o, held, n = _put(out, o, held, n, run[_AT_ONCE + 1], run_bits[_AT_ONCE + 1])
            zeros -= 258 * copies
            w, b = run[zeros + 1] >> run_bits[1], run_bits[zeros + 1] - run_bits[1]
            o, held, n = _put(out, o, held, n, w, b)
        else:
            o, held, n = _put(out, o, held, n, run[zeros], run_bits[zeros])
        if k < len(place):
            o, held, n = _put(out, o, held, n, word[byte[k]], u(bits[byte[k]]))
    o, held, n = _put(out, o, held, n, word[_END], u(bits[_END]))
    n = (n + u(7)) & ~u(7)
    for shift in (24, 16, 8, 0):
        o, held, n = _put(out, o, held, n, u(checksum >> shift & 255), u(8))
    out[o] = held
    return np.int64(4 * o + (n >> u(3)))
