"""Electron events near their Poisson entropy: gaps in ticks, one static table of symbols for every pattern.

:mod:`.intensity` gives each pixel a share of *ticks* in proportion to its expected count. Counted in ticks, the gaps
between electrons have one geometric distribution, which no frame's beginning or end disturbs; they are coded by tabled
asymmetric numeral systems (tANS; J. Duda, arXiv:1311.2540) with a static table. Where 2^r pixels share a tick, r raw
bits name the pixel. Where a pixel has 2^c ticks, it does not matter which of them an electron takes: the encoder, which
works backwards, takes c bits off what it wrote last and lets them choose, and the decoder puts them back ("bits back").
So a bright pixel's many ticks cost nothing, and all steps are shifts and look-ups.

After an electron in a pixel of several ticks the next gap is counted from the pixel's middle; so a second electron of
the same pixel has the Poisson chance of half the pixel's expected count.

Frames are grouped into runs, which are coded independently: two are decoded at a time, so that neither waits for the
other's look-ups, and a single frame needs only its run. A run's bits stand in the order of reading, lowest bit of a
byte first: zeros and a one that fill up the first byte, the state, the electrons.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.core.extending import intrinsic
from numpy.typing import NDArray

from stemloop.core.errors import IntegrityError
from stemloop.stream import intensity
from stemloop.stream.events import EventBlock, index_dtype
from stemloop.stream.intensity import MIDDLE_AT, MOST_TICKS, PIXEL_AT, TICKS_AT

#: The static table has 2^STATE_BITS slots.
STATE_BITS = 12
#: Events that a run should hold.
RUN_EVENTS = 16384
#: Largest ``gap`` of a table.
MOST_GAP = 8 * 40
#: Bytes after the last run, which the decoder may read and never needs.
PADDING = 16
_NARROW_ESCAPE, _WIDE_ESCAPE = 0xFFFF, 1 << 40
#: Zero bits below a run's first ones, for the first electron to take bits from.
_FLOOR = 8


class Static(NamedTuple):
    """The table of one mean gap.

    ``escape``: the symbol that stands for at least as many ticks; ``slots``: how many each symbol has;
    ``reads`` (2^STATE_BITS,): bits to read | state before them << 4 | symbol << 16, and the same in 32 bits for frames
    of less ticks than the escape's symbol there; ``writes``: the state after a symbol; ``symbols`` (escape + 1,): what
    makes bits and place in ``writes`` out of a state, in two halves."""

    escape: int
    slots: NDArray[np.int64]
    reads: NDArray[np.uint64]
    narrow_reads: NDArray[np.uint32]
    writes: NDArray[np.uint16]
    symbols: NDArray[np.uint64]


@functools.cache
def static(gap: int) -> Static:
    """The table of the geometric distribution of mean 2^(gap/8)."""
    mean, size = 2 ** (gap / 8), 1 << STATE_BITS
    # symbols below have most of a slot's chance; more than half a pixel's ticks, so that who escapes leaves the pixel
    escape = 64 if mean > 1000 else min(max(math.ceil(mean * math.log(1 + 1.5 * size / mean)), 1 << MOST_TICKS), 1000)
    symbol = np.arange(escape + 1)
    rate = math.log1p(1 / mean)
    share = np.exp(-symbol * rate) * -math.expm1(-rate)
    share[escape] = math.exp(-escape * rate)
    slots = np.maximum(np.rint(share * size), 1).astype(np.int64)
    while excess := int(slots.sum()) - size:
        step = -1 if excess > 0 else 1
        useful = np.where(slots + step > 0, share * np.log(np.maximum(slots + step, 1) / slots), -np.inf)
        slots[np.argmax(useful)] += step
    first = np.concatenate([[0], np.cumsum(slots)[:-1]])
    spread = np.repeat(symbol, slots)
    inside = np.arange(size) - first[spread]
    order = np.argsort((inside + 0.5) / slots[spread], kind="stable")  # each symbol's slots lie evenly
    spread, inside = spread[order], inside[order]
    number = slots[spread] + inside
    bits = STATE_BITS - np.floor(np.log2(number)).astype(np.int64)
    value = np.where(spread == escape, _WIDE_ESCAPE, spread)
    reads = (bits | ((number << bits) - size) << 4 | value << 16).astype(np.uint64)
    value = np.where(spread == escape, _NARROW_ESCAPE, spread)
    narrow_reads = (bits | ((number << bits) - size) << 4 | value << 16).astype(np.uint32)
    writes = np.empty(size, np.uint16)
    writes[first[spread] + inside] = np.arange(size)
    most = np.where(slots > 1, STATE_BITS - np.floor(np.log2(np.maximum(slots - 1, 1))).astype(np.int64), STATE_BITS)
    symbols = ((most << 16) - (slots << most) + size) | (first - slots + size) << 32
    return Static(escape, slots, reads, narrow_reads, writes, symbols.astype(np.uint64))


def run_frames(events: EventBlock) -> int:
    """Frames a run."""
    return max(1, min(events.frames, round(RUN_EVENTS * events.frames / max(len(events.index), 1))))


def run_edges(frames: int, per_run: int) -> NDArray[np.int64]:
    """(runs + 1,): the first frame of each run, and the number of frames."""
    return np.minimum(np.arange(-(-frames // per_run) + 1) * per_run, frames)


def encode(events: EventBlock, models: intensity.Models, per_run: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """``(data, ends)`` of events without counts apart: all runs' bytes with PADDING, where each begins (runs + 1,)."""
    pixels = events.shape[0] * events.shape[1]
    table, code = intensity.tables(models, pixels), static(models.gap)
    edges = run_edges(events.frames, per_run)
    whole = int((table.end - table.begin).max(initial=0))
    escapes = np.diff(edges) * whole // code.escape * STATE_BITS // 32
    place = np.concatenate([[0], np.cumsum(np.diff(events.indptr[edges]) + escapes + 8)])
    scratch = np.empty(int(place[-1]), np.uint32)
    begins = np.empty(len(edges) - 1, np.int64)
    _encode_runs(
        events.indptr, events.index, edges, models.labels, table.pixel, table.begin, table.end, pixels,
        code.symbols, code.writes, code.escape, scratch, place, begins,
    )  # fmt: skip
    written = scratch.view(np.uint8)
    pieces = [written[a:b] for a, b in zip(begins, 4 * place[1:], strict=True)]
    ends = np.concatenate([[0], np.cumsum(4 * place[1:] - begins)])
    return np.concatenate([*pieces, np.full(PADDING, 255, np.uint8)]), ends


