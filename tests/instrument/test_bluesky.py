"""A real RunEngine scans the twin, headless, and a pause exposes nothing twice."""

import itertools

import numpy as np
import pytest
from conftest import until
from served_twin import TOKENS, served_twin

from stemloop.core.errors import InputError, LimitError
from stemloop.core.instruction import Diffraction, Image
from stemloop.instrument.client import connect

pytest.importorskip("bluesky", reason="bluesky is not installed (the extra bluesky)")
event_model = pytest.importorskip("event_model")

from bluesky import RunEngine, protocols
from bluesky import plan_stubs as bps
from bluesky import plans as bp
from bluesky.preprocessors import plan_mutator
from bluesky.utils import FailedStatus, Msg, RunEngineInterrupted, ensure_generator

from stemloop.instrument.gateways.bluesky import Bench

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    with served_twin(tmp_path_factory.mktemp("bluesky") / "server") as served:
        connection = connect(served.folder, TOKENS["viewer"], "viewer")
        yield served
        connection.close()


@pytest.fixture(scope="module")
def engine():
    return RunEngine({}, context_managers=[])


@pytest.fixture
def bench(twin, engine):
    with connect(twin.folder, TOKENS["agent"], lease=True) as scope:
        made = Bench(scope)
        made.haadf.configure(shape=(8, 8), extent_m=(2e-9, 2e-9), dwell_s=1e-6)
        made.cbed.configure(dwell_s=1e-4)
        hook, engine.msg_hook = engine.msg_hook, None
        made.attach(engine)
        yield made
        engine.msg_hook = hook


class Heard(list):
    __hash__ = object.__hash__  # a RunEngine keeps its listeners in a set

    def __call__(self, name, doc):
        self.append((name, doc))

    def of(self, kind):
        return [doc for name, doc in self if name == kind]


def exposures(twin, kind=Diffraction):
    return [asked for asked in twin.instrument.exposures if isinstance(asked, kind)]


def test_a_grid_scan_gives_a_pattern_a_position(bench, engine, twin):
    heard, before = Heard(), len(exposures(twin))
    engine(bp.grid_scan([bench.cbed], bench.probe_y, 1e-9, 3e-9, 3, bench.probe_x, 2e-9, 3e-9, 2), heard)
    for name, doc in heard:
        event_model.schema_validators[event_model.DocumentNames[name]].validate(doc)
    events = [e["data"] for e in heard.of("event")]
    wanted = [(y, x) for y in (1e-9, 2e-9, 3e-9) for x in (2e-9, 3e-9)]
    assert np.allclose([(e["probe_y"], e["probe_x"]) for e in events], wanted, atol=1e-15)
    taken = exposures(twin)[before:]
    assert np.allclose([asked.positions_m[0] for asked in taken], wanted, atol=1e-15)
    assert all(e["cbed"].shape == (64, 64) and e["cbed_sum"] == e["cbed"].sum() for e in events)
    assert heard.of("start")[0]["uid"] in events[0]["cbed_command"]


def test_a_scan_of_the_defocus_and_a_count(bench, engine, twin):
    heard, before = Heard(), len(exposures(twin, Image))
    engine(bp.scan([bench.haadf], bench.C10, -1e-8, 1e-8, 3), heard)
    assert np.allclose([e["data"]["C10"] for e in heard.of("event")], [-1e-8, 0, 1e-8])
    engine(bps.mv(bench.C10, 0.0, bench.stage_x, 1e-10))
    assert bench.stage_x.position == pytest.approx(1e-10)
    engine(bp.count([bench.haadf, bench.cbed], 2), heard)
    assert len(exposures(twin, Image)) - before == 5
    assert all(e["data"]["haadf"].shape == (8, 8) for e in heard.of("event"))
    configuration = heard.of("descriptor")[-1]["configuration"]["haadf"]["data"]
    assert configuration["haadf_shape"] == [8, 8] and configuration["haadf_dwell_s"] == 1e-6
    engine(bps.mv(bench.stage_x, 0.0))


def test_a_raster_flies_in_one_command(bench, engine, twin):
    heard, before = Heard(), len(exposures(twin))
    bench.cbed_raster.dwell_s = 1e-4
    bench.cbed_raster.raster = type(bench.cbed_raster.raster)((1e-9, 1e-9), (4e-9, 4e-9), (2, 2))
    engine(bp.fly([bench.cbed_raster]), heard)
    assert len(exposures(twin)) == before + 1
    data = [e["data"] for e in heard.of("event")] or [
        {k: v[i] for k, v in page["data"].items()} for page in heard.of("event_page") for i in range(len(page["time"]))
    ]
    places = [(d["cbed_raster_y"], d["cbed_raster_x"]) for d in data]
    assert np.allclose(places, [(2e-9, 2e-9), (2e-9, 4e-9), (4e-9, 2e-9), (4e-9, 4e-9)])


