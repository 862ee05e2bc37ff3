"""How many frames come from before the command that asked for them, asked the naive way and through the adapter.

The twin stands inside Nion's own acquisition stack as scan unit and camera. The probe goes to random places; each
frame is compared with the expected pattern of its own place and of the place before (Poisson likelihood of each:
``sum f log(n p) - n p`` with n electrons).
Run ``python benchmarks/stale_frames.py [MOVES]``; JSON goes to the standard output and to
``benchmarks/results/stale_frames.json``.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
from nion.utils import Geometry
from numpy.typing import NDArray

from stemloop.core.instruction import Diffraction, Optics, Position
from stemloop.core.units import electrons
from stemloop.instrument.nion.device import TWIN
from stemloop.instrument.nion.host import find
from stemloop.instrument.nion.kinds import inside_nion
from stemloop.simulate.camera import Counting
from stemloop.simulate.twin import Twin

RESULTS = Path(__file__).parent / "results" / "stale_frames.json"
DWELL_S = 2e-3
SEMIANGLE_RAD = 9e-3

Frame = NDArray[Any]


def main(moves: int) -> dict[str, Any]:
    twin = Twin("graphene", 0, drifts=False, counting=Counting())
    nion = inside_nion(twin)
    nion.execute(Optics(semiangle_rad=SEMIANGLE_RAD), "optics")
    hardware = find(TWIN)
    camera, stem = hardware.camera, hardware.stem
    parameters = camera.get_frame_parameters_from_dict({"exposure_ms": DWELL_S * 1e3, "binning": 1})
    camera.set_current_frame_parameters(parameters)
    field_m = nion.info.field_m

    def go(position: Position) -> None:
        y, x = (p / size for p, size in zip(position, field_m, strict=True))
        stem.set_probe_position(Geometry.FloatPoint(y=y, x=x))

    def next_to_finish(position: Position) -> Frame:
        go(position)
        return np.asarray(camera.get_next_xdatas_to_finish(10)[0].data)

    def next_to_start(position: Position) -> Frame:
        go(position)
        return np.asarray(camera.get_next_xdatas_to_start(10)[0].data)

    def interrupted(position: Position) -> Frame:
        camera.start_playing()
        camera.get_next_xdatas_to_finish(10)
        return adapter(position)

    def adapter(position: Position) -> Frame:
        exposure = nion.execute(Diffraction((position,), DWELL_S), f"move {time.perf_counter()}")
        return np.asarray(exposure.frames[0])

    expected = Expected()
    result: dict[str, Any] = {"moves": moves, "dwell_s": DWELL_S}
    camera.start_playing()
    camera.get_next_xdatas_to_finish(10)
    result["live view, the next frame that is finished"] = watch(next_to_finish, field_m, expected, moves)
    result["live view, the next frame that is begun"] = watch(next_to_start, field_m, expected, moves)
    result["the adapter, a live view started before each command"] = watch(interrupted, field_m, expected, moves)
    result["the adapter"] = watch(adapter, field_m, expected, moves)
    nion.close()
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    shared = load > 1.5 * cpus  # times are then longer than they need be
    result["machine"] = {"python": platform.python_version(), "cpus": cpus, "load": round(load, 2), "shared": shared}
    return result


class Expected:
    """The expected pattern of a place, from a twin of its own: the mean counts that the noise is drawn about."""

    def __init__(self) -> None:
        from stemloop.simulate.imaging import Scattering
        from stemloop.simulate.twin import SETTINGS

        twin = Twin("graphene", 0, drifts=False)
        setting = SETTINGS["graphene"]
        self._source_m = twin.info.source_fwhm_m
        self._scattering = Scattering(
            twin.sample, setting.energy_eV, phonons=(setting.configurations, 0), source_points=setting.source_points
        )

    def __call__(self, position: Position) -> Frame:
        pattern = self._scattering.cbed(position, SEMIANGLE_RAD, 0.0, (0.0, 0.0), self._source_m)
        return np.maximum(np.asarray(pattern, float), 1e-12)


def watch(
    grab: Callable[[Position], Frame], field_m: tuple[float, float], expected: Expected, moves: int
) -> dict[str, Any]:
    """Go to ``moves`` random places; which of the last places does each frame show?"""
    rng = np.random.default_rng(1)
    places = [(float(y), float(x)) for y, x in rng.random((moves + 1, 2)) * field_m]
    patterns: list[Frame] = [expected(places[0])]
    grab(places[0])
    number = electrons(100e-12, DWELL_S)
    shows, seconds = {"its own place": 0, "the place before": 0}, []
    for place in places[1:]:
        began = time.perf_counter()
        frame = np.asarray(grab(place), float).reshape(patterns[-1].shape)
        seconds.append(time.perf_counter() - began)
        patterns.append(expected(place))
        own, before = (float((frame * np.log(p) - number * p).sum()) for p in (patterns[-1], patterns[-2]))
        shows["its own place" if own > before else "the place before"] += 1
        patterns = patterns[-2:]
    return {**shows, "median_ms": round(float(np.median(seconds)) * 1e3, 2)}


if __name__ == "__main__":
    found = main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    text = json.dumps(found, indent=2)
    RESULTS.write_text(text + "\n")
    print(text)
