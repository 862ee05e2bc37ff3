"""A scan that would not fit into memory is folded in little of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHILD = '''
import json, resource, sys
import numpy as np
from stemloop.core.protocols import Camera
from stemloop.reduce.detectors import Patterns, Virtual, standard
from stemloop.reduce.dpc import CentreOfMass
from stemloop.reduce.engine import reduce
from stemloop.stream.events import EventBlock

side, threads = int(sys.argv[1]), int(sys.argv[2])
SHAPE, FRAMES, ELECTRONS = (128, 128), 512, 50
camera = Camera(SHAPE, 1e-3, (63.2, 64.4))

def stream():
    """Electron events block by block, each made when it is asked for."""
    for first in range(0, side * side, FRAMES):
        n = min(FRAMES, side * side - first)
        rng = np.random.default_rng(first)
        index = np.sort(rng.integers(0, SHAPE[0] * SHAPE[1], (n, ELECTRONS)), axis=1)
        yield first, EventBlock(np.arange(n + 1) * ELECTRONS, index.ravel(), SHAPE, trusted=True)

folds = [Virtual(standard(camera, 12e-3)), CentreOfMass(camera), Patterns(extremes=len(sys.argv) > 3)]
maps = reduce(folds, stream(), (side, side), SHAPE, threads=threads)
print(json.dumps({
    "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "dense_GB": side * side * SHAPE[0] * SHAPE[1] * 2 / 1e9,
    "electrons": int(maps["sum_pattern"].sum()),
    "counts": float(maps["counts"].sum()),
}))
'''


def fold(side, threads, *more):
    """What the child says of a scan of ``side`` x ``side`` positions, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(side), str(threads), *more],
        capture_output=True, text=True, timeout=280, check=False,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["electrons"] == said["counts"] == side * side * 50
    return said


def test_memory_grows_with_the_maps_only():
    small, large = fold(32, 1), fold(256, 1)
    assert large["dense_GB"] > 2.1 and small["dense_GB"] < 0.04
    # nine numbers of 8 bytes a position, kept and laid out as maps, and a block or two; dense it would be 2147 MB
    assert large["peak_MB"] - small["peak_MB"] < 60


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_twenty_gigabytes_are_reduced_in_less_than_one(threads):
    said = fold(782, threads, "extremes")
    assert said["dense_GB"] > 20 and said["peak_MB"] < 1000
