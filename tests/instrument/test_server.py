import json
import math
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import until
from counting_instrument import CURRENT_A, FIELD_M, TOKENS
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as raw_connect

from stemloop.core import units
from stemloop.core.errors import (
    DoseError,
    InputError,
    InstrumentError,
    LeaseError,
    LimitError,
    NotAuthorised,
    StorageError,
)
from stemloop.core.instruction import Blank, Diffraction, Image, Optics, Probe, Report
from stemloop.core.protocols import Instrument
from stemloop.instrument import wire
from stemloop.instrument.audit import verify_audit
from stemloop.instrument.client import connect

POINT = Diffraction(((1e-9, 1e-9),), 1e-3)
PER_POINT = math.ceil(units.electrons(CURRENT_A, 1e-3))


def raw(served, token=TOKENS["agent"]):
    address = json.loads((served.directory / "address.json").read_text())
    socket = raw_connect(f"ws://127.0.0.1:{address['port']}/control", compression=None, proxy=None)
    if token:
        socket.send(wire.encode({"n": 1, "op": "hello", "token": token}))
        assert wire.decode(socket.recv())["ok"]
    return socket


def ask(socket, **message):
    socket.send(wire.encode({"n": 7, **message}))
    while "event" in (reply := wire.decode(socket.recv())):
        pass
    return reply


def http(served, method, path, token=None, body=None):
    address = json.loads((served.directory / "address.json").read_text())
    request = urllib.request.Request(f"http://127.0.0.1:{address['port']}{path}", body, method=method)
    if body:
        request.add_header("Content-Type", "application/json")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_an_exposure_comes_back_and_is_counted(served):
    one = served()
    assert isinstance(one.instrument, Instrument)
    with one.connect() as client, client.lease():
        exposure = client.execute(Diffraction(((0.0, 0.0), FIELD_M), 1e-3), "a")
        assert exposure.frames.shape == (2, 8, 8) and exposure.frames.dtype == np.uint16
        assert exposure.electrons == pytest.approx(units.electrons(CURRENT_A, 1e-3))
        assert exposure.calibration == {"pixel_rad": 1e-3}
        image = client.execute(Image((0.0, 0.0), FIELD_M, (4, 8), 1e-6), "b")
        assert image.frames.shape == (1, 4, 8)
        assert client.info == one.instrument.info
        assert client.state()["current_A"] == CURRENT_A
        total = math.ceil(2 * exposure.electrons) + math.ceil(32 * image.electrons)
        assert client.dose() == {"budget": math.inf, "spent": total, "reserved": 0.0, "left": math.inf}
    one.wait()
    assert one.instrument.closed and one.sink.closed and one.error is None
    assert len(one.instrument.threads) == 1
    assert verify_audit(one.directory / "audit.jsonl").lines > 3
    assert not (one.directory / "address.json").exists()


def test_everything_refused_says_why_and_exposes_nothing(served):
    one = served(dose_budget=2.5 * PER_POINT)
    driver, second, viewer = one.connect(), one.connect(), one.connect("viewer")
    driver.acquire()
    with pytest.raises(LeaseError, match="agent holds the lease with number 1: acquire"):
        second.execute(POINT, "x1")
    with pytest.raises(LeaseError, match=r"agent holds the lease \(number 1\).*wait until it is released"):
        second.acquire()
    with pytest.raises(NotAuthorised, match="viewer may not command the microscope: that needs the role agent"):
        viewer.execute(POINT, "x2")
    with pytest.raises(NotAuthorised, match="viewer may not take the lease"):
        viewer.acquire()
    with pytest.raises(NotAuthorised, match="token is not known"):
        connect(one.directory, "agent-secret-of-nobody", patience_s=1)
    with pytest.raises(NotAuthorised, match="operator was asked"):
        connect(one.directory, TOKENS["agent"], "operator", patience_s=1)
    with pytest.raises(LimitError, match="position x = 3e-08 m is outside the field"):
        driver.execute(Diffraction(((0.0, 3e-8),), 1e-3), "x3")
    with pytest.raises(LimitError, match="dwell 5 s is over the limit of 1 s"):
        driver.execute(Diffraction(((0.0, 0.0),), 5.0), "x4")
    with pytest.raises(LimitError, match="cannot do 'probe'"):
        driver.execute(Probe((0.0, 0.0)), "x5")
    with pytest.raises(LimitError, match="current"):
        driver.execute(Optics(current_A=1.0), "x6")
    with pytest.raises(LimitError, match="unblank"):
        driver.execute(Blank(False), "x7")
    with pytest.raises(DoseError, match="left"):
        driver.execute(Diffraction(((0.0, 0.0),) * 3, 1e-3), "x8")
    with pytest.raises(InputError, match="data must be"):
        driver.execute(POINT, "x9", data="pigeon")
    with pytest.raises(InputError, match="command id"):
        driver.execute(POINT, "y" * 500)
    assert one.exposures == 0
    driver.execute(POINT, "good 1")
    driver.execute(POINT, "good 2")
    with pytest.raises(DoseError, match="budget"):
        driver.execute(POINT, "x10")
    assert one.exposures == 2
    assert driver.dose()["spent"] == 2 * PER_POINT
    for client in (driver, second, viewer):
        client.close()
    one.wait()
    verdicts = [json.loads(line).get("verdict") for line in (one.directory / "audit.jsonl").read_text().splitlines()]
    assert {"done", "lease", "limit", "dose", "not-authorised", "input"} <= set(verdicts)


