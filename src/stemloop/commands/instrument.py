"""``instrument plan`` and ``instrument schema``: what may be asked, checked without touching hardware."""

from __future__ import annotations

import argparse
from typing import Any

from stemloop.commands import facility, tokens


def add(verbs: Any) -> None:
    """Add the verb ``instrument`` and the verbs below it."""
    instrument = verbs.add_parser("instrument", help="serve, check and plan for a microscope")
    actions = instrument.add_subparsers(dest="action", required=True, metavar="ACTION")

    facility.add(actions)
    tokens.add(actions)

    schema = actions.add_parser("schema", help="print the JSON Schema of the instructions")
    schema.set_defaults(do=_schema)


def _schema(words: argparse.Namespace) -> int:
    import json

    from stemloop.core.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
