"""From a recorded image or stack to a folder of results: right answers, the same bytes after a kill, clear errors."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

import stemloop
from stemloop import cli
from stemloop.campaign.images import frames
from stemloop.campaign.images.analysis import analyze, covered
from stemloop.campaign.images.one_image import Wanted, understand
from stemloop.core.errors import InputError
from stemloop.core.protocols import PixelSize
from stemloop.simulate import pictures
from stemloop.store.library import Library

DATA = Path(os.environ.get("STEMLOOP_DATA") or Path(__file__).parents[2] / "../shared/data")
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real files: {DATA} is not there (set STEMLOOP_DATA)")
PIXEL_PM = 20.0


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


def crystal(seed=0, side=112, dose=5e4):
    rng = np.random.default_rng(seed)
    layout = pictures.layout("SrTiO3[001]", (side, side), PIXEL_PM, 0.1)
    return layout, pictures.counted(pictures.mean_image(layout, dose), rng)


def stack(count=6, side=160, bad=(3,), seed=0):
    """Frames of a drifting crystal, with blank frames; and the shifts."""
    rng = np.random.default_rng(seed)
    layout = pictures.layout("SrTiO3[001]", (side, side), PIXEL_PM, 0.1, margin=-20)
    uneven = layout.weight * rng.uniform(0.75, 1.25, len(layout.weight))  # tells a shift from a lattice vector
    layout = pictures.without(replace(layout, weight=uneven), 0.03, 1, rng)
    shift = np.cumsum(rng.normal(0, 0.5, (count, 2)), axis=0)
    made = np.array([pictures.counted(pictures.mean_image(layout, 1e4, shift=tuple(s)), rng) for s in shift])
    made[list(bad)] = 0
    return made, shift


def sums(folder):
    """SHA-256 of every file of results."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "job.json"
    }


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    layout, image = crystal()
    np.save(folder / "crystal.npy", image)
    (folder / "crystal.json").write_text(json.dumps({"pixel_size_nm": PIXEL_PM / 1e3}))
    return folder, layout, analyze(folder / "crystal.npy", folder / "out")


def test_the_columns_of_a_known_crystal_are_found_and_assigned(analysed):
    _, layout, found = analysed
    table = found.columns
    place = np.column_stack([table["row"], table["col"]])
    inner = layout.take(((layout.position > 6) & (layout.position < 105)).all(axis=1))
    away, which = cKDTree(place).query(inner.position)
    assert away.max() < 0.5 and len(place) <= len(layout.position)
    assert np.mean(table["site"][which] == inner.site) > 0.99
    np.testing.assert_allclose(table["x_nm"], table["col"] * PIXEL_PM / 1e3)
    (lattice,) = found.summary["lattices"]
    assert lattice["a1_nm"] == pytest.approx(0.3905, rel=2e-3) and lattice["angle_deg"] == pytest.approx(90, abs=0.3)


