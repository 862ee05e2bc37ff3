"""From analogue frames of a direct detector to electron events, with thresholds measured from the frames themselves.

A pixel's value is dark level + normal noise, plus what passing electrons left there. The histogram's main peak gives
dark level and noise; what lies above it, the signal of an electron. A pixel whose value is above the threshold and not
below any of its eight neighbours (ties go to the one that comes first) is an electron; with ``centroid``, it is moved
to the nearest pixel of the centre of mass of the 3 x 3 signals about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from stemloop.core.errors import InputError
from stemloop.stream.events import EventBlock, index_dtype


@dataclass(frozen=True)
class Threshold:
    """What a detector's frames tell of it.

    dark, noise : mean and 1-sigma deviation of a pixel that no electron hit [detector units].
    signal, spread : mean and 1-sigma deviation of a hit pixel's value above ``dark`` [detector units]; both nan where
        there are too few electrons to tell.
    value : a pixel above it is counted [detector units].
    occupancy : share of the pixels that were hit.
    """

    dark: float
    noise: float
    signal: float
    spread: float
    value: float
    occupancy: float

    @property
    def false_rate(self) -> float:
        """Expected false counts a pixel: the chance that noise alone passes the threshold."""
        return float(ndtr((self.dark - self.value) / self.noise))

    @property
    def efficiency(self) -> float:
        """Expected share of the electrons that pass the threshold, if each leaves all its signal in one pixel."""
        return float(ndtr((self.dark + self.signal - self.value) / self.spread))


def measure(frames: NDArray[Any], false_rate: float = 1e-5) -> Threshold:
    """Dark level, noise and electron signal of analogue ``frames`` (n, rows, columns), most of whose pixels are empty.

    The dark peak is fitted from its lower side, which electrons do not reach: the quantiles 0.1587 and 0.5 of the empty
    pixels lie one sigma apart. The share of hit pixels, needed for these quantiles, is found in a few rounds. The
    threshold is the value that noise alone passes with the chance ``false_rate`` a pixel, or, where that
    is higher and the signal stands far out, the middle between noise and signal in units of their deviations.
    """
    if frames.ndim != 3 or frames.size < 10_000:
        raise InputError(f"a threshold is measured from at least 10000 pixels (n, rows, columns); got {frames.shape}.")
    if not 0 < false_rate < 0.1:
        raise InputError(f"false_rate is a chance a pixel, above 0 and below 0.1; got {false_rate}.")
    values = np.sort(np.asarray(frames, np.float64).ravel())
    if values[0] == values[-1] or not np.isfinite(values[[0, -1]]).all():
        raise InputError("these frames are constant or not finite; a threshold needs the noise of real frames.")
    empty, half_bin = 1.0, _half_bin(frames.dtype)
    for _ in range(20):
        middle, low = (_quantile(values, empty * share) for share in (0.5, float(ndtr(-1.0))))
        dark, noise = middle, max(math.sqrt(max((middle - low) ** 2 - half_bin**2 / 3, 0.0)), 1e-12 + half_bin / 2)
        hit = values[np.searchsorted(values, dark + 5 * noise) :]
        empty = 1 - len(hit) / len(values)
    occupancy = 1 - empty
    signal = spread = math.nan
    lowest = float(dark - ndtri(false_rate) * noise)
    value = lowest
    if len(hit) >= 50:
        signal = float(np.median(hit)) - dark
        spread = max(float(np.subtract(*np.quantile(hit, [0.75, 0.25]))) / (2 * ndtri(0.75)), noise)
        value = max(lowest, dark + signal * noise / (noise + spread))
    return Threshold(dark, noise, signal, spread, value, occupancy)


def count(frames: NDArray[Any], threshold: float, dark: float = 0.0, *, centroid: bool = False) -> EventBlock:
    """The electrons of analogue ``frames`` (n, rows, columns) as events.

    threshold : a pixel above it that is a local maximum is an electron [detector units].
    dark : level that is subtracted before centres of mass are taken [detector units].
    """
    frames = np.asarray(frames)
    if frames.ndim != 3 or frames.dtype.kind not in "uif" or min(frames.shape[1:]) < 1:
        raise InputError(f"analogue frames are real numbers (n, rows, columns); got {frames.dtype} {frames.shape}.")
    values = np.ascontiguousarray(frames, np.float32)
    hits = np.empty(len(values), np.int64)
    nothing = np.empty(0, index_dtype(values.shape[1] * values.shape[2]))
    _maxima(values, np.float32(threshold), np.float32(dark), centroid, hits, hits, nothing)
    indptr = np.concatenate([[0], np.cumsum(hits)])
    index = np.empty(int(indptr[-1]), nothing.dtype)
    if len(index):
        _maxima(values, np.float32(threshold), np.float32(dark), centroid, hits, indptr[:-1].copy(), index)
    if centroid:  # electrons may have changed places
        for first, stop in pairwise(indptr):
            index[first:stop].sort()
    return EventBlock(indptr, index, (values.shape[1], values.shape[2]), trusted=True)


def _half_bin(dtype: np.dtype[Any]) -> float:
    return 0.5 if dtype.kind in "ui" else 0.0


def _quantile(values: NDArray[np.float64], share: float) -> float:
    """Quantile of sorted values; values that stand together (whole numbers) are taken as spread over their bin."""
    place = share * len(values)
    value = values[min(int(place), len(values) - 1)]
    first, stop = np.searchsorted(values, value, "left"), np.searchsorted(values, value, "right")
    if stop - first < 0.001 * len(values):
        return float(value)
    return float(value - 0.5 + (place - first) / (stop - first))


@numba.njit(cache=True, nogil=True)
def _maxima(values, threshold, dark, centroid, hits, place, index):  # type: ignore[no-untyped-def]
    """Count the maxima of each frame into ``hits`` and, where ``index`` has room, write them from ``place`` on."""
    number, rows, columns = values.shape
    for f in range(number):
        found = 0
        for r in range(rows):
            for c in range(columns):
                v = values[f, r, c]
                if not v > threshold:
                    continue
                highest = True
                weight = 0.0
                down = 0.0
                right = 0.0
                for y in range(max(r - 1, 0), min(r + 2, rows)):
                    for x in range(max(c - 1, 0), min(c + 2, columns)):
                        w = values[f, y, x]
                        before = y < r or (y == r and x < c)
                        highest &= not (w > v or (w == v and before))
                        part = max(w - dark, 0.0)
                        weight += part
                        down += part * (y - r)
                        right += part * (x - c)
                if not highest:
                    continue
                if len(index):
                    y, x = r, c
                    if centroid and weight > 0:
                        y = r + int(np.rint(down / weight))
                        x = c + int(np.rint(right / weight))
                    index[place[f] + found] = y * columns + x
                found += 1
        hits[f] = found
