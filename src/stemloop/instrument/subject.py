"""An instrument under examination: every command counted and timed, so that a verdict can name its figures."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from typing import Any

import numpy as np

from stemloop.core.errors import InstrumentError
from stemloop.core.instruction import Diffraction, Image, Instruction, Position, Spectrum
from stemloop.core.protocols import Exposure, Instrument, InstrumentInfo, Scope
from stemloop.core.units import electrons

#: The exposing kinds in the order in which they tell places apart best.
POINTED = ("diffraction", "spectrum", "image")

_EDGE = 0.05
_IMAGE_PX = 8


class Nonconforming(InstrumentError):
    """The instrument does not do what its socket promises; the message says what was seen, ``figures`` how much."""

    code = "nonconforming"

    def __init__(self, message: str = "", **figures: Any) -> None:
        super().__init__(message)
        self.figures = figures


class Bare:
    """An instrument without a server as a :class:`~stemloop.core.protocols.Scope`; epochs and times are stamped."""

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self._epoch = 0

    @property
    def info(self) -> InstrumentInfo:
        """What the instrument is."""
        return self.instrument.info

    def execute(self, instruction: Instruction, command_id: str) -> Exposure:
        """Carry out an instruction; the id is its key."""
        self._epoch += 1
        began = time.time()
        exposure = self.instrument.execute(instruction, key=command_id)
        return dataclasses.replace(
            exposure,
            epoch=exposure.epoch or self._epoch,
            began_s=exposure.began_s or began,
            ended_s=exposure.ended_s or time.time(),
        )

    def state(self) -> dict[str, Any]:
        """The state vector."""
        return self.instrument.state()

    def dose(self) -> dict[str, float]:
        """Nobody counts here."""
        return {}

    def close(self) -> None:
        """The instrument is not ours to close."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a command was sent and answered (our clock), and began and ended (the instrument's clock) [s]."""

    sent_s: float
    began_s: float
    ended_s: float
    answered_s: float
    epoch: int


class Subject:
    """An instrument under examination.

    Parameters
    ----------
    scope : Scope
        With the lease, if it needs one; or a :class:`Bare` instrument.
    name : str
        Begins every command id.
    seed : int
        Of the choice of places.
    electrons_max : float
        Most electrons that one frame may take at one position.
    limits : dict
        What the server declares, if there is one.
    """

    def __init__(
        self,
        scope: Scope,
        name: str = "check",
        seed: int = 0,
        electrons_max: float = 2e6,
        limits: dict[str, Any] | None = None,
    ) -> None:
        self.scope = scope
        self.limits = limits or {}
        self.electrons_max = electrons_max
        self.rng = np.random.default_rng(seed)
        self.commands: Counter[str] = Counter()
        self.latency_s: dict[str, list[float]] = {}
        self.moments: list[Moment] = []
        self._name = name
        self._count = itertools.count()

    @property
    def info(self) -> InstrumentInfo:
        """What the instrument is."""
        return self.scope.info

    @property
    def recorded(self) -> bool:
        """Whether a recording answers, on which no beam falls."""
        return bool(self.info.sample.get("recorded"))

    def new_id(self) -> str:
        """A command id that was not used before."""
        return f"{self._name}-{next(self._count)}"

    def ask(self, instruction: Instruction, command_id: str | None = None) -> Exposure:
        """Carry out an instruction; counted and timed."""
        command_id = command_id or self.new_id()
        sent, started = time.time(), time.perf_counter()
        self.commands[instruction.kind] += 1
        exposure = self.scope.execute(instruction, command_id)
        took = time.perf_counter() - started
        self.latency_s.setdefault(instruction.kind, []).append(took)
        if exposure.epoch:
            self.moments.append(Moment(sent, exposure.began_s, exposure.ended_s, sent + took, exposure.epoch))
        return exposure

    # ---------------------------------------------------------------------------------------------- what to ask for

    def kinds(self) -> tuple[str, ...]:
        """The exposing kinds that the instrument declares."""
        return tuple(kind for kind in POINTED if kind in self.info.instructions)

    def places(self, count: int, kind: str) -> list[Position]:
        """``count`` places (y, x) [m] inside the field, or fewer if fewer were recorded."""
        info = self.info
        recorded = info.positions_m
        if recorded is not None and kind != "image":
            chosen = self.rng.permutation(len(recorded))[:count]
            return [(float(y), float(x)) for y, x in recorded[chosen]]
        drawn = _EDGE + (1 - 2 * _EDGE) * self.rng.random((count, 2))
        return [(float(y * info.field_m[0]), float(x * info.field_m[1])) for y, x in drawn]

    def frame_at(self, kind: str, place: Position, dwell_s: float) -> Image | Diffraction | Spectrum:
        """The smallest exposure of a kind at a place."""
        if kind == "diffraction":
            return Diffraction((place,), dwell_s)
        if kind == "spectrum":
            return Spectrum((place,), dwell_s)
        return self._small_image(place, dwell_s)

    def _small_image(self, place: Position, dwell_s: float) -> Image:
        """A few pixels about a place; whole recorded pixels of a recording."""
        field = self.info.field_m
        recorded = self.info.sample.get("image_shape")
        origin, extent, shape = [], [], []
        for axis in (0, 1):
            pixels = int(recorded[axis]) if recorded else 16 * _IMAGE_PX
            count = min(_IMAGE_PX, pixels)
            pixel = field[axis] / pixels
            first = min(max(round(place[axis] / pixel) - count // 2, 0), pixels - count)
            origin.append(first * pixel)
            extent.append(count * pixel)
            shape.append(count)
        detector = (self.info.detectors or ("HAADF",))[0]
        return Image((origin[0], origin[1]), (extent[0], extent[1]), (shape[0], shape[1]), dwell_s, detector)

    def dwells(self, kind: str) -> list[float]:
        """Dwell times [s] to try, from the gentlest up to the most electrons that a frame may take."""
        current_A = float(self.scope.state().get("current_A") or 1e-10)
        per_second = electrons(current_A, 1.0)
        pixels = _IMAGE_PX**2 if kind == "image" else 1
        most = self.electrons_max / per_second / pixels
        if limit := self.limits.get("dwell_max_s"):
            most = min(most, float(limit))
        if limit := self.limits.get("electrons_per_point"):
            most = min(most, float(limit) / per_second)
        return [most / 4**step for step in range(4, -1, -1)]
