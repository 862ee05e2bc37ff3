"""From frames to signals: which axis is which, in what unit, and where the frames come from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stemloop.core.errors import InstrumentError
from stemloop.core.instruction import Diffraction, Image, Line, Raster, Spectrum
from stemloop.core.protocols import Exposure, InstrumentInfo
from stemloop.core.signal import Axis, Signal
from stemloop.instrument import wire

_PER_NM = 1e9
_PER_MRAD = 1e3


def label(
    exposure: Exposure,
    asked: Image | Diffraction | Spectrum,
    info: InstrumentInfo,
    proof: dict[str, Any],
    single: bool = False,
) -> Signal:
    """The frames of an exposure as a signal; ``proof`` goes into the metadata. See ``Words.measure``."""
    frames = exposure.frames
    if frames is None or len(frames) == 0:
        raise InstrumentError(f"the instrument answered no frames to {asked.kind}.")
    metadata: dict[str, Any] = {
        "instrument": info.name,
        "kind": asked.kind,
        "beam_energy_eV": exposure.state.get("energy_eV", info.energy_eV),
        "electrons": exposure.electrons,
        "electrons_total": exposure.electrons * asked.exposed_positions,
        **proof,
        "epoch": exposure.epoch,
        "began_s": exposure.began_s,
        "ended_s": exposure.ended_s,
        "instruction": wire.instruction_to_message(asked),
        "state": exposure.state,
        "calibration": exposure.calibration,
    }
    if isinstance(asked, Image):
        metadata["detector"] = asked.detector
        return Signal(frames[0], _image_axes(asked, frames[0].shape), metadata)
    frame_axes = _pattern_axes(exposure, info) if isinstance(asked, Diffraction) else _spectrum_axes(exposure, info)
    places = asked.positions_m
    if single and len(frames) == 1:
        metadata["position_nm"] = [value * _PER_NM for value in places[0]]
        return Signal(frames[0], frame_axes, metadata)
    scan = _scan_axes(places, spectra=isinstance(asked, Spectrum))
    if len(scan) == 1 and scan[0].name == "point":
        metadata["positions_nm"] = (np.asarray(places, dtype=np.float64) * _PER_NM).tolist()
    return Signal(frames.reshape(*(axis.size for axis in scan), *frames.shape[1:]), (*scan, *frame_axes), metadata)


def _image_axes(asked: Image, shape: tuple[int, ...]) -> tuple[Axis, ...]:
    """Along the scan's own rows and columns; a turned scan keeps the corner it had before it was turned."""
    steps = (asked.extent_m[i] / asked.shape[i] * _PER_NM for i in (0, 1))
    named = zip("yx", shape, steps, asked.origin_m, strict=True)
    return tuple(Axis(name, size, step, start * _PER_NM, "nm") for name, size, step, start in named)


def _scan_axes(places: Any, spectra: bool) -> tuple[Axis, ...]:
    if isinstance(places, Raster):
        names = ("y", "x") if spectra else ("scan_y", "scan_x")
        steps = [places.extent_m[i] / places.shape[i] * _PER_NM for i in (0, 1)]
        return tuple(
            Axis(names[i], int(places.shape[i]), steps[i], places.origin_m[i] * _PER_NM + steps[i] / 2, "nm")
            for i in (0, 1)
        )
    if isinstance(places, Line):
        step = math.dist(places.start_m, places.stop_m) / max(1, places.count - 1)
        return (Axis("distance", len(places), step * _PER_NM, 0.0, "nm"),)
    return (Axis("point", len(places), 1.0, 0.0, ""),)


def _pattern_axes(exposure: Exposure, info: InstrumentInfo) -> tuple[Axis, ...]:
    assert exposure.frames is not None
    known, camera = exposure.calibration, info.camera
    pixel_rad = float(known.get("pixel_rad") or (camera.pixel_rad if camera else 0.0))
    centre = known.get("centre_px") or (camera.centre_px if camera else (0.0, 0.0))
    unit, step = ("mrad", pixel_rad * _PER_MRAD) if pixel_rad else ("px", 1.0)
    named = zip(("det_y", "det_x"), exposure.frames.shape[1:], centre, strict=True)
    return tuple(Axis(name, size, step, -float(middle) * step, unit) for name, size, middle in named)


def _spectrum_axes(exposure: Exposure, info: InstrumentInfo) -> tuple[Axis, ...]:
    assert exposure.frames is not None
    size = exposure.frames.shape[-1]
    known = exposure.calibration.get("energy_loss") or info.energy_loss
    offset, step = (float(known[0]), float(known[1])) if known else (0.0, 1.0)
    return (Axis("energy_loss", size, step, offset, "eV" if known else "px"),)
