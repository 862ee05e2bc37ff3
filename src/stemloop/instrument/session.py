"""Who may drive the microscope: pure logic without any network.

:class:`Tokens` says who speaks, :class:`LeaseDesk` who drives. A refusal is one of the
:class:`~stemloop.core.errors.Refused` errors; its message says what was asked, what the limit is, and what to do.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from stemloop.core.errors import InputError, LeaseError, NotAuthorised

# ------------------------------------------------------------------------------------------------------ who speaks

#: From the weakest to the strongest: a viewer looks, an agent (a program) drives, an operator (a person) takes over.
ROLES = ("viewer", "agent", "operator")
MIN_TOKEN_LENGTH = 16


@dataclass(frozen=True)
class Identity:
    """Who holds a token: ``name`` is ``role`` or ``role:person``."""

    name: str
    role: str

    @property
    def rank(self) -> int:
        """0 for a viewer, 1 for an agent, 2 for an operator."""
        return ROLES.index(self.role)

    def require(self, role: str, what: str) -> None:
        """Raise ``NotAuthorised`` unless this role is at least ``role``."""
        if self.rank < ROLES.index(role):
            raise NotAuthorised(
                f"{self.name} may not {what}: that needs the role {role}. Connect with the token of one."
            )


class Tokens:
    """Tells identities by their tokens; keeps the SHA-256 of each token only.

    ``tokens`` maps ``role`` or ``role:person`` to a secret of at least 16 characters.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self._identities: dict[bytes, Identity] = {}
        for name, token in tokens.items():
            role = name.split(":", 1)[0]
            if role not in ROLES:
                raise InputError(f"token {name!r}: the role must be one of {', '.join(ROLES)}.")
            if not isinstance(token, str) or len(token) < MIN_TOKEN_LENGTH:
                raise InputError(
                    f"the token of {name!r} is shorter than {MIN_TOKEN_LENGTH} characters; make it longer."
                )
            self._identities[self._hash(token)] = Identity(name, role)
        if len(self._identities) != len(tokens):
            raise InputError("two names share one token; give each its own.")

    @staticmethod
    def make() -> dict[str, str]:
        """New random tokens, one for each role."""
        return {role: secrets.token_urlsafe(32) for role in ROLES}

    @staticmethod
    def _hash(token: str) -> bytes:
        return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()

    def identify(self, token: str) -> Identity:
        """Whose token this is, or ``NotAuthorised``. Takes the same time for any wrong token."""
        given = self._hash(token)
        found = [identity for kept, identity in self._identities.items() if hmac.compare_digest(kept, given)]
        if not found:
            raise NotAuthorised("the token is not known here; read it from tokens.json in the server's directory.")
        return found[0]


# ----------------------------------------------------------------------------------------------------- who drives

#: Shortest and longest time to live of a lease [s].
TTL_RANGE_S = (0.1, 3600.0)


@dataclass
class Lease:
    """The right to drive. ``fencing`` grows with every lease ever given; ``lease_id`` is its secret."""

    lease_id: str
    holder: Identity
    fencing: int
    ttl_s: float
    deadline: float
    running: int = 0


class LeaseDesk:
    """Gives the microscope to one at a time.

    A lease lives ``ttl_s`` seconds from its last use and as long as a command runs under it. Every command carries the
    lease's fencing number, so that a client that was away cannot act after somebody else took over. A higher role may
    take a live lease over. ``unattended`` is set whenever a lease ends, however it ends, until the beam is blanked.

    Parameters
    ----------
    fencing : int
        The last number ever given on this instrument.
    remember : callable
        Makes a new fencing number durable before it is given.
    clock : callable
        A monotonic clock [s].
    """

    def __init__(
        self,
        fencing: int = 0,
        remember: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.fencing = fencing
        self.unattended = False
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
            if lease is None or lease.running or self._clock() < lease.deadline:
                return None
            self._end()
            return lease

    def _end(self) -> None:
        self._lease = None
        self.unattended = True

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
        self._end()

    def adopt(self, lease_id: str, who: Identity) -> bool:
        """A client has come back with its lease: renew it. False if that lease is over."""
        with self._lock:
            lease = self.lease
            if lease is None or lease.holder != who or not hmac.compare_digest(lease.lease_id, lease_id):
                return False
            lease.deadline = self._clock() + lease.ttl_s
            return True

    def check(self, lease_id: str | None, fencing: int | None) -> Lease:
        """The lease, renewed, if ``lease_id`` and ``fencing`` are those of the valid lease; else ``LeaseError``."""
        with self._lock:
            lease = self.lease
            if lease is None:
                hint = "it expired or was released" if fencing else "nobody has it"
                raise LeaseError(f"the command came without a valid lease ({hint}): acquire the lease first.")
            if lease_id is None or not hmac.compare_digest(lease.lease_id, lease_id):
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

    @contextmanager
    def busy(self, lease_id: str | None) -> Iterator[None]:
        """While a command runs under the lease, the lease does not expire; its time starts again afterwards."""
        with self._lock:
            lease = self.lease
            if lease is None or lease.lease_id != lease_id:
                lease = None
            else:
                lease.running += 1
        try:
            yield
        finally:
            if lease is not None:
                with self._lock:
                    lease.running -= 1
                    lease.deadline = self._clock() + lease.ttl_s

    def away(self, lease_id: str, grace_s: float) -> None:
        """The holder's connection is gone: it has ``grace_s`` to come back."""
        with self._lock:
            if self._lease is not None and self._lease.lease_id == lease_id:
                self._lease.deadline = min(self._lease.deadline, self._clock() + grace_s)

    def release(self, who: Identity, lease_id: str | None = None) -> None:
        """End the lease: its holder by ``lease_id``, a higher role without."""
        with self._lock:
            lease = self.lease
            if lease is None:
                return
            own = lease_id is not None and hmac.compare_digest(lease.lease_id, lease_id)
            if not own and who.rank <= lease.holder.rank:
                raise LeaseError(f"{lease.holder.name} holds the lease: only the holder or a higher role ends it.")
            self._end()

    def drop(self) -> None:
        """End the lease whoever holds it: the server stops."""
        with self._lock:
            if self._lease is not None:
                self._end()
