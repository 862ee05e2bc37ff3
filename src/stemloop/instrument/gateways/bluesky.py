"""The microscope as devices of Bluesky: a RunEngine can scan it.

The classes speak :mod:`bluesky.protocols` (Movable, Readable, Triggerable, Flyable, Status), nothing of ophyd is
needed. They hold a connection with a lease (:class:`~stemloop.core.protocols.Scope`), so that the server's limits,
dose ledger and audit stand behind every message of a plan::

    from bluesky import RunEngine, plans

    with connect(address, lease=True) as scope:
        bench, RE = Bench(scope), RunEngine()
        bench.attach(RE)
        RE(plans.grid_scan([bench.cbed], bench.probe_y, 0, 5e-9, 6, bench.probe_x, 0, 5e-9, 6))

A RunEngine that was paused at once goes back to its last checkpoint and says the messages since then again. For a beam
that would be a second dose. After :meth:`Bench.attach` a trigger that is said again carries the command id of the first
time (the run's uid and the trigger's number), and the server answers it without exposing. If the optics or the stage
were changed during the pause, the old frame would be a lie: then the trigger is a new exposure.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.instruction import Diffraction, Image, Instruction, Optics, Probe, Raster, Spectrum, Stage
from stemloop.core.protocols import Exposure, Scope
from stemloop.core.record import content_hash

#: What a pause may change and a repeated trigger must not ignore: names of the state vector.
_SETTINGS = ("semiangle_rad", "current_A", "energy_eV", "stage_", "C1", "C2", "C3", "field_")


class Deed:
    """Something under way; implements :class:`bluesky.protocols.Status`."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def add_callback(self, callback: Callable[[Deed], None]) -> None:
        self._future.add_done_callback(lambda _: callback(self))

    def exception(self, timeout: float | None = 0.0) -> BaseException | None:
        return self._future.exception(timeout)

    @property
    def done(self) -> bool:
        return self._future.done()

    @property
    def success(self) -> bool:
        return self._future.done() and self._future.exception() is None


@dataclass
class _Said:
    """A trigger message (a replay says the same object again) and the command that it became."""

    message: Any
    command_id: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    asked: Instruction | None = None


