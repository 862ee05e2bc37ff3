"""What may be asked of a microscope: a small closed set of typed instructions.

A plan only *asks*; an :class:`~stemloop.core.protocols.Instrument` acts. All numbers are SI (metres, seconds,
radians, amperes, electron-volts for the energy alone, as its name says). Positions are ``(y, x)`` in metres from the
top-left corner of the field of view, ``y`` down and ``x`` to the right. The wire form of an instruction is a plain
dictionary with ``kind`` and ``version``; :func:`to_dict` and :func:`from_dict` are exact inverses.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from stemloop.core.errors import InputError

VERSION = 1

Position = tuple[float, float]


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} must be a finite number above zero; got {value!r}.")


def _finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise InputError(f"{name} must be a finite number; got {value!r}.")


@dataclass(frozen=True)
class Instruction:
    """Base of all instructions. ``exposes`` says whether the beam meets the sample; ``moves`` whether state changes."""

    kind: ClassVar[str] = ""
    exposes: ClassVar[bool] = False

    @property
    def exposed_positions(self) -> int:
        """Number of beam positions (pixels, points) that the instruction exposes."""
        return 0

    @property
    def beam_time_s(self) -> float:
        """Time [s] for which the beam is on the sample."""
        return 0.0


@dataclass(frozen=True)
class Image(Instruction):
    """Scan a rectangle and record the HAADF signal.

    ``origin_m`` (y, x) [m] is its top-left corner, ``extent_m`` (height, width) [m], ``shape`` (rows, columns) its
    pixels, ``dwell_s`` the time a pixel [s]. ``detector`` is one of the instrument's ring detectors.
    """

    origin_m: Position
    extent_m: Position
    shape: tuple[int, int]
    dwell_s: float
    detector: str = "HAADF"
    kind: ClassVar[str] = "image"
    exposes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("dwell_s", self.dwell_s)
        for name, pair in (("origin_m", self.origin_m), ("extent_m", self.extent_m)):
            for value in pair:
                _finite(name, value)
        for value in self.extent_m:
            _positive("extent_m", value)
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise InputError(f"shape must be two whole numbers of at least 1; got {self.shape!r}.")

    @property
    def exposed_positions(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def beam_time_s(self) -> float:
        return self.exposed_positions * self.dwell_s


@dataclass(frozen=True)
class _Points(Instruction):
    positions_m: tuple[Position, ...]
    dwell_s: float
    exposes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("dwell_s", self.dwell_s)
        if not self.positions_m:
            raise InputError("positions_m is empty: ask for at least one position.")
        for position in self.positions_m:
            if len(position) != 2:
                raise InputError(f"each position is a pair (y, x) in metres; got {position!r}.")
            for value in position:
                _finite("a position", value)

    @property
    def exposed_positions(self) -> int:
        return len(self.positions_m)

    @property
    def beam_time_s(self) -> float:
        return self.exposed_positions * self.dwell_s


@dataclass(frozen=True)
class Diffraction(_Points):
    """Record one CBED pattern at each of ``positions_m`` ((y, x) [m]), ``dwell_s`` [s] each, in the order given."""

    kind: ClassVar[str] = "diffraction"


@dataclass(frozen=True)
class Spectrum(_Points):
    """Record one energy-loss spectrum at each of ``positions_m`` ((y, x) [m]), ``dwell_s`` [s] each."""

    kind: ClassVar[str] = "spectrum"


@dataclass(frozen=True)
class Probe(Instruction):
    """Park the (blanked) probe at ``position_m`` (y, x) [m]."""

    position_m: Position
    kind: ClassVar[str] = "probe"

    def __post_init__(self) -> None:
        for value in self.position_m:
            _finite("position_m", value)


@dataclass(frozen=True)
class Blank(Instruction):
    """Blank (``blanked=True``) or unblank the beam."""

    blanked: bool = True
    kind: ClassVar[str] = "blank"


@dataclass(frozen=True)
class Optics(Instruction):
    """Change the probe-forming optics; ``None`` leaves a value as it is.

    ``semiangle_rad`` convergence semiangle, ``C10_m`` defocus (negative is overfocus in this sign convention of
    ``chi = pi/lambda C10 theta^2``: C10 = -defocus), ``current_A`` beam current.
    """

    semiangle_rad: float | None = None
    C10_m: float | None = None
    current_A: float | None = None
    kind: ClassVar[str] = "optics"

    def __post_init__(self) -> None:
        for name in ("semiangle_rad", "current_A"):
            value = getattr(self, name)
            if value is not None:
                _positive(name, value)
        if self.C10_m is not None:
            _finite("C10_m", self.C10_m)


@dataclass(frozen=True)
class Stage(Instruction):
    """Move the stage to absolute coordinates [m] and tilts [rad]; ``None`` leaves an axis where it is."""

    x_m: float | None = None
    y_m: float | None = None
    z_m: float | None = None
    alpha_rad: float | None = None
    beta_rad: float | None = None
    kind: ClassVar[str] = "stage"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                _finite(field.name, value)


@dataclass(frozen=True)
class Report(Instruction):
    """Ask for the state vector. Exposes and changes nothing."""

    kind: ClassVar[str] = "report"


KINDS: dict[str, type[Instruction]] = {
    c.kind: c for c in (Image, Diffraction, Spectrum, Probe, Blank, Optics, Stage, Report)
}


def to_dict(instruction: Instruction) -> dict[str, Any]:
    """The wire form: a dictionary of plain numbers, strings and lists."""
    return {"kind": instruction.kind, "version": VERSION, **dataclasses.asdict(instruction)}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def from_dict(wire: dict[str, Any]) -> Instruction:
    """Rebuild an instruction; a wrong kind, version, name or value is an :class:`InputError` that says which."""
    if not isinstance(wire, dict) or wire.get("kind") not in KINDS:
        kind = wire.get("kind") if isinstance(wire, dict) else wire
        raise InputError(f"unknown instruction {kind!r}; known: {', '.join(sorted(KINDS))}.")
    if wire.get("version") != VERSION:
        raise InputError(f"instruction version {wire.get('version')!r} is not spoken here; this is version {VERSION}.")
    cls = KINDS[wire["kind"]]
    values = {key: _tuples(value) for key, value in wire.items() if key not in ("kind", "version")}
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := set(values) - known:
        raise InputError(f"{cls.kind} has no field {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}.")
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{cls.kind}: {error}.") from None
