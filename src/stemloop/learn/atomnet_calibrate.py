"""What the members of an ensemble say of an image, joined to one answer, and how far that answer can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse
from scipy.sparse import csgraph
from scipy.spatial import cKDTree

from stemloop.learn.atomnet_image import WIDTH, peaks, probability

Floats = NDArray[np.float64]

#: The lowest chance at which a member's maximum is looked at, and the lowest of the mean of all members.
LEAST, LEAST_MEAN = 0.05, 0.1
#: Farther than this [px at the network's scale] two members do not mean the same column.
REACH = 1.6 * WIDTH
#: Directions of the features whose distance from the training set is the novelty.
NOVELTY_DIMENSIONS = 16


class Joined(NamedTuple):
    """What an ensemble of k members found: ``position`` (n, 2) [px at the network's scale], mean over the members;
    ``chance`` (n, k) of each member (0 where it does not see the column); ``log_width`` (n,)."""

    position: Floats
    chance: Floats
    log_width: Floats


def join(maps: NDArray[np.float32]) -> Joined:
    """Join the maps (k, MAPS, rows, columns) of k members.

    Candidates are the maxima of the members' mean; each member's own maxima are assigned to them one to one, at the
    least sum of squared distances (an unassigned candidate costs :data:`REACH` squared).
    """
    mean = maps.mean(axis=0)
    mean[0] = _logit(probability(maps[:, 0].astype(np.float64)).mean(axis=0))
    found = peaks(mean, LEAST_MEAN)
    place = np.repeat(found[:, None, :2], len(maps), axis=1)
    chance, log_width = np.zeros((len(found), len(maps))), np.repeat(found[:, 3:4], len(maps), axis=1)
    for k, own in enumerate(maps):
        theirs = peaks(own, LEAST)
        mine, other = assigned(found[:, :2], theirs[:, :2], REACH)
        place[mine, k], chance[mine, k], log_width[mine, k] = theirs[other, :2], theirs[other, 2], theirs[other, 3]
    weight = chance + 1e-9
    weight /= weight.sum(axis=1, keepdims=True)
    return Joined((place * weight[:, :, None]).sum(axis=1), chance, (log_width * weight).sum(axis=1))


def assigned(one: Floats, other: Floats, reach: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the points (n, 2) and (m, 2) that belong together: one to one, nearer than ``reach``, the squared
    distances the least in sum where each point that is left alone costs ``reach`` squared."""
    if len(one) == 0 or len(other) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    near = cKDTree(one).sparse_distance_matrix(cKDTree(other), reach, output_type="ndarray")
    n = len(one)
    row = np.concatenate([near["i"], np.arange(n)])
    col = np.concatenate([near["j"], len(other) + np.arange(n)])
    cost = np.concatenate([near["v"] ** 2 - reach**2, np.zeros(n)]) + reach**2 + 1.0  # sparse zeros would be no edge
    graph = sparse.csr_array((cost, (row, col)), shape=(n, len(other) + n))
    mine, theirs = csgraph.min_weight_full_bipartite_matching(graph)
    real = theirs < len(other)
    return mine[real].astype(np.int64), theirs[real].astype(np.int64)


def believed(chance: Floats, slope: float, offset: float) -> Floats:
    """Probability of a column from the chances (n, k) of the members: a logistic line in the logit of their mean
    (J. Platt, 1999)."""
    return probability(slope * _logit(chance.mean(axis=1)) + offset)


def _logit(p: Floats) -> Floats:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.asarray(np.log(p / (1 - p)))


def fitted(chance: Floats, true: NDArray[np.bool_], weight: Floats) -> tuple[float, float]:
    """Slope and offset of :func:`believed` that make the ``true`` (n,) likeliest, each counted ``weight`` times."""
    x = _logit(chance.mean(axis=1))

    def surprise(line: Floats) -> float:
        t = line[0] * x + line[1]
        return float((weight * (np.logaddexp(0, t) - true * t)).sum() / weight.sum() + 1e-3 * (line[0] - 1) ** 2)

    slope, offset = optimize.minimize(surprise, np.array([1.0, 0.0]), method="Nelder-Mead").x
    return float(slope), float(offset)


def stretch(pulls: Sequence[Floats]) -> float:
    """By how much deviations must grow for 68.27 % of the ``pulls`` to lie within one: errors over their deviations, an
    array an image, of which one with very many counts no more than 400 of them."""
    away = np.concatenate([np.abs(p).ravel() for p in pulls] or [np.zeros(0)])
    if away.size < 20:
        return 1.0
    weight = np.concatenate([np.full(p.size, 1 / (p.size + 400)) for p in pulls])
    order = np.argsort(away)
    total = np.cumsum(weight[order])
    return float(away[order][np.searchsorted(total, 0.6827 * total[-1])])


def usual(features: Floats, held_out: Floats) -> dict[str, Any]:
    """Middle, axes and reach of the training set's ``features`` (n, k): 99.7 % of ``held_out`` have one below 3."""
    middle = features.mean(axis=0)
    scale = features.std(axis=0) + 1e-6
    _, size, axes = np.linalg.svd((features - middle) / scale, full_matrices=False)
    d = min(NOVELTY_DIMENSIONS, len(size) - 1)
    whiten = (axes[:d].T / (size[:d] / np.sqrt(len(features)) + 1e-9)) / scale[:, None]
    known: dict[str, Any] = {"middle": middle, "whiten": whiten, "reach": 1.0}
    known["reach"] = float(np.quantile([novelty(f, known) for f in held_out], 0.997)) / 3
    return known


def novelty(features: Floats, known: dict[str, Any]) -> float:
    """How far an image's mean ``features`` (k,) lie from the training set's; 3 is the edge of what is usual."""
    away = (features - np.asarray(known["middle"])) @ np.asarray(known["whiten"])
    return float(np.sqrt(np.mean(away**2)) / known["reach"])


def best_threshold(sets: Sequence[tuple[Floats, NDArray[np.bool_], int]]) -> float:
    """The probability from which on a find is a column: the highest mean F1 over ``sets`` of (probability (n,),
    whether true (n,), number of true columns)."""

    def f1(least: float) -> float:
        return float(
            np.mean([2 * true[p >= least].sum() / max(1, (p >= least).sum() + total) for p, true, total in sets])
        )

    tried = np.round(np.arange(0.1, 0.91, 0.02), 2)
    return float(tried[int(np.argmax([f1(t) for t in tried]))])
