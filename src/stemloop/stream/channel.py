"""Frames from the instrument to the edge: nothing is acknowledged before it is durable, nothing is lost unseen.

A :class:`Sender` (DEALER) keeps each block until the :class:`Receiver` (ROUTER) acknowledges it, and sends it again
after a broken connection, a damaged packet or a restarted receiver. Blocks travel as their codec wrote them. The
receiver grants credit, bytes that may be on their way, with each acknowledgement, and less of it when it cannot keep
up; the sender's window bounds what waits for credit. The receiver writes all blocks that are waiting with one
``fdatasync`` and acknowledges them after it; numbers that it already has are counted and dropped. So a frame is
delivered at least once and kept exactly once. Frames that a sender had to drop are declared to the receiver like any
other parcel. The books of both ends are kept by :mod:`stemloop.stream.flow`.

On the wire: ``[frames, header, payload]``, ``[shared, header, place]`` (the payload is in a ring of shared memory) and
``[lost, why]`` one way; ``[ack, granted and keys]``, ``[inline, keys]`` (the ring cannot be read: send these through
the socket), ``[stalled, why]`` and ``[refused, why]`` the other, where a key is ``[stream, first, n, lost]``.
"""

# pyzmq collects its names with star imports, which mypy does not follow here
# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgpack
import numpy as np
import zmq
from numpy.typing import NDArray

from stemloop.core.errors import InputError, InstrumentError, StemloopError, StorageError
from stemloop.core.protocols import Batch, Encoded, FrameLog
from stemloop.core.spans import Spans
from stemloop.stream import cut, packet
from stemloop.stream.flow import Inbox, Key, Outbox, Parcel
from stemloop.stream.keys import Keys, arm_receiver, arm_sender, guard, is_local
from stemloop.stream.ring import Place, Ring, Window

_POLL_MS = 50
_GROUP_BYTES = 64 << 20
_GROUP_BATCHES = 4096
_MAX_MESSAGE = 2 << 30
_SLOWEST_RESEND = 8.0
_CREDIT = 64 << 20
_FORGOTTEN_S = 5.0


