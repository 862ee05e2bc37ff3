"""The commands of a facility: serve an instrument by hand, forecast and check it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import until
from model_instrument import LiveView, Model

import stemloop
from stemloop import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("STEMLOOP_TOKEN", raising=False)


def check(one, capsys, *words):
    until((one.directory / "local.json").exists)
    status = cli.main(["instrument", "check", str(one.directory), "--yes", *words])
    said = capsys.readouterr()
    return status, json.loads(said.out), said.err


def test_a_lawful_instrument_leaves_with_0(served, capsys):
    one = served(instrument=Model(), tokens=None, idle_exit_s=0.6)
    status, report, said = check(one, capsys, "--moves", "12")
    assert status == 0 and report["ok"]
    assert report["moves"] == 12 and report["stale_frames"] == 0 and report["breaches"] == []
    assert {"C10_m", "C12_m", "stage_x_m", "probe"} <= set(report["round_trips"]["equal"])
    assert set(report["latency_ms"]["report"]) == {"count", "median", "p99"}
    assert report["commands"]["diffraction"] > 12 and report["electrons"] > 0 and report["beam"] == "blanked"
    assert "moves of the beam" in said and "It takes at most" in said


def test_limits_that_name_few_controls_fail_no_check(served, capsys):
    """A facility begins with little: what may not be changed is left out, and is refused when it is asked."""
    limits = {"field_m": [8e-9, 10e-9], "controls": {"C10_m": [-1e-7, 1e-7], "stage_x_m": [-1e-6, 1e-6]}}
    one = served(instrument=Model(), tokens=None, idle_exit_s=0.6, limits=limits)
    status, report, _ = check(one, capsys, "--moves", "12")
    assert status == 0 and report["ok"], {n: c for n, c in report["checks"].items() if not c["ok"]}
    assert {"C12_m", "stage_y_m"} <= set(report["round_trips"]["left_out"])


def test_a_live_view_leaves_with_1(served, capsys):
    one = served(instrument=LiveView(), tokens=None, idle_exit_s=0.6)
    status, report, _ = check(one, capsys, "--moves", "12")
    assert status == 1 and report["stale_frames"] >= 12 and not report["checks"]["stale frames"]["ok"]


def test_a_forecast_touches_nothing_and_bounds_the_cost(served, capsys):
    one = served(instrument=Model(), tokens=None, idle_exit_s=1.5)
    status, ahead, _ = check(one, capsys, "--forecast", "--moves", "12", "--max-electrons", "1e5")
    assert status == 0 and one.instrument.exposures == []
    assert ahead["electrons_in_a_frame_at_most"] == 1e5 and ahead["exposes"] == ["diffraction", "image"]
    _, report, _ = check(one, capsys, "--moves", "12", "--max-electrons", "1e5")
    assert 0 < report["electrons"] <= ahead["electrons_at_most"]


def test_an_instrument_served_by_hand_is_told_its_address_and_ends_with_ctrl_c(tmp_path):
    np.save(tmp_path / "image.npy", np.random.default_rng(0).poisson(50.0, (64, 64)).astype(np.float32))
    (tmp_path / "limits.yaml").write_text("field_m: [64e-9, 64e-9]\ndwell_max_s: 0.01\n")
    words = ["serve", f"replay:{tmp_path / 'image.npy'}", "--dir", tmp_path / "memory"]
    words += ["--limits", tmp_path / "limits.yaml", "--max-dose", "1e9"]
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from stemloop import cli; "
    process = subprocess.Popen(
        [sys.executable, "-c", code + "sys.exit(cli.main(['instrument', *sys.argv[1:]]))", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("replay: ws://127.0.0.1:") and "Ctrl-C ends it" in line
        with stemloop.connect(tmp_path / "memory", patience_s=20.0) as scope:
            assert scope.limits["dwell_max_s"] == 0.01 and scope.dose()["budget"] == 1e9
            with scope.lease():
                assert scope.image(shape=64, dwell_us=1).data.shape == (64, 64)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert not (tmp_path / "truth").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["serve", "microscope"], "unknown instrument"),
        (["serve", "twin", "--tls-cert", "a.pem"], "together"),
        (["check", "nowhere"], "no such directory"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["instrument", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_small_set_for_a_microscope_pc_is_part_of_what_stemloop_needs():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {*project["dependencies"], *project["optional-dependencies"]["server"]}
    lines = (ROOT / "constraints" / "microscope-pc.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} <= known
