"""``instrument plan`` and ``instrument schema``: what may be asked, checked without touching hardware."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stemloop.commands import facility, tokens

if TYPE_CHECKING:
    from stemloop.core.instruction import Instruction


def add(verbs: Any) -> None:
    """Add the verb ``instrument`` and the verbs below it."""
    instrument = verbs.add_parser("instrument", help="serve, check and plan for a microscope")
    actions = instrument.add_subparsers(dest="action", required=True, metavar="ACTION")

    plan = actions.add_parser("plan", help="list, check and cost a plan without touching hardware")
    plan.add_argument("plan", type=Path, metavar="PLAN", help="instructions, YAML or JSON")
    plan.add_argument("--limits", type=Path, metavar="FILE", help="what may be asked (default: the server's limits)")
    plan.add_argument(
        "--address", help="server whose instrument, state and dose are meant: wss://host:port or its folder"
    )
    plan.add_argument("--token", help="the secret (default: environment STEMLOOP_TOKEN, or the folder's own)")
    plan.add_argument("--ca", metavar="FILE", help="the server's certificate, or its SHA-256")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.set_defaults(do=_plan)

    schema = actions.add_parser("schema", help="print the JSON Schema of the instructions")
    schema.add_argument("--asyncapi", action="store_true", help="print the AsyncAPI document of all messages instead")
    schema.set_defaults(do=_schema)

    facility.add(actions)
    tokens.add(actions)


def _schema(words: argparse.Namespace) -> int:
    from stemloop.core.schema import json_schema
    from stemloop.instrument.asyncapi import asyncapi

    print(json.dumps(asyncapi() if words.asyncapi else json_schema(), indent=2))
    return 0


def _plan(words: argparse.Namespace) -> int:
    from stemloop.core.errors import InputError
    from stemloop.instrument.plan import read_plan

    try:
        text = words.plan.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{words.plan} is no text: a plan is YAML or JSON.") from None
    steps, state = read_plan(text)
    if words.address is None and words.limits is None:
        raise InputError("give --limits FILE, or --address of a server that has limits.")
    report = _at(words, steps) if words.address else _alone(words.limits, steps, state)
    print(json.dumps(report, indent=2) if words.json else _table(report))
    return 0 if report["verdict"] == "ok" else 2


def _alone(path: Path, steps: tuple[Instruction, ...], state: dict[str, Any]) -> dict[str, Any]:
    """The plan against declared limits and no instrument."""
    from stemloop.instrument.dose import DoseLedger
    from stemloop.instrument.limits import Limits
    from stemloop.instrument.plan import assumed, check_plan

    limits = Limits.load(path)
    ledger = DoseLedger(limits.electrons_max, region=limits.region)
    return check_plan(steps, limits, ledger, assumed(limits), state).to_dict()


def _at(words: argparse.Namespace, steps: tuple[Instruction, ...]) -> dict[str, Any]:
    """The plan on a server's instrument as it is now: by the server's own limits, or by others."""
    from stemloop.instrument import wire
    from stemloop.instrument.client import connect
    from stemloop.instrument.dose import DoseLedger
    from stemloop.instrument.limits import Limits
    from stemloop.instrument.plan import check_plan

    token = words.token or os.environ.get("STEMLOOP_TOKEN") or None
    with connect(words.address, token, ca=words.ca) as scope:
        if words.limits is None:
            plan = [wire.instruction_to_message(step) for step in steps]
            reply = scope._ask({"op": "check", "plan": plan})
            return {name: value for name, value in reply.items() if name not in ("n", "ok")}
        limits, dose = Limits.load(words.limits), scope.dose()
        budgets = [b for b in (dose["budget"], limits.electrons_max) if b is not None and math.isfinite(b)]
        ledger = DoseLedger(min(budgets, default=None), int(dose["spent"]), limits.region)
        return check_plan(steps, limits, ledger, scope.info, scope.state()).to_dict()


def _table(report: dict[str, Any]) -> str:
    """The report of a plan in columns."""
    heads = ("step", "positions", "electrons", "e/A^2", "beam [s]", "time [s]", "verdict")

    def row(kind: str, positions: str, entry: dict[str, Any], verdict: str) -> tuple[str, ...]:
        dense = entry.get("e_per_A2")
        numbers = [f"{entry[name]:.4g}" for name in ("electrons", "beam_time_s", "seconds")]
        return kind, positions, numbers[0], "-" if dense is None else f"{dense:.4g}", *numbers[1:], verdict

    rows = [
        row(
            f"{number} {step['kind']}",
            str(step["positions"]),
            step,
            "ok" if step["verdict"] == "ok" else f"{step['verdict']}: {step['message']}",
        )
        for number, step in enumerate(report["steps"], 1)
    ]
    refused = sum(step["verdict"] != "ok" for step in report["steps"])
    rows.append(row("in all", "", report, "ok" if not refused else f"{refused} refused"))
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads) - 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, 6)), line[6]])
        for line in (heads, *rows)
    )
