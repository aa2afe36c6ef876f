from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import importlib.util
import io
import json
import logging
import math
import os
import stat
import struct
import threading
import warnings
import zlib
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache

import numpy as np
import psutil
import pytest
import torch
from fastapi import FastAPI, HTTPException, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, TiffImagePlugin
from sklearn.datasets import load_sample_image
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient, WebSocketDenialResponse

from osml_plugin import OsmlError
from osml_plugin.data import images as decoding_module
from osml_plugin.data import read_image
from osml_plugin.preprocessing import Preprocessing
from osml_plugin.serve import body as body_module
from osml_plugin.serve import images as images_module
from osml_plugin.serve.audit import Audit
from osml_plugin.serve.body import BodyLimit, read_input
from osml_plugin.serve.gate import Admission, Loopback, is_loopback
from osml_plugin.serve.images import BadImage, decode
from osml_plugin.serve.keys import LOCAL, SCOPES, KeyRing, Refused, keys_required, make_key
from osml_plugin.serve.schemas import Examples, Inputs
from osml_plugin.serve.settings import Limits

# --- keys ------------------------------------------------------------------------------------------------


def test_a_key_is_found_by_what_was_shown_once():
    plain, record = make_key("camera 7", ["enroll", "recognize"])
    _, key_id, secret = plain.split("_", 2)
    assert (len(key_id), len(secret)) == (12, 43) and record.id == key_id and record.name == "camera 7"
    assert record.scopes == ("recognize", "enroll") and record.revoked_at is None
    assert record.digest == hashlib.sha256(secret.encode()).hexdigest() and secret not in repr(record)
    assert len(base64.urlsafe_b64decode(secret + "=")) == 32
    ring = KeyRing([make_key("other", ["admin"])[1], record], required=True)
    assert ring.identify(f"Bearer {plain}", "recognize") == ring.identify(f"bearer {plain} ", "enroll") == "camera 7"


def test_two_keys_are_never_the_same():
    keys = {make_key("k", ["admin"])[0] for _ in range(200)}
    assert len(keys) == 200


def test_admin_holds_every_scope_and_others_their_own():
    for held in SCOPES:
        plain, record = make_key("k", [held])
        ring = KeyRing([record], required=True)
        for scope in SCOPES:
            if held in (scope, "admin"):
                assert ring.identify(f"Bearer {plain}", scope) == "k"
            else:
                with pytest.raises(Refused, match=f"lacks the scope '{scope}'; it has {held}") as refused:
                    ring.identify(f"Bearer {plain}", scope)
                assert refused.value.status == 403


def test_every_invalid_key_gets_one_comparison_and_one_message(monkeypatch):
    plain, record = make_key("k", ["admin"])
    gone, revoked = make_key("gone", ["admin"])
    ring = KeyRing([record, replace(revoked, revoked_at=datetime.now(UTC))], required=True)
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))
    secret = plain.split("_", 2)[2]
    bad = [
        f"Bearer {plain[:-1]}{'A' if plain[-1] != 'A' else 'B'}",  # wrong secret
        f"Bearer osml_{'0' * 12}_{secret}",  # unknown id
        f"Bearer {gone}",  # revoked
        f"Bearer osml_{revoked.id}_{secret}",
        f"Bearer osml_{record.id}_",
        f"Bearer {plain}x",
        "Bearer é",
        "Bearer",
        "",
        f"Basic {plain}",
        plain,
        "Bearer " + "x" * 100_000,
    ]
    messages = set()
    for required in (True, False):  # a key that was sent is checked even where none is required
        ring.required = required
        for authorization in bad:
            with pytest.raises(Refused) as refused:
                ring.identify(authorization, "recognize")
            assert refused.value.status == 401
            messages.add(refused.value.detail)
    assert len(messages) == 1 and "\n" not in messages.pop()
    assert compared == [(64, 64)] * (2 * len(bad))


def test_without_a_key():
    with pytest.raises(Refused, match="an API key is needed") as refused:
        KeyRing([], required=True).identify(None, "recognize")
    assert refused.value.status == 401 and isinstance(refused.value, OsmlError)
    assert KeyRing([], required=False).identify(None, "admin") == LOCAL


def test_when_keys_are_required():
    _, record = make_key("k", ["recognize"])
    revoked = replace(record, revoked_at=datetime.now(UTC))
    assert not keys_required(True, [])
    assert keys_required(False, []) and keys_required(False, [record])
    assert keys_required(True, [record]) and keys_required(True, [revoked])


def test_bad_names_and_scopes():
    for name in ("", "a" * 101, "a\nb", " a", "a ", "\x1b[31m", "\ud800", "local", "a\u2028b"):
        with pytest.raises(OsmlError, match="the name of a key has 1 to 100 printable"):
            make_key(name, ["admin"])
    with pytest.raises(OsmlError, match="unknown scope 'enrol': did you mean 'enroll'"):
        make_key("k", ["enrol"])
    with pytest.raises(OsmlError, match="has no scopes"):
        make_key("k", [])
    assert make_key("é" * 100, ["admin", "admin"])[1].scopes == ("admin",)


