"""The cells of a crystal around its columns, and which places of a cell hold columns: sites by their class.

A weak column that noise hides is not alone: the same place of every cell has one. What a single place cannot show, all
of its class show together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from stemloop.describe.finding.gaussians import Floats, Image, Integers
from stemloop.describe.finding.sites import Neighbourhood, neighbourhoods

#: Pairs of columns a translation apart differ in brightness by less than this, in variances of all columns (apart from
#: the noise's; at random it is 1, alternating sublattices have 2), where columns differ by more than this part.
_ALIKE, _CONTRAST = 1.4, 0.15
#: Translations are shared by this part of what the most shared are: a vector between sublattices by half.
_AS_SHARED = 0.75
#: A column belongs to a class within this part of the neighbourhood's typical distance.
_REACH = 0.2
#: Share of the cells that a class of columns takes, and of the columns that classes explain where there is a lattice.
_LEAST_SHARE, _EXPLAINED = 0.12, 0.7
#: A place is not enclosed if columns are missing over so large an angle.
_OPEN_SIDE = 0.9 * np.pi
#: Columns so many widths beyond the border reach into the image.
_BEYOND = 3.0
#: A class that shows only in the mean of all cells stands out by this many deviations, and of the places that are
#: neither column nor class by this many of theirs.
_STANDS_OUT, _ABOVE_OTHERS = 6.0, 3.0
#: Its columns are hidden by noise, not by what the model leaves: on average each stands out by less than this, and they
#: differ by hardly more than noise.
_UNSEEN, _EVEN = 4.0, 2.0
#: Share of the usual number of columns around a cell where it may have columns, and where it is inside the crystal.
_INHABITED, _INSIDE = 0.5, 0.65
#: Classes that are looked for in the mean of cells, at most.
_HIDDEN = 4
#: Cells whose mean is looked at, at most.
_SAMPLED = 200


class Places(NamedTuple):
    """Open places of cells: ``position`` (n, 2) [px], ``kind`` (n,) the class of each, ``within`` (n,) whether the
    crystal is all around, ``spread`` (n,) [px] by which a column may be off. ``member`` (columns,) is the class of each
    column, -1 for none. ``hidden`` (classes,) tells which classes have no column that stands out. ``rim`` (n,) tells
    which places are so near to the border, or beyond it, that only a part of a column is seen."""

    position: Floats
    kind: Integers
    within: NDArray[np.bool_]
    spread: Floats
    member: Integers
    hidden: NDArray[np.bool_]
    rim: NDArray[np.bool_]


class _Cell(NamedTuple):
    """A lattice: rows of ``basis`` (2, 2) [px]; cells' coordinates are ``(p - middle) @ inverse - bend(p)``."""

    basis: Floats
    inverse: Floats
    middle: Floats
    size: float
    bend: Floats

    def coordinates(self, place: Floats) -> Floats:
        return (place - self.middle) @ self.inverse - self._powers(place) @ self.bend

    def place(self, coordinates: Floats) -> Floats:
        first = coordinates @ self.basis + self.middle
        return np.asarray(first + self._powers(first) @ self.bend @ self.basis)

    def _powers(self, place: Floats) -> Floats:
        y, x = ((place - self.middle) / self.size).clip(-1.3, 1.3).T
        return np.stack([np.ones_like(y), y, x, y * y, y * x, x * x], -1)


class Crystal(NamedTuple):
    """A neighbourhood with its lattice: the ``group``, its ``cell``, the ``coordinates`` (n, 2) of its columns, the
    places ``phases`` (k, 2) in the cell that they take, and (n,) which is each one's ``own`` (-1: none)."""

    group: Neighbourhood
    cell: _Cell
    coordinates: Floats
    phases: Floats
    own: Integers


def crystals(
    position: Floats, amplitude: Floats, sigma: Floats, shape: tuple[int, ...]
) -> tuple[list[Neighbourhood], list[Crystal]]:
    """The neighbourhoods of the columns at ``position`` (n, 2) [px] with the ``amplitude`` (n,) give or take ``sigma``,
    and the lattices of those whose columns take few places of a cell."""
    known: list[Crystal] = []

    def sound(group: Neighbourhood) -> bool:
        mine = group.members
        cell = _cell(position[mine], amplitude[mine], sigma[mine], group)
        if cell is None:
            return False
        coordinates = cell.coordinates(position[mine])
        phases, own = _classes(coordinates, cell, _REACH * group.spacing)
        if len(phases) == 0:
            return False
        known.append(Crystal(group, cell, coordinates, phases, own))
        return True

    return neighbourhoods(position, shape, sound), known


