"""The client as a person meets it: words, named axes, progress, abort, Ctrl-C, lost lines, encryption, await."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import until
from counting_instrument import TOKENS
from model_instrument import CAMERA, FIELD_M, Model
from test_conformance import recording

import stemloop
from stemloop.core.errors import Aborted, InputError, InstrumentError, IntegrityError, LeaseError, NotAuthorised
from stemloop.core.instruction import Diffraction, Image, Line, Raster
from stemloop.core.protocols import Instrument
from stemloop.core.record import content_hash
from stemloop.core.signal import Signal
from stemloop.instrument.connection import find
from stemloop.instrument.replay import Replay
from stemloop.instrument.words import Draft

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scope(served):
    one = served(instrument=Model(), idle_exit_s=0.6)
    with stemloop.connect(one.directory, TOKENS["agent"], patience_s=10.0) as scope:
        yield scope


# ------------------------------------------------------------------------------------------------ words and axes


def test_an_image_comes_with_axes_units_and_where_it_is_from(served):
    one = served(instrument=Model(), idle_exit_s=0.6)
    with one.connect() as scope, scope.lease():
        image = scope.image(fov_nm=4, shape=(16, 32), dwell_us=2)
    assert isinstance(one.instrument, Instrument) and isinstance(image, Signal)
    assert image.data.shape == (16, 32) and [axis.name for axis in image.axes] == ["y", "x"]
    y, x = image.axes
    assert (y.unit, y.scale, x.scale) == ("nm", pytest.approx(0.125), pytest.approx(0.125))
    assert (y.offset, x.offset) == (pytest.approx(3.0), pytest.approx(3.0))  # 2 x 4 nm about the centre of 8 x 10 nm
    entries = [json.loads(line) for line in (one.directory / "audit.jsonl").read_text().splitlines()]
    audited = next(e for e in entries if e.get("id") == image.metadata["command_id"])
    assert image.metadata["sha256"] == audited["result"] == content_hash(image.data[None])
    assert image.metadata["epoch"] >= 1 and image.metadata["ended_s"] >= image.metadata["began_s"] > 1e9
    assert image.metadata["electrons_total"] == pytest.approx(512 * image.metadata["electrons"])
    assert image.metadata["state"]["C10_m"] == 0.0


def test_patterns_at_a_point_a_list_a_line_and_a_raster(scope):
    with scope.lease():
        point = scope.diffraction((4, 5), dwell_ms=0.1)
        several = scope.diffraction([(1, 1), (7, 9), (4, 5)], dwell_ms=0.1)
        line = scope.diffraction(line_nm=((1, 1), (1, 9), 5), dwell_ms=0.1)
        raster = scope.diffraction(fov_nm=(4, 6), shape=(2, 3), dwell_ms=0.1)
    assert [a.name for a in point.axes] == ["det_y", "det_x"] and point.metadata["position_nm"] == pytest.approx([4, 5])
    assert point.axes[0].unit == "mrad" and point.axes[0].values[0] == pytest.approx(-5.5)
    assert several.axes[0].name == "point" and several.metadata["positions_nm"][1] == pytest.approx([7, 9])
    assert (line.axes[0].name, line.axes[0].size) == ("distance", 5)
    assert line.axes[0].values == pytest.approx([0, 2, 4, 6, 8])
    assert [a.name for a in raster.axes] == ["scan_y", "scan_x", "det_y", "det_x"]
    assert raster.axes[0].values == pytest.approx([3, 5]) and raster.axes[1].values == pytest.approx([3, 5, 7])
    brightest = raster.data.reshape(6, -1).argmax(axis=1)  # the disc lies where the position is
    rows, columns = brightest // 12, brightest % 12
    assert rows.tolist() == pytest.approx([2 + 8 * y / 8 for y in (3, 3, 3, 5, 5, 5)], abs=1)
    assert columns.tolist() == pytest.approx([2 + 8 * x / 10 for x in (3, 5, 7) * 2], abs=1)


def test_spectra_have_an_energy_axis(served):
    one = served(instrument=Replay(recording(3)), idle_exit_s=0.6)
    with one.connect() as scope, scope.lease():
        cube = scope.spectrum(shape=(8, 8), dwell_ms=1)
        one_spectrum = scope.spectrum((0.25, 0.25), dwell_ms=1)
    assert [a.name for a in cube.axes] == ["y", "x", "energy_loss"] and cube.axes[2].unit == "eV"
    assert np.array_equal(cube.data, recording(3).data)
    assert np.array_equal(one_spectrum.data, cube.data[0, 0])


def test_controls_are_set_in_the_units_people_say(scope):
    with scope.lease():
        scope.optics(defocus_nm=50, C12_nm=(2, -3), current_pA=40)
        scope.stage(x_nm=100)
        scope.probe((2, 3))
        scope.blank()
        state = scope.report()
    assert state["C10_m"] == pytest.approx(-50e-9) and state["C12_m"] == pytest.approx([2e-9, -3e-9])
    assert state["current_A"] == pytest.approx(40e-12) and state["stage_x_m"] == pytest.approx(100e-9)
    assert (state["probe_y_m"], state["probe_x_m"]) == pytest.approx((2e-9, 3e-9)) and state["blanked"]


def test_words_become_instructions():
    draft = Draft(Model().info)
    assert draft.image() == Image((0.0, 0.0), FIELD_M, (256, 256), 1e-5)
    image = draft.image(2, (4, 8), 1, center_nm=(4, 5), rotation_deg=90, detector="BF")
    assert image.origin_m == pytest.approx((3.5e-9, 4e-9)) and image.extent_m == pytest.approx((1e-9, 2e-9))
    assert image.rotation_rad == pytest.approx(np.pi / 2) and image.detector == "BF"
    assert draft.image(2, 8, origin_nm=(1, 2)).origin_m == pytest.approx((1e-9, 2e-9))
    assert isinstance(draft.diffraction(shape=4).positions_m, Raster)
    assert draft.spectrum(line_nm=((0, 0), (0, 1), 3)).positions_m == Line((0.0, 0.0), (0.0, 1e-9), 3)
    assert draft.stage(alpha_deg=180).alpha_rad == pytest.approx(np.pi)
    assert draft.field(5, rotation_deg=0).extent_m == pytest.approx((5e-9, 5e-9))
    assert draft.detector("camera", binning=2, exposure_ms=5).binning == (2, 2)
    for wrong in (
        draft.diffraction,
        lambda: draft.diffraction((1, 1), shape=4),
        lambda: draft.diffraction([1, 2, 3]),
        lambda: draft.image(origin_nm=(0, 0), center_nm=(1, 1)),
        lambda: draft.probe(3),
    ):
        with pytest.raises(InputError):
            wrong()


def test_a_plan_is_costed_and_touches_nothing(scope):
    costs = scope.plan([scope.draft.image(4, 16, 2), scope.draft.diffraction((1, 99)), scope.draft.blank()])
    assert [cost.verdict for cost in costs] == ["ok", "limit", "ok"] and not costs.ok
    assert costs[0].electrons == pytest.approx(256 * 1e-10 * 2e-6 / 1.602e-19, rel=1e-3)
    assert "outside the field" in str(costs[1].refusal) and costs[0].refusal is None
    assert "in all" in repr(costs) and "<table>" in costs._repr_html_()
    assert scope.dose()["spent"] == 0


def test_big_scans_travel_by_reference_and_are_verified(served, monkeypatch):
    one = served(instrument=Model(), idle_exit_s=0.6)
    monkeypatch.setattr("stemloop.instrument.client.PIECE_BYTES", 3 * 12 * 12 * 4)  # three frames a piece
    with one.connect() as scope, scope.lease():
        inline = scope.diffraction(shape=(3, 5), dwell_ms=0.1, command_id="a")
        fetched = scope.diffraction(shape=(3, 5), dwell_ms=0.1, command_id="a", data="reference")
        assert np.array_equal(inline.data, fetched.data) and fetched.metadata["sha256"] == inline.metadata["sha256"]
        reference = scope.execute(scope.draft.diffraction(shape=(3, 5), dwell_ms=0.1), "a", "reference").calibration[
            "reference"
        ]
        assert scope.fetch(reference).shape == (15, *CAMERA.shape)
        with pytest.raises(IntegrityError, match="not those that were taken"):
            scope.fetch({**reference, "sha256": "0" * 64})
    assert len(one.instrument.exposures) == 1


# ------------------------------------------------------------------------------------------- long scans, lost things


def test_progress_is_told_and_a_scan_can_be_aborted_from_another_thread(served):
    one = served(instrument=Model(sleep_s=0.005), idle_exit_s=0.6)
    seen, error = [], []
    with one.connect() as scope, scope.lease():

        def scan():
            try:
                scope.diffraction(shape=(40, 40), dwell_ms=0.01, progress=lambda done, of: seen.append((done, of)))
            except Aborted as aborted:
                error.append(aborted)

        scanning = threading.Thread(target=scan)
        scanning.start()
        until(lambda: seen)
        scope.abort()
        scanning.join(20)
        assert seen[0][1] == 1600 and "of 1600 positions" in str(error[0])
        assert scope.state()["blanked"]
        assert scope.diffraction((4, 5), dwell_ms=0.01).data.shape == CAMERA.shape
        scope.abort()  # nothing runs: no harm
    assert scope.fencing is None


def test_a_progress_function_may_abort(served):
    one = served(instrument=Model(sleep_s=0.005), idle_exit_s=0.6)
    with one.connect() as scope, scope.lease():
        with pytest.raises(Aborted) as caught:
            scope.diffraction(shape=(40, 40), dwell_ms=0.01, progress=lambda done, of: scope.abort())
        assert caught.value.command_id
        assert scope.diffraction((4, 5), dwell_ms=0.01).data.shape == CAMERA.shape


def test_a_bar_is_drawn_when_asked(scope, capsys):
    with scope.lease():
        scope.diffraction(shape=(4, 4), dwell_ms=0.01, progress=True)
    assert "16/16" in capsys.readouterr().out


INTERRUPTED = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may begin with Ctrl-C ignored
import stemloop
scope = stemloop.connect(sys.argv[1], sys.argv[2], lease=True)
once = threading.Event()
def cut(done, of):
    if not once.is_set():
        once.set()
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    scope.diffraction(shape=(60, 60), dwell_ms=0.01, command_id="long", progress=cut)
except KeyboardInterrupt as error:
    print("interrupted:", error)
print("blanked:", scope.state()["blanked"])
print("goes on:", scope.diffraction((4, 5), dwell_ms=0.01).data.shape)
scope.close()
"""


