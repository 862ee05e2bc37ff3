import errno
import json
import os
import random
import subprocess

import google_crc32c
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemloop.core.errors import InputError, IntegrityError, StorageError, UnreadableFile
from stemloop.core.protocols import Batch, Encoded
from stemloop.core.signal import Axis
from stemloop.store import files, pipelines, read, read_sealed, seal, sealing, verify
from stemloop.store.sealed import Sealed

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
        for k, crc in enumerate(file["entry/frames/cbed/chunk_crc32c"][:]):
            chunk = data.id.read_direct_chunk((k * data.chunks[0], 0, 0))[1]
            assert google_crc32c.value(chunk) == crc


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


def contents(path, run=True):
    kept = [{k: v for k, v in s.metadata.items() if run or k != "run"} for s in read_sealed(path)]
    return [(s.axes, s.data.tobytes(), repr(meta)) for s, meta in zip(read_sealed(path), kept, strict=True)]


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


def damaged(path, copy, offset, byte=0x10):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= byte
    copy.write_bytes(raw)
    return copy


def test_a_damaged_chunk_is_named_and_its_neighbours_are_served(tmp_path):
    """Chunks of 8 frames; the third is damaged. Everything else is served, and is right."""
    frames = np.random.default_rng(3).poisson(2.0, (64, 16, 16)).astype(np.uint16)
    blocks = [deflated("cbed", k, frames[k : k + 8]) for k in range(0, 64, 8)]
    seal(blocks, tmp_path / "run.h5", run=RUN)
    with Sealed(tmp_path / "run.h5") as file:
        chunk = file.set("cbed").chunks[2]
    offset = int(chunk["offset"]) + 11
    bad = damaged(tmp_path / "run.h5", tmp_path / "bad.h5", offset)
    with pytest.raises(IntegrityError, match=f"bytes {chunk['offset']} to .*cbed, frames 16 to 23 are damaged"):
        verify(bad)
    with Sealed(bad) as file:
        np.testing.assert_array_equal(file.frames("cbed", 0, 16), frames[:16])
        np.testing.assert_array_equal(file.frames("cbed", 24, 40), frames[24:])
        with pytest.raises(IntegrityError, match=r"frames 16 to 23 .* not served"):
            file.frames("cbed", 15, 2)
        assert sum(len(b.frames) for b in file.batches("cbed", skip_corrupt=True)) == 56
    made = files.repair(bad, tmp_path / "good.h5")
    assert made["lost"] == {"cbed": [(16, 24)]}
    assert verify(tmp_path / "good.h5")["cbed"]["missing"] == [[16, 24]]
    with h5py.File(tmp_path / "good.h5") as file:
        assert file["entry/frames/cbed"].attrs["declared_lost"].tolist() == [[16, 24]]
    with Sealed(tmp_path / "good.h5") as file:
        np.testing.assert_array_equal(file.frames("cbed", 24, 40), frames[24:])
        with pytest.raises(InputError, match="no frames"):
            file.frames("cbed", 20, 1)


def test_frames_are_served_without_hdf5s_own_tables(sealed, tmp_path):
    """A file that lost its beginning, or that another program wrote into, still gives its frames."""
    bad = tmp_path / "bad.h5"
    bad.write_bytes(bytes(600) + sealed[0].read_bytes()[600:])
    with pytest.raises(IntegrityError, match=r"bytes 0 to .*HDF5's own tables"):
        verify(bad)
    with pytest.raises(OSError):
        h5py.File(bad)
    before = {s.metadata["title"]: s for s in read_sealed(sealed[0])}
    for signal in read_sealed(bad, checked=False):
        np.testing.assert_array_equal(signal.data, before[signal.metadata["title"]].data)
    files.repair(bad, tmp_path / "good.h5")
    assert contents(tmp_path / "good.h5", run=False) == contents(sealed[0], run=False)
    bad.write_bytes(sealed[0].read_bytes())
    with h5py.File(bad, "r+") as file:
        file["entry/frames/cbed/position"][0, 0] = 1.0
    with pytest.raises(IntegrityError, match="positions, metadata"):
        verify(bad)
    with pytest.raises(UnreadableFile, match="could not be read"):
        read(bad)


