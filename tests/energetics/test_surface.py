"""The learned surface on energies that are known in closed form, and against the calculator itself."""

import numpy as np
import pytest

from stemloop.core.errors import CalculationError, InputError
from stemloop.energetics.surface import LIMIT, NATURAL, Invariants, Surface, images


class Known:
    """A smooth energy of hexagonal symmetry that is not a polynomial, with its gradient."""

    def __init__(self):
        self.asked = []

    def __call__(self, strain):
        self.asked.append(strain.copy())
        m, d, x = (strain @ NATURAL.T).T
        r2, q = d**2 + x**2, d**3 - 3 * d * x**2
        soft = np.exp(-6 * m)
        energy = 150 * m**2 * soft + 40 * r2 * np.exp(-4 * m) + 200 * q
        by_m = 150 * (2 * m - 6 * m**2) * soft - 160 * r2 * np.exp(-4 * m)
        by_d = 80 * d * np.exp(-4 * m) + 200 * (3 * d**2 - 3 * x**2)
        by_x = 80 * x * np.exp(-4 * m) - 1200 * d * x
        return energy, np.stack([by_m, by_d, by_x], axis=1) @ NATURAL


STRAINS = np.random.default_rng(3).normal(0, 0.008, (60, 3))


@pytest.mark.parametrize("symmetry", ["hexagonal", "square", "none"])
def test_features_are_invariant_and_their_derivatives_are_those_of_their_values(symmetry):
    features = Invariants(symmetry)
    u = np.random.default_rng(0).normal(0, 0.5, (5, 3))
    values = features.derivative(u, (0, 0, 0))
    for image in images(symmetry):
        np.testing.assert_allclose(features.derivative(u @ image.T, (0, 0, 0)), values, atol=1e-12)
    h = 1e-5  # central differences: error h^2 times a third derivative of order 100
    for i, step in enumerate(h * np.eye(3)):
        slope = (features.derivative(u + step, (0, 0, 0)) - features.derivative(u - step, (0, 0, 0))) / (2 * h)
        np.testing.assert_allclose(features.jacobian(u)[:, i], slope, atol=1e-7)
        bend = (features.jacobian(u + step) - features.jacobian(u - step)) / (2 * h)
        np.testing.assert_allclose(features.hessian(u)[:, i], bend, atol=1e-6)


def test_it_reaches_the_tolerance_and_says_so_honestly():
    surface = Surface(Known(), "hexagonal")
    energy, sigma = surface.energies(STRAINS, 1e-4)
    truth, gradient = Known()(STRAINS)
    assert surface.inside(STRAINS).all() and (sigma <= 1e-4).all()
    assert np.abs(energy - truth).max() < 1e-4
    assert (np.abs(energy - truth) < 4 * sigma + 1e-6).all()
    answer = surface.answer(STRAINS)
    np.testing.assert_allclose(answer.gradient, gradient, atol=0.02)  # of up to 8 eV
    h = 1e-5
    for i, step in enumerate(h * np.eye(3)):
        bend = (surface.answer(STRAINS + step).gradient - surface.answer(STRAINS - step).gradient) / (2 * h)
        np.testing.assert_allclose(answer.hessian[:, i], bend, rtol=1e-5, atol=1e-3)


def test_zero_strain_is_the_minimum():
    surface = Surface(Known(), "hexagonal")
    surface.energies(STRAINS)
    at_rest = surface.answer(np.zeros((1, 3)))
    assert at_rest.energy[0] == 0 and not at_rest.gradient.any() and at_rest.sigma[0] == 0
    assert np.linalg.eigvalsh(at_rest.hessian[0]).min() > 0


def test_what_is_asked_depends_on_the_strains_alone_and_resumes():
    first, second = Surface(Known(), "hexagonal"), Surface(Known(), "hexagonal")
    for part in np.split(STRAINS, 6):
        a, b = first.energies(part), second.energies(part)
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first.nodes, second.nodes)
    assert len(np.unique(first.nodes, axis=0)) == len(first.nodes)


