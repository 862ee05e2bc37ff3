"""``gateway``: other people's ways to drive a microscope that our server guards."""

from __future__ import annotations

import argparse
import json
import signal
import threading
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    """Add the verb ``gateway`` with its kinds."""
    gateway = verbs.add_parser("gateway", help="let other software drive an instrument through its server")
    kinds = gateway.add_subparsers(dest="kind", required=True, metavar="KIND")

    pyro = kinds.add_parser("pyro", help="for notebooks that use Pyro5")
    _server(pyro)
    pyro.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1)")
    pyro.add_argument("--port", type=int, default=0, metavar="N", help="port (default 0: a free one)")
    pyro.add_argument("--secret", type=Path, metavar="FILE", help="holds what notebooks must give; made if missing")
    pyro.add_argument("--cert", type=Path, metavar="FILE", help="certificate of mutual TLS (PEM)")
    pyro.add_argument("--key", type=Path, metavar="FILE", help="its key (PEM)")
    pyro.add_argument("--client-ca", type=Path, metavar="FILE", help="authority of the notebooks' certificates (PEM)")
    pyro.add_argument("--idle", type=float, default=60.0, metavar="S", help="seconds until a silent notebook is let go")
    pyro.set_defaults(do=_pyro)

    intersect = kinds.add_parser("intersect", help="as a capability of INTERSECT, through a broker")
    _server(intersect)
    intersect.add_argument("--broker", default="127.0.0.1:1883", metavar="HOST:PORT", help="MQTT broker, on loopback")
    intersect.add_argument("--user", required=True, metavar="NAME", help="of the broker")
    intersect.add_argument("--password-file", required=True, type=Path, metavar="FILE", help="holds its password")
    for name in ("organization", "facility", "system", "service"):
        intersect.add_argument(f"--{name}", required=True, metavar="NAME", help="where the service stands")
    intersect.add_argument("--idle", type=float, default=60.0, metavar="S", help="seconds of silence until it lets go")
    intersect.set_defaults(do=_intersect)


def _server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="ADDRESS", help="the instrument's server: its folder or wss://host:port")
    parser.add_argument("--server-ca", metavar="FILE", help="the server's certificate, or its SHA-256")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds the server's token for this gateway")
    parser.add_argument("--role", default="agent", help="role to drive in (default agent)")


def _token(words: argparse.Namespace) -> str | None:
    return None if words.token_file is None else words.token_file.read_text(encoding="utf-8").strip()


def _pyro(words: argparse.Namespace) -> int:
    from stemloop.core.errors import InputError
    from stemloop.instrument.gateways import pyro

    given = [words.cert, words.key, words.client_ca]
    if any(given) and not all(given):
        raise InputError("mutual TLS takes all three of --cert, --key and --client-ca.")
    tls = pyro.Tls(*given) if all(given) else None
    path = words.secret
    if path is None and tls is None:
        if not Path(words.address).is_dir():
            raise InputError("name the secret's file with --secret, or use mutual TLS (--cert, --key, --client-ca).")
        path = Path(words.address) / "pyro-secret"

    def ready(uri: str) -> None:
        print(json.dumps({"uri": uri, "secret": path and str(path), "tls": tls is not None}), flush=True)

    secret = None if path is None else pyro.read_secret(path)
    pyro.serve(
        words.address,
        _token(words),
        role=words.role,
        ca=words.server_ca,
        host=words.host,
        port=words.port,
        secret=secret,
        tls=tls,
        idle_s=words.idle,
        ready=ready,
        until=_stopped(),
    )
    return 0


def _intersect(words: argparse.Namespace) -> int:
    from stemloop.core.errors import InputError
    from stemloop.instrument.gateways import intersect

    host, _, port = words.broker.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"a broker is HOST:PORT; got {words.broker!r}.")
    place = {name: getattr(words, name) for name in ("organization", "facility", "system", "service")}

    def ready() -> None:
        print(json.dumps({"service": "{organization}.{facility}.{system}.-.{service}".format(**place)}), flush=True)

    intersect.serve(
        words.address,
        place,
        words.user,
        words.password_file.read_text(encoding="utf-8").strip(),
        token=_token(words),
        role=words.role,
        ca=words.server_ca,
        host=host,
        port=int(port),
        idle_s=words.idle,
        ready=ready,
        until=_stopped(),
    )
    return 0


def _stopped() -> threading.Event:
    """An event that SIGTERM sets, so that the lease is given back and the beam blanked at the end."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop
