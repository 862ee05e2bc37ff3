"""Ferroic variants: into how many directions the displacements of the cells fall, and which cell is which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from stemloop.core.errors import InputError
from stemloop.describe.ferroic.winding import smallest

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Displacements whose coherence is less than this many deviations are taken for noise.
COHERENT = 4.5
#: Directions of two variants are at least this far apart, and each variant has this share of the cells.
_APART, _SHARE = np.deg2rad(30), 0.03
#: Spread of a variant's directions beyond the deviations of the fits.
_NARROW, _WIDE = np.deg2rad(0.5), np.deg2rad(20)
#: Variants must explain this share of the polar cells; else the direction turns steadily and there are none.
_EXPLAINED = 0.5
_SAMPLE = 4000
#: What each of a cell's four neighbours adds to the logarithm of the odds of their variant.
_COUPLING = 1.0


class Variants(NamedTuple):
    """As in :class:`stemloop.describe.polar.Polar`."""

    p_polar: Floats
    variant: Integers
    p_variant: Floats
    direction: Floats
    direction_sigma: Floats


class _Fit(NamedTuple):
    """A mixture: ``size`` and ``spread`` of the lengths of polar vectors; ``share`` (2 + k,) of the cells that are not
    polar, of any direction, and of each variant; ``middle`` (k,) directions; ``width`` of each variant; twice the
    negative log-likelihood; ``member`` (n, 2 + k) probabilities."""

    size: float
    spread: float
    share: Floats
    middle: Floats
    width: float
    price: float
    member: Floats


def none(n: int) -> Variants:
    """``n`` cells that are not polar."""
    return Variants(np.zeros(n), np.full(n, -1, np.int64), np.zeros((n, 0)), np.zeros(0), np.zeros(0))


def variants_of(vector: Floats, sigma: Floats, beside: Integers, number: int | None) -> Variants:
    """Sort vectors (n, 2) with deviations into variants; ``beside`` (n, 4) are their neighbours, -1 where none.

    ``number`` of variants at equal angles, or None: from none to eight at any angles, by the Bayesian information
    criterion (G. Schwarz, Ann. Statist. 6 (1978) 461, doi:10.1214/aos/1176344136).
    """
    if number is not None and not 1 <= number <= 24:
        raise InputError(f"the number of variants is between 1 and 24; got {number}.")
    length, angle = np.hypot(*vector.T), np.arctan2(vector[:, 0], vector[:, 1])
    noise = np.sqrt((sigma**2).mean(axis=1))
    every = max(1, -(-len(vector) // _SAMPLE))
    sample = (length[::every], angle[::every], noise[::every])
    if number is None:
        start = _chosen(*sample)
    else:
        turn = 2 * np.pi / number
        phase = float(np.angle((sample[0] * np.exp(1j * number * sample[1])).sum())) / number
        start = _fitted(*sample, np.asarray(phase + turn * np.arange(number), dtype=np.float64), True)
    fit = _fitted(length, angle, noise, start.middle, number is not None, steps=8, start=start)
    return _placed(length, angle, noise, beside, fit)


def regions(variant: Integers, beside: Integers) -> Integers:
    """(n,) number of the connected set of cells of one variant, the largest first; -1 where ``variant`` is."""
    one = np.repeat(np.arange(len(variant)), beside.shape[1])
    other = beside.ravel()
    kept = (other >= 0) & (variant[one] >= 0)
    kept &= variant[one] == variant[np.where(other >= 0, other, 0)]
    ones = np.ones(int(kept.sum()), dtype=np.int8)
    graph = coo_matrix((ones, (one[kept], other[kept])), shape=(len(variant), len(variant)))
    _, label = connected_components(graph, directed=False)
    polar = variant >= 0
    size = np.bincount(label[polar], minlength=int(label.max(initial=-1)) + 1)
    rank = np.argsort(np.argsort(-size, kind="stable"), kind="stable")
    return np.where(polar, rank[label] if len(rank) else -1, -1).astype(np.int64)


def _chosen(length: Floats, angle: Floats, noise: Floats) -> _Fit:
    """The best number of variants; each is started at one of the highest peaks of the directions' density."""
    weight = np.minimum(length / noise, 5.0) ** 2
    histogram = np.histogram(angle % (2 * np.pi), 180, (0, 2 * np.pi), weights=weight)[0]
    density = ndimage.gaussian_filter1d(histogram.astype(np.float64), 4, mode="wrap")
    top = np.flatnonzero((density == ndimage.maximum_filter1d(density, 15, mode="wrap")) & (density > 0))
    top = top[np.argsort(-density[top], kind="stable")][:8]
    best = _fitted(length, angle, noise, np.zeros(0), False)
    least = best.price + 4 * np.log(len(length))
    for k in range(1, len(top) + 1):
        fit = _fitted(length, angle, noise, (top[:k] + 0.5) * np.pi / 90, False)
        price = fit.price + (5 + 2 * k) * np.log(len(length))
        gaps = np.abs(smallest(fit.middle[:, None] - fit.middle) + 10 * np.eye(k))
        sound = gaps.min() > _APART and fit.share[2:].min() > _SHARE
        sound &= fit.share[2:].sum() > _EXPLAINED * fit.share[1:].sum()
        if sound and price < least - 10:
            best, least = fit, price
    return best


