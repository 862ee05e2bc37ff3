"""Expected counts of a block's pixels, on a scale where electrons come at one rate: the models of :mod:`.entropy`.

A model divides a pattern into *groups*: 2^r neighbouring pixels that share one *tick*, or one pixel that has 2^c ticks.
A tick stands for about the same expected count everywhere, so that counted in ticks the electrons of all patterns come
alike (time rescaling: E. N. Brown et al., Neural Comput. 14, 325 (2002), doi:10.1162/08997660252741149). The division
is the one that makes code and model together shortest, found by dynamic programming (minimum description length:
J. Rissanen, Automatica 14, 465 (1978), doi:10.1016/0005-1098(78)90005-5).

Patterns vary over a scan. Where there are enough electrons, frames are sorted by likelihood among up to
MOST_MODELS models.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import IntegrityError
from stemloop.stream.events import EventBlock

#: A pixel has 2^0 .. 2^MOST_TICKS ticks; a tick has 2^0 .. 2^MOST_PIXELS pixels.
MOST_TICKS = 5
MOST_PIXELS = 12
#: A frame has about so many ticks, so that the tables stay in the processor's cache, ...
WANTED_TICKS = 8192
#: ... but the mean gap between electrons is between these numbers of ticks.
LEAST_GAP, MOST_GAP = 11, 90
#: What a group costs in the model [nats].
_GROUP_COST = 1.4
#: What it costs that the order of electrons in one tick is written, in electrons a tick [nats an electron].
_SAME_TICK_COST = 0.35
#: Models a block at most, the electrons that each of them needs, and the least electrons a frame.
MOST_MODELS, MODEL_ELECTRONS, MODEL_FRAME_ELECTRONS = 8, 500_000, 100
#: Frames are sorted by their counts in SIDE x SIDE regions of about as many electrons each.
SIDE = 8
_SAMPLE = 1024
#: A tick's entry: pixels of the group (log2) | ticks << 4 | (middle - tick + 31) << 7 | first pixel << 13.
TICKS_AT, MIDDLE_AT, PIXEL_AT = 4, 7, 13
_LEFT = 31


class Models(NamedTuple):
    """``groups``: one byte a group of all models in turn, c, or MOST_TICKS + r; ``labels`` (frames,): each frame's
    model; ``number`` of models; ``gap``: the mean gap is 2^(gap/8) ticks."""

    groups: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    number: int
    gap: int


class Tables(NamedTuple):
    """Models ready for the kernels: an entry for each tick of all models, where the ticks of each begin and end,
    and (pixels of all models,) first tick | log2 ticks << 32 | log2 pixels of the group << 36 | place in it << 40."""

    ticks: NDArray[Any]
    begin: NDArray[np.uint64]
    end: NDArray[np.uint64]
    pixel: NDArray[np.uint64]


def fit(events: EventBlock) -> Models:
    """Models of a block without counts apart."""
    frames, electrons = events.frames, len(events.index)
    pixels = events.shape[0] * events.shape[1]
    one = np.zeros(frames, np.uint8)
    if electrons == 0:
        return Models(_divide(np.zeros(pixels), 0.0, 1 / MOST_GAP)[0], one, 1, 0)
    gap = min(max(WANTED_TICKS * frames / electrons, LEAST_GAP), MOST_GAP)
    count = min(MOST_MODELS, 1 << int(math.log2(max(electrons / MODEL_ELECTRONS, 1))))
    if electrons < MODEL_FRAME_ELECTRONS * frames:
        count = 1
    labels = one if count == 1 else _sort(events, count)
    counts = np.zeros((count, pixels))
    _add_up(events.indptr, events.index, labels, counts)
    total = counts.sum(axis=0)[None]
    best = _models(total, one, gap, electrons)
    wider = gap
    while wider > 1:  # a bright pixel may want more ticks than it can have
        wider /= 2
        coarser = _models(total, one, wider, electrons)
        if coarser[1] >= best[1]:
            break
        best, gap = coarser, wider
    if count > 1:
        best = min(best, _models(counts, labels, gap, electrons), key=lambda found: found[1])
    return best[0]


def _models(counts: NDArray[np.float64], labels: NDArray[np.uint8], gap: float, electrons: int) -> tuple[Models, float]:
    """Models of the counts of each label's frames, and the length of the code with them [nats]."""
    frames = np.bincount(labels, minlength=len(counts)).astype(np.float64)
    rate = 1 / (gap * _scale(counts, frames, gap))
    divided = [_divide(own, number, rate) for own, number in zip(counts, frames, strict=True)]
    ticks = sum(number * _ticks(groups) for number, (groups, _) in zip(frames, divided, strict=True))
    share = frames[frames > 0] / frames.sum()
    cost = sum(cost for _, cost in divided) - frames.sum() * float(share @ np.log(share))
    cost += _SAME_TICK_COST * rate * electrons
    mean = max(ticks / electrons - 0.5, 1.0)
    models = Models(np.concatenate([g for g, _ in divided]), labels, len(counts), min(round(8 * math.log2(mean)), 320))
    return models, float(cost)


