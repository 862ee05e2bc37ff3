"""What every instrument must do, as checks that a test suite and ``stemloop instrument check`` share.

Each check asks an instrument (a :class:`~stemloop.instrument.subject.Subject`), returns its figures, and raises
:class:`~stemloop.instrument.subject.Nonconforming` with what was seen. Every check leaves the controls where they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from stemloop.core.errors import Aborted, InputError, InstrumentError, LimitError, Refused, StemloopError
from stemloop.core.instruction import (
    KINDS,
    Blank,
    Detector,
    Diffraction,
    Field,
    Image,
    Instruction,
    Optics,
    Position,
    Probe,
    Report,
    Spectrum,
    Stage,
)
from stemloop.core.protocols import Exposure, Reporting
from stemloop.instrument.limits import CONTROLS
from stemloop.instrument.subject import Bare, Nonconforming, Subject

#: How far a control is moved, from the largest step to the smallest that is tried, by the unit of its name.
STEPS = {
    "m": (10e-9, 1e-9, 1e-10),
    "rad": (5e-3, 1e-3, 1e-4),
    "A": (-2e-12, -5e-13),
    "eV": (0.0,),
}
#: Controls whose steps have another size: coarse aberrations, and what is moved by a part of itself.
_OWN_STEPS = {
    "C21_m": (20e-9, 5e-9),
    "C23_m": (20e-9, 5e-9),
    "C30_m": (1e-6, 1e-7),
    "semiangle_rad": (-5e-4, 5e-4, -1e-4),
    "field_height_m": (-1e-9, -1e-10),
    "field_width_m": (-1e-9, -1e-10),
}
#: A reported value equals the one that was set within this part of it, where the instrument declares no resolution.
RELATIVE = 1e-9
_RATE_WAIT_S = (0.2, 1.0, 3.0)
#: A command is aborted this long after it was sent, and must have ended this long after that [s].
_ABORT_AFTER_S, _HEARS_S = 0.05, 2.0


# --------------------------------------------------------------------------------------------------- what it says


def info_is_truthful(subject: Subject) -> dict[str, Any]:
    """What the instrument says of itself can be: known kinds, a field, detectors for what it records."""
    info = subject.info
    kinds = info.instructions
    if not info.name or len(set(kinds)) != len(kinds) or not set(kinds) <= set(KINDS):
        raise Nonconforming(f"the instructions {kinds} of {info.name!r} are not each one of {', '.join(KINDS)}.")
    if not all(math.isfinite(size) and size > 0 for size in info.field_m) or len(info.field_m) != 2:
        raise Nonconforming(f"the field is {info.field_m}; it must be (height, width) in metres, both above zero.")
    if not (math.isfinite(info.energy_eV) and info.energy_eV >= 0):
        raise Nonconforming(f"the beam energy is {info.energy_eV} eV.")
    if ("diffraction" in kinds) and info.camera is None:
        raise Nonconforming("it declares diffraction and no camera.")
    if ("spectrum" in kinds) and info.energy_loss is None:
        raise Nonconforming("it declares spectra and no energy-loss axis.")
    if info.positions_m is not None:
        places = np.asarray(info.positions_m)
        if places.ndim != 2 or places.shape[1] != 2 or (places < 0).any() or (places > np.array(info.field_m)).any():
            raise Nonconforming("positions_m must be (n, 2) positions inside the field.")
    return {"instructions": list(kinds)}


def samples(subject: Subject) -> Iterator[Instruction]:
    """One harmless instruction of each declared kind."""
    info, state = subject.info, subject.scope.state()
    for kind in subject.kinds():
        yield subject.frame_at(kind, subject.places(1, kind)[0], subject.dwells(kind)[0])
        if kind != "image":
            places = tuple(subject.places(3, kind))
            yield (Diffraction if kind == "diffraction" else Spectrum)(places, subject.dwells(kind)[0])
    middle = info.field_m[0] / 2, info.field_m[1] / 2
    turn = float(state.get("field_rotation_rad") or 0.0)
    quiet: dict[str, Instruction] = {
        "probe": Probe(middle if info.positions_m is None else subject.places(1, "probe")[0]),
        "blank": Blank(True),
        "stage": Stage(**_present(subject, state, Stage, "stage_")),
        "optics": Optics(**_present(subject, state, Optics, "", without=("energy_eV",))),
        "field": Field(rotation_rad=turn if _allowed(subject, "field_rotation_rad") else None),
        "report": Report(),
    }
    for kind, instruction in quiet.items():
        if kind in info.instructions and kind not in subject.limits.get("forbidden", ()):
            yield instruction


def _present(
    subject: Subject, state: dict[str, Any], cls: type[Instruction], prefix: str, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Fields of an instruction at the values that the state reports: a command that changes nothing. What the limits
    do not name is left out."""
    found = {}
    for entry in dataclasses.fields(cls):
        value = state.get(prefix + entry.name)
        if value is not None and entry.name not in without and _allowed(subject, prefix + entry.name):
            found[entry.name] = tuple(value) if isinstance(value, (list, tuple)) else float(value)
    return found


