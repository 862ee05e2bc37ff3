"""Where does a view, or a run of them, fit? All places that are as good as the best one within the noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from stemloop.reduce.registration.canvas import RIM, Canvas
from stemloop.reduce.registration.content import Stack
from stemloop.reduce.registration.views import Floats, Thin

#: A frame must share at least this part of its pixels with the others.
_OVERLAP = 0.25
_MOST_CANDIDATES = 48
#: Chance that a frame jumps instead of drifting on.
_JUMP = 0.01


class Candidates(NamedTuple):
    """``place`` (m, 2) where a view may lie, and ``score`` (m,) its log-likelihood but for a constant;
    ``fits`` is false where nothing overlaps or is alike."""

    place: Floats
    score: Floats
    fits: bool = True

    def best(self, prior: Floats | float = 0.0) -> tuple[int, float]:
        """Number of the likeliest place, and its probability, if ``prior`` (m,) is what is known before; what nothing
        speaks for, a place out of reach, counts as one more candidate. A place that does not fit has none."""
        whole = self.score + prior
        best = int(whole.argmax())
        elsewhere = float(np.min(prior))
        every = np.logaddexp(np.logaddexp.reduce(whole), elsewhere)
        return best, float(np.exp(whole[best] - every)) if self.fits else 0.0


class Piece(NamedTuple):
    """What is laid onto a canvas, a view or several that were summed: ``flat`` and ``flat_weight`` the sums of views
    and their number, ``odd`` and ``odd_weight`` the same of odd things."""

    flat: Thin
    flat_weight: Thin
    odd: Thin
    odd_weight: Thin


def prior(away: Floats, width: Floats, shape: tuple[int, int]) -> Floats:
    """Log-density of a step that is ``away`` (m, 2) from the expected one: drift on, or jump; beyond a
    sixteenth of the field by any order of magnitude alike."""
    drift = np.exp(-0.5 * ((away / width) ** 2).sum(axis=1)) / (2 * np.pi * width.prod())
    core, field = (max(shape) / 16) ** 2, max(shape) ** 2 / 4
    jump = 1 / (np.pi * ((away**2).sum(axis=1) + core) * np.log(1 + field / core))
    return np.asarray(np.log((1 - _JUMP) * drift + _JUMP * jump))


def candidates(stack: Stack, k: int, canvas: Canvas, about: Floats) -> Candidates:
    """The places where view ``k`` fits the canvas as well as anywhere, with what the odd things say of each; ``about``
    (2,) as in :func:`laid`."""
    inner = np.zeros(stack.shape, dtype=np.float32)
    inner[RIM:-RIM, RIM:-RIM] = 1
    piece = Piece(stack.flat[k] * inner, inner, stack.odd[k] * stack.taper, stack.taper**2)
    return laid(stack, piece, canvas, about)


def laid(stack: Stack, piece: Piece, canvas: Canvas, about: Floats) -> Candidates:
    """All places where a piece (as large as a view, or as a canvas) fits as well as anywhere.

    A large perfect crystal has more of them than can be followed: kept are the likeliest, the nearer to ``about`` (2,)
    the sooner, as the drift has it.
    """
    rows, columns = stack.shape
    whole = piece.flat.shape == stack.shape
    wide = (2 * rows, 2 * columns) if whole else (4 * rows, 4 * columns)
    mean, there = canvas.mean(stack.noise)
    signal = canvas.repeating(stack.rough)
    damping = np.float32(np.clip(stack.odd_noise / max(signal, 1e-30), 1, 1e3))
    odd = canvas.odd / (canvas.odd_weight.clip(0) + damping)
    odd_part = canvas.odd_weight.clip(0) / (canvas.odd_weight.clip(0) + damping)

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
    product = across(lay(piece.odd), np.conj(lay(odd)))
    shared = across(lay(piece.odd_weight), np.conj(lay(odd_part))).clip(1e-6)
    order, shift = _lags(stack.shape, 0 if not whole else 1)
    alike, overlap, product, shared = (m[order] for m in (alike, overlap, product, shared))
    peaks = (alike == ndimage.maximum_filter(alike, size=3, mode="constant", cval=-1)) & (alike > 0)
    if not peaks.any():
        return Candidates(np.zeros((1, 2)), np.array([-1e6]), False)
    best = float(alike[peaks].max())
    # the deviation of a correlation over N independent pixels is (1 - rho^2) / sqrt(N)
    doubt = (1 - best**2) / np.sqrt(overlap.clip(_OVERLAP) * rows * columns) + 0.05 * best
    worse = np.where(peaks, np.maximum((best - alike) / doubt - 1.5, 0) ** 2 / 2, np.inf)
    usual = product / np.sqrt(shared)
    likely = worse < 60
    spread = max(_spread(usual[overlap > _OVERLAP]), _spread(usual[likely]) if likely.sum() >= 8 else 0.0)
    deviation = max(spread, 1e-30) * np.sqrt(shared)
    # more alike than the specimen can be is chance, not better evidence
    product = np.minimum(product, signal * shared + deviation)
    score = signal * shared * (product - signal * shared / 2) / deviation**2 - worse
    at = np.argwhere(likely)
    place = np.array([shift[0][at[:, 0]], shift[1][at[:, 1]]]).T
    worth = score[likely] + prior(place - about, np.full(2, 2.0), stack.shape)
    kept = np.argsort(-worth, kind="stable")[:_MOST_CANDIDATES]
    return Candidates(place[kept] + _vertex(alike, at[kept]), score[likely][kept])


def _spread(values: Floats) -> float:
    """Robust standard deviation about zero."""
    return float(np.median(np.abs(values))) / 0.6745


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
