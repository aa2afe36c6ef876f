"""The endpoint from Python: each call is one route, and returns its answer as a model of `schemas.py`.

    with Client("http://127.0.0.1:8000") as client:
        print([result.label for result in client.recognize(["a.jpg", "b.jpg"]).results])

What fails for a moment is sent again (no connection, a timeout, 429, 502, 503, 504), not sooner than the server asks
for. Every write carries an idempotency key, the same in all its retries, so that it is done once however often it is
sent; GETs and writes are sent again after a 500 too. `recognize` has no such key: sent again after a lost answer, it
may remember an unknown item twice.
"""

from __future__ import annotations

import io
import json
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import IO, Any, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx2
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageOps
from pydantic import BaseModel, ValidationError

from osml_plugin.errors import OsmlError

from . import schemas as s

A = TypeVar("A", bound=BaseModel)
ImageLike = str | Path | bytes | bytearray | memoryview | IO[bytes] | Image.Image
"""A file's path, a file's bytes, a file that is open in binary mode, or a picture in memory, which is sent as PNG."""
Images = ImageLike | Sequence[ImageLike]

LOST = (
    httpx2.NetworkError,
    httpx2.TimeoutException,
    httpx2.RemoteProtocolError,
    httpx2.ProxyError,
    httpx2.DecodingError,
)
RETRIED = frozenset({429, 502, 503, 504})
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds
_KEY = re.compile(r"[!-~]+")
LONGEST_ASKED = 60.0  # seconds; a server that asks for more (Retry-After) is not waited for


class Write(TypedDict, total=False):
    """What every write takes: the key of a write of before, to do it at most once. Without it the client makes one."""

    idempotency_key: str


class ServerError(OsmlError):
    """The server refused: `status` is that of HTTP, `detail` its one line that says why."""

    def __init__(self, status: int, detail: str):
        super().__init__(status, detail)
        self.status, self.detail = status, detail

    def __str__(self) -> str:
        return f"{self.detail} (HTTP {self.status})"


