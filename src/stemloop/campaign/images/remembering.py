"""Structural elements of an analysed image and the library: where else they were seen, and that they are here too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from stemloop.campaign.images.one_image import Understood
from stemloop.core.errors import InputError
from stemloop.describe.fingerprints import DIMENSION, VERSION, fingerprints, patches, scatters, unit_px
from stemloop.store.library import Element, Library

#: Defects that are looked up, and images that are told of each.
_MOST_QUERIES, _MOST_IMAGES = 24, 4
#: A column within this many spacings of a point defect is that defect, and is not kept as a column too.
_SAME = 0.3
#: Elements beyond this many are kept without their picture.
_MOST_PICTURES = 4000


@dataclass(frozen=True)
class Seen:
    """A structural element of the image and where the library has seen its like.

    what : in words. place : (row, col) [px]. patch : its picture. others : for each image the file's name, frame,
    place, kind, distance, probability and picture of the nearest match, the nearest image first.
    """

    what: str
    place: tuple[float, float]
    patch: NDArray[Any]
    others: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Remembered:
    """What the library said and took: ``size`` is its number of elements before, ``added`` how many were new."""

    seen: tuple[Seen, ...]
    size: int
    added: int


def remember(
    image: NDArray[np.float64], found: Understood, pixel_m: float | None, path: Path, source: str, sha256: str
) -> Remembered:
    """Ask the library in the file ``path`` for the elements of ``image``, then add them all to it.

    Elements are all defects at a point, and all columns that are not at one, whose surroundings lie within the image.
    An :class:`InputError` where the image shows no lattice: what is alike is not defined then.
    """
    columns = found.columns
    if found.assignment is None or not found.assignment.grains:
        raise InputError("the image shows no lattice, and the library compares surroundings within lattices.")
    point = [d for d in found.defects if len(np.atleast_2d(d.place)) == 1]
    places = np.concatenate([columns.position, *(np.atleast_2d(d.place) for d in point)])
    prints = fingerprints(image, columns, places)
    inside = np.asarray(np.isfinite(prints).all(axis=1))
    unit = unit_px(columns)
    inside[: len(columns)] &= ~_at_a_defect(places, len(columns), _SAME * unit)
    spread = scatters(prints, np.append(columns.sublattice, np.full(len(point), -1)))
    pictures = patches(image, places, unit) if len(places) <= _MOST_PICTURES else None
    kinds = ["column"] * len(columns) + [d.kind for d in point]
    phase = _phases(found, len(columns)) + [""] * len(point)
    elements = [
        Element(
            prints[i],
            kinds[i],
            (float(places[i, 0]), float(places[i, 1])),
            phase[i],
            float(np.clip(columns.p_present[i], 0, 1)) if i < len(columns) and len(columns.p_present) else 1.0,
            scatter=float(spread[i]),
            pixel_size_m=pixel_m,
            patch=None if pictures is None else pictures[i],
        )
        for i in np.flatnonzero(inside)
    ]
    with Library(path, dimension=DIMENSION, version=VERSION) as library:
        size = len(library)
        asked = _questions(found, prints, inside, len(columns), [d.kind for d in point])
        seen = tuple(
            _seen(library, what, i, image, places, prints, unit, float(spread[i]), sha256) for i, what in asked if size
        )
        added = library.add(elements, source, sha256)
    return Remembered(seen, size, added)


def _at_a_defect(places: NDArray[np.float64], n: int, reach_px: float) -> NDArray[np.bool_]:
    """(n,) which of the first ``n`` places (columns) lie within ``reach_px`` of one of the others (defects)."""
    if len(places) == n:
        return np.zeros(n, bool)
    return np.isfinite(cKDTree(places[n:]).query(places[:n], distance_upper_bound=reach_px)[0])


def _phases(found: Understood, n: int) -> list[str]:
    if found.phases is None:
        return [""] * n
    names = list(found.phases.names)
    return [str(names[k]) if 0 <= k < len(names) else "" for k in found.phases.label]


def _questions(
    found: Understood, prints: NDArray[np.float32], inside: NDArray[np.bool_], n: int, kinds: list[str]
) -> list[tuple[int, str]]:
    """(index, in words) of the elements to look up: the defects, and the most typical column of each kind."""
    asked = [(n + k, kind) for k, kind in enumerate(kinds) if inside[n + k]][:_MOST_QUERIES]
    assert found.assignment is not None
    group = found.assignment.site
    for value in np.unique(group[inside[:n]]):
        own = np.flatnonzero(inside[:n] & (group == value))
        if value >= 0 and len(own) >= 5:
            middle = np.median(prints[own], axis=0)
            typical = own[np.argmin(((prints[own] - middle) ** 2).sum(axis=1))]
            asked.append((int(typical), f"typical column of site {int(value) + 1}"))
    return asked


def _seen(
    library: Library,
    what: str,
    i: int,
    image: NDArray[np.float64],
    places: NDArray[np.float64],
    prints: NDArray[np.float32],
    unit: float,
    spread: float,
    sha256: str,
) -> Seen:
    others = []
    for sighting in library.seen(prints[i], scatter=spread, without_source=sha256)[:_MOST_IMAGES]:
        match = sighting.matches[0]
        patch = library.patch(match.entry.id)
        others.append(
            {
                "file": sighting.source,
                "frame": sighting.frame,
                "place_px": [round(v, 3) for v in match.entry.place],
                "kind": match.entry.kind,
                "times": len(sighting.matches),
                "distance": round(match.distance, 3),
                "p_same": round(match.p_same, 4),
                "patch": np.zeros((0, 0)) if patch is None else np.asarray(patch),
            }
        )
    place = (float(places[i, 0]), float(places[i, 1]))
    return Seen(what, place, patches(image, places[i : i + 1], unit)[0], tuple(others))
