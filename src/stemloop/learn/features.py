"""Counts to maps in which every diffraction disc is a peak, whatever its radius and dose.

The radius ``R`` of the discs is known (semiangle / wavelength). Three maps are made of a pattern of counts ``n`` with
``N`` incident electrons, each by one product in Fourier space (disc of radius ``R``: ``2 J1(2 pi k R)/(2 pi k R)``):

1. *intensity*: the square root of the fraction of electrons within a disc around each pixel;
2. *edge*: disc minus surrounding ring of the variance-stabilised counts ``2 sqrt(n + 3/8)`` (F. J. Anscombe, 1948,
   doi:10.1093/biomet/35.3-4.246), whose noise is the same everywhere: the matched filter of a disc's position
   (compare the sigmoidal templates of S. E. Zeltmann et al., 2020, doi:10.1017/S1431927620000975);
3. *counts edge*: the same filter on the plain counts, which loses nothing where most pixels hold no electron.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.special import j1

from stemloop.learn.geometry import PIXEL_PER_A, SIZE

MAPS = 3
_PADDED = 80
_RING_PX = 2.0
_SOFTEN_PX = 0.6
_RADIUS_STEP_PX = 0.02


def radius_px(semiangle_rad: NDArray[np.float64], wavelength_A: NDArray[np.float64]) -> NDArray[np.float64]:
    """Radius of the diffraction discs [canonical pixels]."""
    return np.asarray(semiangle_rad / wavelength_A / PIXEL_PER_A, dtype=np.float64)


def _disc(k: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    u = 2 * np.pi * k * radius
    return 2 * j1(u) / np.where(u > 0, u, 1.0) + (u == 0)


@functools.lru_cache(maxsize=512)
def _filter(steps: int) -> NDArray[np.float32]:
    """(2, rows, columns) transforms of disc, and disc minus ring, of radius ``steps`` times 0.02 px."""
    radius = max(steps, 1) * _RADIUS_STEP_PX
    k = np.hypot(fft.fftfreq(_PADDED)[:, None], fft.rfftfreq(_PADDED)[None, :])
    soft = np.exp(-2 * (np.pi * _SOFTEN_PX * k) ** 2)
    inner, outer = radius**2, (radius + _RING_PX) ** 2
    disc = _disc(k, radius) * soft
    wide = _disc(k, radius + _RING_PX) * soft
    ring = (outer * wide - inner * disc) / (outer - inner)
    return np.stack([disc, disc - ring]).astype(np.float32)


def _filters(radius: NDArray[np.float64]) -> NDArray[np.float32]:
    steps, back = np.unique(np.rint(radius / _RADIUS_STEP_PX).astype(int), return_inverse=True)
    known = np.stack([_filter(int(s)) for s in steps])
    return known if len(steps) == 1 else known[back]


def disc_maps(
    counts: NDArray[np.float32], radius: NDArray[np.float64], electrons: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Maps (n, 3, 64, 64) of canonical patterns ``counts`` (n, 64, 64) [electrons].

    ``radius`` (n,) [px] of the discs, ``electrons`` (n,) incident electrons. Row and column 0, which have no partner
    across the undiffracted beam, are not looked at.
    """
    filters = _filters(radius)
    disc, edge = filters[:, 0], filters[:, 1]
    area = (np.pi * radius**2)[:, None, None].astype(np.float32)
    dose = np.asarray(electrons, dtype=np.float32)[:, None, None]
    inside = counts.copy()
    inside[:, 0, :] = 0
    inside[:, :, 0] = 0
    stable = 2 * (np.sqrt(np.maximum(inside, 0) + 0.375) - np.sqrt(np.float32(0.375)))
    shape = (_PADDED, _PADDED)
    spectrum = fft.rfft2(inside, s=shape, axes=(1, 2))
    spectra = (spectrum * disc, fft.rfft2(stable, s=shape, axes=(1, 2)) * edge, spectrum * edge)
    fraction, edges, plain = (fft.irfft2(s, s=shape, axes=(1, 2))[:, :SIZE, :SIZE] for s in spectra)
    maps = np.empty((len(counts), MAPS, SIZE, SIZE), dtype=np.float32)
    maps[:, 0] = np.sqrt(np.maximum(fraction * area / dose, 0) + 1e-6)
    maps[:, 1] = edges * np.sqrt(area / dose)
    maps[:, 2] = np.arcsinh(30 * plain * area / dose)
    return maps


def condition(
    radius: NDArray[np.float64], electrons: NDArray[np.float64], wavelength_A: NDArray[np.float64]
) -> NDArray[np.float32]:
    """(n, 3) what is known of the beam: disc radius, log dose, log wavelength, each about -1 ... 1."""
    columns = [(radius - 5.5) / 3, (np.log10(electrons) - 5.25) / 1.25, np.log(wavelength_A / 0.033) / 0.5]
    return np.stack(columns, axis=1).astype(np.float32)