def decode(
    data: NDArray[np.uint8],
    ends: NDArray[np.int64],
    sizes: NDArray[np.int64],
    models: intensity.Models,
    pixels: int,
    per_run: int,
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """``(indptr, index)`` of what :func:`encode` wrote; ``sizes`` (runs,) are the electrons of each run.

    ``data`` go PADDING bytes or more beyond ``ends[-1]``."""
    table, code = intensity.tables(models, pixels), static(models.gap)
    frames = len(models.labels)
    place = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    index = np.empty(int(place[-1]), index_dtype(pixels))
    indptr = np.zeros(frames + 1, np.int64)
    if len(data) < ends[-1] + PADDING:
        raise IntegrityError("an entropy-coded block is cut short; ask its sender for the block again.")
    short = int((table.end - table.begin).max()) < _NARROW_ESCAPE  # then an escape leads out of every frame
    reads = code.narrow_reads if short else code.reads
    good = _decode_runs(
        data, ends, place, run_edges(frames, per_run), reads, code.escape, table.ticks, models.labels, table.begin,
        table.end, indptr, index,
    )  # fmt: skip
    if not good:
        raise IntegrityError("an entropy-coded block does not end where it should; ask its sender for the block again.")
    return indptr, index


# The kernels are compiled without numba's reference counts (_nrt), which it would else take for every electron.


@intrinsic  # type: ignore[call-arg]
def _eight_bytes(typing, array, at):  # type: ignore[no-untyped-def]
    """Bytes ``at`` .. ``at + 7`` of ``array`` as one number, the first one lowest."""

    def load(context, builder, signature, words):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, words[0]).data
        place = builder.bitcast(builder.gep(data, [words[1]]), ir.IntType(64).as_pointer())
        return builder.load(place, align=1)

    return types.uint64(array, types.uint64), load


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _mask(bits):  # type: ignore[no-untyped-def]
    return (np.uint64(1) << bits) - np.uint64(1)


