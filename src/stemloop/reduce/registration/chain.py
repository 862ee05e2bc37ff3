"""Which of the places is it? The drift before and after a frame says what is likely."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stemloop.reduce.registration.candidates import Candidates, candidates, prior
from stemloop.reduce.registration.canvas import Canvas
from stemloop.reduce.registration.content import Stack
from stemloop.reduce.registration.views import Floats

#: Least width of a drift from frame to frame [px of a view].
NARROWEST = 0.3


def grown(stack: Stack, tell: Callable[[int], None]) -> Floats:
    """First places of all views: from the middle one forwards to the end, then backwards to the beginning."""
    n = len(stack)
    place = np.zeros((n, 2))
    canvas = Canvas.empty(stack.shape)
    middle = _typical(stack)
    canvas.add(stack, middle, place[middle])
    width = np.full(2, 2.0)
    done = 1
    for way in (range(middle + 1, n), range(middle - 1, -1, -1)):
        trail = [place[middle]]
        for k in way:
            ahead = _ahead(trail)
            found = candidates(stack, k, canvas, ahead)
            weight = found.score + prior(found.place - ahead, width, stack.shape)
            best = found.place[int(weight.argmax())]
            place[k] = best
            if found.score.max() > -1e5 and _fits(stack, k, canvas, best):
                trail.append(best)
                canvas.add(stack, k, best)
                steps = np.diff(np.array(trail[-24:]), axis=0)
                if len(steps) >= 4:
                    width = np.maximum(
                        1.5 * np.median(np.abs(steps - np.median(steps, axis=0)), axis=0) / 0.6745, NARROWEST
                    )
            done += 1
            tell(done)
    return place


def _typical(stack: Stack) -> int:
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


def _fits(stack: Stack, k: int, canvas: Canvas, place: Floats) -> bool:
    """Whether view ``k`` shows at least a third of what the canvas shows there."""
    mean, there = canvas.mean(stack.noise)
    seen, known = canvas.window(mean, place, stack.shape), canvas.window(there, place, stack.shape)
    view = stack.flat[k] * (known > 0.9)
    return float((view * seen).sum()) > float((seen**2 * (known > 0.9)).sum()) / 3


def chained(found: list[Candidates], now: list[Floats], shape: tuple[int, int]) -> tuple[list[Floats], Floats]:
    """The likeliest place of each view by forward-backward sums along the stack, and its probability.

    A step between neighbours is a drift, as wide as the middle of the shortest steps from best candidates, or a jump.
    One view near the middle stays where it is (``now``, (2,) of each): probabilities are of places against its own.
    """
    found = _pinned(found, now)
    best = [f.place[int(f.score.argmax())] for f in found]
    # on a lattice the best of two neighbours may be far apart by chance: the shortest way says how wide the drift is
    steps = [other.place - one for one, other in zip(best, found[1:], strict=False)]
    step = np.array([away[int((away**2).sum(axis=1).argmin())] for away in steps])
    drift, width = np.zeros(2), np.full(2, 2.0)
    if len(step) > 2:
        drift = np.median(step, axis=0)
        width = np.maximum(1.5 * np.median(np.abs(step - drift), axis=0) / 0.6745, NARROWEST)

    def passed(one: Candidates, weight: Floats, other: Candidates, sign: float) -> Floats:
        away = other.place[:, None, :] - one.place[None, :, :] - sign * drift
        link = prior(away.reshape(-1, 2), width, shape).reshape(away.shape[:2])
        return np.asarray(np.logaddexp.reduce(link + weight[None, :], axis=1))

    n = len(found)
    ahead, back = [np.zeros(len(f.score)) for f in found], [np.zeros(len(f.score)) for f in found]
    for k in range(1, n):
        ahead[k] = passed(found[k - 1], ahead[k - 1] + found[k - 1].score, found[k], 1.0)
    for k in range(n - 2, -1, -1):
        back[k] = passed(found[k + 1], back[k + 1] + found[k + 1].score, found[k], -1.0)
    chosen, chance = list[Floats](), np.zeros(n)
    for k in range(n):
        whole = found[k].score + ahead[k] + back[k]
        chosen.append(found[k].place[int(whole.argmax())])
        chance[k] = float(np.exp(whole.max() - np.logaddexp.reduce(whole)))
    return chosen, chance


def _pinned(found: list[Candidates], now: list[Floats]) -> list[Candidates]:
    """The candidates, but of one view near the middle only the one where it is, unless another place is better."""
    for k in sorted(range(len(found)), key=lambda k: abs(k - len(found) // 2)):
        one = found[k]
        away = ((one.place - now[k]) ** 2).sum(axis=1)
        here = int(away.argmin())
        if one.fits and away[here] < 1 and one.score[here] > one.score.max() - 1:
            return [*found[:k], Candidates(one.place[here : here + 1], one.score[here : here + 1]), *found[k + 1 :]]
    return found
