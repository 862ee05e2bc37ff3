"""What departs from the perfect lattice: missing, foreign and extra columns, dislocations, faults, boundaries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial import cKDTree

from stemloop.core.errors import InputError
from stemloop.core.structure import Assignment, Columns, Defect, Grain
from stemloop.describe.faults.bonds import net, sparsest
from stemloop.describe.faults.boundaries import crystals, grain_boundaries, primitive, stacking_faults
from stemloop.describe.faults.dislocations import dislocations
from stemloop.describe.strain import local_lattice
from stemloop.describe.vectors import standard

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

#: False dopants, and false interstitials, that an image may be expected to show.
_FALSE_ALARMS = 0.05
#: Share of columns that are missing before anything is seen.
_VACANCIES = 0.01
#: Amplitude over its deviation from which a column is found by itself.
_FOUND = 4.0
#: A vacancy is listed from this probability.
_LIKELY = 0.75
#: Columns of the same site around a vacancy by which it is judged.
_AROUND = 16
#: Nearer to the border than this many widths of a column nothing is called missing or foreign.
_BORDER = 5.0
#: A column whose width is off by this part is not compared in brightness.
_ODD_WIDTH = 0.15
#: A crystal surrounds a place if no gap between its columns seen from there is wider [rad].
_WIDEST_GAP = np.deg2rad(150)
#: Point defects nearer than this many nearest-neighbour distances (or Burgers vectors) to a line or core are of it.
_NEAR = 1.5
#: Local vectors that differ by more than this part from their grain's are taken for its own.
_ODD = 0.3
#: Fewest columns of a site among which one is called odd.
_FEWEST = 24
#: Lines of neighbours, in lattice vectors, to which a column's brightness is compared.
_LINES = np.array([[1, 0], [0, 1], [1, 1], [1, -1]], dtype=np.float64)
#: Loose columns that share a place in the cell, within this part of the nearest neighbours' distance, are a site that
#: is seldom seen.
_SHARED, _SEVERAL = 0.25, 3


def find_defects(columns: Columns, assignment: Assignment, shape: tuple[int, int]) -> tuple[Defect, ...]:
    """Find the defects of an image's lattices.

    - ``vacancy``: a place inside a crystal where a column is expected and none is, if that is three times likelier than
      that a column of that site was overlooked (a hundredth of all places are taken to be vacant). Detail: ``site``,
      ``grain``.
    - ``dopant``: a column brighter or weaker than the columns of its site along every line through it (so neither a
      slope of thickness nor an interface or a layer is one). At most 0.05 are expected by chance in an image. Detail:
      ``site``, ``ratio`` to the neighbours and ``ratio_sigma``, ``z_score``, ``brightness`` (``brighter`` or
      ``weaker``), ``column``.
    - ``interstitial``: a column inside a crystal and on none of its sites. Several at one place of the cell are a site
      that is seldom seen, and a column beside its empty site is out of place: neither is listed. Detail: ``column``,
      ``offset_px`` to the nearest site.
    - ``dislocation``: see :func:`~stemloop.describe.faults.dislocations.dislocations`; ``burgers_cells`` is the
      Burgers vector in a1 and a2 of its grain.
    - ``stacking-fault``, ``grain-boundary``: see :mod:`~stemloop.describe.faults.boundaries`; ``displacement_cells``
      likewise.

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
    cells = [primitive(grain) for grain in assignment.grains]
    grains, kind = tuple(grain for grain, _ in cells), _kinds(assignment, [alike for _, alike in cells])
    first, change = crystals(grains)
    frames = _frames(columns, assignment, grains, change)
    crystal = np.where(kind >= 0, first[assignment.grain], -1)
    extended = _extended(columns, kind, crystal, frames, grains, assignment)
    spacing = _spacing(columns.position[assignment.site >= 0])
    empty = _vacancies(columns, assignment, spacing, shape)
    loose = _interstitials(columns, assignment, spacing)
    odd = _dopants(columns, assignment, np.where(_near_border(columns.position, columns, shape), -1, kind), frames)
    points = (
        *_lonely(empty, loose, spacing),
        *odd,
        *_lonely(loose, empty, spacing),
    )
    taken = _within(np.array([d.place[0] for d in points]).reshape(-1, 2), extended, spacing)
    return (*extended, *(d for d, part in zip(points, taken, strict=True) if not part))


def _near_border(place: Floats, columns: Columns, shape: tuple[int, int]) -> Mask:
    """(m,) places so near to the border that columns cut by it, which no fit can know, disturb the fits there."""
    margin = _BORDER * float(np.median(columns.width))
    return np.asarray(((place < margin) | (place > np.array(shape) - 1 - margin)).any(axis=1))


