"""What must hold when nobody looks: the beam is closed between exposures, no dose goes unseen, the watch goes on when
a file is broken, nothing is done that cannot be written down, and others' questions do not hold up the instrument."""

import json
import os
import threading

import pytest
from stoppable import LONG, Line, Stoppable
from test_guarded_limits import WHO, Bench, recording

from stemloop.core import units
from stemloop.core.errors import InputError, LimitError, StorageError
from stemloop.core.instruction import Blank, Diffraction, Image, Optics, Stage
from stemloop.core.protocols import Exposure
from stemloop.instrument import server
from stemloop.instrument.audit import verify_audit
from stemloop.instrument.guard import Command
from stemloop.instrument.limits import Limits
from stemloop.instrument.wire import instruction_from_message

POINT = Diffraction(((0.5e-9, 0.5e-9),), 1e-3)
CLOSED = Limits.from_dict({"field_m": [1e-8, 1e-8]})
OPEN = Limits.from_dict({"field_m": [1e-8, 1e-8], "unblank": True, "parked_max_s": 0.5, "electrons_max": 1e12})


@pytest.fixture
def bench(tmp_path):
    opened = []

    def start(limits=CLOSED, **options):
        for one in opened:
            one.close()
        opened[:] = [Bench(tmp_path, limits, **options)]
        return opened[0]

    yield start
    for one in opened:
        one.close()


def test_a_beam_that_somebody_left_open_is_closed_after_the_next_exposure(bench):
    one = bench()
    one.instrument.restore({"blanked": False})  # by hand, at the console
    one.do(POINT, "a")
    assert one.instrument.state()["blanked"]
    assert one.guard.last_state[1]["blanked"]


def test_an_opened_beam_is_closed_by_an_exposure_so_that_its_dose_is_never_free(bench):
    one = bench(OPEN)
    one.do(Blank(False), "open")
    one.do(POINT, "a")
    assert one.instrument.state()["blanked"]


def test_a_server_begins_by_blanking(served):
    one = served()
    with one.connect() as scope:
        assert scope.state()["blanked"]
    assert one.instrument.lines("blank")[0] == ["blank", "True"]


def test_a_restart_does_not_open_the_beam(bench):
    one = bench()
    one.do(POINT, "a")
    assert not one.spool.state["blanked"]  # the state of the exposure, when the beam was open
    asked = []

    class Watched(type(recording())):
        def restore(self, state):
            asked.append(state["blanked"])
            super().restore(state)

    again = recording()
    again.__class__ = Watched
    bench(instrument=again)
    assert asked == [True]


def test_an_abort_that_comes_when_the_exposure_has_just_ended_does_not_end_the_next(bench):
    one = bench(OPEN)
    execute = one.instrument.execute

    def just_ended(asked, key):
        exposure = execute(asked, key)
        if asked.exposes and key == "a":
            assert one.guard.abort(one.guard.running)
        return exposure

    one.instrument.execute = just_ended
    one.do(Blank(False), "open")
    assert one.do(POINT, "a")["frames"] is not None
    assert one.do(POINT, "b")["frames"] is not None


