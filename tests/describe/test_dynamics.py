"""Tracks, rates and displacements against simulated motion whose answer is known in closed form."""

import numpy as np
import pytest
from scipy.linalg import expm

from stemloop.core.errors import InputError
from stemloop.core.structure import Columns
from stemloop.describe.dynamics import Tracks, link, mean_displacement, transitions


def columns(position, sigma=0.05, amplitude=1.0):
    n = len(position)
    place = np.asarray(position, dtype=float).reshape(-1, 2)
    bright = np.broadcast_to(amplitude, (n,)).astype(float)
    return Columns(place, np.full((n, 2), sigma), bright, np.full(n, 3.0), np.zeros(n, np.int64))


def grid(n=12, spacing=18.0):
    return np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), -1).reshape(-1, 2) * spacing + 20


def purity(tracks, truth):
    """Share of tracks whose detections are all of one true column, and how many tracks a column has on average."""
    whose = tracks.of_frames(truth)
    pure = [len(np.unique(whose[tracks.rows(t)])) == 1 for t in range(len(tracks))]
    return np.mean(pure), len(tracks) / len(np.unique(whose))


def film(rng, shift, present=0.9, sigma=0.05, points=None):
    """Frames of a lattice, some columns missing in each and all in random order, and which is which."""
    points = grid() if points is None else points
    frames, truth = [], []
    for moved in shift:
        seen = rng.permutation(np.flatnonzero(rng.random(len(points)) < present))
        frames.append(columns(points[seen] + moved + rng.normal(0, sigma, (len(seen), 2)), sigma))
        truth.append(seen)
    return frames, truth


def test_columns_of_a_drifting_lattice_are_linked_through_gaps():
    rng = np.random.default_rng(1)
    shift = np.cumsum(rng.normal(0, 3, (30, 2)), axis=0)
    frames, truth = film(rng, shift)
    tracks = link(frames, shift, gap=3)
    pure, parts = purity(tracks, truth)
    assert pure == 1.0
    # a track ends where a column is missed four times running: 0.1^4 of 27 chances
    assert parts < 1.02
    assert tracks.events == ()
    assert len(tracks.track) == sum(map(len, frames))  # every detection is in exactly one track


def test_without_shifts_drift_and_a_jump_are_found():
    rng = np.random.default_rng(2)
    shift = np.cumsum(rng.normal(0, 1, (20, 2)), axis=0)
    shift[10:] += [6, -5]
    frames, truth = film(rng, shift)
    tracks = link(frames)
    assert purity(tracks, truth)[0] == 1.0
    assert np.abs((tracks.shift - tracks.shift[0]) - (shift - shift[0])).max() < 0.1


def test_a_jump_longer_than_the_lattice_is_found_where_columns_have_no_period():
    rng = np.random.default_rng(3)
    points = rng.uniform(0, 400, (60, 2))
    shift = np.zeros((6, 2))
    shift[3:] = [57, -80]
    frames, truth = film(rng, shift, points=points)
    assert purity(link(frames, longest_step_px=4.0), truth)[0] == 1.0


def test_frames_without_a_shift_or_without_columns_are_gaps():
    rng = np.random.default_rng(4)
    shift = np.zeros((8, 2))
    frames, truth = film(rng, shift, present=1.0)
    frames[3] = columns(np.zeros((0, 2)))
    truth[3] = truth[3][:0]
    shift[5] = np.nan
    tracks = link(frames, shift)
    assert purity(tracks, truth) == (1.0, 1.0)
    assert not np.isin(tracks.frame, [3, 5]).any()


def test_the_assignment_is_the_best_as_a_whole():
    # two columns move by 0.4 spacing in a row: the nearest column of the first is the old place of the second
    before, after = columns([[50.0, 50.0], [50.0, 60.0]], 0.1), columns([[50.0, 56.0], [50.0, 66.0]], 0.1)
    tracks = link([before, after], np.zeros((2, 2)), longest_step_px=7.0, step_px=3.0)
    assert len(tracks) == 2
    assert all(tracks.detection[tracks.rows(t)].tolist() in ([0, 0], [1, 1]) for t in range(2))


def test_merges_and_splits_are_named():
    apart, one = columns([[50.0, 50.0], [50.0, 54.0], [80.0, 80.0]]), columns([[50.0, 52.0], [80.0, 80.0]])
    one = columns(one.position, amplitude=[2.0, 1.0])
    tracks = link([apart, apart, one, one, one, one, apart, apart], np.zeros((8, 2)), longest_step_px=5.0, step_px=1.0)
    assert [(e.kind, e.frame) for e in tracks.events] == [("merge", 2), ("split", 6)]
    assert all(np.allclose(e.place, [50, 52]) or np.allclose(e.place[0], 50) for e in tracks.events)


def test_a_reconstruction_is_named_and_drift_is_not():
    rng = np.random.default_rng(5)
    frames, _ = film(rng, np.zeros((12, 2)), present=1.0)
    lot = np.hypot(*(grid() - 100).T) < 60
    moved = grid() + np.where(lot[:, None], [2.5, 0.0], 0.0)
    for k in range(7, 12):
        frames[k] = columns(moved + rng.normal(0, 0.05, moved.shape))
    (event,) = link(frames, np.zeros((12, 2))).events
    assert (event.kind, event.frame, len(event.tracks)) == ("reconstruction", 7, lot.sum())
    assert np.hypot(*(event.place - 100)) < 20


def looked_at(generator, sites, looks, dt, present, rng):
    """Tracks and states of sites that follow the chain, seen now and then."""
    chance = expm(generator * dt).cumsum(axis=1)
    state = np.zeros((sites, looks), int)
    state[:, 0] = rng.integers(0, len(generator), sites)
    for k in range(1, looks):
        state[:, k] = (rng.random(sites)[:, None] > chance[state[:, k - 1]]).sum(axis=1)
    track, frame = np.nonzero(rng.random(state.shape) < present)
    none = np.zeros((len(track), 2))
    return Tracks(track, frame, track, none, none, none[:, 0], np.zeros((looks, 2)), 0.0, ()), state[track, frame]


def generator_of(rate):
    rate = np.asarray(rate, dtype=float)
    return rate - np.diag(rate.sum(axis=1))


RATE = np.array([[0.0, 0.5, 0.1], [1.2, 0.0, 0.3], [0.2, 0.9, 0.0]])


def test_rates_of_a_chain_are_found_with_calibrated_deviations():
    # frames are as slow as the chain: a third of the changes is not seen; a fifth of the looks is missing
    off = ~np.eye(3, dtype=bool)
    z = []
    for seed in range(12):
        tracks, states = looked_at(generator_of(RATE), 120, 60, 0.4, 0.8, np.random.default_rng(seed))
        found = transitions(tracks, states, 0.4)
        z.append(((found.rate - RATE)[off]) / found.sigma[off])
    z = np.array(z)
    # 72 normal deviates: their mean is within 3 / sqrt(72) of 0 and their deviation within 0.25 of 1
    assert abs(z.mean()) < 0.36
    assert 0.75 < z.std() < 1.25


def test_slow_changes_give_the_count_over_the_time():
    rate = [[0.0, 0.01], [0.02, 0.0]]
    tracks, states = looked_at(generator_of(rate), 400, 50, 0.1, 1.0, np.random.default_rng(0))
    found = transitions(tracks, states, 0.1)
    for i, j in ((0, 1), (1, 0)):
        n, time = found.count[i, j], found.time_s[i]
        assert found.rate[i, j] == pytest.approx((n + 0.5) / time, rel=0.02)  # what is missed between frames: 0.2 %
        assert found.sigma[i, j] == pytest.approx(np.sqrt(n + 0.5) / time, rel=0.05)
    balance = found.occupation @ generator_of(found.rate)
    assert np.allclose(balance, 0, atol=1e-12) and found.occupation.sum() == pytest.approx(1)