def _within(place: Floats, extended: tuple[Defect, ...], spacing: float) -> Mask:
    """(m,) whether a place lies in a boundary, or in a core (which is as large as its Burgers vector)."""
    out = np.zeros(len(place), dtype=bool)
    for defect in extended:
        size = max(spacing, float(np.hypot(*defect.detail.get("burgers", (0.0, 0.0)))))
        out |= (np.hypot(*(place[:, None] - defect.place).transpose(2, 0, 1)) < _NEAR * size).any(axis=1)
    return out


def _spacing(position: Floats) -> float:
    """Median distance of nearest neighbours [px]."""
    if len(position) < 2:
        return 1.0
    return float(np.median(np.asarray(cKDTree(position).query(position, 2)[0])[:, 1]))


# ------------------------------------------------------------------------------------------------ lines and cores


def _kinds(assignment: Assignment, alike: list[Integers]) -> Integers:
    """(n,) the site of each column, where sites that only a lattice vector tells apart are one; -1 if it has none."""
    kind = np.full(len(assignment), -1, dtype=np.int64)
    for number, first in enumerate(alike):
        own = (assignment.grain == number) & (assignment.site >= 0)
        kind[own] = first[assignment.site[own]]
    return kind


def _extended(
    columns: Columns,
    kind: Integers,
    crystal: Integers,
    frames: Floats,
    grains: tuple[Grain, ...],
    assignment: Assignment,
) -> tuple[Defect, ...]:
    """Grain boundaries, stacking faults and dislocations; ``crystal`` (n,) are the grains, like ones as one."""
    sited, position = np.flatnonzero(kind >= 0), columns.position
    numbers = sorted(set(crystal[sited].tolist()))
    found: list[Defect] = []
    if len(numbers) > 1:
        vectors = np.array([g.vectors for g in grains])[crystal[sited]]
        found += grain_boundaries(position[sited], crystal[sited], grains, net(position[sited], vectors))
    for number in numbers:
        members = np.flatnonzero((crystal == number) & (kind == 0))
        if len(members) < 6:
            continue
        lines = _lines(columns, members, frames, grains[number].vectors)
        found += _in_cells(lines, assignment.grains[number])
    return tuple(found)


def _lines(columns: Columns, members: Integers, frames: Floats, vectors: Floats) -> tuple[Defect, ...]:
    """Stacking faults and dislocations of the columns ``members`` of one crystal, all of one site.

    Where these are of two brightnesses that alternate but for a fault, the bright ones alone show it.
    """
    bright = members[columns.sublattice[members] == columns.sublattice[members].min()]
    for chosen in (bright, members):
        whole = net(columns.position[chosen], frames[chosen])
        change = sparsest(whole)
        ordered = abs(np.linalg.det(change)) > 1.5
        if ordered or len(chosen) == len(members):
            break
    if ordered:
        change = standard(change @ vectors) @ change
        whole, vectors = net(columns.position[chosen], change @ frames[chosen]), change @ vectors
    place = columns.position[chosen]
    return (*stacking_faults(place, vectors, whole), *dislocations(place, vectors, whole))


def _in_cells(found: tuple[Defect, ...], grain: Grain) -> tuple[Defect, ...]:
    """The defects with Burgers vectors and displacements in the cells of ``grain`` as well as in pixels."""
    inverse = np.linalg.inv(grain.vectors)
    for defect in found:
        for name in ("burgers", "displacement"):
            if name in defect.detail:
                cells = np.round(np.array(defect.detail[name]) @ inverse, 6) + 0.0
                defect.detail[f"{name}_cells"] = tuple(cells.tolist())
    return found


def _frames(columns: Columns, assignment: Assignment, grains: tuple[Grain, ...], change: Integers) -> Floats:
    """(n, 2, 2) vectors around each column, in the order of its crystal's first grain.

    They are the median of the nine nearest columns' in the grain, with the grain's own vectors in place of odd ones
    (which cores and faults make)."""
    number = assignment.grain.clip(0)
    own = np.array([g.vectors for g in assignment.grains])
    into = change @ np.array([g.vectors for g in grains]) @ np.linalg.inv(own)  # of the cell as it was assigned
    frames = local_lattice(columns, assignment).vectors
    with np.errstate(invalid="ignore"):
        odd = ~(np.abs((frames - own[number]) @ np.linalg.inv(own)[number]) < _ODD).all(axis=(1, 2))
    frames = into[number] @ np.where(odd[:, None, None], own[number], frames)
    sited = np.flatnonzero((assignment.grain >= 0) & (assignment.site >= 0))
    near = np.asarray(cKDTree(columns.position[sited]).query(columns.position[sited], min(9, len(sited)))[1])
    same = assignment.grain[sited][near] == assignment.grain[sited][:, None]
    near = np.where(same, near, np.arange(len(sited))[:, None])
    frames[sited] = np.median(frames[sited][near], axis=1)
    return np.asarray(frames)


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
    inside = ~_near_border(place, columns, shape)
    inside &= np.asarray(cKDTree(columns.position).query(place)[0]) > 0.5 * spacing
    chosen = np.flatnonzero(inside & _surrounded(place, grain, columns, assignment, 1.55))
    asked = np.zeros(len(place), dtype=bool)
    if len(columns.vacant):
        asked = np.asarray(cKDTree(columns.vacant).query(place)[0]) < 0.4 * spacing
    found = []
    for k in chosen:
        overlooked = _overlooked(columns, assignment, place, site, grain, int(k), bool(asked[k]))
        p = _VACANCIES / (_VACANCIES + (1 - _VACANCIES) * overlooked)
        if p > _LIKELY:
            found.append(Defect("vacancy", place[k][None, :], float(p), {"site": int(site[k]), "grain": int(grain[k])}))
    return tuple(found)


def _lonely(some: tuple[Defect, ...], others: tuple[Defect, ...], spacing: float) -> tuple[Defect, ...]:
    """``some`` without those beside one of ``others``."""
    if not some or not others:
        return some
    distance = np.asarray(cKDTree([d.place[0] for d in others]).query([d.place[0] for d in some])[0])
    return tuple(d for d, far in zip(some, distance > 0.7 * spacing, strict=True) if far)


def _overlooked(
    columns: Columns,
    assignment: Assignment,
    place: Floats,
    site: Integers,
    grain: Integers,
    number: int,
    asked: bool,
) -> float:
    """Chance that a column of this site is not found here.

    A Gaussian's centre is known to w times the relative deviation of its amplitude, so w / sigma is the amplitude in
    deviations. Noise must take half of it where the image was asked at this very place, else what is above the
    threshold of a column that stands alone. It is judged by the weaker of the columns around. Where several places of
    this site are empty together, the share of them is the chance if it is larger.
    """
    like = np.flatnonzero((assignment.site == site[number]) & (assignment.grain == grain[number]))
    near = like[np.argsort(((columns.position[like] - place[number]) ** 2).sum(axis=1))[:_AROUND]]
    sigma = np.sqrt((columns.sigma[near] ** 2).mean(axis=1))
    strength = columns.width[near] / np.where(sigma > 0, sigma, np.inf)
    strength = np.where(sigma > 0, strength, 1e3)
    weaker = float(np.quantile(strength, 0.25)) if len(near) else 0.0
    alone = float(stats.norm.sf(weaker / 2 if asked else weaker - _FOUND))
    radius = np.hypot(*(columns.position[near] - place[number]).T).max() if len(near) else 0.0
    also = (site == site[number]) & (grain == grain[number])
    empty = int((np.hypot(*(place[also] - place[number]).T) <= radius).sum()) - 1
    return max(alone, empty / (empty + len(near))) if empty > 1 else alone


def _dopants(columns: Columns, assignment: Assignment, kind: Integers, frames: Floats) -> tuple[Defect, ...]:
    """Columns that differ from their neighbours of the same site along every line.

    The brightness is compared with the median of two neighbours on either side, along four lines, and the smallest
    difference counts. Its deviation comes from the differences of nearest neighbours, so it holds the disorder of the
    specimen with the noise; a heavier tail than a Gaussian's widens it, and Student's distribution allows for the
    number of columns that it was judged by.
    """
    tested = []
    for number in range(len(assignment.grains)):
        own = (assignment.grain == number) & ~_doubtful(columns) & ~_misfitted(columns)
        for alike in sorted(set(kind[own].tolist()) - {-1}):
            members = np.flatnonzero(own & (kind == alike))
            if len(members) >= _FEWEST:
                tested.append((members, *_contrast(columns, members, frames[members])))
    total = sum(int(np.isfinite(z).sum()) for _, _, z, _, _ in tested)
    found = []
    for members, ratio, z, sigma, freedom in tested:
        chance = 2 * stats.t.sf(np.abs(z), freedom) * total
        for k in np.flatnonzero(chance < _FALSE_ALARMS):
            detail = {
                "site": int(assignment.site[members[k]]),
                "ratio": float(1 + ratio[k]),
                "ratio_sigma": float(sigma[k]),
                "z_score": float(z[k]),
                "brightness": "brighter" if ratio[k] > 0 else "weaker",
                "column": int(members[k]),
            }
            found.append(Defect("dopant", columns.position[members[k]][None, :], float(1 - chance[k]), detail))
    return tuple(found)


def _doubtful(columns: Columns) -> Mask:
    """(n,) columns that may not be there."""
    if len(columns.p_present) != len(columns):
        return np.zeros(len(columns), dtype=bool)
    return np.asarray(columns.p_present < 0.5)


def _misfitted(columns: Columns) -> Mask:
    """(n,) columns of an odd width: what was fitted there is more, or less, than one column."""
    width = columns.width.clip(1e-12)
    return np.asarray(np.abs(np.log(width / np.median(width))) > _ODD_WIDTH)


