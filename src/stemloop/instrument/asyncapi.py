"""The messages of the WebSocket channels in a language that others read: AsyncAPI 3.0.

The bodies are msgpack; their form is told by JSON Schema, where ``contentEncoding: msgpack-ext-1`` stands for an array:
msgpack extension 1, a msgpack header ``[dtype, shape]`` followed by the raw bytes in C order.
"""

from __future__ import annotations

from typing import Any

import stemloop
from stemloop.core import errors
from stemloop.core.schema import definitions

_PREFIX = "#/components/schemas/"

_STRING: dict[str, Any] = {"type": "string"}
_WHOLE: dict[str, Any] = {"type": "integer"}
_NUMBER: dict[str, Any] = {"type": "number"}
_FLAG: dict[str, Any] = {"type": "boolean"}
_OBJECT: dict[str, Any] = {"type": "object"}
_FRAMES = {"$ref": f"{_PREFIX}array"}
_INSTRUCTION = {"$ref": f"{_PREFIX}instruction"}


def _says(schema: dict[str, Any], what: str) -> dict[str, Any]:
    return {**schema, "description": what}


def _maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_TTL = _says(_NUMBER, "time to live without a sign of the client [s]; 10 if it is left out")
_FENCING = _says(_WHOLE, "the number of the lease; it grows with every lease ever given")
_LEASE = {"lease_id": _says(_STRING, "the lease's secret"), "fencing": _FENCING, "ttl_s": _NUMBER}
_STEP = {
    "type": "object",
    "properties": {
        "kind": _STRING,
        "positions": _WHOLE,
        "electrons": _NUMBER,
        "e_per_A2": _maybe(_NUMBER),
        "beam_time_s": _NUMBER,
        "seconds": _NUMBER,
        "verdict": _says(_STRING, "ok, or the code of the refusal"),
        "message": _STRING,
    },
    "required": ["kind", "electrons", "seconds", "verdict", "message"],
}

#: op -> (what it does, its fields, those that must be there, the fields of its reply, those that are always there)
OPS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any], tuple[str, ...]]] = {
    "hello": (
        "Say who you are; the first message of a connection. With a lease_id, come back to that lease.",
        {"token": _STRING, "lease_id": _maybe(_STRING)},
        ("token",),
        {"who": _STRING, "role": _STRING, "fencing": _FENCING, "leased": _FLAG},
        ("who", "role", "fencing", "leased"),
    ),
    "acquire": (
        "Take the lease. With expected, only if that is still the last number given.",
        {"ttl_s": _TTL, "takeover": _FLAG, "expected": _maybe(_WHOLE)},
        (),
        _LEASE,
        tuple(_LEASE),
    ),
    "takeover": ("Take the lease from a lower role.", {"ttl_s": _TTL}, (), _LEASE, tuple(_LEASE)),
    "renew": ("Keep the lease.", {"fencing": _FENCING}, ("fencing",), {}, ()),
    "release": ("Give the lease back; the beam is blanked.", {}, (), {}, ()),
    "execute": (
        "Carry out one instruction. An id that was executed before answers the first result and exposes nothing.",
        {
            "id": _says({**_STRING, "minLength": 1, "maxLength": 200}, "the command's own name"),
            "fencing": _FENCING,
            "instruction": _INSTRUCTION,
            "data": _says(
                {"enum": ["inline", "stream", "reference"]}, "where frames go; inline, in the reply, if it is left out"
            ),
        },
        ("id", "fencing", "instruction"),
        {
            "frames": _says(_maybe(_FRAMES), "one entry an exposed position, or (1, rows, columns) for an image"),
            "reference": _says(_OBJECT, "key, sha256, shape, dtype of frames that fetch gives"),
            "electrons": _says(_NUMBER, "mean number of electrons that each frame was given"),
            "state": _says(_OBJECT, "the state vector when the instruction had been carried out"),
            "calibration": _OBJECT,
            "sha256": _says(_STRING, "of the frames' type, shape and bytes"),
            "epoch": _says(_WHOLE, "commands given when this acquisition began, this one included"),
            "began_s": _says(_NUMBER, "when it began, by the instrument's clock [s since 1970]"),
            "ended_s": _says(_NUMBER, "when it ended [s since 1970]"),
        },
        ("electrons", "state", "calibration", "epoch", "began_s", "ended_s"),
    ),
    "abort": (
        "End the running command as soon as the instrument can; it answers the code aborted.",
        {},
        (),
        {"aborted": _says(_FLAG, "whether a command ran")},
        ("aborted",),
    ),
    "fetch": (
        "Frames of a command out of the server's memory.",
        {"key": _says(_STRING, "the command's id"), "first": _WHOLE, "count": _maybe(_WHOLE)},
        ("key",),
        {"frames": _FRAMES},
        ("frames",),
    ),
    "check": (
        "What an instruction or a plan would cost and whether it would be refused. Touches nothing.",
        {"instruction": _INSTRUCTION, "plan": {"type": "array", "items": _INSTRUCTION}},
        (),
        {
            "steps": {"type": "array", "items": _STEP},
            "electrons": _NUMBER,
            "e_per_A2": _maybe(_NUMBER),
            "beam_time_s": _NUMBER,
            "seconds": _NUMBER,
            "verdict": _STRING,
            "limits": _says(_STRING, "hash of the limits"),
        },
        ("steps", "electrons", "seconds", "verdict", "limits"),
    ),
    "state": ("The state vector.", {}, (), {"state": _OBJECT}, ("state",)),
    "dose": ("Electrons: budget, spent, reserved, left.", {}, (), {"dose": _OBJECT}, ("dose",)),
    "info": (
        "What the instrument is and its limits.",
        {},
        (),
        {"info": _OBJECT, "limits": _OBJECT},
        ("info", "limits"),
    ),
}

