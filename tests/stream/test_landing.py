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
from stemloop.core.protocols import Batch, Encoded
from stemloop.stream import landing, packet
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


def test_blocks_rest_as_they_were_encoded(tmp_path):
    """Whatever a codec made, byte for byte; the log needs no codec to keep, serve and check it."""
    blocks = [
        Encoded("cbed", 0, 4, (6, 5), "<u4", "secret", b"anything at all", {"gain": 2}),
        Encoded("cbed", 4, 1, (6, 5), "<u4", "raw", frames(4, 1).tobytes()),
        Encoded("cbed", 5, 2, (6, 5), "<u4", "secret", b"\0" * 99),
    ]
    with LandingLog(tmp_path / "log", "run") as log:
        log.append_many(blocks)
        log.append(batch(0, 1, "haadf"))
    with LandingLog(tmp_path / "log", readonly=True) as log:
        assert list(log.blocks("cbed")) == blocks
        assert [(head.first, size) for head, size in log.heads()] == [(0, 15), (4, 120), (5, 99), (0, 120)]
        np.testing.assert_array_equal(log.read("cbed", 4, 1), frames(4, 1))
        with pytest.raises(InputError, match="'secret'; give its decoder"):
            log.read("cbed", 0, 7)

    def decode(block):
        return frames(block.first, block.n)

    with LandingLog(tmp_path / "log", readonly=True, decode=decode) as log:
        np.testing.assert_array_equal(log.read("cbed", 1, 6), frames(1, 6))
        assert sum(len(b.frames) for b in log.batches()) == 8


def test_a_log_of_the_first_version_is_read(tmp_path, monkeypatch):
    """Packets had no codec then."""
    real = packet.msgpack.packb

    def old(fields, **options):
        return real({k: 1 if k == "version" else v for k, v in fields.items() if k != "codec"}, **options)

    monkeypatch.setattr(packet.msgpack, "packb", old)
    log = LandingLog(tmp_path / "log", "run")
    log.append(batch(0, 3))
    os.close(log._file)
    monkeypatch.undo()
    with LandingLog(tmp_path / "log", readonly=True) as log:
        np.testing.assert_array_equal(log.read("cbed", 0, 3), frames(0, 3))


def test_what_is_acknowledged_is_stored_or_declared_lost(tmp_path):
    with LandingLog(tmp_path / "log", "run") as log:
        for first in (0, 8, 16):
            log.append(batch(first, 4))
        account = log.ledger()["cbed"]
        assert account.missing == ((4, 8), (12, 16)) and not account.balanced
        log.declare_lost("cbed", 4, 16, "the link was down")  # 8 to 12 are there: not lost
        account = log.ledger()["cbed"]
        assert account.lost == ((4, 8), (12, 16)) and account.balanced
        assert account.counts == {"acknowledged": 20, "stored": 12, "lost": 8, "missing": 0}
        with pytest.raises(InputError, match="no range"):
            log.declare_lost("cbed", 4, 4, "")
    with LandingLog(tmp_path / "log", readonly=True) as log:
        assert log.ledger()["cbed"] == account
        offset = log._records[1]
    raw = bytearray((tmp_path / "log").read_bytes())
    for place in (offset + 5, offset + 44 + 200):  # the fixed part, which is all that is lost; the payload
        changed = bytearray(raw)
        changed[place] ^= 1
        (tmp_path / "bad").write_bytes(changed)
        with LandingLog(tmp_path / "bad", readonly=True) as log:
            account = log.ledger()["cbed"]
            assert account.unaccounted == ((8, 12),) and account.counts["acknowledged"] == 20 and not account.balanced
            with pytest.raises(IntegrityError, match=f"offset {offset}"):
                list(log.blocks())


def test_space_is_set_aside_and_given_back(tmp_path):
    log = LandingLog(tmp_path / "log", "run", reserve_bytes=8 << 20)
    log.append(batch(0, 2))
    status = (tmp_path / "log").stat()
    if status.st_blocks * 512 < 8 << 20:
        pytest.skip("this file system does not set space aside")
    assert status.st_size < 10_000
    log.close()
    assert (tmp_path / "log").stat().st_blocks * 512 < 1 << 20


def test_a_log_has_limits(tmp_path):
    log = LandingLog(tmp_path / "log", "run", limit_bytes=2000)
    n = 0
    with pytest.raises(StorageError, match="may have 2000 bytes"):
        while True:
            log.append(batch(n, 1))
            n += 1
    log._limit = None
    log.append(batch(n, 1))
    assert log.index == {"cbed": [(0, n + 1)]}
    with pytest.raises(InputError, match="Send smaller batches"):
        log.append(Encoded("cbed", 9, 0, (2, 2), "<u2", "x", b"1"))
    with pytest.raises(InputError, match="meta"):
        log.append(Batch("cbed", 9, frames(9, 1), {"text": "x" * (17 << 20)}))
    log.close()


