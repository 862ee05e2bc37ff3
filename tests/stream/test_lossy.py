"""Lossy forms: the error that is stated is the error that is measured."""

import numpy as np
import pytest

from stemloop.core.errors import InputError
from stemloop.stream import codec, lossy
from stemloop.stream import masks as m
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock
from stemloop.stream.lossy import AngularMoments, Binned, SquareRoot

SHAPE, CENTRE = (48, 48), (23.5, 23.5)
FRAMES = 1500


def block(electrons, seed=0):
    """Smooth patterns that wander a little from frame to frame, with Poisson counts."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(SHAPE)
    shift = rng.normal(0, 1.0, (FRAMES, 2, 1, 1))
    radius = np.hypot(rows - CENTRE[0] - shift[:, 0], columns - CENTRE[1] - shift[:, 1])
    pattern = np.exp(-((radius / 9) ** 2)) + 0.02
    pattern /= pattern.sum(axis=(1, 2), keepdims=True)
    return DenseBlock(rng.poisson(electrons * pattern).astype(np.uint16))


RING = m.rings(SHAPE, CENTRE, np.array([8, 20]))
DETECTORS = np.stack([RING == 0, np.indices(SHAPE)[0] < 20]).astype(np.uint8)


def same(measured, stated, spread=4.0):
    """Noise agrees within 4 sigma of a deviation over FRAMES frames (1.8 % each), bias is 0 within 4 of a mean."""
    relative = spread / np.sqrt(2 * FRAMES)
    for noise, expected in ((measured.com_noise, stated.com_noise), (measured.detectors_noise, stated.detectors_noise)):
        assert np.all(np.abs(noise - expected) <= relative * expected + 1e-12), (noise, expected)
    for bias, noise in ((measured.com_bias, stated.com_noise), (measured.detectors_bias, stated.detectors_noise)):
        assert np.all(np.abs(bias) <= spread * noise / np.sqrt(FRAMES) + 1e-12), (bias, noise)


@pytest.mark.parametrize("electrons", [2000, 200_000])
@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
def test_square_root_levels_add_the_noise_that_is_stated_and_no_bias(electrons, step):
    frames = block(electrons)
    square_root = SquareRoot(step)
    again = codec.decode(square_root.encode(frames))
    stated = square_root.stated(frames, DETECTORS)
    same(lossy.measured(frames, DETECTORS, again.moments(), again.dot(DETECTORS)), stated)
    if electrons > 100_000:  # many levels: step / sqrt(6) of the shot noise; counts below (2 / step)^2 are exact
        assert stated.detectors_noise == pytest.approx(step / np.sqrt(6), rel=0.1)


def test_square_root_keeps_single_electrons_exactly():
    frames = block(200)
    assert np.array_equal(SquareRoot(0.5).decode(SquareRoot(0.5).encode(frames)).dense() == 0, frames.dense() == 0)
    small = DenseBlock(np.minimum(frames.dense(), 2))
    assert np.array_equal(SquareRoot(0.5).decode(SquareRoot(0.5).encode(small)).dense(), small.dense())


def test_square_root_takes_less_room_than_no_loss():
    frames = block(200_000)
    sizes = [len(codec.encode(frames)), *(len(SquareRoot(step).encode(frames)) for step in (0.5, 1.0, 2.0))]
    assert sizes == sorted(sizes, reverse=True)
    assert SquareRoot(1.0).encode(frames) == SquareRoot(1.0).encode(frames)


@pytest.mark.parametrize("factor", [2, 4])
def test_binning_adds_the_noise_that_is_stated(factor):
    frames = block(400)
    binned = Binned(factor)
    small = codec.decode(binned.encode(EventBlock.of(frames)))
    assert small.shape == (SHAPE[0] // factor, SHAPE[1] // factor)
    assert np.array_equal(small.moments()[:, 0], frames.moments()[:, 0])
    found = lossy.measured(frames, DETECTORS, binned.moments(small), small.dot(binned.small(DETECTORS)))
    stated = binned.stated(frames, DETECTORS)
    assert found.com_noise == pytest.approx(stated.com_noise, rel=4 / np.sqrt(2 * FRAMES))
    # the pattern falls over a bin: a bias of b^2 / 12 x slope, which averages out over a symmetric pattern
    assert np.all(np.abs(found.com_bias) < 4 * stated.com_noise / np.sqrt(FRAMES))
    assert stated.detectors_noise[1] == 0 and found.detectors_noise[1] == 0  # row 20 is the edge of a bin
    # on the ring's edge a bin's electrons are not spread quite evenly
    assert found.detectors_noise[0] == pytest.approx(stated.detectors_noise[0], rel=0.1)
    assert abs(found.detectors_bias[0]) < 0.2 * factor / 2


def test_angular_moments_keep_ring_detectors_exactly_and_state_the_rest():
    edges = np.arange(0, 37, 4.0)
    frames = block(400)
    kept = AngularMoments(EventBlock.of(frames), CENTRE, edges)
    weights = np.stack([np.arange(9) < 3, np.arange(9) / 9.0])
    masks = np.append(weights, np.zeros((2, 1)), axis=1)[:, m.rings(SHAPE, CENTRE, edges)]
    found = lossy.measured(frames, masks, kept.moments(), kept.detectors(weights))
    stated = kept.stated(frames, weights)
    assert np.all(np.abs(found.detectors_noise) < 1e-12) and np.all(stated.detectors_noise == 0)
    # the innermost rings have few pixels, over which the pattern is not quite even
    assert found.com_noise == pytest.approx(stated.com_noise, rel=0.1)
    assert np.all(np.abs(found.com_bias) < 0.05)
    assert kept.nbytes < frames.nbytes / 10


def test_wrong_words_are_refused_and_each_loss_is_stated():
    for make, says in (
        (lambda: SquareRoot(0), "part of the shot noise"),
        (lambda: Binned(1), "whole number from 2"),
        (lambda: Binned(5).encode(block(10)), "does not divide"),
        (lambda: AngularMoments(block(10), CENTRE, np.array([0, 5]), 0), "order of at least 1"),
    ):
        with pytest.raises(InputError, match=says):
            make()
    assert SquareRoot(1.0).loss.endswith("no bias, noise up 8.0 %") and "0.25 px^2" in Binned(2).loss
    assert "rings" in AngularMoments(block(10), CENTRE, np.array([0, 5])).loss
