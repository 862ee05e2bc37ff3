import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from known_frames import batch, frames

from stemloop.core.errors import InputError, IntegrityError, StorageError
from stemloop.core.protocols import Batch
from stemloop.stream import landing
from stemloop.stream.landing import LandingLog


def write(path, groups=((0, 3), (3, 1), (4, 4)), close=True):
    log = LandingLog(path, "run")
    for first, n in groups:
        log.append(batch(first, n))
    if close:
        log.close()
    else:
        os.close(log._file)
    return [batch(first, n) for first, n in groups]


def same(one, other):
    return (
        (one.stream, one.first, one.meta) == (other.stream, other.first, other.meta)
        and one.frames.dtype == other.frames.dtype
        and np.array_equal(one.frames, other.frames)
    )


def test_what_was_written_is_read(tmp_path):
    written = write(tmp_path / "log")
    with LandingLog(tmp_path / "log", readonly=True) as log:
        assert log.run == "run" and log.closed_cleanly and not log.damage
        assert all(same(a, b) for a, b in zip(log.batches(), written, strict=True))
        assert log.index == {"cbed": [(0, 8)]}
        np.testing.assert_array_equal(log.read("cbed", 2, 4), frames(2, 4))
        with pytest.raises(InputError, match="no frames"):
            log.read("cbed", 5, 9)
        with pytest.raises(StorageError, match="reading alone"):
            log.append(batch(9, 1))


def test_streams_are_told_apart_and_groups_are_written_whole(tmp_path):
    with LandingLog(tmp_path / "log") as log:
        log.append_many([batch(0, 2), batch(0, 1, "haadf"), batch(2, 2)])
        assert [b.first for b in log.batches("cbed")] == [0, 2]
        assert log.index == {"cbed": [(0, 4)], "haadf": [(0, 1)]}


def test_the_first_copy_of_a_number_is_kept(tmp_path):
    with LandingLog(tmp_path / "log") as log:
        log.append(Batch("s", 2, np.full((4, 2), 1.0)))
        log.append(Batch("s", 0, np.full((8, 2), 2.0)))
        assert log.read("s", 0, 8)[:, 0].tolist() == [2, 2, 1, 1, 1, 1, 2, 2]


def test_a_log_goes_on_after_it_was_closed(tmp_path):
    write(tmp_path / "log")
    with LandingLog(tmp_path / "log") as log:
        log.append(batch(8, 2))
    with LandingLog(tmp_path / "log", readonly=True) as log:
        assert log.closed_cleanly and log.index == {"cbed": [(0, 10)]}


def test_another_run_another_writer_and_another_kind_are_refused(tmp_path):
    write(tmp_path / "log")
    with pytest.raises(InputError, match="belongs to run"):
        LandingLog(tmp_path / "log", "other")
    with LandingLog(tmp_path / "log"), pytest.raises(StorageError, match="another process"):
        LandingLog(tmp_path / "log")
    (tmp_path / "text").write_text("hello " * 100)
    with pytest.raises(InputError, match="no landing log"):
        LandingLog(tmp_path / "text")
    (tmp_path / "short").write_text("hello")
    with pytest.raises(InputError, match="no landing log"):
        LandingLog(tmp_path / "short")
    assert (tmp_path / "short").read_text() == "hello"
    with pytest.raises(StorageError, match="folder does not exist"):
        LandingLog(tmp_path / "nowhere" / "log")


def test_every_changed_byte_is_found_and_no_wrong_frame_is_served(tmp_path):
    written = write(tmp_path / "log")
    whole = (tmp_path / "log").read_bytes()
    broken = tmp_path / "broken"
    for i in range(0, len(whole), 7):  # 7 shares no factor with the field sizes, so all fields are met
        changed = bytearray(whole)
        changed[i] ^= 1 << (i % 8)
        broken.write_bytes(changed)
        try:
            log = LandingLog(broken, readonly=True)
        except (InputError, IntegrityError):
            assert i < 128  # the file header
            continue
        assert log.damage and not log.closed_cleanly
        served = list(log.batches(skip_corrupt=True))
        assert len(served) >= len(written) - 1  # the neighbours are still readable
        assert all(any(same(b, w) for w in written) for b in served)
        if len(served) < len(written):
            with pytest.raises(IntegrityError, match=f"offset {log.damage[0].offset}"):
                list(log.batches())
        log.close()


