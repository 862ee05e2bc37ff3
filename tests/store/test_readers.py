import os
import pickle
import struct
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from stemloop.core.errors import UnreadableFile
from stemloop.store import guard, read, sandbox

DATA = Path(os.environ.get("STEMLOOP_DATA") or Path(__file__).parents[2] / "../shared/data")
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real files: {DATA} is not there (set STEMLOOP_DATA)")


def slow(*values):
    """A case that only the long run of the tests takes."""
    return pytest.param(*values, marks=pytest.mark.slow)


def endless_dm3():
    """53 bytes: an array of 2^31 - 1 structures without fields, which a plain parser walks through one by one."""
    head = struct.pack(">iii", 3, 37, 1) + bytes([1, 0]) + struct.pack(">i", 1)
    return head + b"\x15\x00\x04Data%%%%" + struct.pack(">iiiiii", 5, 20, 15, 0, 0, 2**31 - 1)


# ------------------------------------------------------------------------------------------------------ real files


@real
def test_a_real_eels_spectrum_image():
    (signal,) = read(DATA / "eels/SciFiReaders/DMReader_SpectrumImage_SI-EELS.dm3")
    assert signal.data.shape == (49, 6, 1024) and [a.name for a in signal.axes] == ["y", "x", "energy_loss"]
    energy = signal.axis("energy_loss")
    assert (energy.unit, energy.scale) == ("eV", 0.5)
    assert energy.values[[0, -1]].tolist() == [350.0, 861.5]
    assert signal.axis("y").unit == "px" and signal.metadata["uncalibrated"] == ["y", "x"]
    assert (signal.metadata["signal_type"], signal.metadata["reader"]) == ("EELS", "DigitalMicrograph")
    # oxygen's K edge (532 eV) stands above the background before it
    mean = signal.data.mean((0, 1))
    values = energy.values
    before = (values > 515) & (values < 525)
    slope = np.polyfit(np.log(values[before]), np.log(mean[before]), 1)
    peak = (values > 535) & (values < 545)
    assert mean[peak].mean() > 1.05 * np.exp(np.polyval(slope, np.log(values[peak]))).mean()


@real
@pytest.mark.parametrize(
    ("name", "shape", "axes", "unit", "scale"),
    [
        ("haadf/TEMUL/Cropped_PTO-SRO_Aligned.hspy", (224, 1312), ("y", "x"), "m", 1.5e-11),
        slow("haadf/openNCEM/Acquisition_18.emd", (1024, 1024), ("y", "x"), "m", 1.225e-11),
        slow("formats/SciFiReaders/fei_emd_image.emd", (512, 512), ("y", "x"), "m", 5.302e-9),
        slow("formats/openNCEM/temp.mrc", (3, 128, 128), ("frame", "y", "x"), "m", 2e-10),
        ("eels/rosettasciio/EELS_SI.dm4", (2, 2, 2048), ("y", "x", "energy_loss"), "eV", 1.0),
        (
            "4dstem/rosettasciio/py4DSTEM_size2x3x4x5.h5",
            (3, 2, 5, 4),
            ("scan_y", "scan_x", "det_y", "det_x"),
            "1/m",
            4.425e8,
        ),
    ],
)
def test_real_files_of_many_kinds(name, shape, axes, unit, scale):
    signal = read(DATA / name)[0]
    assert signal.data.shape == shape and tuple(a.name for a in signal.axes) == axes
    assert signal.axes[-1].unit == unit and signal.axes[-1].scale == pytest.approx(scale, rel=1e-3)
    assert np.isfinite(signal.data).all() and signal.data.std() > 0 and signal.metadata["file"] == Path(name).name


@real
def test_a_real_tiff():
    pytest.importorskip("tifffile")
    (signal,) = read(DATA / "haadf/AtomDetection_ACSTEM/021_HAADF_15nm_Sample_PtNC_21Oct20.tif")
    assert signal.data.shape == (512, 512) and signal.axis("x").scale == pytest.approx(2.93e-11, rel=1e-2)


@real
def test_a_real_broken_file_says_what_it_is():
    with pytest.raises(UnreadableFile, match=r"spectrum.dm3 could not be read .*DigitalMicrograph"):
        read(DATA / "formats/pyTEMlib/spectrum.dm3")


@real
@pytest.mark.parametrize("share", [0.5, slow(0.98), slow(0.01)])
def test_a_truncated_dm3_is_unreadable(tmp_path, share):
    whole = (DATA / "eels/SciFiReaders/DMReader_SpectrumImage_SI-EELS.dm3").read_bytes()
    (tmp_path / "cut.dm3").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UnreadableFile, match=r"cut\.dm3"):
        read(tmp_path / "cut.dm3", timeout_s=20)


# ------------------------------------------------------------------------------------------- everything that fails