# --- the gate --------------------------------------------------------------------------------------------


async def answers(scope, receive, send):
    await PlainTextResponse("served")(scope, receive, send)


def client(app, peer: str = "127.0.0.1", host: str = "localhost:8000") -> TestClient:
    return TestClient(app, base_url=f"http://{host}", client=(peer, 50_000))


def call(app, **scope) -> list[dict]:
    """What an ASGI application sends to a request without a body."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "http", "method": "GET", "path": "/v1/x", "headers": [], **scope}, receive, send))
    return sent


def test_loopback_addresses():
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8", "::ffff:127.0.0.1"):
        assert is_loopback(host)
    for host in ("", "0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "localhost.", "127.0.0.1.evil.org", "testclient"):
        assert not is_loopback(host)


def test_other_machines_are_refused_while_there_are_no_keys():
    open_door = Loopback(answers, active=lambda: False)
    door = Loopback(answers, active=lambda: True)
    for peer in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        assert client(door, peer).get("/").text == "served"
    for peer in ("10.1.2.3", "::ffff:8.8.8.8", "fe80::1", ""):
        answer = client(door, peer).get("/")
        assert answer.status_code == 403 and "only this machine" in answer.json()["detail"]
        assert client(open_door, peer, "birds.example.org").post("/").status_code == 200
    for peer in ({}, {"client": None}):  # as on Unix sockets
        assert call(door, headers=[(b"host", b"localhost")], **peer)[0]["status"] == 403
        assert call(open_door, **peer)[0]["status"] == 200


def test_names_that_were_rebound_are_refused():
    door = Loopback(answers, active=lambda: True)
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"):
        assert call(door, client=("127.0.0.1", 1), headers=[(b"host", host.encode())])[0]["status"] == 200, host
    bad = ("evil.org", "evil.org:8000", "localhost.evil.org", "127.0.0.1.evil.org", "", "localhost:x", "[::1", "[::1]x")
    bad += ("::1", "localhost:80@evil.org", "evil.org#localhost", "10.0.0.1", "localhost:", "é", "[::1]é")
    for host in bad:
        sent = call(door, client=("127.0.0.1", 1), headers=[(b"host", host.encode("latin-1"))])
        assert sent[0]["status"] == 403, host
    for headers in ([], [(b"host", b"localhost"), (b"host", b"evil.org")]):
        assert call(door, client=("127.0.0.1", 1), headers=headers)[0]["status"] == 403


def test_pages_of_other_sites_may_not_write():
    page = client(Loopback(answers, lambda: True, origins=["https://Birds.example.org"]))
    for origin in ("http://evil.org", "null", "http://localhost:9000", "http://127.0.0.1:8000", "localhost:8000", ""):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            answer = page.request(method, "/v1/classes", headers={"Origin": origin})
            assert answer.status_code == 403 and "pages of other sites" in answer.json()["detail"]
        for method in ("GET", "HEAD", "OPTIONS"):
            assert page.request(method, "/v1/classes", headers={"Origin": origin}).status_code == 200
    for origin in ("http://localhost:8000", "https://birds.example.org"):
        assert page.post("/v1/classes", headers={"Origin": origin}).status_code == 200
    assert page.post("/v1/classes").status_code == 200  # no browser


def test_websockets_pass_the_same_gate():
    async def accepts(scope, receive, send):
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})

    door = Loopback(accepts, active=lambda: True)
    url = "ws://localhost:8000/ws"
    with client(door).websocket_connect(url):
        pass
    for peer, headers in (("10.0.0.1", {}), ("127.0.0.1", {"origin": "http://evil.org"})):
        with pytest.raises(WebSocketDenialResponse), client(door, peer).websocket_connect(url, headers=headers):
            pass


def test_lifespan_passes():
    ran = []

    async def app(scope, receive, send):
        ran.append(scope["type"])

    door = Admission(BodyLimit(Loopback(app, active=lambda: True), 1), 1)
    asyncio.run(door({"type": "lifespan"}, None, None))
    assert ran == ["lifespan"]


def test_no_more_than_the_limit_are_admitted_and_no_slot_is_lost():
    async def scenario():
        release, inside, most = asyncio.Event(), 0, 0

        async def app(scope, receive, send):
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            try:
                if scope["path"].startswith("/v1/"):
                    await release.wait()
                if scope["path"] == "/v1/fails":
                    raise RuntimeError("as programs do")
                await answers(scope, receive, send)
            finally:
                inside -= 1

        gate = Admission(app, limit=3, retry_after_s=2)

        async def request(path: str, root: str = "") -> list[dict]:
            sent = []

            async def receive():
                raise AssertionError("the body was read")

            async def send(message):
                sent.append(message)

            scope = {"type": "http", "method": "GET", "path": root + path, "root_path": root, "headers": []}
            await gate(scope, receive, send)
            return sent

        for _ in range(5):
            release.clear()
            paths = ("/v1/a", "/v1/fails", "/v1/b")
            held = [asyncio.create_task(request(path)) for path in paths]
            await asyncio.sleep(0)
            for root in ("", "/birds"):
                refused = await request("/v1/d", root)
                assert refused[0]["status"] == 503 and (b"retry-after", b"2") in refused[0]["headers"]
                assert "3 requests are under way" in json.loads(refused[1]["body"])["detail"]
            for path in ("/healthz", "/readyz", "/metrics"):
                assert (await request(path))[0]["status"] == 200
            held[0].cancel()  # the client is gone
            await asyncio.sleep(0)
            held.append(asyncio.create_task(request("/v1/e")))  # takes its place
            await asyncio.sleep(0)
            assert gate.active == 3
            release.set()
            done = await asyncio.gather(*held, return_exceptions=True)
            assert isinstance(done[0], asyncio.CancelledError) and isinstance(done[1], RuntimeError)
            assert done[2][0]["status"] == done[3][0]["status"] == 200
            assert gate.active == 0
        assert most == 4  # three, and one of /healthz

    asyncio.run(scenario())


# --- the body --------------------------------------------------------------------------------------------

LIMITS = Limits(body_bytes=20_000, image_bytes=1_000, images=4)
JSON = {"Content-Type": "application/json"}


def application(limits: Limits = LIMITS) -> FastAPI:
    app = FastAPI()
    app.add_middleware(BodyLimit, max_bytes=limits.body_bytes)

    def told(images, embeddings, model):
        return {"images": [image.hex() for image in images], "embeddings": embeddings, "model": model.model_dump()}

    @app.post("/inputs")
    async def inputs(request: Request):
        return told(*await read_input(request, limits, Inputs))

    @app.post("/examples")
    async def examples(request: Request):
        return told(*await read_input(request, limits, Examples))

    return app


HTTP = client(application())


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_a_body_that_says_it_is_too_large_is_not_read():
    async def receive():
        raise AssertionError("the body was read")

    async def app(scope, receive, send):
        raise AssertionError("the application was called")

    def answer(*lengths: bytes) -> tuple[int, str]:
        sent = []

        async def send(message):
            sent.append(message)

        headers = [(b"content-length", length) for length in lengths]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        asyncio.run(BodyLimit(app, 100)(scope, receive, send))
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        return sent[0]["status"], json.loads(sent[1]["body"])["detail"]

    for length in (b"101", b"0101", b"1" * 5000, b"18446744073709551617"):
        assert answer(length) == (413, "the body is larger than 100 bytes: send less at once")
    for length in (b"-1", b"", b"x", b"1.5", b"+5", b"5_0", b" 5", b"5, 5", b"0x10", "٣".encode()):
        assert answer(length) == (400, "Content-Length is not a whole number of bytes")
    assert answer(b"5", b"6")[0] == 400


@settings(deadline=None, max_examples=60)
@given(pieces=st.lists(st.integers(0, 60), max_size=8), declared=st.booleans(), reads=st.booleans())
def test_bodies_are_counted_and_answered_once(pieces, declared, reads):
    got = []

    async def reader(scope, receive, send):
        more = reads
        while more:
            message = await receive()
            got.append(len(message["body"]))
            more = message["more_body"]
        await answers(scope, receive, send)

    sent, total = [], sum(pieces)
    todo = [{"type": "http.request", "body": b"x" * n, "more_body": True} for n in pieces]
    todo.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive():
        return todo.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", str(total).encode()), (b"content-length", str(total).encode())] if declared else []
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run(BodyLimit(reader, 100)(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    refused = total > 100 and (declared or reads)
    assert sent[0]["status"] == (413 if refused else 200) and sum(got) <= 100
    assert refused or not reads or sum(got) == total


def test_a_chunked_body_that_grows_too_large_is_refused_by_the_application():
    def chunks(n: int):
        for _ in range(n):
            yield b"{" + b" " * 999

    for headers in (JSON, {"Content-Type": "multipart/form-data; boundary=b"}):
        answer = HTTP.post("/inputs", content=chunks(21), headers=headers)
        assert answer.status_code == 413 and "larger than 20,000 bytes" in answer.json()["detail"]
        assert HTTP.post("/inputs", content=chunks(20), headers=headers).status_code == 422
        assert HTTP.post("/inputs", content=b"{" * 20_001, headers=headers).status_code == 413


def test_a_body_that_is_too_large_after_the_answer_began_is_no_second_answer():
    async def early(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()

    sent = []

    async def receive():
        return {"type": "http.request", "body": b"x" * 101, "more_body": True}

    async def send(message):
        sent.append(message["type"])

    with pytest.raises(HTTPException):
        asyncio.run(BodyLimit(early, 100)({"type": "http", "headers": []}, receive, send))
    assert sent == ["http.response.start"]


def test_images_come_as_files_or_in_base64():
    contents = [bytes([i]) * (i + 1) for i in range(4)]
    expected = {"images": [content.hex() for content in contents], "embeddings": None}
    files = [("files", (f"../../{i}.png", content, "text/html")) for i, content in enumerate(contents)]
    for path, schema in (("/inputs", Inputs), ("/examples", Examples)):
        rest = {"model": schema().model_dump()}
        assert HTTP.post(path, files=files).json() == expected | rest
        assert HTTP.post(path, json={"images": [b64(content) for content in contents]}).json() == expected | rest
    ids = ["0" * 32, "f" * 32]
    answer = HTTP.post("/examples", json={"observation_ids": ids, "images": []}).json()
    assert answer["images"] == [] and answer["embeddings"] is None and answer["model"]["observation_ids"] == ids
    answer = HTTP.post("/inputs", json={"embeddings": [[1, 2.5], [-3e-3, 0]]}).json()
    assert answer["embeddings"] == [[1, 2.5], [-3e-3, 0]] and answer["images"] == []


def test_large_files_stay_in_memory_and_large_json_leaves_the_loop(monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    big = client(application(Limits()))
    content = np.random.default_rng(0).bytes(3_000_000)
    assert big.post("/inputs", files=[("files", content)]).json()["images"] == [content.hex()]
    threads = []
    parsed = body_module._parsed
    monkeypatch.setattr(
        body_module, "_parsed", lambda *a: threads.append(threading.current_thread().name) or parsed(*a)
    )
    assert big.post("/inputs", json={"images": [b64(content)]}).json()["images"] == [content.hex()]
    assert big.post("/inputs", json={"images": [b64(content[:99])]}).json()["images"] == [content[:99].hex()]
    assert "AnyIO worker thread" in threads[0] and "AnyIO worker thread" not in threads[1]


def part(name: str = 'form-data; name="files"; filename="a"', content: str = "x", headers: str = "") -> str:
    return f"--b\r\nContent-Disposition: {name}\r\n{headers}\r\n{content}\r\n"


BAD_MULTIPART = {
    "expected 1 to 4 images": "--b--\r\n",
    "Too many files": part() * 5 + "--b--\r\n",
    "got the field 'a'": part('form-data; name="a"') * 3 + "--b--\r\n",
    "files=@image.jpg": part('form-data; name="files"') + "--b--\r\n",
    "got the field 'file'": part('form-data; name="file"; filename="a"') + "--b--\r\n",
    "got the field 'x'": part() + part('form-data; name="x"', "1") + "--b--\r\n",
    "ends before its last boundary": part(),
    'field "name" must be provided': part("form-data") + "--b--\r\n",
    "got the field 'b'": part('form-data; name="b"', "x" * 2000) + "--b--\r\n",
    "Invalid multipart data": part(headers="a: b\r\n" * 100) + "--b--\r\n",
    "multipart body": "no boundary in sight",
}


@pytest.mark.parametrize("problem", BAD_MULTIPART)
def test_bad_multipart(problem):
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = HTTP.post("/examples", content=BAD_MULTIPART[problem].encode(), headers=headers)
    assert answer.status_code == 422 and problem in answer.json()["detail"] and "\n" not in answer.json()["detail"]


def test_odd_content_types():
    multipart = "multipart/form-data; boundary=b"
    for media_type in (
        "text/plain",
        "",
        "application/x-www-form-urlencoded",
        "image/png",
        "application/jsonx",
        "x" * 999,
    ):
        assert HTTP.post("/inputs", content=b"{}", headers={"Content-Type": media_type}).status_code == 415
    assert HTTP.post("/inputs", content=b"{}").status_code == 415
    bad = part('form-data; name="+2AA-.."; filename="a"') + "--b--\r\n"
    for charset in ("idna", "punycode", "utf-7", "zlib", "rot13", "utf-16", "undefined", "no-such", "unicode_escape"):
        answer = HTTP.post("/inputs", content=bad, headers={"Content-Type": f"{multipart}; charset={charset}"})
        assert answer.status_code == 422, charset
    for media_type in (
        "multipart/form-data",
        f"multipart/form-data; boundary={'b' * 3000}",
        "multipart/form-data; boundary=",
    ):
        assert HTTP.post("/inputs", content=bad, headers={"Content-Type": media_type}).status_code == 422
    good = HTTP.post("/inputs", json={"images": ["QUJD"]}, headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert good.status_code == 200


BAD_JSON = [
    (b"", "Invalid JSON"),
    (b"null", "should be an object"),
    (b"[]", "should be an object"),
    (b"{}", "expected one of images or embeddings; got none"),
    (b'{"images": []}', "expected one of images or embeddings; got none"),
    (b'{"images": null, "embeddings": []}', "got none"),
    (b'{"images": ["QUJD"], "embeddings": [[1]]}', "got images and embeddings"),
    (b'{"images": ["QUJD", "QUJD", "QUJD", "QUJD", "QUJD"]}', "expected 1 to 4 images; got 5"),
    (b'{"embeddings": [[1],[1],[1],[1],[1]]}', "expected 1 to 4 embeddings; got 5"),
    (b'{"images": "QUJD"}', "images: Input should be a valid"),
    (b'{"images": [1]}', "images.0: "),
    (b'{"images": ["QUJD", "QUJ"]}', "images.1 is not base64: it is cut off"),
    (b'{"images": ["QU\\u00a0JD"]}', "images.0 is not base64"),
    (b'{"images": ["QUI=QUJD"]}', "images.0 is not base64: padding before the end"),
    (b'{"images": ["QUJD.*"]}', "images.0 is not base64"),
    (b'{"images": ["\xc3\xa9AAA"]}', "images.0 is not base64"),
    (b'{"images": ["http://evil.org/a.png"]}', "images.0 is not base64"),
    (b'{"images": ["\xff"]}', "Invalid JSON"),
    (b'{"images": ["\\ud800"]}', "Invalid JSON"),
    (b'{"im\\nages\\ud83d\\ude00": 1}', "im\\nages\\U0001f600: Extra inputs"),
    (b'{"observation_ids": ["0"]}', "observation_ids: Extra inputs"),
    (b'{"embeddings": [[]]}', "embeddings.0: "),
    (b'{"embeddings": [[1, 2], [1]]}', "differ in length"),
    (b'{"embeddings": [[NaN]]}', "not finite"),
    (b'{"embeddings": [[-Infinity]]}', "not finite"),
    (b'{"embeddings": [[1e999]]}', "not finite"),
    (b'{"embeddings": [[1e39]]}', "not finite in 32 bits"),
    (b'{"embeddings": [[1' + b"0" * 400 + b"]]}", "not finite"),
    (b'{"embeddings": [[1' + b"0" * 10_000 + b"]]}", "Invalid JSON"),
    (b'{"embeddings": [["1.5"]]}', "should be a valid number"),
    (b'{"embeddings": [[true]]}', "should be a valid number"),
    (b'{"embeddings": [[null' + b",null" * 3000 + b"]]}", "should be a valid number"),
    (b"[" * 19_000, "arrays in arrays"),
    (b'{"a":' * 3000, "arrays in arrays"),
    (b'{"images": [' + b"[]," * 6000 + b"[]]}", "arrays in arrays"),
    ("{}".encode("utf-16"), "Invalid JSON"),
]


@pytest.mark.parametrize(("content", "problem"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json(content, problem):
    answer = HTTP.post("/inputs", content=content, headers=JSON)
    assert answer.status_code == 422, answer.text
    detail = answer.json()["detail"]
    assert problem in detail and len(detail) < 300 and detail.isascii() and detail.isprintable()


def test_many_numbers_are_refused_before_they_are_parsed(monkeypatch):
    numbers = client(application(replace_limits(body_bytes=2**20)))
    content = b'{"embeddings": [[1' + b",1" * (16 * body_module.WIDTH + 1) + b"]]}"
    assert "more than 65,536 numbers" in numbers.post("/inputs", content=content, headers=JSON).json()["detail"]
    width = 16 * body_module.WIDTH
    content = b'{"embeddings": [[1' + b",1" * (width - 1) + b"]]}"
    assert len(numbers.post("/inputs", content=content, headers=JSON).json()["embeddings"][0]) == width


def replace_limits(**changes) -> Limits:
    return Limits(**(LIMITS.model_dump() | changes))


def test_large_images_are_refused_by_name():
    for n, status in ((1000, 200), (1001, 413), (1002, 413), (1003, 413), (5000, 413)):
        for answer in (
            HTTP.post("/inputs", files=[("files", b"a"), ("files", b"x" * n)]),
            HTTP.post("/inputs", json={"images": ["QQ==", b64(b"x" * n)]}),
        ):
            assert answer.status_code == status
            assert status == 200 or "larger than 1,000 bytes" in answer.json()["detail"]


FLOATS = st.floats(allow_nan=True, allow_infinity=True)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(FLOATS, min_size=1, max_size=3), min_size=1, max_size=5))
def test_embeddings_are_taken_as_they_are_or_refused(embeddings):
    answer = HTTP.post("/inputs", content=json.dumps({"embeddings": embeddings}), headers=JSON)
    largest = float(np.finfo(np.float32).max)
    fine = len(embeddings) <= 4 and len({len(e) for e in embeddings}) == 1
    fine = fine and all(math.isfinite(v) and abs(v) <= largest for e in embeddings for v in e)
    assert answer.status_code == (200 if fine else 422)
    assert not fine or answer.json()["embeddings"] == embeddings


def test_mutated_bodies_never_fail():
    rng = np.random.default_rng(0)
    files = ((part() * 2 + "--b--\r\n").encode(), {"Content-Type": "multipart/form-data; boundary=b"})
    seeds = [
        files,
        (b'{"images": ["QUJD", "QUI="], "embeddings": null}', JSON),
        (b'{"embeddings": [[1e3, 2], [3, 4.5]]}', JSON),
    ]
    seen = set()
    for i in range(600):
        content, headers = seeds[i % len(seeds)]
        answer = HTTP.post("/inputs", content=mutated(content, rng), headers=headers)
        seen.add(answer.status_code)
        assert answer.status_code in (200, 413, 422) and (answer.status_code == 200 or answer.json()["detail"])
    assert seen >= {200, 422}


def test_a_client_that_leaves_is_no_error_of_the_server():
    async def receive():
        return {"type": "http.disconnect"}

    for media_type in (b"application/json", b"multipart/form-data; boundary=b"):
        request = Request({"type": "http", "method": "POST", "headers": [(b"content-type", media_type)]}, receive)
        with pytest.raises(HTTPException) as error:
            asyncio.run(read_input(request, LIMITS, Inputs))
        assert error.value.status_code == 400


# --- images ----------------------------------------------------------------------------------------------

FLOWER = Image.fromarray(load_sample_image("flower.jpg"))  # 640 x 427
SMALL = FLOWER.crop((200, 100, 264, 148))  # 64 x 48
GREY, RGB = Preprocessing(32, 1, (0.5,), (0.5,)), Preprocessing(32, 3, (0.5,) * 3, (0.5,) * 3)


def saved(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, before: bytes = b"", after: bytes = b"", frames: bytes = b"") -> bytes:
    """All black; with chunks before and after the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes((1 + 3 * width) * min(height, 100))))
    return b"\x89PNG\r\n\x1a\n" + header + frames + before + pixels + after + chunk(b"IEND")