def _allowed(subject: Subject, control: str) -> bool:
    """Whether the limits let a control change at all."""
    declared = subject.limits.get("controls")
    return (declared is None or control in declared) and control not in subject.limits.get("forbidden", ())


def declared_instructions_work(subject: Subject) -> dict[str, Any]:
    """Each declared kind is carried out, and brings the frames that were asked for."""
    tried = []
    with opened(subject):
        for instruction in samples(subject):
            try:
                exposure = subject.ask(instruction)
            except StemloopError as error:
                raise Nonconforming(f"it declares {instruction.kind!r} and answers: {error}") from error
            check_frames(subject, instruction, exposure)
            tried.append(instruction.kind)
    return {"tried": tried}


def check_frames(subject: Subject, asked: Instruction, exposure: Exposure) -> None:
    """As many frames as positions, in the declared shape, of finite numbers; none from what does not expose."""
    frames = exposure.frames
    if not asked.exposes:
        if frames is not None:
            raise Nonconforming(f"{asked.kind} exposes nothing and brought frames.")
        return
    if frames is None:
        raise Nonconforming(f"{asked.kind} brought no frames.")
    frames = np.asarray(frames)
    wanted: tuple[int, ...] = (asked.exposed_positions,)
    if isinstance(asked, Image):
        wanted = (1, *asked.shape)
    elif isinstance(asked, Diffraction) and subject.info.camera is not None:
        wanted = (*wanted, *subject.info.camera.shape)
    elif isinstance(asked, Spectrum) and subject.info.energy_loss is not None:
        wanted = (*wanted, subject.info.energy_loss[2])
    if frames.shape != wanted:
        raise Nonconforming(f"{asked.kind} brought frames of shape {frames.shape}; what it declares gives {wanted}.")
    if not np.issubdtype(frames.dtype, np.number) or not np.isfinite(frames).all():
        raise Nonconforming(f"{asked.kind} brought frames that are not finite numbers.")
    if not (math.isfinite(exposure.electrons) and exposure.electrons >= 0):
        raise Nonconforming(f"{asked.kind} reports {exposure.electrons!r} electrons.")


def undeclared_is_refused(subject: Subject) -> dict[str, Any]:
    """A kind that is not declared is refused, and changes nothing."""
    missing = [kind for kind in KINDS if kind not in subject.info.instructions]
    middle = subject.info.field_m[0] / 2, subject.info.field_m[1] / 2
    examples: dict[str, Instruction] = {
        "image": subject.frame_at("image", middle, 1e-6),
        "diffraction": Diffraction((middle,), 1e-6),
        "spectrum": Spectrum((middle,), 1e-6),
        "probe": Probe(middle),
        "blank": Blank(True),
        "optics": Optics(C10_m=0.0),
        "stage": Stage(x_m=0.0),
        "field": Field(rotation_rad=0.0),
        "detector": Detector("HAADF", inserted=True),
        "report": Report(),
    }
    for kind in missing:
        expect_refusal(subject, examples[kind], f"{kind!r} is not declared")
    return {"tried": missing}


