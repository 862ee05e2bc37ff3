"""Whole runs over a recording: the loop, its journal, its frames and its instrument's process are all real."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from campaign.recording import titanium_map, write_recording
from stemloop.campaign.journal import Journal
from stemloop.instrument.files import DirectoryLock
from stemloop.instrument.spool import Journal as SpoolJournal

TARGET = "400"


def stemloop(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "stemloop.cli", *map(str, words)], capture_output=True, text=True, timeout=120, **options
    )


def start(*words):
    # a shell's background job ignores Ctrl-C and its children inherit that: here it must be heard
    return subprocess.Popen(
        [sys.executable, "-m", "stemloop.cli", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write_recording(tmp_path_factory.mktemp("recording") / "ti.hspy")


@pytest.fixture(scope="module")
def finished(recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = stemloop("run", "eels-map", "--instrument", f"replay:{recording}", "--target-sigma", TARGET, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def decisions(folder):
    records = Journal(folder / "journal.jsonl", readonly=True).records
    return [(r["key"], r["chosen"], r["sigma_max"], r["stop"]) for r in records if r["kind"] == "decision"]


def exposed_positions(folder):
    """What the instrument's side began to expose, by its own spool."""
    spool = SpoolJournal(folder / "instrument" / "spool.log")
    positions = []
    for _, record in spool:
        if record["record"] == "intent":
            positions += [tuple(p) for p in record["instruction"].get("positions_m", [])]
    spool.close()
    return positions


def test_a_run_stops_for_uncertainty_and_its_summary_says_so(finished):
    folder, done = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stop_reason"] == "uncertainty"
    assert summary["final_sigma"] <= summary["target_sigma"]
    assert summary["points"] < summary["raster_points"] == 120
    assert summary["points"] == sum(len(chosen) for _, chosen, _, _ in decisions(folder))
    for name in ("report.html", "frames.h5", "result.npz", "journal.jsonl"):
        assert (folder / name).stat().st_size > 0
    assert str(folder / "report.html") in done.stdout


def test_the_map_agrees_with_what_was_recorded(finished):
    folder, _ = finished
    found = np.load(folder / "result.npz")["mean"]
    # the correlation of two smooth maps; noise of the recording alone would leave it above 0.95
    assert np.corrcoef(found.ravel(), titanium_map().ravel())[0, 1] > 0.9


def test_no_position_is_exposed_twice(finished):
    positions = exposed_positions(finished[0])
    assert len(positions) == len(set(positions)) > 0


def test_every_byte_of_a_finished_run_is_verified(finished):
    done = stemloop("verify", finished[0])
    assert done.returncode == 0, done.stderr
    assert "intact" in done.stdout


def run_under_fire(folder, words, rng, kills, also_the_instrument=False):
    """Start a run, SIGKILL it (or its instrument as well) at ``kills`` random moments, resume it each time to its end;
    return how often it was killed."""
    process, done = start(*words), 0
    while process.poll() is None:
        wanted = len(known_records(folder)) + int(rng.integers(1, 4))
        while process.poll() is None and len(known_records(folder)) < wanted:
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.03)))
        if process.poll() is None and done < kills:
            if also_the_instrument:
                kill_instrument(folder)
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            process = start("resume", folder)
    assert process.returncode == 0, process.stderr.read().decode()
    return done


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_it_decides_as_if_it_had_not_been(recording, finished, tmp_path, seed):
    folder = tmp_path / "killed"
    words = ("run", "eels-map", "--instrument", f"replay:{recording}", "--target-sigma", TARGET, "--out", folder)
    assert run_under_fire(folder, words, np.random.default_rng(seed), kills=6) >= 2
    assert decisions(folder) == decisions(finished[0])
    positions = exposed_positions(folder)
    assert len(positions) == len(set(positions))


def test_killed_together_with_its_instrument_it_exposes_nothing_twice(recording, finished, tmp_path):
    folder = tmp_path / "killed"
    words = ("run", "eels-map", "--instrument", f"replay:{recording}", "--target-sigma", TARGET, "--out", folder)
    assert run_under_fire(folder, words, np.random.default_rng(9), kills=4, also_the_instrument=True) >= 1
    positions = exposed_positions(folder)
    assert len(positions) == len(set(positions))
    summary = json.loads((folder / "summary.json").read_text())
    results = [r for r in Journal(folder / "journal.jsonl", readonly=True).records if r["kind"] == "result"]
    if not any(r.get("lost") for r in results):
        assert decisions(folder) == decisions(finished[0])
    elif summary["stop_reason"] == "all-measured":  # what was lost may be what the target needed
        assert summary["points"] == 120
    else:
        assert summary["stop_reason"] == "uncertainty"
        assert summary["final_sigma"] <= summary["target_sigma"]


