"""Who may drive the microscope, within which limits, and for how many electrons: pure logic without any network.

:class:`Tokens` says who speaks, :class:`LeaseDesk` who drives, :class:`Limits` what may be asked and
:class:`DoseLedger` what it may cost. A refusal is one of the :class:`~stemloop.core.errors.Refused` errors; its
message says what was asked, what the limit is, and what to do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stemloop.core.errors import DoseError, InputError, LeaseError, LimitError, NotAuthorised
from stemloop.core.instruction import Blank, Diffraction, Image, Instruction, Optics, Probe, Spectrum, Stage
from stemloop.core.protocols import InstrumentInfo
from stemloop.core.record import content_hash

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


# --------------------------------------------------------------------------------------------- what may be asked

Range = tuple[float, float]


def _within(name: str, value: float, low: float, high: float, unit: str) -> None:
    if not low <= value <= high:
        raise LimitError(
            f"{name} {value:g} {unit} is outside the limit {low:g} to {high:g} {unit}: ask for a value inside it."
        )


def _range(name: str, value: Any) -> Range:
    low, high = (_number(name, v) for v in _pair(name, value))
    if low > high:
        raise InputError(f"limit {name}: the lower end {low:g} is above the upper end {high:g}.")
    return low, high


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InputError(f"limit {name} must be two numbers; got {value!r}.")
    return value[0], value[1]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"limit {name} must be a finite number; got {value!r}.")
    return float(value)


_STAGE: dict[str, Range] = {
    "x_m": (-1e-3, 1e-3),
    "y_m": (-1e-3, 1e-3),
    "z_m": (-3e-4, 3e-4),
    "alpha_rad": (-0.35, 0.35),
    "beta_rad": (-0.35, 0.35),
}


@dataclass(frozen=True)
class Limits:
    """What may be asked of the microscope.

    field_m : (height, width) [m] of the field in which positions may lie.
    dwell_max_s, current_max_A : longest dwell [s], largest beam current [A].
    semiangle_rad, C10_m : lowest and highest value [rad], [m].
    stage : lowest and highest value of each axis; an axis that is not named may not move.
    electrons_per_point : most electrons at one position of the beam. electrons_per_image : most in one image.
    frame_bytes_max : most bytes of frames that one command may bring, counted with 8 bytes a value.
    unblank : whether the beam may be left on the sample outside an exposure, where its dose is not counted.
    version : the user's own number of this set of limits.
    """

    field_m: tuple[float, float]
    dwell_max_s: float = 1.0
    current_max_A: float = 1e-9
    semiangle_rad: Range = (1e-3, 60e-3)
    C10_m: Range = (-2e-6, 2e-6)
    stage: Mapping[str, Range] = field(default_factory=lambda: dict(_STAGE))
    electrons_per_point: float = 1e9
    electrons_per_image: float = 1e12
    frame_bytes_max: float = 2.0**29
    unblank: bool = False
    version: int = 1

    @classmethod
    def from_info(cls, info: InstrumentInfo) -> Limits:
        """The limits that hold where nobody declared any: the instrument's field and cautious ranges."""
        return cls(field_m=(float(info.field_m[0]), float(info.field_m[1])))

    @classmethod
    def from_dict(cls, declared: Mapping[str, Any]) -> Limits:
        """Limits from a dictionary (of a YAML or JSON file). A wrong name or value is an ``InputError``."""
        known = {entry.name for entry in dataclasses.fields(cls)}
        if unknown := set(declared) - known:
            raise InputError(f"unknown limit {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}.")
        if "field_m" not in declared:
            raise InputError("the limits lack field_m: (height, width) [m] of the field that may be used.")
        read: dict[str, Callable[[str, Any], Any]] = {
            "field_m": lambda name, pair: tuple(_number(name, v) for v in _pair(name, pair)),
            "semiangle_rad": _range,
            "C10_m": _range,
            "stage": cls._stage,
            "unblank": lambda _, value: bool(value),
            "version": lambda name, value: int(_number(name, value)),
        }
        return cls(**{name: read.get(name, _number)(name, value) for name, value in declared.items()})

    @staticmethod
    def _stage(_: str, axes: Any) -> dict[str, Range]:
        if not isinstance(axes, Mapping) or (set(axes) - set(_STAGE)):
            raise InputError(f"limit stage must name axes out of {', '.join(_STAGE)}; got {axes!r}.")
        return {axis: _range(f"stage {axis}", value) for axis, value in axes.items()}

    @classmethod
    def from_json(cls, text: str) -> Limits:
        """Limits from the text of a JSON file."""
        try:
            declared = json.loads(text)
        except ValueError as error:
            raise InputError(f"the limits are not JSON: {error}.") from None
        if not isinstance(declared, dict):
            raise InputError("the limits must be a JSON object.")
        return cls.from_dict(declared)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary, which :meth:`from_dict` takes back."""

        def listed(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [float(number) for number in value]
            return value if isinstance(value, bool) else float(value)

        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        stage = {axis: listed(ends) for axis, ends in values.pop("stage").items()}
        version = values.pop("version")
        return {**{name: listed(value) for name, value in values.items()}, "stage": stage, "version": version}

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of these limits, kept with every audited command."""
        return content_hash(self.to_dict())

    def check(self, asked: Instruction, electrons: float, info: InstrumentInfo) -> None:
        """Raise ``LimitError`` unless ``asked`` is within the limits; ``electrons`` are those at each position."""
        if asked.kind not in info.instructions:
            raise LimitError(
                f"{info.name} cannot do {asked.kind!r}; it can do {', '.join(info.instructions)}. Ask for one of these."
            )
        match asked:
            case Image():
                self._check_image(asked, electrons)
            case Diffraction() | Spectrum():
                self._check_points(asked, electrons, info)
            case Probe():
                self._check_position(asked.position_m)
            case Optics():
                self._check_optics(asked)
            case Stage():
                self._check_stage(asked)
            case Blank(blanked=False) if not self.unblank:
                raise LimitError(
                    "the limits do not let the beam rest on the sample (unblank is false): its dose would not be "
                    "counted. An exposure unblanks the beam for its own time."
                )

    def _check_position(self, position: tuple[float, float]) -> None:
        for axis, value, size in zip("yx", position, self.field_m, strict=True):
            slack = 1e-9 * size  # rounding of origin + extent
            if not -slack <= value <= size + slack:
                raise LimitError(
                    f"position {axis} = {value:g} m is outside the field 0 to {size:g} m: ask for a position inside it."
                )

    def _check_exposure(self, dwell_s: float, electrons: float, bytes_: int) -> None:
        if dwell_s > self.dwell_max_s:
            raise LimitError(
                f"dwell {dwell_s:g} s is over the limit of {self.dwell_max_s:g} s: ask for a shorter dwell."
            )
        if electrons > self.electrons_per_point:
            raise LimitError(
                f"{electrons:.3g} electrons at one position are over the limit of {self.electrons_per_point:.3g}: "
                "shorten the dwell or lower the current."
            )
        if bytes_ > self.frame_bytes_max:
            raise LimitError(
                f"the frames may take {bytes_} bytes, over the limit of {self.frame_bytes_max:g}: "
                "ask for fewer positions at a time."
            )

    def _check_image(self, asked: Image, electrons: float) -> None:
        self._check_position(asked.origin_m)
        self._check_position((asked.origin_m[0] + asked.extent_m[0], asked.origin_m[1] + asked.extent_m[1]))
        self._check_exposure(asked.dwell_s, electrons, 8 * asked.exposed_positions)
        if (total := electrons * asked.exposed_positions) > self.electrons_per_image:
            raise LimitError(
                f"the image would take {total:.3g} electrons, over the limit of {self.electrons_per_image:.3g}: "
                "take fewer pixels or a shorter dwell."
            )

    def _check_points(self, asked: Diffraction | Spectrum, electrons: float, info: InstrumentInfo) -> None:
        for position in asked.positions_m:
            self._check_position(position)
        if isinstance(asked, Spectrum):
            values = info.energy_loss[2] if info.energy_loss else 1
        else:
            values = info.camera.shape[0] * info.camera.shape[1] if info.camera else 1
        self._check_exposure(asked.dwell_s, electrons, 8 * values * asked.exposed_positions)

    def _check_optics(self, asked: Optics) -> None:
        if asked.current_A is not None and asked.current_A > self.current_max_A:
            raise LimitError(
                f"current {asked.current_A:g} A is over the limit of {self.current_max_A:g} A: ask for a smaller one."
            )
        if asked.semiangle_rad is not None:
            _within("semiangle", asked.semiangle_rad, *self.semiangle_rad, "rad")
        if asked.C10_m is not None:
            _within("C10", asked.C10_m, *self.C10_m, "m")

    def _check_stage(self, asked: Stage) -> None:
        for entry in dataclasses.fields(asked):
            value = getattr(asked, entry.name)
            if value is None:
                continue
            if entry.name not in self.stage:
                raise LimitError(f"the limits name no range for the stage axis {entry.name}: it may not move.")
            _within(f"stage {entry.name}", value, *self.stage[entry.name], entry.name.rsplit("_", 1)[1])


