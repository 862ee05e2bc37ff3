"""The guard over the declared limits: doses by place outlive a restart, an aborted exposure counts what was exposed,
a beam that rests is blanked, and a plan is refused where its steps would be."""

import numpy as np
import pytest

from stemloop.core import units
from stemloop.core.errors import Aborted, DoseError, InstrumentError, LimitError, OutcomeUnknown
from stemloop.core.instruction import Blank, Diffraction, Image, Line, Optics, Probe, Raster, Report, Stage, to_dict
from stemloop.core.signal import Axis, Signal
from stemloop.instrument.audit import Audit
from stemloop.instrument.dose import DoseLedger
from stemloop.instrument.guard import Command, Guard
from stemloop.instrument.lease import LeaseDesk
from stemloop.instrument.limits import Limits
from stemloop.instrument.plan import check_plan
from stemloop.instrument.replay import Replay
from stemloop.instrument.spool import Spool
from stemloop.instrument.tokens import Identity

WHO = Identity("agent", "agent")
LIMITS = Limits.from_dict(
    {
        "field_m": [1e-8, 1e-8],
        "unblank": True,
        "parked_max_s": 0.025,
        "electrons_max": 1e9,
        "region": {"cell_m": 1e-9, "e_per_A2_max": 1.6e4, "probe_area_m2": 1e-18},
    }
)
CELL = units.electrons(1e-11, 1e-3)  # electrons of a dwell of 1 ms: 62,415
LINE = Diffraction(Line((0.5e-9, 0.5e-9), (0.5e-9, 9.5e-9), 10), 1e-3)


def recording():
    rng = np.random.default_rng(0)
    nm = [Axis(name, 10, 1.0, 0.5, "nm") for name in ("y", "x")]
    det = [Axis(name, 8, 1.0, 0.0, "mrad") for name in ("qy", "qx")]
    counts = rng.integers(0, 9, (10, 10, 8, 8)).astype(np.uint16)
    return Replay(Signal(counts, (*nm, *det)), energy_eV=8e4)


class Bench:
    """A guard on a folder, with the lease."""

    def __init__(self, folder, limits=LIMITS, instrument=None):
        self.instrument = instrument or recording()
        self.spool, self.audit = Spool(folder / "spool.log"), Audit(folder / "audit.jsonl")
        desk = LeaseDesk(self.spool.fencing, self.spool.lease)
        self.guard = Guard(self.instrument, self.spool, self.audit, desk, limits)
        self.lease = desk.acquire(WHO)
        self.guard.blank("the test begins")

    def do(self, asked, name):
        return self.guard.execute(Command(WHO, self.lease.lease_id, self.lease.fencing, name, to_dict(asked)))

    def close(self):
        self.spool.close()
        self.audit.close()


@pytest.fixture
def bench(tmp_path):
    opened = []

    def start(**options):
        for one in opened:
            one.close()
        opened[:] = [Bench(tmp_path, **options)]
        return opened[0]

    yield start
    for one in opened:
        one.close()


def cells(guard):
    return {key: tile.tolist() for key, tile in guard.ledger.committed._tiles.items()}


def test_doses_by_place_outlive_a_restart(bench):
    first = bench()
    first.do(LINE, "a")
    first.do(Diffraction(((0.5e-9, 0.5e-9),), 1e-3), "b")
    before, spent = cells(first.guard), first.guard.ledger.spent
    assert first.guard.ledger.committed.total == spent
    again = bench()
    assert cells(again.guard) == before
    assert again.guard.ledger.committed.total == again.guard.ledger.spent == spent
    with pytest.raises(DoseError, match="had 1248 already"):  # 2 x 62,415 electrons on 100 A^2
        again.do(Diffraction(((0.5e-9, 0.5e-9),), 25e-3), "c")
    again.do(Diffraction(((5.5e-9, 0.5e-9),), 25e-3), "d")


def test_an_aborted_exposure_is_charged_for_what_was_exposed_and_where(bench):
    one = bench()
    one.instrument.progress = lambda done, of: one.instrument.abort() if done == 4 else None
    with pytest.raises(Aborted, match="4 of 10"):
        one.do(LINE, "a")
    with pytest.raises(Aborted, match="4 of 10"):
        one.do(LINE, "a")  # the first answer, and no exposure
    assert one.guard.ledger.spent == np.ceil(4 * CELL)
    assert one.guard.ledger.reserved == 0
    exposed = one.guard.ledger.committed.at(np.array([[0, i] for i in range(10)]))
    np.testing.assert_allclose(exposed, [CELL] * 4 + [0] * 6, atol=1)
    before = cells(one.guard)
    assert cells(bench().guard) == before


def test_a_beam_that_is_left_open_is_charged_and_blanked_in_time(bench, monkeypatch):
    one = bench()
    now = [0.0]
    monkeypatch.setattr("stemloop.instrument.guard.time.monotonic", lambda: now[0])
    one.do(Probe((2.5e-9, 2.5e-9)), "p")
    assert one.guard.ledger.spent == 0  # the beam is closed
    one.do(Blank(False), "open")
    charge = np.ceil(units.electrons(1e-11, 0.025))
    assert one.guard.ledger.spent == charge == one.guard.ledger.committed.at(np.array([[2, 2]]))[0]
    for now[0] in (0.005, 0.015, 0.024):
        one.guard.unpark()
        assert not one.instrument.state()["blanked"]
    now[0] = 0.026
    one.guard.unpark()
    assert one.instrument.state()["blanked"]
    assert cells(bench().guard) == cells(one.guard)


