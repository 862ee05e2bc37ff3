"""A TLS socket for two threads, one that reads and one that writes."""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: How long one look at the socket lasts before it is seen whether it was closed meanwhile [s].
_LOOK_S = 0.5


class DuplexSocket(ssl.SSLSocket):
    """Reads and writes take turns at the TLS state; waiting is done outside the turn.

    OpenSSL allows one thread at a time in a connection. A websocket is read by one thread and written by another, and
    Python keeps them apart from 3.13 on only. Where they meet, most often while a session ticket is read right after
    the handshake, the words written are lost and both sides wait for ever. Set it as ``sslsocket_class`` of a client's
    context.
    """

    _turn: threading.RLock
    _patience_s: float | None

    def __new__(cls, *words: Any, **named: Any) -> DuplexSocket:  # wrap_socket does not call the constructor
        made = super().__new__(cls, *words, **named)
        made._turn, made._patience_s = threading.RLock(), None
        return made

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        return self._in_turn(lambda: super(DuplexSocket, self).recv(buflen, flags))  # type: ignore[no-any-return]

    def send(self, data: Any, flags: int = 0) -> int:
        return self._in_turn(lambda: super(DuplexSocket, self).send(data, flags))  # type: ignore[no-any-return]

    def shutdown(self, how: int) -> None:
        with self._turn:  # what is still to be read stays encrypted: the parent would forget that
            socket.socket.shutdown(self, how)

    def settimeout(self, value: float | None) -> None:
        with self._turn:
            self._patience_s = value
            super().settimeout(value)

    def setblocking(self, flag: bool) -> None:
        self.settimeout(None if flag else 0.0)

    def close(self) -> None:
        with suppress(OSError):  # wakes who waits to read; where nothing is connected nobody waits
            socket.socket.shutdown(self, socket.SHUT_RDWR)
        super().close()

    def _in_turn(self, act: Callable[[], Any]) -> Any:
        """Do what would block in pieces that do not, until it is done or the socket's time limit has passed."""
        end = None if self._patience_s is None else time.monotonic() + self._patience_s
        while True:
            with self._turn:
                super().settimeout(0.0)
                try:
                    return act()
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError) as error:
                    if self._patience_s == 0:
                        raise
                    writes = isinstance(error, ssl.SSLWantWriteError)
                finally:
                    if self.fileno() >= 0:
                        super().settimeout(self._patience_s)
            left_s = _LOOK_S if end is None else min(end - time.monotonic(), _LOOK_S)
            if left_s <= 0:
                raise TimeoutError("the other side did not answer in time")
            self._wait(writes, left_s)

    def _wait(self, writes: bool, seconds: float) -> None:
        descriptor = self.fileno()
        if descriptor < 0:
            return  # closed: the next turn says so
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT if writes else select.POLLIN)
            poll.poll(1e3 * seconds)
        else:
            select.select([] if writes else [self], [self] if writes else [], [], seconds)
