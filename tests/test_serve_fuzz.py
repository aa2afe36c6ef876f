"""The endpoint against what nobody should send: generated requests, damaged files and bodies, clients that stall.

The short runs are against the application under uvicorn, as in a replica, in this process; the `long` ones against the
whole of `osml serve`: Ray, Serve and HAProxy.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image
from serving import images_of, make_bundle, until

from osml_plugin.serve.application import make_app
from osml_plugin.serve.client import Client
from osml_plugin.serve.jobs import Jobs
from osml_plugin.serve.keys import make_key
from osml_plugin.serve.patience import Patience
from osml_plugin.serve.server import running
from osml_plugin.serve.service import Service
from osml_plugin.serve.settings import Limits, ServeConfig
from osml_plugin.serve.store import Store

HANGS = 20
"""Seconds for one request."""


@dataclass(frozen=True)
class Endpoint:
    address: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def netloc(self) -> tuple[str, int]:
        host, port = self.address.removeprefix("http://").split(":")
        return host, int(port)

    def client(self) -> Client:
        return Client(self.address, key=self.key, timeout=HANGS, retries=0)

    def errors(self) -> list[str]:
        """What it has counted as a fault of its own: an exception, also where nobody was there to be told."""
        page = httpx2.get(f"{self.address}/metrics", timeout=HANGS).text
        return [line for line in page.splitlines() if re.match(r'osml_requests_total\{.*status="5(?!03)', line)]


@pytest.fixture(scope="module")
def bundle(digits_folder, tmp_path_factory) -> Path:
    return make_bundle(digits_folder, tmp_path_factory.mktemp("bundle") / "bundle")


@contextmanager
def under_uvicorn(app) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def with_key(config: ServeConfig) -> str:
    """An administrator's: with it schemathesis sees that all the rest is refused without."""
    config.home.mkdir(parents=True, exist_ok=True)
    plain, record = make_key("fuzz", ["admin"])
    store = Store(config.database_url)
    store.add_key(record)
    store.close()
    return plain


@pytest.fixture
def here(bundle, digits_folder, tmp_path) -> Iterator[Endpoint]:
    """In this process, with few places and little patience: that places are given back shows soon."""
    config = ServeConfig(model=str(bundle), home=tmp_path / "home", host="127.0.0.1", limits=Limits(waiting=16))
    key = with_key(config)
    service = Service(config)
    jobs = Jobs(service)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Patience.__init__, "__defaults__", (4.0, 16_384.0))
            app = make_app(service)
        with under_uvicorn(app) as address:
            endpoint = Endpoint(address, key)
            furnish(endpoint, digits_folder)
            yield endpoint
    finally:
        jobs.close()
        service.close()


@pytest.fixture(scope="module")
def there(bundle, digits_folder, tmp_path_factory) -> Iterator[Endpoint]:
    """The whole server, for one test after another: schemathesis, which forgets its classes, comes last."""
    config = ServeConfig(model=str(bundle), home=tmp_path_factory.mktemp("there"), port=0, limits=Limits(waiting=16))
    key = with_key(config)
    with running(config, cpus=2) as address:
        endpoint = Endpoint(address, key)
        furnish(endpoint, digits_folder)
        yield endpoint


def furnish(endpoint: Endpoint, data: Path) -> None:
    """Examples, unknown items and a discovery: there is something to be found under every path."""
    with endpoint.client() as client:
        client.enroll("7", images_of(data, "7", 0, 10))
        client.recognize([*images_of(data, "8", 0, 30), *images_of(data, "9", 0, 30)])
        client.discover()


# --- damaged files and bodies ------------------------------------------------------------------------------


