import gzip
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import zipfile

import h5py
import numpy as np
import pytest

from stemloop import cli
from stemloop.core.errors import InputError, UnreadableFile
from stemloop.store import read, verify
from stemloop.store.convert import convert
from stemloop.store.lazy import Opened
from store.test_readers import DATA, endless_dm3, hostile, one_clear_message, real


def whole(path, which=0, rows=None):
    with Opened(path) as file:
        parts = list(file.blocks(which, rows))
        firsts = np.cumsum([0, *(len(part) for _, part in parts)])
        assert [first for first, _ in parts] == firsts[:-1].tolist()
        return np.concatenate([part for _, part in parts])


def blo(path, frames, start=0x1000):
    """A block file of (rows, columns, side, side) frames."""
    rows, columns, side, _ = frames.shape
    head = struct.pack(
        "<6sHIIIHHHHHddIHI", b"IMGBLO", 0x102, 0x1000, start, 0, side, 0, columns, rows, 0, 2.0, 3.0, 200000, 5000, 1500
    )
    body = b"".join(
        struct.pack("<HI", 0x55AA, k + 1) + f.tobytes() for k, f in enumerate(frames.reshape(-1, side, side))
    )
    path.write_bytes(head.ljust(start, b"\0") + body)


SCAN = np.random.default_rng(0).integers(0, 255, (3, 5, 8, 8), "u1")


# ------------------------------------------------------------------------------------------------------------ lazy


@pytest.mark.parametrize("rows", [None, 1, 2, 100])
def test_blocks_put_together_are_the_whole(tmp_path, rows):
    stack = np.random.default_rng(0).integers(0, 9, (7, 6, 5), "u2")
    np.save(tmp_path / "stack.npy", stack)
    np.testing.assert_array_equal(whole(tmp_path / "stack.npy", rows=rows), stack)


def test_a_block_file_is_read(tmp_path):
    blo(tmp_path / "scan.blo", SCAN)
    (signal,) = read(tmp_path / "scan.blo")
    np.testing.assert_array_equal(signal.data, SCAN)
    np.testing.assert_array_equal(whole(tmp_path / "scan.blo"), SCAN)
    assert [(a.name, a.unit) for a in signal.axes[:3]] == [("scan_y", "m"), ("scan_x", "m"), ("det_y", "m")]
    # 5000 hundredths of pixels a centimetre are 5000 pixels a metre
    assert [a.scale for a in signal.axes] == pytest.approx([3e-9, 2e-9, 1 / 5000, 1 / 5000], rel=1e-12)
    assert signal.metadata["beam_energy_eV"] == 2e5 and signal.metadata["camera_length_m"] == pytest.approx(0.15)
    raw = (tmp_path / "scan.blo").read_bytes()
    for name, bad in (
        ("cut", raw[:-1]),
        ("head", raw[:20]),
        ("other", b"X" + raw[1:]),
        ("moved", raw[:4096] + b"-" + raw[4096:]),
    ):
        (tmp_path / f"{name}.blo").write_bytes(bad)
        with pytest.raises(UnreadableFile, match=name):
            read(tmp_path / f"{name}.blo")


def test_a_sealed_file_is_read_lazily_and_damage_is_not_served(tmp_path):
    np.save(tmp_path / "scan.npy", np.random.default_rng(0).integers(0, 9, (40, 30, 64, 64), "u2"))
    convert(tmp_path / "scan.npy", tmp_path / "scan.h5")
    np.testing.assert_array_equal(whole(tmp_path / "scan.h5", rows=7), np.load(tmp_path / "scan.npy"))
    raw = bytearray((tmp_path / "scan.h5").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "scan.h5").write_bytes(raw)
    with pytest.raises(Exception, match="damaged"):
        whole(tmp_path / "scan.h5")


@real
@pytest.mark.parametrize("rows", [128, 64])
def test_merlin_frames_stand_as_the_detector_sent_them(tmp_path, rows):
    """Their names tell where the one hot pixel is: column 52, row 39, in each of the 4 x 2 frames."""
    zipfile.ZipFile(DATA / "4dstem/rosettasciio/Merlin_navigation4x2_signalNx256_ROI.zip").extractall(tmp_path)
    (path,) = tmp_path.glob(f"*sig256x{rows}_nav4x2_hot_pixel_52x_39y.mib")
    for data in (read(path)[0].data, whole(path)):
        frames = data.reshape(-1, rows, 256)
        assert len(frames) == 8
        assert {tuple(int(k) for k in np.unravel_index(f.argmax(), f.shape)) for f in frames} == {(39, 52)}


