"""The instrument's server: one port, one process, one thread that touches the instrument.

HTTP: ``GET /`` says what this is; ``GET /state``, ``POST /lease`` and ``DELETE /lease`` need a bearer token.
WebSocket ``/control``: one msgpack dictionary a message (:mod:`stemloop.instrument.wire`), one reply each.

=========== ============================================ ==========================================================
``op``      fields                                       reply
=========== ============================================ ==========================================================
``hello``   ``token``, ``lease_id``?                     ``who``, ``role``, ``fencing``, ``leased``; comes first
``acquire`` ``ttl_s``?, ``takeover``?, ``expected``?     ``lease_id``, ``fencing``, ``ttl_s``
``renew``   ``fencing``                                  nothing more
``release``                                              nothing more
``execute`` ``id``, ``fencing``, ``instruction``,        ``frames``, ``electrons``, ``state``, ``calibration``,
            ``data``?                                    ``sha256``
``state``                                                ``state``
``dose``                                                 ``dose``
``info``                                                 ``info``, ``limits``
=========== ============================================ ==========================================================

Each message carries ``n``, which its reply repeats. A reply has ``ok``; without it ``code`` and ``message`` are those
of an error of ``core.errors``. Whenever nobody holds the lease any more the beam is blanked.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse, Response

import stemloop
from stemloop.core.errors import InputError, LeaseError, LimitError, NotAuthorised, StemloopError, StorageError
from stemloop.core.protocols import FrameSink, Instrument
from stemloop.instrument import wire
from stemloop.instrument.guard import Command, Guard
from stemloop.instrument.limits import Limits
from stemloop.instrument.session import Identity, Lease, LeaseDesk, Tokens
from stemloop.instrument.spool import Audit, DirectoryLock, Spool, sync_directory

_log = logging.getLogger(__name__)

ADDRESS_FILE = "address.json"
TOKENS_FILE = "tokens.json"
LIMITS_FILE = "limits.json"

#: A server waits at least so long [s] for its first client before it calls itself idle.
FIRST_CLIENT_S = 30.0

_HELLO_S = 10.0
_SHUTDOWN_S = 10
_TICK_S = (0.02, 0.5)
_MAX_BODY_BYTES = 4096

_STATUS = {NotAuthorised: 403, LeaseError: 409, LimitError: 409, InputError: 422}

T = TypeVar("T")


class _Talk:
    """One connection: who speaks, and the lease it holds."""

    def __init__(self) -> None:
        self.who: Identity | None = None
        self.lease_id: str | None = None

    @property
    def speaker(self) -> Identity:
        if self.who is None:
            raise NotAuthorised("say hello with a token first.")
        return self.who


class Station:
    """What the server does, apart from HTTP: conversations, the lease's watch, the way into the instrument's thread."""

    def __init__(self, guard: Guard, tokens: Tokens, thread: ThreadPoolExecutor, grace_s: float) -> None:
        self.guard = guard
        self.tokens = tokens
        self.desk: LeaseDesk = guard.desk
        self.connections = 0
        self.visited = False
        self.last_seen = time.monotonic()
        self._thread = thread
        self._grace_s = grace_s

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run ``function`` in the instrument's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    # ------------------------------------------------------------------------------------------------- the lease

    async def acquire(self, who: Identity, ttl_s: float, takeover: bool, expected: int | None = None) -> Lease:
        """Give the lease; if it changes hands the beam is blanked before."""
        try:
            lease = await self.call(self.desk.acquire, who, ttl_s, takeover, expected)
        except StemloopError as error:
            self.guard.note("acquire", who.name, verdict=error.code, takeover=takeover)
            raise
        self.guard.note("acquire", who.name, verdict="done", takeover=takeover, fencing=lease.fencing)
        await self.blank_if_unattended("the lease changed hands")
        return lease

    async def release(self, who: Identity, lease_id: str | None) -> None:
        """End the lease and blank the beam."""
        self.desk.release(who, lease_id)
        self.guard.note("release", who.name)
        await self.blank_if_unattended("the lease was released")

    async def blank_if_unattended(self, reason: str) -> None:
        """Blank the beam if a lease ended; a failure is logged and tried again at the next tick."""
        if self.desk.unattended:
            with suppress(StemloopError):
                await self.call(self.blank, reason)

    def blank(self, reason: str) -> None:
        """Blank the beam if a lease ended and it has not been blanked since. For the instrument's thread."""
        if self.desk.unattended:
            self.guard.blank(reason)

    async def watch(self, idle_exit_s: float | None, stop: Callable[[], None]) -> None:
        """End leases whose time is over, blank, and call ``stop`` after ``idle_exit_s`` [s] without any client."""
        while True:
            try:
                await self._end_lapsed()
            except Exception:
                _log.exception("the lease's watch met an error and goes on")
            if self.connections:
                self.last_seen = time.monotonic()
            if idle_exit_s is not None and time.monotonic() >= self._leave_at(idle_exit_s):
                stop()
            lease = self.desk.lease
            pace = min(lease.ttl_s if lease else math.inf, self._grace_s, idle_exit_s or math.inf) / 10
            await asyncio.sleep(min(max(pace, _TICK_S[0]), _TICK_S[1]))

    def _leave_at(self, idle_exit_s: float) -> float:
        return self.last_seen + (idle_exit_s if self.visited else max(idle_exit_s, FIRST_CLIENT_S))

    async def _end_lapsed(self) -> None:
        lapsed = self.desk.lapse()
        if lapsed is not None:
            self.guard.note("lapse", lapsed.holder.name, fencing=lapsed.fencing)
        await self.blank_if_unattended("nobody holds the lease")

    # ----------------------------------------------------------------------------------------------- conversation

    async def converse(self, connection: WebSocket) -> None:
        """Answer the messages of one client until it goes."""
        talk = _Talk()
        self.connections += 1
        self.visited = True
        try:
            await self._answer_all(connection, talk)
        except (WebSocketDisconnect, RuntimeError, TimeoutError):
            pass  # the client is gone, in the middle of a reply or before it said hello
        finally:
            self.connections -= 1
            self.last_seen = time.monotonic()
            if talk.lease_id is not None:
                self.desk.away(talk.lease_id, self._grace_s)

    async def _answer_all(self, connection: WebSocket, talk: _Talk) -> None:
        await connection.accept()
        while True:
            waiting = connection.receive()
            event = await (waiting if talk.who else asyncio.wait_for(waiting, _HELLO_S))
            if event["type"] == "websocket.disconnect":
                return
            await connection.send_bytes(await self._answer(talk, event.get("bytes")))
            if talk.who is None:
                await connection.close(1008)
                return

    async def _answer(self, talk: _Talk, data: bytes | None) -> bytes:
        number = None
        try:
            if data is None:
                raise InputError("messages are binary msgpack; a text message came.")
            message = wire.decode(data)
            number = wire.take(message, "n", int, None)
            reply = await self._do(talk, wire.take(message, "op", str), message)
            return reply if isinstance(reply, bytes) else wire.encode({"n": number, "ok": True, **reply})
        except StemloopError as error:
            return wire.encode({"n": number, "ok": False, "code": error.code, "message": str(error)})
        except Exception as error:
            _log.exception("a message could not be answered")
            text = f"the server failed on this message: {type(error).__name__}: {error}"
            return wire.encode({"n": number, "ok": False, "code": "instrument", "message": text})

    async def _do(self, talk: _Talk, op: str, message: dict[str, Any]) -> dict[str, Any] | bytes:
        actions: dict[str, Callable[[_Talk, dict[str, Any]], Any]] = {
            "hello": self._hello,
            "acquire": self._acquire,
            "renew": self._renew,
            "release": self._release,
            "execute": self._execute,
            "state": self._state,
            "dose": self._dose,
            "info": self._info,
        }
        if op not in actions:
            raise InputError(f"unknown op {op!r:.40}; known: {', '.join(actions)}.")
        if op != "hello":
            talk.speaker.require("viewer", op)
        result: dict[str, Any] | bytes = await actions[op](talk, message)
        return result

    async def _hello(self, talk: _Talk, message: dict[str, Any]) -> dict[str, Any]:
        who = self.identify(wire.take(message, "token", str))
        lease_id = wire.take(message, "lease_id", str, None)
        leased = lease_id is not None and self.desk.adopt(lease_id, who)
        talk.who, talk.lease_id = who, lease_id if leased else None
        return {"who": who.name, "role": who.role, "fencing": self.desk.fencing, "leased": leased}

    def identify(self, token: str) -> Identity:
        """Whose token this is; a wrong one is audited."""
        try:
            return self.tokens.identify(token)
        except NotAuthorised:
            self.guard.note("hello", "unknown", verdict="not-authorised")
            raise

    async def _acquire(self, talk: _Talk, message: dict[str, Any]) -> dict[str, Any]:
        lease = await self.acquire(
            talk.speaker,
            float(wire.take(message, "ttl_s", (int, float), 10.0)),
            wire.take(message, "takeover", bool, False),
            wire.take(message, "expected", int, None),
        )
        talk.lease_id = lease.lease_id
        return {"lease_id": lease.lease_id, "fencing": lease.fencing, "ttl_s": lease.ttl_s}

    async def _renew(self, talk: _Talk, message: dict[str, Any]) -> dict[str, Any]:
        self.desk.check(talk.lease_id, wire.take(message, "fencing", int))
        return {}

    async def _release(self, talk: _Talk, message: dict[str, Any]) -> dict[str, Any]:
        if talk.lease_id is not None:
            lease_id, talk.lease_id = talk.lease_id, None
            with suppress(LeaseError):  # it was over already
                await self.release(talk.speaker, lease_id)
        return {}

    async def _execute(self, talk: _Talk, message: dict[str, Any]) -> bytes:
        command = Command(
            talk.speaker,
            talk.lease_id,
            wire.take(message, "fencing", int, None),
            wire.take(message, "id", str),
            wire.take(message, "instruction", dict),
            wire.take(message, "data", str, "inline"),
        )
        with self.desk.busy(talk.lease_id):
            return await self.call(self._execute_and_encode, command, message.get("n"))

    def _execute_and_encode(self, command: Command, number: int | None) -> bytes:
        return wire.encode({"n": number, "ok": True, **self.guard.execute(command)})

    async def _state(self, talk: _Talk, message: dict[str, Any]) -> dict[str, Any]:
        return {"state": await self.call(self.guard.state)}

    async def _dose(self, talk: _Talk, message: dict[str, Any]) -> dict[str, Any]:
        return {"dose": self.guard.ledger.dose()}

    async def _info(self, talk: _Talk, message: dict[str, Any]) -> dict[str, Any]:
        return {"info": wire.info_to_message(self.guard.info), "limits": self.guard.limits.to_dict()}


