"""Lines of a scan that are displaced along the fast axis: measured against what the others say, and set straight.

Each line of a frame is compared with the same line of an image that does not share its displacement: the mean of all
frames, or, for a single image of a crystal, the mean over the lattice's translations. Least squares give the line's own
displacement with its deviation; lines between rows of atoms say little. How far lines wander and how long they remember
it (a first-order autoregression) is fitted to all of them, and the displacements are smoothed accordingly (Kalman
filter and Rauch-Tung-Striebel smoother; H. E. Rauch, F. Tung and C. T. Striebel, AIAA J. 3 (1965) 1445,
doi:10.2514/3.3166).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from stemloop.core.errors import InputError
from stemloop.core.noise import noise_of, restored, stabilised
from stemloop.core.protocols import Frames
from stemloop.reduce.denoise import column_width, limited, repeated, translations
from stemloop.reduce.register import Registration, along_lines, average
from stemloop.reduce.registration.averaging import clear
from stemloop.reduce.shifting import remembered

Floats = NDArray[np.float64]

_SMALLEST = 16


@dataclass(frozen=True)
class LineShifts:
    """Displacements of scan lines along x: ``shift`` and ``sigma`` (rows,) or (n, rows) [px], NaN for outliers; their
    mean over a frame is zero (the frame's own shift is not in them).

    wander : standard deviation of a line's displacement [px] (0: no jitter is seen). memory : correlation of
    neighbouring lines.
    """

    shift: Floats
    sigma: Floats
    wander: float
    memory: float

    def __iter__(self) -> Any:
        return iter((self.shift, self.sigma))


def line_shifts(
    frames: Frames | NDArray[Any], registration: Registration | None = None, *, mean: NDArray[Any] | None = None
) -> LineShifts:
    """Measure how far each scan line is displaced along x.

    Parameters
    ----------
    frames : a stack (n, rows, columns) together with its ``registration``, or one image (rows, columns) of a lattice.
    registration : from :func:`stemloop.reduce.register.register`; needed for a stack.
    mean : the stack's average image if it is known already (NaN where nothing).

    Returns
    -------
    LineShifts : line r of a frame shows at x what the straight frame shows at ``x - shift[r]``. ``shift, sigma =
        line_shifts(...)`` works, too. The deviations include what the smoothing knows of the other lines; where lines
        say nothing they are as wide as the wander.

    Raises
    ------
    InputError : a stack without a registration, an image without a lattice, or too small.

    Notes
    -----
    From a single image only what differs from line to line is told from the specimen's own strain: a slow drift along
    the image looks like shear, and the lattice takes part of it. A displacement of whole lines along y is not
    identified.
    """
    if len(frames.shape) == 2:
        return _of_image(np.asarray(frames))
    if registration is None:
        raise InputError("line shifts of a stack are measured against its average: give its registration.")
    if len(frames.shape) != 3 or len(frames) != len(registration) or tuple(frames.shape[1:]) != registration.shape:
        raise InputError(
            f"the registration is of {len(registration)} frames of {registration.shape} px; got {frames.shape}."
        )
    n, rows = len(frames), registration.shape[0]
    image = average(frames, registration).image if mean is None else np.asarray(mean, dtype=np.float64)
    known = np.isfinite(image)
    filled = np.where(known, image, image[known].mean())
    expected = clear(filled, float(noise_of(image).variance(filled).mean()))
    used = np.flatnonzero(~registration.outlier)
    raw, sigma = np.full((n, rows), np.nan), np.full((n, rows), np.nan)
    for k in used.tolist():
        frame = np.asarray(frames[k], dtype=np.float64)
        if registration.pattern is not None:
            frame = frame - registration.pattern
        seen, there = _as_seen(expected, known, registration.shift[k])
        raw[k], sigma[k] = _against(frame, seen, there & np.isfinite(frame))
    wander, memory = _habit(raw[used], sigma[used])
    for k in used.tolist():
        raw[k], sigma[k] = _smoothed(raw[k], sigma[k], wander, memory)
    raw -= np.nanmean(raw, axis=1, keepdims=True) if len(used) == n else _row_mean(raw)
    return LineShifts(raw, sigma, wander, memory)


def _row_mean(values: Floats) -> Floats:
    finite = np.isfinite(values)
    return np.asarray((np.where(finite, values, 0).sum(axis=1) / np.maximum(finite.sum(axis=1), 1))[:, None])


def straightened(image: NDArray[Any], shift: NDArray[Any]) -> Floats:
    """The image (rows, columns) with each line moved back by its ``shift`` (rows,) [px] (NaN counts as zero).

    Lines are moved by their Fourier series, mirrored at the ends: nothing is blurred. What was beyond the border is
    NaN.
    """
    pixels = np.asarray(image, dtype=np.float64)
    lines = np.asarray(shift, dtype=np.float64)
    if pixels.ndim != 2 or lines.shape != (pixels.shape[0],):
        raise InputError(f"an image of {pixels.shape} px needs as many line shifts as rows; got {lines.shape}.")
    lines = np.where(np.isfinite(lines), lines, 0.0)
    place = np.arange(pixels.shape[1])[None, :] + lines[:, None]
    out = along_lines(pixels, lines)
    return np.where((place < -0.5) | (place > pixels.shape[1] - 0.5), np.nan, out)


def _of_image(image: NDArray[Any]) -> LineShifts:
    """Against the mean over the lattice's translations that lead to other lines; twice, the image straightened."""
    if image.ndim != 2 or min(image.shape) < _SMALLEST or image.dtype.kind not in "biuf":
        raise InputError(
            f"line shifts need an image (rows, columns) of at least {_SMALLEST} px a side; got {image.shape}."
        )
    pixels = image.astype(np.float64)
    if not np.isfinite(pixels).all():
        raise InputError("the image has pixels that are not finite; fill or crop them.")
    noise = noise_of(pixels)
    found = translations(pixels) if np.ptp(pixels) > 0 else np.zeros((0, 2))
    width = column_width(pixels)
    moves = found[np.abs(found[:, 0]) > 2 * width]
    if len(moves) < 2:
        raise InputError("the image shows no lattice: lines cannot be compared. Give a stack with its registration.")
    there = np.ones(pixels.shape, dtype=bool)
    shift, wander, memory = np.zeros(len(pixels)), 0.0, 0.0
    sigma = np.zeros(len(pixels))
    for _ in range(2):
        straight = along_lines(pixels, shift)
        seen = restored(repeated(stabilised(straight, noise), moves, width, own=False), noise)
        more, sigma = _against(straight, limited(seen, width), there)
        total = shift + more
        wander, memory = _habit(total[None], sigma[None])
        others = max(len(np.unique(np.rint(moves[:, 0] / (2 * width)))), 1)
        sigma = np.hypot(sigma, wander / np.sqrt(others))  # the lines that were averaged wander, too
        shift, sigma = _smoothed(total, sigma, wander, memory)
        shift = shift - shift.mean()
    return LineShifts(shift, sigma, wander, memory)


def _as_seen(image: Floats, known: NDArray[np.bool_], shift: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """The mean image as a frame of ``shift`` shows it, and where that is known."""
    rows, columns = image.shape
    seen = along_lines(along_lines(image, np.full(rows, -shift[1])).T, np.full(columns, -shift[0])).T
    whole = np.rint(shift).astype(int)
    there = np.zeros(image.shape, dtype=bool)
    inner = (slice(max(0, whole[0]), rows + min(0, whole[0])), slice(max(0, whole[1]), columns + min(0, whole[1])))
    outer = (slice(max(0, -whole[0]), rows - max(0, whole[0])), slice(max(0, -whole[1]), columns - max(0, whole[1])))
    there[inner] = ndimage.binary_erosion(known, np.ones((5, 5), bool))[outer]
    return seen, there


def _against(frame: Floats, seen: Floats, there: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """(rows,) displacement of each line of ``frame`` along x against ``seen``, and its deviation, by least squares with
    a free brightness and level a line; weighted by noise that grows with brightness."""
    value = frame - seen
    spread = np.polyfit(seen[there], value[there] ** 2, 1) if there.sum() > 100 else np.array([0.0, 1.0])
    middle = max(float((value[there] ** 2).mean()), 1e-300) if there.any() else 1.0
    variance = np.maximum(max(float(spread[0]), 0.0) * (seen - seen[there].mean()) + middle, 0.25 * middle)
    weight = there / variance
    shift = np.zeros(len(frame))
    sigma = np.full(len(frame), np.inf)
    moved = seen
    for _ in range(3):
        slope = -np.gradient(moved, axis=1)
        parts = np.stack([slope, moved, np.ones_like(moved)], axis=-1)
        normal = np.einsum("yxi,yx,yxj->yij", parts, weight, parts)
        scale = np.sqrt(np.maximum(np.einsum("yii->yi", normal), 1e-300))
        normal = normal / (scale[:, :, None] * scale[:, None, :]) + 1e-9 * np.eye(3)
        goal = np.einsum("yxi,yx->yi", parts, weight * (frame - moved)) / scale
        inverse = np.linalg.inv(normal)
        step = np.einsum("yj,yj->y", inverse[:, 0], goal) / scale[:, 0]
        sigma = np.sqrt(inverse[:, 0, 0]) / scale[:, 0]
        empty = scale[:, 0] < 1e-100
        step[empty], sigma[empty] = 0.0, np.inf
        # a step beyond what the line's own deviation and the linear range allow is halved away
        shift = np.clip(shift + np.clip(step, -1, 1), -4, 4)
        moved = along_lines(seen, -shift)
    return np.where(sigma < 1e6, shift, 0.0), np.minimum(sigma, 1e6)


def _habit(value: Floats, sigma: Floats) -> tuple[float, float]:
    """(wander, memory) of lines (n, rows), the likeliest under a first-order autoregression."""
    chosen = np.linspace(0, len(value) - 1, min(len(value), 12)).astype(int)
    value, sigma = value[chosen], sigma[chosen]
    good = sigma < 3
    if good.sum() < 20:
        return 0.0, 0.0

    def cost(parameters: Floats) -> float:
        wander, memory = float(np.exp(parameters[0])), float(np.tanh(parameters[1]))
        return -sum(_filtered(v, s, wander, memory)[2] for v, s in zip(value, sigma, strict=True))

    guess = np.sqrt(max(float(np.average(value[good] ** 2 - sigma[good] ** 2, weights=sigma[good] ** -4)), 1e-3))
    found = optimize.minimize(
        cost, [np.log(guess), 0.2], method="Nelder-Mead", options={"maxfev": 60, "xatol": 0.02, "fatol": 0.1}
    )
    wander, memory = float(np.exp(found.x[0])), float(np.tanh(found.x[1]))
    nothing = cost(np.array([np.log(1e-4), 0.0]))
    return (wander, memory) if found.fun < nothing - 3 else (0.0, 0.0)


def _filtered(value: Floats, sigma: Floats, wander: float, memory: float) -> tuple[Floats, Floats, float]:
    """Kalman filter of an autoregression: filtered mean and variance (rows,), and the log-likelihood."""
    mean, variance, likelihood = remembered(value, sigma**2, wander**2, memory)
    return mean, variance, float(likelihood)


def _smoothed(value: Floats, sigma: Floats, wander: float, memory: float) -> tuple[Floats, Floats]:
    """Each line's displacement given all of them, and its deviation."""
    if wander == 0:
        return np.zeros_like(value), np.zeros_like(value)
    mean, variance, _ = _filtered(value, sigma, wander, memory)
    out, spread = mean.copy(), variance.copy()
    for k in range(len(value) - 2, -1, -1):
        ahead = memory**2 * variance[k] + (1 - memory**2) * wander**2
        gain = memory * variance[k] / ahead
        out[k] = mean[k] + gain * (out[k + 1] - memory * mean[k])
        spread[k] = variance[k] + gain**2 * (spread[k + 1] - ahead)
    return out, np.sqrt(spread)
