"""What may be asked of the microscope, and for how many electrons: pure logic without any network.

:class:`Limits` says what may be asked and :class:`DoseLedger` what it may cost. A refusal is one of the
:class:`~stemloop.core.errors.Refused` errors; its message says what was asked, what the limit is, and what to do.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stemloop.core.errors import DoseError, InputError, LimitError
from stemloop.core.instruction import Blank, Diffraction, Image, Instruction, Optics, Probe, Spectrum, Stage
from stemloop.core.protocols import InstrumentInfo
from stemloop.core.record import content_hash

# --------------------------------------------------------------------------------------------- what may be asked

Range = tuple[float, float]


def _within(name: str, value: float, low: float, high: float, unit: str) -> None:
    if not low <= value <= high:
        raise LimitError(
            f"{name} {value:g} {unit} is outside the limit {low:g} to {high:g} {unit}: ask for a value inside it."
        )


def _range(name: str, value: Any) -> Range:
    low, high = (_number(name, v) for v in _pair(name, value))
    if low > high:
        raise InputError(f"limit {name}: the lower end {low:g} is above the upper end {high:g}.")
    return low, high


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InputError(f"limit {name} must be two numbers; got {value!r}.")
    return value[0], value[1]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"limit {name} must be a finite number; got {value!r}.")
    return float(value)


_STAGE: dict[str, Range] = {
    "x_m": (-1e-3, 1e-3),
    "y_m": (-1e-3, 1e-3),
    "z_m": (-3e-4, 3e-4),
    "alpha_rad": (-0.35, 0.35),
    "beta_rad": (-0.35, 0.35),
}


@dataclass(frozen=True)
class Limits:
    """What may be asked of the microscope.

    field_m : (height, width) [m] of the field in which positions may lie.
    dwell_max_s, current_max_A : longest dwell [s], largest beam current [A].
    semiangle_rad, C10_m : lowest and highest value [rad], [m].
    stage : lowest and highest value of each axis; an axis that is not named may not move.
    electrons_per_point : most electrons at one position of the beam. electrons_per_image : most in one image.
    frame_bytes_max : most bytes of frames that one command may bring, counted with 8 bytes a value.
    unblank : whether the beam may be left on the sample outside an exposure, where its dose is not counted.
    version : the user's own number of this set of limits.
    """

    field_m: tuple[float, float]
    dwell_max_s: float = 1.0
    current_max_A: float = 1e-9
    semiangle_rad: Range = (1e-3, 60e-3)
    C10_m: Range = (-2e-6, 2e-6)
    stage: Mapping[str, Range] = field(default_factory=lambda: dict(_STAGE))
    electrons_per_point: float = 1e9
    electrons_per_image: float = 1e12
    frame_bytes_max: float = 2.0**29
    unblank: bool = False
    version: int = 1

    @classmethod
    def from_info(cls, info: InstrumentInfo) -> Limits:
        """The limits that hold where nobody declared any: the instrument's field and cautious ranges."""
        return cls(field_m=(float(info.field_m[0]), float(info.field_m[1])))

    @classmethod
    def from_dict(cls, declared: Mapping[str, Any]) -> Limits:
        """Limits from a dictionary (of a YAML or JSON file). A wrong name or value is an ``InputError``."""
        known = {entry.name for entry in dataclasses.fields(cls)}
        if unknown := set(declared) - known:
            raise InputError(f"unknown limit {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}.")
        if "field_m" not in declared:
            raise InputError("the limits lack field_m: (height, width) [m] of the field that may be used.")
        read: dict[str, Callable[[str, Any], Any]] = {
            "field_m": lambda name, pair: tuple(_number(name, v) for v in _pair(name, pair)),
            "semiangle_rad": _range,
            "C10_m": _range,
            "stage": cls._stage,
            "unblank": lambda _, value: bool(value),
            "version": lambda name, value: int(_number(name, value)),
        }
        return cls(**{name: read.get(name, _number)(name, value) for name, value in declared.items()})

    @staticmethod
    def _stage(_: str, axes: Any) -> dict[str, Range]:
        if not isinstance(axes, Mapping) or (set(axes) - set(_STAGE)):
            raise InputError(f"limit stage must name axes out of {', '.join(_STAGE)}; got {axes!r}.")
        return {axis: _range(f"stage {axis}", value) for axis, value in axes.items()}

    @classmethod
    def from_json(cls, text: str) -> Limits:
        """Limits from the text of a JSON file."""
        try:
            declared = json.loads(text)
        except ValueError as error:
            raise InputError(f"the limits are not JSON: {error}.") from None
        if not isinstance(declared, dict):
            raise InputError("the limits must be a JSON object.")
        return cls.from_dict(declared)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary, which :meth:`from_dict` takes back."""

        def listed(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [float(number) for number in value]
            return value if isinstance(value, bool) else float(value)

        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        stage = {axis: listed(ends) for axis, ends in values.pop("stage").items()}
        version = values.pop("version")
        return {**{name: listed(value) for name, value in values.items()}, "stage": stage, "version": version}

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of these limits, kept with every audited command."""
        return content_hash(self.to_dict())

    def check(self, asked: Instruction, electrons: float, info: InstrumentInfo) -> None:
        """Raise ``LimitError`` unless ``asked`` is within the limits; ``electrons`` are those at each position."""
        if asked.kind not in info.instructions:
            raise LimitError(
                f"{info.name} cannot do {asked.kind!r}; it can do {', '.join(info.instructions)}. Ask for one of these."
            )
        match asked:
            case Image():
                self._check_image(asked, electrons)
            case Diffraction() | Spectrum():
                self._check_points(asked, electrons, info)
            case Probe():
                self._check_position(asked.position_m)
            case Optics():
                self._check_optics(asked)
            case Stage():
                self._check_stage(asked)
            case Blank(blanked=False) if not self.unblank:
                raise LimitError(
                    "the limits do not let the beam rest on the sample (unblank is false): its dose would not be "
                    "counted. An exposure unblanks the beam for its own time."
                )

    def _check_position(self, position: tuple[float, float]) -> None:
        for axis, value, size in zip("yx", position, self.field_m, strict=True):
            slack = 1e-9 * size  # rounding of origin + extent
            if not -slack <= value <= size + slack:
                raise LimitError(
                    f"position {axis} = {value:g} m is outside the field 0 to {size:g} m: ask for a position inside it."
                )

    def _check_exposure(self, dwell_s: float, electrons: float, bytes_: int) -> None:
        if dwell_s > self.dwell_max_s:
            raise LimitError(
                f"dwell {dwell_s:g} s is over the limit of {self.dwell_max_s:g} s: ask for a shorter dwell."
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

    def _check_image(self, asked: Image, electrons: float) -> None:
        self._check_position(asked.origin_m)
        self._check_position((asked.origin_m[0] + asked.extent_m[0], asked.origin_m[1] + asked.extent_m[1]))
        self._check_exposure(asked.dwell_s, electrons, 8 * asked.exposed_positions)
        if (total := electrons * asked.exposed_positions) > self.electrons_per_image:
            raise LimitError(
                f"the image would take {total:.3g} electrons, over the limit of {self.electrons_per_image:.3g}: "
                "take fewer pixels or a shorter dwell."
            )

    def _check_points(self, asked: Diffraction | Spectrum, electrons: float, info: InstrumentInfo) -> None:
        for position in asked.positions_m:
            self._check_position(position)
        if isinstance(asked, Spectrum):
            values = info.energy_loss[2] if info.energy_loss else 1
        else:
            values = info.camera.shape[0] * info.camera.shape[1] if info.camera else 1
        self._check_exposure(asked.dwell_s, electrons, 8 * values * asked.exposed_positions)

    def _check_optics(self, asked: Optics) -> None:
        if asked.current_A is not None and asked.current_A > self.current_max_A:
            raise LimitError(
                f"current {asked.current_A:g} A is over the limit of {self.current_max_A:g} A: ask for a smaller one."
            )
        if asked.semiangle_rad is not None:
            _within("semiangle", asked.semiangle_rad, *self.semiangle_rad, "rad")
        if asked.C10_m is not None:
            _within("C10", asked.C10_m, *self.C10_m, "m")

    def _check_stage(self, asked: Stage) -> None:
        for entry in dataclasses.fields(asked):
            value = getattr(asked, entry.name)
            if value is None:
                continue
            if entry.name not in self.stage:
                raise LimitError(f"the limits name no range for the stage axis {entry.name}: it may not move.")
            _within(f"stage {entry.name}", value, *self.stage[entry.name], entry.name.rsplit("_", 1)[1])


# -------------------------------------------------------------------------------------------- what it may cost


class DoseLedger:
    """Counts electrons: reserved before an exposure, settled after it. Whole electrons, so that sums are exact.

    Each amount is rounded up to a whole electron. ``spent + reserved <= budget`` holds after every reservation; an
    instrument that gives more than was reserved is charged what it gave. ``spent`` and ``reserved`` are their sums.

    >>> ledger = DoseLedger(budget=1000)
    >>> ledger.reserve("a", 600.0)
    600
    >>> ledger.settle("a", 550.2)
    551
    >>> ledger.dose()["left"]
    449.0
    """

    def __init__(self, budget: float | None = None, spent: int = 0) -> None:
        if budget is not None and not (math.isfinite(budget) and budget >= 0):
            raise InputError(f"the dose budget must be a number of electrons, zero or more; got {budget!r}.")
        self.budget = None if budget is None else math.floor(budget)
        self.spent = spent
        self.reserved = 0
        self._reserved: dict[str, int] = {}

    def reserve(self, command_id: str, electrons: float) -> int:
        """Promise ``electrons`` to ``command_id``, or raise ``DoseError``; returns the whole electrons reserved."""
        amount = self._whole(electrons)
        if command_id in self._reserved:
            raise InputError(f"electrons are reserved for {command_id!r} already.")
        if self.budget is not None and self.spent + self.reserved + amount > self.budget:
            left = max(0, self.budget - self.spent - self.reserved)
            raise DoseError(
                f"the exposure needs {amount:.4g} electrons; {left:.4g} of the budget of {self.budget:.4g} are left. "
                "Ask for fewer positions or a shorter dwell, or start the server with a larger budget."
            )
        self._reserved[command_id] = amount
        self.reserved += amount
        return amount

    def settle(self, command_id: str, electrons: float | None = None) -> int:
        """Charge what was given, or all that was reserved if nobody knows; returns the whole electrons charged."""
        reserved = self._reserved[command_id]
        amount = reserved if electrons is None else self._whole(electrons)
        del self._reserved[command_id]
        self.reserved -= reserved
        self.spent += amount
        return amount

    def dose(self) -> dict[str, float]:
        """``budget``, ``spent``, ``reserved`` and ``left`` in electrons (``inf`` without a budget)."""
        budget = math.inf if self.budget is None else float(self.budget)
        left = max(0.0, budget - self.spent - self.reserved)
        return {"budget": budget, "spent": float(self.spent), "reserved": float(self.reserved), "left": left}

    @staticmethod
    def _whole(electrons: float) -> int:
        if not (math.isfinite(electrons) and electrons >= 0):
            raise InputError(f"a dose is a number of electrons, zero or more; got {electrons!r}.")
        return math.ceil(electrons)