def places(position: Floats, known: list[Crystal], response: Image, width: float) -> Places:
    """The open places of the classes of all ``known`` crystals.

    Parameters
    ----------
    position : (n, 2) [px] of the columns that stand out. response : how far the image without these columns stands out,
        in deviations of one pixel's noise. width : of the columns [px].
    """
    member, belongs = np.full(len(position), -1), np.full(len(position), -1)
    found = [(np.zeros((0, 2)), np.zeros(0, int), np.zeros(0, bool), np.zeros(0))]
    hidden: list[bool] = []
    everyone, last = cKDTree(position), np.array(response.shape) - 1
    for number, crystal in enumerate(known):
        belongs[crystal.group.members] = number
    for number, (group, cell, coordinates, phases, own) in enumerate(known):
        mine, first = position[group.members], len(hidden)
        member[group.members] = np.where(own >= 0, own + first, -1)
        cells, inside = _inhabited(cell, phases.mean(axis=0), coordinates, everyone, response.shape)
        more = _hidden(cell, cells, phases, response, width) if len(cells) else np.zeros((0, 2))
        off = _wrapped(coordinates - phases[own]) @ cell.basis
        off[own < 0] = 0
        hidden += [False] * len(phases) + [True] * len(more)
        for kind, phase in enumerate(np.concatenate([phases, more])):
            if len(cells) == 0:
                break
            there = _open(cell, cells + phase, kind, mine, own, off)
            free = ((there > -_BEYOND * width) & (there < last + _BEYOND * width)).all(axis=1)
            away, nearest = (np.asarray(v) for v in everyone.query(there, 3))
            free &= away[:, 0] > max(1.3 * width, 0.4 * group.spacing)
            free &= (belongs[nearest] == number).sum(axis=1) >= 2
            scatter = off[own == kind]
            spread = float(np.sqrt((scatter**2).mean())) if len(scatter) > 4 else 0.2 * width
            spread = min(max(spread, 0.1 * width), width)
            there = there[free]
            found.append((there, np.full(len(there), first + kind), inside[free], np.full(len(there), spread)))
    where, kinds, within, spreads = (np.concatenate(part) for part in zip(*found, strict=True))
    if len(where):
        twice = cKDTree(where).query_pairs(1.2 * width, output_type="ndarray")[:, 1]
        where, kinds, within, spreads = (np.delete(of, twice, axis=0) for of in (where, kinds, within, spreads))
    if len(where):
        within &= _enclosed(where, everyone)
    rim = np.asarray(((where < width) | (where > last - width)).any(axis=1))
    return Places(where, kinds, within & ~rim, spreads, member, np.array(hidden, bool), rim)


def _cell(place: Floats, amplitude: Floats, sigma: Floats, group: Neighbourhood) -> _Cell | None:
    """The lattice of a neighbourhood of columns, of vectors that join columns alike; None if there is none."""
    if len(group.vectors) < 4:
        return None
    shared = group.share > _AS_SHARED * np.sort(group.share)[-4:].mean()
    vectors = group.vectors[shared & _alike(place, amplitude, sigma, group)]
    length = np.hypot(*vectors.T)
    order = np.argsort(length)
    vectors, length = vectors[order], length[order]
    if len(vectors) < 4:
        return None
    across = np.abs(vectors[0, 0] * vectors[:, 1] - vectors[0, 1] * vectors[:, 0])
    apart = np.flatnonzero(across > 0.4 * length[0] * length)
    if len(apart) == 0:
        return None
    basis = vectors[[0, apart[0]]]
    whole = np.round(vectors @ np.linalg.inv(basis))
    fits = np.hypot(*(vectors - whole @ basis).T) < _REACH * group.spacing
    basis = np.linalg.lstsq(whole[fits], vectors[fits], rcond=None)[0]
    if abs(np.linalg.det(basis)) < 0.2 * length[0] ** 2:
        return None
    middle = np.median(place, axis=0)
    radius = np.hypot(*(place - middle).T)
    cell = _Cell(basis, np.linalg.inv(basis), middle, float(radius.max()), np.zeros((6, 2)))
    reach = _REACH * group.spacing
    for part in (0.5, 1.0, 1.0):
        some = radius <= part * radius.max()
        coordinates = cell.coordinates(place[some])
        crowd = _crowd(coordinates, basis, reach)
        top = coordinates[int(np.argmax(crowd))]
        off = _wrapped(coordinates - top)
        near = np.hypot(*(off @ basis).T) < 1.5 * reach
        terms = 6 if near.sum() > 30 and part == 1.0 else 3
        if near.sum() < 6:
            return None
        powers = cell._powers(place[some][near])[:, :terms]
        cell.bend[:terms] += np.linalg.lstsq(powers, off[near], rcond=None)[0]
    return cell


