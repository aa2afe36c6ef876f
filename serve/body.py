"""From the body of a request to images or embeddings, within the limits."""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from fastapi import HTTPException
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .settings import Limits

Schema = TypeVar("Schema", bound=BaseModel)

IN_A_THREAD = 2**20
"""Bytes of JSON from which on the event loop goes on with other requests meanwhile."""
WIDTH = 4096
"""So many numbers an embedding are taken on average; wider ones want fewer in a request."""
_SLICE = 2**18  # characters of base64, decoded at a time: a thread holds the interpreter as long


ITEMS = ("/recognize", "/embed", "/examples")
"""How the routes end that take images or embeddings."""
SMALL = 2**16
"""Bytes of a body of the others."""


class BodyLimit:
    """No more than `max_bytes` of a body are read; above it the answer is 413, at once where Content-Length says so.

    So many only where the path ends with one of `routes`: 64 KiB is enough for the others.
    A body without a length is counted as it comes. The exception that its reader then sees is an `HTTPException`, which
    FastAPI and Starlette answer; where nobody did, it is answered here. A Content-Length that is none gives 400.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, routes: tuple[str, ...] = ("",)):
        self.app, self.max_bytes, self.routes = app, max_bytes, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # All other bodies are small JSON, which is parsed before anything else is asked.
        of_items = scope.get("method", "POST") == "POST" and scope.get("path", "").endswith(self.routes)
        most = self.max_bytes if of_items else min(SMALL, self.max_bytes)
        too_large = f"the body is larger than {most:,} bytes: send less at once"
        problem = self._problem(
            most, too_large, [value for name, value in scope["headers"] if name == b"content-length"]
        )
        if problem is not None:
            await _answer(problem)(scope, receive, send)
            return
        count, started = 0, False

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > most:
                raise HTTPException(413, too_large)
            return message

        async def sent(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, counted, sent)
        except HTTPException as problem:
            if started or count <= most:
                raise
            await _answer(problem)(scope, receive, send)

    def _problem(self, most: int, too_large: str, lengths: Sequence[bytes]) -> HTTPException | None:
        if not lengths:
            return None
        if len(set(lengths)) > 1 or not lengths[0].isdigit():
            return HTTPException(400, "Content-Length is not a whole number of bytes")
        digits = lengths[0].lstrip(b"0") or b"0"
        if len(digits) > 18 or int(digits) > most:  # int refuses thousands of digits
            return HTTPException(413, too_large)
        return None


def _answer(problem: HTTPException) -> JSONResponse:
    return JSONResponse({"detail": problem.detail}, problem.status_code)


async def read_input(
    request: Request, limits: Limits, schema: type[Schema]
) -> tuple[list[bytes], list[list[float]] | None, Schema]:
    """The items of a request: image files, embeddings, or what else `schema` offers, of exactly one kind.

    The body is multipart/form-data with the field `files`, once or many times, or application/json of the form `schema`
    (`Inputs` or `Examples`), its images in base64.

    Returns the image files; the embeddings, all of one length and finite in float32, or None; and the rest of the model
    (its images and embeddings are taken out).

    Raises `HTTPException` with one line: 413 for an image larger than `limits.image_bytes`; 415 for another
    Content-Type; 422 for a body that cannot be read, says something else, has nothing in it, items of several kinds, or
    more than `limits.images` items.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if media_type == "multipart/form-data":
            return await _files(request, limits), None, schema()
        if media_type == "application/json":
            body = await request.body()
            if len(body) < IN_A_THREAD:
                return _parsed(body, limits, schema)
            return await run_in_threadpool(_parsed, body, limits, schema)
    except ClientDisconnect:
        raise HTTPException(400, "the connection was closed before the whole body was sent") from None
    raise HTTPException(415, "expected multipart/form-data with the field 'files', or application/json")


# --- multipart -------------------------------------------------------------------------------------------


class _InMemory(MultiPartParser):
    """Nothing is written to disk, the body is small enough; and a body that was cut off is noticed."""

    spool_max_size = 0  # without end
    complete = False

    def on_end(self) -> None:
        self.complete = True


