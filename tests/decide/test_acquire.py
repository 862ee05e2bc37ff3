import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

from stemloop.core.errors import InputError
from stemloop.decide.acquire import (
    ACQUISITIONS,
    Fantasies,
    expected_improvement_of,
    initial_design,
    path_length,
    short_path,
)
from stemloop.decide.gp import GaussianProcess, Hyperparameters, fit

AXIS = np.linspace(0, 10e-9, 24)
CANDIDATES = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), axis=-1).reshape(-1, 2)
H = Hyperparameters((2e-9, 2e-9), 1.0, 0.05, 0.0, 0.5)


def belief(n=20, seed=0):
    rng = np.random.default_rng(seed)
    positions = rng.uniform(0, 10e-9, (n, 2))
    values = np.exp(-np.square(positions - 6e-9).sum(axis=1) / (2 * (1.5e-9) ** 2))
    return GaussianProcess(positions, values, np.full(n, 0.05), H)


@pytest.mark.parametrize("name", ACQUISITIONS)
@pytest.mark.parametrize("n", [1, 7, 12])
def test_every_acquisition_answers_different_candidates_the_same_each_time(name, n):
    asked = [ACQUISITIONS[name](belief(), CANDIDATES, n, (0.0, 0.0), np.random.default_rng(3)) for _ in range(2)]
    assert len(set(asked[0].tolist())) == n
    assert asked[0].min() >= 0 and asked[0].max() < len(CANDIDATES)
    assert asked[0].tobytes() == asked[1].tobytes()


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_more_than_there_is_gives_all_there_is(name):
    few = CANDIDATES[::100]
    chosen = ACQUISITIONS[name](belief(), few, 50, (0.0, 0.0), np.random.default_rng(3))
    assert sorted(chosen) == list(range(len(few)))


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_nothing_to_choose_from_or_nothing_asked_is_refused(name):
    for candidates, n in ((CANDIDATES[:0], 1), (CANDIDATES, 0), (CANDIDATES.ravel(), 3)):
        with pytest.raises(InputError):
            ACQUISITIONS[name](belief(), candidates, n, (0.0, 0.0), np.random.default_rng(3))


def test_fantasies_are_the_deviations_after_measuring():
    process = belief()
    fantasies = Fantasies(process, CANDIDATES)
    for index in (5, 300, 301, 570):
        fantasies.measure(index)
        process = process.condition(CANDIDATES[index : index + 1], [0.05])
    np.testing.assert_allclose(fantasies.variance, process.deviation(CANDIDATES) ** 2, atol=1e-10)


def test_a_batch_of_uncertainty_is_that_of_choosing_one_by_one():
    process = belief()
    batch = ACQUISITIONS["uncertainty"](process, CANDIDATES, 6, (0.0, 0.0), np.random.default_rng(0))
    single = set()
    for _ in range(6):
        sigma = process.deviation(CANDIDATES)
        sigma[list(single)] = -1
        worst = int(sigma.argmax())
        single.add(worst)
        process = process.condition(CANDIDATES[worst : worst + 1], [0.05])
    assert set(batch.tolist()) == single


def test_uncertainty_reaches_a_largest_deviation_with_fewer_points_than_chance_and_than_a_grid():
    first = initial_design(CANDIDATES, 8, (0.0, 0.0), np.random.default_rng(0))
    start = GaussianProcess(CANDIDATES[first], np.zeros(8), np.full(8, 0.05), H)
    worst = {}
    for name in ("uncertainty", "random", "grid"):
        chosen = ACQUISITIONS[name](start, CANDIDATES, 32, (0.0, 0.0), np.random.default_rng(1))
        worst[name] = start.condition(CANDIDATES[chosen], np.full(32, 0.05)).deviation(CANDIDATES).max()
    assert worst["uncertainty"] < 0.95 * worst["grid"]
    assert worst["uncertainty"] < 0.7 * worst["random"]


@pytest.mark.parametrize(
    ("mean", "sigma", "best"), [(0.0, 1.0, 0.5), (2.0, 0.3, 1.0), (-1.0, 2.0, 1.5), (1.0, 0.0, 0.4)]
)
def test_expected_improvement_agrees_with_monte_carlo(mean, sigma, best):
    draws = mean + sigma * np.random.default_rng(0).normal(size=1_000_000)
    improvement = np.maximum(draws - best, 0)
    error = improvement.std() / 1000
    found = expected_improvement_of(np.array([mean]), np.array([sigma]), best)[0]
    assert found == pytest.approx(improvement.mean(), abs=5 * error + 1e-12)


