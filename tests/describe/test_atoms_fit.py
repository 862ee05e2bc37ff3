"""The columns' least squares against dense algebra, and the filters against another implementation."""

import numpy as np
import pytest
from scipy import ndimage

from stemloop.describe.finding import filters, fitting, gaussians, mesh
from stemloop.describe.finding.noise import noise_of
from stemloop.describe.finding.sites import settled

SHAPE = (64, 72)
WIDTH = 2.5


def scene(seed=0):
    """Three overlapping columns and a far one, and a mesh."""
    rng = np.random.default_rng(seed)
    place = np.array([[20.3, 20.1], [24.9, 26.2], [30.2, 19.7], [48.0, 55.4]])
    columns = np.column_stack([place, [50.0, 30.0, 40.0, 20.0], np.log(WIDTH) + rng.normal(0, 0.05, 4)])
    reach = fitting.reach_of(WIDTH)
    nodes = mesh.nodes(SHAPE, max(8 * WIDTH, 2 * reach + 1))
    return fitting.Model(columns, rng.uniform(5, 10, nodes), SHAPE, WIDTH), rng


def jacobian(model):
    """Dense derivatives of the model's image by all its parameters, by central differences."""
    size = model.columns.size + model.background.size
    out = np.empty((np.prod(SHAPE), size))
    for k in range(size):
        images = []
        for sign in (1, -1):
            vector = np.concatenate([model.columns.ravel(), model.background.ravel()])
            step = 1e-2
            vector[k] += sign * step
            columns = vector[: model.columns.size].reshape(-1, 4)
            rest = vector[model.columns.size :].reshape(model.background.shape)
            images.append(fitting.Model(columns, rest, SHAPE, WIDTH).image.astype(np.float64))
        out[:, k] = (images[0] - images[1]).ravel() / (2 * step)
    return out


@pytest.fixture(scope="module")
def dense():
    model, rng = scene()
    weight = rng.uniform(0.5, 2, SHAPE).astype(np.float32)
    J = jacobian(model)
    return model, weight, J, J.T @ (weight.ravel()[:, None] * J)


def test_gradients_are_the_derivatives_of_the_image(dense):
    model, _, J, _ = dense
    image = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    ours = np.concatenate(
        [
            gaussians.gather(model.columns, image, model.reach).ravel(),
            mesh.gather(image, *model.background.shape).ravel(),
        ]
    )
    np.testing.assert_allclose(ours, J.T @ image.ravel(), rtol=0, atol=2e-3 * np.abs(J.T @ image.ravel()).max())


def test_the_sparse_matrix_solves_like_the_dense_one(dense):
    model, weight, J, matrix = dense
    equations = model.equations(weight, np.zeros_like(model.columns))
    right = J.T @ (weight.ravel() * np.random.default_rng(2).normal(size=J.shape[0]))
    n = model.columns.size
    step, lift = equations.solve(
        right[:n].reshape(-1, 4), right[n:].reshape(model.background.shape), damping=0.0, accuracy=1e-6
    )
    expected = np.linalg.solve(matrix, right)
    # single precision sums, pairs cut at 0.75 of the reach: a hundredth of the largest step
    scale = np.sqrt(np.diagonal(np.linalg.inv(matrix)))
    assert np.abs((np.concatenate([step.ravel(), lift.ravel()]) - expected) / scale).max() < 0.03


def test_deviations_are_those_of_the_whole_inverse(dense):
    model, weight, _, matrix = dense
    ours = model.equations(weight, np.zeros_like(model.columns)).deviations()
    whole = np.sqrt(np.diagonal(np.linalg.inv(matrix)))[: model.columns.size].reshape(-1, 4)
    np.testing.assert_allclose(ours, whole, rtol=0.05)  # nodes farther than a column's own nine count as known


def test_the_fit_ends_where_its_truth_is():
    model, rng = scene(3)
    pixels = model.image
    start = model.columns + rng.normal(0, [0.4, 0.4, 3, 0.03], model.columns.shape)
    known = fitting.prior(start)._replace(precision=np.full_like(start, 1e-6), alike=False)
    fitted = fitting.fit(pixels, np.ones(SHAPE, np.float32), start, np.full((2, 2), 7.0), WIDTH, known)
    np.testing.assert_allclose(fitted.columns[:, :2], model.columns[:, :2], atol=0.02)
    np.testing.assert_allclose(fitted.columns[:, 2], model.columns[:, 2], rtol=0.02)


@pytest.mark.parametrize("sigma", [0.9, 2.5, 6.0])
def test_filters_are_those_of_scipy(sigma):
    image = np.random.default_rng(4).normal(size=(50, 70)).astype(np.float32)
    kept = {"mode": "reflect", "truncate": 4.0}
    np.testing.assert_allclose(filters.smooth(image, sigma), ndimage.gaussian_filter(image, sigma, **kept), atol=2e-6)
    theirs = -ndimage.gaussian_laplace(image.astype(np.float64), sigma, mode="reflect")
    assert np.corrcoef(filters.negative_laplacian(image, sigma).ravel(), theirs.ravel())[0, 1] > 0.99
    assert np.abs(filters.negative_laplacian(np.ones_like(image), sigma)).max() < 1e-5


def test_filtered_noise_has_the_stated_variance():
    noise = np.random.default_rng(5).normal(size=(400, 400)).astype(np.float32)
    assert np.var(filters.negative_laplacian(noise, 2.0)) == pytest.approx(filters.laplacian_gain(2.0), rel=0.05)


def test_maxima_are_those_of_a_maximum_filter():
    image = filters.smooth(np.random.default_rng(6).normal(size=(90, 80)).astype(np.float32), 1.5)
    top = (image == ndimage.maximum_filter(image, 5)) & (image > 0.1)
    top[[0, -1]] = top[:, [0, -1]] = False
    np.testing.assert_array_equal(filters.maxima(image, 2, 0.1), np.argwhere(top))


@pytest.mark.parametrize(("gain", "floor"), [(1.0, 0.0), (4.0, 30.0), (0.0, 9.0)])
def test_the_noise_of_counts_is_found(gain, floor):
    rng = np.random.default_rng(7)
    y, x = np.indices((512, 512))
    mean = 40 + 30 * np.sin(x / 7) * np.cos(y / 9)
    image = gain * rng.poisson(mean) if gain else mean
    image = (image + rng.normal(0, np.sqrt(floor), mean.shape)).astype(np.float32)
    noise = noise_of([(image, np.ones(image.shape, bool))])
    level = (gain or 1) * 40
    assert noise.gain * level + noise.floor == pytest.approx(gain * level + floor, rel=0.03)


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_columns_that_keep_their_places_are_there_as_well_as_is_said(count):
    """Columns of one class scatter by 0.1 px about a middle that nobody knows and are seen with deviations of 0.3 px:
    what is found is off by its own deviation, however few there are (within four deviations of the mean square)."""
    rng = np.random.default_rng(count)
    ratio = []
    for _ in range(4000 // count):
        true = rng.normal(0.7, 1.0, 2) + rng.normal(0, 0.1, (count, 2))
        error = np.full((count, 2), 0.3)
        off, sigma = settled(true + rng.normal(0, error), error, beyond=1.0, least=0.1)
        ratio.append(((off - true) ** 2 / sigma**2).mean())
    assert np.mean(ratio) == pytest.approx(1, abs=max(0.12, 4 * np.std(ratio) / np.sqrt(len(ratio))))