# ------------------------------------------------------------------------------------------------------ decoding
# A reader is (bits in hand, how many of them are counted, next byte, state, tick that the gap counts from, log2 ticks
# of the pixel before, place in index, last gap). Above the counted bits are those that follow in the data, or zeros.
# A frame is (end of its ticks, number, last one of the run).


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _fill(run, data, limit):  # type: ignore[no-untyped-def]
    """Count 49 to 56 bits: enough for two electrons, which take 24 bits each at most and put 7 back together.

    Damaged runs end at ``limit``."""
    x, counted, at, state, tick, log_ticks, place, gap = run
    x |= _eight_bytes(data, at) << np.uint64(counted)  # type: ignore[call-arg]
    more = (np.int64(56) - counted) >> np.int64(3)
    return x, counted + (more << np.int64(3)), min(at + np.uint64(more), limit), state, tick, log_ticks, place, gap


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _next_gap(run, reads):  # type: ignore[no-untyped-def]
    u = np.uint64
    x, counted, at, state, tick, log_ticks, place, gap = run
    entry = u(reads[state])
    bits = entry & u(15)
    state = ((entry >> u(4)) & u(0xFFF)) + (x & _mask(bits))
    gap = entry >> u(16)
    return x >> bits, counted - np.int64(bits), at, state, tick + gap, log_ticks, place, gap


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _write_pixel(run, ticks, index):  # type: ignore[no-untyped-def]
    """The electron at the reader's tick."""
    u = np.uint64
    x, counted, at, state, tick, log_ticks, place, gap = run
    entry = u(ticks[tick])
    raw = entry & u(15)
    index[place] = (entry >> u(PIXEL_AT)) + (x & _mask(raw))
    again = u((gap + gap + u(1)) >> log_ticks == u(0))  # less than half a pixel's ticks: the same pixel
    log_ticks = (entry >> u(TICKS_AT)) & u(7)
    back = log_ticks - again
    x = ((x >> raw) << back) | (tick & _mask(back))
    tick = tick + ((entry >> u(MIDDLE_AT)) & u(63)) - u(31)
    return x, counted + np.int64(back) - np.int64(raw), at, state, tick, log_ticks, place + u(1), gap


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _onward(run, frame, data, limit, reads, escape, ticks, labels, begin, end, indptr, index):  # type: ignore[no-untyped-def]
    """The electron after a gap that leads out of the frame, or is an escape."""
    u = np.uint64
    x, counted, at, state, tick, log_ticks, place, gap = _fill(run, data, limit)
    stop, number, last = frame
    while True:
        escaped = gap >= u(_NARROW_ESCAPE)
        if escaped:
            tick -= gap - escape
        while tick >= stop:
            if number < last:
                tick -= stop
                number += u(1)
                indptr[number] = place
                tick += begin[labels[number]]
                stop = end[labels[number]]
            else:  # only damage leads here
                tick = begin[labels[last]]
                escaped = False
        if not escaped:
            break
        run = _next_gap((x, counted, at, state, tick, log_ticks, place, gap), reads)
        x, counted, at, state, tick, log_ticks, place, gap = _fill(run, data, limit)
    run = _write_pixel((x, counted, at, state, tick, u(0), place, gap), ticks, index)
    return _fill(run, data, limit), (stop, number, last)


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _open(r, data, limit, ends, place, edges, labels, begin, end, indptr):  # type: ignore[no-untyped-def]
    u = np.uint64
    first, last = u(edges[r]), u(edges[r + 1] - 1)
    indptr[first] = place[r]
    label = labels[first]
    run = (u(0), np.int64(0), u(ends[r]), u(0), begin[label], u(0), u(place[r]), u(0))
    x, counted, at, state, tick, log_ticks, here, gap = _fill(run, data, limit)
    for _ in range(7):
        if not x & u(1):
            x >>= u(1)
            counted -= np.int64(1)
    x >>= u(1)
    state = x & u((1 << STATE_BITS) - 1)
    run = (x >> u(STATE_BITS), counted - np.int64(STATE_BITS + 1), at, state, tick, log_ticks, here, gap)
    return _fill(run, data, limit), (end[label], first, last)


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _close(r, run, frame, place, ends, indptr):  # type: ignore[no-untyped-def]
    """Frames after the last electron of a run are empty. Whether the run ends where the encoder began."""
    for number in range(frame[1] + np.uint64(1), frame[2] + np.uint64(1)):
        indptr[number] = place[r + 1]
    left = 8 * np.int64(ends[r + 1]) - (8 * np.int64(run[2]) - run[1]) - _FLOOR
    return run[3] == np.uint64(0) and left >= 0 and left % 32 == 0


