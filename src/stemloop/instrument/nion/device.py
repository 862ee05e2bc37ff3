"""Any instrument as a device inside Nion's acquisition stack: a scan unit, cameras and controls.

What Nion Swift asks of its hardware (a frame of a scan, a frame of a camera at the probe's position, the value of a
control) is asked of the instrument ``inside`` as instructions. Nion's coordinates have their origin at the middle of
the field, in nanometres; positions of the probe are fractions of the scan's field.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nion.data import Calibration, DataAndMetadata
from nion.device_kit import CameraDevice, InstrumentDevice, ScanDevice
from nion.instrumentation import scan_base
from nion.usim_device.InstrumentDevice import AxisManager
from nion.usim_device.ScanDevice import ScanBoxSimulator
from nion.utils import Geometry, Registry
from numpy.typing import NDArray

from stemloop.core.instruction import Blank, Diffraction, Image, Instruction, Optics, Spectrum, Stage
from stemloop.core.protocols import Exposure, Instrument
from stemloop.instrument.nion.geometry import M_TO_NM, S_TO_US, turned
from stemloop.instrument.nion.host import Ids

TWIN = Ids("stemloop_controller", "stemloop_scan", "stemloop_camera")


class Inside:
    """The instrument behind the devices, called by one thread at a time, and the key of its next exposure.

    The first exposure after :meth:`announce` carries the announced key, the next ones ``KEY#1``, ``KEY#2`` ... Frames
    of a live view, which nobody announced, get keys of their own. What goes wrong in a thread of Nion's is kept in
    ``failure``.
    """

    def __init__(self, instrument: Instrument) -> None:
        self.instrument = instrument
        self.info = instrument.info
        self._lock = threading.RLock()
        self._key, self._exposed = "live", 0
        self.failure: Exception | None = None

    def announce(self, key: str) -> None:
        """The exposures to come belong to the command ``key``."""
        with self._lock:
            self._key, self._exposed, self.failure = key, 0, None

    def expose(self, instruction: Instruction) -> NDArray[np.float32] | None:
        """The frames of an exposure as Nion carries them, or None if it failed."""
        with self._lock:
            key = f"{self._key}#{self._exposed}" if self._exposed else self._key
            self._exposed += 1
            try:
                frames = self.instrument.execute(instruction, key).frames
                assert frames is not None
            except Exception as error:
                self.failure = self.failure or error
                return None
            return frames.astype(np.float32)

    def command(self, instruction: Instruction) -> Exposure:
        """Carry out what does not expose."""
        with self._lock:
            return self.instrument.execute(instruction, f"{self._key}: {instruction.kind}")

    def state(self) -> dict[str, Any]:
        """The state of the instrument inside."""
        with self._lock:
            return self.instrument.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Bring the instrument inside into ``state``."""
        with self._lock:
            self.instrument.restore(state)


def register(inside: Inside, ids: Ids = TWIN) -> Callable[[], Callable[[], None]]:
    """The devices of ``inside`` for :class:`~stemloop.instrument.nion.host.Stack`."""

    def enter() -> Callable[[], None]:
        stem = _Stem(ids.stem, inside)
        parts: list[tuple[Any, set[str]]] = [(stem, {"instrument_controller", "stem_controller"})]
        if ids.camera:
            camera = _Camera(ids.camera, "ronchigram", "CBED camera", _PatternSource(inside, stem), stem)
            parts.append((_module(ids, camera), {"camera_module"}))
        if ids.eels:
            camera = _Camera(ids.eels, "eels", "EELS camera", _SpectrumSource(inside, stem), stem)
            parts.append((_module(ids, camera), {"camera_module"}))
        parts.append((_ScanModule(ids.scan, inside, stem), {"scan_module"}))
        for part, kinds in parts:
            Registry.register_component(part, kinds)

        def leave() -> None:
            for part, kinds in reversed(parts):
                Registry.unregister_component(part, kinds)

        return leave

    return enter


def _module(ids: Ids, camera: Any) -> Any:
    return CameraDevice.CameraModule(ids.stem, camera, CameraDevice.CameraSettings(camera.camera_id))