class Sender:
    """The instrument's end: a :class:`~stemloop.core.protocols.FrameSink`.

    Parameters
    ----------
    address : where the receiver listens, such as ``tcp://127.0.0.1:5555``.
    run : the run's id; a receiver of another run refuses.
    window_bytes : how much may be unacknowledged before ``send`` waits (one block may always be on its way).
    resend_s : silence [s] after which what is unacknowledged is sent again; doubled up to eightfold while it lasts.
    timeout_s : how long ``send`` waits for credit.
    drop : True for a source that cannot wait: ``send`` drops a block that finds the window full, and declares it lost.
    shared_bytes : size of a ring of shared memory for the payloads (0: none). What the ring has no room for, and all if
        the receiver cannot read it, goes through the socket.
    keys : CURVE keys; needed where ``address`` is not on this machine.
    """

    def __init__(
        self,
        address: str,
        run: str,
        *,
        window_bytes: int = 64 << 20,
        resend_s: float = 1.0,
        timeout_s: float = 60.0,
        drop: bool = False,
        shared_bytes: int = 0,
        keys: Keys | None = None,
    ) -> None:
        guard(address, keys)
        if shared_bytes and not is_local(address):
            raise InputError(f"{address!r} is another machine; shared memory is for one.")
        self.run = run
        self._address = address
        self._resend_s = resend_s
        self._timeout_s = timeout_s
        self._drop = drop
        self._changed = threading.Condition()
        self._box = Outbox(window_bytes)
        self._refused: str | None = None
        self._stalled: str | None = None
        self._heard = time.monotonic()
        self._silence = resend_s
        self._stop = False
        self._closed = False
        self._ring = Ring(shared_bytes) if shared_bytes else None
        self._ring_is_read = True
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
        arm_sender(self._socket, keys)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._release()
            raise InputError(f"{address!r} is no address to send frames to: {error}.") from None
        self._thread = threading.Thread(target=self._work, name="frame-sender", daemon=True)
        self._thread.start()

    def send(self, batch: Batch | Encoded) -> bool:
        """Take over ``batch``, plain or as a codec wrote it; waits while the window is full.

        Returns before it is durable (see :meth:`flush`); False if it was dropped and declared lost (``drop``).
        Errors: :class:`InputError` if the receiver refused this run or the frames were declared lost,
        :class:`StorageError` if its disk takes nothing, :class:`InstrumentError` if it does not answer.
        """
        head, payload = packet.encode(batch, self.run)
        key = Key(batch.stream, int(batch.first), batch.n if isinstance(batch, Encoded) else len(batch.frames))
        size = len(head) + len(payload)
        with self._changed:
            if self._drop and not self._refused and not self._box.room(size) and key not in self._box:
                self._box.declare(key.stream, key.first, key.first + key.n, "the sender's window was full")
                return False
            self._await(lambda: self._box.room(size), self._timeout_s)
            if key in self._box:
                return True
            place = self._ring.put(payload) if self._ring and self._ring_is_read else None
            self._box.offer(key, size, (head, place or payload))
        self._nudge()
        return True

    def declare_lost(self, stream: str, first: int, stop: int, why: str) -> None:
        """Tell the receiver that the frames ``first .. stop``, which were never sent, will not come (a detector that
        skipped numbers, a source that was full). Declared once, they cannot be sent any more (InputError)."""
        with self._changed:
            self._box.declare(stream, first, stop, why)
        self._nudge()

    def flush(self, timeout_s: float = 60.0) -> None:
        """Return when everything that was sent is durable at the receiver; errors as :meth:`send`."""
        with self._changed:
            self._await(lambda: not len(self._box), timeout_s)

    @property
    def unacknowledged(self) -> int:
        """How many batches are on their way."""
        return len(self._box)

    def ledger(self) -> dict[str, dict[str, int]]:
        """Frames of each stream: ``sent = acknowledged + lost + waiting``; after :meth:`flush` none waits."""
        with self._changed:
            return self._box.ledger()

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
            f"({len(self._box)} batches wait); is it running?"
        )

    def _nudge(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake.send(b"x")

    def _release(self) -> None:
        self._socket.close(0)
        self._context.term()
        self._wake.close()
        self._woken.close()
        if self._ring:
            self._ring.close()

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
                    granted, keys = msgpack.unpackb(body)
                    self._acknowledge([Key(*key) for key in keys], granted)
                elif kind == b"inline":
                    self._ring_is_read = False
                    for key in msgpack.unpackb(body):
                        self._box.again(Key(*key))
                elif kind == b"stalled":
                    self._stalled = body.decode()
                else:
                    self._refused = body.decode()
                self._changed.notify_all()

    def _acknowledge(self, keys: list[Key], granted: int) -> None:
        for parcel in self._box.heard(keys, granted):
            if not parcel.key.lost and isinstance(parcel.what[1], Place) and self._ring:
                self._ring.free(parcel.what[1])
        self._stalled = None
        self._silence = self._resend_s

    def _doubt(self) -> None:
        """After a silence, send again all that was sent and not acknowledged."""
        with self._changed:
            if not self._box.flying:
                self._heard = max(self._heard, time.monotonic() - self._resend_s)
            elif time.monotonic() - self._heard > self._silence:
                self._heard = time.monotonic()
                self._silence = min(2 * self._silence, _SLOWEST_RESEND * self._resend_s)
                self._box.doubt()

    def _speak(self) -> bool:
        """Send what is unsent and has credit; False if the connection takes no more for now."""
        while True:
            with self._changed:
                parcel = None if self._refused else self._box.next()
                if parcel is None:
                    return True
                parts = self._parts(parcel)
                try:
                    self._socket.send_multipart(parts, zmq.NOBLOCK)
                except zmq.Again:
                    return False
                if not self._box.flying:
                    self._heard = time.monotonic()
                self._box.sent(parcel)

    def _parts(self, parcel: Parcel) -> list[bytes]:
        if parcel.key.lost:
            return [b"lost", msgpack.packb([self.run, parcel.key, parcel.what])]
        head, payload = parcel.what
        if not isinstance(payload, Place):
            return [b"frames", head, payload]
        if self._ring_is_read:
            return [b"shared", head, msgpack.packb(payload)]
        assert self._ring is not None
        return [b"frames", head, self._ring.get(payload)]


class Receiver:
    """The edge's end: makes batches durable in ``log`` and acknowledges them.

    Parameters
    ----------
    address : where to listen, such as ``tcp://127.0.0.1:*`` (any free port of this machine; see :attr:`address`).
    log : a :class:`~stemloop.core.protocols.FrameLog`. What it holds already counts as durable. If it has ``index``,
        ``append_many`` and ``read`` (as a :class:`~stemloop.stream.landing.LandingLog` has), they are used.
    run : the run's id; packets of another run are refused and counted.

    credit_bytes : how much all senders together may have on their way.
    keys : CURVE keys and the senders that they trust; needed where ``address`` can be reached from other machines.
    taps : called by the receiver's thread, after the ``fdatasync``, with each new block, each number once; what they
        take long over is not acknowledged meanwhile (see :class:`~stemloop.stream.live.Live`).

    A log that cannot be written stops the acknowledgements: :meth:`wait` raises the log's :class:`StorageError`, the
    sender keeps its batches and sends them again, and all goes on by itself when the disk takes them.

    Attributes
    ----------
    address : where it listens. refused, malformed : packets of another run, and damaged ones, that were not taken.
    """

    def __init__(
        self,
        address: str,
        log: FrameLog,
        run: str,
        *,
        credit_bytes: int = _CREDIT,
        keys: Keys | None = None,
        taps: Iterable[Callable[[Encoded], None]] = (),
    ) -> None:
        guard(address, keys)
        self.run = run
        self.refused = 0
        self.malformed = 0
        self._log = log
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._box = Inbox(_durable(log), _lost(log))
        self._credit = credit_bytes
        self._peers: dict[bytes, float] = {}
        self._taps = tuple(taps)
        self._windows: dict[str, Window] = {}
        self._stop = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 256)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE)
        self._doorman = arm_receiver(self._context, self._socket, keys)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._release()
            raise InputError(f"cannot listen on {address!r}: {error}; choose another, or tcp://127.0.0.1:*.") from None
        self.address = str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._thread = threading.Thread(target=self._work, name="frame-receiver", daemon=True)
        self._thread.start()

    def wait(self, stream: str, first: int, n: int, timeout_s: float = 60.0) -> NDArray[Any]:
        """Frames ``first .. first + n`` of ``stream``, (n, ...), as soon as they are durable, read back from the log.

        Errors: :class:`StorageError` if the log cannot be written, :class:`InstrumentError` after ``timeout_s``.
        """

        def there() -> bool:
            return self._box.covers(stream, first, first + n)

        def gone() -> list[tuple[int, int]]:
            return self._box.lost(stream, first, first + n)

        with self._changed:
            self._changed.wait_for(lambda: there() or gone() or self._failure or self._stop, timeout_s)
            if not there():
                if self._failure:
                    raise self._failure
                if gone():
                    raise InstrumentError(f"the sender declared frames {gone()} of stream {stream!r} lost.")
                missing = self._box.absent(stream, first, first + n)
                raise InstrumentError(
                    f"frames {first} to {first + n - 1} of stream {stream!r} did not arrive in {timeout_s:g} s "
                    f"(missing: {missing}); is the sender running?"
                )
        return _read(self._log, stream, first, n)

    def ledger(self) -> dict[str, dict[str, Any]]:
        """What became of the frames of each stream, in frames.

        ``received + recovered = durable + duplicates``; ``durable`` plus ``lost`` (declared by the sender) plus the
        sizes of ``missing`` (ranges ``(first, stop)`` between 0 and the largest number seen) is that largest number
        plus one.
        """
        with self._changed:
            return self._box.ledger()

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
            self._release()

    def _release(self) -> None:
        self._socket.close(0)
        if self._doorman is not None:
            self._doorman.stop()
        self._context.term()
        for window in self._windows.values():
            window.close()

    def _take(self) -> None:
        """All that is waiting: one commit, then the acknowledgements."""
        group: list[tuple[bytes, Encoded]] = []
        lost: list[tuple[bytes, Key, str]] = []
        size = 0
        while size < _GROUP_BYTES and len(group) + len(lost) < _GROUP_BATCHES:
            try:
                peer, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            found = self._admit(peer, parts)
            if isinstance(found, Encoded):
                group.append((peer, found))
                size += len(found.payload)
            elif found is not None:
                lost.append((peer, *found))
        peers = dict.fromkeys([peer for peer, _ in group] + [peer for peer, _, _ in lost])
        if not peers:
            return
        try:
            self.take([block for _, block in group])
            for _, key, why in lost:
                self._declare(key, why)
        except StemloopError as error:
            for peer in peers:
                self._answer(peer, b"stalled", str(error).encode())
            return
        granted = self._granted(list(peers))
        for peer in peers:
            keys = [Key(b.stream, b.first, b.n) for p, b in group if p == peer]
            keys += [key for p, key, _ in lost if p == peer]
            self._answer(peer, b"ack", msgpack.packb([granted, keys]))

    def _granted(self, heard: list[bytes]) -> int:
        """The share of the credit of each sender that was heard lately."""
        now = time.monotonic()
        self._peers |= dict.fromkeys(heard, now)
        self._peers = {peer: last for peer, last in self._peers.items() if now - last < _FORGOTTEN_S}
        return self._credit // len(self._peers)

    def _admit(self, peer: bytes, parts: list[bytes]) -> Encoded | tuple[Key, str] | None:
        """A block, a declaration, or None for what is not taken."""
        try:
            kind, *rest = parts
            if kind == b"lost":
                run, key, why = _declaration(*rest)
                return (key, why) if self._is_ours(peer, run) else None
            if kind not in (b"frames", b"shared") or len(rest) != 2:
                raise InputError("a packet of frames has three parts.")
            payload = rest[1] if kind == b"frames" else self._shared(peer, *rest)
            if payload is None:
                return None
            run, block = packet.open_packet(rest[0], payload)
        except (InputError, TypeError, ValueError):
            self.malformed += 1
            return None
        return block if self._is_ours(peer, run) else None

    def _is_ours(self, peer: bytes, run: str) -> bool:
        if run == self.run:
            return True
        self.refused += 1
        why = f"this receiver takes run {self.run!r}; the frames of run {run!r} were refused."
        self._answer(peer, b"refused", why.encode())
        return False

    def _shared(self, peer: bytes, head: bytes, place: bytes) -> bytes | None:
        """The payload in the sender's ring; None, and a word to the sender, if that cannot be read here."""
        at = _place(place)
        try:
            if at.name not in self._windows:
                self._windows[at.name] = Window(at.name)
            return self._windows[at.name].get(at)
        except InputError:
            fields = packet.header(head)
            key = Key(fields["stream"], fields["first"], fields["shape"][0])
            self._answer(peer, b"inline", msgpack.packb([key]))
            return None

    def _answer(self, peer: bytes, kind: bytes, body: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # a peer that is gone asks again when it is back
            self._socket.send_multipart([peer, kind, body], zmq.NOBLOCK)

    def take(self, batches: Iterable[Batch | Encoded]) -> None:
        """Make the new frames of ``batches`` durable (called by the receiver's own thread).

        All of them are durable and counted when this returns; none is counted if it raises :class:`StorageError`.
        """
        blocks = [packet.raw(batch) if isinstance(batch, Batch) else batch for batch in batches]
        keys = [Key(block.stream, block.first, block.n) for block in blocks]
        plan = self._box.plan(keys)
        with self._failing():
            fresh = [cut.part(block, a, b) for block, parts in zip(blocks, plan, strict=True) for a, b in parts]
            if fresh:
                _append(self._log, fresh)
        with self._changed:
            self._failure = None
            self._box.keep(keys, plan)
            self._changed.notify_all()
        for block in fresh:
            for tap in self._taps:
                tap(block)

    def _declare(self, key: Key, why: str) -> None:
        write = getattr(self._log, "declare_lost", None)
        with self._failing():
            if write is not None:
                write(key.stream, key.first, key.first + key.n, why)
        with self._changed:
            self._box.declare(key)
            self._changed.notify_all()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Who waits is told of a log that takes nothing."""
        try:
            yield
        except (StemloopError, OSError) as error:
            failure = (
                error if isinstance(error, StemloopError) else StorageError(f"the log cannot be written: {error}.")
            )
            with self._changed:
                self._failure = failure
                self._changed.notify_all()
            raise failure from None


def _declaration(body: bytes) -> tuple[str, Key, str]:
    try:
        run, key, why = msgpack.unpackb(body)
        found = Key(*key)
    except Exception as error:
        raise InputError(f"a declaration of lost frames cannot be read: {error}.") from None
    numbers = type(found.first) is int and type(found.n) is int and found.first >= 0 and found.n > 0
    if not (numbers and found.lost is True and all(isinstance(word, str) for word in (run, found.stream, why))):
        raise InputError("a declaration of lost frames names a run, a stream, a range and a reason.")
    return run, found, why


def _place(body: bytes) -> Place:
    try:
        place = Place(*msgpack.unpackb(body))
    except Exception as error:
        raise InputError(f"a place in shared memory cannot be read: {error}.") from None
    if not isinstance(place.name, str) or type(place.offset) is not int or type(place.length) is not int:
        raise InputError("a place in shared memory is a name, an offset and a length.")
    return place


def _durable(log: FrameLog) -> dict[str, Spans]:
    index = getattr(log, "index", None)
    if index is not None:
        return {stream: Spans(spans) for stream, spans in index.items()}
    found: dict[str, Spans] = {}
    for batch in log.batches():
        found.setdefault(batch.stream, Spans()).add(batch.first, batch.first + len(batch.frames))
    return found


def _lost(log: FrameLog) -> dict[str, Spans]:
    ledger = getattr(log, "ledger", None)
    return {stream: Spans(account.lost) for stream, account in ledger().items() if account.lost} if ledger else {}


def _append(log: FrameLog, blocks: list[Encoded]) -> None:
    many = getattr(log, "append_many", None)
    if many is not None:
        many(blocks)
        return
    for block in blocks:
        log.append(Batch(block.stream, block.first, cut.frames_of(block), block.meta))


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
