"""Lattices that were made with known vectors, rotation, strain and inclusions."""

import os
from pathlib import Path

import numpy as np
import pytest

from stemloop.core.errors import InputError, UnknownName
from stemloop.core.structure import Columns
from stemloop.describe.atoms import find_columns
from stemloop.describe.lattice import SYMMETRY, fit_lattice, orientation

DATA = Path(os.environ.get("STEMLOOP_DATA", Path(__file__).parents[3] / "shared" / "data"))
CONSTANT_PM = {"MoS2": 316.0, "graphene": 246.1, "SrTiO3": 390.5}
SECOND = {"MoS2": 0.35, "graphene": 1.0, "SrTiO3": 0.45}
TURN = {"hexagonal": 60.0, "square": 90.0}


def lattice(material, a, degrees, shape):
    """(n, 2) positions (row, col) and (n,) amplitudes, a1 turned by ``degrees`` from +x towards +y."""
    square = SYMMETRY[material] == "square"
    second = a * (np.array([1.0, 0.0]) if square else np.array([np.sqrt(0.75), 0.5]))
    n = int(2 * max(shape) / a) + 3
    i, j = (k.ravel()[:, None] for k in np.meshgrid(np.arange(-n, n), np.arange(-n, n)))
    offset = 0.5 if square else 1 / 3
    points = np.concatenate([(i + o) * np.array([0, a]) + (j + o) * second for o in (0, offset)])
    amplitude = np.repeat([1.0, SECOND[material]], len(i))
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    points = points @ np.array([[c, -s], [s, c]]) + np.array(shape) / 2
    near = ((points > -8) & (points < np.array(shape) + 8)).all(axis=1)
    return points[near], amplitude[near]


def inclusion(points, middle, radius, strain):
    """Displace by a misfitting disc: uniform ``strain`` inside, decaying as 1/r outside (irrotational)."""
    away = points - middle
    r2 = np.maximum((away**2).sum(axis=1), 1e-9)
    return points + away * (strain * np.minimum(1, radius**2 / r2))[:, None]


def picture(points, amplitude, width, shape, dose, rng):
    gy = np.exp(-((np.arange(shape[0])[:, None] - points[:, 0]) ** 2) / 2 / width**2)
    gx = np.exp(-((np.arange(shape[1])[:, None] - points[:, 1]) ** 2) / 2 / width**2)
    return rng.poisson(dose * (0.2 + (gy * amplitude) @ gx.T))


def away(rotation_rad, degrees, material):
    turn = TURN[SYMMETRY[material]]
    return (np.degrees(rotation_rad) - degrees + turn / 2) % turn - turn / 2


@pytest.mark.parametrize("material", SYMMETRY)
@pytest.mark.parametrize("pixel_pm", [10, 18, 35])
@pytest.mark.parametrize("degrees", [-29.0, 0.0, 11.0])
def test_orientation_of_strained_noisy_images(material, pixel_pm, degrees):
    rng = np.random.default_rng(3)
    shape, a = (256, 384), CONSTANT_PM[material] / pixel_pm
    points, amplitude = lattice(material, a, degrees, shape)
    points = inclusion(points, np.array(shape) / 2 + (20, -40), 50.0, 0.03)
    points[:, 1] += 0.01 * (points[:, 1] - shape[1] / 2)  # one per cent along x turns nothing (the frame's own axis)
    image = picture(points, amplitude, max(42 / pixel_pm, 1.0), shape, 60, rng)
    rotation, sigma = orientation(image, material)
    assert abs(away(rotation, degrees, material)) < 0.3
    assert 0 < np.degrees(sigma) < 0.3
    known, _ = orientation(image, material, pixel_pm * 1e-12)
    assert abs(away(known, degrees, material)) < 0.3


@pytest.mark.parametrize("material", SYMMETRY)
def test_columns_and_spectrum_agree_on_the_orientation(material):
    rng = np.random.default_rng(4)
    shape, a = (256, 256), CONSTANT_PM[material] / 18
    points, amplitude = lattice(material, a, 7.0, shape)
    image = picture(points, amplitude, 42 / 18, shape, 200, rng)
    columns = find_columns(image)
    by_columns, sigma = orientation(columns, material, 18e-12)
    assert abs(away(by_columns, 7.0, material)) < max(0.05, 5 * np.degrees(sigma))
    assert abs(np.degrees(orientation(image, material)[0] - by_columns)) < 0.1


