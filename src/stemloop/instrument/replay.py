"""A recording as an instrument: the same experiment over data that were taken before."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core import units
from stemloop.core.errors import Aborted, InputError, LimitError
from stemloop.core.field import absolute, chosen
from stemloop.core.instruction import (
    DETECTORS,
    Blank,
    Diffraction,
    Field,
    Image,
    Instruction,
    Probe,
    Report,
    Spectrum,
)
from stemloop.core.protocols import Camera, Exposure, InstrumentInfo
from stemloop.core.signal import Axis, Signal

_METRES = {"m": 1.0, "mm": 1e-3, "um": 1e-6, "µm": 1e-6, "μm": 1e-6, "nm": 1e-9, "pm": 1e-12, "A": 1e-10, "Å": 1e-10}
_RADIANS = {"rad": 1.0, "mrad": 1e-3}
_PER_METRE = {"1/m": 1.0, "1/nm": 1e9, "nm^-1": 1e9, "1/A": 1e10, "1/Å": 1e10, "A^-1": 1e10, "Å^-1": 1e10}
_ELECTRON_VOLTS = {"eV": 1.0, "keV": 1e3, "meV": 1e-3}
_UNCALIBRATED_M = 1e-9

#: How far [px] an asked position may be from a recorded one.
TOLERANCE_PX = 1e-3


def _is_metric(axes: tuple[Axis, ...]) -> bool:
    return all(axis.unit in _METRES and axis.scale > 0 for axis in axes)


def _pixel_m(axes: tuple[Axis, ...]) -> tuple[float, float]:
    """(y, x) pixel [m]; without a spatial calibration of both axes 1 px counts as 1 nm."""
    if not _is_metric(axes):
        return _UNCALIBRATED_M, _UNCALIBRATED_M
    return axes[0].scale * _METRES[axes[0].unit], axes[1].scale * _METRES[axes[1].unit]


def _camera(axes: tuple[Axis, ...], energy_eV: float) -> Camera:
    """The camera that recorded the two detector axes."""
    unit, scale = axes[0].unit, abs(axes[0].scale)
    if unit in _RADIANS:
        pixel_rad = scale * _RADIANS[unit]
    elif unit in _PER_METRE and energy_eV > 0:
        pixel_rad = scale * _PER_METRE[unit] * units.wavelength_m(energy_eV)
    else:
        raise InputError(
            f"the detector axes are in {unit!r}, which gives no angle a pixel: give camera=Camera(shape, pixel_rad, "
            "centre_px), or the beam's energy_eV for axes in 1/nm."
        )
    centre = [-axis.offset / axis.scale if axis.offset else (axis.size - 1) / 2 for axis in axes]
    return Camera((axes[0].size, axes[1].size), pixel_rad, (centre[0], centre[1]))


def _energy_loss(axis: Axis) -> tuple[float, float, int]:
    if axis.unit not in _ELECTRON_VOLTS:
        raise InputError(f"the energy axis is in {axis.unit!r}; it must be in {', '.join(_ELECTRON_VOLTS)}.")
    factor = _ELECTRON_VOLTS[axis.unit]
    return axis.offset * factor, axis.scale * factor, axis.size


class Replay:
    """An :class:`~stemloop.core.protocols.Instrument` over recorded data. It answers what was recorded, and no more.

    A spectrum image (y, x, energy_loss) answers ``Spectrum``, a 4D-STEM signal (scan_y, scan_x, det_y, det_x)
    answers ``Diffraction``, both at the recorded positions only, which are the centres of the scan's pixels
    (``info.positions_m``), which a line or a raster may hit as well. An image (y, x) answers ``Image`` by a crop along
    its own pixels, for the detector that its metadata name (HAADF if they name none). Without a spatial
    calibration 1 px counts as 1 nm, and ``info.sample["positions"]`` says so.

    Electrons are those that the same instruction would have cost at ``current_A``, so that budgets mean something.

    Parameters
    ----------
    signal : Signal
        The recording: 2, 3 or 4 axes.
    image : Signal, optional
        An image (y, x) of the same field, which answers ``Image`` beside a spectrum image or a 4D-STEM recording.
    energy_eV : float, optional
        The beam's energy [eV]; without it that of ``signal.metadata["beam_energy_eV"]``, or 0: not recorded.
    current_A : float
        Beam current [A] that is charged.
    camera : Camera, optional
        For 4D-STEM whose detector axes are not in rad, mrad or (with ``energy_eV``) 1/nm.
    name : str
        The instrument's name.
    """

    def __init__(
        self,
        signal: Signal,
        *,
        image: Signal | None = None,
        energy_eV: float | None = None,
        current_A: float = 1e-11,
        camera: Camera | None = None,
        name: str = "replay",
    ) -> None:
        dimensions = signal.data.ndim
        if dimensions not in (2, 3, 4):
            raise InputError(
                f"a recording of {dimensions} axes cannot be replayed: give (y, x), (y, x, energy_loss) or "
                "(scan_y, scan_x, det_y, det_x)."
            )
        self._signal = signal
        self._pixel_m = _pixel_m(signal.axes[:2])
        self._image = signal if dimensions == 2 else image
        self._image_pixel_m = self._pixel_m
        rows, columns = signal.data.shape[:2]
        field_m = rows * self._pixel_m[0], columns * self._pixel_m[1]
        if image is not None and dimensions != 2:
            self._image_pixel_m = self._match(image, field_m)
        if energy_eV is None:
            energy_eV = float(signal.metadata.get("beam_energy_eV", 0.0))
        kinds = {2: (), 3: (Spectrum.kind,), 4: (Diffraction.kind,)}[dimensions]
        if self._image is not None:
            kinds = (Image.kind, *kinds)
        sample: dict[str, Any] = {"recorded": True}
        if self._image is not None:
            sample["image_shape"] = list(self._image.data.shape)
        if not _is_metric(signal.axes[:2]):
            sample["positions"] = "no spatial calibration: 1 px counts as 1 nm"
        self._info = InstrumentInfo(
            name=name,
            instructions=(*kinds, Probe.kind, Blank.kind, Field.kind, Report.kind),
            field_m=field_m,
            energy_eV=energy_eV,
            camera=(camera or _camera(signal.axes[2:], energy_eV)) if dimensions == 4 else None,
            energy_loss=_energy_loss(signal.axes[2]) if dimensions == 3 else None,
            positions_m=self._centres() if dimensions > 2 else None,
            sample=sample,
            detectors=self._detectors(),
        )
        self._stop = threading.Event()
        self.progress: Callable[[int, int], None] | None = None
        self._state: dict[str, Any] = {
            "current_A": float(current_A),
            "blanked": True,
            "probe_y_m": 0.0,
            "probe_x_m": 0.0,
            "field_height_m": field_m[0],
            "field_width_m": field_m[1],
            "field_rotation_rad": 0.0,
            "exposures": 0,
        }

    def _detectors(self) -> tuple[str, ...]:
        """What an image may name: the detector that was recorded."""
        if self._image is None:
            return ()
        recorded = self._image.metadata.get("detector", DETECTORS[0])
        return (recorded,) if recorded in DETECTORS else DETECTORS[:1]

    def _match(self, image: Signal, field_m: tuple[float, float]) -> tuple[float, float]:
        """The pixel [m] of an image that shows the field of the recording."""
        if image.data.ndim != 2:
            raise InputError(f"the image beside the recording must be (y, x); it has {image.data.ndim} axes.")
        pixel_m = field_m[0] / image.data.shape[0], field_m[1] / image.data.shape[1]
        if _is_metric(image.axes) and _is_metric(self._signal.axes[:2]):
            own = _pixel_m(image.axes)
            if not all(math.isclose(a, b, rel_tol=0.01) for a, b in zip(own, pixel_m, strict=True)):
                raise InputError(
                    f"the image has pixels of {own} m; over the recording's field of {field_m} m it would have "
                    f"{pixel_m} m. Give the image of the same field."
                )
        return pixel_m

    def _centres(self) -> NDArray[np.float64]:
        rows, columns = self._signal.data.shape[:2]
        y, x = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, indexing="ij")
        return np.stack([y.ravel() * self._pixel_m[0], x.ravel() * self._pixel_m[1]], axis=1)

    @property
    def prompt(self) -> frozenset[str]:
        """Whatever does not expose only sets a few numbers."""
        return frozenset({"probe", "blank", "field", "report"})

    @property
    def info(self) -> InstrumentInfo:
        """What was recorded, as what an instrument can do."""
        return self._info

    def state(self) -> dict[str, Any]:
        """``current_A``, ``blanked``, the parked probe and the number of ``exposures`` so far."""
        return dict(self._state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state` gave."""
        self._state = {**self._state, **{key: state[key] for key in self._state if key in state}}

    def execute(self, instruction: Instruction, key: str) -> Exposure:
        """Answer an instruction out of the recording.

        Raises
        ------
        LimitError
            If the instruction, position or pixel was not recorded.
        InputError
            If the recording holds no number (NaN or infinity) there.
        """
        try:
            return self._execute(instruction)
        finally:
            self._stop.clear()

    def abort(self) -> None:
        """End the exposure that runs; its ``execute`` blanks the beam and raises ``Aborted``. From any thread."""
        self._stop.set()

    def _execute(self, instruction: Instruction) -> Exposure:
        if instruction.kind not in self._info.instructions:
            raise LimitError(
                f"the recording cannot answer {instruction.kind!r}; it answers {', '.join(self._info.instructions)}."
            )
        match instruction:
            case Image():
                return self._exposure(self._crop(instruction), instruction, {"pixel_m": list(self._image_pixel_m)})
            case Spectrum():
                assert self._info.energy_loss is not None
                axis = {"energy_loss": list(self._info.energy_loss)}
                return self._exposure(self._frames(instruction), instruction, axis)
            case Diffraction():
                assert self._info.camera is not None
                camera = self._info.camera
                angles = {"pixel_rad": camera.pixel_rad, "centre_px": list(camera.centre_px)}
                return self._exposure(self._frames(instruction), instruction, angles)
            case Probe():
                y, x = instruction.position_m
                self._inside(y, x)
                self._state.update(probe_y_m=float(y), probe_x_m=float(x))
            case Blank():
                self._state["blanked"] = instruction.blanked
            case Field():
                self._choose(instruction)
        return Exposure(None, 0.0, self.state())

    def _inside(self, y: float, x: float) -> None:
        """Refuse a position outside the chosen field."""
        height, width = chosen(self._state, self._info.field_m)[0]
        if not (0 <= y <= height and 0 <= x <= width):
            raise LimitError(f"(y, x) = ({y:g}, {x:g}) m is outside the field of {height:g} x {width:g} m.")

    def _choose(self, asked: Field) -> None:
        if asked.rotation_rad:
            raise LimitError("a recording is not turned afterwards: leave rotation_rad out.")
        extent_m = asked.extent_m or chosen(self._state, self._info.field_m)[0]
        if any(a > b * (1 + 1e-9) for a, b in zip(extent_m, self._info.field_m, strict=True)):
            raise LimitError(f"the recording's field is {self._info.field_m} m: ask for a smaller one.")
        self._state.update(field_height_m=float(extent_m[0]), field_width_m=float(extent_m[1]))

    def _exposure(self, frames: NDArray[Any], asked: Instruction, calibration: dict[str, Any]) -> Exposure:
        self._state["exposures"] += 1
        dwell_s = asked.beam_time_s / asked.exposed_positions
        electrons = units.electrons(self._state["current_A"], dwell_s)
        return Exposure(frames, electrons, self.state(), calibration)

    def _index(self, position_m: tuple[float, float]) -> tuple[int, int]:
        """The scan pixel (row, column) whose centre is at the position."""
        found = []
        for value, pixel, size in zip(position_m, self._pixel_m, self._signal.data.shape, strict=False):
            place = value / pixel - 0.5
            index = min(max(round(place), 0), size - 1)
            found.append((index, abs(place - index)))
        row, column = found[0][0], found[1][0]
        if max(found[0][1], found[1][1]) > TOLERANCE_PX:
            near = (row + 0.5) * self._pixel_m[0], (column + 0.5) * self._pixel_m[1]
            raise LimitError(
                f"nothing was recorded at (y, x) = ({position_m[0]:.6g}, {position_m[1]:.6g}) m; the nearest recorded "
                f"position is ({near[0]:.6g}, {near[1]:.6g}) m. Ask for positions out of info.positions_m."
            )
        return row, column

    def _frames(self, asked: Spectrum | Diffraction) -> NDArray[Any]:
        positions = absolute(np.asarray(asked.positions_m), self._state, self._info.field_m)
        indices = [self._index((y, x)) for y, x in positions.tolist()]
        taken: list[NDArray[Any]] = []
        while self._reached(len(taken), len(indices)) and len(taken) < len(indices):
            taken.append(np.asarray(self._signal.data[indices[len(taken)]]))
        if len(taken) < len(indices):
            self._state["blanked"] = True
            raise Aborted(
                f"the command was ended after {len(taken)} of {len(indices)} positions; they count as exposed.",
                len(taken),
            )
        frames = np.stack(taken)
        broken = ~np.isfinite(frames).reshape(len(frames), -1).all(axis=1)
        if broken.any():
            row, column = indices[int(np.argmax(broken))]
            raise InputError(
                f"the recording holds no number (NaN or infinity) at scan pixel row {row}, column {column} and at "
                f"{int(broken.sum())} of the {len(frames)} asked positions: leave these out."
            )
        return frames

    def _reached(self, done: int, of: int) -> bool:
        """Tell how far the exposure is; False if it is to end here."""
        if self.progress is not None:
            self.progress(done, of)
        return done == of or not self._stop.is_set()

    def _crop(self, asked: Image) -> NDArray[Any]:
        """(1, rows, columns): the recorded pixels in the asked rectangle."""
        assert self._image is not None
        recorded = self._image.metadata.get("detector", self._info.detectors[0])
        if asked.detector not in self._info.detectors:
            raise LimitError(f"the image was recorded with the detector {recorded!r}; {asked.detector!r} was asked.")
        if asked.rotation_rad:
            raise LimitError("the recording was scanned without a turn: leave rotation_rad out.")
        origin_m = absolute([asked.origin_m], self._state, self._info.field_m)[0]
        begin = []
        for axis, name in enumerate("yx"):
            pixel, size = self._image_pixel_m[axis], self._image.data.shape[axis]
            first, count = origin_m[axis] / pixel, asked.extent_m[axis] / pixel
            start, wanted = round(first), asked.shape[axis]
            whole = abs(first - start) <= TOLERANCE_PX and abs(count - wanted) <= TOLERANCE_PX
            if not whole or start < 0 or start + wanted > size:
                raise LimitError(
                    f"along {name} {wanted} pixels over {asked.extent_m[axis]:.6g} m from {asked.origin_m[axis]:.6g} m "
                    f"were asked; recorded are {size} pixels of {pixel:.6g} m from 0. Ask for whole recorded pixels."
                )
            begin.append(start)
        (top, left), (rows, columns) = begin, asked.shape
        crop = np.array(self._image.data[top : top + rows, left : left + columns])
        if not np.isfinite(crop).all():
            row, column = np.argwhere(~np.isfinite(crop))[0]
            raise InputError(
                f"the recording holds no number (NaN or infinity) at pixel row {top + row}, column {left + column}: "
                "ask for a rectangle without it."
            )
        return crop[np.newaxis]

    def close(self) -> None:
        """Nothing to close: the recording is the caller's."""