def test_ctrl_c_ends_the_scan_on_the_server_and_blanks(served):
    one = served(instrument=Model(sleep_s=0.005), idle_exit_s=3.0)
    until((one.directory / "address.json").exists)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(one.directory), TOKENS["agent"]],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "interrupted: the command 'long' was interrupted: " in done.stdout and "of 3600 positions" in done.stdout
    assert "the beam is blanked" in done.stdout and "blanked: True" in done.stdout
    assert "goes on: (12, 12)" in done.stdout


def test_a_lost_lease_says_who_took_it(served):
    one = served(instrument=Model(sleep_s=0.01), idle_exit_s=0.6)
    with one.connect() as agent, one.connect("operator") as operator:
        agent.acquire()
        seen = []

        def take():
            until(lambda: seen)
            operator.acquire(takeover=True)
            operator.release()

        taking = threading.Thread(target=take)
        taking.start()
        with pytest.raises(LeaseError, match="operator"):
            agent.diffraction(shape=(60, 60), dwell_ms=0.01, progress=lambda done, of: seen.append(done))
        taking.join(20)
        with pytest.raises(LeaseError, match="operator"):
            agent.diffraction((4, 5), dwell_ms=0.01)
        assert agent.acquire() > 2
        agent.diffraction((4, 5), dwell_ms=0.01)


