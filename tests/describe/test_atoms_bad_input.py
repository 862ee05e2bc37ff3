"""Images with holes, saturated, of nothing, of two things, and too large for one piece."""

import resource

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree

from stemloop.describe.atoms import find_columns
from stemloop.describe.finding import raster
from stemloop.simulate import pictures

SIZE = 320


def crystal(dose=1e4, seed=0, size=SIZE, rotation=0.1):
    rng = np.random.default_rng(seed)
    truth = pictures.jittered(pictures.layout("SrTiO3[001]", (size, size), 15.0, rotation), 3.0, rng)
    return truth, pictures.counted(pictures.mean_image(truth, dose), rng)


def inner(place, size=SIZE, margin=12.0):
    return ((place > margin) & (place < size - 1 - margin)).all(axis=1)


def compared(found, truth, size=SIZE):
    """Recall, number of false columns, pulls."""
    distance, which = cKDTree(found.position).query(truth.position)
    seen = inner(truth.position, size)
    near = seen & (distance < 5)
    false = (cKDTree(truth.position).query(found.position)[0] > 5).sum()
    return near.sum() / seen.sum(), false, ((found.position[which] - truth.position) / found.sigma[which])[near]


@pytest.mark.parametrize("share", [1e-3, 0.01, 0.2])
def test_missing_pixels_count_for_nothing(share):
    truth, image = crystal()
    gone = np.random.default_rng(1).random(image.shape) < share
    found = find_columns(np.where(gone, np.nan, image))
    recall, false, pulls = compared(found, truth)
    assert recall == 1 and false == 0
    assert 0.88 < pulls.std() < 1.12  # 250 columns: 0.03 by chance
    assert ((found.measured < 1).any()) == gone.any()
    whole = find_columns(image)
    assert found.sigma.mean() >= whole.sigma.mean() * (1 + 0.3 * share)


def test_nothing_is_invented_in_a_hole():
    truth, image = crystal()
    image[100:200, 120:240] = np.inf
    found = find_columns(image)

    def hole(place, margin):
        low, high = np.array([100, 120]) + margin, np.array([200, 240]) - margin
        return ((place > low) & (place < high)).all(axis=1)

    assert not hole(found.position, 2).any() and not hole(found.vacant, 2).any()
    outside = ~hole(truth.position, -6) & inner(truth.position)
    assert cKDTree(found.position).query(truth.position[outside])[0].max() < 5


@pytest.mark.parametrize("clip", [0.9, 0.7, 0.5])
def test_saturated_columns_are_found_without_bias(clip):
    truth, image = crystal(dose=3e4, seed=2)
    whole = find_columns(image)
    found = find_columns(np.minimum(image, np.round(clip * 54 * 1.1)))
    recall, false, pulls = compared(found, truth)
    assert recall == 1 and false == 0
    assert 0.9 < pulls.std() < 1.1 and abs(pulls.mean()) < 0.15
    bright = inner(whole.position) & (whole.sublattice == 0)
    near = cKDTree(found.position).query(whole.position[bright])[1]
    # where half of the height is cut, the flanks leave it to the other columns' width, 3 % less than these have
    assert np.median(found.amplitude[near] / whole.amplitude[bright]) == pytest.approx(
        1, abs=0.05 if clip < 0.6 else 0.02
    )
    assert (found.measured[near] < 1).mean() > 0.9  # and they are marked


Y, X = np.indices((SIZE, SIZE))
NOTHING = {
    "counts": lambda rng: rng.poisson(50.0, (SIZE, SIZE)),
    "few counts": lambda rng: rng.poisson(0.3, (SIZE, SIZE)),
    "slope": lambda rng: rng.poisson(50 + 0.3 * X + 0.1 * Y),
    "noiseless slope": lambda rng: 50 + 0.3 * X + 0.1 * Y,
    "wave": lambda rng: 100 + 50 * np.sin(X / 80),
    "blob": lambda rng: rng.poisson(10 + 100 * np.exp(-((X - 150) ** 2 + (Y - 150) ** 2) / 2 / 50**2)),
    "edge": lambda rng: rng.poisson(np.where(X > 150, 100.0, 20.0)),
    "disc": lambda rng: rng.poisson(np.where(np.hypot(X - 150, Y - 150) < 80, 100.0, 20.0)),
    "stripes": lambda rng: rng.poisson(100 + 50 * np.sin(X / 3)),
    "hot pixel": lambda rng: np.where((X == 90) & (Y == 60), 1000.0, 0) + rng.normal(size=X.shape),
    "speckle": lambda rng: rng.poisson(100 + 20 * speckle(rng, 2.5)),
    "speckle alone": lambda rng: speckle(rng, 2.0),
}