def _ticks(groups: NDArray[np.uint8]) -> int:
    return int(np.sum(1 << np.where(groups <= MOST_TICKS, groups, 0).astype(np.int64)))


def _scale(counts: NDArray[np.float64], frames: NDArray[np.float64], gap: float) -> float:
    """The factor within an octave by which ticks, rounded to powers of two, cost the least.

    A rate that is e^u times too high costs e^u - 1 - u nats an electron."""
    width = 1
    while counts.sum() < 32 * counts.size / width and 2 * width <= counts.shape[1]:
        width *= 2
    cut = counts.shape[1] - counts.shape[1] % width
    blocks = counts[:, :cut].reshape(len(counts), -1, width).sum(axis=2)[:, :: 1 + counts.size // 65536]
    expected = np.log2(np.maximum(blocks, 1) * gap / np.maximum(frames, 1)[:, None])
    parts = np.bincount((np.floor(expected * 32).astype(np.int64) % 32).ravel(), blocks.ravel(), 32)
    shifts = np.arange(-4, 4) / 8
    at = (np.arange(32) + 0.5) / 32 + shifts[:, None]
    off = (np.rint(at) - at) * math.log(2)
    return float(2 ** shifts[np.argmin((np.exp(off) - 1 - off) @ parts)])


def _sort(events: EventBlock, count: int) -> NDArray[np.uint8]:
    """(frames,): labels below ``count`` (a power of two) of frames whose patterns are alike.

    Poisson likelihoods of the counts in coarse regions, from a start along the principal components."""
    image = events[: -(-events.frames // 8)].total().astype(np.float64)
    cuts = [np.minimum((np.cumsum(side) / side.sum() * SIDE).astype(np.int64), SIDE - 1)
            for side in (image.sum(axis=1), image.sum(axis=0))]  # fmt: skip
    region = (cuts[0][:, None] * SIDE + cuts[1]).astype(np.uint8).ravel()
    coarse = np.zeros((events.frames, SIDE * SIDE), np.float32)
    _coarse(events.indptr, events.index, region, coarse)
    rng = np.random.default_rng(0)  # not every n-th frame: scans are periodic
    some = coarse[rng.choice(events.frames, min(_SAMPLE, events.frames), replace=False)]
    mean = some.mean(axis=0) + 1e-3
    spread = (some / np.maximum(some.sum(axis=1, keepdims=True), 1) - mean / mean.sum()) / np.sqrt(mean)
    components = np.linalg.eigh(spread.T @ spread)[1]
    labels = np.zeros(len(some), np.int64)
    for bit in range(count.bit_length() - 1):
        along = spread @ components[:, -1 - bit]
        labels = 2 * labels + (along > np.median(along))
    for _ in range(6):
        members = np.zeros((count, len(some)), np.float32)
        members[labels, np.arange(len(some))] = 1
        centres = members @ some + 20 * mean / mean.sum() + 1e-3
        likelihood = np.log(centres / centres.sum(axis=1, keepdims=True))
        labels = np.argmax(some @ likelihood.T, axis=1)
    chosen: NDArray[np.uint8] = np.argmax(coarse @ likelihood.T, axis=1).astype(np.uint8)
    return chosen


def tables(models: Models, pixels: int) -> Tables:
    """The tables of ``models``; impossible ones are an IntegrityError."""
    groups = models.groups
    good = len(groups) and int(groups.max()) <= MOST_TICKS + MOST_PIXELS
    sizes = np.where(groups <= MOST_TICKS, 0, groups.astype(np.int64) - MOST_TICKS)
    ends = np.cumsum(1 << sizes) if good else np.zeros(1, np.int64)
    last = np.searchsorted(ends, np.arange(1, models.number + 1) * pixels)
    if (
        not good
        or ends[-1] != models.number * pixels
        or not np.array_equal(ends[last], np.arange(1, models.number + 1) * pixels)
        or int(models.labels.max(initial=0)) >= models.number
    ):
        raise IntegrityError("the model of an entropy-coded block is damaged; ask its sender for the block again.")
    own = 1 << np.where(groups <= MOST_TICKS, groups, 0).astype(np.int64)
    end = np.cumsum(own)[last]
    ticks = np.empty(int(end[-1]), np.uint32 if pixels < 1 << (32 - PIXEL_AT) else np.uint64)
    pixel = np.empty(models.number * pixels, np.uint64)
    _lay_out(groups, pixels, ticks, pixel)
    return Tables(ticks, np.concatenate([[0], end[:-1]]).astype(np.uint64), end.astype(np.uint64), pixel)


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _lay_out(groups, pixels, ticks, pixel):  # type: ignore[no-untyped-def]
    t = 0
    p = 0
    for group in groups:
        c = int(group) if group <= MOST_TICKS else 0
        r = int(group) - MOST_TICKS if group > MOST_TICKS else 0
        middle = t + ((1 << c) >> 1)
        for at in range(t, t + (1 << c)):
            ticks[at] = (p % pixels) << PIXEL_AT | (middle - at + _LEFT) << MIDDLE_AT | c << TICKS_AT | r
        for place in range(1 << r):
            pixel[p + place] = t | c << 32 | r << 36 | place << 40
        t += 1 << c
        p += 1 << r


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _divide(counts, frames, rate):  # type: ignore[no-untyped-def]
    """``(groups, cost)``: the cheapest division of a pattern, whose electrons are ``counts`` in ``frames`` frames,
    into groups of ``rate`` electrons a tick; cost in nats."""
    pixels = len(counts)
    before = np.zeros(pixels + 1)
    for p in range(pixels):
        before[p + 1] = before[p] + counts[p]
    best = np.zeros(pixels + 1)
    choice = np.zeros(pixels, np.uint8)
    exposed = frames * rate
    log_rate, log_two = np.log(rate), np.log(2.0)
    for p in range(pixels - 1, -1, -1):
        least = np.inf
        for c in range(MOST_TICKS + 1):
            cost = best[p + 1] + exposed * (1 << c) - counts[p] * (log_rate + c * log_two)
            if cost < least:
                least = cost
                choice[p] = c
        for r in range(1, MOST_PIXELS + 1):
            n = 1 << r
            if p + n > pixels:
                break
            cost = best[p + n] + exposed - (before[p + n] - before[p]) * (log_rate - r * log_two)
            if cost < least:
                least = cost
                choice[p] = MOST_TICKS + r
        best[p] = least + _GROUP_COST
    groups = np.empty(pixels, np.uint8)
    number = 0
    p = 0
    while p < pixels:
        groups[number] = choice[p]
        p += 1 << (int(choice[p]) - MOST_TICKS if choice[p] > MOST_TICKS else 0)
        number += 1
    return groups[:number].copy(), best[0]


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _coarse(indptr, index, region, out):  # type: ignore[no-untyped-def]
    for f in range(len(indptr) - 1):
        for i in range(indptr[f], indptr[f + 1]):
            out[f, region[index[i]]] += np.float32(1)


@numba.njit(cache=True, nogil=True, boundscheck=False)
def _add_up(indptr, index, labels, out):  # type: ignore[no-untyped-def]
    for f in range(len(indptr) - 1):
        label = labels[f]
        for i in range(indptr[f], indptr[f + 1]):
            out[label, index[i]] += 1