def expect_refusal(subject: Subject, instruction: Instruction, why: str) -> None:
    """The instruction must be refused and change nothing that can be set."""
    before = _settings(subject)
    try:
        subject.ask(instruction)
    except (Refused, InputError):
        pass
    except InstrumentError as error:
        if isinstance(error, Nonconforming):
            raise
    else:
        raise Nonconforming(f"{instruction.kind} was carried out although {why}: {instruction!r:.200}")
    if (after := _settings(subject)) != before:
        changed = [name for name in before if after.get(name) != before[name]]
        raise Nonconforming(f"the refused {instruction.kind} changed {', '.join(changed)}.")


# ------------------------------------------------------------------------------------------------------ the state


def controls(subject: Subject) -> Iterator[tuple[str, Callable[[Any], Instruction]]]:
    """(name in the state, instruction that sets it) of every control that is declared and reported."""
    state = subject.scope.state()
    for cls, prefix in ((Optics, ""), (Stage, "stage_")):
        if cls.kind in subject.info.instructions:
            for entry in dataclasses.fields(cls):
                if state.get(prefix + entry.name) is not None:
                    yield prefix + entry.name, _setter(cls, entry.name)
    if "detector" in subject.info.instructions:
        for device in ("camera", "eels", *subject.info.detectors):
            for entry in dataclasses.fields(Detector):
                if state.get(f"{device}_{entry.name}") is not None:
                    yield f"{device}_{entry.name}", _setter(Detector, entry.name, name=device)
    if "field" in subject.info.instructions:
        if state.get("field_rotation_rad") is not None:
            yield "field_rotation_rad", _setter(Field, "rotation_rad")
        if state.get("field_height_m") is not None:
            yield "field_height_m", lambda v: Field(extent_m=(v, subject.scope.state()["field_width_m"]))
            yield "field_width_m", lambda v: Field(extent_m=(subject.scope.state()["field_height_m"], v))


def _setter(cls: type[Instruction], field: str, **rest: Any) -> Callable[[Any], Instruction]:
    return lambda value: cls(**{field: value, **rest})


def _settings(subject: Subject) -> dict[str, Any]:
    """The part of the state that instructions set."""
    state = subject.scope.state()
    return {name: state.get(name) for name, _ in controls(subject)}


def state_is_complete(subject: Subject) -> dict[str, Any]:
    """Plain values that survive JSON; whatever can be set can be read."""
    state = subject.scope.state()
    try:
        again = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise Nonconforming(f"the state vector is not plain finite values: {error}") from None
    if again != state and json.dumps(again) != json.dumps(state):
        raise Nonconforming("the state vector changes when it is written as JSON and read back.")
    kinds = subject.info.instructions
    needed = {"blank": ("blanked",), "probe": ("probe_y_m", "probe_x_m")}
    missing = [name for kind, names in needed.items() if kind in kinds for name in names if name not in state]
    for kind, names in {
        "optics": ("C10_m",),
        "stage": ("stage_x_m", "stage_y_m"),
        "field": ("field_height_m",),
    }.items():
        if kind in kinds:
            missing += [name for name in names if name not in state]
    if missing:
        raise Nonconforming(
            f"it can set {', '.join(missing)} and does not report {'it' if len(missing) == 1 else 'them'}."
        )
    if subject.ask(Report()).state.keys() != state.keys():
        raise Nonconforming("a Report brings other names than the state vector has.")
    return {"values": len(state)}


def resolution(subject: Subject, name: str, value: Any) -> float:
    """Within what a reported value equals the one that was set."""
    declared = (subject.info.sample.get("resolution") or {}).get(name)
    if declared is not None:
        return float(declared)
    return RELATIVE * max(1e-12, float(np.max(np.abs(value))))


def _reported(subject: Subject, name: str) -> Any:
    return subject.ask(Report()).state.get(name)


def _equal(subject: Subject, name: str, reported: Any, wanted: Any) -> bool:
    try:
        off = np.abs(np.asarray(reported, dtype=np.float64) - np.asarray(wanted, dtype=np.float64))
    except (TypeError, ValueError):
        return False
    return off.shape == np.shape(wanted) and bool(off.max() <= resolution(subject, name, wanted))


