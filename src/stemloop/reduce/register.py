"""Drift and jumps between the frames of a stack, also of a crystal, where every shift by a lattice vector looks alike.

A frame shows the specimen displaced: ``frame(p) = specimen(p - shift) + what stands still + noise``. The frames are
looked at no finer than their lattice is (``view_of``), and put one after the other, from the middle of the stack
outwards, onto a canvas that grows. Two questions are asked of each:

- Where does it fit? All maxima of the normalised correlation that are as good as the best one within the noise. On a
  crystal these are the translations of the lattice.
- Which of them is it? What is left of frame and canvas without the lattice's spots (vacancies, steps, borders, anything
  that does not repeat) gives each candidate a likelihood; the drift before it gives it a prior: near to where the last
  frames lead, or, with a small chance, anywhere.

Then all frames are asked again against all others (without themselves), the candidates of a whole stack are weighed
together (forward-backward sums over the chain of frames), and the places refined by least squares. What stands still
while the specimen moves, such as lines of the scan, is taken off before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from stemloop.core.errors import InputError
from stemloop.core.protocols import Frames
from stemloop.reduce.maps import MapRegistration, register_to_map
from stemloop.reduce.shifting import REACH, moved

__all__ = [
    "Averaged",
    "MapRegistration",
    "Reference",
    "Registration",
    "Shift",
    "View",
    "along_lines",
    "average",
    "placed",
    "register",
    "register_to_map",
    "shift_of",
    "view_of",
    "view_shape",
]

Floats = NDArray[np.float64]
Thin = NDArray[np.float32]

#: Largest side of a view [px].
_WIDEST = 448
_SMALLEST = 8
_RIM = REACH
#: Chance that a frame jumps instead of drifting on.
_JUMP = 0.01
#: A frame must share at least this part of its pixels with the others.
_OVERLAP = 0.25
_MOST_CANDIDATES = 48
_ROUNDS = 3
#: With more jumps than this frames are only asked one by one.
_MOST_RUNS = 40


class View(NamedTuple):
    """A frame as registration sees it: ``image`` (rows, columns) at a coarser pixel, and why it is of no use (or
    an empty string)."""

    image: Thin
    reason: str


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
    noise : variance of a view's pixel. odd_signal : mean square a pixel of what does
    not repeat, over the noise.
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
    odd_signal: float


@dataclass(frozen=True)
class Registration:
    """Shifts of the ``n`` frames of a stack.

    shift : (n, 2) (row, col) [px]: frame k shows at place p what the common frame shows at ``p - shift[k]``; NaN for
        outliers. Gauge: the median of all shifts is zero. sigma : (n, 2) 1-sigma deviations [px], from the residuals
        (robust against uneven noise and lines that move together). p : (n,) probability that the frame is not a
        lattice vector, or anything else, away. outlier : (n,) bool. reason : for each outlier why it is one, else "".
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


# ------------------------------------------------------------------------------------------------------- the call


def register(
    frames: Frames, *, views: Sequence[View] | None = None, progress: Callable[[int, int], None] | None = None
) -> Registration:
    """Find the shift of every frame of a stack.

    Parameters
    ----------
    frames : (n, rows, columns) of real numbers, at least one frame of 8 x 8 px; read one at a time, at most twice.
    views : what :func:`view_of` made of each frame with :func:`view_shape`'s shape, if that was done before, perhaps
        by other processes; the frames are then read only for what stands still.
    progress : is called with (steps done, of).

    Returns
    -------
    Registration : see there. Frames that are empty, not finite, saturated, or that match no others are outliers and
        say so. A frame more than half a field away from the middle one of the stack is one, too.

    Raises
    ------
    InputError : not a stack of equal images of real numbers, or no frame of any use.
    """
    n, shape = _checked(frames)
    steps = n * (2 + _ROUNDS)
    tell = progress or (lambda done, of: None)
    seen: list[View] = []
    mean = _Mean(shape)
    if views is None:
        coarse = view_shape(frames)
        for k in range(n):
            frame = np.asarray(frames[k])
            seen.append(view_of(frame, coarse))
            mean.add(frame, seen[-1])
            tell(k + 1, steps)
    else:
        seen = list(views)
        if len(seen) != n or any(v.image.shape != seen[0].image.shape for v in seen):
            raise InputError(f"{n} frames need as many views of one shape; got {len(seen)}.")
        for k in range(n if len(seen) == n else 0):
            mean.add(np.asarray(frames[k]), seen[k])
    reasons = _unlike([view.reason for view in seen], np.stack([view.image for view in seen]))
    good = np.flatnonzero([not reason for reason in reasons])
    if len(good) == 0:
        raise InputError(f"none of the {n} frames can be registered; the first: {reasons[0]}.")
    stack = _Stack(np.stack([seen[k].image for k in good]), shape)
    place = _grown(stack, lambda done: tell(n + done, steps))
    fits, chance, canvas = _agreed(stack, place, lambda done: tell(2 * n + done, steps))
    return _named(n, shape, good, reasons, stack, canvas, fits, chance, mean)