def test_a_first_batch_lost_with_the_instrument_is_replaced_by_other_positions(finished, tmp_path):
    folder = tmp_path / "lost"
    shutil.copytree(finished[0], folder)
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    command = next(i for i, line in enumerate(lines) if b'"kind":"command"' in line)
    (folder / "journal.jsonl").write_bytes(b"".join(lines[: command + 1]))
    spool = SpoolJournal(folder / "instrument" / "spool.log")
    results = [offset for offset, record in spool if record["record"] == "result"]
    spool.close()
    os.truncate(folder / "instrument" / "spool.log", results[0])
    (folder / "frames.log").unlink()
    done = stemloop("resume", folder)
    assert done.returncode == 0, done.stderr
    positions = exposed_positions(folder)
    assert len(positions) == len(set(positions))
    first, second = (set(chosen) for _, chosen, _, _ in decisions(folder)[:2])
    assert len(second) == len(first)
    assert not first & second
    assert json.loads((folder / "summary.json").read_text())["stop_reason"] in ("uncertainty", "all-measured")


def served(folder):
    """Process ids of all instruments' processes that were started for ``folder``."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
    return [line.split()[0] for line in found if "stemloop.campaign.host" in line and str(folder) in line]


def begun(words, folder, records):
    """A run that has written ``records`` lines to its journal."""
    process = start(*words)
    while process.poll() is None and len(known_records(folder)) < records:
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read().decode()
    return process


def words_of(recording, folder):
    return ("run", "eels-map", "--instrument", f"replay:{recording}", "--target-sigma", TARGET, "--out", folder)


def test_a_run_is_worked_on_by_one_process_at_a_time(finished, recording, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    torn = (folder / "journal.jsonl").read_bytes()[:-5]  # as if the other process were writing its last line
    (folder / "journal.jsonl").write_bytes(torn)
    lock = DirectoryLock(folder)
    for words in (("resume", folder), words_of(recording, folder)):
        done = stemloop(*words)
        assert done.returncode == 2
        assert "another process works on the run" in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 2
    lock.close()
    assert (folder / "journal.jsonl").read_bytes() == torn
    assert served(folder) == []
    assert stemloop("resume", folder).returncode == 0
    assert decisions(folder) == decisions(finished[0])


@pytest.mark.parametrize("records", [0, 7])
def test_ctrl_c_leaves_no_instrument_and_says_how_to_go_on(recording, finished, tmp_path, records):
    folder = tmp_path / "a run"
    if records:
        process = begun(words_of(recording, folder), folder, records)
    else:  # while the instrument's process starts
        process = start(*words_of(recording, folder))
        while not (folder / "instrument" / "config.json").exists():
            time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert f"stemloop resume '{folder}'" in process.stderr.read().decode()
    assert served(folder) == []
    assert stemloop("resume", folder).returncode == 0
    assert decisions(folder) == decisions(finished[0])


needs_prlimit = pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="needs prlimit to shrink the disk of another process"
)


@needs_prlimit
def test_the_runs_disk_fills_and_it_waits_for_room(recording, finished, tmp_path):
    # a limit on the size of files stands for the full disk: whatever file grows beyond it cannot be written
    folder = tmp_path / "full"
    process = begun(words_of(recording, folder), folder, 5)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    said = process.stderr.readline().decode()
    assert "waits" in said and str(folder) in said, said
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert process.wait(120) == 0
    assert decisions(folder) == decisions(finished[0])
    positions = exposed_positions(folder)
    assert len(positions) == len(set(positions))


@needs_prlimit
def test_the_instruments_disk_fills_and_the_run_goes_on_when_there_is_room(recording, finished, tmp_path):
    folder = tmp_path / "full"
    process = begun(words_of(recording, folder), folder, 12)
    instrument = json.loads((folder / "instrument" / "address.json").read_text())["pid"]
    resource.prlimit(instrument, resource.RLIMIT_FSIZE, (500, 500))
    assert process.wait(120) == 2
    said = process.stderr.read().decode()
    assert str(folder) in said and len(said.strip().splitlines()) <= 2, said
    assert served(folder) == []
    done = stemloop("resume", folder)
    assert done.returncode == 0, done.stderr
    assert decisions(folder) == decisions(finished[0])
    positions = exposed_positions(folder)
    assert len(positions) == len(set(positions))


def test_an_unforeseen_failure_of_the_instrument_is_a_line(recording, tmp_path):
    folder = tmp_path / "run"
    words = [str(word) for word in words_of(recording, folder)]
    program = (
        "import sys; from stemloop.campaign import site; from stemloop import cli\n"
        "write = site.write_json\n"
        "def spoilt(path, content):\n"
        "    content.pop('max_electrons', None) if path.name == 'config.json' else None\n"
        "    write(path, content)\n"
        f"site.write_json = spoilt; sys.exit(cli.main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "KeyError: 'max_electrons'" in done.stderr and "log.txt" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2, done.stderr
    assert "Traceback" in (folder / "instrument" / "log.txt").read_text()


def test_a_finished_run_is_verified_without_a_change_and_lost_frames_are_missed(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    for name, keep, said in (("frames.log", 0.5, "lacks frames"), ("journal.jsonl", None, "last line")):
        whole = (folder / name).read_bytes()
        assert stemloop("verify", folder).returncode == 0
        assert (folder / name).read_bytes() == whole
        spoilt = whole[: int(len(whole) * keep)] if keep else whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
        (folder / name).write_bytes(spoilt)
        done = stemloop("verify", folder)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("settings.json", "[1]", "cannot be used"),
        ("settings.json", '{"recipe": "nothing"}', "unknown recipe"),
        ("journal.jsonl", "00000000 {}\n00000000 {}\n", "damaged at line 1"),
    ],
)
def test_a_damaged_run_folder_is_said(finished, tmp_path, name, content, expected):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    (folder / name).write_text(content)
    done = stemloop("resume", folder)
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2, done.stderr
    assert served(folder) == []


def test_a_run_is_resumed_from_any_folder_and_with_a_damaged_address(recording, tmp_path):
    done = stemloop(
        *words_of(recording.name, tmp_path / "run"), "--max-points", 17, cwd=recording.parent, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "run" / "stream.json").write_text("{")
    done = stemloop("resume", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("budget", [("--max-points", 1), ("--max-dose", 1e-9)])
def test_a_budget_for_next_to_nothing_still_ends_well(recording, tmp_path, budget):
    done = stemloop(*words_of(recording, tmp_path / "run"), *budget)
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr


def known_records(folder):
    try:
        return (folder / "journal.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []


def kill_instrument(folder):
    try:
        os.kill(json.loads((folder / "instrument" / "address.json").read_text())["pid"], signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass


def test_budgets_end_a_run_and_say_which(recording, tmp_path):
    replay = f"replay:{recording}"
    done = stemloop(
        "run",
        "eels-map",
        "--instrument",
        replay,
        "--target-sigma",
        "1e-6",
        "--max-points",
        "22",
        "--out",
        tmp_path / "points",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "points" / "summary.json").read_text())
    assert (summary["stop_reason"], summary["points"]) == ("points", 22)


BAD = {
    "unknown recipe": (["run", "strain-enrgy"], "unknown recipe"),
    "unknown specimen": (["demo", "--specimen", "MoSe2"], "unknown specimen"),
    "unknown instrument": (["run", "eels-map", "--instrument", "microscope"], "unknown instrument"),
    "missing file": (["run", "eels-map", "--instrument", "replay:nowhere.dm3"], "nowhere.dm3"),
    "a negative budget": (["demo", "--max-points", "-3"], "max-points"),
    "no run folder": (["resume", "nowhere"], "no run folder"),
    "unknown acquisition": (["demo", "--acquisition", "luck"], "unknown acquisition"),
    "unknown calculator": (["demo", "--calculator", "guess"], "unknown calculator"),
    "a file for a folder": (["resume", __file__], "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_in_two_lines_and_exit_2(case, tmp_path):
    words, expected = BAD[case]
    out = [] if words[0] == "resume" else ["--out", tmp_path / "run"]
    done = stemloop(*words, *out, cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2, done.stderr


def test_a_text_file_named_dm3_and_a_truncated_one(tmp_path):
    (tmp_path / "text.dm3").write_text("this is no microscope file\n" * 40)
    (tmp_path / "short.dm3").write_bytes(bytes([0, 0, 0, 3, 0, 0, 16, 0, 0, 0, 0, 1]) + bytes(30))
    for name in ("text.dm3", "short.dm3"):
        done = stemloop("run", "eels-map", "--instrument", f"replay:{tmp_path / name}", "--out", tmp_path / name[:4])
        assert done.returncode == 2
        assert name in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 2, done.stderr


def test_nan_frames_in_a_recording(tmp_path):
    path = write_recording(tmp_path / "nan.hspy", spoil=(3, 4))
    done = stemloop("run", "eels-map", "--instrument", f"replay:{path}", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "NaN" in done.stderr or "finite" in done.stderr


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = stemloop("demo", "--out", tmp_path / "file" / "run")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_a_folder_that_holds_a_run_is_not_overwritten(finished, recording):
    folder, _ = finished
    before = (folder / "journal.jsonl").read_bytes()
    done = stemloop("run", "eels-map", "--instrument", f"replay:{recording}", "--out", folder)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    assert (folder / "journal.jsonl").read_bytes() == before
