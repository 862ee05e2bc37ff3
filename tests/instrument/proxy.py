"""A TCP proxy between a client and a server that fails like a network: drop, stall, half-close, cut in the middle."""

import select
import socket
import threading
from contextlib import suppress


class Proxy:
    """Forwards every connection to ``port``. ``stall()`` keeps connections open and lets nothing through, as a cable
    that is pulled does; ``drop()`` resets them; ``half_close()`` ends one direction; ``cut(after)`` drops the
    connection after so many more bytes to the client."""

    def __init__(self, port):
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs = []
        self._stalled = threading.Event()
        self._left = None
        self._lock = threading.Lock()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), 5)
            except OSError:
                client.close()
                continue
            pair = (client, server)
            self._pairs.append(pair)
            for number in (0, 1):
                threading.Thread(target=self._pump, args=(pair, number), daemon=True).start()

    def _pump(self, pair, number):
        source, target = pair[number], pair[1 - number]
        with suppress(OSError, ValueError):
            while not self._closed:
                if self._stalled.is_set() or not select.select([source], [], [], 0.02)[0]:
                    threading.Event().wait(0.005)
                    continue
                data = source.recv(65536)
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(self._clipped(data) if number == 1 else data)

    def _clipped(self, data):
        with self._lock:
            if self._left is None:
                return data
            data, self._left = data[: self._left], self._left - len(data)
            if self._left <= 0:
                self._left = None
                threading.Thread(target=self.drop, daemon=True).start()
            return data

    def stall(self):
        self._stalled.set()

    def flow(self):
        self._stalled.clear()

    def cut(self, after):
        with self._lock:
            self._left = after

    def half_close(self):
        for _, server in self._pairs:
            with suppress(OSError):
                server.shutdown(socket.SHUT_WR)

    def drop(self):
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    end.shutdown(socket.SHUT_RDWR)
                    end.close()

    def retarget(self, port):
        self._target = port

    def close(self):
        self._closed = True
        self._listener.close()
        self.drop()
