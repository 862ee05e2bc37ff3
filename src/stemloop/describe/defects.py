"""What departs from the perfect lattice: missing, foreign and extra columns, dislocations, faults, boundaries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial import cKDTree

from stemloop.core.errors import InputError
from stemloop.core.structure import Assignment, Columns, Defect
from stemloop.describe.bonds import net
from stemloop.describe.boundaries import crystals, grain_boundaries, stacking_faults
from stemloop.describe.dislocations import dislocations
from stemloop.describe.strain import local_lattice

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

#: False dopants, and false interstitials, that an image may be expected to show.
_FALSE_ALARMS = 0.05
#: Share of columns that are missing before anything is seen.
_VACANCIES = 0.01
#: Amplitude over its deviation from which a column is found by itself.
_FOUND = 4.0
#: Chance that the image, asked at a place, calls a column absent that is there.
_OVERLOOKED = 0.01
#: A crystal surrounds a place if no gap between its columns seen from there is wider [rad].
_WIDEST_GAP = np.deg2rad(150)
#: Point defects nearer than this many nearest-neighbour distances to a core or a line are parts of it.
_NEAR = 1.5
#: Neighbours of the same site to which a column's brightness is compared.
_COMPARED = 12


def find_defects(columns: Columns, assignment: Assignment, shape: tuple[int, int]) -> tuple[Defect, ...]:
    """Find the defects of an image's lattices.

    - ``vacancy``: a place inside a crystal where a column is expected and none is. p weighs the prior share of
      vacancies against the chance that a column of that site is overlooked. Detail: ``site``, ``grain``.
    - ``dopant``: a column brighter or weaker than the columns of its site on every side of it (so neither a slope of
      thickness nor an interface is one). At most 0.05 are expected by chance in an image. Detail: ``site``, ``ratio``
      to the neighbours and ``ratio_sigma``, ``z_score``, ``brightness`` (``brighter`` or ``weaker``), ``column``.
    - ``interstitial``: a column inside a crystal and on none of its sites. Detail: ``column``, ``offset_px`` to the
      nearest site.
    - ``dislocation``: see :func:`stemloop.describe.dislocations.dislocations`.
    - ``stacking-fault``, ``grain-boundary``: see :mod:`stemloop.describe.boundaries`.

    Point defects within a core or a boundary are counted as parts of it and not listed.

    Parameters
    ----------
    columns, assignment : what was found, and which lattice site each column is. shape : (rows, columns) of the image.

    Returns
    -------
    Defects, lines first; empty where the image shows no lattice.

    Raises
    ------
    InputError : columns and assignment are of different lengths.
    """
    if len(columns) != len(assignment):
        raise InputError(f"{len(columns)} columns have {len(assignment)} assignments: they are of different images.")
    if not assignment.grains or not (assignment.site >= 0).any():
        return ()
    extended = _extended(columns, assignment)
    occupied = [d.place for d in extended]
    spacing = _spacing(columns.position[assignment.site >= 0])
    core = cKDTree(np.concatenate(occupied)) if occupied else None

    def apart(place: Floats) -> Mask:
        if core is None or len(place) == 0:
            return np.ones(len(place), dtype=bool)
        return np.asarray(core.query(place)[0]) > _NEAR * spacing

    points = (
        *_vacancies(columns, assignment, spacing, shape),
        *_dopants(columns, assignment),
        *_interstitials(columns, assignment, spacing),
    )
    free = apart(np.array([d.place[0] for d in points]).reshape(-1, 2))
    return (*extended, *(d for d, alone in zip(points, free, strict=True) if alone))


def _spacing(position: Floats) -> float:
    """Median distance of nearest neighbours [px]."""
    if len(position) < 2:
        return 1.0
    return float(np.median(np.asarray(cKDTree(position).query(position, 2)[0])[:, 1]))


# ------------------------------------------------------------------------------------------------ lines and cores


def _extended(columns: Columns, assignment: Assignment) -> tuple[Defect, ...]:
    """Grain boundaries, stacking faults and dislocations."""
    first, change = crystals(assignment.grains)
    sited = np.flatnonzero((assignment.grain >= 0) & (assignment.site >= 0))
    crystal = np.full(len(columns), -1)
    crystal[sited] = first[assignment.grain[sited]]
    found: list[Defect] = []
    if len(set(crystal[sited].tolist())) > 1:
        vectors = np.array([g.vectors for g in assignment.grains])[crystal[sited]]
        position = columns.position[sited]
        found += grain_boundaries(position, crystal[sited], assignment.grains, net(position, vectors))
    frames = _frames(columns, assignment, change)
    for number in sorted(set(crystal[sited].tolist())):
        members = np.flatnonzero((crystal == number) & (assignment.site == 0))
        if len(members) < 6:
            continue
        vectors, position = assignment.grains[number].vectors, columns.position[members]
        whole = net(position, _settled(position, frames[members], vectors))
        found += stacking_faults(position, vectors, whole)
        found += dislocations(position, vectors, whole)
    return tuple(found)


def _frames(columns: Columns, assignment: Assignment, change: Integers) -> Floats:
    """(n, 2, 2) local vectors in the order of the crystal's first grain; NaN where unknown."""
    frames = local_lattice(columns, assignment).vectors
    return np.asarray(change[assignment.grain.clip(0)] @ frames)


