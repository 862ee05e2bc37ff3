"""The one door to the instrument: every command passes role, lease, limits and dose before it meets the hardware.

A :class:`Guard` is called from one thread, the instrument's. The order of its steps is the safety of the whole:
an id that was executed before is answered from the spool; the lease and its fencing number are checked where the
command is carried out, not where it arrived; the dose is reserved and the intent is durable before the exposure; the
result is durable before the reply.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from stemloop.core import units
from stemloop.core.errors import (
    Aborted,
    InputError,
    InstrumentError,
    LimitError,
    OutcomeUnknown,
    Refused,
    StemloopError,
    from_code,
)
from stemloop.core.instruction import Blank, Image, Instruction, Report
from stemloop.core.protocols import Batch, Exposure, FrameSink, Instrument
from stemloop.core.record import content_hash
from stemloop.instrument import wire
from stemloop.instrument.dose import DoseLedger
from stemloop.instrument.limits import Limits, LimitsWatch
from stemloop.instrument.plan import PlanReport, check_plan, current_A
from stemloop.instrument.session import Identity, LeaseDesk
from stemloop.instrument.spool import Audit, Spool

_log = logging.getLogger(__name__)

_MAX_ID_LENGTH = 200
_AUDITED_POSITIONS = 16


@dataclass(frozen=True)
class Command:
    """One command as it arrived: ``data`` is ``inline`` (frames in the reply) or ``stream`` (through the sink)."""

    who: Identity
    lease_id: str | None
    fencing: int | None
    command_id: str
    instruction: dict[str, Any]
    data: str = "inline"


def _audited(instruction: dict[str, Any]) -> dict[str, Any]:
    """The instruction as the audit keeps it: a long list of positions as its number and hash."""
    positions = instruction.get("positions_m")
    if not isinstance(positions, (list, tuple)) or len(positions) <= _AUDITED_POSITIONS:
        return instruction
    return {**instruction, "positions_m": {"count": len(positions), "sha256": content_hash(positions)}}


class Guard:
    """Carries out commands on an instrument.

    Parameters
    ----------
    instrument : Instrument
        Called from the thread that calls the guard, and from no other.
    spool, audit, desk, limits : Spool, Audit, LeaseDesk, Limits
        What was done, what is written down, who drives, what may be asked.
    dose_budget : float, optional
        Electrons that all exposures together may take, those before a restart included; the smaller one holds of this
        and ``limits.electrons_max``.
    sink : FrameSink, optional
        Where frames go that are asked for with ``data="stream"``.
    """

    def __init__(
        self,
        instrument: Instrument,
        spool: Spool,
        audit: Audit,
        desk: LeaseDesk,
        limits: Limits,
        dose_budget: float | None = None,
        sink: FrameSink | None = None,
    ) -> None:
        self.info = instrument.info
        self.limits = limits
        self.watch = LimitsWatch(limits)
        budgets = [budget for budget in (dose_budget, limits.electrons_max) if budget is not None]
        self.ledger = DoseLedger(min(budgets, default=None), spool.spent, limits.region)
        for past in spool.past():
            if limits.region is not None:
                self._recall(**past)
        self.desk = desk
        self._instrument = instrument
        self._spool = spool
        self._audit = audit
        self._sink = sink
        self._blank_failed = False
        if spool.state is not None:
            instrument.restore(spool.state)
            desk.unattended = True

    def state(self) -> dict[str, Any]:
        """The instrument's state vector."""
        with _instrument_errors():
            return self._instrument.state()

    def note(self, event: str, who: str, **entry: Any) -> None:
        """Write an event that is no instruction into the audit log."""
        self._audit.write(event=event, who=who, **entry)

    def blank(self, reason: str) -> None:
        """Blank the beam because nobody drives. Raises ``InstrumentError`` if the instrument will not."""
        if "blank" in self.info.instructions:
            try:
                with _instrument_errors():
                    self._instrument.execute(Blank(), key=f"blank: {reason}")
            except StemloopError as error:
                if not self._blank_failed:
                    _log.error("the beam could not be blanked (%s): %s", reason, error)
                    self.note("blank", "server", reason=reason, verdict=f"failed: {error}")
                self._blank_failed = True
                raise
        self._blank_failed = False
        self.desk.unattended = False
        self.note("blank", "server", reason=reason, verdict="done")

    def execute(self, command: Command) -> dict[str, Any]:
        """Carry out one command: the reply's fields, or one of the errors of ``core.errors``. Audited either way."""
        started = time.perf_counter()
        verdict, result = "done", None
        try:
            reply, result = self._execute(command)
            return reply
        except StemloopError as error:
            verdict = error.code
            raise
        finally:
            self.note(
                "execute",
                command.who.name,
                fencing=command.fencing,
                id=command.command_id,
                instruction=_audited(command.instruction),
                limits=self.limits.content_hash,
                verdict=verdict,
                result=result,
                latency_s=time.perf_counter() - started,
            )

    def _execute(self, command: Command) -> tuple[dict[str, Any], str | None]:
        command.who.require("agent", "command the microscope")
        if not 0 < len(command.command_id) <= _MAX_ID_LENGTH:
            raise InputError(f"a command id has 1 to {_MAX_ID_LENGTH} characters; got {len(command.command_id)}.")
        if command.data not in ("inline", "stream"):
            raise InputError(f"data must be 'inline' or 'stream'; got {command.data!r:.40}.")
        if command.data == "stream" and self._sink is None:
            raise InputError("this server was given no stream for frames; ask with data='inline'.")
        asked = wire.instruction_from_message(command.instruction)
        first = self._spool.find(command.command_id)
        if first is not None:
            return self._repeat(command, asked, first)
        self.desk.check(command.lease_id, command.fencing)
        if self.desk.unattended:
            self.blank("the lease changed hands")
        exposure = self._expose(command, asked) if asked.exposes else self._act(command, asked)
        return self._reply(command, exposure)

    def _repeat(self, command: Command, asked: Instruction, first: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        if wire.instruction_from_message(first["instruction"]) != asked:
            raise InputError(
                f"the command id {command.command_id!r} was used for another instruction "
                f"({first['instruction'].get('kind')}): give each instruction its own id."
            )
        if first["error"]:
            raise from_code(*first["error"])
        return self._reply(command, wire.exposure_from_message(first["exposure"]))

    def _act(self, command: Command, asked: Instruction) -> Exposure:
        """Carry out what does not expose. Kept without fdatasync: a repeat after a power cut does no harm."""
        state = {} if isinstance(asked, Report) else self.state()
        self.limits.check(asked, 0.0, self.info, state)
        self.watch.admit(asked, state, time.monotonic())
        name, settled = command.command_id, 0
        if (spot := self.limits.opened(asked, state)) is not None:
            electrons = units.electrons(current_A(state, self.limits), self.limits.parked_max_s or 0.0)
            self.ledger.reserve(name, electrons, self.ledger.footprint(spot, self.info, state))
            settled = self.ledger.settle(name)  # in advance: the beam may rest so long, whatever becomes of us
        with _instrument_errors():
            exposure = self._instrument.execute(asked, key=name)
        if not isinstance(asked, Report):
            message = wire.instruction_to_message(asked)
            self._spool.result(name, message, settled, exposure=exposure, durable=settled > 0)
        return exposure

    def _recall(self, instruction: dict[str, Any], settled: int, exposed: int | None, state: dict[str, Any]) -> None:
        """Put an exposure from before a restart back on the map of doses."""
        asked = wire.instruction_from_message(instruction)
        spot = asked if asked.exposes else self.limits.opened(asked, {**state, "blanked": False})
        if spot is not None:
            self.ledger.recall(self.ledger.footprint(spot, self.info, state, exposed), settled)

    def _expose(self, command: Command, asked: Instruction) -> Exposure:
        state = self.state()
        electrons = self._electrons(asked, state)
        self.limits.check(asked, electrons, self.info, state)
        name, message = command.command_id, wire.instruction_to_message(asked)
        where = self.ledger.footprint(asked, self.info, state)
        reserved = self.ledger.reserve(name, electrons * asked.exposed_positions, where)
        try:
            self._spool.intent(name, message, command.fencing or 0, reserved, command.who.name)
        except StemloopError:
            self.ledger.settle(name, 0.0)
            raise
        try:
            with _instrument_errors(), self._beam(name):
                exposure = self._instrument.execute(asked, key=name)
                self._check(asked, exposure)
        except StemloopError as error:
            done = self._exposed(asked, error)
            if done is None:
                settled = self.ledger.settle(name)
            else:
                part = self.ledger.footprint(asked, self.info, state, done) if done else where
                settled = self.ledger.settle(name, electrons * done, part)
            self._keep(name, message, settled, error=error, exposed=done)
            raise
        settled = self.ledger.settle(name, exposure.electrons * asked.exposed_positions)
        stream = None
        if command.data == "stream" and exposure.frames is not None:
            stream = self._spool.number(asked.kind, len(exposure.frames))
        self._keep(name, message, settled, exposure=exposure, stream=stream)
        return exposure

    @staticmethod
    def _exposed(asked: Instruction, error: StemloopError) -> int | None:
        """How many positions were exposed before the error, by the instrument's word; None if it gave none."""
        if isinstance(error, (Refused, InputError)):
            return 0
        done = error.exposed if isinstance(error, Aborted) else None
        return None if done is None else min(max(done, 0), asked.exposed_positions)

    def check(self, plan: Iterable[Instruction]) -> PlanReport:
        """What these instructions would cost and which would be refused, now and one after another. Touches nothing."""
        return check_plan(plan, self.limits, self.ledger, self.info, self.state())

    def unpark(self) -> None:
        """Blank the beam if it has rested on one spot for longer than the limits allow. Ask often."""
        if self.limits.parked_max_s is not None and (reason := self.watch.parked(self.state(), time.monotonic())):
            self.blank(reason)

    @contextmanager
    def _beam(self, name: str) -> Iterator[None]:
        """A blanked beam is opened for an exposure and blanked again after it, however it ends."""
        if not self._instrument.state().get("blanked") or "blank" not in self.info.instructions:
            yield
            return
        try:
            self._instrument.execute(Blank(False), key=f"{name}: unblank")
            yield
        finally:
            try:
                self._instrument.execute(Blank(True), key=f"{name}: blank")
            except Exception:  # the exposure counts; the server's watch blanks as soon as it can
                _log.exception("the beam could not be blanked after %s", name)
                self.desk.unattended = True

    def _keep(self, name: str, message: dict[str, Any], settled: int, **outcome: Any) -> None:
        try:
            self._spool.result(name, message, settled, **outcome)
        except StemloopError as error:
            unknown = OutcomeUnknown(
                f"the exposure {name!r} was made and could not be kept: {error} "
                "It counts as exposed and is not repeated."
            )
            self._spool.lost(name, message, settled, unknown)
            raise unknown from error

    def _electrons(self, asked: Instruction, state: dict[str, Any]) -> float:
        """Electrons at each position."""
        current = current_A(state, self.limits)
        if current > self.limits.current_max_A:
            raise LimitError(
                f"the beam current is {current:g} A, over the limit of {self.limits.current_max_A:g} A: "
                "lower it with an Optics instruction."
            )
        return units.electrons(current, asked.beam_time_s / asked.exposed_positions)

    @staticmethod
    def _check(asked: Instruction, exposure: Exposure) -> None:
        """The instrument keeps its side: one frame a position (one image), and a number of electrons."""
        wanted = 1 if isinstance(asked, Image) else asked.exposed_positions
        if exposure.frames is None or len(exposure.frames) != wanted:
            got = None if exposure.frames is None else len(exposure.frames)
            raise InstrumentError(f"the instrument answered {got} frames to {asked.kind}; {wanted} were asked.")
        if not (math.isfinite(exposure.electrons) and exposure.electrons >= 0):
            raise InstrumentError(f"the instrument reported {exposure.electrons!r} electrons for {asked.kind}.")

    def _reply(self, command: Command, exposure: Exposure) -> tuple[dict[str, Any], str | None]:
        reply = wire.exposure_to_message(exposure)
        frames = exposure.frames
        if frames is None:
            return reply, None
        digest = content_hash(frames)
        if command.data == "stream" and self._sink is not None:
            numbers = self._spool.streamed(command.command_id, command.instruction["kind"], len(frames))
            meta = {
                "command_id": command.command_id,
                "instruction": command.instruction,
                "electrons": exposure.electrons,
                "state": exposure.state,
                "calibration": exposure.calibration,
                "sha256": digest,
            }
            self._send(Batch(numbers["stream"], numbers["first"], frames, wire.plain(meta)))
            reply = {**reply, "frames": None, "calibration": {**exposure.calibration, **numbers}}
        return {**reply, "sha256": digest}, digest

    def _send(self, batch: Batch) -> None:
        assert self._sink is not None
        try:
            self._sink.send(batch)
        except Exception as error:
            raise InstrumentError(
                f"the frames {batch.first} to {batch.first + len(batch.frames) - 1} of {batch.stream!r} were taken and "
                f"are kept, but the stream failed ({error}): repeat the same command id to send them again."
            ) from error


@contextmanager
def _instrument_errors() -> Iterator[None]:
    """Whatever an instrument raises is one of the errors of ``core.errors``."""
    try:
        yield
    except StemloopError:
        raise
    except Exception as error:
        _log.exception("the instrument failed")
        raise InstrumentError(f"the instrument failed: {type(error).__name__}: {error}.") from error
