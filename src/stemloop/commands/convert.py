"""``convert``: a recorded file of any kind into one sealed HDF5 file."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stemloop.commands.progress import bars
from stemloop.core.errors import InputError


def add(verbs: Any) -> None:
    """Add the verb ``convert``."""
    convert = verbs.add_parser("convert", help="copy a recorded file of any kind into one open HDF5 file")
    convert.add_argument("path", type=Path, metavar="IN")
    convert.add_argument("out", type=Path, metavar="OUT.h5")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT.h5 if it is there")
    convert.add_argument("--memory-MB", type=float, default=1024.0, metavar="M", help="most memory of the reader")
    convert.add_argument("--quiet", action="store_true", help="no progress bar")
    convert.set_defaults(do=_convert)


def _convert(words: argparse.Namespace) -> int:
    from stemloop.store.convert import convert

    if not 0 < words.memory_MB < math.inf:
        raise InputError(f"the memory [MB] must be a finite number above zero; got {words.memory_MB:g}.")
    with bar(words.path.name, words.quiet) as progress:
        made = convert(
            words.path,
            words.out,
            overwrite=words.overwrite,
            memory_MB=words.memory_MB,
            progress=progress,
        )
    frames = sum(stream["frames"] for stream in made["streams"].values())
    print(f"{words.out}: {frames} frames in {made['bytes']} bytes, from {made['raw_bytes']}")
    return 0


@contextlib.contextmanager
def bar(title: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of bytes on standard error: what it gives is called with (done, of how many)."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with bars(*columns, TimeRemainingColumn(), quiet=quiet) as tell:
        yield lambda done, total: tell(title, done, total)
