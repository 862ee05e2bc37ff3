"""How wide the columns of an image are, from its spectrum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, special

from stemloop.describe.finding import filters
from stemloop.describe.finding.gaussians import Floats, Image
from stemloop.describe.finding.noise import Noise

#: Standard deviations [nm] that a single atom's image can have; used only where the image shows no period.
_ATOM_SIGMA_NM = 0.04, 0.12
#: Widths [px] that are tried then, each by this factor wider than the one before, and the one where none is better.
_TRIED, _WIDER, _COLUMN_SIGMA_PX = (1.2, 5.5), 1.2, 2.5
#: Narrowest and widest Gaussian [px] that is looked for.
NARROWEST, WIDEST = 0.95, 12.0


class Scale(NamedTuple):
    """``width`` [px] of the columns, roughly; ``periodic`` if the image shows a lattice's sharp peaks."""

    width: float
    periodic: bool

    @property
    def width_of_all(self) -> float | None:
        """The width where there is no lattice: a support's waves would tell another."""
        return None if self.periodic else self.width


def scale_of(parts: Iterable[Image], noise: Noise, pixel_size_nm: float | None = None) -> Scale:
    """A first width of the columns from ``parts`` of an image, all of one shape: 1 / (2 pi) over the rms frequency of
    what stands out of the spectrum.

    Sharp peaks are judged against their ring, so shapes and slopes of the specimen do not count. An image of isolated
    Gaussians, whose spectrum is exp(-(2 pi w f)^2), has the rms frequency 1 / (2 pi w). The spectra of blocks are
    averaged (P. D. Welch, IEEE Trans. Audio Electroacoust. 15 (1967) 70, doi:10.1109/TAU.1967.1161901).
    """
    parts = list(parts)
    spectra = [_power(part, noise) for part in parts]
    power = np.mean([power for power, _ in spectra], axis=0)
    white = float(np.mean([white for _, white in spectra]))
    rows, half = power.shape
    down, across = np.meshgrid(np.fft.fftfreq(rows), np.fft.rfftfreq(2 * half - 2), indexing="ij")
    frequency = np.hypot(down, across)
    seen = (frequency > 1 / 64) & (frequency < 0.45)
    power, frequency = power[seen], frequency[seen]
    ring = np.round(frequency * min(rows, 2 * half - 2)).astype(int)
    independent = len(spectra)  # noise's power is distributed as chi-square of twice as many degrees of freedom
    median = float(special.gammainccinv(independent, 0.5)) / independent
    chance = 1.5 * float(special.gammainccinv(independent, 0.01 / power.size)) / independent  # one image of a hundred
    sharp = np.maximum(power - chance * np.maximum(_medians(power, ring)[ring] / median, white), 0)
    aside = np.minimum(np.abs(across), np.abs(down))[seen] > 2 / min(
        rows, 2 * half - 2
    )  # lines of a scan are no lattice
    if sharp[aside].any():
        width = float(np.sqrt(sharp.sum() / (sharp * frequency**2).sum()) / (2 * np.pi))
        return Scale(min(max(width, NARROWEST), WIDEST), True)
    return scale_of_spots(parts, noise, pixel_size_nm)


def scale_of_spots(parts: list[Image], noise: Noise, pixel_size_nm: float | None = None) -> Scale:
    """The width at which bright spots stand out most from what is as often bright as dark: where the filtered image is
    most skewed."""
    low, high = (s / pixel_size_nm for s in _ATOM_SIGMA_NM) if pixel_size_nm else _TRIED
    low, high = min(max(low, NARROWEST), WIDEST), min(max(high, NARROWEST), WIDEST)
    tried = low * _WIDER ** np.arange(int(np.log(high / low) / np.log(_WIDER)) + 1)
    skewness = np.array([np.mean([_skewness(part, noise, width) for part in parts]) for width in tried])
    if skewness.max() < 0.1:
        return Scale(min(max(_COLUMN_SIGMA_PX, low), high), False)
    return Scale(float(tried[np.argmax(skewness > 0.75 * skewness.max())]), False)


def _skewness(part: Image, noise: Noise, width: float) -> float:
    step = max(1, int(width))
    z = filters.outstanding(part, noise.variance(filters.smooth(part, width)), width)[::step, ::step]
    return float((z**3).mean() / (z**2).mean() ** 1.5)


def _power(part: Image, noise: Noise) -> tuple[Floats, float]:
    """Power spectrum of a part of an even number of columns, and the mean of white noise in it."""
    part = part[:, : part.shape[1] // 2 * 2]
    window = np.outer(np.hanning(part.shape[0]), np.hanning(part.shape[1])).astype(np.float32)
    mean = np.float32((part * window).sum(dtype=np.float64) / window.sum(dtype=np.float64))
    spectrum = fft.rfft2((part - mean) * window)
    white = float((noise.variance(part) * window**2).sum(dtype=np.float64))
    return (spectrum.real**2 + spectrum.imag**2).astype(np.float64), white


def _medians(value: Floats, ring: NDArray[np.int64]) -> Floats:
    """The median of ``value`` in each ring, by its number."""
    order = np.lexsort((value, ring))
    count = np.bincount(ring)
    start = np.cumsum(count) - count
    return np.asarray(value[order][np.minimum(start + count // 2, len(value) - 1)])
