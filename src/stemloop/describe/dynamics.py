"""Columns over the frames of a stack: how often a site changes its state, how far atoms move.

Columns become tracks in :mod:`stemloop.describe.tracks`. Rates are those of a continuous-time Markov chain that is
looked at now and then, with no guess at what happened between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize

from stemloop.core.errors import InputError
from stemloop.describe.tracks import Event, Tracks, link

__all__ = ["Displacement", "Event", "Rates", "Tracks", "link", "mean_displacement", "transitions"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: The fastest rate that is thought of, in changes a frame.
_FASTEST = 50.0


@dataclass(frozen=True)
class Rates:
    """Rates of a continuous-time Markov chain between ``states``.

    rate, sigma : (k, k) [1/s] from the row's state to the column's and its 1-sigma deviation; zeros on the diagonal.
    count : (k, k) how often the one state was seen and, the next time, the other. time_s : (k,) time that sites were
    seen to be in each state, each interval given to the state at its beginning. occupation : (k,) share of time in each
    state in the long run. An unseen transition has the rate its time allows, with a deviation larger than it; so have
    changes much faster than the frames, of which one sees only that they are.
    """

    states: tuple[Any, ...]
    rate: Floats
    sigma: Floats
    count: Integers
    time_s: Floats
    occupation: Floats


def transitions(tracks: Tracks, states: NDArray[Any], frame_time_s: float) -> Rates:
    """Rates at which sites change their state.

    The likelihood of what was seen is that of a continuous-time Markov chain with generator Q: from state i a site is
    found in j after t with the probability exp(Q t)_ij. Frames in which a site is not seen lengthen t; the time before
    it is first seen and after it is last seen says nothing. So fast changes that were missed between frames are
    accounted for (J. D. Kalbfleisch, J. F. Lawless, J. Am. Stat. Assoc. 80 (1985) 863,
    doi:10.1080/01621459.1985.10478195). The prior of each rate is Jeffreys' for a count, so that n transitions in the
    time T give the rate (n + 1/2) / T with the deviation sqrt(n + 1/2) / T where frames are dense.

    Parameters
    ----------
    tracks : linked columns. states : (d,) state of each row of ``tracks`` (numbers or strings), such as
        ``tracks.of_frames(classes)``. frame_time_s : time from frame to frame [s].

    Raises
    ------
    InputError : states of another number, fewer than two states, or no track that is seen twice.
    """
    found = np.asarray(states)
    if found.shape != tracks.track.shape:
        raise InputError(f"there are {len(tracks.track)} detections; states were given for {found.shape}.")
    if not frame_time_s > 0:
        raise InputError(f"the time from frame to frame is above 0 s; got {frame_time_s}.")
    names, number = np.unique(found, return_inverse=True)
    on = np.flatnonzero(np.diff(tracks.track) == 0)
    if len(names) < 2 or len(on) == 0:
        raise InputError(f"{len(names)} states in {len(on)} steps: rates need two states and a site seen twice.")
    lag = np.diff(tracks.frame)[on]
    counts = np.zeros((int(lag.max()) + 1, len(names), len(names)), np.int64)
    np.add.at(counts, (lag, number[on], number[on + 1]), 1)
    time_s = np.asarray(frame_time_s * np.bincount(number[on], lag, len(names)), dtype=np.float64)
    rate, sigma = _likeliest(counts, frame_time_s, time_s)
    occupation = np.asarray(linalg.null_space(_generator(rate).T)[:, 0], dtype=np.float64)
    return Rates(tuple(names.tolist()), rate, sigma, counts.sum(axis=0), time_s, occupation / occupation.sum())


def _generator(rate: Floats) -> Floats:
    return rate - np.diag(rate.sum(axis=1))


def _likeliest(counts: Integers, frame_time_s: float, time_s: Floats) -> tuple[Floats, Floats]:
    """The rates of greatest posterior density over their logarithms, and their deviations from its curvature."""
    k = counts.shape[1]
    off = ~np.eye(k, dtype=bool)
    lags = [g for g in range(1, len(counts)) if counts[g].any()]

    def cost(log_rate: Floats) -> float:
        rate = np.zeros((k, k))
        rate[off] = np.exp(log_rate)
        generator = _generator(rate) * frame_time_s
        chance = [np.maximum(linalg.expm(generator * g), 1e-300) for g in lags]
        seen = sum(float((counts[g] * np.log(p)).sum()) for g, p in zip(lags, chance, strict=True))
        return -seen - 0.5 * float(log_rate.sum())

    least, most = np.log(1e-3 / max(time_s.sum(), frame_time_s)), np.log(_FASTEST / frame_time_s)
    start = np.log(((counts.sum(axis=0) + 0.5) / np.maximum(time_s, frame_time_s)[:, None])[off])
    best = _lowest(cost, np.clip(start, least, most - 1), least, most)
    # the logarithms are nowhere but between the bounds: what the counts do not tell is as wide as those are apart
    size, axes = np.linalg.eigh(_hessian(cost, best))
    spread = np.sqrt((axes**2) @ (1 / (np.maximum(size, 0) + 12 / (most - least) ** 2)))
    beyond = most - best.max()
    if cost(best + beyond) < cost(best) + 2:  # all might as well be as fast as can be: that is not two deviations off
        spread = np.maximum(spread, beyond)
    rate, sigma = np.zeros((k, k)), np.zeros((k, k))
    rate[off] = np.exp(best)
    sigma[off] = rate[off] * spread
    return rate, sigma


def _lowest(cost: Any, start: Floats, least: float, most: float, step: float = 0.5) -> Floats:
    """The minimum next to ``start``, in boxes of ``step``: above the rates that frames can tell all are alike, and a
    search that strides there does not come back."""
    at = start
    for _ in range(100):
        box = [(max(x - step, least), min(x + step, most)) for x in at]
        found = optimize.minimize(cost, at, method="L-BFGS-B", bounds=box).x
        moved, at = np.abs(found - at).max(), found
        if moved < 0.99 * step:
            break
    return at


def _hessian(cost: Any, at: Floats, step: float = 0.02) -> Floats:
    """Second derivatives by central differences."""
    n = len(at)
    move = step * np.eye(n)
    out = np.empty((n, n))
    for a in range(n):
        for b in range(a, n):
            corners = [cost(at + s * move[a] + t * move[b]) for s, t in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
            out[a, b] = out[b, a] = (corners[0] - corners[1] - corners[2] + corners[3]) / (4 * step**2)
    return out


@dataclass(frozen=True)
class Displacement:
    """How far columns go in a time.

    lag_s : (m,) [s]. square, sigma : (m,) mean squared displacement [px^2], without the noise of the positions, and its
    1-sigma deviation. noise : (m,) [px^2] what was taken off. pairs : (m,) how many displacements it is the mean of.
    diffusion, diffusion_sigma : [px^2/s], D of ``<r^2> = 4 D t``, and its deviation. localisation_px : deviation of a
    coordinate that the tracks themselves show (NaN where they are too short to).
    """

    lag_s: Floats
    square: Floats
    sigma: Floats
    noise: Floats
    pairs: Integers
    diffusion: float
    diffusion_sigma: float
    localisation_px: float


def mean_displacement(tracks: Tracks, frame_time_s: float = 1.0, longest: int | None = None) -> Displacement:
    """Mean squared displacement over the lag, and the diffusion coefficient.

    ``<(r(t + lag) - r(t))^2>`` over all tracks and times, less the sum of both positions' variances. Its deviation is
    from leaving out one track at a time (jackknife), as displacements of one track overlap and neighbouring steps share
    a position. D is from steps s between neighbouring frames: ``<s s> / 2 dt + <s s'> / dt`` for each coordinate, with
    s' the step after s: the noise of the positions drops out whatever its size (C. L. Vestergaard et al., Phys. Rev. E
    89 (2014) 022726, doi:10.1103/PhysRevE.89.022726).

    Parameters
    ----------
    longest : longest lag in frames; default a quarter of the frames.

    Raises
    ------
    InputError : no track is seen in two frames.
    """
    if not frame_time_s > 0:
        raise InputError(f"the time from frame to frame is above 0 s; got {frame_time_s}.")
    most = longest or max(1, tracks.n_frames // 4)
    lags, square, sigma, noise, pairs = [], [], [], [], []
    for lag in range(1, most + 1):
        a, b = _apart(tracks, lag)
        if len(a) == 0:
            continue
        own = ((tracks.position[b] - tracks.position[a]) ** 2).sum(axis=1)
        floor = (tracks.sigma[b] ** 2 + tracks.sigma[a] ** 2).sum(axis=1)
        mean, spread = _jackknife(own - floor, tracks.track[a])
        lags.append(lag * frame_time_s)
        square.append(mean)
        sigma.append(spread)
        noise.append(float(floor.mean()))
        pairs.append(len(a))
    if not lags:
        raise InputError("no track is seen twice within the longest lag: there is no displacement.")
    diffusion, spread, localisation = _diffusion(tracks, frame_time_s)
    return Displacement(
        np.array(lags),
        np.array(square),
        np.array(sigma),
        np.array(noise),
        np.array(pairs),
        diffusion,
        spread,
        localisation,
    )


def _apart(tracks: Tracks, lag: int) -> tuple[Integers, Integers]:
    """Rows of the same track ``lag`` frames apart."""
    key = tracks.track * (tracks.n_frames + lag) + tracks.frame
    at = np.searchsorted(key, key + lag)
    good = at < len(key)
    good[good] = key[at[good]] == (key + lag)[good]
    return np.flatnonzero(good), at[good]


def _jackknife(value: Floats, track: Integers) -> tuple[float, float]:
    """Mean, and its deviation by leaving out one track at a time; one track alone says only how its values spread."""
    names, group = np.unique(track, return_inverse=True)
    mean = float(value.mean())
    if len(names) < 2:
        return mean, float(value.std(ddof=1) / np.sqrt(len(value))) if len(value) > 1 else float("nan")
    count, total = np.bincount(group), np.bincount(group, value)
    without = (value.sum() - total) / (len(value) - count)
    n = len(names)
    return mean, float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()))


def _diffusion(tracks: Tracks, frame_time_s: float) -> tuple[float, float, float]:
    a, b = _apart(tracks, 1)
    step = tracks.position[b] - tracks.position[a]
    follows = np.searchsorted(a, b)
    good = follows < len(a)
    good[good] = a[follows[good]] == b[good]
    if not good.any():
        return float("nan"), float("nan"), float("nan")
    first, second = step[good], step[follows[good]]
    square = 0.5 * (first**2 + second**2).mean(axis=1)
    product = (first * second).mean(axis=1)
    mean, spread = _jackknife((square / 2 + product) / frame_time_s, tracks.track[a[good]])
    return mean, spread, float(np.sqrt(max(-float(product.mean()), 0.0)))