def test_expected_improvement_never_falls_with_mean_or_deviation():
    z = np.linspace(-6, 6, 200)
    assert (np.diff(expected_improvement_of(z, np.ones(200), 0.0)) >= 0).all()
    assert (np.diff(expected_improvement_of(np.full(200, -1.0), np.linspace(0, 3, 200), 0.0)) >= 0).all()


def test_expected_improvement_finds_the_summit():
    summit = np.array([6.1e-9, 6.1e-9])

    def height(p):
        return np.exp(-np.square(p - summit).sum(axis=1) / (2 * (1.5e-9) ** 2))

    rng = np.random.default_rng(0)
    positions = CANDIDATES[initial_design(CANDIDATES, 10, (0.0, 0.0), rng)]
    for _ in range(4):
        process = fit(positions, height(positions), np.full(len(positions), 0.01), field_m=(10e-9, 10e-9))
        chosen = ACQUISITIONS["expected-improvement"](process, CANDIDATES, 4, tuple(positions[-1]), rng)
        positions = np.vstack([positions, CANDIDATES[chosen]])
    nearest = positions[height(positions).argmax()]
    assert np.linalg.norm(nearest - summit) < 0.6e-9  # the candidates lie 0.43 nm apart


# ---------------------------------------------------------------------------------------------------------- path


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_a_short_path_is_close_to_the_shortest(n):
    rng = np.random.default_rng(n)
    ratios = []
    for _ in range(12):
        points, start = rng.uniform(size=(n, 2)), tuple(rng.uniform(size=2))
        order = short_path(points, start)
        assert sorted(order) == list(range(n))
        shortest = min(path_length(points[list(p)], start) for p in itertools.permutations(range(n)))
        ratios.append(path_length(points[order], start) / shortest)
    # 2-opt of random points is known to end within about 5 % of the optimum on average
    assert np.mean(ratios) < 1.05 and max(ratios) < 1.35
    assert min(ratios) >= 1 - 1e-12


def test_no_turn_of_a_stretch_shortens_the_path_further():
    rng = np.random.default_rng(5)
    points, start = rng.uniform(size=(30, 2)), (0.0, 0.0)
    order = short_path(points, start)
    length = path_length(points[order], start)
    for i in range(30):
        for j in range(i + 1, 30):
            turned = order.copy()
            turned[i : j + 1] = turned[i : j + 1][::-1]
            assert path_length(points[turned], start) >= length - 1e-12


def test_places_that_coincide_are_all_visited():
    assert sorted(short_path(np.zeros((5, 2)), (0.0, 0.0))) == list(range(5))


# ------------------------------------------------------------------------------------------------- space-filling


@pytest.mark.parametrize("n", [1, 2, 10, 16, 33])
def test_the_first_positions_fill_the_field_better_than_chance(n):
    chosen = initial_design(CANDIDATES, n, (0.0, 0.0), np.random.default_rng(0))
    assert len(set(chosen.tolist())) == n

    def hole(index):
        return np.linalg.norm(CANDIDATES[:, None] - CANDIDATES[index][None], axis=2).min(axis=1).max()

    by_chance = [hole(np.random.default_rng(s).choice(len(CANDIDATES), n, replace=False)) for s in range(50)]
    assert hole(chosen) <= np.median(by_chance) * (1.3 if n < 10 else 1.0)


def test_the_first_positions_follow_their_seed():
    one, same, other = (initial_design(CANDIDATES, 12, (0.0, 0.0), np.random.default_rng(s)) for s in (1, 1, 2))
    assert one.tobytes() == same.tobytes() != other.tobytes()


def test_a_grid_of_a_square_number_is_regular():
    chosen = CANDIDATES[ACQUISITIONS["grid"](None, CANDIDATES, 16, (0.0, 0.0), np.random.default_rng(0))]
    for axis in range(2):
        levels, counts = np.unique(chosen[:, axis], return_counts=True)
        assert counts.tolist() == [4, 4, 4, 4]
        assert np.ptp(np.diff(levels)) <= AXIS[1] * 1.001


def test_candidates_on_a_line_are_spread_along_it():
    line = CANDIDATES[:24]
    for choose in (ACQUISITIONS["grid"], lambda b, *a: initial_design(*a)):
        x = np.sort(line[choose(None, line, 6, (0.0, 0.0), np.random.default_rng(0)), 1])
        assert np.diff(x).max() < 5e-9
