"""The command ``stemloop``: words in, a run folder out, and errors that a stranger understands."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stemloop import __version__
from stemloop.core.errors import InstrumentError, LeaseError, StemloopError

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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="stemloop", description="Electron microscopes that run their own experiments.")
    top.add_argument("--version", action="version", version=f"stemloop {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="a whole autonomous experiment on the embedded twin")
    demo.add_argument("--specimen", default="MoS2", help="MoS2, graphene or SrTiO3 (default MoS2)")
    demo.add_argument("--recipe", default="strain-energy", help="strain-energy (default) or defect-energy")
    demo.add_argument("--damage", action="store_true", help="let the beam damage the specimen")
    _budgets(demo)

    run = verbs.add_parser("run", help="run a recipe on an instrument")
    run.add_argument("recipe", help="strain-energy, defect-energy or eels-map")
    run.add_argument("--instrument", default="twin", metavar="KIND", help="twin (default) or replay:FILE")
    run.add_argument("--specimen", default="MoS2", help="of the twin (default MoS2)")
    run.add_argument("--scalarizer", metavar="NAME", help="of spectra: Ti-L23 (default), O-K")
    _budgets(run)

    resume = verbs.add_parser("resume", help="go on with a run that was interrupted")
    resume.add_argument("directory", type=Path, metavar="DIR")

    lists = verbs.add_parser("list", help="what can be named: recipes, specimens, calculators ...")
    lists.add_argument("what", nargs="?", help="one of recipes, specimens, calculators, acquisitions, scalarizers")

    verify = verbs.add_parser("verify", help="check every byte of a run's frames and its journal")
    verify.add_argument("directory", type=Path, metavar="DIR")
    return top


def _settings(words: argparse.Namespace) -> Settings:
    from stemloop.campaign.settings import Settings

    instrument = getattr(words, "instrument", "twin")
    return Settings(
        recipe=words.recipe,
        instrument=instrument,
        specimen=words.specimen if instrument == "twin" else None,
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


def _dispatch(words: argparse.Namespace) -> int:
    from stemloop.campaign import catalogue, run, terminal

    if words.verb in ("demo", "run"):
        settings = _settings(words)
        words.directory = words.out or run.default_folder(settings)
        return terminal.show(run.start(settings, words.directory))
    if words.verb == "resume":
        return terminal.show(run.resume(words.directory))
    if words.verb == "list":
        return terminal.print_names(catalogue.names(words.what))
    return terminal.print_verdict(run.verify(words.directory))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status (0 well, 2 for what the user can mend, 1 for the rest, 130 Ctrl-C)."""
    words = parser().parse_args(arguments)
    try:
        return _dispatch(words)
    except StemloopError as error:
        on = _go_on(words) if isinstance(error, (InstrumentError, LeaseError)) else ""
        print(f"stemloop: {error}{on}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"stemloop: {where}{error.strerror or error}.{_go_on(words)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stemloop: stopped.{_go_on(words)}", file=sys.stderr)
        return 130


def _go_on(words: argparse.Namespace) -> str:
    """How to continue the run that these words began, if it got as far as a run folder."""
    folder = getattr(words, "directory", None)
    if words.verb == "verify" or folder is None or not (folder / "settings.json").exists():
        return ""
    return f" What was acknowledged is kept; go on with: stemloop resume {shlex.quote(str(folder))}"


if __name__ == "__main__":
    sys.exit(main())
