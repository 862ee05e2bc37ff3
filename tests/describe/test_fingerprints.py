"""Fingerprints stay the same where the specimen does, and differ where it differs."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from stemloop.core.errors import InputError
from stemloop.core.structure import Columns
from stemloop.describe.atoms import find_columns
from stemloop.describe.fingerprints import DIMENSION, fingerprints, patches, scatter, spacing, unit_px
from stemloop.simulate.pictures import Layout, counted, layout, mean_image
from stemloop.simulate.planted import planted
from stemloop.store.library import same

UNIT_PM = 390.5 / np.sqrt(2)


def columns_of(made):
    n = len(made.position)
    none = np.zeros(n)
    return Columns(made.position, np.full((n, 2), 0.02), made.weight, made.width, made.site, none, none + 1)


def surroundings(what="odd"):
    """Columns (n, 4) about a column of SrTiO3: row, col [pm], weight, width [pm]; a defect that has no symmetry."""
    whole = layout("SrTiO3[001]", (301, 301), 10.0)
    middle = whole.position[np.hypot(*(whole.position - 150).T).argmin()]
    columns = np.column_stack([(whole.position - middle) * 10.0, whole.weight, whole.width * 10.0])
    order = np.hypot(columns[:, 0], columns[:, 1]).argsort()
    columns = columns[order]
    if what == "odd":
        columns[2, 2] *= 1.8
        columns[6, :2] += [60.0, 25.0]
        columns = np.delete(columns, [9, 4], axis=0)
    elif what == "vacancy":
        columns = columns[1:]
    return columns


def seen(columns, pixel_pm=15.0, angle=0.0, mirror=1.0, offset=(0.0, 0.0), dose=1e6, background=0.1):
    """The mean image of turned columns, the columns in it, and the place that was the origin."""
    c, s = np.cos(angle), np.sin(angle)
    shape = (2 * int(1100 / pixel_pm) + 1,) * 2
    place = (shape[0] - 1) / 2 + np.array(offset)
    position = (columns[:, :2] * [mirror, 1.0]) @ np.array([[c, -s], [s, c]]) / pixel_pm + place
    none = np.zeros(len(columns), np.int64)
    cell = np.zeros((len(columns), 2), np.int64)
    made = Layout(shape, pixel_pm, position, none, none, cell, columns[:, 2], columns[:, 3] / pixel_pm)
    return mean_image(made, dose, background), columns_of(made), place[None]


def fingerprint(*args, **how):
    """Of a place whose surroundings are measured in the truth's own unit."""
    image, columns, place = seen(*args, **how)
    pixel_pm = how.get("pixel_pm", 15.0)
    # 0.27 nm is the unit where a pixel size is given; so this makes the unit the lattice's
    return fingerprints(image, columns, place, pixel_size_nm=0.27 * pixel_pm / UNIT_PM)[0].astype(float)


@pytest.fixture(scope="module")
def odd():
    return fingerprint(surroundings())


def test_it_is_of_what_was_said(odd):
    assert odd.shape == (DIMENSION,)
    # odd and perfect surroundings are worlds apart: changes below are small beside this
    assert np.linalg.norm(odd - fingerprint(surroundings("perfect"))) > 15


@pytest.mark.parametrize("angle", [0.1, 0.6, 1.3, 2.5, 4.4])
@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_turned_and_mirrored_it_is_the_same(odd, angle, mirror):
    # what is left is the pixels' sampling, without noise: a tenth of a deviation
    assert np.linalg.norm(fingerprint(surroundings(), angle=angle, mirror=mirror) - odd) < 0.3


def test_shifted_by_parts_of_a_pixel_it_is_the_same(odd):
    for offset in ((0.5, 0.5), (0.25, -0.3), (-0.4, 0.1)):
        assert np.linalg.norm(fingerprint(surroundings(), offset=offset) - odd) < 0.3


@pytest.mark.parametrize("pixel_pm", [8.0, 11.0, 20.0, 30.0])
def test_at_another_pixel_size_it_is_the_same(odd, pixel_pm):
    assert np.linalg.norm(fingerprint(surroundings(), pixel_pm=pixel_pm) - odd) < 0.6


def test_brightness_contrast_and_a_slope_change_nothing(odd):
    image, columns, place = seen(surroundings())
    unit = 0.27 * 15.0 / UNIT_PM
    slope = 0.3 * np.ptp(image) * np.indices(image.shape).sum(axis=0) / sum(image.shape)
    for other in (image + 1e5, 7.3 * image, 0.001 * image - 3, image + slope):
        assert np.linalg.norm(fingerprints(other, columns, place, pixel_size_nm=unit)[0] - odd) < 0.05
    assert np.linalg.norm(fingerprint(surroundings(), dose=2e3, background=0.4) - odd) < 0.05


def test_the_spacing_is_the_root_of_a_columns_area_whatever_is_missing():
    rng = np.random.default_rng(0)
    for plane, area in (("SrTiO3[001]", 390.5**2 / 2), ("MoS2", 316.0**2 * np.sqrt(3) / 4)):
        whole = layout(plane, (400, 380), 15.0, 0.4)
        for share in (1.0, 0.98, 0.7):  # of the second sublattice, which weak images hide
            some = whole.position[(rng.random(len(whole.position)) < share) | (whole.site == 0)]
            some = some + rng.normal(0, 0.01 * np.sqrt(area) / 15, some.shape)
            assert spacing(some) == pytest.approx(np.sqrt(area) / 15, rel=3e-3)
    few = columns_of(whole.take(np.arange(5)))
    with pytest.raises(InputError, match="pixel_size_nm"):
        unit_px(few)
    with pytest.raises(InputError, match="pixel_size_nm"):
        spacing(np.column_stack([np.arange(30.0), np.arange(30.0)]))
    assert unit_px(few, 0.015) == pytest.approx(18.0)


