"""A whole instrument examined through its server: what ``stemloop instrument check`` does.

Safe for a microscope at work: it stays inside the server's limits, exposes little, changes controls by small steps and
puts them back, and leaves the beam blanked. What lies outside the limits it asks for by a hundredth only, so that a
server that does not refuse does no harm.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import stemloop
from stemloop.core.errors import LeaseError, StemloopError
from stemloop.core.instruction import Blank, Report
from stemloop.instrument import conformance, freshness
from stemloop.instrument.client import Client
from stemloop.instrument.subject import Nonconforming, Subject

#: How often the state is asked for alone, to time a command.
_TIMED = 200

_NO_TRIPS: dict[str, Any] = {"equal": [], "different": [], "left_out": {}}

Tell = Callable[[str], None]


def _silent(_: str) -> None:
    """Nobody listens."""


def forecast(scope: Client, moves: int = 1000, electrons_max: float = 2e6, seed: int = 0) -> dict[str, Any]:
    """What the examination will do and what it costs at most; touches nothing."""
    subject = _subject(scope, electrons_max, seed)
    kinds = subject.kinds()
    frames = freshness.learning_frames() * len(kinds[:1]) + moves + 200 if kinds else 0
    seconds = 0.0
    if kinds:
        seconds = frames * subject.dwells(kinds[0])[-1]
    return {
        "instrument": scope.info.name,
        "does": [
            f"up to {frames} small exposures at places all over the field: {moves} moves of the beam and what is "
            "needed to know the places",
            "one small exposure of each kind, and a long one that is aborted",
            "small steps of each control that the limits allow, and back",
            "requests just outside the limits, which the server must refuse",
            "leaves the controls as they are now, and the beam blanked",
        ],
        "exposes": list(kinds),
        "electrons_at_most": float(frames * electrons_max),
        "electrons_in_a_frame_at_most": float(electrons_max),
        "beam_time_s_at_most": seconds,
        "left_of_the_dose_budget": scope.dose().get("left"),
    }


def _subject(scope: Client, electrons_max: float, seed: int) -> Subject:
    return Subject(scope, f"check {secrets.token_hex(6)}", seed, electrons_max, scope.limits)


def examine(
    scope: Client,
    moves: int = 1000,
    electrons_max: float = 2e6,
    seed: int = 0,
    tell: Tell = _silent,
) -> dict[str, Any]:
    """Examine the instrument behind ``scope``, which must not hold the lease yet.

    Parameters
    ----------
    scope : Client
        Of the role agent or above.
    moves : int
        Moves of the beam between places whose frames look different.
    electrons_max : float
        Most electrons in one of these frames.
    seed : int
        Of the choice of places.
    tell : callable
        Called with a line about each check when it begins.

    Returns
    -------
    dict
        JSON-able; see the how-to of a facility. ``ok`` is the verdict.
    """
    began = time.time()
    checks: dict[str, dict[str, Any]] = {}
    subject = _subject(scope, electrons_max, seed)
    spent = scope.dose()["spent"]
    tell("a command without the lease")
    _run(checks, "lease is needed", lambda: _lease_is_needed(subject))
    with scope.lease():
        start = scope.state()
        try:
            found = _examine(subject, checks, moves, tell)
        finally:
            tell("everything back to where it was")
            moved = conformance.put_back(subject, start)
            if "blank" in scope.info.instructions:
                subject.ask(Blank(True))
    checks["controls are back"] = {"ok": not moved, "left": moved}
    blanked = scope.state().get("blanked")
    limits, trips = checks.get("limits", {}), checks.get("round trips", {})
    return {
        "instrument": scope.info.name,
        "stemloop": stemloop.__version__,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": round(time.time() - began, 3),
        "ok": all(check["ok"] for check in checks.values()),
        "commands": dict(subject.commands),
        "moves": found.moves,
        "places": found.places,
        "moved_for": found.kind,
        "dwell_s": found.dwell_s,
        "stale_frames": found.stale_frames,
        "stale": found.stale[:20] + [{"where": line} for line in found.clock[:20]],
        "limits_tried": limits.pop("tried", 0),
        "breaches": limits.pop("breaches", []),
        "round_trips": {name: trips.pop(name, empty) for name, empty in _NO_TRIPS.items()},
        "latency_ms": {kind: _latency(seconds) for kind, seconds in subject.latency_s.items()},
        "electrons": scope.dose()["spent"] - spent,
        "beam": "not reported" if blanked is None else "blanked" if blanked else "open",
        "checks": checks,
    }


def _examine(subject: Subject, checks: dict[str, Any], moves: int, tell: Tell) -> freshness.Freshness:
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "info": lambda: conformance.info_is_truthful(subject),
        "declared instructions": lambda: conformance.declared_instructions_work(subject),
        "undeclared instructions": lambda: conformance.undeclared_is_refused(subject),
        "state vector": lambda: conformance.state_is_complete(subject),
        "round trips": lambda: conformance.state_round_trips(subject),
        "blank": lambda: conformance.blank_blanks(subject),
        "limits": lambda: conformance.limits_hold(subject),
        "old fencing number": lambda: _old_number_is_refused(subject),
        "repeated ids": lambda: conformance.repeated_ids_expose_once(subject),
        "abort": lambda: conformance.abort_ends(subject),
        "latency": lambda: _timed(subject, min(_TIMED, moves)),
    }
    for name, check in steps.items():
        tell(name)
        _run(checks, name, check)
    found = freshness.Freshness()

    def look() -> dict[str, Any]:
        nonlocal found
        found = freshness.check_freshness(subject, moves)
        if found.stale_frames:
            raise Nonconforming(f"{found.stale_frames} frames are not those of the position that was asked for.")
        if found.carried_over > freshness.CARRIED:
            raise Nonconforming(f"{found.carried_over:.0%} of the light in a frame is that of the position before.")
        return {"moves": moves, "places": found.places, "carried_over": round(found.carried_over, 4)}

    tell(f"{moves} moves of the beam")
    _run(checks, "stale frames", look)
    return found


def _run(checks: dict[str, Any], name: str, check: Callable[[], dict[str, Any]]) -> None:
    try:
        checks[name] = {"ok": True, **check()}
    except LeaseError:
        raise  # somebody took the microscope: nothing more is to be done here
    except Nonconforming as error:
        checks[name] = {"ok": False, "message": str(error), **error.figures}
    except StemloopError as error:
        checks[name] = {"ok": False, "message": str(error)}


def _lease_is_needed(subject: Subject) -> dict[str, Any]:
    try:
        subject.ask(Blank(True) if "blank" in subject.info.instructions else Report())
    except LeaseError as error:
        return {"said": str(error)}
    raise Nonconforming("a command was carried out without the lease.")


def _old_number_is_refused(subject: Subject) -> dict[str, Any]:
    """A command with the fencing number of an earlier lease must be refused."""
    scope = subject.scope
    assert isinstance(scope, Client)
    number = scope.fencing
    assert number is not None
    scope.fencing = number - 1
    try:
        subject.ask(Blank(True) if "blank" in subject.info.instructions else Report())
    except LeaseError as error:
        return {"said": str(error)}
    finally:
        scope.fencing = number
    raise Nonconforming(f"a command with the fencing number {number - 1} was carried out under the lease {number}.")


def _timed(subject: Subject, count: int) -> dict[str, Any]:
    for _ in range(count):
        subject.ask(Report())
    return {"reports": count}


def _latency(seconds: list[float]) -> dict[str, float]:
    each = np.array(seconds) * 1e3
    return {
        "count": len(seconds),
        "median": round(float(np.median(each)), 4),
        "p99": round(float(np.percentile(each, 99)), 4),
    }
