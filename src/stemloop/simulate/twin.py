"""The digital twin: a simulated STEM behind the same socket as a real one.

Time is simulated: a clock advances with the beam time and the settling of each command. Stage drift and the slow drift
of the defocus are functions of that clock. The noise of a command comes from the twin's seed and the command's key and
from nothing else, so that a repeat under the same key and state gives the same frames.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import Aborted, InputError, InstrumentError, LimitError
from stemloop.core.field import absolute, chosen
from stemloop.core.instruction import (
    DETECTORS,
    Blank,
    Detector,
    Diffraction,
    Field,
    Image,
    Instruction,
    Optics,
    Probe,
    Report,
    Stage,
)
from stemloop.core.protocols import Exposure, InstrumentInfo
from stemloop.core.units import electrons, probe_fwhm_m
from stemloop.simulate.camera import Counting, as_counts
from stemloop.simulate.elasticity import Array
from stemloop.simulate.haadf import RING_RAD, Haadf
from stemloop.simulate.imaging import CBED_PIXELS, FWHM_TO_SIGMA, Aberrations, Scattering, camera
from stemloop.simulate.specimens import SPECIMENS, Sample


@dataclass(frozen=True)
class Setting:
    """Usual optics for a specimen: beam energy [eV] and semiangles [rad] of the image and of the nano-beam."""

    energy_eV: float
    imaging_rad: float
    diffraction_rad: float
    source_points: int
    configurations: int


#: More source points (each with its own frozen-phonon configuration) where a slice more costs little.
SETTINGS = {
    "MoS2": Setting(80e3, 28e-3, 7e-3, source_points=6, configurations=6),
    "graphene": Setting(60e3, 30e-3, 9e-3, source_points=6, configurations=6),
    "SrTiO3": Setting(200e3, 22e-3, 3e-3, source_points=3, configurations=3),
}

_SETTLE_S = {"image": 0.2, "diffraction": 0.002, "stage": 2.0, "optics": 1.0, "field": 1.0, "detector": 1.0}
_STAGE_SHIFT_M, _STAGE_HEIGHT_M, _STAGE_TILT_RAD = 0.3e-9, 200e-9, 0.03
_SEMIANGLE_RAD = (2e-3, 35e-3)
#: Largest aberrations that the twin's windows hold: the probe stays smaller than they are.
_ABERRATION_M = {"C12_m": 50e-9, "C21_m": 2e-6, "C23_m": 2e-6, "C30_m": 50e-6}
#: The largest image by full multislice (all detectors but HAADF) [pixels].
MULTISLICE_PIXELS = 128 * 128
#: What the state did not have before instructions of version 2.
_SINCE_2 = (
    *_ABERRATION_M,
    "field_height_m",
    "field_width_m",
    "field_rotation_rad",
    "camera_binning",
)
_DRIFT_REACH_M, _DRIFT_TIME_S = 0.5e-9, 900.0
_DEFOCUS_REACH_M, _DEFOCUS_PERIOD_S, _DEFOCUS_STEP_M = 3e-9, 2400.0, 1e-9


class Twin:
    """A simulated STEM with a specimen whose truth it knows; implements :class:`stemloop.core.protocols.Instrument`.

    Parameters
    ----------
    specimen : a name of :data:`~stemloop.simulate.specimens.SPECIMENS`, or a sample that was built elsewhere.
    seed : of the specimen, the drift and, with each command's key, the noise.
    current_A, source_fwhm_m : beam current [A] and size of the source at the specimen [m].
    counting : the pixelated detector. drifts : whether stage and defocus drift.
    damage_barn : knock-on cross-section [barn] of S or C atoms; None for a specimen that the beam does not harm.
        An atom leaves with probability ``1 - exp(-cross-section x electrons per area)`` after the exposure.
    """

    def __init__(
        self,
        specimen: str | Sample,
        seed: int = 0,
        *,
        current_A: float = 100e-12,
        source_fwhm_m: float = 0.7e-10,
        counting: Counting | None = None,
        drifts: bool = True,
        damage_barn: float | None = None,
    ) -> None:
        self._pristine = SPECIMENS[specimen](seed) if isinstance(specimen, str) else specimen
        self._seed = seed
        self._setting = SETTINGS[self._pristine.material]
        self._counting = counting or Counting(psf_sigma_px=0.4)
        self._damage_barn = damage_barn
        rng = np.random.default_rng([seed, 7])
        angle = rng.uniform(0, 2 * math.pi)
        self._drift_m = _DRIFT_REACH_M * np.array([math.sin(angle), math.cos(angle)]) * (1.0 if drifts else 0.0)
        self._defocus_m = _DEFOCUS_REACH_M * (1.0 if drifts else 0.0)
        self._info = InstrumentInfo(
            name=f"twin of a {self._setting.energy_eV / 1e3:.0f} kV STEM",
            instructions=("image", "diffraction", "probe", "blank", "optics", "stage", "field", "detector", "report"),
            detectors=DETECTORS,
            field_m=self._pristine.field_m,
            energy_eV=self._setting.energy_eV,
            source_fwhm_m=source_fwhm_m,
            camera=camera(self._setting.energy_eV),
            sample={
                "name": self._pristine.name,
                "material": self._pristine.material,
                "nominal_thickness_m": self._pristine.thickness_m,
            },
        )
        self._state: dict[str, Any] = {
            "clock_s": 0.0,
            "semiangle_rad": self._setting.imaging_rad,
            "C10_m": 0.0,
            "C12_m": [0.0, 0.0],
            "C21_m": [0.0, 0.0],
            "C23_m": [0.0, 0.0],
            "C30_m": 0.0,
            "current_A": current_A,
            "blanked": 0,
            "probe_y_m": self.info.field_m[0] / 2,
            "probe_x_m": self.info.field_m[1] / 2,
            "stage_x_m": 0.0,
            "stage_y_m": 0.0,
            "stage_z_m": 0.0,
            "stage_alpha_rad": 0.0,
            "stage_beta_rad": 0.0,
            "field_height_m": self.info.field_m[0],
            "field_width_m": self.info.field_m[1],
            "field_rotation_rad": 0.0,
            "camera_binning": [1, 1],
            "electrons": 0.0,
            "exposed_positions": 0,
            "lost_atoms": [],
        }
        self._sample: Sample | None = None
        self._scattering: Scattering | None = None
        self._haadf: tuple[Any, Haadf] | None = None
        self._stop = threading.Event()
        self.progress: Callable[[int, int], None] | None = None

    # ------------------------------------------------------------------------------------------ the socket

    @property
    def info(self) -> InstrumentInfo:
        return self._info

    @property
    def prompt(self) -> frozenset[str]:
        """Whatever does not expose only sets a few numbers."""
        return frozenset({"probe", "blank", "optics", "stage", "field", "detector", "report"})

    def state(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, list) else value for name, value in self._state.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave; another set of names is an :class:`InputError`."""
        state = {**{name: self._state[name] for name in _SINCE_2}, **state}
        if set(state) != set(self._state):
            odd = ", ".join(sorted(set(state) ^ set(self._state)))
            raise InputError(f"this is no state of a twin: {odd} missing or unknown. Give back what state() returned.")
        if state["lost_atoms"] != self._state["lost_atoms"]:
            self._forget()
        self._state = {name: list(value) if isinstance(value, list) else value for name, value in state.items()}

    def execute(self, instruction: Instruction, key: str) -> Exposure:
        """Carry out one instruction; ``key`` seeds its noise. Settings outside the twin's range are a
        :class:`LimitError`, exposures with a blanked beam an :class:`InstrumentError`; then nothing has changed."""
        try:
            return self._execute(instruction, key)
        finally:
            self._stop.clear()

    def abort(self) -> None:
        """End the exposure that runs; its ``execute`` blanks the beam and raises ``Aborted``. From any thread."""
        self._stop.set()

    def _execute(self, instruction: Instruction, key: str) -> Exposure:
        if instruction.exposes and self._state["blanked"]:
            raise InstrumentError("the beam is blanked; send Blank(blanked=False) before an exposure.")
        match instruction:
            case Image():
                return self._image(instruction, key)
            case Diffraction():
                return self._diffraction(instruction, key)
            case Probe():
                self._inside(np.array([instruction.position_m]))
                self._state["probe_y_m"], self._state["probe_x_m"] = instruction.position_m
            case Blank():
                self._state["blanked"] = int(instruction.blanked)
            case Optics():
                self._change_optics(instruction)
            case Stage():
                self._move_stage(instruction)
            case Field():
                self._choose_field(instruction)
            case Detector():
                self._set_up(instruction)
            case Report():
                pass
            case _:
                known = ", ".join(self.info.instructions)
                raise InstrumentError(f"this twin cannot carry out {instruction.kind!r}; it knows {known}.")
        self._state["clock_s"] += _SETTLE_S.get(instruction.kind, 0.0)
        return Exposure(None, 0.0, self.state())

    def close(self) -> None:
        """Free the simulated specimen's arrays."""
        self._forget()

    # --------------------------------------------------------------------------------- the specimen's side

    @property
    def sample(self) -> Sample:
        """The specimen as it is now, with its truth; for scoring, not for the loop."""
        if self._sample is None:
            lost = np.array(self._state["lost_atoms"], dtype=np.int64)
            self._sample = self._pristine.without(lost) if len(lost) else self._pristine
        return self._sample

    def write_truth(self, path: str) -> None:
        """Write the specimen's truth to ``path`` (npz): see :meth:`Sample.write_truth`."""
        self.sample.write_truth(path)

    def drift_m(self, clock_s: float | NDArray[np.float64]) -> NDArray[np.float64]:
        """How far (..., 2) (y, x) [m] the specimen has moved under the scan at a time: the stage settles
        exponentially, at first by about 0.03 nm a minute."""
        settled = 1 - np.exp(-np.asarray(clock_s, dtype=np.float64) / _DRIFT_TIME_S)
        return np.asarray(settled[..., None] * self._drift_m)

    def _forget(self) -> None:
        self._sample, self._scattering, self._haadf = None, None, None

    def _on_sample(self, positions: NDArray[np.float64], clock_s: float | NDArray[np.float64]) -> NDArray[np.float64]:
        stage = np.array([self._state["stage_y_m"], self._state["stage_x_m"]])
        return absolute(positions, self._state, self.info.field_m) - self.drift_m(clock_s) - stage

    def _defocused_m(self, clock_s: float) -> float:
        wander = self._defocus_m * math.sin(2 * math.pi * clock_s / _DEFOCUS_PERIOD_S)
        C10_m = self._state["C10_m"] + self._state["stage_z_m"] + wander
        return round(C10_m / _DEFOCUS_STEP_M) * _DEFOCUS_STEP_M

    def _noise(self, key: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self._seed}:{key}".encode()).digest()
        return np.random.default_rng(np.random.SeedSequence(int.from_bytes(digest[:16], "big")))

    # ------------------------------------------------------------------------------------------ exposures

    def _aberrations(self) -> Aberrations:
        state = self._state
        return tuple(float(c) for c in (*state["C12_m"], *state["C21_m"], *state["C23_m"], state["C30_m"]))

    def _scatter(self) -> Scattering:
        if self._scattering is None:
            setting = self._setting
            self._scattering = Scattering(
                self.sample,
                setting.energy_eV,
                phonons=(setting.configurations, self._seed),
                source_points=setting.source_points,
            )
        return self._scattering

    def _optics(self, time: float) -> dict[str, Any]:
        """The probe at a time, as :class:`Scattering` takes it."""
        state = self._state
        return {
            "semiangle_rad": state["semiangle_rad"],
            "C10_m": self._defocused_m(time),
            "tilt_rad": (state["stage_alpha_rad"], state["stage_beta_rad"]),
            "source_fwhm_m": self.info.source_fwhm_m,
            "aberrations": self._aberrations(),
        }

    def _reached(self, done: int, of: int) -> bool:
        """Tell how far the exposure is; False if it is to end here."""
        if self.progress is not None:
            self.progress(done, of)
        return done == of or not self._stop.is_set()

    def _end(self, done: int, of: int) -> Aborted:
        self._state["blanked"] = 1
        return Aborted(f"the command was ended after {done} of {of} positions; they count as exposed.", done)

    def _diffraction(self, asked: Diffraction, key: str) -> Exposure:
        positions = np.array(asked.positions_m, dtype=np.float64)
        self._inside(positions)
        scattering = self._scatter()
        rng, state = self._noise(key), self._state
        number = electrons(state["current_A"], asked.dwell_s)
        each_s = _SETTLE_S["diffraction"] + asked.dwell_s
        times = state["clock_s"] + each_s * (np.arange(len(positions)) + 0.5)
        places = self._on_sample(positions, times)
        patterns: list[NDArray[np.float32]] = []
        while self._reached(len(patterns), len(positions)) and len(patterns) < len(positions):
            y, x = places[len(patterns)]
            patterns.append(scattering.cbed((y, x), **self._optics(times[len(patterns)])))
        done = len(patterns)
        frames = [rng.poisson(self._counting.mean(pattern, number)) for pattern in patterns]
        self._account(number, done, each_s * done)
        probe_m = probe_fwhm_m(self.info.energy_eV, state["semiangle_rad"], self.info.source_fwhm_m)
        self._harm(rng, places[:done], number, probe_m * FWHM_TO_SIGMA)
        state["probe_y_m"], state["probe_x_m"] = (float(p) for p in positions[max(done - 1, 0)])
        if done < len(positions):
            raise self._end(done, len(positions))
        assert self.info.camera is not None
        binning = state["camera_binning"][0]
        calibration = {
            "pixel_rad": self.info.camera.pixel_rad * binning,
            "centre_px": [(centre + 0.5) / binning - 0.5 for centre in self.info.camera.centre_px],
            "positions_m": positions.tolist(),
        }
        return self._exposed(asked, as_counts(_binned(np.stack(frames), binning)), number, calibration)

    def _image(self, asked: Image, key: str) -> Exposure:
        rows, columns = asked.shape
        grid = asked.positions()
        self._inside(grid[[0, 0, -1, -1], [0, -1, 0, -1]])
        rng, state = self._noise(key), self._state
        signal, ring_rad = self._signal(asked)
        number = electrons(state["current_A"], asked.dwell_s)
        times = state["clock_s"] + asked.dwell_s * np.arange(rows * columns).reshape(rows, columns)
        places = self._on_sample(grid, times)
        frame = np.zeros((rows, columns), np.int64)
        done, at_once = 0, max(1, 4096 // columns) if asked.detector == "HAADF" else 1
        while self._reached(done * columns, rows * columns) and done < rows:
            part = slice(done, min(done + at_once, rows))
            frame[part] = rng.poisson(signal(places[part], times[part]) * number)
            done = part.stop
        self._account(number, done * columns, _SETTLE_S["image"] + done * columns * asked.dwell_s)
        self._harm(rng, places[:done].reshape(-1, 2), number, math.sqrt(asked.pixel_m[0] * asked.pixel_m[1]))
        state["probe_y_m"], state["probe_x_m"] = (float(p) for p in grid[max(done - 1, 0), -1])
        if done < rows:
            raise self._end(done * columns, rows * columns)
        calibration = {
            "pixel_m": list(asked.pixel_m),
            "origin_m": list(asked.origin_m),
            "rotation_rad": asked.rotation_rad,
            "detector": asked.detector,
            "ring_rad": list(ring_rad),
        }
        return self._exposed(asked, as_counts(frame)[None], number, calibration)

    def _signal(self, asked: Image) -> tuple[Callable[[Array, Array], Array], tuple[float, float]]:
        """The fraction of the beam that the detector takes, as a function of places and times, and its angles [rad]."""
        state, semiangle_rad = self._state, self._state["semiangle_rad"]
        if asked.detector == "HAADF":
            probe = (semiangle_rad, self._defocused_m(state["clock_s"]), self._aberrations())
            if self._haadf is None or self._haadf[0] != probe:
                source_m = self.info.source_fwhm_m
                haadf = Haadf(self.sample, self.info.energy_eV, *probe[:2], source_m, aberrations=probe[2])
                self._haadf = (probe, haadf)
            image = self._haadf[1]
            return (lambda places, times: image(places[..., 0], places[..., 1])), RING_RAD
        if asked.exposed_positions > MULTISLICE_PIXELS:
            raise LimitError(
                f"{asked.detector} images of this twin are full multislice, at most {MULTISLICE_PIXELS} pixels; "
                f"{asked.exposed_positions} were asked. Ask for fewer pixels, or for HAADF."
            )
        scattering = self._scatter()
        ring_rad = {
            "BF": (0.0, semiangle_rad / 2),
            "ABF": (semiangle_rad / 2, semiangle_rad),
            "ADF": (1.2 * semiangle_rad, min(RING_RAD[0], scattering.largest_rad)),
        }[asked.detector]

        if ring_rad[0] >= ring_rad[1]:
            raise LimitError(
                f"with a semiangle of {semiangle_rad:g} rad nothing is left for {asked.detector} below {ring_rad[1]:g} "
                "rad: ask for a smaller semiangle, or for HAADF."
            )

        def multislice(places: Array, times: Array) -> Array:
            flat = zip(places.reshape(-1, 2), times.ravel(), strict=True)
            signal = [scattering.ring((y, x), ring_rad, **self._optics(time)) for (y, x), time in flat]
            return np.array(signal).reshape(times.shape)

        return multislice, ring_rad

    def _exposed(self, asked: Image | Diffraction, frames: Any, number: float, calibration: dict[str, Any]) -> Exposure:
        common = {
            "energy_eV": self.info.energy_eV,
            "semiangle_rad": self._state["semiangle_rad"],
            "dwell_s": asked.dwell_s,
        }
        return Exposure(frames, number, self.state(), {**common, **calibration})

    def _account(self, number: float, positions: int, seconds: float) -> None:
        self._state["clock_s"] += seconds
        self._state["electrons"] += number * positions
        self._state["exposed_positions"] += positions

    def _harm(self, rng: np.random.Generator, places: NDArray[np.float64], number: float, sigma_m: float) -> None:
        """Knock out light atoms: each exposure spreads its electrons as a Gaussian of rms ``sigma_m``."""
        if self._damage_barn is None:
            return
        weak = np.flatnonzero(np.isin(self._pristine.atoms.symbols, ["S", "C"]))
        weak = np.setdiff1d(weak, self._state["lost_atoms"])
        atoms = self._pristine.position_m(weak)
        fluence = np.zeros(len(weak))
        for start in range(0, len(places), 512):
            squared = ((atoms[:, None] - places[start : start + 512]) ** 2).sum(axis=2)
            fluence += np.exp(-squared / (2 * sigma_m**2)).sum(axis=1)
        fluence *= number / (2 * math.pi * sigma_m**2)
        gone = weak[rng.random(len(weak)) < -np.expm1(-self._damage_barn * 1e-28 * fluence)]
        if len(gone):
            self._forget()
            self._state["lost_atoms"] = sorted(self._state["lost_atoms"] + [int(i) for i in gone])

    # -------------------------------------------------------------------------------------------- settings

    def _inside(self, positions: NDArray[np.float64]) -> None:
        slack, extent_m = 1e-12, chosen(self._state, self.info.field_m)[0]
        if np.any(positions < -slack) or np.any(positions > np.array(extent_m) + slack):
            height, width = (extent * 1e9 for extent in extent_m)
            raise LimitError(f"a position lies outside the field of {height:g} x {width:g} nm; stay inside it.")

    def _change_optics(self, asked: Optics) -> None:
        low, high = _SEMIANGLE_RAD
        if asked.semiangle_rad is not None and not low <= asked.semiangle_rad <= high:
            raise LimitError(f"semiangle_rad {asked.semiangle_rad:g} is outside {low:g} to {high:g}.")
        if asked.C10_m is not None and abs(asked.C10_m) > _STAGE_HEIGHT_M:
            raise LimitError(f"C10_m {asked.C10_m:g} is outside +-{_STAGE_HEIGHT_M:g}.")
        if asked.current_A is not None and asked.current_A > 10e-9:
            raise LimitError(f"current_A {asked.current_A:g} is above 1e-8.")
        if asked.energy_eV is not None and asked.energy_eV != self.info.energy_eV:
            raise LimitError(f"this twin's beam energy is fixed at {self.info.energy_eV:g} eV; leave energy_eV out.")
        for name, reach in _ABERRATION_M.items():
            if (value := getattr(asked, name)) is not None and np.max(np.abs(value)) > reach:
                raise LimitError(f"{name} {value} is outside +-{reach:g} for this twin; nothing has changed.")
        for name in ("semiangle_rad", "C10_m", "current_A", *_ABERRATION_M):
            if (value := getattr(asked, name)) is not None:
                self._state[name] = [float(v) for v in value] if isinstance(value, tuple) else float(value)

    def _choose_field(self, asked: Field) -> None:
        extent_m, rotation_rad = chosen(self._state, self.info.field_m)
        extent_m = asked.extent_m or extent_m
        rotation_rad = rotation_rad if asked.rotation_rad is None else asked.rotation_rad
        wanted = {"field_height_m": extent_m[0], "field_width_m": extent_m[1], "field_rotation_rad": rotation_rad}
        corners = absolute(np.array(extent_m) * [[0, 0], [0, 1], [1, 0], [1, 1]], wanted, self.info.field_m)
        if np.any(corners < -1e-12) or np.any(corners > np.array(self.info.field_m) + 1e-12):
            raise LimitError("this field of view reaches out of the largest one: ask for a smaller extent or turn.")
        self._state.update({name: float(value) for name, value in wanted.items()})

    def _set_up(self, asked: Detector) -> None:
        settings = {f.name for f in dataclasses.fields(asked) if getattr(asked, f.name) is not None} - {"name"}
        if asked.name != "camera" or settings - {"binning"}:
            raise LimitError(
                f"this twin has no setting {', '.join(sorted(settings)) or 'at all'} of {asked.name!r}; it has the "
                "binning of 'camera'."
            )
        if asked.binning is not None:
            if asked.binning[0] != asked.binning[1] or CBED_PIXELS % asked.binning[0]:
                raise LimitError(f"binning {asked.binning} is not square or does not divide {CBED_PIXELS} pixels.")
            self._state["camera_binning"] = [int(n) for n in asked.binning]

    def _move_stage(self, asked: Stage) -> None:
        reach: dict[str, float] = {
            "x_m": _STAGE_SHIFT_M,
            "y_m": _STAGE_SHIFT_M,
            "z_m": _STAGE_HEIGHT_M,
            "alpha_rad": _STAGE_TILT_RAD,
            "beta_rad": _STAGE_TILT_RAD,
        }
        wanted = {name: getattr(asked, name) for name in reach if getattr(asked, name) is not None}
        for name, value in wanted.items():
            if abs(value) > reach[name]:
                raise LimitError(f"stage {name} {value:g} is outside +-{reach[name]:g}; nothing moved.")
        self._state.update({f"stage_{name}": float(value) for name, value in wanted.items()})


def _binned(frames: NDArray[np.int64], binning: int) -> NDArray[np.int64]:
    """Frames (n, y, x) with ``binning`` x ``binning`` pixels added up."""
    n, rows, columns = frames.shape
    parts = frames.reshape(n, rows // binning, binning, columns // binning, binning)
    return np.asarray(parts.sum(axis=(2, 4)))
