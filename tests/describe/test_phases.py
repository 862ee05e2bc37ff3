"""Phases of films, wedges and domains whose answer is known."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from describe import domains
from describe.truth import assignment_of, columns_of
from stemloop.core.errors import InputError
from stemloop.core.structure import Assignment
from stemloop.describe.atoms import find_columns
from stemloop.describe.ferroic import mixture
from stemloop.describe.lattices import assign
from stemloop.describe.phases import local_descriptors, phases
from stemloop.simulate.pictures import PLANES, joined, layout

DATA = Path(os.environ.get("STEMLOOP_DATA", Path(__file__).parents[3] / "shared" / "data"))


def measured(whole, seed=0, noise=True, dose=1e4):
    on = domains.inner(whole)
    columns = columns_of(on, dose, seed=seed, noise=noise)
    return columns, assignment_of(on, columns)


def right(label, truth):
    """Share of labels that are right, whichever number they have."""
    return max((label == truth).mean(), (label == 1 - truth).mean())


# ---------------------------------------------------------------------------------------------------- descriptors


def test_descriptors_of_a_strained_cell_are_its_strain():
    whole = layout("SrTiO3[001]", (300, 300), 15.0, margin=3.0)
    _, assignment = measured(whole, noise=False)
    stretched = replace(whole, position=whole.position * [1.02, 1.0], shape=(310, 300))
    columns, _ = measured(stretched, noise=False)
    seen = local_descriptors(columns, assignment)  # against the grain as it was before
    value = dict(zip(seen.names, seen.value.T, strict=True))
    deep = np.isfinite(value["size"])
    assert deep.mean() > 0.7
    assert np.allclose(value["size"][deep], np.log(1.02) / 2) and np.allclose(value["aspect"][deep], np.log(1.02))
    for name in ("angle", "rotation", "off_centre", "disorder"):
        assert np.allclose(value[name][np.isfinite(value[name])], 0, atol=1e-9)
    assert np.allclose(value["ratio"][np.isfinite(value["ratio"])], np.log(226 / 486))
    assert value["coordination"].max() == 8


@pytest.mark.parametrize("change", ["shift", "turn", "mirror"])
def test_descriptors_do_not_depend_on_where_and_how_the_image_lies(change):
    whole = domains.inner(domains.displaced(domains.array, shape=(240, 240)))
    columns = columns_of(whole, seed=1)
    c, s = np.cos(0.4), np.sin(0.4)
    moves = {
        "shift": lambda p: p + np.array([3.3, -7.1]),
        "turn": lambda p: p @ np.array([[c, -s], [s, c]]),
        "mirror": lambda p: p * [1, -1],
    }
    moved = replace(columns, position=moves[change](columns.position))
    before = local_descriptors(columns, assignment_of(whole, columns))
    after = local_descriptors(moved, assignment_of(whole, moved))
    sign = np.where((np.array(before.names) == "rotation") & (change == "mirror"), -1, 1)
    assert np.allclose(before.value, sign * after.value, equal_nan=True, atol=1e-9)
    assert np.allclose(before.sigma, after.sigma, equal_nan=True)


def test_deviations_of_the_descriptors_are_theirs():
    whole = layout("SrTiO3[001]", (512, 512), 15.0, 0.2)
    seen = local_descriptors(*measured(whole, seed=2))
    # 600 columns, of which nine share the local cell: a tenth
    for name in ("size", "aspect", "angle", "rotation", "brightness", "ratio"):
        k = seen.names.index(name)
        own = np.isfinite(seen.value[:, k])
        pulls = (seen.value[own, k] - seen.value[own, k].mean()) / seen.sigma[own, k]
        assert 0.85 < pulls.std() < 1.15, name


# ---------------------------------------------------------------------------------------------------- the mixture


def test_a_mixture_forgets_the_deviations_of_its_points_and_their_trend():
    rng = np.random.default_rng(0)
    place = rng.uniform(0, 100, (4000, 2))
    trend = mixture.smooth_functions(place)
    sigma = rng.uniform(0.5, 1.5, (4000, 2))
    group = place[:, 0] > 50
    value = np.where(group[:, None], [4.0, -2.0], [0.0, 0.0]) + trend[:, [0]] * 3 + 0.5 * rng.standard_normal((4000, 2))
    points = mixture.Points(value + sigma * rng.standard_normal((4000, 2)), sigma, trend, 2)
    found = mixture.fitted(points, np.stack([group, ~group], axis=1) * 0.6 + 0.2, 200)
    assert np.allclose(found.mean[0] - found.mean[1], [4.0, -2.0], atol=0.25)  # a step and a slope are partly alike
    assert np.allclose(found.spread, 0.5, atol=0.1)
    assert np.allclose(found.slope[0], 3.0, atol=0.15)
    assert np.allclose(found.slope[:, 0], found.slope[:, 1])  # one thickness for both


# ---------------------------------------------------------------------------------------------------------- films


@pytest.mark.parametrize("seed, wedge", [(0, 0.0), (2, 0.5)])
def test_a_film_on_its_substrate_is_two_phases_with_the_interface_where_it_is(seed, wedge):
    whole, film = domains.film(wedge=wedge)
    columns, assignment = domains.seen(whole, seed=seed)
    distance, nearest = cKDTree(whole.position).query(columns.position)
    known = (distance < 4) & (assignment.grain >= 0)
    assert known.mean() > 0.99
    found = phases(columns, assignment)
    assert found.n == 2
    assert right(found.label[known], film[nearest][known]) >= 0.99
    assert np.allclose(found.p.sum(axis=1)[known], 1)
    upper = np.bincount(found.label[film[nearest] & known]).argmax()
    rows = np.arange(200.0, 300.0)
    wrong = [((columns.position[known, 0] < r) != (found.label[known] == upper)).sum() for r in rows]
    assert abs(rows[np.array(wrong) == min(wrong)].mean() - 250) < 13  # half a cell
    assert found.ratio[upper] == pytest.approx(307 / 937, rel=0.05)
    assert found.ratio[1 - upper] == pytest.approx(226 / 486, rel=0.05)
    assert found.cell[upper] == pytest.approx([390.5 / 15, 377 / 15, 90], rel=0.01)
    assert found.cell[1 - upper] == pytest.approx([390.5 / 15, 390.5 / 15, 90], rel=0.01)
    assert "times as bright" in found.description[upper]


def test_phases_run_over_several_grains():
    whole, film = domains.film(seed_grains=True)
    on = domains.inner(whole)
    film = film[((whole.position > 3) & (whole.position < 508)).all(axis=1)]
    columns = columns_of(on, seed=4)
    found = phases(columns, assignment_of(on, columns))
    assert found.n == 2 and right(found.label, film) >= 0.99


def test_two_grains_of_one_crystal_are_one_phase():
    one = layout("SrTiO3[001]", (512, 512), 15.0, 0.1)
    other = layout("SrTiO3[001]", (512, 512), 15.0, 0.6, grain=1)
    both = joined(one.take(one.position[:, 1] < 250), other.take(other.position[:, 1] > 258))
    found = phases(*measured(both, seed=1))
    assert found.n == 1 and (found.label == 0).all()


def test_grains_of_unlike_lattices_are_phases():
    one = layout("SrTiO3[001]", (512, 512), 15.0, 0.1)
    other = layout("Fe[001]", (512, 512), 15.0, 0.0, grain=1)
    both = joined(one.take(one.position[:, 1] < 250), other.take(other.position[:, 1] > 258))
    found = phases(*measured(both, seed=1))
    assert found.n == 2 and right(found.label, domains.inner(both).grain) == 1


def test_domains_that_are_turned_are_one_family():
    whole = layout("PbTiO3[100]", (512, 512), 15.0, margin=-60.0)
    stretch = PLANES["PbTiO3[100]"].vectors_pm[1, 0] / PLANES["PbTiO3[100]"].vectors_pm[0, 1]
    left = whole.position[:, 1] < 250  # there a2 is shortened and a1 stretched
    turned = np.where(left[:, None], (whole.position - 250) * [1 / stretch, stretch] + 250, whole.position)
    found = phases(*measured(replace(whole, position=turned), seed=3))
    assert found.n == 2 and len(set(found.family.tolist())) == 1
    assert np.allclose(found.cell[0, :2], found.cell[1, 1::-1], rtol=0.01)


# ------------------------------------------------------------------------------------------------ what is no phase


WEDGES = {
    "none": lambda u: np.ones(len(u)),
    "exponential": lambda u: np.exp(-1.4 * u[:, 0]),
    "hill": lambda u: 0.4 + 0.6 * np.exp(-8 * ((u - 0.5) ** 2).sum(axis=1)),
    "waves": lambda u: 1 + 0.3 * np.sin(2 * np.pi * u[:, 1]),
    "step": lambda u: np.where(u[:, 1] < 0.5, 1.0, 0.75),
}


@pytest.mark.parametrize("wedge", WEDGES)
def test_thickness_makes_no_phases(wedge):
    whole = layout("SrTiO3[001]", (512, 512), 15.0, 0.1)
    whole = replace(whole, weight=whole.weight * WEDGES[wedge](whole.position / 512))
    on = domains.inner(whole)
    assignment = assignment_of(on)
    assert [phases(columns_of(on, seed=s), assignment).n for s in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("warp", [
    lambda p: p + np.column_stack([5e-5 * (p[:, 1] - 250) ** 2, 0 * p[:, 0]]),
    lambda p: p + np.column_stack([0 * p[:, 0], 6e-5 * (p[:, 1] - 250) ** 2]),
    lambda p: p + np.column_stack([0 * p[:, 0], 1.5 * np.sin(p[:, 1] / 60)]),
])  # fmt: skip
def test_distortions_make_no_phases(warp):
    assert phases(*measured(layout("SrTiO3[001]", (512, 512), 15.0, 0.1, warp=warp))).n == 1


def test_scattered_bright_columns_are_no_phase():
    whole = layout("SrTiO3[001]", (512, 512), 15.0)
    chosen = (whole.site == 0) & (np.random.default_rng(0).random(len(whole.site)) < 0.1)
    assert phases(*measured(replace(whole, weight=np.where(chosen, 1.6, 1.0) * whole.weight))).n == 1


def test_no_lattice_has_no_phases():
    columns, _ = measured(layout("SrTiO3[001]", (100, 100), 15.0))
    n = len(columns)
    none = Assignment(
        np.full(n, -1), np.zeros((n, 2), int), np.full(n, -1), np.zeros((n, 0)),
        *(np.full((n, 2), np.nan) for _ in range(3)), np.ones(n, bool), np.zeros((0, 2)), np.zeros(0, int),
        np.zeros(0, int), (),
    )  # fmt: skip
    found = phases(columns, none)
    assert found.n == 0 and (found.label == -1).all() and found.p.shape == (n, 0)
    assert np.isnan(local_descriptors(columns, none).value).all()
    with pytest.raises(InputError, match="do not belong"):
        phases(columns_of(layout("SrTiO3[001]", (120, 120), 15.0)), none)


def test_a_small_crystal_is_one_phase():
    assert phases(*measured(layout("SrTiO3[001]", (90, 90), 15.0))).n == 1


# -------------------------------------------------------------------------------------------------- a real picture


def test_layers_of_a_real_superlattice_come_out_as_layers():
    path = DATA / "haadf" / "TEMUL" / "Cropped_PTO-SRO_Aligned.hspy"
    if not path.exists():
        pytest.skip(f"{path} is not there; set STEMLOOP_DATA")
    import h5py

    with h5py.File(path) as file:
        image = np.asarray(next(iter(file["Experiments"].values()))["data"], dtype=np.float64)
    columns = find_columns(image)
    found = phases(columns, assign(columns, image.shape))
    assert found.n == 2
    row = columns.position[:, 0]
    low, middle = (row > 185) & (found.label >= 0), (row > 80) & (row < 130) & (found.label >= 0)
    ours = np.bincount(found.label[middle]).argmax()
    assert (found.label[middle] == ours).mean() > 0.95  # SrRuO3
    assert (found.label[low] != ours).mean() > 0.95  # PbTiO3
    assert found.ratio[ours] > 1.5 * found.ratio[1 - ours]