def harm(whole, rng):
    """``whole`` after a flipped bit, or a torn write: a sector that is empty, or that holds another's bytes."""
    changed = bytearray(whole)
    kind = rng.randrange(3)
    if kind == 0:
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        return changed
    begin, other = (rng.randrange(len(whole)) // 512 * 512 for _ in range(2))
    sector = bytes(512) if kind == 1 else whole[other : other + 512].ljust(512, b"\0")
    changed[begin : begin + 512] = sector
    return changed[: len(whole)]


def assault(path, times, seed):
    """No damage makes a wrong frame come out; a damaged record takes no other with it; its place is named."""
    written = [batch(first, 3) for first in range(0, 60, 3)]
    with LandingLog(path, "run") as log:
        log.append_many(written)
    with LandingLog(path, readonly=True) as log:
        begins = [*log._records, path.stat().st_size - 1]
    whole, rng, broken = path.read_bytes(), random.Random(seed), path.with_name("broken")
    for _ in range(times):
        changed = harm(whole, rng)
        if changed == whole:
            continue
        broken.write_bytes(changed)
        try:
            log = LandingLog(broken, readonly=True)
        except (InputError, IntegrityError):
            assert changed[:128] != whole[:128]
            continue
        with log:
            hurt = sum(changed[a:b] != whole[a:b] for a, b in zip(begins[:-1], begins[1:], strict=True))
            served = list(log.blocks(skip_corrupt=True))
            assert len(served) >= len(written) - hurt
            for block in served:
                assert block.payload == frames(block.first, block.n).tobytes()
            first = next(i for i, (a, b) in enumerate(zip(whole, changed, strict=True)) if a != b)
            assert any(d.offset <= first < d.offset + d.length for d in log.damage) or not log.closed_cleanly
            assert log.damage or not hurt


def test_no_damage_makes_a_wrong_frame(tmp_path):
    assault(tmp_path / "log", 300, 0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_damage_makes_a_wrong_frame_a_hundred_thousand_times(tmp_path):
    assault(tmp_path / "log", 100_000, 1)


def test_a_file_size_limit_refuses_clearly_and_the_log_goes_on(tmp_path):
    """RLIMIT_FSIZE in a process of its own: a disk that is full without needing root."""
    code = (
        "import resource, sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parents[2] / 'src')!r}, {str(Path(__file__).parent)!r}]\n"
        "from known_frames import batch\n"
        "from stemloop.core.errors import StorageError\n"
        "from stemloop.stream.landing import LandingLog\n"
        "log = LandingLog(sys.argv[1], 'run')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "n = 0\n"
        "try:\n"
        "    while True:\n"
        "        log.append(batch(n, 4)); n += 4\n"
        "except StorageError as error:\n"
        "    assert 'file size limit' in str(error), error\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "log.append(batch(n, 4)); log.close(); print(n + 4)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "log"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n = int(done.stdout)
    with LandingLog(tmp_path / "log", readonly=True) as log:
        assert log.closed_cleanly and n > 20
        np.testing.assert_array_equal(log.read("cbed", 0, n), frames(0, n))


@pytest.fixture
def ext4(tmp_path):
    """An ext4 file system on a loop device that turns read-only at an error: (folder, mount it anew)."""
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(32 << 20)

    def run(*words):
        return subprocess.run(words, capture_output=True, text=True, check=False).returncode == 0

    def mount():
        return run("mount", "-o", "loop,errors=remount-ro", str(image), str(folder))

    def again():
        assert run("umount", str(folder))  # the log does not hold on to it
        run("e2fsck", "-p", "-f", str(image))
        assert mount()

    try:
        if not (run("mkfs.ext4", "-q", "-F", str(image)) and mount()):
            pytest.skip("mounting a loop device needs root")
    except FileNotFoundError:
        pytest.skip("there is no mkfs.ext4 or mount command")
    yield folder, again
    run("umount", "-l", str(folder))


def test_a_disk_that_turns_read_only_refuses_clearly_and_goes_on_when_it_is_mounted_anew(ext4):
    """The kernel turns an ext4 with an error read-only. After unmounting, checking and mounting, the same open log
    goes on by itself, and nothing is missing."""
    folder, mount_anew = ext4
    source = subprocess.run(["findmnt", "-no", "SOURCE", str(folder)], capture_output=True, text=True).stdout.strip()
    trigger = Path("/sys/fs/ext4") / Path(source).name / "trigger_fs_error"
    if not source or not trigger.exists():
        pytest.skip("this kernel cannot make a file system fail on purpose")
    log = LandingLog(folder / "log", "run")
    log.append_many([batch(0, 3), batch(3, 3)])
    trigger.write_text("a test of stemloop")
    for _ in range(3):
        with pytest.raises(StorageError, match=r"Read-only file system.*mount it writable"):
            log.append(batch(6, 3))
    with pytest.raises(StorageError, match="until its disk is mounted"):
        log.read("cbed", 0, 1)
    mount_anew()
    log.append(batch(6, 3))
    log.close()
    with LandingLog(folder / "log", readonly=True) as again:
        assert again.closed_cleanly and not again.damage
        np.testing.assert_array_equal(again.read("cbed", 0, 9), frames(0, 9))


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
