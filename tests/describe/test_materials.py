"""Materials along zone axes, and what their lattice says of the size of a pixel."""

from dataclasses import replace

import numpy as np
import pytest

from describe.lattice_cases import answered, ideal_columns, real
from stemloop.core.errors import UnknownName
from stemloop.core.protocols import PixelSize
from stemloop.core.structure import Columns
from stemloop.describe import find_columns
from stemloop.describe.lattices import assign
from stemloop.describe.materials import CANDIDATES, check_pixel_size
from stemloop.describe.zoneaxes import projected
from stemloop.simulate import pictures

# (material along zone axis, lengths of the reduced vectors [A], angle between them [deg], number of sites)
KNOWN = [
    ("SrTiO3[001]", (3.905, 3.905), 90, 2),
    ("SrTiO3[110]", (3.905, 3.905 / np.sqrt(2)), 90, 2),
    ("SrTiO3[111]", (3.905 * np.sqrt(2 / 3),) * 2, 60, 1),
    ("Au[001]", (4.0782 / 2,) * 2, 90, 1),
    ("Au[110]", (4.0782 * np.sqrt(3 / 8),) * 2, 70.53, 1),
    ("Fe[001]", (2.8665 / np.sqrt(2),) * 2, 90, 1),
    ("Fe[111]", (2.8665 * np.sqrt(2 / 3),) * 2, 60, 1),
    ("Si[110]", (5.431 * np.sqrt(3 / 8),) * 2, 70.53, 2),
    ("graphene[0001]", (2.461, 2.461), 60, 2),
    ("MoS2[0001]", (3.1602, 3.1602), 60, 2),
    ("TiO2[001]", (4.594 / np.sqrt(2),) * 2, 90, 1),
    ("ZnO[0001]", (3.2498, 3.2498), 60, 2),
]


@pytest.mark.parametrize(("name", "lengths", "angle", "sites"), KNOWN)
def test_projections_are_those_of_the_textbook(name, lengths, angle, sites):
    candidate = CANDIDATES[name]
    found = np.hypot(*candidate.vectors_A.T)
    np.testing.assert_allclose(sorted(found), sorted(lengths), rtol=1e-4)
    cosine = abs(candidate.vectors_A[0] @ candidate.vectors_A[1]) / found.prod()
    assert np.degrees(np.arccos(cosine)) == pytest.approx(angle, abs=0.01)
    assert len(candidate.basis) == sites
    assert candidate.weight[0] == 1 and (np.diff(candidate.weight) <= 0).all()


