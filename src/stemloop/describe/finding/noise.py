"""How noisy an image is, from the image: a variance that is a line in the intensity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stemloop.describe.finding import filters
from stemloop.describe.finding.gaussians import Image

#: The fourth difference: it passes only what changes from pixel to pixel, where no probe transfers anything.
_DIFFERENCE = np.array([1.0, -4.0, 6.0, -4.0, 1.0], np.float32) / np.float32(np.sqrt(70.0))
_BINS = 16


class Noise(NamedTuple):
    """Variance of the noise, ``gain * intensity + floor``, nowhere under ``least``."""

    gain: float
    floor: float
    least: float

    def variance(self, intensity: Image) -> Image:
        return np.maximum(np.float32(self.gain) * intensity + np.float32(self.floor), np.float32(self.least))

    def at(self, places: NDArray[np.int64], intensity: Image) -> Image:
        """The variance at ``places`` (n, 2) of the ``intensity`` (n,)."""
        return self.variance(intensity)


class Given(NamedTuple):
    """The variance of each pixel of a region, known beforehand: ``map`` (rows, columns)."""

    map: Image

    def variance(self, intensity: Image) -> Image:
        return self.map

    def at(self, places: NDArray[np.int64], intensity: Image) -> Image:
        return np.asarray(self.map[tuple(places.T)])


def noise_of(parts: Iterable[tuple[Image, NDArray[np.bool_]]]) -> Noise:
    """The noise of the ``parts`` of an image: their fourth differences along rows and columns, squared, against the
    intensity. Each part comes with which of its pixels were measured.

    What passes the filter has, at each pixel, the variance of the noise averaged with the squared filter; so it is
    compared with the intensity averaged likewise (after J. Immerkaer, Comput. Vis. Image Underst. 64 (1996) 300,
    doi:10.1006/cviu.1996.0060, with differences of higher order, so that narrow columns do not pass). Unlike
    ``core.noise``, which reads the spectrum of a whole image, this looks at parts with missing pixels.
    """
    seen, span = [], 0.0
    for part, measured in parts:
        if measured.all():
            square, local = _both(part, _DIFFERENCE) ** 2, _both(part, _DIFFERENCE**2)
            place = filters.smooth(part, 2.0)[2:-2, 2:-2]
            kept = np.zeros(square.shape, bool)
            kept[::2, ::2] = True  # every other pixel of every other row tells as much
        else:  # along rows alone, which fewer missing pixels spoil
            square, local = _along(part.T, _DIFFERENCE).T ** 2, _along(part.T, _DIFFERENCE**2).T
            place = filters.smooth(part, 2.0)[:, 2:-2]
            kept = _along((~measured.T).astype(np.float32), np.ones(5, np.float32)).T == 0
        seen.append(np.stack([place[kept], local[kept], square[kept]]))
        span = max(span, float(np.ptp(part)))
    place, local, square = np.concatenate(seen, axis=1).astype(np.float64)
    least = (1e-4 * span) ** 2
    if len(place) < 8 * _BINS:
        return Noise(0.0, max(float(square.mean()) if len(square) else 0.0, least), least)
    bins = np.array_split(np.argsort(place), _BINS)
    x = np.array([local[b].mean() for b in bins])
    y = np.array([square[b].mean() for b in bins])
    gain, floor = np.polyfit(x, y, 1, w=1 / np.maximum(y, least)) if np.ptp(x) > 0 else (0.0, 0.0)
    if gain <= 0 or gain * x[0] + floor <= 0:
        gain, floor = 0.0, float(y.mean())
    typical = float(gain * local.mean() + floor)
    return Noise(float(gain), float(floor) + least, max(0.05 * typical, least))


def _both(part: Image, kernel: Image) -> Image:
    """Correlation with ``kernel`` along both axes, where it fits."""
    return _along(np.ascontiguousarray(_along(part, kernel).T), kernel).T


def _along(part: Image, kernel: Image) -> Image:
    """Correlation with ``kernel`` along the first axis, where it fits."""
    size = len(part) - len(kernel) + 1
    out = kernel[0] * part[:size]
    for k in range(1, len(kernel)):
        out += kernel[k] * part[k : k + size]
    return np.asarray(out)
