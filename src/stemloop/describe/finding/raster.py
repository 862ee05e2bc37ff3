"""An image as it was given, checked, and cut into regions that fit into memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.describe.finding import filters
from stemloop.describe.finding.gaussians import Image

_SMALLEST_PX = 16
#: Pixels that are looked at together when an image is checked, and about the side of a region [px].
_STRIP, _REGION = 1 << 22, 1024
#: Grey levels are handed on as 0 to this.
_TOP = 1000.0
#: So many pixels at the very top, and so many times those just below it, are a saturated detector; if it is no more
#: than this share of all.
_SATURATED_LEAST, _SATURATED_TIMES, _SATURATED_MOST = 10, 2, 0.25
#: An image of which less than this share was measured is refused.
_MEASURED_LEAST = 0.25


class Region(NamedTuple):
    """A part of an image: ``pixels`` (float32, 0 to 1000, what was not measured filled in from around), which of them
    were ``measured`` and which ``saturated``, where its first pixel is (``offset``) and the rows and columns [px of the
    whole image] from ``begin`` up to ``end`` that are its own; what lies around belongs to other regions."""

    pixels: Image
    measured: NDArray[np.bool_]
    saturated: NDArray[np.bool_]
    offset: NDArray[np.float64]
    begin: NDArray[np.float64]
    end: NDArray[np.float64]


@dataclass(frozen=True)
class Raster:
    """An image that can be searched: its grey level is ``low + level / per``; ``ceiling`` is the level at which the
    detector saturated, infinite if it did not."""

    image: NDArray[Any]
    low: float
    per: float
    ceiling: float
    complete: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]

    def levels(self, part: tuple[slice, slice]) -> tuple[Image, NDArray[np.bool_]]:
        """The levels of a part of the image, and which of them were measured."""
        raw = np.asarray(self.image[part])
        if raw.dtype.kind == "f" and raw.dtype.itemsize <= 4:
            raw = raw.astype(np.float64)
        pixels = ((raw - self.low) * self.per).astype(np.float32)
        if self.complete:
            return pixels, np.ones(pixels.shape, bool)
        finite = np.isfinite(pixels)
        measured = finite & (pixels < self.ceiling)
        return (pixels if finite.all() else filters.filled(pixels, finite)), measured

    def regions(self, around: float) -> Iterator[Region]:
        """The image in regions of about 1024 px a side, each with ``around`` [px] more of the image around it."""
        counts = [max(1, round(n / _REGION)) for n in self.shape]
        cuts = [np.linspace(0, n, k + 1).astype(int) for n, k in zip(self.shape, counts, strict=True)]
        more = int(np.ceil(around))
        for i, j in itertools.product(*(range(k) for k in counts)):
            begin = np.array([cuts[0][i], cuts[1][j]])
            end = np.array([cuts[0][i + 1], cuts[1][j + 1]])
            first, last = np.maximum(begin - more, 0), np.minimum(end + more, self.shape)
            part = slice(first[0], last[0]), slice(first[1], last[1])
            pixels, measured = self.levels(part)
            saturated = pixels >= self.ceiling
            yield Region(pixels, measured, saturated, first.astype(float), begin.astype(float), end.astype(float))

    def sample(self, side: int, most: int) -> Iterator[tuple[Image, NDArray[np.bool_]]]:
        """Levels and what was measured of at most ``most`` blocks of ``side`` pixels, spread over the image."""
        for block in blocks(self.shape, side, most):
            yield self.levels(block)


def raster_of(image: Any) -> Raster:
    """Check an image of any real numbers, bright columns on dark.

    Raises
    ------
    InputError : not two-dimensional, too small, not numbers, mostly missing, or constant.
    """
    given = image if isinstance(image, np.ndarray) else np.asarray(image)
    if given.ndim == 3 and given.shape[2] in (3, 4) and min(given.shape[:2]) >= _SMALLEST_PX:
        raise InputError(
            f"this is a colour picture of the shape {given.shape}; atoms are measured in grey levels. If its channels "
            "are the same, give image[..., 0], else the mean, image[..., :3].mean(axis=2)."
        )
    if given.ndim != 2 or min(given.shape) < _SMALLEST_PX:
        raise InputError(
            f"atom columns are found in an image (rows, columns) of at least {_SMALLEST_PX} x {_SMALLEST_PX} px; "
            f"got the shape {given.shape}."
        )
    if given.dtype.kind not in "biuf":
        raise InputError(f"the image holds {given.dtype}; give real numbers.")
    if given.dtype.kind == "b":
        given = given.astype(np.uint8)
    low, high, missing = np.inf, -np.inf, 0
    for strip in _strips(given):
        finite = np.isfinite(strip)
        missing += strip.size - int(np.count_nonzero(finite))
        known = strip if finite.all() else strip[finite]
        if known.size:
            low, high = min(low, float(known.min())), max(high, float(known.max()))
    if missing > (1 - _MEASURED_LEAST) * given.size:
        raise InputError(f"{missing} of the image's {given.size} pixels are not finite; crop it to what was measured.")
    if high == low:
        raise InputError(f"all pixels of the image are {low:g}: there is nothing to find.")
    per = _TOP / (high - low) if np.isfinite(high - low) else 0.0
    if per == 0 or not np.isfinite(per):
        raise InputError(f"grey levels from {low:g} to {high:g} cannot be told apart; scale the image.")
    saturated = _saturated(given, low, high)
    ceiling = _TOP * (1 - 1e-6) if saturated else np.inf
    return Raster(given, low, per, ceiling, not saturated and not missing)


def _strips(image: NDArray[Any]) -> Iterator[NDArray[Any]]:
    rows = max(1, _STRIP // image.shape[1])
    for top in range(0, len(image), rows):
        yield np.asarray(image[top : top + rows])


def _saturated(image: NDArray[Any], low: float, high: float) -> bool:
    """Whether the brightest level holds far more pixels than those next to it: a detector or a file at its limit."""
    edge, second = high - 0.02 * (high - low), -np.inf
    top = 0
    for strip in _strips(image):
        bright = strip[strip >= edge]
        top += int(np.count_nonzero(bright == high))
    if not _SATURATED_LEAST <= top <= _SATURATED_MOST * image.size:
        return False
    for strip in _strips(image):
        below = strip[strip < high]
        second = max(second, float(below.max())) if below.size else second
    edge = min(edge, second)
    near = sum(int(np.count_nonzero((strip >= edge) & (strip < high))) for strip in _strips(image))
    return top > _SATURATED_TIMES * near


def blocks(shape: tuple[int, int], side: int, most: int) -> Iterator[tuple[slice, slice]]:
    """At most ``most`` blocks of ``side`` pixels (or the image's, if that is less), spread over ``shape``."""
    size = [min(n, side) for n in shape]
    starts = [np.linspace(0, n - m, -(-n // m)).astype(int) for n, m in zip(shape, size, strict=True)]
    places = list(itertools.product(*starts))
    for top, left in places[:: -(-len(places) // most)]:
        yield slice(top, top + size[0]), slice(left, left + size[1])