def test_a_projection_does_not_depend_on_the_choice_of_the_cell():
    cubic = projected("Au", 4.0782 * np.eye(3), [("Au", *p) for p in FACES], (1, 1, 0), "[110]")
    primitive = 4.0782 / 2 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    zone = tuple(int(v) for v in np.rint(np.array([1, 1, 0]) @ np.linalg.inv(primitive) * 4.0782))
    single = projected("Au", primitive, [("Au", 0.0, 0.0, 0.0)], tuple(v // np.gcd.reduce(zone) for v in zone), "[110]")
    one, other = (np.linalg.svd(c.vectors_A, compute_uv=False) for c in (cubic, single))
    np.testing.assert_allclose(one, other, rtol=1e-9)


FACES = [(0.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5)]


def analysed(name, pixel_pm=15.0, stretch=None):
    layout = pictures.layout(name, (320, 320), pixel_pm, 0.2)
    if stretch is not None:
        middle = np.array([160.0, 160.0])
        layout = replace(layout, position=(layout.position - middle) @ np.array(stretch) + middle)
    columns = ideal_columns(layout)
    return columns, assign(columns, (320, 320))


@pytest.mark.parametrize("name", ["SrTiO3[001]", "SrTiO3[110]", "Au[110]", "Si[110]", "graphene", "MoS2", "Fe[001]"])
def test_a_right_pixel_size_is_confirmed_and_a_wrong_one_refuted(name):
    _columns, answer = analysed(name)
    material = name.split("[")[0]
    right = check_pixel_size(answer, PixelSize(15e-12, "file", "stated"), [material])
    assert right.verdict == "agrees"
    assert right.pixel_size_m == pytest.approx(15e-12, rel=3e-3)
    assert abs(right.ratio - 1) < 3 * right.ratio_sigma
    if "[" in name:
        assert right.zone_axis == "[" + name.split("[")[1]
    wrong = check_pixel_size(answer, PixelSize(16e-12, "file", "stated"), [material])
    assert wrong.verdict == "disagrees"
    assert wrong.ratio == pytest.approx(15 / 16, rel=3e-3)
    assert "% too large" in wrong.message and "deviations" in wrong.message


def test_a_distorted_scan_is_less_sure_of_itself():
    _columns, answer = analysed("SrTiO3[001]", stretch=[[1.06, 0.0], [0.03, 1.0]])
    checked = check_pixel_size(answer, PixelSize(15.4e-12, "file", "stated"), ["SrTiO3[001]"])
    assert checked.candidates[0].distortion == pytest.approx(np.hypot(0.029, 0.015), rel=0.1)
    assert checked.sigma_m / checked.pixel_size_m > 0.02
    assert checked.verdict != "disagrees"


def test_square_lattices_are_alike_and_the_search_says_so():
    _columns, answer = analysed("SrTiO3[001]")
    searched = check_pixel_size(answer, PixelSize(15e-12, "file", "stated"))
    assert searched.verdict == "agrees"
    assert sum(m.p for m in searched.candidates) == pytest.approx(1, abs=1e-2)
    assert {m.material for m in searched.candidates[:5]} >= {"SrTiO3", "SrRuO3"}
    assert searched.p < 0.7
    nothing = check_pixel_size(answer, PixelSize())
    assert nothing.verdict == "unknown" and nothing.pixel_size_m is None and nothing.ratio is None
    assert len(nothing.candidates) > 5 and "name the material" in nothing.message
    named = check_pixel_size(answer, PixelSize(), ["SrTiO3"])
    assert named.verdict == "unknown" and named.pixel_size_m == pytest.approx(15e-12, rel=3e-3)


def test_without_a_lattice_nothing_is_known():
    nothing = Columns(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0), np.zeros(0), np.zeros(0, np.int64))
    checked = check_pixel_size(assign(nothing, (64, 64)), PixelSize(15e-12, "file", "stated"))
    assert checked.verdict == "unknown" and checked.candidates == () and "no lattice" in checked.message


def test_an_unknown_material_is_refused():
    _columns, answer = analysed("Fe[001]")
    with pytest.raises(UnknownName, match="SrTiO3"):
        check_pixel_size(answer, PixelSize(), ["cheese"])
    with pytest.raises(UnknownName, match="empty"):
        check_pixel_size(answer, PixelSize(), [])


# file, what it states [pm], the specimen, verdict, the size that the lattice asks for over the stated one
REAL = [
    ("atomap/test_ADF_cropped.hdf5", 9.326, "SrTiO3", "agrees", 1.00, "[110]"),
    ("openNCEM/Acquisition_18.emd", 12.25, "SrTiO3", "disagrees", 0.95, "[001]"),
    ("TEMUL/Cropped_PTO-SRO_Aligned.hspy", 15.0, "PbTiO3", "disagrees", 1.07, None),
    ("ai4stem/Fe_bcc_100.npy", 12.45, "Fe", "agrees", 0.985, "[001]"),
    ("SciLink/MoS2_stem_Exp-002-5.npy", 17.58, "MoS2", "disagrees", 0.733, "[0001]"),
    ("StatSTEM/ExamplePtIr.mat", 12.11, "Pt", "agrees", 1.02, "[110]"),
]


@pytest.mark.parametrize(("name", "stated_pm", "material", "verdict", "ratio", "zone"), REAL)
def test_real_files(name, stated_pm, material, verdict, ratio, zone):
    _, _columns, answer = answered(name)
    stated = PixelSize(stated_pm * 1e-12, "file", "stated")
    given = check_pixel_size(answer, stated, [material])
    assert given.verdict == verdict
    assert given.ratio == pytest.approx(ratio, abs=0.015)
    assert given.material == material
    if zone:
        assert all(z[:2] == (material, zone) for z in given.zone_axes)
    assert (abs(np.log(given.ratio)) > 3 * given.ratio_sigma / given.ratio) == (verdict == "disagrees")


def test_the_wrong_metadata_of_the_monolayer_is_flagged_by_a_search_too():
    _, _columns, answer = answered("SciLink/MoS2_stem_Exp-002-5.npy")
    searched = check_pixel_size(answer, PixelSize(17.58e-12, "sidecar", "stated"))
    assert searched.verdict == "disagrees"
    assert "too large, whichever it is" in searched.message and "name the material" in searched.message
    assert searched.pixel_size_m is None  # all ask for another one, but not for the same


def test_a_search_that_some_materials_fit_and_others_do_not_settles_nothing():
    _columns, answer = analysed("SrTiO3[001]")
    stated = PixelSize(15.75e-12, "file", "stated")  # 5 % too large, as BaTiO3 nearly right
    searched = check_pixel_size(answer, stated)
    said = {m.material: abs(np.log(m.ratio)) < 0.03 for m in searched.candidates if m.p > 0.01}
    assert said["BaTiO3"] and not said["SrTiO3"]
    assert searched.verdict == "unknown" and searched.p < 0.9
    assert "right for BaTiO3" in searched.message and "too large for SrTiO3[001]" in searched.message
    assert "name the material" in searched.message
    assert check_pixel_size(answer, stated, ["SrTiO3"]).verdict == "disagrees"
    between = check_pixel_size(answer, stated, ["SrTiO3[001]", "BaTiO3[001]"])
    shares = [m.p for m in between.candidates]
    assert (between.verdict == "unknown") == (max(shares) < 0.9)


def test_a_search_gives_a_size_only_where_the_likely_materials_agree_on_it():
    _, answer = analysed("Au[110]")
    searched = check_pixel_size(answer, PixelSize(15e-12, "file", "stated"))  # eight fcc metals, 3.5 to 4.1 A
    sizes = np.array([m.pixel_size_m for m in searched.candidates if m.p > 0.01])
    assert np.ptp(np.log(sizes)) > 0.06
    assert searched.pixel_size_m is None and searched.ratio is None
    _columns, answer = analysed("SrTiO3[110]")
    searched = check_pixel_size(answer, PixelSize(15e-12, "file", "stated"))
    assert searched.pixel_size_m == pytest.approx(15e-12, rel=0.03)
    assert searched.sigma_m > check_pixel_size(answer, PixelSize(), ["SrTiO3[110]"]).sigma_m


def test_the_five_per_cent_of_a_real_file_are_not_called_right_because_barium_titanate_is_larger():
    _, _columns, answer = answered("openNCEM/Acquisition_18.emd")
    searched = check_pixel_size(answer, PixelSize(12.25e-12, "file", "stated"))
    assert searched.verdict == "unknown"
    assert "too large for SrTiO3[001]" in searched.message and "right for BaTiO3" in searched.message


def test_seven_per_cent_on_a_scan_distorted_by_eight_are_told_and_not_sworn_to():
    _, _columns, answer = answered("SciLink/MoS2_stem_Exp-001-5.npy")
    given = check_pixel_size(answer, PixelSize(13.67e-12, "sidecar", "stated"), ["MoS2"])
    assert given.ratio == pytest.approx(0.93, abs=0.02)
    assert given.candidates[0].distortion > 0.05
    assert given.verdict == "unknown" and "% too large" in given.message
    assert "neither confirms nor refutes" in given.message and "distorted" in given.message


def test_without_a_stated_size_the_named_material_gives_one():
    pytest.importorskip("rsciio")
    from rsciio.digitalmicrograph import file_reader

    image = file_reader(str(real("SciFiReaders/DMReader_Image_SI-Survey.dm3")))[0]["data"].astype(float)
    columns = find_columns(image)
    checked = check_pixel_size(assign(columns, image.shape), PixelSize(), ["SrTiO3"])
    assert checked.zone_axis == "[110]"
    # columns 14.95 px apart in x and 21.79 px in y are 0.2761 and 0.3905 nm apart
    assert checked.pixel_size_m == pytest.approx(np.sqrt(0.2761 * 0.3905 / 14.95 / 21.79) * 1e-9, rel=0.01)
