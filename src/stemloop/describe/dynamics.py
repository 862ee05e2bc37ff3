"""Columns over the frames of a stack: which is which, how often a site changes its state, how far atoms move.

Linking asks, frame by frame, for the set of pairs that is most likely as a whole (C. J. Veenman et al., IEEE Trans.
PAMI 23 (2001) 54, doi:10.1109/34.899946), with the deviations of both positions; tracks wait through gaps. Rates are
those of a continuous-time Markov chain that is looked at now and then, with no guess at what happened between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize, sparse, stats
from scipy.ndimage import gaussian_filter, maximum_filter
from scipy.signal import fftconvolve
from scipy.spatial import cKDTree

from stemloop.core.errors import InputError
from stemloop.core.structure import Columns

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Share of moves that are no small steps but jumps to anywhere within reach.
_JUMPS = 1e-3
#: A move this improbable (chi-square of two coordinates) is more than a small step.
_STRANGE = 1e-4
#: The fastest rate that is thought of, in changes a frame.
_FASTEST = 50.0


@dataclass(frozen=True)
class Event:
    """Something that happens to tracks in ``frame``.

    kind : ``merge`` (a track ends where another goes on), ``split`` (one begins beside another), or ``reconstruction``
        (many columns move at once). tracks : those concerned; of a merge or split, the one that ends or begins first.
    place : (2,) [px] in the common frame. significance : in deviations (reconstruction), else NaN.
    """

    kind: str
    frame: int
    tracks: tuple[int, ...]
    place: Floats
    significance: float = float("nan")


@dataclass(frozen=True)
class Tracks:
    """Columns linked over ``n_frames`` frames; one row a detection, sorted by track and frame.

    track, frame, detection : (d,) int; ``detection`` is the row in that frame's Columns. position : (d, 2) [px] in the
    common frame (frame k's place minus ``shift[k]``); sigma : (d, 2). amplitude : (d,). shift : (n_frames, 2) [px] that
    was taken off; NaN for frames that were left out. step_px : deviation of one coordinate of a column's move from
    frame to frame, over what the positions' own deviations explain.
    """

    track: Integers
    frame: Integers
    detection: Integers
    position: Floats
    sigma: Floats
    amplitude: Floats
    shift: Floats
    step_px: float
    events: tuple[Event, ...]

    def __len__(self) -> int:
        """Number of tracks."""
        return int(self.track.max()) + 1 if len(self.track) else 0

    @property
    def n_frames(self) -> int:
        """Frames of the stack."""
        return len(self.shift)

    def rows(self, track: int) -> Integers:
        """Rows of one track, in the order of frames."""
        first, stop = np.searchsorted(self.track, [track, track + 1])
        return np.arange(first, stop)

    def of_frames(self, values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """(d,) what ``values[k][i]`` says of column i of frame k (a sublattice, a class of defect), row by row."""
        if len(values) != self.n_frames:
            raise InputError(f"there are {self.n_frames} frames; values were given for {len(values)}.")
        return np.array([values[k][i] for k, i in zip(self.frame, self.detection, strict=True)])


class _Growing(NamedTuple):
    """The tracks that may go on: where each was seen last, its variance, the frame, its number."""

    position: Floats
    variance: Floats
    frame: Integers
    track: Integers

    def take(self, kept: NDArray[np.bool_]) -> _Growing:
        return _Growing(self.position[kept], self.variance[kept], self.frame[kept], self.track[kept])

    def joined(self, more: _Growing) -> _Growing:
        return _Growing(
            np.concatenate([self.position, more.position]),
            np.concatenate([self.variance, more.variance]),
            np.concatenate([self.frame, more.frame]),
            np.concatenate([self.track, more.track]),
        )


def link(
    frames: Sequence[Columns],
    shift: NDArray[Any] | None = None,
    *,
    gap: int = 2,
    longest_step_px: float | None = None,
    step_px: float | None = None,
) -> Tracks:
    """Which column of a frame is which of the frames before.

    Parameters
    ----------
    frames : columns of each frame; empty ones are gaps. shift : (n, 2) [px], frame k shows at p what the common frame
        shows at p - shift[k] (as :func:`stemloop.reduce.register.register` gives it); a frame with NaN is left out.
        Without it each frame is laid on the last one by the shift that most columns agree on; in a perfect lattice that
        is known up to a lattice vector only, and the shortest is taken.
    gap : frames through which a track that is not seen waits. longest_step_px : no column goes further from one frame
        to the next; default 0.45 of the spacing. step_px : deviation of a coordinate of such a move; default: measured.

    Returns
    -------
    Tracks, with merges, splits and reconstructions.

    Raises
    ------
    InputError : no frames, shifts of another number, or columns with NaN.
    """
    if len(frames) == 0:
        raise InputError("no frames were given: columns are linked over at least one.")
    if gap < 0 or any(limit is not None and not limit > 0 for limit in (longest_step_px, step_px)):
        raise InputError(
            f"gap is 0 or more, longest_step_px and step_px are above 0; got {gap}, {longest_step_px} and {step_px}."
        )
    for k, columns in enumerate(frames):
        if not (np.isfinite(columns.position).all() and np.isfinite(columns.sigma).all()):
            raise InputError(f"places or deviations of frame {k} are not finite: leave those columns out.")
    reach = longest_step_px or 0.45 * _spacing(frames)
    moved = _shifts(frames, reach) if shift is None else _checked_shift(shift, len(frames))
    place = [f.position - s for f, s in zip(frames, moved, strict=True)]
    variance = [np.maximum(f.sigma, 1e-4) ** 2 for f in frames]
    used = [k for k in range(len(frames)) if np.isfinite(moved[k]).all() and len(frames[k])]
    step = _usual_step(place, variance, used, reach) if step_px is None else step_px
    label = _linked(place, variance, used, step, reach, gap)
    rows = [(label[k][i], k, i) for k in used for i in range(len(place[k]))]
    table = np.array(sorted(rows), dtype=np.int64).reshape(-1, 3)
    track, frame, detection = table.T
    tracks = Tracks(
        track,
        frame,
        detection,
        np.array([place[k][i] for _, k, i in table]).reshape(-1, 2),
        np.array([frames[k].sigma[i] for _, k, i in table]).reshape(-1, 2),
        np.array([frames[k].amplitude[i] for _, k, i in table]),
        moved,
        step,
        (),
    )
    found = (*_meetings(tracks, used, reach), *_reconstructions(tracks, reach))
    return replace(tracks, events=tuple(found))


def _spacing(frames: Sequence[Columns]) -> float:
    """Median distance [px] of nearest neighbours; a lone column may go anywhere."""
    some = [f.position for f in frames if len(f) >= 2][:20]
    if not some:
        return 1e3
    return float(np.median(np.concatenate([np.asarray(cKDTree(p).query(p, 2)[0])[:, 1] for p in some])))


def _checked_shift(shift: NDArray[Any], n: int) -> Floats:
    moved = np.asarray(shift, dtype=np.float64)
    if moved.shape != (n, 2):
        raise InputError(f"{n} frames need shifts of shape ({n}, 2); got {moved.shape}.")
    return moved


def _shifts(frames: Sequence[Columns], reach: float) -> Floats:
    """(n, 2) shift of each frame against the first, frame by frame, jumps of any length included."""
    out = np.full((len(frames), 2), np.nan)
    last: tuple[Floats, Floats] | None = None
    for k, columns in enumerate(frames):
        if len(columns) == 0:
            continue
        if last is None:
            out[k] = 0.0
        else:
            out[k] = last[1] + _offset(last[0], columns.position, reach)
        last = (columns.position, out[k])
    return out


def _offset(before: Floats, after: Floats, reach: float) -> Floats:
    """The shift of ``after`` against ``before`` that most columns agree on; of several alike the shortest."""
    bin_px = reach / 4
    low = np.minimum(before.min(axis=0), after.min(axis=0))
    size = np.ceil((np.maximum(before.max(axis=0), after.max(axis=0)) - low) / bin_px).astype(int) + 1
    edges = [np.arange(n + 1) * bin_px + x for n, x in zip(size, low - 0.5 * bin_px, strict=True)]
    a, b = (np.histogram2d(p[:, 0], p[:, 1], bins=edges)[0] for p in (before, after))
    votes = gaussian_filter(fftconvolve(b, a[::-1, ::-1]), 1.0, mode="constant")
    tops = np.argwhere((votes == maximum_filter(votes, 5)) & (votes > 0.7 * votes.max()))
    lags = (tops - (np.array(a.shape) - 1)) * bin_px
    offset = np.asarray(lags[np.hypot(*lags.T).argmin()], dtype=np.float64)
    tree = cKDTree(before)
    for limit in (reach, reach, 0.5 * reach):
        distance, which = (np.asarray(v) for v in tree.query(after - offset))
        near = distance < limit
        if near.any():
            offset = offset + np.median((after - offset - before[which])[near], axis=0)
    return offset


def _usual_step(place: list[Floats], variance: list[Floats], used: list[int], reach: float) -> float:
    """Robust deviation of one coordinate of the moves between neighbouring frames beyond the positions' deviations."""
    squares = []
    for a, b in pairwise(used):
        far, forth = (np.asarray(v) for v in cKDTree(place[a]).query(place[b]))
        back = np.asarray(cKDTree(place[b]).query(place[a])[1])
        mutual = (back[forth] == np.arange(len(place[b]))) & (far < reach)
        off = place[b][mutual] - place[a][forth[mutual]]
        squares.append(((off**2) / (b - a), (variance[b][mutual] + variance[a][forth[mutual]]) / (b - a)))
    if not squares:
        return 0.1 * reach
    square, known = (np.concatenate([s[i] for s in squares]).ravel() for i in (0, 1))
    if len(square) == 0:
        return 0.1 * reach
    excess = np.median(square) / stats.chi2.median(1) - np.median(known)
    return float(np.sqrt(max(excess, 0.05 * float(np.median(known)))))


def _linked(
    place: list[Floats], variance: list[Floats], used: list[int], step: float, reach: float, gap: int
) -> dict[int, Integers]:
    """The track of each column of each used frame."""
    label: dict[int, Integers] = {}
    count = 0
    growing = _Growing(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, np.int64), np.zeros(0, np.int64))
    for k in used:
        growing = growing.take(growing.frame >= k - 1 - gap)
        own = _paired(growing, place[k], variance[k], k, step, reach)
        fresh = own < 0
        label[k] = np.where(fresh, 0, growing.track[own] if len(growing.track) else 0).astype(np.int64)
        label[k][fresh] = count + np.arange(fresh.sum())
        count += int(fresh.sum())
        kept = np.ones(len(growing.track), bool)
        kept[own[~fresh]] = False
        growing = growing.take(kept).joined(_Growing(place[k], variance[k], np.full(len(place[k]), k), label[k]))
    return label


