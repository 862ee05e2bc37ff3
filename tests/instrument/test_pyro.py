"""A notebook drives a twin through Pyro5, over real sockets, and the server's rules hold."""

import json
import math
import os
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import until
from served_twin import TOKENS, served_twin

from stemloop.core.errors import InputError, LeaseError, LimitError, NotAuthorised
from stemloop.core.instruction import Diffraction, Image
from stemloop.instrument.client import connect

pytest.importorskip("Pyro5", reason="Pyro5 is not installed (the extra pyro)")
trustme = pytest.importorskip("trustme", reason="trustme is not installed (the dependency group test)")

import Pyro5.api
import Pyro5.errors

from stemloop.instrument.gateways import pyro
from stemloop.instrument.gateways.vocabulary import LOOKING, as_array, commands

SECRET = "notebook-secret-0123456789"
SRC = Path(__file__).parents[2] / "src"


class Gateway:
    """A gateway in a thread of this process."""

    def __init__(self, address, **options):
        self.stop, self.uri, self.error = threading.Event(), None, None
        options = {"secret": SECRET, "until": self.stop, "ready": self._ready, **options}
        self.thread = threading.Thread(target=self._serve, args=(address, options), daemon=True)
        self.thread.start()
        until(lambda: self.uri or self.error)
        assert self.error is None, self.error

    def _ready(self, uri):
        self.uri = uri

    def _serve(self, address, options):
        try:
            pyro.serve(address, TOKENS["agent"], **options)
        except BaseException as error:
            self.error = error

    @property
    def place(self):
        host, port = self.uri.rsplit("@", 1)[1].rsplit(":", 1)
        return host, int(port)

    def end(self):
        self.stop.set()
        with socket.create_connection(self.place):  # wakes the loop
            pass
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    with served_twin(tmp_path_factory.mktemp("pyro") / "server") as served:
        connection = connect(served.folder, TOKENS["viewer"], "viewer")  # keeps the server up between the tests
        yield served
        connection.close()


@pytest.fixture(scope="module")
def gateway(twin):
    opened = Gateway(twin.folder)
    yield opened
    opened.end()


@pytest.fixture
def notebook(gateway):
    with pyro.connect(gateway.uri, SECRET) as remote:
        yield remote
    until(lambda: free(gateway))


def free(gateway):
    """Whether nobody drives through the gateway."""
    with pyro.connect(gateway.uri, SECRET) as remote:
        try:
            remote.take_control()
        except LeaseError:
            return False
        remote.release_control()
        return True


def stock(gateway, secret=SECRET, serializer="msgpack"):
    """A proxy as any notebook makes it, without a word of ours."""
    proxy = Pyro5.api.Proxy(gateway.uri)
    proxy._pyroSerializer = serializer
    proxy._pyroHandshake = secret
    return proxy


# ------------------------------------------------------------------------------------------------------ who may come


@pytest.mark.parametrize("secret", ["wrong-secret-0123456789", "", None, 3, ["a"], "ü" * 20])
def test_a_wrong_secret_is_refused(gateway, secret):
    with pytest.raises(Pyro5.errors.CommunicationError, match=r"rejected.*secret is wrong"):
        stock(gateway, secret)._pyroBind()
    with pytest.raises(NotAuthorised):
        pyro.connect(gateway.uri)


@pytest.mark.parametrize("serializer", ["serpent", "marshal", "json"])
def test_only_msgpack_is_read(gateway, serializer):
    with pytest.raises(Pyro5.errors.CommunicationError):
        stock(gateway, serializer=serializer)._pyroBind()
    with stock(gateway) as proxy:  # and after the handshake as well
        proxy._pyroBind()
        proxy._pyroSerializer = serializer
        with pytest.raises(Pyro5.errors.PyroError):
            proxy.get_instrument()


def header(kind=1, serializer=4, flags=0, size=0):
    return struct.pack("!4sHBBHHII16sHH", b"PYRO", 502, kind, serializer, flags, 0, size, 0, bytes(16), 0, 0x4DC5)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
        header(size=2**30),
        header(flags=2, size=8) + bytes(8),
        header(serializer=2, size=4) + b"junk",
        header(size=4) + b"\xc1junk",
        header(size=2000) + b"\x91" * 2000,
    ],
    ids=["http", "a gigabyte", "packed", "marshal", "no msgpack", "deep"],
)
def test_hostile_bytes_end_that_connection_only(gateway, data):
    with socket.create_connection(gateway.place, timeout=10) as raw, suppress(OSError):
        raw.sendall(data)
        raw.shutdown(socket.SHUT_WR)  # it may have been closed already
        while raw.recv(4096):
            pass
    with stock(gateway) as proxy:
        assert proxy.get_instrument().startswith("twin")


