"""The client's words, to be awaited: for programs that do other things while a scan runs.

>>> async with await stemloop.aconnect("wss://microscope:8443", token=...) as scope:  # doctest: +SKIP
...     async with scope.lease():
...         image = await scope.image(fov_nm=20, shape=(512, 512), dwell_us=2)

There is one implementation: an :class:`AsyncClient` has a :class:`~stemloop.instrument.client.Client` do the work in
threads of its own. A task that is cancelled during a command ends the command on the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from stemloop.core.errors import StemloopError
from stemloop.core.protocols import InstrumentInfo
from stemloop.instrument.client import Client, connect
from stemloop.instrument.words import Draft

P = ParamSpec("P")
R = TypeVar("R")


async def _in_threads(threads: ThreadPoolExecutor, work: Callable[[], R], stop: Callable[[], Any] | None = None) -> R:
    """Await ``work``. If the awaiting task is cancelled, ``stop`` it and wait for its end."""
    loop = asyncio.get_running_loop()
    running = loop.run_in_executor(threads, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        if stop is not None:
            with suppress(StemloopError):
                await asyncio.to_thread(stop)
        with suppress(StemloopError):
            await running
        raise


async def aconnect(*args: Any, **kwargs: Any) -> AsyncClient:
    """Connect to an instrument's server; the arguments are those of :func:`~stemloop.instrument.client.connect`."""
    threads = ThreadPoolExecutor(2, thread_name_prefix="instrument client")
    try:
        return AsyncClient(await _in_threads(threads, partial(connect, *args, **kwargs)), threads)
    except BaseException:
        threads.shutdown(wait=False)
        raise


def _awaited(
    method: Callable[Concatenate[Client, P], R],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]]:
    """A method of the client, to be awaited; if its task is cancelled the running command is ended."""

    @wraps(method)
    async def awaited(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        work = partial(method, self.client, *args, **kwargs)
        return await _in_threads(self._threads, work, self.client.abort)

    return awaited


class AsyncClient:
    """A :class:`~stemloop.instrument.client.Client` whose words are awaited. Made by :func:`aconnect`."""

    def __init__(self, client: Client, threads: ThreadPoolExecutor) -> None:
        self.client = client
        self._threads = threads

    @property
    def info(self) -> InstrumentInfo:
        """What the instrument is."""
        return self.client.info

    @property
    def limits(self) -> dict[str, Any]:
        """What may be asked."""
        return self.client.limits

    @property
    def fencing(self) -> int | None:
        """The number of our lease."""
        return self.client.fencing

    @property
    def draft(self) -> Draft:
        """The same words, which make instructions and carry out nothing."""
        return self.client.draft

    execute = _awaited(Client.execute)
    perform = _awaited(Client.perform)
    measure = _awaited(Client.measure)
    image = _awaited(Client.image)
    diffraction = _awaited(Client.diffraction)
    spectrum = _awaited(Client.spectrum)
    probe = _awaited(Client.probe)
    blank = _awaited(Client.blank)
    unblank = _awaited(Client.unblank)
    stage = _awaited(Client.stage)
    optics = _awaited(Client.optics)
    field = _awaited(Client.field)
    detector = _awaited(Client.detector)
    report = _awaited(Client.report)
    plan = _awaited(Client.plan)
    fetch = _awaited(Client.fetch)
    state = _awaited(Client.state)
    dose = _awaited(Client.dose)
    abort = _awaited(Client.abort)
    acquire = _awaited(Client.acquire)
    release = _awaited(Client.release)

    @asynccontextmanager
    async def lease(self, takeover: bool = False) -> AsyncIterator[int]:
        """Hold the lease inside an ``async with`` block; gives its fencing number."""
        fencing = await self.acquire(takeover)
        try:
            yield fencing
        finally:
            await asyncio.shield(self.release())

    async def close(self) -> None:
        """Give the lease back, if there is one, and leave."""
        await _in_threads(self._threads, self.client.close)
        self._threads.shutdown(wait=False)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{self.client!r} (awaited)"
