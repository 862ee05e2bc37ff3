"""``instrument token`` and ``instrument certificate``: who may come to an instrument's server, and how it is known."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stemloop.instrument.tokens import Entry, TokenFile


def add(actions: Any) -> None:
    """Add the actions below the verb ``instrument``."""
    token = actions.add_parser("token", help="issue, list and revoke the tokens of an instrument's server")
    verbs = token.add_subparsers(dest="token", required=True, metavar="VERB")

    issue = verbs.add_parser("issue", help="make a token and print it, once")
    issue.add_argument("directory", type=Path, metavar="DIR", help="the server's folder")
    issue.add_argument("--role", required=True, help="viewer, agent, operator or engineer")
    issue.add_argument("--name", default="", help="of the person or program")
    issue.add_argument("--hours", type=float, metavar="H", help="how long it is good for (default: until revoked)")
    issue.add_argument("--only", metavar="KIND,...", help="instructions that it is good for (default: all)")
    issue.add_argument("--instrument", action="append", metavar="NAME", help="instrument that it is good for")
    issue.set_defaults(do=_issue)

    lists = verbs.add_parser("list", help="the tokens that were issued")
    lists.add_argument("directory", type=Path, metavar="DIR")
    lists.set_defaults(do=_list)

    revoke = verbs.add_parser("revoke", help="end a token now, also on a running server")
    revoke.add_argument("directory", type=Path, metavar="DIR")
    revoke.add_argument("token_id", metavar="ID", help="as 'token list' names it")
    revoke.set_defaults(do=_revoke)

    certificate = actions.add_parser("certificate", help="make a certificate and key for TLS")
    certificate.add_argument("directory", type=Path, metavar="DIR")
    certificate.add_argument("hosts", nargs="*", metavar="HOST", help="names and addresses of the server")
    certificate.set_defaults(do=_certificate)


def _file(words: argparse.Namespace) -> TokenFile:
    from stemloop.instrument.tokens import TOKENS_FILE, TokenFile

    words.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return TokenFile(words.directory / TOKENS_FILE)


def _issue(words: argparse.Namespace) -> int:
    token, entry = _file(words).issue(
        words.role,
        words.name,
        None if words.hours is None else words.hours * 3600,
        words.only.split(",") if words.only else None,
        words.instrument,
    )
    print(_line(entry))
    print(token)
    return 0


def _line(entry: Entry) -> str:
    def moment(seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(seconds))

    words = [entry.token_id, entry.name]
    words.append("until revoked" if entry.expires_s is None else f"until {moment(entry.expires_s)}")
    if entry.kinds is not None:
        words.append(f"only {','.join(entry.kinds)}")
    if entry.instruments is not None:
        words.append(f"on {','.join(entry.instruments)}")
    if entry.revoked_s is not None:
        words.append(f"revoked {moment(entry.revoked_s)}")
    return "  ".join(words)


def _list(words: argparse.Namespace) -> int:
    for entry in _file(words).entries():
        print(_line(entry))
    return 0


def _revoke(words: argparse.Namespace) -> int:
    print(_line(_file(words).revoke(words.token_id)))
    return 0


def _certificate(words: argparse.Namespace) -> int:
    from stemloop.instrument.tls import fingerprint, self_signed

    certificate, key = self_signed(words.directory, words.hosts)
    print(f"{certificate}\n{key}\nfingerprint {fingerprint(certificate)}")
    return 0
