"""Training on simulated patterns, from nothing to weights that can be shipped: ``./scripts/train cbed``.

It simulates the training set and two smaller sets of other fields (what exists is kept), trains (an interrupted
training resumes), calibrates on the second set, measures on the third and on fields outside the trained ranges, and
writes one ONNX file and its numbers beside it as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import stemloop
from stemloop.campaign.card import write_measured
from stemloop.core.errors import StemloopError
from stemloop.core.record import content_hash
from stemloop.core.structure import PHASES
from stemloop.core.units import ANGSTROM_M, wavelength_m
from stemloop.learn.calibrate import calibrate
from stemloop.learn.evaluate import measured, table
from stemloop.learn.examples import DOSE_RANGE, Examples, load
from stemloop.learn.export import export
from stemloop.learn.train import Settings, train
from stemloop.simulate.examples import POSITIONS, USUAL, USUALLY, Ranges, examples, write

#: How the patterns of a set are shared among the materials.
SHARES = {"MoS2": 0.425, "graphene": 0.425, "SrTiO3": 0.1225, "vacuum": 0.026}
#: Fields of each material in the sets that calibrate and that test, and positions on each.
HELD_OUT = {"MoS2": 24, "graphene": 24, "SrTiO3": 24, "vacuum": 24}
HELD_OUT_POSITIONS = 40
SHIPPED = Path(__file__).parents[1] / "describe" / "weights"

#: Ranges that the training never sees, by name.
OUTSIDE = {
    "strain of 5 to 7 %": replace(USUALLY, strain=(0.06, 0.07)),
    "semiangle 10 to 25 % above": replace(USUALLY, radius_per_A=(0.31, 0.35), usual=0.0),
    "energy 30 to 45 keV": replace(USUALLY, energy_eV=(30e3, 45e3), usual=0.0),
    "source of 3 A": replace(USUALLY, source_m=(3e-10, 3e-10)),
}


def bounds(ranges: Ranges) -> dict[str, tuple[float, float]]:
    """The trained ranges of what is known of a beam, as the describer checks them."""
    long, short = (wavelength_m(e) / ANGSTROM_M for e in ranges.energy_eV)
    return {"radius_per_A": ranges.radius_per_A, "wavelength_A": (short, long), "electrons": DOSE_RANGE}


def simulated(ranges: Ranges, fields: int, positions: int, seed: int) -> Examples:
    """Examples of ``fields`` random fields of each crystal, ``positions`` each, drawn from ``ranges``."""
    parts: list[dict[str, NDArray[Any]]] = []
    for material in ("MoS2", "graphene", "SrTiO3"):
        for number in range(fields):
            parts.append(examples(material, number, seed, ranges, positions))
    names = Examples.__dataclass_fields__
    return Examples(**{name: np.concatenate([part[name] for part in parts]) for name in names})


def outside(network: Any, factors: NDArray[np.float64], test: Examples, seed: int, fields: int) -> dict[str, Any]:
    """What is measured outside the trained ranges, by name of the range; dose and blur act on ``test`` itself."""
    found = {
        name: table(measured(network, simulated(ranges, fields, 40, seed + 1), factors, seed))
        for name, ranges in OUTSIDE.items()
    }
    for name, electrons in (("3e3 electrons", 3e3), ("3e7 electrons", 3e7)):
        found[name] = table(measured(network, test, factors, seed, dose=electrons))
    found["detector blur of 1 pixel"] = table(measured(network, test, factors, seed, dose=6e5, blur_px=1.0))
    return found


def usual(test: Examples) -> Examples:
    """Those of ``test`` whose beam is the usual one of their material, within 10 %."""
    usual_eV = np.array([USUAL[PHASES[p]][0] for p in test.phase])
    usual_rad = np.array([USUAL[PHASES[p]][1] for p in test.phase])
    near = (np.abs(test.energy_eV / usual_eV - 1) < 1e-3) & (np.abs(test.semiangle_rad / usual_rad - 1) < 0.1)
    return test.take(near & (test.phase != PHASES.index("vacuum")))


def train_cbed(
    out: Path,
    data: Path,
    patterns: int,
    settings: Settings,
    *,
    resume: bool = False,
    start: Path | None = None,
    outside_fields: int = 3,
) -> dict[str, Any]:
    """Simulate, train, calibrate, measure and write ``out/cbed.onnx`` and ``out/cbed.json``; returns the latter.

    Parameters
    ----------
    data : folder of the sets and the checkpoint. patterns : how many the training set shall hold; what the folder
        holds beyond them is used too. resume : go on from the checkpoint. start : begin with the weights of another
        checkpoint. outside_fields : fields of each crystal for each range outside the trained ones; 0 for none.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, TimeRemainingColumn(), TextColumn("{task.fields[note]}")) as progress:
        learnt, held_out, test = _sets(data, patterns, settings.seed, progress)
        task = progress.add_task("training steps", note="", total=None)

        def report(step: int, steps: int, parts: dict[str, float]) -> None:
            note = "  ".join(f"{name} {parts[name]:.2f}" for name in PHASES if name in parts)
            progress.update(task, completed=step, total=steps, note=note)

        network = train(learnt, settings, data / "checkpoint.pt", resume, report, start)
        task = progress.add_task("measuring", note="", total=None)
        factors = calibrate(network, held_out, settings.seed)
        card: dict[str, Any] = {
            "version": stemloop.__version__,
            "seed": settings.seed,
            "settings": asdict(settings),
            "started from": None if start is None else content_hash(start.read_bytes()),
            "drawn from": asdict(USUALLY),
            "ranges": bounds(USUALLY),
            "patterns": {"learnt": len(learnt), "calibrated": len(held_out), "tested": len(test)},
            "factors": factors,
            "test": table(measured(network, test, factors, settings.seed + 2)),
            "usual beam, 6e5 electrons": table(
                measured(network, usual(test), factors, settings.seed + 3, dose=6e5, blur_px=0.45)
            ),
            "outside": outside(network, factors, test, settings.seed + 4, outside_fields) if outside_fields else {},
        }
        progress.update(task, completed=1, total=1)
    export(network, card, out / "cbed.onnx")
    (out / "cbed.json").write_text(json.dumps({**card, "factors": factors.round(4).tolist()}, indent=1) + "\n")
    return card


