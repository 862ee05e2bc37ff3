"""What stands still in all frames while the specimen moves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from stemloop.reduce.registration.canvas import Canvas
from stemloop.reduce.registration.content import Stack
from stemloop.reduce.registration.views import Floats, View


class Mean:
    """Running mean of the useful frames as they stand."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.total, self.count = np.zeros(shape), 0

    def add(self, frame: NDArray[Any], view: View) -> None:
        if not view.reason:
            self.total += np.nan_to_num(frame.astype(np.float64), posinf=0.0, neginf=0.0)
            self.count += 1


def standing(mean: Floats, count: int, stack: Stack, canvas: Canvas, places: list[Floats]) -> Floats | None:
    """What stands still: the cosine waves of the ``mean`` frame, beyond its noise, that the specimen at ``places`` does
    not explain. None if there are none, or if the specimen hardly moves."""
    if count < 4 or len(places) < 4 or np.ptp(np.array(places), axis=0).max() < 1:
        return None
    image, _ = canvas.mean(stack.noise)
    rows, columns = stack.shape
    expected = np.mean([canvas.window(image, place, stack.shape) for place in places], axis=0, dtype=np.float64)
    wave = fft.dctn(mean, norm="ortho")
    told = np.zeros_like(wave)
    told[:rows, :columns] = fft.dctn(expected, norm="ortho") * np.sqrt(stack.scale.prod())
    rest = wave - told
    slow = np.hypot(*np.meshgrid(np.arange(mean.shape[0]) / 12, np.arange(mean.shape[1]) / 12, indexing="ij")) < 2
    spread = float(np.median(np.abs(rest[~slow]))) / 0.6745
    # near to the lattice's own waves what is left may be the specimen's: subtracting it would move columns
    others = ndimage.maximum_filter(np.abs(told), 7) < np.abs(rest) / 4
    clear = (np.abs(rest) > 8 * spread) & others & ~slow
    if not clear.any():
        return None
    near = ndimage.binary_dilation(clear, np.ones((3, 3), bool)) & (np.abs(rest) > 2 * spread) & ~slow
    return np.asarray(fft.idctn(rest * near, norm="ortho"))
