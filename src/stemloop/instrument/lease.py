"""Who drives: an exclusive lease with a time to live and a fencing number. Pure logic without any network."""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from stemloop.core.errors import InputError, LeaseError
from stemloop.instrument.tokens import Identity

#: Shortest and longest time to live of a lease [s].
TTL_RANGE_S = (0.1, 3600.0)


def _same(secret: str, given: str) -> bool:
    """Whether a secret was given; takes the same time wherever they differ."""
    return hmac.compare_digest(secret.encode(), given.encode("utf-8", "surrogatepass"))


@dataclass
class Lease:
    """The right to drive. ``fencing`` grows with every lease ever given; ``lease_id`` is its secret.

    ``running`` counts its commands under way, ``away`` says that its holder's connection is gone.
    """

    lease_id: str
    holder: Identity
    fencing: int
    ttl_s: float
    deadline: float
    running: int = 0
    away: bool = False


class LeaseDesk:
    """Gives the microscope to one at a time.

    A lease lives ``ttl_s`` seconds from its last use, and as long as a command runs under it whose asker is there.
    Every command carries the lease's fencing number, so that a client that was away cannot act after somebody else took
    over. A higher role may take a live lease over; the old lease ends before anything else is done. ``unattended`` is
    set whenever a lease ends, however it ends, until the beam is blanked. May be called from any thread.

    Parameters
    ----------
    fencing : int
        The last number ever given on this instrument.
    remember : callable
        Makes a new fencing number durable before it is given.
    clock : callable
        A monotonic clock [s].

    Attributes
    ----------
    ended : callable
        Called with each lease that ends and with who or what ended it, from whatever thread that happens in and with
        the desk locked: it must return at once.
    """

    def __init__(
        self,
        fencing: int = 0,
        remember: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.fencing = fencing
        self.unattended = False
        self.ended: Callable[[Lease, str], None] = lambda lease, by: None
        self._remember = remember
        self._clock = clock
        self._lease: Lease | None = None
        self._lock = threading.RLock()

    @property
    def lease(self) -> Lease | None:
        """The lease that is valid now."""
        with self._lock:
            self.lapse()
            return self._lease

    def lapse(self) -> Lease | None:
        """End the lease if its time is over; return it if it ended now."""
        with self._lock:
            lease = self._lease
            if lease is None or (lease.running and not lease.away) or self._clock() < lease.deadline:
                return None
            self._end("the clock")
            return lease

    def _end(self, by: str) -> None:
        lease, self._lease = self._lease, None
        self.unattended = True
        if lease is not None:
            self.ended(lease, by)

    def holds(self, lease_id: str | None) -> bool:
        """Whether ``lease_id`` is that of the valid lease; does not renew it."""
        lease = self.lease
        return lease is not None and lease_id is not None and _same(lease.lease_id, lease_id)

    def acquire(self, who: Identity, ttl_s: float = 10.0, takeover: bool = False, expected: int | None = None) -> Lease:
        """Give the lease to ``who``.

        ``takeover`` takes a live lease from a lower role. With ``expected`` the lease is given only if that is still
        the last fencing number: a client that comes back learns in this way that nobody drove in the meantime.
        """
        who.require("agent", "take the lease")
        if not TTL_RANGE_S[0] <= ttl_s <= TTL_RANGE_S[1]:
            raise InputError(f"a lease lives {TTL_RANGE_S[0]} to {TTL_RANGE_S[1]} s; {ttl_s} was asked.")
        with self._lock:
            current = self.lease
            if expected is not None and expected != self.fencing:
                raise LeaseError(
                    f"the lease was given to others since number {expected} (now {self.fencing}): "
                    "look at the state, then acquire it anew."
                )
            if current is not None:
                self._oust(current, who, takeover)
            self._remember(self.fencing + 1)
            self.fencing += 1
            self._lease = Lease(secrets.token_hex(16), who, self.fencing, ttl_s, self._clock() + ttl_s)
            return self._lease

    def _oust(self, current: Lease, who: Identity, takeover: bool) -> None:
        left = max(0.0, current.deadline - self._clock())
        held = f"{current.holder.name} holds the lease (number {current.fencing}) for {left:.1f} s more"
        if who.rank <= current.holder.rank:
            raise LeaseError(f"{held}: wait until it is released, or let a higher role take it over.")
        if not takeover:
            raise LeaseError(f"{held}: ask with takeover=True to take it over.")
        self._end(who.name)

    def adopt(self, lease_id: str, who: Identity) -> bool:
        """A client has come back with its lease: renew it. False if that lease is over."""
        with self._lock:
            lease = self.lease
            if lease is None or lease.holder != who or not _same(lease.lease_id, lease_id):
                return False
            lease.deadline = self._clock() + lease.ttl_s
            lease.away = False
            return True

    def check(self, lease_id: str | None, fencing: int | None) -> Lease:
        """The lease, renewed, if ``lease_id`` and ``fencing`` are those of the valid lease; else ``LeaseError``."""
        with self._lock:
            lease = self.lease
            if lease is None:
                hint = "it expired or was released" if fencing else "nobody has it"
                raise LeaseError(f"the command came without a valid lease ({hint}): acquire the lease first.")
            if lease_id is None or not _same(lease.lease_id, lease_id):
                number = "no fencing number" if fencing is None else f"fencing number {fencing}"
                raise LeaseError(
                    f"the command carries {number}, but {lease.holder.name} holds the lease with number "
                    f"{lease.fencing}: acquire the lease when it is free."
                )
            if fencing != lease.fencing:
                raise LeaseError(
                    f"the command carries the fencing number {fencing}; the lease has {lease.fencing}. "
                    "Send the number that came with the lease."
                )
            lease.deadline = self._clock() + lease.ttl_s
            return lease

    def begin(self, lease_id: str | None) -> Lease | None:
        """A command has come under the lease, which does not expire until :meth:`finish`."""
        with self._lock:
            lease = self.lease
            if lease is None or lease.lease_id != lease_id:
                return None
            lease.running += 1
            return lease

    def finish(self, lease: Lease | None) -> None:
        """The command has been answered; the lease's time starts again."""
        if lease is not None:
            with self._lock:
                lease.running -= 1
                if not lease.away:
                    lease.deadline = self._clock() + lease.ttl_s

    def away(self, lease_id: str, grace_s: float) -> None:
        """The holder's connection is gone: it has ``grace_s`` to come back, also while its command runs."""
        with self._lock:
            if self._lease is not None and self._lease.lease_id == lease_id:
                self._lease.away = True
                self._lease.deadline = min(self._lease.deadline, self._clock() + grace_s)

    def release(self, who: Identity, lease_id: str | None = None) -> None:
        """End the lease: its holder by ``lease_id``, a higher role without."""
        with self._lock:
            lease = self.lease
            if lease is None:
                return
            own = lease_id is not None and _same(lease.lease_id, lease_id)
            if not own and who.rank <= lease.holder.rank:
                raise LeaseError(f"{lease.holder.name} holds the lease: only the holder or a higher role ends it.")
            self._end(who.name)

    def drop(self, by: str) -> None:
        """End the lease whoever holds it: the server stops, or the holder's token was revoked."""
        with self._lock:
            if self._lease is not None:
                self._end(by)
