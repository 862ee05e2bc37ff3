"""Which places of a lattice are alike and which are not: the cell that brightness and position ask for.

A lattice of places comes from :mod:`~stemloop.describe.assigning.walking`. Here it becomes first as fine as positions
allow (all alike), then as coarse as the statistics demand: each sublattice of index 2 or 3 (then again of those) is a
model in which its cosets may differ in brightness and in displacement, and the Bayesian information criterion chooses
(G. Schwarz, Ann. Statist. 6 (1978) 461, doi:10.1214/aos/1176344136).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from stemloop.describe.vectors import standard, wrapped

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: A model must be this much better by the criterion, and its cosets must differ by at least this in the logarithm of
#: the brightness or, in distances of nearest neighbours, in position: less is no other site.
_BETTER, _BRIGHTER, _APART = 20.0, 0.04, 0.04
#: Places must become sharper by this much (twice the logarithm of the ratio of the spreads): errors of scan lines that
#: happen to repeat make 0.1 of it, sites of their own more than 0.7.
_SHARPER = 0.3
#: In one of nine neighbourhoods alone it must be this much better: errors of the scan and of the specimen's brightness
#: are not independent from column to column, and made up to 60 there.
_BETTER_THERE = 100.0
#: ... and by this many deviations of single columns: a faint ripple over a few rows is no lattice.
_CLEAR = 0.7
_MOST_SITES = 16
#: Repeats of the larger cell across the grain, in every direction, that are needed for a first step and for the others:
#: two kinds of columns are common, and a few layers of a film that differ are not yet another lattice.
_REPEATS, _MORE_REPEATS = 2.5, 6.0
#: Columns of a neighbourhood that is tested by itself, of one that votes for the domain of its middle, by how much it
#: must be sure (natural logarithm of the odds), and the smallest domain.
_PATCH, _JURY, _SURE, _SMALLEST_DOMAIN = 120, 16, 8.0, 16


class Indexing(NamedTuple):
    """Lattice of the columns of one grain: ``vectors`` (2, 2) [px], ``basis`` (k, 2), and of each column its ``cell``
    (n, 2), ``site`` (n,) and local vectors ``frame`` (n, 2, 2) [px]."""

    vectors: Floats
    basis: Floats
    cell: Integers
    site: Integers
    frame: Floats

    def take(self, part: Integers) -> Indexing:
        """Of the columns ``part`` only."""
        return self._replace(cell=self.cell[part], site=self.site[part], frame=self.frame[part])


def sublattices() -> list[Integers]:
    """Hermite normal forms (2, 2) of all sublattices of index 2 and 3: their rows are the new vectors in the old."""
    return [
        np.array([[a, b], [0, m // a]]) for m in (2, 3) for a in range(1, m + 1) if m % a == 0 for b in range(m // a)
    ]


def coset(cell: Integers, form: Integers) -> Integers:
    """(n,) which of the sublattice's cosets a cell belongs to."""
    across = cell[:, 0] % form[0, 0]
    down = (cell[:, 1] - cell[:, 0] // form[0, 0] * form[0, 1]) % form[1, 1]
    return np.asarray(across * form[1, 1] + down)


def brightness(amplitude: Floats, near: Integers, most: int = 24) -> Floats:
    """(n,) logarithm of each amplitude over the mean of its neighbours': blind to slow changes of thickness."""
    size = np.log(np.maximum(amplitude, 1e-3 * max(float(np.median(amplitude)), 1e-300)))
    there = near[:, :most] >= 0
    around = (size[near[:, :most]] * there).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    return np.asarray(size - around)


def finest(cells: Indexing, nearest: float) -> Indexing:
    """The lattice with more vectors, if shifts between places of the cell take all places to places."""
    k = len(cells.basis)
    for m in (4, 3, 2):
        if k % m:
            continue
        for shift in cells.basis[1:]:
            exact = np.rint(m * shift) / m
            order = next(o for o in (1, 2, 3, 4) if o == 4 or np.allclose(o * exact, np.rint(o * exact)))
            if order != m or np.hypot(*((shift - exact) @ cells.vectors)) > 0.2 * nearest:
                continue
            moved = (cells.basis[:, None] + exact - cells.basis[None]) @ np.eye(2)
            apart = np.hypot(*np.moveaxis(wrapped(moved, cells.vectors), -1, 0))
            if (apart.min(axis=1) < 0.25 * nearest).all():
                return _refined(cells, exact, m)
    return cells


def _refined(cells: Indexing, shift: Floats, m: int) -> Indexing:
    """With ``shift``, a fraction of order ``m``, as one more lattice vector."""
    multiples = np.array([n * shift - np.rint(n * shift) for n in range(m)])
    extended = np.concatenate([multiples[1:], np.eye(2)])
    best, pair = np.inf, np.eye(2)
    for one in extended:
        for other in extended:
            area = abs(one[0] * other[1] - one[1] * other[0])
            if 1e-6 < area < best - 1e-6:
                best, pair = area, np.array([one, other])
    pair = standard(pair @ cells.vectors, 1.12) @ pair
    inverse = np.linalg.inv(pair)
    # one place of each set of places that the shift joins
    left, kept = set(range(len(cells.basis))), list[int]()
    twin = np.zeros(len(cells.basis), np.int64)
    while left:
        first = min(left)
        off = wrapped((cells.basis - cells.basis[first])[:, None] - multiples[None], cells.vectors)
        same = {int(s) for s in np.argsort(np.hypot(off[..., 0], off[..., 1]).min(axis=1))[:m]} & left | {first}
        for s in same:
            twin[s] = len(kept)
        left -= same
        kept.append(first)
    basis = (cells.basis[kept] @ inverse) % 1.0
    site = twin[cells.site]
    cell = np.rint((cells.cell + cells.basis[cells.site]) @ inverse - basis[site]).astype(np.int64)
    return Indexing(pair @ cells.vectors, basis, cell, site, np.einsum("ij,njk->nik", pair, cells.frame))


def decorated(
    cells: Indexing, position: Floats, bright: Floats, off: Floats, nearest: float, repeats: float = _REPEATS
) -> tuple[Indexing, Integers]:
    """The coarser lattice, if its cosets differ in brightness ``bright`` (n,) or displacement ``off`` (n, 2) [px].

    One step after the other, each of index 2 or 3, and each must be needed, in the whole grain or a part of it. Parts
    that are shifted against each other by a vector of the finer lattice are antiphase domains: their cells are numbered
    from their own origin, and the second answer (n,) tells them apart (0 is the largest).
    """
    values = np.column_stack([bright, off / nearest])
    parts = [np.arange(len(position)), *_patches(position)]
    forms = [form for form in sublattices() if _extent(cells, form) >= repeats]
    for some, least in ((parts[:1], _BETTER), (parts[1:], _BETTER_THERE)):
        gains = [max((_useful(cells, values, form, part)[0] for part in some), default=0.0) for form in forms]
        if gains and max(gains) > least:
            form = forms[int(np.argmax(gains))]
            break
    else:
        return cells, np.zeros(len(position), np.int64)
    if len(cells.basis) * int(form[0, 0] * form[1, 1]) > _MOST_SITES:
        return cells, np.zeros(len(position), np.int64)
    shift, domain = _domains(cells, position, values, form, parts)
    finer = cells._replace(cell=cells.cell + shift)
    coarser, more = decorated(_coarser(finer, form), position, bright, off, nearest, _MORE_REPEATS)
    return coarser, domain * (int(more.max()) + 1) + more


def _patches(position: Floats) -> list[Integers]:
    """Numbers of the columns of nine neighbourhoods, where there are enough for more than two."""
    if len(position) < 2 * _PATCH:
        return []
    places = np.quantile(position, (0.15, 0.5, 0.85), axis=0)
    middles = np.array([[places[i, 0], places[j, 1]] for i in range(3) for j in range(3)])
    return list(np.asarray(cKDTree(position).query(middles, _PATCH)[1], dtype=np.int64))


def _useful(cells: Indexing, values: Floats, form: Integers, part: Integers) -> tuple[float, NDArray[np.bool_]]:
    """Gain of the criterion by ``form`` among the columns ``part``, and which of the values have a share in it."""
    m = int(form[0, 0] * form[1, 1])
    group = cells.site[part] * m + coset(cells.cell[part], form)
    gain, apart = _gain(values[part], cells.site[part], group, len(cells.basis), m)
    useful = (gain > len(part) * np.array([0.0, _SHARPER, _SHARPER])) & (apart > np.array([_BRIGHTER, _APART, _APART]))
    return float(gain[useful].sum()), useful


def _domains(
    cells: Indexing, position: Floats, values: Floats, form: Integers, parts: list[Integers]
) -> tuple[Integers, Integers]:
    """Shift (n, 2) of each column's cell that makes its neighbourhood look like the clearest part, and its domain."""
    n, m = len(position), int(form[0, 0] * form[1, 1])
    nowhere = np.zeros((n, 2), np.int64), np.zeros(n, np.int64)
    told = [_useful(cells, values, form, part) for part in parts]
    clear = int(np.argmax([gain / len(part) for (gain, _), part in zip(told, parts, strict=True)]))
    part, useful = parts[clear], told[clear][1]
    k = len(cells.basis)
    group = cells.site * m + coset(cells.cell, form)
    left, mean, _ = _centred(values[part][:, useful], group[part], k * m)
    wide = 1.4826 * np.median(np.abs(left), axis=0) + 1e-6
    shifts = np.array([[i, j] for i in range(form[0, 0]) for j in range(form[1, 1])])
    moved = [cells.site * m + coset(cells.cell + shift, form) for shift in shifts]
    fit = np.stack([np.minimum((((values[:, useful] - mean[g]) / wide) ** 2).sum(axis=1), 9.0) for g in moved], axis=1)
    tree = cKDTree(position)
    near = np.asarray(tree.query(position, min(_JURY, n))[1])
    misfit = 0.5 * fit[near].sum(axis=1)
    ordered = np.sort(misfit, axis=1)
    sure = ordered[:, 1] - ordered[:, 0] > _SURE
    if sure.sum() < _SMALLEST_DOMAIN:
        return nowhere
    phase = misfit.argmin(axis=1)
    decided = np.flatnonzero(sure)
    phase = phase[decided[np.asarray(cKDTree(position[decided]).query(position)[1])]]
    size = np.bincount(phase, minlength=m)
    phase = np.where(size[phase] < _SMALLEST_DOMAIN, size.argmax(), phase)
    order = np.argsort(np.argsort(-np.bincount(phase, minlength=m), kind="stable"))
    return shifts[phase], np.asarray(order[phase])


def _extent(cells: Indexing, form: Integers) -> float:
    """How often the cell of a sublattice fits into the grain, in the direction in which it fits least often."""
    cell = cells.cell @ np.linalg.inv(standard(form @ cells.vectors, 1.12) @ form)
    width = np.percentile(cell, 97, axis=0) - np.percentile(cell, 3, axis=0)
    return float(width.min()) / 0.94


def _gain(values: Floats, site: Integers, group: Integers, k: int, m: int) -> tuple[Floats, Floats]:
    """By each of ``values`` (n, d): gain of the criterion when each group has its own mean, and the largest distance of
    the means of two cosets of a site."""
    before = _centred(values, site, k)[0]
    after, mean, count = _centred(values, group, k * m)
    n = len(values)
    scale = 4 * 1.4826 * np.median(np.abs(before), axis=0) + 1e-12
    one = np.mean(np.clip(before, -scale, scale) ** 2, axis=0) + 1e-12
    other = np.mean(np.clip(after, -scale, scale) ** 2, axis=0) + 1e-12
    gain = n * np.log(one / other) - k * (m - 1) * np.log(n)
    if (count < 3).any():
        return np.full(values.shape[1], -np.inf), np.zeros(values.shape[1])
    apart = np.ptp(mean.reshape(k, m, -1), axis=1).max(axis=0)
    return np.where(apart > _CLEAR * 1.4826 * np.median(np.abs(after), axis=0), gain, -np.inf), apart


def _centred(values: Floats, group: Integers, groups: int) -> tuple[Floats, Floats, Integers]:
    """Values less their group's mean, the means and the counts."""
    count = np.bincount(group, minlength=groups)
    total = np.stack([np.bincount(group, weights=v, minlength=groups) for v in values.T], axis=1)
    mean = total / np.maximum(count, 1)[:, None]
    return values - mean[group], mean, count


def _coarser(cells: Indexing, form: Integers) -> Indexing:
    """On the sublattice: each coset of each place becomes a place of its own."""
    m = int(form[0, 0] * form[1, 1])
    change = standard(form @ cells.vectors, 1.12) @ form
    inverse = np.linalg.inv(change)
    representative = np.array([[i, j] for i in range(form[0, 0]) for j in range(form[1, 1])])
    basis = ((representative[None] + cells.basis[:, None]) @ inverse).reshape(-1, 2)
    basis = basis - np.floor(basis + 1e-9)
    site = cells.site * m + coset(cells.cell, form)
    cell = np.rint((cells.cell + cells.basis[cells.site]) @ inverse - basis[site]).astype(np.int64)
    frame = np.einsum("ij,njk->nik", change.astype(np.float64), cells.frame)
    return Indexing(change @ cells.vectors, basis, cell, site, frame)