def test_the_folder_holds_what_is_promised(analysed):
    folder, _, found = analysed
    out = folder / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary == found.summary
    assert set(summary["files"]) <= {path.name for path in out.iterdir()}
    assert summary["sha256"] == hashlib.sha256((folder / "crystal.npy").read_bytes()).hexdigest()
    with open(out / "columns.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == summary["columns"] == len(found.columns)
    np.testing.assert_allclose([float(row["row"]) for row in rows], found.columns["row"], rtol=1e-8)
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    np.testing.assert_array_equal(parquet.read_table(out / "columns.parquet")["col"].to_numpy(), found.columns["col"])


def test_the_page_needs_nothing_else(analysed):
    page = (analysed[0] / "out" / "report.html").read_text(encoding="utf-8")
    for word in ("http://", "https://", "<script", 'src="/', "url("):
        assert word not in page
    for heading in ("Is the scale right?", "The lattice", "Strain", "Defects", "Where it comes from"):
        assert heading in page


def test_other_programs_can_load_the_atoms(analysed):
    folder, _, found = analysed
    out, n = folder / "out", len(found.columns)
    with np.load(out / "atoms_atomai.npz") as file:
        coordinates = {int(k): file[k] for k in file.files}
    assert coordinates[0].shape == (n, 3)
    np.testing.assert_array_equal(coordinates[0][:, 0], found.columns["row"])
    np.testing.assert_array_equal(coordinates[0], found.to_atomai()[0])
    with np.load(out / "atoms_atomap.npz") as file:
        positions = [file[name] for name in sorted(file.files)]
    assert sum(map(len, positions)) == n
    np.testing.assert_array_equal(positions[0], found.to_atomap()[0])
    first = found.columns[found.columns["sublattice"] == found.columns["sublattice"].min()]
    np.testing.assert_array_equal(positions[0], np.column_stack([first["col"], first["row"]]))
    import ase.io

    atoms = ase.io.read(out / "atoms.extxyz")
    np.testing.assert_allclose(atoms.positions[:, 0], 10 * found.columns["x_nm"], atol=1e-5)
    height = (found.found.shape[0] - 1) * PIXEL_PM / 100
    np.testing.assert_allclose(atoms.positions[:, 1], height - 10 * found.columns["y_nm"], atol=1e-5)


def test_a_notebook_shows_it_in_five_lines():
    _, image = crystal()
    a = stemloop.analyze(image, pixel_size_nm=PIXEL_PM / 1e3)
    assert len(a.columns) > 50
    assert "data:image/png" in a._repr_html_() and "srcdoc" in a.report()._repr_html_()
    folder = a.folder
    del a
    import gc

    gc.collect()
    assert not folder.exists()


def test_the_same_again_is_not_done_again_and_something_else_is_refused(tmp_path, monkeypatch):
    _, image = crystal(side=96)
    analyze(image, tmp_path / "out")
    before = sums(tmp_path / "out")
    monkeypatch.setattr(frames, "understand", None)
    analyze(image, tmp_path / "out")
    monkeypatch.undo()
    assert sums(tmp_path / "out") == before
    with pytest.raises(InputError, match="--overwrite"):
        analyze(image, tmp_path / "out", pixel_size_nm=0.02)
    assert analyze(image, tmp_path / "out", pixel_size_nm=0.02, overwrite=True).pixel_size.value_m == pytest.approx(
        2e-11
    )


def test_the_network_finds_the_same_columns(analysed, tmp_path):
    folder, _, found = analysed
    other = analyze(folder / "crystal.npy", tmp_path / "out", finder="network", denoise="nlm")
    away, _ = cKDTree(other.found.columns.position).query(found.found.columns.position)
    assert np.mean(away < 0.5) > 0.97
    assert other.denoised.shape == other.image.shape and "Without noise" in other.report().path.read_text()
    assert np.isfinite(other.fringes.values).any() and np.nanmax(np.abs(other.fringes.values[:3])) < 0.02


def test_a_map_is_laid_over_the_image(tmp_path):
    layout, _ = crystal(side=160)
    there = np.hypot(*(layout.position - [70, 90]).T) > 24  # a hole: without it every cell is alike
    mean = pictures.mean_image(layout.take(there & (layout.position[:, 0] < 130)), 5e4)
    spectra = pictures.counted(mean, np.random.default_rng(4)).reshape(20, 8, 20, 8).sum(axis=(1, 3))[..., None]
    np.save(tmp_path / "map.npy", spectra * np.array([0.5, 0.3, 0.2]))
    found = analyze(pictures.counted(mean, np.random.default_rng(5)), tmp_path / "out", map_file=tmp_path / "map.npy")
    told = found.summary["map"]
    assert told["trusted"] and told["correlation"] > 0.9
    np.testing.assert_allclose(told["offset_px"], [3.5, 3.5], atol=1.0)
    assert "The map on the image" in found.report().path.read_text(encoding="utf-8")
    np.save(tmp_path / "flat.npy", np.ones((20, 20)))
    other = analyze(found.image, tmp_path / "other", map_file=tmp_path / "flat.npy")
    assert other.overlay is None and [part for part, _ in other.left_out] == ["map"]


def with_dopant(seed):
    """A crystal in whose middle one secondary column is three times as bright, and where that is."""
    rng = np.random.default_rng(seed)
    layout = pictures.layout("SrTiO3[001]", (200, 200), PIXEL_PM, 0.1 + 0.2 * seed)
    away = np.hypot(*(layout.position - 100.0).T) + 1e3 * (layout.site == 0)
    at = int(away.argmin())
    weight = layout.weight.copy()
    weight[at] *= 3
    mean = pictures.mean_image(replace(layout, weight=weight), 5e4)
    return layout.position[at], pictures.counted(mean, rng)


def test_a_defect_is_remembered_once_and_as_what_it_is(tmp_path):
    place, image = with_dopant(0)
    first = analyze(image, tmp_path / "a", library=tmp_path / "seen.library")
    (dopant,) = [d for d in first.found.defects if d.kind == "dopant"]
    assert np.hypot(*(np.ravel(dopant.place) - place)) < 0.5
    with Library(tmp_path / "seen.library") as library:
        kept = [library.entry(k + 1) for k in range(len(library))]
    near = [e.kind for e in kept if np.hypot(e.place[0] - place[0], e.place[1] - place[1]) < 3]
    assert near == ["dopant"]
    _, other = with_dopant(1)
    second = analyze(other, tmp_path / "b", library=tmp_path / "seen.library")
    (asked,) = [one for one in second.remembered.seen if one.what == "dopant"]
    assert asked.others[0]["kind"] == "dopant" and asked.others[0]["file"] == "array"


# ------------------------------------------------------------------------------------------------------------ stacks


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack")
    made, shift = stack()
    np.save(folder / "stack.npy", made)
    found = analyze(folder / "stack.npy", folder / "out", pixel_size_nm=PIXEL_PM / 1e3, frame_time_s=0.5, workers=2)
    return folder, shift, found


def test_a_stack_is_registered_averaged_and_its_bad_frames_are_named(moving):
    folder, shift, found = moving
    assert list(found.bad) == [3] and found.bad[3]
    good = np.setdiff1d(np.arange(len(shift)), [3])
    error = found.registration.shift[good] - shift[good]
    assert np.abs(error - np.median(error, axis=0)).max() < 0.1
    first = found.frame(0)
    assert np.median(found.found.columns.sigma) < 0.65 * np.median(first.columns.sigma)  # 5 frames: 1 / sqrt(5) = 0.45
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert list(summary["bad_frames"]) == ["3"] and summary["drift"]["frames_used"] == 5
    with open(folder / "out" / "columns.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["frame"]) for row in rows} == set(good.tolist())
    long = [row["track"] for row in rows if row["frame"] == "0"]
    assert len(set(long)) == len(long) and "-1" not in long
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    assert "why it was not used" in page and "From frame to frame" in page


def test_processes_and_this_process_give_the_same_bytes(moving, tmp_path):
    folder, _, _ = moving
    analyze(folder / "stack.npy", tmp_path / "out", pixel_size_nm=PIXEL_PM / 1e3, frame_time_s=0.5, workers=1)
    assert sums(tmp_path / "out") == sums(folder / "out")


def test_a_killed_analysis_goes_on_and_ends_with_the_same_bytes(moving, tmp_path):
    folder, _, _ = moving
    out = tmp_path / "out"
    words = [sys.executable, "-m", "stemloop.cli", "analyze", str(folder / "stack.npy"), "--out", str(out)]
    words += ["--pixel-nm", str(PIXEL_PM / 1e3), "--frame-s", "0.5", "--workers", "1"]
    paths = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(out.glob("frames/*.npz"))) < 2 and time.monotonic() < until and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = sorted(out.glob("frames/0*"))
    assert 0 < len(done) < 6
    changed = [path.stat().st_mtime_ns for path in done]
    analyze(folder / "stack.npy", out, pixel_size_nm=PIXEL_PM / 1e3, frame_time_s=0.5, workers=1)
    assert [path.stat().st_mtime_ns for path in done] == changed
    assert sums(out) == sums(folder / "out")


def test_a_registration_that_was_stopped_goes_on_where_it_was(moving, tmp_path):
    folder, out = moving[0], tmp_path / "out"
    shutil.copytree(folder / "out", out)
    for path in out.glob("*.npz"):  # the frames are done, and what they say together is not
        path.unlink()
    said: list[int] = []

    def until(step, done, of):
        if step == "registering":
            said.append(done)
            if done > 3 * of // 5:  # of five passes over the frames the third is done
                raise KeyboardInterrupt

    words = {"pixel_size_nm": PIXEL_PM / 1e3, "frame_time_s": 0.5, "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        analyze(folder / "stack.npy", out, progress=until, **words)
    kept = {path.name for path in out.glob("registration*")}
    assert kept == {"registration_grown.npz", "registration_round_0.npz"}
    before = list(said)
    with pytest.raises(KeyboardInterrupt):
        analyze(folder / "stack.npy", out, progress=until, **words)
    assert len(said) - len(before) < len(before)  # neither is done again
    (out / "registration_grown.npz").write_bytes(b"PK half of it")  # a damaged part is
    analyze(folder / "stack.npy", out, **words)
    assert sums(out) == sums(folder / "out")


@pytest.mark.slow
def test_a_worker_that_dies_takes_one_frame_along(tmp_path, monkeypatch):
    made, _ = stack(3, bad=())
    np.save(tmp_path / "stack.npy", made)
    frames.Job(str(tmp_path / "stack.npy"), None, frames.PixelSize(), frames.Wanted()).write(tmp_path)
    deadly = frames._Worker.does

    def does(worker, k, seconds):
        if k == 1:
            os.kill(worker._process.pid, signal.SIGKILL)
        return deadly(worker, k, seconds)

    monkeypatch.setattr(frames._Worker, "does", does)
    said = []
    frames.local(tmp_path, [0, 1, 2], said.append, 1)
    assert sorted(said) == [0, 1, 2]
    assert "signal 9" in frames.bad(tmp_path, 1)["message"]
    assert len(frames.load(tmp_path, 0).columns) and len(frames.load(tmp_path, 2).columns)


def test_a_frame_that_takes_too_long_is_given_up(tmp_path):
    made, _ = stack(2, side=64, bad=())
    np.save(tmp_path / "stack.npy", made)
    job = frames.Job(str(tmp_path / "stack.npy"), None, frames.PixelSize(), frames.Wanted(), frame_s=1e-3)
    job.write(tmp_path)
    frames.local(tmp_path, [1], lambda _: None, 1)
    assert "longer than 0.001 s" in frames.bad(tmp_path, 1)["message"]


def test_workers_of_a_cluster_share_the_frames(tmp_path):
    made, _ = stack(4, side=64, bad=(2,))
    np.save(tmp_path / "stack.npy", made)
    frames.Job(str(tmp_path / "stack.npy"), None, frames.PixelSize(), frames.Wanted()).write(tmp_path / "out")
    for part in range(2):
        words = ["analyze", "--worker", str(tmp_path / "out"), "--part", f"{part}/2", "--frames", "4"]
        assert cli.main(words) == 0
    assert all(frames.done(tmp_path / "out", k) for k in range(4)) and frames.bad(tmp_path / "out", 2)
    script = frames.array_script(tmp_path / "out", 2, 4, ["--time=01:00:00"])
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert "#SBATCH --array=0-1" in script and "#SBATCH --time=01:00:00" in script


@pytest.mark.slow
def test_dask_gives_the_same_bytes(moving, tmp_path):
    folder, _, _ = moving
    pytest.importorskip("distributed", reason="Dask is not installed")
    analyze(
        folder / "stack.npy",
        tmp_path / "out",
        pixel_size_nm=PIXEL_PM / 1e3,
        frame_time_s=0.5,
        executor="dask",
        workers=2,
    )
    assert sums(tmp_path / "out") == sums(folder / "out")


def test_the_covered_part_has_half_of_the_frames_everywhere():
    weight = np.full((60, 70), 8.0)
    weight[:5], weight[:, 66:] = 2, 0
    image = np.where(weight > 0, 1.0, np.nan)
    image[30, 30] = np.nan
    part, corner = covered(image, weight)
    assert corner == (5, 0) and part.shape == (55, 66) and np.isfinite(part).all()


@real
def test_a_real_image_whose_metadata_are_wrong_is_flagged(tmp_path, capsys):
    file = DATA / "haadf/SciLink/MoS2_stem_Exp-002-5.npy"  # its sidecar states a field 36 % too wide
    assert cli.main(["analyze", str(file), "--material", "MoS2", "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["pixel_size"] == {"nm": 0.01757813, "source": "sidecar", "trust": "refuted"}
    assert summary["calibration"]["ratio"] == pytest.approx(1 / 1.36, abs=0.05)
    assert "too large" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- bad input


def run(tmp_path, capsys, data, *words):
    np.save(tmp_path / "data.npy", data)
    status = cli.main(["analyze", str(tmp_path / "data.npy"), "--out", str(tmp_path / "out"), *words])
    told = capsys.readouterr()
    return status, told.out, told.err


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.full((64, 64), np.nan), "finite"),
        (np.zeros((64, 64)), "nothing to find"),
        (np.full((64, 64), 65535, "u2"), "nothing to find"),
        (np.zeros((1, 1)), "1 x 1 px"),
        (np.zeros((0, 64)), "data.npy"),
        (np.zeros((64, 64, 3), "u1"), "colour picture"),
        (np.zeros((3, 64, 64)), "none of the 3 frames"),
    ],
    ids=["nan", "constant", "saturated", "one pixel", "empty", "colours", "blank stack"],
)
def test_what_cannot_be_analysed_ends_with_one_clear_line(tmp_path, capsys, data, words):
    status, _, err = run(tmp_path, capsys, data, "--workers", "1")
    assert status == 2 and words in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "out" / "report.html").exists()


