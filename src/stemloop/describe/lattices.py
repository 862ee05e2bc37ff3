"""Which lattice each column belongs to, which place of the cell it holds, and how far it is from there.

Nothing is told beforehand. Each grain's lattice is found in a neighbourhood
(:mod:`~stemloop.describe.assigning.seeds`), followed from column to column
(:mod:`~stemloop.describe.assigning.walking`), made as coarse as brightness and position demand
(:mod:`~stemloop.describe.assigning.decoration`), and every column is then compared with the lattice of its own
neighbours (:mod:`~stemloop.describe.assigning.neighbourhoods`), so that an error stays where it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from stemloop.core.errors import InputError
from stemloop.core.structure import Assignment, Columns, Grain
from stemloop.describe.assigning.decoration import Indexing, brightness, decorated, finest
from stemloop.describe.assigning.neighbourhoods import SmoothLattice, local
from stemloop.describe.assigning.seeds import Seed, common_place, seed
from stemloop.describe.assigning.symmetry import symmetric
from stemloop.describe.assigning.walking import LEVELS, walk
from stemloop.describe.vectors import wrapped

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]

_FEWEST_COLUMNS, _SMALLEST_GRAIN = 8, 10
_NEIGHBOURS, _PATCH, _SMALL_PATCH = 48, 90, 24
_CANDIDATES, _TRIES, _SAMPLE = 200, 12, 1500
_FITS = 0.5
#: A place that fewer of its cells hold than this is not called vacant where it is empty.
_OCCUPIED = 0.6
#: Nor is it where columns of its kind have a larger deviation [widths]: they could hide in the noise.
_CERTAIN = 0.15
_FREEDOM = 4.0
#: Where they could hide, even the finder's word counts only if it calls no more than this share of them vacant.
_RARE = 0.06
#: A place that fewer of the cells hold is none of the lattice's.
_SPARSE = 0.1
#: Columns whose rows differ by less than this part of the distance of neighbours are on one scan line.
_LINE = 0.2
#: A local cell of less than this part of the area that the walk gave it is none.
_FLATTEST = 0.3


class _Field(NamedTuple):
    """The columns of an image: ``near`` (n, 48) are each one's neighbours by distance, -1 where there are none."""

    position: Floats
    variance: Floats
    amplitude: Floats
    near: Integers
    tree: cKDTree
    shape: tuple[int, int]
    margin: float


class _Grown(NamedTuple):
    """A lattice that was followed over the image: ``site`` (n,) is -1 where it does not reach."""

    seed: Seed
    cell: Integers
    site: Integers
    frame: Floats
    support: Floats


class _Member(NamedTuple):
    """What is known of the columns ``which`` of one grain."""

    which: Integers
    cells: Indexing
    grain: Grain
    p_site: Floats
    ideal: Floats
    displacement: Floats
    sigma: Floats
    boundary: Bools
    vacant: Floats
    vacant_site: Integers


def assign(columns: Columns, shape: tuple[int, int]) -> Assignment:
    """Find the lattices of an image's columns and the place of each column in them.

    A grain is a region in which one lattice can be followed from neighbour to neighbour, however bent or strained (so a
    coherent film and its substrate are one grain; two crystals that are turned against each other are two). Its cell is
    that of the decorated lattice: columns that differ in brightness or in the order of their neighbours are different
    sites, and the Bayesian information criterion says how many there are. Cells are numbered by walking; where loops
    disagree, as around a dislocation, the numbers have a cut, and nothing else is computed from them.

    The ideal place of a column is a robust fit of the lattice to the nearest 12 primary columns (or 20, bent, where
    that predicts better), without itself. Where the mean place of a site is near a centre of symmetry of the cell, it
    is set there (see :func:`~stemloop.describe.assigning.symmetry.symmetric`), so that the displacement of a
    uniformly polarised crystal is its polar displacement and not zero.

    Parameters
    ----------
    columns : what :func:`~stemloop.describe.find_columns` or any other finder found. Without deviations (zeros) the
        spread of the lattice itself takes their place.
    shape : (rows, columns) of the image [px].

    Returns
    -------
    Assignment : without grains where the columns show no lattice (too few, no order).

    Raises
    ------
    InputError : positions or amplitudes are not finite, or the arrays' lengths differ.
    """
    field = _field(columns, shape)
    if field is None:
        return _none(len(columns))
    owned = _owned(_lattices(field))
    members = [m for grown, index in owned for m in _described(field, grown, index, columns.vacant)]
    return _joined(len(columns), sorted(members, key=lambda m: -len(m.which)))


