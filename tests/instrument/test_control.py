"""Abort, takeover, events, epochs, references, plans: over real sockets."""

import json
import threading
import time

import numpy as np
import pytest
from conftest import until
from counting_instrument import CURRENT_A, TOKENS
from stoppable import LONG, POINT, Line, Stoppable
from websockets.exceptions import ConnectionClosed

from stemloop.core import units
from stemloop.core.instruction import Diffraction, Report
from stemloop.core.record import content_hash
from stemloop.instrument import wire

STEP_S = 0.02
EACH = units.electrons(CURRENT_A, 1e-3)


def stoppable(path):
    return Stoppable(path, STEP_S)


def running(one, key):
    return lambda: ["begin", key] in one.instrument.lines("begin")


def test_the_holder_ends_its_own_command_and_pays_for_what_was_exposed(served):
    one = served(make=stoppable)
    with Line(one) as agent:
        fencing = agent.ask(op="acquire")["fencing"]
        number = agent.execute("a", fencing, LONG)
        until(running(one, "a"))
        assert agent.ask(op="abort") == {"n": agent.number, "ok": True, "aborted": True}
        reply = agent.reply(number)
        assert reply["code"] == "aborted" and "of 50 positions" in reply["message"]
        done = int(one.instrument.lines("ended")[0][2])
        assert done < 50 and agent.ask(op="dose")["dose"]["spent"] == np.ceil(done * EACH)
        assert agent.ask(op="abort")["aborted"] is False  # nothing runs
        again = agent.reply(agent.execute("a", fencing, LONG))
        assert again["code"] == "aborted" and len(one.instrument.lines("begin")) == 1
        assert agent.reply(agent.execute("b", fencing))["ok"]


def test_only_the_holder_or_a_higher_role_aborts(served):
    one = served(make=stoppable)
    with Line(one) as agent, Line(one) as other, Line(one, "viewer") as viewer, Line(one, "operator") as operator:
        number = agent.execute("a", agent.ask(op="acquire")["fencing"], LONG)
        until(running(one, "a"))
        assert other.ask(op="abort")["code"] == "not-authorised"
        assert viewer.ask(op="abort")["code"] == "not-authorised"
        assert operator.ask(op="abort")["aborted"]
        assert agent.reply(number)["code"] == "aborted"


def test_what_cannot_be_ended_says_so(served):
    one = served(sleep_s=0.4)
    with Line(one) as agent:
        number = agent.execute("a", agent.ask(op="acquire")["fencing"])
        until(lambda: one.exposures)
        reply = agent.ask(op="abort")
        assert reply["code"] == "instrument" and "cannot end a command early" in reply["message"]
        assert agent.reply(number)["ok"]


def test_a_takeover_ends_the_exposure_tells_the_loser_and_does_not_wait(served):
    one = served(make=stoppable)
    with Line(one) as agent, Line(one, "operator") as operator:
        first = agent.ask(op="acquire")["fencing"]
        number = agent.execute("a", first, LONG)
        waiting = agent.execute("b", first)
        until(running(one, "a"))
        lease = operator.ask(op="takeover", ttl_s=5)
        assert lease["fencing"] == first + 1
        assert agent.reply(number)["code"] == "aborted"
        assert agent.reply(waiting)["code"] == "lease"
        assert agent.event("lease-lost") == {"event": "lease-lost", "by": "operator", "fencing": first}
        assert "lease ended" in agent.event("blanked")["reason"]
        assert agent.reply(agent.execute("c", first))["code"] == "lease"
        assert operator.reply(operator.execute("d", lease["fencing"]))["ok"]
    assert [line[1] for line in one.instrument.lines("begin")] == ["a", "d"]


