"""Who may send frames: loopback is open, everything else needs CURVE keys (RFC 26/ZeroMQ CurveZMQ) on both ends."""

# pyzmq collects its names with star imports, which mypy does not follow here
# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from stemloop.core.errors import InputError


@dataclass(frozen=True)
class Keys:
    """A key pair (40 characters each, Z85) and the public keys of whom it talks to: a sender names its one receiver,
    a receiver names all senders that it takes frames from."""

    public: str
    secret: str = field(repr=False)
    peers: tuple[str, ...] = ()

    @classmethod
    def new(cls) -> Keys:
        """A new pair, which trusts nobody yet.

        >>> len(Keys.new().public)
        40
        """
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    def trusting(self, *peers: str) -> Keys:
        """The same pair, for talking to ``peers`` (public keys)."""
        return Keys(self.public, self.secret, peers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the pair to a new file that only its owner may read."""
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(f"{self.public}\n{self.secret}\n")
        except OSError as error:
            raise InputError(f"the keys cannot be written to {path}: {error.strerror}.") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Keys:
        """A pair that :meth:`save` wrote; a file that others may read is refused."""
        try:
            open_to_others = os.stat(path).st_mode & 0o077
            words = Path(path).read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} holds no keys: {error}.") from None
        if open_to_others:
            raise InputError(f"{path} can be read by others; chmod 600 it, or better make new keys.")
        if [len(word) for word in words] != [40, 40] or zmq.curve_public(words[1].encode()).decode() != words[0]:
            raise InputError(f"{path} holds no pair of keys.")
        return cls(words[0], words[1])


def is_local(address: str) -> bool:
    """Whether a ZeroMQ ``address`` never leaves this machine.

    >>> [is_local(a) for a in ("tcp://127.0.0.1:*", "tcp://[::1]:5", "ipc:///tmp/x", "tcp://10.0.0.2:5", "tcp://*:5")]
    [True, True, True, False, False]
    """
    kind, _, rest = address.partition("://")
    if kind in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0].strip("[]")
    if kind != "tcp" or host == "localhost":
        return kind == "tcp"
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def guard(address: str, keys: Keys | None) -> None:
    """Refuse an ``address`` that other machines can reach when there are no ``keys``."""
    if keys is None and not is_local(address):
        raise InputError(
            f"{address!r} leaves this machine and there are no keys: give keys=Keys.load(...), or use tcp://127.0.0.1."
        )
    if keys is not None and not keys.peers:
        raise InputError("these keys trust nobody: name the other end's public key with keys.trusting(...).")


def arm_sender(socket: Any, keys: Keys | None) -> None:
    """Have ``socket`` talk to nobody but the holder of the secret of ``keys.peers[0]``."""
    if keys is not None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, keys.peers[0].encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())


class _Trusted:
    def __init__(self, peers: tuple[str, ...]) -> None:
        self._peers = {peer.encode() for peer in peers}

    def callback(self, _domain: str, key: bytes) -> bool:
        return key in self._peers


def arm_receiver(context: Any, socket: Any, keys: Keys | None) -> ThreadAuthenticator | None:
    """Have ``socket`` take connections of ``keys.peers`` only; stop what this returns before the context ends."""
    if keys is None:
        return None
    doorman = ThreadAuthenticator(context)
    doorman.start()
    doorman.configure_curve_callback(domain="*", credentials_provider=_Trusted(keys.peers))
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
    return doorman
