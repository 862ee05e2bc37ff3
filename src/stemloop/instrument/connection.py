"""One line to an instrument's server: finding it, saying hello, asking, and coming back after it was cut.

Messages go out numbered and their replies come back in any order; between them come *events* (progress, a lost
lease), which have no number. One thread at a time waits for a reply and sorts what comes; another may send meanwhile,
which is how a running command is aborted.
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as open_websocket

from stemloop.core.errors import InputError, InstrumentError, NotAuthorised, StemloopError, from_code
from stemloop.instrument import wire
from stemloop.instrument.duplex import DuplexSocket
from stemloop.instrument.tokens import ROLES

#: What a cut line looks like.
DROPPED = (OSError, WebSocketException, TimeoutError)

_RETRY_S = 0.05
_RETRY_MAX_S = 0.2
_PING_S = 5.0
_PONG_S = 15.0
_LOOK_S = 0.01
_FINGERPRINT = re.compile(r"(?:sha256:)?((?:[0-9a-f]{2}:?){32})", re.IGNORECASE)

Address = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a server listens, whether the line is encrypted, and the SHA-256 of its certificate if that is known."""

    host: str
    port: int
    tls: bool = False
    fingerprint: str | None = None

    @property
    def url(self) -> str:
        """The address of the control channel."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self.tls else 'ws'}://{host}:{self.port}/control"


def find(address: Address) -> Place:
    """Where to connect: a server's directory, ``host:port``, a URL, or what ``address.json`` holds."""
    if isinstance(address, Mapping):
        tls = address.get("scheme") == "wss"
        return Place(str(address["host"]), int(address["port"]), tls, address.get("fingerprint"))
    if isinstance(address, Path) or Path(address).is_dir():
        try:
            return find(json.loads((Path(address) / "address.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, KeyError):
            raise ConnectionRefusedError(f"no server runs on {address}") from None
    scheme, _, rest = str(address).rpartition("://")
    host, _, port = rest.rstrip("/").removesuffix("/control").rpartition(":")
    if not host or not port.isdigit() or scheme not in ("", "ws", "wss", "http", "https"):
        raise InputError(
            f"an address is a server's directory, host:port, or wss://host:port; got {str(address)!r}, and there is no "
            "such directory here."
        )
    return Place(host.strip("[]"), int(port), scheme in ("wss", "https"))


def read_token(address: Address, token: str | None, role: str) -> str:
    """The token given, or that of ``role`` in the server's directory."""
    if token is not None:
        return token
    if isinstance(address, Mapping) or not Path(address).is_dir():
        raise InputError("give the token, or the server's directory as the address.")
    path = Path(address) / "local.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[role])
    except (OSError, ValueError, KeyError):
        raise NotAuthorised(f"no token of role {role!r} in {path}: give the token.") from None


def trust(ca: str | Path | None) -> tuple[ssl.SSLContext, bytes | None]:
    """What to believe of a certificate: the file ``ca``, one certificate by its SHA-256, or what the system trusts."""
    fingerprint = _FINGERPRINT.fullmatch(str(ca)) if ca is not None else None
    try:
        if fingerprint is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the fingerprint says more than either
        else:
            context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            f"ca={str(ca)!r} is neither a file of certificates (PEM) nor a SHA-256 fingerprint of 64 hex digits "
            f"({error.strerror or error})."
        ) from None
    context.sslsocket_class = DuplexSocket
    return context, bytes.fromhex(fingerprint[1].replace(":", "")) if fingerprint else None


class Connection(ABC):
    """A line to a server that is there again after it was cut. Thread-safe; see the module's page."""

    def __init__(
        self,
        address: Address,
        token: str | None,
        role: str | None,
        ca: str | Path | None,
        patience_s: float,
    ) -> None:
        self.who = ""
        self.role = ""
        self._address = address
        self._token = token
        self._wanted = role
        self._ca = ca
        self._patience_s = patience_s
        self._socket: ClientConnection | None = None
        self._number = 0
        self._running = 0
        self._replies: dict[int, dict[str, Any] | None] = {}
        self._lock = threading.RLock()
        self._counting = threading.Lock()
        self._closed = threading.Event()

    @abstractmethod
    def _greeted(self, hello: dict[str, Any]) -> None:
        """What to do on a fresh line, once the server has said who we are."""

    @abstractmethod
    def _lease(self) -> tuple[str | None, int | None]:
        """Id and fencing number of our lease."""

    @abstractmethod
    def _happened(self, event: dict[str, Any]) -> None:
        """An event came. Called by whoever waits for a reply."""

    # ------------------------------------------------------------------------------------------------------ asking

    def _ask(self, message: dict[str, Any], patience_s: float | None = None) -> dict[str, Any]:
        """Send a message and return its reply; over a cut line again, until the patience is over."""
        with self._lock:
            begun, wait, sent = time.monotonic(), _RETRY_S, False
            while True:
                self._raise_if_closed()
                try:
                    self._reach()
                    sent = True
                    return self._exchange(message)
                except DROPPED as error:
                    self._drop()
                    patience = self._patience_s if patience_s is None else patience_s
                    if isinstance(error, ssl.SSLError) or time.monotonic() - begun + wait > patience:
                        raise self._lost(message, sent, error) from error
                    self._closed.wait(wait)
                    wait = min(2 * wait, _RETRY_MAX_S)

    def _raise_if_closed(self) -> None:
        if self._closed.is_set():
            raise InstrumentError("this connection was closed: connect again.")

    def _lost(self, message: dict[str, Any], sent: bool, error: Exception) -> StemloopError:
        """What to say when the server does not come back, with what is known of the message."""
        if isinstance(error, ssl.SSLError):
            return NotAuthorised(
                f"the server at {self._address} could not prove who it is ({error.reason or error}): give its "
                "certificate, or the SHA-256 of it, as ca=. Nothing was sent."
            )
        lines = [f"the instrument server at {self._address} cannot be reached ({error}). Look whether it runs"]
        if message["op"] != "execute":
            return InstrumentError(f"{lines[0]}, and connect again.")
        command_id = message["id"]
        if sent:
            lines.append(
                f"the command {command_id!r} was sent and no answer came, so it may have been carried out; "
                "repeat with the same command id, which exposes nothing twice."
            )
        else:
            lines.append(f"the command {command_id!r} was not sent, so nothing was exposed and nothing moved.")
        return InstrumentError("; ".join(lines))

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        return self._wait(self._send(message))

    def _send(self, message: dict[str, Any]) -> int:
        assert self._socket is not None
        with self._counting:
            self._number += 1
            number = self._number
        self._replies[number] = None
        if message["op"] == "execute":
            self._running = number
        fencing = {"fencing": self._lease()[1]} if message["op"] in ("execute", "renew") else {}
        try:
            self._socket.send(wire.encode({"n": number, **message, **fencing}))
        except BaseException:
            self._replies.pop(number, None)
            raise
        return number

    def _wait(self, number: int, timeout_s: float | None = None) -> dict[str, Any]:
        """Read until the reply to ``number`` is there. Only for who holds the lock."""
        try:
            while (reply := self._outstanding(number)) is None:
                self._sort(self._receive(timeout_s))
        except Exception:  # after Ctrl-C the reply is still waited for
            self._replies.pop(number, None)
            raise
        del self._replies[number]
        return self._judge(reply)

    def _outstanding(self, number: int) -> dict[str, Any] | None:
        """The reply to a message, or None while it may still come."""
        if number not in self._replies:
            raise ConnectionResetError("the line was cut")
        return self._replies[number]

    @staticmethod
    def _judge(reply: dict[str, Any]) -> dict[str, Any]:
        if not reply.get("ok"):
            raise from_code(str(reply.get("code")), str(reply.get("message")))
        return reply

    def _receive(self, timeout_s: float | None) -> dict[str, Any]:
        if self._socket is None:
            raise ConnectionResetError("the line was cut")
        answer = self._socket.recv(timeout_s)
        if not isinstance(answer, bytes):
            raise InstrumentError("the server answered with text: is this a stemloop instrument server?")
        return wire.decode(answer)

    def _sort(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._happened(message)
            return
        number = message.get("n")
        if number is None:  # the server could not even read the number of the message that it refuses
            number = max(self._replies, default=0)
        if number not in self._replies:
            raise ConnectionResetError(f"a reply to message {number} came, which was not asked")
        self._replies[number] = message

    def _ask_beside(self, message: dict[str, Any]) -> dict[str, Any]:
        """Ask without waiting for the command that another thread has under way."""
        if self._lock.acquire(blocking=False):
            try:
                return self._ask(message)
            finally:
                self._lock.release()
        try:
            number = self._send(message)
            while (reply := self._outstanding(number)) is None:
                if self._lock.acquire(timeout=_LOOK_S):  # nobody reads any more
                    try:
                        return self._wait(number)
                    finally:
                        self._lock.release()
        except (AssertionError, *DROPPED):
            return self._ask(message)  # the line was cut meanwhile
        self._replies.pop(number, None)
        return self._judge(reply)

    # ------------------------------------------------------------------------------------------------ coming back

    def _reach(self) -> None:
        """Make sure that there is a line and that the server knows us."""
        if self._socket is not None:
            return
        place = find(self._address)
        options: dict[str, Any] = {}
        fingerprint = None
        if place.tls:
            options["ssl"], fingerprint = trust(self._ca or place.fingerprint)
        opened = open_websocket(
            place.url,
            compression=None,
            max_size=wire.MAX_BYTES,
            proxy=None,
            open_timeout=self._patience_s,
            close_timeout=1,
            ping_interval=_PING_S,
            ping_timeout=_PONG_S,
            **options,
        )
        self._socket = opened.__enter__()  # what connect() itself returns differs between versions of websockets
        try:
            self._recognise(fingerprint)
            self._greet()
        except StemloopError:
            self._drop()
            raise

    def _recognise(self, fingerprint: bytes | None) -> None:
        """Before any secret is said: is this the server whose certificate we know?"""
        if fingerprint is None:
            return
        assert self._socket is not None and isinstance(self._socket.socket, ssl.SSLSocket)
        shown = hashlib.sha256(self._socket.socket.getpeercert(binary_form=True) or b"").digest()
        if shown != fingerprint:
            raise NotAuthorised(
                f"the server at {self._address} showed a certificate with the SHA-256 {shown.hex()}, not the one given "
                "as ca=: another server answers there, or its certificate was renewed. Nothing was sent."
            )

    def _greet(self) -> None:
        token = read_token(self._address, self._token, self._wanted or "agent")
        hello = self._exchange({"op": "hello", "token": token, "lease_id": self._lease()[0]})
        self.who, self.role = str(hello["who"]), str(hello["role"])
        if self._wanted is not None and ROLES.index(self.role) < ROLES.index(self._wanted):
            raise NotAuthorised(f"the token is that of {self.who}; {self._wanted} was asked. Give another token.")
        self._greeted(hello)

    def _drop(self) -> None:
        connection, self._socket = self._socket, None
        self._replies.clear()
        if connection is not None:
            with suppress(*DROPPED):
                connection.close()
