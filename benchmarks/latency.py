"""Point-to-point latency of the loop: what passes between two measured points besides exposure and calculator.

A run over a made-up recording (so that an exposure takes no time of its own) with one point a decision: control round
trip, spool and journal (fdatasync included), stream, landing, reading the spectrum, belief, decision. Writes
``results/latency.json``; the disk's own fdatasync is measured in the same run.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from stemloop.campaign import run
from stemloop.campaign.settings import Settings

POINTS = 60


def recording(path: Path) -> Path:
    """A spectrum image (20, 16, 512) as .npz is no vendor file: write HyperSpy's .hspy as the tests do."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from campaign.recording import write_recording

    return write_recording(path, (20, 16))


def fdatasync_ms(folder: Path) -> float:
    """Median time [ms] of one append of 4 kB with fdatasync."""
    times = []
    with open(folder / "probe", "wb") as file:
        for _ in range(50):
            start = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fdatasync(file.fileno())
            times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))


def main() -> None:
    """Run, and tell the median and the 95th percentile of the time from one decision to the next."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = recording(folder / "made-up.hspy")
        settings = Settings(
            recipe="eels-map", instrument=f"replay:{file}", specimen=None, target_sigma=1e-6, max_points=POINTS, batch=1
        )
        going = run.start(settings, folder / "run")
        moments = []
        for _ in going:
            moments.append(time.perf_counter())
        laps = 1e3 * np.diff(moments[2:])
        stages = {k: 1e3 * v / POINTS for k, v in going.watch.seconds.items() if k not in ("score", "seal", "start")}
        found = {
            "points": POINTS,
            "median_ms_per_point": float(np.median(laps)),
            "p95_ms_per_point": float(np.percentile(laps, 95)),
            "stages_ms_per_point": stages,
            "fdatasync_ms": fdatasync_ms(folder),
        }
    print(json.dumps(found, indent=1))
    (Path(__file__).parent / "results" / "latency.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
