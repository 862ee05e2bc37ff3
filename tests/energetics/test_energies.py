"""Laws of the models: elasticity, propagation of uncertainty, mixtures, determinism."""

import importlib.util

import numpy as np
import pytest

from stemloop.core.errors import InputError, MissingExtra, UnknownName
from stemloop.energetics import CALCULATORS, energy_model
from stemloop.energetics.energies import PROBABILITY_FLOOR, propagate
from stemloop.energetics.surface import Answer

NEAR = np.random.default_rng(5).normal(0, 0.005, (12, 3))


def stiffness(model):
    """(3, 3): second derivatives at rest [eV a cell]."""
    return model.surface.answer(np.zeros((1, 3))).hessian[0]


def test_equilibrium_is_the_calculators_own_minimum(graphene):
    lattice = graphene.equilibrium.lengths[0]
    assert 2.44 < lattice < 2.48
    energy, gradient = graphene.calculate(np.array([[0.0, 0.0, 0.0], [2e-3, 2e-3, 0], [-2e-3, -2e-3, 0]]))
    assert abs(energy[0]) < 1e-9 and (energy[1:] > 0).all()
    assert np.abs(gradient[0]).max() < 1e-2  # eV; 1 % strain makes about 1.5 eV


def test_elastic_constants_are_positive_and_isotropic(graphene):
    C = stiffness(graphene)
    assert np.linalg.eigvalsh(C).min() > 0
    np.testing.assert_allclose(C[0, 0], C[1, 1], rtol=1e-9)
    np.testing.assert_allclose(C[0, 0] - C[0, 1], C[2, 2] / 2, rtol=1e-9)  # C11 - C12 = 2 C66; e_xy is half a shear
    np.testing.assert_allclose(C[:2, 2], 0, atol=1e-9)
    area = graphene.equilibrium.lengths[0] ** 2 * np.sqrt(3) / 2
    young = (C[0, 0] ** 2 - C[0, 1] ** 2) / C[0, 0] / area * 16.0218  # N/m
    assert 300 < young < 450  # experiment 340(50) N/m, doi:10.1126/science.1157996; clamped ions are stiffer


def test_stress_is_the_derivative_of_energy(graphene):
    h, at = 1e-3, np.array([0.008, -0.004, 0.005])
    steps = np.concatenate([at + h * np.eye(3), at - h * np.eye(3), at[None]])
    energy, gradient = graphene.calculate(steps)
    slope = (energy[:3] - energy[3:6]) / (2 * h)
    np.testing.assert_allclose(gradient[6], slope, atol=2e-3)  # third derivative (about 1e3 eV) times h^2, SCF noise


def test_supercells_agree(graphene, place):
    other = energy_model("graphene", supercell=5, cache=place, workers=1)
    strain = np.array([[0.02, 0.02, 0.0], [0.02, 0.0, 0.0]])
    np.testing.assert_allclose(other.calculate(strain)[0], graphene.calculate(strain)[0], rtol=0.02)
    other.calculations.close()


# ------------------------------------------------------------------------------------------------- uncertainty


def test_moments_are_exact_for_a_quadratic_energy():
    """Monte Carlo of a quadratic form: 400 000 draws leave 0.2 % of the deviation on the mean, 0.4 % on the spread."""
    rng = np.random.default_rng(0)
    H = np.array([[180.0, 40.0, 5.0], [40.0, 160.0, -3.0], [5.0, -3.0, 250.0]])
    A = rng.normal(0, 3e-3, (3, 3))
    C, truth = A @ A.T, np.array([0.004, -0.003, 0.002])
    noisy = truth + rng.multivariate_normal(np.zeros(3), C, 400_000)
    energies = 0.5 * np.einsum("ni,ij,nj->n", noisy, H, noisy)
    at_truth = Answer(np.array([0.5 * truth @ H @ truth]), np.zeros(1), (H @ truth)[None], H[None])
    value, sigma = propagate(at_truth, C[None])
    assert energies.std() == pytest.approx(sigma[0], rel=0.01)
    assert energies.mean() - at_truth.energy[0] == pytest.approx(at_truth.energy[0] - value[0], rel=0.02)


