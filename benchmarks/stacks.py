"""A drifting, jumping stack of a crystal at low dose: shifts against the truth, the average against the bound.

Run: python benchmarks/stacks.py [--frames 200] [--size 512] [--dose 1000] [--stripes 0] [--seed 11]

SrTiO3 [001] at 15 pm a pixel, 1 % vacancies, 3 pm disorder, lines that wander by 0.2 px, five jumps of up to 28 px (a
cell is 26 px), one frame of shuffled pixels, one blank. ``--stripes`` adds lines that stand still in the scan, in
units of the brightest column. The bound is the Cramer-Rao bound of a lone column at the dose of all good frames.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reduce.moving import bound, stack
from stemloop.describe.atoms import find_columns
from stemloop.reduce.register import average, register


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--dose", type=float, default=1e3)
    parser.add_argument("--stripes", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=11)
    asked = parser.parse_args()
    made = stack(asked.frames, asked.size, asked.dose, asked.seed, jumps=5, vacancies=0.01, stripes=asked.stripes)
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
        "register_cpu_s": registered - began,
        "average_cpu_s": averaged - registered,
        "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "outliers": {int(k): found.reason[k] for k in np.flatnonzero(found.outlier)},
        "spoilt": spoilt,
        "rms_px": np.sqrt((away**2).mean(axis=0)).round(4).tolist(),
        "worst_px": float(np.abs(away).max()),
        "z_std": (away / found.sigma[good]).std(axis=0).round(3).tolist(),
        "least_p": float(found.p[good].min()),
    }
    deep = mean.weight == good.sum()
    rows, columns = np.flatnonzero(deep.any(axis=1))[1:-1], np.flatnonzero(deep.any(axis=0))[1:-1]
    atoms = find_columns(mean.image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    truth = made.layout.position - gauge - [rows[0], columns[0]]
    distance, index = cKDTree(truth).query(atoms.position)
    offset = (atoms.position - truth[index])[distance < 2]
    offset -= np.median(offset, axis=0)
    for site in (0, 1):
        chosen = offset[made.layout.site[index][distance < 2] == site]
        best = bound("SrTiO3[001]", site, asked.dose * good.sum())
        answer[f"site_{site}_rmse_over_bound"] = (np.sqrt((chosen**2).mean(axis=0)) / best).round(3).tolist()
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
