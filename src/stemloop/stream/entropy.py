"""Electron events near their Poisson entropy, with one static table for every pattern.

Measured in cumulative expected counts, the gaps between the electrons of a Poisson process are unit exponentials
whatever the pattern (time rescaling: E. N. Brown et al., Neural Comput. 14, 325 (2002),
doi:10.1162/08997660252741149). Each pixel is given a whole number of *ticks* in proportion to its expected count, so
that in ticks all gaps have one geometric distribution, which no frame's beginning or end disturbs. Its upper part is
coded by range asymmetric numeral systems (J. Duda, arXiv:1311.2540) with a static table, its lower bits are raw.

Which of its pixel's ticks an electron takes does not matter; the encoder lets the numeral system choose it by
*decoding* a uniform number from what was written so far, and the decoder writes that number back ("bits back"), so a
bright pixel's many ticks cost nothing. All numbers of ticks divide the lower bound of the coder's state; then both sides
know from the state alone when a word was moved.

After an electron in a pixel of t ticks the next gap is counted from about the pixel's middle; so a second electron
of the same pixel has the Poisson chance of half the pixel's expected count.

Frames are grouped into runs, which are coded independently: four are decoded at a time, and a single frame needs only
its run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import IntegrityError
from stemloop.stream.events import EventBlock, index_dtype

#: The static table has 2^TABLE_BITS slots; the mean gap is MEAN of its symbols; symbol ESCAPE goes on for ESCAPE.
TABLE_BITS = 12
MEAN = 16
ESCAPE = 80
#: Most raw bits below a symbol.
MOST_LOW_BITS = 11
#: The state lies in [BOUND, BOUND 2^32); BOUND is a multiple of 2^(TABLE_BITS + MOST_LOW_BITS).
BOUND = 315 << 23
#: Ticks that a pixel may have: the divisors of BOUND up to 2^15.
TICKS = np.array(sorted(odd << a for odd in (1, 3, 5, 7, 9, 15, 21, 35, 45, 63, 105, 315) for a in range(16) if odd << a <= 2**15))
#: Events that a run should hold.
RUN_EVENTS = 16384


def static_table() -> NDArray[np.int64]:
    """(ESCAPE + 1,): how many of the 2^TABLE_BITS slots each symbol has; the last one is the escape."""
    symbol = np.arange(ESCAPE + 1)
    share = np.exp(-symbol / MEAN) * -np.expm1(-1 / MEAN)
    share[ESCAPE] = np.exp(-ESCAPE / MEAN)
    slots = np.maximum(np.rint(share * 2**TABLE_BITS), 1).astype(np.int64)
    slots[0] += 2**TABLE_BITS - slots.sum()
    return slots


class Model(NamedTuple):
    """What both sides know of a pattern: ``grade`` (pixels,) of uint8, the place of each pixel's ticks in TICKS, and the
    raw bits below a symbol (the mean gap is MEAN 2^low_bits ticks)."""

    grade: NDArray[np.uint8]
    low_bits: int


def fit(total: NDArray[Any], frames: int) -> Model:
    """The model of ``frames`` frames whose sum is ``total`` (rows, columns)."""
    counts = total.ravel().astype(np.float64)
    pixels = len(counts)
    # a pixel without an electron is expected to have a part of one, the less the more frames there are
    expected = (counts + 0.3 * (counts < 1)) / max(frames, 1)
    few = counts.sum() < 16 * pixels
    fits = [k for k in range(MOST_LOW_BITS + 1) if expected.sum() * (MEAN << k) <= max(64 * pixels, 256)]
    low_bits = fits[-1] if fits else 0
    wanted = np.clip(expected * (MEAN << low_bits), 1, min(MEAN << low_bits, int(TICKS[-1])))
    allowed = np.flatnonzero(TICKS & (TICKS - 1) == 0) if few else np.arange(len(TICKS))
    edges = np.sqrt(TICKS[allowed][1:] * TICKS[allowed][:-1])
    return Model(allowed[np.searchsorted(edges, wanted)].astype(np.uint8), low_bits)


class Tables(NamedTuple):
    """A model ready for the kernels. ``pixel`` (ticks >> shift,): the pixel in which a group of ticks begins; ``info``
    (pixels + 1,): first tick | ticks << 32 | ticks from the pixel's middle on << 48; ``slots``: the static table, for each slot
    symbol | slots << 8 | (slot - first slot) << 20."""

    info: NDArray[np.uint64]
    pixel: NDArray[Any]
    shift: int
    whole: int
    low_bits: int


def tables(model: Model) -> Tables:
    """The tables of ``model``; an impossible model is an IntegrityError."""
    if model.low_bits > MOST_LOW_BITS or len(model.grade) == 0 or int(model.grade.max()) >= len(TICKS):
        raise IntegrityError("the model of an entropy-coded block is damaged; ask its sender for the block again.")
    ticks = TICKS[model.grade]
    half = TICKS[np.searchsorted(TICKS, (ticks + 1) // 2, side="right") - 1]
    first = np.concatenate([[0], np.cumsum(ticks)])
    shift = int(ticks.min()).bit_length() - 1  # a group of ticks touches two pixels at most
    groups = (np.arange(((int(first[-1]) - 1) >> shift) + 1)) << shift
    pixel = (np.searchsorted(first, groups, side="right") - 1).astype(index_dtype(len(ticks)))
    info = first.astype(np.uint64)
    info[:-1] |= ticks.astype(np.uint64) << np.uint64(32)
    info[:-1] |= half.astype(np.uint64) << np.uint64(48)
    return Tables(info, pixel, shift, int(first[-1]), model.low_bits)


def _slots() -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    number = static_table()
    start = np.concatenate([[0], np.cumsum(number)[:-1]])
    symbol = np.repeat(np.arange(len(number)), number)
    inside = np.arange(1 << TABLE_BITS) - start[symbol]
    return (symbol | number[symbol] << 8 | inside << 20).astype(np.uint32), number, start


_SLOTS, _NUMBER, _START = _slots()


def run_frames(events: EventBlock) -> int:
    """Frames a run."""
    return max(1, min(events.frames, round(RUN_EVENTS * events.frames / max(len(events.index), 1))))


def encode(events: EventBlock, model: Model, per_run: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """``(words, ends)`` of events without counts apart: the words of all runs, and where each run's begin (runs + 1,).

    A run's first two words are its state (low word first)."""
    table = tables(model)
    runs = -(-events.frames // per_run)
    ends = np.zeros(runs + 1, np.int64)
    if not runs:
        return np.empty(0, np.uint32), ends
    longest = int(np.diff(events.indptr[np.minimum(np.arange(runs + 1) * per_run, events.frames)]).max())
    escapes = -(-table.whole * per_run // (ESCAPE << table.low_bits)) + 1
    scratch = np.empty(longest + escapes + 4, np.uint32)
    pieces = []
    for run in range(runs):
        first, stop = run * per_run, min((run + 1) * per_run, events.frames)
        used = _encode_run(
            events.indptr, events.index, first, stop, table.info, table.whole, table.low_bits, _NUMBER, _START, scratch
        )
        pieces.append(scratch[len(scratch) - used :].copy())
        ends[run + 1] = ends[run] + used
    return np.concatenate(pieces), ends


def decode(
    words: NDArray[np.uint32], ends: NDArray[np.int64], sizes: NDArray[np.int64], model: Model, frames: int, per_run: int
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """``(indptr, index)`` of what :func:`encode` wrote; ``sizes`` (runs,) are the electrons of each run."""
    table = tables(model)
    place = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    index = np.empty(int(place[-1]), index_dtype(len(model.grade)))
    indptr = np.empty(frames + 1, np.int64)
    padded = np.append(words, np.uint32(0))
    good = _decode_runs(
        padded, ends, place, frames, per_run, table.info, table.pixel, table.shift, table.whole, table.low_bits, _SLOTS,
        indptr, index,
    )  # fmt: skip
    if not good:
        raise IntegrityError("an entropy-coded block does not end where it should; ask its sender for the block again.")
    return indptr, index


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _encode_run(indptr, index, first, stop, info, whole, low_bits, number, start, scratch):  # type: ignore[no-untyped-def]
    """Write the run of frames ``first`` .. ``stop`` to the end of ``scratch``, backwards; returns the words used."""
    u = np.uint64
    bound, low, bits = u(BOUND), u(low_bits), u(TABLE_BITS)
    top = u(BOUND) >> (bits + low) << u(32)  # a symbol of n slots wants the state below n x top
    escape_top = u(number[ESCAPE]) * (u(BOUND) >> bits << u(32))
    low_mask = (u(1) << low) - u(1)
    x = bound
    o = len(scratch)
    frame = stop - 1
    i = indptr[stop] - 1
    begin = indptr[first]
    while i >= begin:
        while indptr[frame] > i:
            frame -= 1
        here = info[index[i]]
        ticks = (here >> u(32)) & u(0xFFFF)
        tick = here & u(0xFFFFFFFF)
        half = here >> u(48)
        gap = np.int64(0)
        if i > begin:
            before = frame
            while indptr[before] > i - 1:
                before -= 1
            if before == frame and index[i - 1] == index[i]:
                ticks = half  # counted from this very pixel's middle
                gap = -1
            else:
                other = info[index[i - 1]]
                middle = (other & u(0xFFFFFFFF)) + ((other >> u(32)) & u(0xFFFF)) - (other >> u(48))
                gap = np.int64(tick) + (frame - before) * whole - np.int64(middle)
        else:
            gap = np.int64(tick) + (frame - first) * whole
        inside = x % ticks
        x //= ticks
        far = u(inside) if gap == -1 else u(gap) + inside
        high = far >> low
        symbol = high % u(ESCAPE)
        slots = u(number[symbol])
        if x >= slots * top:
            o -= 1
            scratch[o] = np.uint32(x & u(0xFFFFFFFF))
            x >>= u(32)
        x = (x << low) | (far & low_mask)
        x = ((x // slots) << bits) + x % slots + u(start[symbol])
        for _ in range(high // u(ESCAPE)):
            slots = u(number[ESCAPE])
            if x >= escape_top:
                o -= 1
                scratch[o] = np.uint32(x & u(0xFFFFFFFF))
                x >>= u(32)
            x = ((x // slots) << bits) + x % slots + u(start[ESCAPE])
        i -= 1
    scratch[o - 1] = np.uint32(x >> u(32))
    scratch[o - 2] = np.uint32(x & u(0xFFFFFFFF))
    return len(scratch) - (o - 2)


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _step(run, words, last_word, info, pixel, shift, whole, low, low_mask, slots, indptr, index):  # type: ignore[no-untyped-def]
    """Decode one electron of a run (state, tick, pixel of the electron before, its word, its place, frame, last frame)."""
    u = np.uint64
    x, tick, before, word, place, frame, stop = run
    entry = u(slots[x & u((1 << TABLE_BITS) - 1)])
    symbol = entry & u(0xFF)
    x = ((entry >> u(8)) & u(0xFFF)) * (x >> u(TABLE_BITS)) + (entry >> u(20))
    while symbol == u(ESCAPE):
        tick += symbol << low
        more = x < u(BOUND)
        x = (x << u(32)) | u(words[word]) if more else x
        word = min(word + u(more), last_word)
        entry = u(slots[x & u((1 << TABLE_BITS) - 1)])
        symbol = entry & u(0xFF)
        x = ((entry >> u(8)) & u(0xFFF)) * (x >> u(TABLE_BITS)) + (entry >> u(20))
    tick += (symbol << low) | (x & low_mask)
    x >>= low
    while tick >= whole:  # into the next frame
        tick -= whole
        before = u(0xFFFFFFFFFFFF)
        if frame < stop:
            frame += u(1)
            indptr[frame] = place
        else:
            tick = u(0)
    at = u(pixel[tick >> shift])
    at += u((info[at + u(1)] & u(0xFFFFFFFF)) <= tick)
    here = info[at]
    ticks = (here >> u(32)) & u(0xFFFF)
    half = here >> u(48)
    middle = (here & u(0xFFFFFFFF)) + ticks - half
    same = at == before
    base = half if same else ticks
    inside = tick - (middle if same else here & u(0xFFFFFFFF))
    more = x * base < u(BOUND)
    x = (x << u(32)) | u(words[word]) if more else x
    word = min(word + u(more), last_word)
    index[place] = at
    return x * base + inside, middle, at, word, place + u(1), frame, stop


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _begin(run, words, ends, place, frames, per_run):  # type: ignore[no-untyped-def]
    u = np.uint64
    word = u(ends[run])
    x = u(words[word]) | u(words[word + u(1)]) << u(32)
    frame = u(run * per_run)
    return x, u(0), u(0xFFFFFFFFFFFF), word + u(2), u(place[run]), frame, u(min((run + 1) * per_run, frames) - 1)


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _end(run, place, indptr):  # type: ignore[no-untyped-def]
    """Frames after the last electron of a run are empty. Whether the state is where the encoder began."""
    frame = run[5]
    while frame < run[6]:
        frame += np.uint64(1)
        indptr[frame] = run[4]
    return run[0] == np.uint64(BOUND)


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _decode_runs(words, ends, place, frames, per_run, info, pixel, shift, whole, low_bits, slots, indptr, index):  # type: ignore[no-untyped-def]
    u = np.uint64
    runs = len(ends) - 1
    good = True
    shift_, whole_, low = u(shift), u(whole), u(low_bits)
    low_mask = (u(1) << low) - u(1)
    indptr[frames] = place[runs]
    for run in range(0, runs, 4):  # four at a time: none waits for another one's multiplications and look-ups
        number = min(4, runs - run)
        r1, r2, r3 = run + min(1, number - 1), run + min(2, number - 1), run + min(3, number - 1)
        for r in range(run, run + number):
            indptr[r * per_run] = place[r]
        a = _begin(run, words, ends, place, frames, per_run)
        b = _begin(r1, words, ends, place, frames, per_run)
        c = _begin(r2, words, ends, place, frames, per_run)
        d = _begin(r3, words, ends, place, frames, per_run)
        la, lb, lc, ld = u(ends[run + 1]), u(ends[r1 + 1]), u(ends[r2 + 1]), u(ends[r3 + 1])
        sa = place[run + 1] - place[run]
        sb, sc, sd = place[r1 + 1] - place[r1], place[r2 + 1] - place[r2], place[r3 + 1] - place[r3]
        common = min(min(sa, sb), min(sc, sd)) if number == 4 else 0
        for _ in range(common):
            a = _step(a, words, la, info, pixel, shift_, whole_, low, low_mask, slots, indptr, index)
            b = _step(b, words, lb, info, pixel, shift_, whole_, low, low_mask, slots, indptr, index)
            c = _step(c, words, lc, info, pixel, shift_, whole_, low, low_mask, slots, indptr, index)
            d = _step(d, words, ld, info, pixel, shift_, whole_, low, low_mask, slots, indptr, index)
        for _ in range(common, sa):
            a = _step(a, words, la, info, pixel, shift_, whole_, low, low_mask, slots, indptr, index)
        good &= _end(a, place, indptr)
        if number > 1:
            for _ in range(common, sb):
                b = _step(b, words, lb, info, pixel, shift_, whole_, low, low_mask, slots, indptr, index)
            good &= _end(b, place, indptr)
        if number > 2:
            for _ in range(common, sc):
                c = _step(c, words, lc, info, pixel, shift_, whole_, low, low_mask, slots, indptr, index)
            good &= _end(c, place, indptr)
        if number > 3:
            for _ in range(common, sd):
                d = _step(d, words, ld, info, pixel, shift_, whole_, low, low_mask, slots, indptr, index)
            good &= _end(d, place, indptr)
    return good
