"""``transfer`` and ``receive``: files from here to elsewhere, compared with their SHA-256."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from stemloop.commands.convert import bar


def add(verbs: Any) -> None:
    """Add the verbs ``transfer`` and ``receive``."""
    move = verbs.add_parser("transfer", help="copy a file or folder elsewhere; done means compared and flushed")
    move.add_argument("source", metavar="SRC")
    move.add_argument("destination", metavar="DST", help="folder, s3://bucket/prefix, https://..., rsync:, globus:")
    move.add_argument("--overwrite", action="store_true", help="replace files that are there and differ")
    move.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token of a receiver")
    move.add_argument("--ca", metavar="FILE", help="the receiver's certificate")
    move.add_argument("--quiet", action="store_true", help="no progress bar")
    move.set_defaults(do=_transfer)

    take = verbs.add_parser("receive", help="take files from other stemloops into a folder, until Ctrl-C")
    take.add_argument("folder", type=Path, metavar="DIR")
    take.add_argument("--token-file", type=Path, required=True, metavar="FILE", help="holds the token")
    take.add_argument("--host", default="127.0.0.1")
    take.add_argument("--port", type=int, default=8460)
    take.add_argument("--tls-cert", metavar="FILE")
    take.add_argument("--tls-key", metavar="FILE")
    take.set_defaults(do=_receive)


def _token(path: Path | None) -> str:
    return path.read_text().strip() if path else os.environ.get("STEMLOOP_TOKEN", "")


def _transfer(words: argparse.Namespace) -> int:
    from stemloop.store import transfer

    kind, _, rest = words.destination.partition(":")
    if kind == "rsync":
        transfer.rsync(words.source, rest)
        print(f"{words.source}: at {rest}, compared")
        return 0
    if kind == "globus":
        task = transfer.globus(words.source, rest)
        print(f"{words.source}: at {rest}, task {task}")
        return 0
    with bar(Path(words.source).name, words.quiet) as progress:
        sent = transfer.transfer(
            words.source,
            words.destination,
            overwrite=words.overwrite,
            token=_token(words.token_file),
            ca=words.ca,
            progress=progress,
        )
    for file in sent:
        print(f"{file.sha256}  {file.name}: {file.size} bytes, {file.sent} sent")
    return 0


def _receive(words: argparse.Namespace) -> int:
    from stemloop.store import receiver

    receiver.serve(words.folder, _token(words.token_file), words.host, words.port, words.tls_cert, words.tls_key)
    return 0
