"""Counting a simulated detector, whose electrons are known, against closed forms."""

import numpy as np
import pytest
from scipy.special import ndtr

from stemloop.core.errors import InputError
from stemloop.stream.counting import count, measure

DARK, NOISE, SIGNAL, SPREAD = 100.0, 6.0, 80.0, 15.0


def detector(rng, frames=60, shape=(128, 128), occupancy=0.004, dtype=np.float64):
    """Analogue frames and where their electrons are; each leaves all its signal in its pixel, none is beside one."""
    rows, columns = shape
    truth = np.zeros((frames, rows // 4, 4, columns // 4, 4), bool)
    truth[:, :, 1, :, 1] = rng.random((frames, rows // 4, columns // 4)) < 16 * occupancy
    truth = truth.reshape(frames, rows, columns)
    values = rng.normal(DARK, NOISE, truth.shape)
    values[truth] += rng.normal(SIGNAL, np.sqrt(SPREAD**2 - NOISE**2), truth.sum())
    return (np.rint(values) if np.dtype(dtype).kind in "ui" else values).astype(dtype), truth


@pytest.mark.parametrize("dtype", [np.float64, np.uint16])
def test_the_histogram_gives_dark_level_noise_and_signal(dtype):
    frames, truth = detector(np.random.default_rng(0), dtype=dtype)
    found = measure(frames)
    # 1e6 pixels: quantiles of the noise are known to 0.002 sigma; 4000 electrons: their median to 0.3, quartiles to 2 %
    assert abs(found.dark - DARK) < 0.01 * NOISE
    assert abs(found.noise - NOISE) < 0.01 * NOISE
    assert abs(found.signal - SIGNAL) < 1.2
    assert abs(found.spread - SPREAD) < 0.08 * SPREAD
    assert abs(found.occupancy - truth.mean()) < 0.02 * truth.mean()
    assert found.dark + 4 * found.noise < found.value < found.dark + found.signal


@pytest.mark.parametrize("sigmas", [2.5, 3.0, 5.0, 12.0])
def test_efficiency_and_false_counts_are_those_of_the_closed_form(sigmas):
    rng = np.random.default_rng(1)
    frames, truth = detector(rng)
    level = DARK + sigmas * NOISE
    hit = count(frames, level, DARK).dense().astype(bool)
    # noise alone: a pixel is counted when it passes and none of its eight neighbours is above it; with p the chance to
    # pass, P = integral over values of one pixel of (chance that eight others are below) = (1 - (1 - p)^9) / 9
    p = ndtr(-sigmas)
    away = np.zeros_like(truth)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            away |= np.roll(truth, (dy, dx), axis=(1, 2))
    inner = np.zeros(truth.shape[1:], bool)
    inner[1:-1, 1:-1] = True
    quiet = ~away & inner
    expected = (1 - (1 - p) ** 9) / 9 * quiet.sum()
    # maxima next to electrons' pixels are fewer, beside them not; 4 sigma of a Poisson number, neighbours lower it
    assert abs((hit & quiet).sum() - expected) < 4 * np.sqrt(expected + 1) + 0.02 * expected
    passes = ndtr((DARK + SIGNAL - level) / SPREAD)
    found = (hit & truth).sum() / truth.sum()
    assert abs(found - passes) < 4 * np.sqrt(passes * (1 - passes) / truth.sum()) + 1e-3  # a neighbour is higher: 1e-4


def test_the_measured_threshold_keeps_its_rate_of_false_counts():
    rng = np.random.default_rng(2)
    frames, _ = detector(rng, occupancy=0.0)
    found = measure(frames, false_rate=1e-4)
    number = len(count(frames, found.value).index)
    # the level is uncertain by 0.002 sigma x 4: 1 %
    assert abs(number - 1e-4 * frames.size) < 4 * np.sqrt(1e-4 * frames.size) + 0.02 * 1e-4 * frames.size
    assert found.false_rate == pytest.approx(1e-4)
    frames, truth = detector(rng)
    found = measure(frames)
    share = (count(frames, found.value).dense().astype(bool) & truth).sum() / truth.sum()
    assert abs(share - found.efficiency) < 0.003


def test_a_spread_signal_is_counted_once_at_its_centre():
    frames = np.zeros((2, 32, 32))
    frames[0, 10:12, 10:12] = [[50, 49], [49, 48]]  # four pixels, one electron
    frames[1, 5, 5:8] = [40, 30, 40]  # two maxima: the rule says two electrons
    events = count(frames, 20.0)
    assert events.indptr.tolist() == [0, 1, 3]
    frames = np.zeros((1, 9, 9))
    frames[0, 4, 3:6] = [0, 60, 58]  # the centre is nearly between both
    frames[0, 3:6, 5] += [30, 0, 30]
    assert count(frames, 59.0).index.tolist() == [4 * 9 + 4]
    assert count(frames, 59.0, centroid=True).index.tolist() == [4 * 9 + 5]


def test_equal_neighbours_are_one_electron():
    assert len(count(np.full((1, 2, 2), 7), 5.0).index) == 1


def test_electrons_in_the_corners_are_seen():
    frames = np.zeros((1, 8, 8))
    frames[0, [0, 0, 7, 7], [0, 7, 0, 7]] = 9
    assert count(frames, 5.0).index.tolist() == [0, 7, 56, 63]


def test_frames_without_noise_or_of_too_few_pixels_are_refused():
    with pytest.raises(InputError, match="constant"):
        measure(np.zeros((2, 100, 100)))
    with pytest.raises(InputError, match="at least 10000"):
        measure(np.zeros((2, 10, 10)))
    with pytest.raises(InputError, match="false_rate"):
        measure(np.zeros((2, 100, 100)), false_rate=0.5)
    with pytest.raises(InputError, match="real numbers"):
        count(np.zeros((2, 3)), 1.0)
