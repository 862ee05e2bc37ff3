"""Counting electrons: mean intensities to frames of counts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Counting:
    """An electron-counting detector.

    psf_sigma_px : each electron lands displaced by a normal deviate of this rms a direction [px]; those that leave
        the frame are lost. efficiency : detected share of the electrons, 0 to 1. dark : mean false counts a pixel.
    """

    psf_sigma_px: float = 0.0
    efficiency: float = 1.0
    dark: float = 0.0

    def mean(self, intensity: NDArray[Any], electrons: float) -> NDArray[np.float64]:
        """Mean counts of ``intensity`` (rows, columns), the fraction of the beam a pixel, at ``electrons`` a frame."""
        spread = np.asarray(intensity, dtype=np.float64)
        if self.psf_sigma_px > 0:
            rows, columns = (_spread(n, self.psf_sigma_px) for n in spread.shape)
            spread = rows @ spread @ columns.T
        return spread * (electrons * self.efficiency) + self.dark

    def count(
        self, intensity: NDArray[Any], electrons: float, rng: np.random.Generator
    ) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Poisson counts (rows, columns); uint16, or uint32 where a pixel needs it.

        >>> Counting().count(np.array([[0.5, 0.0]]), 1000.0, np.random.default_rng(0)).dtype
        dtype('uint16')
        """
        return as_counts(rng.poisson(self.mean(intensity, electrons)))


def as_counts(counts: NDArray[np.int64]) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """``counts`` as uint16, or as uint32 where one is above 65535."""
    return counts.astype(np.uint16) if counts.max(initial=0) < 2**16 else counts.astype(np.uint32)


@functools.lru_cache(maxsize=8)
def _spread(n: int, sigma_px: float) -> NDArray[np.float64]:
    """(n, n): the probability that an electron of pixel j is counted in pixel i (it enters at the pixel's middle)."""
    edge = (np.arange(n)[:, None] - np.arange(n) - 0.5) / (sigma_px * math.sqrt(2))
    step = 1 / (sigma_px * math.sqrt(2))
    erf = np.vectorize(math.erf)
    return np.asarray((erf(edge + step) - erf(edge)) / 2)
