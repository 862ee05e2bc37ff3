"""Columns of images from microscopes, against what others found in them."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

from stemloop.describe.atoms import find_columns
from stemloop.store.readers import signals

DATA = Path(os.environ.get("STEMLOOP_DATA", Path(__file__).parents[3] / "shared" / "data")) / "haadf"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real files: {DATA} is not there (set STEMLOOP_DATA)")


def image(name):
    return np.asarray(signals(str(DATA / name))[0].data)


def spacing_along(position, direction, near):
    """Median distance [px] to the next column within 8 degrees of ``direction`` (row, col), about ``near`` px away."""
    pairs = cKDTree(position).query_pairs(1.2 * near, output_type="ndarray")
    vector = position[pairs[:, 1]] - position[pairs[:, 0]]
    length = np.hypot(*vector.T)
    aligned = (np.abs(vector @ np.array(direction)) > np.cos(np.radians(8)) * length) & (length > 0.8 * near)
    return float(np.median(length[aligned]))


def test_strontium_titanate_110():
    columns = find_columns(image("atomap/test_ADF_cropped.hdf5"))
    strontium = columns.position[columns.sublattice == 0]
    assert len(strontium) == 117  # another program's number away from the border; here none is nearer
    assert spacing_along(strontium, (1, 0), 29.2) == pytest.approx(29.23, abs=0.3)  # by a spectrum
    assert spacing_along(strontium, (0, 1), 42.2) == pytest.approx(42.22, abs=0.4)
    titanium = columns.position[columns.sublattice == 1]
    assert len(titanium) == 104  # one between each two
    assert len(columns) == 221 and len(columns.vacant) == 0


@pytest.mark.slow
def test_strontium_titanate_001_noisy():
    columns = find_columns(image("openNCEM/Acquisition_18.emd"))
    sites = 2 * 1024**2 / 33.5**2
    assert 0.9 * sites < len(columns) < 1.02 * sites  # strontium and, faint, titanium, but for the border's
    near = cKDTree(columns.position).query(columns.position, 2)[0][:, 1]
    assert np.median(near) == pytest.approx(33.5 / np.sqrt(2), abs=1.5)  # noise shortens the nearest
    assert np.percentile(near, 1) > 15


def test_lead_titanate_on_strontium_ruthenate():
    columns = find_columns(image("TEMUL/Cropped_PTO-SRO_Aligned.hspy"))
    theirs = np.load(DATA / "TEMUL/atom_positions1.npy")[:, ::-1]
    distance = cKDTree(columns.position).query(theirs)[0]
    assert (distance < 2).mean() >= 0.98  # of 465
    assert np.median(distance) < 1


def test_platinum_iridium_particle():
    scipy_io = pytest.importorskip("scipy.io")
    content = scipy_io.loadmat(DATA / "StatSTEM/ExamplePtIr.mat")
    step = float(content["input"]["dx"][0, 0].squeeze())
    theirs = (content["output"]["coordinates"][0, 0] / step - 1)[:, 1::-1]
    columns = find_columns(content["input"]["obs"][0, 0].astype(float))
    distance = cKDTree(columns.position).query(theirs)[0]
    assert len(theirs) == 140
    assert (distance < 3).sum() >= 128  # some of theirs were set by hand outside the particle
    assert np.median(distance) < 0.6
    assert len(columns) < 150


@pytest.mark.parametrize(("number", "spacing"), [(1, 21.4), (2, 21.1)])
def test_molybdenum_disulphide(number, spacing):
    columns = find_columns(np.load(DATA / f"SciLink/MoS2_stem_Exp-00{number}-5.npy"))
    cells = 512**2 * np.sqrt(3) / 2 / spacing**2
    molybdenum, sulphur = (columns.position[columns.sublattice == k] for k in (0, 1))
    assert 0.9 * cells < len(molybdenum) < 1.02 * cells
    lattice = spacing * 2 / np.sqrt(3)
    near = cKDTree(molybdenum).query(molybdenum, 7)[0][:, 1:]
    assert np.median(near) == pytest.approx(lattice, abs=0.5)
    assert np.percentile(near[:, 0], 1) >= 0.45 * lattice
    # two sulphur atoms together are as bright as 0.39 molybdenum; they are in the middle of three of these, and of
    # every two such triangles in one: no shape of the probe, which is alike on both, makes them
    level = [np.median(columns.amplitude[columns.sublattice == k]) for k in (0, 1)]
    assert 0.25 < level[1] / level[0] < 0.5
    away, which = cKDTree(molybdenum).query(sulphur, 3)
    assert np.median(away) == pytest.approx(lattice / np.sqrt(3), abs=1)
    arm = molybdenum[which[:, 0]] - sulphur
    turn = np.exp(3j * np.arctan2(arm[:, 0], arm[:, 1]))  # the other triangles' are the opposite
    assert np.abs(turn.mean()) > 0.8


def test_iron_with_a_grain_boundary():
    columns = find_columns(np.load(DATA / "ai4stem/Fe_bcc_100.npy"))
    near = cKDTree(columns.position).query(columns.position, 5)[0][:, 1:]
    assert np.median(near) == pytest.approx(16.5, abs=0.4)
    assert 0.88 < len(columns) * 16.5**2 / 512**2 < 1
    turn = []
    for grain in (columns.position[:, 0] < 220, columns.position[:, 0] > 300):
        place = columns.position[grain]
        pairs = cKDTree(place).query_pairs(19, output_type="ndarray")
        vector = place[pairs[:, 1]] - place[pairs[:, 0]]
        turn.append(np.degrees(np.angle(np.mean(np.exp(4j * np.arctan2(vector[:, 0], vector[:, 1])))) / 4))
    misorientation = (turn[1] - turn[0]) % 90
    assert min(misorientation, 90 - misorientation) == pytest.approx(37.6, abs=1)


def test_survey_of_a_perovskite():
    columns = find_columns(image("SciFiReaders/DMReader_Image_SI-Survey.dm3"))
    assert 750 < len(columns) < 850  # another program: about 763
    assert spacing_along(columns.position, (0, 1), 14.95) == pytest.approx(14.95, abs=0.2)
    assert spacing_along(columns.position, (1, 0), 21.79) == pytest.approx(21.79, abs=0.4)


def test_a_detector_is_no_crystal():
    assert len(find_columns(image("atomap/example_detector_image.hspy"))) <= 3


def test_single_platinum_atoms_as_people_see_them():
    right, found, labelled = 0, 0, 0
    for number in ("021", "034", "037", "047"):
        (name,) = DATA.glob(f"AtomDetection_ACSTEM/{number}_HAADF*.tif")
        with open(DATA / f"AtomDetection_ACSTEM/{number}_Results.csv", newline="") as file:
            labels = np.array([[float(row["Y"]), float(row["X"])] for row in csv.DictReader(file)])
        columns = find_columns(np.asarray(signals(str(name))[0].data), pixel_size_nm=0.0293)
        distance = np.hypot(*(labels[:, None] - columns.position).transpose(2, 0, 1))
        pairs = linear_sum_assignment(np.minimum(distance, 100))
        right += int((distance[pairs] <= 5).sum())
        found, labelled = found + len(columns), labelled + len(labels)
    # faint spots on a wavy support: people's marks and these agree on three in five
    assert 2 * right / (found + labelled) > 0.58
