import json
import os
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest
from scipy.optimize import approx_fprime
from scipy.special import gamma, kv
from scipy.stats import multivariate_normal

from stemloop.core.errors import CalculationError, InputError, UnknownName
from stemloop.core.protocols import Belief
from stemloop.decide.gp import JITTER, KERNELS, GaussianProcess, Hyperparameters, LogNormal, Prior, _Objective, fit

FIELD = (10e-9, 10e-9)
PLAIN = Hyperparameters(lengths_m=(2e-9, 3e-9), amplitude=1.5, noise=0.1, mean=0.4, mean_sigma=0.7)


def measured(n=25, seed=0, noise=0.1):
    """Positions (n, 2) [m] in the field, values and deviations of a smooth field."""
    rng = np.random.default_rng(seed)
    positions = rng.uniform(0, 10e-9, (n, 2))
    field = np.sin(positions[:, 0] / 2e-9) + np.cos(positions[:, 1] / 3e-9)
    sigmas = noise * rng.uniform(0.5, 1.5, n)
    return positions, field + sigmas * rng.normal(size=n), sigmas


def some(n, seed=9):
    return np.random.default_rng(seed).uniform(0, 10e-9, (n, 2))


def dense_covariance(h, a, b):
    """The prior, entry by entry, from the textbook's general Matern formula with a Bessel function."""
    nu = {"matern52": 2.5, "matern32": 1.5}.get(h.kernel)
    out = np.empty((len(a), len(b)))
    for i, p in enumerate(a):
        for j, q in enumerate(b):
            r = np.hypot((p[0] - q[0]) / h.lengths_m[0], (p[1] - q[1]) / h.lengths_m[1])
            if nu is None:
                k = np.exp(-(r**2) / 2)
            elif r == 0:
                k = 1.0
            else:
                s = np.sqrt(2 * nu) * r
                k = 2 ** (1 - nu) / gamma(nu) * s**nu * kv(nu, s)
            out[i, j] = h.amplitude**2 * k + h.mean_sigma**2
    return out