def _fitted(
    length: Floats,
    angle: Floats,
    noise: Floats,
    middle: Floats,
    tied: bool,
    steps: int = 60,
    start: _Fit | None = None,
) -> _Fit:
    """Expectation maximisation; the deviations of the vectors add to the spreads of the mixture."""
    k = len(middle)
    if start is None:
        clear = length > 2.5 * noise
        size = float(np.median(length[clear])) if clear.sum() > 3 else float(np.median(length))
        share = np.concatenate([[0.3, 0.2 if k else 0.7], np.full(k, 0.5 / max(k, 1))])
        start = _Fit(size, 0.3 * size, share, middle, np.deg2rad(10), np.inf, np.zeros((0, 0)))
    size, spread, share, middle, width, price, _ = start
    for _ in range(steps):
        log_density = _densities(length, angle, noise, size, spread, middle, width) + np.log(share)
        top = log_density.max(axis=1, keepdims=True)
        member = np.exp(log_density - top)
        total = member.sum(axis=1, keepdims=True)
        member /= total
        before, price = price, -2 * float((top + np.log(total)).sum())
        if before - price < 1e-3:
            break
        share = np.maximum(member.mean(axis=0), 1e-6)
        share /= share.sum()
        polar = 1 - member[:, 0]
        pull = spread**2 / (spread**2 + noise**2)
        guess = size + pull * (length - size)
        mass = polar.sum() + 1e-12
        size = float((polar * guess).sum() / mass)
        left = (polar * ((guess - size) ** 2 + pull * noise**2)).sum() / mass
        spread = float(np.sqrt(max(left, (0.02 * size) ** 2)))
        if k:
            middle, width = _turned(angle, noise / max(size, 1e-9), member[:, 2:], middle, width, tied)
    return _Fit(size, spread, share, middle, width, price, member)


def _turned(
    angle: Floats, blur: Floats, member: Floats, middle: Floats, width: float, tied: bool
) -> tuple[Floats, float]:
    """New directions and width of the variants, from the vectors' probabilities of being theirs."""
    off = smallest(angle[:, None] - middle)
    known = member / (width**2 + blur[:, None] ** 2)
    step = (known * off).sum(axis=0) / (known.sum(axis=0) + 1e-12)
    step = np.full(len(middle), (known * off).sum() / (known.sum() + 1e-12)) if tied else step
    pull = (width**2 / (width**2 + blur**2))[:, None]
    rest = (member * ((pull * (off - step)) ** 2 + pull * blur[:, None] ** 2)).sum() / (member.sum() + 1e-12)
    return middle + step, float(np.clip(np.sqrt(rest), _NARROW, _WIDE))


def _densities(
    length: Floats, angle: Floats, noise: Floats, size: float, spread: float, middle: Floats, width: float
) -> Floats:
    """(n, 2 + k) log-densities in the plane of displacements: not polar, any direction, each variant."""
    still = -0.5 * (length / noise) ** 2 - np.log(2 * np.pi * noise**2)
    around = spread**2 + noise**2
    radial = -0.5 * (length - size) ** 2 / around - 0.5 * np.log(2 * np.pi * around)
    radial -= np.log(np.maximum(length, 1e-3 * noise))
    variance = width**2 + (noise / max(size, 1e-9)) ** 2
    off = smallest(angle[:, None] - middle)
    turned = -0.5 * off**2 / variance[:, None] - 0.5 * np.log(2 * np.pi * variance)[:, None]
    return np.column_stack([still, radial - np.log(2 * np.pi), radial[:, None] + turned])


def _placed(length: Floats, angle: Floats, noise: Floats, beside: Integers, fit: _Fit) -> Variants:
    """Probabilities of each cell's variant with its neighbours' say (a Potts prior, in mean field)."""
    k = len(fit.middle)
    own = _densities(length, angle, noise, fit.size, fit.spread, fit.middle, fit.width)
    odd = own[:, 1] + np.log(max(fit.share[1], 1e-3) / max(k, 1))
    each = np.logaddexp(own[:, 2:] + np.log(fit.share[2:]), odd[:, None]) if k else odd[:, None]
    own = np.column_stack([own[:, 0] + np.log(fit.share[0]), each])
    member = smoothed(own, beside, _COUPLING)
    p_polar = 1 - member[:, 0]
    if k == 0:
        return none(len(length))._replace(p_polar=p_polar)
    variant = np.where(p_polar > 0.5, member[:, 1:].argmax(axis=1), -1)
    blur = fit.width**2 + (noise / fit.size) ** 2
    sure = np.sqrt(1 / np.maximum((member[:, 1:] / blur[:, None]).sum(axis=0), 1e-12))
    order = np.argsort(fit.middle % (2 * np.pi))
    rank = np.argsort(order)
    variant = np.where(variant >= 0, rank[variant], -1)
    return Variants(p_polar, variant, member[:, 1:][:, order], smallest(fit.middle[order]), sure[order])


def smoothed(log_density: Floats, beside: Integers, coupling: float, steps: int = 10) -> Floats:
    """(n, k) probabilities of ``log_density`` (n, k) under a Potts prior in mean field: each neighbour (n, m; -1 where
    none) adds ``coupling`` times its own probability to the logarithm (J. Besag, J. R. Stat. Soc. B 48 (1986) 259,
    doi:10.1111/j.2517-6161.1986.tb01412.x)."""
    there = (beside >= 0)[:, :, None]
    member = _normalised(log_density)
    for _ in range(steps):
        before = member
        said = np.where(there, member[beside], 0.0).sum(axis=1)
        member = _normalised(log_density + coupling * said)
        if np.abs(member - before).max(initial=0.0) < 1e-3:
            break
    return member


def _normalised(log_density: Floats) -> Floats:
    part = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    return np.asarray(part / part.sum(axis=1, keepdims=True))
