"""Columns told apart by their brightness."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stemloop.describe.finding.gaussians import Floats

#: So many columns tell the classes as well as more would.
_ENOUGH = 20000


def sublattices(amplitude: Floats, most: int = 3) -> NDArray[np.int64]:
    """Sort columns into classes of brightness, 0 the brightest.

    One-dimensional mixtures of 1 to ``most`` Gaussians are fitted by expectation maximisation; the Bayesian
    information criterion chooses the number (G. Schwarz, Ann. Statist. 6 (1978) 461, doi:10.1214/aos/1176344136).
    Classes must also be apart (Ashman's D above 2: K. M. Ashman et al., Astron. J. 108 (1994) 2348,
    doi:10.1086/117248) and each hold a twentieth of the columns, so that a slope of thickness makes no sublattice.

    Parameters
    ----------
    amplitude : (n,) brightness, any unit.
    most : largest number of classes.

    Returns
    -------
    (n,) class of each column.

    >>> sublattices(np.array([1.0, 9.1, 1.1, 8.9, 0.9, 9.0, 1.05, 9.05] * 4))[:4]
    array([1, 0, 1, 0])
    """
    n = len(amplitude)
    chosen = np.zeros(n, dtype=np.int64)
    if n < 8 or np.ptp(amplitude) == 0:
        return chosen
    some = amplitude[:: -(-n // _ENOUGH)]
    best = -2 * float(_log_normal(some, some.mean(), some.std()).sum()) + 2 * np.log(len(some))
    for k in range(2, most + 1):
        share, mean, spread, log_likelihood = _mixture(some, k)
        bic = -2 * log_likelihood + (3 * k - 1) * np.log(len(some))
        order = np.argsort(-mean)
        gap = -np.diff(mean[order])
        apart = np.sqrt(2) * gap / np.hypot(spread[order][1:], spread[order][:-1])
        if bic < best - 10 and apart.min() > 2 and share.min() > 0.05:
            member = (np.log(share) + _log_normal(amplitude[:, None], mean, spread)).argmax(axis=1)
            best, chosen = bic, np.argsort(order)[member].astype(np.int64)
    return chosen


def _log_normal(x: Floats, mean: Floats | float, spread: Floats | float) -> Floats:
    return np.asarray(-0.5 * ((x - mean) / spread) ** 2 - np.log(spread * np.sqrt(2 * np.pi)))


def _mixture(x: Floats, k: int) -> tuple[Floats, Floats, Floats, float]:
    """Shares, means, deviations and log-likelihood of a mixture of ``k`` Gaussians."""
    mean = np.percentile(x, 100 * (np.arange(k) + 0.5) / k)
    for _ in range(20):  # k-means gives the start
        member = np.abs(x[:, None] - mean).argmin(axis=1)
        mean = np.array([x[member == j].mean() if (member == j).any() else mean[j] for j in range(k)])
    least = 1e-3 * float(x.std())
    spread = np.array([max(x[member == j].std() if (member == j).any() else 0, least) for j in range(k)])
    share = np.maximum(np.bincount(member, minlength=k) / len(x), 1e-3)
    last = -np.inf
    log_likelihood = last
    density = np.zeros((len(x), k))
    for _ in range(300):
        density = np.log(share) + _log_normal(x[:, None], mean, spread)
        top = density.max(axis=1, keepdims=True)
        part = np.exp(density - top)
        log_likelihood = float((top[:, 0] + np.log(part.sum(axis=1))).sum())
        part /= part.sum(axis=1, keepdims=True)
        mass = part.sum(axis=0) + 1e-12
        share, mean = mass / mass.sum(), (part * x[:, None]).sum(axis=0) / mass
        spread = np.maximum(np.sqrt((part * (x[:, None] - mean) ** 2).sum(axis=0) / mass), least)
        if log_likelihood - last < 1e-5 * len(x):
            break
        last = log_likelihood
    return share, mean, spread, log_likelihood
