"""The REST part: administration, and every operation under generated requests."""

import contextlib
import importlib
import json
import time

import pytest
from conftest import until
from counting_instrument import TOKENS
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from stoppable import POINT, Line
from test_server import http

from stemloop.instrument import wire
from stemloop.instrument.audit import Head, verify_audit

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (dependency group test)")
positive_data_acceptance = importlib.import_module("schemathesis.specs.openapi.checks").positive_data_acceptance


def body(**values):
    return json.dumps(values).encode()


def local(one):
    until((one.directory / "local.json").exists)
    until((one.directory / "address.json").exists)
    return json.loads((one.directory / "local.json").read_text())


def test_an_engineer_issues_lists_and_revokes_tokens_of_a_running_server(served):
    one = served(tokens=None, idle_exit_s=4.0)
    secrets = local(one)
    assert http(one, "POST", "/tokens", secrets["operator"], body(role="agent"))[0] == 403
    assert http(one, "GET", "/tokens", secrets["viewer"])[0] == 403
    status, made = http(one, "POST", "/tokens", secrets["engineer"], body(role="agent", name="loop", life_s=60))
    assert status == 201 and made["name"] == "agent:loop" and "sha256" not in made
    status, listed = http(one, "GET", "/tokens", secrets["engineer"])
    assert status == 200 and [entry["token_id"] for entry in listed] == [made["token_id"]]
    assert "token" not in listed[0]
    with Line(one, None) as agent, Line(one, None) as viewer:
        assert viewer.ask(op="hello", token=secrets["viewer"])["ok"]
        assert agent.ask(op="hello", token=made["token"])["who"] == "agent:loop"
        fencing = agent.ask(op="acquire", ttl_s=60)["fencing"]
        assert agent.reply(agent.execute("a", fencing))["ok"]
        assert http(one, "DELETE", f"/tokens/{made['token_id']}", secrets["engineer"])[1]["revoked_s"]
        reply = agent.reply(agent.execute("b", fencing))
        assert reply["code"] == "not-authorised" and "was revoked" in reply["message"]
        viewer.event("blanked", 5)  # its lease has ended as well
        assert http(one, "GET", "/state", made["token"])[0] == 401
    assert http(one, "DELETE", "/tokens/nobody", secrets["engineer"])[0] == 404
    assert one.exposures == 1


def test_a_scope_holds_on_the_wire(served):
    one = served(tokens=None, idle_exit_s=4.0)
    secrets = local(one)
    asked = body(role="agent", name="looker", kinds=["report", "image"])
    token = http(one, "POST", "/tokens", secrets["engineer"], asked)[1]["token"]
    with Line(one, None) as agent:
        assert agent.ask(op="hello", token=token)["ok"]
        reply = agent.reply(agent.execute("a", agent.ask(op="acquire")["fencing"]))
        assert reply["code"] == "not-authorised" and "report, image only" in reply["message"]
        plan = [wire.instruction_to_message(POINT)]
        assert agent.ask(op="check", plan=plan)["code"] == "not-authorised"
    assert one.exposures == 0


def test_the_head_of_the_audit_and_the_plan_over_rest(served):
    one = served(idle_exit_s=4.0)
    until((one.directory / "address.json").exists)
    status, head = http(one, "GET", "/audit/head", TOKENS["viewer"])
    assert status == 200 and head["lines"] >= 1
    plan = body(plan=[wire.instruction_to_message(POINT)])
    status, report = http(one, "POST", "/plan", TOKENS["agent"], plan)
    assert status == 200 and report["verdict"] == "ok" and report["steps"][0]["positions"] == 1
    assert http(one, "POST", "/plan", TOKENS["agent"], body(plan=[{"kind": "fly"}]))[0] == 422
    assert http(one, "POST", "/plan", TOKENS["viewer"], plan)[0] == 403
    assert http(one, "GET", "/lease", TOKENS["viewer"]) == (200, None)
    assert "$defs" in http(one, "GET", "/schema")[1]
    one.wait()
    verify_audit(one.directory / "audit.jsonl", Head(**head))
    assert one.exposures == 0


def test_wrong_tokens_wait_and_right_ones_do_not(served):
    one = served(idle_exit_s=4.0)
    until((one.directory / "address.json").exists)
    begun = time.monotonic()
    for _ in range(11):
        assert http(one, "GET", "/state", "x" * 40)[0] == 401
    assert time.monotonic() - begun >= 1.0  # the eleventh waited
    assert http(one, "GET", "/state", TOKENS["viewer"])[0] == 200
    one.wait()
    lines = [json.loads(line) for line in (one.directory / "audit.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "hello" for line in lines) == 10


def meet(cases, url, token, seen):
    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def ask(case):
        key = case.method, case.path
        more = {"excluded_checks": [positive_data_acceptance]} if case.path == "/plan" else {}  # laws between fields
        answer = case.call_and_validate(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60, **more)
        seen[key] = seen.get(key, 0) + (answer.status_code < 500)

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters has no wrong ones
        ask()


def test_generated_requests_meet_the_schema(served, monkeypatch):
    """schemathesis against the real server: right and wrong requests, with and without a token, on every operation."""
    monkeypatch.setattr("stemloop.instrument.station.Failures.free", 10**9)
    one = served(tokens=None, idle_exit_s=3.0)
    token = local(one)["engineer"]
    url = one.url.replace("ws", "http", 1)
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen = {}
    with Line(one, None) as there:  # somebody is there all the time, so that the server does not leave
        assert there.ask(op="hello", token=token)["ok"]
        for result in schema.get_all_operations():
            for mode in schemathesis.GenerationMode:
                meet(result.ok().as_strategy(generation_mode=mode), url, token, seen)
    assert len(seen) >= 10 and all(seen.values())
    with Line(one, None) as agent:
        assert agent.ask(op="hello", token=local(one)["agent"])["ok"]
    assert one.exposures == 0
