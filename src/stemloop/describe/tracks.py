"""Columns over the frames of a stack: which is which.

Linking asks, frame by frame, for the set of pairs that is most likely as a whole (C. J. Veenman et al., IEEE Trans.
PAMI 23 (2001) 54, doi:10.1109/34.899946), with the deviations of both positions; tracks wait through gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse, stats
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
    found = (*_meetings(tracks, used, reach), *_reconstructions(tracks))
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


def _reconstructions(tracks: Tracks) -> list[Event]:
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
