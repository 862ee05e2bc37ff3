"""The mean of registered frames, sharp and white."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from stemloop.core.errors import InputError
from stemloop.core.protocols import Frames
from stemloop.reduce.registration.views import Floats, Registration, checked


@dataclass(frozen=True)
class Averaged:
    """The mean of registered frames: ``image`` (rows, columns) in the common frame, NaN where nothing was seen;
    ``weight`` (rows, columns) the number of frames that each pixel is made of."""

    image: Floats
    weight: Floats


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
        next to pixels that are not finite, two pixels are left out.
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
    total, weight = np.zeros(shape), np.zeros(shape)
    for k in np.flatnonzero(~registration.outlier).tolist():
        frame = np.asarray(frames[k], dtype=np.float64)
        if registration.pattern is not None:
            frame = frame - registration.pattern
        value, seen = placed(frame, registration.shift[k], lines[k])
        total += value
        weight += seen
        if progress:
            progress(k + 1, n)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Averaged(np.where(weight > 0, total / weight, np.nan), weight)


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