def shift_of(frame: NDArray[Any], reference: Reference, near: NDArray[Any] | None = None) -> Shift:
    """The shift of one frame against a finished reference, such as ``registration.reference``.

    ``near`` (2,) [px]: where the drift leads; without it every place that overlaps is as likely as any other.
    """
    pixels = np.asarray(frame)
    if pixels.shape != reference.shape:
        raise InputError(f"the reference is of frames of {reference.shape} px; got {pixels.shape}.")
    view = view_of(pixels, reference.still.shape)
    nothing = np.full(2, np.nan)
    if view.reason:
        return Shift(nothing, nothing, 0.0, view.reason)
    stack = _Stack(view.image[None], reference.shape, reference)
    canvas = _Canvas(reference.total, reference.weight, reference.odd, reference.odd_weight)
    scale = np.array(reference.scale)
    found = _candidates(stack, 0, canvas)
    weight = found.score.copy()
    if near is not None:
        weight += _prior(found.place - np.asarray(near) / scale, np.full(2, 2.0), stack.shape)
    chance = np.exp(weight - weight.max())
    best = int(weight.argmax())
    fit = _refined(stack, 0, canvas, found.place[best])
    if reason := _mismatch(fit, stack):
        return Shift(nothing, nothing, 0.0, reason)
    return Shift(fit.place * scale, fit.sigma * scale, float(chance[best] / chance.sum()), "")


# ---------------------------------------------------------------------------------------------------- first looks


def view_shape(frames: Frames) -> tuple[int, int]:
    """How many pixels (rows, columns) a view needs: half as fine again as what the frames resolve.

    A few frames say where their mean power spectrum leaves its floor; 448 px a side at most.
    """
    n, shape = _checked(frames)
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


def _checked(frames: Frames) -> tuple[int, tuple[int, int]]:
    shape = tuple(frames.shape)
    if len(shape) != 3 or len(frames) == 0 or min(shape[1:]) < _SMALLEST:
        raise InputError(
            f"a stack is (frames, rows, columns) with at least one frame of {_SMALLEST} x {_SMALLEST} px; got {shape}."
        )
    if np.asarray(frames[0]).dtype.kind not in "biuf":
        raise InputError(f"the frames hold {np.asarray(frames[0]).dtype}; give real numbers.")
    return shape[0], (shape[1], shape[2])


