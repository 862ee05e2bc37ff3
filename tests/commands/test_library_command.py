"""``stemloop library``: from files to a library, and from a place of an image to where else it was seen."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from stemloop.cli import main
from stemloop.simulate.pictures import counted, mean_image
from stemloop.simulate.planted import planted
from stemloop.store.library import Library, sha256_of

DATA = Path(os.environ.get("STEMLOOP_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two images of SrTiO3 with one Sr vacancy each, and where it is."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    places = []
    for name, pixel_pm, turn in (("a.npy", 14.0, 0.3), ("b.npy", 19.0, 1.0)):
        made = planted("SrTiO3[001]", (round(5200 / pixel_pm),) * 2, pixel_pm, turn, ("vacancy-0",), rng)
        np.save(name, counted(mean_image(made.layout, 2e4), rng))
        places.append(made.place["vacancy-0"])
    return places


def test_a_vacancy_is_found_in_the_other_file(files, capsys):
    assert main(["library", "add", "seen", "a.npy", "b.npy"]) == 0
    said = capsys.readouterr().out
    assert main(["library", "add", "seen", "a.npy"]) == 0
    assert "a.npy: 0 new" in capsys.readouterr().out and "a.npy: 0 new" not in said
    row, col = files[1] + 1.5  # nearly
    assert main(["library", "search", "seen", "b.npy", "--at", f"{row},{col}", "--json"]) == 0
    (sighting,) = json.loads(capsys.readouterr().out)
    assert sighting["source"] == "a.npy" and sighting["sha256"] == sha256_of("a.npy")
    (match,) = sighting["matches"]
    assert match["kind"] == "vacancy" and match["p_same"] > 1e-3
    assert np.hypot(*(np.array(match["place"]) - files[0])) < 2
    assert main(["library", "search", "seen", "b.npy", "--at", f"{row},{col}"]) == 0
    assert "a.npy frame 0: 1 times" in capsys.readouterr().out
    assert main(["library", "search", "seen", "b.npy", "--at", "2,2"]) == 2
    assert "further in" in capsys.readouterr().err


def test_libraries_are_merged_and_checked(files, capsys):
    main(["library", "add", "one", "a.npy"])
    main(["library", "add", "two", "b.npy"])
    assert main(["library", "merge", "all", "one", "two"]) == 0
    assert main(["library", "info", "all"]) == 0
    said = capsys.readouterr().out
    about = json.loads(said[said.index("{") :])
    with Library("one") as one, Library("two") as two:
        assert about["entries"] == len(one) + len(two)
    assert about["kinds"]["vacancy"] == 2 and about["sources"] == 2


def test_a_bad_file_does_not_end_the_others(files, capsys):
    Path("bad.npy").write_bytes(b"no array")
    np.save("flat.npy", np.ones((64, 64)))
    assert main(["library", "add", "seen", "bad.npy", "flat.npy", "a.npy"]) == 2
    shown = capsys.readouterr()
    assert "bad.npy" in shown.err and "flat.npy" in shown.err and "a.npy: " in shown.out
    assert main(["library", "info", "nowhere"]) == 2


def test_a_bad_frame_does_not_end_the_others_and_the_file_is_hashed_once(files, capsys, monkeypatch):
    import stemloop.store.library as store

    image = np.load("a.npy").astype(float)
    blank, broken = np.zeros_like(image), np.full_like(image, np.nan)
    np.save("stack.npy", np.stack([blank, image, broken, image]))
    hashed = []
    monkeypatch.setattr(store, "sha256_of", lambda path: hashed.append(path) or "ab" * 32)
    assert main(["library", "add", "seen", "stack.npy"]) == 2
    shown = capsys.readouterr()
    assert "frame 0: all pixels" in shown.err and "frame 2:" in shown.err and len(hashed) == 1
    with Library("seen") as library:
        assert {row[0] for row in library._shelf.ask("SELECT frame FROM entries")} == {1, 3}


def test_colours_are_one_image_and_spectra_none(tmp_path):
    from stemloop.campaign.images.elements import images_of
    from stemloop.core.errors import InputError

    np.save(tmp_path / "rgb.npy", np.stack([np.full((40, 50), v, np.uint8) for v in (10, 20, 60, 255)], axis=2))
    (image, _), *more = images_of(tmp_path / "rgb.npy")
    assert image.shape == (40, 50) and (image == 30).all() and not more
    np.save(tmp_path / "scan.npy", np.zeros((3, 3, 8, 8)))
    with pytest.raises(InputError, match="no image"):
        next(images_of(tmp_path / "scan.npy"))


def test_real_images_are_told_apart_and_their_likes_found(tmp_path):
    from stemloop.campaign.images.elements import elements_of, images_of

    names = ["SciLink/MoS2_stem_Exp-001-5.npy", "SciLink/MoS2_stem_Exp-002-5.npy"]
    names += ["atomap/test_ADF_cropped.hdf5", "ai4stem/Fe_bcc_100.npy"]
    if not all((DATA / "haadf" / name).exists() for name in names):
        pytest.skip(f"{DATA / 'haadf'} is not there; set STEMLOOP_DATA")
    with Library(tmp_path / "seen") as library:
        found = {}
        for name in names:
            image, _ = next(images_of(DATA / "haadf" / name))
            found[name] = elements_of(image)
            library.add(found[name], name, sha256_of(DATA / "haadf" / name))
        # the two images of MoS2 differ by a sixth in pixel size, whatever their metadata say
        own = sha256_of(DATA / "haadf" / names[1])
        best = [library.search(e.vector, 1, without_source=own)[0].entry.source for e in found[names[1]][::4]]
        assert np.mean([source == names[0] for source in best]) > 0.95


def test_a_real_image_turned_and_mirrored_has_the_same_fingerprints():
    from stemloop.campaign.images.elements import images_of
    from stemloop.core.structure import Columns
    from stemloop.describe import find_columns
    from stemloop.describe.fingerprints import fingerprints

    path = DATA / "haadf" / "atomap/test_ADF_cropped.hdf5"
    if not path.exists():
        pytest.skip(f"{path} is not there; set STEMLOOP_DATA")
    image = np.asarray(next(images_of(path))[0], dtype=np.float64)
    columns = find_columns(image)
    found = fingerprints(image, columns)
    turned = np.ascontiguousarray(np.rot90(image)[::-1])  # the same as transposed
    there = Columns(columns.position[:, ::-1], columns.sigma, columns.amplitude, columns.width, columns.sublattice)
    inside = np.isfinite(found).all(axis=1)
    assert inside.sum() > 50
    assert np.abs(fingerprints(turned, there)[inside] - found[inside]).max() < 1e-3