def test_a_takeover_of_what_cannot_be_ended_wins_at_once_and_delivers_to_nobody(served):
    one = served(sleep_s=1.0)
    with Line(one) as agent, Line(one, "operator") as operator:
        first = agent.ask(op="acquire")["fencing"]
        number = agent.execute("a", first, data="stream")
        until(lambda: one.exposures)
        assert operator.ask(op="takeover")["ok"]
        assert not one.instrument.lines("exposed")  # it is still under way
        assert agent.reply(agent.execute("a2", first))["code"] == "lease"  # so is this
        assert not one.instrument.lines("exposed")
        reply = agent.reply(number)
        assert reply["code"] == "aborted" and "exposed to its end" in reply["message"]
        assert not one.sink.lines()
        assert operator.ask(op="dose")["dose"]["spent"] == np.ceil(EACH)
        assert operator.ask(op="fetch", key="a")["frames"].shape == (1, 8, 8)


def test_a_connection_that_is_lost_during_a_long_exposure_ends_it(served):
    one = served(make=stoppable, grace_s=0.2)
    agent = Line(one)
    with Line(one, "viewer") as viewer:
        agent.execute("a", agent.ask(op="acquire", ttl_s=60)["fencing"], Diffraction(LONG.positions_m * 20, 1e-3))
        until(running(one, "a"))
        agent.socket.socket.close()
        until(lambda: one.instrument.lines("ended"), 5)
        until(lambda: one.instrument.values["blanked"], 5)
        viewer.event("blanked")


def test_progress_is_told_to_who_asked(served):
    one = served(make=stoppable)
    with Line(one) as agent, Line(one, "viewer") as viewer:
        agent.reply(agent.execute("a", agent.ask(op="acquire")["fencing"], LONG))
        told = [event for event in agent.events if event["event"] == "progress"]
        assert told[-1] == {"event": "progress", "id": "a", "done": 50, "of": 50} and 2 < len(told) <= 15
        assert [event["done"] for event in told] == sorted(event["done"] for event in told)
        viewer.ask(op="dose")
        assert not viewer.events


