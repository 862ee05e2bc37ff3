"""Phases: the structural states into which the surroundings of an image's columns fall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from stemloop.core.structure import Assignment, Columns
from stemloop.describe.ferroic.mixture import Mixture, Points, fitted, log_densities, smooth_functions
from stemloop.describe.ferroic.surroundings import (
    LocalDescriptors,
    Surroundings,
    local_descriptors,
    log_brightness,
    shape_of,
    surroundings,
)  # fmt: skip
from stemloop.describe.ferroic.variants import smoothed

__all__ = ["LocalDescriptors", "Phases", "local_descriptors", "phases"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_MOST = 6
_SAMPLE = 2000
#: A phase has at least this many columns.
_FEWEST = 12
#: Neighbours share columns, so what they say is not independent: a new phase must pay this times the usual price.
_DEAR = 3.0
#: Means of two phases are this many spreads apart in some coordinate that counts.
_APART = 2.5
#: Between two phases there are fewer columns than this share of those at either.
_GAP = 0.3
#: Two phases with the same cell must differ in ln of the brightness ratio of their sites by this.
_RATIO = 0.1
#: Share of the difference of two phases that must be seen as a step within so many cells from where they meet.
_STEP, _NEAR = 0.6, 1.5
#: How much more often than by chance the neighbours of a phase's columns are of it too (0: chance, 1: always).
_CLUSTERED = 0.3
_COUPLING = 0.5
#: Grains whose cells differ by no more than this (ln of size, ln of aspect, angle) are compared with each other.
_ALIKE = np.array([0.1, 0.15, 0.1])


@dataclass(frozen=True)
class Phases:
    """Phases of ``n`` columns.

    label : (n,) int, the most likely phase, the largest 0; -1 for columns of no lattice. p : (n, k) probabilities.
    names : (k,) short names. description : (k,) a sentence each. count : (k,) columns.
    cell : (k, 3) mean a1 and a2 [px] and the angle between them [deg]. ratio : (k,) amplitude of the secondary over
    that of the primary columns (NaN with one kind of column). family : (k,) phases with the same number are one
    structure, seen in two orientations (their cells are each other's with a1 and a2 exchanged or mirrored).
    """

    label: Integers
    p: Floats
    names: tuple[str, ...]
    description: tuple[str, ...]
    count: Integers
    cell: Floats
    ratio: Floats
    family: Integers

    @property
    def n(self) -> int:
        """How many phases there are."""
        return len(self.names)


def phases(columns: Columns, assignment: Assignment) -> Phases:
    """Sort the columns into phases by their brightness and their local cell.

    Coordinates are the ln of each column's amplitude (one coordinate a site, so that the ratio counts too) and size,
    aspect and angle of the local cell (:func:`local_descriptors`), each with its own deviation. A mixture of Gaussians
    on a smooth trend (:mod:`stemloop.describe.ferroic.mixture`) says how likely each phase is; neighbours say it with
    (a Potts prior in mean field). A phase more must lower the Bayesian information criterion, be apart from the
    others, lie together, and have a gap between it and them or meet them in a step. So slopes of thickness or strain,
    and scattered columns, are none; nor is a factor common to the columns of all sites.

    Grains whose cells are alike are sorted together, wherever they are turned; the others for themselves.

    Returns
    -------
    Phases : one phase is a common answer; none where there is no lattice.

    Raises
    ------
    InputError : lengths that do not match.
    """
    seen = surroundings(columns, assignment)
    n = len(columns)
    groups = _groups(assignment)
    parts = [_sorted(columns, assignment, seen, grains) for grains in groups]
    k = sum(part.p.shape[1] for part in parts)
    p, first = np.zeros((n, k)), 0
    family = np.zeros(k, np.int64)
    for part in parts:
        many = part.p.shape[1]
        p[part.own, first : first + many] = part.p
        family[first : first + many] = first + part.family
        first += many
    taken = p.sum(axis=1) > 0
    label = np.where(taken, p.argmax(axis=1) if k else 0, -1)
    count = np.bincount(label[taken], minlength=k)
    order = np.argsort(-count, kind="stable")
    order = order[count[order] > 0]
    rank = np.full(k, -1, dtype=np.int64)
    rank[order] = np.arange(len(order))
    label = np.where(label >= 0, rank[label] if k else -1, -1).astype(np.int64)
    _, family = np.unique(family[order], return_inverse=True)
    return _described(label, p[:, order], count[order], family.astype(np.int64), columns, assignment, seen)


class _Part(NamedTuple):
    """``own`` (m,) columns, ``p`` (m, k) and ``family`` (k,) of one group of grains."""

    own: Integers
    p: Floats
    family: Integers


def _groups(assignment: Assignment) -> list[list[int]]:
    """Grains with as many sites and with cells that are alike up to a rotation and the order of a1 and a2."""
    groups: list[list[int]] = []
    for g, grain in enumerate(assignment.grains):
        own = np.array(shape_of(grain.vectors))
        for group in groups:
            head = assignment.grains[group[0]]
            first = np.array(shape_of(head.vectors))
            swapped = first * [1, -1, 1]
            alike = (np.abs(own - first) < _ALIKE).all() or (np.abs(own - swapped) < _ALIKE).all()
            if alike and len(head.basis) == len(grain.basis):
                group.append(g)
                break
        else:
            groups.append([g])
    return groups


def _sorted(columns: Columns, assignment: Assignment, seen: Surroundings, grains: list[int]) -> _Part:
    own = np.flatnonzero(np.isin(assignment.grain, grains) & (assignment.site >= 0))
    if len(own) == 0:
        return _Part(own, np.zeros((0, 0)), np.zeros(0, np.int64))
    points = _points(columns, assignment, seen, grains, own)
    length = float(np.hypot(*assignment.grains[grains[0]].vectors.T[::-1]).max())
    distance, beside = cKDTree(columns.position[own]).query(columns.position[own], min(9, len(own)))
    distance, beside = np.reshape(distance, (len(own), -1))[:, 1:], np.reshape(beside, (len(own), -1))[:, 1:]
    beside = np.where(distance < 1.25 * length, beside, -1)
    # each column alone cannot say whether both sites agree; for the fit its neighbours lend it their brightness
    mixture = _chosen(_lent(points, beside), points, columns.position[own], beside, length)
    member = smoothed(log_densities(points, mixture)[:, :-1], beside, _COUPLING)
    return _Part(own, member, _families(mixture))


def _points(columns: Columns, assignment: Assignment, seen: Surroundings, grains: list[int], own: Integers) -> Points:
    """Amplitudes by site, then size, aspect and angle against the first grain's cell."""
    bright, bright_sigma = log_brightness(columns)
    sites = max(len(assignment.grains[g].basis) for g in grains)
    value, sigma = np.full((len(own), sites + 3), np.nan), np.full((len(own), sites + 3), np.nan)
    site = assignment.site[own]
    value[np.arange(len(own)), site], sigma[np.arange(len(own)), site] = bright[own], bright_sigma[own]
    reference = np.array(shape_of(assignment.grains[grains[0]].vectors))
    mean = {g: np.array(shape_of(assignment.grains[g].vectors)) for g in grains}
    # a grain that is turned by a right angle has a1 and a2 exchanged
    turned = {g: np.abs(m[1] + reference[1]) < np.abs(m[1] - reference[1]) - 0.02 for g, m in mean.items()}
    sign = np.array([-1.0 if turned[g] else 1.0 for g in assignment.grain[own].tolist()])
    base = np.array([mean[g] for g in assignment.grain[own].tolist()])
    value[:, -3] = seen.size[own] + base[:, 0] - reference[0]
    value[:, -2] = sign * (seen.aspect[own] + base[:, 1]) - reference[1]
    value[:, -1] = seen.angle[own] + base[:, 2] - reference[2]
    sigma[:, -3:] = np.column_stack([seen.sigma[name][own] for name in ("size", "aspect", "angle")])
    return Points(value, sigma, smooth_functions(columns.position[own]), sites)


def _lent(points: Points, beside: Integers) -> Points:
    """``points`` with what is not known of each taken from the mean of its neighbours (n, m; -1 where none)."""
    there = (beside >= 0)[:, :, None] & np.isfinite(points.value)[beside]
    many = there.sum(axis=1)
    safe = np.maximum(many, 1)
    mean = np.where(there, points.value[beside], 0.0).sum(axis=1) / safe
    left = np.sqrt(np.where(there, points.sigma[beside] ** 2, 0.0).sum(axis=1)) / safe
    wanted = ~np.isfinite(points.value) & (many > 0)
    return points._replace(value=np.where(wanted, mean, points.value), sigma=np.where(wanted, left, points.sigma))


def _chosen(lent: Points, points: Points, position: Floats, beside: Integers, length: float) -> Mixture:
    """The mixture with the best number of phases: each is tried by splitting one phase of the best mixture so far."""
    every = max(1, -(-len(position) // _SAMPLE))
    sample = lent.take(slice(None, None, every))
    dimensions = int(np.isfinite(points.value).any(axis=0).sum())
    best = fitted(sample, np.ones((len(sample.value), 1)))
    while len(best.share) < _MOST and len(position) >= 2 * _FEWEST:
        tries = [fitted(sample, start, 3) for start in _splits(sample, best)]
        if not tries:
            break
        tries = sorted(tries, key=lambda m: m.price)[:3]
        trial = min((fitted(sample, _members(sample, m)) for m in tries), key=lambda m: m.price)
        dear = _DEAR * (dimensions + 1) * np.log(len(sample.value))
        if trial.price > best.price - dear or not _sound(lent, points, trial, position, beside, length):
            break
        best = trial
    return best


def _members(points: Points, mixture: Mixture) -> Floats:
    logs = log_densities(points, mixture)
    part = np.exp(logs - logs.max(axis=1, keepdims=True))
    return np.asarray((part / part.sum(axis=1, keepdims=True))[:, :-1])


def _splits(points: Points, mixture: Mixture) -> list[Floats]:
    """Starts with one phase more: each phase cut in two along each coordinate, with and without its trend."""
    member = _members(points, mixture)
    known = np.isfinite(points.value)
    starts: list[Floats] = []
    for slope in (mixture.slope, np.zeros_like(mixture.slope)):
        flat = points.value - points.trend @ slope
        for k in range(member.shape[1]):
            for c in range(flat.shape[1]):
                here = known[:, c] & (member[:, k] > 0.5)
                if here.sum() < 2 * _FEWEST:
                    continue
                cut = _cut(flat[here, c])
                above = np.where(known[:, c], flat[:, c] > cut, 0.5)
                halves = np.stack([member[:, k] * above, member[:, k] * (1 - above)], axis=1)
                starts.append(np.concatenate([np.delete(member, k, axis=1), halves], axis=1))
    return starts


def _cut(x: Floats) -> float:
    """The threshold with the greatest variance between the two sides (N. Otsu, IEEE Trans. SMC 9 (1979) 62,
    doi:10.1109/TSMC.1979.4310076)."""
    x = np.sort(x)
    left = np.arange(1, len(x))
    total = np.cumsum(x)
    low, high = total[:-1] / left, (total[-1] - total[:-1]) / (len(x) - left)
    best = int((left * (len(x) - left) * (high - low) ** 2).argmax())
    return float((x[best] + x[best + 1]) / 2)


def _sound(lent: Points, points: Points, mixture: Mixture, position: Floats, beside: Integers, length: float) -> bool:
    """Whether all phases are large enough, apart, together in space, and with a gap between them or in steps."""
    k = len(mixture.share)
    member = smoothed(log_densities(points, mixture)[:, :-1], beside, _COUPLING)
    label = member.argmax(axis=1)
    count = np.bincount(label, minlength=k)
    if count.min() < _FEWEST:
        return False
    raw = _members(points, mixture)
    there = beside >= 0
    for a in range(k):
        near = np.where(there, raw[:, a][beside], 0.0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
        share = float(raw[:, a].mean())
        agreed = float((raw[:, a] * near).sum() / max(raw[:, a].sum(), 1e-9))
        if (agreed - share) / max(1 - share, 1e-9) < _CLUSTERED:
            return False
    typical = np.hypot(mixture.spread, np.nanmedian(points.sigma, axis=0))
    flat = points.value - points.trend @ mixture.slope
    return all(
        _distinct(mixture.mean[a] - mixture.mean[b], typical, min(count[a], count[b]))
        and (
            _gapped(lent.value - lent.trend @ mixture.slope, mixture.mean[a], mixture.mean[b], typical)
            or _stepped(flat, position, label, mixture.mean, typical, a, b, length)
        )
        for a in range(k)
        for b in range(a)
    )


def _distinct(difference: Floats, typical: Floats, count: int) -> bool:
    """Whether two means are apart, and by more than a factor common to all columns, which is a thickness."""
    bright, cell = difference[:-3], np.abs(difference / typical)[-3:]
    ratio = float(np.ptp(bright)) if len(bright) > 1 else np.inf
    doubt = 4 * float(np.hypot(*np.sort(typical[:-3])[-2:])) / np.sqrt(count) if len(bright) > 1 else 0.0
    thickness = ratio < max(_RATIO, doubt) and cell.max() < 1
    return bool((np.abs(difference / typical) > _APART).any()) and not thickness


def _gapped(flat: Floats, one: Floats, other: Floats, typical: Floats) -> bool:
    """Whether few columns are midway between two phases: what changes steadily has no such gap."""
    weight = (one - other) / typical**2
    along = np.where(np.isfinite(flat), flat - other, np.nan) * weight
    part = np.nansum(along, axis=1) / np.where(np.isfinite(flat), weight * (one - other), 0.0).sum(axis=1).clip(1e-12)
    at = [int((np.abs(part - middle) < 0.15).sum()) for middle in (0.0, 0.5, 1.0)]
    return at[1] < _GAP * min(at[0], at[2])


def _stepped(
    flat: Floats, position: Floats, label: Integers, mean: Floats, typical: Floats, a: int, b: int, length: float
) -> bool:
    """Whether columns near the other phase are as different as the phases are on the whole
    (true as well where the two do not meet)."""
    one, other = np.flatnonzero(label == a), np.flatnonzero(label == b)
    to_other = np.asarray(cKDTree(position[other]).query(position[one])[0])
    to_one = np.asarray(cKDTree(position[one]).query(position[other])[0])
    one, other = one[to_other < _NEAR * length], other[to_one < _NEAR * length]
    if len(one) < _FEWEST // 2 or len(other) < _FEWEST // 2:
        return True
    difference = mean[a] - mean[b]
    weight = difference / typical**2
    step = _means(flat[one]) - _means(flat[other])
    known = np.isfinite(step)
    return float((weight * step)[known].sum()) > _STEP * float((weight * difference)[known].sum())


def _means(x: Floats) -> Floats:
    known = np.isfinite(x)
    many = known.sum(axis=0)
    return np.where(many > 0, np.where(known, x, 0.0).sum(axis=0) / np.maximum(many, 1), np.nan)


def _families(mixture: Mixture) -> Integers:
    """Phases that are each other's when a1 and a2 are exchanged, or the image is mirrored, share a number."""
    k = len(mixture.share)
    family = np.arange(k)
    for a in range(k):
        for b in range(a):
            same = [mixture.mean[a] * sign - mixture.mean[b] for sign in _orientations(mixture.mean.shape[1])]
            if min(float(np.abs(d / (3 * mixture.spread + 1e-3)).max()) for d in same) < 1:
                family[a] = family[b]
                break
    return family.astype(np.int64)


def _orientations(dimensions: int) -> list[Floats]:
    signs = []
    for aspect, angle in ((-1, 1), (1, -1), (-1, -1)):
        sign = np.ones(dimensions)
        sign[-2:] = aspect, angle
        signs.append(sign)
    return signs


def _described(
    label: Integers,
    p: Floats,
    count: Integers,
    family: Integers,
    columns: Columns,
    assignment: Assignment,
    seen: Surroundings,
) -> Phases:
    k = len(count)
    cell, ratio, sentences = np.full((k, 3), np.nan), np.full(k, np.nan), []
    for a in range(k):
        own = label == a
        # a1 and a2 of one phase in turned grains: lengths are averaged, not vectors
        vectors = seen.vectors[own]
        vectors = vectors[np.isfinite(vectors).all(axis=(1, 2))]
        if len(vectors):
            lengths = np.median(np.hypot(vectors[..., 0], vectors[..., 1]), axis=0)
            cell[a] = *lengths, np.rad2deg(np.median(shape_of(vectors)[2]))
        amplitude = [columns.amplitude[own & (assignment.site == s)] for s in (0, 1)]
        if all(len(x) for x in amplitude):
            ratio[a] = float(np.median(amplitude[1]) / np.median(amplitude[0]))
        off = seen.off_centre[own]
        sentences.append(_sentence(a, int(count[a]), len(label), cell[a], float(ratio[a]), off[np.isfinite(off)]))
    names = tuple(f"phase {a + 1}" for a in range(k))
    return Phases(label, p, names, tuple(sentences), count, cell, ratio, family)


def _sentence(number: int, count: int, total: int, cell: Floats, ratio: float, off_centre: Floats) -> str:
    words = [f"Phase {number + 1}: {count} columns ({100 * count / total:.0f} %)"]
    if np.isfinite(cell).all():
        words.append(f"a cell of {cell[0]:.2f} x {cell[1]:.2f} px at {cell[2]:.1f} degrees")
    if np.isfinite(ratio):
        words.append(f"the secondary columns {ratio:.2f} times as bright as the primary ones")
    if len(off_centre) and float(np.median(off_centre)) > 0.01:
        words.append(f"which are {100 * float(np.median(off_centre)):.1f} % of a cell off its middle")
    return ", ".join(words) + "."
