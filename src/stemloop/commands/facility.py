"""``instrument serve`` and ``instrument check``: put an instrument behind a server, and examine one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(actions: Any) -> None:
    """Add the actions below the verb ``instrument``."""
    serve = actions.add_parser("serve", help="serve an instrument until Ctrl-C")
    serve.add_argument("instrument", metavar="KIND", help="twin, replay:FILE or nion:...")
    serve.add_argument("--dir", type=Path, default=Path("instrument"), metavar="DIR", help="the server's memory")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    serve.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate (PEM); needed off this machine")
    serve.add_argument("--tls-key", type=Path, metavar="FILE", help="its key (PEM)")
    serve.add_argument("--limits", type=Path, metavar="FILE", help="what may be asked (YAML or JSON)")
    serve.add_argument("--max-dose", type=float, metavar="E", help="electrons that all exposures may take together")
    serve.add_argument("--specimen", default="MoS2", help="of the twin (default MoS2)")
    serve.add_argument("--seed", type=int, default=0, help="of the twin (default 0)")
    serve.set_defaults(do=_serve)

    check = actions.add_parser("check", help="examine an instrument through its server; prints JSON")
    check.add_argument("address", help="wss://host:port, or the server's directory")
    check.add_argument("--token", help="the secret (default: environment STEMLOOP_TOKEN, or the directory's own)")
    check.add_argument("--ca", metavar="FILE", help="the server's certificate, or its SHA-256")
    check.add_argument("--moves", type=int, default=1000, metavar="N", help="moves of the beam (default 1000)")
    check.add_argument(
        "--max-electrons", type=float, default=2e6, metavar="E", help="in one frame of these (default 2e6)"
    )
    check.add_argument("--seed", type=int, default=0, help="of the choice of places (default 0)")
    check.add_argument("--forecast", action="store_true", help="print what would be done and its cost, and do nothing")
    check.add_argument("--yes", action="store_true", help="do not ask before beginning")
    check.set_defaults(do=_check)


def _serve(words: argparse.Namespace) -> int:
    from stemloop.campaign.host import serve_by_hand
    from stemloop.core.errors import InputError

    if (words.tls_cert is None) != (words.tls_key is None):
        raise InputError("give --tls-cert and --tls-key together.")
    serve_by_hand(
        words.instrument,
        words.dir,
        specimen=words.specimen,
        seed=words.seed,
        limits=words.limits,
        dose_budget=words.max_dose,
        host=words.host,
        port=words.port,
        tls=(words.tls_cert, words.tls_key) if words.tls_cert else None,
        tell=print,
    )
    return 0


def _check(words: argparse.Namespace) -> int:
    import json
    import os
    import sys

    from stemloop.instrument.client import connect
    from stemloop.instrument.examination import examine, forecast

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    token = words.token or os.environ.get("STEMLOOP_TOKEN") or None
    with connect(words.address, token, ca=words.ca) as scope:
        ahead = forecast(scope, words.moves, words.max_electrons, words.seed)
        if words.forecast:
            print(json.dumps(ahead, indent=2))
            return 0
        tell(f"{ahead['instrument']}: this check does the following.")
        for line in ahead["does"]:
            tell(f"  - {line}")
        tell(
            f"It takes at most {ahead['electrons_at_most']:.3g} electrons, {words.max_electrons:.3g} in one frame, "
            f"and {ahead['beam_time_s_at_most']:.3g} s of beam; usually far less."
        )
        if sys.stdin.isatty() and not words.yes and input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
            return 2
        report = examine(scope, words.moves, words.max_electrons, words.seed, tell)
    print(json.dumps(report, indent=2))
    return 0 if report["ok"] else 1
