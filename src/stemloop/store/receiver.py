"""Takes files from other stemloops into a folder, over HTTP with a token."""

from __future__ import annotations

import hmac
import json
import os
import ssl
from collections import OrderedDict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from stemloop.core.errors import InputError, StemloopError
from stemloop.store.transfer import Folder, Manifest

_MOST_MANIFEST = 2 << 20
_MOST_CHUNK = 64 << 20
_MOST_OPEN = 64


def application(folder: str | os.PathLike[str], token: str) -> FastAPI:
    """The receiver as an ASGI application. ``token`` must come with each request; it is never logged."""
    if len(token) < 16:
        raise InputError("a receiver's token has at least 16 characters; make one with: openssl rand -hex 32.")
    target = Folder(folder)
    waiting: OrderedDict[str, Manifest] = OrderedDict()
    app = FastAPI(title="stemloop receiver", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def known(request: Request, go_on: Any) -> Any:
        said = request.headers.get("authorization", "")
        if not hmac.compare_digest(said.encode(), f"Bearer {token}".encode()):
            return JSONResponse({"code": "not-authorised", "message": "a token is needed."}, 401)
        return await go_on(request)

    @app.exception_handler(StemloopError)
    async def refused(_: Request, error: StemloopError) -> JSONResponse:
        return JSONResponse({"code": error.code, "message": str(error)}, 422)

    @app.post("/begin")
    async def begin(request: Request) -> JSONResponse:
        manifest, overwrite = _asked(await _body(request, _MOST_MANIFEST))
        waiting[manifest.sha256] = manifest
        while len(waiting) > _MOST_OPEN:
            waiting.popitem(last=False)
        return JSONResponse({"wanted": await run_in_threadpool(target.begin, manifest, overwrite)})

    @app.put("/chunk/{sha256}/{index}")
    async def chunk(sha256: str, index: int, request: Request) -> JSONResponse:
        manifest = _open(waiting, sha256)
        if not 0 <= index < len(manifest.chunks):
            raise InputError(f"{manifest.name} has no chunk {index}.")
        await run_in_threadpool(target.put, manifest, index, await _body(request, manifest.chunk))
        return JSONResponse({})

    @app.post("/settle/{sha256}")
    async def settle(sha256: str) -> JSONResponse:
        wrong = await run_in_threadpool(target.settle, _open(waiting, sha256))
        if not wrong:
            waiting.pop(sha256, None)
        return JSONResponse({"wrong": wrong})

    return app


def _asked(body: bytes) -> tuple[Manifest, bool]:
    try:
        asked = json.loads(body)
        told = asked["manifest"]
        numbers = int(told["size"]), int(told["chunk"])
        manifest = Manifest(str(told["name"]), *numbers, str(told["sha256"]), tuple(map(str, told["chunks"])))
        overwrite = bool(asked.get("overwrite"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError("that is no manifest of a file.") from None
    manifest.check()
    if manifest.chunk > _MOST_CHUNK:
        raise InputError(f"a chunk has at most {_MOST_CHUNK} bytes here.")
    return manifest, overwrite


def _open(waiting: OrderedDict[str, Manifest], sha256: str) -> Manifest:
    if sha256 not in waiting:
        raise InputError("no transfer of that file is open here; begin it again.")
    return waiting[sha256]


async def _body(request: Request, most: int) -> bytes:
    found = bytearray()
    async for piece in request.stream():
        found += piece
        if len(found) > most:
            raise InputError(f"more than {most} bytes came at once.")
    return bytes(found)


def serve(
    folder: str | os.PathLike[str],
    token: str,
    host: str = "127.0.0.1",
    port: int = 0,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> None:
    """Receive until SIGTERM or Ctrl-C. Off this machine (``host`` is not loopback) it needs a certificate and key."""
    import uvicorn

    if host not in ("127.0.0.1", "::1", "localhost") and not (tls_cert and tls_key):
        raise InputError(
            "a receiver that others can reach needs --tls-cert and --tls-key (see: instrument certificate)."
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        config = uvicorn.Config(
            application(folder, token),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            ssl_certfile=tls_cert,
            ssl_keyfile=tls_key,
        )
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"the certificate cannot be used: {error}.") from None
    uvicorn.Server(config).run()