def _contrast(columns: Columns, members: Integers, frames: Floats) -> tuple[Floats, Floats, Floats, float]:
    """Relative difference to the neighbours (NaN at a rim), its z-score and deviation, and degrees of freedom."""
    position, bright = columns.position[members], columns.amplitude[members]
    tree = cKDTree(position)
    tolerance = 0.35 * float(np.hypot(*np.median(frames, axis=0).T).min())
    level = np.empty((len(_LINES), len(members)))
    padded, nearest = np.append(bright, np.inf), np.full(len(members), len(members))
    for k, line in enumerate(_LINES):
        along = line @ frames
        near = [
            np.asarray(tree.query(position + far * along, distance_upper_bound=tolerance)[1]) for far in (1, -1, 2, -2)
        ]
        around = padded[np.stack(near, axis=1)]
        level[k] = _median_of(around, np.isfinite(around).sum(axis=1))
        for other in near[:2]:
            nearest = np.where(nearest == len(members), other, nearest)
    known = np.isfinite(level)
    middle = float(np.median(bright))
    whole = np.where(known.any(axis=0), np.nanmean(np.where(known.any(axis=0), level, middle), axis=0), middle)
    difference = (bright - level) / whole
    least = np.where(known, np.abs(difference), np.inf).argmin(axis=0)
    smallest = difference[least, np.arange(len(members))]
    alike = (np.where(known, difference, 1) > 0).all(axis=0) | (np.where(known, difference, -1) < 0).all(axis=0)
    ratio = np.where(known.sum(axis=0) >= 3, np.where(alike, smallest, 0.0), np.nan)
    noise = np.sqrt((columns.sigma[members] ** 2).mean(axis=1)) / columns.width[members].clip(1e-12)
    noise = np.median(noise[np.asarray(tree.query(position, 9)[1])], axis=1)
    noise = noise if noise.min() > 0 and noise.max() < np.inf else np.ones(len(members))
    paired = np.flatnonzero(nearest < len(members))
    if len(paired) < _FEWEST:
        return np.full(len(members), np.nan), np.full(len(members), np.nan), noise, 1.0
    other = nearest[paired]
    pull = np.abs(bright[paired] - bright[other]) / whole[paired] / np.hypot(noise[paired], noise[other])
    scale = max(np.quantile(pull, q) / stats.norm.isf((1 - q) / 2) for q in (0.5, 0.8, 0.9))
    sigma = np.maximum(scale * noise, 1e-6)
    return ratio, ratio / sigma, sigma, 0.37 * len(members)


def _median_of(values: Floats, count: Integers) -> Floats:
    """Median of the ``count`` smallest of the last axis; NaN where they are fewer than two."""
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
    single = (grains == grains[:, :1]).all(axis=1) & (assignment.boundary[regular][near].mean(axis=1) < 0.5)
    loose, grain, near = loose[single], grains[single, 0], near[single]
    inside = _surrounded(columns.position[loose], grain, columns, assignment, 1.55)
    loose, grain, near = loose[inside], grain[inside], np.flatnonzero(regular)[near[inside]]
    rest = [_rest(columns, assignment, k, g, r) for k, g, r in zip(loose, grain, near, strict=True)]
    found = []
    for number in set(grain.tolist()):
        own = np.flatnonzero(grain == number)
        vectors, basis = assignment.grains[number].vectors, assignment.grains[number].basis
        cells = np.array([rest[k] for k in own])
        apart = cells[:, None, :] - cells[None, :, :]
        shared = (np.hypot(*np.moveaxis((apart - np.rint(apart)) @ vectors, -1, 0)) < _SHARED * spacing).sum(axis=1)
        off = cells[:, None, :] - basis[None, :, :]
        off_px = np.hypot(*np.moveaxis((off - np.rint(off)) @ vectors, -1, 0)).min(axis=1)
        for k, several, far in zip(loose[own], shared, off_px, strict=True):
            if several < _SEVERAL and far > 0.25 * spacing:
                p = float(columns.p_present[k]) if len(columns.p_present) == len(columns) else 1.0
                found.append(
                    Defect("interstitial", columns.position[k][None, :], p, {"column": int(k), "offset_px": float(far)})
                )
    return tuple(found)


def _rest(columns: Columns, assignment: Assignment, column: int, number: int, around: Integers) -> Floats:
    """(2,) place in the cell of a column, by the lattice of six columns around it."""
    grain = assignment.grains[number]
    cells = (columns.position[column] - columns.position[around]) @ np.linalg.inv(grain.vectors)
    phase = np.exp(2j * np.pi * (cells + grain.basis[assignment.site[around]]))
    return np.asarray(np.angle(phase.mean(axis=0)) / (2 * np.pi))