@pytest.mark.parametrize("kernel", KERNELS)
def test_everything_agrees_with_the_joint_normal_written_out(kernel):
    positions, values, sigmas = measured(12)
    h = replace(PLAIN, kernel=kernel)
    process = GaussianProcess(positions, values, sigmas, h)
    at = some(7)
    noisy = dense_covariance(h, positions, positions) + np.diag(sigmas**2 + h.noise**2 + JITTER * h.amplitude**2)
    cross = dense_covariance(h, at, positions)
    wanted_mean = h.mean + cross @ np.linalg.solve(noisy, values - h.mean)
    wanted_covariance = dense_covariance(h, at, at) - cross @ np.linalg.solve(noisy, cross.T)
    mean, sigma = process.predict(at)
    np.testing.assert_allclose(mean, wanted_mean, rtol=1e-8)
    np.testing.assert_allclose(sigma**2, np.diag(wanted_covariance), rtol=1e-7)
    np.testing.assert_allclose(process.covariance(at, at), wanted_covariance, atol=1e-9)
    likelihood = multivariate_normal(np.full(12, h.mean), noisy).logpdf(values)
    assert process.log_marginal_likelihood == pytest.approx(likelihood, rel=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("anisotropic", [False, True])
def test_analytic_gradient_is_the_finite_difference(kernel, anisotropic):
    positions, values, sigmas = measured()
    objective = _Objective(
        positions, values, sigmas, kernel=kernel, anisotropic=anisotropic, prior=Prior(), field_m=10e-9
    )
    rng = np.random.default_rng(1)
    for _ in range(3):
        u = objective.centre + rng.normal(0, 0.5, len(objective.centre))
        numeric = approx_fprime(u, lambda v: objective(v)[0], 1e-6)
        # forward differences of a number near 50 at a step of 1e-6: rounding 1e-8, curvature 1e-5
        np.testing.assert_allclose(objective(u)[1], numeric, rtol=1e-4, atol=2e-4)


def test_gradient_by_the_trust_is_the_finite_difference():
    positions, values, sigmas = measured()
    prior = Prior(trust=LogNormal(1.0, 0.5))
    objective = _Objective(positions, values, sigmas, kernel="matern52", anisotropic=False, prior=prior, field_m=10e-9)
    u = objective.centre + np.array([0.2, -0.3, 0.4, 0.5])
    numeric = approx_fprime(u, lambda v: objective(v)[0], 1e-6)
    np.testing.assert_allclose(objective(u)[1], numeric, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_deviations_that_are_off_by_a_factor_are_found_out(factor):
    rng = np.random.default_rng(5)
    positions = rng.uniform(0, 10e-9, (150, 2))
    y, x = (positions / 10e-9).T
    true = 0.2 * rng.uniform(0.7, 1.4, 150)
    values = np.sin(5 * y) * np.cos(4 * x) + true * rng.normal(size=150)
    prior = Prior(noise=LogNormal(0.003, 0.5), trust=LogNormal(1.0, 0.7))
    h = fit(positions, values, factor * true, field_m=FIELD, prior=prior, caution=0.0).hyperparameters
    # 150 deviations give their scale to 1/sqrt(300) = 6 %; three times that, and a little for the field's doubt
    assert h.trust * factor == pytest.approx(1.0, rel=0.2)


def test_objective_is_the_likelihood_and_the_prior():
    positions, values, sigmas = measured()
    prior = Prior()
    objective = _Objective(positions, values, sigmas, kernel="matern52", anisotropic=True, prior=prior, field_m=10e-9)
    u = objective.centre + 0.3
    l0, l1, amplitude, noise = np.exp(u)
    h = Hyperparameters((10e-9 * l0, 10e-9 * l1), amplitude, noise, 0.0, prior.mean_sigma)
    log_prior = -0.5 * sum((0.3 / p.width) ** 2 for p in (prior.length, prior.length, prior.amplitude, prior.noise))
    likelihood = GaussianProcess(positions, values, sigmas, h).log_marginal_likelihood
    assert objective(u)[0] == pytest.approx(-likelihood - log_prior, rel=1e-10)


def test_fit_ends_where_the_gradient_vanishes():
    positions, values, sigmas = measured(40)
    free = fit(positions, values, sigmas, field_m=FIELD, caution=0.0).hyperparameters
    spread = values.std()
    objective = _Objective(
        positions, (values - values.mean()) / spread, sigmas / spread,
        kernel="matern52", anisotropic=False, prior=Prior(), field_m=10e-9,
    )  # fmt: skip
    u = np.log([free.lengths_m[0] / 10e-9, free.amplitude / spread, free.noise / spread])
    assert np.abs(objective(u)[1]).max() < 0.1  # of an objective near 30, in units of one e-fold
    for step in 0.2 * np.vstack([np.eye(3), -np.eye(3)]):
        assert objective(u + step)[0] > objective(u)[0]


def test_without_noise_the_data_are_interpolated():
    positions, values, _ = measured(noise=0.0)
    process = GaussianProcess(positions, values, np.zeros(len(values)), replace(PLAIN, noise=0.0))
    mean, sigma = process.predict(positions)
    np.testing.assert_allclose(mean, values, atol=1e-5)
    assert sigma.max() < 1e-3


def test_far_from_all_data_the_prior_of_field_and_mean_comes_back():
    positions, values, sigmas = measured()
    mean, sigma = GaussianProcess(positions, values, sigmas, replace(PLAIN, mean_sigma=0.0)).predict([[1.0, 1.0]])
    assert mean[0] == pytest.approx(PLAIN.mean)
    assert sigma[0] == pytest.approx(PLAIN.amplitude)


@pytest.mark.parametrize("kernel", KERNELS)
def test_leave_one_out_is_that_of_brute_force(kernel):
    positions, values, sigmas = measured(15)
    h = replace(PLAIN, kernel=kernel)
    mean, sigma = GaussianProcess(positions, values, sigmas, h).loo()
    for i in range(15):
        rest = np.arange(15) != i
        m, s = GaussianProcess(positions[rest], values[rest], sigmas[rest], h).predict(positions[i : i + 1])
        noise2 = sigmas[i] ** 2 + h.noise**2 + JITTER * h.amplitude**2
        assert mean[i] == pytest.approx(m[0], rel=1e-7, abs=1e-9)
        assert sigma[i] == pytest.approx(np.sqrt(s[0] ** 2 + noise2), rel=1e-7)


def test_conditioning_on_places_alone_gives_the_deviations_of_measuring_there():
    positions, values, sigmas = measured(30)
    part = GaussianProcess(positions[:20], values[:20], sigmas[:20], PLAIN)
    grown = part.condition(positions[20:26], sigmas[20:26]).condition(positions[26:], sigmas[26:])
    whole = GaussianProcess(positions, values, sigmas, PLAIN)
    at = some(50)
    np.testing.assert_allclose(grown.deviation(at), whole.predict(at)[1], rtol=1e-9)
    np.testing.assert_allclose(grown.covariance(at, at), whole.covariance(at, at), atol=1e-12)
    for ask in (lambda: grown.predict(at), grown.loo, lambda: grown.log_marginal_likelihood):
        with pytest.raises(InputError, match="without values"):
            ask()


def test_deviations_never_rise_with_data():
    positions, values, sigmas = measured(30)
    at = some(200)
    before = np.full(200, np.inf)
    for n in (1, 2, 5, 10, 20, 30):
        after = GaussianProcess(positions[:n], values[:n], sigmas[:n], PLAIN).predict(at)[1]
        assert (after <= before * (1 + 1e-9)).all()
        before = after


def test_covariance_is_symmetric_and_positive():
    process = GaussianProcess(*measured(), PLAIN)
    at = some(40)
    covariance = process.covariance(at, at)
    np.testing.assert_allclose(covariance, covariance.T, atol=1e-12)
    assert np.linalg.eigvalsh(covariance).min() > -1e-10


def test_the_order_of_the_data_does_not_matter():
    positions, values, sigmas = measured(30)
    shuffled = np.random.default_rng(2).permutation(30)
    one = fit(positions, values, sigmas, field_m=FIELD)
    other = fit(positions[shuffled], values[shuffled], sigmas[shuffled], field_m=FIELD)
    at = some(50)
    # both stop within L-BFGS-B's tolerance (relative 1e-6 of the objective) of the same maximum
    np.testing.assert_allclose(one.predict(at), other.predict(at), rtol=1e-3, atol=1e-4)


def test_the_same_data_and_start_give_the_same_bits():
    data = measured(40)
    start = fit(*(d[:30] for d in data), field_m=FIELD).hyperparameters
    one, other = (fit(*data, field_m=FIELD, start=start) for _ in range(2))
    assert one.hyperparameters == other.hyperparameters
    assert one.predict(some(99))[1].tobytes() == other.predict(some(99))[1].tobytes()


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (27.2, -1e3), (1e6, 5e7)])
def test_the_unit_of_the_values_does_not_matter(scale, shift):
    positions, values, sigmas = measured(30)
    at = some(50)
    mean, sigma = fit(positions, values, sigmas, field_m=FIELD).predict(at)
    m, s = fit(positions, scale * values + shift, scale * sigmas, field_m=FIELD).predict(at)
    np.testing.assert_allclose((m - shift) / scale, mean, atol=1e-4)
    np.testing.assert_allclose(s / scale, sigma, rtol=1e-3)