@pytest.fixture(scope="module")
def images():
    """Fingerprints of counted images of two materials at 1e4 e/A^2: (vectors, names of places, image, scatter)."""
    rng = np.random.default_rng(3)
    kinds = ("vacancy-0", "vacancy-1", "half-0", "double-1", "split-0", "interstitial", "pair", "dislocation")
    parts = []
    for plane, pixel_pm in (("SrTiO3[001]", 12.0), ("SrTiO3[001]", 21.0), ("SrTiO3[001]", 16.0)):
        side = round(22 * UNIT_PM / pixel_pm)
        made = planted(plane, (side, side), pixel_pm, rng.uniform(0, 6), kinds, rng)
        image = counted(mean_image(made.layout, 1e4), rng)
        parts.append((*named(image, made.place, UNIT_PM / pixel_pm), len(parts)))
    vectors, names = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    number = np.concatenate([np.full(len(p[0]), p[3]) for p in parts])
    return vectors, names, number, [p[2] for p in parts]


def named(image, planted_places, unit):
    """Fingerprints of all columns and vacancies that are found, and of planted places that are neither."""
    columns = find_columns(image)
    places = np.concatenate([columns.position, columns.vacant])
    names = np.full(len(places), "column", dtype="<U16")
    for kind, place in planted_places.items():
        near = np.hypot(*(places - place).T)
        names[near < 0.8 * unit] = "near"
        if near.min() < 0.2 * unit:
            names[near.argmin()] = kind
        else:
            places, names = np.concatenate([places, place[None]]), np.append(names, kind)
    vectors = fingerprints(image, columns, places)
    whole = np.isfinite(vectors).all(axis=1)
    group = np.append(columns.sublattice, np.full(len(places) - len(columns), 9))
    return vectors[whole], names[whole], scatter(vectors[whole], group[whole])


def test_a_planted_defect_is_nearest_to_its_like_in_other_images(images):
    vectors, names, number, _ = images
    right = []
    for k in np.flatnonzero((names != "column") & (names != "near")):
        others = number != number[k]
        nearest = np.linalg.norm(vectors[others] - vectors[k], axis=1).argmin()
        right.append(names[others][nearest] == names[k])
    assert len(right) == 24
    # 95 % is asked of the whole method and measured in benchmarks/library_search.py; here one in 24 may fail
    assert np.mean(right) >= 0.95


def test_distances_of_equal_surroundings_are_about_what_noise_makes_them(images):
    vectors, names, number, spread = images
    for kind in ("vacancy-0", "vacancy-1", "double-1"):
        a, b = vectors[(names == kind) & (number == 0)][0], vectors[(names == kind) & (number == 1)][0]
        assert same(np.linalg.norm(a - b), spread[0], spread[1], DIMENSION) > 0.01
    nearest, _ = cKDTree(vectors[names == "column"][::20]).query(vectors[names == "vacancy-0"])
    assert same(nearest.min(), max(spread), max(spread), DIMENSION) < 1e-3


def test_more_electrons_scatter_less():
    rng = np.random.default_rng(5)
    whole = layout("SrTiO3[001]", (400, 400), 15.0, 0.3)
    columns = columns_of(whole)
    found = [scatter(fingerprints(counted(mean_image(whole, d), rng), columns), whole.site) for d in (1e3, 4e3, 1e6)]
    # counting noise halves with four times the electrons; white at about 1e4, where the positions add to it
    assert found[0] / found[1] == pytest.approx(2, rel=0.25)
    assert found[2] < 0.25


def test_places_near_the_border_have_none():
    image, columns, place = seen(surroundings(), dose=1e4)
    places = np.array([place[0], [3.0, 3.0], [0.0, len(image) - 1.0]])
    found = fingerprints(image, columns, places, pixel_size_nm=0.015)
    assert np.isfinite(found[0]).all() and np.isnan(found[1:]).all()


def test_patches_are_the_image_at_the_place():
    image, _, place = seen(surroundings(), dose=1e4)
    (patch,) = patches(image, place, 9.0, 40)  # 39.6 px a side: about pixel for pixel
    top = (patch.shape[0] - 1) // 2
    assert patch[top : top + 2, top : top + 2].max() == pytest.approx(image[tuple(place[0].astype(int))], rel=0.05)
    assert patches(image, place + np.array([0, 300.0]), 9.0).shape == (1, 32, 32)  # beyond the border its pixels go on


@pytest.mark.parametrize(
    "image, match",
    [(np.zeros((9, 9, 3)), "shape"), (np.full((99, 99), np.nan), "finite"), (np.zeros((99, 99), "U1"), "image")],
)
def test_what_is_no_image_is_refused(image, match):
    _, columns, place = seen(surroundings())
    with pytest.raises(InputError, match=match):
        fingerprints(image, columns, place)


def test_a_constant_image_and_odd_arguments():
    _, columns, place = seen(surroundings())
    assert np.isfinite(fingerprints(np.zeros((200, 200)), columns, place, pixel_size_nm=0.015)).all()
    with pytest.raises(InputError, match="row, col"):
        fingerprints(np.zeros((200, 200)), columns, np.zeros(3))
    with pytest.raises(InputError, match="nm"):
        fingerprints(np.zeros((200, 200)), columns, place, pixel_size_nm=-1.0)
