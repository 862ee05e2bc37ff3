"""The microscope as a capability of INTERSECT (intersect-sdk), for facilities whose services meet at a broker.

The gateway is a *client* of the instrument's server: lease, limits, dose ledger and audit hold for every message. The
messages are typed, so the SDK's own schema (AsyncAPI) describes them. A request carries the command's id: the same id
answers the first result and exposes nothing, which a broker that delivers twice needs.

Two properties of the SDK decide what this is good for. It authenticates with the broker's name and password and knows
no TLS: the broker must be reached on loopback (a tunnel may end there). And a round trip through a broker costs tens of
milliseconds: it is a way in for campaigns, not the inner loop.
"""

# annotations stay objects here: the SDK makes its schema of them when the class is made
import base64
import ipaddress
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core import instruction as instructions
from stemloop.core.errors import InputError, InstrumentError, LeaseError, MissingExtra, NotAuthorised, StemloopError
from stemloop.core.instruction import Blank, Diffraction, Image, Instruction, Optics, Probe, Spectrum, Stage
from stemloop.core.protocols import Exposure
from stemloop.core.record import content_hash
from stemloop.instrument import wire
from stemloop.instrument.client import Address, Client
from stemloop.instrument.client import connect as connect_to_server

try:
    from intersect_sdk import (
        ControlPlaneConfig,
        HierarchyConfig,
        IntersectBaseCapabilityImplementation,
        IntersectCapabilityError,
        IntersectService,
        IntersectServiceConfig,
        intersect_message,
        intersect_status,
    )
    from paho.mqtt import client as mqtt
    from pydantic import BaseModel, Field
    from typing_extensions import TypeAliasType
except ImportError as error:
    raise MissingExtra("the INTERSECT gateway needs its SDK: pip install 'stemloop[intersect]'.") from error

#: The key with which ``service.forbid_keys({CONTROL})`` turns off all that changes something.
CONTROL = "control"

#: A JSON value with a schema of its own: the SDK takes no type that may be anything.
Json = TypeAliasType("Json", "dict[str, Json] | list[Json] | str | bool | int | float | None")

_Metres = Annotated[float, Field(description="[m]")]
_Position = tuple[_Metres, _Metres]
_Seconds = Annotated[float, Field(gt=0, description="[s]")]
_Id = Annotated[str, Field(min_length=1, max_length=200, description="repeat it to ask for the same result again")]


class Request(BaseModel, extra="forbid"):
    """What every command has."""

    id: _Id = Field(default_factory=lambda: uuid.uuid4().hex)


class ImageRequest(Request):
    """Scan a rectangle."""

    origin_m: _Position
    extent_m: _Position
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    dwell_s: _Seconds
    detector: str = "HAADF"


class PointsRequest(Request):
    """Patterns or spectra at positions (y, x) [m]."""

    positions_m: Annotated[list[_Position], Field(min_length=1)]
    dwell_s: _Seconds


class ProbeRequest(Request):
    """Park the probe at (y, x) [m]."""

    position_m: _Position


class OpticsRequest(Request):
    """Change the optics; what is left out stays."""

    semiangle_rad: float | None = None
    C10_m: float | None = None
    current_A: float | None = None


class StageRequest(Request):
    """Move the stage; an axis that is left out stays."""

    x_m: float | None = None
    y_m: float | None = None
    z_m: float | None = None
    alpha_rad: float | None = None
    beta_rad: float | None = None


class BlankRequest(Request):
    """Blank or unblank the beam."""

    blanked: bool = True


class AnyRequest(Request):
    """Any instruction in the wire form that ``stemloop instrument schema`` prints."""

    instruction: dict[str, Json]


class Frames(BaseModel):
    """Frames as base64 of their bytes in C order, and what belongs to them. ``data`` is null where there are none."""

    id: str
    data: str | None = None
    dtype: str = ""
    shape: list[int] = []
    sha256: str = ""
    electrons: float = 0.0
    epoch: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0
    calibration: dict[str, Json] = {}
    state: dict[str, Json] = {}

    def array(self) -> NDArray[Any] | None:
        """The frames (n, ...), or None."""
        if self.data is None:
            return None
        return np.frombuffer(base64.b64decode(self.data), self.dtype).reshape(self.shape)


class About(BaseModel):
    """What the instrument is and can do."""

    name: str
    instructions: list[str]
    field_m: tuple[float, float]
    energy_eV: float


class Status(BaseModel):
    """How the gateway stands."""

    instrument: str
    driving: bool
    dose_spent: float
    dose_left: float | None


