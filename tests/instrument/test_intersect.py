"""A client of INTERSECT commands the twin through a broker of Debian's; skipped where mosquitto is not installed."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import until
from served_twin import TOKENS, served_twin

from stemloop.core.errors import InputError, InstrumentError, NotAuthorised
from stemloop.core.instruction import Image, to_dict
from stemloop.instrument.client import connect

pytest.importorskip("intersect_sdk", reason="intersect-sdk is not installed (the extra intersect)")

from stemloop.instrument.gateways import intersect

BROKER = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
PASSWD = shutil.which("mosquitto_passwd")
needs_broker = pytest.mark.skipif(
    not (BROKER and PASSWD), reason="mosquitto is not installed (Debian: apt-get install mosquitto)"
)
pytestmark = pytest.mark.timeout(120)
PLACE = {"organization": "test-lab", "facility": "facility", "system": "microscope", "service": "stemloop"}

CLIENT = """
import json, os, queue, sys, threading, time
from intersect_sdk import (ControlPlaneConfig, IntersectClient, IntersectClientCallback, IntersectClientConfig,
                           IntersectDirectMessageParams)
port, password, messages = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
todo, answers, ended = list(messages), [], threading.Event()

def message():
    operation, payload = todo.pop(0)
    return IntersectDirectMessageParams(destination="test-lab.facility.microscope.-.stemloop",
                                        operation="microscope." + operation, payload=payload)

def heard(source, operation, failed, payload):
    payload = payload.decode() if isinstance(payload, bytes) else payload
    answers.append([operation, failed, payload, time.time()])
    if not todo:
        ended.set()
        return None
    return IntersectClientCallback(messages_to_send=[message()])

broker = ControlPlaneConfig(protocol="mqtt5.0", username="loop", password=password, port=port)
config = IntersectClientConfig(brokers=[broker], initial_message_event_config=IntersectClientCallback(
    messages_to_send=[message()]), organization="test-lab", facility="facility", system="microscope")
