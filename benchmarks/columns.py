"""Atom columns of a synthetic perovskite: stemloop beside atomap and beside the Cramer-Rao bound, on the same images.

The image is counted: a perovskite along [001], 15 pm a pixel, the bright sublattice at the corners (Gaussian columns of
45 pm), the weaker one at the centres (42 pm, half as intense) and displaced by +-20 pm in two domains, thermal jitter
of 3 pm, 1 % of the weaker columns missing, a brightness (thickness) that varies by a quarter from column to column and
in the background between them, Poisson noise at the stated dose. The bound is that of one column whose position,
amplitude, width and background are all unknown, by the Fisher information of independent Poisson pixels. Brightness
does not multiply the image: a slope under a Gaussian moves its middle, for every method alike.

Run: python benchmarks/columns.py [--peer PYTHON_WITH_ATOMAP]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

A_PM = 390.5
WIDTH_PM = (45.0, 42.0)
PEAK_OF_DOSE = 0.0796  # mean counts of the brightest pixel a electron of dose: 18 counts at 1e4 e/A^2 and 15 pm/px
VACANCIES = 0.01
#: size [px], dose [e/A^2], pixel [pm], seeds
CASES = [
    *((512, dose, 15.0, range(5)) for dose in (1e3, 1e4, 1e5)),
    *((512, 1e4, pixel_pm, range(2)) for pixel_pm in (8.0, 11.0, 20.0, 30.0)),
    (2048, 1e5, 15.0, range(1)),
]


@dataclass(frozen=True)
class Case:
    """A counted image and where its columns are: ``position`` (n, 2) [px], ``sublattice`` (n,), ``bound`` (n,) [px] for
    one coordinate; ``vacancy`` (m, 2); ``width`` [px] of the bright ones."""

    image: np.ndarray
    position: np.ndarray
    sublattice: np.ndarray
    bound: np.ndarray
    vacancy: np.ndarray
    width: float


def perovskite(size: int, dose: float, seed: int = 0, pixel_pm: float = 15.0) -> Case:
    """A case of ``size`` x ``size`` pixels at ``dose`` [e/A^2]."""
    rng = np.random.default_rng(seed)
    a = A_PM / pixel_pm
    cells = int(size / a) - 1
    grid = np.stack(np.meshgrid(np.arange(cells), np.arange(cells), indexing="ij"), -1).reshape(-1, 2)
    margin = (size - (cells - 1) * a) / 2
    corner = margin + grid * a
    centre = corner + a / 2
    inside = (centre < size - margin + 1).all(axis=1)
    centre = centre[inside]
    centre[:, 1] += np.where(centre[:, 0] < size / 2, 1, -1) * 20 / pixel_pm
    kept = rng.random(len(centre)) >= VACANCIES
    vacancy, centre = centre[~kept], centre[kept]
    position = np.concatenate([corner, centre]) + rng.normal(0, 3 / pixel_pm, (len(corner) + len(centre), 2))
    sublattice = np.repeat([0, 1], [len(corner), len(centre)])
    width = np.array(WIDTH_PM)[sublattice] / pixel_pm
    peak = dose * (pixel_pm / 100) ** 2 * PEAK_OF_DOSE
    amplitude = peak * np.array([1.0, 0.5])[sublattice]
    y, x = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    brightness = 1 + 0.25 * np.sin(2 * np.pi * (0.6 * x + 0.3 * y))
    local = brightness[tuple(position.round().astype(int).T)]
    image = rng.poisson(paint((size, size), position, amplitude * local, width) + 0.1 * peak * brightness)
    image = image.astype(np.float64)
    bound = np.array([_bound(A * b, w, 0.1 * peak * b) for A, b, w in zip(amplitude, local, width, strict=True)])
    return Case(image, position, sublattice, bound, vacancy, WIDTH_PM[0] / pixel_pm)


def paint(shape, position, amplitude, width):
    """The sum of Gaussians on pixels, each within six widths."""
    image = np.zeros(shape)
    for (r, c), A, w in zip(position, amplitude, width, strict=True):
        reach = int(np.ceil(6 * w))
        r0, r1 = max(0, int(r) - reach), min(shape[0], int(r) + reach + 2)
        c0, c1 = max(0, int(c) - reach), min(shape[1], int(c) + reach + 2)
        gy = np.exp(-0.5 * ((np.arange(r0, r1) - r) / w) ** 2)
        gx = np.exp(-0.5 * ((np.arange(c0, c1) - c) / w) ** 2)
        image[r0:r1, c0:c1] += A * np.outer(gy, gx)
    return image


def _bound(A, w, b):
    """Cramer-Rao deviation of one coordinate of a lone Gaussian column with unknown position, amplitude, width and
    background on Poisson pixels; by symmetry the position separates from the rest."""
    reach = np.arange(-int(8 * w) - 1, int(8 * w) + 2)
    y, x = np.meshgrid(reach, reach, indexing="ij")
    g = A * np.exp(-0.5 * (x**2 + y**2) / w**2)
    return 1 / np.sqrt(((g * x / w**2) ** 2 / (g + b)).sum())


def score(
    case: Case, found: np.ndarray, sigma: np.ndarray | None = None, vacant: np.ndarray | None = None
) -> dict[str, float]:
    """Precision, recall, deviation over the bound and calibration of ``found`` (n, 2) [px], away from the border; the
    share of vacancies that was filled, that ``vacant`` (m, 2) names, and of those named that are true."""
    reach = 0.3 * cKDTree(case.position).query(case.position, 2)[0][:, 1].mean()
    border = 3 * case.width
    size = np.array(case.image.shape)
    distance, which = cKDTree(found).query(case.position)
    hit = distance < reach
    inner = ((case.position > border) & (case.position < size - border)).all(axis=1)
    judged = ((found > border) & (found < size - border)).all(axis=1)
    true = cKDTree(case.position).query(found)[0] < reach
    result = {
        "precision": float(true[judged].mean()),
        "recall": float(hit[inner].mean()),
        "vacancies_filled": float((cKDTree(found).query(case.vacancy)[0] < reach).mean()) if len(case.vacancy) else 0.0,
    }
    error = found[which] - case.position
    for lattice, name in enumerate("AB"):
        mine = inner & hit & (case.sublattice == lattice)
        result[f"rmse_{name}_px"] = float(np.sqrt((error[mine] ** 2).mean()))
        result[f"rmse_{name}_over_bound"] = float(np.sqrt((error[mine] ** 2 / case.bound[mine, None] ** 2).mean()))
    if sigma is not None:
        z = error[inner & hit] / sigma[which[inner & hit]]
        result["within_one_sigma"] = float((np.abs(z) < 1).mean())
        result["z_deviation"] = float(z.std())
    if vacant is not None and len(case.vacancy) and len(vacant):
        result["vacancies_found"] = float((cKDTree(vacant).query(case.vacancy)[0] < reach).mean())
        result["vacancies_true"] = float((cKDTree(case.vacancy).query(vacant)[0] < reach).mean())
    return result


def ours(size: int, dose: float, pixel_pm: float, seed: int) -> dict[str, float]:
    """stemloop on a case, in a process of its own: CPU-seconds of the second call (the first compiles), memory."""
    from stemloop.describe import find_columns

    find_columns(perovskite(128, 1e5).image)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    case = perovskite(size, dose, seed, pixel_pm)
    begun = time.process_time()
    columns = find_columns(case.image)
    spent = time.process_time() - begun
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "cpu_s": spent,
        "memory_MB": memory,
        "memory_of_imports_MB": before,
        **score(case, columns.position, columns.sigma, columns.vacant),
    }


def theirs(python: str, size: int, dose: float, seed: int, most_s: float) -> dict[str, float]:
    """atomap on the same case, by the interpreter of its own environment."""
    case = perovskite(size, dose, seed)
    with tempfile.TemporaryDirectory() as folder:
        image, answer = Path(folder, "image.npy"), Path(folder, "answer.npz")
        np.save(image, case.image)
        script = Path(__file__).parent / "peers" / "atomap_columns.py"
        words = [python, str(script), str(image), str(answer), str(A_PM / 15.0)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=most_s)
        found = np.load(answer)
        return {
            "cpu_s": float(found["cpu_s"]),
            "memory_MB": float(found["memory_MB"]),
            **score(case, found["position"]),
        }


def main() -> None:
    """Every case in a process of its own, so that memory is its own."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--peer", metavar="PYTHON", help="the interpreter of an environment with atomap")
    words.add_argument("--case", nargs=4, metavar=("SIZE", "DOSE", "PIXEL", "SEED"), help=argparse.SUPPRESS)
    words.add_argument("--peer-seconds", type=float, default=900, help="the longest that one case may take atomap")
    asked = words.parse_args()
    if asked.case:
        size, dose, pixel_pm, seed = asked.case
        print(json.dumps(ours(int(size), float(dose), float(pixel_pm), int(seed))))
        return
    rows = []
    for size, dose, pixel_pm, seeds in CASES:
        for seed in seeds:
            again = [sys.executable, __file__, "--case", str(size), str(dose), str(pixel_pm), str(seed)]
            mine = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
            row = {"size": size, "dose_per_A2": dose, "pixel_pm": pixel_pm, "seed": seed, "stemloop": mine}
            if asked.peer and seed == 0 and pixel_pm == 15:
                row["atomap"] = theirs(asked.peer, size, dose, seed, asked.peer_seconds)
            rows.append(row)
            print(json.dumps(row), flush=True)
            keep(rows)


def keep(rows: list[dict[str, Any]]) -> None:
    """Write what was measured, with the hours of processor that a thousand frames of 2048 x 2048 would take."""
    hours = {
        f"{who}_cpu_hours_of_1000_frames_of_2048": 1000 * row[who]["cpu_s"] / 3600
        for row in rows
        for who in ("stemloop", "atomap")
        if row["size"] == 2048 and who in row
    }
    result = {"machine": {"cores": os.cpu_count(), "python": platform.python_version()}, **hours, "cases": rows}
    (Path(__file__).parent / "results" / "columns.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