async def _files(request: Request, limits: Limits) -> list[bytes]:
    parser = _InMemory(request.headers, request.stream(), max_files=limits.images, max_fields=1, max_part_size=1024)
    try:
        form = await parser.parse()
    except (HTTPException, ClientDisconnect):
        raise
    except MultiPartException as error:
        raise _unreadable(f"the multipart body cannot be read: {error.message}") from error
    except Exception as error:  # what codecs and parsers stumble on
        raise _unreadable("the multipart body cannot be read") from error
    try:
        if not parser.complete:
            raise _unreadable("the multipart body ends before its last boundary")
        for field, file in form.multi_items():
            if field == "files" and not isinstance(file, UploadFile):
                raise _unreadable("the field 'files' holds text, not a file: with curl, write files=@image.jpg")
            if field != "files":
                raise _unreadable(f"expected files in the field 'files'; got the field {field[:50]!a}")
            _check_size(file.size, limits)
        _check_count(len(form.multi_items()), limits, "images in the field 'files'")
        return [await file.read() for _, file in form.multi_items()]
    finally:
        await form.close()


# --- JSON ------------------------------------------------------------------------------------------------


def _parsed(body: bytes, limits: Limits, schema: type[Schema]) -> tuple[list[bytes], list[list[float]] | None, Schema]:
    kinds = " or ".join(schema.model_fields)
    # Base64 and numbers have no brackets and no commas: counting these is to know what a parser would build, and a few
    # MB of "[],[],..." would become gigabytes.
    if body.count(b"[") + body.count(b"{") > limits.images + 8:
        raise _unreadable(f"more than {limits.images} items, or arrays in arrays: expected {kinds}")
    if body.count(b",") > max(limits.images, 16) * WIDTH:
        raise _unreadable(f"more than {max(limits.images, 16) * WIDTH:,} numbers: send fewer at once")
    try:
        model = schema.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise _unreadable(_first(error, kinds)) from None
    given = [name for name in schema.model_fields if getattr(model, name)]
    if len(given) != 1:
        raise _unreadable(f"expected one of {kinds}; got {' and '.join(given) or 'none'}")
    _check_count(len(getattr(model, given[0])), limits, given[0])
    images = [_decoded(image, i, limits) for i, image in enumerate(model.images or ())]
    embeddings = model.embeddings or None
    if embeddings is not None:
        _check_embeddings(embeddings)
    return images, embeddings, model.model_copy(update={"images": None, "embeddings": None})


def _decoded(image: str, i: int, limits: Limits) -> bytes:
    _check_size(len(image) * 3 // 4 - 2, limits)
    try:
        # Decoded in slices, which are of whole fours but for the last: only that may be padded.
        if "=" in image[:-2]:
            raise ValueError("padding before the end")
        slices = (image[start : start + _SLICE] for start in range(0, len(image), _SLICE))
        content = b"".join(binascii.a2b_base64(piece, strict_mode=True) for piece in slices)
    except ValueError as error:
        raise _unreadable(f"images.{i} is not base64: {error}") from None
    _check_size(len(content), limits)
    return content


def _check_embeddings(embeddings: list[list[float]]) -> None:
    if len({len(embedding) for embedding in embeddings}) > 1:
        raise _unreadable("the embeddings differ in length: expected the same number of values in each")
    with np.errstate(over="ignore"):
        if not np.isfinite(np.array(embeddings, dtype=np.float32)).all():
            raise _unreadable("an embedding has a value that is not finite in 32 bits")


def _first(error: ValidationError, kinds: str) -> str:
    """One line of what may be very many mistakes."""
    if error.error_count() > 100:
        return f"{error.error_count():,} values are not what was expected: {kinds}"
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part)[:50] for part in first["loc"])
    return " ".join(f"{ascii(place)[1:-1]}: {first['msg']}".removeprefix(": ").split())


def _check_count(n: int, limits: Limits, what: str) -> None:
    if not 1 <= n <= limits.images:
        raise _unreadable(f"expected 1 to {limits.images} {what}; got {n}")


def _check_size(size: int, limits: Limits) -> None:
    if size > limits.image_bytes:
        raise HTTPException(413, f"an image file is larger than {limits.image_bytes:,} bytes: send a smaller one")


def _unreadable(problem: str) -> HTTPException:
    return HTTPException(422, problem)