def test_corrected_energies_have_the_true_mean_on_the_real_surface(graphene, descriptors):
    """Noisy descriptors of one true strain: the mean of the answers is the truth, their spread what sigma says."""
    rng, deviation, truth = np.random.default_rng(1), 2e-3, np.array([0.006, -0.002, 0.003])
    mean = np.array([0.002, 0.004, 0.003]) + rng.normal(0, deviation, (4000, 3))
    strain = np.stack([mean[:, 0] + mean[:, 1], mean[:, 0] - mean[:, 1], mean[:, 2]], axis=1)
    said = graphene(descriptors(strain, [deviation] * 3))
    true = graphene.surface.answer(truth[None]).energy[0]
    standard_error = said.value.std() / np.sqrt(4000)
    assert abs(said.value.mean() - true) < 4 * standard_error + 0.01 * true  # and 1 % for the cubic terms
    C = descriptors(truth[None], [deviation] * 3).strain_covariance
    _, predicted = propagate(graphene.surface.answer(truth[None]), C)
    assert said.value.std() == pytest.approx(predicted[0], rel=0.05)
    assert 1.0 < np.sqrt(np.mean(said.sigma**2)) / said.value.std() < 1.4  # noise steepens the gradient at s: cautious


def test_without_noise_only_the_surface_is_uncertain(graphene, descriptors):
    said = graphene(descriptors(NEAR, (0.0, 0.0, 0.0)))
    energy, sigma = graphene.surface.energies(NEAR)
    np.testing.assert_allclose(said.value, energy, atol=1e-12)
    np.testing.assert_allclose(said.sigma, sigma, atol=1e-12)


def test_vacuum_has_no_strain_energy(graphene, descriptors):
    full = graphene(descriptors(NEAR[:2]))
    half = graphene(descriptors(NEAR[:2], vacuum=0.25))
    none = graphene(descriptors(10 * np.ones((2, 3)), vacuum=1.0))
    np.testing.assert_allclose(half.value, 0.75 * full.value)
    np.testing.assert_allclose(half.sigma**2, 0.75 * full.sigma**2 + 0.1875 * full.value**2)
    assert not none.value.any() and not none.gradient.any()


def test_a_wild_strain_is_counted_and_very_uncertain(graphene, descriptors):
    before = graphene.counts
    said = graphene(descriptors([[0.3, 0.3, 0.0]]))
    assert graphene.counts == before | {"beyond_limit": before["beyond_limit"] + 1}
    assert said.sigma[0] > said.value[0]


def test_nothing_in_nothing_out(graphene, descriptors):
    assert len(graphene(descriptors(np.zeros((0, 3))))) == 0


# ------------------------------------------------------------------------------------------------- determinism


def test_a_cold_and_a_warm_cache_give_the_same_run(tmp_path, descriptors):
    def run():
        model = energy_model("graphene", supercell=4, cache=tmp_path, workers=2)
        parts = [model(descriptors(part)) for part in (NEAR[:4], NEAR[4:8], 3 * NEAR[8:])]
        model.calculations.close()
        return model, np.concatenate([[p.value, p.sigma] for p in parts], axis=1)

    cold, first = run()
    warm, second = run()
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(cold.surface.nodes, warm.surface.nodes)
    assert cold.counts["calculator_calls"] > 5 and warm.counts["calculator_calls"] == 0
    assert cold.counts["calculator_calls"] + cold.counts["cache_hits"] == warm.counts["cache_hits"]


# ----------------------------------------------------------------------------------------------------- defects


def test_formation_energies_of_graphene(place, descriptors):
    model = energy_model("graphene", supercell=4, cache=place, workers=1, quantity="defect_energy")
    formation = model.formation_eV
    assert formation["pristine"] == 0
    assert 6.5 < formation["vacancy"] < 9  # DFT 7.3 to 8.2 eV in such cells
    assert 0 < formation["dopant"] < formation["vacancy"]
    sure = model(descriptors(np.zeros((1, 3)), site=(0.0, 1.0, 0.0)))
    unsure = model(descriptors(np.zeros((1, 3)), site=(0.7, 0.3, 0.0)))
    none = model(descriptors(np.zeros((1, 3)), site=(0.0, 1.0, 0.0), vacuum=1.0))
    assert sure.value[0] == formation["vacancy"] and none.value[0] == 0
    assert 0 < sure.sigma[0] < 3 * np.sqrt(PROBABILITY_FLOOR) * formation["vacancy"]
    np.testing.assert_allclose(unsure.value, 0.3 * formation["vacancy"])
    np.testing.assert_allclose(unsure.sigma, np.sqrt(0.21) * formation["vacancy"], rtol=0.01)  # the floor
    model.calculations.close()


