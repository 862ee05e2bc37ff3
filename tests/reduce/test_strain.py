import numpy as np
import pytest
from plain_block import pieces
from scipy import ndimage

from stemloop.core.errors import InputError
from stemloop.reduce.detectors import disk_area
from stemloop.reduce.disks import Disks, FindDisks, Template, find_disks
from stemloop.reduce.engine import reduce
from stemloop.reduce.strain import COMPONENTS, StrainMap, fit_disks, reference_lattice, strain

SHAPE = (128, 128)
RADIUS = 5.0
REFERENCE = np.array([[63.4, 64.1], [2.3, 21.0], [20.6, -1.9]])  # origin, g1, g2 (row, col) [px]


def place(gradient):
    """Rows (row, col) of g1, g2 after the displacement gradient du/dr (x, y order)."""
    g0 = REFERENCE[1:, ::-1].T
    return (np.linalg.inv(np.eye(2) + gradient).T @ g0).T[:, ::-1]


def mean_pattern(vectors, height, background=0.5):
    """Disks with sharp edges by exact areas: not made by the template."""
    image = np.zeros(SHAPE)
    for h in range(-2, 3):
        for k in range(-2, 3):
            centre = REFERENCE[0] + h * vectors[0] + k * vectors[1]
            image += height * np.exp(-0.35 * (h * h + k * k)) * disk_area(SHAPE, tuple(centre), RADIUS)
    return image + background


def soft_disk(shape, centre, radius, blur):
    """A disk smeared on a grid nine times as fine as the pixels."""
    if not blur:
        return disk_area(shape, tuple(centre), radius)
    fine = disk_area((shape[0] * 9, shape[1] * 9), tuple(9 * np.array(centre) + 4), radius * 9)
    return ndimage.gaussian_filter(fine, blur * 9).reshape(shape[0], 9, shape[1], 9).mean((1, 3))


def test_a_template_is_the_exact_disk():
    rng = np.random.default_rng(0)
    for edge in (0.0, 0.7):
        template = Template.disk(6.3, edge)
        for centre in rng.uniform(15, 17, (5, 2)):
            y, x = np.indices((32, 32))
            made = template.at(y - centre[0], x - centre[1])
            exact = soft_disk((32, 32), centre, 6.3, edge)
            assert np.abs(made - exact).max() < (0.015 if edge == 0 else 3e-3)  # a kink is known to 1/16 px
    measured = Template.measured(template.at(y - 16.2, x - 15.9) * 50 + 2, (16.2, 15.9), 6.3)
    assert np.abs(measured.at(y - 16.2, x - 15.9) - template.at(y - 16.2, x - 15.9)).max() < 0.03


@pytest.mark.parametrize(("height", "blur"), [(2.0, 0.0), (20.0, 0.0), (20.0, 0.6), (400.0, 0.6)])
def test_a_disk_is_placed_at_the_cramer_rao_bound(height, blur):
    rng = np.random.default_rng(3)
    template = Template.disk(RADIUS, blur)
    centre = np.array([20.3, 19.8])
    clean = height * soft_disk((40, 40), centre, RADIUS, blur) + 0.3
    # the bound from this mean, not from the template
    slopes = []
    for axis in (0, 1):
        step = 0.1 * np.eye(2)[axis]
        both = [height * soft_disk((40, 40), centre + s * step, RADIUS, blur) for s in (1, -1)]
        slopes.append((both[0] - both[1]) / 0.2)
    near = np.hypot(*(np.indices((40, 40)) - centre[:, None, None])) <= template.half + 1
    bound = [np.sqrt(1 / np.sum((s**2 / clean)[near])) for s in slopes]
    found = [find_disks(rng.poisson(clean), template) for _ in range(400)]
    assert all(len(disks) == 1 for disks in found)
    position = np.concatenate([disks.position for disks in found])
    sigma = np.concatenate([disks.sigma for disks in found])
    error = position - centre
    ratio = error.std(0) / bound
    # 400 draws: 3.5 %; with 150 electrons in the disk the bound is not quite reached
    assert np.all(ratio < (1.25 if height < 10 else 1.12)) and np.all(ratio > 0.88)
    z = error / sigma
    assert np.all(np.abs(z.std(0) - 1) < (0.25 if height < 10 else 0.14)), z.std(0)
    assert np.all(np.abs(error.mean(0)) < 4 * np.array(bound) / 20 + 0.004)


def test_noise_alone_is_not_a_disk():
    rng = np.random.default_rng(4)
    template = Template.disk(RADIUS)
    found = [len(find_disks(rng.poisson(level, SHAPE), template)) for level in (0.01, 0.3, 5.0) for _ in range(10)]
    assert sum(found) == 0
    assert len(find_disks(np.zeros(SHAPE), template)) == 0


