"""Plain frames of 16 bits a row at a time, the running sums of 128 columns in registers.

For each column three sums run down the rows: S of the counts, T of all S so far, and U of the counts under one mask,
whose bits pick what is added. So each count is read once, by one instruction that also widens it, and takes three
additions: less than the memory takes to bring it. Written in LLVM's words like :mod:`stemloop.stream.lanes`.
"""

from __future__ import annotations

import itertools
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

#: Columns whose sums fill the registers (24 of the 32 that AVX-512 has).
STRIP = 128
_BIT, _COUNT, _SUM, _LONG = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_COUNTS, _SUMS = ir.VectorType(_COUNT, 32), ir.VectorType(_SUM, 32)


def _generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    frames, frame, bits, *sums = (
        context.make_array(kind)(context, builder, value) if isinstance(kind, numba.types.Array) else value
        for kind, value in zip(signature.args, arguments, strict=True)
    )

    def number(value: int) -> Any:
        return ir.Constant(_LONG, value)

    def at(data: Any, place: Any, kind: Any) -> Any:
        """Where a vector of ``kind`` begins in ``data``."""
        return builder.bitcast(builder.gep(data, [place]), kind.as_pointer())

    rows, columns = (builder.extract_value(frames.shape, k) for k in (1, 2))
    size, parts = builder.mul(rows, columns), range(STRIP // 32)
    counts = builder.gep(frames.data, [builder.mul(frame, size)])
    running = [[cgutils.alloca_once(builder, _SUMS) for _ in parts] for _ in sums]
    with cgutils.for_range_slice(builder, number(0), columns, number(STRIP)) as (strip, _):
        for variable in itertools.chain(*running):
            builder.store(ir.Constant(_SUMS, 0), variable)
        with cgutils.for_range_slice(builder, strip, size, columns) as (first, _):
            for part, three in enumerate(zip(*running, strict=True)):
                place = builder.add(first, number(32 * part))
                found = builder.zext(builder.load(at(counts, place, _COUNTS), align=2), _SUMS)
                chosen = builder.load(builder.gep(bits.data, [builder.lshr(place, number(5))]), align=4)
                chosen = builder.bitcast(chosen, ir.VectorType(_BIT, 32))
                s, t, u = (builder.load(variable) for variable in three)
                s = builder.add(s, found)
                t = builder.add(t, s)
                u = builder.add(u, builder.select(chosen, found, ir.Constant(_SUMS, 0)))
                for value, variable in zip((s, t, u), three, strict=True):
                    builder.store(value, variable)
        for variables, array in zip(running, sums, strict=True):
            for part, variable in enumerate(variables):
                place = at(array.data, builder.add(strip, number(32 * part)), _SUMS)
                builder.store(builder.load(variable), place, align=4)
    return context.get_dummy_value()


@intrinsic
def column_sums(typing, frames, frame, bits, s, t, u):  # type: ignore[no-untyped-def]
    """Fill ``s``, ``t`` and ``u`` (columns,) of uint32 for the frame numbered ``frame`` of ``frames`` (n, rows,
    columns) of uint16, columns a multiple of :data:`STRIP`; ``bits`` are the mask's, 32 pixels a word, the first pixel
    the lowest bit."""
    return numba.types.void(frames, frame, bits, s, t, u), _generate
