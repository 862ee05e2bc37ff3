"""A list of instructions, checked and costed without touching hardware.

:func:`check_plan` asks the same limits and the same ledger (a copy of it) as the guard does, one instruction after
another, and follows the state that they would lead to. What it cannot know is what only the instrument knows: whether a
recording holds a position, or a stage is stuck.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stemloop.core import units
from stemloop.core.errors import InputError, LimitError, StemloopError
from stemloop.core.instruction import (
    DETECTORS,
    KINDS,
    VERSION,
    Blank,
    Field,
    Instruction,
    Probe,
    from_dict,
)
from stemloop.core.protocols import InstrumentInfo
from stemloop.instrument.declaration import read_yaml
from stemloop.instrument.dose import DoseLedger
from stemloop.instrument.limits import Limits, LimitsWatch, moved

#: Estimated time [s] that a command of a kind takes besides its beam time, and each of its positions.
OVERHEAD_S = {"image": 0.2, "stage": 2.0, "optics": 1.0, "field": 1.0, "detector": 1.0}
OVERHEAD_EACH_S = {"diffraction": 2e-3, "spectrum": 2e-3}


def current_A(state: Mapping[str, Any], limits: Limits) -> float:
    """The beam current [A]. An instrument that does not report it is charged the largest one."""
    return float(state["current_A"]) if knows_current(state) else limits.current_max_A


def knows_current(state: Mapping[str, Any]) -> bool:
    """Whether the instrument reports its beam current."""
    current = state.get("current_A")
    return isinstance(current, (int, float)) and math.isfinite(current) and current >= 0


@dataclass(frozen=True)
class PlannedStep:
    """One instruction of a plan: what it would cost, and ``ok`` or the code and message of its refusal.

    electrons : of all its positions together. e_per_A2 : the densest dose of any place after it, where doses are
    counted by place. beam_time_s, seconds : time with the beam on, estimated time of all [s].
    """

    kind: str
    positions: int
    electrons: float
    e_per_A2: float | None
    beam_time_s: float
    seconds: float
    verdict: str = "ok"
    message: str = ""


@dataclass(frozen=True)
class PlanReport:
    """The steps of a plan and their sums over what would be carried out."""

    steps: tuple[PlannedStep, ...]
    limits: str

    @property
    def ok(self) -> bool:
        """Whether no step would be refused."""
        return all(step.verdict == "ok" for step in self.steps)

    def _sum(self, name: str) -> float:
        return math.fsum(getattr(step, name) for step in self.steps if step.verdict == "ok")

    @property
    def electrons(self) -> float:
        """Electrons of all steps that would be carried out."""
        return self._sum("electrons")

    @property
    def beam_time_s(self) -> float:
        """Their time with the beam on [s]."""
        return self._sum("beam_time_s")

    @property
    def seconds(self) -> float:
        """Their estimated time [s]."""
        return self._sum("seconds")

    @property
    def e_per_A2(self) -> float | None:
        """The densest dose of any place at the end; None where doses are not counted by place."""
        return self.steps[-1].e_per_A2 if self.steps else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values: ``steps``, their sums, ``verdict`` (``ok`` or the first refusal's code), the limits' hash."""
        refused = next((step.verdict for step in self.steps if step.verdict != "ok"), "ok")
        return {
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "electrons": self.electrons,
            "e_per_A2": self.e_per_A2,
            "beam_time_s": self.beam_time_s,
            "seconds": self.seconds,
            "verdict": refused,
            "limits": self.limits,
        }


