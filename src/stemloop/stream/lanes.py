"""Sixty-four electrons at a time, where the processor can look up bytes in its registers (AVX-512 VBMI).

On frames of at most 256 x 256 pixels, the columns a power of two, row and column of an electron are bits of its pixel
number, and both fit into a byte. A mask of zeros and ones that has at most two runs in each row (disks, rings,
segments, half planes) is then four small tables over the rows, (first column, length) of each run, that stay in
registers: no electron costs a look-up in memory. The kernels are written in LLVM's words, since Numba has none for
vectors; where the processor lacks the instructions, :data:`READY` is False and the caller goes electron by electron.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, codegen
from numba.extending import intrinsic
from numpy.typing import NDArray

from stemloop.stream import masks as m

#: Whether this processor, as Numba may use it, has the instructions.
READY = (
    not numba.config.DISABLE_JIT
    and not numba.config.CPU_NAME
    and not numba.config.CPU_FEATURES
    and {"+avx512bw", "+avx512vbmi"} <= set(codegen.get_host_cpu_features().split(","))
)
#: A row number is a byte; registers of 64 bytes are looked up in pairs.
_MOST = 256
#: Electrons, or gaps, of a frame whose sums stay below 2^32.
_MOST_ITEMS = 1 << 24
_BIT, _BYTE, _WORD, _LONG = (ir.IntType(bits) for bits in (1, 8, 16, 64))
_BYTES, _WORDS, _LONGS = ir.VectorType(_BYTE, 64), ir.VectorType(_WORD, 32), ir.VectorType(_LONG, 8)


def fits(shape: tuple[int, int]) -> bool:
    """Whether frames of ``shape`` can be summed here."""
    rows, columns = shape
    return READY and rows <= _MOST and columns <= _MOST and not columns & (columns - 1)


def runs(mask: NDArray[Any]) -> NDArray[np.uint8] | None:
    """``mask`` (rows, columns) of zeros and ones as (first, length, first, length) over 256 rows; None where it is no
    such mask, or one of its rows has more than two runs.

    >>> runs(np.array([[0, 1, 1, 0, 1]]))[:, 0]
    array([1, 2, 4, 1], dtype=uint8)
    """
    rows, columns = mask.shape
    inside = np.zeros((rows, columns + 2), np.bool_)
    inside[:, 1:-1] = mask != 0
    if not np.array_equal(mask, inside[:, 1:-1]):
        return None
    edges = np.flatnonzero(
        inside[:, 1:] != inside[:, :-1]
    )  # begin and end by turns, as each row begins and ends outside
    (row, first), length = np.divmod(edges[::2], columns + 1), edges[1::2] - edges[::2]
    second = np.diff(row, prepend=-1) == 0
    if np.any(second[1:] & second[:-1]):
        return None
    table, place = np.zeros((4, _MOST), np.uint8), 2 * second
    most = _MOST - 1  # a whole row of 256 does not fit into a byte: in two parts, as it has no room for another run
    table[place, row], table[place + 1, row] = first, np.minimum(length, most)
    table[2, row[length > most]], table[3, row[length > most]] = most, 1
    return table


class _Writer:
    """The instructions that both kernels share, written by ``builder``."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def load(self, pointer: Any, kind: Any, valid: Any) -> Any:
        """A vector from ``pointer``; zero, and not touched in memory, where the bits of ``valid`` are zero."""
        pointer = self.builder.bitcast(pointer, kind.as_pointer())
        valid = self.builder.bitcast(valid, ir.VectorType(_BIT, kind.count))
        name = f"llvm.masked.load.v{kind.count}{kind.element}.p0"
        return self.call(name, kind, pointer, ir.Constant(ir.IntType(32), 1), valid, ir.Constant(kind, 0))

    def all_of(self, kind: Any, value: Any) -> Any:
        """A vector of ``kind`` with ``value`` in every lane."""
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return self.shuffled(one, one, [0] * kind.count)

    def shuffled(self, one: Any, other: Any, lanes: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
        return self.builder.shuffle_vector(one, other, mask)

    def narrowed(self, low: Any, high: Any) -> Any:
        """The lower bytes of 64 words."""
        half = ir.VectorType(_BYTE, 32)
        return self.shuffled(self.builder.trunc(low, half), self.builder.trunc(high, half), list(range(64)))

    def tables(self, pointer: Any, rows: int) -> list[list[Any]]:
        """The registers of each of the four tables of :func:`runs`."""
        pointer = self.builder.bitcast(pointer, _BYTES.as_pointer())
        found = []
        for table in range(4):
            places = [ir.Constant(_LONG, table * 4 + part) for part in range(rows // 64)]
            found.append([self.builder.load(self.builder.gep(pointer, [place]), align=1) for place in places])
        return found

    def looked_up(self, table: list[Any], row: Any) -> Any:
        """The bytes of ``table`` at ``row``."""
        name, pairs = "llvm.x86.avx512.vpermi2var.qi.512", list(zip(table[::2], table[1::2], strict=True))
        found = [self.call(name, _BYTES, one, row, other) for one, other in pairs]
        if len(found) == 1:
            return found[0]
        upper = self.builder.icmp_signed("<", row, ir.Constant(_BYTES, 0))
        return self.builder.select(upper, found[1], found[0])

    def under(self, tables: list[list[Any]], row: Any, column: Any) -> Any:
        """A one bit for each lane that lies in a run of ``tables``."""
        first, length, second, rest = (self.looked_up(table, row) for table in tables)
        in_one = self.builder.icmp_unsigned("<", self.builder.sub(column, first), length)
        in_other = self.builder.icmp_unsigned("<", self.builder.sub(column, second), rest)
        return self.builder.bitcast(self.builder.or_(in_one, in_other), _LONG)

    def ones(self, bits: Any) -> Any:
        return self.call("llvm.ctpop.i64", _LONG, bits)

    def added(self, row: Any, column: Any) -> Any:
        """Eight parts of the sum of the columns, and 2^32 times that of the rows."""
        none = ir.Constant(_BYTES, 0)
        across, down = (self.call("llvm.x86.avx512.psad.bw.512", _LONGS, part, none) for part in (column, row))
        return self.builder.add(across, self.builder.shl(down, ir.Constant(_LONGS, 32)))

    def valid(self, left: Any) -> Any:
        """A one bit for each of the ``left`` lanes, at most 64."""
        some = self.builder.sub(self.builder.shl(ir.Constant(_LONG, 1), left), ir.Constant(_LONG, 1))
        enough = self.builder.icmp_unsigned(">=", left, ir.Constant(_LONG, 64))
        return self.builder.select(enough, ir.Constant(_LONG, -1), some)

    def shifted(self, words: Any, bits: Any) -> Any:
        return self.builder.lshr(words, self.all_of(_WORDS, bits))

    def prefix(self, gaps: Any) -> Any:
        """The running sums of 32 words."""
        for step in (1, 2, 4, 8, 16):
            lanes = [32] * step + list(range(32 - step))
            gaps = self.builder.add(gaps, self.shuffled(gaps, ir.Constant(_WORDS, 0), lanes))
        return gaps

    def last(self, words: Any) -> Any:
        """The last of 32 words, in every lane."""
        return self.shuffled(words, words, [31] * 32)


def _of_events(write: _Writer, pointer: Any, valid: Any, _: Any) -> tuple[Any, Any, Any]:
    """64 pixel numbers as two vectors of words, and which of them count."""
    builder = write.builder
    low = write.load(pointer, _WORDS, builder.trunc(valid, ir.IntType(32)))
    beyond = builder.gep(pointer, [ir.Constant(_LONG, 32)])
    high = write.load(beyond, _WORDS, builder.trunc(builder.lshr(valid, ir.Constant(_LONG, 32)), ir.IntType(32)))
    return low, high, valid


def _of_gaps(write: _Writer, pointer: Any, valid: Any, at: Any) -> tuple[Any, Any, Any]:
    """The same from 64 gaps; ``at`` keeps the place reached. Escapes move on, and do not count."""
    builder = write.builder
    gaps = write.load(pointer, _BYTES, valid)
    halves = [write.shuffled(gaps, gaps, list(range(first, first + 32))) for first in (0, 32)]
    low, high = (write.prefix(builder.zext(half, _WORDS)) for half in halves)
    before = builder.load(at)
    low = builder.add(low, before)
    high = builder.add(high, write.last(low))
    builder.store(write.last(high), at)
    electron = builder.bitcast(builder.icmp_unsigned("!=", gaps, ir.Constant(_BYTES, 255)), _LONG)
    return low, high, builder.and_(valid, electron)


def _kernel(rows: int, read: Callable[..., tuple[Any, Any, Any]]) -> Any:
    """The sums of every frame, for at most ``rows`` rows, over what ``read`` reads."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ends, items, table, bits, *sums = (
            context.make_array(kind)(context, builder, value) if isinstance(kind, numba.types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        frames = builder.sub(builder.extract_value(ends.shape, 0), ir.Constant(_LONG, 1))
        write = _Writer(builder)
        tables = write.tables(table.data, rows)
        bits = builder.trunc(bits, _WORD)
        columns = builder.sub(builder.shl(ir.Constant(_WORD, 1), bits), ir.Constant(_WORD, 1))
        low_bits = write.all_of(_BYTES, builder.trunc(columns, _BYTE))
        kinds = (_LONGS, _LONG, _LONG, _WORDS)
        moments, electrons, under, at = variables = [cgutils.alloca_once(builder, kind) for kind in kinds]

        def add(variable: Any, value: Any) -> None:
            builder.store(builder.add(builder.load(variable), value), variable)

        with cgutils.for_range(builder, frames) as frame:
            start, stop = (
                builder.load(builder.gep(ends.data, [builder.add(frame.index, ir.Constant(_LONG, k))])) for k in (0, 1)
            )
            for variable, kind in zip(variables, kinds, strict=True):
                builder.store(ir.Constant(kind, 0), variable)
            with cgutils.for_range_slice(builder, start, stop, ir.Constant(_LONG, 64)) as (i, _):
                valid = write.valid(builder.sub(stop, i))
                low, high, valid = read(write, builder.gep(items.data, [i]), valid, at)
                counted = builder.bitcast(valid, ir.VectorType(_BIT, 64))
                column = builder.and_(write.narrowed(low, high), low_bits)
                row = write.narrowed(write.shifted(low, bits), write.shifted(high, bits))
                row, column = (builder.select(counted, part, ir.Constant(_BYTES, 0)) for part in (row, column))
                add(moments, write.added(row, column))
                add(electrons, write.ones(valid))
                add(under, write.ones(builder.and_(write.under(tables, row, column), valid)))
            both = write.call("llvm.vector.reduce.add.v8i64", _LONG, builder.load(moments))
            down = builder.lshr(both, ir.Constant(_LONG, 32))
            across = builder.and_(both, ir.Constant(_LONG, 2**32 - 1))
            for value, array in zip((builder.load(electrons), down, across, builder.load(under)), sums, strict=True):
                builder.store(builder.uitofp(value, ir.DoubleType()), builder.gep(array.data, [frame.index]))
        return context.get_dummy_value()

    @intrinsic
    def sum_up(typing, ends, items, table, bits, electrons, down, across, under):  # type: ignore[no-untyped-def]
        return numba.types.void(ends, items, table, bits, electrons, down, across, under), generate

    return sum_up


_events_128, _events_256 = _kernel(128, _of_events), _kernel(256, _of_events)
_gaps_128, _gaps_256 = _kernel(128, _of_gaps), _kernel(256, _of_gaps)


@numba.njit(cache=True, nogil=True)
def _sum_events(ends, index, table, bits, small, electrons, down, across, under):  # type: ignore[no-untyped-def]
    if small:
        _events_128(ends, index, table, bits, electrons, down, across, under)
    else:
        _events_256(ends, index, table, bits, electrons, down, across, under)


@numba.njit(cache=True, nogil=True)
def _sum_gaps(ends, gaps, table, bits, small, electrons, down, across, under):  # type: ignore[no-untyped-def]
    if small:
        _gaps_128(ends, gaps, table, bits, electrons, down, across, under)
    else:
        _gaps_256(ends, gaps, table, bits, electrons, down, across, under)


def dot(
    ends: NDArray[np.int64],
    items: NDArray[Any],
    masks: NDArray[Any],
    others: Callable[[NDArray[Any]], NDArray[np.float64]],
) -> NDArray[np.float64] | None:
    """(k, frames): sums under ``masks`` (k, rows, columns), exact; None where that cannot be done here.

    items : the pixel numbers (uint16) or the gaps (uint8) of all frames; frame f begins at ``ends[f]``.
    others : what gives the sums (n, frames) under the n masks that are neither ramps nor have :func:`runs`.
    """
    shape, frames = masks.shape[1:], len(ends) - 1
    if not fits(shape) or (len(items) >= _MOST_ITEMS and np.diff(ends).max() >= _MOST_ITEMS):
        return None
    ramp = m.ramp_numbers(masks)
    tables = {k: table for k, mask in enumerate(masks) if ramp[k] < 0 and (table := runs(mask)) is not None}
    left = [k for k in range(len(masks)) if ramp[k] < 0 and k not in tables]
    if len(left) == len(masks):
        return None
    out, spare = np.empty((len(masks), frames)), np.empty((4, frames))
    moments = [out[ramp.index(i)] if i in ramp else spare[i] for i in range(3)]
    passes = [(table, out[k]) for k, table in tables.items()] or [(np.zeros((4, _MOST), np.uint8), spare[3])]
    kernel, (rows, columns) = _sum_gaps if items.dtype == np.uint8 else _sum_events, shape
    for table, under in passes:
        kernel(ends, items, table, columns.bit_length() - 1, rows <= _MOST // 2, *moments, under)
    for k, i in enumerate(ramp):
        if i >= 0 and ramp.index(i) < k:
            out[k] = moments[i]
    if left:
        out[left] = others(masks[left])
    return out
