"""Strain, disks and single-sideband ptychography beside their bounds and beside other programs, on the same data.

``python benchmarks/reductions.py [--ssb PYTHON] [--disks PYTHON]``: each names the interpreter of an environment with a
peer, ``ptychography40`` (with LiberTEM) and ``py4DSTEM``; without it the peer is left out, saying so. CPU seconds of
one process after one pass that compiles. JSON goes to the standard output and to
``benchmarks/results/reductions.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from stemloop.core import units
from stemloop.core.protocols import Camera
from stemloop.reduce.detectors import disk_area
from stemloop.reduce.disks import Template, find_disks
from stemloop.reduce.engine import reduce
from stemloop.reduce.ptychography import SingleSideband
from stemloop.reduce.strain import StrainMap
from stemloop.stream.dense import DenseBlock

RESULTS = Path(__file__).parent / "results" / "reductions.json"
N, STEP_M, ENERGY_EV, SEMIANGLE = 48, 2.5e-11, 80e3, 25e-3
SHAPE, RADIUS = (128, 128), 5.0
LATTICE = np.array([[63.4, 64.1], [2.3, 21.0], [20.6, -1.9]])

SSB_PEER = """
import sys, time, json, numpy as np
from libertem.api import Context
from libertem.executor.inline import InlineJobExecutor
from ptychography40.reconstruction.ssb import SSB_UDF
folder, wavelength, step, semiangle, radius = sys.argv[1], *map(float, sys.argv[2:6])
data = np.load(folder + "/data.npy").astype(np.float32)
context = Context(executor=InlineJobExecutor())
dataset = context.load("memory", data=data, sig_dims=2)
make = lambda: SSB_UDF(lamb=wavelength, dpix=step, semiconv=semiangle, semiconv_pix=radius, cy=24, cx=24)
context.run_udf(dataset, make())
begun = time.process_time()
found = context.run_udf(dataset, make())
spent = time.process_time() - begun
np.save(folder + "/phase.npy", np.asarray(found["phase"].data))
print(json.dumps({"cpu_s": spent}))
"""

DISKS_PEER = """
import sys, time, json, numpy as np, py4DSTEM
folder = sys.argv[1]
data = np.load(folder + "/data.npy").astype(np.float64)
cube = py4DSTEM.DataCube(data=data)
image = np.load(folder + "/probe.npy")
probe = py4DSTEM.Probe(image)
kernel = probe.get_kernel(mode="sigmoid", origin=(64, 64), radii=(6, 24), bilinear=True)
options = dict(template=probe.kernel, corrPower=1.0, sigma=0, edgeBoundary=6, minRelativeIntensity=0.02,
               minPeakSpacing=8, subpixel="multicorr", upsample_factor=32, maxNumPeaks=60)
begun = time.process_time()
found = cube.find_Bragg_disks(**options)
spent = time.process_time() - begun
points = []
for y in range(data.shape[0]):
    for x in range(data.shape[1]):
        peaks = found.raw[y, x]
        points.append([[float(a), float(b)] for a, b in zip(peaks.qx, peaks.qy)])
json.dump(points, open(folder + "/points.json", "w"))
print(json.dumps({"cpu_s": spent, "version": py4DSTEM.__version__}))
"""


def weak_phase() -> np.ndarray:
    y, x = np.indices((N, N))
    terms = ((0.02, 3, 1, 0.4), (0.024, -2, 5, 1.0), (0.016, 0, 9, 2.0), (0.012, 8, -8, 0.1))
    return sum(h * np.cos(2 * np.pi * (a * y + b * x) / N + s) for h, a, b, s in terms)


def patterns(phase: np.ndarray, counts: float) -> np.ndarray:
    """Counted far fields of exp(i phase) at every position of its grid."""
    k = np.fft.fftfreq(N, STEP_M)
    aperture = np.hypot(k[:, None], k[None, :]) * units.wavelength_m(ENERGY_EV) <= SEMIANGLE
    probe = np.fft.ifft2(aperture)
    probe /= np.sqrt(np.sum(np.abs(probe) ** 2))
    rng, found = np.random.default_rng(0), np.empty((N, N, N, N), np.uint16)
    for y in range(N):
        for x in range(N):
            wave = np.fft.fft2(np.roll(probe, (y, x), (0, 1)) * np.exp(1j * phase)) / N
            found[y, x] = rng.poisson(np.fft.fftshift(np.abs(wave) ** 2) * counts)
    return found


def peer(python: str | None, code: str, *words: object) -> dict[str, float] | None:
    """What a peer's process says, or None where there is no such environment."""
    if python is None:
        return None
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", code, *map(str, words)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:200]}  # type: ignore[dict-item]
    return json.loads(done.stdout.strip().splitlines()[-1])


