"""Durable ingest, sealing and reading of 128x128 frames: ``python benchmarks/landing.py [FOLDER]``.

CPU-seconds of this process and its children; wall times depend on what else the machine does and on its disk.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from stemloop.campaign import keeping
from stemloop.core.chunk import SHUFFLE_DEFLATE, deflate
from stemloop.core.protocols import Encoded
from stemloop.store.sealed import Sealed
from stemloop.stream import codec
from stemloop.stream.dense import DenseBlock
from stemloop.stream.landing import LandingLog

SHAPE = (128, 128)
PER_BLOCK = 64
GROUP = 28  # blocks a commit: 20 ms at 87,000 frames/s
ELECTRONS = 200
SCAN = (512, 512)
GOAL_FPS, GOAL_CORES, GOAL_SEAL = 87_000, 1.2, 3.0


def cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def patterns() -> np.ndarray:
    """(64, 128, 128) counts of 200 electrons a frame: a disk of 24 pixels with a faint halo."""
    y, x = np.indices(SHAPE) - 63.5
    radius = np.hypot(y, x)
    rate = (radius < 24) + 0.02 * np.exp(-radius / 40)
    return np.random.default_rng(0).poisson(ELECTRONS * rate / rate.sum(), (PER_BLOCK, *SHAPE)).astype("<u2")


def encoded(frames: np.ndarray, name: str) -> bytes:
    return deflate(frames) if name == SHUFFLE_DEFLATE else codec.encode(DenseBlock(frames), name)


def ingest(path: Path, frames: np.ndarray, name: str, blocks: int, encode: bool) -> dict[str, float]:
    """Blocks written and acknowledged in groups; with ``encode`` each is made from dense frames first."""
    payload = encoded(frames, name)
    log = LandingLog(path, "bench")
    begin, used = time.perf_counter(), cpu()
    for first in range(0, blocks, GROUP):
        group = []
        for k in range(first, min(first + GROUP, blocks)):
            body = encoded(frames, name) if encode else payload
            group.append(Encoded("cbed", k * PER_BLOCK, PER_BLOCK, SHAPE, "<u2", name, body))
        log.append_many(group)
    wall, used = time.perf_counter() - begin, cpu() - used
    log.close()
    n = blocks * PER_BLOCK
    return {
        "frames": n,
        "bytes_per_frame": round(len(payload) / PER_BLOCK, 1),
        "frames_per_s_wall": round(n / wall),
        "frames_per_cpu_s": round(n / used),
        "cores_at_87k_frames_per_s": round(GOAL_FPS * used / n, 3),
    }


def sealing(log: Path, out: Path, profile: str) -> dict[str, float]:
    scan = {"shape": SCAN, "axes": [{"name": n, "scale": 1e-10, "offset": 0.0, "unit": "m"} for n in ("y", "x")]}
    begin, used = time.perf_counter(), cpu()
    calibrations = {"cbed": {"pixel_rad": 1e-3, "scan": scan}}
    made = keeping.seal_log(log, out, run={}, calibrations=calibrations, profile=profile)
    wall, used = time.perf_counter() - begin, cpu() - used
    raw = made["streams"]["cbed"]["frames"] * 2 * SHAPE[0] * SHAPE[1]
    return {
        "raw_GB": round(raw / 1e9, 3),
        "file_GB": round(made["bytes"] / 1e9, 4),
        "cpu_s": round(used, 3),
        "raw_GB_per_cpu_s": round(raw / used / 1e9, 2),
        "wall_s": round(wall, 2),
    }


def h5py_gzip(out: Path, frames: np.ndarray, blocks: int) -> dict[str, float]:
    """The same frames into the same kind of dataset by h5py itself, for comparison."""
    used = cpu()
    with h5py.File(out, "w") as file:
        shape = (blocks * PER_BLOCK, *SHAPE)
        options = {"shuffle": True, "compression": "gzip", "compression_opts": 1}
        data = file.create_dataset("data", shape, "<u2", chunks=(PER_BLOCK, *SHAPE), **options)
        for k in range(blocks):
            data[k * PER_BLOCK : (k + 1) * PER_BLOCK] = frames
    used = cpu() - used
    raw = blocks * frames.nbytes
    return {"raw_GB": round(raw / 1e9, 3), "cpu_s": round(used, 3), "raw_GB_per_cpu_s": round(raw / used / 1e9, 2)}


def main(folder: Path) -> dict[str, object]:
    frames = patterns()
    blocks = SCAN[0] * SCAN[1] // PER_BLOCK
    encoded(frames, "gaps")  # compiled once
    result: dict[str, object] = {
        "data": f"{SCAN[0]} x {SCAN[1]} frames of 128 x 128 uint16, {ELECTRONS} electrons each",
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start (shared)",
        "goals": {"ingest": "87,000 frames/s on 1.2 cores", "sealing": "3 GB raw a CPU-second"},
    }
    ingested, sealed = {}, {}
    for name in (SHUFFLE_DEFLATE, "gaps", "gaps-zstd"):
        log = folder / f"{name}.log"
        ingested[name] = {
            "encoded_blocks": ingest(log, frames, name, blocks, encode=False),
            "encoded_here_from_dense": ingest(folder / "x.log", frames, name, blocks // 4, encode=True),
        }
        (folder / "x.log").unlink()
        for profile in ("portable", "working"):
            out = folder / f"{name}.{profile}.h5"
            sealed[f"{name}, {profile}"] = sealing(log, out, profile)
            with Sealed(out, keeping.decode) as file:
                np.testing.assert_array_equal(file.frames("cbed", 640, 64), frames)
            used = cpu()
            keeping.verify(out)
            sealed[f"{name}, {profile}"]["verify_cpu_s"] = round(cpu() - used, 3)
            out.unlink()
        log.unlink()
    result["ingest"], result["sealing"] = ingested, sealed
    result["h5py_gzip_1"] = h5py_gzip(folder / "h5py.h5", frames, blocks // 8)
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        found = main(Path(name))
    text = json.dumps(found, indent=1)
    (Path(__file__).parent / "results" / "landing.json").write_text(text + "\n")
    print(text)