def _answer(command_id: str, found: Exposure) -> Frames:
    more = {
        "electrons": found.electrons,
        "calibration": wire.plain(found.calibration),
        "state": wire.plain(found.state),
    }
    if found.frames is None:
        return Frames(id=command_id, **more)
    whole = np.ascontiguousarray(found.frames)
    return Frames(
        id=command_id,
        data=base64.b64encode(whole.tobytes()).decode(),
        dtype=whole.dtype.str,
        shape=list(whole.shape),
        sha256=content_hash(whole),
        **more,
    )


@contextmanager
def _told() -> Iterator[None]:
    """Errors of ours as the SDK passes them on: ``code: message``."""
    try:
        yield
    except StemloopError as error:
        raise IntersectCapabilityError(f"{error.code}: {error}") from None


class Microscope(IntersectBaseCapabilityImplementation):
    """The capability ``microscope``.

    The lease is taken with the first command that changes something and given back after ``idle_s`` without one; then
    the beam is blanked. A lease that a person took over is not taken back before the message ``take_control``.
    """

    intersect_sdk_capability_name = "microscope"

    def __init__(self, client: Client, idle_s: float = 60.0) -> None:
        super().__init__()
        self._client, self._idle_s = client, idle_s
        self._driving, self._lost = False, ""
        self._heard = time.monotonic()
        self._lock = threading.RLock()

    # ------------------------------------------------------------------------------------------------------ looking

    @intersect_status()
    def status(self) -> Status:
        """How the gateway stands."""
        dose = self._client.dose()
        left = dose["left"]
        return Status(
            instrument=self._client.info.name,
            driving=self._driving,
            dose_spent=dose["spent"],
            dose_left=left if left is not None and np.isfinite(left) else None,
        )

    @intersect_message()
    def about(self) -> About:
        """What the instrument is and can do."""
        info = self._client.info
        return About(
            name=info.name,
            instructions=list(info.instructions),
            field_m=(info.field_m[0], info.field_m[1]),
            energy_eV=info.energy_eV,
        )

    @intersect_message()
    def state(self) -> dict[str, Json]:
        """The state vector, SI."""
        with _told():
            return dict(wire.plain(self._client.state()))

    # -------------------------------------------------------------------------------------------------- commanding

    @intersect_message(ignore_keys={CONTROL})
    def image(self, request: ImageRequest) -> Frames:
        """Scan a rectangle: one frame (rows, columns)."""
        return self._do(request, lambda r: Image(r.origin_m, r.extent_m, tuple(r.shape), r.dwell_s, r.detector))

    @intersect_message(ignore_keys={CONTROL})
    def diffraction(self, request: PointsRequest) -> Frames:
        """A pattern at each position."""
        return self._do(request, lambda r: Diffraction(tuple(r.positions_m), r.dwell_s))

    @intersect_message(ignore_keys={CONTROL})
    def spectrum(self, request: PointsRequest) -> Frames:
        """A spectrum at each position."""
        return self._do(request, lambda r: Spectrum(tuple(r.positions_m), r.dwell_s))

    @intersect_message(ignore_keys={CONTROL})
    def probe(self, request: ProbeRequest) -> Frames:
        """Park the probe."""
        return self._do(request, lambda r: Probe(r.position_m))

    @intersect_message(ignore_keys={CONTROL})
    def optics(self, request: OpticsRequest) -> Frames:
        """Change the optics."""
        return self._do(request, lambda r: Optics(r.semiangle_rad, r.C10_m, r.current_A))

    @intersect_message(ignore_keys={CONTROL})
    def stage(self, request: StageRequest) -> Frames:
        """Move the stage."""
        return self._do(request, lambda r: Stage(r.x_m, r.y_m, r.z_m, r.alpha_rad, r.beta_rad))

    @intersect_message(ignore_keys={CONTROL})
    def blank(self, request: BlankRequest) -> Frames:
        """Blank or unblank the beam."""
        return self._do(request, lambda r: Blank(r.blanked))

    @intersect_message(ignore_keys={CONTROL})
    def execute(self, request: AnyRequest) -> Frames:
        """Carry out any instruction."""
        return self._do(request, lambda r: instructions.from_dict(r.instruction))

    @intersect_message(ignore_keys={CONTROL})
    def take_control(self) -> None:
        """Ask for the lease, also after it was taken over."""
        with _told(), self._lock:
            self._client.acquire()
            self._driving, self._lost, self._heard = True, "", time.monotonic()

    @intersect_message(ignore_keys={CONTROL})
    def release_control(self) -> None:
        """Give the lease back; the beam is blanked."""
        with _told(), self._lock:
            self._driving, self._lost = False, ""
            self._client.release()

    def _do(self, request: Any, make: Callable[[Any], Instruction]) -> Frames:
        with _told(), self._lock:
            asked = make(request)
            if self._lost:
                raise LeaseError(f"the microscope was taken from this gateway ({self._lost}) Ask: take_control.")
            if not self._driving:
                self._client.acquire()
                self._driving = True
            try:
                return _answer(request.id, self._client.execute(asked, request.id))
            except LeaseError as error:
                self._lost = str(error)
                raise
            finally:
                self._heard = time.monotonic()

    def rest(self) -> None:
        """Give the lease back if nobody has commanded for a while."""
        if self._lock.acquire(blocking=False):
            try:
                if self._driving and time.monotonic() - self._heard > self._idle_s:
                    self._driving, self._lost = False, ""
                    with suppress(StemloopError):  # the server notices the silence by itself, and blanks
                        self._client.release()
            finally:
                self._lock.release()


