"""Scan lines: what is found is what was done to them, and its deviation is what is left."""

from __future__ import annotations

import numpy as np
import pytest

from reduce.moving import stack
from stemloop.core.errors import InputError
from stemloop.reduce.register import average, register
from stemloop.reduce.scanlines import line_shifts, straightened
from stemloop.simulate import pictures


def test_lines_of_a_stack_are_found_and_averages_gain():
    made = stack(n=24, size=160, dose=1e4, jitter=0.8, jumps=0, seed=2)
    found = register(made.frames)
    lines = line_shifts(made.frames, found)
    true = made.jitter - made.jitter.mean(axis=1, keepdims=True)
    away = lines.shift - true
    assert lines.wander == pytest.approx(0.8, rel=0.15)
    assert away.std() < 0.6 * true.std()
    assert 0.8 < (away / lines.sigma).std() < 1.5  # the average that lines are compared with is blurred by them
    before = average(made.frames, found).image
    after = average(made.frames, found, line_shift=lines.shift).image
    inner = (slice(20, -20), slice(20, -20))
    sharp = [np.gradient(image, axis=1)[inner].std() for image in (before, after)]
    assert sharp[1] > 1.02 * sharp[0]


def test_lines_that_remember_each_other_are_smoothed():
    rng = np.random.default_rng(3)
    walk = np.zeros(256)
    for k in range(1, 256):
        walk[k] = 0.95 * walk[k - 1] + rng.normal(0, 0.25)
    layout = pictures.layout("SrTiO3[001]", (256, 256), 15.0, margin=-20.0)
    image = pictures.counted(pictures.mean_image(layout, 1e5, row_jitter=walk), rng)
    lines = line_shifts(image)
    assert lines.memory > 0.6
    assert (lines.shift - walk + walk.mean()).std() < 0.6 * walk.std()


def test_lines_of_one_image_of_a_lattice():
    rng = np.random.default_rng(0)
    layout = pictures.layout("SrTiO3[001]", (192, 192), 15.0, 0.05, margin=-20.0)
    jitter = rng.normal(0, 0.6, 192)
    image = pictures.counted(pictures.mean_image(layout, 1e5, row_jitter=jitter), rng)
    shift, sigma = line_shifts(image)
    away = shift - (jitter - jitter.mean())
    assert away.std() < 0.25
    assert 0.6 < (away / sigma).std() < 1.5


def test_still_lines_stay():
    layout = pictures.layout("SrTiO3[001]", (160, 160), 15.0, 0.05, margin=-20.0)
    image = pictures.counted(pictures.mean_image(layout, 1e4), np.random.default_rng(1))
    assert np.abs(line_shifts(image).shift).max() < 0.25  # the bound of a line is 0.15 px


def test_straightening_undoes_a_displacement_exactly():
    rng = np.random.default_rng(2)
    x = np.arange(128)
    shift = rng.uniform(-2, 2, 64)
    image = np.cos(2 * np.pi * (x[None, :] - shift[:, None]) / 7.0)
    straight = straightened(image, shift)
    assert np.abs(straight - np.cos(2 * np.pi * x / 7.0))[:, 16:-16].max() < 0.03
    assert np.allclose(straightened(image, np.zeros(64)), image, atol=1e-12)
    assert np.isnan(straightened(image, np.full(64, 5.0))[:, -5:]).all()


def test_what_cannot_be_measured_is_refused():
    noise = np.random.default_rng(4).poisson(3.0, (64, 64))
    with pytest.raises(InputError, match="no lattice"):
        line_shifts(noise)
    with pytest.raises(InputError, match="no lattice"):
        line_shifts(np.ones((64, 64)))
    with pytest.raises(InputError, match="registration"):
        line_shifts(np.zeros((3, 64, 64)))
    with pytest.raises(InputError, match="as many line shifts"):
        straightened(noise, np.zeros(3))
