"""The server's face on HTTP: discovery, state, leases and tokens; and the way in to the two WebSocket channels.

Everything but ``GET /`` and ``GET /openapi.json`` needs the header ``Authorization: Bearer <token>``. A refusal is a
JSON object with ``code`` and ``message``; its status is 401 for a token that is not good, 403 for a role that may not,
409 for the lease, the limits and the dose, 413 and 422 for a request that cannot be read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Literal

from fastapi import Depends, FastAPI, Query, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

import stemloop
from stemloop.core.errors import (
    InputError,
    InstrumentError,
    LeaseError,
    LimitError,
    NotAuthorised,
    StemloopError,
    UnknownName,
)
from stemloop.core.instruction import KINDS
from stemloop.core.plain import jsonable
from stemloop.core.schema import json_schema
from stemloop.instrument.control import Conversation
from stemloop.instrument.manage import Manager
from stemloop.instrument.station import PLAN_MAX, Station
from stemloop.instrument.tokens import LIFE_MAX_S, NAME_PATTERN, Entry, Identity, TokenFile

MAX_BODY_BYTES = 2**20

_STATUS = {
    UnknownName: 404,
    NotAuthorised: 403,
    LeaseError: 409,
    LimitError: 409,
    InputError: 422,
    InstrumentError: 502,
}
_STATE_WAIT_S = 0.2


Kind: Any = Literal[tuple(KINDS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class LeaseRequest(_Strict):
    """What a lease is asked with: its time to live [s], and whether to take it over from a lower role."""

    ttl_s: float = Field(10.0, ge=0.1, le=3600.0)
    takeover: bool = False


class LeaseReply(BaseModel):
    """A lease: its secret, its fencing number, and its time to live [s]."""

    lease_id: str
    fencing: int
    ttl_s: float


class TokenRequest(_Strict):
    """What a token is issued with; see ``TokenFile.issue``."""

    role: Literal["viewer", "agent", "operator", "engineer"]
    name: str = Field("", pattern=NAME_PATTERN)
    life_s: float | None = Field(None, gt=0, le=LIFE_MAX_S)
    kinds: list[Kind] | None = Field(None, max_length=len(KINDS))
    instruments: list[str] | None = Field(None, max_length=64)


class PlanRequest(_Strict):
    """Instructions in the order in which they would be sent; ``GET /schema`` says what each looks like."""

    plan: list[dict[str, Any]] = Field(max_length=PLAN_MAX)


class Refusal(BaseModel):
    """Why a request was refused."""

    code: str
    message: str


class _NotAuthenticated(Exception):
    pass


def _refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Refusal, "description": "Refused"} for code in codes}


def _answer(status: int, code: str, message: str) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"code": code, "message": message}, status, headers)


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _Bounded:
    """Refuses a body of more than ``MAX_BODY_BYTES`` before it is kept."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size, parts, more = 0, [], True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            size += len(event.get("body", b""))
            if size > MAX_BODY_BYTES:
                text = f"the request has more than {MAX_BODY_BYTES} bytes."
                await _answer(413, "input", text)(scope, receive, send)
                return
            parts.append(event.get("body", b""))
            more = event.get("more_body", False)
        body: MutableMapping[str, Any] | None = {"type": "http.request", "body": b"".join(parts), "more_body": False}

        async def once() -> MutableMapping[str, Any]:
            nonlocal body
            if body is None:
                return await receive()
            first, body = body, None
            return first

        await self._app(scope, once, send)


