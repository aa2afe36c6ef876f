"""What was rejected, and is remembered."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from ..schemas import Changed, ItemId, UnknownList, UnknownOut
from ..store import Unknown, Write
from .common import (
    NOT_FOUND,
    PROBLEMS,
    WRITE_PROBLEMS,
    After,
    Limit,
    Served,
    actor_with,
    answer,
    changed,
    known_queries,
    writer_with,
)

router = APIRouter(prefix="/v1", tags=["unknowns"], dependencies=known_queries)
reads = [Depends(actor_with("enroll"))]


@router.get("/unknowns", response_model=UnknownList, responses=PROBLEMS, dependencies=reads)
def unknowns(service: Served, limit: Limit = 100, after: After = None):
    """The unknown items, the newest first."""
    total, rows, following = service.store.unknowns(limit, after)
    return answer(service.live.snapshot, {"total": total, "unknowns": [_out(row) for row in rows], "next": following})


@router.get("/unknowns/{item}", response_model=UnknownOut, responses=PROBLEMS | NOT_FOUND, dependencies=reads)
def unknown(service: Served, item: ItemId):
    """One of them."""
    return answer(service.live.snapshot, _out(service.store.unknown(item)))


@router.delete("/unknowns/{item}", response_model=Changed, responses=WRITE_PROBLEMS | NOT_FOUND)
def discard(service: Served, item: ItemId, by: Annotated[Write, Depends(writer_with("enroll"))]):
    """Remove one for good."""
    return changed(*service.write(service.store.discard, by, [item]))


@router.get(
    "/items/{item}/image",
    response_class=Response,
    responses=PROBLEMS
    | NOT_FOUND
    | {200: {"content": {kind: {} for kind in ("image/jpeg", "image/png", "image/webp")}, "description": "The file."}},
    dependencies=reads,
)
def image(service: Served, item: ItemId):
    """The image of an unknown item or of an example, as it was sent."""
    content, media_type = service.store.image(item)
    # It came from outside: no browser may take it for anything but an image.
    headers = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}
    return Response(content, media_type=media_type, headers=headers)


def _out(row: Unknown) -> dict:
    return {
        "id": row.id,
        "created_at": row.created_at.isoformat(),
        "score": row.score,
        "nearest": row.nearest,
        "p_value": row.p_value,
        "has_image": row.has_image,
    }
