"""Gaussians at given places: where they are, how well that is known, and which are no columns."""

import numpy as np
import pytest
from scipy import ndimage

from stemloop.core.errors import InputError
from stemloop.describe.finding.refining import refine
from stemloop.simulate import pictures


def crystal(dose, seed=0):
    rng = np.random.default_rng(seed)
    whole = pictures.layout("SrTiO3[001]", (200, 220), 15, 0.2, margin=8)
    return pictures.counted(pictures.mean_image(whole, dose), rng), whole.position, rng


def test_places_that_are_off_come_back_to_the_columns():
    image, true, rng = crystal(3e4)
    columns, which = refine(image, true + rng.normal(0, 0.7, true.shape), 3.0)
    assert len(which) == len(true)
    pulls = (columns.position - true[which]) / columns.sigma
    assert 0.85 < pulls.std() < 1.2  # about 500 coordinates
    assert np.abs(columns.width / 3.0 - 1).max() < 0.25


def test_what_is_no_column_is_left_out():
    image, true, _ = crystal(3e4)
    between = true[:40] + np.array([5.0, 4.0])
    _, which = refine(image, np.concatenate([true, between]), 3.0)
    assert np.isin(np.arange(len(true)), which).mean() > 0.98
    assert (which >= len(true)).sum() <= 1


def test_a_place_is_answered_once():
    image, true, _ = crystal(3e4)
    _, which = refine(image, np.concatenate([true, true[:10] + 0.8]), 3.0)
    assert len(which) == len(true)


def test_grey_levels_are_those_of_the_image():
    image, true, _ = crystal(3e4)
    one, _ = refine(image, true, 3.0)
    other, _ = refine(7 * image + 300, true, 3.0)
    assert np.allclose(other.amplitude, 7 * one.amplitude, rtol=1e-3)
    assert np.allclose(other.background, 7 * one.background + 300, atol=0.01 * other.amplitude.max())
    assert np.allclose(other.position, one.position, atol=1e-3)


def test_no_place_is_no_column_and_a_constant_image_is_refused():
    image, _, _ = crystal(3e4)
    columns, which = refine(image, np.zeros((0, 2)), 3.0)
    assert len(columns) == len(which) == 0
    with pytest.raises(InputError):
        refine(np.full((64, 64), 2.0), np.zeros((0, 2)), 3.0)


def rough(power, seed):
    """Lone atoms on counting noise and on a support whose roughness is ``power`` times the atoms' amplitude, both 3 px
    wide where they are sharpest."""
    rng = np.random.default_rng(seed)
    true = np.zeros((0, 2))
    while len(true) < 60:
        place = rng.uniform(15, 385, (1, 2))
        if len(true) == 0 or np.hypot(*(true - place).T).min() > 24:
            true = np.concatenate([true, place])
    y, x = np.indices((400, 400))
    atoms = sum(np.exp(-0.5 * ((y - p[0]) ** 2 + (x - p[1]) ** 2) / 9) for p in true)
    support = ndimage.gaussian_filter(rng.normal(size=(400, 400)), 3)
    mean = 300 + 200 * (atoms + power * support / support.std())
    return rng.poisson(np.maximum(mean, 0)).astype(float), true, rng


@pytest.mark.parametrize("power", [0.0, 0.03, 0.1])
def test_deviations_of_lone_columns_hold_on_a_rough_support(power):
    pulls = []
    for seed in range(4):
        image, true, rng = rough(power, seed)
        columns, which = refine(image, true + rng.normal(0, 0.5, true.shape), 3.0)
        pulls.append((columns.position - true[which]) / columns.sigma)
    within = np.mean(np.abs(np.concatenate(pulls)) < 1)
    # 0.68 if exact, 480 coordinates scatter by 0.021. Measured are 0.69 to 0.74: the rougher the support, the more of
    # the fits that it pulls farthest are left out. By counting noise alone it would be 0.43 and 0.15
    assert 0.62 < within < 0.80