def test_epochs_grow_by_one_and_never_repeat(served):
    one = served()
    with Line(one) as agent:
        fencing = agent.ask(op="acquire")["fencing"]
        before = time.time()
        replies = [
            agent.reply(agent.execute(name, fencing, asked))
            for name, asked in (("a", POINT), ("r", Report()), ("b", POINT), ("a", POINT))
        ]
        epochs = [reply["epoch"] for reply in replies]
        assert epochs == [1, 2, 3, 1]  # a repeat answers the first
        assert before <= replies[0]["began_s"] <= replies[0]["ended_s"] <= replies[1]["began_s"] <= time.time()
    one.wait()
    two = served()
    with Line(two) as agent:
        fencing = agent.ask(op="acquire")["fencing"]
        assert agent.reply(agent.execute("c", fencing))["epoch"] > 3
        assert agent.reply(agent.execute("a", fencing))["epoch"] == 1
        assert two.exposures == 3
    lines = [json.loads(line) for line in (one.directory / "audit.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["event"] == "execute"][:4] == epochs


def test_frames_by_reference_are_fetched_in_parts(served):
    one = served()
    with Line(one) as agent, Line(one, "viewer") as viewer:
        fencing = agent.ask(op="acquire")["fencing"]
        five = Diffraction(((1e-9, 1e-9),) * 5, 1e-4)
        reply = agent.reply(agent.execute("a", fencing, five, data="reference"))
        reference = reply["reference"]
        assert reply["frames"] is None
        assert reference == {"key": "a", "sha256": reply["sha256"], "shape": [5, 8, 8], "dtype": "<u2"}
        frames = viewer.ask(op="fetch", key="a")["frames"]
        assert content_hash(frames) == reference["sha256"]
        assert np.array_equal(viewer.ask(op="fetch", key="a", first=1, count=2)["frames"], frames[1:3])
        assert np.array_equal(agent.reply(agent.execute("a", fencing, five))["frames"], frames)
        for wrong in ({"key": "../../etc/passwd"}, {"key": "a", "first": 9}, {"key": "a", "first": -1}, {"key": 3}):
            assert viewer.ask(op="fetch", **wrong)["code"] == "input"
    assert one.exposures == 1


def test_a_plan_is_checked_without_a_lease_and_touches_nothing(served):
    one = served(dose_budget=1.5 * np.ceil(EACH))
    with Line(one) as agent, Line(one, "viewer") as viewer:
        plan = [wire.instruction_to_message(asked) for asked in (POINT, Diffraction(((1.0, 1.0),), 1e-3), POINT)]
        reply = agent.ask(op="check", plan=plan)
        assert reply["ok"] and [step["verdict"] for step in reply["steps"]] == ["ok", "limit", "dose"]
        assert reply["electrons"] == pytest.approx(EACH) and reply["verdict"] == "limit"
        assert agent.ask(op="check", instruction=plan[0])["steps"][0]["verdict"] == "ok"
        assert viewer.ask(op="check", plan=plan)["code"] == "not-authorised"
        assert agent.ask(op="check", plan=[3])["code"] == "input"
        assert agent.ask(op="check", plan=[plan[0]] * 1001)["code"] == "input"
        assert agent.ask(op="dose")["dose"]["spent"] == 0
    assert one.exposures == 0


def test_too_many_waiting_commands_are_refused(served):
    one = served(make=stoppable)
    with Line(one) as agent:
        fencing = agent.ask(op="acquire")["fencing"]
        numbers = [agent.execute(f"c{n}", fencing, LONG if n == 0 else POINT) for n in range(40)]
        until(running(one, "c0"))
        agent.reply(numbers[16])  # the first that is refused is answered at once
        assert agent.ask(op="abort")["aborted"]
        answers = [agent.reply(number) for number in numbers if number != numbers[16]]
    assert [answer.get("code") for answer in answers] == ["aborted"] + [None] * 15 + ["input"] * 23


def test_the_old_connection_of_a_lease_may_die_late(served):
    """A client that came back on a new connection keeps its lease when its half-open old one is noticed."""
    one = served(grace_s=0.2)
    old = Line(one)
    lease = old.ask(op="acquire", ttl_s=30)
    with Line(one, None) as new:
        hello = new.ask(op="hello", token=TOKENS["agent"], lease_id=lease["lease_id"])
        assert hello["leased"]
        old.close()
        time.sleep(0.6)
        assert new.reply(new.execute("a", lease["fencing"]))["ok"]


def test_telemetry_comes_while_the_instrument_is_busy(served):
    one = served(sleep_s=1.5)
    with Line(one) as agent:
        lease = agent.ask(op="acquire", ttl_s=5)
        number = agent.execute("a", lease["fencing"])
        until(lambda: one.exposures)
        with Line(one, None, "manage") as manager:
            manager.socket.send(json.dumps({"op": "hello", "token": TOKENS["viewer"], "hz": 10}))
            told = [json.loads(manager.socket.recv(5)) for _ in range(4)]
            assert all(t["ok"] and t["running"] == "a" and t["epoch"] == 1 for t in told)
            assert told[-1]["lease"] == {"holder": "agent", "fencing": 1, "ttl_s": 5.0}
            manager.socket.send(json.dumps({"beat": 7, **{k: lease[k] for k in ("lease_id", "fencing")}}))
            until(lambda: json.loads(manager.socket.recv(5))["beat"] == 7, 3)
        assert not one.instrument.lines("exposed")
        assert agent.reply(number)["ok"]
    with Line(one, None, "manage") as manager:
        manager.socket.send(wire.encode({"op": "hello", "token": "not the token of anybody"}))
        assert wire.decode(manager.socket.recv(5))["code"] == "not-authorised"
        with pytest.raises(ConnectionClosed):
            manager.socket.recv(5)


def test_heartbeats_on_the_management_channel_keep_a_lease(served):
    one = served()
    with Line(one) as agent, Line(one, None, "manage") as manager:
        lease = agent.ask(op="acquire", ttl_s=0.4)
        manager.socket.send(wire.encode({"op": "hello", "token": TOKENS["agent"], "hz": 10}))
        stop = threading.Event()

        def beat():
            count = 0
            while not stop.wait(0.1):
                count += 1
                manager.socket.send(wire.encode({"beat": count, **{k: lease[k] for k in ("lease_id", "fencing")}}))

        beating = threading.Thread(target=beat)
        beating.start()
        time.sleep(1.2)
        stop.set()
        beating.join()
        assert agent.reply(agent.execute("a", lease["fencing"]))["ok"]
        agent.event("lease-lost", 5)  # nobody beats any more
