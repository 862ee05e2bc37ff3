"""What means harm: refused, written down, and the server alive with flat memory."""

import json
import os
import socket
import threading

import msgpack
import numpy as np
import psutil
import pytest
from conftest import until
from counting_instrument import TOKENS
from stoppable import POINT, Line
from websockets.exceptions import ConnectionClosed, WebSocketException

from stemloop.core.errors import InputError
from stemloop.instrument import wire
from stemloop.instrument.audit import verify_audit

NUMBERS = ["fencing", "first", "count", "ttl_s", "expected"]
FIELDS = [*NUMBERS, "id", "instruction", "data", "key", "plan", "token", "lease_id", "takeover"]
REPORT = {"kind": "report", "version": 2}


NO_REQUESTS = [
    b"\0" * 5000,
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
    b"POST /lease HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
]


def nested(depth, opening=b"\x91", core=b"\xc0"):
    return opening * depth + core


def hostile_messages(rng, fencing):
    """Bytes that no friend sends."""
    good = wire.encode({"n": 1, "op": "execute", "id": "a", "fencing": fencing, "instruction": REPORT})
    for _ in range(60):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 5))):
            data[rng.integers(len(data))] = rng.integers(256)
        yield bytes(data[: rng.integers(1, len(data) + 1)])
    yield b""
    for depth in (17, 500, 1023, 1025, 100_000):
        yield nested(depth)
        yield nested(depth, b"\x81\xa1a")
        yield b"\x82\xa2op\xa7execute\xa1x" + nested(depth)
    yield b"\xdf\xff\xff\xff\xff"  # a map of 2**32 - 1
    yield b"\xdd\xff\xff\xff\xff" + b"\x90" * 1000
    yield b"\xdb\xff\xff\xff\xff" + b"x"
    yield b"\xc9\xff\xff\xff\xff\x01"
    yield msgpack.packb({"op": "execute", "instruction": msgpack.ExtType(1, b"\x92\xa3|O8\x91\x01" + b"x" * 8)})
    yield msgpack.packb({"op": "execute", "x": msgpack.ExtType(1, msgpack.packb(["<f8", [2**40, 2**40]]))})
    yield msgpack.packb({"op": "execute", "x": msgpack.ExtType(77, b"x")})
    yield msgpack.packb({"op": "x" * 100_000})
    for op in ("__class__", "_do", "run", "tell", "fetch", "acquire", "execute", "check", "hello", "renew", "abort"):
        for value in (None, 3, -1, 2**63, 1.5, float("nan"), "x", "../../etc/passwd", [], {}, [[[]]], b"x", True):
            yield msgpack.packb({"n": 1, "op": op, **dict.fromkeys(FIELDS, value)})
    for place in ("../../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "a\0b", "file:///etc/passwd", "é" * 300):
        yield wire.encode({"n": 1, "op": "fetch", "key": place})
        yield wire.encode({"n": 1, "op": "execute", "id": place, "fencing": fencing + 1, "instruction": REPORT})


def test_hostile_messages_are_refused_and_the_server_goes_on(served):
    one = served()
    rng = np.random.default_rng(1)
    with Line(one) as driver:
        fencing = driver.ask(op="acquire", ttl_s=60)["fencing"]
        for role in ("agent", "viewer"):
            with Line(one, role) as line:
                for data in hostile_messages(rng, fencing):
                    line.socket.send(data)
                    while "event" in (reply := wire.decode(line.socket.recv(10))):
                        pass
                    if reply.get("ok"):  # a broken message may still be a harmless one: who am I, what is the dose
                        assert set(reply) & {"dose", "state", "info", "aborted", "steps"} or len(reply) == 2, reply
                    else:
                        assert reply["code"] in ("input", "lease", "not-authorised", "limit"), (data[:60], reply)
                assert line.ask(op="dose")["ok"]
        assert driver.reply(driver.execute("good", fencing))["ok"]
    one.wait()
    assert one.exposures == 1 and one.error is None
    verify_audit(one.directory / "audit.jsonl")
    lines = [json.loads(line) for line in (one.directory / "audit.jsonl").read_text().splitlines()]
    assert any(line.get("verdict") == "lease" and "passwd" in str(line.get("id")) for line in lines)


def test_replayed_messages_expose_nothing(served):
    """Bytes that were taken from the line and sent again: under the lease, after it, and by somebody else."""
    one = served()
    sent = []
    with Line(one) as agent, Line(one) as thief, Line(one, "operator") as operator:
        fencing = agent.ask(op="acquire")["fencing"]
        for name in "abc":
            asked = wire.instruction_to_message(POINT)
            message = {"n": 1, "op": "execute", "id": name, "fencing": fencing, "instruction": asked}
            sent.append(wire.encode(message))
            agent.socket.send(sent[-1])
            assert wire.decode(agent.socket.recv())["ok"]
        spent = agent.ask(op="dose")["dose"]["spent"]
        for data in sent * 2:
            for line in (agent, thief):
                line.socket.send(data)
                assert wire.decode(line.socket.recv())["ok"]  # the first result
        new = wire.encode({**wire.decode(sent[0]), "id": "new"})
        thief.socket.send(new)
        assert wire.decode(thief.socket.recv())["code"] == "lease"
        operator.ask(op="takeover")
        agent.event("lease-lost")
        agent.send(**{k: v for k, v in wire.decode(new).items() if k != "n"})
        assert agent.reply(agent.number)["code"] == "lease"
        assert agent.ask(op="dose")["dose"]["spent"] == spent
    assert one.exposures == 3


def test_huge_frames_and_strangers_get_nothing(served):
    one = served()
    with Line(one) as line, pytest.raises(ConnectionClosed):
        line.socket.send(b"\0" * (wire.MAX_COMMAND_BYTES + 1))
        line.socket.recv(10)
    with Line(one, None) as stranger:
        stranger.socket.send(b"\x90" * 100_000)  # before hello only a small message is read
        assert "at most 4096 bytes" in wire.decode(stranger.socket.recv(10))["message"]
    for op in ("execute", "fetch", "state", "info", "acquire", "abort", "check"):
        with Line(one, None) as stranger:
            assert stranger.ask(op=op, key="a")["code"] == "not-authorised"
    host, port = one.url.split("//")[1].split(":")
    for raw in NO_REQUESTS:
        with socket.create_connection((host, int(port)), 5) as plain:
            try:
                plain.sendall(raw)
                answer = plain.recv(200)
            except OSError:
                answer = b""
            assert b" 200 " not in answer
    with Line(one, "viewer") as viewer:
        assert viewer.ask(op="dose")["ok"]
    one.wait()
    assert one.error is None


def test_memory_stays_flat_under_a_siege(tmp_path, spawn):
    """Every hostile message, bombs of empty lists and lost connections, round after round, in a process of its own."""
    process = spawn()
    directory = tmp_path / "server"
    until((directory / "local.json").exists)
    until((directory / "address.json").exists)
    port = json.loads((directory / "address.json").read_text())["port"]
    agent = json.loads((directory / "local.json").read_text())["agent"]
    one = type("There", (), {"url": f"ws://127.0.0.1:{port}"})
    server = psutil.Process(process.pid)
    rng = np.random.default_rng(2)
    bomb = b"\x82\xa2op\xa5check\xa4plan\xdd\x00\x0f\x00\x00" + b"\x90" * 0x0F0000

    def siege():
        with Line(one, None) as line:
            assert line.ask(op="hello", token=agent)["ok"]
            for data in [*hostile_messages(rng, 0), bomb]:
                line.socket.send(data)
                line.socket.recv(10)
        for _ in range(10):
            try:
                lost = Line(one, None)
                lost.socket.send(b"\x81\xa5token")
                lost.socket.socket.close()
            except (OSError, WebSocketException):
                pass

    memory = []
    for _ in range(4):
        siege()
        memory.append(server.memory_info().rss / 2**20)
    assert memory[-1] - memory[1] < 24, memory  # MiB; an allocator keeps some of what the first rounds freed
    assert process.poll() is None
    with Line(one, None) as line:
        assert line.ask(op="hello", token=agent)["ok"]
        assert line.reply(line.execute("good", line.ask(op="acquire")["fencing"]))["ok"]


@pytest.mark.parametrize("depth", [17, 200, 1000, 5000])
def test_deep_nesting_is_refused_at_once(depth):
    with pytest.raises(InputError):
        wire.decode(b"\x81\xa1a" + nested(depth))
    assert wire.decode(b"\x81\xa1a" + nested(14)) is not None


def test_many_strangers_at_once_do_not_keep_a_driver_out(served):
    one = served()
    with Line(one) as driver:
        fencing = driver.ask(op="acquire")["fencing"]
        stop = threading.Event()

        def knock():
            while not stop.is_set():
                try:
                    with Line(one, None) as line:
                        line.ask(op="hello", token=os.urandom(16).hex())
                except (OSError, WebSocketException, EOFError, TimeoutError):
                    pass

        strangers = [threading.Thread(target=knock) for _ in range(4)]
        for stranger in strangers:
            stranger.start()
        for number in range(10):
            assert driver.reply(driver.execute(f"c{number}", fencing))["ok"]
        stop.set()
        for stranger in strangers:
            stranger.join()
    assert TOKENS["agent"] not in (one.directory / "audit.jsonl").read_text()