def test_a_server_that_does_not_come_back_leaves_an_error_that_says_what_is_known(tmp_path, spawn):
    process = spawn(sleep_s=30.0)
    scope = stemloop.connect(tmp_path / "server", role="agent", lease=True)
    scope._patience_s = 0.5
    killer = threading.Timer(1.0, lambda: process.send_signal(signal.SIGKILL))
    killer.start()
    with pytest.raises(InstrumentError, match="'begun' was sent and no answer came, so it may have been carried out"):
        scope.diffraction((1, 1), dwell_ms=1, command_id="begun")
    killer.join()
    with pytest.raises(InstrumentError, match="'later' was not sent, so nothing was exposed") as caught:
        scope.diffraction((1, 1), dwell_ms=1, command_id="later")
    assert caught.value.command_id == "later"
    scope.close()


def test_addresses():
    assert find("ws://a:1").url == "ws://a:1/control" == find("a:1").url
    assert find("wss://a.b:8443/").url == "wss://a.b:8443/control" == find("https://a.b:8443").url
    assert find("wss://[::1]:9").url == "wss://[::1]:9/control"
    assert find({"host": "h", "port": 5, "scheme": "wss", "fingerprint": "ab"}).fingerprint == "ab"
    for wrong in ("a", "ftp://a:1", "wss://a", ":1"):
        with pytest.raises(InputError, match="wss://host:port"):
            find(wrong)


# -------------------------------------------------------------------------------------------------------- encrypted


