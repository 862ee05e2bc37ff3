"""The structural elements of a file's images, ready for a library: every column and every vacant place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.signal import Signal
from stemloop.core.structure import Columns
from stemloop.describe.atoms import find_columns
from stemloop.describe.fingerprints import fingerprints, patches, scatters, unit_px
from stemloop.store.library import Element
from stemloop.store.readers import read

#: An image with fewer has no surroundings to speak of.
LEAST_COLUMNS = 12


def images_of(path: str | os.PathLike[str]) -> Iterator[tuple[NDArray[Any], float | None]]:
    """The images of a file in order, those of stacks frame by frame, and their pixel size [m] where it is known.

    Colours (the last of three axes has 3 or 4 numbers) are averaged; spectrum images are left out. A stack stays on the
    disk but for one frame. InputError if the file holds no image.
    """
    count = 0
    for signal in read(path, mapped=True):
        for image in _images(signal):
            count += 1
            yield image, _pixel_m(signal)
    if count == 0:
        raise InputError(f"{os.fspath(path)} holds no image (rows, cols) and no stack of images.")


def _images(signal: Signal) -> Iterator[NDArray[Any]]:
    data = signal.data
    if data.ndim not in (2, 3) or any(axis.name.startswith("energy") for axis in signal.axes):
        return
    if data.ndim == 3 and data.shape[2] in (3, 4):
        yield data[..., :3].mean(axis=2)
        return
    for image in data if data.ndim == 3 else (data,):
        yield np.array(image)


def _pixel_m(signal: Signal) -> float | None:
    axis = signal.axes[1 if signal.data.ndim == 3 and signal.data.shape[2] in (3, 4) else -1]
    return abs(axis.scale) if axis.unit == "m" and axis.scale != 0 else None


def elements_of(image: NDArray[Any], frame: int = 0, pixel_size_m: float | None = None) -> list[Element]:
    """Its columns (kind ``column``, phase ``site-0`` ... by brightness) and vacant places (``vacancy``).

    Those whose surroundings leave the image are left out. ``pixel_size_m`` is only noted down: fingerprints are
    measured in the lattice's own spacing. An image with fewer than a dozen columns has none.
    """
    columns = find_columns(image)
    if len(columns) < LEAST_COLUMNS:
        return []
    places = np.concatenate([columns.position, columns.vacant])
    group = np.append(columns.sublattice, np.full(len(columns.vacant), -1))
    made = _elements(image, columns, places, group, frame)
    return [replace(element, pixel_size_m=pixel_size_m) for element in made]


def element_at(image: NDArray[Any], place: tuple[float, float]) -> Element:
    """Whatever is at ``place`` (row, col) [px]; the middle is the column or vacant place within a quarter of a spacing,
    if there is one. InputError where the surroundings leave the image."""
    columns = find_columns(image)
    if len(columns) < LEAST_COLUMNS:
        raise InputError(
            f"{len(columns)} columns were found in the image: too few to compare what surrounds a place; choose "
            "another image, or look at this one with stemloop analyze."
        )
    known = np.concatenate([columns.position, columns.vacant])
    away = np.hypot(*(known - np.array(place)).T)
    if len(known) and away.min() < 0.25 * unit_px(columns):
        place = (float(known[away.argmin(), 0]), float(known[away.argmin(), 1]))
    places = np.concatenate([columns.position, [place]])
    made = _elements(image, columns, places, np.append(columns.sublattice, -1), 0)
    if not made or made[-1].place != place:
        raise InputError(f"what surrounds ({place[0]:g}, {place[1]:g}) px leaves the image; choose a place further in.")
    return made[-1]


def _elements(
    image: NDArray[Any], columns: Columns, places: NDArray[np.float64], group: NDArray[np.int64], frame: int
) -> list[Element]:
    vectors = fingerprints(image, columns, places)
    pictures = patches(image, places, unit_px(columns))
    spread = scatters(vectors, group)
    chance = np.append(columns.p_present, np.ones(len(places) - len(columns)))
    return [
        Element(
            vectors[i],
            "column" if group[i] >= 0 else "vacancy",
            (float(places[i, 0]), float(places[i, 1])),
            f"site-{group[i]}" if group[i] >= 0 else "",
            float(chance[i]),
            frame,
            float(spread[i]),
            patch=pictures[i],
        )
        for i in np.flatnonzero(np.isfinite(vectors).all(axis=1))
    ]