def test_a_repeated_id_answers_the_first_result_and_another_instruction_under_it_is_refused(served):
    one = served(dose_budget=1.5 * PER_POINT)
    with one.connect() as client, client.lease():
        first = client.execute(POINT, "a")
        again = client.execute(POINT, "a")
        assert np.array_equal(first.frames, again.frames) and again.electrons == first.electrons
        assert client.dose()["spent"] == PER_POINT
        with pytest.raises(InputError, match="was used for another instruction"):
            client.execute(Diffraction(((2e-9, 2e-9),), 1e-3), "a")
        client.execute(Optics(current_A=5e-11), "o")
        client.execute(Optics(current_A=5e-11), "o")
        assert client.execute(Report(), "r").state["moves"] == 1
    assert one.exposures == 1


def test_frames_through_the_stream_keep_their_numbers(served):
    one = served()
    with one.connect() as client, client.lease():
        answers = [client.execute(Diffraction(((0.0, 0.0),) * n, 1e-4), f"c{n}", data="stream") for n in (2, 3)]
        assert [a.frames for a in answers] == [None, None]
        assert [(a.calibration["first"], a.calibration["count"]) for a in answers] == [(0, 2), (2, 3)]
        assert answers[0].calibration["stream"] == "diffraction" and answers[0].calibration["pixel_rad"] == 1e-3
        inline = client.execute(Diffraction(((0.0, 0.0),) * 2, 1e-4), "c2")  # the same frames, this time inline
        client.execute(Diffraction(((0.0, 0.0),) * 2, 1e-4), "c2", data="stream")
        client.execute(POINT, "late")
        late = client.execute(POINT, "late", data="stream")
        assert late.calibration["first"] == 5
    lines = one.sink.lines()
    assert [(line["id"], line["first"], line["count"]) for line in lines] == [
        ("c2", 0, 2), ("c3", 2, 3), ("c2", 0, 2), ("late", 5, 1),
    ]  # fmt: skip
    assert lines[0] == lines[2] and lines[0]["sum"] == inline.frames.sum()
    assert one.exposures == 3


def test_a_stream_that_fails_loses_nothing(served, monkeypatch):
    one = served()
    with one.connect() as client, client.lease():
        with monkeypatch.context() as patch:
            patch.setattr(one.sink, "send", lambda batch: 1 / 0)
            with pytest.raises(InstrumentError, match="repeat the same command id"):
                client.execute(POINT, "a", data="stream")
        assert client.execute(POINT, "a", data="stream").calibration["first"] == 0
    assert one.exposures == 1


def test_a_server_without_a_stream_says_so(served):
    one = served(sink=None)
    with one.connect() as client, client.lease(), pytest.raises(InputError, match="data='inline'"):
        client.execute(POINT, "a", data="stream")


def test_an_old_fencing_number_cannot_act_after_a_takeover(served):
    one = served()
    with one.connect() as agent, one.connect("operator") as operator:
        agent.acquire()
        agent.execute(POINT, "a")
        with pytest.raises(LeaseError, match="takeover=True"):
            operator.acquire()
        blanked = len(one.instrument.lines("blank True"))
        assert operator.acquire(takeover=True) == 2
        assert len(one.instrument.lines("blank True")) == blanked + 1
        with pytest.raises(LeaseError, match="carries fencing number 1, but operator holds the lease with number 2"):
            agent.execute(POINT, "b")
        operator.execute(POINT, "c")
        assert agent.execute(POINT, "a").frames is not None  # its own first result stays readable
    assert one.exposures == 2


def test_a_wrong_number_under_the_right_lease_is_refused(served):
    one = served()
    with one.connect() as client, client.lease():
        client.fencing += 1
        with pytest.raises(LeaseError, match="fencing number 2; the lease has 1"):
            client.execute(POINT, "a")
    assert one.exposures == 0