class Bench:
    """The microscope's devices, by name: movables, detectors and a flyer, as far as the instrument has them.

    ============================================== ======================================================== =========
    device                                         is                                                       unit
    ============================================== ======================================================== =========
    ``probe_y``, ``probe_x``                       where the beam is parked                                 m
    ``stage_x``, ``stage_y``, ``stage_z``          the stage                                                m
    ``stage_alpha``, ``stage_beta``                its tilts                                                rad
    ``C10``, ``semiangle``, ``current``            the probe                                                m, rad, A
    ``haadf``, ``cbed``, ``eels``                  detectors: an image, a pattern or a spectrum a trigger
    ``cbed_raster``                                a flyer: patterns on a raster, in one command
    ============================================== ======================================================== =========

    Parameters
    ----------
    scope : Scope
        A connection with the lease.
    frames : bool
        Whether events carry the frames. Without them they carry their sum, SHA-256 and command id; the frames stay in
        the server's spool.
    """

    def __init__(self, scope: Scope, frames: bool = True) -> None:
        self.scope, self.frames = scope, frames
        self.run: str | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bluesky devices")
        self._said: list[_Said] = []
        self._checkpoints: list[int] = []
        self._current: _Said | None = None
        self._count = 0
        state, can = scope.state(), scope.info.instructions
        self.devices: dict[str, Any] = {}
        if "probe" in can and "probe_y_m" in state:
            for axis in ("y", "x"):
                self._add(ProbeAxis(self, axis))
        for name, (key, unit, make) in _KNOBS.items():
            if make(0.0 if unit != "A" and name != "semiangle" else 1e-12).kind in can and key in state:
                self._add(Knob(self, name, key, unit, make))
        height, width = scope.info.field_m
        if "image" in can:
            self._add(Detector(self, "haadf", Image((0.0, 0.0), (height, width), (128, 128), 2e-6)))
        here = (height / 2, width / 2)
        if "diffraction" in can:
            self._add(Detector(self, "cbed", Diffraction((here,), 1e-3)))
            self._add(Flyer(self, "cbed_raster", Raster((0.0, 0.0), (height, width), (8, 8)), 1e-3))
        if "spectrum" in can:
            self._add(Detector(self, "eels", Spectrum((here,), 1e-2)))

    def _add(self, device: Any) -> None:
        self.devices[device.name] = device

    def __getattr__(self, name: str) -> Any:
        devices = self.__dict__.get("devices", {})
        if name in devices:
            return devices[name]
        raise AttributeError(f"the microscope has no device {name!r}; it has {', '.join(devices)}.")

    # -------------------------------------------------------------------------------- triggers that are said again

    def attach(self, engine: Any) -> None:
        """Listen to a RunEngine, so that a trigger that it says again after a pause exposes nothing again."""
        before = engine.msg_hook

        def hear(message: Any) -> None:
            if before is not None:
                before(message)
            self._hear(message)

        engine.msg_hook = hear
        engine.subscribe(self._begin, "start")

    def _begin(self, _: str, start: dict[str, Any]) -> None:
        self.run, self._count = start["uid"], 0

    def _hear(self, message: Any) -> None:
        if message.command == "checkpoint":  # what came before the one before cannot come back
            self._checkpoints.append(len(self._said))
            if len(self._checkpoints) > 2:
                gone = self._checkpoints.pop(0)
                del self._said[:gone]
                self._checkpoints = [place - gone for place in self._checkpoints]
        if message.command not in ("trigger", "kickoff") or message.obj not in self.devices.values():
            return
        for said in self._said:
            if said.message is message:
                self._current = said
                return
        self._current = _Said(message)
        self._said.append(self._current)

    def settings(self) -> dict[str, Any]:
        """What a frame depends on besides the probe's position: optics, stage and field, from the state vector."""
        return {name: value for name, value in self.scope.state().items() if name.startswith(_SETTINGS)}

    def claim(self) -> Any:
        """Which message the trigger that is being carried out came with; None where nobody heard it."""
        said, self._current = self._current, None
        return said

    def command_id(self, said: _Said | None, name: str, asked: Instruction) -> str:
        """The id under which to ask: that of the first time, if the same is asked under the same settings."""
        if said is None:
            return f"bluesky:{name}:{uuid.uuid4().hex}"
        settings = self.settings()
        if (said.asked, said.settings) != (asked, settings):
            self._count += 1
            said.command_id = f"bluesky:{self.run}:{name}:{self._count}"
            said.asked, said.settings = asked, settings
        return said.command_id

    # ------------------------------------------------------------------------------------------------- helpers

    def start(self, act: Callable[[], Any]) -> Deed:
        """Do something in the bench's own thread, in the order of asking."""
        return Deed(self._thread.submit(act))

    def do(self, asked: Instruction) -> None:
        """Carry out what exposes nothing."""
        self.scope.execute(asked, f"bluesky:{uuid.uuid4().hex}")

    def parked_m(self) -> tuple[float, float]:
        """Where the probe is (y, x) [m]."""
        state = self.scope.state()
        return float(state["probe_y_m"]), float(state["probe_x_m"])

    def describe(self, name: str, array: NDArray[Any] | None, shape: tuple[int, ...]) -> dict[str, Any]:
        """The data keys of a detector's reading."""
        source = f"stemloop:{self.scope.info.name}"
        keys: dict[str, dict[str, Any]] = {
            f"{name}_sum": {"source": source, "dtype": "number", "shape": [], "units": "counts"},
            f"{name}_electrons": {"source": source, "dtype": "number", "shape": [], "units": "electrons"},
            f"{name}_epoch": {"source": source, "dtype": "integer", "shape": []},
            f"{name}_sha256": {"source": source, "dtype": "string", "shape": []},
            f"{name}_command": {"source": source, "dtype": "string", "shape": []},
        }
        if self.frames:
            keys[name] = {"source": source, "dtype": "array", "shape": list(shape), "units": "counts"}
            if array is not None:
                keys[name]["dtype_numpy"] = array.dtype.str
        return keys

    def reading(
        self, name: str, frame: NDArray[Any], exposure: Exposure, command_id: str, when: float
    ) -> dict[str, Any]:
        """The reading of one frame; its epoch grows with each command, so that an old frame shows."""
        values: dict[str, Any] = {
            f"{name}_sum": float(frame.sum(dtype=np.float64)),
            f"{name}_electrons": float(exposure.electrons),
            f"{name}_epoch": exposure.epoch,
            f"{name}_sha256": content_hash(frame),
            f"{name}_command": command_id,
        }
        if self.frames:
            values[name] = frame
        return {key: {"value": value, "timestamp": when} for key, value in values.items()}


