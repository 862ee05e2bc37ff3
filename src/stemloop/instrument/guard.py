"""The one door to the instrument: every command passes role, lease, limits and dose before it meets the hardware.

A :class:`Guard` is called from one thread, the instrument's, but for what says otherwise. The order of its steps is
the safety of the whole:
an id that was executed before is answered from the spool; the lease and its fencing number are checked where the
command is carried out, not where it arrived; the dose is reserved and the intent is durable before the exposure; the
result is durable before the reply.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from stemloop.core import units
from stemloop.core.errors import (
    Aborted,
    InputError,
    InstrumentError,
    LeaseError,
    LimitError,
    OutcomeUnknown,
    Refused,
    StemloopError,
    StorageError,
    from_code,
)
from stemloop.core.instruction import Blank, Image, Instruction, Probe, Report
from stemloop.core.protocols import Abortable, Batch, Exposure, FrameSink, Instrument, Prompt, Reporting
from stemloop.core.record import content_hash
from stemloop.instrument import wire
from stemloop.instrument.audit import Audit, Head
from stemloop.instrument.dose import DoseLedger
from stemloop.instrument.lease import LeaseDesk
from stemloop.instrument.limits import Limits, LimitsWatch, frame_bytes
from stemloop.instrument.plan import PlanReport, check_plan, current_A, knows_current
from stemloop.instrument.spool import Spool
from stemloop.instrument.tokens import Identity

_log = logging.getLogger(__name__)

_MAX_ID_LENGTH = 200
_AUDITED_POSITIONS = 16
_AUDITED_LENGTH = 4096
_PROGRESS_S = 0.1


@dataclass(frozen=True)
class Command:
    """One command as it arrived.

    ``data`` is ``inline`` (frames in the reply), ``stream`` (through the sink) or ``reference`` (kept on the
    instrument's side; the reply has their hash, and they are fetched by the command's id).
    """

    who: Identity
    lease_id: str | None
    fencing: int | None
    command_id: str
    instruction: dict[str, Any]
    data: str = "inline"


class _Keeping(NamedTuple):
    """An exposure whose result is being made durable."""

    done: Future[None]
    message: dict[str, Any]
    settled: int


def _audited(instruction: dict[str, Any]) -> dict[str, Any]:
    """The instruction as the audit keeps it: a long list of positions, or whatever else is long, as its hash."""
    positions = instruction.get("positions_m")
    if isinstance(positions, (list, tuple)) and len(positions) > _AUDITED_POSITIONS:
        instruction = {**instruction, "positions_m": {"count": len(positions), "sha256": _sha256(positions)}}
    if len(repr(instruction)) > _AUDITED_LENGTH:
        return {"kind": repr(instruction.get("kind"))[:80], "sha256": _sha256(instruction)}
    audited: dict[str, Any] = wire.plain(instruction)
    return audited


def _sha256(asked: Any) -> str:
    """The hash of anything that came in a message, well-formed or not."""
    try:
        return content_hash(asked)
    except Exception:
        return hashlib.sha256(repr(asked).encode("utf-8", "backslashreplace")).hexdigest()


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
                self._recall(**{**past, "state": {**instrument.state(), **past["state"]}})
        self.desk = desk
        self._instrument = instrument
        self._spool = spool
        self._audit = audit
        self._sink = sink
        self._prompt = instrument.prompt if isinstance(instrument, Prompt) else frozenset()
        self._blank_failed = False
        self._lock = threading.Lock()  # the instrument's command begins, is aborted and ends under it
        self._running: Command | None = None
        self._keeping: _Keeping | None = None
        self._abort_sent = False
        self._told_s = 0.0
        self.on_progress: Callable[[Command, int, int], None] = lambda command, done, of: None
        if isinstance(instrument, Reporting):
            instrument.progress = self._progress
        if spool.state is not None:
            instrument.restore(_blanked(spool.state))
        desk.unattended = True  # nobody drives yet: the beam is blanked before anything else
        self.epoch = 0
        self.last_state: tuple[float, dict[str, Any]] = (time.time(), self.state())

    def state(self) -> dict[str, Any]:
        """The instrument's state vector."""
        with _instrument_errors():
            state = self._instrument.state()
        self.last_state = (time.time(), state)
        return state

    # ----------------------------------------------------------------------------------- calls from any thread

    @property
    def running(self) -> Command | None:
        """The command that the instrument carries out now."""
        return self._running

    @property
    def audit_head(self) -> Head:
        """Where the audit log ends now."""
        return self._audit.head

    def can_abort(self) -> bool:
        """Whether the instrument can end a running command early."""
        return isinstance(self._instrument, Abortable)

    def abort(self, running: Command) -> bool:
        """Ask the instrument to end ``running`` early; False if that is not under way or cannot be ended."""
        with self._lock:
            if self._running is not running or not isinstance(self._instrument, Abortable):
                return False
            self._abort_sent = True
            with _instrument_errors():
                self._instrument.abort()
            return True

    def admit(self, command: Command) -> None:
        """Refuse at once what would be refused anyway: a command without the lease that was never carried out.

        So nobody who lost the lease waits behind another's exposure to hear it. The lease is checked again where the
        command is carried out.
        """
        running = self._running
        if self._spool.knows(command.command_id) or (running and running.command_id == command.command_id):
            return
        try:
            command.who.require("agent", "command the microscope")
            self.desk.check(command.lease_id, command.fencing)
        except StemloopError as error:
            self._account(command, error.code, {}, 0.0)
            raise

    def prompt(self, command: Command) -> bool:
        """Whether nothing on the way of this command waits for hardware or a disk: :meth:`execute` may then be called
        in another thread that has taken the instrument's thread's place."""
        kind = command.instruction.get("kind")
        return (
            isinstance(kind, str)
            and kind in self._prompt
            and (kind == Report.kind or self.limits.parked_max_s is None)
            and self._spool.epoch_at_hand
            and not self.desk.unattended
            and not self._spool.knows(command.command_id)
        )

    def fetch(self, key: str, first: int = 0, count: int | None = None) -> NDArray[Any]:
        """Frames ``first`` to ``first + count`` of the exposure with the command id ``key``, out of the spool."""
        kept = self._spool.find(key)
        frames: NDArray[Any] | None = ((kept or {}).get("exposure") or {}).get("frames")
        if frames is None:
            raise InputError(f"no frames are kept under the key {key!r:.80}: give the id of an exposure made here.")
        if first < 0 or (count is not None and count < 0) or first > len(frames):
            raise InputError(f"{key!r:.80} has {len(frames)} frames; {count} from {first} on were asked.")
        return frames[first : None if count is None else first + count]

    def note(self, event: str, who: str, **entry: Any) -> None:
        """Write an event that is no instruction into the audit log."""
        self._audit.write(event=event, who=who, **entry)

    def _progress(self, done: int, of: int) -> None:
        now = time.monotonic()
        command = self._running
        if command is not None and (done >= of or now - self._told_s >= _PROGRESS_S):
            self._told_s = now
            self.on_progress(command, done, of)

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
        done = "done" if "blank" in self.info.instructions else "this instrument has no blanker"
        self.note("blank", "server", reason=reason, verdict=done)

    def execute(self, command: Command) -> dict[str, Any]:
        """Carry out one command: the reply's fields, or one of the errors of ``core.errors``. Audited either way."""
        started = time.perf_counter()
        verdict, exposed = "failed", False
        reply: dict[str, Any] = {}
        try:
            reply, exposed = self._execute(command)
            verdict = "done"
            return reply
        except StemloopError as error:
            verdict = error.code
            raise
        finally:
            keeping, self._keeping = self._keeping, None
            try:
                self._account(command, verdict, reply, time.perf_counter() - started, durable=exposed)
            finally:
                if keeping is not None:
                    self._kept(command, keeping)

    def _account(
        self, command: Command, verdict: str, reply: dict[str, Any], latency_s: float, durable: bool = False
    ) -> None:
        """The command's line in the audit log."""
        self._audit.write(
            durable=durable,
            event="execute",
            who=command.who.name,
            token=command.who.token_id,
            fencing=command.fencing,
            id=command.command_id[:_MAX_ID_LENGTH],
            instruction=_audited(command.instruction),
            limits=self.limits.content_hash,
            verdict=verdict,
            result=reply.get("sha256"),
            epoch=reply.get("epoch"),
            latency_s=latency_s,
        )

    def _execute(self, command: Command) -> tuple[dict[str, Any], bool]:
        """The reply, and whether the beam met the sample for it now."""
        command.who.require("agent", "command the microscope")
        if not 0 < len(command.command_id) <= _MAX_ID_LENGTH:
            raise InputError(f"a command id has 1 to {_MAX_ID_LENGTH} characters; got {len(command.command_id)}.")
        if command.data not in ("inline", "stream", "reference"):
            raise InputError(f"data must be 'inline', 'stream' or 'reference'; got {command.data!r:.40}.")
        if command.data == "stream" and self._sink is None:
            raise InputError("this server was given no stream for frames; ask with data='inline'.")
        asked = wire.instruction_from_message(command.instruction)
        command.who.require_kind(asked.kind)
        first = self._spool.find(command.command_id)
        if first is not None:
            return self._repeat(command, asked, first), False
        self.desk.check(command.lease_id, command.fencing)
        self._audit.raise_if_failed()  # what cannot be written down is not done
        if self.desk.unattended:
            self.blank("the lease changed hands")
        exposure = self._expose(command, asked) if asked.exposes else self._act(command, asked)
        if asked.exposes and not self.desk.holds(command.lease_id):
            raise Aborted(
                f"the lease of {command.who.name} ended while {command.command_id!r:.80} ran, which could not be ended "
                "early: it was exposed to its end, counts, and is kept under its id."
            )
        return self._reply(command, exposure), asked.exposes

    def _carry_out(self, command: Command, asked: Instruction) -> Exposure:
        """Give the instrument a command, in the name of a lease that is valid at this moment."""
        epoch = self._spool.epoch()
        with self._lock:
            self.desk.check(command.lease_id, command.fencing)
            self._running, self._abort_sent = command, False
        self.epoch = epoch
        began = time.time()
        try:
            exposure = self._instrument.execute(asked, key=command.command_id)
        finally:
            with self._lock:
                self._running = None
            if self._abort_sent:
                self._take_abort_back()
        ended = time.time()
        self.last_state = (ended, exposure.state)
        return Exposure(
            exposure.frames,
            exposure.electrons,
            exposure.state,
            exposure.calibration,
            exposure.epoch or epoch,
            exposure.began_s or began,
            exposure.ended_s or ended,
        )

    def _take_abort_back(self) -> None:
        """An abort that came when the command had just ended must not end the next one: blanking uses it up."""
        asked = Blank() if "blank" in self.info.instructions else Report()
        try:
            self._instrument.execute(asked, key="after an abort")
        except Aborted:
            pass
        except Exception:
            _log.exception("the instrument failed after an abort")
            self.desk.unattended = True

    def _repeat(self, command: Command, asked: Instruction, first: dict[str, Any]) -> dict[str, Any]:
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
        if isinstance(asked, Report):
            self.limits.check(asked, 0.0, self.info, {})
            with _instrument_errors():
                return self._carry_out(command, asked)
        state = self.state()
        self.limits.check(asked, 0.0, self.info, state)
        self.watch.admit(asked, state, time.monotonic())
        if (spot := self.limits.opened(asked, state)) is not None:
            return self._open(command, asked, spot, state)
        with _instrument_errors():
            exposure = self._carry_out(command, asked)
        message = wire.instruction_to_message(asked)
        self._spool.result(command.command_id, message, 0, exposure=exposure, durable=False)
        return exposure

    def _open(self, command: Command, asked: Instruction, spot: Probe, state: dict[str, Any]) -> Exposure:
        """Let the open beam rest at ``spot``; it is charged for as long as it may, whatever becomes of us."""
        name, message = command.command_id, wire.instruction_to_message(asked)
        electrons = units.electrons(current_A(state, self.limits), self.limits.parked_max_s or 0.0)
        reserved = self.ledger.reserve(name, electrons, self.ledger.footprint(spot, self.info, state))
        self._intend(command, message, reserved)
        try:
            with _instrument_errors():
                exposure = self._carry_out(command, asked)
        except LeaseError:  # somebody took over at the last moment: the instrument was not asked
            self.ledger.settle(name, 0.0)
            self._spool.cancel(name)
            raise
        except StemloopError as error:
            refused = isinstance(error, (Refused, InputError))
            self._keep(name, message, self.ledger.settle(name, 0.0 if refused else None), error=error)
            raise
        self._keep(name, message, self.ledger.settle(name), exposure=exposure)
        return exposure

    def _intend(self, command: Command, message: dict[str, Any], reserved: int) -> None:
        """Make it durable that an exposure is about to begin, or give back the dose that was reserved for it."""
        try:
            self._spool.intent(command.command_id, message, command.fencing or 0, reserved, command.who.name)
        except StemloopError:
            self.ledger.settle(command.command_id, 0.0)
            raise

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
        self._spool.raise_if_no_room(frame_bytes(asked, self.info))
        name, message = command.command_id, wire.instruction_to_message(asked)
        where = self.ledger.footprint(asked, self.info, state)
        reserved = self.ledger.reserve(name, electrons * asked.exposed_positions, where)
        self._intend(command, message, reserved)
        try:
            with _instrument_errors(), self._beam(name):
                exposure = self._carry_out(command, asked)
                self._check(asked, exposure)
        except LeaseError:  # somebody took over at the last moment: the instrument was not asked
            self.ledger.settle(name, 0.0)
            self._spool.cancel(name)
            raise
        except StemloopError as error:
            done = self._exposed(asked, error)
            if done is None:
                settled = self.ledger.settle(name)
            else:
                part = self.ledger.footprint(asked, self.info, state, done) if done else where
                settled = self.ledger.settle(name, electrons * done, part)
            self._keep(name, message, settled, error=error, exposed=done)
            raise
        given = exposure.electrons if knows_current(state) else max(exposure.electrons, electrons)
        settled = self.ledger.settle(name, given * asked.exposed_positions)
        stream = None
        if command.data == "stream" and exposure.frames is not None:
            stream = self._spool.number(asked.kind, len(exposure.frames))
        beside = stream is None  # the numbers of a stream are durable before its frames leave
        self._keep(name, message, settled, exposure=exposure, stream=stream, durable=not beside)
        if beside:  # while the audit line is written and made durable, too
            self._keeping = _Keeping(self._spool.sync(), message, settled)
        return exposure

    @staticmethod
    def _exposed(asked: Instruction, error: StemloopError) -> int | None:
        """How many positions were exposed before the error, by the instrument's word; None if it gave none."""
        if isinstance(error, (Refused, InputError)):
            return 0
        done = error.exposed if isinstance(error, Aborted) else None
        return None if done is None else min(max(done, 0), asked.exposed_positions)

    def planner(self) -> Callable[[Iterable[Instruction]], PlanReport]:
        """What tells the cost of instructions, and which would be refused, from now on and one after another.

        It touches nothing and may be called from any thread: a long plan must not hold up the instrument.
        """
        ledger, state = self.ledger.copy(), self.state()
        return lambda plan: check_plan(plan, self.limits, ledger, self.info, state)

    def unpark(self) -> None:
        """Blank the beam if it has rested on one spot for longer than the limits allow. Ask often."""
        if self.limits.parked_max_s is not None and (reason := self.watch.parked(self.state(), time.monotonic())):
            self.blank(reason)

    @contextmanager
    def _beam(self, name: str) -> Iterator[None]:
        """A blanked beam is opened for an exposure; after it the beam is blanked, however it ends and whoever opened
        it: what is not counted as exposed must not be open."""
        if "blank" not in self.info.instructions:
            yield
            return
        try:
            if self._instrument.state().get("blanked"):
                self._instrument.execute(Blank(False), key=f"{name}: unblank")
            yield
        finally:
            try:
                blanked = self._instrument.execute(Blank(True), key=f"{name}: blank")
                self.last_state = (time.time(), blanked.state)
            except Exception:  # the exposure counts; the server's watch blanks as soon as it can
                _log.exception("the beam could not be blanked after %s", name)
                self.desk.unattended = True

    def _keep(self, name: str, message: dict[str, Any], settled: int, **outcome: Any) -> None:
        try:
            self._spool.result(name, message, settled, **outcome)
        except StemloopError as error:
            raise self._lost(name, message, settled, error) from error

    def _kept(self, command: Command, keeping: _Keeping) -> None:
        """Wait until the exposure's result is durable; if the disk refuses, nobody knows what it has."""
        try:
            keeping.done.result()
        except StorageError as error:
            unknown = self._lost(command.command_id, keeping.message, keeping.settled, error)
            self._account(command, unknown.code, {}, 0.0)
            raise unknown from error

    def _lost(self, name: str, message: dict[str, Any], settled: int, error: StemloopError) -> OutcomeUnknown:
        """What the exposure's id answers from now on."""
        unknown = OutcomeUnknown(
            f"the exposure {name!r} was made and could not be kept: {error} It counts as exposed and is not repeated."
        )
        self._spool.lost(name, message, settled, unknown)
        return unknown

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

    def _reply(self, command: Command, exposure: Exposure) -> dict[str, Any]:
        reply = wire.exposure_to_message(exposure)
        frames = exposure.frames
        if frames is None:
            return reply
        reply["sha256"] = digest = content_hash(frames)
        if command.data == "reference":
            reference = {
                "key": command.command_id,
                "sha256": digest,
                "shape": list(frames.shape),
                "dtype": frames.dtype.str,
            }
            return {**reply, "frames": None, "reference": reference}
        if command.data == "stream" and self._sink is not None:
            numbers = self._spool.streamed(command.command_id, command.instruction["kind"], len(frames))
            meta = {
                "command_id": command.command_id,
                "instruction": command.instruction,
                "electrons": exposure.electrons,
                "state": exposure.state,
                "calibration": exposure.calibration,
                "sha256": digest,
                "epoch": exposure.epoch,
                "limits": self.limits.content_hash,
            }
            self._send(Batch(numbers["stream"], numbers["first"], frames, wire.plain(meta)))
            return {**reply, "frames": None, "calibration": {**exposure.calibration, **numbers}}
        return reply

    def _send(self, batch: Batch) -> None:
        assert self._sink is not None
        try:
            self._sink.send(batch)
        except Exception as error:
            raise InstrumentError(
                f"the frames {batch.first} to {batch.first + len(batch.frames) - 1} of {batch.stream!r} were taken and "
                f"are kept, but the stream failed ({error}): repeat the same command id to send them again."
            ) from error


def _blanked(state: dict[str, Any]) -> dict[str, Any]:
    """A kept state, with the beam blanked: nobody drives when a server starts."""
    return {**state, "blanked": type(state["blanked"])(True)} if "blanked" in state else state


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
