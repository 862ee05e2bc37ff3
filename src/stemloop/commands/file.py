"""``file seal``, ``verify``, ``info`` and ``repair``: landing logs and sealed files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """Add the verb ``file``."""
    file = verbs.add_parser("file", help="landing logs and sealed files: seal, verify, info, repair")
    what = file.add_subparsers(dest="what", required=True, metavar="WHAT")

    seal = what.add_parser("seal", help="copy a landing log into one HDF5 file that many programs open")
    seal.add_argument("log", type=Path, metavar="LOG")
    seal.add_argument("out", type=Path, metavar="OUT.h5")
    seal.add_argument("--profile", default="portable", help="portable (default: needs no plugin) or working")
    seal.add_argument("--about", type=Path, metavar="FILE", help="JSON with run, calibrations and logs")
    seal.add_argument("--overwrite", action="store_true", help="replace OUT.h5 if it is there")
    seal.set_defaults(do=_seal)

    verify = what.add_parser("verify", help="compare every byte with its checksum; name what is damaged")
    verify.add_argument("path", type=Path, metavar="FILE")
    verify.set_defaults(do=_verify)

    info = what.add_parser("info", help="what a file holds, and the ledger of its streams")
    info.add_argument("path", type=Path, metavar="FILE")
    info.set_defaults(do=_info)

    repair = what.add_parser("repair", help="save what is good into a new file; declare the rest lost")
    repair.add_argument("path", type=Path, metavar="FILE")
    repair.add_argument("out", type=Path, metavar="OUT")
    repair.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    repair.set_defaults(do=_repair)


def _seal(words: argparse.Namespace) -> int:
    from stemloop.campaign import keeping
    from stemloop.core.errors import InputError

    about: dict[str, Any] = {}
    if words.about:
        try:
            about = json.loads(words.about.read_text())
            about = {key: about[key] for key in ("run", "calibrations", "logs") if key in about}
        except (ValueError, TypeError) as error:
            raise InputError(f"{words.about} is no JSON object with run, calibrations and logs: {error}.") from None
    about.setdefault("run", {})
    made = keeping.seal_log(words.log, words.out, profile=words.profile, overwrite=words.overwrite, **about)
    frames = sum(stream["frames"] for stream in made["streams"].values())
    print(f"{words.out}: {frames} frames in {made['bytes']} bytes")
    return 0


def _verify(words: argparse.Namespace) -> int:
    from stemloop.campaign import keeping

    report = keeping.verify(words.path)
    print(f"{words.path}: a {report.kind}; every byte is what was written")
    return 0


def _info(words: argparse.Namespace) -> int:
    from stemloop.campaign import keeping

    report = keeping.examine(words.path)
    print(f"{words.path}: {report.kind}")
    for key, value in report.facts.items():
        if value not in ("", None):
            print(f"  {key}: {value}")
    for name, facts in report.streams.items():
        print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    for flaw in report.flaws:
        print(f"  damaged: {flaw}")
    return 0


def _repair(words: argparse.Namespace) -> int:
    from stemloop.campaign import keeping

    lost = keeping.repair(words.path, words.out, overwrite=words.overwrite)
    for stream, spans in lost.items():
        print(f"{stream}: frames {keeping.missing(spans)} are lost, and declared so in {words.out}")
    if not lost:
        print(f"{words.out}: nothing is lost")
    return 0
