"""Electron events near their Poisson entropy, with one static table for every pattern.

Measured in cumulative expected counts, the gaps between the electrons of a Poisson process are unit exponentials
whatever the pattern (time rescaling: E. N. Brown et al., Neural Comput. 14, 325 (2002),
doi:10.1162/08997660252741149). Each pixel is given a whole number of *ticks* in proportion to its expected count, so
that in ticks all gaps have one geometric distribution, which no frame's beginning or end disturbs. Its upper part is
coded by range asymmetric numeral systems (J. Duda, arXiv:1311.2540) with a static table, its lower bits are raw.

Which of its pixel's ticks an electron takes does not matter; the encoder lets the numeral system choose it by
*decoding* a uniform number from what was written so far, and the decoder writes that number back ("bits back"), so a
bright pixel's many ticks cost nothing. All numbers of ticks divide the lower bound of the coder's state; then both
sides know from the state alone when a word was moved.

After an electron in a pixel of t ticks the next gap is counted from about the pixel's middle; so a second electron
of the same pixel has the Poisson chance of half the pixel's expected count.

Frames are grouped into runs, which are coded independently: four are decoded at a time, and a single frame needs only
its run.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

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
_ODD = (1, 3, 5, 7, 9, 15, 21, 35, 45, 63, 105, 315)
#: Ticks that a pixel may have: the divisors of BOUND up to 2^15 whose larger half is a divisor too.
TICKS = np.array(
    [t for t in sorted(odd << a for odd in _ODD for a in range(16)) if t <= 2**15 and BOUND % (t - t // 2) == 0]
)
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
    """What both sides know of a pattern: ``grade`` (pixels,) of uint8, the place of each pixel's ticks in TICKS, and
    the raw bits below a symbol (the mean gap is MEAN 2^low_bits ticks)."""

    grade: NDArray[np.uint8]
    low_bits: int


def fit(total: NDArray[Any], frames: int) -> Model:
    """The model of ``frames`` frames whose sum is ``total`` (rows, columns).

    Where there are few electrons a pixel, the sum is smoothed and the ticks are powers of two: a model must not take
    more bytes than it saves."""
    counts = total.astype(np.float64)
    mean = counts.mean()
    if 0 < mean < 8:
        width = min(2 * math.ceil(math.sqrt(8 / mean)) // 2 + 1, *total.shape) if min(total.shape) > 1 else 1
        counts = uniform_filter(counts, width, mode="nearest")
    # a pixel without an electron is expected to have a part of one, the less the more frames there are
    expected = np.maximum(counts, min(0.3, mean + 1e-9)).ravel() / max(frames, 1)
    pixels = len(expected)
    fits = [k for k in range(MOST_LOW_BITS + 1) if expected.sum() * (MEAN << k) <= max(16 * pixels, 4096)]
    low_bits = fits[-1] if fits else 0
    wanted = np.clip(expected * (MEAN << low_bits), 1, min(MEAN << low_bits, int(TICKS[-1])))
    allowed = np.flatnonzero(TICKS & (TICKS - 1) == 0) if mean < 16 else np.arange(len(TICKS))
    edges = np.sqrt(TICKS[allowed][1:] * TICKS[allowed][:-1])
    return Model(allowed[np.searchsorted(edges, wanted)].astype(np.uint8), low_bits)


class Tables(NamedTuple):
    """A model ready for the kernels: ``pixel`` (whole,) of each tick; ``info`` (pixels,) first tick | ticks << 32."""

    info: NDArray[np.uint64]
    pixel: NDArray[Any]
    whole: int
    low_bits: int


def tables(model: Model) -> Tables:
    """The tables of ``model``; an impossible model is an IntegrityError."""
    if model.low_bits > MOST_LOW_BITS or len(model.grade) == 0 or int(model.grade.max()) >= len(TICKS):
        raise IntegrityError("the model of an entropy-coded block is damaged; ask its sender for the block again.")
    ticks = TICKS[model.grade]
    first = np.concatenate([[0], np.cumsum(ticks)]) + 1  # tick 0 is no pixel's: there the frame begins
    number = np.arange(len(ticks))
    pixel = np.repeat(number.astype(index_dtype(len(ticks))), ticks + (number == 0))
    info = first[:-1].astype(np.uint64) | ticks.astype(np.uint64) << np.uint64(32)
    return Tables(info, pixel, int(first[-1]), model.low_bits)


def _slots() -> tuple[NDArray[np.uint32], NDArray[np.uint64], NDArray[np.uint64]]:
    """For each slot symbol | slots of the symbol << 8 | number among them << 16; for each symbol slots, first slot."""
    number = static_table()
    start = np.concatenate([[0], np.cumsum(number)[:-1]])
    symbol = np.repeat(np.arange(len(number)), number)
    inside = np.arange(1 << TABLE_BITS) - start[symbol]
    return (
        (symbol | number[symbol] << 8 | inside << 16).astype(np.uint32),
        number.astype(np.uint64),
        start.astype(np.uint64),
    )


_SLOTS, _NUMBER, _START = _slots()


def run_frames(events: EventBlock) -> int:
    """Frames a run."""
    return max(1, min(events.frames, round(RUN_EVENTS * events.frames / max(len(events.index), 1))))


def encode(events: EventBlock, model: Model, per_run: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """``(words, ends)`` of events without counts apart: the words of all runs, and where each run's begin (runs + 1,).

    A run's first two words are its state (low word first)."""
    table = tables(model)
    begins = events.indptr[run_edges(events.frames, per_run)]
    runs = len(begins) - 1
    escapes = (
        table.whole * per_run // (ESCAPE << table.low_bits) // 4 + 16
    )  # an escape is less than a quarter of a word
    room = np.diff(begins) + escapes
    place = np.concatenate([[0], np.cumsum(room)])
    scratch = np.empty(int(place[-1]), np.uint32)
    used = np.zeros(runs, np.int64)
    _encode_runs(
        events.indptr,
        events.index,
        per_run,
        table.info,
        table.whole,
        table.low_bits,
        _NUMBER,
        _START,
        scratch,
        place,
        used,
    )
    ends = np.concatenate([[0], np.cumsum(used)])
    words = np.empty(int(ends[-1]), np.uint32)
    for run in range(runs):
        words[ends[run] : ends[run + 1]] = scratch[place[run + 1] - used[run] : place[run + 1]]
    return words, ends