def test_changes_as_fast_as_the_frames_are_found_and_faster_ones_said_to_be_unknown():
    frame_s = 1.0
    for rate, known in ((1.0, True), (20.0, False)):
        z = []
        for seed in range(6):
            chain = generator_of([[0.0, rate], [rate, 0.0]])
            tracks, states = looked_at(chain, 100, 40, frame_s, 1.0, np.random.default_rng(seed))
            found = transitions(tracks, states, frame_s)
            z.append((found.rate[0, 1] - rate) / found.sigma[0, 1])
            # two frames share exp(-2) of a correlation at 1 a frame, known to 0.016: the rate to 6 %
            assert (found.sigma[0, 1] < 0.2 * rate) if known else (found.sigma[0, 1] > found.rate[0, 1])
            assert found.occupation[0] == pytest.approx(0.5, abs=0.05)
        assert np.abs(z).max() < 3.5


def test_a_change_that_was_never_seen_has_an_upper_limit():
    track = np.repeat(np.arange(20), 10)
    states = np.repeat(np.where(np.arange(20) < 10, "full", "empty"), 10)
    none = np.zeros((200, 2))
    tracks = Tracks(track, np.tile(np.arange(10), 20), track, none, none, none[:, 0], np.zeros((10, 2)), 0.0, ())
    found = transitions(tracks, states, 2.0)
    assert found.states == ("empty", "full") and found.count[0, 1] == 0
    assert found.rate[0, 1] == pytest.approx(0.5 / 180, rel=0.05) and found.sigma[0, 1] > found.rate[0, 1]


def brownian(diffusion, sigma, dt, seed, n=60, looks=60):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 3000, (n, 2))
    path = start + np.cumsum(rng.normal(0, np.sqrt(2 * diffusion * dt), (looks, n, 2)), axis=0)
    return [columns(p + rng.normal(0, sigma, p.shape), sigma) for p in path]


def test_brownian_motion_gives_4_d_t():
    diffusion, sigma, dt = 0.3, 0.2, 0.1
    z, z_square = [], []
    for seed in range(8):
        tracks = link(brownian(diffusion, sigma, dt, seed), np.zeros((60, 2)), longest_step_px=4.0)
        found = mean_displacement(tracks, dt)
        z.append((found.diffusion - diffusion) / found.diffusion_sigma)
        z_square.append(((found.square - 4 * diffusion * found.lag_s) / found.sigma)[[0, 4, 14]])
        assert found.noise[0] == pytest.approx(4 * sigma**2)
        assert found.localisation_px == pytest.approx(sigma, rel=0.15)
    assert abs(np.mean(z)) < 3 / np.sqrt(8) and np.std(z) < 2
    assert np.abs(np.mean(z_square, axis=0)).max() < 4 / np.sqrt(8)


def test_a_lattice_that_stands_still_does_not_diffuse():
    rng = np.random.default_rng(7)
    frames, _ = film(rng, np.zeros((40, 2)))
    found = mean_displacement(link(frames, np.zeros((40, 2))), 0.5)
    assert abs(found.diffusion) < 3 * found.diffusion_sigma
    assert (np.abs(found.square) < 3.5 * found.sigma).all()
    assert found.localisation_px == pytest.approx(0.05, rel=0.1)


def test_what_cannot_be_is_refused():
    still = columns(grid())
    with pytest.raises(InputError, match="no frames"):
        link([])
    with pytest.raises(InputError, match="shape"):
        link([still, still], np.zeros((3, 2)))
    for bad in (columns(np.vstack([grid(), [[np.nan, 3.0]]])), columns(grid(), np.nan)):
        with pytest.raises(InputError, match="frame 1 are not finite"):
            link([still, bad])
    with pytest.raises(InputError, match="above 0"):
        link([still, still], longest_step_px=float("nan"))
    tracks = link([still, still], np.zeros((2, 2)))
    with pytest.raises(InputError, match="two states"):
        transitions(tracks, np.zeros(len(tracks.track)), 1.0)
    with pytest.raises(InputError, match="no displacement"):
        mean_displacement(link([still], np.zeros((1, 2))))
    with pytest.raises(InputError, match="above 0"):
        mean_displacement(tracks, 0.0)
    assert len(link([columns(np.zeros((0, 2)))] * 3)) == 0
