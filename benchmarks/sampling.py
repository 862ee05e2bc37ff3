"""Autonomous runs on the three specimens, beside random and regular sampling with the same number of points.

Each row is a whole run of the command in a process of its own: ``stemloop demo --specimen S --seed K``; then the same
with ``--acquisition random`` and ``grid`` and as many points as the first one took. Writes ``results/sampling.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

KEYS = ("specimen", "seed", "stop_reason", "points", "raster_points", "dose_fraction", "target_sigma", "final_sigma")
KEYS += ("map_rmse", "coverage_2sigma", "seconds")


def run(specimen: str, seed: int, *more: str) -> dict[str, Any]:
    """One run; its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["demo", "--specimen", specimen, "--seed", str(seed), "--out", f"{folder}/run", *more]
        subprocess.run([sys.executable, "-m", "stemloop.cli", *words], check=True, capture_output=True)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    sampling = more[1] if more else "uncertainty"
    return {**{key: summary[key] for key in KEYS}, "sampling": sampling}


def compared(specimen: str, seed: int, baselines: bool) -> list[dict[str, Any]]:
    """The autonomous run, and its baselines with the same budget."""
    rows = [run(specimen, seed)]
    if baselines:
        points = str(rows[0]["points"])
        rows += [run(specimen, seed, "--acquisition", name, "--max-points", points) for name in ("random", "grid")]
    return rows


def main() -> None:
    """Run all, print the rows as they come, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 ... of the autonomous runs")
    parser.add_argument("--baselines", type=int, default=5, help="how many of these seeds have baselines beside them")
    parser.add_argument("--specimens", nargs="+", default=["MoS2", "graphene", "SrTiO3"])
    words = parser.parse_args()
    tasks = [(s, k, k < words.baselines) for s in words.specimens for k in range(words.seeds)]
    rows = []
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda task: compared(*task), tasks):
            rows += found
            for row in found:
                print(json.dumps(row), flush=True)
    target = Path(__file__).parent / "results" / "sampling.json"
    target.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
