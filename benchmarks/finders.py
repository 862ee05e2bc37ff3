"""The two finders of atom columns on the same images: the classical one and the network.

Synthetic: the perovskite of ``columns.py`` at three pixel sizes and three doses; single atoms on an amorphous film, of
a seed that no training uses; films without any atom. Recorded: four HAADF images of single Pt atoms on carbon with
human labels (S. Mitchell et al., J. Am. Chem. Soc. (2022), doi:10.1021/jacs.1c12466), which took no part in the
training, the calibration or the threshold of the probability; which widths are tried was set with them in view.

Run: python benchmarks/finders.py [--data FOLDER]   (FOLDER holds haadf/AtomDetection_ACSTEM)
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import tifffile
from columns import perovskite
from scipy import optimize

from stemloop.describe import finders
from stemloop.simulate.scenes import scene

PIXELS_PM, DOSES = (8.0, 15.0, 30.0), (1e3, 1e4, 1e5)
LABELLED_PIXEL_NM, WITHIN_PX = 0.0293, (3.0, 5.0)
SEED = 20_000  # the training's own scenes are drawn from [seed, part, number]


def hits(found: np.ndarray, true: np.ndarray, within: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pairs, one to one, that are nearer than ``within`` px (least squared distance in sum)."""
    if not len(found) or not len(true):
        return np.zeros(0, int), np.zeros(0, int)
    cost = np.minimum(((found[:, None] - true) ** 2).sum(-1), within**2)
    one, other = optimize.linear_sum_assignment(cost)
    near = cost[one, other] < within**2
    return one[near], other[near]


def rates(hit: int, found: int, true: int) -> dict[str, float]:
    return {
        "precision": round(hit / found, 4) if found else float("nan"),
        "recall": round(hit / true, 4) if true else float("nan"),
        "F1": round(2 * hit / (found + true), 4) if found + true else float("nan"),
        "found": found,
        "true": true,
    }


def lattice(find, pixel_pm: float, dose: float) -> dict[str, float]:
    """A perovskite of 512 x 512 px: rates away from the border, deviation over the bound, calibration, time."""
    case = perovskite(512, dose, 0, pixel_pm)
    begun = time.process_time()
    columns = find(case.image)
    spent = time.process_time() - begun
    edge = 3 * 45 / pixel_pm
    inner, judged = (((p > edge) & (p < 511 - edge)).all(axis=1) for p in (case.position, columns.position))
    one, other = hits(columns.position, case.position, 0.3 * 276 / pixel_pm)
    both = judged[one] & inner[other]
    error = (columns.position[one] - case.position[other])[both]
    return {
        **rates(int(both.sum()), int(judged.sum()), int(inner.sum())),
        "rmse_over_bound": round(float(np.sqrt(np.mean((error / case.bound[other][both][:, None]) ** 2))), 3),
        "within_one_sigma": round(float(np.mean(np.abs(error) < columns.sigma[one][both])), 3),
        "cpu_s": round(spent, 3),
    }


def atoms_on_film(find, kind: str, scenes: int, told: bool) -> dict[str, float]:
    """Scenes of ``kind``: rates within one and a half widths of the probe of where the image shows the columns, away
    from the border; of the coordinates of the hits those within one deviation."""
    total, pulls = np.zeros(3, int), [np.zeros((0, 2))]
    for number in range(scenes):
        made = scene(np.random.default_rng([SEED, number]), 64.0, kind)
        columns = find(made.image, made.pixel_pm * 1e-3 if told else None)
        edge, size = 3 * made.probe, np.array(made.image.shape) - 1
        inner, judged = (((p > edge) & (p < size - edge)).all(axis=1) for p in (made.shown, columns.position))
        one, other = hits(columns.position, made.shown, 1.5 * made.probe)
        both = judged[one] & inner[other]
        total += [int(both.sum()), int(judged.sum()), int(inner.sum())]
        pulls.append(((columns.position[one] - made.shown[other]) / columns.sigma[one])[both])
    within = np.abs(np.concatenate(pulls)) < 1
    held = {"within_one_sigma": round(float(within.mean()), 3)} if within.size else {}
    return {**rates(*(int(n) for n in total)), **held, "scenes": scenes}


def labelled(folder: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Name, image and labels (n, 2) (row, col) of the recorded images."""
    cases = []
    for table in sorted(folder.glob("*_Results.csv")):
        number = table.name.split("_")[0]
        rows = list(csv.DictReader(table.open()))
        place = np.array([[float(row["Y"]), float(row["X"])] for row in rows])
        cases.append((number, tifffile.imread(next(folder.glob(f"{number}_HAADF*.tif"))).astype(float), place))
    return cases


def recorded(find, cases, told: bool) -> dict[str, object]:
    """Rates of every image and of all together, at each distance."""
    found = [find(image, LABELLED_PIXEL_NM if told else None).position for _, image, _ in cases]
    result: dict[str, object] = {}
    for within in WITHIN_PX:
        counts = [
            (len(hits(f, place, within)[0]), len(f), len(place)) for f, (_, _, place) in zip(found, cases, strict=True)
        ]
        result[f"{within:g} px"] = {
            **rates(*(int(n) for n in np.sum(counts, axis=0))),
            "images": {name: rates(*c) for (name, _, _), c in zip(cases, counts, strict=True)},
        }
    return result


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get("STEMLOOP_DATA") or Path(__file__).parents[2] / "shared" / "data"
    words.add_argument("--data", type=Path, default=Path(default))
    words.add_argument("--scenes", type=int, default=20)
    words.add_argument("--finder", choices=list(finders()), help="measure this one anew and keep the other's numbers")
    asked = words.parse_args()
    folder = asked.data / "haadf" / "AtomDetection_ACSTEM"
    cases = labelled(folder) if folder.is_dir() else []
    page = Path(__file__).parent / "results" / "finders.json"
    result: dict[str, object] = json.loads(page.read_text()) if asked.finder and page.exists() else {}
    result["machine"] = {"cores": os.cpu_count(), "python": platform.python_version()}
    for name, find in finders().items():
        if asked.finder not in (None, name):
            continue
        find(perovskite(128, 1e5).image)  # compiles and loads
        result[name] = {
            "perovskite": {f"{p:g} pm, {d:g} e/A2": lattice(find, p, d) for p in PIXELS_PM for d in DOSES},
            "single atoms on a film": atoms_on_film(find, "single atoms", asked.scenes, True),
            "single atoms on a film, pixel size unknown": atoms_on_film(find, "single atoms", asked.scenes, False),
            "nothing": atoms_on_film(find, "nothing", asked.scenes, True),
            "labelled Pt atoms": recorded(find, cases, True) if cases else "not there",
            "labelled Pt atoms, pixel size unknown": recorded(find, cases, False) if cases else "not there",
        }
        print(name, json.dumps(result[name], indent=1), flush=True)
    page.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