def test_the_unit_of_the_field_does_not_matter():
    positions, values, sigmas = measured(30)
    small = fit(positions, values, sigmas, field_m=FIELD).predict(some(50))[0]
    large = fit(1e6 * positions, values, sigmas, field_m=(10e-3, 10e-3)).predict(1e6 * some(50))[0]
    np.testing.assert_allclose(small, large, atol=1e-4)


@pytest.mark.parametrize("length_nm", [1.0, 2.0])
def test_the_length_scale_of_sampled_fields_is_found(length_nm):
    rng = np.random.default_rng(4)
    h = Hyperparameters((length_nm * 1e-9,) * 2, 1.0, 0.0, 0.0, 0.0)
    ratios = []
    for _ in range(8):
        positions = rng.uniform(0, 10e-9, (120, 2))
        covariance = dense_covariance_fast(h, positions)
        values = np.linalg.cholesky(covariance) @ rng.normal(size=120) + 0.05 * rng.normal(size=120)
        found = fit(positions, values, np.full(120, 0.05), field_m=FIELD, caution=0.0).hyperparameters
        ratios.append(found.lengths_m[0] / h.lengths_m[0])
    # one draw of 25-100 correlated patches tells its length to about 15 %; eight of them to 5 %
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1.0, abs=0.15)