def single_sidebands(python: str | None) -> dict[str, object]:
    wavelength = units.wavelength_m(ENERGY_EV)
    camera = Camera((N, N), wavelength / (N * STEP_M), (N // 2, N // 2))
    truth = weak_phase()
    data = patterns(truth, 20000)
    fold = SingleSideband(camera, SEMIANGLE, STEP_M, ENERGY_EV)
    for _ in range(2):
        begun = time.process_time()
        maps = reduce(fold, [(0, DenseBlock(data.reshape(-1, N, N)))], (N, N), (N, N))
        spent = time.process_time() - begun

    def error(phase: np.ndarray) -> float:
        return float(np.sqrt(np.mean((phase - phase.mean() - truth) ** 2)))

    found: dict[str, object] = {
        "scan": [N, N], "frame": [N, N], "electrons_a_frame": 20000,
        "cpu_s": spent, "error_rad": error(maps["ssb_phase"]), "stated_sigma_rad": float(maps["ssb_phase_sigma"]),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/data.npy", data)
        radius = SEMIANGLE / camera.pixel_rad
        said = peer(python, SSB_PEER, folder, wavelength, STEP_M, SEMIANGLE, radius)
        if said and "error" not in said:
            phase = np.load(f"{folder}/phase.npy")
            said["error_rad"] = error(phase)
            said["correlation_with_ours"] = float(np.corrcoef(phase.ravel(), maps["ssb_phase"].ravel())[0, 1])
    return {"stemloop": found, "ptychography40": said or "not installed: give --ssb PYTHON"}


def disks(python: str | None) -> dict[str, object]:
    """Positions of the disks of a square-like lattice, and the strain, over 10 x 20 counted patterns."""
    places = np.array(
        [LATTICE[0] + h * LATTICE[1] + k * LATTICE[2] for h in (-2, -1, 0, 1, 2) for k in (-2, -1, 0, 1, 2)]
    )
    heights = np.array([12 * np.exp(-0.35 * (h * h + k * k)) for h in (-2, -1, 0, 1, 2) for k in (-2, -1, 0, 1, 2)])

    def image(at: np.ndarray) -> np.ndarray:
        return sum(h * disk_area(SHAPE, tuple(p), RADIUS) for h, p in zip(heights, at, strict=True)) + 0.5

    mean = image(places)
    data = np.random.default_rng(1).poisson(mean, (10, 20, *SHAPE)).astype(np.uint16)
    template = Template.disk(RADIUS)
    fold = StrainMap(template, LATTICE)
    block = DenseBlock(data.reshape(-1, *SHAPE))
    for _ in range(2):
        begun = time.process_time()
        maps = reduce(fold, [(0, block)], (10, 20), SHAPE)
        spent = time.process_time() - begun
    bound, near = [], []
    for i in range(len(places)):
        slopes = []
        for axis in np.eye(2):
            forth, back = places.copy(), places.copy()
            forth[i] += 0.1 * axis
            back[i] -= 0.1 * axis
            slopes.append((image(forth) - image(back)) / 0.2)
        information = np.array([[np.sum(a * b / mean) for b in slopes] for a in slopes])
        bound.append(np.sqrt(np.trace(np.linalg.inv(information)) / 2))
    near = [find_disks(frame, template).position for frame in data.reshape(-1, *SHAPE)]

    def errors(points: list[np.ndarray]) -> dict[str, float]:
        """Error of each true disk over its bound, and how many were found at all (nearer than 2 px)."""
        ratio, seen = [], 0
        for i, place in enumerate(places):
            error = []
            for p in points:
                if len(p) and np.hypot(*(p - place).T).min() < 2.0:
                    error.append((p - place)[np.hypot(*(p - place).T).argmin()])
            seen += len(error)
            if len(error) > 0.9 * len(points):
                ratio.append(float(np.sqrt(np.mean(np.square(error))) / bound[i]))
        return {
            "error_over_cramer_rao": float(np.median(ratio)) if ratio else float("nan"),
            "found": seen / (len(points) * len(places)),
        }

    ours: dict[str, object] = {"cpu_ms_a_pattern": spent / 200 * 1e3, **errors(near)}
    for name in ("e_xx", "e_yy", "e_xy", "rotation"):
        ours[f"{name}_rms"] = float(np.sqrt(np.mean(maps[name] ** 2)))
        ours[f"{name}_rms_over_stated"] = float(np.sqrt(np.mean((maps[name] / maps[f"{name}_sigma"]) ** 2)))
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/data.npy", data)
        np.save(f"{folder}/probe.npy", disk_area(SHAPE, (64, 64), RADIUS))
        said = peer(python, DISKS_PEER, folder)
        if said and "error" not in said:
            points = [np.array(p).reshape(-1, 2) for p in json.loads(Path(f"{folder}/points.json").read_text())]
            said = {**said, "cpu_ms_a_pattern": said["cpu_s"] / 200 * 1e3, **errors(points)}
    return {"patterns": 200, "frame": list(SHAPE), "stemloop": ours, "py4DSTEM": said or "not installed: give --disks"}


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--ssb", metavar="PYTHON")
    words.add_argument("--disks", metavar="PYTHON")
    given = words.parse_args()
    result = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]},
        "note": "CPU seconds; other programs ran on the same machine",
        "disks": disks(given.disks),
        "single_sidebands": single_sidebands(given.ssb),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
