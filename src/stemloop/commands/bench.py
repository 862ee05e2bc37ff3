"""``bench crash``: crashes on purpose, and the acknowledged frames that did not survive them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """Add the verb ``bench``."""
    bench = verbs.add_parser("bench", help="measure a promise on this machine")
    what = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    crash = what.add_parser("crash", help="kill writers and cut their power; count acknowledged frames that are lost")
    crash.add_argument("--kills", type=int, default=50, metavar="N", help="SIGKILLs of a writer (default 50)")
    crash.add_argument("--cuts", type=int, default=10, metavar="M", help="power cuts; need root (default 10)")
    crash.add_argument("--peers", type=float, default=0.1, metavar="SHARE", help="of that for peers (default 0.1)")
    crash.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    crash.add_argument("--folder", type=Path, metavar="DIR", help="where killed writers write")
    crash.add_argument("--json", type=Path, metavar="FILE", help="write the counts there too")
    crash.set_defaults(do=_crash)


def _crash(words: argparse.Namespace) -> int:
    from stemloop.campaign import crash

    outcome = crash.crash(words.kills, words.cuts, seed=words.seed, folder=words.folder, share=words.peers)
    row = "{:<14}{:<10}{:>8}{:>14}{:>10}{:>8}{:>9}{:>10}"
    print(row.format("container", "crash", "crashes", "acknowledged", "lost", "lost %", "wrong", "unopened"))
    for kind, tallies in (("SIGKILL", outcome.kills), ("power cut", outcome.cuts)):
        for name, tally in tallies.items():
            percent = f"{100 * tally.lost / max(1, tally.acknowledged):.1f}"
            counts = (tally.crashes, tally.acknowledged, tally.lost, percent, tally.wrong, tally.unopened)
            print(row.format(name, kind, *counts))
    for reason in outcome.skipped:
        print(f"skipped: {reason}")
    if words.json:
        words.json.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    return 1 if outcome.lost else 0
