"""Whatever is given to the Python client, and whatever answers it: `OsmlError` in one line that any terminal can print."""

from __future__ import annotations

import gzip
import io
import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from osml_plugin import OsmlError
from osml_plugin.serve.client import Client, ServerError


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A port that answers every request with the same bytes, and closes."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.settimeout(5)
            came = self.request.recv(2**20)
            while came[:1].isalpha() and b"\r\n\r\n" not in came:  # TLS says hello in one piece
                came += self.request.recv(2**20)
            self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def problem_of(call, expected: type[Exception] = OsmlError) -> str:
    with pytest.raises(expected) as refused:
        call()
    text = str(refused.value)
    assert type(refused.value) in (OsmlError, ServerError)
    assert text.isprintable() and text.encode("utf-8") and len(text) < 1500
    return text


def answer(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", "Connection: close"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


PAGE = "<html>\n<h1>Sign\u00a0in</h1>\u001b[31m</html>".encode()
ANSWERS = {
    "a page in place of an answer": (answer(PAGE, "200 OK", "Content-Type: text/html"), "gave no Classes"),
    "nothing": (answer(b"", "204 No Content"), "gave no Classes"),
    "JSON of something else": (answer(b'{"classes": 3}'), "gave no Classes"),
    "deep JSON": (answer(b"[" * 200_000), "gave no Classes"),
    "a page of an error": (answer(PAGE, "502 Bad Gateway"), "<html> <h1>Sign in</h1> [31m</html> (HTTP 502)"),
    "an odd charset": (answer(PAGE, "404 Not Found", "Content-Type: text/html; charset=hex"), "(HTTP 404)"),
    "a reason that is no text": (answer(b"\xff\xfe\x00" * 99, "500 Oops"), "(HTTP 500)"),
    "a detail of many lines": (answer(b'{"detail": "a\\nb\\u001b[2J\\ud800"}', "422 No"), "a b [2J (HTTP 422)"),
    "a detail that is a list": (answer(b'{"detail": [{"msg": "a\\nb"}]}', "422 No"), "(HTTP 422)"),
    "a detail without end": (answer(json.dumps({"detail": "x" * 10**6}).encode(), "422 No"), "xxx (HTTP 422)"),
    "deep JSON of an error": (answer(b"[" * 200_000, "400 Bad"), "[[[ (HTTP 400)"),
    "moved": (answer(b"", "308 Moved", "Location: https://b.example/v1"), "at https://b.example/v1: give that address"),
    "moved to an odd place": (answer(b"", "302 Found", "Location: http://["), "at http://[: give that"),
    "half an answer": (answer(b'{"classes"', length=999), "no answer from"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", "no answer from"),
    "TLS": (b"\x15\x03\x01\x00\x02\x02\x46", "no answer from"),
    "nothing at all": (b"", "no answer from"),
    "damaged compression": (answer(b"no gzip", "200 OK", "Content-Encoding: gzip"), "no answer from"),
    "a head without end": (b"HTTP/1.1 200 OK\r\nA: " + b"a" * 2**20, "no answer from"),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_whatever_answers(what):
    with answering(ANSWERS[what][0]) as address, Client(address, retries=0, timeout=5) as client:
        assert ANSWERS[what][1] in problem_of(client.classes)
        assert problem_of(lambda: client.recognize([b"x"]))
        assert problem_of(lambda: client.image("f" * 32))
        assert isinstance(client.ready(), bool)


def test_compressed_answers_are_read():
    body = gzip.compress(b'{"model_version": "a", "gallery_version": 0, "classes": []}')
    with answering(answer(body, "200 OK", "Content-Encoding: gzip")) as address, Client(address) as client:
        assert client.classes().classes == []


def test_addresses():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        closed = probe.getsockname()[1]
    for address, expected in {
        f"http://127.0.0.1:{closed}": "no answer from http://127.0.0.1",
        f"http://me:secret@127.0.0.1:{closed}": "no answer from http://127.0.0.1",
        "localhost:8000": "cannot ask",
        "ftp://localhost": "cannot ask",
        "": "cannot ask",
        "http://127.0.0.1:port": "cannot use the address",
        "http://127.0.0.1/\udc80": "cannot use the address",
        f"http://{'a' * 300}.de": "",  # a label that no name server is asked for
        None: "cannot use the address",
        7: "cannot use the address",
    }.items():
        problem = problem_of(lambda address=address: Client(address, retries=0).classes())
        assert expected in problem and "secret" not in problem
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        secure = Client(address.replace("http:", "https:"), retries=0)
        assert "no answer from https://" in problem_of(secure.classes) and secure.ready() is False


def test_keys():
    for key in ("schlüssel", "osml_Ж", "a b", "a\nb", "\udc80", "\x00"):
        problem = problem_of(lambda key=key: Client(key=key))
        assert "osml keys add" in problem and key not in problem
    assert Client(key="osml_1 \n")._headers == {"Authorization": "Bearer osml_1"}  # as a file holds it


def test_a_client_that_was_closed():
    client = Client()
    client.close()
    assert "closed" in problem_of(client.classes) and problem_of(client.ready)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Nothing that is given to it is taken."""
    with answering(answer(b'{"detail": "no"}', "422 No")) as address, Client(address, retries=0) as client:
        yield client


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=[]), max_size=20))
@example("\udc80")
@example("\ud83d")
@example("a\x00b")
@example("Ж\n")
@example("..")
def test_any_text_anywhere(client, text):
    calls = [
        lambda: client.forget(text),
        lambda: client.rename("a", text),
        lambda: client.enroll(text, [b"x"]),
        lambda: client.enroll("a", observations=[text]),
        lambda: client.remove_example("a", text),
        lambda: client.image(text),
        lambda: list(client.examples(text)),
        lambda: client.accept(text, 0, text),
        lambda: client.forget("a", idempotency_key=text or "\udc80"),
        lambda: client.embed(f"/no/such/folder/{text}"),
    ]
    for call in calls:
        problem_of(call)


def test_what_is_no_image(client, tmp_path):
    (tmp_path / "text").write_text("text")
    Image.effect_noise((300, 300), 90).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:9000])
    with open(tmp_path / "whole.jpg", "rb") as closed:
        pass
    for image in (
        tmp_path,
        tmp_path / "text" / "a.jpg",
        "",
        "a" * 5000,
        Image.open(tmp_path / "cut.jpg"),
        closed,
        io.StringIO("text"),
        torch.zeros(30, 30, 3).numpy(),
        {"a": 1}.items(),
        [[b"x"]],
        [None],
    ):
        assert "cannot send the image" in problem_of(lambda image=image: client.embed(image))
    for nothing in (7, 1.5, object()):
        assert "expected images, such as paths" in problem_of(lambda nothing=nothing: client.embed(nothing))
    for call in (
        lambda: client.enroll("a", observations="f" * 32),
        lambda: client.enroll("a", observations=7),
        lambda: client.enroll("a", observations=[object()]),
        lambda: client.recognize(embeddings=[[object()]]),
        lambda: client.recognize(embeddings=[[float("nan")]]),
        lambda: client.recognize(embeddings=torch.zeros(2, 2, device="meta")),
        lambda: client.set_alpha(object()),
        lambda: client.rename("a", Path("b")),
        lambda: client.forget(None),
        lambda: client.forget(b"a"),
        lambda: client.forget("a", idempotency_key=7),
        lambda: client.discover(n_classes=object()),
    ):
        problem_of(call)


def test_files_that_are_open_and_buffers_are_images():
    body = b'{"model_version": "a", "gallery_version": 0, "embeddings": [[1.0]]}'
    with answering(answer(body)) as address, Client(address) as client:
        for image in (io.BytesIO(b"a\nb"), bytearray(b"x"), memoryview(b"x"), [io.BytesIO(b"x")]):
            assert client.embed(image).embeddings == [[1.0]]