def test_noise_has_no_columns_and_no_lattice(tmp_path, capsys):
    noise = np.random.default_rng(0).poisson(50.0, (128, 128)).astype(float)
    status, out, _ = run(tmp_path, capsys, noise)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert status == 0 and "lattice   none" in out
    assert summary["columns"] <= 2 and summary["lattices"] == [] and summary["defects"] == []


def test_single_atoms_are_no_lattice(tmp_path, capsys):
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:160, :160]
    mean = np.full((160, 160), 20.0)
    for r, c in rng.uniform(10, 150, (14, 2)):
        mean += 40 * np.exp(-((y - r) ** 2 + (x - c) ** 2) / (2 * 2.5**2))
    status, _, _ = run(tmp_path, capsys, rng.poisson(mean).astype(float), "--pixel-nm", "0.02")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert status == 0 and 10 <= summary["columns"] <= 16 and summary["lattices"] == []


def test_half_of_it_vacuum(tmp_path, capsys):
    layout, _ = crystal(side=160)
    layout = layout.take(layout.position[:, 0] < 80)
    rng = np.random.default_rng(2)
    y = np.arange(160)[:, None]
    mean = pictures.mean_image(layout, 1e4, background=0.0) + np.where(y < 80, 1.0, 0.05)
    status, _, _ = run(tmp_path, capsys, pictures.counted(mean, rng))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert status == 0 and len(summary["lattices"]) == 1
    with open(tmp_path / "out" / "columns.csv", newline="") as file:
        rows = [float(row["row"]) for row in csv.DictReader(file)]
    assert max(rows) < 86 and len(rows) >= 0.95 * np.sum(layout.position[:, 0] > 4)