@numba.njit(cache=True, nogil=True, boundscheck=False, _nrt=False)
def _decode_runs(  # type: ignore[no-untyped-def]  # noqa: C901, PLR0912, PLR0915 - one loop nest, compiled
    data, ends, place, edges, reads, escape_, ticks, labels, begin, end, indptr, index
):
    u = np.uint64
    limit, escape = u(len(data) - 8), u(escape_)
    runs = len(ends) - 1
    good = True
    indptr[len(indptr) - 1] = place[runs]
    for r in range(0, runs, 2):
        other = min(r + 1, runs - 1)
        a, a_frame = _open(r, data, limit, ends, place, edges, labels, begin, end, indptr)
        b, b_frame = _open(other, data, limit, ends, place, edges, labels, begin, end, indptr)
        a_stop, b_stop = u(place[r + 1]), u(place[other + 1])
        if other == r:
            b_stop = b[6]
        while True:  # both at once, until one leaves its frame
            away = 0
            for _ in range(min(a_stop - a[6], b_stop - b[6]) >> u(1)):
                a = _next_gap(a, reads)
                if a[4] >= a_frame[0]:
                    away = 1
                    break
                a = _write_pixel(a, ticks, index)
                b = _next_gap(b, reads)
                if b[4] >= b_frame[0]:
                    away = 2
                    break
                b = _write_pixel(b, ticks, index)
                a = _next_gap(a, reads)
                if a[4] >= a_frame[0]:
                    away = 1
                    break
                a = _write_pixel(a, ticks, index)
                b = _next_gap(b, reads)
                if b[4] >= b_frame[0]:
                    away = 2
                    break
                b = _write_pixel(b, ticks, index)
                a = _fill(a, data, limit)
                b = _fill(b, data, limit)
            a = _fill(a, data, limit)
            b = _fill(b, data, limit)
            if away == 1:
                a, a_frame = _onward(a, a_frame, data, limit, reads, escape, ticks, labels, begin, end, indptr, index)
            elif away == 2:
                b, b_frame = _onward(b, b_frame, data, limit, reads, escape, ticks, labels, begin, end, indptr, index)
            else:
                break
        for r_now in range(r, other + 1):  # what is left of each
            run, frame, stop = (a, a_frame, a_stop) if r_now == r else (b, b_frame, b_stop)
            while run[6] < stop:
                run = _next_gap(run, reads)
                if run[4] >= frame[0]:
                    run, frame = _onward(
                        run, frame, data, limit, reads, escape, ticks, labels, begin, end, indptr, index
                    )
                else:
                    run = _fill(_write_pixel(run, ticks, index), data, limit)
            good &= _close(r_now, run, frame, place, ends, indptr)
    return good