def service(
    capability: Microscope,
    hierarchy: dict[str, str],
    username: str,
    password: str,
    host: str = "127.0.0.1",
    port: int = 1883,
    protocol: str = "mqtt5.0",
) -> IntersectService:
    """The SDK's service of this capability.

    Parameters
    ----------
    hierarchy : ``organization``, ``facility``, ``system``, ``service`` and, if wanted, ``subsystem``.
    username, password : of the broker. host, port : of the broker, on loopback. protocol : mqtt5.0 or amqp0.9.1.
    """
    if not (host == "localhost" or _is_loopback(host)):
        raise InputError(
            f"the SDK talks to its broker without TLS, and {host!r} is not loopback: let a tunnel (ssh -L, stunnel) "
            "end on 127.0.0.1."
        )
    try:
        broker = ControlPlaneConfig(protocol=protocol, username=username, password=password, host=host, port=port)
        config = IntersectServiceConfig(hierarchy=HierarchyConfig(**hierarchy), brokers=[broker])
    except (ValueError, TypeError) as error:
        raise InputError(f"this is no place of an INTERSECT service: {' '.join(str(error).split())[:300]}") from None
    return IntersectService([capability], config)


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def serve(
    address: Address,
    hierarchy: dict[str, str],
    username: str,
    password: str,
    *,
    token: str | None = None,
    role: str = "agent",
    ca: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 1883,
    idle_s: float = 60.0,
    ready: Callable[[], None] | None = None,
    until: threading.Event | None = None,
) -> None:
    """Serve the instrument at ``address`` as an INTERSECT capability until ``until`` is set.

    ``ready`` is called when the broker has taken the service; a request that comes before it is lost.
    """
    stop = until or threading.Event()
    with connect_to_server(address, token, role, ca=ca) as client:
        capability = Microscope(client, idle_s)
        running = service(capability, hierarchy, username, password, host, port)
        _knock(host, port, username, password)
        try:
            running.startup()
            if not _connected(running, stop):
                raise InstrumentError(
                    f"the broker at {host}:{port} does not take the service: look at name and password."
                )
            if ready is not None:
                ready()
            while not stop.wait(min(0.5, idle_s / 4)):
                capability.rest()
                if running.considered_unrecoverable():
                    raise InstrumentError(f"the broker at {host}:{port} is lost.")
        finally:
            running.shutdown(reason="the gateway ends")


def _knock(host: str, port: int, username: str, password: str, patience_s: float = 10.0) -> None:
    """Ask the broker once whether it takes us: the SDK itself would try a wrong password again for minutes."""
    answered, said = threading.Event(), []

    def hear(_client: Any, _userdata: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        said.append(reason)
        answered.set()

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.username_pw_set(username, password)
    client.on_connect = hear
    try:
        client.connect(host, port)
    except OSError as error:
        raise InstrumentError(f"no broker answers at {host}:{port} ({error.strerror or error}): start it.") from None
    client.loop_start()
    answered.wait(patience_s)
    client.disconnect()
    client.loop_stop()
    if not said:
        raise InstrumentError(f"what listens at {host}:{port} is no MQTT 5 broker.")
    if said[0].is_failure:
        raise NotAuthorised(f"the broker at {host}:{port} refuses {username!r} ({said[0]}): look at the password.")


def _connected(running: IntersectService, stop: threading.Event, patience_s: float = 20.0) -> bool:
    end = time.monotonic() + patience_s
    while not running.is_connected():
        if running.considered_unrecoverable() or time.monotonic() > end or stop.wait(0.05):
            return False
    return True