def state_round_trips(subject: Subject) -> dict[str, Any]:
    """Each control is set, reported, and set back: what is reported is what was set. Small steps, inside the limits."""
    equal: list[str] = []
    different: list[str] = []
    left_out: dict[str, str] = {}
    for name, setter in list(controls(subject)):
        if name.startswith("field_"):
            continue
        before = subject.scope.state()[name]
        before = tuple(before) if isinstance(before, (list, tuple)) else before
        asked, refusal = None, "no step was allowed"
        for wanted in _steps(subject, name, before):
            try:
                subject.ask(setter(wanted))
            except (Refused, InputError) as error:
                refusal = str(error)
                continue
            asked = wanted
            break
        if asked is None:
            left_out[name] = refusal
            continue
        there = _equal(subject, name, _reported(subject, name), asked)
        patiently(subject, setter(before))
        back = _equal(subject, name, _reported(subject, name), before)
        (equal if there and back else different).append(name)
    _field_round_trip(subject, equal, different, left_out)
    _probe_round_trip(subject, equal, different)
    found = {"equal": equal, "different": different, "left_out": left_out}
    if different:
        raise Nonconforming(f"what was set is not what is reported: {', '.join(different)}.", **found)
    return found


def _field_round_trip(subject: Subject, equal: list[str], different: list[str], left_out: dict[str, str]) -> None:
    """A smaller field, turned a little so that its corners stay inside the largest one; then the one before."""
    before = subject.scope.state()
    if "field" not in subject.info.instructions or before.get("field_height_m") is None:
        return
    height, width, turn = (float(before.get(f"field_{n}") or 0.0) for n in ("height_m", "width_m", "rotation_rad"))
    turned = {"field_height_m": 0.9 * height, "field_width_m": 0.9 * width, "field_rotation_rad": turn + 5e-3}
    upright = {**turned, "field_rotation_rad": turn}
    refusal = ""
    for wanted in (turned, upright):
        rotation = wanted["field_rotation_rad"] if wanted is turned else None
        try:
            subject.ask(Field((wanted["field_height_m"], wanted["field_width_m"]), rotation))
        except (Refused, InputError) as error:
            left_out["field_rotation_rad"] = refusal = str(error)
            continue
        break
    else:
        left_out["field_height_m"] = left_out["field_width_m"] = refusal
        return
    there = subject.ask(Report()).state
    patiently(subject, Field((height, width), turn if wanted is turned else None))
    back = subject.ask(Report()).state
    for name in wanted if wanted is turned else ("field_height_m", "field_width_m"):
        same = _equal(subject, name, there.get(name), wanted[name]) and _equal(
            subject, name, back.get(name), before[name]
        )
        (equal if same else different).append(name)


def _probe_round_trip(subject: Subject, equal: list[str], different: list[str]) -> None:
    if "probe" not in subject.info.instructions:
        return
    for place in subject.places(3, "probe"):
        subject.ask(Probe(place))
        state = subject.ask(Report()).state
        same = all(_equal(subject, n, state.get(n), v) for n, v in zip(("probe_y_m", "probe_x_m"), place, strict=True))
        (equal if same else different).append("probe")


def _steps(subject: Subject, name: str, before: Any) -> Iterator[Any]:
    """Values near the present one, the furthest first."""
    if name.endswith("_binning"):
        yield from ((2, 2), (4, 4), before) if tuple(before) == (1, 1) else ((1, 1), before)
        return
    if isinstance(before, bool):
        yield not before
        return
    steps = _OWN_STEPS.get(name) or STEPS.get(name.rsplit("_", 1)[1], (0.0,))
    limit = (subject.limits.get("controls") or {}).get(name) or {}
    for step in steps:
        most = limit.get("step")
        bounded = step if most is None else math.copysign(min(abs(step), 0.5 * float(most)), step)
        for sign in (1, -1):
            if isinstance(before, tuple):
                yield tuple(value + sign * bounded for value in before)
            elif name == "current_A":
                yield before * (0.9 if sign > 0 else 0.99)
            else:
                yield before + sign * bounded