def _sets(data: Path, patterns: int, seed: int, progress: Any) -> tuple[Examples, Examples, Examples]:
    """The training, calibration and test sets under ``data``, simulated as far as they are not there."""
    fields = {m: int(np.ceil(share * patterns / POSITIONS[m])) for m, share in SHARES.items()}
    _follow(progress, "simulating fields to learn", write(data, fields, seed))
    found = [load(data)]
    for number, name in enumerate(("calibration", "test")):
        shards = write(data / name, HELD_OUT, 1001 + number + seed, positions=HELD_OUT_POSITIONS)
        _follow(progress, f"simulating fields to {name}", shards)
        found.append(load(data / name))
    return found[0], found[1], found[2]


def _follow(progress: Any, name: str, shards: Iterable[tuple[int, int]]) -> None:
    task = progress.add_task(name, note="", total=None)
    for done, total in shards:
        progress.update(task, completed=done, total=total)


def main(arguments: list[str] | None = None) -> int:
    """The command behind ``./scripts/train``: ``cbed`` here, ``atoms`` in :mod:`stemloop.campaign.atom_training`."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["atoms"]:
        from stemloop.campaign import atom_training

        return atom_training.main(words[1:])
    parser = argparse.ArgumentParser(
        prog="./scripts/train cbed", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("network", choices=["cbed", "atoms"], help="atoms has options of its own: atoms --help")
    parser.add_argument("--examples", type=int, default=75_680, help="simulated patterns (default 75680)")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of cbed.onnx and cbed.json")
    parser.add_argument("--data", type=Path, default=Path("build/cbed"), help="folder of the training set")
    parser.add_argument("--start", type=Path, help="checkpoint whose weights are the first ones")
    parser.add_argument("--card", type=Path, help="page whose measured part is written anew")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(words)
    settings = Settings(epochs=given.epochs, seed=given.seed, threads=given.threads)
    try:
        card = train_cbed(given.out, given.data, given.examples, settings, resume=given.resume, start=given.start)
        if given.card:
            write_measured(card, given.card)
    except StemloopError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