# ------------------------------------------------------------------------------------------------------ encoding
# A writer is (bits not yet moved to scratch, how many, place in scratch, state, electrons not yet written (counted from
# the block's first), entry in ``pixel`` of the last of them, the gap to write). A frame is (number, where its pixels'
# entries begin, its first electron).


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _write_symbol(run, symbol, symbols, writes, scratch):  # type: ignore[no-untyped-def]
    """Write a symbol; the 32 bits that were written first are moved away where there are more than 39."""
    u = np.uint64
    x, count, o, state, left, here, gap = run
    entry = symbols[symbol]
    bits = (state + (entry & u(0xFFFFFFFF))) >> u(16)
    x = (x << bits) | (state & _mask(bits))
    state = u(writes[((state + u(1 << STATE_BITS)) >> bits) + (entry >> u(32)) - u(1 << STATE_BITS)])
    count += np.int64(bits)
    full = np.int64(count >= 40)
    scratch[o - u(1)] = np.uint32(x >> u((count - 32) & 63))
    count -= full << np.int64(5)
    return x & _mask(u(count)), count, o - u(full), state, left, here, gap


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _write_rarely(run, symbols, writes, escape, scratch, top):  # type: ignore[no-untyped-def]
    """Write a gap that may need escapes; take the last word back where few bits are in hand."""
    gap = run[6]
    escapes = gap // escape
    run = _write_symbol(run, gap - escapes * escape, symbols, writes, scratch)
    for _ in range(escapes):
        run = _write_symbol(run, escape, symbols, writes, scratch)
    return _take_back(run, scratch, top)


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _take_back(run, scratch, top):  # type: ignore[no-untyped-def]
    """Have at least _FLOOR bits in hand; below the word written first there are zeros."""
    u = np.uint64
    x, count, o, state, left, here, gap = run
    if count < np.int64(_FLOOR):
        if o < top:
            x |= u(scratch[o]) << u(count)
            o += u(1)
        count += np.int64(32)
    return x, count, o, state, left, here, gap


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _take_tick(x, count, here, again):  # type: ignore[no-untyped-def]
    """The electron's tick, chosen by the bits written last; then its place in the group is written."""
    u = np.uint64
    log_ticks = (here >> u(32)) & u(15)
    first = (here & u(0xFFFFFFFF)) + (((u(1) << log_ticks) >> u(1)) & (u(0) - again))
    log_ticks -= again
    tick = first + ((x - first) & _mask(log_ticks))
    raw = (here >> u(36)) & u(15)
    x = ((x >> log_ticks) << raw) | (here >> u(40))
    return x, count + np.int64(raw) - np.int64(log_ticks), tick


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _middle(here):  # type: ignore[no-untyped-def]
    u = np.uint64
    return (here & u(0xFFFFFFFF)) + ((u(1) << ((here >> u(32)) & u(15))) >> u(1))


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _place_next(run, row, index, pixel):  # type: ignore[no-untyped-def]
    """Choose the tick of an electron that is not the first one of its frame; the gap is to be written."""
    u = np.uint64
    x, count, o, state, left, here, _ = run
    before = pixel[row + u(index[left - u(2)])]
    middle = _middle(before)
    again = u(before == here) & u(middle != (before & u(0xFFFFFFFF)))
    x, count, tick = _take_tick(x, count, here, again)
    return x, count, o, state, left - u(1), before, tick - middle


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _place_first(run, frame, first_frame, stop, indptr, index, labels, pixel, begin, end, pixels):  # type: ignore[no-untyped-def]
    """The same for the first electron of a frame; goes to the frame of the electron before."""
    u = np.uint64
    x, count, o, state, left, here, gap = run
    number = frame[0]
    x, count, tick = _take_tick(x, count, here, u(0))
    gap = tick - begin[labels[number]]
    left -= u(1)
    while number > first_frame and (left == stop or u(indptr[number]) == left):
        number -= u(1)
        gap += end[labels[number]] - begin[labels[number]]
    row = u(labels[number]) * pixels
    if left > stop:
        here = pixel[row + u(index[left - u(1)])]
        gap -= _middle(here) - begin[labels[number]]
    return (x, count, o, state, left, here, gap), (number, row, u(indptr[number]))


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _begin(r, indptr, index, edges, labels, pixel, pixels, place):  # type: ignore[no-untyped-def]
    u = np.uint64
    left, number = u(indptr[edges[r + 1]]), u(edges[r + 1] - 1)
    here, row = u(0), u(0)
    if left > u(indptr[edges[r]]):
        while u(indptr[number]) == left:
            number -= u(1)
        row = u(labels[number]) * pixels
        here = pixel[row + u(index[left - u(1)])]
    return (u(0), np.int64(_FLOOR), u(place[r + 1]), u(0), left, here, u(0)), (number, row, u(indptr[number]))


