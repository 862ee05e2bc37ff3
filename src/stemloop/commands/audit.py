"""``audit verify``: whether an audit log is what was written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """Add the verb ``audit``."""
    audit = verbs.add_parser("audit", help="check the log of who asked an instrument for what")
    actions = audit.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="find any byte that was changed since it was written")
    verify.add_argument("file", type=Path, metavar="FILE", help="audit.jsonl of a server's folder")
    verify.add_argument("--head", metavar="LINES:SHA256", help="an end kept from GET /audit/head: finds cut-off lines")
    verify.set_defaults(do=_verify)


def _verify(words: argparse.Namespace) -> int:
    from stemloop.core.errors import InputError
    from stemloop.instrument.audit import Head, verify_audit

    head = None
    if words.head is not None:
        lines, _, sha256 = words.head.partition(":")
        if not lines.isdigit() or len(sha256) != 64:
            raise InputError(f"a head is LINES:SHA256 with 64 hexadecimal digits; got {words.head!r}.")
        head = Head(int(lines), sha256.lower())
    found = verify_audit(words.file, head)
    print(f"{words.file}: {found.lines} lines, each as it was written; head {found.lines}:{found.sha256}")
    return 0
