import resource
import subprocess
import sys

import pytest

from stemloop.campaign.journal import Journal
from stemloop.core.errors import IntegrityError, StorageError


def filled(path, n=5):
    journal = Journal(path)
    for i in range(n):
        journal.append("decision", str(i), value=i / 7)
    journal.close()
    return path


def test_what_was_appended_is_read_back_exactly(tmp_path):
    journal = Journal(filled(tmp_path / "j"))
    assert [r["value"] for r in journal.records] == [i / 7 for i in range(5)]


def test_once_makes_a_record_once(tmp_path):
    journal, calls = Journal(tmp_path / "j"), []
    for _ in range(3):
        journal.once("command", "a", lambda: calls.append(1) or {"n": len(calls)})
    assert len(calls) == 1
    assert journal.find("command", "a")["n"] == 1


def test_a_torn_tail_is_cut_wherever_it_was_torn(tmp_path):
    whole = filled(tmp_path / "whole").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        path = tmp_path / "torn"
        path.write_bytes(whole[:cut])
        journal = Journal(path)
        assert len(journal.records) == 4
        journal.append("decision", "again")
        journal.close()
        assert len(Journal(path).records) == 5


def test_a_changed_byte_in_the_middle_is_named(tmp_path):
    path = filled(tmp_path / "j")
    damaged = bytearray(path.read_bytes())
    damaged[40] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="line 1"):
        Journal(path)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        Journal(tmp_path / "nowhere" / "j")


def test_a_full_disk_loses_nothing_that_was_acknowledged(tmp_path):
    # the limit on file size stands for the full disk: the write fails with EFBIG half-way through a line
    program = f"""
import resource, signal
from pathlib import Path
from stemloop.campaign.journal import Journal
from stemloop.core.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(Path({str(tmp_path / "j")!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
n = 0
try:
    while True:
        journal.append("decision", str(n), value="x" * 50)
        n += 1
except StorageError as error:
    print(n, error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    acknowledged = int(done.stdout.split()[0])
    assert "make room" in done.stdout
    assert len(Journal(tmp_path / "j").records) == acknowledged > 10
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4000