def test_an_instrument_that_does_not_know_its_current_is_charged_the_largest(bench):
    one = bench()
    execute = one.instrument.execute
    del one.instrument._state["current_A"]

    def silent(asked, key):
        one.instrument._state["current_A"] = 0.0
        exposure = execute(asked, key)
        del one.instrument._state["current_A"]
        return Exposure(exposure.frames, 0.0, one.instrument.state(), exposure.calibration)

    one.instrument.execute = silent
    one.do(POINT, "a")
    assert one.guard.ledger.spent == -(-units.electrons(CLOSED.current_max_A, 1e-3) // 1)


def test_an_open_beam_must_have_an_end():
    with pytest.raises(InputError, match="parked_max_s"):
        Limits.from_dict({"field_m": [1e-8, 1e-8], "unblank": True})


@pytest.mark.parametrize("asked", [Optics(current_A=2e-10), Stage(x_m=1e-9)])
def test_under_an_open_beam_neither_its_current_nor_its_place_changes_unseen(asked):
    state = {"blanked": 0, "current_A": 1e-12, "stage_x_m": 0.0, "probe_y_m": 0.0, "probe_x_m": 0.0}
    info = Stoppable("unused").info
    info = type(info)(info.name, (*info.instructions, "stage"), info.field_m, info.energy_eV)
    with pytest.raises(LimitError, match="beam is open"):
        OPEN.check(asked, 0.0, info, state)
    OPEN.check(asked, 0.0, info, {**state, "blanked": 1})


def test_what_cannot_be_written_down_is_not_done(bench):
    one = bench()
    one.audit._failed = "No space left on device"
    began = one.instrument.state()["exposures"]
    for name in ("a", "b"):
        with pytest.raises(StorageError, match="No space left"):
            one.do(POINT, name)
    assert one.instrument.state()["exposures"] == began
    assert one.guard.ledger.spent == 0


def test_no_exposure_begins_when_its_frames_would_not_fit_on_the_disk(bench, monkeypatch):
    one = bench()
    monkeypatch.setattr("stemloop.instrument.spool.shutil.disk_usage", lambda path: Full)
    began = one.instrument.state()["exposures"]
    with pytest.raises(StorageError, match="Make room"):
        one.do(POINT, "a")
    assert one.instrument.state()["exposures"] == began
    assert one.guard.ledger.dose()["spent"] == one.guard.ledger.dose()["reserved"] == 0


class Full:
    total, used, free = 2**40, 2**40 - 1000, 1000


@pytest.mark.parametrize("odd", [{b"kind": 1}, {"kind": "blank", "x" * 100_000: [[b"y"]]}, {"kind": "x" * 500_000}])
def test_whatever_comes_has_a_line_in_the_audit_that_is_not_long(bench, tmp_path, odd):
    one = bench()
    with pytest.raises(InputError):
        one.guard.execute(Command(WHO, one.lease.lease_id, one.lease.fencing, "odd", odd))
    one.audit.sync()
    assert verify_audit(tmp_path / "audit.jsonl").lines == one.guard.audit_head.lines
    last = (tmp_path / "audit.jsonl").read_bytes().splitlines()[-1]
    assert b'"id": "odd"' in last
    assert len(last) < 8192


def test_a_broken_file_of_tokens_does_not_stop_the_watch(served, monkeypatch):
    one = served(tokens=None, make=Stoppable)
    with Line(one, role=None) as line:
        secret = json.loads((one.directory / "local.json").read_text())["agent"]
        assert line.ask(op="hello", token=secret)["ok"]
        fencing = line.ask(op="acquire", ttl_s=0.3)["fencing"]
        (one.directory / "tokens.json").write_text("{broken")
        os.chmod(one.directory / "tokens.json", 0o600)
        assert line.reply(line.execute("a", fencing))["ok"]
        execute = one.instrument.execute
        failed = []

        def once(asked, key):
            if isinstance(asked, Blank) and asked.blanked and not failed:
                failed.append(key)
                raise RuntimeError("the blanker is stuck")
            return execute(asked, key)

        one.instrument.execute = once
        line.event("lease-lost")
        line.event("blanked")  # the first try failed; the watch tries again
        assert failed
    (one.directory / "tokens.json").unlink()


def test_others_plans_and_pieces_do_not_hold_up_the_instrument(served, monkeypatch):
    one = served()
    hold, begun = threading.Event(), threading.Event()

    def slow(*args):
        begun.set()
        hold.wait(20)
        raise LimitError("at last")

    monkeypatch.setattr("stemloop.instrument.guard.check_plan", slow)
    with Line(one) as asker, Line(one, "operator") as driver:
        plan = asker.send(op="check", instruction={"kind": "blank", "version": 2})
        assert begun.wait(10)
        try:
            lease = driver.ask(op="acquire")
            reply = driver.reply(driver.execute("a", lease["fencing"]), timeout=10)
            assert reply["ok"]
        finally:
            hold.set()
        assert asker.reply(plan)["code"] == "limit"


def test_a_server_that_is_stopped_ends_the_exposure_and_closes_the_beam(served, monkeypatch):
    servers = []

    class Known(server._Uvicorn):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(server, "_Uvicorn", Known)
    one = served(make=lambda path: Stoppable(path, 0.2), idle_exit_s=0.5)
    with Line(one) as line:
        fencing = line.ask(op="acquire")["fencing"]
        line.execute("long", fencing, LONG)  # 10 s
        line.event("progress")
        servers[0].should_exit = True  # as SIGTERM does
        one.thread.join(8)
        assert not one.thread.is_alive()
    assert one.instrument.values["blanked"]
    assert one.instrument.lines("ended long")


def test_a_size_that_no_microscope_has_is_refused_as_such():
    with pytest.raises(InputError, match="positions"):
        Image((0.0, 0.0), (1e-9, 1e-9), (10**400, 1), 1e-6)
    with pytest.raises(InputError):
        instruction_from_message(
            {
                "kind": "image",
                "version": 2,
                "origin_m": [0, 0],
                "extent_m": [1, 1],
                "shape": [2**40, 2**40],
                "dwell_s": 1,
            }
        )


def test_frames_that_no_message_could_carry_are_not_allowed_for():
    with pytest.raises(InputError, match="frame_bytes_max"):
        Limits.from_dict({"field_m": [1e-8, 1e-8], "frame_bytes_max": 1e12})


def test_a_second_server_leaves_the_address_of_the_first(served):
    from stemloop.campaign.host import serve_by_hand

    one = served(idle_exit_s=3.0)
    with one.connect("operator"):
        with pytest.raises(StorageError, match="another instrument server"):
            serve_by_hand("twin", one.directory)
        with one.connect("engineer") as scope:
            assert scope.role == "engineer"