def test_blocks_are_copied_and_not_packed_again(tmp_path, monkeypatch):
    """Whole blocks that lie at the boundaries of chunks: the very bytes are in the file, also after a lost one."""
    frames = np.random.default_rng(3).poisson(0.1, (70, 16, 16)).astype(np.uint16)
    blocks = [deflated("cbed", k, frames[k : k + 16]) for k in (16, 0, 48)]
    known = sealing.Known(run=RUN)
    monkeypatch.setattr(sealing.pipelines, "pack", None)  # would fail if it were called
    sealing.write(str(tmp_path / "run.h5"), Blocks(blocks), known)
    raw = (tmp_path / "run.h5").read_bytes()
    assert all(block.payload in raw for block in blocks)
    (signal,) = read_sealed(tmp_path / "run.h5")
    np.testing.assert_array_equal(signal.data, frames[[*range(32), *range(48, 64)]])
    assert signal.metadata["missing"] == [[32, 48]]
    with h5py.File(tmp_path / "run.h5") as file:
        np.testing.assert_array_equal(file["entry/cbed/data"][:], signal.data)


class Blocks:
    """Blocks in memory, as sealing wants them."""

    def __init__(self, blocks):
        self._blocks = blocks

    def heads(self):
        return ((block, len(block.payload)) for block in self._blocks)

    def blocks(self):
        return iter(self._blocks)


def deflated(stream, first, frames, codec="hdf5-deflate"):
    payload = pipelines.pack(frames, len(frames), codec)
    return Encoded(stream, first, len(frames), frames.shape[1:], frames.dtype.str, codec, payload)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_overlap_and_size_of_blocks_gives_the_same_frames(data, tmp_path_factory):
    """Law: what is read is, number by number, the first copy of what was given, whatever the blocks."""
    truth = np.random.default_rng(5).integers(0, 9, (40, 4, 6)).astype(np.uint16)
    spans = st.tuples(st.integers(0, 38), st.integers(1, 12)).map(lambda s: (s[0], min(40, s[0] + s[1])))
    codecs = st.sampled_from(["raw", "hdf5-deflate"])
    drawn = data.draw(st.lists(st.tuples(spans, codecs), min_size=1, max_size=9))
    scan = data.draw(st.sampled_from([None, (4, 10), (10, 4), (5, 8)]))
    calibrations = {"s": {"scan": {"shape": scan}}} if scan else {}
    expected, blocks = {}, []
    for copy, ((first, stop), codec) in enumerate(drawn):
        frames = truth[first:stop] + np.uint16(100 * copy)  # copies can be told apart
        blocks.append(deflated("s", first, frames, codec))
        for k in range(first, stop):
            expected.setdefault(k, frames[k - first])
    path = tmp_path_factory.mktemp("seal") / "s.h5"
    sealing.write(str(path), Blocks(blocks), sealing.Known(calibrations=calibrations))
    with Sealed(path) as file:
        assert not file.flaws()
        found = {b.first + k: f for b in file.batches("s") for k, f in enumerate(b.frames)}
        assert sorted(found) == sorted(expected)
        for number, frame in expected.items():
            np.testing.assert_array_equal(found[number], frame)
            np.testing.assert_array_equal(file.frames("s", number, 1)[0], frame)
    with h5py.File(path) as file:
        rows = file["entry/s/data"][:].reshape(-1, 4, 6)
        sequence = file["entry/frames/s/sequence"][:]
        for row, number in zip(rows, sequence, strict=True):
            np.testing.assert_array_equal(row, expected.get(number, np.zeros((4, 6))))