def dense_covariance_fast(h, positions):
    r = np.sqrt(5) * np.linalg.norm((positions[:, None] - positions[None]) / h.lengths_m, axis=2)
    return h.amplitude**2 * (1 + r + r**2 / 3) * np.exp(-r) + 1e-10 * np.eye(len(positions))


def strain_energy(seed, grid):
    """A field that is not stationary: a quadratic form of smooth waves plus a narrow inclusion, (n,) over ``grid``."""
    rng = np.random.default_rng(seed)
    nm = grid / 1e-9
    wave = rng.normal(size=(2, 6, 2)) / 2.0
    phase = rng.uniform(0, 2 * np.pi, (2, 6, 1))
    strain = 0.2 * np.cos(np.einsum("skd,nd->skn", wave, nm) + phase).sum(axis=1)
    strain[0] += 1.5 * np.exp(-np.square(nm - rng.uniform(3, 7, 2)).sum(axis=1) / (2 * rng.uniform(0.8, 1.6) ** 2))
    return 0.5 * (strain[0] ** 2 + strain[1] ** 2 + 0.6 * strain[0] * strain[1])


def test_two_deviations_cover_the_truth_of_fields_that_are_not_stationary():
    from stemloop.decide.acquire import ACQUISITIONS, initial_design

    axis = np.linspace(0, 10e-9, 41)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    covered = []
    for seed in range(8):
        rng = np.random.default_rng(100 + seed)
        truth = strain_energy(seed, grid)
        noise = 0.1 * np.ptp(truth)
        index = initial_design(grid, 16, (0.0, 0.0), rng)
        values = truth[index] + noise * rng.normal(size=16)
        start = None
        while len(index) < 80:
            belief = fit(grid[index], values, np.full(len(index), noise), field_m=FIELD, start=start)
            start = belief.hyperparameters
            left = np.setdiff1d(np.arange(len(grid)), index)
            chosen = left[ACQUISITIONS["uncertainty"](belief, grid[left], 16, (0.0, 0.0), rng)]
            index = np.append(index, chosen)
            values = np.append(values, truth[chosen] + noise * rng.normal(size=16))
        belief = fit(grid[index], values, np.full(len(index), noise), field_m=FIELD, start=start)
        mean, sigma = belief.predict(grid)
        covered.append((np.abs(mean - truth) < 2 * sigma).mean())
    assert 0.92 < np.mean(covered) < 0.99
    assert min(covered) > 0.85


def test_two_length_scales_are_told_apart():
    rng = np.random.default_rng(6)
    h = Hyperparameters((1e-9, 4e-9), 1.0, 0.0, 0.0, 0.0)
    positions = rng.uniform(0, 10e-9, (150, 2))
    values = np.linalg.cholesky(dense_covariance_fast(h, positions)) @ rng.normal(size=150)
    y, x = fit(positions, values, np.full(150, 0.02), field_m=FIELD, anisotropic=True).hyperparameters.lengths_m
    assert 2.0 < x / y < 8.0