# --------------------------------------------------------------------------------------------------------- HTTP


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return value


def build_app(station: Station, lifespan: Any = None) -> FastAPI:
    """The HTTP and WebSocket face of a station."""
    app = FastAPI(
        title="stemloop instrument", version=stemloop.__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )

    def speaker(request: Request) -> Identity:
        station.last_seen = time.monotonic()
        station.visited = True
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise NotAuthorised("send the header 'Authorization: Bearer <token>'.")
        return station.identify(token.strip())

    @app.exception_handler(StemloopError)
    async def refuse(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StemloopError)
        status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
        return JSONResponse({"code": error.code, "message": str(error)}, status)

    @app.get("/")
    async def discover() -> dict[str, Any]:
        info = station.guard.info
        return {
            "name": info.name,
            "version": stemloop.__version__,
            "instructions": list(info.instructions),
            "control": "control",
        }

    @app.get("/state")
    async def state(request: Request) -> JSONResponse:
        speaker(request)
        lease = station.desk.lease
        return JSONResponse(
            _jsonable(
                wire.plain(
                    {
                        "state": await station.call(station.guard.state),
                        "dose": station.guard.ledger.dose(),
                        "limits": station.guard.limits.content_hash,
                        "lease": lease and {"holder": lease.holder.name, "fencing": lease.fencing},
                    }
                )
            )
        )

    @app.post("/lease")
    async def acquire(request: Request) -> dict[str, Any]:
        who = speaker(request)
        asked = await _body(request)
        lease = await station.acquire(
            who,
            float(wire.take(asked, "ttl_s", (int, float), 10.0)),
            wire.take(asked, "takeover", bool, False),
        )
        return {"lease_id": lease.lease_id, "fencing": lease.fencing, "ttl_s": lease.ttl_s}

    @app.delete("/lease", status_code=204)
    async def release(request: Request) -> Response:
        await station.release(speaker(request), request.query_params.get("lease_id"))
        return Response(status_code=204)

    @app.websocket("/control")
    async def control(connection: WebSocket) -> None:
        await station.converse(connection)

    return app


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object in a request, empty if there is none."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > _MAX_BODY_BYTES:
            raise InputError(f"the request has more than {_MAX_BODY_BYTES} bytes.")
    try:
        asked = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise InputError('the request must be a JSON object such as {"ttl_s": 10}.')
    return asked


