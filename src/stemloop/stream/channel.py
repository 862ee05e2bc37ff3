"""Frames from the instrument to the edge: nothing is acknowledged before it is durable, nothing is lost unseen.

A :class:`Sender` (DEALER) keeps each batch until the :class:`Receiver` (ROUTER) acknowledges it, and sends it again
after a broken connection, a damaged packet or a restarted receiver. Its window of unacknowledged bytes is the credit
that bounds the memory of both sides: each acknowledgement gives credit back. The receiver writes all batches that are
waiting with one ``fdatasync`` and acknowledges them after it; numbers that it already has are counted and dropped.
So a batch is delivered at least once and kept exactly once.

On the wire: ``[frames, header, payload]`` one way; ``[ack, keys]``, ``[stalled, why]`` and ``[refused, why]`` the
other, where a key is ``[stream, first, n]``.
"""

# pyzmq collects its names with star imports, which mypy does not follow here
# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import zmq
from numpy.typing import NDArray

from stemloop.core.errors import InputError, InstrumentError, StemloopError, StorageError
from stemloop.core.protocols import Batch, FrameLog
from stemloop.stream import packet
from stemloop.stream.spans import Spans

_POLL_MS = 50
_GROUP_BYTES = 64 << 20
_GROUP_BATCHES = 4096
_MAX_MESSAGE = 2 << 30
_SLOWEST_RESEND = 8.0

Key = tuple[str, int, int]


@dataclass
class _Pending:
    """A batch without an acknowledgement; ``order`` counts sendings, 0 is not sent yet."""

    parts: tuple[bytes, bytes]
    order: int = 0

    @property
    def size(self) -> int:
        return len(self.parts[0]) + len(self.parts[1])


