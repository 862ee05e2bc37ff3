import itertools

import numpy as np

from stemloop.learn.calibrate import COVERAGE, DOSE_EDGES, factors, scaled
from stemloop.learn.examples import poisson


def test_calibrated_deviations_cover_what_they_say_in_every_bin_of_dose():
    rng = np.random.default_rng(0)
    n = 60_000
    phase, dose = rng.integers(0, 3, n), 10 ** rng.uniform(DOSE_EDGES[0], DOSE_EDGES[-1], n)
    sigma = rng.uniform(0.5, 2.0, (n, 7))
    truth = sigma * (1.5 + phase[:, None]) * (dose[:, None] / 1e5) ** 0.1
    error = truth * rng.normal(size=(n, 7))
    half = np.arange(n) < n // 2
    factor = factors(error[half], sigma[half], phase[half], dose[half])
    calibrated = scaled(sigma[~half], phase[~half], dose[~half], factor)
    within = np.abs(error[~half]) < 2 * calibrated
    for p in range(3):
        for low, high in itertools.pairwise(DOSE_EDGES):
            here = (phase[~half] == p) & (np.log10(dose[~half]) >= low) & (np.log10(dose[~half]) < high)
            # 2000 draws in each of two halves: a share of 0.9545 varies by 0.0066; four times that, and 0.01 for
            # the dose dependence within a bin
            np.testing.assert_allclose(within[here].mean(0), COVERAGE, atol=0.037)


def test_counts_have_the_mean_and_variance_of_poisson_on_both_sides_of_the_switch():
    rng = np.random.default_rng(1)
    for mean in (0.3, 8.0, 49.0, 51.0, 400.0):
        counts = poisson(np.full(200_000, mean, dtype=np.float32), rng)
        # 200k draws: the mean varies by sqrt(mean / n), the variance by about mean sqrt(2 / n) (+ 1/12 from rounding)
        assert abs(counts.mean() - mean) < 5 * np.sqrt(mean / len(counts)) + 1e-3
        assert abs(counts.var() - mean) < 0.02 * mean + 0.1
        assert counts.min() >= 0 and np.array_equal(counts, np.rint(counts))
