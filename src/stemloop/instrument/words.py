"""The words of a notebook: instructions in the units people say, and answers with named axes.

Lengths are in nanometres, angles of the beam in milliradians, those of the stage and of scans in degrees; each name
carries its unit. Places are (y, x) from the top-left corner of the field, y down and x to the right.
:class:`Draft` turns words into instructions, :class:`Words` carries them out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import numpy as np
from numpy.typing import ArrayLike

from stemloop.core.errors import InputError
from stemloop.core.instruction import (
    Blank,
    Detector,
    Diffraction,
    Field,
    Image,
    Instruction,
    Line,
    Optics,
    Position,
    Positions,
    Probe,
    Raster,
    Report,
    Spectrum,
    Stage,
)
from stemloop.core.protocols import Exposure, InstrumentInfo
from stemloop.core.signal import Signal
from stemloop.instrument.labels import label
from stemloop.instrument.progress import Progress

#: Divided by, so that 10 us is 1e-5 s to the last bit.
_NM, _MRAD, _US, _MS, _PA, _UM, _MM = 1e9, 1e3, 1e6, 1e3, 1e12, 1e6, 1e3
_DEGREE = 180 / math.pi
#: Frames that may take more bytes than this are left on the server and fetched in pieces.
INLINE_BYTES = 64 * 2**20

Size = float | tuple[float, float]
Shape = int | tuple[int, int]
P = ParamSpec("P")


def _pair(value: Any, name: str) -> tuple[float, float]:
    try:
        first, second = value
        return float(first), float(second)
    except (TypeError, ValueError):
        raise InputError(f"{name} is a pair of numbers (y, x); got {value!r:.60}.") from None


def _scaled(value: float | None, per: float) -> float | None:
    return None if value is None else value / per


def _both(value: tuple[float, float] | None, per: float, name: str) -> tuple[float, float] | None:
    if value is None:
        return None
    first, second = _pair(value, name)
    return first / per, second / per


class Draft:
    """Makes instructions without carrying them out: ``scope.plan([scope.draft.image(fov_nm=20), ...])``."""

    def __init__(self, info: InstrumentInfo) -> None:
        self._info = info

    def _rectangle(
        self,
        fov_nm: Size | None,
        shape: Shape,
        center_nm: Position | None,
        origin_nm: Position | None,
    ) -> tuple[Position, Position, tuple[int, int]]:
        """(origin_m, extent_m, shape) of a scanned rectangle, by default the whole field."""
        rows, columns = (shape, shape) if isinstance(shape, (int, np.integer)) else (int(shape[0]), int(shape[1]))
        field = self._info.field_m
        if fov_nm is None:
            extent = float(field[0]), float(field[1])
        elif np.ndim(fov_nm) == 0:
            width = float(fov_nm) / _NM  # type: ignore[arg-type]
            extent = width * rows / columns, width
        else:
            height, width = _pair(fov_nm, "fov_nm")
            extent = height / _NM, width / _NM
        if origin_nm is not None and center_nm is not None:
            raise InputError("give origin_nm or center_nm, not both.")
        if origin_nm is not None:
            y, x = _pair(origin_nm, "origin_nm")
            return (y / _NM, x / _NM), extent, (rows, columns)
        middle = (field[0] / 2, field[1] / 2)
        if center_nm is not None:
            y, x = _pair(center_nm, "center_nm")
            middle = y / _NM, x / _NM
        origin = middle[0] - extent[0] / 2, middle[1] - extent[1] / 2
        return origin, extent, (rows, columns)

    def _places(
        self,
        at_nm: ArrayLike | None,
        line_nm: tuple[Position, Position, int] | None,
        fov_nm: Size | None,
        shape: Shape | None,
        center_nm: Position | None,
        origin_nm: Position | None,
        rotation_deg: float,
    ) -> Positions:
        if sum(given is not None for given in (at_nm, line_nm, shape)) != 1:
            raise InputError(
                "say where: at_nm=(y, x) or a list of places, line_nm=((y, x), (y, x), count), or shape=(rows, "
                "columns) of a raster with its fov_nm."
            )
        if line_nm is not None:
            start, stop, count = line_nm
            (a, b), (c, d) = _pair(start, "line_nm"), _pair(stop, "line_nm")
            return Line((a / _NM, b / _NM), (c / _NM, d / _NM), int(count))
        if shape is not None:
            origin, extent, rows = self._rectangle(fov_nm, shape, center_nm, origin_nm)
            return Raster(origin, extent, rows, math.radians(rotation_deg))
        places = np.atleast_2d(np.asarray(at_nm, dtype=np.float64))
        if places.ndim != 2 or places.shape[1] != 2:
            raise InputError(f"at_nm is a place (y, x) or a list of them (n, 2); got the shape {places.shape}.")
        return tuple((y / _NM, x / _NM) for y, x in places.tolist())

    def image(
        self,
        fov_nm: Size | None = None,
        shape: Shape = 256,
        dwell_us: float = 10.0,
        *,
        center_nm: Position | None = None,
        origin_nm: Position | None = None,
        rotation_deg: float = 0.0,
        detector: str = "HAADF",
    ) -> Image:
        """An image; the words are those of :meth:`Words.image`."""
        origin, extent, size = self._rectangle(fov_nm, shape, center_nm, origin_nm)
        return Image(origin, extent, size, dwell_us / _US, detector, math.radians(rotation_deg))

    def diffraction(
        self,
        at_nm: ArrayLike | None = None,
        *,
        line_nm: tuple[Position, Position, int] | None = None,
        fov_nm: Size | None = None,
        shape: Shape | None = None,
        center_nm: Position | None = None,
        origin_nm: Position | None = None,
        rotation_deg: float = 0.0,
        dwell_ms: float = 1.0,
    ) -> Diffraction:
        """Diffraction patterns; the words are those of :meth:`Words.diffraction`."""
        places = self._places(at_nm, line_nm, fov_nm, shape, center_nm, origin_nm, rotation_deg)
        return Diffraction(places, dwell_ms / _MS)

    def spectrum(
        self,
        at_nm: ArrayLike | None = None,
        *,
        line_nm: tuple[Position, Position, int] | None = None,
        fov_nm: Size | None = None,
        shape: Shape | None = None,
        center_nm: Position | None = None,
        origin_nm: Position | None = None,
        rotation_deg: float = 0.0,
        dwell_ms: float = 10.0,
    ) -> Spectrum:
        """Energy-loss spectra; the words are those of :meth:`Words.spectrum`."""
        places = self._places(at_nm, line_nm, fov_nm, shape, center_nm, origin_nm, rotation_deg)
        return Spectrum(places, dwell_ms / _MS)

    def probe(self, at_nm: Position) -> Probe:
        """Park the (blanked) probe at (y, x) [nm]."""
        y, x = _pair(at_nm, "at_nm")
        return Probe((y / _NM, x / _NM))

    def blank(self) -> Blank:
        """Keep the beam off the sample."""
        return Blank(True)

    def unblank(self) -> Blank:
        """Let the beam rest on the sample, where the limits allow it. An exposure needs no such thing."""
        return Blank(False)

    def stage(
        self,
        *,
        x_nm: float | None = None,
        y_nm: float | None = None,
        z_nm: float | None = None,
        alpha_deg: float | None = None,
        beta_deg: float | None = None,
    ) -> Stage:
        """Move the stage to absolute coordinates [nm] and tilts [degrees]; what is not named stays."""
        return Stage(
            _scaled(x_nm, _NM),
            _scaled(y_nm, _NM),
            _scaled(z_nm, _NM),
            _scaled(alpha_deg, _DEGREE),
            _scaled(beta_deg, _DEGREE),
        )

    def optics(
        self,
        *,
        defocus_nm: float | None = None,
        semiangle_mrad: float | None = None,
        current_pA: float | None = None,
        C12_nm: tuple[float, float] | None = None,
        C21_nm: tuple[float, float] | None = None,
        C23_nm: tuple[float, float] | None = None,
        C30_um: float | None = None,
        energy_keV: float | None = None,
    ) -> Optics:
        """Change the probe-forming optics; what is not named stays. The defocus is ``-C10``."""
        return Optics(
            semiangle_rad=_scaled(semiangle_mrad, _MRAD),
            C10_m=_scaled(defocus_nm, -_NM),
            current_A=_scaled(current_pA, _PA),
            C12_m=_both(C12_nm, _NM, "C12_nm"),
            C21_m=_both(C21_nm, _NM, "C21_nm"),
            C23_m=_both(C23_nm, _NM, "C23_nm"),
            C30_m=_scaled(C30_um, _UM),
            energy_eV=_scaled(energy_keV, 1e-3),
        )

    def field(self, fov_nm: Size | None = None, *, rotation_deg: float | None = None) -> Field:
        """Choose the field of view in which places count from now on, about the centre of the largest one."""
        extent = None
        if fov_nm is not None:
            square = (float(fov_nm),) * 2 if np.ndim(fov_nm) == 0 else fov_nm  # type: ignore[arg-type]
            extent = _both(square, _NM, "fov_nm")  # type: ignore[arg-type]
        return Field(extent, _scaled(rotation_deg, _DEGREE))

    def detector(
        self,
        name: str,
        *,
        inserted: bool | None = None,
        gain: float | None = None,
        offset: float | None = None,
        exposure_ms: float | None = None,
        binning: Shape | None = None,
        camera_length_mm: float | None = None,
        inner_mrad: float | None = None,
        outer_mrad: float | None = None,
        energy_offset_eV: float | None = None,
        dispersion_eV: float | None = None,
    ) -> Detector:
        """Set up one detector; what is not named stays."""
        bins = (binning, binning) if isinstance(binning, int) else binning
        return Detector(
            name,
            inserted=inserted,
            gain=gain,
            offset=offset,
            exposure_s=_scaled(exposure_ms, _MS),
            binning=bins,
            camera_length_m=_scaled(camera_length_mm, _MM),
            inner_rad=_scaled(inner_mrad, _MRAD),
            outer_rad=_scaled(outer_mrad, _MRAD),
            energy_offset_eV=energy_offset_eV,
            dispersion_eV=dispersion_eV,
        )


def _does(
    drafted: Callable[Concatenate[Draft, P], Instruction],
) -> Callable[Concatenate[Words, P], dict[str, Any]]:
    """The word that carries out what a draft's word makes; it answers the state vector afterwards."""

    @wraps(drafted)
    def word(self: Words, /, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        exposure, _ = self.perform(drafted(self.draft, *args, **kwargs))
        return exposure.state

    return word


class Words(ABC):
    """What can be said to a microscope. Everything but ``report`` needs the lease."""

    @property
    @abstractmethod
    def info(self) -> InstrumentInfo:
        """What the instrument is."""

    @abstractmethod
    def perform(
        self,
        instruction: Instruction,
        command_id: str | None = None,
        data: str = "inline",
        progress: bool | Progress | None = None,
    ) -> tuple[Exposure, dict[str, Any]]:
        """Carry out an instruction."""

    @property
    def draft(self) -> Draft:
        """The same words, which make instructions and carry out nothing."""
        return Draft(self.info)

    probe = _does(Draft.probe)
    blank = _does(Draft.blank)
    unblank = _does(Draft.unblank)
    stage = _does(Draft.stage)
    optics = _does(Draft.optics)
    field = _does(Draft.field)
    detector = _does(Draft.detector)

    def report(self) -> dict[str, Any]:
        """The full state vector, as the instrument itself reports it now."""
        return self.perform(Report())[0].state

    def image(
        self,
        fov_nm: Size | None = None,
        shape: Shape = 256,
        dwell_us: float = 10.0,
        *,
        center_nm: Position | None = None,
        origin_nm: Position | None = None,
        rotation_deg: float = 0.0,
        detector: str = "HAADF",
        command_id: str | None = None,
        data: str | None = None,
        progress: bool | Progress | None = None,
    ) -> Signal:
        """Scan a rectangle.

        Parameters
        ----------
        fov_nm : float or pair, optional
            Width [nm], the height following from square pixels, or (height, width); without it the whole field.
        shape : int or pair
            Rows and columns of pixels.
        dwell_us : float
            Time a pixel [us].
        center_nm, origin_nm : pair, optional
            Centre or top-left corner (y, x) [nm]; without either the centre of the field.
        rotation_deg : float
            Turn of the scan about its centre [degrees], from +x towards +y.
        detector : str
            Such as ``HAADF`` or ``BF``.
        command_id : str, optional
            Repeating a command with its id answers the first result and exposes nothing.
        data : str, optional
            ``inline`` or ``reference``; without it by the size of the frames.
        progress : bool or callable, optional
            True draws a bar; a function is called with (positions done, positions in all).

        Returns
        -------
        Signal
            (y, x) [nm].
        """
        asked = self.draft.image(
            fov_nm,
            shape,
            dwell_us,
            center_nm=center_nm,
            origin_nm=origin_nm,
            rotation_deg=rotation_deg,
            detector=detector,
        )
        return self.measure(asked, command_id, data, progress)

    def diffraction(
        self,
        at_nm: ArrayLike | None = None,
        *,
        line_nm: tuple[Position, Position, int] | None = None,
        fov_nm: Size | None = None,
        shape: Shape | None = None,
        center_nm: Position | None = None,
        origin_nm: Position | None = None,
        rotation_deg: float = 0.0,
        dwell_ms: float = 1.0,
        command_id: str | None = None,
        data: str | None = None,
        progress: bool | Progress | None = None,
    ) -> Signal:
        """Record convergent-beam diffraction patterns.

        Parameters
        ----------
        at_nm : (2,) or (n, 2), optional
            One place (y, x) [nm] or several.
        line_nm : (start, stop, count), optional
            A line of ``count`` places from start to stop (y, x) [nm], both included.
        fov_nm, shape, center_nm, origin_nm, rotation_deg : optional
            A raster of ``shape`` (rows, columns) places; the others as in :meth:`image`. The places are the centres
            of the equal parts of the rectangle.
        dwell_ms : float
            Time at each place [ms].
        command_id, data, progress : optional
            As in :meth:`image`.

        Returns
        -------
        Signal
            (det_y, det_x) [mrad] for one place, (point, ...) for several, (distance [nm], ...) for a line and
            (scan_y, scan_x [nm], ...) for a raster.
        """
        asked = self.draft.diffraction(
            at_nm,
            line_nm=line_nm,
            fov_nm=fov_nm,
            shape=shape,
            center_nm=center_nm,
            origin_nm=origin_nm,
            rotation_deg=rotation_deg,
            dwell_ms=dwell_ms,
        )
        return self.measure(asked, command_id, data, progress, single=np.ndim(at_nm) == 1)  # type: ignore[arg-type]

    def spectrum(
        self,
        at_nm: ArrayLike | None = None,
        *,
        line_nm: tuple[Position, Position, int] | None = None,
        fov_nm: Size | None = None,
        shape: Shape | None = None,
        center_nm: Position | None = None,
        origin_nm: Position | None = None,
        rotation_deg: float = 0.0,
        dwell_ms: float = 10.0,
        command_id: str | None = None,
        data: str | None = None,
        progress: bool | Progress | None = None,
    ) -> Signal:
        """Record energy-loss spectra; the words are those of :meth:`diffraction`.

        Returns
        -------
        Signal
            (energy_loss) [eV] for one place, (point, energy_loss), (distance, energy_loss) or (y, x, energy_loss).
        """
        asked = self.draft.spectrum(
            at_nm,
            line_nm=line_nm,
            fov_nm=fov_nm,
            shape=shape,
            center_nm=center_nm,
            origin_nm=origin_nm,
            rotation_deg=rotation_deg,
            dwell_ms=dwell_ms,
        )
        return self.measure(asked, command_id, data, progress, single=np.ndim(at_nm) == 1)  # type: ignore[arg-type]

    def measure(
        self,
        instruction: Image | Diffraction | Spectrum,
        command_id: str | None = None,
        data: str | None = None,
        progress: bool | Progress | None = None,
        *,
        single: bool = False,
    ) -> Signal:
        """Carry out an exposing instruction; its frames with axes, units and where they come from.

        ``metadata`` has the instruction, the command id, the epoch and times of the acquisition, the SHA-256 of the
        frames as in the server's audit, the electrons a frame, and the state vector. With ``single`` the one position
        of the instruction gets no axis.
        """
        if data is None:
            data = "reference" if self._bytes(instruction) > INLINE_BYTES else "inline"
        exposure, proof = self.perform(instruction, command_id, data, progress)
        return label(exposure, instruction, self.info, proof, single)

    def _bytes(self, asked: Instruction) -> int:
        """About how many bytes the frames will have."""
        camera, loss = self.info.camera, self.info.energy_loss
        each = {"diffraction": 2 * math.prod(camera.shape) if camera else 0, "spectrum": 4 * loss[2] if loss else 0}
        return each.get(asked.kind, 4) * asked.exposed_positions


__all__ = ["Draft", "Words"]
