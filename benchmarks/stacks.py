"""Drifting, jumping stacks of a crystal at low dose: shifts against the truth, the average against the bound.

Run: python benchmarks/stacks.py [--frames 200] [--size 512] [--dose 1000] [--stripes 0] [--seeds 11 21 22 23]

SrTiO3 [001] at 15 pm a pixel, 1 % vacancies, 3 pm disorder, lines that wander by 0.2 px, five jumps of up to 28 px (a
cell is 26 px), one frame of shuffled pixels, one blank. ``--stripes`` adds lines that stand still in the scan, in
units of the brightest column. The bound is the Cramer-Rao bound of a lone column at the dose of all good frames.

The same columns are measured four times, so that each loss shows by itself: on one still image of the whole dose, with
other counts (the finder alone), on the average by the true shifts of frames and lines (and the averaging), by the true
shifts of frames (and the lines that wander), and by the shifts that were found (and the registration). Columns nearer
to the border than three widths are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reduce.moving import Stack, bound, stack
from stemloop.describe.atoms import find_columns
from stemloop.reduce.register import Averaged, Registration, average, register
from stemloop.simulate import pictures

PLANE = "SrTiO3[001]"


def over_bound(made: Stack, image: np.ndarray, variance: np.ndarray | None, offset: np.ndarray, dose: float):
    """(site, (n, 2)): errors of the columns found in ``image`` over their bound at ``dose``; the layout's place p lies
    at ``p - offset``. A displacement of the whole is no error. With their deviations as the second, over the bound."""
    found = find_columns(image, variance=variance)
    distance, index = cKDTree(made.layout.position - offset).query(found.position)
    border = 3 * made.layout.width.max()
    place = found.position
    kept = (distance < 2) & ((place > border) & (place < np.array(image.shape) - 1 - border)).all(axis=1)
    error = (place - (made.layout.position - offset)[index])[kept]
    site = made.layout.site[index[kept]]
    best = np.array([bound(PLANE, s, dose) for s in (0, 1)])[site][:, None]
    return site, (error - error.mean(axis=0)) / best, found.sigma[kept] / best


def of_average(made: Stack, mean: Averaged, gauge: np.ndarray, good: int):
    """The same of an average, where all frames are in it."""
    deep = mean.weight > good - 1.5  # lines that wander cut single pixels off
    rows, columns = np.flatnonzero(deep.any(axis=1))[1:-1], np.flatnonzero(deep.any(axis=0))[1:-1]
    part, corner = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], np.array([rows[0], columns[0]])
    return over_bound(made, mean.image[part], mean.variance[part], gauge + corner, made.dose * good)


def seed_of(asked: argparse.Namespace, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one stack gave, and the errors over the bound of each way."""
    made = stack(asked.frames, asked.size, asked.dose, seed, jumps=5, vacancies=0.01, stripes=asked.stripes)
    frames, rng = made.frames, np.random.default_rng(1)
    spoilt = [asked.frames // 5, asked.frames // 3]
    frames[spoilt[0]] = rng.permutation(frames[spoilt[0]].ravel()).reshape(frames[0].shape)
    frames[spoilt[1]] = 0
    began = time.process_time()
    found = register(frames)
    registered = time.process_time()
    mean = average(frames, found)
    averaged = time.process_time()
    good = ~found.outlier
    away = (found.shift - made.shift)[good]
    gauge = np.median(away, axis=0)
    away -= gauge
    answer = {
        "seed": seed,
        "register_cpu_s": registered - began,
        "average_cpu_s": averaged - registered,
        "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "outliers": {int(k): found.reason[k] for k in np.flatnonzero(found.outlier)},
        "spoilt": spoilt,
        "rms_px": np.sqrt((away**2).mean(axis=0)).round(4).tolist(),
        "worst_px": round(float(np.abs(away).max()), 4),
        "z_std": (away / found.sigma[good]).std(axis=0).round(3).tolist(),
        "least_p": float(found.p[good].min()),
    }
    n, none = int(good.sum()), np.zeros(2)
    true: Registration = replace(found, shift=np.where(found.outlier[:, None], np.nan, made.shift))
    still = pictures.mean_image(made.layout, asked.dose * n)
    ways = {
        "still": over_bound(made, pictures.counted(still, np.random.default_rng(seed)), None, none, asked.dose * n),
        "true_shifts_and_lines": of_average(made, average(frames, true, line_shift=made.jitter), none, n),
        "true_shifts": of_average(made, average(frames, true), none, n),
        "found": of_average(made, mean, gauge, n),
    }
    return answer | {"over_bound": {name: summary(*way) for name, way in ways.items()}}, ways


def summary(site: np.ndarray, error: np.ndarray, sigma: np.ndarray) -> dict[str, Any]:
    """Root mean squares over the bound: of each site along y and x, of all, how far chance alone moves that, and what
    the deviations say."""
    return {
        "site_0": np.sqrt((error[site == 0] ** 2).mean(axis=0)).round(3).tolist(),
        "site_1": np.sqrt((error[site == 1] ** 2).mean(axis=0)).round(3).tolist(),
        "all": round(float(np.sqrt((error**2).mean())), 4),
        "by_chance": round(float(1 / np.sqrt(2 * error.size)), 4),
        "deviations": round(float(np.sqrt((sigma**2).mean())), 4),
        "columns": len(error),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--dose", type=float, default=1e3)
    parser.add_argument("--stripes", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 21, 22, 23])
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    ways: list[dict[str, Any]] = []
    for seed in asked.seeds:
        row, way = seed_of(asked, seed)
        print(json.dumps(row), flush=True)
        rows.append(row)
        ways.append(way)
        result = {
            "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
            "asked": {key: value for key, value in vars(asked).items() if key != "seeds"},
            "over_bound": {
                name: summary(*(np.concatenate([one[name][part] for one in ways]) for part in range(3)))
                for name in ways[0]
            },
            "cases": rows,
        }
        (Path(__file__).parent / "results" / "stacks.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