def patiently(subject: Subject, instruction: Instruction) -> None:
    """Carry out an instruction that a limit of rates may put off."""
    for wait_s in (*_RATE_WAIT_S, None):
        try:
            subject.ask(instruction)
            return
        except LimitError:
            if wait_s is None:
                raise
            time.sleep(wait_s)


def state_is_restored(subject: Subject) -> dict[str, Any]:
    """``restore(state())`` brings every value back, after the controls were elsewhere. For a bare instrument."""
    assert isinstance(subject.scope, Bare)
    instrument = subject.scope.instrument
    before = instrument.state()
    for name, setter in controls(subject):
        value = before[name]
        value = tuple(value) if isinstance(value, (list, tuple)) else value
        for wanted in _steps(subject, name, value):
            with contextlib.suppress(Refused, InputError):
                subject.ask(setter(wanted))
                break
    if "probe" in subject.info.instructions:
        subject.ask(Probe(subject.places(1, "probe")[0]))
    instrument.restore(json.loads(json.dumps(before)))
    after = instrument.state()
    changed = [name for name in before if json.dumps(after.get(name)) != json.dumps(before[name])]
    if changed:
        raise Nonconforming(f"restore(state()) left {', '.join(changed)} changed.")
    return {"values": len(before)}


# ---------------------------------------------------------------------------------------------- the beam, the noise


@contextlib.contextmanager
def opened(subject: Subject) -> Iterator[None]:
    """An instrument without a server is unblanked by hand; a server opens the beam for each exposure itself."""
    bare = isinstance(subject.scope, Bare) and "blank" in subject.info.instructions
    if bare:
        subject.ask(Blank(False))
    try:
        yield
    finally:
        if bare:
            with contextlib.suppress(StemloopError):
                subject.ask(Blank(True))


def blank_blanks(subject: Subject) -> dict[str, Any]:
    """A blanked beam is reported, and exposes nothing: an exposure is refused or dark."""
    if "blank" not in subject.info.instructions:
        return {"blank": "not declared"}
    subject.ask(Blank(True))
    if not subject.scope.state().get("blanked"):
        raise Nonconforming("the beam was blanked and is not reported so.")
    for kind in () if subject.recorded else subject.kinds()[:1]:
        asked = subject.frame_at(kind, subject.places(1, kind)[0], subject.dwells(kind)[0])
        if isinstance(subject.scope, Bare):
            _stays_dark(subject, asked)
        else:
            subject.ask(asked)
            if not subject.scope.state().get("blanked"):
                raise Nonconforming("the beam was blanked, an exposure opened it, and it stayed open.")
    return {"blank": "blanks"}


def _stays_dark(subject: Subject, asked: Instruction) -> None:
    try:
        exposure = subject.ask(asked)
    except InstrumentError as error:
        if isinstance(error, Nonconforming):
            raise
        return
    except (Refused, InputError):
        return
    if exposure.electrons > 0:
        raise Nonconforming(f"with a blanked beam {asked.kind} brought a frame of {exposure.electrons:.3g} electrons.")


def noise_follows_the_key(subject: Subject) -> dict[str, Any]:
    """From the same state the same key gives the same frames. For a bare instrument that is simulated or recorded."""
    assert isinstance(subject.scope, Bare)
    instrument, tried = subject.scope.instrument, []
    with opened(subject):
        for kind in subject.kinds():
            asked = subject.frame_at(kind, subject.places(1, kind)[0], subject.dwells(kind)[0])
            before = instrument.state()
            first = subject.ask(asked, f"same {kind}")
            instrument.restore(before)
            again = subject.ask(asked, f"same {kind}")
            if not np.array_equal(first.frames, again.frames):  # type: ignore[arg-type]
                raise Nonconforming(f"the same {kind} under the same key and state brought other frames.")
            tried.append(kind)
    return {"tried": tried}


# ------------------------------------------------------------------------------------------------------ the limits