def _alike(place: Floats, amplitude: Floats, sigma: Floats, group: Neighbourhood) -> NDArray[np.bool_]:
    """(k,) whether the columns that each of the vectors joins are of one brightness."""
    noise = float((sigma**2).mean())
    contrast = float(amplitude.var()) - noise
    if contrast < (_CONTRAST * amplitude.mean()) ** 2:
        return np.ones(len(group.vectors), bool)
    tree, good = cKDTree(place), np.zeros(len(group.vectors), bool)
    for k, vector in enumerate(group.vectors):
        away, which = (np.asarray(v) for v in tree.query(place + vector, distance_upper_bound=_REACH * group.spacing))
        pair = np.isfinite(away)
        if pair.any():
            difference = amplitude[pair] - amplitude[which[pair]]
            good[k] = 0.5 * float((difference**2).mean()) - noise < _ALIKE * contrast
    return good


def _crowd(coordinates: Floats, basis: Floats, reach: float) -> Integers:
    """(n,) how many of ``coordinates`` (n, 2) are within ``reach`` [px] of each, all moved into one cell."""
    box = np.hypot(*basis.T)
    scaled = np.minimum(np.mod(coordinates, 1) % 1 * box, box * (1 - 1e-12))
    return np.asarray(cKDTree(scaled, boxsize=box).query_ball_point(scaled, reach, return_length=True))


def _classes(coordinates: Floats, cell: _Cell, reach: float) -> tuple[Floats, Integers]:
    """Places (k, 2) in the cell that many columns share, and (n,) which of them each column has (-1: none); none at all
    where these are too few of the columns.

    Many is more than chance would bring together of all columns; when these have their places, of those left.
    """
    crowd = _crowd(coordinates, cell.basis, reach)
    part = np.pi * reach**2 / abs(float(np.linalg.det(cell.basis)))
    phases: list[Floats] = []
    own = np.full(len(coordinates), -1)
    free = np.ones(len(coordinates), bool)
    for _ in range(2):
        chance = part * free.sum()
        least = max(4.0, _LEAST_SHARE * float(crowd.max()), chance + 3 * np.sqrt(chance))
        while (free & (crowd >= least)).any():
            top = int(np.argmax(np.where(free, crowd, 0)))
            off = _wrapped(coordinates - coordinates[top])
            near = np.hypot(*(off @ cell.basis).T) < reach
            phase = coordinates[top] + off[near].mean(axis=0)
            away = np.hypot(*(_wrapped(coordinates - phase) @ cell.basis).T)
            own[(away < 1.5 * reach) & (own < 0)] = len(phases)
            free &= away > 2 * reach
            free[top] = False
            phases.append(np.mod(phase, 1))
        if (own >= 0).mean() < _EXPLAINED:
            return np.zeros((0, 2)), own
    return np.array(phases), own


def _wrapped(coordinates: Floats) -> Floats:
    """Differences of coordinates, to the nearest cell's."""
    return coordinates - np.round(coordinates)


def _inhabited(
    cell: _Cell, middle: Floats, own: Floats, everyone: cKDTree, shape: tuple[int, ...]
) -> tuple[Floats, NDArray[np.bool_]]:
    """(m, 2) the whole coordinates of the cells that have columns about them, ``everyone`` asked, and (m,) whether
    they are on all sides. ``middle`` is that of a cell, ``own`` (n, 2) are the coordinates of the columns."""
    low, high = np.floor(own.min(axis=0)).astype(int) - 2, np.ceil(own.max(axis=0)).astype(int) + 2
    if np.prod(high - low + 1) > 20 * len(own) + 400:
        return np.zeros((0, 2)), np.zeros(0, bool)
    cells = np.stack(np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(low, high, strict=True)), indexing="ij"), -1)
    cells = cells.reshape(-1, 2).astype(np.float64)
    where = cell.place(cells + middle)
    side = float(np.hypot(*cell.basis.T).max())
    near = ((where > -side) & (where < np.array(shape) - 1 + side)).all(axis=1)
    cells, where = cells[near], where[near]
    if len(cells) == 0:
        return cells, np.zeros(0, bool)
    radius, columns = 1.8 * side, cell.place(own)
    count = everyone.query_ball_point(where, radius, return_length=True)
    share = count / np.maximum(_on_image(where, shape, radius), 0.1)
    usual = np.asarray(everyone.query_ball_point(columns, radius, return_length=True))
    share = share / max(1.0, float(np.median(usual / _on_image(columns, shape, radius))))
    kept = share > _INHABITED
    return cells[kept], share[kept] > _INSIDE


