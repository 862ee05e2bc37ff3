"""Training of the network that finds atom columns, from nothing to shipped weights: ``./scripts/train atoms``.

It simulates random scenes, trains the members of the ensemble, calibrates them on other scenes, measures the whole
finder on a third set, and writes one ONNX file and its numbers beside it as JSON. No recorded image takes part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import stemloop
from stemloop.campaign.card import HEADING
from stemloop.campaign.training import SHIPPED
from stemloop.core.errors import StemloopError
from stemloop.core.record import content_hash
from stemloop.describe.network import AtomNetwork
from stemloop.learn.atomnet import SIDE, Example, Settings, ensemble, finished, train
from stemloop.learn.atomnet_calibrate import REACH, assigned, believed, best_threshold, fitted, join, stretch, usual
from stemloop.learn.atomnet_export import export
from stemloop.learn.atomnet_image import WIDTH, normalised, resampled, to_network
from stemloop.learn.network import torch_module
from stemloop.simulate import scenes
from stemloop.simulate.scenes import KINDS, scene

Floats = NDArray[np.float64]

#: How far the scale of an image may be misjudged: the largest ratio of a column's width to WIDTH, and its inverse.
MISJUDGED = 1.6
#: Examples that calibrate, and scenes of each kind that test.
CALIBRATION, TEST = 300, 10
#: Scenes of each kind that teach how far the whole finder is to be believed.
SURVEY = 30
_LEARN, _CALIBRATE, _TEST, _SURVEY = 0, 1, 2, 3


def example(seed: int, part: int, number: int) -> tuple[Example, str]:
    """Example ``number`` of a ``part`` (to learn, calibrate or test), and the kind of its scene."""
    rng = np.random.default_rng([seed, part, number])
    ratio = float(np.exp(rng.uniform(-1, 1) * np.log(MISJUDGED)))
    made = scene(rng, (SIDE + rng.uniform(2, 48)) / (WIDTH * ratio))
    small, exact = resampled(made.image, WIDTH * ratio / made.probe)
    small = normalised(small)
    corner = np.array([rng.integers(n - SIDE + 1) for n in small.shape])
    cut = small[corner[0] : corner[0] + SIDE, corner[1] : corner[1] + SIDE]
    position = to_network(made.position, exact) - corner
    log_width = np.log(made.width * exact.mean() / WIDTH)
    near = ((position > -CLOSE) & (position < SIDE - 1 + CLOSE)).all(axis=1)
    return Example(cut, position[near], log_width[near]), made.kind


#: Columns up to this far [px] beyond an example's border are known to it.
CLOSE = 4.0


def calibrated(network: Any, examples: Sequence[tuple[Example, str]], learnt: Sequence[Example]) -> dict[str, Any]:
    """The line of the chances, the threshold, and what is usual, by examples that the training has not seen."""
    torch = torch_module()

    def answer(part: Example) -> tuple[NDArray[np.float32], Floats]:
        with torch.no_grad():
            maps, features = network(torch.from_numpy(part.image[None, None]))
        return maps[0].numpy(), features[0].numpy().astype(np.float64)

    found: list[tuple[str, Floats, NDArray[np.bool_], int]] = []
    held_out = []
    for part, kind in examples:
        maps, features = answer(part)
        held_out.append(features)
        seen = join(maps)
        inner = _deep(part.position, CLOSE, part.image.shape)
        true = np.zeros(len(seen.position), bool)
        true[assigned(seen.position, part.position, REACH)[0]] = True
        judged = _deep(seen.position, CLOSE, part.image.shape)
        found.append((kind, seen.chance[judged], true[judged], int(inner.sum())))
    chance = np.concatenate([f[1] for f in found])
    true = np.concatenate([f[2] for f in found])
    weight = np.concatenate([np.full(len(f[2]), 1 / (len(f[2]) + 20)) for f in found])
    line = fitted(chance, true, weight)
    sets = []
    for kind in KINDS:
        mine = [f for f in found if f[0] == kind]
        if kind != "nothing" and mine:
            joined = np.concatenate([f[1] for f in mine]), np.concatenate([f[2] for f in mine])
            sets.append((believed(joined[0], *line), joined[1], sum(f[3] for f in mine)))
    known = usual(np.array([answer(part)[1] for part in learnt]), np.array(held_out))
    return {"line": line, "threshold": best_threshold(sets), "usual": known}


def _deep(position: Floats, edge: float, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which places (n, 2) lie farther than ``edge`` [px] from the border of an image of ``shape``."""
    return np.asarray(((position > edge) & (position < np.array(shape) - 1 - edge)).all(axis=1))