def test_an_unguarded_door_is_not_opened(tmp_path):
    for options in ({}, {"secret": "short"}, {"secret": SECRET, "host": "0.0.0.0"}, {"host": "192.0.2.1"}):
        with pytest.raises(InputError):
            pyro.serve(tmp_path, TOKENS["agent"], **options)


def test_the_secrets_file_is_made_for_its_owner_only(tmp_path):
    made = pyro.read_secret(tmp_path / "secret")
    assert len(made) >= 32 and pyro.read_secret(tmp_path / "secret") == made
    if os.name == "posix":
        (tmp_path / "secret").chmod(0o644)
        with pytest.raises(NotAuthorised):
            pyro.read_secret(tmp_path / "secret")


# ------------------------------------------------------------------------------------------------- what is asked


def test_an_image_arrives_bit_for_bit(gateway, notebook, twin):
    notebook.device_settings("haadf", size=24, exposure=5e-6)
    notebook.set_fov(4e-9)
    image = notebook.acquire_scanned_image(["haadf"], command_id="image-1")
    asked = twin.instrument.exposures[-1]
    assert asked == Image((3e-9, 3e-9), (4e-9, 4e-9), (24, 24), 5e-6)
    notebook.release_control()
    with connect(twin.folder, TOKENS["agent"], lease=True) as scope:  # the server's own answer to the same id
        first = scope.execute(asked, "image-1").frames[0]
    assert image.dtype == first.dtype and np.array_equal(image, first)


def test_bytes_type_and_shape_need_nothing_of_ours(gateway, notebook):
    del notebook
    with stock(gateway) as proxy:
        proxy.place_beam([0.5, 0.5])
        found = proxy.acquire_camera_image()
        proxy.release_control()
    assert isinstance(found["data"], bytes)
    pattern = np.frombuffer(found["data"], found["dtype"]).reshape(found["shape"])
    assert pattern.shape == (64, 64)
    assert found["calibration"]["pixel_rad"] > 0
    assert found["electrons"] == pytest.approx(6.2415e5, rel=1e-4)  # 100 pA, 1 ms
    # the detector sees nearly all electrons: its sum is their number within a few per cent
    assert pattern.sum() == pytest.approx(found["electrons"], rel=0.05)


def test_a_repeated_command_id_exposes_nothing(notebook, twin):
    first = notebook.acquire_camera_image(command_id="once")
    exposed = len(twin.instrument.exposures)
    assert np.array_equal(notebook.acquire_camera_image(command_id="once"), first)
    assert len(twin.instrument.exposures) == exposed


def test_units_are_converted_and_come_back(notebook):
    notebook.set_fov(1e-8)
    notebook.place_beam([0.25, 0.75])  # x, y
    assert notebook.get_probe_position() == pytest.approx([0.75, 0.25])
    state = notebook.get_state()
    assert (state["probe_y_m"], state["probe_x_m"]) == pytest.approx((7.5e-9, 2.5e-9))
    notebook.set_probe_position([0.5, 0.125])  # y, x
    assert notebook.get_probe_position() == pytest.approx([0.5, 0.125])
    notebook.set_defocus(2e-8)
    assert notebook.get_state()["C10_m"] == pytest.approx(-2e-8)
    assert notebook.get_defocus() == pytest.approx(2e-8)
    assert notebook.SetVal("C10", 1e-8) and notebook.GetVal("C10") == pytest.approx(1e-8)
    assert notebook.SetValDelta("C10", -1e-8) and notebook.GetVal("C10") == pytest.approx(0, abs=1e-20)
    assert notebook.SetValAndConfirm("ConvergenceAngle", 0.02, 1.0, 5000)
    assert notebook.get_screen_current() == pytest.approx(100.0)
    notebook.set_stage({"alpha": 0.5}, relative=False)
    assert notebook.get_state()["stage_alpha_rad"] == pytest.approx(math.radians(0.5))
    notebook.set_stage({"alpha": 0.25, "x": 1e-10})
    assert notebook.get_stage() == pytest.approx([1e-10, 0, 0, 0.75, 0])
    notebook.set_stage({"alpha": 0.0}, relative=False)
    notebook.move_stage([0.0, 0.0])
    assert notebook.get_stage() == pytest.approx([0, 0, 0, 0, 0], abs=1e-18)
    assert notebook.GetVal("EHT") == 80e3


