"""A RunEngine runs the adaptive loop, headless, and what it emits is what the run folder holds."""

import json
from pathlib import Path

import numpy as np
import pytest

from campaign.recording import titanium_map, write_recording
from campaign.test_run import exposed_positions
from stemloop.campaign import run
from stemloop.campaign.settings import Settings
from stemloop.core.errors import InputError

pytest.importorskip("bluesky", reason="bluesky is not installed (the extra bluesky)")
event_model = pytest.importorskip("event_model")

from bluesky import RunEngine
from bluesky.preprocessors import plan_mutator
from bluesky.utils import Msg, RunEngineInterrupted, ensure_generator

from stemloop.campaign.plans import adaptive_plan, adaptive_scan, counts

pytestmark = pytest.mark.timeout(150)
SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def engine():
    return RunEngine({}, context_managers=[], call_returns_result=True)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write_recording(tmp_path_factory.mktemp("plans") / "ti.hspy", (6, 5))


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SRC))  # of the instrument's process


class Heard(list):
    __hash__ = object.__hash__

    def __call__(self, name, doc):
        self.append((name, doc))

    def of(self, kind):
        return [doc for name, doc in self if name == kind]

    def stream(self, name):
        known = {doc["uid"] for doc in self.of("descriptor") if doc["name"] == name}
        return [doc["data"] for doc in self.of("event") if doc["descriptor"] in known]


def settings(recording, **more):
    options = {"max_points": 20, "initial": 8, "batch": 4, "target_sigma": 1e-9, **more}
    return Settings("eels-map", f"replay:{recording}", None, **options)


def paused_after(plan, triggers):
    """The plan, paused at once when its ``triggers``-th trigger is under way."""
    count = iter(range(1, 10**6))

    def pause(message):
        if message.command == "trigger" and next(count) == triggers:
            return None, ensure_generator([Msg("pause", None, defer=False)])
        return None, None

    return plan_mutator(plan, pause)


@pytest.mark.parametrize("pause", [None, 1, 3])
def test_a_run_engine_runs_a_recipe(engine, recording, tmp_path, pause):
    """With and without a pause at once in the middle of a step: the same positions, none twice, valid documents."""
    heard, folder = Heard(), tmp_path / "run"
    plan = adaptive_plan(run.start(settings(recording), folder), {"operator": "test"})
    if pause is None:
        done = engine(plan, heard)
    else:
        with pytest.raises(RunEngineInterrupted):
            engine(paused_after(plan, pause), heard)
        done = engine.resume()
    for name, doc in heard:
        event_model.schema_validators[event_model.DocumentNames[name]].validate(doc)
    summary = json.loads((folder / "summary.json").read_text())
    assert done.plan_result is None or done.plan_result["points"] == 20
    assert done.exit_status == "success" and summary["stop_reason"] == "points"
    assert heard.of("stop")[0]["reason"] == "points" and heard.of("start")[0]["operator"] == "test"
    result, events = np.load(folder / "result.npz"), heard.stream("primary")
    assert np.allclose([(e["y"], e["x"]) for e in events], result["points_m"])
    assert np.allclose([e["value"] for e in events], result["values"])
    places = exposed_positions(folder)
    assert len(places) == len(set(places)) == 20
    assert [d["points"] for d in heard.stream("decision")] == [0, 8, 12, 16, 20]
    assert heard.stream("decision")[-1]["stop"] == "points"


def test_an_aborted_plan_leaves_a_run_that_resumes(engine, recording, tmp_path):
    heard, folder = Heard(), tmp_path / "run"
    with pytest.raises(RunEngineInterrupted):
        engine(paused_after(adaptive_plan(run.start(settings(recording), folder)), 3), heard)
    engine.abort()
    assert heard.of("stop")[0]["exit_status"] == "abort"
    assert not (folder / "summary.json").exists()
    known = exposed_positions(folder)
    again = Heard()
    engine(adaptive_plan(run.resume(folder)), again)
    places = exposed_positions(folder)
    assert places[: len(known)] == known and len(places) == len(set(places)) == 20
    assert len(again.stream("primary")) == 20  # those of the first life are told again, and not exposed


class Axis:
    """An axis of another facility."""

    parent, hints = None, {}

    def __init__(self, name):
        self.name, self.where = name, 0.0

    def set(self, value):
        from concurrent.futures import Future

        from stemloop.instrument.gateways.bluesky import Deed

        self.where, done = value, Future()
        done.set_result(None)
        return Deed(done)

    def read(self):
        return {self.name: {"value": self.where, "timestamp": 0.0}}

    def describe(self):
        return {self.name: {"source": "test", "dtype": "number", "shape": []}}

    def read_configuration(self):
        return {}

    describe_configuration = read_configuration


class Counter(Axis):
    """Counts on a smooth map at the place of two axes."""

    def __init__(self, y, x, seed=0):
        super().__init__("counter_sum")
        self._y, self._x, self._rng = y, x, np.random.default_rng(seed)

    def trigger(self):
        mean = 1e4 * density(self._y.where, self._x.where)
        return self.set(float(self._rng.poisson(mean)))


def density(y, x):
    return 1.0 + 2.0 * np.exp(-2 * ((y - 0.2) ** 2 + (x + 0.3) ** 2))


def test_the_decision_alone_drives_any_devices(engine):
    """The map is known to the wanted deviation with a fraction of the raster, and it is right."""
    y, x = Axis("fine_y"), Axis("fine_x")
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 12), np.linspace(-1, 1, 10), indexing="ij"), -1).reshape(-1, 2)
    heard = Heard()
    plan = adaptive_scan([Counter(y, x)], y, x, grid, counts("counter_sum"), target_sigma=600.0, points=100)
    done = engine(plan, heard).plan_result
    assert done["stop"] == "uncertainty" and len(done["index"]) < 60
    assert len(set(done["index"])) == len(done["index"]) == len(heard.stream("primary"))
    truth = 1e4 * titanium_map((12, 10)).ravel()
    assert np.allclose(truth, 1e4 * density(*grid.T))
    assert np.sqrt(np.mean((done["mean"] - truth) ** 2)) < 600.0
    assert np.mean(np.abs(done["mean"] - truth) < 2 * done["sigma"]) > 0.9


def test_an_adaptive_scan_ends_with_its_points_or_its_places(engine):
    y, x = Axis("y"), Axis("x")
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 4), indexing="ij"), -1).reshape(-1, 2)
    for points, reason, n in ((15, "points", 15), (100, "all-measured", 20)):
        plan = adaptive_scan([Counter(y, x)], y, x, grid, counts("counter_sum"), target_sigma=1e-6, points=points)
        done = engine(plan).plan_result
        assert (done["stop"], len(done["index"])) == (reason, n)
    with pytest.raises(InputError):
        engine(adaptive_scan([], y, x, grid[:3], counts("a"), target_sigma=1.0, points=5))