def one_clear_message(error):
    text = str(error.value)
    assert text.count("\n") <= 1 and len(text) < 400
    return text


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.dm3")
    (tmp_path / "empty.dm3").touch()
    for path, why in (
        (tmp_path / "none.dm3", "there is no file"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe.dm3", "no regular file"),
        (tmp_path / "empty.dm3", "is empty"),
    ):
        with pytest.raises(UnreadableFile, match=why) as error:
            read(path)
        one_clear_message(error)


@pytest.mark.parametrize(
    "name", ["text.dm3", "text.xyz", "text.npy", slow("text.emd"), slow("text.mrc"), slow("text"), slow("text.npz")]
)
def test_text_under_another_name(tmp_path, name):
    (tmp_path / name).write_text("Dear reader,\nthis is a letter.\n" * 20)
    with pytest.raises(UnreadableFile, match=name.replace(".", r"\.")) as error:
        read(tmp_path / name)
    one_clear_message(error)


def test_a_reader_that_hangs_is_stopped(tmp_path):
    (tmp_path / "hang.dm3").write_bytes(endless_dm3())
    begin = time.monotonic()
    with pytest.raises(UnreadableFile, match=r"not read in 6 s|more than .* MB") as error:
        read(tmp_path / "hang.dm3", timeout_s=6)
    assert time.monotonic() - begin < 12
    one_clear_message(error)


def test_a_reader_that_wants_too_much_memory_is_stopped(tmp_path):
    with h5py.File(tmp_path / "big.emd", "w") as file:
        group = file.create_group("entry")
        group.attrs["emd_group_type"] = 1
        group.create_dataset("data", (600, 300, 300), "f4", chunks=(400, 300, 300))  # 216 MB of fill value
    with pytest.raises(UnreadableFile, match="more than 120 MB"):
        read(tmp_path / "big.emd", memory_MB=120)


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGKILL"])
def test_a_reader_that_crashes_is_reported(tmp_path, how):
    with sandbox.scratch() as folder, pytest.raises(sandbox.ChildDied, match=f"{how}|exit status"):
        number = {"SIGSEGV": 11, "SIGKILL": 9}[how]
        (tmp_path / "crash.py").write_text(f"import os\ndef now(folder): os.kill(os.getpid(), {number})\n")
        sys.path.append(str(tmp_path))
        try:
            sandbox.call("crash:now", {}, folder, timeout_s=10, memory_MB=500)
        finally:
            sys.path.remove(str(tmp_path))


def test_arrays_are_read_and_pickles_are_not(tmp_path):
    stack = np.random.default_rng(0).random((3, 5, 4)).astype(">f4")
    np.save(tmp_path / "stack.npy", stack)
    np.savez(tmp_path / "two.npz", a=stack[0], b=stack[0, 0])
    (signal,) = read(tmp_path / "stack.npy")
    np.testing.assert_array_equal(signal.data, stack)
    assert [a.name for a in signal.axes] == ["frame", "y", "x"] and {a.unit for a in signal.axes} == {"px"}
    assert {s.metadata["title"]: s.data.shape for s in read(tmp_path / "two.npz")} == {"a": (5, 4), "b": (4,)}

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "trap.npy").write_bytes(pickle.dumps(Trap()))
    np.save(tmp_path / "objects.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    for name in ("trap.npy", "objects.npy"):
        with pytest.raises(UnreadableFile, match=name):
            read(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_an_empad_header_cannot_name_a_file_elsewhere(tmp_path):
    header = "<root><raw_file filename={!r}/><pix_x>1</pix_x><pix_y>1</pix_y></root>"
    for raw in ("/etc/passwd", "../secret.raw", "a&#47;b"):
        (tmp_path / "scan.xml").write_text(header.format(raw))
        with pytest.raises(UnreadableFile, match="to be safe"):
            read(tmp_path / "scan.xml")
    (tmp_path / "scan.xml").write_text('<!DOCTYPE x [<!ENTITY a "b">]><root/>')
    with pytest.raises(UnreadableFile, match="entities"):
        read(tmp_path / "scan.xml")


# ---------------------------------------------------------------------------------------------------------- guard


def hostile(kind, path):
    with h5py.File(path, "w") as file:
        if kind == "external storage":
            file.create_dataset("data", (10,), "u1", external=[("/etc/passwd", 0, 10)])
        elif kind == "external link":
            file["data"] = h5py.ExternalLink("/etc/passwd", "/")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((10,), "u1")
            layout[:] = h5py.VirtualSource("/tmp/other.h5", "data", (10,))
            file.create_virtual_dataset("data", layout)
        elif kind == "bomb":
            file.create_dataset("data", (1 << 20, 1 << 20), "f8", chunks=(1024, 1024))
        elif kind == "deep":
            group = file
            for _ in range(80):
                group = group.create_group("g")
        elif kind == "hidden deep in a group":
            file["a/b/c"] = h5py.ExternalLink("other.h5", "/")


@pytest.mark.parametrize(
    "kind", ["external storage", "external link", "virtual", "bomb", "deep", "hidden deep in a group"]
)
def test_hostile_hdf5_is_refused(tmp_path, kind):
    hostile(kind, tmp_path / "evil.h5")
    with pytest.raises(UnreadableFile, match=r"evil\.h5 was not read, to be safe"):
        guard.check(str(tmp_path / "evil.h5"))


def test_hostile_hdf5_is_refused_by_the_reader_under_any_name(tmp_path):
    for name in ("evil.emd", "evil.nxs"):
        hostile("external storage", tmp_path / name)
        with pytest.raises(UnreadableFile, match="another file"):
            read(tmp_path / name)


def test_a_harmless_file_with_a_circle_of_links_passes(tmp_path):
    with h5py.File(tmp_path / "fine.h5", "w") as file:
        file.create_group("a")["back"] = file["/"]
        file["a/data"] = np.zeros(5)
        file["soft"] = h5py.SoftLink("/a/data")
    guard.check(str(tmp_path / "fine.h5"))