def _settled(position: Floats, frames: Floats, vectors: Floats) -> Floats:
    """Local vectors without the odd ones: the median of nine neighbours', the crystal's own where there is none."""
    far = np.abs((frames - vectors) @ np.linalg.inv(vectors)).max(axis=(1, 2))
    frames = np.where((far < 0.3)[:, None, None], frames, vectors)
    near = np.asarray(cKDTree(position).query(position, min(9, len(position)))[1])
    return np.asarray(np.median(frames[near], axis=1))


# -------------------------------------------------------------------------------------------------- single columns


def _surrounded(place: Floats, grain: Integers, columns: Columns, assignment: Assignment, reach: float) -> Mask:
    """(m,) whether columns of the grain are on all sides of each place, within ``reach`` lattice vectors."""
    out = np.zeros(len(place), dtype=bool)
    for number in set(grain.tolist()) - {-1}:
        members = columns.position[(assignment.grain == number) & (assignment.site >= 0)]
        if len(members) < 3:
            continue
        tree = cKDTree(members)
        radius = reach * float(np.hypot(*assignment.grains[number].vectors.T).max())
        for k in np.flatnonzero(grain == number):
            away = members[tree.query_ball_point(place[k], radius)] - place[k]
            angle = np.sort(np.arctan2(*away[np.hypot(*away.T) > 0.1].T))
            if len(angle) >= 3:
                out[k] = np.diff(angle, append=angle[0] + 2 * np.pi).max() < _WIDEST_GAP
    return out


def _vacancies(columns: Columns, assignment: Assignment, spacing: float, shape: tuple[int, int]) -> tuple[Defect, ...]:
    place, site, grain = assignment.vacant, assignment.vacant_site, assignment.vacant_grain
    if len(place) == 0:
        return ()
    margin = float(np.median(columns.width)) * 2
    inside = ((place >= margin) & (place <= np.array(shape) - 1 - margin)).all(axis=1)
    inside &= np.asarray(cKDTree(columns.position).query(place)[0]) > 0.5 * spacing
    chosen = np.flatnonzero(inside & _surrounded(place, grain, columns, assignment, 1.55))
    asked = np.zeros(len(place), dtype=bool)
    if len(columns.vacant):
        asked = np.asarray(cKDTree(columns.vacant).query(place)[0]) < 0.4 * spacing
    found = []
    for k in chosen:
        like = (assignment.site == site[k]) & (assignment.grain == grain[k])
        overlooked = _overlooked(columns, like) * (_OVERLOOKED if asked[k] else 1.0)
        p = _VACANCIES / (_VACANCIES + (1 - _VACANCIES) * overlooked)
        found.append(Defect("vacancy", place[k][None, :], float(p), {"site": int(site[k]), "grain": int(grain[k])}))
    return tuple(found)


def _overlooked(columns: Columns, like: Mask) -> float:
    """Chance that a column like these is not found by itself.

    A Gaussian's centre is known to w times the relative deviation of its amplitude, so w / sigma is the amplitude in
    deviations; what noise may take from it is the rest above the threshold.
    """
    sigma = np.sqrt((columns.sigma[like] ** 2).mean(axis=1))
    sigma = sigma[sigma > 0]
    if len(sigma) == 0:
        return float(stats.norm.sf(8))
    strength = float(np.median(columns.width[like])) / float(np.median(sigma))
    return float(stats.norm.sf(strength - _FOUND))


def _dopants(columns: Columns, assignment: Assignment) -> tuple[Defect, ...]:
    """Columns that differ from their neighbours of the same site on every side.

    The brightness is compared with the median of the neighbours in each of four half-planes, and the smallest
    difference counts. Its deviation comes from the differences of nearest neighbours, so it holds the disorder of the
    specimen with the noise; a heavier tail than a Gaussian's widens it, and Student's distribution allows for the
    number of columns that it was judged by.
    """
    tested = []
    for number in range(len(assignment.grains)):
        own = (assignment.grain == number) & ~_doubtful(columns)
        for site in sorted(set(assignment.site[own].tolist()) - {-1}):
            members = np.flatnonzero(own & (assignment.site == site))
            if len(members) > 2 * _COMPARED:
                tested.append((site, members, *_contrast(columns, members)))
    total = sum(int(np.isfinite(z).sum()) for _, _, _, z, _, _ in tested)
    found = []
    for site, members, ratio, z, sigma, freedom in tested:
        chance = 2 * stats.t.sf(np.abs(z), freedom) * total
        for k in np.flatnonzero(chance < _FALSE_ALARMS):
            found.append(
                Defect(
                    "dopant",
                    columns.position[members[k]][None, :],
                    float(1 - chance[k]),
                    {
                        "site": site,
                        "ratio": float(1 + ratio[k]),
                        "ratio_sigma": float(sigma[k]),
                        "z_score": float(z[k]),
                        "brightness": "brighter" if ratio[k] > 0 else "weaker",
                        "column": int(members[k]),
                    },
                )
            )
    return tuple(found)