def test_a_tilted_beam_falls_where_it_should(tmp_path):
    """A disk moved down and right has its centre of mass at larger y and x, in every format we can write."""
    y, x = np.indices((32, 32))
    disk = (np.hypot(y - 22, x - 10) < 5).astype("u1")
    frames = np.broadcast_to(disk, (2, 3, 32, 32))
    np.save(tmp_path / "a.npy", frames)
    blo(tmp_path / "b.blo", frames)
    convert(tmp_path / "b.blo", tmp_path / "c.h5")
    for name in ("a.npy", "b.blo", "c.h5"):
        frame = whole(tmp_path / name)[0, 0].astype(float)
        assert ((frame * y).sum() / frame.sum(), (frame * x).sum() / frame.sum()) == (22, 10)


# --------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((9,), "f8"),
        ((40, 50), "f4"),
        ((7, 33, 20), ">u2"),
        ((4, 6, 17, 13), "c8"),
        ((50, 40, 16, 16), "u1"),
        ((2, 3, 4, 5, 6), "i4"),
        ((5, 7, 8, 8), "?"),
    ],
)
def test_everything_arrives(tmp_path, shape, dtype):
    data = (np.random.default_rng(0).random(shape) * 100).astype(dtype)
    np.save(tmp_path / "in.npy", data)
    told = []
    made = convert(tmp_path / "in.npy", tmp_path / "out.h5", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (data.nbytes, data.nbytes) and made["raw_bytes"] == data.nbytes
    np.testing.assert_array_equal(read(tmp_path / "out.h5")[0].data.reshape(-1), data.reshape(-1))
    verify(tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:  # without plugins
        np.testing.assert_array_equal(file["entry/data/data"][...].reshape(-1), data.reshape(-1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npy", "out.h5"]


def test_axes_keep_their_calibration(tmp_path):
    blo(tmp_path / "scan.blo", SCAN)
    convert(tmp_path / "scan.blo", tmp_path / "scan.h5")
    before, after = read(tmp_path / "scan.blo")[0], read(tmp_path / "scan.h5")[0]
    assert before.axes == after.axes
    assert after.metadata["calibration"]["metadata"]["beam_energy_eV"] == 2e5


def test_a_file_that_is_there_is_kept(tmp_path):
    np.save(tmp_path / "in.npy", np.ones((3, 4, 4)))
    (tmp_path / "out.h5").write_text("mine")
    with pytest.raises(InputError, match="there already"):
        convert(tmp_path / "in.npy", tmp_path / "out.h5")
    (tmp_path / "bad.dm3").write_text("no")
    with pytest.raises(UnreadableFile):
        convert(tmp_path / "bad.dm3", tmp_path / "out.h5", overwrite=True)
    assert (tmp_path / "out.h5").read_text() == "mine"
    convert(tmp_path / "in.npy", tmp_path / "out.h5", overwrite=True)
    assert verify(tmp_path / "out.h5")["data"]["frames"] == 3


def test_a_killed_conversion_leaves_no_half_file(tmp_path):
    np.save(tmp_path / "in.npy", np.random.default_rng(0).integers(0, 99, (300, 256, 256), "u2"))
    command = [sys.executable, "-m", "stemloop.cli", "convert", str(tmp_path / "in.npy"), str(tmp_path / "out.h5")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.h5.*.part")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not (tmp_path / "out.h5").exists()
    assert cli.main(["convert", str(tmp_path / "in.npy"), str(tmp_path / "out.h5"), "--quiet"]) == 0
    assert verify(tmp_path / "out.h5")["data"]["frames"] == 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npy", "out.h5"]


def test_memory_stays_bounded(tmp_path):
    """A file much larger than the room: 300 MB in 100 MB."""
    stack = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", "u2", (600, 512, 512))
    stack[::50] = 7
    stack.flush()
    convert(tmp_path / "big.npy", tmp_path / "big.h5", memory_MB=100)
    with Opened(tmp_path / "big.h5", memory_MB=100) as file:
        assert sum(int(part.sum()) for _, part in file.blocks()) == 12 * 7 * 512 * 512


# --------------------------------------------------------------------------------------------------------- hostile


def threats(folder):
    """Files that want to hang, eat, reach out or crash."""
    (folder / "hang.dm3").write_bytes(endless_dm3())
    for kind in ("external storage", "external link", "virtual", "bomb", "deep"):
        hostile(kind, folder / f"{kind.replace(' ', '_')}.h5")
    (folder / "passwd.xml").write_text('<root><raw_file filename="/etc/passwd"/></root>')
    (folder / "bomb.npz").write_bytes(b"")
    np.savez_compressed(folder / "bomb.npz", a=np.zeros(400_000_000, "u1"))
    head = np.lib.format.magic(1, 0) + struct.pack("<H", 118)
    said = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000, 1000)}"
    (folder / "liar.npy").write_bytes(head + said.ljust(117) + b"\n" + bytes(64))
    (folder / "side.blo").write_bytes(
        struct.pack("<6sHIIIHHHHHddIHI", b"IMGBLO", 1, 0, 9, 0, 65535, 0, 65535, 65535, 0, 1, 1, 1, 1, 1) + bytes(99)
    )


def test_hostile_files_are_refused_and_leave_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    threats(tmp_path / "in")
    for path in sorted((tmp_path / "in").iterdir()):
        begin = time.monotonic()
        with pytest.raises(UnreadableFile) as error:
            convert(path, tmp_path / "out/out.h5", memory_MB=200, stall_s=5)
        one_clear_message(error)
        with pytest.raises(UnreadableFile) as error, Opened(path, timeout_s=5, memory_MB=200) as file:
            for _ in file.blocks():
                pass
        one_clear_message(error)
        assert time.monotonic() - begin < 60
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("seed", range(3))
def test_mutated_files_are_read_or_refused(tmp_path, seed):
    """A flipped, cut or spliced block file, array or sealed file: numbers or an error of the house, nothing else."""
    blo(tmp_path / "scan.blo", SCAN)
    np.save(tmp_path / "scan.npy", SCAN)
    convert(tmp_path / "scan.npy", tmp_path / "scan.h5")
    random_ = random.Random(seed)
    for name in ("scan.blo", "scan.npy", "scan.h5"):
        raw = bytearray((tmp_path / name).read_bytes())
        for _ in range(random_.randint(1, 8)):
            raw[random_.randrange(min(len(raw), 6000))] = random_.randrange(256)
        if random_.random() < 0.4:
            del raw[random_.randrange(len(raw)) :]
        (tmp_path / f"bad-{name}").write_bytes(raw)
        try:
            for signal in read(tmp_path / f"bad-{name}", timeout_s=20, memory_MB=500):
                assert isinstance(signal.data, np.ndarray)
        except UnreadableFile as error:
            assert len(str(error)) < 600


@real
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_real_file_is_opened_or_refused_with_a_clear_error(tmp_path):
    opened = 0
    for path in sorted(path for path in DATA.rglob("*") if path.is_file()):
        begin = time.monotonic()
        try:
            with Opened(path, timeout_s=60) as file:
                for k, found in enumerate(file.found):
                    data = np.concatenate([part for _, part in file.blocks(k)])
                    assert data.shape == found.shape == tuple(axis.size for axis in found.axes)
                opened += 1
        except UnreadableFile as error:
            assert path.name in str(error) and len(str(error)) < 600 and str(error).count("\n") == 0
        assert time.monotonic() - begin < 90
    assert opened > 110


def test_a_compressed_name_is_no_trick(tmp_path):
    with gzip.open(tmp_path / "a.npy.gz", "wb") as file:
        file.write(b"1")
    shutil.copy(tmp_path / "a.npy.gz", tmp_path / "a.npy")
    for name in ("a.npy", "a.npy.gz"):
        with pytest.raises(UnreadableFile, match=r"a\.npy"):
            Opened(tmp_path / name)
