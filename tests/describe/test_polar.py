"""Polar displacements, variants, walls and vortices of fields whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import cKDTree

from describe import domains
from describe.truth import assignment_of, columns_of
from stemloop.core.errors import InputError
from stemloop.core.structure import Assignment
from stemloop.describe.atoms import find_columns
from stemloop.describe.ferroic import winding
from stemloop.describe.lattices import assign
from stemloop.describe.polar import polar, vortices, walls
from stemloop.simulate.pictures import counted, jittered, layout, mean_image, without


def measured(whole, seed=0, noise=True, dose=1e4):
    on = domains.inner(whole)
    columns = columns_of(on, dose, seed=seed, noise=noise)
    return columns, assignment_of(on, columns)


def strip(whole, seed=0, **kind):
    return polar(*measured(whole, seed), **kind)


# ------------------------------------------------------------------------------------------------ winding numbers


@pytest.mark.parametrize("turns", [-2, -1, 0, 1, 2])
def test_a_power_of_the_place_winds_as_often_as_its_exponent(turns):
    y, x = np.mgrid[-4:5, -4:5] + np.array([0.43, 0.31])[:, None, None]
    angle = turns * np.arctan2(y, x) + 0.3
    assert winding.plaquettes(angle).sum() == -turns  # the first axis is y, so the loops run the other way
    rim = np.concatenate([angle[0, :-1], angle[:-1, -1], angle[-1, :0:-1], angle[:0:-1, 0]])
    assert winding.along(rim) == turns


def test_the_windings_inside_are_the_winding_along_the_rim():
    rng = np.random.default_rng(0)
    for _ in range(20):
        angle = rng.uniform(-np.pi, np.pi, (9, 13))
        rim = np.concatenate([angle[:-1, 0], angle[-1, :-1], angle[:0:-1, -1], angle[0, :0:-1]])
        assert winding.plaquettes(angle).sum() == winding.along(rim)


def test_smoothing_says_how_sure_it_is():
    rng = np.random.default_rng(1)
    sigma = np.where(np.arange(60)[:, None, None] < 30, 0.5, 2.0) * np.ones((60, 70, 2))
    left = [winding.smooth(sigma * rng.standard_normal(sigma.shape), sigma, 1.0) for _ in range(40)]
    pulls = np.array([m / s for m, s in left])
    assert pulls.std() == pytest.approx(1.0, abs=0.02)  # 336,000 numbers, about 12 of them to one that is independent
    constant, _ = winding.smooth(np.full(sigma.shape, 3.0), sigma, 1.0)
    assert np.allclose(constant, 3.0)


def test_noise_has_no_charges():
    rng = np.random.default_rng(2)
    for _ in range(30):
        sigma = np.ones((40, 40, 2))
        mean, left = winding.smooth(rng.standard_normal(sigma.shape), sigma, 1.5)
        assert not winding.charges(mean, left)


# -------------------------------------------------------------------------------------------------- displacements


@pytest.mark.parametrize("plane", ["BaTiO3[100]", "SrTiO3[110]", "MoS2"])
@pytest.mark.parametrize("rotation", [0.0, 0.3])
def test_a_uniform_displacement_is_measured_under_any_affine_strain(plane, rotation):
    strain = np.array([[1.01, 0.015], [-0.01, 0.99]])
    whole = layout(plane, (300, 300), 15.0, rotation, margin=3.0)
    position = whole.position @ strain
    position[whole.site == 1] += [0.9, -0.4]
    columns, assignment = measured(replace(whole, position=position, shape=(320, 320)), noise=False)
    found = polar(columns, assignment)
    assert len(found) > 60
    assert np.allclose(found.vector, [0.9, -0.4], atol=1e-9)
    assert np.allclose(polar(columns, assignment, relative="mean").vector, 0, atol=1e-9)
    assert np.allclose(polar(columns, assignment, relative="mean").offset, [0.9, -0.4])


def test_deviations_are_those_of_the_displacements():
    whole = domains.displaced(domains.uniform)
    found = strip(whole, seed=5)
    pulls = (found.vector - domains.SHIFT_PM / 15 * np.array([0.6, -0.8])) / found.sigma
    # the deviations may be widened by what neighbours show, which 200 cells know to about a tenth
    assert 0.85 < pulls.std() < 1.1
    assert np.abs(pulls.mean(axis=0)).max() < 4 / np.sqrt(len(found))


def test_static_disorder_widens_the_deviations():
    still = strip(layout("SrTiO3[001]", (400, 400), 15.0))
    moved = strip(jittered(layout("SrTiO3[001]", (400, 400), 15.0), 10.0, np.random.default_rng(0)))
    ratio = np.median(moved.sigma) / np.median(still.sigma)
    own = np.median(still.sigma)
    assert ratio == pytest.approx(np.hypot(own, 10 / 15 * np.sqrt(1.25)) / own, rel=0.2)
    assert abs(moved.coherence) < 4.5 and (moved.variant == -1).all()


def test_a_lost_corner_is_made_up_for_by_the_others():
    whole = without(domains.displaced(domains.uniform), 0.05, 0, np.random.default_rng(0))
    found = polar(*measured(whole, noise=False))
    assert np.allclose(found.vector, domains.SHIFT_PM / 15 * np.array([0.6, -0.8]), atol=1e-9)
    assert len(found) > 0.97 * 14 * 13


# ------------------------------------------------------------------------------------- variants, walls, vortices


@pytest.mark.parametrize("given", [None, 4])
def test_flux_closure_has_four_variants_four_walls_and_one_vortex(given):
    found = polar(*domains.seen(domains.displaced(domains.closure)), variants=given)
    assert np.allclose(np.sort(np.rad2deg(found.direction)) % 360 % 90 % 85, 0, atol=8)
    assert len(found.direction) == 4
    lines = walls(found)
    assert [d.detail["type"] for d in lines] == ["90"] * 4
    for line in lines:
        assert abs(line.detail["angle_deg"] - 90) < 4 * line.detail["sigma_deg"]
        assert line.detail["charge"] == "neutral" and line.p > 0.8
        # on a diagonal, give or take a third of a cell
        off = np.abs(line.place - 199.5)
        assert np.abs(off[:, 0] - off[:, 1]).mean() < 26.6 / 3 * np.sqrt(2)
    (core,) = vortices(found)
    assert core.detail["winding"] == 1
    assert (core.detail["character"], core.detail["sense"]) == ("vortex", "clockwise")
    assert np.hypot(*(core.place[0] - 199.5)) < 26.6 / 2 and core.p > 0.95


def test_stripes_have_walls_of_180_degrees_and_no_vortex():
    found = polar(*domains.seen(domains.displaced(domains.stripes)))
    assert len(found.direction) == 2
    lines = walls(found)
    assert len(lines) == 3
    for line in lines:
        assert line.detail["type"] == "180" and line.detail["charge"] == "neutral"
        assert abs(line.detail["angle_deg"] - 180) < 4 * line.detail["sigma_deg"] + 3
        off = (line.place[:, 1] - 199.5 + 53) % 106.5 - 53
        assert np.abs(off).max() < 26.6  # walls of a crystal lie between its cells
        assert line.detail["width_px"] < 26.6
    assert not vortices(found)
    assert found.region.max() == 3


def test_an_array_of_vortices_and_antivortices():
    found = polar(*domains.seen(domains.displaced(domains.array, shape=(512, 512))))
    cores = vortices(found)
    assert len(found.direction) == 0 and not walls(found)  # it turns steadily
    assert sorted(d.detail["winding"] for d in cores) == [-1, -1, -1, -1, 1]
    for core in cores:
        expected = np.zeros(2) if core.detail["winding"] == 1 else 105.0 * np.sign(core.place[0] - 255.5)
        assert np.abs(core.place[0] - 255.5 - expected).max() < max(5 * core.detail["sigma_px"], 13)
        assert core.detail["character"] == ("vortex" if core.detail["winding"] == 1 else "antivortex")


@pytest.mark.parametrize(
    "turn, phase, character, sense",
    [(1, 0.0, "hedgehog", "source"), (1, np.pi, "hedgehog", "sink"), (1, np.pi / 2, "vortex", "clockwise"),
     (1, -np.pi / 2, "vortex", "anticlockwise"), (-1, 0.4, "antivortex", ""), (2, 0.2, "multiple", "")],
)  # fmt: skip
def test_charges_are_known_by_their_turns(turn, phase, character, sense):
    found = strip(domains.displaced(lambda r: domains.around(r, turn, phase), rotation=0.2))
    cores = vortices(found)
    assert sum(d.detail["winding"] for d in cores) == turn
    if turn != 2:  # a double charge is one on a large loop, or two on small ones
        assert (cores[0].detail["character"], cores[0].detail["sense"]) == (character, sense)
        assert np.abs(cores[0].place[0] - 199.5).max() < 4 * cores[0].detail["sigma_px"]


def test_the_place_of_a_vortex_is_known_as_well_as_it_says():
    pulls = []
    on = domains.inner(domains.displaced(domains.around))
    assignment = assignment_of(on)
    for seed in range(12):
        (core,) = vortices(polar(columns_of(on, seed=seed), assignment))
        pulls.append((core.place[0] - 199.5) / core.detail["sigma_px"])
    assert 0.6 < np.std(pulls) < 1.5  # 24 numbers: a seventh, and a field that is not affine


def test_the_width_of_a_wall_is_that_of_its_profile():
    def wide(r):
        return np.column_stack([np.tanh(r[:, 1] / 40), 0 * r[:, 1]])

    line = walls(strip(domains.displaced(wide), seed=3))[0]
    assert line.detail["type"] == "180"
    assert abs(line.detail["width_px"] - 80) < 3 * line.detail["width_sigma_px"] < 60


def test_charged_walls_are_known():
    def against(r):
        return np.column_stack([0 * r[:, 1], -np.sign(r[:, 1])])

    assert walls(strip(domains.displaced(against)))[0].detail["charge"] == "head-to-head"
    assert walls(strip(domains.displaced(lambda r: -against(r))))[0].detail["charge"] == "tail-to-tail"


def test_a_uniform_polarisation_is_one_variant():
    found = strip(domains.displaced(domains.uniform))
    assert len(found.direction) == 1 and (found.variant == 0).all() and (found.region == 0).all()
    assert abs(found.direction[0] - np.arctan2(0.6, -0.8)) < 4 * found.direction_sigma[0]
    assert not walls(found) and not vortices(found)
    assert (strip(domains.displaced(domains.uniform), relative="mean").variant == -1).all()


# -------------------------------------------------------------------------------------------- symmetry, nothing


@pytest.mark.parametrize("change", ["turn", "mirror"])
def test_a_turned_or_mirrored_image_gives_the_turned_or_mirrored_answer(change):
    image = counted(mean_image(domains.displaced(domains.closure), 1e4), np.random.default_rng(4))
    other = np.rot90(image, -1) if change == "turn" else image[:, ::-1]  # (row, col) -> (col, 399 - row)
    answers = []
    for picture in (image, np.ascontiguousarray(other)):
        columns = find_columns(picture)
        answers.append(polar(columns, assign(columns, picture.shape)))
    before, after = answers
    if change == "turn":
        place = np.column_stack([before.place[:, 1], 399 - before.place[:, 0]])
        vector = np.column_stack([before.vector[:, 1], -before.vector[:, 0]])
    else:
        place = np.column_stack([before.place[:, 0], 399 - before.place[:, 1]])
        vector = before.vector * [1, -1]
    off = np.hypot(*(place[:, None] - after.place[None]).transpose(2, 0, 1))
    pair, far = off.argmin(axis=1), off.min(axis=1)
    assert (far < 1).mean() > 0.98
    assert np.median(np.abs(vector - after.vector[pair])[far < 1]) < 0.1 * np.median(before.sigma)
    ours, theirs = (vortices(a) for a in answers)
    assert [d.detail["winding"] for d in ours] == [d.detail["winding"] for d in theirs] == [1]
    assert ours[0].detail["sense"] == "clockwise"
    assert theirs[0].detail["sense"] == ("clockwise" if change == "turn" else "anticlockwise")
    assert sorted(d.detail["type"] for d in walls(after)) == ["90"] * 4


def test_strontium_titanate_has_nothing():
    whole = domains.inner(domains.displaced(domains.nothing, plane="SrTiO3[001]"))
    assignment = assignment_of(whole)
    polar_cells = 0
    for seed in range(40):
        found = polar(columns_of(whole, seed=seed), assignment)
        polar_cells += int((found.p_polar > 0.5).any())
        assert not walls(found) and not vortices(found)
    assert polar_cells == 0


def test_an_image_of_strontium_titanate_has_nothing():
    found = polar(*domains.seen(domains.displaced(domains.nothing, plane="SrTiO3[001]"), seed=9))
    assert len(found) > 150 and (found.variant == -1).all()
    assert not walls(found) and not vortices(found)


def test_one_kind_of_column_or_no_lattice_has_no_displacements():
    iron = polar(*measured(layout("Fe[001]", (200, 200), 15.0)), site=1)
    dumbbells = polar(*measured(layout("Si[110]", (200, 200), 15.0)))
    columns, _ = measured(layout("Fe[001]", (200, 200), 15.0))
    none = Assignment(
        np.full(len(columns), -1), np.zeros((len(columns), 2), int), np.full(len(columns), -1),
        np.zeros((len(columns), 0)), *(np.full((len(columns), 2), np.nan) for _ in range(3)),
        np.ones(len(columns), bool), np.zeros((0, 2)), np.zeros(0, int), np.zeros(0, int), (),
    )  # fmt: skip
    for found in (iron, dumbbells, polar(columns, none)):
        assert (found.vector.shape[1], len(found.direction)) == (2, 0)
        assert not walls(found) and not vortices(found)
    assert len(dumbbells) == len(polar(columns, none)) == 0


def test_wrong_words_are_refused():
    columns, assignment = measured(layout("SrTiO3[001]", (100, 100), 15.0))
    with pytest.raises(InputError, match="relative"):
        polar(columns, assignment, relative="median")
    with pytest.raises(InputError, match="do not belong"):
        polar(columns_of(layout("SrTiO3[001]", (120, 120), 15.0)), assignment)
    with pytest.raises(InputError, match="smoothing"):
        vortices(polar(columns, assignment), smoothing=-1.0)


def test_displacements_of_weak_columns_are_not_drawn_back_in_the_noise():
    # at 1e3 e/A^2 the secondary columns stand out by three deviations and are found by their class only
    along, pulls = [], []
    for seed in range(3):
        whole = domains.displaced(domains.closure)
        columns, _ = domains.seen(whole, 1e3, seed)
        apart, which = cKDTree(whole.position).query(columns.position)
        weak = (apart < 6) & (whole.site[which] == 1)
        moved = domains.closure(whole.position[which] - 199.5) * domains.SHIFT_PM / 15
        error = columns.position - whole.position[which]
        along.append((error * moved).sum(axis=1)[weak] / (moved**2).sum(axis=1)[weak])
        pulls.append((error / columns.sigma)[weak])
    # 510 columns of 0.7 of the displacement each: 0.03; those that stand out by themselves are held a little
    assert abs(np.concatenate(along).mean()) < 0.15
    assert 0.8 < np.sqrt((np.concatenate(pulls) ** 2).mean()) < 1.15
