"""The server's process is killed at any moment: nothing acknowledged is lost, nothing is exposed twice."""

import json
import os
import signal
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from conftest import until
from counting_instrument import CURRENT_A, Counting, ListSink

from stemloop.core import units
from stemloop.core.errors import InstrumentError, OutcomeUnknown, StemloopError
from stemloop.core.instruction import Diffraction, Optics
from stemloop.instrument.audit import verify_audit
from stemloop.instrument.client import connect

POINT = Diffraction(((1e-9, 1e-9), (2e-9, 2e-9)), 1e-3)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def exposures(directory):
    return [line[1] for line in Counting(directory / "exposures.txt").lines("expose ")]


def test_after_a_kill_everything_goes_on_where_it_stopped(tmp_path, spawn):
    process = spawn()
    with connect(tmp_path / "server", lease=True) as client:
        first = client.execute(POINT, "a", data="inline")
        client.execute(POINT, "b", data="stream")
        client.execute(Optics(current_A=CURRENT_A / 2), "slow down")
        spent, fencing = client.dose()["spent"], client.fencing
        kill(process)
        process = spawn()
        again = client.execute(POINT, "a")  # the client finds the new server, and its lease again
        assert np.array_equal(again.frames, first.frames) and again.state == first.state
        assert client.fencing > fencing
        assert client.dose()["spent"] == spent
        state = client.state()
        assert state["current_A"] == CURRENT_A / 2 and state["moves"] == 1
        assert state["blanked"]  # nobody had the lease at the start
        streamed = client.execute(POINT, "c", data="stream")
        assert (streamed.calibration["first"], streamed.calibration["count"]) == (2, 2)
        assert client.execute(POINT, "b", data="stream").calibration["first"] == 0
        assert exposures(tmp_path) == ["a", "b", "c"]
        lines = ListSink(tmp_path / "frames.txt").lines()
        assert [(line["id"], line["first"]) for line in lines] == [("b", 0), ("c", 2), ("b", 0)]
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stdout.read().startswith("clean")
    assert not (tmp_path / "server" / "address.json").exists()
    verify_audit(tmp_path / "server" / "audit.jsonl")


def test_a_kill_during_the_exposure_leaves_an_unknown_outcome_and_its_dose_spent(tmp_path, spawn):
    process = spawn(sleep_s=5.0)
    with connect(tmp_path / "server", lease=True) as client:
        answers = []

        def ask():
            try:
                answers.append(client.execute(POINT, "a"))
            except InstrumentError as error:
                answers.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: exposures(tmp_path) == ["a"])
        kill(process)
        spawn(sleep_s=0.0)
        asking.join(30)
        assert isinstance(answers[0], OutcomeUnknown) and "new command id" in str(answers[0])
        with pytest.raises(OutcomeUnknown):
            client.execute(POINT, "a")
        reserved = int(np.ceil(2 * units.electrons(CURRENT_A, 1e-3)))
        assert client.dose()["spent"] == reserved and client.dose()["reserved"] == 0
        client.execute(POINT, "b")
    assert exposures(tmp_path) == ["a", "b"]


def test_kills_at_random_moments_never_expose_twice(tmp_path, spawn):
    """Twelve commands, a kill every fraction of a second; the client only repeats its ids."""
    rng = np.random.default_rng(5)
    sleep_s = 0.03
    done = threading.Event()
    processes = [spawn(sleep_s=sleep_s)]
    kills = []

    def killer():
        for _ in range(4):
            until(lambda: (tmp_path / "server" / "address.json").exists() or done.is_set())
            if done.wait(rng.uniform(0.05, 0.35)):
                return
            kill(processes[-1])
            kills.append(time.monotonic())
            (tmp_path / "server" / "address.json").unlink(missing_ok=True)
            processes.append(spawn(sleep_s=sleep_s))

    thread = threading.Thread(target=killer)
    known, unknown = {}, []
    with connect(tmp_path / "server", lease=True) as client:
        thread.start()
        for number in range(12):
            try:
                known[f"c{number}"] = client.execute(POINT, f"c{number}")
            except OutcomeUnknown:
                unknown.append(f"c{number}")
        done.set()
        thread.join()
        dose = client.dose()
        for name, exposure in known.items():  # each acknowledged frame is still there
            assert np.array_equal(client.execute(POINT, name).frames, exposure.frames)
    seen = exposures(tmp_path)
    assert kills and len(seen) == len(set(seen))
    assert set(known) <= set(seen) <= set(known) | set(unknown)
    each = int(np.ceil(2 * units.electrons(CURRENT_A, 1e-3)))
    assert dose["spent"] == each * (len(known) + len(unknown))


def test_a_signal_during_an_exposure_waits_for_its_end(tmp_path, spawn):
    process = spawn(sleep_s=1.0)
    client = connect(tmp_path / "server", lease=True)

    def ask():
        with suppress(StemloopError):
            client.execute(POINT, "a")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    until(lambda: exposures(tmp_path) == ["a"])
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 0
    assert Counting(tmp_path / "exposures.txt").lines("exposed")
    assert Counting(tmp_path / "exposures.txt").lines("blank True")
    client.close()
    asking.join(10)
    assert not asking.is_alive()
    spawn()
    with connect(tmp_path / "server", lease=True) as client:
        assert client.execute(POINT, "a").frames.shape == (2, 8, 8)
    assert exposures(tmp_path) == ["a"]


def test_an_idle_process_ends_by_itself(tmp_path, spawn):
    process = spawn(idle_exit_s=0.5)
    with connect(tmp_path / "server") as client:
        assert json.loads((tmp_path / "server" / "address.json").read_text())["pid"] == process.pid
        client.state()
    assert process.wait(20) == 0