# -------------------------------------------------------------------------------------------------------- serve


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


def _write_atomically(path: Path, value: Any) -> None:
    part = path.with_name(f"{path.name}.part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_directory(path.parent)


def _tokens(directory: Path, given: Mapping[str, str] | None) -> Tokens:
    """The tokens given, those kept in the directory, or new ones, which are kept in a file of mode 0600."""
    if given is not None:
        return Tokens(given)
    path = directory / TOKENS_FILE
    if not path.exists():
        _write_atomically(path, Tokens.make())
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise NotAuthorised(f"{path} can be read by others: take their rights away with 'chmod 600 {path}'.")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        kept = None
    if not isinstance(kept, dict):
        raise InputError(f"{path} is no JSON object from names to tokens: remove it and new ones are made.")
    return Tokens(kept)


def _loopback(host: str, port: int) -> socket.socket:
    """A listening socket on a loopback address; any other is refused in this version."""
    address = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InputError(
            f"this version serves loopback addresses only, and {host!r} is none, because the channel is not encrypted: "
            "use host='127.0.0.1' and reach it from elsewhere through 'ssh -L'."
        )
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
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
    (directory / ADDRESS_FILE).unlink(missing_ok=True)
    return lock


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
    idle_exit_s: float | None = None,
    grace_s: float = 5.0,
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
        From ``role`` or ``role:person`` to a secret of at least 16 characters; without it they are made once and kept
        in ``directory/tokens.json`` (mode 0600).
    host, port : str, int
        A loopback address (any other is refused in this version) and a port, 0 for a free one.
    idle_exit_s : float, optional
        Stop after this time [s] without a client, but not in the first 30 s if none has come yet.
    grace_s : float
        How long [s] a lease outlives the connection of its holder.

    Raises
    ------
    InputError, NotAuthorised, StorageError, IntegrityError
        If the arguments, the tokens' file, the disk or the stored records do not allow a start.
    """
    directory = Path(directory)
    listener = _loopback(host, port)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="instrument")
    closers: list[Callable[[], Any]] = [listener.close]  # called in reverse order
    try:
        lock = _open_directory(directory)
        closers += [lock.close, lambda: (directory / ADDRESS_FILE).unlink(missing_ok=True)]
        known = _tokens(directory, tokens)
        spool = Spool(directory / "spool.log")
        closers.append(spool.close)
        audit = Audit(directory / "audit.jsonl")
        closers.append(audit.close)

        def begin() -> Guard:
            desk = LeaseDesk(spool.fencing, spool.lease)
            return Guard(instrument, spool, audit, desk, _limits(limits, instrument), dose_budget, sink)

        guard = thread.submit(begin).result()
        _write_atomically(
            directory / LIMITS_FILE, {**guard.limits.to_dict(), "content_hash": guard.limits.content_hash}
        )
        station = Station(guard, known, thread, grace_s)
        _run(station, listener, directory, idle_exit_s)
        guard.desk.drop()
        with suppress(StemloopError):
            thread.submit(station.blank, "the server stops").result()
    finally:
        _close(thread, instrument, sink)
        for close in reversed(closers):
            close()


def _run(station: Station, listener: socket.socket, directory: Path, idle_exit_s: float | None) -> None:
    address = listener.getsockname()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        def stop() -> None:
            server.should_exit = True

        watch = asyncio.create_task(station.watch(idle_exit_s, stop))
        station.guard.note("start", "server", pid=os.getpid(), limits=station.guard.limits.content_hash)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        _write_atomically(
            directory / ADDRESS_FILE,
            {
                "host": address[0],
                "port": address[1],
                "pid": os.getpid(),
                "started": started,
                "version": stemloop.__version__,
            },
        )
        yield
        watch.cancel()
        station.guard.note("stop", "server", pid=os.getpid())

    server = _Uvicorn(
        uvicorn.Config(
            build_app(station, lifespan),
            log_config=None,
            access_log=False,
            loop="asyncio",
            lifespan="on",
            ws_max_size=wire.MAX_COMMAND_BYTES,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=_SHUTDOWN_S,
            server_header=False,
        )
    )
    server.run(sockets=[listener])


def _close(thread: ThreadPoolExecutor, instrument: Instrument, sink: FrameSink | None) -> None:
    """Close the instrument and the sink in the thread that used them."""
    for owned in (instrument, sink):
        if owned is not None:
            error = thread.submit(owned.close).exception()
            if error is not None:
                _log.error("%s did not close: %s", type(owned).__name__, error)
    thread.shutdown(wait=True)
