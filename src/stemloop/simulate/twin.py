"""The digital twin: a simulated STEM behind the same socket as a real one.

Time is simulated: a clock advances with the beam time and the settling of each command. Stage drift and the slow drift
of the defocus are functions of that clock. The noise of a command comes from the twin's seed and the command's key and
from nothing else, so that a repeat under the same key and state gives the same frames.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError, InstrumentError, LimitError
from stemloop.core.instruction import Blank, Diffraction, Image, Instruction, Optics, Probe, Report, Stage
from stemloop.core.protocols import Exposure, InstrumentInfo
from stemloop.core.units import electrons, probe_fwhm_m
from stemloop.simulate.camera import Counting, as_counts
from stemloop.simulate.haadf import RING_RAD, Haadf
from stemloop.simulate.imaging import FWHM_TO_SIGMA, Scattering, camera
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

_SETTLE_S = {"image": 0.2, "diffraction": 0.002, "stage": 2.0, "optics": 1.0}
_STAGE_SHIFT_M, _STAGE_HEIGHT_M, _STAGE_TILT_RAD = 0.3e-9, 200e-9, 0.03
_SEMIANGLE_RAD = (2e-3, 35e-3)
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
            instructions=("image", "diffraction", "probe", "blank", "optics", "stage", "report"),
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
            "current_A": current_A,
            "blanked": 0,
            "probe_y_m": self.info.field_m[0] / 2,
            "probe_x_m": self.info.field_m[1] / 2,
            "stage_x_m": 0.0,
            "stage_y_m": 0.0,
            "stage_z_m": 0.0,
            "stage_alpha_rad": 0.0,
            "stage_beta_rad": 0.0,
            "electrons": 0.0,
            "exposed_positions": 0,
            "lost_atoms": [],
        }
        self._sample: Sample | None = None
        self._scattering: Scattering | None = None
        self._haadf: tuple[tuple[float, float], Haadf] | None = None

    # ------------------------------------------------------------------------------------------ the socket

    @property
    def info(self) -> InstrumentInfo:
        return self._info

    def state(self) -> dict[str, Any]:
        return {**self._state, "lost_atoms": list(self._state["lost_atoms"])}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave; another set of names is an :class:`InputError`."""
        if set(state) != set(self._state):
            odd = ", ".join(sorted(set(state) ^ set(self._state)))
            raise InputError(f"this is no state of a twin: {odd} missing or unknown. Give back what state() returned.")
        if state["lost_atoms"] != self._state["lost_atoms"]:
            self._forget()
        self._state = {**state, "lost_atoms": list(state["lost_atoms"])}

    def execute(self, instruction: Instruction, key: str) -> Exposure:
        """Carry out one instruction; ``key`` seeds its noise. Settings outside the twin's range are a
        :class:`LimitError`, exposures with a blanked beam an :class:`InstrumentError`; then nothing has changed."""
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
        return positions - self.drift_m(clock_s) - stage

    def _defocused_m(self, clock_s: float) -> float:
        wander = self._defocus_m * math.sin(2 * math.pi * clock_s / _DEFOCUS_PERIOD_S)
        C10_m = self._state["C10_m"] + self._state["stage_z_m"] + wander
        return round(C10_m / _DEFOCUS_STEP_M) * _DEFOCUS_STEP_M

    def _noise(self, key: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self._seed}:{key}".encode()).digest()
        return np.random.default_rng(np.random.SeedSequence(int.from_bytes(digest[:16], "big")))

    # ------------------------------------------------------------------------------------------ exposures

    def _diffraction(self, asked: Diffraction, key: str) -> Exposure:
        positions = np.array(asked.positions_m, dtype=np.float64)
        self._inside(positions)
        if self._scattering is None:
            setting = self._setting
            self._scattering = Scattering(
                self.sample,
                setting.energy_eV,
                phonons=(setting.configurations, self._seed),
                source_points=setting.source_points,
            )
        rng, state = self._noise(key), self._state
        number = electrons(state["current_A"], asked.dwell_s)
        each_s = _SETTLE_S["diffraction"] + asked.dwell_s
        times = state["clock_s"] + each_s * (np.arange(len(positions)) + 0.5)
        places = self._on_sample(positions, times)
        tilt_rad = (state["stage_alpha_rad"], state["stage_beta_rad"])
        patterns = [
            self._scattering.cbed(
                (place[0], place[1]),
                state["semiangle_rad"],
                self._defocused_m(time),
                tilt_rad,
                self.info.source_fwhm_m,
            )
            for place, time in zip(places, times, strict=True)
        ]
        frames = np.stack([rng.poisson(self._counting.mean(pattern, number)) for pattern in patterns])
        self._account(number, len(positions), each_s * len(positions))
        probe_m = probe_fwhm_m(self.info.energy_eV, state["semiangle_rad"], self.info.source_fwhm_m)
        self._harm(rng, places, number, probe_m * FWHM_TO_SIGMA)
        state["probe_y_m"], state["probe_x_m"] = (float(p) for p in positions[-1])
        assert self.info.camera is not None
        calibration = {
            "pixel_rad": self.info.camera.pixel_rad,
            "centre_px": list(self.info.camera.centre_px),
            "positions_m": positions.tolist(),
        }
        return self._exposed(asked, as_counts(frames), number, calibration)

    def _image(self, asked: Image, key: str) -> Exposure:
        if asked.detector != "HAADF":
            raise InstrumentError(f"there is no detector {asked.detector!r} here; the ring detector is 'HAADF'.")
        rows, columns = asked.shape
        pixel = (asked.extent_m[0] / rows, asked.extent_m[1] / columns)
        y = asked.origin_m[0] + pixel[0] * np.arange(rows)
        x = asked.origin_m[1] + pixel[1] * np.arange(columns)
        self._inside(np.array([[y[0], x[0]], [y[-1], x[-1]]]))
        rng, state = self._noise(key), self._state
        probe = (state["semiangle_rad"], self._defocused_m(state["clock_s"]))
        if self._haadf is None or self._haadf[0] != probe:
            self._haadf = (probe, Haadf(self.sample, self.info.energy_eV, *probe, self.info.source_fwhm_m))
        number = electrons(state["current_A"], asked.dwell_s)
        times = state["clock_s"] + asked.dwell_s * np.arange(rows * columns).reshape(rows, columns)
        grid = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)
        places = self._on_sample(grid, times)
        signal = self._haadf[1](places[..., 0], places[..., 1])
        frame = as_counts(rng.poisson(signal * number))
        self._account(number, rows * columns, _SETTLE_S["image"] + asked.beam_time_s)
        self._harm(rng, places.reshape(-1, 2), number, math.sqrt(pixel[0] * pixel[1]))
        state["probe_y_m"], state["probe_x_m"] = float(y[-1]), float(x[-1])
        calibration = {
            "pixel_size_m": list(pixel),
            "origin_m": list(asked.origin_m),
            "detector": asked.detector,
            "ring_rad": list(RING_RAD),
        }
        return self._exposed(asked, frame[None], number, calibration)

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
        slack = 1e-12
        if np.any(positions < -slack) or np.any(positions > np.array(self.info.field_m) + slack):
            height, width = (extent * 1e9 for extent in self.info.field_m)
            raise LimitError(f"a position lies outside the field of {height:g} x {width:g} nm; stay inside it.")

    def _change_optics(self, asked: Optics) -> None:
        low, high = _SEMIANGLE_RAD
        if asked.semiangle_rad is not None and not low <= asked.semiangle_rad <= high:
            raise LimitError(f"semiangle_rad {asked.semiangle_rad:g} is outside {low:g} to {high:g}.")
        if asked.C10_m is not None and abs(asked.C10_m) > _STAGE_HEIGHT_M:
            raise LimitError(f"C10_m {asked.C10_m:g} is outside +-{_STAGE_HEIGHT_M:g}.")
        if asked.current_A is not None and asked.current_A > 10e-9:
            raise LimitError(f"current_A {asked.current_A:g} is above 1e-8.")
        for name in ("semiangle_rad", "C10_m", "current_A"):
            if (value := getattr(asked, name)) is not None:
                self._state[name] = float(value)

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
