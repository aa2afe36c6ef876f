"""Uploads as other clients make them: bodies as they came over the wire from curl, browsers, JavaScript and Python."""

from __future__ import annotations

import base64
import gzip
import io
import socket
import string
import textwrap
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI, Request
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import until
from starlette.testclient import TestClient

from osml_plugin import OsmlError
from osml_plugin.serve import encoded
from osml_plugin.serve.body import BodyLimit, read_input
from osml_plugin.serve.encoded import decoded
from osml_plugin.serve.schemas import Inputs
from osml_plugin.serve.settings import Limits

LIMITS = Limits(body_bytes=60_000, image_bytes=20_000, images=4)


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).save(file, kind)
    return file.getvalue()


JPEG, PNG, WEBP = map(picture, ("JPEG", "PNG", "WEBP"))
TEXT = base64.b64encode(JPEG).decode()
assert {"+", "/", "="} <= set(TEXT + base64.b64encode(PNG).decode())


def application() -> FastAPI:
    app = FastAPI()
    app.add_middleware(BodyLimit, max_bytes=LIMITS.body_bytes)

    @app.post("/inputs")
    async def inputs(request: Request):
        return [image.hex() for image in (await read_input(request, LIMITS, Inputs))[0]]

    return app


HTTP = TestClient(application())


def sent(body: bytes, **headers: str) -> list[bytes] | str:
    """The images that arrive, or the status and the one line that says why none do."""
    answer = HTTP.post("/inputs", content=body, headers={k.replace("_", "-"): v for k, v in headers.items()})
    if answer.is_success:
        return [bytes.fromhex(image) for image in answer.json()]
    detail = answer.json()["detail"]
    assert detail.isascii() and detail.isprintable() and len(detail) < 300
    return f"{answer.status_code} {detail}"


def images(*texts: str) -> list[bytes] | str:
    answer = HTTP.post("/inputs", json={"images": texts})
    return [bytes.fromhex(image) for image in answer.json()] if answer.is_success else answer.json()["detail"]


# --- base64 ----------------------------------------------------------------------------------------------

URL_SAFE = base64.urlsafe_b64encode(JPEG).decode()
WAYS = {
    "lines": "\r\n".join(textwrap.wrap(TEXT, 76)) + "\r\n",
    "tabs and blanks": " \t".join(textwrap.wrap(TEXT, 33)),
    "URL-safe": URL_SAFE,
    "URL-safe without padding": URL_SAFE.rstrip("="),
    "without padding": TEXT.rstrip("="),
    "too much padding": TEXT + "==",
    "data URL": f"data:image/jpeg;base64,{TEXT}",
    "data URL of a file without an ending": f"data:application/octet-stream;base64,{TEXT}",
    "data URL with nothing said": f"data:;base64,{TEXT}",
    "data URL in capitals, with parameters and lines": f" DATA:Image/PNG;name=a.png;BASE64,\n{TEXT}\n",
    "data URL that went through a form": "data:image/jpeg;base64,"
    + TEXT.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
}


@pytest.mark.parametrize("way", WAYS)
def test_base64_is_read_as_clients_write_it(way):
    assert images(WAYS[way], TEXT) == [JPEG, JPEG]


NO_BASE64 = {
    "": "is empty",
    " \n": "is empty",
    "===": "is empty",
    "data:image/png;base64,": "is empty",
    "data:image/png": "a data: URL without a comma",
    "data:text/html;base64,PGI+": "a data: URL of 'text/html': expected image/jpeg, image/png or image/webp",
    "data:image/svg+xml;base64,PGI+": "a data: URL of 'image/svg+xml'",
    "data:image/png,%89PNG%0D%0A": "a data: URL in percent encoding",
    "https://example.org/a.jpg": "it is an address, and nothing is fetched",
    "FILE:///etc/passwd": "it is an address, and nothing is fetched",
    "s3://bucket/a.jpg": "it is an address",
    "/home/me/a.jpg": "it looks like a path",
    "C:\\Users\\me\\a": "it looks like a path",
    "photos/Ötter.jpeg": "it looks like a path",
    "../../a.png": "it looks like a path",
    str(base64.b64encode(JPEG)): "it is Python's b'...'",
    base64.b64encode(TEXT.encode()).decode(): "is base64 of base64",
    base64.b64encode(f"data:image/png;base64,{TEXT}".encode()).decode(): "is base64 of base64",
    JPEG.hex(): "it is hexadecimal",
    "<svg></svg>": "it is markup",
    "/9j/4AAQ*": "it has '*' at position 8",
    "QUJD\\nQUJD": "it has '\\\\' at position 4",
    "QUI=QUJD": "padding before the end",
    TEXT.rstrip("=")[:101]: "cut off",
}


