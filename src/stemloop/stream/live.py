"""Reductions of a stream while it runs: folds fed by a receiver, with bounded memory and therefore bounded delay."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from stemloop.core.errors import InputError, InstrumentError
from stemloop.core.protocols import Batch, Encoded, Fold
from stemloop.core.spans import Spans
from stemloop.stream import cut


class Live:
    """Folds of the stream that :meth:`take` is given: a tap of :class:`~stemloop.stream.channel.Receiver`.

    Parameters
    ----------
    folds : a :class:`~stemloop.core.protocols.Fold` by name.
    scan : (rows, columns) positions of the scan; frame number k belongs to position k, row-major.
    shape : (rows, columns) of a frame.
    stream : the stream's name; blocks of others are left alone.
    waiting_bytes : most payload that may wait for the folds. When they fall behind, :meth:`take` waits, the receiver
        acknowledges nothing, the sender's credit runs out: what waits never grows, and nothing is lost.
    watch : called with each block when all folds have it (to redraw, to measure the delay), by the folding thread.

    A block that cannot be folded (damaged, of another shape, outside the scan) stops the folding. The methods
    ``wait`` and ``results`` raise its error; the receiver goes on.
    """

    def __init__(
        self,
        folds: Mapping[str, Fold],
        scan: tuple[int, int],
        shape: tuple[int, int],
        *,
        stream: str,
        waiting_bytes: int = 16 << 20,
        watch: Callable[[Encoded], None] | None = None,
    ) -> None:
        self.stream = stream
        self.shape = shape
        self._folds = dict(folds)
        self._positions = scan[0] * scan[1]
        self._parts = {name: fold.init(scan, shape) for name, fold in folds.items()}
        self._most = waiting_bytes
        self._watch = watch
        self._changed = threading.Condition()
        self._folding = threading.Lock()
        self._queue: deque[Encoded] = deque()
        self._bytes = 0
        self._done = Spans()
        self._failure: Exception | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._work, name="live-folds", daemon=True)
        self._thread.start()

    def take(self, block: Encoded) -> None:
        """Put ``block`` in the row; waits while the row is full."""
        if block.stream != self.stream:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._bytes < self._most or self._failure or self._stop)
            if self._failure or self._stop:
                return
            self._queue.append(block)
            self._bytes += len(block.payload)
            self._changed.notify_all()

    def results(self) -> dict[str, dict[str, NDArray[Any]]]:
        """What each fold makes of the frames that it has now; positions without a frame are as the fold left them."""
        with self._folding:
            if self._failure:
                raise self._failure
            return {name: fold.finish(self._parts[name]) for name, fold in self._folds.items()}

    @property
    def folded(self) -> list[tuple[int, int]]:
        """The ranges ``(first, stop)`` of frames that are in the results."""
        with self._changed:
            return list(self._done)

    def wait(self, first: int, n: int, timeout_s: float = 60.0) -> None:
        """Return when the frames ``first .. first + n`` are in the results."""
        with self._changed:
            self._changed.wait_for(lambda: self._done.covers(first, first + n) or self._failure, timeout_s)
            if self._failure:
                raise self._failure
            if not self._done.covers(first, first + n):
                raise InstrumentError(
                    f"frames {self._done.absent(first, first + n)} of stream {self.stream!r} did not come in "
                    f"{timeout_s:g} s; is the sender running?"
                )

    def close(self) -> None:
        """Fold what waits, and end; the results stay. Closing twice is harmless."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stop)
                if not self._queue:
                    return
                block = self._queue.popleft()
            try:
                with self._folding:
                    self._fold(block)
                if self._watch is not None:
                    self._watch(block)
            except Exception as error:  # a thread has nobody above it: whoever waits is told
                with self._changed:
                    self._failure = error
                    self._queue.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._bytes -= len(block.payload)
                self._done.add(block.first, block.first + block.n)
                self._changed.notify_all()

    def _fold(self, packed: Encoded) -> None:
        if tuple(packed.shape) != tuple(self.shape) or packed.first + packed.n > self._positions:
            raise InputError(
                f"frames {packed.first} to {packed.first + packed.n - 1} of shape {packed.shape} do not fit a scan of "
                f"{self._positions} positions with frames of {self.shape}."
            )
        block = cut.block_of(packed)
        for name, fold in self._folds.items():
            self._parts[name] = fold.step(self._parts[name], block, packed.first)


class Unkept:
    """A :class:`~stemloop.core.protocols.FrameLog` that keeps nothing, for looking at a stream without recording it:
    what its receiver acknowledges was taken in, and is not durable."""

    def append(self, batch: Batch) -> None:
        """Let ``batch`` go."""

    def append_many(self, blocks: list[Encoded]) -> None:
        """Let ``blocks`` go."""

    def batches(self, stream: str | None = None) -> Iterator[Batch]:
        """Nothing."""
        return iter(())

    def close(self) -> None:
        """Nothing to close."""
