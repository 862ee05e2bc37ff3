"""What a server does, whichever way the words come in: the lease's watch, abort, blanking, events."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from stemloop.core.errors import InputError, InstrumentError, LeaseError, NotAuthorised, StemloopError
from stemloop.instrument import wire
from stemloop.instrument.guard import Command, Guard
from stemloop.instrument.hand import Hand
from stemloop.instrument.lease import Lease, LeaseDesk
from stemloop.instrument.plan import PlanReport
from stemloop.instrument.tokens import Identity, Tokens

_log = logging.getLogger(__name__)

#: A server waits at least so long [s] for its first client before it calls itself idle.
FIRST_CLIENT_S = 30.0

#: Instructions that are checked at a time.
PLAN_MAX = 1000

_TICK_S = (0.02, 0.5)
#: An acquire waits at most so long [s] for the beam to be blanked; a busy instrument blanks when it can.
_BLANK_WAIT_S = 0.02
_ABORT_AGAIN_S = 0.02
_ABORT_TRIES = 50


T = TypeVar("T")


class Listener(Protocol):
    """A connection that events are told to."""

    lease_id: str | None

    def tell(self, event: dict[str, Any]) -> None:
        """Send an event, or drop it if the connection does not keep up."""


class Failures:
    """Wrong tokens by address: the first few a minute are answered at once, then each waits.

    Every failure is noted until the answers wait, then every hundredth, so that nobody fills the audit log's disk.
    """

    free = 10
    wait_s = 1.0
    window_s = 60.0
    addresses_max = 1024

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}

    def add(self, where: str) -> tuple[float, int]:
        """Count a failure: how long [s] its answer waits, and how many failures to note now (0: do not)."""
        now = self._clock()
        since, count = self._seen.pop(where, (now, 0))
        if now - since > self.window_s:
            since, count = now, 0
        if len(self._seen) >= self.addresses_max:
            self._seen.pop(next(iter(self._seen)))
        self._seen[where] = since, count + 1
        if count < self.free:
            return 0.0, 1
        return self.wait_s, 100 if (count - self.free) % 100 == 99 else 0


class Station:
    """Joins guard, tokens and lease on the event loop.

    Parameters
    ----------
    guard, tokens, hand : Guard, Tokens, Hand
        The door to the instrument, who may come, and the thread that touches the instrument.
    grace_s : float
        How long [s] a lease outlives the connection of its holder.
    """

    def __init__(self, guard: Guard, tokens: Tokens, hand: Hand, grace_s: float) -> None:
        self.guard = guard
        self.tokens = tokens
        self.hand = hand
        self.desk: LeaseDesk = guard.desk
        self.listeners: set[Listener] = set()
        self.connections = 0
        self.waiting = 0  # commands that came and were not answered
        self.visited = False
        self.last_seen = self.started = time.monotonic()
        self._grace_s = grace_s
        self._failures = Failures()
        self._blanking: asyncio.Task[None] | None = None
        self._chores: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unparking: Future[None] | None = None
        self._tokens_error = ""
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="aside")

    async def aside(self, function: Callable[..., T], *args: Any) -> T:
        """Do what may take long and is not urgent, one at a time, away from what a takeover or an abort waits for."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, function, *args)

    def open(self) -> None:
        """Listen to the desk and the guard from the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self.desk.ended = lambda lease, by: self._soon(self._lease_ended, lease, by)
        self.guard.on_progress = lambda command, done, of: self._soon(self._progress, command, done, of)

    def _soon(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: the server stops and blanks by itself
            self._loop.call_soon_threadsafe(function, *args)

    # ------------------------------------------------------------------------------------------------- identity

    async def greet(self, token: str, where: str) -> Identity:
        """Whose token this is. A wrong one is audited; after many of them from one address the answer comes late.

        A right token is never kept waiting, so that nobody is locked out by somebody else's mistakes.
        """
        self.last_seen = time.monotonic()
        self.visited = True
        try:
            return self.tokens.identify(token)
        except NotAuthorised:
            wait_s, noted = self._failures.add(where)
            if noted:
                self.guard.note("hello", "unknown", verdict="not-authorised", address=where, failures=noted)
            await asyncio.sleep(wait_s)
            raise

    # ------------------------------------------------------------------------------------------------- the lease

    async def acquire(self, who: Identity, ttl_s: float, takeover: bool, expected: int | None = None) -> Lease:
        """Give the lease. It does not wait for the instrument; who held it is told, and its command ended."""
        try:
            lease = await asyncio.to_thread(self.desk.acquire, who, ttl_s, takeover, expected)
        except StemloopError as error:
            self.guard.note("acquire", who.name, verdict=error.code, takeover=takeover)
            raise
        self.guard.note("acquire", who.name, verdict="done", takeover=takeover, fencing=lease.fencing)
        await self._blank_or_go_on()
        return lease

    async def release(self, who: Identity, lease_id: str | None) -> None:
        """End the lease and blank the beam."""
        self.desk.release(who, lease_id)
        self.guard.note("release", who.name)
        await self._blank_or_go_on()

    async def _blank_or_go_on(self) -> None:
        await asyncio.sleep(0)  # the desk's word that a lease ended comes first
        if (blanking := self._blanking) is not None:
            await asyncio.wait({blanking}, timeout=_BLANK_WAIT_S)

    def _lease_ended(self, lease: Lease, by: str) -> None:
        for listener in list(self.listeners):
            if listener.lease_id == lease.lease_id:
                listener.lease_id = None
                listener.tell({"event": "lease-lost", "by": by, "fencing": lease.fencing})
        running = self.guard.running
        if running is not None and running.fencing == lease.fencing:
            self._chore(self.stop_running(running))
        self.blank_if_unattended(f"the lease ended ({by})")

    async def stop_running(self, running: Command) -> None:
        """Abort a command until it has ended; nothing if the instrument cannot."""
        while self.guard.running is running and self.guard.can_abort():
            await asyncio.to_thread(self.guard.abort, running)
            await asyncio.sleep(_ABORT_AGAIN_S)

    def _chore(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    def away(self, lease_id: str) -> None:
        """A connection of the lease is gone; if it was the last, the lease has the grace to come back."""
        if not any(listener.lease_id == lease_id for listener in self.listeners):
            self.desk.away(lease_id, self._grace_s)

    # -------------------------------------------------------------------------------------------------- the beam

    def blank_if_unattended(self, reason: str) -> None:
        """Have the beam blanked if a lease ended; a failure is logged and tried again at the next tick."""
        if self.desk.unattended and (self._blanking is None or self._blanking.done()):
            self._blanking = asyncio.get_running_loop().create_task(self._blank(reason))

    async def _blank(self, reason: str) -> None:
        with suppress(StemloopError):
            if await self.hand.call(self.blank, reason):
                self.tell_all({"event": "blanked", "reason": reason})

    def blank(self, reason: str) -> bool:
        """Blank the beam if a lease ended and it has not been blanked since. For the instrument's thread."""
        if self.desk.unattended:
            self.guard.blank(reason)
            return True
        return False

    async def plan(self, who: Identity, asked: list[Any]) -> PlanReport:
        """What a list of instructions (their wire form) would cost, and which would be refused. Touches nothing."""
        who.require("agent", "check a plan")
        if len(asked) > PLAN_MAX:
            raise InputError(f"a plan has at most {PLAN_MAX} instructions at a time; {len(asked)} came.")
        plan = [wire.instruction_from_message(one) for one in asked]
        for one in plan:
            who.require_kind(one.kind)
        planner = await self.hand.call(self.guard.planner)
        return await self.aside(planner, plan)

    async def abort(self, who: Identity, lease_id: str | None) -> bool:
        """End the running command for the lease's holder or a higher role; False if nothing runs."""
        lease = self.desk.lease
        own = self.desk.holds(lease_id)
        if not own and (lease is None or who.rank <= lease.holder.rank):
            who.require("operator", "abort the command of others")
            if lease is not None:
                raise LeaseError(f"{lease.holder.name} holds the lease: only the holder or a higher role aborts.")
        for _ in range(_ABORT_TRIES):  # a command that is about to begin counts
            running = self.guard.running
            if running is not None or not self.waiting:
                break
            await asyncio.sleep(_ABORT_AGAIN_S)
        if running is None:
            return False
        if not self.guard.can_abort():
            raise InstrumentError(f"{self.guard.info.name} cannot end a command early: wait until it ends by itself.")
        ended = await asyncio.to_thread(self.guard.abort, running)
        self.guard.note("abort", who.name, id=running.command_id)  # a full disk does not keep anybody from ending it
        return ended

    # ------------------------------------------------------------------------------------------------- the watch

    async def watch(self, idle_exit_s: float | None, stop: Callable[[], None]) -> None:
        """End leases whose time is over, blank, and call ``stop`` after ``idle_exit_s`` [s] without any client."""
        while True:
            try:
                self._look()
            except Exception:
                _log.exception("the lease's watch met an error and goes on")
            if self.connections:
                self.last_seen = time.monotonic()
            if idle_exit_s is not None and time.monotonic() >= self._leave_at(idle_exit_s):
                stop()
            lease = self.desk.lease
            parked_s = self.guard.limits.parked_max_s or math.inf
            pace = min(lease.ttl_s if lease else math.inf, self._grace_s, idle_exit_s or math.inf, parked_s) / 10
            await asyncio.sleep(min(max(pace, _TICK_S[0]), _TICK_S[1]))

    def _leave_at(self, idle_exit_s: float) -> float:
        return self.last_seen + (idle_exit_s if self.visited else max(idle_exit_s, FIRST_CLIENT_S))

    def _look(self) -> None:
        lapsed = self.desk.lapse()
        self.blank_if_unattended("nobody holds the lease")  # before anything that can fail
        self._unpark()
        if lapsed is not None:
            self.guard.note("lapse", lapsed.holder.name, fencing=lapsed.fencing)
        self._look_at_tokens()

    def _unpark(self) -> None:
        waits = self._unparking is not None and not self._unparking.done()
        if self.guard.limits.parked_max_s is not None and self.guard.running is None and not waits:
            self._unparking = self.hand.submit(self.guard.unpark)

    def _look_at_tokens(self) -> None:
        try:
            self.tokens.refresh()
        except (StemloopError, OSError) as error:
            if str(error) != self._tokens_error:
                _log.error("the issued tokens cannot be read, those that were read last hold: %s", error)
            self._tokens_error = str(error)
        else:
            self._tokens_error = ""
        lease = self.desk.lease
        if lease is not None:
            try:
                self.tokens.confirm(lease.holder)
            except NotAuthorised as error:
                self.desk.drop(str(error))
                self.guard.note("revoke", lease.holder.name, fencing=lease.fencing)

    # ---------------------------------------------------------------------------------------------------- events

    def tell_all(self, event: dict[str, Any]) -> None:
        """Tell an event to everybody."""
        for listener in list(self.listeners):
            listener.tell(event)

    def _progress(self, command: Command, done: int, of: int) -> None:
        for listener in list(self.listeners):
            if listener.lease_id is not None and listener.lease_id == command.lease_id:
                listener.tell({"event": "progress", "id": command.command_id, "done": done, "of": of})

    def telemetry(self) -> dict[str, Any]:
        """How things are, at once and without asking the instrument."""
        lease = self.desk.lease
        running = self.guard.running
        as_of, state = self.guard.last_state
        return {
            "state": state,
            "state_as_of_s": as_of,
            "dose": self.guard.ledger.dose(),
            "limits": self.guard.limits.content_hash,
            "lease": lease and {"holder": lease.holder.name, "fencing": lease.fencing, "ttl_s": lease.ttl_s},
            "running": running and running.command_id,
            "unattended": self.desk.unattended,
            "epoch": self.guard.epoch,
            "connections": self.connections,
            "uptime_s": time.monotonic() - self.started,
            "utc": time.time(),
        }