@numba.njit(cache=True, nogil=True, boundscheck=False, _nrt=False)
def _encode_runs(  # type: ignore[no-untyped-def]  # noqa: C901, PLR0912, PLR0915 - one loop nest, compiled
    indptr, index, edges, labels, pixel, begin, end, pixels_, symbols, writes, escape_, scratch, place, begins
):
    """Write each run backwards from the end of its room in ``scratch``, two at a time."""
    u = np.uint64
    escape, pixels = u(escape_), u(pixels_)
    runs = len(edges) - 1
    for r in range(0, runs, 2):
        other = min(r + 1, runs - 1)
        a_first, b_first = u(edges[r]), u(edges[other])
        a_stop, b_stop = u(indptr[edges[r]]), u(indptr[edges[other]])
        a_top, b_top = u(place[r + 1]), u(place[other + 1])
        a, a_frame = _begin(r, indptr, index, edges, labels, pixel, pixels, place)
        b, b_frame = _begin(other, indptr, index, edges, labels, pixel, pixels, place)
        if other == r:
            b_stop = b[4]
        while a[4] > a_stop and b[4] > b_stop:  # both at once, until one leaves its frame
            away = 0
            for _ in range(min(a[4] - a_frame[2], b[4] - b_frame[2]) - u(1)):
                a = _place_next(a, a_frame[1], index, pixel)
                if a[6] >= escape:
                    away = 1
                    break
                a = _write_symbol(a, a[6], symbols, writes, scratch)
                b = _place_next(b, b_frame[1], index, pixel)
                if b[6] >= escape:
                    away = 2
                    break
                b = _write_symbol(b, b[6], symbols, writes, scratch)
                if min(a[1], b[1]) < _FLOOR:
                    away = 3
                    break
            if away == 1:
                a = _write_rarely(a, symbols, writes, escape, scratch, a_top)
            elif away == 2:
                b = _write_rarely(b, symbols, writes, escape, scratch, b_top)
            elif away == 0:
                if a[4] - u(1) == a_frame[2]:
                    a, a_frame = _place_first(
                        a, a_frame, a_first, a_stop, indptr, index, labels, pixel, begin, end, pixels
                    )
                    a = _write_rarely(a, symbols, writes, escape, scratch, a_top)
                else:
                    b, b_frame = _place_first(
                        b, b_frame, b_first, b_stop, indptr, index, labels, pixel, begin, end, pixels
                    )
                    b = _write_rarely(b, symbols, writes, escape, scratch, b_top)
            a = _take_back(a, scratch, a_top)
            b = _take_back(b, scratch, b_top)
        for now in range(r, other + 1):  # what is left of each
            run, frame, first, stop, top = a, a_frame, a_first, a_stop, a_top
            if now > r:
                run, frame, first, stop, top = b, b_frame, b_first, b_stop, b_top
            while run[4] > stop:
                if run[4] - u(1) > frame[2]:
                    run = _place_next(run, frame[1], index, pixel)
                else:
                    run, frame = _place_first(run, frame, first, stop, indptr, index, labels, pixel, begin, end, pixels)
                run = _write_rarely(run, symbols, writes, escape, scratch, top)
            count = run[1] + np.int64(STATE_BITS)
            x = (run[0] << u(STATE_BITS)) | run[3]
            o = run[2]
            if count >= 40:
                scratch[o - u(1)] = np.uint32(x >> u(count - 32))
                count -= np.int64(32)
                o -= u(1)
            x = ((x << u(1)) | u(1)) << u(63 - count)
            scratch[o - u(1)] = np.uint32(x >> u(32))
            scratch[o - u(2)] = np.uint32(x & u(0xFFFFFFFF))
            begins[now] = np.int64(o) * 4 - ((count + 8) >> 3)
