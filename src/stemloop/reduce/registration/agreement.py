"""One answer for the whole stack: frames against all others, along the chain, and runs of frames as a whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from stemloop.reduce.registration.candidates import Piece, candidates, laid, prior
from stemloop.reduce.registration.canvas import Canvas
from stemloop.reduce.registration.chain import NARROWEST, chained
from stemloop.reduce.registration.content import Stack
from stemloop.reduce.registration.outliers import mismatch
from stemloop.reduce.registration.refinement import Fit, refined
from stemloop.reduce.registration.views import Floats

ROUNDS = 3
#: With more jumps than this frames are only asked one by one.
_MOST_RUNS = 40


#: Gives what a step gives: by doing it, or because it is kept under that name from before.
Keep = Callable[[str, Callable[[], Any]], Any]


class Agreement(NamedTuple):
    """Where a round left the views: their ``fits``, the ``chance`` (n,) of each place along the chain, and that of the
    ``whole`` (n,) run that each is in."""

    fits: list[Fit]
    chance: Floats
    whole: Floats


def agreed(
    stack: Stack, place: Floats, tell: Callable[[int], None], keep: Keep = lambda _, step: step()
) -> tuple[list[Fit], Floats, Canvas]:
    """All views asked again against all others, weighed along the chain, and refined; each round is kept by itself."""
    n = len(stack)
    now = Agreement(_centred([Fit(p, np.full(2, np.nan), 1.0, 1.0) for p in place]), np.ones(n), np.ones(n))
    for turn in range(ROUNDS):
        now = keep(f"round_{turn}", partial(_round, stack, now, turn, tell))
    tell(ROUNDS * n)
    return now.fits, now.chance * now.whole, summed(stack, now.fits)


def _round(stack: Stack, now: Agreement, turn: int, tell: Callable[[int], None]) -> Agreement:
    """Candidates, the chain, refinement and runs; the last round only refines."""
    n, (old, chance, whole) = len(stack), now
    canvas = summed(stack, old)
    places = [fit.place for fit in old]
    if turn < ROUNDS - 1:
        found = []
        for k in range(n):
            with _Without(stack, canvas, k, old[k]):
                found.append(candidates(stack, k, canvas, places[k]))
            tell(turn * n + k + 1)
        places, chance = chained(found, places, stack.shape)
    else:
        _stragglers(stack, old, canvas, places)
    fits = []
    for k in range(n):
        with _Without(stack, canvas, k, old[k]):
            fits.append(refined(stack, k, canvas, places[k]))
    if turn < ROUNDS - 1:
        whole = joined(stack, fits)
        fits = _centred(fits)
    return Agreement(fits, chance, whole)


def _centred(fits: list[Fit]) -> list[Fit]:
    """All places moved by whole pixels, so that their middle is that of the canvas: only places to each other count,
    and how far a frame may be away is measured from the middle."""
    middle = np.rint(np.median([fit.place for fit in fits], axis=0))
    return [fit._replace(place=fit.place - middle) for fit in fits]


def joined(stack: Stack, fits: list[Fit]) -> Floats:
    """Runs of frames between jumps, the longest first, each asked as a whole against those before it and put where it
    belongs: what one frame leaves open its run may tell. ``fits`` is changed; (n,) the probability of each run's place
    against that of the longest."""
    chance = np.ones(len(fits))
    parts = [[k for k in run if not mismatch(fits[k], stack)] for run in runs(np.array([fit.place for fit in fits]))]
    parts = sorted((part for part in parts if part), key=len, reverse=True)
    if len(parts) > _MOST_RUNS:
        return chance
    canvas, placed = Canvas.empty(stack.shape), set[int]()
    for number, run in enumerate(parts):
        if number:
            piece = Canvas.empty(stack.shape)
            for k in run:
                piece.add(stack, k, fits[k].place)
            whole = Piece(piece.total, piece.weight, piece.odd, piece.odd_weight)
            found = laid(stack, whole, canvas, np.zeros(2))
            best, chance[run] = found.best(_leading(fits, run, placed, found.place, stack.shape))
            step = found.place[best]
            inside = all((np.abs(fits[k].place + step) < np.array(stack.shape) // 2 - 2).all() for k in run)
            if found.fits and np.abs(step).max() > 1.5:
                if inside:
                    for k in run:
                        fits[k] = fits[k]._replace(place=fits[k].place + step)
                else:  # it belongs where it cannot be put
                    chance[run] = 0.0
        for k in run:
            canvas.add(stack, k, fits[k].place)
        placed |= set(run)
    return chance


def _leading(fits: list[Fit], run: list[int], placed: set[int], step: Floats, shape: tuple[int, int]) -> Floats:
    """(m,) log-density of each ``step`` (m, 2) of a run from the drift or the jumps that lead to it and from it."""
    out = np.zeros(len(step))
    steps = np.diff(np.array([fit.place for fit in fits]), axis=0)
    width = np.maximum(1.5 * np.median(np.abs(steps), axis=0) / 0.6745, NARROWEST)
    for end, beside in ((run[0], range(run[0] - 1, -1, -1)), (run[-1], range(run[-1] + 1, len(fits)))):
        near = next((k for k in beside if k in placed), None)
        if near is not None:
            out += prior(fits[end].place + step - fits[near].place, width * np.sqrt(abs(near - end)), shape)
    return out


def _stragglers(stack: Stack, fits: list[Fit], canvas: Canvas, places: list[Floats]) -> None:
    """A view alone away from both its neighbours, which stay together, may be one of which a part is lost: if it also
    fits, in part, where they are, that is its place."""
    for k in range(1, len(fits) - 1):
        before, after = fits[k - 1].place, fits[k + 1].place
        near = (before + after) / 2
        if np.abs(after - before).max() > 2 or np.abs(fits[k].place - near).max() < 4:
            continue
        fit = refined(stack, k, canvas, near)
        if fit.strength > 0.2 and fit.alike > 0.2 and np.abs(fit.place - near).max() < 2:
            places[k] = near


def runs(place: Floats) -> list[list[int]]:
    """Numbers of views (n, 2) in runs that no jump interrupts."""
    step = np.diff(place, axis=0)
    if not len(step):
        return [[0]]
    middle = np.median(step, axis=0)
    width = np.median(np.abs(step - middle), axis=0) / 0.6745
    jumps = (np.abs(step - middle) > np.maximum(6 * width, 2 * NARROWEST)).any(axis=1)
    return [part.tolist() for part in np.split(np.arange(len(place)), np.flatnonzero(jumps) + 1)]


class _Without:
    """The canvas without one view, for a while."""

    def __init__(self, stack: Stack, canvas: Canvas, k: int, fit: Fit) -> None:
        self.stack, self.canvas, self.k, self.fit = stack, canvas, k, fit
        self.used = not mismatch(fit, stack) and len(stack) > 1

    def __enter__(self) -> None:
        if self.used:
            self.canvas.add(self.stack, self.k, self.fit.place, -1.0)

    def __exit__(self, *error: object) -> None:
        if self.used:
            self.canvas.add(self.stack, self.k, self.fit.place)


def summed(stack: Stack, fits: list[Fit]) -> Canvas:
    """All views that are no outliers on one canvas."""
    canvas = Canvas.empty(stack.shape)
    for k, fit in enumerate(fits):
        if not mismatch(fit, stack):
            canvas.add(stack, k, fit.place)
    return canvas