class _Device:
    """What all devices share."""

    parent = None

    def __init__(self, bench: Bench, name: str) -> None:
        self._bench, self.name = bench, name

    @property
    def hints(self) -> dict[str, Any]:
        return {"fields": [self.name]}

    def read_configuration(self) -> dict[str, Any]:
        return {}

    def describe_configuration(self) -> dict[str, Any]:
        return {}


class _Axis(_Device):
    """A number that can be set and read: Movable, Locatable, Readable."""

    unit = "m"

    def __init__(self, bench: Bench, name: str, key: str) -> None:
        super().__init__(bench, name)
        self._key = key
        self._wanted: float | None = None

    def _move(self, value: float) -> None:
        raise NotImplementedError

    def set(self, value: float) -> Deed:
        """Move there; done when the instrument has answered."""
        wanted = float(value)
        self._wanted = wanted
        return self._bench.start(lambda: self._move(wanted))

    @property
    def position(self) -> float:
        """Where it is now."""
        return float(self._bench.scope.state()[self._key])

    def locate(self) -> dict[str, float]:
        here = self.position
        return {"setpoint": here if self._wanted is None else self._wanted, "readback": here}

    def read(self) -> dict[str, Any]:
        return {self.name: {"value": self.position, "timestamp": time.time()}}

    def describe(self) -> dict[str, Any]:
        source = f"stemloop:{self._bench.scope.info.name}:{self._key}"
        return {self.name: {"source": source, "dtype": "number", "shape": [], "units": self.unit}}


class ProbeAxis(_Axis):
    """Where the probe is parked along one axis [m]; the other stays."""

    def __init__(self, bench: Bench, axis: str) -> None:
        super().__init__(bench, f"probe_{axis}", f"probe_{axis}_m")
        self._axis = axis

    def _move(self, value: float) -> None:
        y, x = self._bench.parked_m()
        self._bench.do(Probe((value, x) if self._axis == "y" else (y, value)))


class Knob(_Axis):
    """One control of the optics or the stage."""

    def __init__(self, bench: Bench, name: str, key: str, unit: str, make: Callable[[float], Instruction]) -> None:
        super().__init__(bench, name, key)
        self.unit, self._make = unit, make

    def _move(self, value: float) -> None:
        self._bench.do(self._make(value))


_KNOBS: dict[str, tuple[str, str, Callable[[float], Instruction]]] = {
    "stage_x": ("stage_x_m", "m", lambda v: Stage(x_m=v)),
    "stage_y": ("stage_y_m", "m", lambda v: Stage(y_m=v)),
    "stage_z": ("stage_z_m", "m", lambda v: Stage(z_m=v)),
    "stage_alpha": ("stage_alpha_rad", "rad", lambda v: Stage(alpha_rad=v)),
    "stage_beta": ("stage_beta_rad", "rad", lambda v: Stage(beta_rad=v)),
    "C10": ("C10_m", "m", lambda v: Optics(C10_m=v)),
    "semiangle": ("semiangle_rad", "rad", lambda v: Optics(semiangle_rad=v)),
    "current": ("current_A", "A", lambda v: Optics(current_A=v)),
}


