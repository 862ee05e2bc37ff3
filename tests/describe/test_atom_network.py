"""The shipped network on images whose answer is known, and beside the classical finder."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from stemloop import describe
from stemloop.core.errors import InputError, UnreadableFile
from stemloop.describe import network
from stemloop.describe.network import UNUSUAL, AtomNetwork, find_columns
from stemloop.learn.atomnet_calibrate import assigned
from stemloop.simulate import pictures
from stemloop.simulate.scenes import scene

DATA = Path(os.environ.get("STEMLOOP_DATA", Path(__file__).parents[3] / "shared" / "data"))


def crystal(plane, pixel_pm, dose, seed=0, shape=(224, 240), rotation=0.3):
    """A counted image of a perfect plane with thermal disorder, and its layout."""
    rng = np.random.default_rng(seed)
    whole = pictures.layout(plane, shape, pixel_pm, rotation, margin=-20)
    whole = pictures.without(pictures.jittered(whole, 3, rng), 0.01, int(whole.site.max()), rng)
    return pictures.counted(pictures.mean_image(whole, dose), rng), whole


def rates(found, true, shape, within, edge):
    """Recall, precision and the pairs, away from the border."""
    inner, judged = (((p > edge) & (p < np.array(shape) - 1 - edge)).all(axis=1) for p in (true, found))
    one, other = assigned(found, true, within)
    both = judged[one] & inner[other]
    return both.sum() / max(1, inner.sum()), both.sum() / max(1, judged.sum()), one[both], other[both]


def test_both_finders_share_one_interface():
    named = describe.finders()
    assert set(named) == {"classical", "network"}
    image, _whole = crystal("SrTiO3[001]", 20, 1e5)
    tables = [find(image, pixel_size_nm=0.02).table() for find in named.values()]
    assert tables[0].dtype == tables[1].dtype
    one, other = (np.column_stack([t["row"], t["col"]]) for t in tables)
    mine, theirs = assigned(one, other, 2.0)
    assert len(mine) > 0.98 * max(len(one), len(other))
    assert np.abs(one[mine] - other[theirs]).max() < 0.1  # both are fits of the same Gaussians


@pytest.mark.parametrize("plane", ["SrTiO3[001]", "SrTiO3[110]", "MoS2", "Si[110]", "Au[110]"])
def test_columns_of_many_crystals_are_found_where_they_are(plane):
    image, whole = crystal(plane, 14, 2e4)
    columns = find_columns(image)
    recall, precision, mine, theirs = rates(columns.position, whole.position, image.shape, 3.0, 12)
    assert recall > 0.97 and precision > 0.98
    pulls = (columns.position[mine] - whole.position[theirs]) / columns.sigma[mine]
    assert 0.75 < pulls.std() < 1.35


@pytest.mark.parametrize("pixel_pm", [8, 12, 20, 30])
@pytest.mark.parametrize("told", [True, False])
def test_no_collapse_at_another_pixel_size(pixel_pm, told):
    side = int(np.clip(4000 / pixel_pm, 200, 420))
    image, whole = crystal("SrTiO3[001]", pixel_pm, 2e4, shape=(side, side))
    columns = find_columns(image, pixel_pm * 1e-3 if told else None)
    recall, precision, _, _ = rates(columns.position, whole.position, image.shape, 60 / pixel_pm, 150 / pixel_pm)
    assert recall > 0.97 and precision > 0.97


def test_a_wrong_pixel_size_is_borne():
    """Stored pixel sizes are up to 36 % off; the columns themselves say how wide they are."""
    image, whole = crystal("MoS2", 14, 2e4)
    recall, precision, _, _ = rates(find_columns(image, 0.019).position, whole.position, image.shape, 3.0, 12)
    assert recall > 0.97 and precision > 0.97


def test_a_turned_image_has_most_of_the_same_columns_turned():
    there_all = common = 0
    for k in range(4):
        made = scene(np.random.default_rng([77, k]), 90.0, "single atoms")
        there = find_columns(made.image, made.pixel_pm * 1e-3).position
        again = find_columns(np.rot90(made.image, 2), made.pixel_pm * 1e-3).position
        back = made.image.shape[0] - 1 - again
        common += len(assigned(there, back, made.probe)[0])
        there_all += max(len(there), len(back))
    # faint atoms are on either side of the threshold: no network of this kind is blind to direction
    assert common >= 0.55 * there_all > 0


@pytest.mark.parametrize("mean", [0.03, 0.1, 0.3, 1.0, 4.0, 50.0, 1000.0])
def test_noise_alone_holds_no_column(mean):
    """The limit is set for less than one column in an image; so five images hold less than one each."""
    found = 0
    for seed in range(5):
        image = np.random.default_rng([31, seed]).poisson(mean, (192, 192)).astype(float)
        found += len(find_columns(image, [None, 0.02, 0.035][seed % 3]))
    assert found <= 5


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_deviations_hold_in_smoothed_images_too(smoothing):
    from scipy import ndimage

    image, whole = crystal("SrTiO3[001]", 15, 2e4, seed=8, shape=(320, 320))
    width = 45 / 15
    columns = find_columns(ndimage.gaussian_filter(image, smoothing * width) if smoothing else image, 0.015)
    _, _, mine, theirs = rates(columns.position, whole.position, image.shape, 3.0, 12)
    error = columns.position[mine] - whole.position[theirs]
    within = np.mean(np.abs(error) < columns.sigma[mine])
    # 0.68 if exact; 500 coordinates scatter by 0.021. Of smoothed noise the power at the columns' frequencies can only
    # be extrapolated: measured are 0.46 to 0.57 (without that, one in ten lies within its deviation)
    assert (0.60 < within < 0.76) if not smoothing else (0.38 < within < 0.80)


def test_films_alone_hold_few_columns():
    made = [scene(np.random.default_rng([78, k]), 90.0, "nothing") for k in range(6)]
    found = [len(find_columns(m.image, m.pixel_pm * 1e-3)) for m in made]
    assert sum(found) <= 25  # of films alone, six times 90 x 90 widths: speckle as fine and as sharp as atoms


def test_single_atoms_on_a_film():
    hits = found = true = 0
    for k in range(6):
        made = scene(np.random.default_rng([79, k]), 90.0, "single atoms")
        columns = find_columns(made.image, made.pixel_pm * 1e-3)
        edge, size = 3 * made.probe, np.array(made.image.shape) - 1
        inner, judged = (((p > edge) & (p < size - edge)).all(axis=1) for p in (made.position, columns.position))
        one, other = assigned(columns.position, made.position, 1.5 * made.probe)
        hits += (judged[one] & inner[other]).sum()
        found, true = found + judged.sum(), true + inner.sum()
    # measured are 0.64 and 0.22: most atoms of these scenes are hidden in the roughness of their film
    assert hits / found > 0.5
    assert hits / true > 0.15


def test_the_probability_is_calibrated_and_an_unlike_image_is_flagged():
    image, _ = crystal("SrTiO3[001]", 15, 2e4)
    usual = network._shipped().find(image)
    assert usual.novelty < UNUSUAL
    assert usual.chance.shape == (len(usual.columns), 3)
    assert ((usual.columns.p_present > 0) & (usual.columns.p_present <= 1)).all()
    stripes = 500 + 400 * np.sin(np.indices((256, 256))[1] / 3)
    with pytest.warns(UserWarning, match="unlike those|dark on bright"):
        find_columns(stripes)


@pytest.mark.parametrize("plane", ["SrTiO3[001]", "SrTiO3[110]", "MoS2"])
def test_dark_columns_are_noticed(plane):
    image, _ = crystal(plane, 14, 2e4)
    assert network._shipped().find(image).darker < 0
    with pytest.warns(UserWarning, match="dark on bright|unlike those"):
        find_columns(image.max() - image)
    assert network._shipped().find(image.max() - image, 0.014).novelty > UNUSUAL


def test_dark_atoms_are_noticed_and_bright_ones_are_not_called_dark():
    made = [scene(np.random.default_rng([80, k]), 64.0, "single atoms") for k in range(8)]
    right, negative = (
        np.array([network._shipped().find(image, m.pixel_pm * 1e-3).darker for m, image in pairs])
        for pairs in ([(m, m.image) for m in made], [(m, m.image.max() - m.image) for m in made])
    )
    assert (right < network.DARK).all()
    assert np.mean(negative > network.DARK) >= 0.3  # measured 3 of 8; where few atoms are seen, so few could be chance


def test_tiles_join_without_a_seam(monkeypatch):
    net = network._shipped()
    image = np.random.default_rng(5).normal(size=(300, 260)).astype(np.float32)
    whole, _ = net.maps(image)
    monkeypatch.setattr(network, "_TILE", 128)
    parts, _ = net.maps(image)
    # what a map's cell sees reaches a little farther than the halo, with little weight
    assert np.abs(whole - parts).max() < 0.2
    assert np.quantile(np.abs(whole - parts), 0.99) < 1e-3


@pytest.mark.parametrize(
    "image", [np.full((64, 64), 3.0), np.where(np.eye(64) > 0, np.nan, 1.0), np.zeros((8, 80)), np.zeros((4, 64, 64))]
)
def test_unusable_images_are_refused(image):
    with pytest.raises(InputError):
        find_columns(image)


def test_a_file_that_is_no_network_says_so(tmp_path):
    (tmp_path / "atoms.onnx").write_bytes(b"nothing")
    with pytest.raises(UnreadableFile, match="train atoms"):
        AtomNetwork(tmp_path / "atoms.onnx")
    with pytest.raises(UnreadableFile, match="no network at"):
        AtomNetwork(tmp_path / "none.onnx")


def test_a_network_whose_card_lacks_something_says_what(monkeypatch):
    monkeypatch.setattr(network, "_ON_CARD", network._ON_CARD | {"mood"})
    with pytest.raises(UnreadableFile, match="lacks mood; make it anew"):
        AtomNetwork()


def test_the_weights_are_small():
    folder = Path(network.__file__).parent / "weights"
    assert sum(p.stat().st_size for p in folder.glob("atoms*")) < 3e6


def test_single_platinum_atoms_of_real_images():
    """Four images with human labels, none of which took part in the training or its threshold."""
    folder = DATA / "haadf" / "AtomDetection_ACSTEM"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set STEMLOOP_DATA")
    import tifffile

    hits = total = 0
    for table in sorted(folder.glob("*_Results.csv")):
        place = np.array([[float(r["Y"]), float(r["X"])] for r in csv.DictReader(table.open())])
        image = tifffile.imread(next(folder.glob(table.name.split("_")[0] + "_HAADF*.tif")))
        found = find_columns(image, 0.0293).position
        hits += len(assigned(found, place, 5.0)[0])
        total += len(found) + len(place)
    assert 2 * hits / total > 0.55