def test_damage_on_the_disk_after_opening_is_found_on_reading(tmp_path):
    write(tmp_path / "log")
    with LandingLog(tmp_path / "log", readonly=True) as log:
        with open(tmp_path / "log", "r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"\xff\xff\xff")
        with pytest.raises(IntegrityError, match="not served"):
            log.read("cbed", 4, 4)


def test_a_damaged_whole_record_is_never_cut_off(tmp_path):
    write(tmp_path / "log", close=False)
    size = (tmp_path / "log").stat().st_size
    with open(tmp_path / "log", "r+b") as file:
        file.seek(size - 1)
        file.write(b"\xee")
    with LandingLog(tmp_path / "log") as log:
        assert not log.damage[0].torn and log.index == {"cbed": [(0, 4)]}
        log.append(batch(4, 4))  # sent again
    assert (tmp_path / "log").stat().st_size > size
    with LandingLog(tmp_path / "log", readonly=True) as log:
        np.testing.assert_array_equal(log.read("cbed", 0, 8), frames(0, 8))
        with pytest.raises(IntegrityError):
            list(log.batches())


def test_every_cut_is_found_and_mended(tmp_path):
    written = write(tmp_path / "log")
    whole = (tmp_path / "log").read_bytes()
    cut = tmp_path / "cut"
    for size in range(128, len(whole), 11):
        cut.write_bytes(whole[:size])
        with LandingLog(cut, readonly=True) as log:
            assert not log.closed_cleanly
        with LandingLog(cut) as log:
            kept = list(log.batches())
            assert all(same(a, b) for a, b in zip(kept, written, strict=False))
            log.append(batch(100, 1))
        with LandingLog(cut, readonly=True) as log:
            assert log.closed_cleanly and len(list(log.batches())) == len(kept) + 1


WRITER = """
import sys
sys.path[:0] = [{src!r}, {here!r}]
from known_frames import batch
from stemloop.stream.landing import LandingLog
log = LandingLog({path!r}, "run")
first = log.index.get("cbed", [(0, 0)])[-1][1]
print("ready", flush=True)
while True:
    log.append_many([batch(first, 3), batch(first + 3, 2)])
    first += 5
    print(first, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path):
    """One log, a writer killed 24 times at random moments and started again: what it said is there, unchanged."""
    path = tmp_path / "log"
    here = Path(__file__).parent
    code = WRITER.format(src=str(here.parents[1] / "src"), here=str(here), path=str(path))
    rng = random.Random(0)
    acknowledged = 0
    for _ in range(24):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.06))
        child.send_signal(signal.SIGKILL)
        said = [line for line in child.stdout.read().split("\n")[:-1] if line]
        child.wait()
        acknowledged = max([acknowledged, *map(int, said)])
        with LandingLog(path, readonly=True) as log:
            spans = log.index.get("cbed", [(0, 0)])
            assert len(spans) == 1 and spans[0][0] == 0 and spans[0][1] >= acknowledged
            assert all(damage.torn for damage in log.damage)
    with LandingLog(path) as log:
        assert acknowledged > 100
        for b in log.batches():
            np.testing.assert_array_equal(b.frames, frames(b.first, len(b.frames)))


def test_a_write_that_fails_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    """A disk that takes some bytes and then is full; the retry starts from the last durable byte."""
    log = LandingLog(tmp_path / "log", "run")
    log.append(batch(0, 2))
    size = (tmp_path / "log").stat().st_size
    real = os.pwritev

    def full(handle, buffers, offset):
        if offset > size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, [bytes(buffers[0])[:30]], offset)

    monkeypatch.setattr(landing.os, "pwritev", full)
    with pytest.raises(StorageError, match=r"No space left.*Free some space"):
        log.append_many([batch(2, 2), batch(4, 1)])
    assert (tmp_path / "log").stat().st_size == size
    assert log.index == {"cbed": [(0, 2)]}
    monkeypatch.undo()
    monkeypatch.setattr(landing.os, "fdatasync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(StorageError, match="I/O error"):
        log.append(batch(2, 2))
    monkeypatch.undo()
    log.append(batch(2, 2))
    log.close()
    with LandingLog(tmp_path / "log", readonly=True) as again:
        np.testing.assert_array_equal(again.read("cbed", 0, 4), frames(0, 4))


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_refuses_clearly_and_goes_on_when_there_is_room(small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(500_000))
    log = LandingLog(small_disk / "log", "run")
    n = 0
    with pytest.raises(StorageError, match="No space left"):
        while True:
            log.append(Batch("s", n, np.full((1, 100, 100), n, np.uint16)))
            n += 1
    assert n > 10 and log.index == {"s": [(0, n)]}
    ballast.unlink()
    log.append(Batch("s", n, np.full((1, 100, 100), n, np.uint16)))
    log.close()
    with LandingLog(small_disk / "log", readonly=True) as again:
        assert again.closed_cleanly
        np.testing.assert_array_equal(again.read("s", 0, n + 1)[:, 5, 5], np.arange(n + 1))
