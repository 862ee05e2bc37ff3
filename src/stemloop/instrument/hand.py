"""The one thread that touches the instrument: work goes in from any thread and is done in the order of arrival."""

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
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException:  # the thread outlives whatever happens in it
                _log.exception("work of the instrument's thread failed")
            work = None

    def post(self, work: Callable[[], None]) -> None:
        """Do ``work`` after all that was posted before. It tells its outcome by itself."""
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