def test_caution_shortens_the_length_and_never_promises_more():
    data = measured(30)
    bold, cautious = (fit(*data, field_m=FIELD, caution=c) for c in (0.0, 1.0))
    assert cautious.hyperparameters.lengths_m[0] < bold.hyperparameters.lengths_m[0]
    assert cautious.predict(some(200))[1].max() > bold.predict(some(200))[1].max()


def test_extra_noise_is_learned_when_the_given_deviations_are_too_small():
    rng = np.random.default_rng(8)
    positions = rng.uniform(0, 10e-9, (200, 2))
    values = np.sin(positions[:, 0] / 3e-9) + 0.3 * rng.normal(size=200)
    h = fit(positions, values, np.full(200, 0.01), field_m=FIELD).hyperparameters
    assert h.noise == pytest.approx(0.3, rel=0.15)  # 200 values: 5 %, and what the field takes


@pytest.mark.parametrize("n", [1, 2, 3])
def test_very_few_or_constant_data_still_give_a_sensible_belief(n):
    mean, sigma = fit(some(n), np.full(n, 3.0), np.full(n, 0.5), field_m=FIELD).predict(some(20))
    np.testing.assert_allclose(mean, 3.0, atol=1e-6)
    assert (sigma > 0.1).all() and (sigma < 5).all()
    assert np.isfinite(fit(some(n), np.zeros(n), np.zeros(n), field_m=FIELD).predict(some(5))).all()


def test_repeated_positions_are_averaged():
    at = np.repeat(some(1), 100, axis=0)
    rng = np.random.default_rng(1)
    process = GaussianProcess(at, 2.0 + rng.normal(size=100), np.ones(100), replace(PLAIN, noise=0.0))
    assert process.predict(at[:1])[1][0] == pytest.approx(0.1, rel=0.01)


def test_hyperparameters_go_through_json_unchanged():
    h = fit(*measured(), field_m=FIELD).hyperparameters
    assert Hyperparameters.from_dict(json.loads(json.dumps(h.to_dict()))) == h


def test_a_process_is_a_belief():
    predict = Belief.predict
    assert callable(predict) and callable(GaussianProcess.predict)
    mean, sigma = GaussianProcess(*measured(), PLAIN).predict(some(4))
    assert mean.shape == sigma.shape == (4,)


@pytest.mark.parametrize(
    "broken",
    [
        lambda p, v, s: (p[:, :1], v, s),
        lambda p, v, s: (p, v[:-1], s),
        lambda p, v, s: (p, v, -s),
        lambda p, v, s: (p, np.where(v > 0, np.nan, v), s),
        lambda p, v, s: (p[:0], v[:0], s[:0]),
    ],
)
def test_data_that_cannot_be_used_are_refused(broken):
    with pytest.raises(InputError):
        fit(*broken(*measured()), field_m=FIELD)


def test_settings_that_cannot_be_used_are_refused():
    with pytest.raises(UnknownName, match="matern52"):
        fit(*measured(), field_m=FIELD, kernel="matern5")
    with pytest.raises(InputError, match="field_m"):
        fit(*measured(), field_m=(0.0, 1e-9))
    with pytest.raises(InputError):
        replace(PLAIN, amplitude=0.0)
    with pytest.raises(InputError, match="no hyperparameters"):
        Hyperparameters.from_dict({"lengths_m": [1e-9, 1e-9]})


def test_contradicting_repeats_without_noise_are_refused_or_solved():
    at = np.repeat(some(1), 3, axis=0)
    h = replace(PLAIN, noise=0.0, amplitude=1e-12, mean_sigma=1e3)
    with pytest.raises(CalculationError, match="sigma"):
        GaussianProcess(at, np.arange(3.0), np.zeros(3), h)
