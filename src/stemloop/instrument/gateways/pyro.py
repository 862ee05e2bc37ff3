"""A Pyro5 daemon for notebooks that drive a microscope that way today.

The gateway is a *client* of the instrument's server: the server's role, lease, limits, dose ledger and audit hold for
whatever a notebook asks. It speaks msgpack only (no text, no code), takes a shared secret in Pyro's handshake or
mutual TLS or both, and leaves loopback with mutual TLS only. One notebook drives at a time: it gets the lease with its
first command that changes something, and loses it when it leaves or says nothing for ``idle_s``; then the beam is
blanked. A lease that a person took over is not taken back until the notebook asks for it with ``take_control()``.

Run it as a process of its own: ``stemloop gateway pyro ADDRESS``. A notebook needs nothing but Pyro5::

    Pyro5.config.SERIALIZER = "msgpack"
    scope = Pyro5.api.Proxy("PYRO:stemloop@127.0.0.1:9091")
    scope._pyroHandshake = secret

or, with arrays and our errors, :func:`connect` of this module.
"""

from __future__ import annotations

import functools
import hmac
import ipaddress
import os
import secrets
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stemloop.core.errors import (
    InputError,
    InstrumentError,
    LeaseError,
    MissingExtra,
    NotAuthorised,
    StemloopError,
    from_code,
)
from stemloop.instrument.client import Address, Client
from stemloop.instrument.client import connect as connect_to_server
from stemloop.instrument.gateways.vocabulary import LOOKING, Vocabulary, as_array, commands

try:
    import Pyro5.api
    import Pyro5.errors
    import Pyro5.server
    from Pyro5.callcontext import current_context
except ImportError as error:
    raise MissingExtra("the Pyro5 gateway needs Pyro5: pip install 'stemloop[pyro]'.") from error

#: The name of the object that a gateway serves.
OBJECT = "stemloop"
#: The largest message that a notebook may send [bytes].
MAX_MESSAGE_BYTES = 2**20
#: How long a connection may take to say who it is [s].
HANDSHAKE_S = 10.0
#: How long a notebook waits for another that may just be leaving, before it is refused [s].
LEAVING_S = 3.0
MIN_SECRET = 16

_MSGPACK, _PING = 4, 6
_HEAD, _REST = 6, 34
_COMPRESSED = 0x02


@dataclass(frozen=True)
class Tls:
    """Files (PEM) of mutual TLS: the gateway's certificate and key, and the authority that signed the notebooks'."""

    cert: Path
    key: Path
    ca: Path

    def context(self) -> ssl.SSLContext:
        """The server's side: TLS 1.2 or later, a certificate of the authority is asked of everybody."""
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self.cert, self.key)
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
            return context
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"the TLS files {self.cert}, {self.key}, {self.ca} cannot be used: {reason}.") from None


class _TlsListener:
    """A listening socket whose connections speak TLS; the handshake is left to the thread that serves them."""

    def __init__(self, plain: Any, context: ssl.SSLContext) -> None:
        self._plain, self._context = plain, context

    def accept(self) -> tuple[Any, Any]:
        connection, address = self._plain.accept()
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)