def test_disks_of_a_scan_are_those_of_its_frames():
    rng = np.random.default_rng(5)
    data = rng.poisson(mean_pattern(place(np.zeros((2, 2))), 30), (2, 3, *SHAPE)).astype(np.uint16)
    fold = FindDisks(Template.disk(RADIUS), threshold=8)
    maps = reduce(fold, pieces(data, [2, 3])[::-1], (2, 3), SHAPE)
    disks = Disks(*(maps[f"disk_{name}"] for name in Disks.__dataclass_fields__))
    for n in range(6):
        alone = find_disks(data.reshape(6, *SHAPE)[n], fold.template, 8)
        assert np.array_equal(disks.of(n).position, alone.position) and len(alone) >= 9
    fits = find_disks(data[0, 0], fold.template, start=disks.of(0).position)
    # the fits of a search begin at whole pixels, these at the end of those
    assert np.abs(fits.position - disks.of(0).position).max() < 0.02


GRADIENTS = {
    "none": [[0, 0], [0, 0]],
    "stretch": [[0.02, 0], [0, -0.01]],
    "shear": [[0, 0.015], [0.015, 0]],
    "turn": [[np.cos(0.05) - 1, -np.sin(0.05)], [np.sin(0.05), np.cos(0.05) - 1]],
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_strain_of_a_known_lattice_is_exact(name):
    gradient = np.array(GRADIENTS[name], float)
    value, sigma = strain(place(gradient), REFERENCE[1:])
    f = np.eye(2) + gradient
    u = np.linalg.svd(f)[2].T @ np.diag(np.linalg.svd(f)[1]) @ np.linalg.svd(f)[2]
    expected = {
        "none": [0, 0, 0, 0],
        "stretch": [0.02, -0.01, 0, 0],
        "shear": [u[0, 0] - 1, u[1, 1] - 1, 0.015, 0],
        "turn": [0, 0, 0, 0.05],  # from +x towards +y
    }[name]
    assert np.allclose(value, expected, atol=1e-12) and np.all(sigma == 0)


@pytest.mark.parametrize("name", GRADIENTS)
def test_strain_from_counted_patterns_with_calibrated_deviations(name):
    rng = np.random.default_rng(6)
    gradient = np.array(GRADIENTS[name], float)
    truth, _ = strain(place(gradient), REFERENCE[1:])
    data = rng.poisson(mean_pattern(place(gradient), 12), (15, 20, *SHAPE)).astype(np.uint16)
    fold = StrainMap(Template.disk(RADIUS), REFERENCE)
    maps = reduce(fold, pieces(data, [31]), (15, 20), SHAPE)
    for i, component in enumerate(COMPONENTS):
        error = maps[component] - truth[i]
        z = error / maps[f"{component}_sigma"]
        # 300 draws: 0.06 and 4 %; widening by a misfit above 1 makes deviations a little too large
        assert abs(z.mean()) < 0.25 and 0.82 < z.std() < 1.12, component
        assert error.std() < 1.5e-3
    assert maps["disks"].min() >= 9 and 0.7 < maps["misfit"].mean() < 1.3


def test_the_reference_is_found_in_a_mean_pattern():
    rng = np.random.default_rng(7)
    found = reference_lattice(rng.poisson(mean_pattern(REFERENCE[1:], 500)), Template.disk(RADIUS))
    # the same lattice, perhaps with other vectors
    change = found[1:] @ np.linalg.inv(REFERENCE[1:])
    assert np.allclose(change, np.rint(change), atol=2e-3) and abs(abs(np.linalg.det(change)) - 1) < 2e-3
    assert np.allclose(found[0], REFERENCE[0], atol=0.02)
    assert abs(found[1, 0]) < abs(found[1, 1])


def test_what_cannot_be_fitted_is_said():
    template = Template.disk(RADIUS)
    with pytest.raises(InputError, match="at least three"):
        fit_disks(Disks.join([]), REFERENCE)
    with pytest.raises(InputError, match="span no plane"):
        strain(np.array([[1.0, 1.0], [2.0, 2.0]]), REFERENCE[1:])
    with pytest.raises(InputError, match="not negative"):
        find_disks(np.full(SHAPE, -1.0), template)
    with pytest.raises(InputError, match="too small"):
        find_disks(np.ones((8, 8)), template)
    with pytest.raises(InputError, match="lower the threshold"):
        reference_lattice(np.ones(SHAPE), template)
    empty = np.zeros((1, 2, *SHAPE), np.uint16)
    maps = reduce(StrainMap(template, REFERENCE), pieces(empty, []), (1, 2), SHAPE)
    assert np.isnan(maps["e_xx"]).all() and np.all(maps["disks"] == 0)