def read_plan(text: str) -> tuple[tuple[Instruction, ...], dict[str, Any]]:
    """(instructions, state at the beginning) out of a YAML or JSON text.

    The text is a list of instructions in their wire form, whose ``version`` may be left out, or a table with ``steps``
    and, where no instrument is asked, the ``state`` that the plan begins in.

    >>> read_plan("[{kind: blank}]")
    ((Blank(blanked=True),), {})
    """
    told = read_yaml(text, "the plan")
    table = {"steps": told} if isinstance(told, list) else told
    if not isinstance(table, dict) or not isinstance(table.get("steps"), list) or set(table) - {"steps", "state"}:
        raise InputError("a plan is a list of instructions, or a table with 'steps' and 'state'.")
    state = table.get("state") or {}
    if not isinstance(state, dict):
        raise InputError(f"the plan's state must be a table such as {{current_A: 1e-10}}; got {state!r:.80}.")
    steps = []
    for number, step in enumerate(table["steps"], 1):
        try:
            steps.append(from_dict({"version": VERSION, **step} if isinstance(step, dict) else step))
        except InputError as error:
            raise InputError(f"step {number} of the plan: {error}") from None
    return tuple(steps), state


def assumed(limits: Limits) -> InstrumentInfo:
    """The instrument that a plan is checked against where none is asked: it can do everything in the limits' field."""
    return InstrumentInfo("the assumed instrument", tuple(KINDS), limits.field_m, 0.0, detectors=DETECTORS)


def _led_to(asked: Instruction, state: dict[str, Any]) -> dict[str, Any]:
    """The state after an instruction, as far as a plan can know it."""
    after = {**state, **{control: value for control, value in moved(asked)}}
    if isinstance(asked, Blank):
        after["blanked"] = asked.blanked
    elif isinstance(asked, Probe):
        after["probe_y_m"], after["probe_x_m"] = asked.position_m
    elif asked.exposes and "blanked" in state:
        after["blanked"] = True
    elif isinstance(asked, Field) and asked.extent_m is not None:
        after["field_height_m"], after["field_width_m"] = asked.extent_m
    return after


def _cost(asked: Instruction, state: Mapping[str, Any], limits: Limits) -> tuple[float, float, float]:
    """(electrons at each position, beam time [s], estimated time [s])."""
    positions = asked.exposed_positions
    each = units.electrons(current_A(state, limits), asked.beam_time_s / positions) if positions else 0.0
    waits = OVERHEAD_S.get(asked.kind, 0.0) + OVERHEAD_EACH_S.get(asked.kind, 0.0) * positions
    return each, asked.beam_time_s, asked.beam_time_s + waits


def check_plan(
    plan: Iterable[Instruction],
    limits: Limits,
    ledger: DoseLedger,
    info: InstrumentInfo,
    state: Mapping[str, Any],
) -> PlanReport:
    """List, check and cost a plan.

    Parameters
    ----------
    plan : instructions in the order in which they would be sent.
    limits, ledger : those of the guard; the ledger is copied and stays as it is.
    info, state : what the instrument is, and its state vector at the beginning.

    A step that would be refused changes nothing for those after it, as on the instrument. Rates are judged by the
    estimated times, with every step sent as soon as the one before has ended.
    """
    ledger, watch, now = ledger.copy(), LimitsWatch(limits), dict(state)
    steps, seconds = [], 0.0
    for number, asked in enumerate(plan):
        each, beam_time_s, takes_s = _cost(asked, now, limits)
        electrons = each * asked.exposed_positions
        verdict, message = "ok", ""
        try:
            limits.check(asked, each, info, now)
            if each and current_A(now, limits) > limits.current_max_A:
                raise LimitError(f"the beam current is over the limit of {limits.current_max_A:g} A: lower it first.")
            if not asked.exposes:
                watch.admit(asked, now, seconds)
                spot: Instruction | None = limits.opened(asked, now)
                electrons = units.electrons(current_A(now, limits), limits.parked_max_s or 0.0) if spot else 0.0
            else:
                spot = asked
            if spot is not None:
                ledger.reserve(f"step {number}", electrons, ledger.footprint(spot, info, now))
                ledger.settle(f"step {number}")
            now = _led_to(asked, now)
            seconds += takes_s
        except StemloopError as error:
            verdict, message = error.code, str(error)
        worst = ledger.worst_e_per_A2 if ledger.region is not None else None
        positions = asked.exposed_positions
        steps.append(PlannedStep(asked.kind, positions, electrons, worst, beam_time_s, takes_s, verdict, message))
    return PlanReport(tuple(steps), limits.content_hash)
