"""The mean of registered frames, sharp and white."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from stemloop.core.errors import InputError
from stemloop.core.noise import noise_of
from stemloop.core.protocols import Frames
from stemloop.reduce.registration.views import Floats, Registration, checked

#: Pixels that were seen at least so often, or as often as any, tell how frames scatter, in so many bins of brightness.
_FEW, _BINS = 8, 16


@dataclass(frozen=True)
class Averaged:
    """The mean of registered frames: ``image`` (rows, columns) in the common frame, NaN where nothing was seen;
    ``weight`` (rows, columns) the number of frames that each pixel is made of; ``variance`` (rows, columns) of the
    noise of each pixel, NaN where nothing was seen."""

    image: Floats
    weight: Floats
    variance: Floats


def average(
    frames: Frames,
    registration: Registration,
    *,
    line_shift: NDArray[Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Averaged:
    """The mean of all frames that are no outliers, each moved back by its shift.

    Parameters
    ----------
    frames : as given to :func:`register`; read once. registration : its answer.
    line_shift : (n, rows) or (rows,) [px] how far each scan line is displaced along x on top of the frame's shift, as
        :func:`stemloop.reduce.scanlines.line_shifts` finds it (NaN counts as zero).
    progress : is called with (frames done, of).

    Returns
    -------
    Averaged : of the field of a frame of shift zero. Frames are moved by Fourier series of their lines, mirrored at the
        ends: nothing is blurred, and white noise stays white (only what oscillates from pixel to pixel, 0.5 / px, is
        lost). A pixel of ``weight`` w therefore has the variance of one frame over w, independent of its neighbours,
        and whatever is measured on the image has the deviations that white noise gives. Next to a frame's border, and
        next to pixels that are not finite, two pixels are left out. ``variance`` is a line in the intensity, fitted to
        how the frames scatter about the mean (lines that wander and shifts that are a little wrong scatter, too), over
        the weight. Counts of a bright pixel that fell between two pixels are shared with the dark ones beside it, so
        that the finest differences of the image tell less of how noise grows with brightness than the scatter does.
    """
    n, shape = checked(frames)
    if n != len(registration) or shape != registration.shape:
        raise InputError(
            f"the registration is of {len(registration)} frames of {registration.shape} px; got {n} of {shape}."
        )
    lines = np.zeros((n, shape[0]))
    if line_shift is not None:
        lines = np.array(np.broadcast_to(np.asarray(line_shift, dtype=np.float64), lines.shape))
        lines[~np.isfinite(lines)] = 0.0
    total, square, weight = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for k in np.flatnonzero(~registration.outlier).tolist():
        frame = np.asarray(frames[k], dtype=np.float64)
        if registration.pattern is not None:
            frame = frame - registration.pattern
        value, seen = placed(frame, registration.shift[k], lines[k])
        total += value
        square += value**2
        weight += seen
        if progress:
            progress(k + 1, n)
    with np.errstate(invalid="ignore", divide="ignore"):
        image = np.where(weight > 0, total / weight, np.nan)
        scatter = (square - weight * image**2) / (weight - 1)
    return Averaged(image, weight, _variance(image, scatter, weight))


def _variance(image: Floats, scatter: Floats, weight: Floats) -> Floats:
    """Of each pixel of a mean of ``weight`` frames (rows, columns), between which it varies by ``scatter``: a line in
    what the image is without its noise."""
    seen = weight > 0
    if not seen.any():
        return np.full(image.shape, np.nan)
    filled = np.where(seen, image, image[seen].mean())
    often = weight >= min(_FEW, weight.max())
    if weight.max() < 3:
        noise = noise_of(filled)
        gain, floor = (weight.max() * part for part in noise)
        mean = float(noise.variance(filled).mean())
    else:
        mean = float((scatter[often] / weight[often]).mean())
        gain = floor = 0.0
    level = clear(filled, mean)
    if weight.max() >= 3:
        parts = np.array_split(np.argsort(level[often]), min(_BINS, int(often.sum())))
        x, y = (np.array([of[often][part].mean() for part in parts]) for of in (level, scatter))
        if np.ptp(x) and y.max() > 0:
            relative = np.maximum(y / y.max(), 1e-12)
            gain, floor = y.max() * np.polyfit(x, y / y.max(), 1, w=1 / relative)
        if gain <= 0 or gain * x.min() + floor <= 0:
            gain, floor = 0.0, float(y.mean())
    single = gain * level + floor
    least = max(0.05 * float(single[seen].mean()), 1e-12 * float(np.ptp(filled)) ** 2)
    with np.errstate(divide="ignore"):
        return np.where(seen, np.maximum(single, least) / weight, np.nan)


def clear(image: Floats, variance: float) -> Floats:
    """An image (rows, columns) without the frequencies that drown in its noise of ``variance`` (a Wiener filter)."""
    spectrum = fft.dctn(image, norm="ortho")
    power = ndimage.uniform_filter(spectrum**2, 3)
    return np.asarray(fft.idctn(spectrum * np.maximum(1 - 1.5 * variance / np.maximum(power, 1e-300), 0), norm="ortho"))


def placed(frame: Floats, shift: Floats, line_shift: Floats | None = None) -> tuple[Floats, Floats]:
    """One frame moved back by its shift and its lines' own: (value, seen), value zero and seen 0 where it shows
    nothing.

    ``frame`` (rows, columns); ``shift`` (2,) [px]; ``line_shift`` (rows,) [px].
    """
    rows, columns = frame.shape
    across = np.full(rows, float(shift[1])) + (0.0 if line_shift is None else line_shift)
    finite = np.isfinite(frame)
    pixels = frame if finite.all() else np.where(finite, frame, frame[finite].mean() if finite.any() else 0.0)
    pixels = along_lines(pixels, across)
    pixels = along_lines(pixels.T, np.full(columns, float(shift[0]))).T
    seen = np.ones(frame.shape)
    if not finite.all():
        hole = ndimage.binary_dilation(~finite, np.ones((5, 5), bool)).astype(np.float64)
        hole = np.stack(
            [ndimage.shift(line, -a, order=1, mode="nearest") for line, a in zip(hole, across, strict=True)]
        )
        seen = (ndimage.shift(hole, (-float(shift[0]), 0), order=1, mode="nearest") < 0.01).astype(np.float64)
    # pixel x of the answer is pixel x + shift of the frame
    x = np.arange(columns)[None, :] + across[:, None]
    inside = ((x >= 2) & (x <= columns - 3)).astype(np.float64)
    y = np.arange(rows) + float(shift[0])
    inside = inside[np.clip(np.rint(y).astype(int), 0, rows - 1)] * ((y >= 2) & (y <= rows - 3))[:, None]
    seen = seen * inside
    return pixels * seen, seen


def along_lines(lines: Floats, shift: Floats) -> Floats:
    """(m, size) lines, each moved back by its own ``shift`` (m,): out[x] = line[x + shift], mirrored at the ends."""
    size = lines.shape[1]
    series = fft.rfft(np.concatenate([lines, lines[:, ::-1]], axis=1), axis=1)
    frequency = fft.rfftfreq(2 * size)
    series *= np.exp(2j * np.pi * frequency[None, :] * shift[:, None])
    return np.asarray(fft.irfft(series, 2 * size, axis=1)[:, :size])
