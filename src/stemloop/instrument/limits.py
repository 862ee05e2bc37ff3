"""What may be asked of the microscope: one declared, versioned and hashed set of limits.

:class:`Limits` are read from YAML (or JSON), checked without any memory (:meth:`Limits.check`), and identified by their
``content_hash``, which goes into the audit with every command. :class:`LimitsWatch` remembers what the rates and the
parked beam need. A refusal is a :class:`~stemloop.core.errors.LimitError` that says what was asked, what the limit is,
and what to do.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stemloop.core.errors import InputError, LimitError
from stemloop.core.field import absolute, chosen
from stemloop.core.instruction import (
    KINDS,
    Blank,
    Detector,
    Diffraction,
    Field,
    Image,
    Instruction,
    Optics,
    Probe,
    Spectrum,
    Stage,
)
from stemloop.core.protocols import InstrumentInfo
from stemloop.core.record import content_hash
from stemloop.instrument.declaration import (
    Control,
    Envelope,
    Region,
    read_flag,
    read_number,
    read_pair,
    read_positive,
    read_table,
    read_yaml,
)

#: What one message can carry, and a little less [bytes].
FRAME_BYTES_MOST = 600 * 2**20
#: The form of the file that is written here.
FORMAT = 2

State = Mapping[str, Any]

_OPTICS: dict[str, Control] = {
    "semiangle_rad": Control(1e-3, 60e-3),
    "current_A": Control(0.0, 1e-6),
    "C10_m": Control(-2e-6, 2e-6),
    "C12_m": Control(-1e-6, 1e-6),
    "C21_m": Control(-2e-5, 2e-5),
    "C23_m": Control(-2e-5, 2e-5),
    "C30_m": Control(-3e-3, 3e-3),
}
_STAGE: dict[str, Control] = {
    "stage_x_m": Control(-1e-3, 1e-3),
    "stage_y_m": Control(-1e-3, 1e-3),
    "stage_z_m": Control(-3e-4, 3e-4),
    "stage_alpha_rad": Control(-0.35, 0.35),
    "stage_beta_rad": Control(-0.35, 0.35),
}
_FIELD = {"field_rotation_rad": Control(-math.pi, math.pi)}
#: Every control of the microscope that limits may name. ``energy_eV`` has no range of its own: it must be declared.
CONTROLS = (*_OPTICS, "energy_eV", *_STAGE, *_FIELD)
#: What of a detector limits may name, as ``NAME_setting``: ``camera_binning``, ``BF_inserted`` (0 or 1) ...
SETTINGS = tuple(entry.name for entry in dataclasses.fields(Detector) if entry.name != "name")


def _is_control(name: str) -> bool:
    setting = any(name.endswith(f"_{one}") and len(name) > len(one) + 1 for one in SETTINGS)
    return name in CONTROLS or setting


def moved(asked: Instruction) -> Iterator[tuple[str, Any]]:
    """(name, wanted value) of every control that an instruction sets. The state vector has the same names."""
    if isinstance(asked, (Optics, Stage)):
        prefix = "stage_" if isinstance(asked, Stage) else ""
        for entry in dataclasses.fields(asked):
            if (value := getattr(asked, entry.name)) is not None:
                yield prefix + entry.name, value
    elif isinstance(asked, Detector):
        for setting in SETTINGS:
            if (value := getattr(asked, setting)) is not None:
                yield f"{asked.name}_{setting}", int(value) if isinstance(value, bool) else value
    elif isinstance(asked, Field) and asked.rotation_rad is not None:
        yield "field_rotation_rad", asked.rotation_rad


def _label(control: str) -> tuple[str, str]:
    """How an error calls a control, and its unit."""
    name, unit = control.rsplit("_", 1)
    if unit not in ("m", "rad", "A", "eV", "s"):
        return control.replace("_", " "), ""
    if control.startswith("stage_"):
        return f"stage {control.removeprefix('stage_')}", unit
    return name.replace("_", " "), unit


def _known(state: State, name: str) -> Any:
    """A number or a pair of them out of the state, or None."""
    value = state.get(name)
    numbers = value if isinstance(value, (list, tuple)) else [value]
    good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in numbers)
    return value if good else None


def _shown(value: Any) -> str:
    return f"({', '.join(f'{v:g}' for v in value)})" if isinstance(value, (list, tuple)) else f"{value:g}"


# ----------------------------------------------------------------------------------------------------- the limits


@dataclass(frozen=True)
class Limits:
    """What may be asked of the microscope.

    field_m : (height, width) [m] of the field, from its top-left corner, in which positions may lie.
    controls : range, step and rate of each control; one of the microscope's that is not named may not be changed. A
        detector's setting may be named as ``NAME_setting``; one that is not is left to the instrument.
    forbidden : kinds of instructions and controls that nobody may use, whatever else is declared.
    stage_envelope : the stage's reach by the tilt ``alpha_rad`` and by ``beta_rad``; both hold.
    dwell_max_s, beam_time_max_s : longest dwell, longest exposure of one command [s].
    current_max_A : largest beam current [A].
    electrons_per_point, electrons_per_image : most electrons at one position of the beam, in one image.
    electrons_max : most electrons of all exposures together; the server's own budget holds as well.
    region : dose by place.
    frame_bytes_max : most bytes of frames that one command may bring, counted with 8 bytes a value.
    unblank : whether the beam may be left on the sample outside an exposure.
    parked_max_s : how long [s] the open beam may rest on one spot, in an exposure or outside; then it is blanked. A
        beam that is left open is charged for this time at once. Needed with ``unblank``.
    version : the user's own number of this set of limits.
    """

    field_m: tuple[float, float]
    controls: Mapping[str, Control] = field(default_factory=lambda: {**_OPTICS, **_STAGE, **_FIELD})
    forbidden: tuple[str, ...] = ()
    stage_envelope: Mapping[str, Envelope] = field(default_factory=dict)
    dwell_max_s: float = 1.0
    beam_time_max_s: float | None = None
    current_max_A: float = 1e-9
    electrons_per_point: float = 1e9
    electrons_per_image: float = 1e12
    electrons_max: float | None = None
    region: Region | None = None
    frame_bytes_max: float = 2.0**29
    unblank: bool = False
    parked_max_s: float | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if self.unblank and self.parked_max_s is None:
            raise InputError(
                "limits with unblank need parked_max_s: for how long [s] the open beam may rest on one spot, whose "
                "electrons are charged. Without it nobody would count them."
            )
        if self.frame_bytes_max > FRAME_BYTES_MOST:
            raise InputError(f"limit frame_bytes_max is at most {FRAME_BYTES_MOST}: no message carries more.")

    # ------------------------------------------------------------------------------------------ reading, writing

    @classmethod
    def from_info(cls, info: InstrumentInfo) -> Limits:
        """The limits that hold where nobody declared any: the instrument's field and cautious ranges."""
        return cls(field_m=(float(info.field_m[0]), float(info.field_m[1])))

    @classmethod
    def from_dict(cls, declared: Mapping[str, Any]) -> Limits:
        """Limits from a dictionary (of a YAML or JSON file). A wrong name or value is an ``InputError``.

        Instead of ``controls``, the first form of the file has ``semiangle_rad``, ``C10_m`` and ``stage``: ranges that
        replace those of a set of cautious ones.
        """
        first = {"semiangle_rad", "C10_m", "stage"}
        table = read_table(
            "limit", declared, {entry.name for entry in dataclasses.fields(cls)} | first | {"format"}, set()
        )
        if "field_m" not in table:
            raise InputError("the limits lack field_m: (height, width) [m] of the field that may be used.")
        if table.get("format", FORMAT) not in (1, FORMAT):
            raise InputError(f"limits of format {table['format']!r:.40} are not read here; this is format {FORMAT}.")
        if "controls" in table and first & set(table):
            raise InputError(f"name {', '.join(sorted(first & set(table)))} under controls, not beside it.")
        values = {name: cls._read(name, value) for name, value in table.items() if name not in first | {"format"}}
        if "controls" not in values:
            values["controls"] = cls._first_form(table)
        return cls(**values)

    @classmethod
    def _read(cls, name: str, value: Any) -> Any:
        if value is None and name in ("beam_time_max_s", "electrons_max", "region", "parked_max_s"):
            return None
        read: dict[str, Callable[[str, Any], Any]] = {
            "field_m": lambda name, value: tuple(read_positive(name, one) for one in read_pair(name, value)),
            "controls": lambda _, value: {
                k: Control.read(k, v)
                for k, v in read_table(
                    "control", value, {*CONTROLS, *filter(_is_control, map(str, value or ()))}, set()
                ).items()
            },
            "stage_envelope": lambda name, value: {
                k: Envelope.read(f"{name} {k}", v)
                for k, v in read_table(name, value, {"alpha_rad", "beta_rad"}, set()).items()
            },
            "region": Region.read,
            "forbidden": lambda _, value: cls._forbidden(value),
            "unblank": read_flag,
            "version": lambda name, value: int(read_number(name, value)),
            "electrons_max": lambda name, value: read_positive(name, value) if value else 0.0,
        }
        return read.get(name, read_positive)(name, value)

    @staticmethod
    def _forbidden(value: Any) -> tuple[str, ...]:
        known = (*KINDS, *CONTROLS)
        listed = isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)
        if not listed or not all(one in known or _is_control(one) for one in value):
            raise InputError(f"limit forbidden must be a list out of {', '.join(known)}; got {value!r:.80}.")
        return tuple(value)

    @staticmethod
    def _first_form(table: Mapping[str, Any]) -> dict[str, Control]:
        controls = {**_OPTICS, **_FIELD}
        controls.update({name: Control.read(name, table[name]) for name in ("semiangle_rad", "C10_m") if name in table})
        if "stage" not in table:
            return {**controls, **_STAGE}
        axes = read_table("stage", table["stage"], {name.removeprefix("stage_") for name in _STAGE}, set())
        return {**controls, **{f"stage_{axis}": Control.read(f"stage {axis}", value) for axis, value in axes.items()}}

    @classmethod
    def from_json(cls, text: str) -> Limits:
        """Limits from the text of a JSON file."""
        try:
            declared = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the limits are not JSON: {error}.") from None
        if not isinstance(declared, dict):
            raise InputError("the limits must be a JSON object.")
        return cls.from_dict(declared)

    @classmethod
    def from_yaml(cls, text: str) -> Limits:
        """Limits from the text of a YAML file (JSON is YAML, too). A name that comes twice is refused."""
        return cls.from_dict(read_yaml(text, "the limits"))

    @classmethod
    def load(cls, path: str | Path) -> Limits:
        """Limits from a YAML or JSON file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the limits {path} cannot be read: {error}.") from None
        return cls.from_json(text) if Path(path).suffix == ".json" else cls.from_yaml(text)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary, which :meth:`from_dict` takes back."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and name not in ("unblank", "version")
        }
        return {
            "format": FORMAT,
            "version": self.version,
            "field_m": [float(one) for one in self.field_m],
            "unblank": self.unblank,
            "controls": {name: control.to_dict() for name, control in self.controls.items()},
            "forbidden": list(self.forbidden),
            "stage_envelope": {tilt: envelope.to_dict() for tilt, envelope in self.stage_envelope.items()},
            **({"region": self.region.to_dict()} if self.region else {}),
            **numbers,
        }

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of these limits, kept with every audited command."""
        return content_hash(self.to_dict())

    # -------------------------------------------------------------------------------------------------- checking

    def check(self, asked: Instruction, electrons: float, info: InstrumentInfo, state: State | None = None) -> None:
        """Raise ``LimitError`` unless ``asked`` is within the limits.

        ``electrons`` are those at each position, ``state`` the instrument's state vector: steps, the stage's envelope
        and the field are judged from where the instrument is. What it does not tell is refused where it is needed.
        """
        if asked.kind not in info.instructions:
            raise LimitError(
                f"{info.name} cannot do {asked.kind!r}; it can do {', '.join(info.instructions)}. Ask for one of these."
            )
        if asked.kind in self.forbidden:
            raise LimitError(f"the limits forbid {asked.kind!r}: ask whoever declares them.")
        state = state or {}
        self._check_open_beam(asked, state)
        for control, value in moved(asked):
            self._check_control(control, value, state)
        match asked:
            case Image():
                self._check_image(asked, electrons, info, state)
            case Diffraction() | Spectrum():
                self._check_points(asked, electrons, info, state)
            case Probe():
                self._check_positions([asked.position_m], info, state)
            case Stage() if self.stage_envelope:
                self._check_envelope(asked, state)
            case Field():
                self._check_field(asked, info, state)
            case Blank(blanked=False) if not self.unblank:
                raise LimitError(
                    "the limits do not let the beam rest on the sample (unblank is false): its dose would not be "
                    "counted. An exposure unblanks the beam for its own time."
                )

    @staticmethod
    def _check_open_beam(asked: Instruction, state: State) -> None:
        """The electrons of an open beam were charged for its current and its place: neither changes under it."""
        changes = isinstance(asked, (Stage, Field)) or (isinstance(asked, Optics) and asked.current_A is not None)
        if changes and "blanked" in state and not state["blanked"]:
            raise LimitError(
                f"the beam is open, and {asked.kind} would change its current or where it rests on the sample: blank "
                "it first."
            )

    def opened(self, asked: Instruction, state: State) -> Probe | None:
        """Where the open beam will rest after ``asked``, charged for ``parked_max_s`` at once. None if it does not
        rest anywhere new, or without that limit."""
        if self.parked_max_s is None:
            return None
        if isinstance(asked, Probe):
            return None if state.get("blanked") else asked
        if not isinstance(asked, Blank) or asked.blanked:
            return None
        y, x = _known(state, "probe_y_m"), _known(state, "probe_x_m")
        if self.region is not None and (y is None or x is None):
            raise LimitError(
                "the instrument does not tell where its probe is, and doses are counted by place: have it report "
                "probe_y_m and probe_x_m, or declare limits without region."
            )
        return Probe((y or 0.0, x or 0.0))

    def _check_control(self, control: str, value: Any, state: State) -> None:
        label, unit = _label(control)
        if control in self.forbidden:
            raise LimitError(f"the limits forbid to change {label}: ask whoever declares them.")
        limit = self.controls.get(control)
        if limit is None and control not in CONTROLS:
            return  # the setting of a detector that nobody limits
        if limit is None:
            where = f"the stage axis {control.removeprefix('stage_')}" if control.startswith("stage_") else label
            raise LimitError(f"the limits name no range for {where}: it may not move.")
        if control == "current_A" and value > self.current_max_A:
            raise LimitError(
                f"current {value:g} A is over the limit of {self.current_max_A:g} A: ask for a smaller one."
            )
        for one in value if isinstance(value, tuple) else (value,):
            if not limit.low <= one <= limit.high:
                raise LimitError(
                    f"{label} {one:g} {unit} is outside the limit {limit.low:g} to {limit.high:g} {unit}: "
                    "ask for a value inside it."
                )
        if limit.step is None:
            return
        step = distance(control, value, state)
        if step > limit.step * (1 + 1e-9):  # rounding of the difference
            raise LimitError(
                f"{label} from {_shown(state[control])} to {_shown(value)} {unit} is a step of {step:g} {unit}, over "
                f"the limit of {limit.step:g} {unit} a command: go in smaller steps."
            )

    def _check_envelope(self, asked: Stage, state: State) -> None:
        """The corners of the way: the axes may move one after another in any order, so the largest shift may meet the
        largest tilt. A move that takes no axis further from zero is always allowed."""
        now, then = {}, {}
        for axis in ("x_m", "y_m", "z_m", "alpha_rad", "beta_rad"):
            here, wanted = _known(state, f"stage_{axis}"), getattr(asked, axis)
            if here is None:
                raise LimitError(
                    f"the instrument does not tell where the stage's {axis} is, and the limits depend on it: "
                    "have it report the stage, or declare limits without stage_envelope."
                )
            now[axis] = abs(float(here))
            then[axis] = now[axis] if wanted is None else abs(float(wanted))
        if all(then[axis] <= now[axis] for axis in now):
            return
        far = {axis: max(now[axis], then[axis]) for axis in now}
        for tilt, envelope in self.stage_envelope.items():
            if far[tilt] > envelope.tilt_rad[-1]:
                raise LimitError(
                    f"stage {tilt} {far[tilt]:g} rad is outside the stage's envelope, which ends at "
                    f"{envelope.tilt_rad[-1]:g} rad: ask for a smaller tilt."
                )
            for axis in envelope.reach:
                reach = envelope.at(axis, far[tilt])
                if far[axis] > reach:
                    raise LimitError(
                        f"stage {axis} reaches {far[axis]:g} m while {tilt} reaches {far[tilt]:g} rad on the way; the "
                        f"stage's envelope allows {reach:g} m there. Bring one of them back to zero first, then move "
                        "the other."
                    )

    def _check_field(self, asked: Field, info: InstrumentInfo, state: State) -> None:
        extent, rotation_rad = chosen(state, info.field_m)
        extent = asked.extent_m or extent
        rotation_rad = rotation_rad if asked.rotation_rad is None else asked.rotation_rad
        wanted = {"field_height_m": extent[0], "field_width_m": extent[1], "field_rotation_rad": rotation_rad}
        corners = absolute(np.array(extent) * [[0, 0], [0, 1], [1, 0], [1, 1]], wanted, info.field_m)
        self._check_inside(corners, self._usable_m(info), "a corner of the field of view")

    def _check_positions(self, positions: ArrayLike, info: InstrumentInfo, state: State) -> None:
        places = np.asarray(positions, np.float64).reshape(-1, 2)
        extent, rotation_rad = chosen(state, info.field_m)
        if extent != tuple(info.field_m) or rotation_rad != 0:
            self._check_inside(places, extent, "position")
        self._check_inside(absolute(places, state, info.field_m), self._usable_m(info), "position")

    def _usable_m(self, info: InstrumentInfo) -> tuple[float, float]:
        """(height, width) [m] of the field that the limits and the instrument both have."""
        return min(self.field_m[0], info.field_m[0]), min(self.field_m[1], info.field_m[1])

    @staticmethod
    def _check_inside(places: Any, field_m: tuple[float, float], what: str) -> None:
        size = np.array(field_m)
        slack = 1e-9 * size  # rounding of origin + extent
        outside = ~((places >= -slack) & (places <= size + slack))  # NaN is outside
        if outside.any():
            row, axis = np.argwhere(outside)[0]
            raise LimitError(
                f"{what} {'yx'[axis]} = {places[row, axis]:g} m is outside the field 0 to {size[axis]:g} m: "
                "ask for a position inside it."
            )

    def _check_exposure(self, asked: Image | Diffraction | Spectrum, electrons: float, bytes_: int) -> None:
        if asked.dwell_s > self.dwell_max_s:
            raise LimitError(
                f"dwell {asked.dwell_s:g} s is over the limit of {self.dwell_max_s:g} s: ask for a shorter dwell."
            )
        if self.parked_max_s is not None and asked.dwell_s > self.parked_max_s:
            raise LimitError(
                f"dwell {asked.dwell_s:g} s is over the {self.parked_max_s:g} s for which the beam may rest on one "
                "spot: ask for a shorter dwell."
            )
        if self.beam_time_max_s is not None and asked.beam_time_s > self.beam_time_max_s:
            raise LimitError(
                f"the exposure takes {asked.beam_time_s:g} s of beam time, over the limit of {self.beam_time_max_s:g} "
                "s: ask for fewer positions or a shorter dwell."
            )
        if electrons > self.electrons_per_point:
            raise LimitError(
                f"{electrons:.3g} electrons at one position are over the limit of {self.electrons_per_point:.3g}: "
                "shorten the dwell or lower the current."
            )
        if bytes_ > self.frame_bytes_max:
            raise LimitError(
                f"the frames may take {bytes_} bytes, over the limit of {self.frame_bytes_max:g}: "
                "ask for fewer positions at a time."
            )

    def _check_image(self, asked: Image, electrons: float, info: InstrumentInfo, state: State) -> None:
        if asked.detector not in info.detectors:
            raise LimitError(
                f"{info.name} has no detector {asked.detector!r}; it has {', '.join(info.detectors)}: "
                "ask for one of these."
            )
        self._check_positions(asked.corners_m(), info, state)
        self._check_exposure(asked, electrons, frame_bytes(asked, info))
        if (total := electrons * asked.exposed_positions) > self.electrons_per_image:
            raise LimitError(
                f"the image would take {total:.3g} electrons, over the limit of {self.electrons_per_image:.3g}: "
                "take fewer pixels or a shorter dwell."
            )

    def _check_points(
        self, asked: Diffraction | Spectrum, electrons: float, info: InstrumentInfo, state: State
    ) -> None:
        self._check_positions(asked.corners_m(), info, state)
        self._check_exposure(asked, electrons, frame_bytes(asked, info))


