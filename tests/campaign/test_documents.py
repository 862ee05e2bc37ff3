"""A run as event-model documents: valid by the official schemas, and the same whenever they are made."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from campaign.recording import write_recording
from stemloop import cli
from stemloop.campaign import documents, run
from stemloop.campaign.journal import Journal
from stemloop.campaign.settings import Settings
from stemloop.core.errors import InputError
from stemloop.stream.landing import LandingLog

event_model = pytest.importorskip("event_model", reason="event-model is not installed (the extra bluesky)")

SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run over a small recording."""
    place = tmp_path_factory.mktemp("documents")
    path = write_recording(place / "map.hspy", (6, 5))
    settings = Settings("eels-map", f"replay:{path}", None, max_points=30, initial=8, batch=6, target_sigma=1e-9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SRC))  # of the instrument's process
        for _ in run.start(settings, place / "run"):
            pass
    return place / "run"


@pytest.fixture(scope="module")
def made(folder):
    return list(documents.documents(folder))


def of(made, kind):
    return [doc for name, doc in made if name == kind]


def stream(made, name):
    known = {doc["uid"] for doc in of(made, "descriptor") if doc["name"] == name}
    return [doc for doc in of(made, "event") if doc["descriptor"] in known]


def test_every_document_passes_the_official_schemas(made):
    for name, doc in made:
        event_model.schema_validators[event_model.DocumentNames[name]].validate(doc)
    assert (made[0][0], made[-1][0]) == ("start", "stop")
    assert {"descriptor", "event", "stream_resource", "stream_datum"} < {name for name, _ in made}


def test_they_hang_together(made):
    uids = [doc["uid"] for _, doc in made]
    assert len(uids) == len(set(uids))
    (start,), (stop,) = of(made, "start"), of(made, "stop")
    assert all(
        doc["run_start"] == start["uid"] for doc in [*of(made, "descriptor"), *of(made, "stream_resource"), stop]
    )
    known = set()
    for name, doc in made:  # nothing is spoken of before it came
        if name in ("event", "stream_datum"):
            assert doc["descriptor"] in known
        if name == "stream_datum":
            assert doc["stream_resource"] in known
        known.add(doc["uid"])
    for descriptor in of(made, "descriptor"):
        events = stream(made, descriptor["name"])
        assert [e["seq_num"] for e in events] == list(range(1, len(events) + 1))
        assert stop["num_events"][descriptor["name"]] == len(events)
        inside = {name for name, key in descriptor["data_keys"].items() if "external" not in key}
        assert all(set(e["data"]) == set(e["timestamps"]) == inside for e in events)
    times = [doc["time"] for name, doc in made if "time" in doc]
    assert times == sorted(times) and times[-1] - times[0] < 300


def test_they_say_what_the_run_folder_says(folder, made):
    summary = json.loads((folder / "summary.json").read_text())
    result = np.load(folder / "result.npz")
    events = stream(made, "primary")
    assert len(events) == summary["points"]
    assert np.allclose([[e["data"]["y"], e["data"]["x"]] for e in events], result["points_m"])
    values = np.array([e["data"]["value"] for e in events], float)  # null becomes NaN
    assert np.array_equal(values, result["values"], equal_nan=True)
    assert sum(e["data"]["electrons"] for e in events) == pytest.approx(summary["electrons"])
    assert of(made, "stop")[0]["reason"] == summary["stop_reason"]
    assert {key["units"] for key in [of(made, "descriptor")[1]["data_keys"]["value"]]} == {summary["unit"]}


def test_the_frame_of_each_event_is_the_one_that_was_recorded(folder, made):
    """The rows that the documents name in frames.h5, against the positions that the file itself keeps."""
    (resource,) = of(made, "stream_resource")
    assert resource["uri"] == (folder / "frames.h5").resolve().as_uri()
    events = {e["seq_num"]: e for e in stream(made, "primary")}
    (descriptor,) = [d for d in of(made, "descriptor") if d["name"] == "primary"]
    with h5py.File(folder / "frames.h5") as file:
        data, place = file[resource["parameters"]["dataset"]], file["entry/frames/spectrum/position"]
        assert descriptor["data_keys"]["frame"]["shape"] == [1, *data.shape[1:]]
        assert descriptor["data_keys"]["frame"]["dtype_numpy"] == data.dtype.str
        rows = 0
        for datum in of(made, "stream_datum"):
            numbers = range(datum["seq_nums"]["start"], datum["seq_nums"]["stop"])
            for row, number in zip(range(datum["indices"]["start"], datum["indices"]["stop"]), numbers, strict=True):
                assert np.allclose(place[row], [events[number]["data"][axis] for axis in "yx"])
                rows += 1
        assert rows == len(events) == len(data)
    with LandingLog(folder / "frames.log", readonly=True) as log:
        assert sum(len(batch.frames) for batch in log.batches()) == rows