@pytest.mark.parametrize("text", NO_BASE64, ids=range(len(NO_BASE64)))
def test_what_is_not_base64_is_named(text):
    detail = images(TEXT, text)
    assert detail.startswith("images.1 is ") and NO_BASE64[text] in detail
    assert detail.isascii() and detail.isprintable() and len(detail) < 200


def bit_by_bit(text: str) -> bytes | None:
    """Base64 as RFC 4648 has it, slowly: both alphabets, blanks between, padding or none; None where it is not."""
    letters = text.translate({ord(c): None for c in " \t\r\n\f\v"}).rstrip("=")
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    values = [alphabet.find({"-": "+", "_": "/"}.get(c, c)) for c in letters]
    bits = "".join(f"{value:06b}" for value in values)
    whole = len(bits) // 8 * 8
    if -1 in values or len(letters) % 4 == 1 or "1" in bits[whole:]:
        return None
    return bytes(int(bits[i : i + 8], 2) for i in range(0, whole, 8))


TEXTS = st.one_of(
    st.text(string.ascii_letters + "+/-_= \n", max_size=40),
    st.binary(max_size=40).map(lambda content: base64.urlsafe_b64encode(content).decode()),
    st.binary(max_size=40).map(lambda content: base64.encodebytes(content).decode()),
)


@settings(deadline=None, max_examples=200)
@given(TEXTS)
@example("QUJ")
@example("QU I\n=")
def test_base64_in_slices_is_base64_bit_by_bit(text):
    expected = bit_by_bit(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded, "_SLICE", 8)
        if not expected or expected.startswith(encoded._AS_BASE64):
            with pytest.raises(OsmlError):
                decoded(text)
        else:
            assert decoded(text) == expected


# --- multipart -------------------------------------------------------------------------------------------


