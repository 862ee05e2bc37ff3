"""How the analysis of a stack scales: ``python benchmarks/scaling.py [--side 512] [--frames 12]``.

1. Real: the same stack in 1 and in 2 processes of this machine; frames a second while all processes are busy (their
   start, which a stack of thousands does not feel, is not counted).
2. Simulated: a real Dask scheduler with up to 64 workers whose tasks sleep as long as measured frames took; efficiency
   is the work over workers times wall time. It measures the scheduler and the spread of durations, not the disk.
3. CPU-hours for 1,000 frames of 2048 x 2048, from the CPU of measured frames, beside atomap's 52 (188 CPU-s a frame:
   measured before on the same kind of picture, not in this run).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np  # noqa: E402

from stemloop.campaign.images import frames  # noqa: E402
from stemloop.campaign.images.one_image import Wanted, understand  # noqa: E402
from stemloop.core.protocols import PixelSize  # noqa: E402
from stemloop.simulate import pictures  # noqa: E402

PIXEL_PM, DOSE = 15.0, 1e4
ATOMAP_CPU_S = 188.0


def picture(side: int, seed: int, dose: float = DOSE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    layout = pictures.layout("SrTiO3[001]", (side, side), PIXEL_PM, 0.1)
    layout = pictures.without(pictures.jittered(layout, 3.0, rng), 0.01, 1, rng)
    return pictures.counted(pictures.mean_image(layout, dose), rng)


def real(side: int, count: int, processes: int) -> dict[str, float]:
    """Frames a second of ``processes``, from the first result of all of them to the last."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        np.save(here / "stack.npy", np.stack([picture(side, k) for k in range(count)]))
        frames.Job(str(here / "stack.npy"), None, PixelSize(PIXEL_PM * 1e-12, "user", "stated"), Wanted()).write(here)
        ends: list[float] = []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        frames.local(here, range(count), lambda _: ends.append(time.perf_counter()), processes)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        good = sum(frames.bad(here, k) is None for k in range(count))
    warm = ends[processes - 1]  # every process has begun, compiled and ended a frame
    rate = (len(ends) - processes) / (ends[-1] - warm)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"processes": processes, "frames": good, "frames_per_s": rate, "cpu_s_in_all": cpu}


def measured(side: int, count: int) -> list[float]:
    """CPU-s of each of ``count`` frames of ``side``, after one to warm up."""
    size, spent = PixelSize(PIXEL_PM * 1e-12, "user", "stated"), []
    understand(picture(128, 0), size, Wanted())
    for k in range(count):
        image = picture(side, k)
        began = time.process_time()
        understand(image, size, Wanted())
        spent.append(time.process_time() - began)
    return spent


def simulated(durations: list[float], workers: int, tasks: int) -> dict[str, float]:
    """A real scheduler whose tasks sleep for the measured durations."""
    import distributed

    with (
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=False, dashboard_address=None, memory_limit=0
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.wait_for_workers(workers)
        distributed.wait(client.map(time.sleep, [0.01] * workers, key="warm"))
        sleeps = [durations[k % len(durations)] for k in range(tasks)]
        began = time.perf_counter()
        distributed.wait([client.submit(time.sleep, s, key=("frame", k), pure=False) for k, s in enumerate(sleeps)])
        wall = time.perf_counter() - began
    return {"workers": workers, "tasks": tasks, "wall_s": wall, "efficiency": sum(sleeps) / (workers * wall)}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--side", type=int, default=512)
    words.add_argument("--frames", type=int, default=12)
    words.add_argument("--large", type=int, default=2, help="frames of 2048 x 2048 that are measured")
    words.add_argument("--tasks", type=int, default=16, help="tasks a worker in the simulation")
    words.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "scaling.json")
    asked = words.parse_args()
    result: dict[str, object] = {"cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}
    print(f"{result['cores']} cores, load {result['load_before']:.1f} before")

    rows = [real(asked.side, asked.frames, p) for p in (1, 2)]
    result["real"] = {"side": asked.side, "rows": rows, "speed_up": rows[1]["frames_per_s"] / rows[0]["frames_per_s"]}
    for row in rows:
        print(f"{row['processes']:.0f} processes  {row['frames_per_s']:.2f} frames/s of {asked.side}^2")
    print(f"speed-up of 2 processes: {result['real']['speed_up']:.2f}")

    small, large = measured(asked.side, 4), measured(2048, asked.large)
    hours = 1000 * float(np.mean(large)) / 3600
    result["cpu_s"] = {str(asked.side): small, "2048": large}
    result["cpu_hours_1000_of_2048"] = {"stemloop_extrapolated": hours, "atomap_measured_before": ATOMAP_CPU_S / 3.6}
    print(f"CPU-s a frame: {asked.side}^2 {np.mean(small):.2f}, 2048^2 {np.mean(large):.2f}")
    print(f"1,000 frames of 2048^2: {hours:.2f} CPU-h (extrapolated); atomap 52 CPU-h")

    result["simulated"] = []
    for workers in (1, 8, 64):
        row = simulated(large, workers, (asked.tasks if workers > 2 else 4) * workers)
        result["simulated"].append(row)
        print(f"{workers:3d} workers  {row['tasks']} tasks  {100 * row['efficiency']:.1f} % efficient")
    asked.out.parent.mkdir(exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
