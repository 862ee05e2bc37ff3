"""The management channel: telemetry and heartbeats over the WebSocket ``/manage``, apart from the commands.

It never waits for the instrument: what it tells was noted when it happened. The first message is
``{"op": "hello", "token": ..., "hz": 1 to 10}``, as JSON (text) or msgpack (binary); the telemetry comes in the same
form. Any role may listen. A client sends a heartbeat ``{"beat": n}`` now and then, which the next telemetry repeats;
with ``lease_id`` and ``fencing`` it also renews that lease, so that a lease lives on while its command channel is busy.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from stemloop.core.errors import InputError, LeaseError, StemloopError
from stemloop.core.plain import jsonable
from stemloop.instrument import wire
from stemloop.instrument.station import Station
from stemloop.instrument.tokens import Identity

HELLO_S = 10.0
MESSAGE_BYTES = 4096
HZ_RANGE = (1.0, 10.0)


class Manager:
    """One management connection."""

    def __init__(self, station: Station, connection: WebSocket) -> None:
        self._station = station
        self._connection = connection
        self._text = False
        self._beat: int | None = None

    async def run(self) -> None:
        """Tell the telemetry until the client goes."""
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            await self._connection.accept()
            try:
                message = await asyncio.wait_for(self._receive(), HELLO_S)
                who = await self._station.greet(wire.take(message, "token", str), self._address())
                hertz = float(wire.take(message, "hz", (int, float), 1.0))
                if not HZ_RANGE[0] <= hertz <= HZ_RANGE[1]:
                    raise InputError(f"hz is {HZ_RANGE[0]:g} to {HZ_RANGE[1]:g}; got {hertz!r}.")
            except StemloopError as error:
                await self._send({"ok": False, "code": error.code, "message": str(error)})
                await self._connection.close(1008)
                return
            telling = asyncio.create_task(self._tell(who, 1 / hertz))
            try:
                while True:
                    self._heed(await self._receive())
            except InputError:
                await self._connection.close(1008)
            finally:
                telling.cancel()

    def _address(self) -> str:
        client = self._connection.client
        return client.host if client else ""

    async def _receive(self) -> dict[str, Any]:
        event = await self._connection.receive()
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", 1000))
        data: str | bytes = event.get("bytes") or event.get("text") or ""
        self._text = isinstance(data, str)
        if len(data) > MESSAGE_BYTES:
            raise InputError(f"a message of this channel has at most {MESSAGE_BYTES} bytes.")
        if isinstance(data, bytes):
            return wire.decode(data)
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise InputError('a message is a dictionary such as {"beat": 1}.')
        return message

    def _heed(self, message: dict[str, Any]) -> None:
        self._beat = wire.take(message, "beat", int)
        lease_id = wire.take(message, "lease_id", str, None)
        if lease_id is not None:
            with suppress(LeaseError):  # the telemetry says whose lease it is now
                self._station.desk.check(lease_id, wire.take(message, "fencing", int))

    async def _tell(self, who: Identity, every_s: float) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):
            while True:
                try:
                    self._station.tokens.confirm(who)
                except StemloopError as error:
                    await self._send({"ok": False, "code": error.code, "message": str(error)})
                    await self._connection.close(1008)
                    return
                load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
                await self._send({"ok": True, "beat": self._beat, "load": load, **self._station.telemetry()})
                await asyncio.sleep(every_s)

    async def _send(self, message: dict[str, Any]) -> None:
        if self._text:
            await self._connection.send_text(json.dumps(jsonable(message)))
        else:
            await self._connection.send_bytes(wire.encode(message))