def _wary(receive: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """Read a connection's bytes and refuse, before anything is decoded, what is too long, packed or no msgpack."""
    head = b""

    def read(size: int) -> bytes:
        nonlocal head
        if size > MAX_MESSAGE_BYTES:
            raise Pyro5.errors.ProtocolError(f"the message has {size} bytes; at most {MAX_MESSAGE_BYTES} are read")
        data = receive(size)
        if len(head) < _HEAD and size == _HEAD:
            head = data
        elif len(head) == _HEAD and size == _REST:
            kind, serializer, flags = data[0], data[1], int.from_bytes(data[2:4], "big")
            head = b""
            if flags & _COMPRESSED:
                raise Pyro5.errors.ProtocolError("compressed messages are not read: set Pyro5.config.COMPRESSION=False")
            if serializer != _MSGPACK and kind != _PING:
                raise Pyro5.errors.ProtocolError(
                    "this gateway reads msgpack only: set Pyro5.config.SERIALIZER = 'msgpack' before connecting"
                )
        return data

    return read


class _Daemon(Pyro5.server.Daemon):
    """A daemon that asks for the secret, reads msgpack only and tells nobody its traceback."""

    def __init__(self, host: str, port: int, secret: str | None, tls: Tls | None, left: Callable[[Any], None]) -> None:
        super().__init__(host=host, port=port)
        self._secret, self._left = secret, left
        if tls is not None:
            self.transportServer.sock = _TlsListener(self.transportServer.sock, tls.context())

    def _handshake(self, conn: Any, denied_reason: str | None = None) -> bool:
        if denied_reason is not None:  # all threads are taken: no time is spent on this one
            return False
        conn.sock.settimeout(HANDSHAKE_S)
        if isinstance(conn.sock, ssl.SSLSocket):
            conn.sock.do_handshake()
        conn.recv = _wary(conn.recv)
        welcome: bool = super()._handshake(conn)
        conn.sock.settimeout(None)
        return welcome

    def validateHandshake(self, conn: Any, data: Any) -> str:
        if self._secret is not None:
            given = data if isinstance(data, str) else ""
            if not hmac.compare_digest(given.encode(), self._secret.encode()):
                raise NotAuthorised("the secret is wrong: set proxy._pyroHandshake to the gateway's secret.")
        return OBJECT

    def clientDisconnect(self, conn: Any) -> None:
        self._left(conn)

    def _sendExceptionResponse(self, connection: Any, seq: int, serializer_id: int, exc_value: Any, tbinfo: Any,
                               flags: int = 0, annotations: Any = None) -> None:  # fmt: skip
        super()._sendExceptionResponse(connection, seq, serializer_id, exc_value, [], flags, annotations)


class _Desk:
    """Which notebook drives. Called from the daemon's threads."""

    def __init__(self, client: Client, idle_s: float) -> None:
        self._client, self._idle_s = client, idle_s
        self._words = Vocabulary(client)
        self._driver: Any = None
        self._lost: str | None = None
        self._heard = time.monotonic()
        self._lock = threading.Condition()

    def call(self, name: str, *words: Any, **named: Any) -> Any:
        """Carry out a command of the vocabulary for the notebook of the current connection."""
        if name in LOOKING:
            return getattr(self._words, name)(*words, **named)
        with self._lock:
            self.take(current_context.client, again=False)
            try:
                return getattr(self._words, name)(*words, **named)
            except LeaseError as error:
                self._lost = str(error)
                raise
            finally:
                self._heard = time.monotonic()

    def take(self, who: Any, again: bool) -> None:
        """Give the lease to a notebook, if no other has it; one that was lost only if it is asked for ``again``."""
        with self._lock:
            # one that has just hung up is noticed a moment later
            if not self._lock.wait_for(lambda: self._driver is None or self._driver is who, LEAVING_S):
                raise LeaseError("another notebook drives through this gateway: wait until it leaves.")
            if self._lost is not None and self._driver is who and not again:
                raise LeaseError(f"the microscope was taken from this notebook ({self._lost}) Ask: take_control().")
            if self._driver is None or again:
                self._client.acquire()
                self._driver, self._lost = who, None
            self._heard = time.monotonic()

    def release(self, who: Any) -> None:
        """Give the lease back if this notebook has it; the server blanks the beam."""
        with self._lock:
            if self._driver is who:
                self._driver, self._lost = None, None
                self._lock.notify_all()
                self._client.release()

    def left(self, who: Any) -> None:
        """A notebook went away."""
        with suppress(StemloopError):  # the server notices the silence by itself, and blanks
            self.release(who)

    def watch(self) -> None:
        """Take the lease from a notebook that has been silent."""
        if self._lock.acquire(blocking=False):
            try:
                if self._driver is not None and time.monotonic() - self._heard > self._idle_s:
                    self.left(self._driver)
            finally:
                self._lock.release()


def _exposed(name: str) -> Callable[..., Any]:
    """A method that Pyro5 serves: a command of the vocabulary, its errors in a form that any notebook can read."""

    @functools.wraps(getattr(Vocabulary, name))
    def method(self: _Served, *words: Any, **named: Any) -> Any:
        return _told(lambda: self.desk.call(name, *words, **named))

    return method


def _told(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except TypeError as error:  # too many words, or unknown ones
        raise _plain(InputError(f"the command was not called rightly: {error}.")) from None
    except StemloopError as error:
        raise _plain(error) from None
    except Exception as error:  # nothing of our own may cross the wire
        raise _plain(InstrumentError(f"the gateway failed: {type(error).__name__}: {error}.")) from error


def _plain(error: StemloopError) -> Pyro5.errors.PyroError:
    """An error that stock Pyro5 can rebuild, with ``code`` and ``message`` of ours."""
    told = Pyro5.errors.PyroError(f"{error.code}: {error}")
    told.code, told.message = error.code, str(error)  # type: ignore[attr-defined]
    return told


class _Served:
    """The object on the wire."""

    def __init__(self, desk: _Desk) -> None:
        self.desk = desk

    @Pyro5.api.expose
    def take_control(self) -> None:
        """Ask for the lease, also after it was taken over."""
        return _told(lambda: self.desk.take(current_context.client, again=True))

    @Pyro5.api.expose
    def release_control(self) -> None:
        """Give the lease back; the beam is blanked."""
        return _told(lambda: self.desk.release(current_context.client))


for _name in commands():
    setattr(_Served, _name, Pyro5.api.expose(_exposed(_name)))


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_secret(path: Path) -> str:
    """The secret in a file of mode 0600; one is made where there is none."""
    try:
        if not path.exists():
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise NotAuthorised(f"{path} can be read by others: take their rights away with 'chmod 600 {path}'.")
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the secret's file {path} cannot be used: {error}.") from None


def serve(
    address: Address,
    token: str | None = None,
    *,
    role: str = "agent",
    ca: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    secret: str | None = None,
    tls: Tls | None = None,
    idle_s: float = 60.0,
    ready: Callable[[str], None] | None = None,
    until: threading.Event | None = None,
) -> None:
    """Serve the instrument at ``address`` to Pyro5 until ``until`` is set (or for ever).

    Parameters
    ----------
    address, token, role, ca
        Of the instrument's server, as in :func:`stemloop.instrument.client.connect`.
    host, port : str, int
        Where to listen; port 0 is a free one. Addresses that are not loopback need ``tls``.
    secret : str, optional
        What notebooks give in the handshake, at least 16 characters. Without it ``tls`` must be given.
    tls : Tls, optional
        Mutual TLS.
    idle_s : float
        A notebook that has sent no command for this time [s] loses the lease.
    ready : callable, optional
        Called with the address (``PYRO:stemloop@host:port``) once notebooks may connect.

    Raises
    ------
    InputError
        If the arguments would open an unguarded door, or the address cannot be used.
    """
    if secret is None and tls is None:
        raise InputError("give a secret, or the files of mutual TLS: nobody may drive a microscope unasked.")
    if secret is not None and len(secret) < MIN_SECRET:
        raise InputError(f"the secret must have at least {MIN_SECRET} characters.")
    if tls is None and not _loopback(host):
        raise InputError(f"{host!r} is not loopback: give the files of mutual TLS, or use host='127.0.0.1'.")
    client = connect_to_server(address, token, role, ca=ca)
    try:
        desk = _Desk(client, idle_s)
        try:
            daemon = _Daemon(host, port, secret, tls, desk.left)
        except OSError as error:
            raise InputError(f"cannot listen on {host}:{port}: {error.strerror}. Use port=0 for a free one.") from None
        try:
            uri = daemon.register(_Served(desk), OBJECT)
            if ready is not None:
                ready(str(uri))

            def running() -> bool:
                return until is None or not until.is_set()

            watch = threading.Thread(target=_watch, args=(desk, running, idle_s), name="idle notebooks", daemon=True)
            watch.start()
            daemon.requestLoop(running)
        finally:
            daemon.close()
    finally:
        client.close()


def _watch(desk: _Desk, running: Callable[[], bool], idle_s: float) -> None:
    while running():
        time.sleep(min(0.5, idle_s / 4))
        desk.watch()


class Remote:
    """A notebook's side: the commands as methods, arrays as arrays, errors as ours. Made by :func:`connect`."""

    def __init__(self, proxy: Any) -> None:
        self._proxy = proxy

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*words: Any, **named: Any) -> Any:
            try:
                found = getattr(self._proxy, name)(*words, **named)
            except Pyro5.errors.PyroError as error:
                code = getattr(error, "code", None)
                if code is None:
                    raise
                raise from_code(code, error.message) from None  # type: ignore[attr-defined]
            return as_array(found) if isinstance(found, dict) and set(found) >= {"data", "dtype", "shape"} else found

        return call

    def close(self) -> None:
        """Leave; the lease is given back."""
        self._proxy._pyroRelease()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(uri: str, secret: str | None = None) -> Remote:
    """Connect a notebook to a gateway.

    For mutual TLS set Pyro5's own ``SSL``, ``SSL_CLIENTCERT``, ``SSL_CLIENTKEY`` and ``SSL_CACERTS`` first.
    """
    proxy = Pyro5.api.Proxy(uri)
    proxy._pyroSerializer = "msgpack"
    if secret is not None:
        proxy._pyroHandshake = secret
    try:
        proxy._pyroBind()
    except Pyro5.errors.CommunicationError as error:
        if "rejected" in str(error):
            raise NotAuthorised(f"the gateway said no: {error}.") from None
        raise InstrumentError(f"the gateway {uri} cannot be reached: {error}.") from None
    return Remote(proxy)