def test_the_lease_outlives_a_long_think_and_a_long_exposure(served):
    one = served(sleep_s=1.0)
    with one.connect(ttl_s=0.4) as client:
        client.acquire()
        time.sleep(1.2)  # three times its life
        client.execute(POINT, "a")
        time.sleep(0.6)
        client.execute(POINT, "b")
        assert client.fencing == 1
    assert one.exposures == 2


def opened_by_hand(one, watcher):
    until(lambda: watcher.state()["blanked"])  # the server begins so
    one.instrument.values["blanked"] = False


def test_the_beam_is_blanked_when_the_holder_falls_silent(served):
    one = served()
    with one.connect("viewer") as watcher:
        socket = raw(one)
        lease = ask(socket, op="acquire", ttl_s=1.0)
        assert lease["ok"]
        opened_by_hand(one, watcher)
        until(lambda: watcher.state()["blanked"], 3)  # it is connected, and says nothing
        reply = ask(socket, op="execute", id="a", fencing=1, instruction=wire.instruction_to_message(POINT))
        assert not reply["ok"] and reply["code"] == "lease" and "acquire the lease" in reply["message"]
        socket.close()
    assert one.exposures == 0


def test_the_beam_is_blanked_when_the_connection_is_lost_longer_than_the_grace(served):
    one = served(grace_s=0.2)
    with one.connect("viewer") as watcher:
        socket = raw(one)
        assert ask(socket, op="acquire", ttl_s=60.0)["ok"]
        opened_by_hand(one, watcher)
        socket.socket.close()
        until(lambda: watcher.state()["blanked"], 3)
        with one.connect() as other:
            other.acquire()


def test_a_blanked_beam_opens_for_an_exposure_and_closes_after_it(served):
    one = served()
    with one.connect() as client:
        with client.lease():
            pass
        with client.lease():
            assert client.state()["blanked"]
            assert client.execute(POINT, "a").frames is not None
            assert client.state()["blanked"]
            one.instrument.sleep_s = "a while"
            with pytest.raises(InstrumentError):
                client.execute(POINT, "b")
            assert client.state()["blanked"]


def test_who_comes_back_within_the_grace_goes_on_with_the_same_lease(served):
    one = served(grace_s=5.0)
    with one.connect() as client:
        client.acquire()
        until(lambda: client.state()["blanked"])  # the server begins so
        client._socket.socket.shutdown(2)
        client.execute(POINT, "a")
        assert client.fencing == 1
        assert one.instrument.lines("blank") == [["blank", "True"], ["blank", "False"], ["blank", "True"]]
    assert one.exposures == 1


def test_a_connection_that_drops_during_an_exposure_exposes_once(served):
    one = served(sleep_s=0.5)
    with one.connect() as client:
        client.acquire()
        cutter = threading.Timer(0.2, lambda: client._socket.socket.shutdown(2))
        cutter.start()
        assert client.execute(POINT, "a").frames is not None
        cutter.join()
    assert one.exposures == 1


def test_malformed_bytes_get_an_answer_or_a_farewell_and_the_server_goes_on(served):
    one = served()
    rng = np.random.default_rng(0)
    with one.connect() as client, client.lease():
        socket = raw(one)
        good = wire.encode({"n": 1, "op": "execute", "id": "a", "fencing": 1, "instruction": {"kind": "image"}})
        for _ in range(200):
            data = bytearray(good)
            for _ in range(3):
                data[rng.integers(len(data))] = rng.integers(256)
            socket.send(bytes(data))
            assert wire.decode(socket.recv())["ok"] is False
        for message in (
            {"op": "fly"}, {"op": 3}, {}, {"op": "execute"}, {"op": "execute", "id": 3},
            {"op": "acquire", "ttl_s": "x"},
            {"op": "acquire", "ttl_s": math.nan}, {"op": "execute", "id": "a", "instruction": {"kind": []}},
            {"op": "renew"}, {"op": "hello", "token": 5}, {"op": "execute", "id": "a", "instruction": [1], "data": {}},
        ):  # fmt: skip
            assert ask(socket, **message)["ok"] is False
        socket.send("text")
        assert "binary" in wire.decode(socket.recv())["message"]
        stranger = raw(one, token=None)
        stranger.send(b"\xc1 not msgpack")
        assert wire.decode(stranger.recv())["code"] == "input"
        with pytest.raises(ConnectionClosed):
            stranger.recv()
        stranger = raw(one, token=None)
        assert ask(stranger, op="state")["code"] == "not-authorised"
        huge = raw(one)
        with pytest.raises(ConnectionClosed):
            huge.send(b"\0" * (wire.MAX_COMMAND_BYTES + 1))
            huge.recv()
        client.execute(POINT, "good")
        socket.close()
    assert one.exposures == 1


