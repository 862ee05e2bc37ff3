"""A microscope that Nion Swift runs, behind our socket.

Every frame began after the command that asked for it: live views are stopped first, a camera's frames come from a
sequence and an image from a record task that are begun for the command, and what Nion says of their beginning (the
sequence's own time, the scan's number) is compared with the command. A frame that fails the comparison is an
``InstrumentError``, not a frame. See ``docs/explanation/stale-frames.md`` for what happens otherwise.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nion.utils import Geometry
from numpy.typing import NDArray

from stemloop.core.errors import Aborted, InputError, InstrumentError, LimitError
from stemloop.core.instruction import (
    Blank,
    Detector,
    Diffraction,
    Field,
    Image,
    Instruction,
    Optics,
    Position,
    Probe,
    Report,
    Spectrum,
    Stage,
)
from stemloop.core.protocols import Camera, Exposure, InstrumentInfo
from stemloop.core.units import electrons
from stemloop.instrument.limits import moved
from stemloop.instrument.nion.device import Inside
from stemloop.instrument.nion.geometry import M_TO_NM, S_TO_MS, S_TO_US, View
from stemloop.instrument.nion.host import Hardware, stop_playing

#: Entries of the state vector and the Nion controls behind them: one, or two for a pair.
CONTROLS: dict[str, tuple[str, ...]] = {
    "semiangle_rad": ("ConvergenceAngle",),
    "C10_m": ("C10",),
    "C12_m": ("C12.a", "C12.b"),
    "C21_m": ("C21.a", "C21.b"),
    "C23_m": ("C23.a", "C23.b"),
    "C30_m": ("C30",),
    "current_A": ("BeamCurrent",),
    "energy_eV": ("EHT",),
    "blanked": ("C_Blank",),
    "stage_x_m": ("stage_position_m.x",),
    "stage_y_m": ("stage_position_m.y",),
    "stage_z_m": ("stage_height_m",),
    "stage_alpha_rad": ("stage_tilt_rad.a",),
    "stage_beta_rad": ("stage_tilt_rad.b",),
    "eels_energy_offset_eV": ("ZLPoffset",),
}

#: Our names of the ring detectors and the names of Nion's channels.
CHANNELS = {"HAADF": "HAADF", "ADF": "MAADF", "ABF": "ABF", "BF": "BF"}

_CONTEXT_PIXELS = 256
#: A camera may be this much later [s] than ten exposures.
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Setup:
    """What Nion does not know of a microscope, or calls by another name.

    name : for people. field_m : (height, width) [m] of the largest field. controls, channels : see :data:`CONTROLS`,
    :data:`CHANNELS`; a control that the microscope lacks is not offered. source_fwhm_m : size [m] of the source at the
    specimen. binning : pixels of the diffraction camera that make one pixel of ours, in both directions. sample : goes
    into ``info``. counts : whether frames are whole counts of electrons. square_pixels : whether images must have
    square pixels. tolerance : largest relative difference between a control's value and what was asked. confirm_s :
    how long [s] a control may take. settle_s : rest [s] after a move of the probe. slack_s : how much earlier than the
    command the clock of a camera may say that a sequence began (its clock may be another one's).
    """

    name: str
    field_m: tuple[float, float]
    controls: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: CONTROLS)
    channels: Mapping[str, str] = field(default_factory=lambda: CHANNELS)
    source_fwhm_m: float = 0.0
    binning: int = 1
    sample: Mapping[str, Any] = field(default_factory=dict)
    counts: bool = False
    square_pixels: bool = True
    tolerance: float = 1e-6
    confirm_s: float = 10.0
    settle_s: float = 0.0
    slack_s: float = 0.0


class NionInstrument:
    """An instrument over Nion's hardware; implements :class:`stemloop.core.protocols.Instrument`.

    Parameters
    ----------
    hardware : what :func:`stemloop.instrument.nion.host.find` found.
    setup : what Nion does not know.
    inside : the instrument behind simulated devices, if that is what they are.
    close : called at the end, to end a stack that was started for this instrument.
    """

    def __init__(
        self,
        hardware: Hardware,
        setup: Setup,
        inside: Inside | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        self._hardware, self._setup, self._inside, self._close = hardware, setup, inside, close
        self._controls = {
            entry: names for entry, names in setup.controls.items() if None not in [self._get(name) for name in names]
        }
        self._channels = self._find_channels()
        self._aborted = threading.Event()
        self.progress: Callable[[int, int], None] | None = None
        self._binning = 1
        self._last_scan: str | None = None
        self._exposed = {"electrons": 0.0, "exposed_positions": 0}
        self._view = View(setup.field_m)
        self._probe: Position = (setup.field_m[0] / 2, setup.field_m[1] / 2)
        self._quiet()
        self._choose_view(self._view)
        self._park(self._probe)
        self._info = self._describe()

    # ------------------------------------------------------------------------------------------- the socket

    @property
    def info(self) -> InstrumentInfo:
        return self._info

    def state(self) -> dict[str, Any]:
        """All controls that this microscope has, the probe, the field of view and what was exposed."""
        values: dict[str, Any] = {entry: self._read(entry) for entry in self._controls}
        if "blanked" in values:
            values["blanked"] = int(bool(values["blanked"]))
        values |= {"probe_y_m": self._probe[0], "probe_x_m": self._probe[1]}
        values |= {"field_height_m": self._view.extent_m[0], "field_width_m": self._view.extent_m[1]}
        values |= {"field_rotation_rad": self._view.rotation_rad, "camera_binning": [self._binning, self._binning]}
        inside = {} if self._inside is None else self._inside.state()
        return {**{f"inside_{name}": value for name, value in inside.items()}, **values, **self._exposed}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave; another set of names is an :class:`InputError`.

        The controls of a microscope that was not started for us stay as they are: it remembers them by itself, may have
        been driven by hand since, and must not move because a server starts.
        """
        if odd := set(state) ^ set(self.state()):
            raise InputError(
                f"this is no state of {self._setup.name}: {', '.join(sorted(odd))} missing or unknown. "
                "Give back what state() returned."
            )
        if self._inside is not None:
            self._inside.restore({name[7:]: value for name, value in state.items() if name.startswith("inside_")})
        if self._close is not None:
            self._change({entry: state[entry] for entry in self._controls})
        self._binning = int(state["camera_binning"][0])
        self._exposed = {name: state[name] for name in self._exposed}
        self._choose_view(View((state["field_height_m"], state["field_width_m"]), state["field_rotation_rad"]))
        self._park((state["probe_y_m"], state["probe_x_m"]))

    def execute(self, instruction: Instruction, key: str) -> Exposure:
        """Carry out one instruction. ``key`` reaches simulated devices, which seed their noise with it."""
        try:
            return self._execute(instruction, key)
        except Aborted:
            if "blanked" in self._controls:
                self._change({"blanked": 1.0})
            raise
        finally:
            self._aborted.clear()

    def _execute(self, instruction: Instruction, key: str) -> Exposure:
        if instruction.exposes:
            self._quiet()
        if self._inside is not None:
            self._inside.announce(key)
        if not instruction.exposes:
            self._act(instruction)
            return Exposure(None, 0.0, self.state())
        if self._read("blanked"):
            raise InstrumentError("the beam is blanked; send Blank(blanked=False) before an exposure.")
        if isinstance(instruction, Image):
            return self._image(instruction)
        assert isinstance(instruction, (Diffraction, Spectrum))
        return self._points(instruction)

    def _act(self, instruction: Instruction) -> None:
        """Carry out what does not expose."""
        match instruction:
            case Probe():
                self._park(instruction.position_m)
            case Blank():
                self._change({"blanked": float(instruction.blanked)})
            case Optics() | Stage():
                self._change(wanted := dict(moved(instruction)))
                if "energy_eV" in wanted:
                    self._info = self._describe()
            case Field():
                self._change_view(instruction)
            case Detector():
                self._set_up(instruction)
            case Report():
                pass
            case _:
                raise InstrumentError(f"{self._setup.name} cannot carry out {instruction.kind!r}.")

    def abort(self) -> None:
        """End the running exposure, or the next one, as soon as the hardware can; called from another thread."""
        self._aborted.set()
        for camera in (self._hardware.camera, self._hardware.eels):
            if camera is not None:
                camera.acquire_sequence_cancel()
        if self._hardware.scan.is_recording:
            self._hardware.scan.abort_recording()

    def close(self) -> None:
        """Stop what plays; end the stack if it was started for this instrument."""
        self._quiet()
        if self._close is not None:
            self._close()
            self._close = None

    # --------------------------------------------------------------------------------------------- what it is

    def _describe(self) -> InstrumentInfo:
        hardware = self._hardware
        kinds = ["image", "probe", "optics", "field", "report"]
        kinds += ["diffraction"] if hardware.camera is not None else []
        kinds += ["spectrum"] if hardware.eels is not None else []
        kinds += ["blank"] if "blanked" in self._controls else []
        kinds += ["stage"] if any(entry.startswith("stage_") for entry in self._controls) else []
        kinds += ["detector"] if hardware.camera is not None or hardware.eels is not None else []
        return InstrumentInfo(
            name=self._setup.name,
            instructions=tuple(kinds),
            field_m=self._setup.field_m,
            energy_eV=float(self._read("energy_eV") or 0.0),
            source_fwhm_m=self._setup.source_fwhm_m,
            camera=None if hardware.camera is None else self._camera(1),
            energy_loss=None if hardware.eels is None else self._energy_loss(),
            sample=dict(self._setup.sample),
            detectors=tuple(self._channels),
        )

    def _camera(self, binning: int) -> Camera:
        """The diffraction camera as it is calibrated now, with ``binning`` of our pixels."""
        source, parameters = self._hardware.camera, self._frame_parameters(Diffraction(((0.0, 0.0),), 1.0))
        parameters.binning = binning * self._setup.binning
        y, x = source.get_camera_calibrations(parameters)
        if y.units != "rad" or not math.isclose(y.scale, x.scale, rel_tol=1e-6):
            raise InstrumentError(
                f"{source.display_name} is not calibrated in rad with square pixels (it says {y.scale} and {x.scale} "
                f"{y.units or 'without unit'}): calibrate it in Nion Swift."
            )
        rows, columns = source.get_expected_dimensions(parameters.binning)
        return Camera((int(rows), int(columns)), float(y.scale), (-y.offset / y.scale, -x.offset / x.scale))

    def _energy_loss(self) -> tuple[float, float, int]:
        """(offset [eV], scale [eV], channels) of the spectrometer as it is calibrated now."""
        source, parameters = self._hardware.eels, self._frame_parameters(Spectrum(((0.0, 0.0),), 1.0))
        axis = source.get_camera_calibrations(parameters)[-1]
        if axis.units != "eV":
            raise InstrumentError(f"{source.display_name} is not calibrated in eV: calibrate it in Nion Swift.")
        return float(axis.offset), float(axis.scale), int(source.get_expected_dimensions(1)[1])

    def _find_channels(self) -> dict[str, int]:
        scan = self._hardware.scan
        known = {scan.get_channel_state(index).name: index for index in range(scan.channel_count)}
        return {ours: known[name] for ours, name in self._setup.channels.items() if name in known}

    # ------------------------------------------------------------------------------------------------ controls

    def _get(self, control: str) -> float | None:
        exists, value = self._hardware.stem.TryGetVal(control)
        return float(value) if exists and value is not None else None

    def _read(self, entry: str) -> Any:
        """An entry of the state vector: a number, a list of two, or None for one that this microscope lacks."""
        values = [self._get(name) for name in self._controls.get(entry, ())]
        return values if len(values) > 1 else values[0] if values else None

    def _change(self, wanted: Mapping[str, Any]) -> None:
        """Set controls, each confirmed and read back; if one fails, those before it go back to where they were."""
        if unknown := [entry for entry in wanted if entry not in self._controls]:
            raise InstrumentError(
                f"{self._setup.name} has no control for {', '.join(unknown)}; it has {', '.join(self._controls)}."
            )
        before: dict[str, float] = {}
        try:
            for entry, value in wanted.items():
                for control, number in zip(self._controls[entry], np.atleast_1d(value).tolist(), strict=True):
                    old = self._get(control)
                    if old != number:
                        before[control] = float(old or 0.0)
                        self._set(control, float(number))
        except Exception:
            for control, number in before.items():
                with contextlib.suppress(Exception):
                    self._set(control, number)
            raise

    def _set(self, control: str, value: float) -> None:
        if not self._hardware.stem.SetValAndConfirm(control, value, 1.0, int(self._setup.confirm_s * S_TO_MS)):
            raise InstrumentError(
                f"the microscope did not confirm {control} = {value:g} within {self._setup.confirm_s:g} s."
            )
        got = self._get(control)
        if got is None or not math.isclose(got, value, rel_tol=self._setup.tolerance, abs_tol=1e-15):
            raise InstrumentError(f"the control {control} was set to {value:g} and reads {got}.")

    def _choose_view(self, view: View) -> None:
        """Tell Nion the scan context in which fractions count."""
        scan = self._hardware.scan
        parameters = scan.get_current_frame_parameters()
        parameters.pixel_size = Geometry.IntSize(_CONTEXT_PIXELS, _CONTEXT_PIXELS)
        parameters.fov_nm = view.side_m * M_TO_NM
        parameters.center_nm = Geometry.FloatPoint(0.0, 0.0)
        parameters.rotation_rad = 0.0
        scan.set_current_frame_parameters(parameters)
        context = self._hardware.stem.scan_context
        if not math.isclose(context.fov_nm, parameters.fov_nm, rel_tol=1e-9):
            raise InstrumentError(
                f"the scan's field was set to {parameters.fov_nm:g} nm and reads {context.fov_nm:g} nm."
            )
        self._view = view

    def _change_view(self, asked: Field) -> None:
        extent = asked.extent_m or self._view.extent_m
        if any(part > whole * (1 + 1e-9) for part, whole in zip(extent, self._setup.field_m, strict=True)):
            height, width = (size * M_TO_NM for size in self._setup.field_m)
            raise LimitError(f"the field of view is at most {height:g} x {width:g} nm here; ask for a smaller one.")
        rotation = self._view.rotation_rad if asked.rotation_rad is None else asked.rotation_rad
        self._choose_view(View(extent, rotation))
        self._park((extent[0] / 2, extent[1] / 2))

    def _park(self, position_m: Position) -> None:
        """Park the probe and see that it is there."""
        y, x = self._view.fraction(position_m)
        stem = self._hardware.stem
        stem.set_probe_position(Geometry.FloatPoint(y=y, x=x))
        parked = stem.probe_position
        if parked is None or (parked.y, parked.x) != (y, x):
            raise InstrumentError(f"the probe was sent to ({y:g}, {x:g}) of the scan and stands at {parked}.")
        self._probe = (float(position_m[0]), float(position_m[1]))

    def _set_up(self, asked: Detector) -> None:
        wanted = {name: value for name, value in vars(asked).items() if name != "name" and value is not None}
        if asked.name == "camera" and set(wanted) == {"binning"} and self._hardware.camera is not None:
            rows, columns = wanted["binning"]
            known = [n for n in range(1, 65) if n * self._setup.binning in self._hardware.camera.binning_values]
            if rows != columns or rows not in known:
                known_ones = ", ".join(map(str, known))
                raise LimitError(f"the camera bins {known_ones} pixels in both directions; got {rows} x {columns}.")
            self._binning = int(rows)
        elif asked.name == "eels" and set(wanted) == {"energy_offset_eV"} and self._hardware.eels is not None:
            self._change({"eels_energy_offset_eV": wanted["energy_offset_eV"]})
        elif wanted:
            raise InstrumentError(
                f"{self._setup.name} cannot set {', '.join(wanted)} of {asked.name!r}; it can set the binning of "
                "'camera' and the energy_offset_eV of 'eels'."
            )
        self._info = self._describe()

    # ----------------------------------------------------------------------------------------------- exposures

    def _quiet(self) -> None:
        for source in (self._hardware.scan, self._hardware.camera, self._hardware.eels):
            if source is not None:
                stop_playing(source)

    def _points(self, asked: Diffraction | Spectrum) -> Exposure:
        source = self._hardware.camera if isinstance(asked, Diffraction) else self._hardware.eels
        if source is None:
            raise InstrumentError(f"{self._setup.name} has no camera for {asked.kind}.")
        for corner in asked.corners_m().tolist():
            self._view.fraction((corner[0], corner[1]))
        parameters, total = self._frame_parameters(asked), asked.exposed_positions
        frames: NDArray[Any] | None = None
        began_s = 0.0
        for index, position in enumerate(asked.positions_m):
            if self._aborted.is_set():
                raise Aborted(f"the command was aborted after {index} of {total} positions.", index)
            commanded_s = time.time()
            self._park(position)
            if self._setup.settle_s:
                time.sleep(self._setup.settle_s)
            frame, at_s = self._one(source, parameters, commanded_s)
            began_s = began_s or at_s
            self._account(asked.dwell_s, 1)
            if frame is None:
                raise Aborted(f"the command was aborted at position {index + 1} of {total}.", index + 1)
            if frames is None:
                frames = np.empty((total, *frame.shape), frame.dtype)
            frames[index] = frame
            if self.progress is not None:
                self.progress(index + 1, total)
        assert frames is not None
        return self._exposed_frames(asked, frames, began_s, self._points_calibration(asked))

    def _one(self, source: Any, parameters: Any, commanded_s: float) -> tuple[NDArray[Any] | None, float]:
        """One frame of a camera that was begun now, and when [s since 1970]; None for a frame that was cancelled:
        Nion's device kit then answers with the frame before and calls it complete."""
        source.acquire_sequence_prepare(1)
        data = source.acquire_sequence_begin(parameters, 1)
        end = time.monotonic() + _PATIENCE_S + 10 * parameters.exposure_ms / S_TO_MS
        try:
            while not (data.is_complete or data.is_canceled):
                if time.monotonic() > end:
                    source.acquire_sequence_cancel()
                    raise InstrumentError(
                        f"{source.display_name} began a frame and does not end it; see Nion Swift's log."
                    )
                data = source.acquire_sequence_continue()
        finally:
            source.acquire_sequence_end()
        self._raise_failure()
        if data.is_canceled or self._aborted.is_set():
            return None, commanded_s
        frame = data.xdata
        began = frame.timestamp.replace(tzinfo=datetime.UTC).timestamp()
        if began < commanded_s - self._setup.slack_s - 1e-6:  # Nion's times are whole microseconds
            raise InstrumentError(
                f"{source.display_name} gave a frame that began {commanded_s - began:.3g} s before the command; "
                "it is not used."
            )
        return np.array(frame.data[0]), began

    def _image(self, asked: Image) -> Exposure:
        if asked.detector not in self._channels:
            raise LimitError(f"there is no detector {asked.detector!r} here; there are {', '.join(self._channels)}.")
        if self._setup.square_pixels and not _square(asked):
            raise LimitError(
                f"{self._setup.name} scans square pixels; {asked.pixel_m[0]:g} x {asked.pixel_m[1]:g} m were asked."
            )
        part = self._view.subscan(asked)
        scan = self._hardware.scan
        parameters = scan.get_current_frame_parameters()
        parameters.subscan_pixel_size = Geometry.IntSize(*(int(n) for n in asked.shape))
        parameters.subscan_fractional_center = Geometry.FloatPoint(*part.middle)
        parameters.subscan_fractional_size = Geometry.FloatSize(*part.size)
        parameters.subscan_rotation = part.rotation_rad
        parameters.pixel_time_us = asked.dwell_s * S_TO_US
        parameters.enabled_channel_indexes = [self._channels[asked.detector]]
        if self._aborted.is_set():
            raise Aborted("the image was aborted before its first pixel.", 0)
        began_s = time.time()
        recorded = [frame for frame in scan.record_immediate(parameters) if frame is not None]
        self._raise_failure()
        if self._aborted.is_set():
            self._account(asked.dwell_s, asked.exposed_positions)
            raise Aborted(f"the image was aborted; at most {asked.exposed_positions} positions were exposed.")
        frame = self._fresh(recorded, parameters, asked)
        self._account(asked.dwell_s, asked.exposed_positions)
        corner = asked.positions()[-1, -1]
        self._park((float(corner[0]), float(corner[1])))
        calibration = {
            "pixel_m": list(asked.pixel_m),
            "origin_m": list(asked.origin_m),
            "detector": asked.detector,
            "rotation_rad": asked.rotation_rad,
        }
        return self._exposed_frames(asked, frame[None], began_s, calibration)

    def _fresh(self, recorded: list[Any], parameters: Any, asked: Image) -> NDArray[Any]:
        """The recorded frame, if it is a whole new scan with the parameters that were asked."""
        if len(recorded) != 1:
            raise InstrumentError(f"the scan gave {len(recorded)} frames; one was asked. See Nion Swift's log.")
        xdata = recorded[0]
        scan = xdata.metadata["scan"]
        got, number = scan["scan_device_parameters"], str(scan["scan_id"])
        names = (
            "fov_nm",
            "subscan_pixel_size",
            "subscan_fractional_center",
            "subscan_fractional_size",
            "pixel_time_us",
        )
        other = [name for name in names if not np.allclose(got[name], parameters.as_dict()[name], rtol=1e-9, atol=0)]
        if number == self._last_scan or other or xdata.data_shape != tuple(asked.shape):
            what = ", ".join(other) or ("shape" if number != self._last_scan else "scan_id")
            raise InstrumentError(f"the scan gave a frame of another command ({what} differs); it is not used.")
        if int(scan["valid_rows"]) != asked.shape[0]:
            raise InstrumentError(f"the scan ended after {scan['valid_rows']} of {asked.shape[0]} rows.")
        self._last_scan = number
        return np.array(xdata.data)

    def _frame_parameters(self, asked: Diffraction | Spectrum) -> Any:
        """Camera parameters: whole frames of the diffraction camera, summed columns of the spectrometer."""
        spectrum = isinstance(asked, Spectrum)
        source = self._hardware.eels if spectrum else self._hardware.camera
        return source.get_frame_parameters_from_dict(
            {
                "exposure_ms": asked.dwell_s * S_TO_MS,
                "binning": 1 if spectrum else self._binning * self._setup.binning,
                "processing": "sum_project" if spectrum else None,
                "integration_count": 1,
            }
        )

    def _points_calibration(self, asked: Diffraction | Spectrum) -> dict[str, Any]:
        where = {"positions_m": np.asarray(asked.positions_m, float).tolist()}
        if isinstance(asked, Spectrum):
            return {"energy_loss": list(self._energy_loss()), "counting": self._setup.counts, **where}
        camera = self._camera(self._binning)
        return {"pixel_rad": camera.pixel_rad, "centre_px": list(camera.centre_px), **where}

    def _exposed_frames(
        self, asked: Image | Diffraction | Spectrum, frames: NDArray[Any], began_s: float, calibration: dict[str, Any]
    ) -> Exposure:
        state = self.state()
        common: dict[str, Any] = {name: state[name] for name in ("energy_eV", "semiangle_rad") if name in state}
        if self._setup.counts:
            wide = np.rint(frames)
            frames = wide.astype(np.uint16 if wide.max(initial=0) < 2**16 else np.uint32)
        number = electrons(state.get("current_A", 0.0), asked.dwell_s)
        calibrated = {**common, "dwell_s": asked.dwell_s, **calibration}
        return Exposure(frames, number, state, calibrated, began_s=began_s, ended_s=time.time())

    def _account(self, dwell_s: float, positions: int) -> None:
        self._exposed["electrons"] += electrons(self._read("current_A") or 0.0, dwell_s) * positions
        self._exposed["exposed_positions"] += positions

    def _raise_failure(self) -> None:
        if self._inside is not None and self._inside.failure is not None:
            failure, self._inside.failure = self._inside.failure, None
            raise failure


def _square(asked: Image) -> bool:
    """Whether the pixels are square to within half a pixel over the frame."""
    y, x = asked.pixel_m
    return abs(y - x) * max(asked.shape) < 0.5 * min(y, x)