class _Mean:
    """Running mean of the useful frames as they stand."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.total, self.count = np.zeros(shape), 0

    def add(self, frame: NDArray[Any], view: View) -> None:
        if not view.reason:
            self.total += np.nan_to_num(frame.astype(np.float64), posinf=0.0, neginf=0.0)
            self.count += 1


def _unlike(reasons: list[str], views: Thin) -> list[str]:
    """Names the frames whose mean level is not of this stack: blank ones and floods."""
    good = np.array([not reason for reason in reasons])
    if good.sum() < 3:
        return reasons
    level = views.mean(axis=(1, 2))
    least = float(views[good].min())
    middle = float(np.median(level[good]))
    spread = float(np.median(np.abs(level[good] - middle))) / 0.6745
    out = list(reasons)
    for k in np.flatnonzero(good):
        away = abs(level[k] - middle) > 8 * spread
        if away and level[k] - min(least, 0.0) < 0.2 * (middle - min(least, 0.0)):
            out[k] = f"blank: its mean is {level[k]:.3g} where the others have {middle:.3g}"
        elif away and level[k] > 5 * abs(middle):
            out[k] = f"flooded: its mean is {level[k]:.3g} where the others have {middle:.3g}"
    return out


# ------------------------------------------------------------------------------------------------------ the stack


class _Stack:
    """Views made ready: ``flat`` (n, rows, columns) without slow background and without what stands still; ``odd``
    the same, tapered, without the lattice's spots. Shifts are in pixels of views here."""

    def __init__(self, views: Thin, frame_shape: tuple[int, int], like: Reference | None = None) -> None:
        n, rows, columns = views.shape
        self.frame_shape, self.shape = frame_shape, (rows, columns)
        self.scale = np.array(frame_shape) / np.array(self.shape)
        self.flat = np.stack([_flattened(view) for view in views])
        self.taper = _taper(rows)[:, None] * _taper(columns)[None, :]
        self.still = like.still if like else _still(self.flat, self.taper)
        self.flat -= self.still
        power = np.zeros((rows, columns // 2 + 1))
        for view in self.flat:
            power += np.abs(fft.rfft2(view * self.taper)) ** 2
        power /= n * float((self.taper**2).sum())
        self.noise = _floor(power)
        self.passed = like.passed if like else _between_spots(power, self.noise)
        self.odd = np.stack([fft.irfft2(fft.rfft2(v * self.taper) * self.passed, self.shape) for v in self.flat])
        open_ = self.passed > 0.3 * self.passed.max()
        excess = float(np.median(power[open_])) / self.noise - 1  # a median: what is left of spots does not count
        self.odd_signal = like.odd_signal if like else float(np.clip(excess, 1e-3, 0.1))

    def __len__(self) -> int:
        return len(self.flat)


def _flattened(view: Thin) -> Thin:
    """Without the slow background: a Gaussian of a twelfth of the field."""
    pixels = view.astype(np.float32)
    return np.asarray(pixels - ndimage.gaussian_filter(pixels, np.array(pixels.shape) / 12.0, mode="reflect"))


def _taper(size: int) -> Thin:
    """One, falling to zero over a quarter of the length at either end as a raised cosine."""
    width = max(1, size // 4)
    rise = 0.5 - 0.5 * np.cos(np.pi * (np.arange(width) + 0.5) / width)
    line = np.ones(size, dtype=np.float32)
    line[:width], line[-width:] = rise, rise[::-1]
    return line


def _floor(power: Floats) -> float:
    """Power of the white noise: the median over the finest third of frequencies."""
    rows = np.abs(np.fft.fftfreq(power.shape[0]))[:, None]
    columns = np.fft.rfftfreq(2 * (power.shape[1] - 1) or 1)[None, : power.shape[1]]
    fine = np.hypot(rows, columns) > 0.42
    return float(max(np.median(power[fine]), 1e-12 * power.max(), 1e-30))


def _spots(power: Floats) -> NDArray[np.bool_]:
    """Where the mean power stands out from its surroundings by eight times."""
    whole = ndimage.median_filter(power, size=(11, 11), mode="nearest")
    return np.asarray(power > 8 * np.maximum(whole, np.median(power)))


def _between_spots(power: Floats, noise: float) -> Thin:
    """What keeps the frequencies between a lattice's spots, as fine as the specimen's image is."""
    spots = _spots(power)
    rows = np.fft.fftfreq(power.shape[0])[:, None]
    columns = np.fft.rfftfreq(2 * (power.shape[1] - 1))[None, :]
    radius = np.hypot(rows, columns)
    strong = spots & (power > 8 * noise)
    edge = float(radius[strong].max()) if strong.any() else 0.3
    soft = np.exp(-((radius / max(0.9 * edge, 0.06)) ** 2))
    return (soft * ~ndimage.binary_dilation(spots, np.ones((5, 5), bool))).astype(np.float32)


def _still(flat: Thin, taper: Thin) -> Thin:
    """What stands still in all views while something else moves: spots whose phase is the same in all of them.

    A lattice that drifts turns the phases of its spots; nothing is taken off unless spots along two directions do.
    """
    n, rows, columns = flat.shape
    none = np.zeros((rows, columns), dtype=np.float32)
    if n < 4:
        return none
    total = np.zeros((rows, columns // 2 + 1), dtype=np.complex128)
    power = np.zeros(total.shape)
    for view in flat:
        spectrum = fft.rfft2(view * taper)
        total += spectrum
        power += np.abs(spectrum) ** 2
    power /= n
    spots = _spots(power)
    around = np.maximum(ndimage.median_filter(power, size=(11, 11), mode="nearest"), 1e-30)
    alike = np.abs(total / n) ** 2 / np.maximum(power, 1e-30)
    fixed = spots & (alike > 0.97 - 2 * around / power)
    moving = spots & (alike < 0.6 * (1 - around / power))
    where = np.argwhere(moving).astype(np.float64)
    if not fixed.any() or len(where) < 2:
        return none
    where[:, 0] = np.where(where[:, 0] > rows / 2, where[:, 0] - rows, where[:, 0])
    spread = np.linalg.svd(where * np.sqrt(power[moving])[:, None], compute_uv=False)
    if spread[1] < 0.1 * spread[0]:
        return none
    kept = ndimage.binary_dilation(fixed, np.ones((7, 7), bool)) & ~ndimage.binary_dilation(
        moving, np.ones((3, 3), bool)
    )
    return np.asarray(fft.irfft2(fft.rfft2(flat.mean(axis=0)) * kept, (rows, columns)), dtype=np.float32)


# ------------------------------------------------------------------------------------------------------ the canvas


@dataclass
class _Canvas:
    """Sums of frames, twice as wide as a view; the place p of a frame of shift s lies at ``p - s + half``."""

    total: Thin
    weight: Thin
    odd: Thin
    odd_weight: Thin

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> _Canvas:
        wide = (2 * shape[0], 2 * shape[1])
        return cls(*(np.zeros(wide, dtype=np.float32) for _ in range(4)))

    def add(self, stack: _Stack, k: int, place: Floats, sign: float = 1.0) -> None:
        """Put view ``k`` at ``place``, or take it away with ``sign`` -1."""
        whole, part = _split(place)
        rows, columns = stack.shape
        top, left = (np.array(stack.shape) // 2 - whole).tolist()
        inner = (slice(_RIM, rows - _RIM), slice(_RIM, columns - _RIM))
        goal = (slice(top + _RIM, top + rows - _RIM), slice(left + _RIM, left + columns - _RIM))
        self.total[goal] += sign * _moved(stack.flat[k], -part)[inner]
        self.weight[goal] += np.float32(sign)
        self.odd[goal] += sign * (stack.taper * _moved(stack.odd[k], -part))[inner]
        self.odd_weight[goal] += sign * (stack.taper**2)[inner]

    def mean(self, noise: float) -> tuple[Thin, Thin]:
        """The mean frame, zero where there is none, and where there is one (1 or 0).

        Of the mean those frequencies are kept that stand out of its noise (``noise`` is the variance of a pixel of one
        view), else the slopes of that noise would blur the places of frames that are compared with it.
        """
        there = (self.weight > 0.5).astype(np.float32)
        spectrum = fft.rfft2(self.total * there / np.maximum(self.weight, 1))
        noise_power = noise * float((there / np.maximum(self.weight, 1)).sum())
        power = ndimage.uniform_filter(np.abs(spectrum) ** 2, 3, mode="wrap")
        spectrum *= np.maximum(1 - 1.5 * noise_power / np.maximum(power, 1e-30), 0).astype(np.float32)
        return np.asarray(fft.irfft2(spectrum, self.total.shape) * there, dtype=np.float32), there

    def window(self, field_: Thin, place: Floats, shape: tuple[int, int]) -> Thin:
        """``field_`` of the canvas as a view of shift ``place`` would see it."""
        whole, part = _split(place)
        top, left = (np.array(shape) // 2 - whole).tolist()
        pad = REACH
        wide = np.pad(field_, pad)
        cut = wide[top : top + shape[0] + 2 * pad, left : left + shape[1] + 2 * pad]
        return _moved(cut, part)[pad:-pad, pad:-pad]


def _split(place: Floats) -> tuple[NDArray[np.int64], Floats]:
    whole = np.rint(place).astype(np.int64)
    return whole, place - whole


def _moved(image: Thin, part: Floats, slope: int | None = None) -> Thin:
    return moved(image, (float(part[0]), float(part[1])), slope)


# ---------------------------------------------------------------------------------------------------- the questions


class _Candidates(NamedTuple):
    """``place`` (m, 2) where a view may lie, and ``score`` (m,) its log-likelihood but for a constant."""

    place: Floats
    score: Floats


class _Piece(NamedTuple):
    """What is laid onto a canvas, a view or several that were summed: ``flat`` and ``flat_weight`` the sums of views
    and their number, ``odd`` and ``odd_weight`` the same of odd things."""

    flat: Thin
    flat_weight: Thin
    odd: Thin
    odd_weight: Thin


def _candidates(stack: _Stack, k: int, canvas: _Canvas) -> _Candidates:
    """All places where view ``k`` fits the canvas as well as anywhere, with what the odd things say of each."""
    inner = np.zeros(stack.shape, dtype=np.float32)
    inner[_RIM:-_RIM, _RIM:-_RIM] = 1
    piece = _Piece(stack.flat[k] * inner, inner, stack.odd[k] * stack.taper, stack.taper**2)
    return _laid(stack, piece, canvas)


def _laid(stack: _Stack, piece: _Piece, canvas: _Canvas) -> _Candidates:
    """All places where a piece (as large as a view, or as a canvas) fits as well as anywhere."""
    rows, columns = stack.shape
    whole = piece.flat.shape == stack.shape
    wide = (2 * rows, 2 * columns) if whole else (4 * rows, 4 * columns)
    mean, there = canvas.mean(stack.noise)
    odd = canvas.odd / (canvas.odd_weight.clip(0) + np.float32(1 / stack.odd_signal))

    def lay(field_: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(fft.rfft2(field_, wide))

    seen = (piece.flat_weight > 0.5).astype(np.float32)
    view = piece.flat / np.maximum(piece.flat_weight, 1)
    one, goal_there = lay(seen), np.conj(lay(there))

    def across(spectrum: NDArray[Any], other: NDArray[Any]) -> Floats:
        """Sum over p of piece(p) canvas(p + half - s), for s from -half on."""
        return np.asarray(fft.irfft2(spectrum * other, wide), dtype=np.float64)

    overlap = across(one, goal_there) / max(float(seen.sum()), 1.0)
    energy = np.maximum(across(one, np.conj(lay(mean**2))), 1e-12) * np.maximum(across(lay(view**2), goal_there), 1e-12)
    alike = np.where(overlap > _OVERLAP, across(lay(view), np.conj(lay(mean))) / np.sqrt(energy), -1.0)
    told = across(lay(piece.odd), np.conj(lay(odd)))
    told = told - 0.5 * across(lay(piece.odd_weight), np.conj(lay(odd**2)))
    order, shift = _lags(stack.shape, 0 if not whole else 1)
    alike, overlap, told = (m[order] for m in (alike, overlap, told / stack.noise))
    peaks = (alike == ndimage.maximum_filter(alike, size=3, mode="constant", cval=-1)) & (alike > 0)
    if not peaks.any():
        return _Candidates(np.zeros((1, 2)), np.array([-1e6]))
    best = float(alike[peaks].max())
    # the deviation of a correlation over N independent pixels is (1 - rho^2) / sqrt(N)
    doubt = (1 - best**2) / np.sqrt(overlap.clip(_OVERLAP) * rows * columns) + 0.05 * best
    worse = np.where(peaks, np.maximum((best - alike) / doubt - 1.5, 0) ** 2 / 2, np.inf)
    score = told - worse
    rank = np.flatnonzero(worse < 60)
    rank = rank[np.argsort(score.flat[rank])[::-1][:_MOST_CANDIDATES]]
    at = np.column_stack(np.unravel_index(rank, score.shape))
    place = np.array([shift[0][at[:, 0]], shift[1][at[:, 1]]]).T + _vertex(alike, at)
    return _Candidates(place, score.flat[rank])


def _lags(shape: tuple[int, int], halves: int) -> tuple[Any, tuple[Floats, Floats]]:
    """How to order a circular correlation so that shifts run upwards, and the shifts of rows and columns; the canvas
    begins ``halves`` half views before the piece."""
    lists, shifts = [], []
    for size in shape:
        shift = np.arange(-(size // 2) + 1, size // 2)
        # piece(p) sits at canvas p - s + half: the lag of the correlation is s - half
        lists.append((shift - halves * (size // 2)) % ((2 if halves else 4) * size))
        shifts.append(shift.astype(np.float64))
    return np.ix_(*lists), (shifts[0], shifts[1])


def _vertex(field_: Floats, at: NDArray[np.int64]) -> Floats:
    """(m, 2) where parabolas through the neighbours of ``at`` (m, 2) have their tops."""
    out = np.zeros(at.shape)
    for axis in (0, 1):
        size = field_.shape[axis]
        step = np.zeros(2, dtype=np.int64)
        step[axis] = 1
        safe = (at[:, axis] > 0) & (at[:, axis] < size - 1)
        left, middle, right = (
            field_[tuple((np.clip(at + d * step, 0, np.array(field_.shape) - 1)).T)] for d in (-1, 0, 1)
        )
        bend = left - 2 * middle + right
        out[:, axis] = np.where(safe & (bend < 0), 0.5 * (left - right) / np.where(bend == 0, 1, bend), 0.0)
    return np.clip(out, -0.5, 0.5)


def _prior(away: Floats, width: Floats, shape: tuple[int, int]) -> Floats:
    """Log-density of a step that is ``away`` (m, 2) from the expected one: drift on, or jump, by any order of
    magnitude alike."""
    drift = np.exp(-0.5 * ((away / width) ** 2).sum(axis=1)) / (2 * np.pi * width.prod())
    jump = 1 / (np.pi * ((away**2).sum(axis=1) + 4) * np.log(1 + max(shape) ** 2 / 4))
    return np.asarray(np.log((1 - _JUMP) * drift + _JUMP * jump))


# ------------------------------------------------------------------------------------------------------ the answers


def _grown(stack: _Stack, tell: Callable[[int], None]) -> Floats:
    """First places of all views: from the middle one forwards to the end, then backwards to the beginning."""
    n = len(stack)
    place = np.zeros((n, 2))
    canvas = _Canvas.empty(stack.shape)
    middle = _typical(stack)
    canvas.add(stack, middle, place[middle])
    width = np.full(2, 2.0)
    done = 1
    for way in (range(middle + 1, n), range(middle - 1, -1, -1)):
        trail = [place[middle]]
        for k in way:
            found = _candidates(stack, k, canvas)
            ahead = _ahead(trail)
            weight = found.score + _prior(found.place - ahead, width, stack.shape)
            best = found.place[int(weight.argmax())]
            place[k] = best
            if found.score.max() > -1e5 and _fits(stack, k, canvas, best):
                trail.append(best)
                canvas.add(stack, k, best)
                steps = np.diff(np.array(trail[-24:]), axis=0)
                if len(steps) >= 4:
                    width = np.maximum(1.5 * np.median(np.abs(steps - np.median(steps, axis=0)), axis=0) / 0.6745, 0.7)
            done += 1
            tell(done)
    return place


def _typical(stack: _Stack) -> int:
    """The view nearest to the middle of the stack that is neither much fainter nor much stronger than most."""
    strength = np.array([float((v**2).mean()) for v in stack.flat])
    usual = np.abs(strength / np.median(strength) - 1) <= max(
        0.15, float(np.quantile(np.abs(strength / np.median(strength) - 1), 0.5))
    )
    order = np.argsort(np.abs(np.arange(len(stack)) - len(stack) // 2), kind="stable")
    return int(next(k for k in order if usual[k]))


def _ahead(trail: list[Floats]) -> Floats:
    """Where the drift leads: the last place and half of the median of the last steps."""
    if len(trail) < 4:
        return trail[-1]
    return np.asarray(trail[-1] + 0.5 * np.median(np.diff(np.array(trail[-6:]), axis=0), axis=0))


def _fits(stack: _Stack, k: int, canvas: _Canvas, place: Floats) -> bool:
    """Whether view ``k`` shows at least a third of what the canvas shows there."""
    mean, there = canvas.mean(stack.noise)
    seen, known = canvas.window(mean, place, stack.shape), canvas.window(there, place, stack.shape)
    view = stack.flat[k] * (known > 0.9)
    return float((view * seen).sum()) > float((seen**2 * (known > 0.9)).sum()) / 3


def _agreed(stack: _Stack, place: Floats, tell: Callable[[int], None]) -> tuple[list[_Fit], Floats, _Canvas]:
    """All views asked again against all others, weighed along the chain, and refined."""
    n = len(stack)
    chance = np.ones(n)
    fits = [_Fit(p, np.full(2, np.nan), 1.0, 1.0) for p in place]
    whole = np.ones(n)
    canvas = _summed(stack, fits)
    for turn in range(_ROUNDS):
        places = [fit.place for fit in fits]
        if turn < _ROUNDS - 1:
            found = []
            for k in range(n):
                with _Without(stack, canvas, k, fits[k]):
                    found.append(_candidates(stack, k, canvas))
                tell(turn * n + k + 1)
            chosen, chance = _chained(found, stack.shape)
            places = [found[k].place[chosen[k]] for k in range(n)]
        else:
            _stragglers(stack, fits, canvas, places)
        old, fits = fits, []
        for k in range(n):
            with _Without(stack, canvas, k, old[k]):
                fits.append(_refined(stack, k, canvas, places[k]))
        if turn == 0:
            whole = _joined(stack, fits)
        canvas = _summed(stack, fits)
    tell(_ROUNDS * n)
    return fits, chance * whole, canvas


def _joined(stack: _Stack, fits: list[_Fit]) -> Floats:
    """Runs of frames between jumps, each asked as a whole against all others and put where it belongs: what one frame
    leaves open its run may tell. ``fits`` is changed; (n,) the probability of each frame's run."""
    chance = np.ones(len(fits))
    for _ in range(2):
        place = np.array([fit.place for fit in fits])
        runs = _runs(place)
        if len(runs) > _MOST_RUNS:
            break
        canvas, changed = _summed(stack, fits), False
        for run in sorted(runs, key=len)[: len(runs) - 1]:
            used = [k for k in run if not _mismatch(fits[k], stack)]
            part = _Canvas.empty(stack.shape)
            for k in used:
                part.add(stack, k, fits[k].place)
                canvas.add(stack, k, fits[k].place, -1.0)
            if used and canvas.weight.max() > 0.5:
                found = _laid(stack, _Piece(part.total, part.weight, part.odd, part.odd_weight), canvas)
                best = int(found.score.argmax())
                step = found.place[best]
                chance[run] = float(np.exp(found.score[best] - np.logaddexp.reduce(found.score)))
                inside = (np.abs(place[run] + step) < np.array(stack.shape) // 2 - 2).all()
                if found.score[best] > -1e5 and np.abs(step).max() > 1.5 and inside:
                    changed = True
                    for k in run:
                        fits[k] = fits[k]._replace(place=fits[k].place + step)
            for k in used:
                canvas.add(stack, k, fits[k].place)
        if not changed:
            break
    return chance


def _stragglers(stack: _Stack, fits: list[_Fit], canvas: _Canvas, places: list[Floats]) -> None:
    """A view alone away from both its neighbours, which stay together, may be one of which a part is lost: if it also
    fits, in part, where they are, that is its place."""
    for k in range(1, len(fits) - 1):
        before, after = fits[k - 1].place, fits[k + 1].place
        near = (before + after) / 2
        if np.abs(after - before).max() > 2 or np.abs(fits[k].place - near).max() < 4:
            continue
        fit = _refined(stack, k, canvas, near)
        if fit.strength > 0.2 and fit.alike > 0.2 and np.abs(fit.place - near).max() < 2:
            places[k] = near


def _runs(place: Floats) -> list[list[int]]:
    """Numbers of views (n, 2) in runs that no jump interrupts."""
    step = np.diff(place, axis=0)
    if not len(step):
        return [[0]]
    middle = np.median(step, axis=0)
    width = np.median(np.abs(step - middle), axis=0) / 0.6745
    jumps = (np.abs(step - middle) > np.maximum(6 * width, 2.0)).any(axis=1)
    return [part.tolist() for part in np.split(np.arange(len(place)), np.flatnonzero(jumps) + 1)]


class _Without:
    """The canvas without one view, for a while."""

    def __init__(self, stack: _Stack, canvas: _Canvas, k: int, fit: _Fit) -> None:
        self.stack, self.canvas, self.k, self.fit = stack, canvas, k, fit
        self.used = not _mismatch(fit, stack) and len(stack) > 1

    def __enter__(self) -> None:
        if self.used:
            self.canvas.add(self.stack, self.k, self.fit.place, -1.0)

    def __exit__(self, *error: object) -> None:
        if self.used:
            self.canvas.add(self.stack, self.k, self.fit.place)


def _summed(stack: _Stack, fits: list[_Fit]) -> _Canvas:
    canvas = _Canvas.empty(stack.shape)
    for k, fit in enumerate(fits):
        if not _mismatch(fit, stack):
            canvas.add(stack, k, fit.place)
    return canvas


def _chained(found: list[_Candidates], shape: tuple[int, int]) -> tuple[NDArray[np.int64], Floats]:
    """The likeliest candidate of each view by forward-backward sums along the stack, and its probability.

    A step between neighbours is a drift, as wide as the middle of the best candidates' steps, or a jump.
    """
    best = np.array([f.place[int(f.score.argmax())] for f in found])
    step = np.diff(best, axis=0)
    drift = np.median(step, axis=0) if len(step) else np.zeros(2)
    spread = np.median(np.abs(step - drift), axis=0) / 0.6745 if len(step) else np.ones(2)
    width = np.maximum(1.5 * spread, 0.7)

    def passed(one: _Candidates, weight: Floats, other: _Candidates, sign: float) -> Floats:
        away = other.place[:, None, :] - one.place[None, :, :] - sign * drift
        link = _prior(away.reshape(-1, 2), width, shape).reshape(away.shape[:2])
        return np.asarray(np.logaddexp.reduce(link + weight[None, :], axis=1))

    n = len(found)
    ahead, back = [np.zeros(len(f.score)) for f in found], [np.zeros(len(f.score)) for f in found]
    for k in range(1, n):
        ahead[k] = passed(found[k - 1], ahead[k - 1] + found[k - 1].score, found[k], 1.0)
    for k in range(n - 2, -1, -1):
        back[k] = passed(found[k + 1], back[k + 1] + found[k + 1].score, found[k], -1.0)
    chosen, chance = np.zeros(n, dtype=np.int64), np.zeros(n)
    for k in range(n):
        whole = found[k].score + ahead[k] + back[k]
        chosen[k] = int(whole.argmax())
        chance[k] = float(np.exp(whole.max() - np.logaddexp.reduce(whole)))
    return chosen, chance


class _Fit(NamedTuple):
    """A refined place with its deviation, the view's strength over the mean's, and the part of the view's blocks
    that show the specimen at all."""

    place: Floats
    sigma: Floats
    strength: float
    alike: float


def _refined(stack: _Stack, k: int, canvas: _Canvas, place: Floats) -> _Fit:
    """Least squares of the view against the mean of the others, by Gauss-Newton; deviations from the residuals, summed
    over groups of lines, so that lines that are displaced together count."""
    mean, there = canvas.mean(stack.noise)
    at = np.array(place, dtype=np.float64)
    covariance, strength, alike = np.full((2, 2), np.nan), 0.0, 0.0
    limit = np.array(stack.shape) // 2 - 1
    for _ in range(6):
        if (np.abs(at) > limit).any():
            break
        _, part = _split(at)
        whole = at - part
        known = canvas.window(there, at, stack.shape) > 0.99
        known[:_RIM], known[-_RIM:], known[:, :_RIM], known[:, -_RIM:] = False, False, False, False
        seen = canvas.window(mean, at, stack.shape)
        slopes = np.stack([_slope(canvas, mean, whole, part, stack.shape, axis) for axis in (0, 1)])
        used = known.astype(np.float32)
        power = float((seen**2 * used).sum())
        strength = float((stack.flat[k] * seen * used).sum()) / max(power, 1e-30)
        residual = (stack.flat[k] - np.float32(strength) * seen) * used
        weight = _evened(residual, seen, used)
        slopes *= -np.float32(strength)
        normal = np.einsum("iyx,jyx->ij", slopes * weight, slopes).astype(np.float64)
        if not np.isfinite(normal).all() or np.linalg.cond(normal) > 1e12:
            break
        line = np.einsum("iyx,yx->yi", slopes, weight * residual).astype(np.float64)
        step = np.linalg.solve(normal, line.sum(axis=0))
        at = at + np.clip(step, -1, 1)
        group = np.add.reduceat(line, np.arange(0, len(line), 4), axis=0)
        inverse = np.linalg.inv(normal)
        covariance = inverse @ (group.T @ group) @ inverse
        alike = _blocks_alike(stack.flat[k], seen, used)
        if np.abs(step).max() < 2e-4:
            break
    return _Fit(at, np.sqrt(np.diag(covariance)), strength, alike)


def _evened(residual: Thin, seen: Thin, used: Thin) -> Thin:
    """Weights (mean about 1) that even out noise which grows with brightness: its variance as a line in ``seen``."""
    count = max(float(used.sum()), 1.0)
    square = residual**2
    middle = max(float(square.sum()) / count, 1e-30)
    level = float((seen * used).sum()) / count
    away = (seen - level) * used
    slope = max(float((away * square).sum()) / max(float((away**2).sum()), 1e-30), 0.0)
    return np.asarray(used * middle / np.maximum(middle + slope * (seen - level), 0.25 * middle), dtype=np.float32)


def _slope(canvas: _Canvas, mean: Thin, whole: Floats, part: Floats, shape: tuple[int, int], axis: int) -> Thin:
    """Derivative along ``axis`` of the canvas as a view of shift ``whole + part`` sees it."""
    top, left = (np.array(shape) // 2 - np.rint(whole).astype(int)).tolist()
    pad = REACH
    cut = np.pad(mean, pad)[top : top + shape[0] + 2 * pad, left : left + shape[1] + 2 * pad]
    return _moved(cut, part, slope=axis)[pad:-pad, pad:-pad]


def _blocks_alike(view: Thin, seen: Thin, used: Thin) -> float:
    """Part of an 8 x 8 grid of blocks in which the view has at least 0.3 of the strength of what is expected."""

    def blocks(field_: Thin) -> Floats:
        rows, columns = (np.linspace(0, size, 9).astype(int)[:-1] for size in field_.shape)
        return np.asarray(np.add.reduceat(np.add.reduceat(field_, rows, axis=0), columns, axis=1), dtype=np.float64)

    power = blocks(seen**2 * used)
    counted = power > 0.2 * np.median(power[power > 0]) if (power > 0).any() else power > 0
    if not counted.any():
        return 0.0
    return float((blocks(view * seen * used)[counted] > 0.3 * power[counted]).mean())


def _mismatch(fit: _Fit, stack: _Stack) -> str:
    """Why a refined view is an outlier, or nothing."""
    if (np.abs(fit.place) > np.array(stack.shape) // 2 - 1).any():
        return "beyond reach: more than half a field away"
    if fit.strength < 0.3:
        return "matches no other frame"
    if fit.alike < 0.7:
        return f"corrupt: {100 * (1 - fit.alike):.0f} % of its area does not match the other frames"
    return ""


def _named(
    n: int,
    shape: tuple[int, int],
    good: NDArray[np.int64],
    reasons: list[str],
    stack: _Stack,
    canvas: _Canvas,
    fits: list[_Fit],
    chance: Floats,
    mean: _Mean,
) -> Registration:
    """Everything in pixels of frames, by the frames' numbers."""
    shift, sigma, p = np.full((n, 2), np.nan), np.full((n, 2), np.nan), np.zeros(n)
    reason = list(reasons)
    for k, fit, likely in zip(good, fits, chance, strict=True):
        reason[k] = _mismatch(fit, stack) if len(good) > 1 else ""
        if not reason[k]:
            shift[k], sigma[k], p[k] = fit.place * stack.scale, fit.sigma * stack.scale, likely
    outlier = np.array([bool(text) for text in reason])
    kept = [fit.place for k, fit in zip(good, fits, strict=True) if not outlier[k]]
    pattern = _pattern(mean.total / max(mean.count, 1), mean.count, stack, canvas, kept)
    if not outlier.all():
        shift -= np.median(shift[~outlier], axis=0)
    reference = Reference(
        shape,
        (float(stack.scale[0]), float(stack.scale[1])),
        canvas.total,
        canvas.weight,
        canvas.odd,
        canvas.odd_weight,
        stack.passed,
        stack.still,
        stack.noise,
        stack.odd_signal,
    )
    return Registration(shape, shift, sigma, p, outlier, tuple(reason), pattern, reference)


def _pattern(mean: Floats, count: int, stack: _Stack, canvas: _Canvas, places: list[Floats]) -> Floats | None:
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


# ------------------------------------------------------------------------------------------------------- averaging


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
    n, shape = _checked(frames)
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
