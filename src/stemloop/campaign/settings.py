"""What a run is asked to do. Written to ``settings.json`` before anything is exposed, and never changed after."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemloop.core.errors import InputError


@dataclass(frozen=True)
class Settings:
    """One run.

    recipe : name of the recipe. instrument : ``twin``, ``nion:twin``, ``nion:usim`` or ``replay:FILE``. specimen : of
    the twin. seed : of the twin and of every random choice. target_sigma : wanted largest deviation of the property
    over the field, in the unit of the recipe (None: the recipe's own). max_points, max_electrons, max_seconds :
    budgets (None: no limit; a run always ends when every position of the map has been exposed). acquisition : how the
    next positions are chosen. calculator : of the energies (None: the material's own). scalarizer : of spectra (None:
    the recipe's own). initial, batch : numbers of points of the first design and of each later step (None: the
    recipe's own).
    """

    recipe: str = "strain-energy"
    instrument: str = "twin"
    specimen: str | None = "MoS2"
    seed: int = 0
    target_sigma: float | None = None
    max_points: int | None = None
    max_electrons: float | None = None
    max_seconds: float | None = None
    acquisition: str | None = None
    calculator: str | None = None
    scalarizer: str | None = None
    initial: int | None = None
    batch: int | None = None
    damage: bool = False

    def __post_init__(self) -> None:
        for name in ("target_sigma", "max_points", "max_electrons", "max_seconds", "initial", "batch"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name.replace('_', '-')} must be above zero; got {value}.")
        if self.seed < 0:
            raise InputError(f"seed must not be negative; got {self.seed}.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read ``settings.json``; a file that is missing or not of this version is an :class:`InputError`."""
        try:
            wire = json.loads(path.read_text())
            return cls(**wire)
        except FileNotFoundError:
            raise InputError(f"{path.parent} is no run folder: it has no {path.name}.") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; name the folder of a run.") from None
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} cannot be used: {error}.") from None