def run_edges(frames: int, per_run: int) -> NDArray[np.int64]:
    """(runs + 1,): the first frame of each run, and the number of frames."""
    return np.minimum(np.arange(-(-frames // per_run) + 1) * per_run, frames)


def decode(
    words: NDArray[np.uint32],
    ends: NDArray[np.int64],
    sizes: NDArray[np.int64],
    model: Model,
    frames: int,
    per_run: int,
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """``(indptr, index)`` of what :func:`encode` wrote; ``sizes`` (runs,) are the electrons of each run."""
    table = tables(model)
    place = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    index = np.empty(int(place[-1]), index_dtype(len(model.grade)))
    indptr = np.zeros(frames + 1, np.int64)
    # an electron takes one word at most, so that damaged words cannot lead further than these zeros
    padded = np.concatenate([words, np.zeros(int(sizes.max(initial=0)) + 64, np.uint32)])
    good = _decode_runs(
        padded, ends, place, run_edges(frames, per_run), table.info, table.pixel, table.whole, table.low_bits, _SLOTS,
        indptr, index,
    )  # fmt: skip
    if not good:
        raise IntegrityError("an entropy-coded block does not end where it should; ask its sender for the block again.")
    return indptr, index


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _push(x, o, slots, start, low, low_bits, top, scratch):  # type: ignore[no-untyped-def]
    """Write one symbol and its low bits onto the state; a word leaves it first where it would grow too large."""
    u = np.uint64
    full = u(x >= slots * top)
    scratch[o - u(1)] = np.uint32(x & u(0xFFFFFFFF))
    o -= full
    x = ((x >> (full << u(5))) << low_bits) | low
    whole = x // slots
    return (whole << u(TABLE_BITS)) + (x - whole * slots) + start, o


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _put(run, i, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch):  # type: ignore[no-untyped-def]
    """Encode electron ``i`` of a run (state, place in scratch, frame of the electron, its info, first frame, first)."""
    u = np.uint64
    x, o, frame, here, first_frame, begin = run
    ticks = here >> u(32)
    first = here & u(0xFFFFFFFF)
    other = here
    base = first
    if i == u(indptr[frame]):  # the electron before is in a frame before
        if i == begin:
            base += (frame - first_frame) * whole
        else:
            later = frame
            while u(indptr[frame]) > i - u(1):
                frame -= u(1)
            other = info[index[i - u(1)]]
            base += (later - frame) * whole - (other & u(0xFFFFFFFF)) - (other >> u(33))
    else:
        other = info[index[i - u(1)]]
        base = first - (other & u(0xFFFFFFFF)) - (other >> u(33))
        if other == here:  # counted from this very pixel's middle
            base = u(0)
            ticks -= ticks >> u(1)
    rest = x // ticks
    far = base + (x - rest * ticks)
    high = far >> low_bits
    escapes = high // u(ESCAPE)
    symbol = high - escapes * u(ESCAPE)
    x, o = _push(rest, o, number[symbol], start[symbol], far & low_mask, low_bits, top, scratch)
    for _ in range(escapes):
        x, o = _push(x, o, number[ESCAPE], start[ESCAPE], u(0), u(0), top << low_bits, scratch)
    return x, o, frame, other, first_frame, begin


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _open(run, indptr, index, per_run, info, place):  # type: ignore[no-untyped-def]
    u = np.uint64
    first = u(run * per_run)
    stop = min(first + u(per_run), u(len(indptr) - 1))
    frame = stop - u(1)
    while frame > first and indptr[frame] == indptr[stop]:
        frame -= u(1)
    begin = u(indptr[first])
    end = u(indptr[stop])
    here = info[index[end - u(1)]] if end > begin else u(0)
    return (u(BOUND), u(place[run + 1]), frame, here, first, begin), end


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _finish(run, i, r, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch, place, used):  # type: ignore[no-untyped-def]
    """Encode what is left of a run and write its state."""
    while i > run[5]:
        i -= np.uint64(1)
        run = _put(run, i, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch)
    o = run[1] - np.uint64(2)
    scratch[o] = np.uint32(run[0] & np.uint64(0xFFFFFFFF))
    scratch[o + np.uint64(1)] = np.uint32(run[0] >> np.uint64(32))
    used[r] = place[r + 1] - np.int64(o)


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _encode_runs(indptr, index, per_run, info, whole_, low_bits_, number, start, scratch, place, used):  # type: ignore[no-untyped-def]
    """Write each run backwards from the end of its room in ``scratch``."""
    u = np.uint64
    whole, low_bits = u(whole_), u(low_bits_)
    low_mask = (u(1) << low_bits) - u(1)
    top = (u(BOUND) >> (u(TABLE_BITS) + low_bits)) << u(32)  # a symbol of n slots wants the state below n x top
    runs = len(used)
    fours = runs - runs % 4
    for r in range(0, fours, 4):  # four at a time: none waits for another one's divisions
        a, i = _open(r, indptr, index, per_run, info, place)
        b, j = _open(r + 1, indptr, index, per_run, info, place)
        c, k = _open(r + 2, indptr, index, per_run, info, place)
        d, m = _open(r + 3, indptr, index, per_run, info, place)
        for _ in range(min(i - a[5], j - b[5], k - c[5], m - d[5])):
            i -= u(1)
            j -= u(1)
            k -= u(1)
            m -= u(1)
            a = _put(a, i, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch)
            b = _put(b, j, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch)
            c = _put(c, k, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch)
            d = _put(d, m, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch)
        _finish(a, i, r, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch, place, used)
        _finish(b, j, r + 1, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch, place, used)
        _finish(c, k, r + 2, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch, place, used)
        _finish(d, m, r + 3, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch, place, used)
    for r in range(fours, runs):
        a, i = _open(r, indptr, index, per_run, info, place)
        _finish(a, i, r, indptr, index, info, whole, low_bits, low_mask, top, number, start, scratch, place, used)


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _get(run, place, words, info, pixel, whole, low_bits, low_mask, slots, indptr, index):  # type: ignore[no-untyped-def]
    """Decode one electron of a run: (state, tick that the next gap counts from, its word, frame, last frame)."""
    u = np.uint64
    x, tick, word, frame, last = run
    since = tick
    entry = u(slots[x & u((1 << TABLE_BITS) - 1)])
    symbol = entry & u(0xFF)
    x = ((entry >> u(8)) & u(0xFF)) * (x >> u(TABLE_BITS)) + (entry >> u(16))
    while symbol == u(ESCAPE):
        tick += u(ESCAPE) << low_bits
        if x < u(BOUND):
            x = (x << u(32)) | u(words[word])
            word += u(1)
        entry = u(slots[x & u((1 << TABLE_BITS) - 1)])
        symbol = entry & u(0xFF)
        x = ((entry >> u(8)) & u(0xFF)) * (x >> u(TABLE_BITS)) + (entry >> u(16))
    tick += (symbol << low_bits) + (x & low_mask)
    x >>= low_bits
    if tick >= whole:  # into the next frames
        since = u(0)
        while tick >= whole:
            tick -= whole
            if frame < last:
                frame += u(1)
                indptr[frame] = place
            else:  # only damaged words lead here
                tick = u(0)
    at = pixel[tick]
    index[place] = at
    here = info[at]
    base = here >> u(32)
    first = here & u(0xFFFFFFFF)
    middle = first + (base >> u(1))
    skipped = (base >> u(1)) if since >= first else u(0)  # counted from this very pixel's middle
    base -= skipped
    inside = tick - first - skipped
    x *= base
    need = u(x < u(BOUND))
    x = (x << (need << u(5))) + (u(words[word]) & (u(0) - need)) * base + inside
    return x, middle, word + need, frame, last


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _start(run, words, ends, place, edges, indptr):  # type: ignore[no-untyped-def]
    u = np.uint64
    word = u(ends[run])
    indptr[edges[run]] = place[run]
    x = u(words[word]) | u(words[word + u(1)]) << u(32)
    return x, u(0), word + u(2), u(edges[run]), u(edges[run + 1] - 1)


@numba.njit(cache=True, nogil=True, boundscheck=False, inline="always")
def _end(run, number, place, ends, indptr):  # type: ignore[no-untyped-def]
    """Frames after the last electron of a run are empty. Whether state and word are where the encoder began."""
    for frame in range(run[3] + np.uint64(1), run[4] + np.uint64(1)):
        indptr[frame] = place[number + 1]
    return run[0] == np.uint64(BOUND) and run[2] == np.uint64(ends[number + 1])


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _decode_runs(words, ends, place, edges, info, pixel, whole_, low_bits_, slots, indptr, index):  # type: ignore[no-untyped-def]
    u = np.uint64
    runs = len(ends) - 1
    good = True
    whole, low_bits = u(whole_), u(low_bits_)
    low_mask = (u(1) << low_bits) - u(1)
    indptr[len(indptr) - 1] = place[runs]
    fours = runs - runs % 4
    for r in range(0, fours, 4):  # four at a time: none waits for another one's multiplications and look-ups
        a = _start(r, words, ends, place, edges, indptr)
        b = _start(r + 1, words, ends, place, edges, indptr)
        c = _start(r + 2, words, ends, place, edges, indptr)
        d = _start(r + 3, words, ends, place, edges, indptr)
        i, j, k, m, n = u(place[r]), u(place[r + 1]), u(place[r + 2]), u(place[r + 3]), u(place[r + 4])
        for _ in range(min(j - i, k - j, m - k, n - m)):
            a = _get(a, i, words, info, pixel, whole, low_bits, low_mask, slots, indptr, index)
            b = _get(b, j, words, info, pixel, whole, low_bits, low_mask, slots, indptr, index)
            c = _get(c, k, words, info, pixel, whole, low_bits, low_mask, slots, indptr, index)
            d = _get(d, m, words, info, pixel, whole, low_bits, low_mask, slots, indptr, index)
            i += u(1)
            j += u(1)
            k += u(1)
            m += u(1)
        for p in range(i, place[r + 1]):
            a = _get(a, u(p), words, info, pixel, whole, low_bits, low_mask, slots, indptr, index)
        for p in range(j, place[r + 2]):
            b = _get(b, u(p), words, info, pixel, whole, low_bits, low_mask, slots, indptr, index)
        for p in range(k, place[r + 3]):
            c = _get(c, u(p), words, info, pixel, whole, low_bits, low_mask, slots, indptr, index)
        for p in range(m, place[r + 4]):
            d = _get(d, u(p), words, info, pixel, whole, low_bits, low_mask, slots, indptr, index)
        good &= _end(a, r, place, ends, indptr) and _end(b, r + 1, place, ends, indptr)
        good &= _end(c, r + 2, place, ends, indptr) and _end(d, r + 3, place, ends, indptr)
    for r in range(fours, runs):
        a = _start(r, words, ends, place, edges, indptr)
        for p in range(place[r], place[r + 1]):
            a = _get(a, u(p), words, info, pixel, whole, low_bits, low_mask, slots, indptr, index)
        good &= _end(a, r, place, ends, indptr)
    return good
