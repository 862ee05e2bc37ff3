"""``demo``, ``run``, ``resume``, ``list`` and ``verify``: whole experiments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemloop.campaign.settings import Settings


def _budgets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the twin and of every random choice (default 0)")
    parser.add_argument("--target-sigma", type=float, metavar="X", help="wanted largest deviation over the field")
    parser.add_argument("--max-points", type=int, metavar="N", help="stop after N measured positions")
    parser.add_argument("--max-dose", type=float, metavar="E", help="stop before E electrons have been spent")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="stop after S seconds")
    parser.add_argument("--acquisition", metavar="NAME", help="uncertainty, expected-improvement, random or grid")
    parser.add_argument("--calculator", metavar="NAME", help="GFN1-xTB or CHGNet (default: the material's own)")
    parser.add_argument("--batch", type=int, metavar="N", help="positions a decision")
    parser.add_argument("--initial", type=int, metavar="N", help="positions before the first decision")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default runs/RECIPE-...)")


def add(verbs: Any) -> None:
    """Add the verbs of whole experiments."""
    demo = verbs.add_parser("demo", help="a whole autonomous experiment on the embedded twin")
    demo.add_argument("--specimen", default="MoS2", help="MoS2, graphene or SrTiO3 (default MoS2)")
    demo.add_argument("--recipe", default="strain-energy", help="strain-energy (default) or defect-energy")
    demo.add_argument("--damage", action="store_true", help="let the beam damage the specimen")
    _budgets(demo)
    demo.set_defaults(do=_start)

    run = verbs.add_parser("run", help="run a recipe on an instrument")
    run.add_argument("recipe", help="strain-energy, defect-energy or eels-map")
    run.add_argument(
        "--instrument", default="twin", metavar="KIND", help="twin (default), nion:twin, nion:usim or replay:FILE"
    )
    run.add_argument("--specimen", default="MoS2", help="of the twin (default MoS2)")
    run.add_argument("--scalarizer", metavar="NAME", help="of spectra: Ti-L23 (default), O-K, thickness")
    _budgets(run)
    run.set_defaults(do=_start)

    resume = verbs.add_parser("resume", help="go on with a run that was interrupted")
    resume.add_argument("directory", type=Path, metavar="DIR")
    resume.set_defaults(do=_resume)

    lists = verbs.add_parser("list", help="what can be named: recipes, specimens, calculators ...")
    lists.add_argument("what", nargs="?", help="one of recipes, specimens, calculators, acquisitions, scalarizers")
    lists.set_defaults(do=_list)

    verify = verbs.add_parser("verify", help="check every byte of a run's frames and its journal")
    verify.add_argument("directory", type=Path, metavar="DIR")
    verify.set_defaults(do=_verify)

    documents = verbs.add_parser("documents", help="a run as event-model documents, for Bluesky's tools")
    documents.add_argument("directory", type=Path, metavar="DIR")
    documents.add_argument("--follow", action="store_true", help="print them as the run goes on; write no file")
    documents.set_defaults(do=_documents)


def _settings(words: argparse.Namespace) -> Settings:
    from stemloop.campaign.settings import Settings

    instrument = getattr(words, "instrument", "twin")
    return Settings(
        recipe=words.recipe,
        instrument=instrument,
        specimen=words.specimen if instrument.endswith("twin") else None,
        seed=words.seed,
        target_sigma=words.target_sigma,
        max_points=words.max_points,
        max_electrons=words.max_dose,
        max_seconds=words.max_seconds,
        acquisition=words.acquisition,
        calculator=words.calculator,
        scalarizer=getattr(words, "scalarizer", None),
        initial=words.initial,
        batch=words.batch,
        damage=getattr(words, "damage", False),
    )


def _start(words: argparse.Namespace) -> int:
    from stemloop.campaign import run, terminal

    settings = _settings(words)
    words.directory = words.out or run.default_folder(settings)
    return terminal.show(run.start(settings, words.directory))


def _resume(words: argparse.Namespace) -> int:
    from stemloop.campaign import run, terminal

    return terminal.show(run.resume(words.directory))


def _list(words: argparse.Namespace) -> int:
    from stemloop.campaign import catalogue, terminal

    return terminal.print_names(catalogue.names(words.what))


def _verify(words: argparse.Namespace) -> int:
    from stemloop.campaign import run, terminal

    return terminal.print_verdict(run.verify(words.directory))


def _documents(words: argparse.Namespace) -> int:
    from stemloop.campaign import documents

    if words.follow:
        for name, doc in documents.follow(words.directory):
            print(documents.line(name, doc), flush=True)
        return 0
    count = documents.write(words.directory)
    print(f"{words.directory / documents.FILE}: " + ", ".join(f"{n} {name}" for name, n in count.items()))
    return 0
