"""Columns of images whose answer is known, by construction or by an independent program."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from stemloop.core.errors import InputError
from stemloop.describe.atoms import find_columns, sublattices

DATA = Path(os.environ.get("STEMLOOP_DATA", Path(__file__).parents[3] / "shared" / "data"))

# kind: lattice constant [pm], amplitudes of its two columns
LATTICES = {"MoS2": (316.0, (1.0, 0.35)), "graphene": (246.1, (1.0, 1.0)), "SrTiO3": (390.5, (1.0, 0.45))}


def lattice(kind, pixel_pm, shape, rng, rotation=0.2, jitter=0.01):
    """Positions (n, 2) and amplitudes of a rotated lattice with random displacements of ``jitter`` a."""
    a, amplitudes = LATTICES[kind][0] / pixel_pm, LATTICES[kind][1]
    square = kind == "SrTiO3"
    second = np.array([a, 0]) if square else np.array([a * np.sqrt(3) / 2, a / 2])
    n = int(2 * max(shape) / a) + 3
    i, j = (k.ravel()[:, None] for k in np.meshgrid(np.arange(-n, n), np.arange(-n, n)))
    offset = 0.5 if square else 1 / 3
    points = np.concatenate([(i + o) * np.array([0, a]) + (j + o) * second for o in (0, offset)])
    amplitude = np.repeat(amplitudes, len(i))
    c, s = np.cos(rotation), np.sin(rotation)
    points = points @ np.array([[c, -s], [s, c]]) + np.array(shape) / 2 + 0.37
    points += rng.normal(0, jitter * a, points.shape)
    near = ((points > -10) & (points < np.array(shape) + 10)).all(axis=1)
    return points[near], amplitude[near]


def expected(points, amplitude, width, shape, dose, background=0.2):
    gy = np.exp(-((np.arange(shape[0])[:, None] - points[:, 0]) ** 2) / 2 / width**2)
    gx = np.exp(-((np.arange(shape[1])[:, None] - points[:, 1]) ** 2) / 2 / width**2)
    return dose * (background + (gy * amplitude) @ gx.T)


def match(columns, points, width, shape, margin=3.0):
    """Recall, precision, and (found, true) index pairs of the columns ``margin`` widths from the border."""
    inner = ((points > margin * width) & (points < np.array(shape) - 1 - margin * width)).all(axis=1)
    distance, nearest = cKDTree(points).query(columns.position)
    hit = distance < width
    recall = len(set(nearest[hit]) & set(np.flatnonzero(inner))) / inner.sum()
    chosen = hit & inner[nearest]
    return recall, float(hit.mean()), np.flatnonzero(chosen), nearest[chosen]


def bound(points, amplitude, width, image, dose):
    """Cramer-Rao bound of each coordinate for Poisson counts, all neighbours and a constant background free."""
    shape = image.shape
    middle = np.argsort(np.hypot(*(points - np.array(shape) / 2).T))[:12]
    y, x = np.indices(shape)
    slopes = []
    for k in middle:
        own = dose * amplitude[k] * np.exp(-((y - points[k, 0]) ** 2 + (x - points[k, 1]) ** 2) / 2 / width**2)
        slopes += [own * (y - points[k, 0]) / width**2, own * (x - points[k, 1]) / width**2, own / amplitude[k]]
    slopes = np.stack([s.ravel() for s in slopes] + [np.ones(image.size)])
    fisher = (slopes / image.ravel()) @ slopes.T
    return np.sqrt(np.linalg.inv(fisher)[0, 0])


@pytest.mark.parametrize("kind", LATTICES)
@pytest.mark.parametrize("pixel_pm", [8, 16, 40])
def test_every_column_is_found_where_it_is_and_says_how_well(kind, pixel_pm):
    rng = np.random.default_rng(pixel_pm)
    shape, width, dose = ((420, 400) if pixel_pm == 8 else (256, 288)), max(42 / pixel_pm, 1.0), 400
    points, amplitude = lattice(kind, pixel_pm, shape, rng)
    truth = expected(points, amplitude, width, shape, dose)
    columns = find_columns(rng.poisson(truth))
    recall, precision, _, _ = match(columns, points, width, shape)
    assert recall > 0.995
    assert precision > 0.995
    # columns cut by the border, which no fit can know, reach inwards: deviations are judged a little further in
    deep = match(columns, points, width, shape, margin=8.0)
    pulls = (columns.position[deep[2]] - points[deep[3]]) / columns.sigma[deep[2]]
    assert 0.8 < pulls.std() < 1.3
    assert 0.8 < 1.4826 * np.median(np.abs(pulls)) < 1.3
    bright = amplitude[deep[3]] == 1.0
    rmse = np.sqrt(np.mean((columns.position[deep[2]] - points[deep[3]])[bright] ** 2))
    assert rmse < 1.3 * bound(points, amplitude, width, truth, dose)  # a bound that knows all widths
    assert abs(np.median(columns.width) - width) < 0.03 * width


@pytest.mark.parametrize("kind", LATTICES)
def test_sublattices_are_the_elements(kind):
    rng = np.random.default_rng(4)
    shape, width = (256, 256), 42 / 16
    points, amplitude = lattice(kind, 16, shape, rng)
    columns = find_columns(rng.poisson(expected(points, amplitude, width, shape, 200)))
    _, _, found, true = match(columns, points, width, shape)
    wanted = (amplitude[true] < 0.9).astype(int)
    assert np.mean(columns.sublattice[found] == wanted) > 0.99


def test_the_answer_does_not_depend_on_gain_or_offset():
    rng = np.random.default_rng(5)
    points, amplitude = lattice("MoS2", 16, (128, 128), rng)
    image = rng.poisson(expected(points, amplitude, 2.6, (128, 128), 100)).astype(float)
    one, other = find_columns(image), find_columns(37.0 * image - 1e4)
    np.testing.assert_allclose(one.position, other.position, atol=2e-3)  # px: where the iteration stops
    np.testing.assert_allclose(37.0 * one.amplitude, other.amplitude, rtol=1e-2)


def test_low_dose_keeps_precision():
    rng = np.random.default_rng(6)
    shape, width = (256, 256), 42 / 13
    points, amplitude = lattice("MoS2", 13, shape, rng)
    columns = find_columns(rng.poisson(expected(points, amplitude, width, shape, 8, background=0.5)))
    recall, precision, found, true = match(columns, points, width, shape)
    assert precision > 0.98
    assert recall > 0.5  # the bright half for certain
    pulls = (columns.position[found] - points[true]) / columns.sigma[found]
    assert 0.8 < pulls.std() < 1.3


def test_noise_alone_holds_hardly_a_column():
    rng = np.random.default_rng(7)
    assert len(find_columns(rng.poisson(50.0, (256, 256)))) <= 2
    assert len(find_columns(rng.poisson(50.0, (256, 256)), pixel_size_nm=0.013)) <= 2


def test_a_vacancy_and_a_dopant_are_no_sublattices():
    rng = np.random.default_rng(8)
    points, amplitude = lattice("graphene", 16, (256, 256), rng)
    middle = np.argsort(np.hypot(*(points - 128).T))
    amplitude[middle[0]] = 1.8
    keep = np.arange(len(points)) != middle[5]
    image = rng.poisson(expected(points[keep], amplitude[keep], 2.6, (256, 256), 300))
    columns = find_columns(image)
    assert columns.sublattice.max() == 0
    near = cKDTree(columns.position).query(points[[middle[0], middle[5]]])[0]
    assert near[0] < 0.5 and near[1] > 5  # px: the dopant is there, the vacancy is empty
    assert columns.amplitude.argmax() == cKDTree(columns.position).query(points[middle[0]])[1]


def test_one_population_is_one_sublattice():
    rng = np.random.default_rng(9)
    assert sublattices(rng.normal(100, 10, 500)).max() == 0
    three = sublattices(np.concatenate([rng.normal(m, 3, 200) for m in (100, 40, 70)]))
    assert [three[:200].mean().round(), three[200:400].mean().round(), three[400:].mean().round()] == [0, 2, 1]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.full((64, 64), 3.0), "nothing to find"),
        (np.where(np.eye(64) > 0, np.nan, 1.0), "nothing to find"),
        (np.where(np.arange(64) < 50, np.nan, np.ones((64, 1))), "not finite"),
        (np.zeros((1, 1)), "at least 16"),
        (np.zeros((0, 0)), "at least 16"),
        (np.zeros((64, 64, 3), dtype=np.uint8), "colour picture.*mean"),
        (np.zeros((8, 80)), "at least 16"),
        (np.zeros((4, 64, 64)), "at least 16"),
        (np.zeros((64, 64), dtype=complex), "real numbers"),
    ],
)
def test_unusable_images_are_refused(image, says):
    with pytest.raises(InputError, match=says):
        find_columns(image)


def real(name):
    path = DATA / "haadf" / name
    if not path.exists():
        pytest.skip(f"{path} is not there; set STEMLOOP_DATA")
    return path


@pytest.mark.parametrize("number", [1, 2])
def test_molybdenum_of_a_real_monolayer(number):
    image = np.load(real(f"SciLink/MoS2_stem_Exp-00{number}-5.npy"))
    columns = find_columns(image)
    cell = (2 / np.sqrt(3)) * {1: 21.4, 2: 21.1}[number] ** 2  # px^2, from the spacing d10
    cells = image.size / cell
    bright = columns.position[columns.sublattice == 0]
    assert 0.88 * cells < len(bright) < 1.1 * cells  # one Mo a cell, less those cut by the border
    near = cKDTree(bright).query(bright, 2)[0][:, 1]
    assert np.percentile(near, 2) > 9  # no column twice
    assert np.median(columns.sigma) < 0.6


def test_particle_agrees_with_the_columns_of_another_program():
    scipy_io = pytest.importorskip("scipy.io")
    content = scipy_io.loadmat(real("StatSTEM/ExamplePtIr.mat"))
    image = content["input"]["obs"][0, 0].astype(float)
    step = float(content["input"]["dx"][0, 0].squeeze())
    output = content["output"]["coordinates"][0, 0]
    theirs = (output / step - 1)[:, 1::-1]
    columns = find_columns(image)
    distance, _ = cKDTree(columns.position).query(theirs)
    assert np.mean(distance < 3) > 0.85  # of their 140, some of which were set by hand outside the particle
    assert np.median(distance) < 0.6  # px, a thirtieth of the spacing


def perovskite(dose, seed, size=384, pixel_pm=15.0):
    """Counts at ``dose`` [e/A^2], columns (n, 2), which sublattice, and vacancies (m, 2)."""
    rng = np.random.default_rng(seed)
    a = 390.5 / pixel_pm
    cells = int(size / a) - 1
    grid = a * np.stack(np.meshgrid(np.arange(cells), np.arange(cells), indexing="ij"), -1).reshape(-1, 2)
    corner = grid + (size - (cells - 1) * a) / 2
    centre = corner[(grid < (cells - 1.5) * a).all(axis=1)] + a / 2
    kept = np.ones(len(centre), bool)
    kept[rng.choice(len(centre), 3, replace=False)] = False
    points = np.concatenate([corner, centre[kept]])
    amplitude = np.repeat([1.0, 0.5], [len(corner), kept.sum()])
    peak = dose * (pixel_pm / 100) ** 2 * 0.08
    truth = expected(points, amplitude, 43 / pixel_pm, (size, size), peak, background=0.1)
    return rng.poisson(truth), points, (amplitude < 1).astype(int), centre[~kept]


@pytest.mark.parametrize("seed", range(3))
def test_where_noise_hides_columns_the_lattice_finds_them_and_leaves_vacancies_empty(seed):
    counts, points, _, vacancies = perovskite(1e3, seed)
    columns = find_columns(counts)
    recall, precision, _, _ = match(columns, points, 43 / 15, counts.shape)
    assert recall > 0.97  # peaks of two and one counts; by themselves nine of ten are found
    assert precision > 0.99
    assert cKDTree(columns.position).query(vacancies)[0].min() > 5  # px: nothing was put there
    assert cKDTree(columns.vacant).query(vacancies)[0].max() < 3
    assert columns.p_present.min() > 0.5


def test_the_table_names_what_was_found():
    counts, _, _, _ = perovskite(1e4, 5, size=256)
    columns = find_columns(counts)
    table = columns.table()
    assert table.dtype.names[:2] == ("row", "col")
    np.testing.assert_array_equal(table["sigma_col"], columns.sigma[:, 1])
    assert np.isfinite([table[name] for name in table.dtype.names]).all()
    peak = 1e4 * 0.15**2 * 0.08
    assert abs(np.median(table["background"]) - 0.1 * peak) < 0.03 * peak


def test_a_variance_that_is_known_is_believed():
    """One half of the image has four times the noise: there the deviations double, and the places are as they say."""
    rng, width, shape = np.random.default_rng(7), 3.0, (256, 256)
    points, amplitude = lattice("SrTiO3", 15.0, shape, rng)
    clean = expected(points, amplitude, width, shape, 100.0)
    variance = np.full(shape, 25.0)
    variance[:, 128:] = 100.0
    image = clean + rng.normal(0, 1, shape) * np.sqrt(variance)
    columns = find_columns(image, variance=variance)
    place = columns.position
    distance, nearest = cKDTree(points).query(place)
    inner = (distance < width) & ((place > 9) & (place < 246)).all(axis=1) & (np.abs(place[:, 1] - 128) > 9)
    left, bright = place[:, 1] < 128, amplitude[nearest] == 1
    halves = [np.median(columns.sigma[inner & bright & half]) for half in (left, ~left)]
    assert halves[1] / halves[0] == pytest.approx(2, rel=0.1)
    z = (place - points[nearest]) / columns.sigma
    for half in (left, ~left):  # some 80 columns of two coordinates: known to 6 %
        assert z[inner & half].std() == pytest.approx(1, abs=0.17)


def test_pixels_without_a_variance_count_for_nothing():
    rng, width, shape = np.random.default_rng(8), 3.0, (128, 128)
    points, amplitude = lattice("SrTiO3", 15.0, shape, rng)
    image = rng.poisson(expected(points, amplitude, width, shape, 100.0)).astype(float)
    variance = np.full(shape, 50.0)
    hole = np.zeros(shape, bool)
    hole[50:70, 50:70] = True
    spoilt, missing = np.where(hole, 1e4, image), np.where(hole, np.nan, image)
    columns = find_columns(spoilt, variance=np.where(hole, np.inf, variance))
    same = find_columns(missing, variance=variance)
    assert np.array_equal(columns.position, same.position)
    with pytest.raises(InputError, match="variance for each pixel"):
        find_columns(image, variance=variance[1:])
    with pytest.raises(InputError, match="no pixel has a finite positive"):
        find_columns(image, variance=0 * variance)
