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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.protocols import Frames
from stemloop.reduce.maps import MapRegistration, register_to_map
from stemloop.reduce.registration.agreement import ROUNDS, Keep, agreed
from stemloop.reduce.registration.averaging import Averaged, along_lines, average, placed
from stemloop.reduce.registration.candidates import candidates, prior
from stemloop.reduce.registration.canvas import Canvas
from stemloop.reduce.registration.chain import grown
from stemloop.reduce.registration.content import Stack
from stemloop.reduce.registration.outliers import mismatch, unlike
from stemloop.reduce.registration.pattern import Mean, standing
from stemloop.reduce.registration.refinement import Fit, refined
from stemloop.reduce.registration.views import (
    Floats,
    Reference,
    Registration,
    Shift,
    View,
    checked,
    view_of,
    view_shape,
)

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


def register(
    frames: Frames,
    *,
    views: Sequence[View] | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep: Keep = lambda _, step: step(),
) -> Registration:
    """Find the shift of every frame of a stack.

    Parameters
    ----------
    frames : (n, rows, columns) of real numbers, at least one frame of 8 x 8 px; read one at a time, at most twice.
    views : what :func:`view_of` made of each frame with :func:`view_shape`'s shape, if that was done before, perhaps
        by other processes; the frames are then read only for what stands still.
    progress : is called with (steps done, of).
    keep : is called with (name, step) for each of the long parts of the work, and gives what ``step()`` gives: by doing
        it, or, where the same stack was begun before, from where it kept it. The answer is the same to the last bit.

    Returns
    -------
    Registration : see there. Frames that are empty, not finite, saturated, or that match no others are outliers and
        say so. A frame more than half a field away from the middle one of the stack is one, too.

    Raises
    ------
    InputError : not a stack of equal images of real numbers, or no frame of any use.
    """
    n, shape = checked(frames)
    steps = n * (2 + ROUNDS)
    tell = progress or (lambda done, of: None)
    seen: list[View] = []
    mean = Mean(shape)
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
    reasons = unlike([view.reason for view in seen], np.stack([view.image for view in seen]))
    good = np.flatnonzero([not reason for reason in reasons])
    if len(good) == 0:
        raise InputError(f"none of the {n} frames can be registered; the first: {reasons[0]}.")
    stack = Stack(np.stack([seen[k].image for k in good]), shape)
    place = keep("grown", lambda: grown(stack, lambda done: tell(n + done, steps)))
    fits, chance, canvas = agreed(stack, place, lambda done: tell(2 * n + done, steps), keep)
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
    stack = Stack(view.image[None], reference.shape, reference)
    canvas = Canvas(
        reference.total, reference.weight, reference.odd, reference.odd_weight, reference.own, reference.own_weight
    )
    scale = np.array(reference.scale)
    about = np.zeros(2) if near is None else np.asarray(near, dtype=np.float64) / scale
    found = candidates(stack, 0, canvas, about)
    drift = 0.0 if near is None else prior(found.place - about, np.full(2, 2.0), stack.shape)
    best, p = found.best(drift)
    fit = refined(stack, 0, canvas, found.place[best])
    if reason := mismatch(fit, stack):
        return Shift(nothing, nothing, 0.0, reason)
    return Shift(fit.place * scale, fit.sigma * scale, p, "")


def _named(
    n: int,
    shape: tuple[int, int],
    good: NDArray[np.int64],
    reasons: list[str],
    stack: Stack,
    canvas: Canvas,
    fits: list[Fit],
    chance: Floats,
    mean: Mean,
) -> Registration:
    """Everything in pixels of frames, by the frames' numbers."""
    shift, sigma, p = np.full((n, 2), np.nan), np.full((n, 2), np.nan), np.zeros(n)
    reason = list(reasons)
    for k, fit, likely in zip(good, fits, chance, strict=True):
        reason[k] = mismatch(fit, stack) if len(good) > 1 else ""
        if not reason[k]:
            shift[k], sigma[k], p[k] = fit.place * stack.scale, fit.sigma * stack.scale, likely
    outlier = np.array([bool(text) for text in reason])
    kept = [fit.place for k, fit in zip(good, fits, strict=True) if not outlier[k]]
    pattern = standing(mean.total / max(mean.count, 1), mean.count, stack, canvas, kept)
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
        canvas.own,
        canvas.own_weight,
    )
    return Registration(shape, shift, sigma, p, outlier, tuple(reason), pattern, reference)