# ------------------------------------------------------------------------------------------------------- controls


@dataclass(frozen=True)
class _Control:
    """An entry of the state inside behind a Nion control: a number, or one (``part``) of a pair. ``asked``, with the
    field ``name`` changed, is the instruction that sets it."""

    entry: str
    asked: Optics | Stage
    name: str
    part: int | None = None

    def read(self, state: dict[str, Any]) -> float | None:
        value = state.get(self.entry)
        if value is None:
            return None
        return float(value if self.part is None else value[self.part])

    def instruction(self, value: float, state: dict[str, Any]) -> Instruction:
        wanted: Any = value
        if self.part is not None:
            pair = list(state[self.entry])
            pair[self.part] = value
            wanted = tuple(pair)
        changed: dict[str, Any] = {self.name: wanted}
        return replace(self.asked, **changed)


def _pair(name: str) -> dict[str, _Control]:
    return {f"{name}.{axis}": _Control(f"{name}_m", Optics(), f"{name}_m", part) for part, axis in enumerate("ab")}


_CONTROLS = {
    "C10": _Control("C10_m", Optics(), "C10_m"),
    **_pair("C12"),
    **_pair("C21"),
    **_pair("C23"),
    "C30": _Control("C30_m", Optics(), "C30_m"),
    "ConvergenceAngle": _Control("semiangle_rad", Optics(), "semiangle_rad"),
    "BeamCurrent": _Control("current_A", Optics(), "current_A"),
    "stage_position_m.x": _Control("stage_x_m", Stage(), "x_m"),
    "stage_position_m.y": _Control("stage_y_m", Stage(), "y_m"),
    "stage_height_m": _Control("stage_z_m", Stage(), "z_m"),
    "stage_tilt_rad.a": _Control("stage_alpha_rad", Stage(), "alpha_rad"),
    "stage_tilt_rad.b": _Control("stage_beta_rad", Stage(), "beta_rad"),
}
_BLANKER = "C_Blank"


class _Values:
    """Nion's controls as instructions; implements the device kit's ``ValueManagerLike``."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._facts = {"EHT": inside.info.energy_eV, **_camera_facts(inside)}

    def get_value(self, name: str) -> float | None:
        if name in self._facts:
            return self._facts[name]
        state = self._inside.state()
        if name == _BLANKER:
            return float(state["blanked"]) if "blanked" in state else None
        return _CONTROLS[name].read(state) if name in _CONTROLS else None

    def set_value(self, name: str, value: float) -> bool:
        if name in self._facts or self.get_value(name) is None:
            return False
        if name == _BLANKER:
            self._inside.command(Blank(value != 0.0))
        else:
            self._inside.command(_CONTROLS[name].instruction(float(value), self._inside.state()))
        return True

    inform_value = set_value

    def get_value_2d(self, s: str, default_value: Any = None, *, axis: Any = None) -> Any:
        names = self._axes(s, axis)
        values = [self.get_value(name) for name in names]
        if None in values:
            if default_value is None:
                raise KeyError(f"there is no control {s!r}")
            return default_value
        return Geometry.FloatPoint(x=values[0], y=values[1])

    def set_value_2d(self, s: str, value: Any, *, axis: Any = None) -> bool:
        x, y = self._axes(s, axis)
        return self.set_value(x, value.x) and self.set_value(y, value.y)

    def inform_control_2d(self, s: str, value: Any, *, axis: Any) -> bool:
        return self.set_value_2d(s, value, axis=axis)

    def get_reference_setting_index(self, settings_control: str) -> int:
        return 0

    @staticmethod
    def _axes(name: str, axis: Any) -> tuple[str, str]:
        native = ("a", "b") if f"{name}.a" in _CONTROLS else ("x", "y")
        first, second = axis or native
        return f"{name}.{first}", f"{name}.{second}"


def _camera_facts(inside: Inside) -> dict[str, float]:
    """Calibrations of the cameras as controls: Nion's value at index i is ``offset + i * scale``."""
    facts: dict[str, float] = {}
    if (camera := inside.info.camera) is not None:
        for axis, centre in zip("yx", camera.centre_px, strict=True):
            facts[f"ronchigram_{axis}_scale"] = camera.pixel_rad
            facts[f"ronchigram_{axis}_offset"] = -centre * camera.pixel_rad
    if (loss := inside.info.energy_loss) is not None:
        facts |= {"eels_x_offset": loss[0], "eels_x_scale": loss[1], "eels_y_offset": 0.0, "eels_y_scale": 1.0}
    return facts


