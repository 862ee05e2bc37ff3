"""Pictures of atom columns: geometry by closed forms, counts by conservation."""

from __future__ import annotations

import numpy as np
import pytest

from stemloop.core.errors import InputError, UnknownName
from stemloop.simulate import pictures


@pytest.mark.parametrize("name", pictures.PLANES)
def test_density_is_the_cells(name):
    plane = pictures.PLANES[name]
    made = pictures.layout(plane, (400, 300), 12.0, 0.3, margin=0.0)
    area = abs(np.linalg.det(plane.vectors_pm / 12.0))
    expected = 399 * 299 * len(plane.basis) / area
    assert abs(len(made.position) - expected) < 4 * np.sqrt(expected)  # columns on the rim


def test_rotation_runs_from_x_towards_y():
    turned = pictures.layout("Fe[001]", (200, 200), 20.0, np.deg2rad(10))
    middle = turned.position[(turned.cell == 0).all(axis=1) & (turned.site == 0)][0]
    beside = turned.position[(turned.cell == [1, 0]).all(axis=1) & (turned.site == 0)][0]
    assert np.allclose(beside - middle, 286.6 / 20 * np.array([np.sin(np.deg2rad(10)), np.cos(np.deg2rad(10))]))


def test_counts_are_those_of_the_gaussians():
    made = pictures.layout("SrTiO3[001]", (256, 256), 15.0, margin=40.0)
    image = pictures.mean_image(made, 1e4, background=0.0, shift=(1.3, -0.4))
    peak = 1e4 * 0.15**2 * pictures.PEAK_OF_DOSE
    assert image.sum() == pytest.approx((2 * np.pi * made.width**2 * made.weight * peak).sum(), rel=1e-4)
    y, x = np.mgrid[:256, :256]
    centre = np.array([(image * y).sum(), (image * x).sum()]) / image.sum()
    mass = made.width**2 * made.weight
    expected = (mass[:, None] * made.position).sum(axis=0) / mass.sum()
    assert np.allclose(centre - expected, np.array([1.3, -0.4]), atol=1e-3)


def test_row_jitter_moves_lines_along_x():
    made = pictures.layout("SrTiO3[001]", (64, 64), 15.0, margin=12.0)
    still = pictures.mean_image(made, 1e4)
    jitter = np.zeros(64)
    jitter[30] = 2.0
    moved = pictures.mean_image(made, 1e4, row_jitter=jitter)
    assert np.allclose(np.delete(moved, 30, 0), np.delete(still, 30, 0))
    assert np.allclose(moved[30, 4:], still[30, 2:-2], rtol=1e-6)


def test_vacancies_are_noted():
    rng = np.random.default_rng(3)
    whole = pictures.layout("SrTiO3[001]", (512, 512), 15.0)
    left = pictures.without(whole, 0.1, 1, rng)
    assert len(left.position) + len(left.vacant) == len(whole.position)
    assert (left.vacant_site == 1).all() and 0.05 < len(left.vacant) / (whole.site == 1).sum() < 0.16


def test_wrong_words_are_refused():
    with pytest.raises(UnknownName, match="SrTiO3"):
        pictures.layout("unobtainium", (64, 64), 15.0)
    with pytest.raises(InputError, match="8 x 8"):
        pictures.layout("MoS2", (4, 64), 15.0)
