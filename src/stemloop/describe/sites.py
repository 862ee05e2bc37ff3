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
_NEIGHBOURS = 24


class Sites(NamedTuple):
    """``position`` (n, 2) [px] of sites and ``spread`` [px], the 1-sigma deviation of one coordinate of a column from
    where its neighbours expect it."""

    position: Floats
    spread: float


def expected(position: Floats, shape: tuple[int, ...], margin: float) -> Sites:
    """Sites that the columns at ``position`` (n, 2) [px] expect and where none of them is.

    Vectors to neighbours that most columns share are the lattice's; each column expects a neighbour at each of them,
    and what several expect at one place is a site. So the prediction is local: a slow strain moves all voters
    alike. Where there is no such lattice (few columns, no order, grains) nothing is expected.

    ``shape`` is the image's; sites nearer than ``margin`` [px] to its border are left out.
    """
    none = Sites(np.zeros((0, 2)), 0.0)
    if len(position) < 12:
        return none
    tree = cKDTree(position)
    near = np.asarray(tree.query(position, min(_NEIGHBOURS + 1, len(position)))[0])
    spacing = float(np.median(near[:, 1]))
    reach = _REACH * spacing
    vectors = _shared_vectors(position, tree, shape, 2.3 * spacing, reach)
    if len(vectors) < 4:
        return none
    votes = (position[:, None] + vectors).reshape(-1, 2)
    inside = ((votes > margin) & (votes < np.array(shape) - 1 - margin)).all(axis=1)
    votes = votes[inside]
    ballot = cKDTree(votes)
    spread = _spread(position, votes, ballot, reach)
    open_votes = votes[np.asarray(tree.query(votes)[0]) > 0.5 * spacing]
    return Sites(_elected(open_votes, reach, max(_FEWEST_VOTES, _VOTES * len(vectors))), spread)


def _shared_vectors(position: Floats, tree: cKDTree, shape: tuple[int, ...], longest: float, reach: float) -> Floats:
    """(k, 2) vectors at which at least a share of the columns, those far from the border, have a neighbour."""
    whole = ((position > longest) & (position < np.array(shape) - 1 - longest)).all(axis=1)
    if whole.sum() < 6:
        return np.zeros((0, 2))
    pairs = tree.query_ball_point(position[whole], longest)
    own = np.flatnonzero(whole)
    differences = np.concatenate([position[them] - position[i] for i, them in zip(own, pairs, strict=True)])
    differences = differences[np.hypot(*differences.T) > reach]
    return _elected(differences, reach, _SHARED * len(own))


def _elected(points: Floats, reach: float, least: float) -> Floats:
    """Means of the groups of at least ``least`` points that lie within ``reach`` of each other, largest first."""
    if len(points) == 0:
        return points
    sample = points if len(points) <= 20000 else points[:: -(-len(points) // 20000)]
    share = len(points) / len(sample)
    tree = cKDTree(sample)
    size = np.asarray(tree.query_ball_point(sample, reach, return_length=True)) * share
    free = size >= least
    chosen: list[Floats] = []
    for i in np.argsort(-size, kind="stable"):
        if size[i] < least:
            break
        if free[i]:
            group = np.asarray(tree.query_ball_point(sample[i], reach), int)
            middle = sample[group].mean(axis=0)
            free[np.asarray(tree.query_ball_point(middle, 2 * reach), int)] = False
            chosen.append(middle)
    return np.array(chosen).reshape(-1, 2)


def _spread(position: Floats, votes: Floats, ballot: cKDTree, reach: float) -> float:
    """Deviation of a coordinate of the columns from the mean of the votes for their place."""
    groups: Any = ballot.query_ball_point(position, 1.5 * reach)
    off = [votes[them].mean(axis=0) - p for them, p in zip(groups, position, strict=True) if len(them) >= _FEWEST_VOTES]
    return max(0.05 * reach, 1.4826 * float(np.median(np.abs(off)))) if off else reach


def presence(amplitude: Floats, sigma: Floats, known: Floats, share: float) -> Floats:
    """Probability that a column is at a site, by Bayes' rule from the amplitude that was measured there.

    A column has one of the amplitudes ``known`` (m,) of other columns, give or take a tenth; an empty site has none.

    Parameters
    ----------
    amplitude, sigma : (n,) what was measured at the sites, and its 1-sigma deviation.
    known : (m,) amplitudes of columns.
    share : prior probability of a column at a site, between 0 and 1.
    """
    levels = np.quantile(known, (np.arange(32) + 0.5) / 32)
    variance = sigma[:, None] ** 2 + (0.1 * levels) ** 2
    there = -0.5 * (amplitude[:, None] - levels) ** 2 / variance - 0.5 * np.log(variance)
    there = np.logaddexp.reduce(there, axis=1) - np.log(len(levels))
    empty = -0.5 * (np.minimum(amplitude, 1e6 * sigma) / sigma) ** 2 - np.log(sigma)
    odds = np.log(share / (1 - share)) + there - empty
    return np.asarray(1 / (1 + np.exp(-np.clip(odds, -500, 500))))