class Client:
    """The endpoint at `address`; `key` is an API key, where it has keys. Threads may share a client.

    `timeout`: seconds for one try. `retries`: how often a request that failed for a moment is sent again. `http`: an
    HTTP client of your own; its base address and timeout hold then, and it stays open.

    Every call raises `ServerError` where the server refuses, and `OsmlError` where none answers or the input is bad.
    """

    def __init__(
        self,
        address: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        timeout: float = 30,
        retries: int = 5,
        http: httpx2.Client | None = None,
    ):
        try:
            self._own = None if http else httpx2.Client(base_url=address, timeout=timeout)
        except Exception as error:  # of the address, or of a proxy or certificate that the environment names
            raise OsmlError(f"cannot use the address {address!r}: {_reason(error)}") from error
        self._http = http or self._own
        if key and not _KEY.fullmatch(str(key).strip()):
            raise OsmlError("the key has characters that no key has: give it as 'osml keys add' printed it")
        self._headers = {"Authorization": f"Bearer {str(key).strip()}"} if key else {}
        self._retries = retries

    @property
    def _address(self) -> str:
        """For messages: without a password."""
        return str(self._http.base_url.copy_with(userinfo=b""))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        if self._own:
            self._own.close()

    def recognize(
        self,
        images: Images | None = None,
        *,
        embeddings: ArrayLike | None = None,
        neighbours: int = 3,
        remember: bool = True,
    ) -> s.Recognized:
        """What each image, or embedding `(N, D)`, is; with `remember` the unknown ones join the unknown pool."""
        body = _items(images=images, embeddings=embeddings)
        return self._ask(
            s.Recognized, "POST", "recognize", params={"neighbours": neighbours, "remember": remember}, **body
        )

    def embed(self, images: Images) -> s.Embedded:
        return self._ask(s.Embedded, "POST", "embed", **_items(images=images))

    def classes(self) -> s.Classes:
        return self._ask(s.Classes, "GET", "classes")

    def examples(self, name: str) -> Iterator[s.ExampleOut]:
        """What was enrolled of a class, page by page."""
        return self._pages(s.ExamplesOf, "classes", name, "examples")

    def enroll(
        self,
        name: str,
        images: Images | None = None,
        *,
        embeddings: ArrayLike | None = None,
        observations: Sequence[str] | None = None,
        **write: Unpack[Write],
    ) -> s.Changed:
        """Teach a class, or more of one: images, embeddings `(N, D)`, or unknown items by their observation ids."""
        body = _items(images=images, embeddings=embeddings, observation_ids=observations)
        return self._ask(s.Changed, "POST", "classes", name, "examples", **body, **write)

    def remove_example(self, name: str, id: str, **write: Unpack[Write]) -> s.Changed:
        return self._ask(s.Changed, "DELETE", "classes", name, "examples", id, **write)

    def rename(self, name: str, new: str, **write: Unpack[Write]) -> s.Changed:
        return self._ask(s.Changed, "PATCH", "classes", name, json={"name": new}, **write)

    def merge(self, name: str, into: str, **write: Unpack[Write]) -> s.Changed:
        """Make class `name` a part of class `into`."""
        return self._ask(s.Changed, "POST", "classes", name, "merge", json={"into": into}, **write)

    def forget(self, name: str, **write: Unpack[Write]) -> s.Changed:
        return self._ask(s.Changed, "DELETE", "classes", name, **write)

    def image(self, id: str) -> bytes:
        """The image of an unknown item or of an example, as it came."""
        response = self._send("GET", "items", id, "image")
        if not response.headers.get("Content-Type", "").startswith("image/"):
            raise OsmlError(f"{response.url} gave no image: look at the address and its version")
        return response.content

    def unknowns(self) -> Iterator[s.UnknownOut]:
        """The unknown pool, page by page."""
        return self._pages(s.UnknownList, "unknowns")

    def unknown(self, id: str) -> s.UnknownOut:
        return self._ask(s.UnknownOut, "GET", "unknowns", id)

    def discard(self, id: str, **write: Unpack[Write]) -> s.Changed:
        return self._ask(s.Changed, "DELETE", "unknowns", id, **write)

    def discover(
        self,
        n_classes: int | None = None,
        seed: int = 0,
        *,
        wait: bool = True,
        progress: Callable[[float], None] | None = None,
        **write: Unpack[Write],
    ) -> s.DiscoveryOut:
        """Group the unknown pool. Returns when that is done, or at once without `wait`.

        Groups that were found before keep their `id`, and what was merged or rejected stays so (docs/serving.md).

        While it waits it calls `progress` with the share that is done. A discovery that fails raises `OsmlError`.
        """
        body, pause = {"n_classes": n_classes, "seed": seed}, 0.05
        found = self._ask(s.DiscoveryOut, "POST", "discoveries", json=body, **write)
        while wait:
            if progress:
                progress(found.progress)
            if found.state == "failed":
                raise OsmlError(f"discovery {found.id} failed: {found.error}")
            if found.state == "done":
                break
            time.sleep(pause)
            found, pause = self.discovery(found.id), min(1.5 * pause, 2)
        return found

    def discovery(self, id: str) -> s.DiscoveryOut:
        return self._ask(s.DiscoveryOut, "GET", "discoveries", id)

    def members(self, discovery: str, group: int) -> s.MembersOf:
        return self._ask(s.MembersOf, "GET", "discoveries", discovery, "groups", group)

    def accept(self, discovery: str, group: int, name: str, **write: Unpack[Write]) -> s.Changed:
        """Enrol the members of a group as class `name`."""
        path = ("discoveries", discovery, "groups", group, "accept")
        return self._ask(s.Changed, "POST", *path, json={"name": name}, **write)

    def merge_groups(self, discovery: str, group: int, into: int, **write: Unpack[Write]) -> s.DiscoveryOut:
        """Make a group part of another one; their items come out together in later discoveries, too."""
        path = ("discoveries", discovery, "groups", group, "merge")
        return self._ask(s.DiscoveryOut, "POST", *path, json={"into": into}, **write)

    def reject(self, discovery: str, group: int, **write: Unpack[Write]) -> s.DiscoveryOut:
        """Say that a group is no class: later discoveries that find it again reject it, too."""
        return self._ask(s.DiscoveryOut, "POST", "discoveries", discovery, "groups", group, "reject", **write)

    def model(self) -> s.ModelOut:
        return self._ask(s.ModelOut, "GET", "model")

    def history(self) -> s.History:
        return self._ask(s.History, "GET", "model", "history")

    def reload(self, version: int | None = None, **write: Unpack[Write]) -> s.ModelChange:
        """Go over to a version of the registered model; None: the one that the alias names now."""
        return self._ask(s.ModelChange, "POST", "model", "reload", json={"version": version}, **write)

    def rollback(self, **write: Unpack[Write]) -> s.ModelChange:
        return self._ask(s.ModelChange, "POST", "model", "rollback", **write)

    def set_alpha(self, alpha: float, **write: Unpack[Write]) -> s.Changed:
        return self._ask(s.Changed, "PUT", "model", "alpha", json={"alpha": alpha}, **write)

    def ready(self) -> bool:
        """Whether the server takes requests; asks once, and no answer is a no."""
        try:
            return self._once("GET", "/readyz").is_success
        except LOST:
            return False

    def _ask(self, answer: type[A], method: str, *path: str | int, **request: Any) -> A:
        response = self._send(method, *path, **request)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise OsmlError(f"{response.url} gave no {answer.__name__}: look at the address and its version") from error

    def _pages(self, page: type[BaseModel], *path: str) -> Iterator[Any]:
        after: dict[str, str] | None = {}
        while after is not None:
            found: Any = self._ask(page, "GET", *path, params=after)
            yield from found.examples if isinstance(found, s.ExamplesOf) else found.unknowns
            after = {"after": found.next} if found.next else None

    def _send(self, method: str, *path: str | int, idempotency_key: str = "", **request: Any) -> httpx2.Response:
        if any(not isinstance(part, str | int) or part in ("", ".", "..") for part in path):
            raise OsmlError(f"expected names and ids; got {_short(path)}")
        try:
            url = "/v1/" + "/".join(quote(str(part), safe="") for part in path)
        except UnicodeEncodeError as error:
            raise OsmlError(f"a name or an id is no text that can be sent: {_short(path)}") from error
        headers, retried = {}, RETRIED
        if method == "GET":
            retried = RETRIED | {500}
        elif path[0] not in ("recognize", "embed"):
            headers, retried = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}, RETRIED | {500}
        for attempt in count():
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1)
            try:
                response = self._once(method, url, headers, **request)
            except LOST as error:
                if attempt >= self._retries:
                    raise OsmlError(f"no answer from {self._address}: {_reason(error)}") from error
            else:
                if response.is_success:
                    return response
                asked = response.headers.get("Retry-After", "")
                asked = float(asked) if asked.isdecimal() else 0.0
                if response.status_code not in retried or attempt >= self._retries or asked > LONGEST_ASKED:
                    raise ServerError(response.status_code, _detail(response))
                wait += asked  # never sooner than that, and not all clients at once
            time.sleep(wait)

    def _once(self, method: str, url: str, headers: dict[str, str] | None = None, **request: Any) -> httpx2.Response:
        """One try: an answer, one of `LOST`, or `OsmlError`."""
        try:
            return self._http.request(method, url, headers=self._headers | (headers or {}), **request)
        except LOST:
            raise
        except Exception as error:  # headers, JSON and addresses that cannot be; answers that cannot be unpacked
            raise OsmlError(f"cannot ask {self._address} for {url}: {_reason(error)}") from error