def test_a_scan_is_four_dimensional(tmp_path):
    frames = np.arange(6 * 8 * 4 * 5, dtype=np.uint16).reshape(48, 4, 5)
    axes = [Axis("y", 6, 1e-10, 0.0, "m"), Axis("x", 8, 2e-10, 1e-9, "m")]
    calibrations = {"cbed": {"pixel_rad": 1e-3, "scan": {"shape": (6, 8), "axes": axes}}}
    blocks = [deflated("cbed", k, frames[k : k + 16]) for k in range(0, 48, 16)]
    seal(blocks, tmp_path / "run.h5", run=RUN, calibrations=calibrations)
    (signal,) = read_sealed(tmp_path / "run.h5")
    np.testing.assert_array_equal(signal.data, frames.reshape(6, 8, 4, 5))
    assert signal.axes[:2] == tuple(axes) and signal.axes[2].unit == "rad"


@pytest.mark.parametrize("codec", ["hdf5-bitshuffle-lz4", "hdf5-bitshuffle-zstd"])
def test_the_working_profile_keeps_what_was_landed(tmp_path, codec):
    pytest.importorskip("hdf5plugin")
    frames = np.random.default_rng(3).poisson(0.1, (50, 16, 16)).astype(np.uint16)
    blocks = [deflated("cbed", k, frames[k : k + 16], codec) for k in (0, 16, 32)]
    blocks.append(deflated("cbed", 48, frames[48:], codec))
    for profile in files.PROFILES:
        seal(blocks, tmp_path / f"{profile}.h5", run=RUN, profile=profile)
        np.testing.assert_array_equal(read_sealed(tmp_path / f"{profile}.h5")[0].data, frames)
        with h5py.File(tmp_path / f"{profile}.h5") as file:
            np.testing.assert_array_equal(file["entry/cbed/data"][:], frames)
            assert (file["entry/cbed/data"].compression == "gzip") is (profile == "portable")
    assert all(block.payload in (tmp_path / "working.h5").read_bytes() for block in blocks[:3])
    with pytest.raises(InputError, match="no profile"):
        seal(blocks, tmp_path / "x.h5", run=RUN, profile="small")


def test_blocks_of_an_unknown_codec_are_kept_as_they_are(tmp_path):
    """A codec of the edge: the working file holds its bytes, and whoever has the decoder reads them."""
    truth = np.arange(40 * 6, dtype=np.uint16).reshape(40, 2, 3)

    def decode(block):
        return np.frombuffer(block.payload[::-1], block.dtype).reshape(block.n, *block.shape)

    blocks = [
        Encoded("s", first, n, (2, 3), "<u2", "backwards", truth[first : first + n].tobytes()[::-1])
        for first, n in ((10, 10), (0, 12), (25, 15))
    ]
    seal(blocks, tmp_path / "run.h5", run=RUN, profile="working")
    assert all(block.payload in (tmp_path / "run.h5").read_bytes() for block in blocks)
    (signal,) = read_sealed(tmp_path / "run.h5", decode=decode)
    np.testing.assert_array_equal(signal.data, truth[[*range(20), *range(25, 40)]])
    with pytest.raises(InputError, match="decoder"):
        read_sealed(tmp_path / "run.h5")
    with pytest.raises(InputError, match="'backwards'; give its decoder"):
        seal(blocks, tmp_path / "portable.h5", run=RUN)
    sealing.write(str(tmp_path / "portable.h5"), Blocks(blocks), sealing.Known(), decode)
    np.testing.assert_array_equal(read_sealed(tmp_path / "portable.h5")[0].data, signal.data)


def test_state_and_sensors_are_nexus_logs(tmp_path):
    logs = {"stage_x": {"time": [0.0, 1.5], "value": [1e-9, 2e-9], "unit": "m", "start": "2026-01-01T00:00:00Z"}}
    seal([Batch("s", 0, np.ones((2, 3, 3)))], tmp_path / "run.h5", run={}, logs=logs)
    with h5py.File(tmp_path / "run.h5") as file:
        group = file["entry/instrument/stage_x"]
        assert group.attrs["NX_class"] == "NXlog" and file["entry/instrument"].attrs["NX_class"] == "NXinstrument"
        assert group["value"][:].tolist() == [1e-9, 2e-9] and group["value"].attrs["units"] == "m"
        assert group["time"].attrs["start"] == "2026-01-01T00:00:00Z"
    with pytest.raises(InputError, match="one value a time"):
        seal([Batch("s", 0, np.ones((2, 3)))], tmp_path / "x.h5", run={}, logs={"x": {"time": [0], "value": [1, 2]}})


