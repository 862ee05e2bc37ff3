"""Prompt commands keep every promise: one touches the instrument at a time, nothing overtakes; and an exposure whose
result and audit line are made durable side by side is answered only when both are."""

import json
import threading
import time

import pytest
from counting_instrument import Counting

from stemloop.core.errors import OutcomeUnknown
from stemloop.core.instruction import Blank, Diffraction, Optics, Report, to_dict
from stemloop.instrument import audit as audits
from stemloop.instrument import spool as spools
from stemloop.instrument.audit import Audit, verify_audit
from stemloop.instrument.guard import Command, Guard
from stemloop.instrument.hand import Hand
from stemloop.instrument.lease import LeaseDesk
from stemloop.instrument.limits import Limits
from stemloop.instrument.spool import Spool
from stemloop.instrument.tokens import Identity

WHO = Identity("agent", "agent")
POINT = Diffraction(((5e-9, 5e-9),), 1e-3)


class Prompt(Counting):
    """Says that a report is prompt, and notes if two calls ever meet."""

    prompt = frozenset({"report", "blank"})

    def __init__(self, path, sleep_s=0.0):
        super().__init__(path, sleep_s)
        self.order, self.met, self.inside = [], False, threading.Lock()

    def execute(self, instruction, key):
        if not self.inside.acquire(blocking=False):
            self.met = True
            raise AssertionError("two calls at a time")
        try:
            self.order.append(key)
            return super().execute(instruction, key)
        finally:
            self.inside.release()


class Bench:
    """A guard on a folder, with the lease."""

    def __init__(self, folder, instrument):
        self.spool, self.audit = Spool(folder / "spool.log"), Audit(folder / "audit.jsonl")
        self.desk = LeaseDesk(self.spool.fencing, self.spool.lease)
        limits = Limits.from_dict({"field_m": [1e-8, 2e-8], "current_max_A": 1e-9})
        self.guard = Guard(instrument, self.spool, self.audit, self.desk, limits)
        self.lease = self.desk.acquire(WHO)

    def command(self, asked, name):
        return Command(WHO, self.lease.lease_id, self.lease.fencing, name, to_dict(asked))


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path, Prompt(tmp_path / "exposures.txt"))
    yield made
    made.spool.close()
    made.audit.close()


def test_the_place_of_the_thread_is_taken_only_while_it_has_nothing_to_do():
    hand, done, go = Hand(), [], threading.Event()
    assert hand.take() and not hand.take()
    hand.post(lambda: done.append("posted"))
    time.sleep(0.05)
    assert not done  # whoever took the place has it until they give it back
    hand.give_back()
    assert hand.submit(lambda: "next").result(10) == "next" and done == ["posted"]
    hand.post(lambda: go.wait(10))
    assert not hand.take()  # something is under way
    go.set()
    hand.close()


def test_many_threads_and_takers_never_meet():
    hand, inside, met, taken = Hand(), threading.Lock(), [], []

    def touch():
        if not inside.acquire(blocking=False):
            met.append(True)
            return
        time.sleep(1e-5)
        inside.release()

    def work():
        for _ in range(200):
            hand.submit(touch).result(10)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if hand.take():
            taken.append(True)
            touch()
            hand.give_back()
        time.sleep(1e-5)
    hand.close()
    assert not met


def test_reports_come_from_the_event_loop_and_wait_behind_an_exposure(served):
    one = served(make=lambda path: Prompt(path, 0.2))
    with one.connect() as client:
        client.acquire()
        client.execute(Report(), "first")  # in the thread: the numbers of commands are made durable on this way
        before = len(one.instrument.threads)
        for number in range(50):  # the thread may still have the first one's end to see to
            client.execute(Report(), f"then:{number}")
            if len(one.instrument.threads) == before + 1:
                break
        assert len(one.instrument.threads) == before + 1
        client.execute(Optics(C10_m=1e-8), "moved")
        asked = [("long", POINT), *((f"r{number}", Report()) for number in range(8))]
        sent = [client._send({"op": "execute", "id": name, "instruction": to_dict(one)}) for name, one in asked]
        for number in sent:
            client._wait(number)
    assert not one.instrument.met
    kept = [name for name in one.instrument.order if not name.startswith(("blank", "long:", "then:"))]
    assert kept == ["first", "moved", "long", *(f"r{number}" for number in range(8))]


def test_what_needs_the_disk_or_the_blanker_is_not_prompt(bench):
    guard = bench.guard
    report = bench.command(Report(), "a")
    assert not guard.prompt(report)  # the numbers of commands are not at hand
    guard.execute(report)
    assert guard.prompt(bench.command(Report(), "b")) and guard.prompt(bench.command(Blank(True), "c"))
    assert not guard.prompt(bench.command(Optics(C10_m=1e-8), "d")) and not guard.prompt(bench.command(POINT, "e"))
    guard.execute(bench.command(Blank(True), "c"))
    assert not guard.prompt(bench.command(Blank(True), "c"))  # its first answer is read from the disk
    bench.desk.unattended = True
    assert not guard.prompt(bench.command(Report(), "f"))  # the beam is blanked first
    hostile = Command(WHO, None, None, "g", {"kind": ["report"]})
    assert not guard.prompt(hostile)


@pytest.mark.parametrize("broken", ["spool", "audit", "none"])
def test_no_exposure_is_answered_before_both_files_are_durable(bench, monkeypatch, tmp_path, broken):
    """The disk refuses one of the two after the frames were taken: the client hears of it, and so does a repeat."""
    bench.guard.execute(bench.command(Report(), "a"))
    synced = {"spool": 0, "audit": 0}

    def sync(name, real):
        def do(descriptor):
            synced[name] += 1
            if name == broken and (name == "audit" or synced[name] > 100):  # the intent is the first of the spool
                raise OSError(5, "Input/output error")
            time.sleep(0.02 if name == "spool" else 0.0)
            real(descriptor)
            synced[name] += 100

        return do

    monkeypatch.setattr(audits, "GROUP_COMMIT_S", 60.0)
    for name, module in (("spool", spools), ("audit", audits)):
        monkeypatch.setattr(module, "sync_data", sync(name, module.sync_data))
    command = bench.command(POINT, "e")
    if broken == "none":
        assert bench.guard.execute(command)["sha256"]
        assert synced["spool"] >= 200 and synced["audit"] >= 100
        return
    with pytest.raises(Exception, match="Input/output"):
        bench.guard.execute(command)
    monkeypatch.undo()
    if broken == "spool":
        with pytest.raises(OutcomeUnknown, match="counts as exposed"):
            bench.guard.execute(command)
        lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_bytes().splitlines()]
        said = [line["verdict"] for line in lines if line.get("id") == "e"]
        assert said == ["done", OutcomeUnknown.code, OutcomeUnknown.code]
        verify_audit(tmp_path / "audit.jsonl", bench.audit.head)
