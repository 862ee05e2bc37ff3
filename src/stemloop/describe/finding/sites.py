"""Where a column should be, by the columns around it, and whether one is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Floats = NDArray[np.float64]

#: A vector belongs to the lattice if this share of the columns have a neighbour there.
_SHARED = 0.6
#: Half-width of a site, as a part of the distance of nearest neighbours.
_REACH = 0.2
#: How many columns must expect a site, and which share of those that could.
_FEWEST_VOTES, _VOTES = 3, 0.4
#: A smaller share shows a lattice some of whose columns were not seen; many more than the chance of a few in a hundred.
_SEEN = 0.25
#: Longest vector, in typical distances of columns.
_LONGEST = 2.3
#: Of so many neighbours the farthest tells how densely columns lie, whether they come in pairs or not: on a square or
#: hexagonal lattice it is this many typical distances away.
_NEIGHBOURS, _FARTHEST = 6, 1.44
#: Of the columns that could expect a site inside a crystal at least this share is there.
_SURROUNDED = 0.65
#: Most columns of a neighbourhood, how many may be too few to halve it if it has no lattice, and how many are asked.
_GROUP, _SMALLEST_GROUP, _ASKED = 400, 40, 100
#: A vector is judged by so many columns that have room for it, at least.
_FEWEST_ASKED = 6
#: Columns of a class differ in amplitude by these parts at least and at most; so many of its places are believed to
#: hold one before any is looked at.
_LEAST_SPREAD, _MOST_SPREAD, _BELIEVED = 0.05, 0.3, 4.0
#: Columns and empty places cannot be told by their amplitudes where these are so many deviations apart, and surely can
#: where they are so many.
_ALIKE, _TOLD = 1.0, 3.0
#: Their means and shares are known when a step moves them by less than this part.
_SETTLED = 1e-3
#: What neighbours leave at an empty place, in amplitudes of its class.
_LEFT = 0.1


class Sites(NamedTuple):
    """``position`` (n, 2) [px] of sites, ``within`` (n,) whether columns are all around each or it is at the crystal's
    rim, and ``spread`` [px], the 1-sigma deviation of one coordinate of a column from where its neighbours expect it
    (zero if they expect nothing)."""

    position: Floats
    within: NDArray[np.bool_]
    spread: float

    def take(self, kept: NDArray[np.bool_]) -> Sites:
        return Sites(self.position[kept], self.within[kept], self.spread)


#: Columns of a class move if their scatter is above the noise's by so many deviations.
_MOVES = 3.0


class Neighbourhood(NamedTuple):
    """Columns ``members`` (n,) near each other, with the ``vectors`` (k, 2) [px] at which many of them have a neighbour
    and the ``share`` (k,) that has; ``spacing`` [px] is the distance of nearest neighbours."""

    members: NDArray[np.int64]
    vectors: Floats
    share: Floats
    spacing: float

    @property
    def common(self) -> Floats:
        """The vectors that most columns share."""
        return self.vectors[self.share >= _SHARED]


def shares_vectors(group: Neighbourhood) -> bool:
    """Whether most columns of a neighbourhood share as many vectors as a lattice has shortest ones."""
    return len(group.common) >= 4


def neighbourhoods(
    position: Floats, shape: tuple[int, ...], sound: Callable[[Neighbourhood], bool] = shares_vectors
) -> list[Neighbourhood]:
    """The columns at ``position`` (n, 2) [px] in groups near each other, each with a lattice of its own: groups are
    halved until they are ``sound`` or small. Small ones that share no vectors are left out."""
    if len(position) < 12:
        return []
    tree = cKDTree(position)
    away = np.asarray(tree.query(position, _NEIGHBOURS + 1)[0])
    spacing = float(np.median(away[:, 1]))
    room = _LONGEST * max(spacing, float(np.median(away[:, _NEIGHBOURS])) / _FARTHEST)
    groups, left = [], [np.arange(len(position))]
    while left:
        members = left.pop()
        if len(members) <= _GROUP:
            vectors, share = _shared_vectors(position, members, tree, room, _REACH * spacing, shape)
            group = Neighbourhood(members, vectors, share, spacing)
            if sound(group) or (shares_vectors(group) and len(members) <= _SMALLEST_GROUP):
                groups.append(group)
                continue
        if len(members) > _SMALLEST_GROUP:
            left += _halves(position, members)
    return groups


def expected(position: Floats, groups: list[Neighbourhood], shape: tuple[int, ...], margin: float) -> Sites:
    """Sites that the columns at ``position`` (n, 2) [px] expect and where none of them is.

    Vectors to neighbours that most columns of a neighbourhood share are its lattice's; each column expects a neighbour
    at each of them, and what several expect at one place is a site. So the prediction is local: a slow strain moves all
    voters alike, and each grain has its own. Where there is no such lattice (few columns, no order) nothing is
    expected.

    ``shape`` is the image's; sites nearer than ``margin`` [px] to its border are left out.
    """
    none = Sites(np.zeros((0, 2)), np.zeros(0, bool), 0.0)
    groups = [group for group in groups if shares_vectors(group)]
    if not groups:
        return none
    tree, spacing = cKDTree(position), groups[0].spacing
    reach = _REACH * spacing
    room = max(float(np.hypot(*group.common.T).max()) for group in groups)
    ballots = [(position[group.members, None] + group.common).reshape(-1, 2) for group in groups]
    weights = [
        np.full(len(ballot), 1 / max(_FEWEST_VOTES, _VOTES * len(group.common)))
        for ballot, group in zip(ballots, groups, strict=True)
    ]
    votes, weight = np.concatenate(ballots), np.concatenate(weights)
    inside = ((votes > margin) & (votes < np.array(shape) - 1 - margin)).all(axis=1)
    votes, weight = votes[inside], weight[inside]
    if len(votes) == 0:
        return none
    distance, nearest = (np.asarray(v) for v in tree.query(votes))
    open_ = distance > 0.5 * spacing
    sites, _ = _elected(votes[open_], reach, weight[open_])
    share = _seen(sites, shape, room)
    full = np.asarray(cKDTree(votes).query_ball_point(sites, reach, return_length=True)) if len(sites) else np.zeros(0)
    most = float(np.median(1 / weight)) / _VOTES
    return Sites(sites, full > _SURROUNDED * share * most, _spread(position, votes, distance, nearest, reach))


def _seen(sites: Floats, shape: tuple[int, ...], radius: float) -> Floats:
    """(n,) share of the ring of ``radius`` / 2 around each of ``sites`` that is on the image, and so could vote."""
    turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    ring = sites[:, None] + 0.5 * radius * np.stack([np.sin(turn), np.cos(turn)], -1)
    return np.asarray(((ring >= 0) & (ring <= np.array(shape) - 1)).all(axis=2).mean(axis=1))


def _halves(position: Floats, members: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The columns ``members`` in two groups, cut across their longer side."""
    side = int(np.ptp(position[members], axis=0).argmax())
    order = members[np.argsort(position[members, side], kind="stable")]
    return [order[: len(order) // 2], order[len(order) // 2 :]]


def _shared_vectors(
    position: Floats, members: NDArray[np.int64], tree: cKDTree, longest: float, reach: float, shape: tuple[int, ...]
) -> tuple[Floats, Floats]:
    """(k, 2) vectors at which many of ``members`` have a neighbour, and their share of those that could on an image of
    ``shape``."""
    asked = np.random.default_rng(0).permutation(members)[:_ASKED]  # a stride would prefer a sublattice
    pairs: Any = tree.query_ball_point(position[asked], longest)
    own = np.repeat(asked, [len(them) for them in pairs])
    differences = position[np.concatenate(pairs).astype(np.int64)] - position[own]
    differences = differences[np.hypot(*differences.T) > reach]
    last = np.array(shape) - 1
    along = [np.sort(position[asked, i]) for i in (0, 1)]  # how many have room: along either side alone, multiplied
    room = np.ones(len(differences))
    for i in (0, 1):
        first, final = (
            np.searchsorted(along[i], -differences[:, i]),
            np.searchsorted(along[i], last[i] - differences[:, i]),
        )
        room *= (final - first) / len(asked)
    usable = room * len(asked) >= _FEWEST_ASKED
    differences, room = differences[usable], room[usable]
    vectors, size = _elected(differences, reach, 1 / (_SEEN * len(asked) * room))
    return vectors, size * _SEEN


def _elected(points: Floats, reach: float, weight: Floats) -> tuple[Floats, Floats]:
    """Means of the groups of points that lie within ``reach`` of each other and whose ``weight`` is at least one in
    sum, the heaviest first, and that sum."""
    if len(points) == 0:
        return points, np.zeros(0)
    tree = cKDTree(points)
    pairs = tree.query_pairs(reach, output_type="ndarray")
    size = weight + np.bincount(pairs[:, 0], weight[pairs[:, 1]], len(points))
    size += np.bincount(pairs[:, 1], weight[pairs[:, 0]], len(points))
    free = size >= 1 - 1e-9
    chosen: list[Floats] = []
    sums: list[float] = []
    for i in np.argsort(-size, kind="stable"):
        if not free[i]:
            if size[i] < 1 - 1e-9:
                break
            continue
        middle = points[np.asarray(tree.query_ball_point(points[i], reach), int)].mean(axis=0)
        free[np.asarray(tree.query_ball_point(middle, 2 * reach), int)] = False
        chosen.append(middle)
        sums.append(float(size[i]))
    return np.array(chosen).reshape(-1, 2), np.array(sums)


def _spread(position: Floats, votes: Floats, distance: Floats, nearest: NDArray[np.int64], reach: float) -> float:
    """Deviation of a coordinate of the columns from the mean of the votes for their place."""
    meant = distance < 1.5 * reach
    whom, off = nearest[meant], (votes - position[nearest])[meant]
    count = np.bincount(whom, minlength=len(position))
    mean = np.stack([np.bincount(whom, off[:, i], len(position)) for i in (0, 1)], -1) / np.maximum(count, 1)[:, None]
    mean = mean[count >= _FEWEST_VOTES]
    return max(0.05 * reach, 1.4826 * float(np.median(np.abs(mean)))) if len(mean) else reach


def occupancy(amplitude: Floats, sigma: Floats, known: Floats) -> float:
    """Share of a lattice's places that hold a column: of the columns ``known`` (m,) by amplitude, which stood out, and
    of the sites (n,) between them with the ``amplitude`` and deviation ``sigma`` measured there, by expectation
    maximisation; at most 0.99."""
    share = 0.95
    for _ in range(10):
        there = float(presence(amplitude, sigma, known, np.full(len(amplitude), share)).sum())
        share = min(0.99, max(0.5, (len(known) + there) / (len(known) + len(amplitude))))
    return share


class Classes(NamedTuple):
    """Of each class the ``mean`` amplitude of its columns, their ``spread``, the ``share`` of places that hold one."""

    mean: Floats
    spread: Floats
    share: Floats

    def presence(self, amplitude: Floats, sigma: Floats, kind: NDArray[np.int64]) -> Floats:
        """Probability that a column of the class ``kind`` (n,) is where the ``amplitude`` (n,) with the deviation
        ``sigma`` was measured."""
        mean, variance = self.mean[kind], self.spread[kind] ** 2 + sigma**2
        there = -0.5 * (amplitude - mean) ** 2 / variance - 0.5 * np.log(variance)
        there = np.where(amplitude > mean, np.maximum(there, -0.5 * np.log(variance) - 0.5), there)  # brighter is there
        noise = np.hypot(sigma, _LEFT * mean)
        empty = -0.5 * (amplitude / noise) ** 2 - np.log(noise)
        odds = np.log(self.share[kind] / (1 - self.share[kind])) + there - empty
        return np.asarray(1 / (1 + np.exp(-np.clip(odds, -500, 500))))

    def bounds(self, sigma: Floats) -> tuple[Floats, Floats]:
        """The least and the largest share that the places allow: where columns and empty places look alike, being
        apart by few of their deviations ``sigma`` (classes,), dim columns on all are as likely as bright ones on some.
        """
        told = ((self.mean / np.maximum(sigma, 1e-300) - _ALIKE) / (_TOLD - _ALIKE)).clip(0, 1)
        return np.minimum(self.share, 0.5 + 0.495 * told), np.maximum(self.share, 0.995 - 0.495 * told)


def classes(amplitude: Floats, sigma: Floats, kind: NDArray[np.int64], number: int) -> Classes:
    """What columns of each class are like, from all its places, empty or not, by expectation maximisation.

    An empty place has the amplitude zero give or take ``sigma`` (n,), a column that of its class give or take the
    class's spread and ``sigma`` together (A. P. Dempster et al., J. R. Stat. Soc. B 39 (1977) 1,
    doi:10.1111/j.2517-6161.1977.tb01600.x).
    """

    def total(of: Floats) -> Floats:
        return np.asarray(np.bincount(kind, of, number), np.float64)

    weight = 1 / (sigma**2 + (0.1 * np.abs(amplitude).mean()) ** 2)
    mean = np.maximum(total(weight * amplitude) / np.maximum(total(weight), 1e-300), 1e-9)
    known = Classes(mean, 0.2 * mean, np.full(number, 0.95))
    count = total(np.ones_like(amplitude))
    for _ in range(40):
        there = known.presence(amplitude, sigma, kind)
        weight = there / (sigma**2 + known.spread[kind] ** 2)
        mean = np.maximum(total(weight * amplitude) / np.maximum(total(weight), 1e-300), 1e-9)
        excess = total(there * ((amplitude - mean[kind]) ** 2 - sigma**2)) / np.maximum(total(there), 1e-9)
        spread = np.sqrt(np.maximum(excess, 0)).clip(_LEAST_SPREAD * mean, _MOST_SPREAD * mean)
        share = ((total(there) + _BELIEVED) / (count + _BELIEVED)).clip(0.02, 0.995)
        moved = float(np.abs(mean / known.mean - 1).max() + np.abs(share - known.share).max())
        known = Classes(mean, spread, share)
        if moved < _SETTLED:
            break
    return known


def presence(amplitude: Floats, sigma: Floats, known: Floats, share: Floats) -> Floats:
    """Probability that a column is at a site, by Bayes' rule from the amplitude that was measured there.

    A column has one of the amplitudes ``known`` (m,) of other columns, give or take a tenth; an empty site has none.

    Parameters
    ----------
    amplitude, sigma : (n,) what was measured at the sites, and its 1-sigma deviation.
    known : (m,) amplitudes of columns.
    share : (n,) prior probability of a column at each site, between 0 and 1.
    """
    sigma = np.maximum(sigma, 1e-9 * float(known.max(initial=1e-300)))
    levels = np.quantile(known, (np.arange(32) + 0.5) / 32)
    variance = sigma[:, None] ** 2 + (0.1 * levels) ** 2
    there = -0.5 * (amplitude[:, None] - levels) ** 2 / variance - 0.5 * np.log(variance)
    there = np.logaddexp.reduce(there, axis=1) - np.log(len(levels))
    empty = -0.5 * (np.minimum(amplitude, 1e6 * sigma) / sigma) ** 2 - np.log(sigma)
    odds = np.log(share / (1 - share)) + there - empty
    return np.asarray(1 / (1 + np.exp(-np.clip(odds, -500, 500))))


def settled(off: Floats, error: Floats, beyond: float, least: float) -> tuple[Floats, Floats]:
    """Where the columns of one class are, and how well that is known, from what noise lets be seen of each.

    If they are farther off their places than noise moves them, each stays where it was seen. If not, they keep their
    places as well as anybody can tell, and are there, but for what each shows beyond its noise (empirical Bayes:
    B. Efron and C. Morris, J. Am. Stat. Assoc. 68 (1973) 117, doi:10.1080/01621459.1973.10481350).

    Parameters
    ----------
    off, error : (n, 2) [px] from the places that were expected, and the 1-sigma deviation.
    beyond : what else there is in the image makes the scatter so many times as large.
    least : the scatter [px] that columns have at least.

    Returns
    -------
    off, error : the same, (n, 2) [px] each.
    """
    middle = np.average(off, axis=0, weights=1 / error**2)
    scatter = (1.4826 * float(np.median(np.abs(off - middle)))) ** 2
    noise = beyond**2 * float((error**2).mean())
    if scatter / noise - 1 > _MOVES * 2.3 / np.sqrt(2 * len(off)):  # 2.3: of the squared median deviation
        return off, error
    kept = max(scatter - noise, least**2)
    part = kept / (kept + error**2)
    of_middle = 1 / (1 / (kept + error**2)).sum(axis=0)  # few columns do not tell where the middle is
    return middle + part * (off - middle), np.sqrt(part * error**2 + (1 - part) ** 2 * of_middle)