def outside(subject: Subject) -> Iterator[tuple[str, Instruction]]:
    """(what, instruction) just outside the field and the declared limits."""
    info, limits, state = subject.info, subject.limits, subject.scope.state()
    height, width = limits.get("field_m") or info.field_m
    height, width = min(height, info.field_m[0]), min(width, info.field_m[1])
    if state.get("field_height_m") is not None:
        height, width = float(state["field_height_m"]), float(state["field_width_m"])
    beyond: dict[str, Position] = {
        "below the field": (1.01 * height, width / 2),
        "right of the field": (height / 2, 1.01 * width),
        "above the field": (-0.01 * height, width / 2),
    }
    for where, place in beyond.items():
        for kind in subject.kinds():
            if kind != "image":
                yield f"{kind} {where}", subject.frame_at(kind, place, subject.dwells(kind)[0])
        if "probe" in info.instructions:
            yield f"probe {where}", Probe(place)
    if "image" in info.instructions:
        extent = 1.02 * height, 1.02 * width
        yield "image over the field", Image((-0.01 * height, -0.01 * width), extent, (4, 4), 1e-6)
    if limits:
        yield from _outside_limits(subject, (height / 2, width / 2))


def _outside_limits(subject: Subject, middle: Position) -> Iterator[tuple[str, Instruction]]:
    limits, state = subject.limits, subject.scope.state()
    for kind in subject.kinds()[:1]:
        place = subject.places(1, kind)[0]
        yield "dwell", subject.frame_at(kind, place, 1.01 * float(limits["dwell_max_s"]))
    for name, setter in controls(subject):
        declared = (limits.get("controls") or {}).get(name)
        if declared is None:
            if name in CONTROLS:
                yield f"{name}, which the limits do not name", setter(_tuple(state[name]))
            continue
        low, high = declared["range"]
        for end, sign in ((high, 1.0), (low, -1.0)):
            value = end + sign * 0.01 * (high - low)
            if name in ("semiangle_rad", "current_A", "energy_eV") and value <= 0:
                continue
            yield f"{name} {value:.4g}", setter((value, value) if isinstance(state[name], (list, tuple)) else value)
    if "optics" in subject.info.instructions and "current_max_A" in limits:
        yield "current", Optics(current_A=1.01 * float(limits["current_max_A"]))
    if "blank" in subject.info.instructions and limits.get("unblank") is False:
        yield "a beam left open", Blank(False)
    if "image" in subject.info.instructions:
        known = subject.info.detectors
        for detector in ("BF", "ABF", "ADF", "HAADF"):
            if detector not in known:
                asked = subject.frame_at("image", middle, 1e-6)
                yield f"detector {detector}", dataclasses.replace(asked, detector=detector)  # type: ignore[arg-type, call-arg]
                break


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def limits_hold(subject: Subject) -> dict[str, Any]:
    """What is just outside the field or a declared limit is refused and changes nothing."""
    tried, breaches = 0, []
    with opened(subject):
        for what, instruction in list(outside(subject)):
            tried += 1
            before = _settings(subject)
            try:
                subject.ask(instruction)
            except (Refused, InputError):
                if _settings(subject) != before:
                    breaches.append(f"{what}: refused, and yet something changed")
            except InstrumentError as error:
                breaches.append(f"{what}: it reached the instrument, which failed: {error}")
            else:
                breaches.append(what)
                _put_back(subject, before)
    if breaches:
        raise Nonconforming(
            f"{len(breaches)} of {tried} requests outside the limits were not refused: {', '.join(breaches)}.",
            tried=tried,
            breaches=breaches,
        )
    return {"tried": tried, "breaches": []}


def _put_back(subject: Subject, before: dict[str, Any]) -> None:
    setters = dict(controls(subject))
    for name, value in before.items():
        if value is not None and _reported(subject, name) != value:
            with contextlib.suppress(StemloopError):
                patiently(subject, setters[name](_tuple(value)))


