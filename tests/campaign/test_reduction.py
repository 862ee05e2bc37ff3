import json
import os
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from recording import write_recording

from stemloop import cli
from stemloop.campaign import reduction
from stemloop.core import units
from stemloop.core.errors import InputError, UnknownName
from stemloop.core.protocols import Batch
from stemloop.reduce.detectors import Radial, disk_area, standard
from stemloop.reduce.engine import Reduction, Together, reduce
from stemloop.stream import LandingLog, Receiver, Sender
from stemloop.stream.dense import DenseBlock
from stemloop.stream.events import EventBlock

DATA = Path(os.environ.get("STEMLOOP_DATA") or Path(__file__).parents[2] / "../shared/data")
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real files: {DATA} is not there (set STEMLOOP_DATA)")
SCAN, FRAME, CENTRE, RADIUS = (12, 14), (40, 44), (19.6, 22.3), 6.5


def scan(height=6.0, seed=0):
    """A bright disk that moves a little with the position, and a faint ring around it."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 4 * np.pi, SCAN[0]), np.linspace(0, 4 * np.pi, SCAN[1]), indexing="ij")
    data = np.empty((*SCAN, *FRAME), np.uint16)
    for i in np.ndindex(*SCAN):
        centre = (CENTRE[0] + 0.5 * np.sin(y[i]), CENTRE[1] + 0.5 * np.sin(x[i]))
        data[i] = rng.poisson(height * disk_area(FRAME, centre, RADIUS) + 0.02 * disk_area(FRAME, CENTRE, 18.0))
    return data


@pytest.fixture
def file(tmp_path):
    np.save(tmp_path / "scan.npy", scan())
    return tmp_path / "scan.npy"


def test_the_command_makes_maps_a_picture_and_a_page(file, tmp_path, capsys):
    out = tmp_path / "maps"
    words = ["--semiangle-mrad", "20", "--energy-keV", "80", "--step-nm", "0.05"]
    assert cli.main(["reduce", str(file), "--out", str(out), *words]) == 0
    said = capsys.readouterr().out
    assert "report" in said and "note: the angle of a pixel follows" in said
    data, summary = np.load(file), json.loads((out / "summary.json").read_text())
    assert np.allclose(summary["disk_centre_px"], CENTRE, atol=0.2)
    assert abs(summary["disk_radius_px"] - RADIUS) < 0.25
    assert abs(summary["pixel_rad"] - 20e-3 / summary["disk_radius_px"]) < 1e-6
    with h5py.File(out / "maps.h5") as maps:
        assert np.array_equal(maps["sum_pattern"][()], data.sum((0, 1)))
        assert np.array_equal(maps["maximum_pattern"][()], data.max((0, 1)))
        assert np.array_equal(maps["counts"][()], data.sum((2, 3)))
        rows = np.arange(FRAME[0])[:, None]
        com = (data * rows).sum((2, 3)) / data.sum((2, 3)) - summary["disk_centre_px"][0]
        assert np.allclose(maps["com_y"][()], com * summary["pixel_rad"], atol=1e-3 * summary["pixel_rad"])
        assert maps["com_y"].attrs["unit"] == "rad" and maps["bf"].attrs["unit"] == "counts"
        assert maps["dpc_phase"].attrs["unit"] == "rad" and np.all(maps["dpc_phase_sigma"][()] > 0)
        # a shift of half a pixel at the steepest place: com follows the phase's gradient times lambda / 2 pi
        k = 2 * np.pi / units.wavelength_m(80e3)
        assert np.ptp(maps["dpc_phase"][()]) < k * summary["pixel_rad"] * SCAN[1] * 0.05e-9
    assert (out / "maps.png").read_bytes()[:4] == b"\x89PNG"
    page = (out / "report.html").read_text()
    assert "scan.npy" in page and "http" not in page.replace("http://www.w3.org", "")


def test_sparse_and_dense_blocks_threads_and_order_give_the_same_bits(file, monkeypatch):
    opened = reduction.open_scan(file)
    assert isinstance(opened.data, np.memmap)
    names = ("patterns", "bf", "adf", "haadf", "com", "dpc", "radial")
    monkeypatch.setattr(reduction, "BLOCK_BYTES", 60_000)
    monkeypatch.setattr(reduction, "SPARSE", 0.0)
    assert {type(block) for _, block in opened.blocks()} == {DenseBlock}
    dense = reduction.reduce_scan(opened, names)
    monkeypatch.setattr(reduction, "SPARSE", 1.0)
    assert {type(block) for _, block in opened.blocks()} == {EventBlock}
    seen = []
    sparse = reduction.reduce_scan(opened, names, threads=2, progress=lambda *said: seen.append(said))
    assert {title for title, _, _ in seen} == {"patterns", "maps"} and seen[-1][1:] == (168, 168)
    for name, found in dense.maps.items():
        assert found.tobytes() == sparse.maps[name].tobytes(), name


def test_a_live_stream_its_log_and_its_file_give_the_same_bits(file, tmp_path):
    opened = reduction.open_scan(file)
    frames = np.asarray(opened.data).reshape(-1, *FRAME)
    camera = reduction.Camera(FRAME, 1e-3, CENTRE)
    folds = [reduction.Virtual(standard(camera, 6e-3)), reduction.Patterns(), reduction.dpc.CentreOfMass(camera)]
    whole = reduce(folds, opened.blocks(), SCAN, FRAME)
    with LandingLog(tmp_path / "log", "run") as log, Receiver("tcp://127.0.0.1:*", log, "run") as receiver:
        live = Reduction(Together(tuple(folds)), SCAN, FRAME)
        with Sender(receiver.address, "run") as sender:
            for first in range(0, len(frames), 21):
                sender.send(Batch("cbed", first, frames[first : first + 21]))
            for first in range(0, len(frames), 12):
                live.take(first, EventBlock.from_dense(receiver.wait("cbed", first, 12)))
                assert np.count_nonzero(np.isfinite(live.result()["bf"])) == first + 12
        stored = reduce(folds, ((b.first, DenseBlock(b.frames)) for b in log.batches("cbed")), SCAN, FRAME)
    for name, found in whole.items():
        assert found.tobytes() == live.result()[name].tobytes() == stored[name].tobytes(), name


def test_a_file_stays_on_the_disk_and_gives_the_bits_of_the_array(file, tmp_path, monkeypatch):
    data = np.load(file)
    assert cli.main(["convert", str(file), str(tmp_path / "sealed.h5")]) == 0
    with h5py.File(tmp_path / "plain.h5", "w") as plain:  # in RosettaSciIO's own form
        group = plain.create_group("Experiments/scan")
        plain.attrs.update(file_format="HyperSpy", file_format_version="3.3")
        group.create_dataset("data", data=data, chunks=(1, 5, *FRAME))
        for k, (name, size) in enumerate(zip(("y", "x", "ky", "kx"), data.shape, strict=True)):
            axis = group.create_group(f"axis-{k}")
            axis.attrs.update(name=name, size=size, scale=1.0, offset=0.0, units="", navigate=k < 2)
            axis.attrs["_type"] = "UniformDataAxis"
        for name in ("metadata", "original_metadata", "metadata/General", "metadata/Signal"):
            group.create_group(name)
        group["metadata/Signal"].attrs["signal_type"] = ""
    (tmp_path / "plain.h5").rename(tmp_path / "plain.hspy")
    names = ("patterns", "bf", "com")
    wanted = reduction.reduce_scan(reduction.open_scan(file), names).maps
    for name in ("sealed.h5", "plain.hspy"):
        for block_bytes in (8 << 20, 5 * 2 * FRAME[0] * FRAME[1], 100_000):  # all, parts of a row, some rows
            monkeypatch.setattr(reduction, "BLOCK_BYTES", block_bytes)
            with reduction.open_scan(tmp_path / name) as opened:
                assert isinstance(opened.data, reduction.Stored) and opened.shape == SCAN
                firsts = [first for first, _ in opened.frames()]
                found = reduction.reduce_scan(opened, names).maps
            assert len(firsts) > (1 if block_bytes < 1 << 20 else 0)
            for key, map_ in wanted.items():
                assert found[key].tobytes() == map_.tobytes(), (name, key)


def test_detectors_of_the_user_and_the_phase_from_segments(file, tmp_path, capsys):
    mask = np.zeros(FRAME)
    mask[10:20, 5:9] = 0.5
    np.save(tmp_path / "mask.npy", mask)
    out = tmp_path / "maps"
    words = ["--semiangle-mrad", "20", "--energy-keV", "80", "--step-nm", "0.05", "--rotation-deg", "0"]
    mine = ["--ring", "outer:30:50", "--mask", f"corner={tmp_path / 'mask.npy'}"]
    folds = ["--fold", "dpc", "--fold", "segments", "--fold", "idpc"]
    assert cli.main(["reduce", str(file), "--out", str(out), *words, *mine, *folds]) == 0
    data, summary = np.load(file), json.loads((out / "summary.json").read_text())
    with h5py.File(out / "maps.h5") as maps:
        assert np.allclose(maps["corner"][()], (data * mask).sum((2, 3)))
        y, x = np.indices(FRAME)
        centre = summary["disk_centre_px"]
        angle = np.hypot(y - centre[0], x - centre[1]) * summary["pixel_rad"]
        edge = summary["pixel_rad"]  # the rings cut pixels in parts
        inside, near = ((angle > 0.03 + sign * edge) & (angle < 0.05 - sign * edge) for sign in (1, -1))
        assert ((data * inside).sum((2, 3)) <= maps["outer"][()]).all()
        assert ((data * near).sum((2, 3)) >= maps["outer"][()]).all()
        halves = [maps[name][()] for name in reduction.SEGMENTS]
        assert np.allclose(sum(halves), (data * (angle < 1.2 * 0.02)).sum((2, 3)), rtol=0.05)
        # the disk moves as a whole: both ways see the same phase
        both = np.corrcoef(maps["idpc_phase"][()].ravel(), maps["dpc_phase"][()].ravel())[0, 1]
        assert both > 0.95 and maps["idpc_phase"].attrs["unit"] == "rad"
    for wrong in (["--ring", "outer"], ["--mask", "m"], ["--mask", "m=nowhere.npy"], ["--ring", "bf:1:2"]):
        assert cli.main(["reduce", str(file), "--out", str(out), *words, *wrong]) == 2
    assert "cannot be called 'bf'" in capsys.readouterr().err


def test_values_that_are_no_counts_are_rounded_and_lose_their_deviations(tmp_path):
    values = scan().astype(np.float32) * 0.37 - 0.001
    np.save(tmp_path / "floats.npy", values)
    opened = reduction.open_scan(tmp_path / "floats.npy")
    found = reduction.reduce_scan(opened, ("patterns", "bf", "com"))
    assert not [name for name in found.maps if "_sigma" in name]
    assert any("below zero" in note for note in found.summary["notes"])
    assert any("not counts" in note for note in found.summary["notes"])
    positive = np.maximum(values.astype(np.float64), 0)
    # each value is rounded by at most half of the largest over 2^20
    assert np.allclose(found.maps["sum_pattern"], positive.sum((0, 1)), atol=168 * values.max() / 2**20)
    assert np.allclose(found.maps["variance_pattern"], positive.var((0, 1), ddof=1), rtol=1e-3, atol=1e-6)
    assert found.unit["bf"] == "the file's own"
    whole = tmp_path / "whole.npy"
    np.save(whole, scan().astype(np.float64))
    assert reduction.open_scan(whole).quantum == 1.0


@pytest.mark.parametrize("name", ["dpc_y", "sum_pattern", "bf", "bf_sigma", "rotation", "counts", "a/b", ".", ""])
def test_a_detector_takes_no_other_maps_name(file, name):
    with reduction.open_scan(file, pixel_rad=1e-3) as opened, pytest.raises(InputError, match="cannot be called"):
        reduction.reduce_scan(opened, rings={name: (1e-3, 4e-3)})


def test_two_detectors_of_one_name_are_refused(file, tmp_path, capsys):
    words = ["--pixel-mrad", "1", "--ring", "outer:1:4", "--ring", "outer:2:5"]
    assert cli.main(["reduce", str(file), "--out", str(tmp_path / "out"), *words]) == 2
    assert "two detectors" in capsys.readouterr().err


def test_values_that_are_not_finite_are_counted_and_said(tmp_path):
    data = scan().astype(np.float32)
    data[2, 3, :4, 5], data[1, 1, 0, 0] = np.nan, np.inf
    np.save(tmp_path / "scan.npy", data)
    with reduction.open_scan(tmp_path / "scan.npy") as opened:
        assert opened.notes == ["5 values are not finite and were taken as zero"]


def test_strain_and_single_sidebands_from_a_file(tmp_path):
    rng = np.random.default_rng(1)
    image = sum(
        20 * np.exp(-0.3 * (h * h + k * k)) * disk_area((96, 96), (47 + 17 * h, 48 + 17 * k), 4.0)
        for h in (-2, -1, 0, 1, 2)
        for k in (-2, -1, 0, 1, 2)
    )
    np.save(tmp_path / "spots.npy", rng.poisson(image + 0.2, (4, 5, 96, 96)).astype(np.uint16))
    found = reduction.reduce_scan(reduction.open_scan(tmp_path / "spots.npy"), ("strain",))
    for name in ("e_xx", "e_yy", "e_xy", "rotation"):
        z = found.maps[name] / found.maps[f"{name}_sigma"]
        assert np.abs(z).max() < 5 and found.maps[f"{name}_sigma"].max() < 2e-3
    np.save(tmp_path / "disk.npy", scan())
    known = {"semiangle_rad": 20e-3, "energy_eV": 80e3, "step_m": 5e-11}
    found = reduction.reduce_scan(reduction.open_scan(tmp_path / "disk.npy", **known), ("ssb",), rotation_rad=0.0)
    assert found.maps["ssb_phase"].shape == SCAN and found.unit["ssb_phase"] == "rad"
    with pytest.raises(InputError, match="ssb needs"):
        reduction.reduce_scan(reduction.open_scan(tmp_path / "disk.npy"), ("ssb",))


def test_what_cannot_be_reduced_is_said(file, tmp_path, capsys):
    assert cli.main(["reduce", str(file), "--out", str(tmp_path / "o"), "--fold", "nonsense"]) == 2
    assert "unknown fold 'nonsense'; known: patterns, bf" in capsys.readouterr().err
    with pytest.raises(UnknownName):
        reduction.reduce_scan(reduction.open_scan(file), ("adf2",))
    np.save(tmp_path / "image.npy", np.zeros((8, 8)))
    assert cli.main(["reduce", str(tmp_path / "image.npy"), "--out", str(tmp_path / "o")]) == 2
    assert "holds no 4D-STEM data" in capsys.readouterr().err
    spectra = write_recording(tmp_path / "spectra.hspy")
    assert cli.main(["reduce", str(spectra), "--out", str(tmp_path / "o")]) == 2
    assert "holds no 4D-STEM data" in capsys.readouterr().err
    assert cli.main(["reduce", str(tmp_path / "nowhere.npy"), "--out", str(tmp_path / "o")]) == 2
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00nonsense")
    assert cli.main(["reduce", str(tmp_path / "broken.npy"), "--out", str(tmp_path / "o")]) == 2
    (tmp_path / "taken").write_text("")
    assert cli.main(["reduce", str(file), "--out", str(tmp_path / "taken")]) == 2
    np.save(tmp_path / "empty.npy", np.zeros((2, 2, 16, 16), np.uint8))
    assert cli.main(["reduce", str(tmp_path / "empty.npy"), "--out", str(tmp_path / "o")]) == 2
    assert "no bright disk" in capsys.readouterr().err


@real
def test_a_real_merlin_recording_shows_its_hot_pixel(tmp_path):
    archive = DATA / "4dstem/rosettasciio/Merlin_navigation4x2_signalNx256_ROI.zip"
    name = "002_merlin_test_roi_sig256x128_nav4x2_hot_pixel_52x_39y"
    with zipfile.ZipFile(archive) as packed:
        for suffix in (".mib", ".hdr"):
            packed.extract(name + suffix, tmp_path)
    opened = reduction.open_scan(tmp_path / f"{name}.mib")
    assert opened.data.shape == (2, 4, 128, 256)
    maps = reduce(reduction.Patterns(), opened.blocks(), opened.shape, opened.frame)
    row, column = np.unravel_index(maps["maximum_pattern"].argmax(), opened.frame)
    # the file's name gives it from the left and, as the recorder counts rows, from the top or from the bottom
    assert column == 52 and row in (39, 128 - 1 - 39)
    frames = np.concatenate([frames for _, frames in opened.frames()])
    opened.close()
    assert np.array_equal(maps["sum_pattern"], frames.sum(0, dtype=np.int64))


@real
def test_a_real_spot_pattern_scan_is_what_numpy_says():
    raw = (DATA / "4dstem/rosettasciio/test1.blo").read_bytes()
    _, _, _, offset, _, size, _, nx, ny = struct.unpack_from("<6sHIIIHHHH", raw)
    frames = np.frombuffer(raw, np.uint8, offset=offset).reshape(ny * nx, size * size + 6)[:, 6:]
    data = frames.reshape(ny, nx, size, size)
    found = reduction.reduce_scan(
        reduction.Scan("test1.blo", data, energy_eV=200e3, pixel_rad=1e-3), ("patterns", "bf", "com", "radial")
    )
    # a broad halo lies around the direct beam (about row 74.8, column 72.5)
    assert np.hypot(*(np.array(found.summary["disk_centre_px"]) - (74.8, 72.5))) < 4
    assert np.array_equal(found.maps["counts"], data.sum((2, 3)))
    assert np.allclose(found.maps["variance_pattern"], data.reshape(6, size, size).var(0, ddof=1))
    camera = reduction.Camera((size, size), 1e-3, found.summary["disk_centre_px"])
    mask = standard(camera, found.summary["disk_radius_px"] * 1e-3)["bf"]
    assert np.allclose(found.maps["bf"], np.einsum("ijyx,yx->ij", data, mask), rtol=2e-4)
    rings = Radial(camera, 1e-3, found.maps["radial"].shape[-1]).rings
    assert np.allclose(
        found.maps["radial"] @ rings.sum((1, 2)), np.einsum("ijyx,yx->ij", data, rings.sum(0)), rtol=2e-4
    )
