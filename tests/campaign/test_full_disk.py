"""A disk that fills up in the middle of a run: the run waits, says so once, and goes on when there is room."""

import os
import select
import subprocess
import sys
import time

import pytest

from campaign.recording import write_recording
from stemloop.campaign.journal import Journal
from stemloop.campaign.patience import Patience
from stemloop.core.errors import StorageError


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)]
    try:
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path):
    """Take all the room that is left."""
    with open(path, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def wait_for(stream, words, seconds):
    """What ``stream`` says until ``words`` are in it."""
    said, end = "", time.monotonic() + seconds
    while words not in said and time.monotonic() < end:
        if select.select([stream], [], [], 0.1)[0]:
            piece = os.read(stream.fileno(), 4096).decode()
            if not piece:
                break
            said += piece
    assert words in said, said
    return said


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def decisions(folder):
    records = Journal(folder / "journal.jsonl", readonly=True).records
    return [(r["key"], r["chosen"], r["sigma_max"], r["stop"]) for r in records if r["kind"] == "decision"]


def test_a_run_waits_for_room_and_loses_nothing(small_disk, tmp_path):
    recording = write_recording(tmp_path / "ti.hspy")
    words = [sys.executable, "-m", "stemloop.cli", "run", "eels-map", "--instrument", f"replay:{recording}"]
    words += ["--target-sigma", "400", "--out"]
    whole = subprocess.run([*words, tmp_path / "whole"], capture_output=True, text=True, timeout=240)
    assert whole.returncode == 0, whole.stderr

    folder, ballast = small_disk / "run", small_disk / "ballast"
    (tmp_path / "instrument").mkdir()
    folder.mkdir()
    (folder / "instrument").symlink_to(tmp_path / "instrument")  # the instrument's PC has a disk of its own
    run = subprocess.Popen([*words, folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 150
        while lines(folder / "journal.jsonl") < 8 and time.monotonic() < end:
            time.sleep(0.005)
        fill(ballast)
        said = wait_for(run.stderr, "The run waits", 150)
        assert "No space left" in said and "goes on by itself" in said
        time.sleep(1.0)
        assert run.poll() is None
        ballast.unlink()
        said += wait_for(run.stderr, "goes on.", 150)
        assert run.wait(240) == 0
        assert said.count("The run waits") == 1
    finally:
        run.kill()
        run.wait()
    assert decisions(folder) == decisions(tmp_path / "whole")
    done = subprocess.run(
        [sys.executable, "-m", "stemloop.cli", "verify", folder], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_other_refusals_are_raised_at_once(tmp_path, caplog):
    patience = Patience(tmp_path / "nowhere", pause_s=0.0)
    with pytest.raises(StorageError, match="gone"):
        patience(lambda: (_ for _ in ()).throw(StorageError("gone")))
    calls = []

    def stubborn():
        calls.append(1)
        raise StorageError("no")

    with pytest.raises(StorageError, match="no"):
        Patience(tmp_path, pause_s=0.01, in_vain_s=0.2)(stubborn)
    assert len(calls) > 1
    assert Patience(tmp_path, pause_s=0.0)(lambda: 7) == 7
    assert [r.getMessage()[:14] for r in caplog.records] == ["The run waits:"]