def test_blueskys_own_reader_of_hdf5_takes_them(made):
    consolidators = pytest.importorskip(
        "bluesky.consolidators", reason="bluesky reads HDF5 with tiled, which is not installed"
    )
    (resource,) = of(made, "stream_resource")
    (descriptor,) = [d for d in of(made, "descriptor") if d["name"] == "primary"]
    reader = consolidators.HDF5Consolidator(resource, descriptor)
    for datum in of(made, "stream_datum"):
        reader.consume_stream_datum(datum)
    assert reader.shape == (len(stream(made, "primary")), 512)
    assert not reader.has_skips


def test_the_file_is_the_documents(folder, made):
    lines = (folder / "documents.jsonl").read_text().splitlines()
    assert [(one["name"], one["doc"]) for one in map(json.loads, lines)] == made


def test_the_documents_of_a_part_are_the_first_of_the_whole(folder, made):
    """Law: what is emitted after n records is never taken back by the ones that follow."""
    records = Journal(folder / "journal.jsonl", readonly=True).records
    maker = documents.Documents(folder, Settings.load(folder / "settings.json"))
    seen = []
    for record in records:
        seen += maker.feed(record)
        assert seen == made[: len(seen)]
    assert seen == made


def test_following_a_run_that_is_over_gives_the_same(folder, made):
    assert list(documents.follow(folder)) == made


def test_lost_positions_are_told_apart(folder):
    maker = documents.Documents(folder, Settings.load(folder / "settings.json"))
    records = [dict(r) for r in Journal(folder / "journal.jsonl", readonly=True).records]
    for record in records:
        if (record["kind"], record["key"]) == ("exposure", "batch-1"):
            record.update(lost=True, electrons=6e3)
            del record["calibration"], record["frames"], record["state"]
    told = [document for record in records for document in maker.feed(record)]
    for name, doc in told:
        event_model.schema_validators[event_model.DocumentNames[name]].validate(doc)
    assert sum(e["data"]["electrons"] for e in stream(told, "lost")) == pytest.approx(6e3)
    rows = [d["indices"] for d in of(told, "stream_datum")]
    assert all(a["stop"] == b["start"] for a, b in zip(rows, rows[1:]))  # rows of frames.h5 have no gap


def test_what_is_no_number_is_null(folder):
    maker = documents.Documents(folder, Settings.load(folder / "settings.json"))
    records = [dict(r) for r in Journal(folder / "journal.jsonl", readonly=True).records]
    for record in records:
        if record["kind"] == "result":
            record.update(value=[None] * len(record["value"]), descriptors={"mean": [[float("nan")] * 7] * 8})
    told = [document for record in records[:5] for document in maker.feed(record)]
    assert all(json.loads(documents.line(*document))["doc"] == document[1] for document in told)
    assert {e["data"]["value"] for e in stream(told, "primary")} == {None}


def test_a_folder_without_a_run_is_an_input_error(tmp_path):
    with pytest.raises(InputError):
        list(documents.documents(tmp_path))


def stemloop(*words):
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    return [sys.executable, "-m", "stemloop.cli", *map(str, words)], environment


def test_a_killed_run_has_the_documents_of_what_it_did(tmp_path, capsys):
    """Kill a run, rebuild its documents, resume it, rebuild them: what was emitted live and after the kill stands.
    (A run that was over before it was killed keeps the same law.)"""
    path = write_recording(tmp_path / "map.hspy", (6, 5))
    folder = tmp_path / "run"
    words, environment = stemloop("run", "eels-map", "--instrument", f"replay:{path}", "--target-sigma", "1e-9",
                                  "--initial", 4, "--batch", 1, "--max-points", 16, "--out", folder)  # fmt: skip
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not (folder / "journal.jsonl").exists() or (folder / "journal.jsonl").read_bytes().count(b"\n") < 12:
            assert time.monotonic() < end
            time.sleep(0.005)
        live = []
        for document in documents.follow(folder, 0.01):
            live.append(document)
            if len(live) > 12:
                break
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    after_kill = list(documents.documents(folder))
    assert after_kill[: len(live)] == live
    done = subprocess.run(stemloop("resume", folder)[0], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = list(documents.documents(folder))
    assert whole[: len(after_kill)] == after_kill
    assert whole[-1][0] == "stop"
    lines = (folder / "documents.jsonl").read_bytes()
    (folder / "documents.jsonl").unlink()
    assert cli.main(["documents", str(folder)]) == 0
    assert "1 stop" in capsys.readouterr().out
    assert (folder / "documents.jsonl").read_bytes() == lines  # byte for byte
    assert cli.main(["documents", "--follow", str(folder)]) == 0
    assert capsys.readouterr().out.encode() == lines