# -------------------------------------------------------------------------------------------- what it may cost


class DoseLedger:
    """Counts electrons: reserved before an exposure, settled after it. Whole electrons, so that sums are exact.

    Each amount is rounded up to a whole electron. ``spent + reserved <= budget`` holds after every reservation; an
    instrument that gives more than was reserved is charged what it gave. ``spent`` and ``reserved`` are their sums.

    >>> ledger = DoseLedger(budget=1000)
    >>> ledger.reserve("a", 600.0)
    600
    >>> ledger.settle("a", 550.2)
    551
    >>> ledger.dose()["left"]
    449.0
    """

    def __init__(self, budget: float | None = None, spent: int = 0) -> None:
        if budget is not None and not (math.isfinite(budget) and budget >= 0):
            raise InputError(f"the dose budget must be a number of electrons, zero or more; got {budget!r}.")
        self.budget = None if budget is None else math.floor(budget)
        self.spent = spent
        self.reserved = 0
        self._reserved: dict[str, int] = {}

    def reserve(self, command_id: str, electrons: float) -> int:
        """Promise ``electrons`` to ``command_id``, or raise ``DoseError``; returns the whole electrons reserved."""
        amount = self._whole(electrons)
        if command_id in self._reserved:
            raise InputError(f"electrons are reserved for {command_id!r} already.")
        if self.budget is not None and self.spent + self.reserved + amount > self.budget:
            left = max(0, self.budget - self.spent - self.reserved)
            raise DoseError(
                f"the exposure needs {amount:.4g} electrons; {left:.4g} of the budget of {self.budget:.4g} are left. "
                "Ask for fewer positions or a shorter dwell, or start the server with a larger budget."
            )
        self._reserved[command_id] = amount
        self.reserved += amount
        return amount

    def settle(self, command_id: str, electrons: float | None = None) -> int:
        """Charge what was given, or all that was reserved if nobody knows; returns the whole electrons charged."""
        reserved = self._reserved[command_id]
        amount = reserved if electrons is None else self._whole(electrons)
        del self._reserved[command_id]
        self.reserved -= reserved
        self.spent += amount
        return amount

    def dose(self) -> dict[str, float]:
        """``budget``, ``spent``, ``reserved`` and ``left`` in electrons (``inf`` without a budget)."""
        budget = math.inf if self.budget is None else float(self.budget)
        left = max(0.0, budget - self.spent - self.reserved)
        return {"budget": budget, "spent": float(self.spent), "reserved": float(self.reserved), "left": left}

    @staticmethod
    def _whole(electrons: float) -> int:
        if not (math.isfinite(electrons) and electrons >= 0):
            raise InputError(f"a dose is a number of electrons, zero or more; got {electrons!r}.")
        return math.ceil(electrons)