def _field(columns: Columns, shape: tuple[int, int]) -> _Field | None:
    position = np.ascontiguousarray(columns.position, dtype=np.float64)
    amplitude = np.asarray(columns.amplitude, dtype=np.float64)
    n = len(position)
    if position.ndim != 2 or position.shape[1:] != (2,) or amplitude.shape != (n,):
        raise InputError(f"columns need positions (n, 2) and amplitudes (n,); got {position.shape}, {amplitude.shape}.")
    if not (np.isfinite(position).all() and np.isfinite(amplitude).all()):
        raise InputError("some columns have positions or amplitudes that are not finite; leave those out.")
    if len(shape) != 2 or min(shape) < 1:
        raise InputError(f"the image's shape is (rows, columns); got {shape}.")
    if n < _FEWEST_COLUMNS:
        return None
    tree = cKDTree(position)
    index = np.asarray(tree.query(position, min(_NEIGHBOURS + 1, n))[1])
    near = np.full((n, _NEIGHBOURS), -1, np.int64)
    near[:, : index.shape[1] - 1] = index[:, 1:]
    sigma = np.asarray(columns.sigma, dtype=np.float64)
    variance = np.where(np.isfinite(sigma), sigma, 0.0) ** 2 if sigma.shape == (n, 2) else np.zeros((n, 2))
    width = np.asarray(columns.width, dtype=np.float64)
    margin = float(np.median(width)) if width.shape == (n,) and np.isfinite(width).all() else 1.0
    return _Field(position, variance, amplitude, near, tree, (int(shape[0]), int(shape[1])), margin)


def _none(n: int) -> Assignment:
    nowhere = np.full((n, 2), np.nan)
    whole, nothing = np.full(n, -1, np.int64), np.zeros(0, np.int64)
    return Assignment(
        grain=whole,
        cell=np.zeros((n, 2), np.int64),
        site=whole.copy(),
        p_site=np.zeros((n, 0)),
        ideal=nowhere,
        displacement=nowhere.copy(),
        displacement_sigma=nowhere.copy(),
        boundary=np.zeros(n, bool),
        vacant=np.zeros((0, 2)),
        vacant_site=nothing,
        vacant_grain=nothing.copy(),
        grains=(),
    )


# ------------------------------------------------------------------------------------------------ finding grains


