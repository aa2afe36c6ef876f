"""The HTTP application around a service: routes, errors as one clear line, and what stands before them."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

from osml_plugin import __version__
from osml_plugin.errors import OsmlError

from . import metrics
from .body import ITEMS, BodyLimit
from .gate import Admission, Loopback
from .patience import Patience
from .prefix import Prefix
from .routes import ROUTERS
from .service import Service
from .store import Conflict, KeyReused, NotThere, StaleModel, StoreFull, StoreUnavailable

RETRY = {"Retry-After": "1"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""Counted by their names; a client may make up any others."""


def make_app(service: Service) -> Any:
    """The ASGI application of one replica."""
    app = FastAPIOffline(  # its docs page needs nothing from the network
        title="osml-plugin",
        version=__version__,
        description="Open-set recognition: a known class, or unknown; the unknown grouped; a group learned once named.",
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    _errors(app)

    limits = service.config.limits
    outer: Any = BodyLimit(Patience(app), limits.body_bytes, ITEMS)
    outer = Admission(outer, limits.waiting, retry_after_s=1)
    if service.config.cors:
        outer = CORSMiddleware(
            outer,
            allow_origins=service.config.cors,
            allow_methods=["*"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key"],
            expose_headers=["Idempotency-Replayed", "Retry-After"],
        )
    outer = Loopback(outer, lambda: not service.keyring.required, origins=service.config.cors)
    return Prefix(Measured(outer), service.config.root_path)


def _errors(app: FastAPI) -> None:
    def problem(status: int, headers: dict[str, str] | None = None):
        async def handler(_: Request, error: Exception) -> JSONResponse:
            return JSONResponse({"detail": " ".join(str(error).split())}, status, headers)

        return handler

    app.exception_handler(NotThere)(problem(404))
    app.exception_handler(Conflict)(problem(409))
    app.exception_handler(KeyReused)(problem(409))
    app.exception_handler(StaleModel)(problem(409))
    app.exception_handler(OsmlError)(problem(422))
    app.exception_handler(StoreFull)(problem(507))
    app.exception_handler(StoreUnavailable)(problem(503, RETRY))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"detail": f"{where}: {' '.join(str(first['msg']).split())}"}, 422)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        headers, path = error.headers, getattr(request.scope.get("route"), "path_format", None)
        if error.status_code == 405 and error.detail == METHOD_NOT_ALLOWED and path in app.openapi()["paths"]:
            # Starlette names the methods of the first route with this path alone.
            headers = {"Allow": ", ".join(method.upper() for method in app.openapi()["paths"][path])}
        return JSONResponse({"detail": str(error.detail)}, error.status_code, headers)


METHOD_NOT_ALLOWED = HTTPStatus.METHOD_NOT_ALLOWED.phrase
"""Detail of Starlette's own refusal; ours say more."""


class Measured:
    """Counts and times every request, by the route that it matched: names of classes are no labels."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def watched(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path_format", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            metrics.requests.labels(method, route, str(status)).inc()
            metrics.latency.labels(route).observe(time.perf_counter() - began)