def harm(whole, rng):
    """``whole`` after a flipped bit, or a torn write: a sector that is empty, or that holds another's bytes."""
    changed = bytearray(whole)
    kind = rng.randrange(3)
    if kind == 0:
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        return changed
    begin = rng.randrange(len(whole)) // 512 * 512
    other = rng.randrange(len(whole)) // 512 * 512
    sector = bytes(512) if kind == 1 else whole[other : other + 512].ljust(512, b"\0")
    changed[begin : begin + 512] = sector
    return changed[: len(whole)]


def assault(path, times, seed):
    """No damage makes a wrong frame come out; a damaged chunk takes no other with it; verify names the place."""
    whole = path.read_bytes()
    with Sealed(path) as file:
        expected = {
            name: {b.first + k: f for b in file.batches(name) for k, f in enumerate(b.frames)} for name in file.names
        }
        chunks = {
            name: [(int(c["offset"]), int(c["offset"] + c["size"])) for c in file.set(name).chunks]
            for name in file.names
        }
        side = {name: file.set(name).side for name in file.names}
    rng = random.Random(seed)
    broken = path.with_name("assault.h5")
    named = 0
    for _ in range(times):
        changed = harm(whole, rng)
        if changed == whole:
            continue
        broken.write_bytes(changed)
        places = (
            [k for k, (a, b) in enumerate(zip(whole, changed, strict=False)) if a != b] if rng.random() < 0.05 else None
        )
        with Sealed(broken) as file:
            flaws = file.flaws()
            for name, frames in expected.items():
                served = {b.first + k: f for b in file.batches(name, skip_corrupt=True) for k, f in enumerate(b.frames)}
                for number, frame in served.items():
                    assert np.array_equal(frame, frames[number])
                hurt = sum(1 for begin, stop in chunks[name] if changed[begin:stop] != whole[begin:stop])
                assert len(served) >= len(frames) - hurt * side[name]
                assert sum(f.frames is not None and f.frames[0] == name for f in flaws) == hurt
        named += bool(flaws)
        if places and flaws:
            assert any(f.offset <= place < f.offset + f.size for place in places for f in flaws)
    return named


def small_sealed(folder):
    frames = np.random.default_rng(9).poisson(1.0, (24, 8, 8)).astype(np.uint16)
    blocks = [deflated("cbed", k, frames[k : k + 4]) for k in range(0, 24, 4)]
    blocks.append(Batch("image", 0, np.random.default_rng(9).random((1, 16, 16))))
    seal(blocks, folder / "run.h5", run=RUN, calibrations=CALIBRATIONS)
    return folder / "run.h5"


def test_no_damage_makes_a_wrong_frame(tmp_path):
    assert assault(small_sealed(tmp_path), 300, 0) > 30


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_damage_makes_a_wrong_frame_a_hundred_thousand_times(tmp_path):
    assert assault(small_sealed(tmp_path), 100_000, 1) > 10_000


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


def test_a_packer_that_is_wrong_seals_nothing(tmp_path):
    from stemloop.campaign import keeping
    from stemloop.core.chunk import deflate
    from stemloop.stream import LandingLog, cut
    from stemloop.stream.dense import DenseBlock

    frames = np.random.default_rng(0).poisson(0.01, (64, 128, 128)).astype("<u2")
    with LandingLog(tmp_path / "frames.log", "run") as log:
        log.append_many([cut.encoded(DenseBlock(frames), "4d", 0, "gaps")])
    known = files.known({"id": "run"}, None, None, None, profile="portable")
    with LandingLog(tmp_path / "frames.log", readonly=True) as log:
        made = sealing.write(str(tmp_path / "good.h5"), log, known, keeping.decode, keeping.pack)
        assert made["4d"]["frames"] == 64
        with pytest.raises(IntegrityError, match="packed wrongly"):
            sealing.write(str(tmp_path / "bad.h5"), log, known, keeping.decode, lambda block, rows: deflate(frames + 1))
