"""How large a supercell the strain energy needs, and what an energy surface costs.

    python benchmarks/energetics.py [--cache FOLDER] [--workers 2] [--materials graphene MoS2]

Each supercell is referred to its own equilibrium (its own lattice and its own zero), as the energy models do. Energies
are clamped-ion strain energies [meV a primitive cell]; ``off`` is the largest relative difference from the largest
supercell. ``surface``: a fresh energy surface in the default supercell for 150 descriptors whose strains are normal
with a deviation of 0.8 % in each of e_mean, e_diff, e_xy and a measuring deviation of 0.1 %; its calculator calls and
their CPU seconds, and its errors at 5 strains inside its hull that are calculated directly.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from stemloop.core.structure import PHASES, Descriptors
from stemloop.energetics import MATERIALS, Task, energy_model
from stemloop.energetics.models import deformed

SUPERCELLS = {"graphene": (4, 5, 7, 8), "MoS2": (3, 4, 5, 6)}
STRAINS = {"biaxial_2": (0.02, 0.02, 0.0), "uniaxial_3": (0.03, 0.0, 0.0), "shear_2": (0.02, -0.02, 0.0)}


def convergence(material: str, cache: str, workers: int) -> list[dict]:
    rows = []
    for repeats in SUPERCELLS[material]:
        model = energy_model(material, supercell=repeats, cache=cache, workers=workers)
        energies, _ = model.calculate(np.array(list(STRAINS.values())))
        tasks = [Task.of(deformed(model.equilibrium.supercell, e), model.calculator) for e in STRAINS.values()]
        seconds = [result.seconds for result in model.calculations.run(tasks)]
        model.calculations.close()
        rows.append(
            {
                "supercell": repeats,
                "atoms": len(model.equilibrium.supercell),
                "lattice_A": list(model.equilibrium.lengths),
                "energy_meV": {k: round(1e3 * e, 4) for k, e in zip(STRAINS, energies, strict=True)},
                "cpu_s_a_call": round(float(np.mean(seconds)), 3),
            }
        )
    largest = rows[-1]["energy_meV"]
    for row in rows:
        row["off"] = round(max(abs(row["energy_meV"][k] / largest[k] - 1) for k in STRAINS), 4)
    return rows


def surface(material: str, cache: str, workers: int) -> dict:
    n, rng = 150, np.random.default_rng(0)
    mean, sigma, phase, site = np.zeros((n, 7)), np.zeros((n, 7)), np.zeros((n, 4)), np.zeros((n, 3))
    mean[:, :3], sigma[:, :3], site[:, 0] = rng.normal(0, 0.008, (n, 3)), 1e-3, 1.0
    phase[:, PHASES.index(material)] = 1.0
    descriptors = Descriptors(mean, sigma, phase, site, np.zeros(n))
    model = energy_model(material, cache=cache, workers=workers)
    started = time.perf_counter()
    for part in np.array_split(np.arange(n), 10):
        said = model(descriptors.take(part))
    wall = time.perf_counter() - started
    counts = dict(model.counts)
    drawn = rng.normal(0, 0.008, (50, 3))
    held = drawn[model.surface.inside(drawn)][:5]
    direct, _ = model.calculate(held)
    learned = model.surface.answer(held)
    many = rng.normal(0, 0.005, (10_000, 3))
    begun = time.perf_counter()
    model.surface.energies(many, tolerance_eV=None)
    fast = time.perf_counter() - begun
    model.calculations.close()
    return {
        "supercell": model.repeats,
        **counts,
        "wall_s": round(wall, 1),
        "workers": workers,
        "median_sigma_meV": round(1e3 * float(np.median(said.sigma)), 4),
        "held_out_error_meV": [round(1e3 * float(e), 5) for e in learned.energy - direct],
        "held_out_deviation_meV": [round(1e3 * float(s), 5) for s in learned.sigma],
        "ms_for_10000_strains": round(1e3 * fast, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", help="folder of stored results (default: a new one)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--materials", nargs="+", default=list(SUPERCELLS), choices=list(SUPERCELLS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as fresh:
        found = {
            material: {
                "calculator": MATERIALS[material].calculator,
                "surface": surface(material, fresh, asked.workers),
                "convergence": convergence(material, asked.cache or fresh, asked.workers),
            }
            for material in asked.materials
        }
    report = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(), **found}
    text = json.dumps(report, indent=1)
    place = Path(__file__).parent / "results" / "energetics.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
