"""``reduce``: a recorded 4D-STEM file to maps."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stemloop.commands.progress import bars
from stemloop.core.errors import InputError, UnreadableFile


def add(verbs: Any) -> None:
    """Add the verb."""
    verb = verbs.add_parser("reduce", help="maps of a 4D-STEM file: detectors, centre of mass, phase, strain ...")
    verb.add_argument("file", type=Path, metavar="FILE", help="a 4D-STEM file of any vendor, or .npy")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for maps.h5 and report.html")
    verb.add_argument(
        "--fold",
        action="append",
        metavar="NAME",
        help="patterns, bf, abf, adf, haadf, segments, com, dpc, idpc, radial, strain, ssb",
    )
    verb.add_argument(
        "--ring", action="append", default=[], metavar="NAME:INNER:OUTER", help="a ring detector more [mrad]"
    )
    verb.add_argument(
        "--mask", action="append", default=[], metavar="NAME=FILE.npy", help="a detector more, by its weights"
    )
    verb.add_argument("--defocus-nm", type=float, default=0.0, metavar="C10", help="that ssb undoes [nm] (default 0)")
    verb.add_argument("--threads", type=int, default=1, metavar="N", help="threads that fold (default 1)")
    verb.add_argument("--memory-MB", type=float, default=2048.0, metavar="M", help="of the file's reader (2048)")
    verb.add_argument("--pixel-mrad", type=float, metavar="A", help="angle of a detector pixel [mrad]")
    verb.add_argument("--semiangle-mrad", type=float, metavar="A", help="of the probe [mrad]")
    verb.add_argument("--energy-keV", type=float, metavar="E", help="of the beam [keV]")
    verb.add_argument("--step-nm", type=float, metavar="S", help="of the scan [nm]")
    verb.add_argument("--rotation-deg", type=float, metavar="R", help="of the camera against the scan (default: found)")
    verb.set_defaults(do=_reduce)


def _reduce(words: argparse.Namespace) -> int:
    from stemloop.campaign import reduction

    def times(value: float | None, factor: float) -> float | None:
        return None if value is None else value * factor

    rings, masks = _each_once(map(_ring, words.ring)), _each_once(map(_mask, words.mask))
    known = {
        "pixel_rad": times(words.pixel_mrad, 1e-3),
        "semiangle_rad": times(words.semiangle_mrad, 1e-3),
        "energy_eV": times(words.energy_keV, 1e3),
        "step_m": times(words.step_nm, 1e-9),
    }
    with reduction.open_scan(words.file, words.memory_MB, **known) as scan, bars() as tell:
        reduced = reduction.reduce_scan(
            scan,
            tuple(words.fold) if words.fold else reduction.USUAL,
            threads=words.threads,
            rotation_rad=times(words.rotation_deg, math.pi / 180),
            C10_m=words.defocus_nm * 1e-9,
            rings=rings,
            masks=masks,
            progress=tell,
        )
    report = reduction.write(reduced, words.out)
    for note in reduced.summary["notes"]:
        print(f"note: {note}")
    print(f"maps    {', '.join(reduced.maps)}")
    print(f"report  {report.resolve()}")
    return 0


def _each_once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, what in pairs:
        if name in found:
            raise InputError(f"two detectors are called {name!r}; take another name.")
        found[name] = what
    return found


def _ring(text: str) -> tuple[str, tuple[float, float]]:
    """``NAME:INNER:OUTER`` [mrad]."""
    try:
        name, inner, outer = text.split(":")
        return name, (float(inner) * 1e-3, float(outer) * 1e-3)
    except ValueError:
        raise InputError(f"--ring takes NAME:INNER:OUTER in mrad, such as outer:30:60; got {text!r}.") from None


def _mask(text: str) -> tuple[str, Any]:
    """``NAME=FILE.npy``: weights (rows, columns)."""
    import numpy as np

    name, _, file = text.partition("=")
    if not name or not file:
        raise InputError(f"--mask takes NAME=FILE.npy; got {text!r}.")
    try:
        mask = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UnreadableFile(f"the mask {file} cannot be read: {why}.") from None
    if mask.ndim != 2 or mask.dtype.kind not in "buif" or not np.isfinite(mask).all():
        raise InputError(
            f"the mask {file} is {mask.dtype} of {mask.shape}; it must be (rows, columns) of finite numbers."
        )
    return name, mask
