"""The instrument's server: one port, one process, one thread that touches the instrument.

:mod:`~stemloop.instrument.rest` is its face on HTTP, :mod:`~stemloop.instrument.control` the channel of the commands,
:mod:`~stemloop.instrument.manage` that of telemetry and heartbeats; :mod:`~stemloop.instrument.station` joins them with
the :mod:`~stemloop.instrument.guard`, the one door to the instrument.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

import stemloop
from stemloop.core.errors import InputError, StemloopError, StorageError
from stemloop.core.protocols import FrameSink, Instrument
from stemloop.instrument import tls as certificates
from stemloop.instrument import wire
from stemloop.instrument.audit import Audit
from stemloop.instrument.files import DirectoryLock, write_atomically
from stemloop.instrument.guard import Guard
from stemloop.instrument.hand import Hand
from stemloop.instrument.lease import LeaseDesk
from stemloop.instrument.limits import Limits
from stemloop.instrument.rest import build_app
from stemloop.instrument.spool import Spool
from stemloop.instrument.station import Station
from stemloop.instrument.tokens import TOKENS_FILE, TokenFile, Tokens, secret_file

_log = logging.getLogger(__name__)

ADDRESS_FILE = "address.json"
LOCAL_FILE = "local.json"
LIMITS_FILE = "limits.json"

_SHUTDOWN_S = 10
_ABORT_AGAIN_S = 0.02
_MAX_CONNECTIONS = 256

TLS = tuple[str | Path, str | Path]


class _Config(uvicorn.Config):
    """No session tickets: clients that read and write in two threads may lose words while one is read (duplex.py)."""

    def load(self) -> None:
        super().load()
        if self.ssl is not None:
            self.ssl.num_tickets = 0


class _Uvicorn(uvicorn.Server):
    """A server that ends quietly at SIGTERM or SIGINT instead of raising the signal again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _tokens(directory: Path, given: Mapping[str, str] | None, name: str, local: bool) -> Tokens:
    """The tokens given; or those that were issued and, on loopback, new ones for programs of the same user."""
    if given is not None:
        return Tokens(given, instrument=name)
    issued = TokenFile(directory / TOKENS_FILE)
    if not local:
        if not any(not entry.verdict(time.time(), name) for entry in issued.entries()):
            raise InputError(
                f"a server that others can reach needs tokens, and {issued.path} holds none that is good: "
                f"issue one with 'stemloop instrument token issue {directory} --role engineer'."
            )
        return Tokens(None, issued, name)
    secrets = Tokens.make()
    secret_file(directory / LOCAL_FILE, secrets)
    return Tokens(secrets, issued, name)


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach ``host``."""
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int, tls: TLS | None) -> socket.socket:
    """A listening socket. A server leaves loopback only with TLS."""
    if not is_loopback(host) and tls is None:
        raise InputError(
            f"{host!r} can be reached from other machines, and without TLS anybody on the way reads the tokens: give "
            "tls=(certificate, key) (--tls-cert, --tls-key), or use host='127.0.0.1' and reach it through 'ssh -L'."
        )
    address = "127.0.0.1" if host == "localhost" else host
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # asyncio sends at once only on sockets that name TCP; others hold a reply back until an event before it has been
    # acknowledged, 40 ms later
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}. Use port=0 for a free one.") from None
    return listener


def _open_directory(directory: Path) -> DirectoryLock:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = DirectoryLock(directory)
    except OSError as error:
        raise StorageError(f"cannot use {directory}: {error.strerror}. Choose a writable directory.") from None
    _forget(directory)
    return lock


def _forget(directory: Path) -> None:
    """Remove what holds only while a server runs."""
    for name in (ADDRESS_FILE, LOCAL_FILE):
        (directory / name).unlink(missing_ok=True)


def _limits(declared: Limits | Mapping[str, Any] | None, instrument: Instrument) -> Limits:
    if declared is None:
        return Limits.from_info(instrument.info)
    return declared if isinstance(declared, Limits) else Limits.from_dict(declared)


def serve(
    instrument: Instrument,
    directory: str | Path,
    *,
    sink: FrameSink | None = None,
    limits: Limits | Mapping[str, Any] | None = None,
    dose_budget: float | None = None,
    tokens: Mapping[str, str] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: TLS | None = None,
    idle_exit_s: float | None = None,
    grace_s: float = 5.0,
    heartbeat_s: float = 3.0,
) -> None:
    """Serve an instrument until SIGTERM, or until ``idle_exit_s`` [s] have passed without any client.

    Once clients may connect, ``directory/address.json`` has the host, port, process id and start time; it goes away
    with the server. At the end the beam is blanked and the instrument and the sink are closed, all in the thread that
    used them.

    Parameters
    ----------
    instrument : Instrument
        Taken over: after this call nobody else uses it. It is called from one thread only.
    directory : path
        The server's memory: what was exposed, the audit log, tokens. Started again on the same directory, a server
        goes on where it stopped. One server at a time may use it.
    sink : FrameSink, optional
        Where frames go that clients ask for with ``data="stream"``. Taken over, too.
    limits : Limits or dict, optional
        What may be asked; without it the instrument's field and the ranges of :class:`Limits`.
    dose_budget : float, optional
        Electrons that all exposures in this directory may take together; None for no bound.
    tokens : dict, optional
        From ``role`` or ``role:person`` to a secret of at least 16 characters; without it those that were issued
        (``directory/tokens.json``, hashes only) and, on loopback, one of each role that is made anew at each start
        for programs of the same user (``directory/local.json``, mode 0600).
    host, port : str, int
        An address and a port, 0 for a free one. Any address but loopback needs ``tls`` and tokens.
    tls : (path, path), optional
        Certificate and key in PEM form; :func:`stemloop.instrument.tls.self_signed` makes them.
    idle_exit_s : float, optional
        Stop after this time [s] without a client, but not in the first 30 s if none has come yet.
    grace_s : float
        How long [s] a lease outlives the connection of its holder.
    heartbeat_s : float
        A connection whose other end has not answered a ping for this time [s] is closed. Pings are this far apart.

    Raises
    ------
    InputError, NotAuthorised, StorageError, IntegrityError
        If the arguments, the tokens' file, the disk or the stored records do not allow a start.
    """
    directory = Path(directory)
    if tls is not None:
        certificates.check_pair(*tls)
    listener = _listen(host, port, tls)
    hand = Hand()
    closers: list[Callable[[], Any]] = [listener.close]  # called in reverse order
    try:
        lock = _open_directory(directory)
        closers += [lock.close, lambda: _forget(directory)]
        known = _tokens(directory, tokens, hand.submit(lambda: instrument.info).result().name, is_loopback(host))
        spool = Spool(directory / "spool.log")
        closers.append(spool.close)
        audit = Audit(directory / "audit.jsonl")
        closers.append(audit.close)

        def begin() -> Guard:
            desk = LeaseDesk(spool.fencing, spool.lease)
            return Guard(instrument, spool, audit, desk, _limits(limits, instrument), dose_budget, sink)

        guard = hand.submit(begin).result()
        write_atomically(directory / LIMITS_FILE, {**guard.limits.to_dict(), "content_hash": guard.limits.content_hash})
        station = Station(guard, known, hand, grace_s)
        _run(station, listener, directory, idle_exit_s, tls, heartbeat_s)
        guard.desk.drop("the server stops")
        _end_running(guard)
        with suppress(StemloopError):
            hand.submit(station.blank, "the server stops").result()
    finally:
        _close(hand, instrument, sink)
        for close in reversed(closers):
            close()


def _run(
    station: Station,
    listener: socket.socket,
    directory: Path,
    idle_exit_s: float | None,
    tls: TLS | None,
    heartbeat_s: float,
) -> None:
    address = listener.getsockname()
    scheme = "ws" if tls is None else "wss"

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        def stop() -> None:
            server.should_exit = True

        station.open()
        watch = asyncio.create_task(station.watch(idle_exit_s, stop))
        station.guard.note("start", "server", pid=os.getpid(), limits=station.guard.limits.content_hash)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_atomically(
            directory / ADDRESS_FILE,
            {
                "host": address[0],
                "port": address[1],
                "scheme": scheme,
                "fingerprint": certificates.fingerprint(tls[0]) if tls else None,
                "pid": os.getpid(),
                "started": started,
                "version": stemloop.__version__,
            },
        )
        yield
        watch.cancel()
        station.guard.note("stop", "server", pid=os.getpid())

    server = _Uvicorn(
        _Config(
            build_app(station, lifespan),
            log_config=None,
            access_log=False,
            loop="asyncio",
            lifespan="on",
            ws_max_size=wire.MAX_COMMAND_BYTES,
            ws_per_message_deflate=False,
            ws_ping_interval=heartbeat_s,
            ws_ping_timeout=heartbeat_s,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_SHUTDOWN_S,
            server_header=False,
            ssl_certfile=tls and str(tls[0]),
            ssl_keyfile=tls and str(tls[1]),
        )
    )
    server.run(sockets=[listener])


def _end_running(guard: Guard) -> None:
    """Abort the command that runs until it has ended, where the instrument can: who stopped us may not wait long."""
    while (running := guard.running) is not None and guard.can_abort():
        with suppress(StemloopError):
            guard.abort(running)
        time.sleep(_ABORT_AGAIN_S)


def _close(hand: Hand, instrument: Instrument, sink: FrameSink | None) -> None:
    """Close the instrument and the sink in the thread that used them."""
    for owned in (instrument, sink):
        if owned is not None:
            error = hand.submit(owned.close).exception()
            if error is not None:
                _log.error("%s did not close: %s", type(owned).__name__, error)
    hand.close()
