"""Clients that fight for one microscope: whatever they do, in whatever order, no limit, lease or electron is lost."""

import logging
import math
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from stemloop.core import units
from stemloop.core.errors import Aborted, InstrumentError, Refused, StemloopError
from stemloop.core.instruction import Blank, Diffraction, Image, Optics, Report
from stemloop.core.protocols import Camera, Exposure, InstrumentInfo
from stemloop.instrument import audit as audits
from stemloop.instrument import spool as spools
from stemloop.instrument import wire
from stemloop.instrument.audit import Audit, verify_audit
from stemloop.instrument.guard import Command, Guard
from stemloop.instrument.lease import LeaseDesk
from stemloop.instrument.limits import Limits
from stemloop.instrument.spool import Spool
from stemloop.instrument.tokens import Identity

FIELD_M = (1e-8, 2e-8)
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a fight is not about the disk
DWELL_MAX_S = 2e-3
CURRENT_MAX_A = 2e-10
BUDGET = 2e8
INFO = InstrumentInfo(
    "judge",
    ("image", "diffraction", "blank", "optics", "report"),
    FIELD_M,
    80e3,
    camera=Camera((2, 2), 1e-3, (0.5, 0.5)),
)
WHO = [Identity("agent:a", "agent"), Identity("agent:b", "agent"), Identity("operator", "operator")]


class Judge:
    """An instrument that counts electrons by itself and judges each command that reaches it."""

    info = INFO

    def __init__(self):
        self.values = {"current_A": 1e-10, "blanked": False}
        self.electrons = 0
        self.executed = {}
        self.violations = []
        self.expected = None  # (key, fencing) of the command that may come now
        self.desk = None
        self.during = None
        self.fail = None

    def state(self):
        return dict(self.values)

    def restore(self, state):
        self.values = dict(state)

    def close(self):
        pass

    def judge(self, asked, key):
        if isinstance(asked, Blank) and ": " in key:
            return  # the guard's own
        lease = self.desk.lease
        if self.expected is None or key != self.expected[0] or lease is None or lease.fencing != self.expected[1]:
            self.violations.append(("lease", key, self.expected, lease))
        if asked.exposes and key in self.executed and self.executed[key].exposes:
            self.violations.append(("twice", key))
        self.executed[key] = asked
        if isinstance(asked, Optics) and asked.current_A is not None and asked.current_A > CURRENT_MAX_A:
            self.violations.append(("current", asked))
        if isinstance(asked, Blank) and not asked.blanked:
            self.violations.append(("unblank", asked))
        if asked.exposes:
            corners = asked.corners_m() if isinstance(asked, Image) else asked.positions_m
            places = np.asarray(corners, np.float64)
            inside = (places >= -1e-16).all() and (places <= np.array(FIELD_M) * (1 + 1e-8)).all()
            if not inside or asked.dwell_s > DWELL_MAX_S or self.values["current_A"] > CURRENT_MAX_A:
                self.violations.append(("limit", asked))

    def execute(self, asked, key):
        self.judge(asked, key)
        if isinstance(asked, Blank):
            self.values["blanked"] = asked.blanked
        if isinstance(asked, Optics):
            self.values["current_A"] = asked.current_A or self.values["current_A"]
        if not asked.exposes:
            return Exposure(None, 0.0, self.state())
        if self.values["blanked"]:
            self.violations.append(("blanked", key))
        each = units.electrons(self.values["current_A"], asked.dwell_s)
        during, self.during = self.during, None
        fail, self.fail = self.fail, None
        if during:
            during()
        if fail == "refuse":
            raise Refused("not here")
        if fail == "abort":
            self.values["blanked"] = True
            done = asked.exposed_positions // 2
            self.electrons += math.ceil(each * done)
            raise Aborted("ended", done)
        self.electrons += math.ceil(each * asked.exposed_positions)
        if fail == "break":
            raise OSError("the cable")
        shape = (1, *asked.shape) if isinstance(asked, Image) else (asked.exposed_positions, 2, 2)
        return Exposure(np.zeros(shape, np.uint8), each, self.state())


coordinate = st.sampled_from([0.0, 1e-9, 2e-9, 5e-9, 7e-9, 9.9e-9, 1e-8, 1.2e-8, 3e-8, -1e-9])
dwell = st.sampled_from([1e-6, 1e-5, 1e-4, 1e-3, 2e-3, 2.1e-3])
points = st.builds(
    lambda places, dwell_s: Diffraction(tuple(places), dwell_s),
    st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=4),
    dwell,
)
images = st.builds(
    lambda origin, extent, dwell_s: Image(origin, extent, (2, 3), dwell_s),
    st.tuples(coordinate, coordinate),
    st.tuples(st.sampled_from([1e-10, 1e-9, 2e-8]), st.sampled_from([1e-10, 1e-9])),
    dwell,
)
optics = st.builds(lambda current: Optics(current_A=current), st.sampled_from([1e-11, 1e-10, 2e-10, 3e-10, 1e-6]))
asked_for = st.one_of(points, images, optics, st.builds(Blank, st.booleans()), st.just(Report()))


