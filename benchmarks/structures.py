"""From counted images to structures whose truth is known: the whole way, many seeds.

- A film of LaCoO3 on SrTiO3 with vacancies: which columns are primary and which secondary, and which phase.
- Ferroelectrics: flux closure (four walls of 90 degrees, one vortex), stripes (walls of 180 degrees, no vortex), an
  array of a vortex and four antivortices.
- Edge dislocations in several crystals: their Burgers vectors.

Only what the program finds in the image (``find_columns``, ``assign``, ``phases``, ``polar``, ``find_defects``) is
judged; nothing is told to it.

Run: python benchmarks/structures.py [--seeds N]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from describe import domains
from stemloop.describe.atoms import find_columns
from stemloop.describe.defects import find_defects
from stemloop.describe.lattices import assign
from stemloop.describe.phases import phases
from stemloop.describe.polar import polar, vortices, walls
from stemloop.simulate.elasticity import EdgeDislocation
from stemloop.simulate.pictures import PLANES, counted, layout, mean_image, without

PIXEL_PM = 15.0
BURGERS = ((1, 0), (0, 1), (1, 1), (0, -1), (-1, 1))
CRYSTALS = ("SrTiO3[001]", "BaTiO3[100]", "LaCoO3[001]", "MoS2", "graphene")


def film(dose: float, seed: int) -> dict[str, int]:
    """Columns of a film with 1 % vacancies on both sublattices: known, sites right, phases right; vacancies found."""
    rng = np.random.default_rng([seed, 1])
    whole, upper = domains.film()
    whole = domains.inner(whole)
    upper = whole.position[:, 0] < 250.0
    perfect = whole
    for site in (0, 1):
        whole = without(whole, 0.01, site, rng)
    image = counted(mean_image(whole, dose), rng)
    columns = find_columns(image)
    assignment = assign(columns, image.shape)
    apart, nearest = cKDTree(perfect.position).query(columns.position)
    known = apart < 4
    site, truth = assignment.site[known], perfect.site[nearest[known]]
    phase = phases(columns, assignment)
    label, layer = phase.label[known], upper[nearest[known]]
    right = [(label == layer).sum(), (label == 1 - layer).sum()]
    gone = perfect.position[cKDTree(whole.position).query(perfect.position)[0] > 4]
    gone = gone[((gone > 30) & (gone < np.array(image.shape) - 30)).all(axis=1)]
    seen = (
        cKDTree(assignment.vacant).query(gone)[0] < 5 if len(assignment.vacant) and len(gone) else np.zeros(len(gone))
    )
    return {
        "columns": int(known.sum()),
        "sites_right": int((site == truth).sum()),
        "phases": int(phase.n),
        "phases_right": int(max(right)),
        "strangers": int((~known).sum()),
        "vacancies": len(gone),
        "vacancies_found": int(seen.sum()),
    }


def closure(dose: float, seed: int) -> bool:
    found = polar(*domains.seen(domains.displaced(domains.closure), dose, seed))
    cores = vortices(found)
    return [d.detail["type"] for d in walls(found)] == ["90"] * 4 and [d.detail["winding"] for d in cores] == [1]


def vortex(dose: float, seed: int) -> bool:
    """The vortex of a flux closure alone, whatever is said of its walls."""
    found = polar(*domains.seen(domains.displaced(domains.closure), dose, seed))
    return [d.detail["winding"] for d in vortices(found)] == [1]


def stripes(dose: float, seed: int) -> bool:
    found = polar(*domains.seen(domains.displaced(domains.stripes), dose, seed))
    return [d.detail["type"] for d in walls(found)] == ["180"] * 3 and not vortices(found)


def array(dose: float, seed: int) -> bool:
    found = polar(*domains.seen(domains.displaced(domains.array, shape=(512, 512)), dose, seed))
    return sorted(d.detail["winding"] for d in vortices(found)) == [-1, -1, -1, -1, 1] and not walls(found)


def dislocation(plane: str, cells: tuple[int, int], dose: float, seed: int) -> tuple[bool, float]:
    """Whether the planted Burgers vector is found (one core, or two that add up), and how far off its core is."""
    shape, core = (300, 320), np.array([151.3, 157.1])
    vectors = PLANES[plane].vectors_pm / PIXEL_PM
    vector = np.array(cells) @ vectors
    field = EdgeDislocation(tuple(core), tuple(vector))
    whole = layout(plane, shape, PIXEL_PM, warp=lambda p: p + field.displacement(p), margin=-30.0)
    image = counted(mean_image(whole, dose), np.random.default_rng([seed, 2]))
    columns = find_columns(image)
    found = [d for d in find_defects(columns, assign(columns, image.shape), image.shape) if d.kind == "dislocation"]
    if len(found) not in (1, 2):
        return False, float("nan")
    total = np.sum([d.detail["burgers"] for d in found], axis=0)
    off = np.hypot(*(np.mean([d.place[0] for d in found], axis=0) - core)) / np.hypot(*vectors[0])
    return bool(np.hypot(*(total - vector)) < 0.15 * np.hypot(*vector)), float(off)


def count(case: Callable[[float, int], bool], dose: float, seeds: int) -> str:
    return f"{sum(case(dose, seed) for seed in range(seeds))} of {seeds}"


def measure(seeds: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "what": "structures found in counted images of 15 pm pixels",
        "machine": {"python": platform.python_version()},
        "seeds": seeds,
        "film": {},
        "domains": {},
        "dislocations": {},
    }
    for dose in (1e4, 1e3):
        total: Counter[str] = Counter()
        for seed in range(seeds):
            total += Counter({k: v for k, v in film(dose, seed).items() if k != "phases"})
        result["film"][f"{dose:.0e}"] = dict(total)
        result["domains"][f"{dose:.0e}"] = {
            c.__name__: count(c, dose, seeds) for c in (closure, vortex, stripes, array)
        }
        rows = [dislocation(p, b, dose, seed) for seed, p in enumerate(CRYSTALS) for b in BURGERS]
        offs = [off for _, off in rows if np.isfinite(off)]
        result["dislocations"][f"{dose:.0e}"] = {
            "right": sum(ok for ok, _ in rows),
            "of": len(rows),
            "core_off_cells_median": float(np.median(offs)),
            "core_off_cells_max": max(offs),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=10)
    found = measure(parser.parse_args().seeds)
    path = Path(__file__).parent / "results" / "structures.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