def test_a_raster_is_row_by_row(notebook, twin):
    notebook.device_settings("camera", size=2, exposure=1e-4)
    notebook.set_fov(4e-9)
    stack = notebook.acquire_scanned_data_advanced()
    assert stack.shape == (2, 2, 64, 64)
    asked = twin.instrument.exposures[-1]
    assert isinstance(asked, Diffraction)
    assert np.allclose(list(asked.positions_m), [(4e-9, 4e-9), (4e-9, 6e-9), (6e-9, 4e-9), (6e-9, 6e-9)])
    notebook.device_settings("camera", size=16, exposure=1e-3)


@pytest.mark.parametrize(
    "name, words",
    [
        ("place_beam", ["a"]),
        ("place_beam", [[float("nan"), 0.0]]),
        ("place_beam", [[True, 0.0]]),
        ("place_beam_list", [[0.1, 0.2, 0.3]]),
        ("acquire_image", ["flucam"]),
        ("acquire_image", [3]),
        ("acquire_image", ["haadf", 3]),
        ("acquire_spectrum", []),
        ("device_settings", ["haadf", 3]),
        ("set_stage", [{"gamma": 1.0}]),
        ("SetVal", ["EHT", 2e5]),
        ("GetVal", ["nothing"]),
        ("set_fov", [1.0]),
        ("move_stage", [[0] * 6]),
        ("get_fov", [1]),
    ],
)
def test_nonsense_is_refused_and_exposes_nothing(notebook, twin, name, words):
    before = len(twin.instrument.asked)
    with pytest.raises(InputError):
        getattr(notebook, name)(*words)
    assert len(twin.instrument.asked) - before <= 1  # a blank at most
    assert not [a for a, _ in twin.instrument.asked[before:] if a.exposes]


# --------------------------------------------------------------------------------------------- the server's rules


def test_limits_of_the_server_hold_and_say_so(gateway, notebook, twin):
    before = len(twin.instrument.exposures)
    notebook.device_settings("camera", exposure=5.0)  # longer than any dwell that is allowed
    with pytest.raises(LimitError):
        notebook.acquire_camera_image()
    notebook.device_settings("camera", exposure=1e-3)
    with pytest.raises(LimitError):
        notebook.move_stage([1e-3])
    with pytest.raises(LimitError):
        notebook.place_beam([2.0, 0.5])
    assert len(twin.instrument.exposures) == before
    notebook.release_control()
    with stock(gateway) as proxy:
        with pytest.raises(Pyro5.errors.PyroError) as caught:
            proxy.move_stage([1e-3])
        assert caught.value.code == "limit" and caught.value.message
        assert "Traceback" not in "".join(getattr(caught.value, "_pyroTraceback", None) or [])
        proxy.release_control()


def test_the_beam_stays_blanked_unless_the_limits_allow_it(notebook):
    notebook.blank_beam()
    with pytest.raises(LimitError):
        notebook.unblank_beam()
    assert notebook.get_state()["blanked"]


def test_one_notebook_drives_at_a_time(gateway, notebook):
    notebook.place_beam([0.5, 0.5])
    with pyro.connect(gateway.uri, SECRET) as other:
        assert other.get_fov() > 0  # looking is free
        with pytest.raises(LeaseError, match="another notebook"):
            other.place_beam([0.1, 0.1])
        notebook.release_control()
        other.place_beam([0.1, 0.1])
        with pytest.raises(LeaseError):
            notebook.place_beam([0.5, 0.5])


def test_a_person_takes_over_and_the_notebook_has_to_ask(notebook, twin):
    notebook.place_beam([0.5, 0.5])
    with connect(twin.folder, TOKENS["operator"], "operator", takeover=True):
        with pytest.raises(LeaseError):
            notebook.place_beam([0.2, 0.2])
        with pytest.raises(LeaseError):
            notebook.take_control()
    with pytest.raises(LeaseError, match="take_control"):
        notebook.place_beam([0.2, 0.2])
    notebook.take_control()
    notebook.place_beam([0.2, 0.2])


def test_a_silent_notebook_loses_the_lease(twin):
    opened = Gateway(twin.folder, idle_s=0.2)
    try:
        with pyro.connect(opened.uri, SECRET) as one, pyro.connect(opened.uri, SECRET) as other:
            one.place_beam([0.5, 0.5])

            def free_again():
                try:
                    other.take_control()
                except LeaseError:
                    return False
                return True

            until(free_again)
    finally:
        opened.end()


def test_everything_is_audited(notebook, twin):
    before = twin.audit()
    notebook.place_beam([0.5, 0.5])
    assert twin.audit() > before


