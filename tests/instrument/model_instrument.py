"""A small lawful instrument, and others that each break one law."""

import dataclasses
import hashlib
import threading
import time

import numpy as np

from stemloop.core import units
from stemloop.core.errors import Aborted, InstrumentError, LimitError
from stemloop.core.instruction import Blank, Diffraction, Image, Optics, Probe, Stage
from stemloop.core.protocols import Camera, Exposure, InstrumentInfo

FIELD_M = (8e-9, 10e-9)
CAMERA = Camera((12, 12), 1e-3, (5.5, 5.5))
REACH_M = 1e-6


class Model:
    """Two-beam patterns whose disc moves with the position; Poisson noise by the key; ``sleep_s`` a position."""

    def __init__(self, sleep_s=0.0):
        self.sleep_s = sleep_s
        self.progress = None
        self.exposures = []
        self._stop = threading.Event()
        self._state = {
            "current_A": 1e-10, "C10_m": 0.0, "C12_m": [0.0, 0.0], "blanked": True, "probe_y_m": 0.0,
            "probe_x_m": 0.0, "stage_x_m": 0.0, "stage_y_m": 0.0,
        }  # fmt: skip

    @property
    def info(self):
        kinds = ("image", "diffraction", "probe", "blank", "optics", "stage", "report")
        return InstrumentInfo("model", kinds, FIELD_M, 80e3, camera=CAMERA)

    def state(self):
        return {**self._state, "C12_m": list(self._state["C12_m"])}

    def restore(self, state):
        self._state = {**state}

    def close(self):
        pass

    def abort(self):
        self._stop.set()

    def execute(self, instruction, key):
        if instruction.kind not in self.info.instructions:
            raise LimitError(f"{instruction.kind} is not known here.")
        if instruction.exposes:
            return self.expose(instruction, key)
        self.set(instruction)
        return Exposure(None, 0.0, self.state())

    def set(self, instruction):
        match instruction:
            case Blank():
                self._state["blanked"] = instruction.blanked
            case Probe():
                self.inside([instruction.position_m])
                self._state["probe_y_m"], self._state["probe_x_m"] = map(float, instruction.position_m)
            case Optics() | Stage():
                self.move(instruction)

    def move(self, instruction):
        prefix = "stage_" if isinstance(instruction, Stage) else ""
        wanted = {prefix + f.name: getattr(instruction, f.name) for f in dataclasses.fields(instruction)}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        if any(name not in self._state or np.max(np.abs(value)) > REACH_M for name, value in wanted.items()):
            raise LimitError(f"{', '.join(wanted)}: not here, or too far; nothing moved.")
        self._state.update({n: list(v) if isinstance(v, tuple) else float(v) for n, v in wanted.items()})

    def inside(self, positions):
        places = np.asarray(positions, float).reshape(-1, 2)
        if (places < -1e-12).any() or (places > np.array(FIELD_M) + 1e-12).any():
            raise LimitError("outside the field.")

    def pattern(self, place):
        y, x = np.mgrid[:12, :12]
        row, column = 2 + 8 * np.asarray(place) / FIELD_M
        return 0.02 + np.exp(-((y - row) ** 2 + (x - column) ** 2) / 4)

    def expose(self, asked, key):
        if self._state["blanked"]:
            raise InstrumentError("the beam is blanked.")
        seed = hashlib.sha256(key.encode()).digest()[:8]
        rng, number = np.random.default_rng(list(seed)), units.electrons(self._state["current_A"], asked.dwell_s)
        if isinstance(asked, Image):
            self.inside(asked.corners_m())
            places = asked.positions().reshape(-1, 2)
            means = np.array([self.pattern(place)[3:6, 2:9].mean() for place in places])
            frames = rng.poisson(means * number).reshape(1, *asked.shape)
        else:
            assert isinstance(asked, Diffraction)
            places = np.asarray(asked.positions_m, float)
            self.inside(places)
            frames = np.array([self.taken(place, rng, number, i, len(places)) for i, place in enumerate(places)])
        self._state["probe_y_m"], self._state["probe_x_m"] = map(float, places[-1])
        self.exposures.append(key)
        return Exposure(frames.astype(np.uint32), number, self.state(), {"pixel_rad": 1e-3})

    def taken(self, place, rng, number, index, of):
        time.sleep(self.sleep_s)
        if self._stop.is_set():
            self._stop.clear()
            self._state["blanked"] = True
            raise Aborted(f"aborted after {index} of {of} positions.", index)
        if self.progress is not None:
            self.progress(index + 1, of)
        return rng.poisson(self.pattern(place) * number / 30)


