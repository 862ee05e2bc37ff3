"""Polar displacements of unit cells, their ferroic variants, the walls between these, and vortices.

Vectors are (row, col) [px]; their angles run from +x (columns) towards +y (rows, down).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stemloop.core.errors import InputError
from stemloop.core.structure import Assignment, Columns, Defect
from stemloop.describe.ferroic import variants as directions
from stemloop.describe.ferroic import winding
from stemloop.describe.ferroic.cells import CellTable, corners_of
from stemloop.describe.ferroic.walls import walls_of

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Steps between cells that share no column.
_APART = [(2, 0), (0, 2), (2, 2), (2, -2)]
#: Repetitions with new noise: so many cells in all, within these bounds.
_DRAWN, _FEWEST_DRAWS, _MOST_DRAWS = 400_000, 40, 150


@dataclass(frozen=True)
class Polar:
    """Polar displacements of ``n`` unit cells.

    place : (n, 2) [px] middle of the primary columns around each secondary one. vector : (n, 2) [px] the secondary
    column against that middle (less ``offset``); sigma : (n, 2) [px] its 1-sigma deviation. column : (n,) index of the
    secondary column; cell : (n, 2) (i, j) and grain : (n,) as in the assignment.
    p_polar : (n,) probability that the cell is displaced at all. variant : (n,) int, the most likely variant, -1 where
    the cell is not polar or the directions have no variants; p_variant : (n, k). direction, direction_sigma : (k,)
    [rad] of the variants. region : (n,) int, connected cells of one variant, the largest first, -1 as above.
    coherence : how far the displacements of cells that share no column or scan line agree, in deviations of chance
    (negative where they alternate; beyond 4.5 the image is polar). offset : (grains, 2) [px] what was taken off the
    vectors of each grain; vectors : (grains, 2, 2) [px] its lattice.
    """

    place: Floats
    vector: Floats
    sigma: Floats
    column: Integers
    cell: Integers
    grain: Integers
    p_polar: Floats
    variant: Integers
    p_variant: Floats
    direction: Floats
    direction_sigma: Floats
    region: Integers
    coherence: float
    offset: Floats
    vectors: Floats

    def __len__(self) -> int:
        return len(self.place)

    @property
    def angle(self) -> Floats:
        """(n,) direction of each displacement [rad]."""
        return np.arctan2(self.vector[:, 0], self.vector[:, 1])

    @property
    def length(self) -> Floats:
        """(n,) [px] length of each displacement; noise alone gives about 1.25 sigma."""
        return np.hypot(*self.vector.T)

    @property
    def significance(self) -> Floats:
        """(n,) length of each displacement in deviations."""
        return np.hypot(*(self.vector / self.sigma).T)


def polar(
    columns: Columns,
    assignment: Assignment,
    *,
    site: int = 1,
    relative: Literal["none", "mean"] = "none",
    variants: int | None = None,
) -> Polar:
    """Displacement of the secondary column of each cell against the middle of the primary columns around it.

    The middle of the corners of a cell moves with every affine strain as the site between them does, so what is left
    is polar. Its deviation follows from those of the fits; where neighbouring cells disagree by more, it is widened
    to what they show (so static disorder and bad fits do not pass for significance).

    Parameters
    ----------
    columns, assignment : what was found, and which site of which lattice it is.
    site : the secondary site of the cell, 1 or more.
    relative : ``"mean"`` takes the mean displacement of each grain off (a specimen tilt moves heavy and light columns
        against each other alike everywhere; but a uniform polarisation goes with it). ``"none"`` keeps it.
    variants : how many variants there are, at equal angles (2, 4, 8 ...). ``None``: their number and directions
        are found (a mixture of wrapped normal distributions, the number by the Bayesian information criterion).

    Returns
    -------
    Polar : empty where there is no secondary site, or where it does not lie amid primary ones. One that has lost a
        corner is kept if two corners on opposite sides are left.

    Raises
    ------
    InputError : lengths that do not match, a site below 1, or an unknown ``relative``.

    Notes
    -----
    The displacement is proportional to the polarisation by the Born effective charges (C. T. Nelson et al., Nano
    Lett. 11 (2011) 828, doi:10.1021/nl1041808). A cell is polar by Bayes' rule from its own vector and its four
    neighbours' (a Potts prior in mean field).
    """
    if len(columns) != len(assignment):
        raise InputError(f"{len(columns)} columns and an assignment of {len(assignment)} do not belong together.")
    if site < 1 or relative not in ("none", "mean"):
        raise InputError(f"site must be 1 or more and relative 'none' or 'mean'; got {site} and {relative!r}.")
    parts = [_of_grain(columns, assignment, k, site) for k in range(len(assignment.grains))]
    offset = np.zeros((len(parts), 2))
    if relative == "mean":
        offset = np.array([_middle(p.vector) for p in parts]).reshape(-1, 2)
        parts = [p._replace(vector=p.vector - off) for p, off in zip(parts, offset, strict=True)]
    grids = [_Grid.of(p.cell, np.arange(len(p.cell))) for p in parts]
    parts = [p._replace(sigma=p.sigma * _excess(p, g)) for p, g in zip(parts, grids, strict=True)]
    joined = _Part(*(np.concatenate([getattr(p, n) for p in parts]) if parts else e for n, e in _EMPTY.items()))
    grain = np.repeat(np.arange(len(parts)), [len(p.column) for p in parts]).astype(np.int64)
    starts = np.cumsum([0, *(len(p.column) for p in parts)])
    beside = _stacked(grids, starts, [(1, 0), (-1, 0), (0, 1), (0, -1)])
    apart = _stacked(grids, starts, _APART)
    across = np.array([_across(g.vectors) for g in assignment.grains]).reshape(-1, len(_APART))
    coherence = _coherence(joined.vector, joined.sigma, np.where(across[grain], apart, -1))
    found = directions.none(len(joined.column))
    if abs(coherence) > directions.COHERENT:
        found = directions.variants_of(joined.vector, joined.sigma, beside, variants)
    return Polar(
        joined.place,
        joined.vector,
        joined.sigma,
        joined.column,
        joined.cell,
        grain,
        found.p_polar,
        found.variant,
        found.p_variant,
        found.direction,
        found.direction_sigma,
        directions.regions(found.variant, beside),
        coherence,
        offset,
        np.array([g.vectors for g in assignment.grains], dtype=np.float64).reshape(-1, 2, 2),
    )


def walls(polar: Polar, *, fewest: int = 4) -> tuple[Defect, ...]:
    """Domain walls: lines between cells of different variants.

    Parameters
    ----------
    polar : with variants. fewest : shortest wall, in cells.

    Returns
    -------
    Defects of the kind ``domain-wall``, the longest first, each with the points of its line in order and, in
    ``detail``: ``angle_deg`` between the displacements on its two sides and its deviation ``sigma_deg``; ``type`` (
    ``"180"``, ``"90"`` or the angle's whole degrees as text, where it is neither within 20 degrees); ``charge``
    (``"neutral"``, ``"head-to-head"``, ``"tail-to-tail"``); ``variants``; ``cells``, its length in cells; ``width_px``
    and ``width_sigma_px``, the 2 xi of a profile tanh(x / xi) (NaN where none could be fitted). ``p`` is the mean
    probability that the cells along it are of these two variants.
    """
    found: list[Defect] = []
    for g in range(len(polar.vectors)):
        own = np.flatnonzero(polar.grain == g)
        grid = _Grid.of(polar.cell[own], own)
        found += walls_of(grid.table, polar.place, polar.vector, polar.sigma, polar.variant, polar.p_variant, fewest)
    return tuple(sorted(found, key=lambda d: -int(d.detail["cells"])))


def vortices(polar: Polar, *, smoothing: float | None = None) -> tuple[Defect, ...]:
    """Vortices, hedgehogs and antivortices: points around which the displacement turns by a whole number of turns.

    The field is averaged over a Gaussian of ``smoothing`` cells, weighted by its deviations. A winding counts where
    the loop's polygon in the space of displacements keeps three deviations from zero; so neither noise nor an abrupt
    180 degree wall (where a half turn to the left and to the right are alike) makes pairs of vortices.

    Parameters
    ----------
    polar : the displacements. smoothing : width [cells]; ``None`` takes what the ratio of displacements to their
        deviations asks for, between 0.5 and 2.

    Returns
    -------
    Defects of the kind ``vortex``, the surest first. ``place`` is where the displacement vanishes. ``detail`` has
    ``winding`` (+1 for vortices and hedgehogs, -1 for antivortices), ``character`` (``"vortex"``, ``"hedgehog"``,
    ``"antivortex"`` or ``"multiple"``), ``sense`` (``"clockwise"`` on the screen, ``"anticlockwise"``, ``"source"``,
    ``"sink"`` or ``""``), ``margin_sigma`` (see above), ``cells`` (side of the loop) and ``sigma_px``, the deviation of
    ``place``. ``p`` is the share of repetitions with new noise that keep the winding.
    """
    if smoothing is not None and not smoothing >= 0:
        raise InputError(f"smoothing is a number of cells, 0 or more; got {smoothing}.")
    found: list[Defect] = []
    for g, lattice in enumerate(polar.vectors):
        own = np.flatnonzero(polar.grain == g)
        if len(own) >= 9:
            found += _vortices_of(polar, _Grid.of(polar.cell[own], own), lattice, smoothing)
    return tuple(sorted(found, key=lambda d: -float(d.detail["margin_sigma"])))


class _Part(NamedTuple):
    """Cells of one grain; the fields are those of :class:`Polar`."""

    place: Floats
    vector: Floats
    sigma: Floats
    column: Integers
    cell: Integers


_EMPTY: dict[str, Any] = {
    "place": np.zeros((0, 2)),
    "vector": np.zeros((0, 2)),
    "sigma": np.zeros((0, 2)),
    "column": np.zeros(0, np.int64),
    "cell": np.zeros((0, 2), np.int64),
}


class _Grid(NamedTuple):
    """``table`` (rows, columns): which of the cells lies at (i, j) - ``low``; -1 where none."""

    table: Integers
    low: Integers
    cell: Integers

    @classmethod
    def of(cls, cell: Integers, number: Integers) -> _Grid:
        if len(cell) == 0:
            return cls(np.full((0, 0), -1, np.int64), np.zeros(2, np.int64), cell)
        low = cell.min(axis=0)
        table = np.full(tuple(cell.max(axis=0) - low + 1), -1, dtype=np.int64)
        table[tuple((cell - low).T)] = number
        return cls(table, low, cell)

    def beside(self, steps: list[tuple[int, int]]) -> Integers:
        """(n, steps) what lies at each step from each of the cells, -1 where nothing does."""
        padded = np.pad(self.table, 2, constant_values=-1)
        i, j = (self.cell - self.low + 2).T
        return np.stack([padded[i + a, j + b] for a, b in steps], axis=1).reshape(len(self.cell), len(steps))


def _stacked(grids: list[_Grid], starts: Integers, steps: list[tuple[int, int]]) -> Integers:
    near = [g.beside(steps) for g in grids]
    moved = [np.where(b >= 0, b + start, -1) for b, start in zip(near, starts[:-1], strict=True)]
    return np.concatenate(moved) if moved else np.zeros((0, len(steps)), np.int64)


def _of_grain(columns: Columns, assignment: Assignment, number: int, site: int) -> _Part:
    corners = corners_of(assignment.grains[number], site)
    cells = CellTable(assignment, number)
    column = cells.own[assignment.site[cells.own] == site] if corners is not None else np.zeros(0, np.int64)
    if corners is None or len(column) == 0:
        return _Part(**_EMPTY)
    cell = assignment.cell[column]
    column = column[cells.at(cell, site) == column]
    cell = assignment.cell[column]
    around = cells.at(cell[:, None] + corners, 0)
    weight = _balanced(around >= 0, corners)
    whole = weight.sum(axis=1) > 0
    column, cell, around, weight = column[whole], cell[whole], around[whole], weight[whole]
    if len(column) == 0:
        return _Part(**_EMPTY)
    weight = weight / weight.sum(axis=1, keepdims=True)
    place = (weight[:, :, None] * columns.position[around]).sum(axis=1)
    variance = ((weight[:, :, None] * columns.sigma[around]) ** 2).sum(axis=1) + columns.sigma[column] ** 2
    return _Part(place, columns.position[column] - place, np.sqrt(variance), column, cell)


def _balanced(there: NDArray[np.bool_], corners: Integers) -> Floats:
    """(n, m) weight of each corner: all where all are there, else those whose opposite is there too."""
    opposite = (corners[:, None] + corners == 2 * corners.mean(axis=0)).all(axis=-1)
    paired = there & (there @ opposite)
    whole: NDArray[np.bool_] = np.asarray(there.all(axis=1))
    return np.where(whole[:, None], there, paired).astype(np.float64)


def _middle(vector: Floats) -> Floats:
    """Mean of what is left after the far ones (beyond four robust deviations of the median) are out."""
    if len(vector) == 0:
        return np.zeros(2)
    off = vector - np.median(vector, axis=0)
    scale = 1.4826 * np.median(np.abs(off), axis=0) + 1e-12
    kept = (np.abs(off) < 4 * scale).all(axis=1)
    return np.asarray(vector[kept].mean(axis=0) if kept.any() else np.median(vector, axis=0))


def _excess(part: _Part, grid: _Grid) -> float:
    """By how much neighbouring cells disagree beyond their deviations, at least 1.

    The mixed second difference v(i, j) - v(i+1, j) - v(i, j+1) + v(i+1, j+1) is blind to slopes and to straight walls
    along the lattice; the median over the cells forgets the others.
    """
    if len(part.column) < 25:
        return 1.0
    four = np.column_stack([np.arange(len(part.column)), grid.beside([(1, 0), (0, 1), (1, 1)])])
    four = four[(four >= 0).all(axis=1)]
    if len(four) < 16:
        return 1.0
    v = part.vector[four]
    square = (v[:, 0] - v[:, 1] - v[:, 2] + v[:, 3]) ** 2 / (part.sigma[four] ** 2).sum(axis=1)
    return max(1.0, float(np.sqrt(np.median(square) / 0.4549)))  # median of chi-square of one degree


def _across(vectors: Floats) -> NDArray[np.bool_]:
    """Which of the steps between compared cells lead to other scan lines: jitter of a line moves all its columns."""
    steps = np.array(_APART) @ vectors
    return np.asarray(np.abs(steps[:, 0]) > 0.25 * np.hypot(*steps.T))


def _coherence(vector: Floats, sigma: Floats, apart: Integers) -> float:
    """Sum of the scalar products of vectors (in deviations, at most 5 long) of cells that share no column, over what
    chance gives it: the largest, by size, of those for the steps ``apart`` (n, steps)."""
    scaled = vector / sigma
    length = np.hypot(*scaled.T)
    scaled = scaled * np.minimum(1, 5 / np.maximum(length, 1e-12))[:, None]
    ratios = [0.0]
    for other in apart.T:
        product = (scaled[other >= 0] * scaled[other[other >= 0]]).sum(axis=1)
        ratios.append(float(product.sum() / np.sqrt((product**2).sum())) if product.any() else 0.0)
    return max(ratios, key=abs)


def _vortices_of(polar: Polar, grid: _Grid, lattice: Floats, smoothing: float | None) -> Iterator[Defect]:
    there = grid.table >= 0
    vector = np.where(there[..., None], polar.vector[grid.table], np.nan)
    sigma = np.where(there[..., None], polar.sigma[grid.table], np.nan)
    ratio = float(np.nanmedian(np.hypot(*np.moveaxis(vector / sigma, -1, 0))))
    width = float(np.clip(3 / max(ratio, 1e-6), 0.5, 2.0)) if smoothing is None else smoothing
    mean, left = winding.smooth(vector, sigma, width)
    # the grid's first axis runs along a1, so its loops turn as angles do where a2 lies from a1 towards +y
    hand = 1 if np.linalg.det(lattice) < 0 else -1
    found = winding.charges(mean, left)
    draws = int(np.clip(_DRAWN // grid.table.size, _FEWEST_DRAWS, _MOST_DRAWS))
    sure = winding.held(sigma, width, mean, found, draws, np.random.default_rng(0)) if found else ()
    for charge, p in zip(found, sure, strict=True):
        yield _vortex(charge, hand, float(p), polar, grid)


def _vortex(charge: winding.Charge, hand: int, p: float, polar: Polar, grid: _Grid) -> Defect:
    (i, j), s = charge.corner, charge.size
    number = grid.table[max(i - 3, 0) : i + s + 4, max(j - 3, 0) : j + s + 4].ravel()
    number = number[number >= 0]
    on_rim = grid.table[i : i + s + 1, j : j + s + 1]
    rim = polar.place[on_rim[on_rim >= 0]]
    reach = (s / 2 + 1.2) * float(np.sqrt(abs(np.linalg.det(polar.vectors[polar.grain[number[0]]]))))
    core, sigma = rim.mean(axis=0), np.nan
    for _ in range(4):  # amid the cells that are asked, so that a field that saturates does not pull
        away = np.hypot(*(polar.place[number] - core).T)
        near = number[np.argsort(away)][: max(4, int((away < reach).sum()))]
        core, sigma = _core(polar.place[near], polar.vector[near], polar.sigma[near])
        core = np.clip(core, rim.min(axis=0), rim.max(axis=0))
    place, v = polar.place[near], polar.vector[near]
    away = place - core
    swirl = np.exp(1j * (np.arctan2(v[:, 0], v[:, 1]) - np.arctan2(away[:, 0], away[:, 1]))).sum()
    turns = hand * charge.winding
    character, sense = _named(turns, complex(swirl))
    detail: dict[str, Any] = {
        "winding": turns,
        "character": character,
        "sense": sense,
        "margin_sigma": charge.margin,
        "cells": charge.size,
        "sigma_px": sigma,
    }
    return Defect("vortex", core[None], p, detail)


def _core(place: Floats, vector: Floats, sigma: Floats) -> tuple[Floats, float]:
    """Where an affine field through ``vector`` at ``place`` vanishes, and the deviation of its coordinates."""
    middle = place.mean(axis=0)
    design = np.column_stack([np.ones(len(place)), place - middle])
    solved, *_ = np.linalg.lstsq(design, vector, rcond=None)
    strong = float(np.sqrt(np.abs(np.linalg.det(solved[1:]))))
    if strong < 1e-12:
        return middle, float(np.hypot(*np.ptp(place, axis=0))) / 4
    spread = float(np.sqrt((sigma**2).mean() / len(place))) / strong
    return middle - np.linalg.solve(solved[1:].T, solved[0]), spread


def _named(turns: int, swirl: complex) -> tuple[str, str]:
    if turns == -1:
        return "antivortex", ""
    if turns != 1:
        return "multiple", ""
    if abs(swirl.real) > abs(swirl.imag):
        return "hedgehog", "source" if swirl.real > 0 else "sink"
    return "vortex", "clockwise" if swirl.imag > 0 else "anticlockwise"