def _enclosed(where: Floats, everyone: cKDTree) -> NDArray[np.bool_]:
    """(n,) whether the columns nearest to each of ``where`` are on all its sides: seen from there, no two that follow
    each other are half a turn apart."""
    _, nearest = everyone.query(where, min(8, everyone.n))
    off = everyone.data[np.asarray(nearest)] - where[:, None]
    angle = np.sort(np.arctan2(off[..., 0], off[..., 1]), axis=1)
    gap = np.diff(angle, axis=1, append=angle[:, :1] + 2 * np.pi)
    return np.asarray(gap.max(axis=1) < _OPEN_SIDE)


def _on_image(where: Floats, shape: tuple[int, ...], radius: float) -> Floats:
    """(n,) share of a square of twice the ``radius`` around each of ``where`` that is on the image."""
    last = np.array(shape) - 1
    return np.asarray(((where + radius).clip(0, last) - (where - radius).clip(0, last)).prod(axis=1) / (4 * radius**2))


def _hidden(cell: _Cell, cells: Floats, phases: Floats, response: Image, width: float) -> Floats:
    """(k, 2) places in the cell that no class of columns has but where the mean of all cells stands out."""
    steps = [int(np.clip(np.hypot(*v) / (0.5 * width), 4, 40)) for v in cell.basis]
    grid = np.stack(np.meshgrid(*(np.arange(n) / n for n in steps), indexing="ij"), -1).reshape(-1, 2)
    cells = np.random.default_rng(0).permutation(cells)[:_SAMPLED]
    place = np.round(cell.place((grid[:, None] + cells).reshape(-1, 2))).astype(int)
    last = np.array(response.shape) - 1
    inside = ((place >= width) & (place <= last - width)).all(axis=1)
    place = place.clip(0, last)
    sampled = np.where(inside, response[tuple(place.T)], 0).reshape(len(grid), -1)
    number = inside.reshape(len(grid), -1).sum(axis=1)
    z = sampled.sum(axis=1) / np.sqrt(np.maximum(number, 1))

    def away(phase: Floats) -> NDArray[np.bool_]:
        off = grid - phase
        near = np.stack([(off - np.round(off) + s) @ cell.basis for s in ((0, 0), (1, 0), (0, 1), (1, -1), (-1, 0))])
        return np.asarray(np.hypot(near[..., 0], near[..., 1]).min(axis=0) > 2.2 * width)

    free = (number > 0.3 * len(cells)) & (number >= 8)
    for phase in phases:
        free &= away(phase)
    chosen: list[Floats] = []
    while len(chosen) < _HIDDEN and free.any():
        top = int(np.argmax(np.where(free, z, -np.inf)))
        free &= away(grid[top])
        others = z[free] if free.any() else np.zeros(1)
        seen = sampled[top][inside.reshape(len(grid), -1)[top]]
        if seen.mean() > _UNSEEN or seen.std() > _EVEN:
            break
        if z[top] < max(_STANDS_OUT, _ABOVE_OTHERS * 1.4826 * float(np.median(np.abs(others - np.median(others))))):
            break
        chosen.append(grid[top])
    return np.array(chosen).reshape(-1, 2)


def _open(cell: _Cell, coordinates: Floats, kind: int, mine: Floats, own: Integers, off: Floats) -> Floats:
    """(m, 2) where columns of a class should be, moved as the columns around each are, its own class twice as much."""
    there = cell.place(coordinates)
    radius = 1.6 * np.hypot(*cell.basis.T).max()

    def mean(of: NDArray[np.bool_], start: Floats, stay: float) -> Floats:
        if not of.any():
            return start
        tree = cKDTree(mine[of])
        away, which = (np.asarray(v) for v in tree.query(there, min(8, int(of.sum())), distance_upper_bound=radius))
        away, which = away.reshape(len(there), -1), which.reshape(len(there), -1)
        seen = np.isfinite(away)
        moved = np.where(seen[..., None], off[of][np.minimum(which, int(of.sum()) - 1)], 0).sum(axis=1)
        return np.asarray((moved + stay * start) / (seen.sum(axis=1) + stay)[:, None])

    shift = mean(own >= 0, np.zeros_like(there), 2.0)
    return there + mean(own == kind, shift, 2.0)
