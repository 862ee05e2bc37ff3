"""The words that notebooks use today, said in our instructions.

:class:`Vocabulary` knows the method names of two habits, those of asyncroscopy's microscope server (``place_beam``,
``acquire_scanned_image``, ``get_stage`` ...) and those of Nion Swift's instrument (``GetVal``, ``SetVal`` ...), and
converts their units: fractions of the field of view, degrees and picoamperes there, metres, radians and amperes here.
Arguments are checked here; whether a command may be carried out is the server's to say.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.instruction import (
    Blank,
    Diffraction,
    Image,
    Instruction,
    Optics,
    Position,
    Probe,
    Raster,
    Spectrum,
    Stage,
)
from stemloop.core.protocols import Exposure, Scope
from stemloop.instrument import wire

#: Detector names of the notebooks, the kind of instruction behind each, and its first settings: pixels along an edge
#: (``size``; for ``camera`` those of the raster of ``acquire_scanned_data_advanced``) and seconds a pixel
#: (``exposure``).
DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "haadf": ("image", {"size": 256, "exposure": 2e-6}),
    "camera": ("diffraction", {"size": 16, "exposure": 1e-3}),
    "eels": ("spectrum", {"size": 16, "exposure": 1e-2}),
}
_ALIASES = {"ceta_camera": "camera", "bm-ceta": "camera", "ronchigram": "camera", "cbed": "camera"}

_AXES = ("x_m", "y_m", "z_m", "alpha_rad", "beta_rad")

#: Controls of Nion Swift that can be read: the name in the state vector.
NION_READ = {
    "C10": "C10_m",
    "ConvergenceAngle": "semiangle_rad",
    "BeamCurrent": "current_A",
    "C_Blank": "blanked",
    "stage_position_m.x": "stage_x_m",
    "stage_position_m.y": "stage_y_m",
    "SShft.x": "stage_x_m",
    "SShft.y": "stage_y_m",
}
#: Those that can be set, and the instruction that sets each.
NION_WRITE: dict[str, Callable[[float], Instruction]] = {
    "C10": lambda value: Optics(C10_m=value),
    "ConvergenceAngle": lambda value: Optics(semiangle_rad=value),
    "BeamCurrent": lambda value: Optics(current_A=value),
    "C_Blank": lambda value: Blank(bool(value)),
    "stage_position_m.x": lambda value: Stage(x_m=value),
    "stage_position_m.y": lambda value: Stage(y_m=value),
    "SShft.x": lambda value: Stage(x_m=value),
    "SShft.y": lambda value: Stage(y_m=value),
}


def _number(name: str, value: Any) -> float:
    """``value`` as a finite float; what is no number is an InputError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number; got {type(value).__name__} {value!r:.40}.")
    return float(value)


