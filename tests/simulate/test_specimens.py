import numpy as np
import pytest

from stemloop.core.errors import InputError, UnknownName
from stemloop.simulate.elasticity import Uniform
from stemloop.simulate.specimens import MARGIN_A, SITE_RADIUS_A, SPECIMENS, build

MAIN = {"MoS2": "Mo", "graphene": "C", "SrTiO3": "Sr"}


@pytest.fixture(scope="module", params=sorted(SPECIMENS))
def sample(request):
    return SPECIMENS[request.param](5)


def local_lattice(sample, position_m, radius_A=9.0):
    """Distortion (2, 2) over (y, x) of the atoms around a place against the ideal lattice, by least squares."""
    main = sample.atoms[sample.atoms.symbols == MAIN[sample.material]]
    heights = np.unique(main.positions[:, 2])
    plane = main.positions[main.positions[:, 2] == heights[len(heights) // 2], 1::-1]  # tilt shears about the middle
    centre = np.array(position_m) * 1e10 + MARGIN_A
    near = plane[np.linalg.norm(plane - centre, axis=1) < radius_A]
    turn = sample.rotation_rad
    cell = np.array(sample.crystal.cell_A) @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    cell = cell[:, ::-1]
    if sample.material == "graphene":  # a sublattice: the neighbours of one atom that lie on whole lattice vectors
        index = (near - near[0]) @ np.linalg.inv(cell)
        near = near[np.abs(index - index.round()).max(axis=1) < 0.15]
    start = near[np.linalg.norm(near - centre, axis=1).argmin()]
    ideal = ((near - start) @ np.linalg.inv(cell)).round() @ cell
    ideal, seen = ideal - ideal.mean(0), near - near.mean(0)
    return near.mean(0), np.linalg.lstsq(ideal, seen, rcond=None)[0].T - np.eye(2)


def test_truth_is_what_the_atoms_show(sample):
    # an affine fit over 9 A differs from the local gradient by its curvature; long waves and edges are >= 8 A, so
    # compare 40 places: the fit follows the truth to 0.4 % of strain (rms) where strains reach 2 to 3 %
    rng = np.random.default_rng(0)
    found, told = [], []
    for position in rng.uniform(0.1, 0.9, (40, 2)) * sample.field_m:
        centre, (yy_yx, xy_xx) = local_lattice(sample, position)
        d = sample.truth((centre - MARGIN_A)[None] * 1e-10)
        found.append([xy_xx[1], yy_yx[0], (xy_xx[0] + yy_yx[1]) / 2, (yy_yx[1] - xy_xx[0]) / 2])
        told.append([*d.strain[0], d.mean[0, 3]])
    found, told = np.array(found), np.array(told)
    assert np.sqrt(np.mean((found - told) ** 2)) < 0.004
    assert np.corrcoef(found.ravel(), told.ravel())[0, 1] > 0.85


def test_uniform_strain_is_found_back_exactly():
    asked = dict(e_xx=0.02, e_yy=-0.015, e_xy=0.005, rotation_rad=0.01)
    sample = build("MoS2", (40.0, 40.0), Uniform(**asked), rotation_rad=0.03)
    _, ((yy, yx), (xy, xx)) = local_lattice(sample, (2e-9, 2e-9))
    np.testing.assert_allclose([xx, yy, (xy + yx) / 2, (yx - xy) / 2], list(asked.values()), atol=1e-9)
    np.testing.assert_allclose(sample.truth(np.array([[1e-9, 2e-9]])).strain[0], [0.02, -0.015, 0.005], atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_strains_and_turns_stay_in_their_range(sample, seed):
    sample = SPECIMENS[sample.name](seed)
    axes = [np.linspace(0, extent, 30) for extent in sample.field_m]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    strain = sample.truth(points).strain
    assert 0.012 < np.abs(strain).max() < 0.045
    assert abs(sample.rotation_rad) <= np.deg2rad(3.0)
    high = sample.atoms.cell.lengths()[:2]
    assert np.all(sample.atoms.positions[:, :2].min(0) < 3) and np.all(sample.atoms.positions[:, :2].max(0) > high - 3)


def test_the_same_seed_gives_the_same_specimen(sample):
    again, other = SPECIMENS[sample.name](5), SPECIMENS[sample.name](6)
    np.testing.assert_array_equal(again.atoms.positions, sample.atoms.positions)
    assert again.defects == sample.defects
    assert len(other.atoms) != len(sample.atoms) or not np.allclose(other.atoms.positions, sample.atoms.positions)


def test_no_atoms_lie_on_each_other(sample):
    # graphene's bond is 1.42 A, Ti-O 1.95 A, Mo-S 2.4 A; strain and shuffles take at most 15 %
    inside = np.all(np.abs(sample.atoms.positions[:, :2] - 60) < 8, axis=1)
    atoms = sample.atoms[inside]
    distance = atoms.get_all_distances() + 10 * np.eye(len(atoms))
    assert distance.min() > 1.2


@pytest.mark.parametrize("name", ["MoS2", "graphene"])
def test_defects_are_where_they_are_told(name):
    sample = SPECIMENS[name](1)
    plane = sample.atoms.positions[:, 1::-1]
    inside = [d for d in sample.defects if all(0 < p < f for p, f in zip(d["position_m"], sample.field_m))]
    assert len(inside) > 5
    for defect in inside:
        place = np.array(defect["position_m"]) * 1e10 + MARGIN_A
        here = sample.atoms[np.linalg.norm(plane - place, axis=1) < 0.3].symbols
        assert list(here) == (["Si"] if defect["kind"] == "dopant" else ["S"] if name == "MoS2" else [])
        site = sample.truth(np.array([defect["position_m"]])).site[0]
        assert site.argmax() == (2 if defect["kind"] == "dopant" else 1)


def test_site_is_pristine_away_from_defects():
    sample = SPECIMENS["MoS2"](1)
    places = np.random.default_rng(0).uniform(0, 1, (300, 2)) * sample.field_m
    where = np.array([d["position_m"] for d in sample.defects])
    far = np.linalg.norm(places[:, None] - where, axis=2).min(axis=1) > SITE_RADIUS_A * 1e-10
    np.testing.assert_array_equal(sample.truth(places).site[:, 0] == 1, far)


def test_knocked_out_atoms_become_vacancies():
    sample = build("graphene", (20.0, 20.0))
    index = int(np.linalg.norm(sample.position_m(np.arange(len(sample.atoms))) - 1e-9, axis=1).argmin())
    less = sample.without(np.array([index]))
    assert len(less.atoms) == len(sample.atoms) - 1
    assert less.truth(sample.position_m(np.array([index]))).site[0, 1] == 1


def test_written_truth_is_the_truth(sample, tmp_path):
    sample.write_truth(str(tmp_path / "truth.npz"), points=9)
    with np.load(tmp_path / "truth.npz") as written:
        place = np.array([[written["y_m"][3], written["x_m"][7]]])
        np.testing.assert_allclose(written["strain"][3, 7], sample.truth(place).strain[0])
        assert len(written["defect_kind"]) == len(sample.defects) and int(written["seed"]) == 5


def test_unknown_names_and_impossible_defects_are_refused():
    with pytest.raises(UnknownName, match="MoS2"):
        SPECIMENS["MoS"]
    with pytest.raises(UnknownName, match="graphene"):
        build("grafene", (20.0, 20.0))
    with pytest.raises(InputError, match="without"):
        build("SrTiO3", (20.0, 20.0), vacancies=1)
