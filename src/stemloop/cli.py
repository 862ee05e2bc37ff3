"""The command ``stemloop``: words in, a run folder out, and errors that a stranger understands."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from stemloop import __version__
from stemloop.commands import (
    analyze,
    audit,
    bench,
    convert,
    experiment,
    file,
    gateway,
    instrument,
    library,
    reduce,
    transfer,
)
from stemloop.core.errors import InstrumentError, LeaseError, StemloopError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="stemloop", description="Electron microscopes that run their own experiments.")
    top.add_argument("--version", action="version", version=f"stemloop {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    for subject in (experiment, file, convert, transfer, reduce, analyze, instrument, gateway, library, audit, bench):
        subject.add(verbs)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status (0 well, 2 for what the user can mend, 1 for the rest, 130 Ctrl-C)."""
    words = parser().parse_args(arguments)
    try:
        return int(words.do(words))
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
    if words.verb not in ("demo", "run", "resume") or folder is None or not (folder / "settings.json").exists():
        return ""
    return f" What was acknowledged is kept; go on with: stemloop resume {shlex.quote(str(folder))}"


if __name__ == "__main__":
    sys.exit(main())
