"""How limits are declared: numbers, ranges and tables out of YAML, read without trust."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from stemloop.core.errors import InputError

Range = tuple[float, float]

# ---------------------------------------------------------------------------------------------- reading a declaration


def read_number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"limit {name} must be a finite number; got {value!r:.80}.")
    return float(value)


def read_positive(name: str, value: Any) -> float:
    """A finite number above zero."""
    if read_number(name, value) <= 0:
        raise InputError(f"limit {name} must be above zero; got {value!r:.80}.")
    return float(value)


def read_numbers(name: str, value: Any) -> tuple[float, ...]:
    """A list of numbers."""
    if not isinstance(value, (list, tuple)):
        raise InputError(f"limit {name} must be a list of numbers; got {value!r:.80}.")
    return tuple(read_number(name, one) for one in value)


def read_pair(name: str, value: Any) -> tuple[float, float]:
    """Two numbers."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InputError(f"limit {name} must be two numbers; got {value!r:.80}.")
    return read_number(name, value[0]), read_number(name, value[1])


def read_range(name: str, value: Any) -> Range:
    """Two numbers, the lower one first."""
    low, high = read_pair(name, value)
    if low > high:
        raise InputError(f"limit {name}: the lower end {low:g} is above the upper end {high:g}.")
    return low, high


def read_flag(name: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise InputError(f"limit {name} must be true or false; got {value!r:.80}.")
    return value


def read_table(name: str, value: Any, known: set[str], needed: set[str]) -> Mapping[str, Any]:
    """A mapping with names out of ``known``, all of ``needed`` among them."""
    if not isinstance(value, Mapping):
        raise InputError(f"limit {name} must be a table with {', '.join(sorted(known))}; got {value!r:.80}.")
    if unknown := {str(key) for key in value} - known:
        raise InputError(f"unknown {name} {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}.")
    if missing := needed - set(value):
        raise InputError(f"limit {name} lacks {', '.join(sorted(missing))}.")
    return value


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may be written 1e-3 (YAML 1.1 wants 1.0e-3) and whose names may not come twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if (name := key.value) in seen:
                raise InputError(f"the limits name {name!r} twice (line {key.start_mark.line + 1}): keep one of them.")
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)

#: More than this is no set of limits [characters].
_MAX_TEXT = 2**20


# ------------------------------------------------------------------------------------------------------ the parts


@dataclass(frozen=True)
class Control:
    """One control: ``low`` to ``high``, at most ``step`` a command and ``rate_per_s`` a second, in its own unit.

    A pair such as C12 is within the range when both its numbers are; its step is the length of the change.
    """

    low: float
    high: float
    step: float | None = None
    rate_per_s: float | None = None

    @classmethod
    def read(cls, name: str, value: Any) -> Control:
        """From ``[low, high]`` or ``{range: [low, high], step: ..., rate_per_s: ...}``."""
        if not isinstance(value, Mapping):
            return cls(*read_range(name, value))
        table = read_table(name, value, {"range", "step", "rate_per_s"}, {"range"})
        limits = {key: read_positive(f"{name} {key}", table[key]) for key in ("step", "rate_per_s") if key in table}
        return cls(*read_range(name, table["range"]), **limits)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`read` takes."""
        limits = {key: getattr(self, key) for key in ("step", "rate_per_s") if getattr(self, key) is not None}
        return {"range": [self.low, self.high], **limits}


@dataclass(frozen=True)
class Envelope:
    """How far the stage may be from its zero at a tilt: ``reach[axis][i]`` [m] at ``tilt_rad[i]``, linear in between.

    ``tilt_rad`` begins at 0 and grows; no reach grows with the tilt; beyond the last tilt nothing is allowed.
    """

    tilt_rad: tuple[float, ...]
    reach: Mapping[str, tuple[float, ...]]

    @classmethod
    def read(cls, name: str, value: Any) -> Envelope:
        """From ``{tilt_rad: [0, ...], x_m: [...], y_m: [...], z_m: [...]}``; an axis left out is not bound."""
        table = read_table(name, value, {"tilt_rad", "x_m", "y_m", "z_m"}, {"tilt_rad"})
        tilt = read_numbers(f"{name} tilt_rad", table["tilt_rad"])
        if len(tilt) < 2 or tilt[0] != 0 or any(b <= a for a, b in itertools.pairwise(tilt)):
            raise InputError(f"limit {name} tilt_rad must grow from 0, two values or more; got {list(tilt)}.")
        reach = {axis: read_numbers(f"{name} {axis}", table[axis]) for axis in table if axis != "tilt_rad"}
        for axis, values in reach.items():
            falls = all(b <= a for a, b in itertools.pairwise(values))
            if len(values) != len(tilt) or not falls or values[-1] < 0:
                raise InputError(
                    f"limit {name} {axis} must hold a reach of 0 or more for each of the {len(tilt)} tilts, none "
                    f"larger than the one before; got {list(values)}."
                )
        return cls(tilt, reach)

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`read` takes."""
        return {"tilt_rad": list(self.tilt_rad), **{axis: list(values) for axis, values in self.reach.items()}}

    def at(self, axis: str, tilt_rad: float) -> float:
        """The reach [m] of an axis at a tilt [rad]."""
        return float(np.interp(abs(tilt_rad), self.tilt_rad, self.reach[axis]))


@dataclass(frozen=True)
class Region:
    """Dose by place: at most ``e_per_A2_max`` electrons per square angstrom in any cell of a grid of ``cell_m`` [m].

    A pixel of an image spreads its electrons over its own area, a point over a square of ``probe_area_m2`` [m^2]. The
    grid lies on the specimen: it moves with the stage (position minus stage) unless ``follows_stage`` is false.
    """

    cell_m: float
    e_per_A2_max: float
    probe_area_m2: float
    follows_stage: bool = True

    @classmethod
    def read(cls, name: str, value: Any) -> Region:
        """From a table with these names."""
        known = {entry.name for entry in dataclasses.fields(cls)}
        table = read_table(name, value, known, known - {"follows_stage"})
        numbers = {key: read_positive(f"{name} {key}", table[key]) for key in known - {"follows_stage"}}
        return cls(**numbers, follows_stage=read_flag(f"{name} follows_stage", table.get("follows_stage", True)))

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`read` takes."""
        return dataclasses.asdict(self)


def read_yaml(text: str, what: str) -> Any:
    """The table in a YAML text, or an ``InputError`` that names ``what`` and the line."""
    if len(text) > _MAX_TEXT:
        raise InputError(f"{what} has more than {_MAX_TEXT} characters.")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=_Loader)):
            raise InputError(f"{what} has aliases (*name), which are not read: write the values out.")
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what} is not YAML: {' '.join(str(error).split()):.200}.") from None
