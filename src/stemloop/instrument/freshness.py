"""Does each frame belong to the position that was asked for?

A microscope whose detectors run freely answers "the next frame" with one that began before the beam had moved. So we
go to and fro between places whose frames look different, and look at each frame: whose is it?

First the places are learnt. At each the beam stays for several frames, and the first ones are thrown away, so that
even an instrument that is always a frame late shows the right picture at last. Two places A and B with mean frames a
and b are told apart by ``s(f) = <f - (a + b) / 2, w>``, ``w = (a - b) / (|a| + |b| + c)``: positive for a frame of A,
negative for one of B (the linear discriminant for counts, whose variance is their mean; R. A. Fisher, Annals of
Eugenics 7, 179 (1936), doi:10.1111/j.1469-1809.1936.tb02137.x). Frames that did not take part in the means give its
deviation, and places are used only if they differ by ``MARGIN`` deviations.

A frame is stale if it is more like another place than like its own. If a part of its light is that of the place before,
its ``s`` against that place is smaller than its ``s`` against the others, both as parts of what they should be; the
mean difference is about that part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, InstrumentError, Refused
from stemloop.core.instruction import Diffraction, Image, Position, Spectrum
from stemloop.instrument.subject import Moment, Nonconforming, Subject

#: How many deviations two places must be apart.
MARGIN = 8.0
#: At most this part of the frames, on average, may be light of the place before.
CARRIED = 0.1
#: How many places are looked at for some that differ.
CANDIDATES = 16
#: Clocks are read in steps and by busy machines [s].
CLOCK_S = 0.02

_DISCARDED, _LEARNT, _PROVED = 2, 3, 4
_PLACES, _ENOUGH = 6, 4
_FORGET = 0.15
_BATCHES = 5


@dataclass
class Places:
    """Places whose frames are known: ``means[i]`` is that of ``positions[i]``."""

    kind: str
    dwell_s: float
    positions: list[Position]
    means: list[NDArray[np.float64]]

    def weights(self, one: int, other: int) -> tuple[NDArray[np.float64], float, float]:
        """(w, middle, half) of the discriminant between two places: its value is ``w.f - middle``, +-half at best."""
        a, b = self.means[one], self.means[other]
        size = np.abs(a) + np.abs(b)
        floor = 0.05 * float(size.mean()) or 1.0
        w = (a - b) / (size + floor)
        return w, float(w @ (a + b)) / 2, float(w @ (a - b)) / 2

    def between(self, frame: NDArray[np.float64], place: int, other: int) -> float:
        """1 for a frame of the place, -1 for one of the other."""
        w, middle, half = self.weights(place, other)
        return (float(w @ frame) - middle) / half

    def share(self, frame: NDArray[np.float64], place: int) -> float:
        """Above 0 if the frame is more like the place than like any other."""
        return min(self.between(frame, place, other) for other in range(len(self.means)) if other != place)

    def looks_like(self, frame: NDArray[np.float64]) -> int:
        """The place that the frame resembles most."""
        return max(range(len(self.means)), key=lambda place: self.share(frame, place))

    def learn(self, frame: NDArray[np.float64], own: int) -> None:
        """The sample drifts: the mean follows the frames that belong."""
        self.means[own] = (1 - _FORGET) * self.means[own] + _FORGET * frame


@dataclass
class Freshness:
    """What was seen: ``moves``, ``stale`` frames with where they came from, and clocks that contradict."""

    moves: int = 0
    places: int = 0
    kind: str = ""
    dwell_s: float = 0.0
    stale: list[dict[str, Any]] = field(default_factory=list)
    clock: list[str] = field(default_factory=list)
    shares: list[tuple[float, float]] = field(default_factory=list)

    @property
    def carried_over(self) -> float:
        """The part of a frame that is light of the place before, on average; 0 but for noise in a lawful instrument."""
        if not self.shares:
            return 0.0
        before, others = np.mean(self.shares, axis=0)
        return float(others - before)

    @property
    def stale_frames(self) -> int:
        """Frames that are not those of their command, by their looks or by their times."""
        return len(self.stale) + len(self.clock)


def learning_frames() -> int:
    """How many frames the places cost at most before the moves begin."""
    return CANDIDATES * (_DISCARDED + _LEARNT + _PROVED) * 5


def _flat(frames: Any) -> NDArray[np.float64]:
    return np.asarray(frames, dtype=np.float64).ravel()


def _shown(subject: Subject, kind: str, place: Position, dwell_s: float) -> NDArray[np.float64]:
    exposure = subject.ask(subject.frame_at(kind, place, dwell_s))
    if exposure.frames is None or len(exposure.frames) != 1:
        raise Nonconforming(f"one {kind} at one place brought {_count(exposure.frames)} frames.")
    return _flat(exposure.frames[0])


def _count(frames: Any) -> Any:
    return "no" if frames is None else len(frames)


def find_places(subject: Subject, kind: str, candidates: int = CANDIDATES) -> Places | None:
    """Places whose frames can be told apart; None if there are none.

    The gentlest dwell that gives four of them, or else the one that gives most: between two places alone a frame that
    is two moves late would go unseen.
    """
    tried = subject.places(candidates, kind)
    best: Places | None = None
    for dwell_s in subject.dwells(kind):
        try:
            seen = [
                np.array([_shown(subject, kind, place, dwell_s) for _ in range(_DISCARDED + _LEARNT + _PROVED)])
                for place in tried
            ]
        except (Refused, InputError):
            continue  # this dwell is not allowed here
        chosen = _apart(kind, dwell_s, tried, [frames[_DISCARDED:] for frames in seen])
        if chosen is not None and (best is None or len(chosen.positions) > len(best.positions)):
            best = chosen
        if best is not None and len(best.positions) >= min(_ENOUGH, len(tried)):
            break
    return best


def _apart(kind: str, dwell_s: float, candidates: list[Position], seen: list[NDArray[np.float64]]) -> Places | None:
    """Up to six of the candidates that all differ from each other."""
    every = Places(kind, dwell_s, candidates, [frames[:_LEARNT].mean(axis=0) for frames in seen])
    number = len(candidates)
    differ = np.zeros((number, number), dtype=bool)
    for one in range(number):
        for other in range(one):
            differ[one, other] = differ[other, one] = _differ(every, seen, one, other)
    best: list[int] = []
    for first in range(number):
        chosen = [first]
        for other in range(number):
            if len(chosen) < _PLACES and all(differ[other, member] for member in chosen):
                chosen.append(other)
        best = max(best, chosen, key=len)
    if len(best) < 2:
        return None
    means = [seen[index].mean(axis=0) for index in best]
    return Places(kind, dwell_s, [candidates[index] for index in best], means)


def _differ(every: Places, seen: list[NDArray[np.float64]], one: int, other: int) -> bool:
    if every.means[one].shape != every.means[other].shape:
        raise Nonconforming("frames of the same kind came in different shapes.")
    w, middle, half = every.weights(one, other)
    if half <= 0 or not np.isfinite(half):
        return False
    scores = [seen[index][_LEARNT:] @ w - middle for index in (one, other)]
    spread = np.sqrt((scores[0].var(ddof=1) + scores[1].var(ddof=1)) / 2)
    apart = (scores[0].mean() - scores[1].mean()) / 2
    return bool(apart > MARGIN * spread and apart > 0.5 * half and scores[0].min() > 0 > scores[1].max())


def watch_moves(subject: Subject, places: Places, moves: int) -> Freshness:
    """Move the beam ``moves`` times between the places; never to the place where it is."""
    found = Freshness(moves, len(places.positions), places.kind, places.dwell_s)
    begin, here = len(subject.moments), 0
    _shown(subject, places.kind, places.positions[here], places.dwell_s)
    for move in range(moves):
        there = int(subject.rng.integers(len(places.positions) - 1))
        there += there >= here
        frame = _shown(subject, places.kind, places.positions[there], places.dwell_s)
        _note(found, places, frame, there, here, f"move {move}")
        here = there
    if places.kind != "image":
        for batch in range(_BATCHES):
            here = _watch_batch(subject, places, found, here, f"batch {batch}")
    found.clock = clock_contradictions(subject.moments[begin:])
    return found


def _note(found: Freshness, places: Places, frame: NDArray[np.float64], own: int, before: int, where: str) -> None:
    others = [places.between(frame, own, other) for other in range(len(places.means)) if other not in (own, before)]
    if before != own and others:
        found.shares.append((places.between(frame, own, before), float(np.mean(others))))
    if places.share(frame, own) > 0:
        places.learn(frame, own)
    else:
        looks = places.looks_like(frame)
        found.stale.append({"where": where, "place": own, "looks_like": looks, "place_before": before})


def _watch_batch(subject: Subject, places: Places, found: Freshness, here: int, where: str) -> int:
    """Several places in one command: each frame is that of its own place, in the order asked. Returns the last."""
    order = subject.rng.permutation(len(places.positions))
    positions = tuple(places.positions[index] for index in order)
    cls = Diffraction if places.kind == "diffraction" else Spectrum
    exposure = subject.ask(cls(positions, places.dwell_s))
    if exposure.frames is None or len(exposure.frames) != len(order):
        raise Nonconforming(f"{len(order)} places were asked; {_count(exposure.frames)} frames came.")
    for index, own in enumerate(order.tolist()):
        _note(found, places, _flat(exposure.frames[index]), own, here, f"{where}, frame {index}")
        here = own
    return here


def clock_contradictions(moments: list[Moment]) -> list[str]:
    """Times that cannot be: a frame that began before its command was sent, or before the one before had ended.

    The two clocks may differ by a constant. One number must explain all commands: no acquisition began before its
    command was sent, none ended after it was answered.
    """
    found = []
    for before, after in pairwise(moments):
        if after.epoch <= before.epoch:
            found.append(f"epoch {after.epoch} came after epoch {before.epoch}")
        if after.began_s < before.ended_s - CLOCK_S:
            found.append(f"epoch {after.epoch} began {before.ended_s - after.began_s:.3f} s before the last one ended")
    found += [f"epoch {m.epoch} ended before it began" for m in moments if m.ended_s < m.began_s]
    if not moments:
        return found
    # our clock + offset = the instrument's; sent + offset <= began and ended <= answered + offset for all
    most = np.array([m.began_s - m.sent_s for m in moments])
    least = np.array([m.ended_s - m.answered_s for m in moments])
    offset = _explains_most(most, least)
    for moment, upper, lower in zip(moments, most, least, strict=True):
        if offset > upper + CLOCK_S:
            found.append(f"epoch {moment.epoch} began {offset - upper:.3f} s before its command was sent")
        if offset < lower - CLOCK_S:
            found.append(f"epoch {moment.epoch} ended {lower - offset:.3f} s after its command was answered")
    return found


def _explains_most(most: NDArray[np.float64], least: NDArray[np.float64]) -> float:
    """The difference of the clocks that the fewest commands contradict."""
    tried = np.concatenate([most, least])
    early = np.searchsorted(np.sort(most), tried - CLOCK_S)
    late = len(least) - np.searchsorted(np.sort(least), tried + CLOCK_S, side="right")
    return float(tried[np.argmin(early + late)])


def check_freshness(subject: Subject, moves: int, kind: str | None = None) -> Freshness:
    """Find places and move between them; an ``InstrumentError`` if no two places look different."""
    kinds = [kind] if kind else list(subject.kinds())
    for one in kinds:
        places = find_places(subject, one, max(8, min(CANDIDATES, moves // 5)))
        if places is not None:
            return watch_moves(subject, places, moves)
    raise InstrumentError(
        f"no two places of the field look different in {', '.join(kinds) or 'any exposure'} with up to "
        f"{subject.electrons_max:.3g} electrons a frame, so nothing can be said about stale frames: go to a part of "
        "the sample with contrast, or allow more electrons."
    )


__all__ = ["Freshness", "Image", "Places", "check_freshness", "clock_contradictions", "find_places", "watch_moves"]