class Sender:
    """The instrument's end: a :class:`~stemloop.core.protocols.FrameSink`.

    Parameters
    ----------
    address : where the receiver listens, such as ``tcp://127.0.0.1:5555``.
    run : the run's id; a receiver of another run refuses.
    window_bytes : how much may be unacknowledged before ``send`` waits (one batch may always be on its way).
    resend_s : silence [s] after which what is unacknowledged is sent again; doubled up to eightfold while it lasts.
    timeout_s : how long ``send`` waits for credit.
    """

    def __init__(
        self,
        address: str,
        run: str,
        *,
        window_bytes: int = 64 << 20,
        resend_s: float = 1.0,
        timeout_s: float = 60.0,
    ) -> None:
        self.run = run
        self._address = address
        self._window = window_bytes
        self._resend_s = resend_s
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._pending: dict[Key, _Pending] = {}
        self._unsent: deque[Key] = deque()
        self._bytes = 0
        self._orders = itertools.count(1)
        self._refused: str | None = None
        self._stalled: str | None = None
        self._heard = time.monotonic()
        self._silence = resend_s
        self._stop = False
        self._closed = False
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.SNDHWM, 256)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._release()
            raise InputError(f"{address!r} is no address to send frames to: {error}.") from None
        self._thread = threading.Thread(target=self._work, name="frame-sender", daemon=True)
        self._thread.start()

    def send(self, batch: Batch) -> None:
        """Take over ``batch``; waits while the window is full.

        Returns before the batch is durable (see :meth:`flush`). Errors: :class:`InputError` if the receiver refused
        this run, :class:`StorageError` if its disk takes nothing, :class:`InstrumentError` if it does not answer.
        """
        item = _Pending(packet.encode(batch, self.run))
        key = (batch.stream, int(batch.first), len(batch.frames))
        with self._changed:
            self._await(lambda: not self._pending or self._bytes + item.size <= self._window, self._timeout_s)
            if key in self._pending:
                return
            self._pending[key] = item
            self._bytes += item.size
            self._unsent.append(key)
        self._nudge()

    def flush(self, timeout_s: float = 60.0) -> None:
        """Return when everything that was sent is durable at the receiver; errors as :meth:`send`."""
        with self._changed:
            self._await(lambda: not self._pending, timeout_s)

    @property
    def unacknowledged(self) -> int:
        """How many batches are on their way."""
        return len(self._pending)

    def close(self, timeout_s: float = 10.0) -> None:
        """Flush for at most ``timeout_s`` and close; an error says what was never acknowledged."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush(timeout_s)
        finally:
            self._stop = True
            self._nudge()
            self._thread.join()
            self._release()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- inside

    def _await(self, ready: Any, timeout_s: float) -> None:
        """Wait under the lock until ``ready()``; says why if it never is."""
        self._changed.wait_for(lambda: ready() or self._refused, timeout_s)
        if self._refused:
            raise InputError(self._refused)
        if ready():
            return
        if self._stalled:
            raise StorageError(self._stalled)
        raise InstrumentError(
            f"the receiver at {self._address} acknowledged nothing for {timeout_s:g} s "
            f"({len(self._pending)} batches wait); is it running?"
        )

    def _nudge(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake.send(b"x")

    def _release(self) -> None:
        self._socket.close(0)
        self._context.term()
        self._wake.close()
        self._woken.close()

    def _work(self) -> None:
        poller = zmq.Poller()
        poller.register(self._woken.fileno(), zmq.POLLIN)
        blocked = False
        while not self._stop:
            poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if blocked else 0))
            poller.poll(_POLL_MS)
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
            self._hear()
            self._doubt()
            blocked = not self._speak()

    def _hear(self) -> None:
        while True:
            try:
                kind, body = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            with self._changed:
                self._heard = time.monotonic()
                if kind == b"ack":
                    self._acknowledge([tuple(key) for key in msgpack.unpackb(body)])
                elif kind == b"stalled":
                    self._stalled = body.decode()
                else:
                    self._refused = body.decode()
                self._changed.notify_all()

    def _acknowledge(self, keys: list[Any]) -> None:
        last = 0
        for key in keys:
            item = self._pending.pop(key, None)
            if item is not None:
                self._bytes -= item.size
                last = max(last, item.order)
        self._stalled = None
        self._silence = self._resend_s
        # acknowledgements come in the order of sending: what was passed over was lost or damaged on its way
        for key, item in self._pending.items():
            if item.order >= last:
                break
            if item.order:
                item.order = 0
                self._unsent.append(key)

    def _doubt(self) -> None:
        """After a silence, send again all that was sent and not acknowledged."""
        with self._changed:
            if not self._pending or len(self._unsent) == len(self._pending):
                self._heard = max(self._heard, time.monotonic() - self._resend_s)
                return
            if time.monotonic() - self._heard > self._silence:
                self._heard = time.monotonic()
                self._silence = min(2 * self._silence, _SLOWEST_RESEND * self._resend_s)
                for item in self._pending.values():
                    item.order = 0
                self._unsent = deque(self._pending)

    def _speak(self) -> bool:
        """Send what is unsent; False if the connection takes no more for now."""
        while True:
            with self._changed:
                while self._unsent and self._unsent[0] not in self._pending:
                    self._unsent.popleft()
                if not self._unsent or self._refused:
                    return True
                key = self._unsent[0]
                item = self._pending[key]
            try:
                self._socket.send_multipart([b"frames", *item.parts], zmq.NOBLOCK)
            except zmq.Again:
                return False
            with self._changed:
                if not any(other.order for other in self._pending.values()):
                    self._heard = time.monotonic()
                item.order = next(self._orders)
                self._unsent.popleft()


@dataclass
class _Count:
    """Frames of one stream: ``recovered`` were in the log when the receiver began."""

    durable: Spans
    recovered: int = 0
    received: int = 0
    duplicates: int = 0


class Receiver:
    """The edge's end: makes batches durable in ``log`` and acknowledges them.

    Parameters
    ----------
    address : where to listen, such as ``tcp://127.0.0.1:*`` (any free port of this machine; see :attr:`address`).
    log : a :class:`~stemloop.core.protocols.FrameLog`. What it holds already counts as durable. If it has ``index``,
        ``append_many`` and ``read`` (as a :class:`~stemloop.stream.landing.LandingLog` has), they are used.
    run : the run's id; packets of another run are refused and counted.

    Attributes
    ----------
    address : where it listens. refused, malformed : packets of another run, and damaged ones, that were not taken.

    A log that cannot be written stops the acknowledgements: :meth:`wait` raises the log's :class:`StorageError`, the
    sender keeps its batches and sends them again, and all goes on by itself when the disk takes them.
    """

    def __init__(self, address: str, log: FrameLog, run: str) -> None:
        self.run = run
        self.refused = 0
        self.malformed = 0
        self._log = log
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._counts = {stream: _Count(spans, len(spans)) for stream, spans in _durable(log).items()}
        self._stop = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 256)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close(0)
            self._context.term()
            raise InputError(f"cannot listen on {address!r}: {error}; choose another, or tcp://127.0.0.1:*.") from None
        self.address = str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._thread = threading.Thread(target=self._work, name="frame-receiver", daemon=True)
        self._thread.start()

    def wait(self, stream: str, first: int, n: int, timeout_s: float = 60.0) -> NDArray[Any]:
        """Frames ``first .. first + n`` of ``stream``, (n, ...), as soon as they are durable, read back from the log.

        Errors: :class:`StorageError` if the log cannot be written, :class:`InstrumentError` after ``timeout_s``.
        """

        def there() -> bool:
            return stream in self._counts and self._counts[stream].durable.covers(first, first + n)

        with self._changed:
            self._changed.wait_for(lambda: there() or self._failure or self._stop, timeout_s)
            if not there():
                if self._failure:
                    raise self._failure
                missing = self._counts[stream].durable.absent(first, first + n) if stream in self._counts else "all"
                raise InstrumentError(
                    f"frames {first} to {first + n - 1} of stream {stream!r} did not arrive in {timeout_s:g} s "
                    f"(missing: {missing}); is the sender running?"
                )
        return _read(self._log, stream, first, n)

    def ledger(self) -> dict[str, dict[str, Any]]:
        """What became of the frames of each stream, in frames.

        ``received + recovered = durable + duplicates``, and ``durable`` plus the sizes of ``missing`` (ranges
        ``(first, stop)`` between 0 and the largest number seen) is that largest number plus one.
        """
        with self._changed:
            return {
                stream: {
                    "received": count.received,
                    "recovered": count.recovered,
                    "durable": len(count.durable),
                    "duplicates": count.duplicates,
                    "missing": count.durable.gaps(),
                }
                for stream, count in sorted(self._counts.items())
            }

    def close(self) -> None:
        """Stop listening; the log stays open. Closing twice is harmless."""
        if self._thread.is_alive():
            self._stop = True
            self._thread.join()
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- inside

    def _work(self) -> None:
        try:
            while not self._stop:
                if self._socket.poll(_POLL_MS):
                    self._take()
        except Exception as error:  # a thread has nobody above it: whoever waits is told
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            self._socket.close(0)
            self._context.term()

    def _take(self) -> None:
        """All batches that are waiting: one commit, then their acknowledgements."""
        group: list[tuple[bytes, Batch]] = []
        size = 0
        while size < _GROUP_BYTES and len(group) < _GROUP_BATCHES:
            try:
                peer, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            batch = self._admit(peer, parts)
            if batch is not None:
                group.append((peer, batch))
                size += batch.frames.nbytes
        if group:
            peers = dict.fromkeys(peer for peer, _ in group)
            try:
                self.take([batch for _, batch in group])
            except StemloopError as error:
                for peer in peers:
                    self._answer(peer, b"stalled", str(error).encode())
                return
            for peer in peers:
                keys = [(b.stream, b.first, len(b.frames)) for p, b in group if p == peer]
                self._answer(peer, b"ack", msgpack.packb(keys))

    def _admit(self, peer: bytes, parts: list[bytes]) -> Batch | None:
        try:
            if len(parts) != 3 or parts[0] != b"frames":
                raise InputError("a packet has three parts.")
            run, batch = packet.decode(parts[1], parts[2])
        except InputError:
            self.malformed += 1
            return None
        if run != self.run:
            self.refused += 1
            why = f"this receiver takes run {self.run!r}; the frames of run {run!r} were refused."
            self._answer(peer, b"refused", why.encode())
            return None
        return batch

    def _answer(self, peer: bytes, kind: bytes, body: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # a peer that is gone asks again when it is back
            self._socket.send_multipart([peer, kind, body], zmq.NOBLOCK)

    def take(self, batches: list[Batch]) -> None:
        """Make the new frames of ``batches`` durable (called by the receiver's own thread).

        All of them are durable and counted when this returns; none is counted if it raises :class:`StorageError`.
        """
        planned: dict[str, Spans] = {}
        fresh: list[Batch] = []
        for batch in batches:
            known = self._counts[batch.stream].durable if batch.stream in self._counts else Spans()
            plan = planned.setdefault(batch.stream, Spans())
            for a, b in known.absent(batch.first, batch.first + len(batch.frames)):
                for first, stop in plan.add(a, b):
                    frames = batch.frames[first - batch.first : stop - batch.first]
                    fresh.append(Batch(batch.stream, first, frames, batch.meta))
        try:
            if fresh:
                _append(self._log, fresh)
        except (StemloopError, OSError) as error:
            failure = (
                error if isinstance(error, StemloopError) else StorageError(f"the log cannot be written: {error}.")
            )
            with self._changed:
                self._failure = failure
                self._changed.notify_all()
            raise failure from None
        with self._changed:
            self._failure = None
            for batch in batches:
                count = self._counts.setdefault(batch.stream, _Count(Spans()))
                count.received += len(batch.frames)
                count.duplicates += len(batch.frames)
            for batch in fresh:
                count = self._counts[batch.stream]
                count.durable.add(batch.first, batch.first + len(batch.frames))
                count.duplicates -= len(batch.frames)
            self._changed.notify_all()


def _durable(log: FrameLog) -> dict[str, Spans]:
    index = getattr(log, "index", None)
    if index is not None:
        return {stream: Spans(spans) for stream, spans in index.items()}
    found: dict[str, Spans] = {}
    for batch in log.batches():
        found.setdefault(batch.stream, Spans()).add(batch.first, batch.first + len(batch.frames))
    return found


def _append(log: FrameLog, batches: Iterable[Batch]) -> None:
    many = getattr(log, "append_many", None)
    if many is not None:
        many(list(batches))
        return
    for batch in batches:
        log.append(batch)


def _read(log: FrameLog, stream: str, first: int, n: int) -> NDArray[Any]:
    read = getattr(log, "read", None)
    if read is not None:
        frames: NDArray[Any] = read(stream, first, n)
        return frames
    found: dict[int, NDArray[Any]] = {}
    for batch in log.batches(stream):
        for number, frame in enumerate(batch.frames, batch.first):
            if first <= number < first + n:
                found.setdefault(number, frame)
    return np.stack([found[number] for number in range(first, first + n)])
