"""A file is there whole or not at all, whatever becomes of its writer."""

import os
import signal
import subprocess
import sys

import pytest

from stemloop.core import durable
from stemloop.core.errors import StorageError

OLD, NEW = b"old\n" * 1000, b"new!\n" * 100_000

KILLED = """
import os, signal, sys
from pathlib import Path
from stemloop.core.durable import writing
with writing(Path(sys.argv[1])) as file:
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(OLD)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == OLD
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["a.bin"]
    durable.write_whole(path, NEW)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(OLD)
    with pytest.raises(type(error)), durable.writing(path) as file:
        file.write(NEW)
        raise error
    assert path.read_bytes() == OLD and names(tmp_path) == ["a.bin"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource", reason="no limits on files here")
    path = tmp_path / "a.bin"
    path.write_bytes(OLD)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) // 2, before[1]))
    try:
        with pytest.raises(StorageError, match=r"a\.bin cannot be written: .*\. Buy a disk\.$"):
            durable.write_whole(path, NEW, mend="Buy a disk.")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == OLD and names(tmp_path) == ["a.bin"]


def test_a_block_that_writes_nothing_and_a_missing_folder_are_said(tmp_path):
    with pytest.raises(StorageError, match="No such file"), durable.replacing(tmp_path / "a.bin"):
        pass
    with pytest.raises(StorageError, match="No such file"):
        durable.write_whole(tmp_path / "nowhere" / "a.bin", NEW)
    assert names(tmp_path) == []


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def watched(handle):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc here")
    durable.write_whole(tmp_path / "a.bin", "text é")
    assert done[0].startswith(".a.bin.") and done[1:] == ["rename", tmp_path.name]
    assert (tmp_path / "a.bin").read_text(encoding="utf-8") == "text é"


@pytest.mark.skipif(os.name != "posix", reason="permission bits of POSIX")
def test_permission_bits(tmp_path):
    umask = os.umask(0o022)
    try:
        bits = []
        for mode in (None, 0o600, None):
            durable.write_whole(tmp_path / "a", "x", mode)
            bits.append((tmp_path / "a").stat().st_mode & 0o777)
        assert bits == [0o644, 0o600, 0o600]  # the usual ones, those that are asked for, those of the old file
        with durable.writing(tmp_path / "secret", 0o600) as file:
            assert os.fstat(file.fileno()).st_mode & 0o077 == 0  # nobody else could ever read it
    finally:
        os.umask(umask)


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_a_link_stays_one_and_what_is_no_file_stays_what_it_is(tmp_path):
    there, link, pipe = tmp_path / "there", tmp_path / "link", tmp_path / "pipe"
    there.mkdir()
    link.symlink_to(there / "a.bin")
    for content in (OLD, NEW):  # first it points to nothing
        durable.write_whole(link, content)
        assert link.is_symlink() and (there / "a.bin").read_bytes() == content
    os.mkfifo(pipe)
    for path in (there, pipe):
        with pytest.raises(StorageError, match="is no file"):
            durable.write_whole(path, NEW)
    assert pipe.is_fifo() and names(tmp_path) == ["link", "pipe", "there"] and names(there) == ["a.bin"]