def speckle(rng, width):
    field = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), width)
    return field / field.std()


@pytest.mark.parametrize("name", NOTHING)
def test_no_lattice_no_columns(name):
    assert len(find_columns(NOTHING[name](np.random.default_rng(3)))) <= 1


def test_half_vacuum_stays_empty():
    truth, image = crystal(seed=4)
    image[:, 160:] = np.random.default_rng(5).poisson(1.8, (SIZE, SIZE - 160))
    found = find_columns(image)
    assert (found.position[:, 1] < 164).all() and (found.vacant[:, 1] < 164).all()
    left = inner(truth.position) & (truth.position[:, 1] < 150)
    assert cKDTree(found.position).query(truth.position[left])[0].max() < 5


@pytest.mark.parametrize("dose", [1e3, 1e4])
def test_two_grains(dose):
    rng = np.random.default_rng(6)
    one, two = (pictures.layout("SrTiO3[001]", (SIZE, SIZE), 15.0, turn) for turn in (0.1, 0.7))
    truth = pictures.joined(one.take(one.position[:, 0] < 152), two.take(two.position[:, 0] > 160))
    found = find_columns(pictures.counted(pictures.mean_image(truth, dose), rng))
    recall, false, pulls = compared(found, truth)
    assert recall > (0.97 if dose < 1e4 else 0.999)
    assert false <= (2 if dose < 1e4 else 0)
    assert 0.9 < pulls.std() < 1.1


@pytest.mark.parametrize("kind", ["<u2", ">u2", "i4", "f2", "f4", "f8"])
def test_the_kind_of_number_does_not_matter(kind):
    _, image = crystal(size=160)
    np.testing.assert_array_equal(find_columns(image.astype(kind)).position, find_columns(image).position)


def test_regions_join_without_a_seam(monkeypatch):
    truth, image = crystal(seed=7, size=400, rotation=0.0)
    whole = find_columns(image)
    monkeypatch.setattr(raster, "_REGION", 200)
    parts = find_columns(image)
    assert len(parts) == len(whole)
    far, same = cKDTree(whole.position).query(parts.position)
    assert far.max() < 1
    # regions lay the background's nodes elsewhere, and stop within a twentieth of a deviation
    moved = (parts.position - whole.position[same]) / whole.sigma[same]
    seam = (np.abs(parts.position - 200) < 20).any(axis=1)
    assert np.sqrt(np.mean(moved[seam] ** 2)) < 0.35
    recall, false, pulls = compared(parts, truth, 400)
    assert recall == 1 and false == 0
    assert 0.9 < pulls.std() < 1.1


@pytest.mark.slow
def test_a_large_image_needs_little_memory():
    _, image = crystal(dose=1e4, seed=8, size=512, rotation=0.0)
    small = find_columns(image)
    image = np.tile(image.astype(np.uint16), (16, 16))  # 8192 x 8192: 128 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = find_columns(image)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 900  # MiB
    # tiles join where two rims meet; within each the answer is that of the small image
    middle = small.position[inner(small.position, 512, 60)]
    wanted = (middle[None] + 512 * np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1).reshape(-1, 1, 2)).reshape(
        -1, 2
    )
    distance, which = cKDTree(found.position).query(wanted)
    assert (distance < 3).mean() > 0.9999
    sigma = np.median(small.sigma)
    assert np.sqrt(np.mean((found.position[which] - wanted)[distance < 3] ** 2)) < 0.4 * sigma


def test_pixels_far_larger_than_atoms_show_few_or_none():
    rng = np.random.default_rng(0)
    image = rng.poisson(50 + 20 * np.kron(rng.random((16, 16)), np.ones((16, 16)))).astype(float)
    assert len(find_columns(image, 5.3)) <= 3
