"""``analyze``: an image or stack of any vendor to atoms, lattices, phases, defects and a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stemloop.commands.progress import bars
from stemloop.core.errors import InputError


def add(verbs: Any) -> None:
    """Add the verb."""
    verb = verbs.add_parser("analyze", help="an image or stack of any vendor to atoms, lattices, phases, defects")
    verb.add_argument("file", type=Path, nargs="?", metavar="FILE", help="an image or stack of any vendor, or .npy")
    verb.add_argument("--out", type=Path, metavar="DIR", help="folder for report.html and the tables")
    verb.add_argument("--pixel-nm", type=float, metavar="P", help="size of a pixel [nm]; the file's own if left out")
    verb.add_argument("--finder", default="classical", help="of columns: classical (default) or network")
    verb.add_argument("--material", metavar="NAME", help="compare with this material only, such as SrTiO3")
    verb.add_argument("--which", metavar="N", help="number or title of the dataset, where a file holds several")
    verb.add_argument("--frame-s", type=float, metavar="T", help="time from frame to frame [s], for rates")
    verb.add_argument("--library", type=Path, metavar="FILE", help="library of structures to search and to add to")
    verb.add_argument("--denoise", metavar="METHOD", help="also show the image without noise: nlm or lattice")
    verb.add_argument(
        "--map", type=Path, metavar="FILE", help="map or spectrum image of the same area, to be laid over"
    )
    verb.add_argument("--executor", default="local", help="of frames: local (default), dask or slurm")
    verb.add_argument("--workers", type=int, metavar="N", help="frames at once (default: one a core)")
    verb.add_argument("--scheduler", metavar="ADDRESS", help="of a running Dask cluster, such as tcp://host:8786")
    verb.add_argument("--slurm", action="append", default=[], metavar="WORD", help="one more word for sbatch")
    verb.add_argument("--overwrite", action="store_true", help="begin again, whatever DIR holds of an analysis")
    verb.add_argument("--memory-MB", type=float, default=2048.0, metavar="M", help="of the file's reader (2048)")
    verb.add_argument("--worker", type=Path, metavar="DIR", help="only do frames of the analysis in DIR (for clusters)")
    verb.add_argument("--part", default="0/1", metavar="K/N", help="with --worker: every Nth frame from K on")
    verb.add_argument("--frames", type=int, metavar="N", help="with --worker: frames of the stack")
    verb.set_defaults(do=_analyze)


def _analyze(words: argparse.Namespace) -> int:
    if words.worker is not None:
        return _work(words)
    if words.file is None or words.out is None:
        raise InputError("name a file and a folder: stemloop analyze FILE --out DIR.")
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from stemloop.campaign.images import analyze

    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with bars(*columns) as tell:
        found = analyze(
            words.file,
            words.out,
            pixel_size_nm=words.pixel_nm,
            finder=words.finder,
            material=words.material,
            which=words.which,
            frame_time_s=words.frame_s,
            library=words.library,
            denoise=words.denoise,
            map_file=words.map,
            executor=words.executor,
            workers=words.workers,
            scheduler=words.scheduler,
            slurm_options=tuple(words.slurm),
            overwrite=words.overwrite,
            memory_MB=words.memory_MB,
            progress=tell,
        )
    for name, value in found.sentences():
        print(f"{name:9} {value}")
    return 0


def _work(words: argparse.Namespace) -> int:
    from stemloop.campaign.images import frames

    number, _, parts = words.part.partition("/")
    if not (number.isdigit() and parts.isdigit() and 0 <= int(number) < int(parts)) or not words.frames:
        raise InputError("a worker needs --part K/N with K from 0 to N-1, and --frames with how many there are.")
    frames.job(words.worker)
    frames.here(words.worker, frames.part_of(words.worker, int(number), int(parts), words.frames), lambda _: None)
    return 0