def put_back(subject: Subject, state: dict[str, Any]) -> list[str]:
    """Bring every control and the probe back to ``state``; returns what could not be brought back."""
    _put_back(subject, {name: state.get(name) for name, _ in controls(subject)})
    if "probe" in subject.info.instructions and state.get("probe_y_m") is not None:
        with contextlib.suppress(StemloopError):
            subject.ask(Probe((state["probe_y_m"], state["probe_x_m"])))
    now = subject.ask(Report()).state
    return [
        n for n, _ in controls(subject) if state.get(n) is not None and not _equal(subject, n, now.get(n), state[n])
    ]


# ------------------------------------------------------------------------------------------------- ids and abortion


def repeated_ids_expose_once(subject: Subject) -> dict[str, Any]:
    """A repeated id answers the first result and costs nothing. Behind a server."""
    tried = 0
    for kind in subject.kinds():
        asked = subject.frame_at(kind, subject.places(1, kind)[0], subject.dwells(kind)[0])
        command_id = subject.new_id()
        first = subject.ask(asked, command_id)
        spent = subject.scope.dose().get("spent")
        begin = len(subject.moments)
        again = subject.ask(asked, command_id)
        del subject.moments[begin:]  # the moment of the first exposure once more
        if not np.array_equal(first.frames, again.frames) or again.epoch != first.epoch:  # type: ignore[arg-type]
            raise Nonconforming(f"a repeated {kind} brought another result than the first.")
        if subject.scope.dose().get("spent") != spent:
            raise Nonconforming(f"a repeated {kind} was exposed again.")
        tried += 1
    return {"tried": tried}


def abort_ends(subject: Subject) -> dict[str, Any]:
    """A long exposure that is aborted raises ``Aborted``, and the next command works. For what can be aborted.

    What ends within a moment of the abort may have been over before it was heard; then a longer one is tried.
    """
    bare = subject.scope.instrument if isinstance(subject.scope, Bare) else None
    abort = getattr(bare or subject.scope, "abort", None)
    points = [kind for kind in subject.kinds() if kind != "image"]
    if abort is None or not points:
        return {"abort": "not declared"}
    kind, verdict = points[0], "it ended before an abort could reach it"
    places = subject.places(16, kind)
    cls = Diffraction if kind == "diffraction" else Spectrum
    for positions in _longer(subject, kind):
        asked = cls(tuple(places[i % len(places)] for i in range(positions)), subject.dwells(kind)[0])
        with opened(subject), _aborting(bare, abort) as called:
            try:
                subject.ask(asked)
            except Aborted as error:
                verdict = str(error)
                break
            over = called and time.monotonic() - called[0] > _HEARS_S
        if over or (bare is not None and isinstance(bare, Reporting)):
            raise Nonconforming(f"a {kind} of {positions} positions was aborted and went on to its end.")
    with opened(subject):
        again = subject.frame_at(kind, places[0], subject.dwells(kind)[0])
        check_frames(subject, again, subject.ask(again))
    return {"abort": verdict}


def _longer(subject: Subject, kind: str) -> Iterator[int]:
    """Numbers of positions, each four times the one before, within what a server lets one command bring."""
    camera, loss = subject.info.camera, subject.info.energy_loss
    values = math.prod(camera.shape) if kind == "diffraction" and camera else loss[2] if loss else 1
    most = int(float(subject.limits.get("frame_bytes_max") or 2**27) / (8 * values))
    for positions in (250, 1000, 4000, 16000):
        if positions < most:
            yield positions
        else:
            yield most
            return


@contextlib.contextmanager
def _aborting(bare: Any, abort: Callable[[], Any]) -> Iterator[list[float]]:
    """Abort while something runs: a bare instrument that reports its progress at its first word, any other soon. Gives
    the time at which it was called."""
    called: list[float] = []

    def call(*_: Any) -> None:
        if not called:
            called.append(time.monotonic())
            with contextlib.suppress(Refused, InstrumentError):  # it has ended already
                abort()

    if bare is not None and isinstance(bare, Reporting):
        before, bare.progress = bare.progress, call
        try:
            yield called
        finally:
            bare.progress = before
        return
    timer = threading.Timer(_ABORT_AFTER_S, call)
    timer.start()
    try:
        yield called
    finally:
        timer.cancel()
        timer.join()
