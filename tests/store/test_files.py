import errno
import json
import os
import random
import subprocess

import google_crc32c
import h5py
import numpy as np
import pytest

from stemloop.core.errors import InputError, IntegrityError, StorageError, UnreadableFile
from stemloop.core.protocols import Batch
from stemloop.core.signal import Axis
from stemloop.store import files, read, read_sealed, seal, verify

RUN = {"id": "r-1", "title": "a run", "sample": {"is_simulation": True, "atom_types": "Mo, S"}}
CALIBRATIONS = {
    "cbed": {"pixel_rad": 1e-3, "centre_px": (16.0, 20.0)},
    "HAADF": {"pixel_m": 2e-11},
    "eels": {"energy_loss": (100.0, 0.5, 64), "semiangle_rad": 0.03},
}
POSITIONS = {"cbed": np.random.default_rng(1).uniform(0, 1e-8, (60, 2))}


def recorded():
    """Frames as a landing log would give them: a lost batch (16 to 23), a late one, a repeated one, two shapes."""
    rng = np.random.default_rng(0)
    cbed = rng.poisson(2.0, (64, 32, 40)).astype(np.uint16)
    cbed[3] = 0  # an empty frame is not a missing one
    for first in (0, 8, 32, 24, 40, 8, 48, 56):
        yield Batch("cbed", first, cbed[first : first + 8], {"electrons": 200.0})
    yield Batch("HAADF", 0, rng.random((1, 20, 30)).astype(np.float32))
    yield Batch("HAADF", 1, rng.random((1, 10, 30)).astype(np.float32))
    yield Batch("eels", 0, rng.random((5, 64)))
    yield Batch("current", 0, np.arange(4.0))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    path = tmp_path_factory.mktemp("sealed") / "run.h5"
    return path, seal(recorded(), path, run=RUN, calibrations=CALIBRATIONS, positions=POSITIONS)


def test_what_was_sealed_comes_back(sealed):
    path, record = sealed
    signals = {s.metadata["title"]: s for s in read_sealed(path)}
    assert set(signals) == {"cbed", "HAADF", "2_HAADF", "eels", "current"}
    for batch in recorded():
        for number, frame in enumerate(batch.frames, batch.first):
            found = [
                s.data[s.metadata["sequence"] == number][0]
                for s in signals.values()
                if s.metadata["stream"] == batch.stream and number in s.metadata["sequence"]
            ]
            assert len(found) == 1 and found[0].dtype == frame.dtype
            np.testing.assert_array_equal(found[0], frame)
    cbed = signals["cbed"]
    assert cbed.metadata["missing"] == [[16, 24]] and np.all(np.diff(cbed.metadata["sequence"]) > 0)
    assert cbed.metadata["run"] == RUN
    assert cbed.axes[1:] == (Axis("det_y", 32, 1e-3, -0.016, "rad"), Axis("det_x", 40, 1e-3, -0.020, "rad"))
    assert signals["eels"].axis("energy_loss") == Axis("energy_loss", 64, 0.5, 100.0, "eV")
    assert signals["HAADF"].axis("x").unit == "m"
    known = cbed.metadata["sequence"] < 60
    np.testing.assert_array_equal(
        cbed.metadata["position_m"][known], POSITIONS["cbed"][cbed.metadata["sequence"][known]]
    )
    assert np.isnan(cbed.metadata["position_m"][~known]).all() and (~known).sum() == 4
    assert record["streams"]["cbed"]["frames"] == 56 and record["bytes"] == path.stat().st_size
    assert verify(path) == record["streams"]


def test_the_generic_reader_knows_sealed_files(sealed):
    signals = {s.metadata["title"]: s for s in read(sealed[0])}
    direct = {s.metadata["title"]: s for s in read_sealed(sealed[0])}
    assert set(signals) == set(direct)
    np.testing.assert_array_equal(signals["cbed"].data, direct["cbed"].data)
    assert signals["cbed"].axes == direct["cbed"].axes


def test_it_opens_without_plugins_and_has_one_copy_of_the_bytes(sealed):
    with h5py.File(sealed[0]) as file:
        data = file["entry/cbed/data"]
        assert (data.compression, data.shuffle) == ("gzip", True)
        assert file["ncem/cbed/data"] == data and file["ncem/cbed/dim2"] == file["entry/cbed/det_y"]
        assert file["entry"].attrs["NX_class"] == "NXentry" and file["entry/definition"][()] == b"NXem"
        assert json.loads(file["entry/run"][()]) == RUN
        shelf = file["entry/frames/cbed"]
        row = 5
        assert google_crc32c.value(data[row].tobytes()) == shelf["crc32c"][row]


