"""The control channel: the conversation with one client over the WebSocket ``/control``.

One msgpack dictionary a message (:mod:`stemloop.instrument.wire`), one reply each.

============ ============================================ ==========================================================
``op``       fields                                       reply
============ ============================================ ==========================================================
``hello``    ``token``, ``lease_id``?                     ``who``, ``role``, ``fencing``, ``leased``; comes first
``acquire``  ``ttl_s``?, ``takeover``?, ``expected``?     ``lease_id``, ``fencing``, ``ttl_s``
``takeover`` ``ttl_s``?                                   the same; ``acquire`` with ``takeover``
``renew``    ``fencing``                                  nothing more
``release``                                               nothing more
``execute``  ``id``, ``fencing``, ``instruction``,        ``frames`` or ``reference``, ``electrons``, ``state``,
             ``data``?                                    ``calibration``, ``epoch``, ``began_s``, ``ended_s``,
                                                          ``sha256``
``abort``                                                 ``aborted``: whether a command ran
``fetch``    ``key``, ``first``?, ``count``?              ``frames``
``check``    ``instruction`` or ``plan``                  ``steps`` and totals; touches nothing
``state``                                                 ``state``
``dose``                                                  ``dose``
``info``                                                  ``info``, ``limits``
============ ============================================ ==========================================================

Each message carries ``n``, which its reply repeats. A reply has ``ok``; without it ``code`` and ``message`` are those
of an error of ``core.errors``. A message that carries ``event`` and no ``n`` is no reply: ``progress`` (``id``,
``done``, ``of``), ``lease-lost`` (``by``, ``fencing``), ``blanked`` (``reason``).

While a command runs the channel goes on to read: ``abort``, ``takeover`` and everything that does not need the
instrument are answered at once. Whenever nobody holds the lease any more the beam is blanked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from stemloop.core.errors import InputError, LeaseError, NotAuthorised, StemloopError
from stemloop.instrument import wire
from stemloop.instrument.guard import Command
from stemloop.instrument.station import Station
from stemloop.instrument.tokens import Identity

_log = logging.getLogger(__name__)

HELLO_S = 10.0
#: The longest message before a token was seen [bytes].
HELLO_BYTES = 4096
#: Commands of one connection that may wait at a time.
MAX_WAITING = 16
_MAX_UNSENT = 64


class Conversation:
    """One connection: who speaks, and the lease it holds. ``address`` is where it comes from."""

    def __init__(self, station: Station, connection: WebSocket) -> None:
        self.who: Identity | None = None
        self.lease_id: str | None = None
        self._station = station
        self._connection = connection
        self._waiting = 0
        self._sending: set[asyncio.Task[None]] = set()
        self._actions: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]] = {
            "hello": self._hello,
            "acquire": self._acquire,
            "takeover": self._takeover,
            "renew": self._renew,
            "release": self._release,
            "execute": self._execute,
            "abort": self._abort,
            "fetch": self._fetch,
            "check": self._check,
            "state": self._state,
            "dose": self._dose,
            "info": self._info,
        }

    @property
    def address(self) -> str:
        """The client's host."""
        client = self._connection.client
        return client.host if client else ""

    @property
    def speaker(self) -> Identity:
        """Who speaks; their token is looked at again."""
        if self.who is None:
            raise NotAuthorised("say hello with a token first.")
        self._station.tokens.confirm(self.who)
        return self.who

    async def run(self) -> None:
        """Answer until the client goes."""
        station = self._station
        station.connections += 1
        station.visited = True
        try:
            await self._answer_all()
        except (WebSocketDisconnect, RuntimeError, TimeoutError):
            pass  # the client is gone, in the middle of a reply or before it said hello
        finally:
            station.connections -= 1
            station.last_seen = time.monotonic()
            station.listeners.discard(self)
            if self.lease_id is not None:
                station.away(self.lease_id)

    async def _answer_all(self) -> None:
        connection = self._connection
        await connection.accept()
        while True:
            waiting = connection.receive()
            event = await (waiting if self.who else asyncio.wait_for(waiting, HELLO_S))
            if event["type"] == "websocket.disconnect":
                return
            reply = await self._answer(event.get("bytes"))
            if reply is not None:
                await connection.send_bytes(reply)
            if self.who is None:
                await connection.close(1008)
                return

    # --------------------------------------------------------------------------------------------------- sending

    def tell(self, event: dict[str, Any]) -> None:
        """Send an event, or drop it if the connection does not keep up."""
        if len(self._sending) < _MAX_UNSENT:
            self._say(wire.encode(event))

    def _say(self, data: bytes) -> None:
        task = asyncio.get_running_loop().create_task(self._send(data))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, data: bytes) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):  # the client is gone; the spool has what it missed
            await self._connection.send_bytes(data)

    # ------------------------------------------------------------------------------------------------- answering

    async def _answer(self, data: bytes | None) -> bytes | None:
        """The reply to a message; None if it comes later."""
        number = None
        try:
            if data is None:
                raise InputError("messages are binary msgpack; a text message came.")
            if self.who is None and len(data) > HELLO_BYTES:
                raise InputError(f"the first message is a hello of at most {HELLO_BYTES} bytes.")
            message = wire.decode(data)
            number = wire.take(message, "n", int, None)
            reply = await self._do(wire.take(message, "op", str), message)
            return None if reply is None else wire.encode({"n": number, "ok": True, **reply})
        except Exception as error:
            return refusal(number, error)

    async def _do(self, op: str, message: dict[str, Any]) -> dict[str, Any] | None:
        if op not in self._actions:
            raise InputError(f"unknown op {op!r:.40}; known: {', '.join(self._actions)}.")
        if op != "hello":
            self.speaker.require("viewer", op)
        return await self._actions[op](message)

    async def _hello(self, message: dict[str, Any]) -> dict[str, Any]:
        station = self._station
        who = await station.greet(wire.take(message, "token", str), self.address)
        lease_id = wire.take(message, "lease_id", str, None)
        leased = lease_id is not None and station.desk.adopt(lease_id, who)
        self.who, self.lease_id = who, lease_id if leased else None
        station.listeners.add(self)
        return {"who": who.name, "role": who.role, "fencing": station.desk.fencing, "leased": leased}

    async def _acquire(self, message: dict[str, Any]) -> dict[str, Any]:
        lease = await self._station.acquire(
            self.speaker,
            float(wire.take(message, "ttl_s", (int, float), 10.0)),
            wire.take(message, "takeover", bool, False),
            wire.take(message, "expected", int, None),
        )
        self.lease_id = lease.lease_id
        return {"lease_id": lease.lease_id, "fencing": lease.fencing, "ttl_s": lease.ttl_s}

    async def _takeover(self, message: dict[str, Any]) -> dict[str, Any]:
        return await self._acquire({**message, "takeover": True})

    async def _renew(self, message: dict[str, Any]) -> dict[str, Any]:
        self._station.desk.check(self.lease_id, wire.take(message, "fencing", int))
        return {}

    async def _release(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.lease_id is not None:
            lease_id, self.lease_id = self.lease_id, None
            with suppress(LeaseError):  # it was over already
                await self._station.release(self.speaker, lease_id)
        return {}

    async def _execute(self, message: dict[str, Any]) -> dict[str, Any] | None:
        command = Command(
            self.speaker,
            self.lease_id,
            wire.take(message, "fencing", int, None),
            wire.take(message, "id", str),
            wire.take(message, "instruction", dict),
            wire.take(message, "data", str, "inline"),
        )
        if self._waiting >= MAX_WAITING:
            raise InputError(f"{MAX_WAITING} commands of this connection wait already: wait for their replies.")
        number, guard, desk, hand = message.get("n"), self._station.guard, self._station.desk, self._station.hand
        if guard.prompt(command) and hand.take():
            try:
                return guard.execute(command)
            finally:
                hand.give_back()
        guard.admit(command)
        lease = desk.begin(self.lease_id)
        loop = asyncio.get_running_loop()
        self._waiting += 1
        self._station.waiting += 1

        def finish(reply: bytes) -> None:
            self._waiting -= 1
            self._station.waiting -= 1
            self._say(reply)

        def work() -> None:
            try:
                reply = wire.encode({"n": number, "ok": True, **guard.execute(command)})
            except Exception as error:
                reply = refusal(number, error)
            desk.finish(lease)
            with suppress(RuntimeError):  # the server stopped meanwhile; the spool has the result
                loop.call_soon_threadsafe(finish, reply)

        hand.post(work)
        return None

    async def _abort(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"aborted": await self._station.abort(self.speaker, self.lease_id)}

    async def _fetch(self, message: dict[str, Any]) -> dict[str, Any]:
        frames = await self._station.aside(
            self._station.guard.fetch,
            wire.take(message, "key", str),
            wire.take(message, "first", int, 0),
            wire.take(message, "count", int, None),
        )
        return {"frames": frames}

    async def _check(self, message: dict[str, Any]) -> dict[str, Any]:
        asked = wire.take(message, "plan", list, None)
        if asked is None:
            asked = [wire.take(message, "instruction", dict)]
        report = await self._station.plan(self.speaker, asked)
        return report.to_dict()

    async def _state(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"state": await self._station.hand.call(self._station.guard.state)}

    async def _dose(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"dose": self._station.guard.ledger.dose()}

    async def _info(self, message: dict[str, Any]) -> dict[str, Any]:
        guard = self._station.guard
        return {"info": wire.info_to_message(guard.info), "limits": guard.limits.to_dict()}


def refusal(number: int | None, error: Exception) -> bytes:
    """The reply that says why there is no other."""
    if isinstance(error, StemloopError):
        return wire.encode({"n": number, "ok": False, "code": error.code, "message": str(error)})
    _log.error("a message could not be answered", exc_info=error)
    text = f"the server failed on this message: {type(error).__name__}: {error}"
    return wire.encode({"n": number, "ok": False, "code": "instrument", "message": text})