def _doubtful(columns: Columns) -> Mask:
    if len(columns.p_present) != len(columns):
        return np.zeros(len(columns), dtype=bool)
    return np.asarray(columns.p_present < 0.5)


def _contrast(columns: Columns, members: Integers) -> tuple[Floats, Floats, Floats, float]:
    """Relative difference to the neighbours (NaN at a rim), its z-score and deviation, and degrees of freedom."""
    position, bright = columns.position[members], columns.amplitude[members]
    noise = np.sqrt((columns.sigma[members] ** 2).mean(axis=1)) / columns.width[members]
    near = np.asarray(cKDTree(position).query(position, _COMPARED + 1)[1])
    away, around = position[near[:, 1:]] - position[:, None, :], bright[near[:, 1:]]
    middle = np.median(around, axis=1)
    nearest = np.median(np.hypot(away[:, 0, 0], away[:, 0, 1]))
    sides = np.stack([sign * away[..., axis] > 0.3 * nearest for axis in (0, 1) for sign in (-1, 1)], axis=1)
    level = _median_of(np.where(sides, around[:, None, :], np.inf), sides.sum(axis=2))
    difference = (bright[:, None] - level) / middle[:, None]
    least = np.where(np.isfinite(difference), np.abs(difference), np.inf).argmin(axis=1)
    smallest = difference[np.arange(len(members)), least]
    known = np.isfinite(difference)
    agree = (np.where(known, difference, 1) > 0).all(axis=1) | (np.where(known, difference, -1) < 0).all(axis=1)
    ratio = np.where(known.sum(axis=1) >= 3, np.where(agree, smallest, 0.0), np.nan)
    expected = np.median(noise[near[:, 1:]], axis=1)
    expected = expected if expected.min() > 0 else np.ones(len(members))
    partner = near[:, 1]
    pull = (bright - bright[partner]) / middle / np.hypot(expected, expected[partner])
    scale = max(np.quantile(np.abs(pull), q) / stats.norm.isf((1 - q) / 2) for q in (0.5, 0.8, 0.9))
    sigma = np.maximum(scale * expected, 1e-6)
    return ratio, ratio / sigma, sigma, 0.37 * len(members)


def _median_of(values: Floats, count: Integers) -> Floats:
    """Median of the first ``count`` of the sorted last axis; NaN under two."""
    ordered = np.sort(values, axis=-1)
    low = np.take_along_axis(ordered, ((count - 1) // 2).clip(0)[..., None], -1)[..., 0]
    high = np.take_along_axis(ordered, (count // 2).clip(0, values.shape[-1] - 1)[..., None], -1)[..., 0]
    return np.where(count >= 2, (low + high) / 2, np.nan)


def _interstitials(columns: Columns, assignment: Assignment, spacing: float) -> tuple[Defect, ...]:
    """Columns without a site that a single crystal surrounds and that no site can hold."""
    loose = np.flatnonzero((assignment.site < 0) | (assignment.grain < 0))
    regular = (assignment.site >= 0) & (assignment.grain >= 0)
    loose = loose[~_doubtful(columns)[loose]]
    if len(loose) == 0 or regular.sum() < 6:
        return ()
    strength = columns.width[loose] / np.sqrt((columns.sigma[loose] ** 2).mean(axis=1)).clip(1e-9)
    sure = stats.norm.sf(strength - _FOUND) * len(loose) < _FALSE_ALARMS
    loose = loose[sure]
    tree = cKDTree(columns.position[regular])
    near = np.asarray(tree.query(columns.position[loose], 6)[1]).reshape(-1, 6)
    grains = assignment.grain[regular][near]
    single = (grains == grains[:, :1]).all(axis=1)
    loose, grain, near = loose[single], grains[single, 0], near[single]
    inside = _surrounded(columns.position[loose], grain, columns, assignment, 1.55)
    found = []
    for k, number, around in zip(loose[inside], grain[inside], near[inside], strict=True):
        off = _off_site(columns, assignment, int(k), int(number), np.flatnonzero(regular)[around])
        if off > 0.25 * spacing:
            p = float(columns.p_present[k]) if len(columns.p_present) == len(columns) else 1.0
            found.append(
                Defect("interstitial", columns.position[k][None, :], p, {"column": int(k), "offset_px": float(off)})
            )
    return tuple(found)


def _off_site(columns: Columns, assignment: Assignment, column: int, number: int, around: Integers) -> float:
    """Distance [px] of a column from the nearest site of the lattice around it, the median by six neighbours."""
    grain = assignment.grains[number]
    away = columns.position[column] - columns.position[around]
    cells = away @ np.linalg.inv(grain.vectors) + grain.basis[assignment.site[around]]
    rest = cells[:, None, :] - grain.basis[None, :, :]
    rest -= np.rint(rest)
    return float(np.median(np.hypot(*np.moveaxis(rest @ grain.vectors, -1, 0)).min(axis=1)))
