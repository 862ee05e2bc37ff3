"""The one thread that touches the instrument: work goes in from any thread and is done in the order of arrival.

While it has nothing to do, another thread may take its place for a moment (:meth:`Hand.take`): still only one touches
the instrument at a time, and nothing overtakes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Hand:
    """A thread with a queue of work; cheaper than an executor where every microsecond of a command's way counts."""

    def __init__(self, name: str = "instrument") -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._count = threading.Lock()
        self._pending = 0  # what was posted and is not done, and whoever has taken the thread's place
        self._place = threading.Lock()  # whoever touches the instrument holds it
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            with self._place:
                try:
                    work()
                except BaseException:  # the thread outlives whatever happens in it
                    _log.exception("work of the instrument's thread failed")
            with self._count:
                self._pending -= 1
            work = None

    def take(self) -> bool:
        """Take the thread's place if it has nothing to do; True asks for :meth:`give_back` soon. Never waits."""
        with self._count:
            if self._pending:
                return False
            self._pending = 1
            self._place.acquire()  # free: nothing is pending
        return True

    def give_back(self) -> None:
        """Let the thread go on with what was posted meanwhile."""
        self._place.release()
        with self._count:
            self._pending -= 1

    def post(self, work: Callable[[], None]) -> None:
        """Do ``work`` after all that was posted before. It tells its outcome by itself."""
        with self._count:
            self._pending += 1
        self._work.put(work)

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Do ``function(*args)`` and keep its outcome in a future."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

        self.post(work)
        return future

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Do ``function(*args)`` and wait for it without blocking the event loop."""
        return await asyncio.wrap_future(self.submit(function, *args))

    def close(self) -> None:
        """Do what was posted, then end the thread."""
        self._work.put(None)
        self._thread.join()