def test_a_fork_does_not_touch_the_run():
    surface = Surface(Known(), "hexagonal")
    surface.energies(STRAINS[:5])
    nodes = surface.nodes.copy()
    surface.fork().energies(np.array([[0.05, 0.03, 0.0]]))
    np.testing.assert_array_equal(surface.nodes, nodes)


def test_outside_the_hull_it_calculates_or_owns_up():
    surface = Surface(Known(), "hexagonal")
    surface.energies(STRAINS[:5])
    far = np.array([[0.045, 0.045, 0.01]])
    assert surface.energies(far, tolerance_eV=None)[1][0] == np.inf
    before = len(surface.nodes)
    energy, _ = surface.energies(far)
    assert len(surface.nodes) > before and surface.inside(far).all()
    assert abs(energy[0] - Known()(far)[0][0]) < 1e-3


def test_beyond_the_limit_it_refuses():
    with pytest.raises(CalculationError, match="beyond"):
        Surface(Known(), "hexagonal").energies(np.array([[2 * LIMIT, 0.0, 0.0], [2 * LIMIT, 2 * LIMIT, 0.0]]))


def test_an_unknown_symmetry_is_named():
    with pytest.raises(InputError, match="oblique"):
        Surface(Known(), "oblique")


def test_a_turned_crystal_is_the_same_crystal():
    """E in axes turned by theta equals E of the strain turned back: R e R^T."""
    theta = 0.4
    c, s = np.cos(theta), np.sin(theta)
    turn = np.array([[c, -s], [s, c]])
    straight, turned = Surface(Known(), "hexagonal"), Surface(Known(), "hexagonal", rotation_rad=theta)
    strain = np.array([[0.012, -0.006, 0.004]])
    crystal = np.array([[strain[0, 0], strain[0, 2]], [strain[0, 2], strain[0, 1]]])
    image = turn @ crystal @ turn.T
    seen = np.array([[image[0, 0], image[1, 1], image[0, 1]]])
    np.testing.assert_allclose(turned.energies(seen)[0], straight.energies(strain)[0], atol=1e-9)


def test_symmetry_saves_nodes_and_changes_nothing():
    hexagonal, plain = Surface(Known(), "hexagonal"), Surface(Known(), "none")
    a, _ = hexagonal.energies(STRAINS, 1e-4)
    b, _ = plain.energies(STRAINS, 1e-4)
    np.testing.assert_allclose(a, b, atol=2e-4)
    assert len(hexagonal.nodes) < len(plain.nodes)


def test_leave_one_out_errors_are_within_their_deviations():
    surface = Surface(Known(), "hexagonal")
    surface.energies(STRAINS)
    error, deviation = surface.held_out()
    assert (np.abs(error) < 4 * deviation).all()


def test_graphene_surface_against_direct_calculations(graphene):
    """Held out: random strains inside the nodes' hull, calculated directly."""
    drawn = np.random.default_rng(11).normal(0, 0.006, (30, 3))
    strain = drawn[graphene.surface.inside(drawn)][:6]
    energy, gradient = graphene.calculate(strain)
    answer = graphene.surface.answer(strain)
    assert np.abs(answer.energy - energy).max() < 2e-5  # eV a cell; the tolerance asked for was 3e-4
    assert (np.abs(answer.energy - energy) < 4 * answer.sigma).all()
    np.testing.assert_allclose(answer.gradient, gradient, atol=1e-2)


def test_symmetry_of_graphene_holds_in_the_calculator(graphene):
    """Reduction by point symmetry is allowed because images of a strain have the same energy (to SCF noise)."""
    s = np.array([0.004, 0.011, 0.007])
    orbit = np.array([np.linalg.solve(NATURAL, image @ s) for image in images("hexagonal")[[0, 1, 2]]])
    energy, _ = graphene.calculate(orbit)
    assert np.ptp(energy) < 1e-5
