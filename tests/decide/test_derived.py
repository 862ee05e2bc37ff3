"""A property derived from believed fields."""

import numpy as np
import pytest

from stemloop.core.errors import InputError
from stemloop.decide.acquire import ACQUISITIONS
from stemloop.decide.derived import DEFAULT_PRIOR, Derived, fit_derived
from stemloop.decide.gp import fit

FIELD = (10e-9, 10e-9)


def measured(n=40, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    positions = rng.uniform(0, 10e-9, (n, 2))
    y, x = (positions / 10e-9).T
    fields = np.stack([np.sin(4 * y) * np.cos(3 * x), np.cos(5 * x + y)], axis=1)
    return positions, fields + noise * rng.normal(size=fields.shape), np.full(fields.shape, noise)


def first(mean):
    return lambda variance: (mean[0], np.sqrt(variance[0]))


def square_sum(mean):
    def moments(variance):
        return (mean**2 + variance).sum(0), np.sqrt((4 * mean**2 * variance + 2 * variance**2).sum(0))

    return moments


def test_a_property_that_is_one_of_the_fields_is_that_field():
    positions, values, sigmas = measured()
    derived = fit_derived(positions, values, sigmas, first, field_m=FIELD)
    alone = fit(positions, values[:, 0], sigmas[:, 0], field_m=FIELD, caution=0.8, prior=DEFAULT_PRIOR)
    places = np.random.default_rng(1).uniform(0, 10e-9, (50, 2))
    for a, b in zip(derived.predict(places), alone.predict(places), strict=True):
        np.testing.assert_array_equal(a, b)
    choose = ACQUISITIONS["uncertainty"]
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(
        choose(derived, places, 5, (0.0, 0.0), rng), choose(alone, places, 5, (0.0, 0.0), rng)
    )


def test_moments_of_a_sum_of_squares_against_sampling():
    positions, values, sigmas = measured()
    derived = fit_derived(positions, values, sigmas, square_sum, field_m=FIELD)
    place = np.array([[4e-9, 6e-9]])
    mean, sigma = derived.predict(place)
    rng = np.random.default_rng(2)
    known = [field.predict(place) for field in derived.fields]
    drawn = sum((m[0] + s[0] * rng.normal(size=400_000)) ** 2 for m, s in known)
    # 400,000 draws: the mean varies by sigma / 632, the deviation by about 0.2 %; five times that
    assert mean[0] == pytest.approx(drawn.mean(), abs=0.008 * sigma[0])
    assert sigma[0] == pytest.approx(drawn.std(), rel=0.01)


def test_imagined_measurements_lower_the_variance_as_real_ones_do():
    positions, values, sigmas = measured()
    derived = fit_derived(positions, values, sigmas, square_sum, field_m=FIELD)
    places = np.random.default_rng(3).uniform(0, 10e-9, (30, 2))
    imagined = derived.imagine(places)
    imagined.measure(7)
    means = np.array([field.predict(places)[0] for field in derived.fields])
    after = [field.condition(places[7:8], sigmas[:1, k]) for k, field in enumerate(derived.fields)]
    expected = square_sum(means)(np.array([field.deviation(places) ** 2 for field in after]))[1]
    np.testing.assert_allclose(np.sqrt(imagined.variance), expected, rtol=1e-6)


def test_columns_that_do_not_match_are_refused():
    positions, values, sigmas = measured()
    with pytest.raises(InputError, match="both be"):
        fit_derived(positions, values, sigmas[:, :1], first, field_m=FIELD)


def test_it_is_a_value():
    positions, values, sigmas = measured()
    derived = fit_derived(positions, values, sigmas, first, field_m=FIELD)
    assert isinstance(derived, Derived)
    with pytest.raises(AttributeError):
        derived.fields = ()