def test_an_instrument_that_fails_is_charged_and_not_asked_again(served, monkeypatch):
    one = served()
    with one.connect() as client, client.lease():
        with monkeypatch.context() as patch:
            patch.setattr(one.instrument, "sleep_s", "a while")
            with pytest.raises(InstrumentError, match="TypeError"):
                client.execute(POINT, "a")
        with pytest.raises(InstrumentError, match="TypeError"):
            client.execute(POINT, "a")
        assert client.dose()["spent"] == PER_POINT and client.dose()["reserved"] == 0
    assert one.exposures == 1


def test_rest_discovers_reads_the_state_and_handles_leases(served):
    one = served(idle_exit_s=1.5)
    until((one.directory / "address.json").exists)
    status, seen = http(one, "GET", "/")
    assert status == 200 and seen["name"] == "counting" and "image" in seen["instructions"]
    assert http(one, "GET", "/state")[0] == 401
    assert http(one, "GET", "/state", "x" * 20)[0] == 401
    status, seen = http(one, "GET", "/state", TOKENS["viewer"])
    assert status == 200 and seen["lease"] is None and seen["state"]["current_A"] == CURRENT_A
    assert seen["dose"]["left"] is None  # without bound
    assert http(one, "POST", "/lease", TOKENS["viewer"])[1]["code"] == "not-authorised"
    status, lease = http(one, "POST", "/lease", TOKENS["agent"], b'{"ttl_s": 30}')
    assert status == 200 and lease["fencing"] == 1
    assert http(one, "POST", "/lease", TOKENS["operator"])[0] == 409
    assert http(one, "POST", "/lease", TOKENS["operator"], b"[1]")[0] == 422
    assert http(one, "POST", "/lease", TOKENS["operator"], b" " * 10_000)[0] == 422
    assert http(one, "POST", "/lease", TOKENS["operator"], b" " * 2_000_000)[0] == 413
    assert http(one, "DELETE", "/lease", TOKENS["agent"])[0] == 409
    socket = raw(one, token=None)
    assert ask(socket, op="hello", token=TOKENS["agent"], lease_id=lease["lease_id"])["leased"]
    assert ask(socket, op="renew", fencing=1)["ok"]
    assert http(one, "DELETE", f"/lease?lease_id={lease['lease_id']}", TOKENS["agent"])[0] == 204
    assert one.instrument.values["blanked"]
    assert http(one, "GET", "/state", TOKENS["viewer"])[1]["lease"] is None
    socket.close()


def test_secrets_of_the_same_user_are_made_anew_and_kept_from_others(served):
    one = served(tokens=None)
    with connect(one.directory, patience_s=10) as client:
        assert client.who == "agent"
        secrets = (one.directory / "local.json").read_text()
        assert stat.S_IMODE(os.stat(one.directory / "local.json").st_mode) == 0o600
    one.wait()
    assert not (one.directory / "local.json").exists()
    two = served(tokens=None)
    with connect(one.directory, role="operator", patience_s=10) as client:
        assert client.who == "operator"
        assert (one.directory / "local.json").read_text() != secrets
    two.wait()


def test_a_second_server_on_the_directory_is_refused(served):
    one = served()
    with one.connect() as client:
        two = served()
        two.wait()
        assert isinstance(two.error, StorageError)
        assert client.state()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "microscope.example.org", "::"])
def test_loopback_is_not_left_without_tls(served, host):
    one = served(host=host)
    one.wait()
    assert isinstance(one.error, InputError) and "tls=(certificate, key)" in str(one.error)


def test_it_leaves_when_nobody_is_there_and_blanks_first(served):
    one = served(idle_exit_s=0.3, grace_s=60.0)
    client = one.connect(ttl_s=60.0)
    client.acquire()
    client._closed.set()
    client._socket.socket.shutdown(2)  # the lease stays behind
    one.wait()
    assert one.error is None and one.instrument.lines("blank True") and one.instrument.closed


def test_without_a_server_the_client_says_what_to_do(tmp_path):
    with pytest.raises(InstrumentError, match="cannot be reached"):
        connect(tmp_path, TOKENS["agent"], patience_s=0.1)
    with pytest.raises(InputError, match="host:port"):
        connect("nowhere", TOKENS["agent"], patience_s=0.1)


def test_the_client_does_not_pull_in_the_server():
    code = "import sys, stemloop.instrument.client, stemloop.instrument.replay; sys.exit('fastapi' in sys.modules)"
    source = str(Path(__file__).parents[2] / "src")
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, check=True)


def test_a_reply_does_not_wait_until_an_event_was_acknowledged():
    # asyncio turns the delay of small packets off on sockets whose protocol is named, and on no others
    from stemloop.instrument.server import _listen

    with _listen("127.0.0.1", 0, None) as listener, socket.create_connection(listener.getsockname()) as caller:
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP
            assert caller.getpeername()[1] == listener.getsockname()[1]