class _Stem(InstrumentDevice.Instrument):
    """The microscope's controls and the sizes of its cameras."""

    def __init__(self, instrument_id: str, inside: Inside) -> None:
        super().__init__(instrument_id, _Values(inside), AxisManager())
        info = inside.info
        self.inside = inside
        self._shapes = {
            "ronchigram": info.camera.shape if info.camera else (1, 1),
            "eels": (1, info.energy_loss[2] if info.energy_loss else 1),
        }

    def camera_sensor_dimensions(self, camera_type: str) -> tuple[int, int]:
        return self._shapes[camera_type]

    def camera_readout_area(self, camera_type: str) -> tuple[int, int, int, int]:
        return (0, 0, *self._shapes[camera_type])

    @property
    def counts_per_electron(self) -> int:
        return 1


# -------------------------------------------------------------------------------------------------------- cameras


class _Camera(CameraDevice.Camera):
    """A camera without binning."""

    @property
    def binning_values(self) -> list[int]:
        return [1]


class _Source:
    """Frames of a camera at the probe's position; implements the device kit's ``CameraSimulatorLike``."""

    def __init__(self, inside: Inside, stem: _Stem) -> None:
        self._inside, self._stem = inside, stem

    def close(self) -> None:
        pass

    def get_dimensional_calibrations(self, readout_area: Any, binning_shape: Any) -> list[Calibration.Calibration]:
        raise NotImplementedError

    def _ask(self, position: tuple[float, float], exposure_s: float) -> Instruction:
        raise NotImplementedError

    def _shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def get_frame_data(
        self, readout_area: Any, binning_shape: Any, exposure_s: float, scan_context: Any, probe: Any
    ) -> Any:
        asked = self._ask(self._position(scan_context, probe), exposure_s)
        frames = self._inside.expose(asked)
        frame = np.zeros(self._shape(), np.float32) if frames is None else frames.reshape(self._shape())
        return DataAndMetadata.new_data_and_metadata(
            frame,
            dimensional_calibrations=self.get_dimensional_calibrations(readout_area, binning_shape),
            intensity_calibration=Calibration.Calibration(units="counts"),
        )

    def _position(self, context: Any, parked: Any) -> tuple[float, float]:
        """(y, x) [m] from the top-left corner of the field, of the parked probe or of the scan's present pixel."""
        controller = self._stem.scan_controller
        if self._stem.probe_state == "scanning" and controller is not None:
            probe = controller.scan_device.current_probe_position
        else:
            probe = parked or Geometry.FloatPoint(0.5, 0.5)
        side_nm = context.fov_size_nm or Geometry.FloatSize(0.0, 0.0)
        centre = context.center_nm or Geometry.FloatPoint()
        away = turned(((probe.y - 0.5) * side_nm.height, (probe.x - 0.5) * side_nm.width), context.rotation_rad or 0.0)
        return in_field((centre.y + away[0], centre.x + away[1]), self._inside.info.field_m)


class _PatternSource(_Source):
    def _ask(self, position: tuple[float, float], exposure_s: float) -> Instruction:
        return Diffraction((position,), exposure_s)

    def _shape(self) -> tuple[int, int]:
        return self._stem.camera_sensor_dimensions("ronchigram")

    def get_dimensional_calibrations(self, readout_area: Any, binning_shape: Any) -> list[Calibration.Calibration]:
        camera = self._inside.info.camera
        assert camera is not None
        return [Calibration.Calibration(-c * camera.pixel_rad, camera.pixel_rad, "rad") for c in camera.centre_px]