def surveyed(network: AtomNetwork, seed: int, each: int) -> dict[str, Any]:
    """What the whole finder's answers on ``each`` scenes of every kind teach: the ``stretch`` of its deviations where
    there is no lattice, and the line that makes its probabilities the share of finds that are ``present``."""
    pulls: list[Floats] = []
    chances, trues = [np.zeros(0)], [np.zeros(0, bool)]
    for number, kind in enumerate(KINDS):
        for i in range(each):
            made = scene(np.random.default_rng([seed, _SURVEY, number, i]), 64.0, kind)
            found = network.find(made.image, made.pixel_pm * 1e-3 if i % 2 else None)
            columns = found.columns
            mine, other = assigned(columns.position, made.shown, 1.5 * made.probe)
            judged = _deep(columns.position, 3 * made.probe, made.image.shape)
            true = np.zeros(len(columns), bool)
            true[mine] = True
            chances.append(columns.p_present[judged])
            trues.append(true[judged])
            if not found.lattice:
                pulls.append(((columns.position[mine] - made.shown[other]) / columns.sigma[mine])[judged[mine]])
    weight = np.concatenate([np.full(len(t), 1 / (len(t) + 20)) for t in trues])
    return {
        "stretch": stretch(pulls),
        "present": fitted(np.concatenate(chances)[:, None], np.concatenate(trues), weight),
    }


def measured(network: AtomNetwork, seed: int, each: int) -> dict[str, dict[str, float]]:
    """The whole finder on ``each`` new scenes of every kind: precision, recall, F1 within one and a half widths, with
    and without the pixel size told; finds in an empty scene; deviations from where the image shows the columns."""
    table: dict[str, dict[str, float]] = {}
    for number, kind in enumerate(KINDS):
        for told in (True, False):
            hits = finds = total = 0
            pulls: list[Floats] = []
            for i in range(each):
                made = scene(np.random.default_rng([seed, _TEST, number, i]), 64.0, kind)
                columns = network.find(made.image, made.pixel_pm * 1e-3 if told else None).columns
                edge = 3 * made.probe
                inner, judged = (_deep(p, edge, made.image.shape) for p in (made.shown, columns.position))
                mine, other = assigned(columns.position, made.shown, 1.5 * made.probe)
                finds, total = finds + int(judged.sum()), total + int(inner.sum())
                hits += int((judged[mine] & inner[other]).sum())
                pulls.append(((columns.position[mine] - made.shown[other]) / columns.sigma[mine])[judged[mine]])
            numbers = {"scenes": float(each), "columns": float(total), "found": float(finds)}
            if total:
                precision, recall = hits / max(1, finds), hits / total
                numbers |= {"precision": precision, "recall": recall, "F1": 2 * hits / (finds + total)}
                numbers["within one sigma"] = float(np.mean(np.abs(np.concatenate(pulls)) < 1))
            table[kind + ("" if told else ", pixel size unknown")] = numbers
    return table