def build_app(station: Station, lifespan: Any = None) -> FastAPI:
    """The HTTP and WebSocket face of a station."""
    app = FastAPI(
        title="stemloop instrument", version=stemloop.__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(_Bounded)
    bearer = HTTPBearer(auto_error=False, description="a token of this instrument")

    async def speaker(request: Request, credentials: HTTPAuthorizationCredentials | None = Depends(bearer)) -> Identity:
        if credentials is None:
            raise _NotAuthenticated("send the header 'Authorization: Bearer <token>'.")
        try:
            return await station.greet(credentials.credentials, request.client.host if request.client else "")
        except NotAuthorised as error:
            raise _NotAuthenticated(str(error)) from None

    @app.exception_handler(StemloopError)
    async def refuse(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StemloopError)
        status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
        return _answer(status, error.code, str(error))

    @app.exception_handler(_NotAuthenticated)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return _answer(401, NotAuthorised.code, str(error))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _answer(422 if error.status_code == 400 else error.status_code, InputError.code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def unreadable(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _answer(422, InputError.code, f"{where}: {first['msg']}.")

    _discovery(app, station, speaker)
    _leases(app, station, speaker)
    _administration(app, station, speaker)

    @app.websocket("/control")
    async def control(connection: WebSocket) -> None:
        await Conversation(station, connection).run()

    @app.websocket("/manage")
    async def manage(connection: WebSocket) -> None:
        await Manager(station, connection).run()

    return app


def _discovery(app: FastAPI, station: Station, speaker: Any) -> None:
    asked: set[asyncio.Future[dict[str, Any]]] = set()

    @app.get("/")
    async def discover() -> dict[str, Any]:
        """What this is and where its channels are."""
        info = station.guard.info
        return {
            "name": info.name,
            "version": stemloop.__version__,
            "instructions": list(info.instructions),
            "control": "control",
            "manage": "manage",
            "openapi": "openapi.json",
            "schema": "schema",
        }

    @app.get("/state", responses=_refusals(401, 502))
    async def state(who: Identity = Depends(speaker)) -> JSONResponse:
        """State vector, dose, limits, lease and epoch; while the instrument is busy the last state that is known."""
        if station.guard.running is None and not asked:  # one question at a time waits for the instrument
            asking = asyncio.ensure_future(station.hand.call(station.guard.state))
            asked.add(asking)
            asking.add_done_callback(asked.discard)
            await asyncio.wait({asking}, timeout=_STATE_WAIT_S)
            if asking.done():
                asking.result()
            else:
                asking.add_done_callback(lambda done: done.exception())
        return JSONResponse(jsonable(station.telemetry()))

    @app.get("/schema")
    async def schema() -> dict[str, Any]:
        """The JSON Schema of the instructions."""
        return json_schema()

    @app.post("/plan", responses=_refusals(401, 403, 413, 422, 502))
    async def plan(asked: PlanRequest, who: Identity = Depends(speaker)) -> JSONResponse:
        """What a list of instructions would cost and which would be refused; touches nothing."""
        report = await station.plan(who, asked.plan)
        return JSONResponse(jsonable(report.to_dict()))

    @app.get("/audit/head", responses=_refusals(401))
    async def head(who: Identity = Depends(speaker)) -> dict[str, Any]:
        """Lines of the audit log and the hash of the last: kept elsewhere it proves later that nothing was cut off."""
        lines, sha256 = station.guard.audit_head
        return {"lines": lines, "sha256": sha256}


def _leases(app: FastAPI, station: Station, speaker: Any) -> None:
    @app.get("/lease", responses=_refusals(401))
    async def lease(who: Identity = Depends(speaker)) -> JSONResponse:
        """Who holds the lease, without its secret."""
        return JSONResponse(station.telemetry()["lease"])

    @app.post("/lease", response_model=LeaseReply, responses=_refusals(401, 403, 409, 413, 422))
    async def acquire(asked: LeaseRequest | None = None, who: Identity = Depends(speaker)) -> LeaseReply:
        """Take the lease, with ``takeover`` from a lower role."""
        asked = asked or LeaseRequest.model_validate({})
        given = await station.acquire(who, asked.ttl_s, asked.takeover)
        return LeaseReply(lease_id=given.lease_id, fencing=given.fencing, ttl_s=given.ttl_s)

    @app.delete("/lease", status_code=204, responses=_refusals(401, 409, 422))
    async def release(lease_id: str | None = Query(None, max_length=64), who: Identity = Depends(speaker)) -> Response:
        """End the lease: its holder by ``lease_id``, a higher role without."""
        await station.release(who, lease_id)
        return Response(status_code=204)


def _administration(app: FastAPI, station: Station, speaker: Any) -> None:
    def file(who: Identity) -> TokenFile:
        who.require("engineer", "administer tokens")
        if station.tokens.file is None:
            raise InputError("this server was started with tokens of its own and issues none: start it without.")
        return station.tokens.file

    def public(entry: Entry) -> dict[str, Any]:
        return dict(jsonable(entry.public()))

    @app.get("/tokens", responses=_refusals(401, 403, 422))
    async def tokens(who: Identity = Depends(speaker)) -> list[dict[str, Any]]:
        """The tokens that were issued, without their secrets."""
        return [public(entry) for entry in await asyncio.to_thread(file(who).entries)]

    @app.post("/tokens", status_code=201, responses=_refusals(401, 403, 413, 422))
    async def issue(asked: TokenRequest, who: Identity = Depends(speaker)) -> dict[str, Any]:
        """Issue a token. This reply is the only one that holds it."""
        token, entry = await asyncio.to_thread(
            file(who).issue, asked.role, asked.name, asked.life_s, asked.kinds, asked.instruments
        )
        station.guard.note("issue", who.name, token=entry.token_id, to=entry.name, expires_s=entry.expires_s)
        return {"token": token, **public(entry)}

    @app.delete("/tokens/{token_id}", responses=_refusals(401, 403, 404, 422))
    async def revoke(token_id: str, who: Identity = Depends(speaker)) -> dict[str, Any]:
        """Revoke a token: open connections end with their next message, its lease within half a second."""
        entry = await asyncio.to_thread(file(who).revoke, token_id)
        station.guard.note("revoke", who.name, token=entry.token_id, to=entry.name)
        return public(entry)