def test_a_material_without_defects_says_which_have_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(InputError, match=r"SrTiO3 has no defects.*MoS2"):
        energy_model("SrTiO3", quantity="defect_energy")


# ------------------------------------------------------------------------------------------------------- names


def test_names_that_are_not_known(tmp_path):
    for wrong in ({"material": "MoS3"}, {"material": "MoS2", "calculator": "GFN9"}):
        with pytest.raises(UnknownName):
            energy_model(**wrong, cache=tmp_path)
    with pytest.raises(UnknownName, match="strain_energy"):
        energy_model("MoS2", quantity="stran_energy", cache=tmp_path)


def test_a_missing_chgnet_is_one_line_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        energy_model("SrTiO3")
    assert "pip install 'stemloop[ml]'" in str(caught.value) and "\n" not in str(caught.value)


def test_mos2_is_isotropic_and_soft_in_the_plane(place, descriptors):
    model = energy_model("MoS2", supercell=3, cache=place, workers=2)
    said = model(descriptors(NEAR, phase="MoS2"))
    C = stiffness(model)
    assert np.linalg.eigvalsh(C).min() > 0
    strain = 0.7 * NEAR[:2]
    np.testing.assert_allclose(model.surface.answer(strain).energy, model.calculate(strain)[0], atol=2e-5)
    assert (said.sigma > 0).all()
    model.calculations.close()


@pytest.mark.slow
def test_mos2_in_its_default_supercell(place, descriptors):
    model = energy_model("MoS2", cache=place, workers=2)
    model(descriptors(2 * NEAR, phase="MoS2"))
    strain = NEAR[:2]
    np.testing.assert_allclose(model.surface.answer(strain).energy, model.calculate(strain)[0], atol=5e-5)
    assert model.counts["calculator_cpu_s"] < 250
    model.calculations.close()


def test_relaxed_ions_are_softer(place):
    """Relaxation can only lower an energy: clamped is an upper bound, and the gradient stays that of the energy."""
    clamped = energy_model("graphene", supercell=2, cache=place, workers=1)
    relaxed = energy_model("graphene", supercell=2, cache=place, workers=1, relax_internal=True)
    strain = np.array([[0.02, -0.02, 0.0], [0.022, -0.022, 0.0], [0.018, -0.018, 0.0]])
    hard, _ = clamped.calculate(strain[:1])
    soft, gradient = relaxed.calculate(strain)
    assert soft[0] < hard[0] - 1e-4
    slope = (soft[1] - soft[2]) / 4e-3
    np.testing.assert_allclose(gradient[0, 0] - gradient[0, 1], slope, rtol=0.02)  # dE/de_diff
    for model in (clamped, relaxed):
        model.calculations.close()


def test_srtio3_with_chgnet(place, descriptors):
    pytest.importorskip("chgnet", reason="the extra stemloop[ml] is not installed")
    model = energy_model("SrTiO3", cache=place, workers=1)
    said = model(descriptors(NEAR, phase="SrTiO3"))
    assert model.equilibrium.lengths[0] == pytest.approx(3.943, abs=0.01)
    assert np.linalg.eigvalsh(stiffness(model)).min() > 0 and np.isfinite(said.value).all()
    strain = 0.7 * NEAR[:4]
    # CHGNet's energies carry a noise of 0.2 meV (single precision and neighbours that enter its cut-off): 2.5 of it
    np.testing.assert_allclose(model.surface.answer(strain).energy, model.calculate(strain)[0], atol=5e-4)
    model.calculations.close()


def test_every_calculator_has_its_material_or_is_for_tests():
    # a page of the documentation registers one of its own where its blocks run in the same process
    assert set(CALCULATORS) - {"argon"} == {"GFN1-xTB", "CHGNet", "EMT"}