@cache
def images() -> dict[str, tuple[bytes, str]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(0, 65536, 32, dtype=np.uint16).reshape(32, 64))
    jpeg, plain, webp = "image/jpeg", "image/png", "image/webp"
    return {
        "png": (saved(SMALL, format="PNG"), plain),
        "exact": (saved(SMALL.resize((32, 32)), format="PNG"), plain),
        "deep": (saved(deep, format="PNG"), plain),
        "one bit": (saved(SMALL.convert("1"), format="PNG"), plain),
        "palette": (saved(SMALL.convert("P"), format="PNG", transparency=0), plain),
        "alpha": (saved(SMALL.convert("RGBA"), format="PNG"), plain),
        "interlaced": (saved(SMALL.convert("LA"), format="PNG", interlace=1), plain),
        "turned png": (saved(SMALL, format="PNG", exif=exif), plain),
        "tall": (saved(Image.linear_gradient("L").resize((1, 60_000)), format="PNG"), plain),
        "wide": (saved(Image.linear_gradient("L").resize((60_000, 1)), format="JPEG"), jpeg),
        "jpeg": (saved(FLOWER, format="JPEG"), jpeg),
        "progressive": (saved(FLOWER, format="JPEG", progressive=True), jpeg),
        "grey jpeg": (saved(SMALL.convert("L"), format="JPEG"), jpeg),
        "cmyk": (saved(FLOWER.convert("CMYK"), format="JPEG"), jpeg),
        "turned": (saved(FLOWER, format="JPEG", exif=exif), jpeg),
        "profile": (saved(SMALL, format="JPEG", icc_profile=os.urandom(500_000)), jpeg),
        "camera": (saved(FLOWER, format="MPO", save_all=True, append_images=[SMALL]), jpeg),
        "webp": (saved(SMALL, format="WEBP"), webp),
        "lossless": (saved(SMALL.convert("RGBA"), format="WEBP", lossless=True, exif=exif), webp),
    }