def _paired(growing: _Growing, place: Floats, variance: Floats, k: int, step: float, reach: float) -> Integers:
    """(n,) the row of ``growing`` that each column continues, -1 for none: the most likely set of pairs as a whole.

    Only pairs that could be are looked at; they fall into small groups, and each is solved for itself.
    """
    own = np.full(len(place), -1, np.int64)
    if len(growing.track) == 0:
        return own
    since = k - growing.frame
    farthest = reach * np.sqrt(since.max())
    pairs = cKDTree(place).sparse_distance_matrix(cKDTree(growing.position), farthest, output_type="coo_matrix")
    i, j = pairs.row.astype(np.int64), pairs.col.astype(np.int64)
    off = place[i] - growing.position[j]
    good = (off**2).sum(axis=1) <= reach**2 * since[j]
    i, j, off = i[good], j[good], off[good]
    total = variance[i] + growing.variance[j] + since[j, None] * step**2
    usual = np.exp(-0.5 * (off**2 / total).sum(axis=1)) / (2 * np.pi * np.sqrt(total.prod(axis=1)))
    cost = -2 * np.log((1 - _JUMPS) * np.pi * reach**2 * usual + _JUMPS / since[j])
    alone = -2 * np.log(0.1 * _JUMPS / since.max())
    n = len(place)
    graph = sparse.coo_matrix((np.ones(len(i)), (i, n + j)), shape=(n + len(since),) * 2)
    group = sparse.csgraph.connected_components(graph, directed=False)[1][i]
    single = np.bincount(group)[group] == 1  # most: one column, one track, nothing to choose
    own[i[single]] = j[single]
    i, j, cost, group = i[~single], j[~single], cost[~single], group[~single]
    order = np.argsort(group, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(order) else ():
        _solve(i[part], j[part], cost[part], alone, own)
    return own


def _solve(i: Integers, j: Integers, cost: Floats, alone: float, own: Integers) -> None:
    """Pairs of one group: least cost, where a column without a track costs ``alone``, more than any pair."""
    left, a = np.unique(i, return_inverse=True)
    right, b = np.unique(j, return_inverse=True)
    table = np.full((len(left), len(right) + len(left)), alone)
    table[:, : len(right)] = 1e6
    table[a, b] = cost
    rows, cols = optimize.linear_sum_assignment(table)
    for r, c in zip(rows, cols, strict=True):
        if c < len(right) and table[r, c] < 1e5:
            own[left[r]] = right[c]


def _meetings(tracks: Tracks, used: list[int], reach: float) -> list[Event]:
    """Merges (a track ends for good within ``reach`` of one that goes on) and splits (the same, backwards in time)."""
    if len(tracks.track) == 0:
        return []
    starts = np.flatnonzero(np.diff(tracks.track, prepend=-1))
    ends = np.append(starts[1:], len(tracks.track)) - 1
    after, events = dict(pairwise(used)), []
    rows_of = {k: np.flatnonzero(tracks.frame == k) for k in used}
    for kind, edge in (("merge", ends), ("split", starts)):
        for k in used:
            other = after.get(k) if kind == "merge" else {v: u for u, v in after.items()}.get(k)
            mine = edge[tracks.frame[edge] == k]
            if other is None or len(mine) == 0:
                continue
            both = np.intersect1d(tracks.track[rows_of[k]], tracks.track[rows_of[other]])
            hosts = rows_of[other][np.isin(tracks.track[rows_of[other]], both)]
            if len(hosts) == 0:
                continue
            far, which = (np.asarray(v) for v in cKDTree(tracks.position[hosts]).query(tracks.position[mine]))
            for row, host, distance in zip(mine, hosts[which], far, strict=True):
                if distance < reach and _adds_up(tracks, row, host, k):
                    pair = (int(tracks.track[row]), int(tracks.track[host]))
                    events.append(Event(kind, max(k, other), pair, tracks.position[host]))
    return events


def _adds_up(tracks: Tracks, row: int, host: int, frame: int) -> bool:
    """Whether the brightness of two columns is nearer to what is left of them than that of the host alone is."""
    rows = tracks.rows(int(tracks.track[host]))
    apart = tracks.amplitude[rows[tracks.frame[rows] == frame][0]]
    together = tracks.amplitude[host]
    return bool(abs(together - apart - tracks.amplitude[row]) < abs(together - apart))


def _reconstructions(tracks: Tracks, reach: float) -> list[Event]:
    """Frames in which far more columns move by more than four of their deviations than in others."""
    ongoing = np.flatnonzero((np.diff(tracks.track) == 0) & (np.diff(tracks.frame) == 1))
    if len(ongoing) < 8:
        return []
    off = tracks.position[ongoing + 1] - tracks.position[ongoing]
    total = tracks.sigma[ongoing] ** 2 + tracks.sigma[ongoing + 1] ** 2 + tracks.step_px**2
    strange = (off**2 / total).sum(axis=1) > stats.chi2.isf(_STRANGE, 2)
    frame = tracks.frame[ongoing + 1]
    usual = max(float(np.median([strange[frame == k].mean() for k in np.unique(frame)])), _STRANGE)
    events = []
    for k in np.unique(frame):
        here = frame == k
        moved = ongoing[here & strange] + 1
        chance = stats.binom.sf(len(moved) - 1, int(here.sum()), usual)
        if len(moved) >= 4 and chance < 1e-6:
            who = tuple(int(t) for t in tracks.track[moved])
            middle = np.median(tracks.position[moved], axis=0)
            events.append(Event("reconstruction", int(k), who, middle, float(stats.norm.isf(max(chance, 1e-300)))))
    return events


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
