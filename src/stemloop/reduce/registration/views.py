"""Words of registration, and frames as it sees them: no finer than their lattice is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from stemloop.core.errors import InputError
from stemloop.core.protocols import Frames

Floats = NDArray[np.float64]
Thin = NDArray[np.float32]

#: Largest side of a view [px].
_WIDEST = 448
_SMALLEST = 8


class View(NamedTuple):
    """A frame as registration sees it: ``image`` (rows, columns) at a coarser pixel, and why it is of no use (or
    an empty string)."""

    image: Thin
    reason: str


def view_shape(frames: Frames) -> tuple[int, int]:
    """How many pixels (rows, columns) a view needs: half as fine again as what the frames resolve.

    A few frames say where their mean power spectrum leaves its floor; 448 px a side at most.
    """
    n, shape = checked(frames)
    power, count = np.zeros(shape), 0
    for k in np.unique(np.linspace(0, n - 1, min(n, 12)).astype(int)):
        pixels = np.asarray(frames[k], dtype=np.float64)
        finite = np.isfinite(pixels)
        if finite.mean() < 0.9 or np.ptp(pixels[finite]) == 0:
            continue
        pixels = np.where(finite, pixels, pixels[finite].mean())
        power += fft.dctn(pixels - pixels.mean(), norm="ortho") ** 2 / pixels.var()
        count += 1
    sides = []
    for axis, size in enumerate(shape):
        edge = _edge(power.max(axis=1 - axis) if count else np.ones(size), count * shape[1 - axis])
        wanted = max(64, int(np.ceil(1.5 * edge)))
        sides.append(min(size, _WIDEST, 2 * int(fft.next_fast_len((wanted + 1) // 2, real=True))))
    return sides[0], sides[1]


def _edge(line: Floats, draws: int) -> int:
    """Index after the last of ``line`` (largest powers along a frequency) that noise alone does not explain."""
    tail = line[len(line) * 3 // 4 :]
    spread = np.median(np.abs(tail - np.median(tail))) / 0.6745
    above = np.flatnonzero(line > np.median(tail) + 6 * spread + 0.5 * np.median(tail))
    return int(above.max()) + 1 if len(above) and draws else len(line) // 2


def view_of(frame: NDArray[Any], shape: tuple[int, ...]) -> View:
    """A frame at ``shape`` (rows, columns) pixels: its cosine series cut off, so that nothing below is aliased.

    Pixels that are not finite, if they are few (under a tenth), are filled with the mean of their neighbours.
    """
    pixels = np.asarray(frame)
    nothing = np.zeros((shape[0], shape[1]), dtype=np.float32)
    pixels = pixels.astype(np.float64)
    finite = np.isfinite(pixels)
    share = float(finite.mean())
    if share < 0.9:
        return View(nothing, f"{100 * (1 - share):.0f} % of its pixels are not finite")
    if share < 1:
        known = ndimage.gaussian_filter(finite.astype(np.float64), 3.0)
        filled = ndimage.gaussian_filter(np.where(finite, pixels, 0.0), 3.0) / np.maximum(known, 1e-6)
        pixels = np.where(finite, pixels, filled)
    if np.ptp(pixels) == 0:
        return View(nothing, f"blank: all its pixels are {pixels.flat[0]:g}")
    top = float((pixels == pixels.max()).mean())
    if top > 0.2 and pixels.max() > 4 * max(float(np.median(pixels[pixels < pixels.max()])), 1e-30) - 3:
        levels = len(np.unique(pixels.ravel()[:: max(1, pixels.size // 4096)]))
        if levels > 4:
            return View(nothing, f"saturated: {100 * top:.0f} % of its pixels are at its largest value")
    series = fft.dctn(pixels, norm="ortho")[: shape[0], : shape[1]]
    gain = np.sqrt(shape[0] * shape[1] / pixels.size)
    return View((fft.idctn(series, norm="ortho") * gain).astype(np.float32), "")


def checked(frames: Frames) -> tuple[int, tuple[int, int]]:
    """Number and shape of the frames of a stack, or why it is none."""
    shape = tuple(frames.shape)
    if len(shape) != 3 or len(frames) == 0 or min(shape[1:]) < _SMALLEST:
        raise InputError(
            f"a stack is (frames, rows, columns) with at least one frame of {_SMALLEST} x {_SMALLEST} px; got {shape}."
        )
    if np.asarray(frames[0]).dtype.kind not in "biuf":
        raise InputError(f"the frames hold {np.asarray(frames[0]).dtype}; give real numbers.")
    return shape[0], (shape[1], shape[2])


class Shift(NamedTuple):
    """Where a frame lies: ``shift`` and ``sigma`` (2,) [px], the probability ``p`` that no other place is meant, and
    the ``reason`` if it is an outlier (then shift and sigma are NaN)."""

    shift: Floats
    sigma: Floats
    p: float
    reason: str


@dataclass(frozen=True)
class Reference:
    """What frames are registered to: sums over frames on a canvas twice as wide as a view; can be pickled.

    total, weight : (2 rows, 2 columns) of a view, of frames without their slow background. odd, odd_weight : the same
    of frames without the lattice's spots. passed : (rows, columns // 2 + 1) the frequencies that ``odd`` keeps.
    still : (rows, columns) of a view that does not move. scale : (2,) pixels of a frame a pixel of a view.
    noise : variance of a view's pixel. own, own_weight : sums of the squares of what each frame added to ``odd`` and
    ``odd_weight``.
    """

    shape: tuple[int, int]
    scale: tuple[float, float]
    total: Thin
    weight: Thin
    odd: Thin
    odd_weight: Thin
    passed: Thin
    still: Thin
    noise: float
    own: float
    own_weight: float


@dataclass(frozen=True)
class Registration:
    """Shifts of the ``n`` frames of a stack.

    shift : (n, 2) (row, col) [px]: frame k shows at place p what the common frame shows at ``p - shift[k]``; NaN for
        outliers. Gauge: the median of all shifts is zero. sigma : (n, 2) 1-sigma deviations [px], from the residuals
        (robust against uneven noise and lines that move together).
    p : (n,) probability that the frame is not a lattice vector, or anything else, away from the longest run of frames
        without a jump. Of a perfect crystal that jumps nobody can know: p is low there, and the average does not
        suffer, since the crystal repeats.
    outlier : (n,) bool. reason : for each outlier why it is one, else "".
    pattern : (rows, columns) what stands still in all frames while the specimen moves, such as lines of the scan (its
        mean is zero), or None. reference : what single frames can be registered to, see :func:`shift_of`.
    """

    shape: tuple[int, int]
    shift: Floats
    sigma: Floats
    p: Floats
    outlier: NDArray[np.bool_]
    reason: tuple[str, ...]
    pattern: Floats | None
    reference: Reference = field(repr=False)

    def __len__(self) -> int:
        return len(self.shift)
