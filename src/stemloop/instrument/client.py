"""A guarded connection to an instrument's server: what the loop holds of a microscope.

A :class:`Client` is synchronous and may be used from several threads. It keeps its lease alive in the background
while its owner thinks, comes back after a dropped connection, and repeats a command with the same id, which exposes
nothing twice.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as open_websocket

from stemloop.core.errors import InputError, InstrumentError, LeaseError, NotAuthorised, StemloopError, from_code
from stemloop.core.instruction import Instruction
from stemloop.core.protocols import Exposure, InstrumentInfo
from stemloop.instrument import wire
from stemloop.instrument.tokens import ROLES

_DROPPED = (OSError, WebSocketException, TimeoutError)
_RETRY_S = 0.05
_RETRY_MAX_S = 0.2

Address = str | Path | Mapping[str, Any]


def _host_and_port(address: Address) -> tuple[str, int]:
    """Where to connect: a server's directory, ``host:port``, a URL, or what ``address.json`` holds."""
    if isinstance(address, Mapping):
        return str(address["host"]), int(address["port"])
    if isinstance(address, Path) or Path(address).is_dir():
        try:
            return _host_and_port(json.loads((Path(address) / "address.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, KeyError):
            raise ConnectionRefusedError(f"no server runs on {address}") from None
    host, _, port = address.split("://", 1)[-1].rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"an address is a server's directory or host:port; got {address!r}.")
    return host.strip("[]"), int(port)


def _token(address: Address, token: str | None, role: str) -> str:
    if token is not None:
        return token
    if isinstance(address, Mapping):
        raise InputError("give the token, or the server's directory as the address.")
    path = Path(address) / "local.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[role])
    except (OSError, ValueError, KeyError):
        raise NotAuthorised(f"no token of role {role!r} in {path}: give the token.") from None


def connect(
    address: Address,
    token: str | None = None,
    role: str = "agent",
    *,
    lease: bool = False,
    takeover: bool = False,
    ttl_s: float = 10.0,
    patience_s: float = 30.0,
) -> Client:
    """Connect to an instrument's server.

    Parameters
    ----------
    address : path, str or dict
        The server's directory (it is waited for and followed when the server starts again on another port),
        ``"host:port"``, or the contents of ``address.json``.
    token : str, optional
        The secret; without it that of ``role`` is read from ``local.json`` in the server's directory.
    role : str
        The role that is needed: ``viewer``, ``agent`` or ``operator``.
    lease, takeover : bool
        Acquire the lease at once; take it over from a lower role.
    ttl_s : float
        How long [s] the lease lives without a sign of this process.
    patience_s : float
        How long [s] to try again when the server cannot be reached, at the start and later.

    Raises
    ------
    InstrumentError
        If the server cannot be reached in ``patience_s``.
    NotAuthorised, LeaseError
        If the token is wrong or its role too low; if somebody else holds the lease.
    """
    if role not in ROLES:
        raise InputError(f"unknown role {role!r}; known: {', '.join(ROLES)}.")
    client = Client(address, token, role, ttl_s, patience_s)
    if lease or takeover:
        try:
            client.acquire(takeover)
        except BaseException:
            client.close()
            raise
    return client


class Client:
    """A connection to an instrument's server; implements :class:`~stemloop.core.protocols.Scope`.

    Made by :func:`connect`. Errors of the server come back as themselves. As a context manager it closes itself.
    """

    def __init__(
        self, address: Address, token: str | None, role: str, ttl_s: float = 10.0, patience_s: float = 30.0
    ) -> None:
        self.who = ""
        self.fencing: int | None = None
        self._address = address
        self._token = token
        self._role = role
        self._ttl_s = ttl_s
        self._patience_s = patience_s
        self._socket: ClientConnection | None = None
        self._lease_id: str | None = None
        self._number = 0
        self._lock = threading.RLock()
        self._closed = threading.Event()
        reply = self._ask({"op": "info"})
        self._info = wire.info_from_message(reply["info"])
        self.limits: dict[str, Any] = reply["limits"]
        threading.Thread(target=self._beat, name="lease heartbeat", daemon=True).start()

    # -------------------------------------------------------------------------------------------------- the scope

    @property
    def info(self) -> InstrumentInfo:
        """What the instrument is."""
        return self._info

    def execute(self, instruction: Instruction, command_id: str, data: str = "inline") -> Exposure:
        """Carry out an instruction under the lease.

        An id that was executed before answers its first result and exposes nothing. With ``data="stream"`` the frames
        travel through the server's stream: ``frames`` is None and ``calibration`` says ``stream``, ``first``,
        ``count``.
        """
        reply = self._ask(
            {
                "op": "execute",
                "id": command_id,
                "instruction": wire.instruction_to_message(instruction),
                "data": data,
            }
        )
        return wire.exposure_from_message(reply)

    def state(self) -> dict[str, Any]:
        """The instrument's state vector."""
        return dict(self._ask({"op": "state"})["state"])

    def dose(self) -> dict[str, float]:
        """``budget``, ``spent``, ``reserved`` and ``left`` in electrons."""
        return dict(self._ask({"op": "dose"})["dose"])

    def close(self) -> None:
        """Give the lease back, if there is one, and leave."""
        self._closed.set()
        with self._lock:
            if self._socket is not None:
                if self._lease_id is not None:
                    with suppress(*_DROPPED, StemloopError):
                        self._exchange({"op": "release"})
                self._drop()
            self._forget()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------- the lease

    def acquire(self, takeover: bool = False) -> int:
        """Take the lease; returns its fencing number, which every command carries from now on."""
        with self._lock:
            self._keep(self._ask({"op": "acquire", "ttl_s": self._ttl_s, "takeover": takeover}))
            assert self.fencing is not None
            return self.fencing

    def release(self) -> None:
        """Give the lease back; the server blanks the beam."""
        with self._lock:
            if self._lease_id is not None:
                self._ask({"op": "release"})
            self._forget()

    @contextmanager
    def lease(self, takeover: bool = False) -> Iterator[int]:
        """Hold the lease inside a ``with`` block; gives its fencing number."""
        fencing = self.acquire(takeover)
        try:
            yield fencing
        finally:
            self.release()

    def _keep(self, reply: dict[str, Any]) -> None:
        self._lease_id, self.fencing = str(reply["lease_id"]), int(reply["fencing"])

    def _forget(self) -> None:
        self._lease_id = self.fencing = None

    def _beat(self) -> None:
        """Renew the lease while nothing else does. A request under way renews it as well."""
        while not self._closed.wait(self._ttl_s / 4):
            if self._lease_id is not None and self._lock.acquire(blocking=False):
                try:
                    self._ask({"op": "renew"}, patience_s=self._ttl_s / 4)
                except (StemloopError, *_DROPPED):
                    pass  # the next command meets the same error and says it to somebody
                finally:
                    self._lock.release()

    # --------------------------------------------------------------------------------------------- the connection

    def _ask(self, message: dict[str, Any], patience_s: float | None = None) -> dict[str, Any]:
        """Send a message and return its reply; over a dropped connection again, until the patience is over."""
        with self._lock:
            begun = time.monotonic()
            wait = _RETRY_S
            while True:
                if self._closed.is_set():
                    raise InstrumentError("this connection was closed: connect again.")
                try:
                    self._reach()
                    return self._exchange(message)
                except _DROPPED as error:
                    self._drop()
                    patience = self._patience_s if patience_s is None else patience_s
                    if time.monotonic() - begun + wait > patience:
                        raise InstrumentError(
                            f"the instrument server at {self._address} cannot be reached ({error}). Look whether it "
                            "runs; repeat with the same command id, which exposes nothing twice."
                        ) from error
                    self._closed.wait(wait)
                    wait = min(2 * wait, _RETRY_MAX_S)

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._socket is not None
        self._number += 1
        fencing = {"fencing": self.fencing} if message["op"] in ("execute", "renew") else {}
        self._socket.send(wire.encode({"n": self._number, **message, **fencing}))
        reply = self._receive()
        while "event" in reply:
            reply = self._receive()
        if reply.get("n") not in (self._number, None):
            raise ConnectionResetError(f"reply {reply.get('n')} came to message {self._number}")
        if not reply.get("ok"):
            raise from_code(str(reply.get("code")), str(reply.get("message")))
        return reply

    def _receive(self) -> dict[str, Any]:
        assert self._socket is not None
        answer = self._socket.recv()
        if not isinstance(answer, bytes):
            raise InstrumentError("the server answered with text: is this a stemloop instrument server?")
        return wire.decode(answer)

    def _reach(self) -> None:
        """Make sure that there is a connection, with our lease if nobody drove in the meantime."""
        if self._socket is not None:
            return
        host, port = _host_and_port(self._address)
        url = f"ws://[{host}]:{port}/control" if ":" in host else f"ws://{host}:{port}/control"
        opened = open_websocket(
            url, compression=None, max_size=wire.MAX_BYTES, proxy=None, open_timeout=self._patience_s, close_timeout=1
        )
        self._socket = opened.__enter__()  # what connect() itself returns differs between versions of websockets
        try:
            hello = self._greet()
        except StemloopError:
            self._drop()
            raise
        if self._lease_id is not None and not hello["leased"]:
            self._regain()

    def _greet(self) -> dict[str, Any]:
        token = _token(self._address, self._token, self._role)
        hello = self._exchange({"op": "hello", "token": token, "lease_id": self._lease_id})
        self.who = str(hello["who"])
        if ROLES.index(str(hello["role"])) < ROLES.index(self._role):
            raise NotAuthorised(f"the token is that of {self.who}; {self._role} was asked. Give another token.")
        return hello

    def _regain(self) -> None:
        """The server lost our lease (it started again, or we were away too long): take it if nobody drove since."""
        try:
            self._keep(self._exchange({"op": "acquire", "ttl_s": self._ttl_s, "expected": self.fencing}))
        except LeaseError:
            self._forget()
            raise

    def _drop(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            with suppress(*_DROPPED):
                connection.close()