client = IntersectClient(config, user_callback=heard)
client.startup()
ended.wait(60)
print(json.dumps(answers), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    """A mosquitto of our own: loopback, a free port, one name with a password; ended by its process id."""
    folder = tmp_path_factory.mktemp("broker")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run([PASSWD, "-b", "-c", str(folder / "names"), "loop", "broker-secret"], check=True)
    (folder / "names").chmod(0o644)
    folder.chmod(0o755)
    user = "user root\n" if os.name == "posix" and os.geteuid() == 0 else ""
    (folder / "broker.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {folder / 'names'}\n{user}persistence false\n"
    )
    process = subprocess.Popen([BROKER, "-c", str(folder / "broker.conf")], stderr=subprocess.DEVNULL)
    try:
        until(lambda: process.poll() is not None or not socket.socket().connect_ex(("127.0.0.1", port)))
        assert process.poll() is None, "the broker ended at its start"
        yield port
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    with served_twin(tmp_path_factory.mktemp("intersect") / "server") as served:
        connection = connect(served.folder, TOKENS["viewer"], "viewer")
        yield served
        connection.close()


@pytest.fixture
def gateway(twin, broker):
    """The capability, served in a thread."""
    stop, ready, failed = threading.Event(), threading.Event(), []

    def serve():
        try:
            intersect.serve(twin.folder, PLACE, "loop", "broker-secret", token=TOKENS["agent"], port=broker,
                            ready=ready.set, until=stop)  # fmt: skip
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    until(lambda: ready.is_set() or failed, 60)
    assert not failed, failed
    yield broker
    stop.set()
    thread.join(20)
    assert not thread.is_alive()


def ask(port, *messages, password="broker-secret"):
    """Send messages one after the other; (operation, failed, payload, time) of each answer."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(port), password, json.dumps(messages)],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@needs_broker
def test_a_campaign_images_and_measures_through_the_broker(gateway, twin):
    image = {"id": "intersect-image", "origin_m": [1e-9, 1e-9], "extent_m": [2e-9, 2e-9], "shape": [8, 8],
             "dwell_s": 2e-6}  # fmt: skip
    points = {"id": "intersect-points", "positions_m": [[1e-9, 1e-9], [2e-9, 3e-9]], "dwell_s": 1e-4}
    any_image = {"id": "intersect-any", "instruction": to_dict(Image((0.0, 0.0), (1e-9, 1e-9), (4, 4), 1e-6))}
    before = len(twin.instrument.exposures)
    answers = ask(
        gateway,
        ["about", None],
        ["optics", {"C10_m": 1e-8}],
        ["state", None],
        ["image", image],
        ["image", image],
        ["diffraction", points],
        ["execute", any_image],
        ["optics", {"C10_m": 0.0}],
        ["release_control", None],
    )
    assert [failed for _, failed, _, _ in answers] == [False] * 9, answers
    said = [payload for _, _, payload, _ in answers]
    assert said[0]["name"] == "twin of a 80 kV STEM" and "diffraction" in said[0]["instructions"]
    assert said[2]["C10_m"] == 1e-8
    assert len(twin.instrument.exposures) - before == 3  # the repeated id exposed nothing
    assert said[3]["data"] == said[4]["data"]
    assert intersect.Frames(**said[5]).array().shape == (2, 64, 64)
    assert intersect.Frames(**said[6]).array().shape == (1, 4, 4)
    with connect(twin.folder, TOKENS["agent"], lease=True) as scope:  # bit for bit what the server kept
        asked = twin.instrument.exposures[before]
        kept = scope.execute(asked, "intersect-image").frames
    frame = np.frombuffer(base64.b64decode(said[3]["data"]), said[3]["dtype"]).reshape(said[3]["shape"])
    assert np.array_equal(frame, kept) and frame.dtype == kept.dtype


@needs_broker
def test_limits_and_types_hold_through_the_broker(gateway, twin):
    before = len(twin.instrument.exposures)
    answers = ask(
        gateway,
        ["stage", {"x_m": 1e-3}],
        ["diffraction", {"positions_m": [[1e-9, 1e-9]], "dwell_s": 30.0}],
        ["diffraction", {"positions_m": "everywhere", "dwell_s": 1e-3}],
        ["image", {"origin_m": [0, 0]}],
        ["execute", {"instruction": {"kind": "teleport"}}],
        ["blank", {"blanked": False}],
        ["release_control", None],
    )
    assert [failed for _, failed, _, _ in answers] == [True] * 6 + [False], answers
    assert "limit:" in answers[0][2] and "limit:" in answers[1][2] and "limit:" in answers[5][2]
    assert "input:" in answers[4][2]
    assert len(twin.instrument.exposures) == before


@needs_broker
def test_a_wrong_password_reaches_nothing(broker, twin):
    with pytest.raises(NotAuthorised, match="broker"):
        intersect.serve(twin.folder, PLACE, "loop", "wrong", token=TOKENS["agent"], port=broker)


def test_no_broker_is_said_at_once(twin):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(InstrumentError, match="no broker"):
            intersect.serve(twin.folder, PLACE, "a", "b", token=TOKENS["agent"], port=free.getsockname()[1])


def test_the_contract_is_a_schema(twin):
    """The SDK describes every message; the names and types are those of the instruction set."""
    with connect(twin.folder, TOKENS["agent"]) as client:
        capability = intersect.Microscope(client)
        assert capability.about().name == client.info.name
        assert capability.status().driving is False
        made = intersect.service(capability, PLACE, "loop", "secret")
    del made
    from intersect_sdk import get_schema_from_capability_implementations

    schema = get_schema_from_capability_implementations([intersect.Microscope], intersect.HierarchyConfig(**PLACE))
    told = json.dumps(schema)
    for word in ("positions_m", "dwell_s", "take_control", "PointsRequest", "semiangle_rad"):
        assert word in told


def test_a_broker_elsewhere_is_refused(twin):
    with connect(twin.folder, TOKENS["agent"]) as client:
        capability = intersect.Microscope(client)
        for host in ("192.0.2.7", "broker.example.org"):
            with pytest.raises(InputError, match="TLS"):
                intersect.service(capability, PLACE, "loop", "secret", host)
        with pytest.raises(InputError):
            intersect.service(capability, {**PLACE, "system": "Not A Name"}, "loop", "secret")


@needs_broker
def test_the_command_serves_the_capability(broker, twin, tmp_path):
    (tmp_path / "token").write_text(TOKENS["agent"])
    (tmp_path / "password").write_text("broker-secret\n")
    words = ["gateway", "intersect", twin.folder, "--token-file", tmp_path / "token", "--broker", f"127.0.0.1:{broker}"]
    words += ["--user", "loop", "--password-file", tmp_path / "password"]
    words += [word for name, value in PLACE.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = subprocess.Popen(
        [sys.executable, "-m", "stemloop.cli", *map(str, words)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert json.loads(process.stdout.readline())["service"] == "test-lab.facility.microscope.-.stemloop"
        answers = ask(broker, ["about", None])
        assert answers[0][2]["energy_eV"] == 80e3
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