def form(*parts: tuple[str, bytes]) -> list[bytes] | str:
    """Sends parts, each of its head and its content."""
    body = b"".join(b"--xXx\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts)
    return sent(body + b"--xXx--\r\n", Content_Type="multipart/form-data; boundary=xXx")


HEADS = {
    "curl -F files=@a.jpg": 'Content-Disposition: form-data; name="files"; filename="a.jpg"\r\nContent-Type: image/jpeg',
    "curl -F 'files=<a.jpg'": 'Content-Disposition: form-data; name="files"',
    "filename* alone": "Content-Disposition: form-data; name=\"files\"; filename*=UTF-8''%D0%A4.jpg",
    "both": 'Content-Disposition: form-data; name="files"; filename="a.jpg"; filename*=UTF-8\'\'%D0%A4.jpg',
    "no quotes": "content-disposition: form-data; name=files; filename=a.jpg",
    "an empty name, as of a Blob": 'Content-Disposition: form-data; name="files"; filename=""',
    "a name in UTF-8, with quotes": 'Content-Disposition: form-data; name="files"; filename="Ф \\"1\\".jpg"',
    "a wrong type": 'Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="files"',
    "axios": 'Content-Disposition: form-data; name="files[]"; filename="blob"',
    "PHP": 'Content-Disposition: form-data; name="files[0]"; filename="blob"',
    "attachment": 'Content-Disposition: attachment; name="files"; filename="a.jpg"',
    "binary": 'Content-Disposition: form-data; name="files"\r\nContent-Transfer-Encoding: binary',
}


@pytest.mark.parametrize("client", HEADS)
def test_a_part_is_a_file_however_it_is_named(client):
    for content in (JPEG, PNG, WEBP):
        assert form((HEADS[client], content)) == [content]
    assert form(*[(HEADS[client], PNG)] * 4) == [PNG] * 4
    assert form(*[(HEADS[client], PNG)] * 5).startswith("422")
    assert (
        form((HEADS[client], JPEG + bytes(20_000)))
        == "413 an image file is larger than 20,000 bytes: send a smaller one"
    )


def test_text_in_a_part_is_base64_or_refused():
    bare, file = HEADS["curl -F 'files=<a.jpg'"], HEADS["curl -F files=@a.jpg"]
    assert form((bare, f"data:image/jpeg;base64,{TEXT}".encode()), (bare, PNG)) == [JPEG, PNG]
    for head in (bare, file):
        lines = base64.encodebytes(JPEG)
        assert form((f"{head}\r\nContent-Transfer-Encoding: BASE64", lines)) == [JPEG]
        assert "files.0 is quoted-printable" in form((f"{head}\r\nContent-Transfer-Encoding: quoted-printable", b"=FF"))
    refused = form((bare, PNG), (bare, "Ötter.jpg".encode()))
    assert refused.startswith("422 files.1 is not base64: it looks like a path") and "files=@image.jpg" in refused
    for head in HEADS.values():
        assert form((bare, PNG), (head, b"")) == "422 files.1 is empty: expected an image file"
    assert form(('Content-Disposition: form-data; name="image"', JPEG)) == (
        "422 expected files in the field 'files'; got the field 'image'"
    )


# --- the body alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "media_type",
    ["", "image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded", "application/json", "x", "*/*"],
)
def test_an_image_is_a_body(media_type):
    for content in (JPEG, PNG, WEBP):
        assert sent(content, **{"Content_Type": media_type} if media_type else {}) == [content]
    # A client that sets this header by hand leaves out the boundary.
    assert sent(PNG, Content_Type="multipart/form-data") == [PNG]
    assert sent(PNG + b"x" * 20_000, Content_Type=media_type).startswith("413 an image file is larger")
    assert sent(PNG + b"x" * 60_000, Content_Type=media_type).startswith("413 the body is larger")


def test_other_bodies_are_refused_by_their_type():
    for media_type, content in (
        ("text/plain", b"{}"),
        ("application/x-www-form-urlencoded", b"files=a.jpg"),
        ("", b""),
    ):
        refused = sent(content, Content_Type=media_type)
        assert refused.startswith("415 expected multipart/form-data with the field 'files' (curl -F files=@image.jpg)")
        assert repr(media_type) in refused or "no Content-Type and an empty body" in refused
    for packed, name in ((gzip.compress(PNG), "gzip"), (PNG, "br"), (b"{}", "gzip, identity")):
        refused = sent(packed, Content_Type="application/json", Content_Encoding=name)
        assert refused == f"415 the body is compressed (Content-Encoding: '{name}'): send it as it is"
    assert sent(PNG, Content_Encoding="identity") == [PNG]
    refused = sent(b"--b\r\n", Content_Type="multipart/form-data")  # as set by hand, over what a client would have set
    assert refused == "422 multipart/form-data without a boundary: let the client make the Content-Type itself"


# --- on the wire -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(application(), host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(timeout=20)


def over(port: int, *sendings: bytes) -> list[bytes]:
    """What a socket answers to bytes that are sent one after the other."""
    answers = []
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for sending in sendings:
            connection.sendall(sending)
            answers.append(connection.recv(100_000))
        while more := connection.recv(100_000):
            answers.append(more)
    return answers


def test_chunked_in_any_pieces(port):
    for size in (1, 7, 500):
        pieces = (PNG[i : i + size] for i in range(0, len(PNG), size))
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        head = b"POST /inputs HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert PNG.hex().encode() in b"".join(over(port, head + body))


def test_a_client_that_waits_to_be_asked_for_the_body(port):
    head = (
        b"POST /inputs HTTP/1.1\r\nHost: a\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    )
    first, *rest = over(port, head % len(PNG), PNG)
    assert first.startswith(b"HTTP/1.1 100") and PNG.hex().encode() in b"".join(rest)
    assert b"".join(over(port, head % 60_001)).startswith(b"HTTP/1.1 413")


def test_a_client_of_http_1_0(port):
    head = b"POST /inputs HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(PNG)
    assert PNG.hex().encode() in b"".join(over(port, head + PNG))