def originals(data: Path) -> list[bytes]:
    """Digits as JPEG, PNG and WEBP files of several sizes and kinds."""
    files = [file.read_bytes() for file in images_of(data, "3", 0, 3)]
    for i, (mode, size) in enumerate([("L", 8), ("L", 33), ("RGB", 64), ("RGB", 700), ("CMYK", 50), ("RGBA", 40)]):
        with Image.open(images_of(data, str(i))[0]) as digit:
            image = digit.convert(mode).resize((size, size + 5))
        if mode != "RGBA":
            files += [saved(image, "JPEG", quality=80), saved(image, "JPEG", progressive=True, quality=30)]
        if mode != "CMYK":
            files += [saved(image, "PNG"), saved(image, "WEBP"), saved(image, "WEBP", lossless=True)]
        grey = image.convert("L")
        files += [saved(grey.convert(m), "PNG") for m in ("1", "P", "I;16", "LA")]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    files += [saved(grey, "JPEG", exif=exif), saved(grey, "PNG", exif=exif)]
    files += [saved(grey, kind, save_all=True, append_images=[grey.rotate(90)]) for kind in ("WEBP", "PNG")]
    return files


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def damaged(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """One to four wounds."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        wound = draw.randrange(8)
        if wound == 0 and data:  # bits
            for _ in range(draw.choice((1, 3, 30))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif wound == 1:
            del data[at:]
        elif wound == 2:
            other = draw.choice(others)
            data[at:] = other[draw.randrange(len(other)) :]
        elif wound == 3:
            del data[at : at + draw.choice((1, 4, 100))]
        elif wound == 4:
            data[at:at] = data[at : at + draw.choice((1, 12, 5000))] * draw.choice((1, 2, 20))
        elif wound == 5:  # a number in the header
            at, width = draw.randrange(64), draw.choice((1, 2, 4))
            data[at : at + width] = (draw.choice(NUMBERS) % 256**width).to_bytes(width, draw.choice(("big", "little")))
        elif wound == 6:  # the length of a chunk or segment
            marks = [m.start() for m in re.finditer(rb"IDAT|IHDR|PLTE|eXIf|VP8 |VP8L|VP8X|ALPH|\xff[\xc0-\xfe]", data)]
            if marks:
                mark = draw.choice(marks)
                start, width = {0xFF: (mark + 2, 2), 0x49: (mark - 4, 4)}.get(data[mark], (mark + 4, 4))
                data[max(start, 0) : start + width] = (draw.choice(NUMBERS) % 256**width).to_bytes(width, "big")
        else:
            data[at:at] = draw.randbytes(draw.choice((1, 7, 300)))
    if data[:4] == b"\x89PNG" and draw.random() < 0.7:
        mend_sums(data)
    return bytes(data)


def mend_sums(data: bytearray) -> None:
    """So that it is not the checksum of a chunk that refuses the file."""
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + length > len(data):
            break
        data[at + 8 + length : at + 12 + length] = zlib.crc32(data[at + 4 : at + 8 + length]).to_bytes(4, "big")
        at += 12 + length


BOUNDARY = "xXx"
MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
JSON = {"Content-Type": "application/json"}
NAMES = ("7", "a%2Fb", "%00", "%ED%A0%80", "..", "-1", "n" * 201, "%F0%9F%90%99", "a b", "%0d%0a", "new")
ODD_JSON = (
    b"",
    b"{}",
    b"null",
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b'{"embeddings":' + b"[" * 60 + b"]" * 60 + b"}",
    b'{"embeddings": [[NaN]]}',
    b'{"embeddings": [[1e999]]}',
    b'{"embeddings": [[-Infinity, 1]]}',
    b'{"embeddings": [[' + b"9" * 5000 + b"]]}",
    b'{"embeddings": [[' + b",".join([b"1e-45"] * 32) + b"]]}",
    b'{"embeddings": [[' + b",".join([b"3e38"] * 32) + b"]]}",
    b'{"embeddings": [[' + b",".join([b"-1e9"] * 32) + b"]]}",
    b'{"embeddings": [[' + b",".join([b"0.5"] * 32) + b"]]}",
    b'{"embeddings": [[' + b",".join([b"1"] * 32) + b']], "images": []}',
    b'{"images": ["\\ud800"]}',
    b'{"images": ["\\u0000"]}',
    b'{"images": [""]}',
    b'{"images": ["AAAA"], "images": ["BBBB"]}',
    b'{"name": "\\ud800"}',
    b'{"name": "\\u0000"}',
    b'{"name": "\xff"}',
    b'{"name": "new name"}',
    b'{"into": "new"}',
    b'{"into": 1}',
    b'{"into": ' + b"9" * 400 + b"}",
    b'{"into": -1}',
    b'{"n_classes": 3}',
    b'{"n_classes": 100000, "seed": 2147483648}',
    b'{"seed": 1e3}',
    b'{"alpha": 5e-324}',
    b'{"alpha": 0.9999999999999999}',
    b'{"alpha": 0.05}',
    b'{"version": 99999999999999999999}',
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00",
    b'{"observation_ids": ["' + b"0" * 32 + b'"]}',
)


class Attack:
    """Request number i, always the same one: method, path, headers, body."""

    def __init__(self, data: Path, ids: list[str], discovery: str):
        self.files, self.ids, self.discovery = originals(data), ids, discovery

    def __call__(self, i: int) -> tuple[str, str, dict[str, str], bytes]:
        draw = random.Random(i)
        kind = draw.random()
        if kind < 0.55:
            files = [damaged(draw, draw.choice(self.files), self.files) for _ in range(draw.choice((1, 1, 1, 3)))]
            return "POST", self._taking_images(draw), MULTIPART, multipart(files)
        if kind < 0.7:
            text = base64.b64encode(damaged(draw, draw.choice(self.files), self.files)).decode()
            body = json.dumps({"images": [text] * draw.choice((1, 2))}).encode()
            if draw.random() < 0.5:
                body = damaged(draw, body, self.files)
            return "POST", self._taking_images(draw), JSON, body
        if kind < 0.85:
            body = multipart([draw.choice(self.files) for _ in range(draw.choice((1, 2)))])
            return "POST", self._taking_images(draw), self._type(draw), damaged(draw, body, self.files)
        body = draw.choice(ODD_JSON)
        if draw.random() < 0.3:
            body = damaged(draw, body, list(ODD_JSON[1:]))
        return (*self._any(draw), self._type(draw) | self._key(draw), body)

    def _taking_images(self, draw: random.Random) -> str:
        # A bad query is refused before the body is looked at.
        bad = draw.choice(("?neighbours=-1", "?remember=%00", "?neighbours=1e9"))
        query = draw.choice(("", "", "?neighbours=50", "?remember=0&neighbours=0")) if draw.random() < 0.97 else bad
        name = draw.choice(NAMES)
        # Few are enrolled: a gallery that grows takes memory, and should.
        return draw.choice((f"/v1/recognize{query}",) * 6 + ("/v1/embed",) * 3 + (f"/v1/classes/{name}/examples",))

    def _any(self, draw: random.Random) -> tuple[str, str]:
        name, item = draw.choice(NAMES), draw.choice([*self.ids, "0" * 32, "x"])
        group = f"/v1/discoveries/{draw.choice((self.discovery, '0' * 32))}/groups/{draw.choice((0, 1, 2**31, -1))}"
        paths = [
            ("POST", "/v1/recognize"),
            ("POST", "/v1/embed"),
            ("POST", f"/v1/classes/{name}/examples"),
            ("POST", f"/v1/classes/{name}/merge"),
            ("PATCH", f"/v1/classes/{name}"),
            ("DELETE", f"/v1/classes/{name}"),
            ("DELETE", f"/v1/classes/{name}/examples/{item}"),
            ("DELETE", f"/v1/unknowns/{item}"),
            ("POST", f"{group}/{draw.choice(('accept', 'merge', 'reject'))}"),
            ("POST", "/v1/model/reload"),
            ("POST", "/v1/model/rollback"),
            ("PUT", "/v1/model/alpha"),
            ("GET", f"/v1/items/{item}/image"),
            ("GET", f"/v1/unknowns?limit={draw.choice((0, 1, 9**30, 'x'))}&after={item}&after=%ff"),
            (draw.choice(("HEAD", "OPTIONS", "TRACE", "BREW", "PUT")), draw.choice(("/v1/classes", "/metrics", "/"))),
        ]
        return draw.choice(paths)

    def _type(self, draw: random.Random) -> dict[str, str]:
        odd = (
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/form-data; boundary=other",
            f"multipart/form-data; boundary={'b' * 3000}",
            f"multipart/form-data; boundary={BOUNDARY}; charset=utf-7",
            "application/json; charset=utf-16",
            "application/x-www-form-urlencoded",
            "text/plain",
            "/",
        )
        return draw.choice((MULTIPART, JSON, MULTIPART, JSON, {}, {"Content-Type": draw.choice(odd)}))

    def _key(self, draw: random.Random) -> dict[str, str]:
        key = draw.choice((None, None, "same", "x" * 200, "x" * 201, "", "a b", str(draw.random())))
        return {} if key is None else {"Idempotency-Key": key}


def multipart(files: list[bytes]) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    return b"".join(head + file + b"\r\n" for file in files) + f"--{BOUNDARY}--\r\n".encode()


def attacked(endpoint: Endpoint, data: Path, numbers: range) -> Counter[int]:
    """The statuses of all answers; each comes in time."""
    with endpoint.client() as client:
        ids = [row.id for _, row in zip(range(20), client.unknowns(), strict=False)]
    found = httpx2.get(f"{endpoint.address}/v1/discoveries", headers=endpoint.headers, timeout=HANGS).json()
    attack = Attack(data, ids, found["discoveries"][-1]["id"])
    local = threading.local()

    def one(i: int) -> int:
        if not hasattr(local, "http"):
            local.http = httpx2.Client(base_url=endpoint.address, headers=endpoint.headers, timeout=HANGS)
        method, path, headers, body = attack(i)
        for _ in range(3):
            try:
                status = local.http.request(method, path, headers=headers, content=body).status_code
            except httpx2.TransportError as error:
                # A refused body may find the connection closed; the same request on a new one has an answer.
                assert not isinstance(error, httpx2.TimeoutException), f"request {i} ({method} {path}) hangs"
                last = error
                continue
            assert status < 500, f"request {i} ({method} {path}): {status}"
            return status
        raise AssertionError(f"request {i} ({method} {path}) has no answer") from last

    with ThreadPoolExecutor(8) as clients:
        return Counter(clients.map(one, numbers))


@contextmanager
def unharmed(endpoint: Endpoint, data: Path) -> Iterator[None]:
    """Afterwards a good request has the answer that it had before."""
    files = [file for digit in "0123" for file in images_of(data, digit, 0, 5)]
    with endpoint.client() as client:
        before = client.embed(files).embeddings
        yield
        assert client.embed(files).embeddings == before
        for row in client.classes().classes:
            if row.enrolled:
                client.forget(row.name)
        found = [r.nearest for r in client.recognize(files, remember=False).results]
        assert sum(name == file.parent.name for name, file in zip(found, files, strict=True)) >= 18
    assert endpoint.errors() == []


def test_damaged_files_and_bodies(here, digits_folder):
    with unharmed(here, digits_folder):
        statuses = attacked(here, digits_folder, range(800))
    assert statuses.keys() >= {200, 201, 404, 405, 415, 422}
    assert statuses[200] > 50  # some of the damage does not matter


@pytest.mark.long
def test_ten_thousand_damaged_files_and_bodies(there, digits_folder):
    replica = the_replica()
    with unharmed(there, digits_folder):
        warm = attacked(there, digits_folder, range(10_000, 12_000))
    before = settled(replica)
    began = time.monotonic()
    with unharmed(there, digits_folder):
        statuses = attacked(there, digits_folder, range(10_000))
    seconds = time.monotonic() - began
    after = settled(replica)
    print(f"\n{sum(warm.values())} to warm up, then {sum(statuses.values())} requests in {seconds:.0f} s")
    print(f"statuses {dict(sorted(statuses.items()))}; RSS {before / 2**20:.0f} MiB before, {after / 2**20:.0f} after")
    assert the_replica().pid == replica.pid
    assert after < 1.15 * before


def the_replica() -> psutil.Process:
    found = []
    for process in psutil.Process().children(recursive=True):
        with_name = process.cmdline()[:1] if process.is_running() else []
        if with_name and with_name[0].startswith("ray::ServeReplica"):
            found.append(process)
    assert len(found) == 1
    return found[0]


def settled(replica: psutil.Process) -> int:
    """Resident bytes when it has been idle for a moment."""
    time.sleep(3)
    return replica.memory_info().rss


# --- requests that no client library sends -----------------------------------------------------------------

GOOD = b"Host: 127.0.0.1\r\nAuthorization: Bearer KEY\r\n"
ODD = {
    "TRACE": b"TRACE /v1/classes HTTP/1.1\r\n" + GOOD + b"\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\n" + GOOD + b"\r\n",
    "absolute": b"GET http://127.0.0.1/v1/classes HTTP/1.1\r\n" + GOOD + b"\r\n",
    "CONNECT": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n" + GOOD + b"\r\n",
    "an invented method": b"BREW /v1/classes HTTP/1.1\r\n" + GOOD + b"\r\n",
    "a long path": b"GET /v1/classes/" + b"a" * 7000 + b"/examples HTTP/1.1\r\n" + GOOD + b"\r\n",
    "a very long path": b"GET /v1/classes/" + b"a" * 200_000 + b" HTTP/1.1\r\n" + GOOD + b"\r\n",
    "many slashes": b"GET " + b"/" * 3000 + b" HTTP/1.1\r\n" + GOOD + b"\r\n",
    "dots": b"GET /v1/../../../etc/passwd HTTP/1.1\r\n" + GOOD + b"\r\n",
    "percent and nothing": b"GET /v1/classes/%/examples HTTP/1.1\r\n" + GOOD + b"\r\n",
    "percent and bad UTF-8": b"GET /v1/classes/%ff%fe/examples HTTP/1.1\r\n" + GOOD + b"\r\n",
    "raw bytes in the path": b"GET /v1/classes/\xff\xfe/examples HTTP/1.1\r\n" + GOOD + b"\r\n",
    "raw bytes in the query": b"GET /v1/unknowns?limit=\xff HTTP/1.1\r\n" + GOOD + b"\r\n",
    "a long query": b"GET /v1/unknowns?" + b"limit=1&" * 900 + b" HTTP/1.1\r\n" + GOOD + b"\r\n",
    "HTTP/1.0": b"GET /v1/classes HTTP/1.0\r\n" + GOOD + b"\r\n",
    "HTTP/9.9": b"GET /v1/classes HTTP/9.9\r\n" + GOOD + b"\r\n",
    "no Host": b"GET /v1/classes HTTP/1.1\r\nAuthorization: Bearer KEY\r\n\r\n",
    "two Hosts": b"GET /v1/classes HTTP/1.1\r\nHost: a\r\n" + GOOD + b"\r\n",
    "an odd Host": b"GET /v1/classes HTTP/1.1\r\nHost: \xff:99999999\r\n\r\n",
    "bytes in a header": b"DELETE /v1/classes/x HTTP/1.1\r\n" + GOOD + b"Idempotency-Key: \x80\xff\r\n\r\n",
    "NUL in a header": b"DELETE /v1/classes/x HTTP/1.1\r\n" + GOOD + b"Idempotency-Key: a\0b\r\n\r\n",
    "tab in a header": b"DELETE /v1/classes/x HTTP/1.1\r\n" + GOOD + b"Idempotency-Key: \t\r\n\r\n",
    "two keys": b"DELETE /v1/classes/x HTTP/1.1\r\n" + GOOD + b"Idempotency-Key: a\r\nIdempotency-Key: b\r\n\r\n",
    "bytes for a key": b"GET /v1/classes HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer \xc3\xa9\xff\r\n\r\n",
    "basic": b"GET /v1/classes HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Basic eDp5\r\n\r\n",
    "two Authorizations": b"GET /v1/classes HTTP/1.1\r\n" + GOOD + b"Authorization: Bearer x\r\n\r\n",
    "many headers": b"GET /v1/classes HTTP/1.1\r\n" + GOOD + b"A: b\r\n" * 3000 + b"\r\n",
    "odd type": b"POST /v1/embed HTTP/1.1\r\n" + GOOD + b"Content-Type: \xff/\xfe;;;=\r\nContent-Length: 2\r\n\r\n{}",
    "two types": b"POST /v1/embed HTTP/1.1\r\n"
    + GOOD
    + b"Content-Type: application/json\r\nContent-Type: multipart/form-data\r\nContent-Length: 2\r\n\r\n{}",
    "an odd boundary": b"POST /v1/embed HTTP/1.1\r\n"
    + GOOD
    + b'Content-Type: multipart/form-data; boundary="\xff\xfe\x80"\r\nContent-Length: 2\r\n\r\n{}',
    "two lengths": b"POST /v1/embed HTTP/1.1\r\n" + GOOD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a negative length": b"POST /v1/embed HTTP/1.1\r\n" + GOOD + b"Content-Length: -1\r\n\r\n{}",
    "a huge length": b"POST /v1/embed HTTP/1.1\r\n" + GOOD + b"Content-Length: " + b"9" * 15 + b"\r\n\r\n{}",
    "length and chunks": b"POST /v1/embed HTTP/1.1\r\n"
    + GOOD
    + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk of no length": b"POST /v1/embed HTTP/1.1\r\n" + GOOD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a huge chunk": b"POST /v1/embed HTTP/1.1\r\n"
    + GOOD
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + b"f" * 16
    + b"\r\n{}",
    "an unknown coding": b"POST /v1/embed HTTP/1.1\r\n" + GOOD + b"Transfer-Encoding: br, chunked\r\n\r\n0\r\n\r\n",
    "another protocol": b"GET /v1/classes HTTP/1.1\r\n" + GOOD + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}


def odd_statuses(endpoint: Endpoint) -> dict[str, int]:
    """What each is answered; 0 where the connection is closed without a word, or more of the request is waited for."""
    statuses = {}
    for name, request in ODD.items():
        request = request.replace(b"KEY", endpoint.key.encode())
        with socket.create_connection(endpoint.netloc, timeout=3) as connection:
            try:
                connection.sendall(request)
                answer = connection.recv(4096)
            except (ConnectionError, TimeoutError):
                answer = b""
        match = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
        statuses[name] = int(match[1]) if match else 0
    return statuses


def test_requests_that_no_client_library_sends(here):
    statuses = odd_statuses(here)
    assert {name: status for name, status in statuses.items() if status >= 500} == {}
    assert statuses["HTTP/1.0"] == statuses["absolute"] == 200
    assert statuses["basic"] == statuses["bytes for a key"] == 401
    assert statuses["a huge length"] == 413
    assert here.errors() == []


@pytest.mark.long
def test_requests_that_no_client_library_sends_through_haproxy(there):
    statuses = odd_statuses(there)
    print(statuses)
    # HAProxy's own answer, for a path that it knows no server for.
    assert {name: status for name, status in statuses.items() if status >= 500} == {"asterisk": 503}
    assert there.errors() == []


# --- half a body -------------------------------------------------------------------------------------------

HALF = b"POST /v1/recognize HTTP/1.1\r\n" + GOOD + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"


def stalled(endpoint: Endpoint, n: int) -> list[socket.socket]:
    connections = []
    for _ in range(n):
        connection = socket.create_connection(endpoint.netloc, timeout=2 * HANGS)
        connection.sendall(HALF.replace(b"KEY", endpoint.key.encode()))
        connections.append(connection)
    return connections


def places_are_given_back(endpoint: Endpoint) -> None:
    """There are 16 places; 16 clients take them all with half a body each."""

    def status() -> int:
        return httpx2.get(f"{endpoint.address}/v1/classes", headers=endpoint.headers, timeout=HANGS).status_code

    others = stalled(endpoint, 12)
    assert status() == 200  # a few that stall are in nobody's way
    some = stalled(endpoint, 4)
    until(lambda: status() == 503, timeout=5)
    assert httpx2.get(f"{endpoint.address}/healthz", timeout=HANGS).status_code == 200
    for connection in some:
        connection.close()  # they vanish
    until(lambda: status() == 200, timeout=5)
    for connection in others:  # they stay, and are not waited for
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
        connection.close()
    busy = stalled(endpoint, 15)
    assert status() == 200
    for connection in busy:
        connection.close()
    until(lambda: len(at_once(status, 12)) == 12, timeout=5)


def at_once(call: Callable[[], int], n: int) -> list[int]:
    with ThreadPoolExecutor(n) as clients:
        return [status for status in clients.map(lambda _: call(), range(n)) if status == 200]


@pytest.mark.long
def test_half_bodies_through_haproxy(there):
    places_are_given_back(there)
    assert there.errors() == []


def test_half_bodies(here):
    places_are_given_back(here)
    assert here.errors() == []


def test_a_body_has_to_come_in_time():
    app = FastAPI()

    @app.post("/")
    async def length(request: Request) -> int:
        return len(await request.body())

    with under_uvicorn(Patience(app, grace_s=1, bytes_per_s=1000)) as address:
        endpoint = Endpoint(address, "")

        def dripped(pieces: list[bytes], pause: float) -> bytes:
            with socket.create_connection(endpoint.netloc, timeout=HANGS) as connection:
                connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(b"".join(pieces)))
                for piece in pieces:
                    try:
                        connection.sendall(piece)
                    except ConnectionError:
                        break
                    time.sleep(pause)
                return connection.recv(4096)

        assert b" 200 " in dripped([b"x" * 10_000], 0)
        assert b" 200 " in dripped([b"x" * 1000] * 6, 0.4)  # longer than the grace, but fast enough
        assert b" 408 " in dripped([b"x"] * 20, 0.2)  # never silent for long, but too slow


# --- what the OpenAPI page says ----------------------------------------------------------------------------


def test_the_page_names_every_operation_once(here):
    paths = httpx2.get(f"{here.address}/openapi.json", timeout=HANGS).json()["paths"]
    ids = [operation["operationId"] for path in paths.values() for operation in path.values()]
    assert len(ids) == len(set(ids)) > 20


def schemathesis(endpoint: Endpoint, folder: Path, *options: str) -> None:
    """Every operation; all checks but one: that what the schema allows is taken. Whether text is a JPEG in base64, and
    whether a name is printable, no schema can say."""
    command = [
        *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
        *("run", f"{endpoint.address}/openapi.json", "-H", f"Authorization: {endpoint.headers['Authorization']}"),
        *("--exclude-checks", "positive_data_acceptance", "--suppress-health-check", "all", "--no-shrink"),
        *("--generation-database", "none", "--seed", "4", "--request-timeout", str(HANGS), "--no-color", *options),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Selected: (\d+)/\1\n  Tested: \1\n", done.stdout)
    assert endpoint.errors() == []


def test_schemathesis(here, tmp_path):
    schemathesis(here, tmp_path, "-n", "2", "--phases", "examples,coverage,fuzzing", "--max-time", "15")


@pytest.mark.long
def test_schemathesis_for_long(there, tmp_path):
    schemathesis(there, tmp_path, "-n", "60", "--max-time", "120", "--continue-on-failure")
