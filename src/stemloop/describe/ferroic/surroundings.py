"""What the surroundings of each column look like: its local cell, its brightness, its neighbours."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.structure import Assignment, Columns
from stemloop.describe.ferroic.cells import CellTable, corners_of, nearest

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: What :func:`local_descriptors` gives, in order. All are numbers without a unit; angles are in radian.
DESCRIPTORS = (
    "size", "aspect", "angle", "rotation", "brightness", "ratio", "off_centre", "coordination", "disorder",
)  # fmt: skip
_AROUND = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], dtype=np.int64)


class LocalDescriptors(NamedTuple):
    """Descriptors of ``n`` columns: ``value`` and ``sigma`` (n, 9) with the columns ``names``; NaN where there is
    nothing to tell. ``numpy.asarray(local.value)`` is what a clustering takes."""

    value: Floats
    sigma: Floats
    names: tuple[str, ...]


def local_descriptors(columns: Columns, assignment: Assignment) -> LocalDescriptors:
    """The local structure around each column, each number with its 1-sigma deviation.

    ``size`` ln of the root of the local cell's area over the grain's; ``aspect`` ln of its a2 / a1 over the grain's;
    ``angle`` between them less the grain's; ``rotation`` of the local cell against the grain's (+x towards +y);
    ``brightness`` ln of the column's amplitude over the mean of its kind; ``ratio`` ln of the secondary over the
    primary amplitude, the column itself against its neighbours of the other kind; ``off_centre`` distance of the
    secondary column from the middle of the primary ones around it, in lengths of the cell (around a primary column:
    the mean of its cells); ``coordination`` neighbours of its own kind that are there (0 to 8); ``disorder`` root mean
    square of what the local affine fit leaves, in lengths of the cell.

    The local cell is the least-squares fit to the up to nine columns of the same kind around the column. So none of
    these changes with a shift; size, aspect, angle, brightness, ratio, off_centre, coordination and disorder do not
    with a rotation either, and a mirror only reverses ``rotation`` (where it keeps the order of a1 and a2).

    Raises
    ------
    InputError : lengths that do not match.
    """
    seen = surroundings(columns, assignment)
    value = np.column_stack([getattr(seen, name) for name in DESCRIPTORS])
    sigma = np.column_stack([seen.sigma[name] for name in DESCRIPTORS])
    return LocalDescriptors(value, sigma, DESCRIPTORS)


class Surroundings(NamedTuple):
    """The descriptors by name (n,), their deviations, and ``vectors`` (n, 2, 2), the local cell [px]."""

    size: Floats
    aspect: Floats
    angle: Floats
    rotation: Floats
    brightness: Floats
    ratio: Floats
    off_centre: Floats
    coordination: Floats
    disorder: Floats
    vectors: Floats
    sigma: dict[str, Floats]


def surroundings(columns: Columns, assignment: Assignment) -> Surroundings:
    """See :func:`local_descriptors`."""
    if len(columns) != len(assignment):
        raise InputError(f"{len(columns)} columns and an assignment of {len(assignment)} do not belong together.")
    n = len(columns)
    value: dict[str, Floats] = {name: np.full(n, np.nan) for name in DESCRIPTORS}
    sigma: dict[str, Floats] = {name: np.full(n, np.nan) for name in DESCRIPTORS}
    vectors = np.full((n, 2, 2), np.nan)
    bright, bright_sigma = log_brightness(columns)
    for g in range(len(assignment.grains)):
        cells = CellTable(assignment, g)
        if len(cells.own):
            _cell(columns, assignment, g, cells, value, sigma, vectors)
            _brightness(assignment, g, cells, bright, bright_sigma, value, sigma)
            _off_centre(columns, assignment, g, cells, value, sigma)
    return Surroundings(**value, vectors=vectors, sigma=sigma)


def log_brightness(columns: Columns) -> tuple[Floats, Floats]:
    """ln of the amplitudes and its deviation: that of a Gaussian's amplitude is root two times that of its place over
    its width (A. J. den Dekker et al., Ultramicroscopy 104 (2005) 83, doi:10.1016/j.ultramic.2005.03.001)."""
    positive = columns.amplitude > 0
    bright = np.where(positive, np.log(np.where(positive, columns.amplitude, 1.0)), np.nan)
    return bright, np.sqrt(2 * (columns.sigma**2).mean(axis=1)) / columns.width


def shape_of(vectors: Floats) -> tuple[Floats, Floats, Floats]:
    """ln of the root of the area, ln of a2 / a1 and the angle between a1 and a2 of cells (..., 2, 2)."""
    a1, a2 = vectors[..., 0, :], vectors[..., 1, :]
    length = np.hypot(a1[..., 0], a1[..., 1]), np.hypot(a2[..., 0], a2[..., 1])
    area = np.abs(a1[..., 0] * a2[..., 1] - a1[..., 1] * a2[..., 0])
    between = np.arctan2(area, (a1 * a2).sum(axis=-1))
    return np.log(area) / 2, np.log(length[1] / length[0]), between


def _cell(
    columns: Columns,
    assignment: Assignment,
    number: int,
    cells: CellTable,
    value: dict[str, Floats],
    sigma: dict[str, Floats],
    vectors: Floats,
) -> None:
    own = cells.own
    around = cells.at(assignment.cell[own][:, None] + _AROUND, assignment.site[own][:, None])
    there = (around >= 0).astype(np.float64)
    many = there.sum(axis=1)
    place = columns.position[around]
    step = _AROUND - (there[:, :, None] * _AROUND).sum(axis=1, keepdims=True) / many[:, None, None]
    middle = (there[:, :, None] * place).sum(axis=1) / many[:, None]
    step, off = step * there[:, :, None], (place - middle[:, None]) * there[:, :, None]
    normal = np.einsum("nka,nkb->nab", step, step)
    fit = (many >= 5) & (np.linalg.det(normal) > 1.5)
    inverse = np.linalg.inv(np.where(fit[:, None, None], normal, np.eye(2)))
    local = inverse @ np.einsum("nka,nkb->nab", step, off)
    local[~fit] = np.nan
    vectors[own] = local
    left = ((off - np.einsum("nka,nab->nkb", step, local)) ** 2).sum(axis=(1, 2)) / np.maximum(2 * many - 6, 1)
    noise = (there * (columns.sigma[around] ** 2).mean(axis=-1)).sum(axis=1) / many  # of one coordinate
    grain = assignment.grains[number].vectors
    size, aspect, angle = shape_of(local)
    mean_size, mean_aspect, mean_angle = shape_of(grain)
    length = np.hypot(local[..., 0], local[..., 1])
    own_sigma = np.sqrt(noise[:, None] * np.diagonal(inverse, axis1=1, axis2=2)) / length  # of ln |a1|, ln |a2|
    both = np.where(fit, np.hypot(*own_sigma.T), np.nan)
    value["size"][own], sigma["size"][own] = size - mean_size, both / 2
    value["aspect"][own], sigma["aspect"][own] = aspect - mean_aspect, both
    value["angle"][own], sigma["angle"][own] = angle - mean_angle, both
    turn = np.linalg.inv(grain) @ local  # rows: where the grain's unit vectors (row, col) went
    value["rotation"][own] = np.arctan2(turn[:, 1, 0] - turn[:, 0, 1], turn[:, 0, 0] + turn[:, 1, 1])
    sigma["rotation"][own] = both / 2
    value["coordination"][own], sigma["coordination"][own] = many - 1, 0.0
    mean_length = float(np.sqrt(np.abs(np.linalg.det(grain))))
    value["disorder"][own] = np.where(fit, np.sqrt(left), np.nan) / mean_length
    sigma["disorder"][own] = np.where(fit, np.sqrt(noise / np.maximum(4 * many - 12, 2)), np.nan) / mean_length


def _brightness(
    assignment: Assignment,
    number: int,
    cells: CellTable,
    bright: Floats,
    bright_sigma: Floats,
    value: dict[str, Floats],
    sigma: dict[str, Floats],
) -> None:
    own, site = cells.own, assignment.site[cells.own]
    for s in range(cells.table.shape[2]):
        kind = own[site == s]
        if len(kind):
            value["brightness"][kind] = bright[kind] - np.nanmedian(bright[kind])
            sigma["brightness"][kind] = bright_sigma[kind]
    grain = assignment.grains[number]
    if len(grain.basis) < 2:
        return
    for s in range(2):
        kind = own[site == s]
        mean, left = _mean_of(cells, assignment.cell[kind], nearest(grain, s, 1 - s), 1 - s,
                              bright, bright_sigma)  # fmt: skip
        value["ratio"][kind] = (bright[kind] - mean) * (1 if s == 1 else -1)
        sigma["ratio"][kind] = np.hypot(bright_sigma[kind], left)


def _mean_of(
    cells: CellTable, cell: Integers, steps: Integers, site: int, value: Floats, sigma: Floats
) -> tuple[Floats, Floats]:
    """Mean of ``value`` over the columns of ``site`` at ``steps`` around each of ``cell``, and its deviation."""
    around = cells.at(cell[:, None] + steps, site)
    there = (around >= 0) & np.isfinite(value[around])
    many = there.sum(axis=1)
    safe = np.maximum(many, 1)
    mean = np.where(there, value[around], 0.0).sum(axis=1) / safe
    left = np.sqrt(np.where(there, sigma[around] ** 2, 0.0).sum(axis=1)) / safe
    return np.where(many > 0, mean, np.nan), np.where(many > 0, left, np.nan)


def _off_centre(
    columns: Columns,
    assignment: Assignment,
    number: int,
    cells: CellTable,
    value: dict[str, Floats],
    sigma: dict[str, Floats],
) -> None:
    grain = assignment.grains[number]
    if len(grain.basis) < 2:
        return
    n = len(columns)
    mean_length = float(np.sqrt(np.abs(np.linalg.det(grain.vectors))))
    second = cells.own[assignment.site[cells.own] == 1]
    inward = corners_of(grain, 1)
    if inward is None:
        return
    place: Any = columns.position
    noise = np.sqrt((columns.sigma**2).mean(axis=1))
    vector, left = np.full((n, 2), np.nan), np.full(n, np.nan)
    whole = (cells.at(assignment.cell[second][:, None] + inward, 0) >= 0).all(axis=1)
    second = second[whole]
    middles = [_mean_of(cells, assignment.cell[second], inward, 0, place[:, k], noise) for k in (0, 1)]
    vector[second] = place[second] - np.column_stack([m for m, _ in middles])
    left[second] = np.hypot(noise[second], middles[0][1])
    first = cells.own[assignment.site[cells.own] == 0]
    outward = nearest(grain, 0, 1)
    means = [_mean_of(cells, assignment.cell[first], outward, 1, vector[:, k], left) for k in (0, 1)]
    vector[first], left[first] = np.column_stack([m for m, _ in means]), means[0][1]
    own = cells.own
    value["off_centre"][own] = np.hypot(*vector[own].T) / mean_length
    sigma["off_centre"][own] = left[own] / mean_length