def frame_bytes(asked: Instruction, info: InstrumentInfo) -> int:
    """The most bytes that the frames of an exposure may take: 8 a value."""
    values = 1
    if isinstance(asked, Spectrum) and info.energy_loss:
        values = info.energy_loss[2]
    elif isinstance(asked, Diffraction) and info.camera:
        values = info.camera.shape[0] * info.camera.shape[1]
    return 8 * values * asked.exposed_positions


def distance(control: str, value: Any, state: State) -> float:
    """How far a control goes from where the state says it is; refused if the state does not say."""
    here = _known(state, control)
    if here is None or isinstance(here, (list, tuple)) != isinstance(value, tuple):
        raise LimitError(
            f"the instrument does not tell its {control}, and the limits depend on it: have it report {control}, or "
            "declare limits without a step and a rate for it."
        )
    return math.dist(here, value) if isinstance(value, tuple) else abs(value - here)


# ------------------------------------------------------------------------------------------------------- memory


class LimitsWatch:
    """What limits must remember: how far each control went lately, and since when the beam rests where it is.

    A control may go ``step`` (or what it may go in one second, if no step is declared) at once, and further at its
    rate: in any time T its way is at most ``step + rate T``. Times are those of one monotonic clock [s].
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._used: dict[str, tuple[float, float]] = {}  # control -> (how much of its step is used up, when)
        self._spot: tuple[Any, Any] | None = None
        self._since = 0.0

    def admit(self, asked: Instruction, state: State, now_s: float) -> None:
        """Take note of ``asked`` at the time ``now_s``, or raise ``LimitError`` and note nothing."""
        used = {}
        for control, value in moved(asked):
            limit = self._limits.controls.get(control)
            if limit is None or limit.rate_per_s is None:
                continue
            way = distance(control, value, state)
            capacity = limit.rate_per_s if limit.step is None else limit.step
            before, when = self._used.get(control, (0.0, now_s))
            total = max(0.0, before - (now_s - when) * limit.rate_per_s) + way
            if total > capacity * (1 + 1e-9):  # rounding of the difference
                label, unit = _label(control)
                wait_s = (total - capacity) / limit.rate_per_s
                what = f"wait {wait_s:.3g} s" if way <= capacity else f"go in steps of at most {capacity:g} {unit}"
                raise LimitError(
                    f"{label} would go {way:g} {unit}, faster than its limit of {limit.rate_per_s:g} {unit} a "
                    f"second: {what}."
                )
            used[control] = (total, now_s)
        self._used.update(used)
        if (spot := self._limits.opened(asked, state)) is not None:
            self._spot, self._since = spot.position_m, now_s

    def parked(self, state: State, now_s: float) -> str | None:
        """Why the beam must be blanked now: it rests on one spot for too long. None if it does not. Ask often."""
        if self._limits.parked_max_s is None:
            return None
        if state.get("blanked"):
            self._spot = None
            return None
        spot = (state.get("probe_y_m"), state.get("probe_x_m"))
        if spot != self._spot:
            self._spot, self._since = spot, now_s
        rested = now_s - self._since
        if rested < self._limits.parked_max_s:
            return None
        return f"the beam rested on one spot for {rested:.3g} s, over the limit of {self._limits.parked_max_s:g} s"


__all__ = ["CONTROLS", "Control", "Envelope", "Limits", "LimitsWatch", "Region", "frame_bytes", "moved", "read_yaml"]