def _pair(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InputError(f"{name} must be two numbers; got {type(value).__name__}.")
    return _number(name, value[0]), _number(name, value[1])


def as_message(array: NDArray[Any], **more: Any) -> dict[str, Any]:
    """An array as bytes, type and shape: ``numpy.frombuffer(r["data"], r["dtype"]).reshape(r["shape"])``."""
    whole = np.ascontiguousarray(array)
    return {"data": whole.tobytes(), "dtype": whole.dtype.str, "shape": list(whole.shape), **wire.plain(more)}


def as_array(message: dict[str, Any]) -> NDArray[Any]:
    """The array in a message of :func:`as_message`, read-only.

    >>> as_array(as_message(np.arange(6, dtype="u2").reshape(2, 3))).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    return np.frombuffer(message["data"], message["dtype"]).reshape(message["shape"])


class Vocabulary:
    """The notebooks' commands on a scope. Public methods are the commands; they take and return plain values.

    The field of view is a square in the middle of the instrument's field, of edge :meth:`set_fov`; positions of the
    beam are fractions of it, ``(x, y)`` from its top-left corner. ``command_id`` of an acquisition makes a repeat
    harmless: the same id answers the first result and exposes nothing.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._fov_m = min(scope.info.field_m)
        self._settings = {name: dict(first) for name, (kind, first) in DETECTORS.items() if kind in self._can}

    @property
    def _can(self) -> tuple[str, ...]:
        return self._scope.info.instructions

    # ------------------------------------------------------------------------------------------------ what is there

    def get_instrument(self) -> str:
        """Name of the instrument."""
        return self._scope.info.name

    def get_commands(self) -> list[str]:
        """Names of all commands."""
        return commands()

    def get_detectors(self) -> list[str]:
        """Names of the detectors."""
        return list(self._settings)

    def get_state(self) -> dict[str, Any]:
        """The state vector, SI."""
        return dict(wire.plain(self._scope.state()))

    def get_dose(self) -> dict[str, Any]:
        """``budget``, ``spent``, ``reserved`` and ``left`` in electrons."""
        return dict(wire.plain(self._scope.dose()))

    def activate_device(self, device: str) -> int:
        """1 if there is such a detector."""
        self._detector(device)
        return 1

    def device_settings(self, device: str, **settings: Any) -> dict[str, Any]:
        """Change ``size`` (pixels along an edge) or ``exposure`` (seconds a pixel) of a detector; the settings now."""
        known = self._settings[self._detector(device)]
        for name, value in settings.items():
            if name not in known:
                raise InputError(f"{device} has no setting {name!r}; it has {', '.join(known)}.")
            number = _number(name, value)
            if number <= 0 or (name == "size" and number != int(number)):
                raise InputError(
                    f"{name} must be {'a whole number ' if name == 'size' else ''}above zero; got {value}."
                )
            known[name] = int(number) if name == "size" else number
        return dict(known)

    # ------------------------------------------------------------------------------------------------------ the beam

    def get_fov(self) -> float:
        """Edge of the field of view [m]."""
        return self._fov_m

    def set_fov(self, fov_m: float) -> None:
        """Set the edge of the field of view [m], at most that of the instrument's field."""
        wanted, most = _number("the field of view", fov_m), min(self._scope.info.field_m)
        if not 0 < wanted <= most * (1 + 1e-9):
            raise InputError(f"the field of view must be above zero and at most {most:g} m; got {wanted:g}.")
        self._fov_m = wanted

    def place_beam(self, position: Sequence[float]) -> None:
        """Park the beam at ``(x, y)``, fractions of the field of view from its top-left corner."""
        x, y = _pair("position", position)
        self._do(Probe(self._place(y, x)))

    def place_beam_list(self, positions: Sequence[float]) -> None:
        """Park the beam at ``x0, y0, x1, y1 ...`` in turn."""
        if not isinstance(positions, (list, tuple)) or len(positions) % 2:
            raise InputError("positions must be a list x0, y0, x1, y1 ... of even length.")
        for x, y in zip(positions[::2], positions[1::2], strict=True):
            self.place_beam((x, y))

    def get_probe_position(self) -> list[float]:
        """Where the beam is parked, as fractions ``(y, x)`` of the field of view (the order of Nion Swift)."""
        (y0, x0), state = self._corner(), self._scope.state()
        return [(state["probe_y_m"] - y0) / self._fov_m, (state["probe_x_m"] - x0) / self._fov_m]

    def set_probe_position(self, position: Sequence[float]) -> None:
        """Park the beam at the fractions ``(y, x)`` of the field of view (the order of Nion Swift)."""
        self._do(Probe(self._place(*_pair("position", position))))

    def blank_beam(self) -> None:
        """Blank the beam."""
        self._do(Blank(True))

    def unblank_beam(self) -> None:
        """Let the beam through. The server blanks it again by its own rules."""
        self._do(Blank(False))

    def get_defocus(self) -> float:
        """Defocus [m]: ``-C10``."""
        return -float(self._scope.state()["C10_m"])

    def set_defocus(self, defocus_m: float) -> None:
        """Set the defocus [m]: ``C10 = -defocus``."""
        self._do(Optics(C10_m=-_number("defocus", defocus_m)))

    def get_screen_current(self) -> float:
        """The beam's current [pA]."""
        return float(self._scope.state()["current_A"]) * 1e12

    # ----------------------------------------------------------------------------------------------------- the stage

    def get_stage(self) -> list[float]:
        """``[x, y, z]`` [m] and ``[alpha, beta]`` [degrees] of the stage."""
        state = self._scope.state()
        found = [float(state[f"stage_{axis}"]) for axis in _AXES]
        return [*found[:3], *map(math.degrees, found[3:])]

    def move_stage(self, position: Sequence[float]) -> None:
        """Move the stage to ``[x, y, z, alpha, beta]``, metres and degrees; what is left off stays."""
        if not isinstance(position, (list, tuple)) or not 1 <= len(position) <= 5:
            raise InputError("the stage takes one to five numbers: x, y, z [m], alpha, beta [degrees].")
        numbers = [_number(axis, value) for axis, value in zip(_AXES, position, strict=False)]
        asked = dict(zip(_AXES, [*numbers[:3], *map(math.radians, numbers[3:])], strict=False))
        self._do(Stage(**asked))

    def set_stage(self, stage_positions: dict[str, float], relative: bool = True) -> None:
        """Move the axes named (``x``, ``y``, ``z`` [m], ``alpha``, ``beta`` [degrees]), by default by this much."""
        names = ("x", "y", "z", "alpha", "beta")
        if not isinstance(stage_positions, dict) or set(stage_positions) - set(names):
            raise InputError(f"the stage's axes are {', '.join(names)}: give a dictionary of some of them.")
        now = self.get_stage()
        asked = {}
        for name, value in stage_positions.items():
            number = _number(name, value) + (now[names.index(name)] if relative else 0.0)
            asked[_AXES[names.index(name)]] = number if name in "xyz" else math.radians(number)
        self._do(Stage(**asked))

    # ------------------------------------------------------------------------------------------------- acquisitions

    def acquire_image(self, device_name: str = "haadf", command_id: str | None = None) -> dict[str, Any]:
        """What the detector of that name records now: an image, a pattern or a spectrum."""
        take = {"haadf": self._image, "camera": self._pattern, "eels": self._spectrum}
        return take[self._detector(device_name)](command_id)

    def acquire_scanned_image(
        self, detector_list: Sequence[str] = ("haadf",), command_id: str | None = None
    ) -> dict[str, Any]:
        """Scan the field of view (one detector)."""
        names = [self._detector(name) for name in (detector_list or ["haadf"])]
        if names != ["haadf"]:
            raise InputError(f"one scanned detector at a time, haadf; got {names}.")
        return self._image(command_id)

    def acquire_camera_image(self, command_id: str | None = None) -> dict[str, Any]:
        """One diffraction pattern with the beam where it is parked."""
        self._detector("camera")
        return self._pattern(command_id)

    def acquire_spectrum(self, detector_name: str = "eels", command_id: str | None = None) -> dict[str, Any]:
        """One spectrum with the beam where it is parked."""
        if self._detector(detector_name) != "eels":
            raise InputError(f"{detector_name} records no spectra; eels does.")
        return self._spectrum(command_id)

    def acquire_scanned_data_advanced(self, command_id: str | None = None) -> dict[str, Any]:
        """Diffraction patterns on a raster over the field of view: (rows, columns, det_y, det_x)."""
        edge = int(self._settings[self._detector("camera")]["size"])
        places = Raster(self._corner(), (self._fov_m, self._fov_m), (edge, edge))
        found = self._expose(Diffraction(places, self._settings["camera"]["exposure"]), command_id)
        assert found.frames is not None
        return self._answer(found, found.frames.reshape(edge, edge, *found.frames.shape[1:]))

    def _image(self, command_id: str | None) -> dict[str, Any]:
        setting, extent = self._settings["haadf"], (self._fov_m, self._fov_m)
        shape = (setting["size"], setting["size"])
        return self._first(Image(self._corner(), extent, shape, setting["exposure"]), command_id)

    def _pattern(self, command_id: str | None) -> dict[str, Any]:
        return self._first(Diffraction((self._parked(),), self._settings["camera"]["exposure"]), command_id)

    def _spectrum(self, command_id: str | None) -> dict[str, Any]:
        return self._first(Spectrum((self._parked(),), self._settings["eels"]["exposure"]), command_id)

    def _first(self, asked: Instruction, command_id: str | None) -> dict[str, Any]:
        found = self._expose(asked, command_id)
        assert found.frames is not None
        return self._answer(found, found.frames[0])

    @staticmethod
    def _answer(found: Exposure, array: NDArray[Any]) -> dict[str, Any]:
        more = {"electrons": found.electrons, "calibration": found.calibration, "state": found.state}
        return as_message(array, epoch=found.epoch, began_s=found.began_s, ended_s=found.ended_s, **more)

    # ---------------------------------------------------------------------------------------------------- Nion Swift

    def GetVal(self, name: str) -> float:
        """The value of a control of Nion Swift, SI."""
        if name == "EHT":
            return float(self._scope.info.energy_eV)
        if name not in NION_READ:
            raise InputError(f"the control {name!r} is not known here; known: EHT, {', '.join(NION_READ)}.")
        return float(self._scope.state()[NION_READ[name]])

    def SetVal(self, name: str, value: float) -> bool:
        """Set a control of Nion Swift, SI; true when it has been carried out."""
        if name not in NION_WRITE:
            raise InputError(f"the control {name!r} cannot be set here; these can: {', '.join(NION_WRITE)}.")
        self._do(NION_WRITE[name](_number(name, value)))
        return True

    def SetValDelta(self, name: str, delta: float) -> bool:
        """Change a control by ``delta``."""
        return self.SetVal(name, self.GetVal(name) + _number(name, delta))

    def SetValAndConfirm(self, name: str, value: float, tolerance_factor: float = 1.0, timeout_ms: int = 10000) -> bool:
        """Set a control and read it back; true if it has the value. An instrument here answers when it is done, so
        that nothing is left to wait for."""
        self.SetVal(name, value)
        return math.isclose(self.GetVal(name), value, rel_tol=1e-6 * max(1.0, tolerance_factor), abs_tol=1e-15)

    # ------------------------------------------------------------------------------------------------------- helpers

    def _detector(self, name: Any) -> str:
        known = _ALIASES.get(str(name).lower().strip(), str(name).lower().strip()) if isinstance(name, str) else ""
        if known not in self._settings:
            raise InputError(f"no detector {name!r:.40}; there are {', '.join(self._settings) or 'none'}.")
        return known

    def _corner(self) -> Position:
        height, width = self._scope.info.field_m
        return (height - self._fov_m) / 2, (width - self._fov_m) / 2

    def _place(self, y: float, x: float) -> Position:
        (y0, x0), edge = self._corner(), self._fov_m
        return y0 + y * edge, x0 + x * edge

    def _parked(self) -> Position:
        state = self._scope.state()
        if "probe_y_m" not in state:
            raise InputError("this instrument does not say where the beam is parked.")
        return float(state["probe_y_m"]), float(state["probe_x_m"])

    def _do(self, asked: Instruction) -> None:
        self._scope.execute(asked, f"gateway-{uuid.uuid4().hex}")

    def _expose(self, asked: Instruction, command_id: str | None) -> Exposure:
        if command_id is not None and not (isinstance(command_id, str) and command_id):
            raise InputError("a command id is a text that is not empty.")
        return self._scope.execute(asked, command_id or f"gateway-{uuid.uuid4().hex}")


#: Commands that only look: they need no lease.
LOOKING = frozenset(
    name for name in vars(Vocabulary) if name.startswith(("get_", "Get")) or name in ("activate_device", "set_fov")
) | {"device_settings"}


def commands() -> list[str]:
    """The names of all commands."""
    return sorted(name for name, member in vars(Vocabulary).items() if callable(member) and not name.startswith("_"))
