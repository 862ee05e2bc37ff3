"""``stemloop instrument plan`` and ``schema``: what they print and how they leave."""

import json
import threading

import jsonschema
import numpy as np
import pytest

from stemloop.cli import main
from stemloop.core.instruction import Diffraction, to_dict
from stemloop.core.signal import Axis, Signal

LIMITS = """
field_m: [10e-9, 10e-9]
electrons_max: 1e8
controls:
  C10_m: {range: [-1e-7, 1e-7], step: 2e-8}
region: {cell_m: 1e-9, e_per_A2_max: 1e5, probe_area_m2: 1e-18}
"""
PLAN = """
state: {current_A: 1e-11, C10_m: 0}
steps:
  - {kind: optics, C10_m: 1e-8}
  - kind: diffraction
    positions_m: {path: raster, origin_m: [0, 0], extent_m: [4e-9, 4e-9], shape: [4, 4]}
    dwell_s: 1e-3
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "limits.yaml").write_text(LIMITS)
    (tmp_path / "plan.yaml").write_text(PLAN)
    return tmp_path


def run(*words):
    return main(["instrument", *map(str, words)])


def test_a_plan_within_the_limits_is_listed_with_its_costs(files, capsys):
    assert run("plan", files / "plan.yaml", "--limits", files / "limits.yaml") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1].startswith("in all") and lines[-1].endswith("ok")
    # 16 places of 1 ms at 10 pA: 998,642 electrons, 624 e/A^2 on 1 nm^2 each
    assert "9.986e+05" in lines[2] and "624.2" in lines[2] and "0.016" in lines[2]


def test_a_plan_that_would_be_refused_says_where_and_leaves_with_2(files, capsys):
    (files / "plan.yaml").write_text(PLAN + "  - {kind: optics, C10_m: 9e-8}\n")
    assert run("plan", files / "plan.yaml", "--limits", files / "limits.yaml", "--json") == 2
    report = json.loads(capsys.readouterr().out)
    assert [step["verdict"] for step in report["steps"]] == ["ok", "ok", "limit"]
    assert report["verdict"] == "limit" and "step of 8e-08 m" in report["steps"][2]["message"]
    assert run("plan", files / "plan.yaml", "--limits", files / "limits.yaml") == 2
    assert "1 refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, why",
    [
        ("{}", "steps"),
        ("[{kind: jump}]", "step 1"),
        ("- {kind: blank}\n- {kind: probe}", "step 2"),
        ("steps: [", "YAML"),
        ("state: 3\nsteps: []", "state"),
    ],
)
def test_a_plan_that_cannot_be_read_says_why(files, capsys, text, why):
    (files / "plan.yaml").write_text(text)
    assert run("plan", files / "plan.yaml", "--limits", files / "limits.yaml") == 2
    assert why in capsys.readouterr().err


def test_a_plan_needs_limits_from_somewhere(files, capsys):
    assert run("plan", files / "plan.yaml") == 2
    assert "--limits" in capsys.readouterr().err
    assert run("plan", files / "nowhere.yaml", "--limits", files / "limits.yaml") == 2
    assert run("plan", files / "plan.yaml", "--limits", files / "nowhere.yaml") == 2


def test_a_plan_is_checked_at_a_server_with_its_own_limits_or_others(files, capsys):
    from stemloop.instrument.limits import Limits
    from stemloop.instrument.replay import Replay
    from stemloop.instrument.server import serve

    axes = [Axis(name, 4, 1.0, 0.5, "nm") for name in "yx"] + [Axis(name, 8, 1.0, 0.0, "mrad") for name in "yx"]
    recording = Replay(Signal(np.ones((4, 4, 8, 8), np.uint16), tuple(axes)), energy_eV=8e4)
    own = Limits.from_dict({"field_m": [4e-9, 4e-9], "dwell_max_s": 1e-4})
    folder = files / "scope"
    thread = threading.Thread(
        target=serve, args=(recording, folder), kwargs={"limits": own, "idle_exit_s": 1.0}, daemon=True
    )
    thread.start()
    (files / "plan.json").write_text(json.dumps([to_dict(Diffraction(((5e-10, 5e-10),), 1e-3))]))
    deadline = threading.Event()
    for _ in range(200):
        if (folder / "address.json").exists():
            break
        deadline.wait(0.05)
    assert run("plan", files / "plan.json", "--address", folder, "--json") == 2
    assert "dwell" in json.loads(capsys.readouterr().out)["steps"][0]["message"]
    assert run("plan", files / "plan.json", "--address", folder, "--limits", files / "limits.yaml") == 0
    assert recording.state()["exposures"] == 0
    thread.join(30)
    assert not thread.is_alive()


def test_the_schema_and_the_messages_are_printed(capsys):
    assert run("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(schema).validate({"kind": "blank", "version": 2, "blanked": True})
    assert run("schema", "--asyncapi") == 0
    assert json.loads(capsys.readouterr().out)["asyncapi"] == "3.0.0"