def test_a_square_whose_columns_all_look_alike_needs_the_pixel_size():
    points, _ = lattice("SrTiO3", 20.0, 10.0, (200, 200))
    n = len(points)
    columns = Columns(points, np.full((n, 2), 0.1), np.ones(n), np.full(n, 3.0), np.zeros(n, dtype=np.int64))
    assert abs(away(orientation(columns, "SrTiO3", 390.5e-12 / 20)[0], 10.0, "SrTiO3")) < 1e-6


@pytest.mark.parametrize("material", SYMMETRY)
def test_vectors_are_found_with_honest_deviations(material):
    pulls = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        degrees = rng.uniform(-29, 29)
        points, amplitude = lattice(material, 15.0, degrees, (200, 220))
        if material == "SrTiO3":
            points = points[amplitude == 1]
        fit = fit_lattice(points + rng.normal(0, 0.2, points.shape))
        pulls.append((np.hypot(*fit.a1) - 15.0) / fit.sigma[0, 0])
        pulls.append(away(fit.rotation_rad, degrees, material) / np.degrees(fit.rotation_sigma_rad))
        assert fit.symmetry == SYMMETRY[material]
        assert fit.basis.max() == (0 if material == "SrTiO3" else 1)  # a honeycomb is two interlocking copies
        assert abs(np.degrees(np.arctan2(fit.a1[0], fit.a1[1]))) < 45.5
    assert 0.6 < np.std(pulls) < 1.5  # 24 pulls: one deviation is good to 15 %, and lengths and angles are correlated


def test_most_points_decide_and_the_inclusion_shows_in_the_residuals():
    rng = np.random.default_rng(1)
    shape, middle = (400, 400), np.array([150.0, 240.0])
    points, _ = lattice("MoS2", 18.0, 5.0, shape)
    strained = inclusion(points, middle, 60.0, 0.03) + rng.normal(0, 0.1, points.shape)
    keep = rng.random(len(points)) > 0.03  # vacancies
    false = rng.uniform(0, 400, (15, 2))
    fit = fit_lattice(np.concatenate([strained[keep], false]))
    assert abs(np.hypot(*fit.a1) / 18.0 - 1) < 0.004
    assert abs(np.degrees(fit.rotation_rad) - 5.0) < 0.1
    size = np.hypot(*fit.residual[: keep.sum()].T)
    r = np.hypot(*(points[keep] - middle).T)
    at_edge, far = np.abs(r - 60) < 12, r > 170
    assert np.nanmedian(size[at_edge]) > 2.5 * np.nanmedian(size[far])


def test_index_and_vectors_give_the_points_back():
    points, _ = lattice("graphene", 12.0, -17.0, (150, 150))
    fit = fit_lattice(points)
    first = fit.basis == 0
    rebuilt = fit.origin + fit.index[first] @ np.stack([fit.a1, fit.a2])
    np.testing.assert_allclose(rebuilt, points[first], atol=1e-8)
    np.testing.assert_allclose(fit.residual, 0, atol=1e-8)


def test_what_is_no_lattice_is_said():
    rng = np.random.default_rng(2)
    with pytest.raises(InputError, match="no lattice"):
        fit_lattice(rng.uniform(0, 500, (200, 2)))
    with pytest.raises(InputError, match="at least 8"):
        fit_lattice(np.zeros((3, 2)))
    with pytest.raises(InputError, match="no hexagonal lattice"):
        orientation(rng.poisson(20.0, (128, 128)), "MoS2")
    with pytest.raises(InputError, match="constant"):
        orientation(np.ones((64, 64)), "MoS2")
    with pytest.raises(UnknownName, match="graphene"):
        orientation(np.ones((64, 64)), "cheese")


@pytest.mark.parametrize("number", [1, 2])
def test_a_real_monolayer_by_both_ways(number):
    path = DATA / "haadf" / "SciLink" / f"MoS2_stem_Exp-00{number}-5.npy"
    if not path.exists():
        pytest.skip(f"{path} is not there; set STEMLOOP_DATA")
    image = np.load(path)
    columns = find_columns(image)
    by_image, by_columns = orientation(image, "MoS2")[0], orientation(columns, "MoS2")[0]
    assert abs(np.degrees(by_image - by_columns)) < 0.5
    fit = fit_lattice(columns.position)
    spacing = np.sqrt(abs(np.linalg.det([fit.a1, fit.a2])) * np.sqrt(0.75))  # of the hexagon of the same area
    assert abs(spacing - {1: 21.4, 2: 21.1}[number]) < 0.4  # px, from the rings of its spectrum
