"""What happens from frame to frame of an analysed stack: columns linked, sites that change, how far atoms move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stemloop.campaign.images.one_image import Understood
from stemloop.core.errors import InputError
from stemloop.core.structure import Columns
from stemloop.describe.dynamics import Displacement, Rates, Tracks, link, mean_displacement, transitions

#: More detections than this are not linked.
MOST_DETECTIONS = 3_000_000


@dataclass(frozen=True)
class Motion:
    """What the frames say together. tracks : columns and vacant places, linked. rates : between ``occupied`` and
    ``vacant`` sites (None where nothing changed). displacement : None where no column was seen twice.
    frame_s : time from frame to frame [s], None if it is not known (rates and times are then per frame)."""

    tracks: Tracks
    rates: Rates | None
    displacement: Displacement | None
    frame_s: float | None


def motion(frames: Sequence[Understood | None], shift: NDArray[np.float64] | None, frame_s: float | None) -> Motion:
    """Link what was found in the frames (None where a frame is of no use), each displaced by ``shift`` (n, 2) [px].

    A vacant place of the lattice is linked like a column, so that a site that is emptied or filled is one track that
    changes its state. The state is that of each frame alone: a column that is misjudged counts as a change.
    """
    columns = [_with_vacant(frame) for frame in frames]
    total = sum(len(c) for c in columns)
    if total > MOST_DETECTIONS:
        raise InputError(f"there are {total} detections; more than {MOST_DETECTIONS} are not linked: crop the frames.")
    tracks = link(columns, shift)
    vacant = tracks.of_frames([c.amplitude <= 0 for c in columns])
    states = np.where(vacant, "vacant", "occupied")
    rates, far = None, None
    step = frame_s or 1.0
    if len(np.unique(states)) > 1 and (np.diff(tracks.track) == 0).any():
        rates = transitions(tracks, states, step)
    if (np.diff(tracks.track) == 0).any():
        far = mean_displacement(tracks, step)
    return Motion(tracks, rates, far, frame_s)


def _with_vacant(frame: Understood | None) -> Columns:
    """The columns of a frame, and after them its vacant places with no amplitude."""
    nothing = np.zeros(0)
    if frame is None:
        return Columns(np.zeros((0, 2)), np.zeros((0, 2)), nothing, nothing, np.zeros(0, np.int64))
    columns, assigned = frame.columns, frame.assignment
    empty = np.zeros((0, 2)) if assigned is None else assigned.vacant
    m, n = len(empty), len(columns)
    sigma = np.median(columns.sigma, axis=0) if n else np.ones(2)
    return replace(
        columns,
        position=np.concatenate([columns.position, empty]),
        sigma=np.concatenate([columns.sigma, np.tile(2 * sigma, (m, 1))]),
        amplitude=np.concatenate([np.maximum(columns.amplitude, 1e-12), np.zeros(m)]),
        width=np.concatenate([columns.width, np.ones(m)]),
        sublattice=np.concatenate([columns.sublattice, np.zeros(m, np.int64)]),
        background=nothing,
        p_present=nothing,
    )


def track_of(found: Motion, k: int, n: int) -> NDArray[np.int64]:
    """(n,) the track of each of the ``n`` columns of frame ``k``."""
    rows = np.flatnonzero(found.tracks.frame == k)
    rows = rows[found.tracks.detection[rows] < n]
    out = np.full(n, -1, np.int64)
    out[found.tracks.detection[rows]] = found.tracks.track[rows]
    return out


def told(found: Motion, pixel_m: float | None) -> dict[str, object]:
    """The numbers of a motion, for the summary."""
    tracks, per = found.tracks, "s" if found.frame_s else "frame"
    lengths = np.bincount(tracks.track) if len(tracks) else np.zeros(0, int)
    said: dict[str, object] = {
        "tracks": len(tracks),
        "seen_in_half_of_the_frames": int((lengths >= 0.5 * tracks.n_frames).sum()),
        "step_px": round(float(tracks.step_px), 5),
        "events": dict(sorted(Counter(event.kind for event in tracks.events).items())),
        "reconstructions_in_frames": sorted({int(e.frame) for e in tracks.events if e.kind == "reconstruction"}),
    }
    if found.displacement is not None and np.isfinite(found.displacement.diffusion):
        unit, factor = ("px^2", 1.0) if pixel_m is None else ("pm^2", (1e12 * pixel_m) ** 2)
        said[f"diffusion_{unit}_per_{per}"] = [
            float(f"{v * factor:.4g}") for v in (found.displacement.diffusion, found.displacement.diffusion_sigma)
        ]
    if found.rates is not None:
        names = found.rates.states
        for i, j in ((0, 1), (1, 0)):
            said[f"rate_{names[i]}_to_{names[j]}_per_{per}"] = [
                float(f"{v:.4g}") for v in (found.rates.rate[i, j], found.rates.sigma[i, j])
            ]
            said[f"changes_{names[i]}_to_{names[j]}"] = int(found.rates.count[i, j])
    return said