@pytest.mark.parametrize("name", images())
def test_pixels_are_those_that_training_saw(name, tmp_path):
    content, media_type = images()[name]
    (tmp_path / "no-image.exe").write_bytes(content)
    for preprocessing in (GREY, RGB, replace(RGB, size=100)):
        pixels, told = decode(content, preprocessing, Limits())
        expected = read_image(tmp_path / "no-image.exe", preprocessing.channels, preprocessing.size)
        assert told == media_type and pixels.dtype == torch.uint8 and torch.equal(pixels, expected)


@cache
def bad_images() -> dict[str, tuple[bytes, str]]:
    jpeg, plain, webp = (saved(FLOWER, format=f) for f in ("JPEG", "PNG", "WEBP"))
    progressive = saved(SMALL, format="JPEG", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))
    texts = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 100
    header = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\x3f" * 2  # 4,194,304 pixels square
    animation = {"save_all": True, "append_images": [FLOWER.resize((64, 48))]}
    return {
        "empty": (b"", "no JPEG, PNG or WEBP image"),
        "text": (b"this is no image", "no JPEG, PNG or WEBP image"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no JPEG, PNG or WEBP image"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no JPEG, PNG or WEBP image"),
        **{
            f: (saved(SMALL, format=f), "no JPEG, PNG or WEBP image")
            for f in ("GIF", "TIFF", "BMP", "PPM", "ICO", "JPEG2000")
        },
        "cut jpeg": (jpeg[: len(jpeg) // 2], "image file is truncated"),
        "cut png": (plain[: len(plain) // 2], "image file is truncated"),
        "cut webp": (webp[: len(webp) // 2], "the image cannot be read"),
        "head": (b"\x89PNG\r\n\x1a\n", "no JPEG, PNG or WEBP image"),
        "bomb": (png(60_000, 60_000), "more than 32,000,000 pixels"),
        "smaller bomb": (png(6_000, 6_000), "6000 x 6000 pixels are more than 32,000,000"),
        "webp bomb": (b"RIFF" + struct.pack("<I", 22) + b"WEBP" + header, "more than 32,000,000 pixels"),
        "animated png": (saved(SMALL, format="PNG", **animation), "2 frames are more than 1"),
        "frames told only": (png(8, 8, frames=chunk(b"acTL", struct.pack(">II", 2**31, 0))), "frames are more than 1"),
        "animated webp": (saved(SMALL, format="WEBP", **animation), "2 frames are more than 1"),
        "text bomb": (png(8, 8, text), "Decompressed data too large"),
        "text bomb behind": (png(8, 8, after=text), "Decompressed data too large"),
        "text bombs": (png(8, 8, texts), "Too much memory used in text chunks"),
        "profile bomb": (png(8, 8, text.replace(b"zTXt", b"iCCP")), "the image cannot be read"),
        "pieces": (png(8, 8, chunk(b"abCd") * 200_000), "too many small pieces"),
        "pieces behind": (png(8, 8, after=chunk(b"abCd") * 200_000), "too many small pieces"),
        "segments": (jpeg[:2] + b"\xff\xfe\0\2" * 200_000 + jpeg[2:], "too many small pieces"),
        "scans": (progressive[:-2] + last_scan * 100 + progressive[-2:], "more than 100 scans"),
    }


@pytest.mark.parametrize("name", bad_images())
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_refused(name):
    content, problem = bad_images()[name]
    before = psutil.Process().memory_info().rss
    with pytest.raises(BadImage, match="the image cannot be read: .") as error:
        decode(content, RGB, Limits())
    text = str(error.value)
    assert problem in text and text.isprintable() and " at 0x" not in text and "BytesIO" not in text
    assert psutil.Process().memory_info().rss - before < 150 * 2**20


@pytest.mark.parametrize(
    "name", ["bomb", "smaller bomb", "webp bomb", "animated png", "animated webp", "frames told only", "scans"]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_counted_before_a_pixel_is_decoded(name, monkeypatch):
    loaded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: loaded.append(image) or load(image))
    with pytest.raises(BadImage):
        decode(bad_images()[name][0], RGB, Limits())
    assert not loaded
    decode(images()["png"][0], RGB, Limits())
    assert loaded


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_limits_can_be_set():
    content = saved(SMALL, format="PNG")
    assert decode(content, RGB, Limits(pixels=64 * 48))[0].shape == (3, 32, 32)
    with pytest.raises(BadImage, match="64 x 48 pixels are more than 3,071"):
        decode(content, RGB, Limits(pixels=64 * 48 - 1))
    animation = saved(SMALL, format="WEBP", lossless=True, save_all=True, append_images=[FLOWER.resize((64, 48))])
    pixels, _ = decode(animation, RGB, Limits(frames=2))
    assert torch.equal(pixels, decode(content, RGB, Limits())[0])
    with pytest.raises(BadImage, match="pixels are more than"):  # never above what Pillow is set to
        decode(png(10_000, 10_000), RGB, Limits(pixels=10**9))


def test_errors_that_are_not_for_people_are_not_told(monkeypatch):
    for error in (
        KeyError(17),
        OSError("cannot read <_io.BytesIO object at 0x7f00>"),
        RecursionError("deep"),
        ValueError(),
    ):

        def stumble(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(images_module, "decode_opened", stumble)
        with pytest.raises(BadImage, match=rf"it is damaged \({type(error).__name__}\)$"):
            decode(saved(SMALL, format="PNG"), RGB, Limits())


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at, n = int(rng.integers(len(data) + 1)), int(rng.integers(1, 9))
        kind = rng.integers(6)
        if kind == 0:  # other bytes
            data[at : at + n] = rng.bytes(n)
        elif kind == 1:  # extreme numbers
            data[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\xff\xff", b"\x7f\xff\xff\xff"])
        elif kind == 2:  # cut
            del data[at:]
        elif kind == 3:  # a hole
            del data[at : at + n]
        elif kind == 4:  # a piece twice
            other = int(rng.integers(len(data) + 1))
            data[at:at] = data[other : other + 10 * n]
        else:  # in the head, where the sizes are
            at = int(rng.integers(min(len(data), 60) + 1))
            data[at : at + 1] = rng.bytes(1)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_mutated_images_are_decoded_or_refused():
    rng = np.random.default_rng(0)
    seeds = [content for content, _ in images().values() if len(content) < 10_000]
    seeds += [saved(SMALL, format=f, save_all=True, append_images=[SMALL]) for f in ("PNG", "WEBP")]
    process, limits = psutil.Process(), Limits(pixels=4_000_000)
    decoded = 0
    for i in range(3000):
        if i == 300:
            before = process.memory_info().rss
        try:
            pixels, media_type = decode(mutated(seeds[i % len(seeds)], rng), RGB, limits)
        except BadImage as error:
            text = str(error)
            assert text.isprintable() and len(text) < 300 and " at 0x" not in text and "BytesIO" not in text
        else:
            assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8 and media_type.startswith("image/")
            decoded += 1
    assert 100 < decoded < 2900  # both ways were taken
    assert process.memory_info().rss - before < 100 * 2**20


def test_warnings_about_images_are_not_kept():
    # Each text has numbers of the file in it: kept, they would fill the memory.
    odd = [b"Exif\0\0II*\0" + struct.pack("<IHHHII", 8, 1, 1000 + n, 7, 9000 + n, 0) + bytes(20) for n in range(20)]
    contents = [saved(SMALL, format="PNG", exif=exif) for exif in odd]
    kept = vars(TiffImagePlugin).setdefault("__warningregistry__", {})
    for imported_anew in (False, True):
        with warnings.catch_warnings(record=True) as warned:
            warnings.resetwarnings()
            if imported_anew:  # what an import does is undone by pytest
                spec = importlib.util.spec_from_file_location("osml_plugin.data.again", decoding_module.__file__)
                spec.loader.exec_module(importlib.util.module_from_spec(spec))
            for content in contents:
                decode(content, RGB, Limits())
            assert len(warned) == len(set(kept) - {"version"}) == (0 if imported_anew else 20)


# --- the audit log ---------------------------------------------------------------------------------------


def test_every_write_is_one_line(tmp_path, caplog):
    caplog.set_level(logging.INFO, "osml.audit")
    file = tmp_path / "audit.log"
    audit = Audit(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = datetime.now(UTC)
    audit.write("camera 7", "enroll", "otter", n_examples=3, model_version="birds/7", gallery_version=4, home=tmp_path)
    audit.write("local", "forget", "cat")
    first, second = map(json.loads, file.read_text().splitlines())
    assert before <= datetime.fromisoformat(first.pop("time")) <= datetime.now(UTC)
    details = {"n_examples": 3, "model_version": "birds/7", "gallery_version": 4, "home": str(tmp_path)}
    assert first == {"actor": "camera 7", "action": "enroll", "subject": "otter", "details": details}
    assert second["subject"] == "cat" and second["details"] == {}
    assert [record.message for record in caplog.records] == file.read_text().splitlines()
    Audit(file).write("local", "forget", "dog")  # appended, by another process too
    assert len(file.read_text().splitlines()) == 3


@settings(deadline=None, max_examples=50)
@given(actor=st.text(), subject=st.text(st.characters(), max_size=20), value=st.text())
def test_no_name_forges_a_line(tmp_path_factory, actor, subject, value):
    file = tmp_path_factory.mktemp("audit") / "audit.log"
    Audit(file).write(actor, "rename", subject + '\r\n{"actor": "x"}\u2028\x1b[2J', to=value)
    content = file.read_bytes()
    assert content.count(b"\n") == 1 and content.endswith(b"\n") and all(32 <= byte < 127 for byte in content[:-1])
    line = json.loads(content)
    assert line["actor"] == actor and line["subject"].startswith(subject) and line["details"] == {"to": value}


def test_writers_do_not_mix_their_lines(tmp_path):
    file = tmp_path / "audit.log"
    audits = [Audit(file) for _ in range(4)]

    def work(i: int) -> None:
        for j in range(100):
            audits[i].write(f"actor {i}", "enroll", str(j), padding="x" * 3000)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted((line["actor"], int(line["subject"])) for line in lines) == [
        (f"actor {i}", j) for i in range(4) for j in range(100)
    ]


def test_a_file_that_fails_loses_no_line(tmp_path, caplog, monkeypatch):
    (tmp_path / "home").mkdir()
    file = tmp_path / "home" / "audit.log"
    audit = Audit(file)
    file.unlink()
    file.parent.rmdir()
    audit.write("local", "enroll", "otter")
    assert caplog.records[-1].levelname == "ERROR" and '"subject": "otter"' in caplog.records[-1].message
    assert "No such file" in caplog.records[-1].message

    file.parent.mkdir()  # it is there again: nothing to restart
    audit.write("local", "enroll", "cat")
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, content: write(file, content[:20]))
        audit.write("local", "enroll", "dog")
    assert caplog.records[-1].levelname == "ERROR" and '"subject": "dog"' in caplog.records[-1].message
    audit.write("local", "enroll", "owl")
    whole = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    assert [line["subject"] for line in whole] == ["cat", "owl"]


def test_without_a_file_and_with_one_that_cannot_be(tmp_path, caplog):
    caplog.set_level(logging.INFO, "osml.audit")
    Audit(None).write("local", "enroll", "otter")
    assert json.loads(caplog.records[-1].message)["subject"] == "otter"
    with pytest.raises(OsmlError, match=r"cannot write the audit log '.*absent/audit\.log': No such file"):
        Audit(tmp_path / "absent" / "audit.log")