def test_without_frames_an_event_says_where_they_are(twin, engine):
    with connect(twin.folder, TOKENS["agent"], lease=True) as scope:
        bench, heard = Bench(scope, frames=False), Heard()
        bench.cbed.configure(dwell_s=1e-4)
        engine(bp.count([bench.cbed]), heard)
        (event,) = heard.of("event")
        assert "cbed" not in event["data"]
        asked = exposures(twin)[-1]
        frame = scope.execute(asked, event["data"]["cbed_command"]).frames[0]  # answered from the spool
        assert frame.sum() == event["data"]["cbed_sum"]
        assert exposures(twin)[-1] is asked


def test_the_servers_limits_end_a_plan(bench, engine, twin):
    before, heard = len(twin.instrument.exposures), Heard()
    for plan in (bp.scan([bench.cbed], bench.probe_x, 0, 1.0, 2), bps.mv(bench.stage_x, 1e-3)):
        with pytest.raises(FailedStatus) as caught:
            engine(plan, heard)
        assert isinstance(caught.value.__cause__, LimitError)
    assert heard.of("stop")[-1]["exit_status"] == "fail"
    assert len(twin.instrument.exposures) <= before + 1  # the first of the scan's two points was inside


def paused(engine, plan, after, heard):
    """Run a plan that is paused at once, right after its ``after``-th trigger was begun; then resume it."""
    count = itertools.count(1)

    def pause_after(message):
        if message.command == "trigger" and next(count) == after:
            return None, ensure_generator([Msg("pause", None, defer=False)])
        return None, None

    with pytest.raises(RunEngineInterrupted):
        engine(plan_mutator(plan, pause_after), heard)
    yield
    engine.resume()


def plan_without_checkpoints(bench, n):
    yield from bps.open_run()
    yield from bps.checkpoint()
    for i in range(n):
        yield from bps.abs_set(bench.probe_x, (1 + i) * 1e-9, wait=True)
        yield from bps.trigger(bench.cbed, wait=True)
        yield from bps.create()
        yield from bps.read(bench.cbed)
        yield from bps.read(bench.probe_x)
        yield from bps.save()
    yield from bps.close_run()


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("plan", ["scan", "one checkpoint"])
def test_a_pause_at_once_exposes_nothing_twice(bench, engine, twin, plan, attached):
    """A RunEngine goes back to its checkpoint and says the triggers since then again. Attached, none exposes again;
    without, the same plan shows that the test would see it."""
    if not attached:
        engine.msg_hook = lambda message: None
    heard, before = Heard(), len(exposures(twin))
    n = 6
    made = bp.scan([bench.cbed], bench.probe_x, 1e-9, 6e-9, n) if plan == "scan" else plan_without_checkpoints(bench, n)
    for _ in paused(engine, made, 4, heard):
        pass
    taken = exposures(twin)[before:]
    if attached:
        assert len(taken) == n
        assert np.allclose([asked.positions_m[0][1] for asked in taken], np.arange(1, n + 1) * 1e-9)
    else:
        assert len(taken) > n
    last = {e["seq_num"]: e["data"] for e in heard.of("event")}  # a rewind says some numbers again
    assert sorted(last) == list(range(1, n + 1))
    assert np.allclose([last[i]["probe_x"] for i in sorted(last)], np.arange(1, n + 1) * 1e-9)
    assert heard.of("stop")[-1]["exit_status"] == "success"


def test_what_was_refocused_in_the_pause_is_exposed_again(bench, engine, twin):
    """An old frame under a new defocus would be a lie."""
    heard, before = Heard(), len(exposures(twin))
    for _ in paused(engine, plan_without_checkpoints(bench, 4), 3, heard):
        bench.C10.set(5e-9).exception(10)
    assert len(exposures(twin)) - before == 4 + 3
    assert [e["seq_num"] for e in heard.of("event")][-1] == 4
    engine(bps.mv(bench.C10, 0.0))


def test_two_runs_never_share_a_command(bench, engine):
    heard = Heard()
    for _ in range(2):
        engine(bp.count([bench.cbed], 2), heard)
    ids = [e["data"]["cbed_command"] for e in heard.of("event")]
    assert len(set(ids)) == 4


def test_the_devices_keep_the_protocols(bench):
    for name in ("probe_y", "probe_x", "stage_x", "stage_alpha", "C10", "semiangle", "current"):
        device = getattr(bench, name)
        assert isinstance(device, protocols.Movable) and isinstance(device, protocols.Readable), name
        assert isinstance(device, protocols.Locatable)
    for name in ("haadf", "cbed"):
        device = getattr(bench, name)
        assert isinstance(device, protocols.Triggerable) and isinstance(device, protocols.Readable)
    assert isinstance(bench.cbed_raster, protocols.Flyable)
    assert isinstance(bench.probe_y.set(1e-9), protocols.Status)
    with pytest.raises(AttributeError, match="probe_x"):
        bench.monochromator


def test_nonsense_is_an_input_error(bench):
    with pytest.raises(InputError):
        bench.cbed.configure(positions_m=((0.0, 0.0),))
    with pytest.raises(InputError):
        bench.cbed.configure(gain=2)
    with pytest.raises(InputError):
        bench.haadf.configure(dwell_s=-1.0)
    with pytest.raises(InputError):
        Bench(bench.scope).cbed.read()
    deed = bench.probe_x.set(float("nan"))
    until(lambda: deed.done)
    assert not deed.success and isinstance(deed.exception(), InputError)