which = st.sampled_from([0, 0, 0, 0, 1, 2, 5])  # of the leases so far, the last one first


class Fight(RuleBasedStateMachine):
    """Two programs and a person; they keep every lease they ever had and use any of them."""

    commands = executed = refused = 0

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.now = 0.0
        self.judge = Judge()
        self.spool = Spool(self.folder / "spool.log")
        self.audit = Audit(self.folder / "audit.jsonl")
        self.desk = self.judge.desk = LeaseDesk(0, self.spool.lease, lambda: self.now)
        declared = {"field_m": list(FIELD_M), "dwell_max_s": DWELL_MAX_S, "current_max_A": CURRENT_MAX_A}
        limits = Limits.from_dict(declared)
        assert limits.current_max_A == CURRENT_MAX_A
        self.guard = Guard(self.judge, self.spool, self.audit, self.desk, limits, BUDGET)
        self.leases = []
        self.given = {}

    @rule(who=st.sampled_from(WHO), ttl=st.sampled_from([0.5, 5.0, 60.0]), takeover=st.booleans())
    def acquire(self, who, ttl, takeover):
        try:
            self.leases.append(self.desk.acquire(who, ttl, takeover))
        except StemloopError:
            pass

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(who=st.sampled_from(WHO), pick=st.integers(0, 3))
    def release(self, who, pick):
        lease_id = self.leases[-1 - pick].lease_id if pick < len(self.leases) else None
        try:
            self.desk.release(who, lease_id)
        except StemloopError:
            pass

    @rule(
        burst=st.lists(
            st.tuples(asked_for, st.sampled_from([0, 0, 0, 0, 1, 2, 5]), st.booleans()), min_size=1, max_size=8
        ),
        first=st.sampled_from([*WHO, None, None]),
        wrong=st.sampled_from([0, 0, 0, 0, 0, 1, -1]),
        during=st.sampled_from([None, None, None, None, None, "takeover", "lapse"]),
        fail=st.sampled_from([None, None, None, None, None, "refuse", "abort", "break"]),
    )
    def command(self, burst, first, wrong, during, fail):
        if first is not None:
            self.acquire(first, 60.0, True)
        for asked, pick, again in burst:
            lease = self.leases[-1 - pick] if pick < len(self.leases) else None
            name = next(reversed(self.given)) if again and self.given else f"c{len(self.given)}"
            self.judge.during = {"takeover": self.take_over, "lapse": self.lapse}.get(during)
            self.judge.fail = fail
            self.ask(asked, lease, name, wrong)

    def take_over(self):
        self.acquire(WHO[2], 60.0, True)

    def lapse(self):
        self.now += 100.0
        self.desk.lapse()

    def ask(self, asked, lease, name, wrong):
        fencing = None if lease is None else lease.fencing + wrong
        who = lease.holder if lease else WHO[0]
        self.judge.expected = (name, fencing)
        command = Command(who, lease and lease.lease_id, fencing, name, wire.instruction_to_message(asked))
        type(self).commands += 1
        try:
            self.guard.execute(command)
            type(self).executed += 1
        except (Refused, InstrumentError, StemloopError):
            type(self).refused += 1
        finally:
            self.judge.expected = self.judge.during = self.judge.fail = None
        self.given[name] = asked

    @invariant()
    def nothing_is_violated(self):
        if not hasattr(self, "judge"):
            return
        assert not self.judge.violations, self.judge.violations
        assert self.guard.ledger.spent == self.judge.electrons
        assert self.guard.ledger.reserved == 0
        assert self.guard.ledger.spent <= BUDGET

    def teardown(self):
        if not hasattr(self, "judge"):
            return
        self.spool.close()
        self.audit.close()
        verify_audit(self.folder / "audit.jsonl")
        again = Spool(self.folder / "spool.log")
        assert again.spent == self.judge.electrons
        again.close()
        shutil.rmtree(self.folder)


def fight(examples, steps):
    Fight.commands = Fight.executed = Fight.refused = 0
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    unsynced = mock.patch.multiple
    with unsynced(spools, sync_data=lambda _: None), unsynced(audits, sync_data=lambda _: None, GROUP_COMMIT_S=0.0):
        run_state_machine_as_test(
            Fight,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],  # a fight that goes wrong is long; shrinking it takes minutes
                suppress_health_check=checks,
            ),
        )
    return Fight.commands, Fight.executed


@pytest.fixture(autouse=True)
def quiet():
    """Failures of the instrument are part of the fight and need no traceback."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_two_programs_and_a_person_fight_over_one_microscope():
    commands, executed = fight(80, 50)
    assert commands > 2000 and executed > 300


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_commands_of_a_fight():
    commands, done = fight(1500, 80)
    assert commands >= 100_000 and done > 5_000