#: event -> (when it is sent, its fields)
EVENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "progress": ("While a command runs.", {"id": _STRING, "done": _WHOLE, "of": _WHOLE}),
    "lease-lost": ("Somebody else holds the lease now.", {"by": _STRING, "fencing": _WHOLE}),
    "blanked": ("The server blanked the beam.", {"reason": _STRING}),
}


def _object(fields: dict[str, Any], required: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**fields}, "required": list(required), **more}


def _codes(root: type[errors.StemloopError]) -> list[str]:
    return [root.code, *(code for child in root.__subclasses__() for code in _codes(child))]


def _schemas() -> dict[str, Any]:
    schemas = definitions(_PREFIX)
    kinds = [{"$ref": _PREFIX + name} for name, schema in schemas.items() if "kind" in schema["properties"]]
    schemas["instruction"] = {"oneOf": kinds}
    schemas["array"] = {"contentEncoding": "msgpack-ext-1", "description": "an array of numbers"}
    schemas["error"] = _object(
        {
            "n": _maybe(_WHOLE),
            "ok": {"const": False},
            "code": _says({"enum": _codes(errors.StemloopError)}, "the kind of error"),
            "message": _says(_STRING, "what happened and what to do"),
        },
        ("n", "ok", "code", "message"),
        additionalProperties=False,
    )
    for op, (what, fields, required, reply, always) in OPS.items():
        head = {"n": _says(_maybe(_WHOLE), "repeated by the reply"), "op": {"const": op}}
        schemas[op] = _object({**head, **fields}, ("op", *required), description=what)
        answer = {"n": _maybe(_WHOLE), "ok": {"const": True}, **reply}
        schemas[f"{op}-reply"] = _object(answer, ("n", "ok", *always), additionalProperties=False)
    for event, (what, fields) in EVENTS.items():
        told = {"event": {"const": event}, **fields}
        schemas[f"{event}-event"] = _object(told, tuple(told), description=what, additionalProperties=False)
    schemas["manage-hello"] = _object(
        {"op": {"const": "hello"}, "token": _STRING, "hz": {"type": "number", "minimum": 1, "maximum": 10}}, ("token",)
    )
    schemas["manage-beat"] = _object({"beat": _WHOLE, "lease_id": _STRING, "fencing": _WHOLE}, ("beat",))
    schemas["manage-telemetry"] = _says(_OBJECT, "state, lease, dose, epoch, load, uptime and the last heartbeat")
    return schemas


def asyncapi() -> dict[str, Any]:
    """The AsyncAPI 3.0 document of a server's WebSocket channels, from the server's point of view."""
    schemas = _schemas()
    # the instructions and paths are parts of messages, not messages; an op such as "probe" would collide with a kind
    parts = {"instruction", "array", *definitions()} - set(OPS)
    messages = {name: {"payload": {"$ref": _PREFIX + name}} for name in schemas if name not in parts}
    manage = {name for name in messages if name.startswith("manage-")}

    def of(channel: str, *names: str) -> list[dict[str, str]]:
        return [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in names]

    operations: dict[str, Any] = {
        op: {
            "action": "receive",
            "summary": what,
            "channel": {"$ref": "#/channels/control"},
            "messages": of("control", op),
            "reply": {"channel": {"$ref": "#/channels/control"}, "messages": of("control", f"{op}-reply", "error")},
        }
        for op, (what, *_) in OPS.items()
    }
    for event, (when, _) in EVENTS.items():
        operations[event] = {
            "action": "send",
            "summary": when,
            "channel": {"$ref": "#/channels/control"},
            "messages": of("control", f"{event}-event"),
        }
    for name, action in (("manage-hello", "receive"), ("manage-beat", "receive"), ("manage-telemetry", "send")):
        operations[name] = {
            "action": action,
            "channel": {"$ref": "#/channels/manage"},
            "messages": of("manage", name),
        }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "stemloop instrument",
            "version": stemloop.__version__,
            "description": "Commands to a microscope, their replies and events. SI units; angles in radians.",
        },
        "defaultContentType": "application/msgpack",
        "channels": {
            "control": {
                "address": "/control",
                "messages": {
                    name: {"$ref": f"#/components/messages/{name}"} for name in messages if name not in manage
                },
            },
            "manage": {
                "address": "/manage",
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in sorted(manage)},
            },
        },
        "operations": operations,
        "components": {"messages": messages, "schemas": schemas},
    }
