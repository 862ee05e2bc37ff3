import numpy as np
import pytest
from kinematic import discs

from stemloop.learn.geometry import (
    LATTICES,
    MIRRORS,
    deformation,
    mirrored,
    polar,
    reflections,
    rotation,
    strain_of,
    transposed,
    turned,
)

STRETCH = np.array([0.012, -0.02, 0.015, 0.06])


def random_stretch(n=50, seed=0):
    return np.random.default_rng(seed).normal(0, [0.02, 0.02, 0.02, 0.3], (n, 4))


def test_polar_and_deformation_are_inverse():
    stretch = random_stretch()
    np.testing.assert_allclose(polar(deformation(stretch)), stretch, atol=1e-14)


def test_strain_of_undoes_a_gradient_on_a_turned_reference_lattice():
    rng = np.random.default_rng(1)
    e_mean, e_diff, e_xy, w = rng.normal(0, 0.02, 4)
    gradient = np.array([[1 + e_mean + e_diff, e_xy - w], [e_xy + w, 1 + e_mean - e_diff]])
    whole = gradient @ rotation(np.array(0.4))
    np.testing.assert_allclose(strain_of(polar(whole[None]), 0.4)[0], [e_mean, e_diff, e_xy, w], atol=1e-14)


def test_labels_turn_with_the_pattern():
    stretch, angle = random_stretch(), 0.7
    turn = rotation(np.array(angle))
    np.testing.assert_allclose(polar(turn @ deformation(stretch)), turned(stretch, angle), atol=1e-13)


@pytest.mark.parametrize("mirror", MIRRORS)
@pytest.mark.parametrize("phase", LATTICES)
def test_a_mirrored_pattern_is_the_pattern_of_the_mirrored_labels(phase, mirror):
    labels = np.concatenate([STRETCH, [0.01, -0.02]])[None]
    pattern = discs(phase, STRETCH, 4.0)[None].astype(np.float32)
    seen, moved = mirrored(pattern, labels, mirror)
    expected = discs(phase, moved[0, :4], 4.0)
    np.testing.assert_allclose(seen[0, 1:, 1:], expected[1:, 1:], atol=1e-8)
    signs = {"none": (1, 1), "x": (1, -1), "y": (-1, 1), "half-turn": (-1, -1)}[mirror]
    np.testing.assert_array_equal(moved[0, 4:], labels[0, 4:] * signs)


def test_exchanging_x_and_y_is_a_symmetry_of_square_lattices():
    labels = np.concatenate([STRETCH, [0.01, -0.02]])[None]
    seen, moved = transposed(discs("SrTiO3", STRETCH, 4.0)[None].astype(np.float32), labels)
    np.testing.assert_allclose(seen[0], discs("SrTiO3", moved[0, :4], 4.0), atol=1e-8)
    assert moved[0, 4:].tolist() == [-0.02, 0.01]


@pytest.mark.parametrize("phase", LATTICES)
def test_reflections_are_reciprocal_to_the_lattice(phase):
    a, kind = LATTICES[phase]
    vectors = np.array([[a, 0], [0, a]]) if kind == "square" else np.array([[a, 0], [a / 2, a * 3**0.5 / 2]])
    products = reflections(phase) @ vectors.T
    np.testing.assert_allclose(products, np.rint(products), atol=1e-12)
    assert {tuple(g) for g in reflections(phase).round(9) + 0.0} == {
        tuple(-g) for g in reflections(phase).round(9) + 0.0
    }
