"""Whole runs over a recording: the loop, its journal, its frames and its instrument's process are all real."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from campaign.recording import titanium_map, write_recording
from stemloop.campaign.journal import Journal
from stemloop.instrument.spool import Journal as SpoolJournal

TARGET = "400"


def stemloop(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "stemloop.cli", *map(str, words)], capture_output=True, text=True, timeout=120, **options
    )


def start(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "stemloop.cli", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
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
    records = Journal(folder / "journal.jsonl").records
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
        wanted = len(known_records(folder)) + int(rng.integers(1, 8))
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
    assert run_under_fire(folder, words, np.random.default_rng(seed), kills=6) >= 3
    assert decisions(folder) == decisions(finished[0])
    positions = exposed_positions(folder)
    assert len(positions) == len(set(positions))


def test_killed_together_with_its_instrument_it_exposes_nothing_twice(recording, tmp_path):
    folder = tmp_path / "killed"
    words = ("run", "eels-map", "--instrument", f"replay:{recording}", "--target-sigma", TARGET, "--out", folder)
    assert run_under_fire(folder, words, np.random.default_rng(9), kills=4, also_the_instrument=True) >= 2
    positions = exposed_positions(folder)
    assert len(positions) == len(set(positions))
    assert json.loads((folder / "summary.json").read_text())["stop_reason"] == "uncertainty"


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
