"""The AsyncAPI document says what the server says: every op, every event, and a whole conversation that fits it."""

import json

import jsonschema
import pytest
from counting_instrument import TOKENS
from websockets.sync.client import connect as open_websocket

from stemloop.core.instruction import Diffraction, Raster, to_dict
from stemloop.instrument import control, wire
from stemloop.instrument.asyncapi import EVENTS, OPS, asyncapi

DOCUMENT = json.loads(json.dumps(asyncapi()))


def fits(name, message):
    """Whether a message fits its schema; arrays are shown as null, which their schema does not bind."""
    shown = json.loads(json.dumps(message, default=lambda array: None))
    root = {**DOCUMENT, "$ref": f"#/components/schemas/{name}"}
    jsonschema.Draft202012Validator(root).validate(shown)


def references(value):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_every_reference_of_the_document_leads_somewhere():
    for reference in set(references(DOCUMENT)):
        place = DOCUMENT
        for word in reference.removeprefix("#/").split("/"):
            place = place[word]


def test_the_schemas_are_schemas():
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_op_of_the_server_is_in_the_document():
    actions = control.Conversation(None, None)._actions
    assert set(actions) == set(OPS)
    assert set(DOCUMENT["operations"]) >= set(OPS) | set(EVENTS)


def test_a_conversation_fits_the_document(served):
    one = served()
    asked = to_dict(Diffraction(Raster((0.0, 0.0), (1e-9, 1e-9), (2, 3)), 1e-4))
    address = json.loads(wait_for(one.directory / "address.json"))
    seen = set()
    with open_websocket(f"ws://{address['host']}:{address['port']}/control", compression=None) as socket:

        def say(op, **fields):
            message = {"n": 7, "op": op, **fields}
            fits(op, message)
            socket.send(wire.encode(message))
            while "n" not in (reply := wire.decode(socket.recv())):
                fits(f"{reply['event']}-event", reply)
            fits(f"{op}-reply" if reply["ok"] else "error", reply)
            seen.add(op)
            return reply

        say("hello", token=TOKENS["agent"], lease_id=None)
        fencing = say("acquire", ttl_s=5.0, takeover=False)["fencing"]
        say("renew", fencing=fencing)
        say("check", plan=[asked, asked])
        say("check", instruction=asked)
        for data in ("inline", "reference", "stream"):
            assert say("execute", id=data, fencing=fencing, instruction=asked, data=data)["ok"]
        say("fetch", key="reference", first=1, count=2)
        assert say("execute", id="old", fencing=0, instruction=asked)["code"] == "lease"
        for op in ("state", "dose", "info", "abort"):
            say(op)
        say("release")
        say("takeover", ttl_s=1.0)
        say("release")
    assert seen == set(OPS)


def wait_for(path):
    from conftest import until

    until(path.exists)
    return path.read_text()


@pytest.mark.parametrize(
    "message",
    [{"op": "execute", "id": "a", "fencing": 1}, {"op": "execute", "id": "", "fencing": 1, "instruction": {}}],
)
def test_a_message_that_the_server_would_refuse_does_not_fit(message):
    with pytest.raises(jsonschema.ValidationError):
        fits("execute", message)