class Detector(_Device):
    """One exposure a trigger. ``settings`` is the instruction that is asked for; :meth:`configure` changes it.

    Patterns and spectra are taken where the probe is parked.
    """

    def __init__(self, bench: Bench, name: str, settings: Image | Diffraction | Spectrum) -> None:
        super().__init__(bench, name)
        self.settings = settings
        self._reading: dict[str, Any] | None = None
        self._last: NDArray[Any] | None = None

    @property
    def hints(self) -> dict[str, Any]:
        return {"fields": [f"{self.name}_sum"]}

    def configure(self, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Change fields of the instruction, such as ``dwell_s``, ``shape``, ``extent_m``; (old, new) configuration."""
        if "positions_m" in changes:
            raise InputError(f"{self.name} is taken where the probe is parked: move probe_y and probe_x.")
        old = self.read_configuration()
        try:
            self.settings = replace(self.settings, **changes)
        except TypeError as error:
            raise InputError(f"{self.name} cannot be configured so: {error}.") from None
        return old, self.read_configuration()

    def read_configuration(self) -> dict[str, Any]:
        return {name: {"value": value, "timestamp": time.time()} for name, value in self._configuration().items()}

    def describe_configuration(self) -> dict[str, Any]:
        return {name: {"source": "stemloop", **_described(value)} for name, value in self._configuration().items()}

    def _configuration(self) -> dict[str, Any]:
        names = ("origin_m", "extent_m", "shape", "dwell_s", "detector", "rotation_rad")
        found = {name: getattr(self.settings, name) for name in names if hasattr(self.settings, name)}
        return {f"{self.name}_{k}": list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    def trigger(self) -> Deed:
        """Expose once; a trigger that is said again after a pause is answered without exposing."""
        said = self._bench.claim()
        return self._bench.start(lambda: self._expose(said))

    def _expose(self, said: _Said | None) -> None:
        asked = self.settings
        if not isinstance(asked, Image):
            asked = replace(asked, positions_m=(self._bench.parked_m(),))
        command_id = self._bench.command_id(said, self.name, asked)
        self._take(self._bench.scope.execute(asked, command_id), command_id)

    def _take(self, exposure: Exposure, command_id: str) -> None:
        assert exposure.frames is not None
        self._last = exposure.frames[0]
        self._reading = self._bench.reading(self.name, self._last, exposure, command_id, time.time())

    def read(self) -> dict[str, Any]:
        if self._reading is None:
            raise InputError(f"{self.name} has recorded nothing yet: trigger it first.")
        return self._reading

    def describe(self) -> dict[str, Any]:
        return self._bench.describe(self.name, self._last, () if self._last is None else self._last.shape)


@dataclass
class _Flight:
    exposure: Exposure | None = None
    command_id: str = ""
    places: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 2)))
    when: float = 0.0


class Flyer(_Device):
    """Diffraction patterns on a raster in one command: Flyable and Collectable, one event a position."""

    def __init__(self, bench: Bench, name: str, raster: Raster, dwell_s: float) -> None:
        super().__init__(bench, name)
        self.raster, self.dwell_s = raster, dwell_s
        self._flight = _Flight()
        self._deed: Deed | None = None

    @property
    def hints(self) -> dict[str, Any]:
        return {"fields": [f"{self.name}_sum"]}

    def kickoff(self) -> Deed:
        """Begin; done at once, :meth:`complete` waits for the frames."""
        asked = Diffraction(self.raster, self.dwell_s)
        said, places = self._bench.claim(), self.raster.array()

        def fly() -> None:
            command_id = self._bench.command_id(said, self.name, asked)
            found = self._bench.scope.execute(asked, command_id)
            self._flight = _Flight(found, command_id, places, time.time())

        self._deed = self._bench.start(fly)
        begun: Future[None] = Future()
        begun.set_result(None)
        return Deed(begun)

    def complete(self) -> Deed:
        if self._deed is None:
            raise InputError(f"{self.name} was not kicked off.")
        return self._deed

    def describe_collect(self) -> dict[str, Any]:
        frames = None if self._flight.exposure is None else self._flight.exposure.frames
        one = None if frames is None else frames[0]
        keys = self._bench.describe(self.name, one, () if one is None else one.shape)
        for axis in ("y", "x"):
            keys[f"{self.name}_{axis}"] = {"source": "stemloop", "dtype": "number", "shape": [], "units": "m"}
        return {self.name: keys}

    def collect(self) -> Iterator[dict[str, Any]]:
        flight = self._flight
        if flight.exposure is None or flight.exposure.frames is None:
            return
        for place, frame in zip(flight.places, flight.exposure.frames, strict=True):
            reading = self._bench.reading(self.name, frame, flight.exposure, flight.command_id, flight.when)
            for axis, value in zip(("y", "x"), place, strict=True):
                reading[f"{self.name}_{axis}"] = {"value": float(value), "timestamp": flight.when}
            yield {
                "time": flight.when,
                "data": {name: entry["value"] for name, entry in reading.items()},
                "timestamps": {name: entry["timestamp"] for name, entry in reading.items()},
            }


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, list):
        return {"dtype": "array", "shape": [len(value)]}
    return {"dtype": "string" if isinstance(value, str) else "number", "shape": []}
