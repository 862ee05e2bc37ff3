"""What is made of an image for the eye only: it without noise, and strain straight from its fringes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.structure import Assignment
from stemloop.describe.strain import gpa
from stemloop.reduce.denoise import denoise

#: Strain maps are kept with at most so many pixels along a side; larger images have none, nor are they denoised.
_MOST_PX, _MOST_SIDE = 420, 4096


@dataclass(frozen=True)
class Fringes:
    """Strain by geometric phase analysis, thinned to what a page can show.

    values : (4, rows, columns) e_xx, e_yy, e_xy and the rotation [rad]; NaN where it is not known. sigma : (4,) their
    middle deviations. resolution_px : standard deviation [px of the image] of the Gaussian that averages.
    """

    values: NDArray[np.float32]
    sigma: NDArray[np.float64]
    resolution_px: float


def fringes(image: NDArray[np.float64], assignment: Assignment) -> Fringes:
    """Strain from the fringes of the largest lattice of ``image``, against its mean."""
    _small_enough(image)
    found = gpa(image, assignment)
    step = -(-max(image.shape) // _MOST_PX)
    maps = np.stack([found.e_xx, found.e_yy, found.e_xy, found.rotation])
    if not np.isfinite(maps).any():
        raise InputError("the fringes are too weak, or the image is too small, for a strain map.")
    middle = np.nanmedian(found.sigma.reshape(4, -1), axis=1)
    return Fringes(maps[:, step // 2 :: step, step // 2 :: step].astype(np.float32), middle, float(found.resolution_px))


def without_noise(image: NDArray[Any], method: str) -> NDArray[np.float32]:
    """``image`` denoised (``nlm`` or ``lattice``), to be looked at only."""
    _small_enough(image)
    return denoise(image, method=method).astype(np.float32)


def _small_enough(image: NDArray[Any]) -> None:
    if max(image.shape) > _MOST_SIDE:
        raise InputError(f"that is made of images up to {_MOST_SIDE} px along a side only; crop it.")