def test_only_the_commands_are_on_the_wire(gateway):
    with stock(gateway) as proxy:
        proxy._pyroBind()
        assert set(proxy._pyroMethods) == {*commands(), "take_control", "release_control"}
        assert not proxy._pyroAttrs
    assert set(commands()) > LOOKING


def test_arrays_come_back_as_they_were():
    from stemloop.instrument.gateways.vocabulary import as_message

    for dtype in ("<u2", ">u2", "<f4", "|b1"):
        array = np.arange(24).reshape(2, 3, 4).astype(dtype)[:, ::2]
        assert np.array_equal(as_array(as_message(array)), array) and as_array(as_message(array)).dtype == array.dtype


# ------------------------------------------------------------------------------------------------------ mutual TLS

NOTEBOOK = """
import sys
import Pyro5, Pyro5.api, Pyro5.errors
uri, cert, key, ca = sys.argv[1:]
Pyro5.config.SERIALIZER = "msgpack"
Pyro5.config.SSL = True
Pyro5.config.SSL_CLIENTCERT, Pyro5.config.SSL_CLIENTKEY, Pyro5.config.SSL_CACERTS = cert, key, ca
try:
    with Pyro5.api.Proxy(uri) as scope:
        print(scope.get_instrument())
        print(scope.acquire_camera_image()["shape"])
except Pyro5.errors.PyroError as error:
    print("refused", type(error).__name__)
"""


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """Certificates of an authority that the gateway trusts, and of another."""
    folder = tmp_path_factory.mktemp("papers")

    def write(name, authority, *names):
        given = authority.issue_cert(*names)
        given.private_key_pem.write_to_path(folder / f"{name}.key")
        given.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")

    trusted, stranger = trustme.CA(), trustme.CA()
    trusted.cert_pem.write_to_path(folder / "ca.pem")
    write("gateway", trusted, "127.0.0.1", "localhost")
    write("notebook", trusted, "notebook@example.org")
    write("stranger", stranger, "stranger@example.org")
    return folder


def ask_over_tls(uri, papers, name):
    words = (
        [uri, papers / f"{name}.pem", papers / f"{name}.key", papers / "ca.pem"]
        if name
        else [uri, "", "", papers / "ca.pem"]
    )
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, *map(str, words)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_mutual_tls_lets_in_who_has_a_certificate(twin, papers):
    tls = pyro.Tls(papers / "gateway.pem", papers / "gateway.key", papers / "ca.pem")
    opened = Gateway(twin.folder, secret=None, tls=tls)
    try:
        idle = socket.create_connection(opened.place)  # a peer that never speaks holds nobody up
        assert ask_over_tls(opened.uri, papers, "notebook") == ["twin of a 80 kV STEM", "[64, 64]"]
        assert ask_over_tls(opened.uri, papers, "stranger")[0].startswith("refused")
        assert ask_over_tls(opened.uri, papers, None)[0].startswith("refused")
        with pytest.raises(Pyro5.errors.CommunicationError):  # no TLS at all
            stock(opened)._pyroBind()
        idle.close()
    finally:
        opened.end()


def test_files_that_are_no_certificates_are_an_input_error(twin, papers, tmp_path):
    (tmp_path / "junk.pem").write_text("junk")
    for cert in ("junk.pem", "missing.pem"):
        tls = pyro.Tls(tmp_path / cert, papers / "gateway.key", papers / "ca.pem")
        with pytest.raises(InputError, match="TLS"):
            pyro.serve(twin.folder, TOKENS["agent"], tls=tls)


# ----------------------------------------------------------------------------------------------------- the command


def test_the_command_serves_and_ends_well(twin, tmp_path):
    (tmp_path / "token").write_text(TOKENS["agent"] + "\n")
    words = ["gateway", "pyro", twin.folder, "--token-file", tmp_path / "token", "--secret", tmp_path / "secret"]
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    process = subprocess.Popen(
        [sys.executable, "-m", "stemloop.cli", *map(str, words)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        told = json.loads(process.stdout.readline())
        assert told["tls"] is False and Path(told["secret"]) == tmp_path / "secret"
        with pyro.connect(told["uri"], (tmp_path / "secret").read_text().strip()) as remote:
            assert remote.get_detectors() == ["haadf", "camera"]
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    "words", [["127.0.0.1:1"], ["127.0.0.1:1", "--cert", "a"], [".", "--host", "0.0.0.0"]], ids=str
)
def test_the_command_refuses_half_a_lock(words, tmp_path, capsys, monkeypatch):
    from stemloop import cli

    monkeypatch.chdir(tmp_path)
    assert cli.main(["gateway", "pyro", *words]) == 2
    assert capsys.readouterr().err.startswith("stemloop: ")
