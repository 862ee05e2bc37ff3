"""Noise: the inverse transform against sums over the Poisson distribution, the estimate against what was drawn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from stemloop.core.noise import Noise, noise_of, restored, stabilised
from stemloop.simulate import pictures


@pytest.mark.parametrize("gain", [1.0, 3.7])
@pytest.mark.parametrize("mean", [0.01, 0.3, 1.0, 4.2, 25.0, 59.0, 300.0])
def test_the_inverse_is_unbiased(mean, gain):
    noise = Noise(gain, 0.0)
    counts = np.arange(0, int(mean + 12 * np.sqrt(mean) + 20))
    transformed = stats.poisson.pmf(counts, mean) @ stabilised(gain * counts, noise)
    assert restored(np.array([transformed]), noise)[0] == pytest.approx(gain * mean, rel=2e-3, abs=1e-4)


def test_the_inverse_is_unbiased_with_read_noise_and_with_a_pedestal():
    rng = np.random.default_rng(0)
    for floor, offset, read in ((4.0, 0.0, 2.0), (-10.0, 10.0, 0.0)):
        noise = Noise(1.0, floor)
        level = rng.poisson(6.0, 400_000) + rng.normal(0, read, 400_000) + offset
        mean = stabilised(level, noise).mean()
        # the mean of 4e5 levels is known to 0.004, twice that through the transform
        assert restored(np.array([mean]), noise)[0] == pytest.approx(6 + offset, abs=0.02)


def test_the_transform_evens_the_noise():
    rng = np.random.default_rng(1)
    for mean in (4.0, 20.0, 200.0):
        assert stabilised(2 * rng.poisson(mean, 100_000), Noise(2.0, 0.0)).std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("gain", "read"), [(1.0, 0.0), (2.5, 0.0), (1.0, 3.0)])
def test_noise_is_read_from_the_image(gain, read):
    rng = np.random.default_rng(2)
    layout = pictures.layout("SrTiO3[001]", (384, 384), 15.0, 0.1, margin=-20.0)
    image = gain * pictures.counted(pictures.mean_image(layout, 3e4), rng) + rng.normal(0, read, (384, 384))
    noise = noise_of(image)
    expected = gain * image.mean() + read**2
    assert float(noise.gain * image.mean() + noise.floor) == pytest.approx(expected, rel=0.05)
    assert noise.gain == pytest.approx(gain, rel=0.2)


def test_images_without_noise_or_without_anything():
    assert noise_of(np.full((32, 32), 5.0)) == Noise(0.0, 0.0)
    assert noise_of(np.zeros((1, 1))) == Noise(0.0, 0.0)
    assert noise_of(np.full((32, 32), np.nan)) == Noise(0.0, 0.0)
    image = np.random.default_rng(3).normal(100, 2, (64, 64))
    image[5, 5] = np.nan
    noise = noise_of(image)
    assert noise.gain * 100 + noise.floor == pytest.approx(4, rel=0.25)
