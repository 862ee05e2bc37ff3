"""Defects that were planted, found as what they are; and crystals without any."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from describe.truth import assignment_of, columns_of
from stemloop.core.errors import InputError
from stemloop.core.structure import Columns, Grain
from stemloop.describe import find_columns
from stemloop.describe.defects import find_defects
from stemloop.describe.faults.bonds import net
from stemloop.describe.faults.boundaries import crystals, primitive, turn_between
from stemloop.describe.faults.dislocations import burgers, dislocations
from stemloop.describe.lattices import assign
from stemloop.simulate.elasticity import EdgeDislocation
from stemloop.simulate.pictures import Plane, counted, joined, layout, mean_image, without

DATA = Path(os.environ.get("STEMLOOP_DATA", Path(__file__).parents[3] / "shared" / "data"))
SHAPE = (300, 320)
MIDDLE = np.array([151.3, 157.1])


def known(whole, dose=1e4, seed=0):
    columns = columns_of(whole, dose, seed=seed)
    return columns, assignment_of(whole, columns)


def of_kind(found, kind):
    return [d for d in found if d.kind == kind]


def seen(whole, dose, seed=0):
    """The whole way: counted image, columns, lattices, defects."""
    picture = counted(mean_image(whole, dose), np.random.default_rng(seed))
    columns = find_columns(picture)
    return find_defects(columns, assign(columns, picture.shape), picture.shape)


# ------------------------------------------------------------------------------------------------- dislocations


def dislocated(plane, cells, margin=1.0, shape=SHAPE, core=MIDDLE):
    vectors = assignment_of(layout(plane, shape, 15)).grains[0].vectors
    field = EdgeDislocation(tuple(core), tuple(np.array(cells) @ vectors))
    return layout(plane, shape, 15, warp=lambda p: p + field.displacement(p), margin=margin), np.array(cells) @ vectors


@pytest.mark.parametrize("plane", ["SrTiO3[001]", "graphene"])
@pytest.mark.parametrize("cells", [(1, 0), (0, 1), (1, 1), (-1, 0), (0, -1), (-1, -1), (1, -1)])
def test_a_dislocation_has_the_burgers_vector_that_it_was_made_with(plane, cells):
    whole, vector = dislocated(plane, cells)
    found = find_defects(*known(whole), whole.shape)
    assert [d.kind for d in found] == ["dislocation"]
    cell = np.hypot(*np.array(found[0].detail["burgers"])) / np.hypot(*cells)
    np.testing.assert_allclose(found[0].detail["burgers_cells"], cells)
    np.testing.assert_allclose(found[0].detail["burgers"], vector, atol=0.1 * cell)  # the fitted lattice is bent
    assert np.hypot(*(found[0].place[0] - MIDDLE)) < 1.0 * cell * np.hypot(*cells)
    assert found[0].p > 0.99


def test_a_mirrored_crystal_has_the_mirrored_burgers_vector():
    whole, vector = dislocated("SrTiO3[001]", (1, 1))
    mirrored = replace(whole, position=np.array([0, SHAPE[1] - 1]) + whole.position * [1, -1])
    (found,) = find_defects(*known(mirrored), SHAPE)
    # a mirror reverses the sense of the loop with the vector: b -> -M b
    np.testing.assert_allclose(found.detail["burgers"], vector * [-1, 1], atol=3.0)


def test_burgers_vectors_add_up_over_any_parts():
    first, vectors = (110.0, 90.0), assignment_of(layout("SrTiO3[001]", SHAPE, 15)).grains[0].vectors
    one, two = EdgeDislocation(first, tuple(vectors[0])), EdgeDislocation((200.0, 230.0), tuple(vectors[1]))
    whole = layout("SrTiO3[001]", SHAPE, 15, warp=lambda p: p + one.displacement(p) + two.displacement(p))
    position = known(whole)[0].position[whole.site == 0]
    mesh = net(position, vectors)
    found = dislocations(position, vectors, mesh)
    assert len(found) == 2
    np.testing.assert_allclose(burgers(mesh, vectors), vectors.sum(axis=0), atol=1e-9)
    np.testing.assert_allclose(sum(np.array(d.detail["burgers"]) for d in found), vectors.sum(axis=0), atol=1e-9)
    left = position[mesh.triangle].mean(axis=1)[:, 1] < 160
    np.testing.assert_allclose(burgers(mesh, vectors, left), vectors[0], atol=1e-9)
    rng = np.random.default_rng(0)
    part = rng.integers(0, 5, len(mesh.triangle))  # any cut at all
    parts = sum(burgers(mesh, vectors, part == k) for k in range(5))
    np.testing.assert_allclose(parts, burgers(mesh, vectors), atol=1e-9)


def test_a_pair_of_opposite_dislocations_adds_up_to_nothing():
    vectors = assignment_of(layout("SrTiO3[001]", SHAPE, 15)).grains[0].vectors
    one, two = EdgeDislocation((150.0, 90.0), tuple(vectors[0])), EdgeDislocation((150.0, 230.0), tuple(-vectors[0]))
    whole = layout("SrTiO3[001]", SHAPE, 15, warp=lambda p: p + one.displacement(p) + two.displacement(p))
    found = of_kind(find_defects(*known(whole), SHAPE), "dislocation")
    assert sorted(d.detail["burgers_cells"] for d in found) == [(-1.0, 0.0), (1.0, 0.0)]


@pytest.mark.parametrize(
    ("plane", "cells", "dose"), [("SrTiO3[001]", (0, 1), 1e3), ("graphene", (1, 0), 1e4), ("MoS2", (1, 1), 1e4)]
)
def test_a_dislocation_is_found_in_its_image(plane, cells, dose):
    whole, vector = dislocated(plane, cells, margin=-30)
    found = seen(whole, dose)
    assert [d.kind for d in found] == ["dislocation"]
    np.testing.assert_allclose(found[0].detail["burgers"], vector, atol=0.08 * np.hypot(*vector))
    assert np.hypot(*(found[0].place[0] - MIDDLE)) < 1.2 * np.hypot(*vector)


@pytest.mark.parametrize("cells", [(1, 0), (1, 1), (0, 0)])
def test_columns_lost_in_a_core_do_not_hide_it(cells):
    whole = dislocated("SrTiO3[001]", cells)[0] if any(cells) else layout("SrTiO3[001]", SHAPE, 15, margin=1.0)
    lost = np.hypot(*(whole.position - MIDDLE).T) < 40  # 1.5 cells
    found = of_kind(find_defects(*known(whole.take(~lost)), whole.shape), "dislocation")
    if cells == (0, 0):
        assert not found
        return
    (core,) = found
    np.testing.assert_allclose(core.detail["burgers_cells"], cells)
    assert np.hypot(*(core.place[0] - MIDDLE)) < 1.5 * 26


# ---------------------------------------------------------------------------------------------- faults, boundaries


def faulted(plane, fraction, rotation=0.2, shape=SHAPE, margin=1.0):
    """A crystal whose lower half is shifted by ``fraction`` of a1, a2; and the shift [px]."""
    c, s = np.cos(rotation), np.sin(rotation)
    vectors = plane.vectors_pm / 15 @ np.array([[c, -s], [s, c]])
    shift = np.array(fraction) @ vectors
    normal = np.array([vectors[0, 1], -vectors[0, 0]]) / np.hypot(*vectors[0])
    half = (np.array(shape) - 1) / 2

    def warp(p):
        return p + np.where(((p - half) @ normal > 0.3 * vectors[1] @ normal)[:, None], shift, 0)

    return layout(plane, shape, 15, rotation, warp=warp, margin=margin), shift, vectors


#: fcc along [110] in its primitive cell, a1 along the trace of (111).
FCC = Plane("Au[110]", np.array([[0, 249.7], [235.4, 83.2]]), np.zeros((1, 2)), np.ones(1), np.array([45.0]))
PEROVSKITE = Plane(
    "SrTiO3",
    np.array([[0, 390.5], [390.5, 0]]),
    np.array([[0, 0], [0.5, 0.5]]),
    np.array([1, 0.465]),
    np.array([45, 43.4]),
)


def closest(step, shift, vectors):
    """Distance of ``step`` from ``shift`` or its opposite, up to a lattice vector."""
    return min(
        np.hypot(*((d - np.rint(d)) @ vectors))
        for d in ((step - sign * shift) @ np.linalg.inv(vectors) for sign in (1, -1))
    )


@pytest.mark.parametrize(
    ("plane", "fraction"), [(FCC, (1 / 3, 0)), (PEROVSKITE, (0.5, 0.5)), (PEROVSKITE, (0.5, 0)), (PEROVSKITE, (0, 0.5))]
)
@pytest.mark.parametrize("dose", [1e3, 1e4])
def test_a_stacking_fault_is_found_in_its_image_with_its_displacement(plane, fraction, dose):
    whole, shift, vectors = faulted(plane, fraction, margin=-20)
    found = seen(whole, dose)
    assert [d.kind for d in found] == ["stacking-fault"]
    fault = found[0]
    assert closest(np.array(fault.detail["displacement"]), shift, vectors) < 1.0
    assert fault.detail["length_px"] > 0.8 * SHAPE[1]
    side = np.sign(fault.detail["normal"][0])  # the shift is that of the side that the normal points to
    step = (side * np.array(fault.detail["displacement"]) - shift) @ np.linalg.inv(vectors)
    assert np.hypot(*((step - np.rint(step)) @ vectors)) < 1.0
    assert np.abs(fault.place[:, 0].mean() - 150) < 25


def test_a_fault_is_none_if_it_is_a_lattice_vector():
    whole, _, _ = faulted(PEROVSKITE, (1.0, 0.0))
    assert find_defects(*known(whole), SHAPE) == ()


@pytest.mark.parametrize(
    ("plane", "turn", "wanted"),
    [("Fe[001]", 36.87, 36.87), ("Fe[001]", 53.13, 36.87), ("graphene", 21.8, 21.8), ("graphene", 40, 20)],
)
def test_a_grain_boundary_has_the_smallest_of_its_equivalent_turns(plane, turn, wanted):
    one = layout(plane, SHAPE, 15, 0.1, margin=-20)
    other = layout(plane, SHAPE, 15, 0.1 + np.deg2rad(turn), grain=1, margin=-20)
    line = np.array([1.0, 0.3]) / np.hypot(1.0, 0.3)
    side = [((w.position - MIDDLE) @ line) * sign > 1.5 for w, sign in ((one, 1), (other, -1))]
    both = joined(one.take(side[0]), other.take(side[1]))
    found = seen(both, 1e4)
    boundaries = of_kind(found, "grain-boundary")
    assert len(boundaries) == 1
    assert boundaries[0].detail["misorientation_deg"] == pytest.approx(wanted, abs=0.2)
    assert boundaries[0].detail["sigma_deg"] < 0.5
    off = (boundaries[0].place - MIDDLE) @ line
    assert np.abs(off).max() < 12  # a bond's half-length on either side
    assert {d.kind for d in found} <= {"grain-boundary", "vacancy"}  # a column missed by the finder at the border


def grain(vectors, basis=((0, 0),), bright=(1.0,)):
    basis, bright = np.array(basis, float), np.array(bright, float)
    return Grain(np.array(vectors, float), np.full((2, 2), 0.01), np.zeros(2), basis, bright, 0.1 * bright)


def test_a_turn_does_not_depend_on_which_vectors_describe_the_lattices():
    rng = np.random.default_rng(0)
    square = np.array([[0.0, 20.0], [20.0, 0.0]])
    for angle in np.deg2rad([5.0, 20.0, 37.0, 44.0]):
        c, s = np.cos(angle), np.sin(angle)
        other = square @ np.array([[c, -s], [s, c]])
        for _ in range(4):
            change = np.array([[1, rng.integers(-1, 2)], [0, 1]])
            turn = turn_between(grain(square), grain(change @ other))
            assert abs(turn.rotation) == pytest.approx(angle, abs=1e-9)


def test_ferroelastic_variants_are_one_crystal_and_turned_grains_are_not():
    c, s = np.cos(0.3), np.sin(0.3)
    square, turned = np.array([[0.0, 20.0], [20.0, 0.0]]), np.array([[s, c], [c, -s]]) * 20
    first, change = crystals((grain(square * [1, 1.03]), grain(square * [1.03, 1]), grain(turned)))
    assert first.tolist() == [0, 0, 2]
    assert change[1].tolist() == [[1, 0], [0, 1]]


def test_a_doubled_cell_is_made_primitive():
    small, alike = primitive(grain([[0, 20], [20, 0]], [(0, 0), (0.5, 0.5)], (1.0, 1.05)))
    assert abs(np.linalg.det(small.vectors)) == pytest.approx(200)
    assert alike.tolist() == [0, 0]
    same, apart = primitive(grain([[0, 20], [20, 0]], [(0, 0), (0.5, 0.5)], (1.0, 0.5)))
    assert abs(np.linalg.det(same.vectors)) == pytest.approx(400)
    assert apart.tolist() == [0, 1]


# -------------------------------------------------------------------------------------------------- single columns


def planted(plane, dose, seed):
    """A crystal with vacancies of both sites, two columns 1.8 times as bright and two half as bright."""
    rng = np.random.default_rng(seed)
    whole = layout(plane, (400, 420), 15, rotation_rad=0.2, margin=-20)
    whole = without(without(whole, 0.01, 0, rng), 0.01, 1, rng)
    inner = np.flatnonzero(((whole.position > 40) & (whole.position < [360, 380])).all(axis=1))
    odd = rng.choice(inner, 4, replace=False)
    weight = whole.weight.copy()
    weight[odd] *= [1.8, 1.8, 0.5, 0.5]
    whole = replace(whole, weight=weight)
    empty = whole.vacant[((whole.vacant > 20) & (whole.vacant < [380, 400])).all(axis=1)]
    return whole, empty, whole.position[odd]


@pytest.mark.parametrize(("plane", "dose"), [("SrTiO3[001]", 1e4), ("MoS2", 1e5), ("graphene", 1e4)])
def test_vacancies_and_dopants_are_found_in_the_image(plane, dose):
    whole, empty, odd = planted(plane, dose, seed=1)
    found = seen(whole, dose)
    vacancies, dopants = of_kind(found, "vacancy"), of_kind(found, "dopant")
    near, which = cKDTree([d.place[0] for d in vacancies]).query(empty)
    assert (near < 5).all()
    assert all(vacancies[k].p > 0.9 for k in which)
    assert len(found) - len(dopants) <= len(empty) + 1
    near, which = cKDTree([d.place[0] for d in dopants]).query(odd)
    assert (near < 3).all()
    assert [dopants[k].detail["brightness"] for k in which] == ["brighter"] * 2 + ["weaker"] * 2
    for k, ratio in zip(which, (1.8, 1.8, 0.5, 0.5), strict=True):
        assert dopants[k].detail["ratio"] == pytest.approx(ratio, abs=0.2)
        assert dopants[k].detail["z_score"] * (ratio - 1) > 0


def test_a_vacancy_says_how_sure_it_is():
    """Where columns stand out of the noise an empty place is a vacancy; where they hardly do one may be overlooked."""
    whole = without(layout("SrTiO3[001]", SHAPE, 15), 0.02, 1, np.random.default_rng(0))
    columns, assignment = known(whole, 1e4)
    sure = of_kind(find_defects(columns, assignment, SHAPE), "vacancy")
    faint = replace(columns, sigma=columns.width[:, None] * np.array([0.25, 0.25]), vacant=np.zeros((0, 2)))
    assert len(sure) > 2
    assert all(d.p > 0.99 and d.detail["site"] == 1 for d in sure)
    assert of_kind(find_defects(faint, assignment, SHAPE), "vacancy") == []


def test_an_extra_column_is_an_interstitial_and_a_seldom_seen_site_is_none():
    whole = layout("SrTiO3[001]", SHAPE, 15)
    columns, assignment = known(whole)
    middle = np.flatnonzero((np.abs(columns.position - 150) < 60).all(axis=1) & (whole.site == 0))

    def with_extra(offsets):
        extra = columns.position[middle[: len(offsets)]] + np.array(offsets) @ assignment.grains[0].vectors
        m = len(extra)
        more = Columns(
            np.concatenate([columns.position, extra]),
            np.concatenate([columns.sigma, columns.sigma[:m]]),
            *(np.concatenate([v, v[:m]]) for v in (columns.amplitude, columns.width, columns.sublattice)),
        )
        loose = replace(
            assignment,
            grain=np.append(assignment.grain, [-1] * m),
            site=np.append(assignment.site, [-1] * m),
            boundary=np.append(assignment.boundary, [True] * m),
            **{
                n: np.concatenate([getattr(assignment, n), np.zeros((m, 2))])
                for n in ("ideal", "displacement", "displacement_sigma", "p_site")
            },
            cell=np.concatenate([assignment.cell, np.zeros((m, 2), np.int64)]),
        )
        return of_kind(find_defects(more, loose, SHAPE), "interstitial")

    (one,) = with_extra([(0.5, 0.05)])
    assert one.detail["column"] == len(columns)
    assert one.detail["offset_px"] > 10
    assert with_extra([(0.5, 0.0)] * 5) == []


def crystal(plane, seed, margin):
    """A perfect crystal that is bent by a wave and thicker on one side."""
    rng = np.random.default_rng(seed)
    size, length, phase = rng.uniform(0, 1.5), rng.uniform(150, 400), rng.uniform(0, 6)

    def warp(p):
        k = 2 * np.pi / length
        return p + size * np.stack([np.sin(k * p[:, 1] + phase), np.cos(k * p[:, 0])], axis=1)

    whole = layout(plane, SHAPE, 15, rng.uniform(-0.5, 0.5), warp=warp, margin=margin)
    return replace(whole, weight=whole.weight * (1 + rng.uniform(0, 0.6) * (whole.position[:, 1] / SHAPE[1] - 0.5)))


@pytest.mark.parametrize("dose", [1e3, 1e4, 1e5])
def test_a_perfect_crystal_has_hardly_ever_a_defect(dose):
    """With the errors of positions and brightness at their bounds: at most 5 % of images show anything."""
    shown = sum(
        bool(find_defects(*known(crystal(plane, seed, 1.0), dose, seed), SHAPE))
        for plane in ("SrTiO3[001]", "graphene", "Fe[001]", "MoS2")
        for seed in range(3)
    )
    assert shown <= 1


@pytest.mark.slow
@pytest.mark.parametrize("dose", [1e3, 1e4, 1e5])
def test_an_image_of_a_perfect_crystal_has_hardly_ever_a_defect(dose):
    shown = [
        (plane, seed, [d.kind for d in found])
        for plane in ("SrTiO3[001]", "graphene", "Fe[001]", "MoS2")
        for seed in range(10)
        if (found := seen(crystal(plane, seed, -20), dose, seed))
    ]
    assert len(shown) <= 2, shown


def test_layers_and_interfaces_are_no_dopants():
    whole = layout("SrTiO3[001]", SHAPE, 15)
    row = np.rint(whole.position[:, 0] / 13.017).astype(int)
    for bright in (np.where(row > 11, 1.9, 1.0), np.where(row == 10, 1.5, 1.0)):  # another crystal; a delta layer
        layered = replace(whole, weight=whole.weight * bright)
        assert of_kind(find_defects(*known(layered, 1e5), SHAPE), "dopant") == []


# ---------------------------------------------------------------------------------------------------------- laws


def test_defects_turn_with_the_image():
    whole, _ = dislocated("SrTiO3[001]", (1, 0))
    (upright,) = find_defects(*known(whole), SHAPE)
    turned = replace(  # a quarter turn from +x towards +y
        whole, shape=SHAPE[::-1], position=np.column_stack([whole.position[:, 1], SHAPE[0] - 1 - whole.position[:, 0]])
    )
    (rotated,) = find_defects(*known(turned), SHAPE[::-1])
    row, col = upright.detail["burgers"]
    np.testing.assert_allclose(rotated.detail["burgers"], (col, -row), atol=2.0)
    np.testing.assert_allclose(rotated.place[0], (upright.place[0, 1], SHAPE[0] - 1 - upright.place[0, 0]), atol=14)


def test_no_lattice_no_defects():
    nobody = Columns(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0), np.zeros(0), np.zeros(0, np.int64))
    assert find_defects(nobody, assign(nobody, (64, 64)), (64, 64)) == ()
    scattered = np.random.default_rng(0).uniform(0, 300, (60, 2))
    anywhere = Columns(scattered, np.full((60, 2), 0.1), np.ones(60), np.full(60, 3.0), np.zeros(60, np.int64))
    assert find_defects(anywhere, assign(anywhere, SHAPE), SHAPE) == ()
    assignment = assignment_of(layout("SrTiO3[001]", SHAPE, 15))
    with pytest.raises(InputError, match="different images"):
        find_defects(anywhere, assignment, SHAPE)


def test_twelve_thousand_columns_take_less_than_a_second():
    large = layout("SrTiO3[001]", (2048, 2048), 15)
    columns, small = columns_of(large), assignment_of(layout("SrTiO3[001]", SHAPE, 15))
    n = len(columns)
    assignment = replace(
        small,
        grain=np.zeros(n, np.int64),
        cell=large.cell,
        site=large.site,
        boundary=np.zeros(n, bool),
        **dict.fromkeys(("p_site", "ideal", "displacement", "displacement_sigma"), np.zeros((n, 2))),
    )
    begin = time.process_time()
    find_defects(columns, assignment, (2048, 2048))
    assert n > 12000
    assert time.process_time() - begin < 2.0  # 0.3 s here; room for a slow machine


# ------------------------------------------------------------------------------------------------------ real files


def real(picture):
    columns = find_columns(picture)
    assignment = assign(columns, picture.shape)
    return assignment, find_defects(columns, assignment, picture.shape)


def load(path):
    if not (DATA / path).exists():
        pytest.skip(f"needs {path} under STEMLOOP_DATA")
    return np.load(DATA / path).astype(float)


def test_the_boundary_in_iron_is_turned_by_37_degrees():
    _, found = real(load("haadf/ai4stem/Fe_bcc_100.npy"))
    assert [d.kind for d in found] == ["grain-boundary"]
    boundary = found[0]
    assert boundary.detail["misorientation_deg"] == pytest.approx(37.6, abs=1.0)  # by Fourier transform of each half
    assert 0.1 < boundary.detail["sigma_deg"] < 1.0
    assert abs(boundary.place[:, 0].mean() - 260) < 10
    assert boundary.detail["length_px"] > 450


@pytest.mark.parametrize("name", ["001", "002"])
def test_real_mos2_has_few_vacancies_and_hardly_lines(name):
    assignment, found = real(load(f"haadf/SciLink/MoS2_stem_Exp-{name}-5.npy"))
    # where dirt or noise hides the sulphur a short fault is reported, which nobody has confirmed
    assert {d.kind for d in found} <= {"vacancy", "dopant", "interstitial", "stacking-fault"}
    assert len(of_kind(found, "stacking-fault")) <= 1
    metal = int((assignment.site == 0).sum())
    assert len(of_kind(found, "vacancy")) < 0.03 * metal


def test_a_particle_of_platinum_and_iridium_has_no_dislocations():
    from scipy.io import loadmat

    path = DATA / "haadf/StatSTEM/ExamplePtIr.mat"
    if not path.exists():
        pytest.skip(f"needs {path.name} under STEMLOOP_DATA")
    stored = loadmat(path, struct_as_record=False, squeeze_me=True)
    _, found = real(np.asarray(stored["input"].obs, dtype=float))
    assert not {"dislocation", "stacking-fault", "grain-boundary"} & {d.kind for d in found}