def test_an_opening_whose_end_was_never_seen_is_charged_after_the_restart(bench):
    one = bench()
    one.spool.intent("open", to_dict(Blank(False)), 1, 1000, "agent")
    again = bench()
    assert again.guard.ledger.spent == again.guard.ledger.committed.total == 1000
    with pytest.raises(OutcomeUnknown):
        again.do(Blank(False), "open")


def test_an_instrument_that_fails_to_open_the_beam_is_charged_for_it(bench, monkeypatch):
    one = bench()

    def fail(instruction):
        raise RuntimeError("the blanker is stuck")

    monkeypatch.setattr(one.instrument, "_execute", fail)
    with pytest.raises(InstrumentError, match="stuck"):
        one.do(Blank(False), "open")
    assert one.guard.ledger.spent == np.ceil(units.electrons(1e-11, 0.025))
    assert bench().guard.ledger.spent == one.guard.ledger.spent


def test_what_was_exposed_under_version_1_is_answered_and_counted(bench):
    """A folder that an older server left: its ids answer their first results, its doses are on the map."""
    one = bench()
    asked = Diffraction(((0.5e-9, 0.5e-9),), 1e-3)
    old = {**to_dict(asked), "version": 1}
    kept = one.instrument.execute(asked, "old")
    one.spool.result("old", old, int(np.ceil(CELL)), exposure=kept)
    again = bench()
    assert again.guard.ledger.committed.at(np.array([[0, 0]]))[0] == again.guard.ledger.spent == np.ceil(CELL)
    before = again.instrument.state()["exposures"]
    np.testing.assert_array_equal(again.do(asked, "old")["frames"], kept.frames)
    assert again.instrument.state()["exposures"] == before


def test_steps_and_rates_hold_over_commands(tmp_path):
    class Stageful(Replay):
        """A recording with a stage that only remembers."""

        def _execute(self, instruction):
            if isinstance(instruction, Stage):
                self._state["stage_x_m"] = instruction.x_m
                return super()._execute(Report())
            return super()._execute(instruction)

    instrument = Stageful(recording()._signal, energy_eV=8e4)
    instrument._info = type(instrument._info)(
        **{**vars(instrument._info), "instructions": (*instrument._info.instructions, "stage")}
    )
    instrument._state["stage_x_m"] = 0.0
    limits = Limits.from_dict(
        {"field_m": [1e-8, 1e-8], "controls": {"stage_x_m": {"range": [-1, 1], "step": 1e-6, "rate_per_s": 1e-9}}}
    )
    one = Bench(tmp_path, limits, instrument)
    one.do(Stage(x_m=9e-7), "a")
    with pytest.raises(LimitError, match="faster"):
        one.do(Stage(x_m=0.0), "b")
    with pytest.raises(LimitError, match="step"):
        one.do(Stage(x_m=2e-6), "c")
    one.close()


PLAN = [
    LINE,
    Image((0.0, 0.0), (1e-8, 1e-8), (10, 10), 1e-3),
    Optics(C10_m=1e-9),
    Diffraction(((0.5e-9, 0.5e-9),), 10e-3),
    Diffraction(((0.5e-9, 0.5e-9),), 25e-3),
    Diffraction(Raster((5e-9, 0.0), (1e-9, 1e-8), (1, 10)), 1e-3),
    Blank(False),
    Probe((9.5e-9, 9.5e-9)),
]


def test_a_plan_is_refused_where_its_steps_would_be_and_costs_what_they_cost(bench):
    one = bench()
    planned = one.guard.planner()(PLAN)
    assert one.guard.ledger.spent == 0 and not one.instrument.state()["exposures"]
    verdicts, spent = [], []
    for i, asked in enumerate(PLAN):
        before = one.guard.ledger.spent
        try:
            one.do(asked, f"step {i}")
            verdicts.append(("ok", ""))
        except (LimitError, DoseError) as error:
            verdicts.append((error.code, str(error)))
        spent.append(one.guard.ledger.spent - before)
    assert [(step.verdict, step.message) for step in planned.steps] == verdicts
    assert [code for code, _ in verdicts] == ["ok", "limit", "limit", "ok", "dose", "ok", "ok", "ok"]
    costs = [np.ceil(step.electrons) if step.verdict == "ok" else 0 for step in planned.steps]
    assert costs == spent
    assert planned.e_per_A2 == one.guard.ledger.worst_e_per_A2
    assert not planned.ok and planned.to_dict()["verdict"] == "limit"
    assert planned.to_dict()["limits"] == LIMITS.content_hash


def test_the_time_of_a_plan_is_at_least_its_beam_time():
    info = recording().info
    planned = check_plan([LINE] * 3, Limits.from_info(info), DoseLedger(), info, {"current_A": 1e-11})
    assert planned.beam_time_s == pytest.approx(0.03) and planned.seconds > planned.beam_time_s
    assert planned.electrons == pytest.approx(30 * CELL) and planned.e_per_A2 is None


def test_a_plan_follows_the_state_that_its_steps_lead_to():
    info = recording().info
    limits = Limits.from_dict({"field_m": [1e-8, 1e-8], "electrons_per_point": 1e5})
    info = type(info)(**{**vars(info), "instructions": (*info.instructions, "optics")})
    planned = check_plan([LINE, Optics(current_A=1e-10), LINE], limits, DoseLedger(), info, {"current_A": 1e-11})
    assert [step.verdict for step in planned.steps] == ["ok", "ok", "limit"]
