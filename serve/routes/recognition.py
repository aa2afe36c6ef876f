"""Recognise and embed."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from ..schemas import Embedded, Inputs, Recognized
from .common import BODY_PROBLEMS, Served, actor_with, answer, items_of, known_queries

router = APIRouter(prefix="/v1", tags=["recognition"], dependencies=known_queries)


def either(schema: type) -> dict:
    """The OpenAPI of a body that is a form with files, JSON, or one file."""
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": {"files": files}, "required": ["files"]},
                    "encoding": {"files": {"contentType": "image/jpeg, image/png, image/webp"}},
                },
                "application/json": {"schema": schema.model_json_schema()},
                "application/octet-stream": {
                    "schema": {"type": "string", "format": "binary", "description": "One image file."}
                },
            },
        }
    }


@router.post(
    "/recognize",
    response_model=Recognized,
    responses=BODY_PROBLEMS,
    openapi_extra=either(Inputs),
    dependencies=[Depends(actor_with("recognize"))],
)
async def recognize(
    request: Request,
    service: Served,
    neighbours: Annotated[int, Query(ge=0, le=50, description="Nearest references to name for each item.")] = 3,
    remember: Annotated[bool, Query(description="Keep what is unknown, to be grouped and named.")] = True,
):
    """Say what images (JPEG, PNG, WEBP) or embeddings are: a known class, or unknown."""
    contents, vectors, _ = await items_of(request, service, Inputs)
    snapshot, items = await service.items(contents, vectors)
    return answer(
        snapshot, {"results": await service.recognize(snapshot, items, neighbours=neighbours, remember=remember)}
    )


@router.post(
    "/embed",
    response_model=Embedded,
    responses=BODY_PROBLEMS,
    openapi_extra=either(Inputs),
    dependencies=[Depends(actor_with("recognize"))],
)
async def embed(request: Request, service: Served):
    """The embeddings of images, in order."""
    contents, vectors, _ = await items_of(request, service, Inputs)
    snapshot, items = await service.items(contents, vectors)
    return answer(snapshot, {"embeddings": (await service.embed(snapshot, items)).tolist()})