def _items(**given: Any) -> dict[str, Any]:
    """The body that carries the one kind of items that is given."""
    given = {kind: items for kind, items in given.items() if items is not None}
    if len(given) != 1:
        raise OsmlError(f"expected one kind of items, such as images; got {' and '.join(given) or 'none'}")
    ((kind, items),) = given.items()
    if kind == "observation_ids":
        if isinstance(items, str) or not isinstance(items, Iterable):
            raise OsmlError(f"expected a list of observation ids; got {_short(items)}")
        return {"json": {kind: list(items)}}
    if kind == "embeddings":
        try:
            return {"json": {kind: np.asarray(items, np.float32).tolist()}}
        except Exception as error:  # tensors of other libraries raise what they like
            raise OsmlError(f"embeddings must be numbers of shape (N, D): {_reason(error)}") from error
    if isinstance(items, str | Path | bytes | bytearray | memoryview | Image.Image) or hasattr(items, "read"):
        items = [items]
    if not isinstance(items, Iterable):
        raise OsmlError(f"expected images, such as paths of files; got {_short(items)}")
    files = [("files", (str(i), _file(image), "application/octet-stream")) for i, image in enumerate(items)]
    if not files:
        raise OsmlError("no images: give at least one")
    return {"files": files}


def _file(image: ImageLike) -> bytes:
    try:
        if isinstance(image, bytes | bytearray | memoryview):
            return bytes(image)
        if hasattr(image, "read"):
            return bytes(image.read())
        if isinstance(image, Image.Image):
            ImageOps.exif_transpose(image).save(buffer := io.BytesIO(), "PNG")
            return buffer.getvalue()
        return Path(image).read_bytes()
    except Exception as error:  # Pillow's decoders and other people's files raise whatever they stumble on
        raise OsmlError(f"cannot send the image {_short(image)}: {_reason(error)}") from error


def _short(value: Any) -> str:
    """A value in a line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else f"{text[:200]}…"


def _reason(error: Exception) -> str:
    text = _printable(str(error)) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


def _detail(response: httpx2.Response) -> str:
    """The server's one line; of what stands before the server, the beginning of its page, or where it points to."""
    if response.has_redirect_location:
        return f"it is at {_printable(response.headers['Location'])[:200]}: give that address"
    try:
        return _printable(str(json.loads(response.content)["detail"]))[:1000]
    except (ValueError, KeyError, TypeError, RecursionError):
        return _printable(response.content[:10_000].decode("utf-8", "replace"))[:200] or response.reason_phrase


def _printable(text: str) -> str:
    """One line, which a terminal shows and does not obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
