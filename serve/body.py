"""From the body of a request to images or embeddings, within the limits."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from itertools import count, repeat
from typing import TypeVar

import numpy as np
from fastapi import HTTPException
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from osml_plugin.errors import OsmlError

from .encoded import decoded
from .images import begins_as_image
from .settings import Limits

Schema = TypeVar("Schema", bound=BaseModel)

IN_A_THREAD = 2**20
"""Bytes of JSON from which on the event loop goes on with other requests meanwhile."""
WIDTH = 4096
"""So many numbers an embedding are taken on average; wider ones want fewer in a request."""

ITEMS = ("/recognize", "/embed", "/examples")
"""How the routes end that take images or embeddings."""
SMALL = 2**16
"""Bytes of a body of the others."""


class BodyLimit:
    """No more than `max_bytes` of a body are read; above it the answer is 413, at once where Content-Length says so.

    So many only where the path ends with one of `routes`: 64 KiB is enough for the others.
    A body without a length is counted as it comes. The exception that its reader then sees is an `HTTPException`, which
    FastAPI and Starlette answer; where nobody did, it is answered here. A Content-Length that is none gives 400, a
    compressed body 415: what it would become is not known before it is unpacked.
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
        headers = scope["headers"]
        problem = self._problem(most, too_large, [value for name, value in headers if name == b"content-length"])
        problem = problem or _compressed([value for name, value in headers if name == b"content-encoding"])
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


def _compressed(encodings: Sequence[bytes]) -> HTTPException | None:
    for encoding in encodings:
        if encoding.strip().lower() not in (b"", b"identity"):
            name = ascii(encoding.decode("latin-1"))[:50]
            return HTTPException(415, f"the body is compressed (Content-Encoding: {name}): send it as it is")
    return None


def _answer(problem: HTTPException) -> JSONResponse:
    return JSONResponse({"detail": problem.detail}, problem.status_code)


async def read_input(
    request: Request, limits: Limits, schema: type[Schema]
) -> tuple[list[bytes], list[list[float]] | None, Schema]:
    """The items of a request: image files, embeddings, or what else `schema` offers, of exactly one kind.

    The body is multipart/form-data with the field `files`, once or many times; application/json of the form `schema`
    (`Inputs` or `Examples`), its images in base64 (`encoded.py`); or, with any Content-Type, one image file itself.

    Returns the image files; the embeddings, all of one length and finite in float32, or None; and the rest of the model
    (its images and embeddings are taken out).

    Raises `HTTPException` with one line: 413 for an image larger than `limits.image_bytes`; 415 for another
    Content-Type; 422 for a body that cannot be read, says something else, has nothing in it, items of several kinds, or
    more than `limits.images` items.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    try:
        head, body = await _begun(request.stream())
        if begins_as_image(head):
            return [await _image(body, limits)], None, schema()
        if media_type == "multipart/form-data":
            return await _files(request, body, limits), None, schema()
        if media_type == "application/json":
            content = b"".join([piece async for piece in body])
            if len(content) < IN_A_THREAD:
                return _parsed(content, limits, schema)
            return await run_in_threadpool(_parsed, content, limits, schema)
    except ClientDisconnect:
        raise HTTPException(400, "the connection was closed before the whole body was sent") from None
    raise HTTPException(
        415,
        "expected multipart/form-data with the field 'files' (curl -F files=@image.jpg), application/json, or the "
        f"bytes of one JPEG, PNG or WEBP file; got {ascii(content_type[:100]) if content_type else 'no Content-Type'}"
        f"{'' if head else ' and an empty body'}",
    )


async def _begun(stream: AsyncGenerator[bytes, None]) -> tuple[bytes, AsyncGenerator[bytes, None]]:
    """The first bytes, enough to tell an image by, and all of the body, these included."""
    head = b""
    async for piece in stream:
        head += piece
        if len(head) >= 12:
            break

    async def whole() -> AsyncGenerator[bytes, None]:
        yield head
        async for piece in stream:
            yield piece

    return head, whole()


async def _image(body: AsyncGenerator[bytes, None], limits: Limits) -> bytes:
    content = bytearray()
    async for piece in body:
        content += piece
        _check_size(len(content), limits)
    return bytes(content)


# --- multipart -------------------------------------------------------------------------------------------


_FIELD = re.compile(r"files(\[\d*\])?")
"""The name of the parts; some clients number the items of a list, or put brackets behind its name."""


_ENCODING = "content-transfer-encoding"
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")


class _InMemory(MultiPartParser):
    """A multipart parser that takes every part for a file, writes nothing to disk, and notices a body that was cut off.

    Clients leave the file name out, or write `filename*` alone, which RFC 7578 forbids and parsers pass over.
    """

    spool_max_size = 0  # without end
    complete = False

    def on_headers_finished(self) -> None:
        part = self._current_part
        _, options = parse_options_header(part.content_disposition)
        field = options.get(b"name", b"").decode("latin-1")
        if b"name" in options and not _FIELD.fullmatch(field):
            raise _unreadable(f"expected files in the field 'files'; got the field {field[:50]!a}")
        if b"filename" not in options:
            kind, _, parameters = (part.content_disposition or b"").partition(b";")
            part.content_disposition = kind + b'; filename="";' + parameters
        super().on_headers_finished()
        if part.file is None:  # an odd quotation mark
            raise _unreadable("the Content-Disposition of a part cannot be read")

    def on_end(self) -> None:
        self.complete = True


async def _files(request: Request, body: AsyncGenerator[bytes, None], limits: Limits) -> list[bytes]:
    if b"boundary" not in parse_options_header(request.headers["content-type"])[1]:
        raise _unreadable("multipart/form-data without a boundary: let the client make the Content-Type itself")
    parser = _InMemory(request.headers, body, max_files=limits.images)
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
        files = [file for _, file in form.multi_items()]
        for i, file in enumerate(files):
            _check_size(file.size, limits)
            if not file.size:
                raise _unreadable(f"files.{i} is empty: expected an image file")
        _check_count(len(files), limits, "images in the field 'files'")
        contents = [await file.read() for file in files]
        if all(file.filename and _ENCODING not in file.headers for file in files):
            return contents
        return await run_in_threadpool(lambda: list(map(_content, count(), contents, files, repeat(limits))))
    finally:
        await form.close()


def _content(i: int, content: bytes, part: UploadFile, limits: Limits) -> bytes:
    """The image file in a part: as it is, or in base64 where the part says so, or has no file name and is text."""
    encoding = part.headers.get(_ENCODING, "").strip().lower()
    if encoding == "quoted-printable":
        raise _unreadable(f"files.{i} is quoted-printable: send it as it is")
    if encoding != "base64" and (part.filename or not _is_text(content)):
        return content
    try:
        return _decoded(content.decode("utf-8", "replace"), f"files.{i}", limits)
    except HTTPException as problem:
        if problem.status_code == 422:
            problem.detail += " (with curl, write files=@image.jpg)"
        raise


def _is_text(content: bytes) -> bool:
    """An image file has bytes that no text has."""
    try:
        return not _CONTROL.search(content) and content.decode("utf-8") is not None
    except UnicodeDecodeError:
        return False


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
    images = [_decoded(image, f"images.{i}", limits) for i, image in enumerate(model.images or ())]
    embeddings = model.embeddings or None
    if embeddings is not None:
        _check_embeddings(embeddings)
    return images, embeddings, model.model_copy(update={"images": None, "embeddings": None})


def _decoded(text: str, place: str, limits: Limits) -> bytes:
    try:
        content = decoded(text)
    except OsmlError as error:
        raise _unreadable(f"{place} {error}") from None
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