def _lattices(field: _Field) -> list[_Grown]:
    """Lattices one after the other, each from the best ordered place that no earlier one reaches."""
    n = len(field.position)
    free, asked = np.ones(n, bool), np.zeros(n, bool)
    found: list[_Grown] = []
    failed = 0
    while failed < _TRIES and (free & ~asked).sum() >= _FEWEST_COLUMNS:
        start = _promising(field, free, free & ~asked)
        patch = _patch(field, start, free)
        asked[start] = True
        grown = _from(field, patch, free)
        if grown is None:
            asked[patch[: _SMALL_PATCH // 2]] = True
            failed += 1
            continue
        found.append(grown)
        free &= grown.site < 0
        failed = 0
    return found


def _from(field: _Field, patch: Integers, free: Bools) -> _Grown | None:
    """A new lattice from a neighbourhood, or from its middle alone (a small grain), or None."""
    for size in (_PATCH, _SMALL_PATCH):
        here = seed(field.position, field.tree, patch[:size], field.shape)
        if here is not None:
            grown = _enriched(field, _grown(field, here))
            if _is_new(grown, free):
                return grown
    return None


def _promising(field: _Field, free: Bools, open_: Bools) -> int:
    """The column, of at most 200 open ones, whose neighbours most often have a partner on the opposite side, and are
    free."""
    candidates = np.flatnonzero(open_)
    candidates = candidates[:: -(-len(candidates) // _CANDIDATES)]
    near = field.near[candidates, : min(12, (field.near[0] >= 0).sum())]
    step = field.position[near] - field.position[candidates][:, None]
    far = np.asarray(field.tree.query(field.position[candidates][:, None] - step)[0])
    opposite = far < 0.2 * np.hypot(step[..., 0], step[..., 1])[:, :1]
    score = opposite.mean(axis=1) + free[near].mean(axis=1)
    return int(candidates[score.argmax()])


def _patch(field: _Field, start: int, free: Bools) -> Integers:
    """Numbers of the nearest free columns of one, by distance."""
    numbers = np.flatnonzero(free)
    distance = np.hypot(*(field.position[numbers] - field.position[start]).T)
    return np.asarray(numbers[np.argsort(distance, kind="stable")[:_PATCH]], dtype=np.int64)


def _grown(field: _Field, here: Seed) -> _Grown:
    cell, site, frame, support = walk(
        field.position, field.near, here.vectors, here.basis, here.column, here.nearest, LEVELS
    )
    site[support < _FITS] = -1
    return _Grown(here, cell, site, frame, support)


def _enriched(field: _Field, grown: _Grown) -> _Grown:
    """With the places of the cell that only some of its cells hold, too few to be seen from the seed.

    Columns that do not fit but lie among those that do are asked for their place in the local cell; where at least half
    of them, and eight, meet at one place, it is one of the lattice's.
    """
    for _ in range(3):
        mine = np.flatnonzero(grown.site >= 0)
        if len(mine) < _SMALLEST_GRAIN:
            break
        reach = float(np.hypot(*grown.seed.vectors.T).max())
        other = np.flatnonzero(grown.site < 0)
        far, nearest = (np.asarray(v) for v in cKDTree(field.position[mine]).query(field.position[other]))
        among = far < reach
        host = mine[nearest[among]]
        step = (field.position[other[among]] - field.position[host])[:, None]
        fraction = (step @ np.linalg.inv(grown.frame[host]))[:, 0] + grown.seed.basis[grown.site[host]]
        place = common_place(fraction, grown.seed.vectors, 0.3 * grown.seed.nearest)
        if place is None:
            break
        basis = np.concatenate([grown.seed.basis, place[None]])
        if np.hypot(*wrapped(grown.seed.basis - place, grown.seed.vectors).T).min() < 0.5 * grown.seed.nearest:
            break
        again = _grown(field, grown.seed._replace(basis=basis))
        added = np.flatnonzero(again.site == len(basis) - 1)
        most = np.bincount(again.site[again.site >= 0]).max()
        here = np.isin(added, other[among]).sum()  # the others lie beyond: another crystal, or this one after a shift
        if len(added) < max(_FEWEST_COLUMNS, _SPARSE * most) or here < 0.6 * len(added):
            break
        grown = again
    return grown


def _is_new(grown: _Grown, free: Bools) -> bool:
    """Large enough, and not a lattice that was there before."""
    size = int((grown.site >= 0).sum())
    fresh = int((free & (grown.site >= 0)).sum())
    return size >= _SMALLEST_GRAIN and fresh >= max(_SMALLEST_GRAIN, 0.5 * size)


def _strain(grown: _Grown) -> Floats:
    """(n,) twice the logarithm of the ratio of the principal stretches of the local vectors: what strain costs."""
    frame = np.where(grown.site[:, None, None] >= 0, grown.frame, grown.seed.vectors)
    stretch = np.linalg.svd(np.linalg.inv(grown.seed.vectors) @ frame, compute_uv=False)
    return np.asarray(2 * np.log(stretch[:, 0] / stretch[:, 1]))


def _owned(lattices: list[_Grown]) -> list[tuple[_Grown, Integers]]:
    """Each column goes to the lattice that fits it best; lattices with the numbers of their columns, largest first."""
    lattices = sorted(lattices, key=lambda g: -int((g.site >= 0).sum()))
    while lattices:
        support = np.array([np.where(g.site >= 0, g.support - _strain(g), -9.0) for g in lattices])
        owner = np.where(support.max(axis=0) > -9, support.argmax(axis=0), -1)
        size = np.bincount(owner[owner >= 0], minlength=len(lattices))
        if size.min() >= _SMALLEST_GRAIN:
            order = np.argsort(-size, kind="stable")
            return [(lattices[k], np.flatnonzero(owner == k)) for k in order]
        lattices = [g for k, g in enumerate(lattices) if k != size.argmin()]
    return []


# -------------------------------------------------------------------------------------------- describing a grain


def _described(field: _Field, grown: _Grown, index: Integers, vacant: Floats) -> list[_Member]:
    """What is known of the columns ``index`` of a lattice: one grain, or one for each antiphase domain."""
    nearest = grown.seed.nearest
    cells = Indexing(grown.seed.vectors, grown.seed.basis, grown.cell[index], grown.site[index], grown.frame[index])
    cells = finest(cells, nearest)
    bright = brightness(field.amplitude, field.near)[index]
    position = field.position[index]
    variance = np.maximum(field.variance[index].mean(axis=1), (1e-3 * nearest) ** 2)
    off = position - _predicted(position, variance, cells)
    off = _without_scan(np.where(np.isfinite(off), off, 0.0), position[:, 0], nearest)
    cells, domain = decorated(cells, position, bright, off, nearest)
    parts = [np.flatnonzero(domain == d) for d in np.unique(domain)]
    return [
        _member(field, index[part], cells.take(part), bright[part], variance[part], nearest, vacant)
        for part in parts
        if len(part) >= _SMALLEST_GRAIN
    ]


def _member(
    field: _Field, index: Integers, cells: Indexing, bright: Floats, variance: Floats, nearest: float, vacant: Floats
) -> _Member:
    """Sites, ideal places, rim and vacancies of one grain."""
    position = field.position[index]
    cells = _ranked(cells, bright)
    around = _surroundings(position, variance, cells)
    frame = _filled(around.frame, cells.frame)
    fraction = np.einsum("ni,nij->nj", position - around.origin, np.linalg.inv(frame))
    basis = symmetric(_mean_places(fraction, cells), cells.vectors)
    cells = cells._replace(basis=basis, frame=frame)
    ideal, spread = around.at(basis[cells.site])
    sigma = np.sqrt(field.variance[index] + spread[:, None])
    p_site = _probabilities(position - ideal, bright, cells)
    grain = _grain(position, field.amplitude[index], cells)
    rim, places, kinds = _gaps(field, index, cells, nearest, vacant)
    return _Member(index, cells, grain, p_site, ideal, position - ideal, sigma, rim, places, kinds)


def _without_scan(off: Floats, row: Floats, nearest: float) -> Floats:
    """``off`` (n, 2) less its mean along each scan line, ``row`` (n,) being the columns' rows.

    A line that is scanned too far to one side moves all its columns alike: dozens of them, but one error. A place of
    the cell by itself must show among the columns of one line.
    """
    order = np.argsort(row, kind="stable")
    sums = np.concatenate([np.zeros((1, 2)), np.cumsum(np.clip(off[order], -0.3 * nearest, 0.3 * nearest), axis=0)])
    low, high = (np.searchsorted(row[order], row + side * _LINE * nearest) for side in (-1, 1))
    return np.asarray(off - (sums[high] - sums[low]) / np.maximum(high - low, 1)[:, None])


def _filled(frame: Floats, otherwise: Floats) -> Floats:
    """``frame`` (n, 2, 2) where it is known and spans the plane (a single row of columns does not)."""
    area = np.abs(np.linalg.det(otherwise))
    finite: Bools = np.asarray(np.isfinite(frame).all(axis=(1, 2)))
    known = np.where(finite[:, None, None], frame, 0.0)
    there: Bools = np.asarray(np.abs(np.linalg.det(known)) > _FLATTEST * area)
    return np.where(there[:, None, None], frame, otherwise)


def _predicted(position: Floats, variance: Floats, cells: Indexing) -> Floats:
    """(n, 2) where the columns around expect each, all sites alike."""
    around = local(position, variance, cells, np.arange(len(position)))
    return around.at(cells.basis[cells.site])[0]


def _ranked(cells: Indexing, bright: Floats) -> Indexing:
    """Sites in the order of their brightness, the brightest first at (0, 0) of its cell.

    Of sites that are alike within three deviations the one is first that leaves the others nearest to the origin.
    """
    k = len(cells.basis)
    groups = [bright[cells.site == s] for s in range(k)]
    mean = np.array([np.median(g) if len(g) else -np.inf for g in groups])
    error = np.array([1.2533 * np.std(g) / np.sqrt(len(g)) if len(g) else 0.0 for g in groups])
    top = int(mean.argmax())
    alike = np.flatnonzero(mean > mean[top] - max(0.02, 3 * np.hypot(error[top], error.max())))
    first = min(alike, key=lambda s: (round(float(((cells.basis - cells.basis[s] + 1e-3) % 1.0).sum()), 2), s))
    order = np.array([first, *(s for s in np.argsort(-mean, kind="stable") if s != first)])
    basis = cells.basis[order] - cells.basis[first]
    basis = basis - np.floor(basis + 1e-3)
    site = np.argsort(order)[cells.site]
    whole = np.rint(cells.cell + cells.basis[cells.site] - cells.basis[first] - basis[site]).astype(np.int64)
    return cells._replace(basis=basis, cell=whole, site=site)


def _surroundings(position: Floats, variance: Floats, cells: Indexing) -> SmoothLattice:
    """The lattice around each column, with neighbours' variance raised to what their own misfits show.

    Of the straight and the bent lattice the one is taken that predicts the primary columns better.
    """
    primary = np.flatnonzero(cells.site == 0)
    sample = primary[:: -(-len(primary) // _SAMPLE)]
    chosen: tuple[float, int, Floats] | None = None
    for order in (1, 2):
        total = variance
        for _ in range(2):
            around = local(position, total, cells, primary, order, sample)
            left, spread = position[sample] - around.origin, around.covariance[:, 0, 0]
            total = variance + _excess(left, variance[sample] + spread, spread / total[sample])
        good: Bools = np.asarray(np.isfinite(left).all(axis=1))
        size = float(np.median(np.hypot(*left[good].T))) if good.sum() > 0.5 * len(good) else np.inf
        if chosen is None or size < 0.93 * chosen[0]:
            chosen = size, order, total
    assert chosen is not None
    return local(position, chosen[2], cells, primary, chosen[1])


def _excess(left: Floats, expected: Floats, share: Floats) -> float:
    """Variance [px^2] of a coordinate of each column beyond its own, so that misfits ``left`` have their deviation.

    ``share`` is the variance of the prediction in units of a neighbour's.
    """
    good: Bools = np.asarray(np.isfinite(left).all(axis=1) & np.isfinite(expected))
    if good.sum() < 5:
        return 0.0
    pull = (left[good] ** 2).sum(axis=1) / (2 * expected[good])
    ratio = float(np.median(pull)) / np.log(2)  # half of a chi-square with two degrees of freedom
    return max(0.0, (ratio - 1) * float(np.median(expected[good])) / (1 + float(np.median(share[good]))))


def _mean_places(fraction: Floats, cells: Indexing) -> Floats:
    """(k, 2) median fractional place of each site's columns in their local cells; the first is (0, 0)."""
    basis = cells.basis.copy()
    for s in range(1, len(basis)):
        mine = fraction[(cells.site == s) & np.isfinite(fraction).all(axis=1)]
        if len(mine):
            basis[s] = np.median(mine, axis=0)
    basis[0] = 0.0
    return basis


def _probabilities(off: Floats, bright: Floats, cells: Indexing) -> Floats:
    """(n, k) probability of each site by place and brightness: Student's t with four degrees of freedom (three
    dimensions) around each site's mean, as wide as its columns spread."""
    k, n = len(cells.basis), len(off)
    off = np.where(np.isfinite(off), off, 0.0)
    score = np.full((n, k), -np.inf)
    least = 1e-3 * float(np.hypot(*cells.vectors[0]))
    for s in range(k):
        mine = cells.site == s
        if not mine.any():
            continue
        middle, level = np.median(off[mine], axis=0), float(np.median(bright[mine]))
        spread = max(1.4826 * float(np.median(np.abs(off[mine] - middle))), least)
        wide = max(1.4826 * float(np.median(np.abs(bright[mine] - level))), 0.02)
        away = wrapped(cells.basis[cells.site] - cells.basis[s], cells.vectors) + off - middle
        square = (away**2).sum(axis=1) / spread**2 + (bright - level) ** 2 / wide**2
        score[:, s] = np.log(mine.mean()) - 2 * np.log(spread) - np.log(wide)
        score[:, s] -= 0.5 * (_FREEDOM + 3) * np.log1p(square / _FREEDOM)
    score = np.exp(score - score.max(axis=1, keepdims=True))
    return np.asarray(score / score.sum(axis=1, keepdims=True))


def _grain(position: Floats, amplitude: Floats, cells: Indexing) -> Grain:
    """One lattice through all columns, least squares with Tukey's biweight; vectors with their deviations."""
    place = cells.cell + cells.basis[cells.site]
    design = np.column_stack([place, np.ones(len(place))])
    weight = np.ones(len(place))
    for _ in range(12):
        normal = (design * weight[:, None]).T @ design
        solution = np.linalg.lstsq(normal, (design * weight[:, None]).T @ position, rcond=None)[0]
        left = np.hypot(*(position - design @ solution).T)
        scale = max(float(np.median(left)) / 1.1774, 1e-6)
        weight = np.clip(1 - (left / (4.685 * scale)) ** 2, 0, 1) ** 2
    spread = float((weight * left**2).sum() / max(2 * weight.sum() - 6, 1))
    covariance = np.linalg.pinv(normal) * spread
    k = len(cells.basis)
    groups = [amplitude[cells.site == s] for s in range(k)]
    mean = np.array([np.median(g) if len(g) else np.nan for g in groups])
    wide = np.array([1.4826 * np.median(np.abs(g - np.median(g))) if len(g) else np.nan for g in groups])
    sigma = np.sqrt(np.diag(covariance)[:2])[:, None] * np.ones(2)
    vectors: Floats = np.asarray(solution[:2], dtype=np.float64)
    return Grain(vectors, sigma, np.asarray(solution[2], dtype=np.float64), cells.basis, mean, wide)


def _gaps(
    field: _Field, index: Integers, cells: Indexing, nearest: float, known: Floats
) -> tuple[Bools, Floats, Integers]:
    """Which columns lie at the rim, and the vacant places (m, 2) inside the grain with the site of each.

    Every column expects its own kind at the shortest lattice vectors. Where none is and three expect it (two, where the
    finder of the columns asked the image there and found nothing), the place is vacant.
    """
    steps = _short_steps(cells.vectors)
    position = field.position[index]
    mine = np.full(len(field.position), -1, np.int64)
    mine[index] = cells.site
    goal = position[:, None] + np.einsum("ti,nij->ntj", steps, cells.frame)
    far, who = (np.asarray(v) for v in field.tree.query(goal))
    met = (far < 0.42 * nearest) & (mine[who] == cells.site[:, None])
    edge = np.array(field.shape) - 1 - field.margin
    inside = ((goal > field.margin) & (goal < edge)).all(axis=2)
    empty = inside & (far > 0.42 * nearest)
    kind = np.broadcast_to(cells.site[:, None], empty.shape)[empty]
    voter = np.broadcast_to(np.arange(len(index))[:, None], empty.shape)[empty]
    places, kinds, votes, voters = _elected(goal[empty], kind, voter, 0.42 * nearest)
    asked = np.zeros(len(places), bool)
    if len(known) and len(places):
        asked = np.asarray(cKDTree(known).query(places)[0]) < 0.42 * nearest
    count = np.bincount(cells.site, minlength=len(cells.basis))
    lost = np.bincount(kinds[votes >= 3], minlength=len(cells.basis))
    certain = _doubt(field, index, cells) < _CERTAIN
    usual = (count / np.maximum(count + lost, 1) >= _OCCUPIED) & certain
    rare = np.bincount(kinds[asked], minlength=len(cells.basis)) <= np.maximum(_RARE * count, 2)
    asked &= (certain | rare)[kinds]
    vacant = ((votes >= 3) & (usual[kinds] | asked)) | ((votes >= 2) & asked) if len(places) else asked
    vacant &= _enclosed(field, places, kinds, cells.frame[voters], mine, 0.42 * nearest)
    rim = ~met
    if vacant.any():
        rim &= np.asarray(cKDTree(places[vacant]).query(goal)[0]) > 0.42 * nearest
    return rim.any(axis=1), places[vacant], kinds[vacant]


def _doubt(field: _Field, index: Integers, cells: Indexing) -> Floats:
    """(k,) median deviation of each site's columns, in widths of a column (1 / sqrt(counts) where there are counts)."""
    sigma = np.sqrt(field.variance[index].mean(axis=1)) / max(field.margin, 1e-9)
    kinds = range(len(cells.basis))
    return np.array([np.median(sigma[cells.site == s]) if (cells.site == s).any() else np.inf for s in kinds])


def _enclosed(field: _Field, places: Floats, kinds: Integers, frame: Floats, mine: Integers, reach: float) -> Bools:
    """Whether the neighbours of a place, of its kind, stand on all sides: no gap between them of 140 degrees.

    Neighbours outside the image are taken as there.
    """
    if len(places) == 0:
        return np.zeros(0, bool)
    steps = np.array([[i, j] for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j], dtype=np.float64)
    step = np.einsum("ti,nij->ntj", steps, frame)
    goal = places[:, None] + step
    far, who = (np.asarray(v) for v in field.tree.query(goal))
    outside = ((goal < field.margin) | (goal > np.array(field.shape) - 1 - field.margin)).any(axis=2)
    there = outside | ((far < reach) & (mine[who] == kinds[:, None]))
    angle = np.where(there, np.arctan2(step[..., 0], step[..., 1]), np.nan)
    angle = np.sort(angle, axis=1)
    number = there.sum(axis=1)
    gap = np.diff(angle, axis=1)
    last = angle[np.arange(len(angle)), np.maximum(number - 1, 0)]
    round_ = angle[:, 0] + 2 * np.pi - last
    widest = np.fmax(np.nanmax(np.column_stack([gap, round_]), axis=1, initial=0.0), 0.0)
    return np.asarray((number >= 4) & (widest < np.radians(140)))


def _short_steps(vectors: Floats) -> Floats:
    """Whole steps (m, 2) to the nearest lattice points: four, or six if the lattice is close to hexagonal."""
    steps = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=np.float64)
    longest = 1.15 * max(np.hypot(*vectors[0]), np.hypot(*vectors[1]))
    more = [np.array(t) for t in ((1.0, -1.0), (1.0, 1.0)) if np.hypot(*(np.array(t) @ vectors)) < longest]
    return np.concatenate([steps, *([t, -t] for t in more)])


def _elected(
    places: Floats, kind: Integers, voter: Integers, reach: float
) -> tuple[Floats, Integers, Integers, Integers]:
    """Groups of ``places`` of one kind that lie together: means (m, 2), kinds, sizes and one voter of each."""
    if len(places) == 0:
        nothing = np.zeros(0, np.int64)
        return np.zeros((0, 2)), nothing, nothing, nothing
    tree = cKDTree(np.column_stack([places, kind * 10 * reach]))
    left = np.ones(len(places), bool)
    middles, kinds, votes, voters = [], [], [], []
    groups: Any = tree.query_ball_point(tree.data, reach)
    for i in np.argsort([-len(g) for g in groups], kind="stable"):
        if left[i]:
            members = [m for m in groups[i] if left[m]]
            left[members] = False
            middles.append(places[members].mean(axis=0))
            kinds.append(int(kind[i]))
            votes.append(len(members))
            voters.append(int(voter[i]))
    return np.array(middles), np.array(kinds, np.int64), np.array(votes, np.int64), np.array(voters, np.int64)


def _joined(n: int, members: list[_Member]) -> Assignment:
    """The grains' columns as one answer."""
    answer = _none(n)
    if not members:
        return answer
    p_site = np.zeros((n, max(m.p_site.shape[1] for m in members)))
    for number, m in enumerate(members):
        answer.grain[m.which], answer.cell[m.which], answer.site[m.which] = number, m.cells.cell, m.cells.site
        p_site[m.which, : m.p_site.shape[1]] = m.p_site
        answer.ideal[m.which], answer.displacement[m.which] = m.ideal, m.displacement
        answer.displacement_sigma[m.which] = m.sigma
        answer.boundary[m.which] = m.boundary
    numbers = [np.full(len(m.vacant), g, np.int64) for g, m in enumerate(members)]
    return replace(
        answer,
        p_site=p_site,
        vacant=np.concatenate([m.vacant for m in members]),
        vacant_site=np.concatenate([m.vacant_site for m in members]),
        vacant_grain=np.concatenate(numbers),
        grains=tuple(m.grain for m in members),
    )
