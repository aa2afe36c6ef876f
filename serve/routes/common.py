"""What all routes share: who asks, under which key, and the versions that every answer names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, Header, HTTPException, Query, Request, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from osml_plugin.checks import LARGEST
from osml_plugin.errors import unknown_name

from ..body import Schema, read_input
from ..keys import Refused
from ..live import Snapshot
from ..prefix import route_path
from ..schemas import Problem
from ..service import Service, fingerprint
from ..store import Write, Written

_bearer = HTTPBearer(
    auto_error=False, description="A key that `osml keys add` made; not needed on loopback without keys."
)

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        401: "No key, or none that is valid.",
        403: "The key does not have the scope; or, without keys, the request does not come from this machine.",
        422: "Something in the request is wrong; `detail` says what.",
        503: "Too busy, or the store does not answer: try again after `Retry-After` seconds.",
    }.items()
}
BODY_PROBLEMS = PROBLEMS | {
    400: {"model": Problem, "description": "The body cannot be read."},
    408: {"model": Problem, "description": "The body comes too slowly."},
    413: {"model": Problem, "description": "The body, or an image, is too large."},
    415: {"model": Problem, "description": "Neither a form, nor JSON, nor an image; or the body is compressed."},
}
NOT_FOUND = {404: {"model": Problem, "description": "There is no such class, item, discovery or group."}}
WRITE_PROBLEMS = PROBLEMS | {
    400: {"model": Problem, "description": "The body cannot be read."},
    408: {"model": Problem, "description": "The body comes too slowly."},
    409: {
        "model": Problem,
        "description": "It does not fit what is there now, or the key was used for something else.",
    },
    413: {"model": Problem, "description": "The body is too large."},
    415: {"model": Problem, "description": "The body is compressed."},
    507: {"model": Problem, "description": "The disk of the store is full; nothing was changed."},
}


async def service_of(request: Request) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(service_of)]
After = Annotated[str | None, Query(pattern=r"^[0-9a-f]{32}$", description="`next` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=1000)]


IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[!-~]{1,200}$",
        description="The same key again gives the first answer and changes nothing; kept for a day.",
    ),
]
Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
Scope = Literal["recognize", "enroll", "admin"]


async def only_known_queries(request: Request) -> None:
    """422 for a query parameter that the route does not have: a misspelt one would be ignored."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            if not known:
                raise HTTPException(422, "this route takes no query parameters")
            raise HTTPException(422, str(unknown_name("query parameter", name[:50], known)))


known_queries = [Depends(only_known_queries)]
"""For a router: all its routes have it."""


def actor_with(scope: Scope):
    """A dependency: the name of the key that may do this."""

    async def actor(request: Request, _: Bearer) -> str:
        return _identified(request, scope)

    return actor


def writer_with(scope: Scope):
    """A dependency: who writes, and under which idempotency key, for requests whose body is small JSON."""

    async def writer(request: Request, _: Bearer, idempotency_key: IdempotencyKey = None) -> Write:
        actor = _identified(request, scope)
        said = fingerprint(request.method, route_path(request.scope), await request.body())
        return Write(actor, idempotency_key, said)

    return writer


def _identified(request: Request, scope: Scope) -> str:
    try:
        return request.app.state.service.keyring.identify(request.headers.get("authorization"), scope)
    except Refused as refused:
        headers = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else None
        raise HTTPException(refused.status, refused.detail, headers) from None


async def items_of(request: Request, service: Service, schema: type[Schema]):
    """What `read_input` gives; 422 where an embedding has a number that float32 cannot square."""
    contents, vectors, body = await read_input(request, service.config.limits, schema)
    if vectors is not None and np.abs(np.array(vectors)).max() > LARGEST:
        raise HTTPException(422, f"an embedding has a number beyond {LARGEST:.0e}: float32 cannot square it")
    return contents, vectors, body


def answer(snapshot: Snapshot, fields: dict[str, Any], status: int = 200) -> JSONResponse:
    """JSON with the versions that gave it."""
    versions = {"model_version": snapshot.model, "gallery_version": snapshot.gallery_version}
    return JSONResponse(versions | fields, status)


def changed(snapshot: Snapshot, written: Written, status: int = 200) -> JSONResponse:
    """What a committed write did."""
    fields = {"model_version": snapshot.model, "gallery_version": written.gallery_version}
    fields |= {"name": None, "n_examples": None, "example_ids": None} | written.result
    fields["warnings"] = snapshot.warnings
    return JSONResponse(fields, status, {"Idempotency-Replayed": "true"} if written.replayed else None)
