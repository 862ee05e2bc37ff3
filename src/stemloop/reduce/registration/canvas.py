"""A canvas that frames are summed on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from stemloop.reduce.registration.content import Stack
from stemloop.reduce.registration.views import Floats, Thin
from stemloop.reduce.shifting import REACH, moved

RIM = REACH


@dataclass
class Canvas:
    """Sums of frames, twice as wide as a view; the place p of a frame of shift s lies at ``p - s + half``.

    ``own``, ``own_weight``: sums over frames and pixels of the squares of what each frame added to ``odd`` and
    ``odd_weight``; what ``odd`` has beyond them repeats from frame to frame.
    """

    total: Thin
    weight: Thin
    odd: Thin
    odd_weight: Thin
    own: float = 0.0
    own_weight: float = 0.0

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> Canvas:
        wide = (2 * shape[0], 2 * shape[1])
        total, weight, odd, odd_weight = (np.zeros(wide, dtype=np.float32) for _ in range(4))
        return cls(total, weight, odd, odd_weight)

    def add(self, stack: Stack, k: int, place: Floats, sign: float = 1.0) -> None:
        """Put view ``k`` at ``place``, or take it away with ``sign`` -1."""
        whole, part = split(place)
        rows, columns = stack.shape
        top, left = (np.array(stack.shape) // 2 - whole).tolist()
        inner = (slice(RIM, rows - RIM), slice(RIM, columns - RIM))
        goal = (slice(top + RIM, top + rows - RIM), slice(left + RIM, left + columns - RIM))
        self.total[goal] += sign * shifted(stack.flat[k], -part)[inner]
        self.weight[goal] += np.float32(sign)
        odd, weight = (stack.taper * shifted(stack.odd[k], -part))[inner], (stack.taper**2)[inner]
        self.odd[goal] += sign * odd
        self.odd_weight[goal] += sign * weight
        self.own += sign * float((odd**2).sum())
        self.own_weight += sign * float((weight**2).sum())

    def repeating(self, rough: float) -> float:
        """Mean square a pixel of the odd things that come again in other frames, two deviations low, at least zero.

        ``rough``: variance of the product of two frames' odd things at a pixel, summed over its correlation.
        """
        pairs = float((self.odd_weight**2).sum(dtype=np.float64)) - self.own_weight
        if pairs < 1:
            return 0.0
        found = float((self.odd**2).sum(dtype=np.float64)) - self.own
        return max(found / pairs - 2 * float(np.sqrt(2 * rough / pairs)), 0.0)

    def mean(self, noise: float) -> tuple[Thin, Thin]:
        """The mean frame, zero where there is none, and where there is one (1 or 0).

        Of the mean those frequencies are kept that stand out of its noise (``noise`` is the variance of a pixel of one
        view), else the slopes of that noise would blur the places of frames that are compared with it.
        """
        there = (self.weight > 0.5).astype(np.float32)
        spectrum = fft.rfft2(self.total * there / np.maximum(self.weight, 1))
        noise_power = noise * float((there / np.maximum(self.weight, 1)).sum())
        power = ndimage.uniform_filter(np.abs(spectrum) ** 2, 3, mode="wrap")
        spectrum *= np.maximum(1 - 1.5 * noise_power / np.maximum(power, 1e-30), 0).astype(np.float32)
        return np.asarray(fft.irfft2(spectrum, self.total.shape) * there, dtype=np.float32), there

    def window(self, field_: Thin, place: Floats, shape: tuple[int, int]) -> Thin:
        """``field_`` of the canvas as a view of shift ``place`` would see it."""
        whole, part = split(place)
        top, left = (np.array(shape) // 2 - whole).tolist()
        pad = REACH
        wide = np.pad(field_, pad)
        cut = wide[top : top + shape[0] + 2 * pad, left : left + shape[1] + 2 * pad]
        return shifted(cut, part)[pad:-pad, pad:-pad]


def split(place: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The nearest whole pixels of a place, and the rest."""
    whole = np.rint(place).astype(np.int64)
    return whole, place - whole


def shifted(image: Thin, part: Floats, slope: int | None = None) -> Thin:
    """The image displaced by ``part`` of a pixel, or the slope of that."""
    return moved(image, (float(part[0]), float(part[1])), slope)