def test_two_grains_are_two_lattices(tmp_path, capsys):
    one = pictures.layout("Fe[001]", (256, 256), 12.5, 0.1)
    two = pictures.layout("Fe[001]", (256, 256), 12.5, 0.1 + np.radians(30), grain=1)
    both = pictures.joined(one.take(one.position[:, 0] < 126), two.take(two.position[:, 0] > 130))
    image = pictures.counted(pictures.mean_image(both, 3e4), np.random.default_rng(0))
    status, _, _ = run(tmp_path, capsys, image, "--pixel-nm", "0.0125")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert status == 0 and len(summary["lattices"]) == 2
    turned = abs(summary["lattices"][0]["rotation_deg"] - summary["lattices"][1]["rotation_deg"]) % 90
    assert min(turned, 90 - turned) == pytest.approx(30, abs=1)


def test_a_saturated_crystal_is_analysed_and_says_so(tmp_path, capsys):
    _, image = crystal()
    status, out, _ = run(tmp_path, capsys, np.minimum(image, np.percentile(image, 97)))
    assert status == 0 and "saturated" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothere.npy", "--out", "x"], "there is no file"),
        (["--out", "x"], "name a file"),
        (["--worker", "nowhere", "--frames", "3"], "no analysis"),
        (["--worker", "nowhere", "--part", "3/2", "--frames", "3"], "--part"),
    ],
)
def test_wrong_words_end_with_how_to_mend_them(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["analyze", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [{"finder": "oracle"}, {"denoise": "magic"}, {"executor": "moon"}, {"pixel_size_nm": -1.0}, {"workers": 0}],
    ids=lambda w: next(iter(w)),
)
def test_options_that_mean_nothing_are_refused(tmp_path, words):
    with pytest.raises(InputError):
        analyze(np.ones((64, 64)), tmp_path / "out", **words)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_very_large_image(tmp_path, capsys):
    """8192 x 8192 px of one crystal, from a tile that repeats after whole cells."""
    across = 1024 / 39  # px a cell: a tile of 1024 px is 39 cells wide
    plane = pictures.PLANES["SrTiO3[001]"]
    tile = pictures.layout(plane, (1024 + 64, 1024 + 64), 390.5 / across, margin=-20)
    mean = pictures.mean_image(tile, 2e4)[32:-32, 32:-32]
    rng = np.random.default_rng(0)
    image = np.empty((8192, 8192), np.uint16)
    for top in range(0, 8192, 1024):
        for left in range(0, 8192, 1024):
            image[top : top + 1024, left : left + 1024] = rng.poisson(mean)
    status, _, err = run(tmp_path, capsys, image, "--pixel-nm", str(0.3905 / across))
    assert status == 0, err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["columns"] > 0.98 * 2 * (8 * 39) ** 2
    assert (tmp_path / "out" / "report.html").stat().st_size < 20e6


def test_where_nothing_is_found_it_is_said_what_was_looked_for():
    noise = np.random.default_rng(0).normal(0, 1, (96, 96))
    found = understand(noise, PixelSize(), Wanted())
    assert len(found.columns) == 0 and "up to 12 px (1 sigma) stands out" in found.notes[-1]
