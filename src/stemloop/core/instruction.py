"""What may be asked of a microscope: a small closed set of typed instructions.

A plan only *asks*; an :class:`~stemloop.core.protocols.Instrument` acts. All numbers are SI (metres, seconds,
radians, amperes, electron-volts for the energy alone, as its name says). Positions are ``(y, x)`` in metres from the
top-left corner of the field of view, ``y`` down and ``x`` to the right. The wire form of an instruction is a plain
dictionary with ``kind`` and ``version``; :func:`to_dict` and :func:`from_dict` are exact inverses.

What each field means, its unit and what it may be stand beside it, once: the checks, the JSON Schema
(:mod:`stemloop.core.schema`) and the tables of the documentation are made of these words.

Version 2 adds paths of positions, rotated scans, the detectors ADF, ABF and BF, aberrations beyond defocus, the beam
energy, the field of view and detector settings. What version 1 could say means the same in version 2.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError

VERSION = 2

Position = tuple[float, float]

#: The detectors of an image, from the largest angles to the smallest.
DETECTORS = ("HAADF", "ADF", "ABF", "BF")
#: More positions than this are no instruction.
MAX_POSITIONS = 2**31

# ------------------------------------------------------------------------------------------------ fields that explain


def _asks(form: str, what: str, unit: str = "", default: Any = dataclasses.MISSING, **law: Any) -> Any:
    """A field of a ``form`` (number, pair, sizes, word, flag, positions); ``law``: above (a number), choices."""
    return dataclasses.field(default=default, metadata={"form": form, "what": what, "unit": unit, **law})


def _number(name: str, value: Any, law: Mapping[str, Any]) -> None:
    above = law.get("above")
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if number and (above is None or value > above):
        return
    wanted = "a finite number" if above is None else f"a finite number above {'zero' if above == 0 else above}"
    raise InputError(f"{name} must be {wanted}; got {value!r:.80}.")


def _pair(name: str, value: Any, law: Mapping[str, Any]) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise InputError(f"{name} must be a pair of numbers; got {value!r:.80}.")
    for one in value:
        _number(name, one, law)


def _sizes(name: str, value: Any, law: Mapping[str, Any]) -> None:
    whole = isinstance(value, tuple) and len(value) == 2
    if not whole or not all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 1 for n in value):
        raise InputError(f"{name} must be two whole numbers of at least 1; got {value!r:.80}.")


def _word(name: str, value: Any, law: Mapping[str, Any]) -> None:
    choices = law.get("choices")
    if not isinstance(value, str) or not value or len(value) > 100 or (choices and value not in choices):
        wanted = f"one of {', '.join(choices)}" if choices else "a word of 1 to 100 characters"
        raise InputError(f"{name} must be {wanted}; got {value!r:.80}.")


def _flag(name: str, value: Any, law: Mapping[str, Any]) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} must be true or false; got {value!r:.80}.")


def _count(name: str, value: Any, law: Mapping[str, Any]) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= int(value) < MAX_POSITIONS:
        raise InputError(f"{name} must be a whole number from 1 to {MAX_POSITIONS - 1}; got {value!r:.80}.")


def _positions(name: str, value: Any, law: Mapping[str, Any]) -> None:
    if isinstance(value, (Line, Raster)):
        return
    if not isinstance(value, tuple):
        raise InputError(f"{name} must be pairs (y, x) in metres, a Line or a Raster; got {value!r:.80}.")
    if not value:
        raise InputError(f"{name} is empty: ask for at least one position.")
    for position in value:
        if not isinstance(position, tuple) or len(position) != 2:
            raise InputError(f"each position is a pair (y, x) in metres; got {position!r:.80}.")
        for one in position:
            _number("a position", one, law)


_CHECKS = {
    "number": _number,
    "pair": _pair,
    "sizes": _sizes,
    "word": _word,
    "flag": _flag,
    "count": _count,
    "positions": _positions,
}


def _check_fields(asked: Any) -> None:
    for field in dataclasses.fields(asked):
        value = getattr(asked, field.name)
        if value is None and field.default is None:
            continue
        _CHECKS[field.metadata["form"]](field.name, value, field.metadata)


# --------------------------------------------------------------------------------------------- paths of positions


def turned(points: NDArray[np.float64], centre: NDArray[np.float64], rotation_rad: float) -> NDArray[np.float64]:
    """``points`` (..., 2) (y, x) turned about ``centre`` by ``rotation_rad``, from +x towards +y."""
    sine, cosine = math.sin(rotation_rad), math.cos(rotation_rad)
    y, x = points[..., 0] - centre[0], points[..., 1] - centre[1]
    return np.stack([centre[0] + cosine * y + sine * x, centre[1] + cosine * x - sine * y], axis=-1)


def _corners(origin_m: Position, extent_m: Position, rotation_rad: float) -> NDArray[np.float64]:
    """(4, 2): the corners of a rectangle that is turned about its own centre."""
    origin, extent = np.array(origin_m, float), np.array(extent_m, float)
    upright = origin + extent * np.array([[0, 0], [0, 1], [1, 0], [1, 1]], float)
    return turned(upright, origin + extent / 2, rotation_rad) if rotation_rad else upright


class _Path:
    """Positions that are worked out when they are asked for."""

    def array(self) -> NDArray[np.float64]:
        """(n, 2): all positions (y, x) [m]."""
        raise NotImplementedError

    def corners_m(self) -> NDArray[np.float64]:
        """(k, 2): points whose convex hull holds all positions."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def _at(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.array().astype(dtype or np.float64)

    def __iter__(self) -> Iterator[Position]:
        for start in range(0, len(self), 4096):
            yield from map(tuple, self._at(np.arange(start, min(start + 4096, len(self)))).tolist())

    @overload
    def __getitem__(self, index: int) -> Position: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Position, ...]: ...
    def __getitem__(self, index: int | slice) -> Position | tuple[Position, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        y, x = self._at(np.array([index % len(self)]))[0].tolist()
        return y, x


@dataclass(frozen=True)
class Line(_Path):
    """``count`` positions from ``start_m`` to ``stop_m`` (y, x) [m], both included, evenly spaced.

    >>> list(Line((0.0, 0.0), (0.0, 2e-9), 3))
    [(0.0, 0.0), (0.0, 1e-09), (0.0, 2e-09)]
    """

    start_m: Position = _asks("pair", "the first position (y, x)", "m")
    stop_m: Position = _asks("pair", "the last position (y, x)", "m")
    count: int = _asks("count", "number of positions, both ends included")
    path: ClassVar[str] = "line"

    def __post_init__(self) -> None:
        _check_fields(self)

    def __len__(self) -> int:
        return int(self.count)

    def _at(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        start, stop = np.array(self.start_m, float), np.array(self.stop_m, float)
        return start + (stop - start) * (index / max(1, self.count - 1))[:, None]

    def array(self) -> NDArray[np.float64]:
        return self._at(np.arange(len(self)))

    def corners_m(self) -> NDArray[np.float64]:
        return np.array([self.start_m, self.stop_m] if self.count > 1 else [self.start_m], float)


@dataclass(frozen=True)
class Raster(_Path):
    """The centres of the ``shape`` (rows, columns) equal parts of a rectangle, row by row.

    ``origin_m`` (y, x) [m] is its top-left corner before it is turned about its own centre by ``rotation_rad`` (from
    +x towards +y), ``extent_m`` (height, width) [m].

    >>> list(Raster((0.0, 0.0), (2.0, 4.0), (1, 2)))
    [(1.0, 1.0), (1.0, 3.0)]
    """

    origin_m: Position = _asks("pair", "top-left corner (y, x) of the rectangle before it is turned", "m")
    extent_m: Position = _asks("pair", "height and width of the rectangle", "m", above=0)
    shape: tuple[int, int] = _asks("sizes", "rows and columns of positions")
    rotation_rad: float = _asks("number", "turn about the rectangle's centre, from +x towards +y", "rad", 0.0)
    path: ClassVar[str] = "raster"

    def __post_init__(self) -> None:
        _check_fields(self)
        _count("the number of positions", math.prod(self.shape), {})

    def __len__(self) -> int:
        return int(math.prod(self.shape))

    def _at(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        origin, extent = np.array(self.origin_m, float), np.array(self.extent_m, float)
        part = extent / self.shape
        points = origin + part * (np.stack(np.divmod(index, self.shape[1]), axis=-1) + 0.5)
        return turned(points, origin + extent / 2, self.rotation_rad) if self.rotation_rad else points

    def array(self) -> NDArray[np.float64]:
        return self._at(np.arange(len(self)))

    def corners_m(self) -> NDArray[np.float64]:
        return _corners(self.origin_m, self.extent_m, self.rotation_rad)


PATHS: dict[str, type[Line | Raster]] = {"line": Line, "raster": Raster}

Positions = tuple[Position, ...] | Line | Raster

# ---------------------------------------------------------------------------------------------------- instructions


@dataclass(frozen=True)
class Instruction:
    """Base of all instructions. ``exposes`` says whether the beam meets the sample."""

    kind: ClassVar[str] = ""
    exposes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_fields(self)

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
    """Scan a rectangle and record one signal a pixel.

    The rectangle is turned about its own centre by ``rotation_rad``; before that, pixel (i, j) of ``shape`` is taken
    with the probe at ``origin_m + (i, j) * extent_m / shape``, row by row.
    """

    origin_m: Position = _asks("pair", "top-left corner (y, x) of the scanned rectangle, before it is turned", "m")
    extent_m: Position = _asks("pair", "height and width of the scanned rectangle", "m", above=0)
    shape: tuple[int, int] = _asks("sizes", "rows and columns of pixels")
    dwell_s: float = _asks("number", "time a pixel", "s", above=0)
    detector: str = _asks("word", "which detector records", default="HAADF", choices=DETECTORS)
    rotation_rad: float = _asks("number", "turn of the scan about its centre, from +x towards +y", "rad", 0.0)
    kind: ClassVar[str] = "image"
    exposes: ClassVar[bool] = True

    @property
    def exposed_positions(self) -> int:
        return int(self.shape[0]) * int(self.shape[1])

    @property
    def beam_time_s(self) -> float:
        return self.exposed_positions * self.dwell_s

    @property
    def pixel_m(self) -> tuple[float, float]:
        """(y, x) [m] of a pixel."""
        return self.extent_m[0] / self.shape[0], self.extent_m[1] / self.shape[1]

    def positions(self) -> NDArray[np.float64]:
        """(rows, columns, 2): where the probe is (y, x) [m] for each pixel."""
        grid = np.stack(np.meshgrid(*(np.arange(n) for n in self.shape), indexing="ij"), axis=-1)
        points = np.array(self.origin_m, float) + grid * np.array(self.pixel_m)
        centre = np.array(self.origin_m, float) + np.array(self.extent_m, float) / 2
        return turned(points, centre, self.rotation_rad) if self.rotation_rad else points

    def __post_init__(self) -> None:
        super().__post_init__()
        _count("the number of positions", math.prod(map(int, self.shape)), {})

    def corners_m(self) -> NDArray[np.float64]:
        """(4, 2): the corners (y, x) [m] of the scanned rectangle."""
        return _corners(self.origin_m, self.extent_m, self.rotation_rad)


@dataclass(frozen=True)
class _Points(Instruction):
    positions_m: Positions = _asks("positions", "where: pairs (y, x), a line or a raster, in the order given", "m")
    dwell_s: float = _asks("number", "time at each position", "s", above=0)
    exposes: ClassVar[bool] = True

    @property
    def exposed_positions(self) -> int:
        return len(self.positions_m)

    @property
    def beam_time_s(self) -> float:
        return self.exposed_positions * self.dwell_s

    def corners_m(self) -> NDArray[np.float64]:
        """(k, 2): points (y, x) [m] whose convex hull holds all positions."""
        if isinstance(self.positions_m, (Line, Raster)):
            return self.positions_m.corners_m()
        return np.asarray(self.positions_m, float)


@dataclass(frozen=True)
class Diffraction(_Points):
    """Record one CBED pattern at each of ``positions_m``, ``dwell_s`` each, in the order given."""

    kind: ClassVar[str] = "diffraction"


@dataclass(frozen=True)
class Spectrum(_Points):
    """Record one energy-loss spectrum at each of ``positions_m``, ``dwell_s`` each, in the order given."""

    kind: ClassVar[str] = "spectrum"


@dataclass(frozen=True)
class Probe(Instruction):
    """Park the (blanked) probe."""

    position_m: Position = _asks("pair", "where (y, x)", "m")
    kind: ClassVar[str] = "probe"


@dataclass(frozen=True)
class Blank(Instruction):
    """Blank or unblank the beam."""

    blanked: bool = _asks("flag", "true keeps the beam off the sample", default=True)
    kind: ClassVar[str] = "blank"


@dataclass(frozen=True)
class Optics(Instruction):
    """Change the probe-forming optics; what is not named stays as it is.

    The phase of the probe at the angle ``theta`` and the azimuth ``phi`` (from +x towards +y) is
    ``chi = 2 pi / lambda [C10 theta^2 / 2 + |C12| theta^2 cos 2(phi - phi12) / 2 + |C21| theta^3 cos(phi - phi21) / 3
    + |C23| theta^3 cos 3(phi - phi23) / 3 + C30 theta^4 / 4]``; a pair ``(a, b)`` holds ``|C| cos(m phi_nm)`` and
    ``|C| sin(m phi_nm)``, where m is the second digit (O. L. Krivanek et al., Ultramicroscopy 78, 1 (1999),
    doi:10.1016/S0304-3991(99)00013-3). The defocus is ``-C10``.
    """

    semiangle_rad: float | None = _asks("number", "convergence semiangle", "rad", None, above=0)
    C10_m: float | None = _asks("number", "defocus term; negative is underfocus", "m", None)
    current_A: float | None = _asks("number", "beam current", "A", None, above=0)
    C12_m: tuple[float, float] | None = _asks("pair", "twofold astigmatism (a, b)", "m", None)
    C21_m: tuple[float, float] | None = _asks("pair", "axial coma (a, b)", "m", None)
    C23_m: tuple[float, float] | None = _asks("pair", "threefold astigmatism (a, b)", "m", None)
    C30_m: float | None = _asks("number", "third-order spherical aberration", "m", None)
    energy_eV: float | None = _asks(
        "number", "beam energy, where the instrument and its limits allow", "eV", None, above=0
    )
    kind: ClassVar[str] = "optics"


@dataclass(frozen=True)
class Stage(Instruction):
    """Move the stage to absolute coordinates and tilts; an axis that is not named stays where it is."""

    x_m: float | None = _asks("number", "along +x of the field", "m", None)
    y_m: float | None = _asks("number", "along +y of the field", "m", None)
    z_m: float | None = _asks("number", "along the beam", "m", None)
    alpha_rad: float | None = _asks("number", "tilt about the holder's axis", "rad", None)
    beta_rad: float | None = _asks("number", "tilt about the second axis", "rad", None)
    kind: ClassVar[str] = "stage"


@dataclass(frozen=True)
class Field(Instruction):
    """Choose the field of view in which positions count from now on.

    It shares its centre with the instrument's largest field, is at most that large and is turned about the centre.
    """

    extent_m: tuple[float, float] | None = _asks("pair", "height and width of the field", "m", None, above=0)
    rotation_rad: float | None = _asks("number", "turn about the field's centre, from +x towards +y", "rad", None)
    kind: ClassVar[str] = "field"


@dataclass(frozen=True)
class Detector(Instruction):
    """Set up one detector; what is not named stays as it is."""

    name: str = _asks("word", "which detector: one of info's, such as HAADF or camera")
    inserted: bool | None = _asks("flag", "whether it is in the beam's way", default=None)
    gain: float | None = _asks("number", "counts an electron", "1", None, above=0)
    offset: float | None = _asks("number", "counts without any electron", "1", None)
    exposure_s: float | None = _asks("number", "exposure of one frame of a camera", "s", None, above=0)
    binning: tuple[int, int] | None = _asks("sizes", "rows and columns that make one pixel", default=None)
    camera_length_m: float | None = _asks("number", "camera length", "m", None, above=0)
    inner_rad: float | None = _asks("number", "inner angle of a ring", "rad", None, above=0)
    outer_rad: float | None = _asks("number", "outer angle of a ring", "rad", None, above=0)
    energy_offset_eV: float | None = _asks("number", "energy loss at the first channel of a spectrometer", "eV", None)
    dispersion_eV: float | None = _asks("number", "energy a channel of a spectrometer", "eV", None, above=0)
    kind: ClassVar[str] = "detector"


@dataclass(frozen=True)
class Report(Instruction):
    """Ask for the full state vector. Exposes and changes nothing."""

    kind: ClassVar[str] = "report"


KINDS: dict[str, type[Instruction]] = {
    c.kind: c for c in (Image, Diffraction, Spectrum, Probe, Blank, Optics, Stage, Field, Detector, Report)
}

#: What version 1 knew. It means the same in version 2.
_VERSION_1: dict[str, set[str]] = {
    "image": {"origin_m", "extent_m", "shape", "dwell_s", "detector"},
    "diffraction": {"positions_m", "dwell_s"},
    "spectrum": {"positions_m", "dwell_s"},
    "probe": {"position_m"},
    "blank": {"blanked"},
    "optics": {"semiangle_rad", "C10_m", "current_A"},
    "stage": {"x_m", "y_m", "z_m", "alpha_rad", "beta_rad"},
    "report": set(),
}

# ----------------------------------------------------------------------------------------------------- the wire form


def _plain(value: Any) -> Any:
    if isinstance(value, (Line, Raster)):
        return {"path": value.path, **{f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def to_dict(instruction: Instruction) -> dict[str, Any]:
    """The wire form: a dictionary of plain numbers, strings and lists."""
    values = {field.name: _plain(getattr(instruction, field.name)) for field in dataclasses.fields(instruction)}
    return {"kind": instruction.kind, "version": VERSION, **values}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _read(value: Any) -> Any:
    """A field's value out of its wire form."""
    if not isinstance(value, dict):
        return _tuples(value)
    cls = PATHS.get(value.get("path", "")) if isinstance(value.get("path"), str) else None
    if cls is None:
        raise InputError(f"a path is one of {', '.join(PATHS)}; got {value.get('path')!r:.80}.")
    return _build(cls, cls.path, {name: _tuples(item) for name, item in value.items() if name != "path"})


@functools.cache
def _names(cls: type[Any]) -> tuple[frozenset[str], frozenset[str]]:
    """The fields of a class, and those of them that have no default."""
    fields = dataclasses.fields(cls)
    needed = (field.name for field in fields if field.default is dataclasses.MISSING)
    return frozenset(field.name for field in fields), frozenset(needed)


def _build(cls: type[Any], name: str, values: dict[str, Any]) -> Any:
    known, needed = _names(cls)  # type: ignore[arg-type]  # mypy holds that classes have no hash
    if unknown := values.keys() - known:
        has = ", ".join(sorted(known)) or "none"
        raise InputError(f"{name} has no field {', '.join(sorted(map(repr, unknown)))}; it has {has}.")
    if missing := needed - values.keys():
        raise InputError(f"{name} lacks {', '.join(sorted(missing))}.")
    return cls(**values)


def from_dict(wire: dict[str, Any]) -> Instruction:
    """Rebuild an instruction; a wrong kind, version, name or value is an :class:`InputError` that says which.

    The wire form of version 1 is read, too.

    >>> from_dict({"kind": "blank", "version": 1, "blanked": True})
    Blank(blanked=True)
    """
    kind = wire.get("kind") if isinstance(wire, dict) else wire
    if not isinstance(wire, dict) or not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"unknown instruction {kind!r:.80}; known: {', '.join(sorted(KINDS))}.")
    version = wire.get("version")
    values = {key: value for key, value in wire.items() if key not in ("kind", "version")}
    if version == 1 and not (kind in _VERSION_1 and set(values) <= _VERSION_1[kind]):
        raise InputError(
            f"version 1 of the instructions had no {kind} with {', '.join(sorted(values))}; send version 2."
        )
    if version not in (1, VERSION) or isinstance(version, bool):
        raise InputError(f"instruction version {version!r:.80} is not spoken here; this is version {VERSION}.")
    built: Instruction = _build(KINDS[kind], kind, {name: _read(value) for name, value in values.items()})
    return built
