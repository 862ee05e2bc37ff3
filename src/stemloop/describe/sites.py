"""Where a column should be, by the columns around it, and whether one is there."""

from __future__ import annotations

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
#: Longest vector, in distances of nearest neighbours.
_LONGEST = 2.3
#: Of the columns that could expect a site inside a crystal at least this share is there.
_SURROUNDED = 0.65
#: Most columns of a neighbourhood, how many may be too few to halve it if it has no lattice, and how many are asked.
_GROUP, _SMALLEST_GROUP, _ASKED = 400, 40, 100


class Sites(NamedTuple):
    """``position`` (n, 2) [px] of sites, ``within`` (n,) whether columns are all around each or it is at the crystal's
    rim, and ``spread`` [px], the 1-sigma deviation of one coordinate of a column from where its neighbours expect it
    (zero if they expect nothing)."""

    position: Floats
    within: NDArray[np.bool_]
    spread: float

    def take(self, kept: NDArray[np.bool_]) -> Sites:
        return Sites(self.position[kept], self.within[kept], self.spread)


def expected(position: Floats, shape: tuple[int, ...], margin: float) -> Sites:
    """Sites that the columns at ``position`` (n, 2) [px] expect and where none of them is.

    Vectors to neighbours that most columns of a neighbourhood share are its lattice's; each column expects a neighbour
    at each of them, and what several expect at one place is a site. So the prediction is local: a slow strain moves all
    voters alike, and each grain has its own. Where there is no such lattice (few columns, no order) nothing is
    expected.

    ``shape`` is the image's; sites nearer than ``margin`` [px] to its border are left out.
    """
    none = Sites(np.zeros((0, 2)), np.zeros(0, bool), 0.0)
    if len(position) < 12:
        return none
    tree = cKDTree(position)
    spacing = float(np.median(np.asarray(tree.query(position, 2)[0])[:, 1]))
    reach = _REACH * spacing
    room = _LONGEST * spacing
    whole = np.asarray(((position > room) & (position < np.array(shape) - 1 - room)).all(axis=1))
    ballots, weights = [np.zeros((0, 2))], [np.zeros(0)]
    left = [np.arange(len(position))]
    while left:
        members = left.pop()
        known = _shared_vectors(position, members[whole[members]], tree, room, reach) if len(members) <= _GROUP else ()
        if len(known) >= 4:
            ballots.append((position[members, None] + known).reshape(-1, 2))
            weights.append(np.full(len(ballots[-1]), 1 / max(_FEWEST_VOTES, _VOTES * len(known))))
        elif len(members) > _SMALLEST_GROUP:
            left += _halves(position, members)
    votes, weight = np.concatenate(ballots), np.concatenate(weights)
    inside = ((votes > margin) & (votes < np.array(shape) - 1 - margin)).all(axis=1)
    votes, weight = votes[inside], weight[inside]
    if len(votes) == 0:
        return none
    distance, nearest = (np.asarray(v) for v in tree.query(votes))
    open_ = distance > 0.5 * spacing
    sites = _elected(votes[open_], reach, weight[open_])
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
    position: Floats, members: NDArray[np.int64], tree: cKDTree, longest: float, reach: float
) -> Floats:
    """(k, 2) vectors at which at least a share of ``members`` (those far from the border) have a neighbour."""
    if len(members) < 6:
        return np.zeros((0, 2))
    asked = members[:: -(-len(members) // _ASKED)]
    pairs: Any = tree.query_ball_point(position[asked], longest)
    own = np.repeat(asked, [len(them) for them in pairs])
    differences = position[np.concatenate(pairs).astype(np.int64)] - position[own]
    differences = differences[np.hypot(*differences.T) > reach]
    return _elected(differences, reach, np.full(len(differences), 1 / (_SHARED * len(asked))))


def _elected(points: Floats, reach: float, weight: Floats) -> Floats:
    """Means of the groups of points that lie within ``reach`` of each other and whose ``weight`` is at least one in
    sum, the heaviest first."""
    if len(points) == 0:
        return points
    tree = cKDTree(points)
    pairs = tree.query_pairs(reach, output_type="ndarray")
    size = weight + np.bincount(pairs[:, 0], weight[pairs[:, 1]], len(points))
    size += np.bincount(pairs[:, 1], weight[pairs[:, 0]], len(points))
    free = size >= 1 - 1e-9
    chosen: list[Floats] = []
    for i in np.argsort(-size, kind="stable"):
        if not free[i]:
            if size[i] < 1 - 1e-9:
                break
            continue
        middle = points[np.asarray(tree.query_ball_point(points[i], reach), int)].mean(axis=0)
        free[np.asarray(tree.query_ball_point(middle, 2 * reach), int)] = False
        chosen.append(middle)
    return np.array(chosen).reshape(-1, 2)


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
