"""How honest are the map's deviations, and how many points do they cost?

Active runs on fields that are not stationary (the energy of an inclusion in a random strain field: a quadratic form of
smooth random components, flat where they vanish, and a bump) until the largest deviation falls to a target. At the stop
the truth should lie within two deviations at about 95 % of the pixels. One row a setting of the fit; targets and noise
are shares of the field's range. Run: ``python benchmarks/belief_coverage.py [--seeds 12]``; JSON to benchmarks/results.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from stemloop.decide.acquire import ACQUISITIONS, initial_design
from stemloop.decide.gp import fit

FIELD_M = 10e-9
SIDE = 65
AXIS = np.linspace(0.0, FIELD_M, SIDE)
PIXELS = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), axis=-1).reshape(-1, 2)
TARGETS = (0.15, 0.12, 0.10, 0.08, 0.06)
NOISES = {"5 %": (0.05, False), "10 %": (0.10, False), "20 %": (0.20, False), "10 % heteroscedastic": (0.10, True)}
FIRST, BATCH, MOST = 16, 8, 240


def energy_field(seed: int) -> np.ndarray:
    """A quadratic form of three smooth random strains (1.2-2.2 nm) and an inclusion (0.8-1.6 nm), range 1."""
    rng = np.random.default_rng(seed)
    strain = np.stack(
        [gaussian_filter(rng.normal(size=(129, 129)), rng.uniform(8, 14), mode="wrap")[:SIDE, :SIDE] for _ in range(3)]
    )
    strain *= 0.35 / strain.std(axis=(1, 2), keepdims=True)
    centre, width = rng.uniform(0.25, 0.75, 2) * FIELD_M, rng.uniform(0.8e-9, 1.6e-9)
    inclusion = np.exp(-np.square(PIXELS - centre).sum(axis=1) / (2 * width**2)).reshape(SIDE, SIDE)
    strain[0] += np.sqrt(2) * inclusion
    strain[1] += 0.3 * inclusion
    stiffness = np.array([[1.0, 0.3, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 0.8]])
    energy = 0.5 * np.einsum("iyx,ij,jyx->yx", strain, stiffness, strain).ravel()
    return energy / np.ptp(energy)


def run(seed: int, noise: float, heteroscedastic: bool, acquisition: str, settings: dict) -> list[dict | None]:
    """One experiment; what the map was worth when each target was first reached (None: never)."""
    rng = np.random.default_rng(1000 + seed)
    truth = energy_field(seed)

    def measure(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sigma = np.full(len(index), noise)
        if heteroscedastic:
            sigma = noise * (0.3 + 1.2 * np.sqrt(np.maximum(truth[index], 0.0)))
        return truth[index] + sigma * rng.normal(size=len(index)), sigma

    index = initial_design(PIXELS, FIRST, (0.0, 0.0), rng)
    values, sigmas = measure(index)
    belief, found, free = None, [], np.ones(len(PIXELS), bool)
    while len(found) < len(TARGETS) and len(index) <= MOST:
        start = belief.hyperparameters if belief else None
        belief = fit(PIXELS[index], values, sigmas, field_m=(FIELD_M, FIELD_M), start=start, **settings)
        mean, sigma = belief.predict(PIXELS)
        miss = np.abs(mean - truth)
        while len(found) < len(TARGETS) and sigma.max() <= TARGETS[len(found)]:
            high = truth > truth.min() + 0.3
            found.append(
                {
                    "points": len(index),
                    "coverage": float((miss < 2 * sigma).mean()),
                    "coverage_bump": float((miss < 2 * sigma)[high].mean()),
                    "rmse": float(np.sqrt(np.mean(miss**2))),
                    "sigma": float(sigma.mean()),
                }
            )
        free[index] = False
        left = np.flatnonzero(free)
        chosen = left[ACQUISITIONS[acquisition](belief, PIXELS[left], BATCH, tuple(PIXELS[index[-1]]), rng)]
        more, doubts = measure(chosen)
        index, values, sigmas = np.append(index, chosen), np.append(values, more), np.append(sigmas, doubts)
    return found + [None] * (len(TARGETS) - len(found))


def table(seeds: int, acquisition: str, settings: dict) -> list[dict]:
    rows = []
    for label, (noise, heteroscedastic) in NOISES.items():
        runs = [run(seed, noise, heteroscedastic, acquisition, settings) for seed in range(seeds)]
        for k, target in enumerate(TARGETS):
            stopped = [r[k] for r in runs if r[k] is not None]
            row = {"noise": label, "target": target, "stopped": len(stopped)}
            if len(stopped) > seeds // 2:
                coverage = np.array([s["coverage"] for s in stopped])
                row |= {"coverage": float(coverage.mean()), "lowest": float(coverage.min())}
                row |= {"tenth": float(np.quantile(coverage, 0.1))}
                row |= {
                    key: float(np.mean([s[key] for s in stopped]))
                    for key in ("points", "coverage_bump", "rmse", "sigma")
                }
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=12)
    seeds = parser.parse_args().seeds
    tried = {
        "matern52, most probable": ("uncertainty", {"caution": 0.0}),
        "matern52, caution 0.5": ("uncertainty", {"caution": 0.5}),
        "matern52, caution 1 (default)": ("uncertainty", {"caution": 1.0}),
        "matern32, caution 1": ("uncertainty", {"kernel": "matern32", "caution": 1.0}),
        "rbf, caution 1": ("uncertainty", {"kernel": "rbf", "caution": 1.0}),
        "matern52, caution 1, random points": ("random", {"caution": 1.0}),
    }
    result = {}
    for label, (acquisition, settings) in tried.items():
        result[label] = table(seeds, acquisition, settings)
        print(label, file=sys.stderr)
        for r in result[label]:
            numbers = " ".join(f"{k} {v:.3g}" for k, v in r.items() if k != "noise")
            print(f"   {r['noise']:>22}: {numbers}", file=sys.stderr, flush=True)
    text = json.dumps({"seeds": seeds, "field": "energy of an inclusion, 65x65, 10 nm", "settings": result}, indent=1)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "belief_coverage.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
