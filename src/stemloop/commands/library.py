"""``library``: structural elements of many images in one file, and where else one was seen."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from stemloop.core.plain import jsonable


def add(verbs: Any) -> None:
    """Add the verb ``library`` with its actions."""
    subject = verbs.add_parser("library", help="keep structural elements of images; find where else one was seen")
    actions = subject.add_subparsers(dest="action", required=True, metavar="ACTION")

    keep = actions.add_parser("add", help="keep the columns and vacancies of images")
    keep.add_argument("library", type=Path, metavar="LIBRARY")
    keep.add_argument("files", type=Path, nargs="+", metavar="FILE", help="images or stacks of any vendor, or .npy")
    keep.set_defaults(do=_add)

    find = actions.add_parser("search", help="where else was what is at a place of an image seen?")
    find.add_argument("library", type=Path, metavar="LIBRARY")
    find.add_argument("file", type=Path, metavar="FILE")
    find.add_argument("--at", required=True, type=_place, metavar="ROW,COL", help="place [px] in the first image")
    find.add_argument("--least-p", type=float, default=1e-3, metavar="P", help="least probability of being the same")
    find.add_argument("--json", action="store_true", help="print JSON instead of a table")
    find.set_defaults(do=_search)

    merge = actions.add_parser("merge", help="keep all entries of other libraries, too")
    merge.add_argument("library", type=Path, metavar="LIBRARY")
    merge.add_argument("others", type=Path, nargs="+", metavar="OTHER")
    merge.set_defaults(do=_merge)

    info = actions.add_parser("info", help="what a library holds; compares every entry with its digest")
    info.add_argument("library", type=Path, metavar="LIBRARY")
    info.set_defaults(do=_info)


def _place(words: str) -> tuple[float, float]:
    try:
        row, col = (float(word) for word in words.split(","))
    except ValueError:
        row = col = math.nan
    if not (math.isfinite(row) and math.isfinite(col)):
        raise argparse.ArgumentTypeError(f"a place is ROW,COL in pixels, such as 120.5,88; got {words!r}")
    return row, col


def _add(words: argparse.Namespace) -> int:
    from stemloop.core.errors import StemloopError
    from stemloop.describe.fingerprints import VERSION
    from stemloop.store.library import Library

    failed = 0
    with Library(words.library, version=VERSION) as library:
        for path in words.files:
            try:
                new, bad = _keep(library, path)
                print(f"{path}: {new} new of {len(library)}")
                for error in bad:
                    failed = error.exit_code
                    print(f"stemloop: {path}: {error}", file=sys.stderr)
            except StemloopError as error:  # one bad file does not end the others
                failed = error.exit_code
                print(f"stemloop: {'' if str(path) in str(error) else f'{path}: '}{error}", file=sys.stderr)
    return failed


def _keep(library: Any, path: Path) -> tuple[int, list[Any]]:
    """How many elements of a file were new, and what was wrong with those of its frames that could not be read."""
    from stemloop.campaign.images.elements import elements_of, images_of
    from stemloop.core.errors import InputError
    from stemloop.store.library import sha256_of
    from stemloop.store.readers import look

    look(path)
    sha256, new, bad = sha256_of(path), 0, []
    for frame, (image, pixel_m) in enumerate(images_of(path)):
        try:
            found = elements_of(image, frame, pixel_m)
        except InputError as error:  # one bad frame does not end the others
            bad.append(InputError(f"frame {frame}: {error}"))
        else:
            new += library.add(found, path.name, sha256)
    return new, bad


def _search(words: argparse.Namespace) -> int:
    from stemloop.campaign.images.elements import element_at, images_of
    from stemloop.store.library import sha256_of

    with _known(words.library) as library:
        image, _ = next(images_of(words.file))
        element = element_at(image, words.at)
        sightings = library.seen(
            element.vector, scatter=element.scatter, least_p=words.least_p, without_source=sha256_of(words.file)
        )
    if words.json:
        print(json.dumps(jsonable([_facts(sighting) for sighting in sightings]), indent=1))
        return 0
    for sighting in sightings:
        best = sighting.matches[0]
        y, x = best.entry.place
        print(
            f"{sighting.source} frame {sighting.frame}: {len(sighting.matches)} times, the nearest at "
            f"({y:.1f}, {x:.1f}) px: {best.entry.kind}, distance {best.distance:.1f}, p {best.p_same:.2g}"
        )
    if not sightings:
        print("nowhere else")
    return 0


def _facts(sighting: Any) -> dict[str, Any]:
    return {
        "source": sighting.source,
        "sha256": sighting.source_sha256,
        "frame": sighting.frame,
        "matches": [
            {"id": m.entry.id, "place": m.entry.place, "kind": m.entry.kind, "phase": m.entry.phase}
            | {"distance": m.distance, "p_same": m.p_same}
            for m in sighting.matches
        ],
    }


def _known(path: Path) -> Any:
    from stemloop.core.errors import UnreadableFile
    from stemloop.describe.fingerprints import VERSION
    from stemloop.store.library import Library

    if not path.exists():
        raise UnreadableFile(f"there is no library {path}; make one with: stemloop library add {path} FILE ...")
    return Library(path, version=VERSION)


def _merge(words: argparse.Namespace) -> int:
    from stemloop.describe.fingerprints import VERSION
    from stemloop.store.library import Library

    with Library(words.library, version=VERSION) as library:
        for other in words.others:
            print(f"{other}: {library.merge(other)} new of {len(library)}")
    return 0


def _info(words: argparse.Namespace) -> int:
    with _known(words.library) as library:
        library.verify()
        print(json.dumps(library.about(), indent=1))
    return 0
