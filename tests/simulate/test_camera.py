import numpy as np
import pytest

from stemloop.simulate.camera import Counting

SPOT = np.zeros((33, 33))
SPOT[16, 12] = 1.0


def test_counts_are_poisson():
    rng = np.random.default_rng(0)
    counts = np.array([Counting().count(np.full((50, 50), 1 / 2500), 20_000.0, rng) for _ in range(40)])
    # 100 000 pixels of mean 8: the mean's deviation is 0.009, the variance's 0.037
    assert counts.mean() == pytest.approx(8.0, abs=0.04) and counts.var() == pytest.approx(8.0, abs=0.15)


def test_point_spread_keeps_electrons_and_has_its_width():
    mean = Counting(psf_sigma_px=1.5).mean(SPOT, 1000.0)
    rows, columns = np.indices(SPOT.shape)
    assert mean.sum() == pytest.approx(1000.0, rel=1e-6)
    assert (mean * rows).sum() / 1000 == pytest.approx(16) and (mean * columns).sum() / 1000 == pytest.approx(12)
    # a pixel's own width adds 1/12
    assert (mean * (rows - 16) ** 2).sum() / 1000 == pytest.approx(1.5**2 + 1 / 12, rel=1e-3)


def test_efficiency_and_dark_counts():
    mean = Counting(efficiency=0.8, dark=0.01).mean(SPOT, 500.0)
    assert mean.sum() == pytest.approx(400.0 + 0.01 * SPOT.size)


def test_bright_pixels_get_wider_numbers():
    rng = np.random.default_rng(0)
    assert Counting().count(SPOT, 6e4, rng).dtype == np.uint16
    assert Counting().count(SPOT, 6e6, rng).dtype == np.uint32