def test_an_encrypted_line_is_trusted_by_file_or_fingerprint_and_by_nothing_else(served, tmp_path):
    pytest.importorskip("cryptography", reason="certificates are made with cryptography")
    from stemloop.instrument.tls import fingerprint, self_signed

    certificate, key = self_signed(tmp_path / "mine")
    other, _ = self_signed(tmp_path / "other")
    one = served(instrument=Model(), idle_exit_s=1.5, tls=(certificate, key))
    until((one.directory / "address.json").exists)
    address = f"wss://localhost:{json.loads((one.directory / 'address.json').read_text())['port']}"
    token = TOKENS["agent"]
    for ca in (certificate, str(certificate), fingerprint(certificate), f"sha256:{fingerprint(certificate)}"):
        with stemloop.connect(address, token, ca=ca, patience_s=5.0) as scope:
            assert scope.who == "agent"
    with stemloop.connect(one.directory, token, patience_s=5.0) as scope:  # the folder knows the fingerprint
        assert scope.info.name == "model"
    for ca in (None, other, fingerprint(other)):
        with pytest.raises(NotAuthorised, match="Nothing was sent"):
            stemloop.connect(address, token, ca=ca, patience_s=5.0)
    with pytest.raises(InputError, match="neither a file"):
        stemloop.connect(address, token, ca="no such file", patience_s=5.0)


# ---------------------------------------------------------------------------------------------------------- awaited


def test_the_same_words_can_be_awaited(served):
    one = served(instrument=Model(), idle_exit_s=0.6)

    async def experiment():
        scope = await stemloop.aconnect(one.directory, TOKENS["agent"], patience_s=10.0)
        async with scope, scope.lease() as fencing:
            assert fencing == scope.fencing
            image = await scope.image(4, 16, 2)
            await scope.optics(defocus_nm=20)
            assert (await scope.report())["C10_m"] == pytest.approx(-20e-9)
            costs = await scope.plan([scope.draft.image(4, 16, 2)])
            return image, costs, await scope.dose()

    image, costs, dose = asyncio.run(experiment())
    assert image.data.shape == (16, 16) and costs.ok and dose["spent"] > 0


def test_a_task_that_is_cancelled_ends_its_scan(served):
    one = served(instrument=Model(sleep_s=0.005), idle_exit_s=0.6)

    async def experiment():
        scope = await stemloop.aconnect(one.directory, TOKENS["agent"], patience_s=10.0)
        async with scope, scope.lease():
            begun = asyncio.Event()
            loop = asyncio.get_running_loop()

            def progress(done, of):
                loop.call_soon_threadsafe(begun.set)

            task = asyncio.create_task(scope.diffraction(shape=(60, 60), dwell_ms=0.01, progress=progress))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await scope.state())["blanked"]
            assert one.instrument.exposures == []
            await scope.diffraction((4, 5), dwell_ms=0.01)

    asyncio.run(experiment())


def test_every_word_has_its_awaited_twin():
    from stemloop.instrument.aclient import AsyncClient
    from stemloop.instrument.client import Client

    def words(kind):
        return {name for name in dir(kind) if not name.startswith("_")}

    assert words(Client) <= words(AsyncClient)


def test_stemloop_itself_imports_nothing_heavy():
    code = "import sys, stemloop; sys.exit('websockets' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, check=True)
    assert stemloop.connect and stemloop.aconnect
    with pytest.raises(AttributeError):
        stemloop.nothing_of_the_kind


# ----------------------------------------------------------------------------------------------------------- signals


def test_a_signal_shows_itself():
    signal_ = recording(4)
    assert repr(signal_).startswith("<Signal of uint16 (y 8 from 0 to 3.5 nm, x 8")
    assert "data:image/png" in signal_._repr_html_()
    assert np.asarray(signal_).shape == (8, 8, 8, 8) and np.sum(signal_) == signal_.data.sum()


def test_a_signal_goes_to_other_libraries():
    xarray = pytest.importorskip("xarray")
    signal_ = recording(3)
    array = signal_.to_xarray()
    assert isinstance(array, xarray.DataArray) and array.dims == ("y", "x", "energy_loss")
    assert array.coords["y"].values == pytest.approx(signal_.axes[0].values)
    assert array.coords["y"].attrs["units"] == "nm"


def test_a_signal_goes_to_hyperspy():
    pytest.importorskip("hyperspy")
    assert recording(3).to_hyperspy().axes_manager.signal_dimension == 1
    found = recording(4).to_hyperspy()
    assert found.axes_manager.signal_dimension == 2 and found.axes_manager["x"].units == "nm"


@pytest.mark.parametrize("shape", [(3,), (300, 7), (2, 600, 600), (1, 1)])
def test_any_array_has_a_picture(shape):
    from stemloop.core.picture import picture

    assert picture(np.random.default_rng(0).random(shape)).startswith(("<img", "<svg"))
    assert picture(np.full(shape, np.nan)) and picture(np.zeros((0, 3))) == ""


def test_raw_instructions_are_still_executed(scope):
    with scope.lease():
        assert scope.execute(Diffraction(((1e-9, 1e-9),), 1e-4), "raw").frames.shape == (1, *CAMERA.shape)