def train_atoms(
    out: Path,
    examples: int,
    settings: Settings,
    report: Callable[[str, int, int, float], None],
    kept: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Simulate, train, calibrate, measure; write ``out``/atoms.onnx and ``out``/atoms.json, and give the numbers.

    ``report(what, done, of, loss)`` is called as it goes on. Each stage of the training that is done is written to the
    folder ``kept``; with ``resume`` those that lie there are not done again.
    """
    if kept is not None:
        kept = kept / content_hash({"examples": examples, **asdict(replace(settings, members=0))})[:12]
        kept.mkdir(parents=True, exist_ok=True)
        for stage in () if resume else kept.glob("*.pt"):
            stage.unlink()
    learnt = []
    needed = 2 * CALIBRATION if finished(settings, kept) else examples
    for i in range(min(needed, examples)):
        learnt.append(example(settings.seed, _LEARN, i)[0])
        report("simulating", i + 1, needed, 0.0)
    members = train(
        learnt, settings, lambda m, i, n, value: report(f"member {m}" if m >= 0 else "all", i, n, value), kept
    )
    held_out = [example(settings.seed, _CALIBRATE, i) for i in range(CALIBRATION)]
    known = calibrated(ensemble(members), held_out, learnt[: 2 * CALIBRATION])
    report("calibrated", 1, 1, 0.0)
    return shipped(ensemble(members), known, examples, settings, out)


def shipped(network: Any, known: dict[str, Any], examples: int, settings: Settings, out: Path) -> dict[str, Any]:
    """Survey the calibrated ``network``, measure it, write it and its numbers to ``out``, and give these."""
    known["usual"] = {k: np.asarray(v).round(6).tolist() for k, v in known["usual"].items()}
    card: dict[str, Any] = {
        "version": stemloop.__version__,
        "settings": asdict(settings),
        "examples": examples,
        "scenes": {name: getattr(scenes, name) for name in ("KINDS", "PIXEL_PM", "PROBE", "DOSE")},
        "misjudged": MISJUDGED,
        **known,
        "stretch": 1.0,
        "present": (1.0, 0.0),
    }
    export(network, card, out / "atoms.onnx")
    card |= surveyed(AtomNetwork(out / "atoms.onnx"), settings.seed, SURVEY)
    export(network, card, out / "atoms.onnx")
    return measure_atoms(out)


def measure_atoms(folder: Path) -> dict[str, Any]:
    """Measure ``folder``/atoms.onnx on scenes that took no part in its training; write ``folder``/atoms.json."""
    network = AtomNetwork(folder / "atoms.onnx")
    card = {k: v for k, v in network.card.items() if k != "usual"}
    card["test"] = measured(network, card["settings"]["seed"], TEST)
    (folder / "atoms.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def write_measured(card: dict[str, Any], page: Path) -> None:
    """Replace everything after the heading of the measured part of ``page`` by the numbers of ``card``."""
    head = page.read_text().split(HEADING)[0]
    names = ("scenes", "columns", "found", "precision", "recall", "F1", "within one sigma")
    lines = [
        HEADING,
        "",
        f"{card['examples']} examples; settings: `{card['settings']}`; threshold {card['threshold']}.",
        "",
    ]
    lines += ["| scene | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind, numbers in card["test"].items():
        shown = (f"{numbers[n]:.3f}".rstrip("0").rstrip(".") if n in numbers else "" for n in names)
        lines.append(f"| {kind} | {' | '.join(shown)} |")
    page.write_text(head + "\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """The command behind ``./scripts/train atoms``."""
    from rich.progress import Progress

    parser = argparse.ArgumentParser(
        prog="./scripts/train atoms", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--examples", type=int, default=EXAMPLES, help=f"simulated images (default {EXAMPLES})")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of atoms.onnx and atoms.json")
    parser.add_argument("--members", type=int, default=Settings.members)
    parser.add_argument("--data", type=Path, default=Path("build/atoms"), help="folder of what is done of the training")
    parser.add_argument("--resume", action="store_true", help="go on with what lies in DATA")
    parser.add_argument("--card", type=Path, help="page whose measured part is written anew")
    parser.add_argument("--threads", type=int, default=Settings.threads)
    parser.add_argument("--measure", action="store_true", help="train nothing: measure what lies in OUT anew")
    given = parser.parse_args(arguments)
    settings = Settings(members=given.members, epochs=given.epochs, seed=given.seed, threads=given.threads)
    try:
        with Progress() as progress:
            tasks: dict[str, Any] = {}

            def report(what: str, done: int, of: int, value: float) -> None:
                if what not in tasks:
                    tasks[what] = progress.add_task(what, total=of)
                note = f"{what}  loss {value:.3f}" if value else what
                progress.update(tasks[what], completed=done, description=note)

            card = (
                measure_atoms(given.out)
                if given.measure
                else train_atoms(given.out, given.examples, settings, report, given.data, given.resume)
            )
        if given.card:
            write_measured(card, given.card)
    except StemloopError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


#: Simulated images of the shipped training.
EXAMPLES = 6000