class _SpectrumSource(_Source):
    def _ask(self, position: tuple[float, float], exposure_s: float) -> Instruction:
        return Spectrum((position,), exposure_s)

    def _shape(self) -> tuple[int, int]:
        return self._stem.camera_sensor_dimensions("eels")

    def get_dimensional_calibrations(self, readout_area: Any, binning_shape: Any) -> list[Calibration.Calibration]:
        loss = self._inside.info.energy_loss
        assert loss is not None
        return [Calibration.Calibration(), Calibration.Calibration(loss[0], loss[1], "eV")]


# ----------------------------------------------------------------------------------------------------------- scan


def in_field(centred_nm: tuple[float, float], field_m: tuple[float, float]) -> tuple[float, float]:
    """From Nion's (y, x) [nm] about the middle of the field to ours [m] from its top-left corner.

    >>> in_field((-5.0, 0.0), (10e-9, 20e-9))
    (0.0, 1e-08)
    """
    y, x = (value / M_TO_NM + size / 2 for value, size in zip(centred_nm, field_m, strict=True))
    return y, x


class _ScanDevice(ScanDevice.Device):
    """A scan unit with the ring detectors of the instrument inside as channels, pixels of any shape."""

    def __init__(self, device_id: str, inside: Inside, stem: _Stem) -> None:
        super().__init__(device_id, "Scan", stem, ScanBoxSimulator(self))
        self._inside = inside
        detectors = inside.info.detectors
        # the device kit has a list of channels of its own and no other way to give it another one
        self._Device__channels = [ScanDevice.Channel(n, name, n == 0) for n, name in enumerate(detectors)]

    def generate_scan_data(self, instrument: Any, parameters: Any) -> NDArray[np.float32]:
        raise NotImplementedError("frames are made by get_scan_data, which knows the channel")

    def get_scan_data(self, frame_parameters: Any, channel: Any) -> NDArray[np.float32]:
        """One frame of one channel: the instrument is asked for the image of that detector."""
        asked = image_of(frame_parameters, channel.name, self._inside.info.field_m)
        frames = self._inside.expose(asked)
        return np.zeros(asked.shape, np.float32) if frames is None else frames[0]


def image_of(parameters: Any, detector: str, field_m: tuple[float, float]) -> Image:
    """The image that Nion's scan parameters ask for."""
    shape = parameters.subscan_pixel_size or parameters.pixel_size
    longest = max(parameters.pixel_size)
    whole = [n * parameters.fov_nm / longest for n in parameters.pixel_size]
    share = parameters.subscan_fractional_size or Geometry.FloatSize(1.0, 1.0)
    middle = parameters.subscan_fractional_center or Geometry.FloatPoint(0.5, 0.5)
    extent_m = (whole[0] * share.height / M_TO_NM, whole[1] * share.width / M_TO_NM)
    away = turned(((middle.y - 0.5) * whole[0], (middle.x - 0.5) * whole[1]), parameters.rotation_rad)
    centre = in_field((parameters.center_nm.y + away[0], parameters.center_nm.x + away[1]), field_m)
    return Image(
        (centre[0] - extent_m[0] / 2, centre[1] - extent_m[1] / 2),
        extent_m,
        (int(shape[0]), int(shape[1])),
        parameters.pixel_time_us / S_TO_US,
        detector,
        parameters.rotation_rad - (parameters.subscan_rotation or 0.0),
    )


class _ScanModule(scan_base.ScanModule):
    def __init__(self, device_id: str, inside: Inside, stem: _Stem) -> None:
        self.stem_controller_id = stem.instrument_id
        self.device = _ScanDevice(device_id, inside, stem)
        self.priority = 20
        side_nm = max(inside.info.field_m) * M_TO_NM
        usual = ScanDevice.ScanFrameParameters(pixel_size=(256, 256), pixel_time_us=1, fov_nm=side_nm)
        modes = [scan_base.ScanSettingsMode(name, name.lower(), usual) for name in ("Fast", "Slow", "Record")]
        self.settings = scan_base.ScanSettings(device_id, modes, ScanDevice.ScanFrameParameters, 0, 2)