# ------------------------------------------------------------------------------------------------ each breaks one law


class LiveView(Model):
    """Grabs "the next frame" of a camera that runs freely. The frame that is next to finish began before the beam had
    moved: it is that of the position before."""

    _began_at = (0.0, 0.0)

    def taken(self, place, rng, number, index, of):
        finished = super().taken(self._began_at, rng, number, index, of)
        self._began_at = place  # the camera begins its next frame here
        return finished


class HalfMoved(LiveView):
    """The beam moves in the middle of a frame."""

    def taken(self, place, rng, number, index, of):
        old, self._began_at = self._began_at, place
        take = super(LiveView, self).taken
        return (take(old, rng, number, index, of) + take(place, rng, number, index, of)) // 2


class TwoLate(Model):
    """A queue of two frames lies between the camera and us."""

    _queue = ((0.0, 0.0), (0.0, 0.0))

    def taken(self, place, rng, number, index, of):
        shown, self._queue = self._queue[0], (self._queue[1], place)
        return super().taken(shown, rng, number, index, of)


class OldTimes(Model):
    """The frame is right and says that it began a minute before the command."""

    def expose(self, asked, key):
        now = time.time()
        began = now - 60 if len(self.exposures) % 2 else now
        return dataclasses.replace(super().expose(asked, key), began_s=began, ended_s=began)


class SortedFrames(Model):
    """The frames of a list come in the order of the positions in the field."""

    def expose(self, asked, key):
        exposure = super().expose(asked, key)
        if isinstance(asked, Diffraction):
            return dataclasses.replace(exposure, frames=exposure.frames[np.lexsort(np.array(asked.positions_m).T)])
        return exposure


class LosesTheLast(Model):
    """The last frame of a list does not arrive."""

    def expose(self, asked, key):
        exposure = super().expose(asked, key)
        many = asked.exposed_positions > 1 and isinstance(asked, Diffraction)
        return dataclasses.replace(exposure, frames=exposure.frames[:-1]) if many else exposure


class Nanometres(Model):
    """Reports the defocus in nanometres."""

    def state(self):
        return {**super().state(), "C10_m": self._state["C10_m"] * 1e9}


class DeafControl(Model):
    """Accepts a stage move and does not move."""

    def move(self, instruction):
        if not isinstance(instruction, Stage):
            super().move(instruction)


class SecretControl(Model):
    """Moves the stage and does not say where it is."""

    def state(self):
        return {name: value for name, value in super().state().items() if not name.startswith("stage_")}


class Clips(Model):
    """Takes a position outside the field to its edge instead of refusing it."""

    def inside(self, positions):
        pass


class DoesMore(Model):
    """Carries out what it does not declare."""

    @property
    def info(self):
        return dataclasses.replace(super().info, instructions=("image", "diffraction", "probe", "blank", "report"))

    def execute(self, instruction, key):
        if isinstance(instruction, Optics):
            return Exposure(None, 0.0, self.state())
        return super().execute(instruction, key)


class LeakyBlanker(Model):
    """Reports a blanked beam and exposes."""

    def expose(self, asked, key):
        blanked, self._state["blanked"] = self._state["blanked"], False
        try:
            return super().expose(asked, key)
        finally:
            self._state["blanked"] = blanked


class OwnDice(Model):
    """Its noise does not come from the key."""

    def expose(self, asked, key):
        return super().expose(asked, f"{key}{len(self.exposures)}")


class ForgetsOnRestore(Model):
    """Brings back everything but the astigmatism."""

    def restore(self, state):
        self._state = {**state, "C12_m": self._state["C12_m"]}


class Unstoppable(Model):
    """Does not hear an abort."""

    def abort(self):
        pass


class Boasts(Model):
    """Declares spectra without a spectrometer."""

    @property
    def info(self):
        return dataclasses.replace(super().info, instructions=(*super().info.instructions, "spectrum"))