@pytest.mark.parametrize("dialect", ["nexus", "emd"])
def test_rosettasciio_opens_each_dialect_with_the_same_numbers(sealed, dialect):
    from rsciio import emd, nexus

    path = str(sealed[0])
    entries = nexus.file_reader(path, nxdata_only=True) if dialect == "nexus" else emd.file_reader(path)
    entries = {entry["metadata"]["General"]["title"]: entry for entry in entries}
    assert set(entries) == {"cbed", "HAADF", "2_HAADF", "eels", "current"}
    with h5py.File(path) as file:
        for name, entry in entries.items():
            np.testing.assert_array_equal(entry["data"], file["entry"][name]["data"][:])
    axes = {axis["name"]: axis for axis in entries["cbed"]["axes"]}
    assert axes["det_y"]["scale"] == pytest.approx(1e-3) and axes["det_y"]["offset"] == pytest.approx(-0.016)
    assert axes["det_y"]["units"] == "rad"


def test_ncempy_opens_it(sealed):
    emd = pytest.importorskip("ncempy.io.emd")
    found = emd.emdReader(str(sealed[0]))
    assert found["data"].size


def contents(path):
    signals = read_sealed(path)
    return [(s.metadata["title"], s.axes, s.data.tobytes(), repr(s.metadata)) for s in signals]


def test_a_changed_byte_is_found_or_changes_nothing(sealed, tmp_path):
    """HDF5 has bytes that mean nothing (padding, free space); wherever a byte means something, its change is found."""
    whole, before = sealed[0].read_bytes(), contents(sealed[0])
    rng = random.Random(0)
    found = 0
    broken = tmp_path / "broken.h5"
    for _ in range(40):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        broken.write_bytes(changed)
        try:
            files.check(str(broken))
        except (IntegrityError, UnreadableFile):
            found += 1
        else:
            assert contents(broken) == before
    assert found > 20


def test_a_changed_frame_is_named(sealed, tmp_path):
    copy = tmp_path / "copy.h5"
    copy.write_bytes(sealed[0].read_bytes())
    with h5py.File(copy, "r+") as file:
        file["entry/cbed/data"][9, 3, 3] += 1
    with pytest.raises(IntegrityError, match="cbed, frame 9 is not what was recorded"):
        verify(copy)
    copy.write_bytes(sealed[0].read_bytes())
    with h5py.File(copy, "r+") as file:
        file["entry/frames/cbed/position"][0, 0] = 1.0
    with pytest.raises(IntegrityError, match="positions, axes or metadata"):
        verify(copy)
    with pytest.raises(UnreadableFile, match="could not be read"):
        read(copy)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_found(sealed, tmp_path, share):
    whole = sealed[0].read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises((IntegrityError, UnreadableFile)):
        verify(tmp_path / "cut.h5")


def test_nothing_is_overwritten_or_left_behind(tmp_path):
    one = [Batch("s", 0, np.ones((2, 3, 3)))]
    seal(one, tmp_path / "run.h5", run={})
    with pytest.raises(InputError, match="there already"):
        seal(one, tmp_path / "run.h5", run={})
    seal(one, tmp_path / "run.h5", run={}, overwrite=True)

    def damaged():
        yield one[0]
        raise IntegrityError("the record at offset 4711 is damaged")

    with pytest.raises(IntegrityError, match="4711"):
        seal(damaged(), tmp_path / "other.h5", run={})
    with pytest.raises(InputError, match="no frames"):
        seal([], tmp_path / "other.h5", run={})
    with pytest.raises(InputError, match="letters, digits"):
        seal([Batch("../x", 0, np.ones((1, 2)))], tmp_path / "other.h5", run={})
    with pytest.raises(InputError, match="3 axes"):
        bad = {"s": {"axes": [Axis("a", 1), Axis("b", 1), Axis("c", 1)]}}
        seal(one, tmp_path / "other.h5", run={}, calibrations=bad)
    assert sorted(os.listdir(tmp_path)) == ["run.h5"]


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="no folder"):
        seal(recorded(), tmp_path / "nowhere" / "run.h5", run={})

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files.Path, "touch", refuse)
    with pytest.raises(StorageError, match="Read-only file system"):
        seal(recorded(), tmp_path / "run.h5", run={})


def test_a_full_disk_is_a_storage_error_and_this_process_lives(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    try:
        noise = np.random.default_rng(0).integers(0, 65535, (40, 200, 200), np.uint16)
        with pytest.raises(StorageError, match="MB are free"):
            seal([Batch("s", 0, noise)], folder / "run.h5", run={})
        assert os.listdir(folder) == []
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
