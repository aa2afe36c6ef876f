"""The Python client against real HTTP applications: in process for the verbs, on a port for what goes wrong on the way."""

from __future__ import annotations

import asyncio
import inspect
import io
import pickle
import re
import socket
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime

import httpx2
import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from osml_plugin import OsmlError
from osml_plugin.data.images import convert_image, read_image
from osml_plugin.serve import client as client_module
from osml_plugin.serve import schemas as s
from osml_plugin.serve.client import Client, ServerError

VERSIONS = {"model_version": "birds/7", "gallery_version": 3}
NOW = datetime(2026, 11, 21, tzinfo=UTC)
IDS = [f"{i:032x}" for i in range(5)]
DISCOVERY = VERSIONS | {
    "id": IDS[0],
    "state": "queued",
    "progress": 0,
    "error": None,
    "created_at": NOW,
    "n_items": None,
    "n_classes": None,
    "n_classes_interval": None,
    "left_out": None,
    "changes": [],
    "groups": [],
}
MODEL = VERSIONS | {
    "source": "models:/birds/7",
    "pending": None,
    "pending_progress": None,
    "alpha": 0.05,
    "threshold": 0.4,
    "detector": "knn",
    "guarantee": None,
    "input": "images",
    "width": 8,
    "n_classes": 3,
    "n_references": 30,
}
UNKNOWNS = [
    {"id": i, "created_at": NOW, "score": 1.5, "nearest": "cat", "p_value": 0.01, "has_image": True} for i in IDS
]


def changed(name=None, n=1):
    return VERSIONS | {"name": name, "n_examples": n, "example_ids": None}


def make_app() -> FastAPI:
    """The routes of the contract; `app.state.log` holds what came: method, route, path parameters, body."""
    app = FastAPI()
    app.state.log = []
    app.state.polls = 0
    app.state.fails = False

    @app.middleware("http")
    async def note(request: Request, call):
        request.state.body = await request.body()
        request.state.files = []
        if request.headers.get("content-type", "").startswith("multipart"):
            form = await request.form()
            request.state.files = [await f.read() for f in form.getlist("files")]
        app.state.log.append(request)
        return await call(request)

    def page(rows, after):
        start = IDS.index(after) + 1 if after else 0
        return rows[start : start + 2], IDS[start + 1] if start + 2 < len(rows) else None

    @app.post("/v1/recognize", response_model=s.Recognized)
    async def recognize(request: Request, neighbours: int = 3, remember: bool = True):
        n = len(request.state.files) or len(s.Inputs.model_validate_json(request.state.body).embeddings)
        row = {
            "label": None,
            "known": False,
            "nearest": "cat",
            "score": 2.0,
            "threshold": 1.0,
            "p_value": 0.01,
            "neighbours": [{"name": "cat", "distance": 0.5}] * neighbours,
            "observation_id": IDS[0] if remember else None,
        }
        return VERSIONS | {"results": [row] * n}

    @app.post("/v1/embed", response_model=s.Embedded)
    async def embed(request: Request):
        return VERSIONS | {"embeddings": [[0.5, 0.5]] * len(request.state.files)}

    @app.get("/v1/classes", response_model=s.Classes)
    async def classes():
        return VERSIONS | {"classes": [{"name": "cat", "trained": 10, "enrolled": 0}]}

    @app.get("/v1/classes/{name:path}/examples", response_model=s.ExamplesOf)
    async def examples(name: str, after: str | None = None):
        rows, following = page([{"id": i, "has_image": True, "created_at": NOW} for i in IDS], after)
        return VERSIONS | {"name": name, "examples": rows, "next": following}

    @app.post("/v1/classes/{name:path}/examples", response_model=s.Changed, status_code=201)
    async def enroll(name: s.ClassName, request: Request):
        if request.state.files:
            return changed(name, len(request.state.files))
        body = s.Examples.model_validate_json(request.state.body)
        return changed(name, len(body.embeddings or body.observation_ids))

    @app.delete("/v1/classes/{name:path}/examples/{id}", response_model=s.Changed)
    async def remove_example(name: str, id: str):
        return changed(name)

    @app.patch("/v1/classes/{name:path}", response_model=s.Changed)
    async def rename(name: str, new: s.NewName):
        return changed(new.name)

    @app.post("/v1/classes/{name:path}/merge", response_model=s.Changed)
    async def merge(name: str, into: s.Into):
        return changed(into.into)

    @app.delete("/v1/classes/{name:path}", response_model=s.Changed)
    async def forget(name: str):
        return changed(name)

    @app.get("/v1/items/{id}/image")
    async def image(id: str):
        return Response(b"\x89PNG" + id.encode(), media_type="image/png")

    @app.get("/v1/unknowns", response_model=s.UnknownList)
    async def unknowns(after: str | None = None):
        rows, following = page(UNKNOWNS, after)
        return VERSIONS | {"total": len(UNKNOWNS), "unknowns": rows, "next": following}

    @app.get("/v1/unknowns/{id}", response_model=s.UnknownOut)
    async def unknown(id: str):
        if id not in IDS:
            return JSONResponse({"detail": f"there is no unknown item {id}"}, 404)
        return UNKNOWNS[IDS.index(id)]

    @app.delete("/v1/unknowns/{id}", response_model=s.Changed)
    async def discard(id: str):
        return changed()

    @app.post("/v1/discoveries", response_model=s.DiscoveryOut, status_code=202)
    async def discover(wanted: s.DiscoveryIn):
        return DISCOVERY | {"n_classes": wanted.n_classes}

    @app.get("/v1/discoveries/{id}", response_model=s.DiscoveryOut)
    async def discovery(id: str):
        app.state.polls += 1
        if app.state.fails:
            return DISCOVERY | {"state": "failed", "error": "only 2 unknown items"}
        if app.state.polls < 3:
            return DISCOVERY | {"state": "running", "progress": app.state.polls / 3}
        return DISCOVERY | {"state": "done", "progress": 1, "n_classes": 2, "n_classes_interval": (1, 3)}

    @app.get("/v1/discoveries/{id}/groups/{g}", response_model=s.MembersOf)
    async def members(id: str, g: int):
        return VERSIONS | {"group": g, "members": IDS}

    @app.post("/v1/discoveries/{id}/groups/{g}/accept", response_model=s.Changed)
    async def accept(id: str, g: int, new: s.NewName):
        return changed(new.name, 5)

    @app.post("/v1/discoveries/{id}/groups/{g}/merge", response_model=s.DiscoveryOut)
    async def merge_groups(id: str, g: int, into: s.GroupInto):
        return DISCOVERY

    @app.post("/v1/discoveries/{id}/groups/{g}/reject", response_model=s.DiscoveryOut)
    async def reject(id: str, g: int):
        return DISCOVERY

    @app.get("/v1/model", response_model=s.ModelOut)
    async def model():
        return MODEL

    @app.get("/v1/model/history", response_model=s.History)
    async def history():
        row = {"model_version": "birds/7", "source": "models:/birds/7", "activated_at": NOW, "active": True}
        return VERSIONS | {"models": [row]}

    @app.post("/v1/model/reload", response_model=s.ModelChange, status_code=202)
    async def reload(wanted: s.ReloadIn):
        return VERSIONS | {"target": f"birds/{wanted.version or 8}", "state": "preparing"}

    @app.post("/v1/model/rollback", response_model=s.ModelChange, status_code=202)
    async def rollback():
        return VERSIONS | {"target": "birds/6", "state": "active"}

    @app.put("/v1/model/alpha", response_model=s.Changed)
    async def alpha(wanted: s.AlphaIn):
        return changed(n=None)

    @app.get("/readyz")
    async def ready():
        return {}

    return app


@pytest.fixture
def app():
    return make_app()


@pytest.fixture
def client(app):
    with TestClient(app) as http, Client(key="secret", http=http) as client:
        yield client


@pytest.fixture
def quick(monkeypatch):
    """Backing off is about order, not length: the waits that were asked for."""
    waits = []
    monkeypatch.setattr(client_module.time, "sleep", waits.append)
    return waits


def key_of(request) -> str | None:
    return request.headers.get("Idempotency-Key")


READS = [
    ("classes", (), s.Classes),
    ("unknown", (IDS[1],), s.UnknownOut),
    ("discovery", (IDS[0],), s.DiscoveryOut),
    ("members", (IDS[0], 2), s.MembersOf),
    ("model", (), s.ModelOut),
    ("history", (), s.History),
]
WRITES = [
    ("enroll", ("otter", [b"one", b"two"]), s.Changed),
    ("remove_example", ("otter", IDS[1]), s.Changed),
    ("rename", ("otter", "sea otter"), s.Changed),
    ("merge", ("otter", "cat"), s.Changed),
    ("forget", ("otter",), s.Changed),
    ("discard", (IDS[1],), s.Changed),
    ("discover", (2,), s.DiscoveryOut),
    ("accept", (IDS[0], 1, "otter"), s.Changed),
    ("merge_groups", (IDS[0], 1, 2), s.DiscoveryOut),
    ("reject", (IDS[0], 1), s.DiscoveryOut),
    ("reload", (8,), s.ModelChange),
    ("rollback", (), s.ModelChange),
    ("set_alpha", (0.1,), s.Changed),
]


class TestVerbs:
    @pytest.mark.parametrize("verb, arguments, answer", READS)
    def test_reads(self, app, client, verb, arguments, answer):
        assert type(getattr(client, verb)(*arguments)) is answer
        (request,) = app.state.log
        assert key_of(request) is None and request.headers["Authorization"] == "Bearer secret"

    @pytest.mark.parametrize("verb, arguments, answer", WRITES)
    def test_writes_carry_a_key_each_or_the_callers(self, app, client, verb, arguments, answer):
        call = getattr(client, verb)
        options = {"wait": False} if verb == "discover" else {}
        for _ in range(2):
            assert type(call(*arguments, **options)) is answer
        call(*arguments, **options, idempotency_key="mine")
        first, second, mine = (key_of(request) for request in app.state.log)
        assert re.fullmatch("[0-9a-f]{32}", first) and first != second and mine == "mine"

    def test_every_verb_is_tested(self):
        tested = {v for v, _, _ in READS + WRITES} | {"recognize", "embed", "examples", "unknowns", "image", "ready"}
        public = {n for n, _ in inspect.getmembers(Client, inspect.isfunction) if not n.startswith("_")}
        assert public - {"close"} == tested

    def test_recognize_images_and_embeddings(self, app, client):
        found = client.recognize([b"one", b"two"], neighbours=2, remember=False)
        assert [len(r.neighbours) for r in found.results] == [2, 2] and found.results[0].observation_id is None
        assert app.state.log[0].state.files == [b"one", b"two"] and key_of(app.state.log[0]) is None
        vectors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
        for same in (vectors, torch.from_numpy(vectors), vectors.tolist(), list(vectors)):
            assert len(client.recognize(embeddings=same).results) == 3
            sent = s.Inputs.model_validate_json(app.state.log[-1].state.body)
            assert np.array_equal(np.float32(sent.embeddings), vectors) and sent.images is None

    def test_enroll_each_kind(self, client):
        assert client.enroll("otter", images=[b"one", b"two"]).n_examples == 2
        assert client.enroll("otter", embeddings=np.eye(3)).n_examples == 3
        assert client.enroll("otter", observations=IDS).n_examples == 5

    def test_what_counts_as_an_image(self, app, client, tmp_path):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
        picture.save(tmp_path / "a.png")
        content = (tmp_path / "a.png").read_bytes()
        for one in (tmp_path / "a.png", str(tmp_path / "a.png"), content, picture):
            assert len(client.embed(one).embeddings) == len(client.embed([one]).embeddings) == 1
        for request in app.state.log[:6]:
            assert request.state.files == [content]

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
    def test_pictures_arrive_as_the_recognizer_would_take_them(self, app, client, mode):
        pixels = np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        turned = Image.Exif()
        turned[0x0112] = 6  # by a quarter
        picture.info["exif"] = turned.tobytes()
        client.embed(picture)
        (sent,) = app.state.log[0].state.files
        arrived = read_image(io.BytesIO(sent), 3, None)
        assert arrived.shape == (3, 5, 6) and torch.equal(arrived, convert_image(picture.copy(), 3, None))

    def test_pages(self, app, client):
        assert [e.id for e in client.examples("otter")] == IDS
        assert [u.id for u in client.unknowns()] == IDS
        assert [r.query_params.get("after") for r in app.state.log] == [None, IDS[1], IDS[3]] * 2
        assert next(client.unknowns()).id == IDS[0] and len(app.state.log) == 7  # no page before it is needed

    def test_image(self, client):
        assert client.image(IDS[2]) == b"\x89PNG" + IDS[2].encode()


class TestDiscover:
    def test_it_waits_and_tells_how_far_it_is(self, client, quick):
        told = []
        found = client.discover(n_classes=2, progress=told.append)
        assert found.state == "done" and found.n_classes_interval == (1, 3)
        assert told == pytest.approx([0, 1 / 3, 2 / 3, 1]) and quick == sorted(quick)

    def test_without_waiting(self, app, client):
        assert client.discover(wait=False).state == "queued" and app.state.polls == 0

    def test_failed(self, app, client, quick):
        app.state.fails = True
        with pytest.raises(OsmlError, match=f"discovery {IDS[0]} failed: only 2 unknown items"):
            client.discover()


class Failing:
    """ASGI: answers with the given statuses first, after reading the body, and then as the application does."""

    def __init__(self, app, *failures: int | Response):
        self.app = app
        self.failures = [JSONResponse({"detail": "busy"}, f) if isinstance(f, int) else f for f in failures]
        self.seen = []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope, receive)
        body = await request.body()
        self.seen.append((request.headers.get("Idempotency-Key"), len(body)))
        if self.failures:
            return await self.failures.pop(0)(scope, receive, send)

        async def replay():
            return {"type": "http.request", "body": body}

        await self.app(scope, replay, send)


@contextmanager
def failing(app, *failures, **options):
    server = Failing(app, *failures)
    with TestClient(server) as http:
        yield Client(http=http, **options), server


class TestRetries:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    def test_a_write_is_sent_again_whole_under_the_same_key(self, app, quick, status):
        with failing(app, status, status) as (client, server):
            images = [np.random.default_rng(i).bytes(200_000) for i in range(3)]
            assert client.enroll("otter", images).n_examples == 3
        (key, size), *again = server.seen
        assert key and size > 600_000 and again == [(key, size)] * 2
        assert app.state.log[0].state.files == images and len(quick) == 2

    @pytest.mark.parametrize("status", [429, 502, 503, 504])
    def test_recognize_is_sent_again(self, app, quick, status):
        with failing(app, status) as (client, server):
            assert len(client.recognize([b"one"]).results) == 1
        assert len(server.seen) == 2

    def test_after_a_500_only_what_is_idempotent(self, app, quick):
        with failing(app, 500, 500) as (client, server):
            assert client.classes().classes[0].name == "cat"
            assert len(server.seen) == 3
        for ask in (lambda c: c.recognize([b"one"]), lambda c: c.embed([b"one"])):
            with failing(app, 500) as (client, server), pytest.raises(ServerError, match=r"busy \(HTTP 500\)"):
                ask(client)
            assert len(server.seen) == 1

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 415, 422, 507])
    def test_the_rest_is_final(self, app, quick, status):
        with failing(app, status) as (client, server), pytest.raises(ServerError) as refused:
            client.forget("otter")
        assert (refused.value.status, refused.value.detail) == (status, "busy")
        assert str(refused.value) == f"busy (HTTP {status})" and len(server.seen) == 1 and not quick
        again = pickle.loads(pickle.dumps(refused.value))
        assert (again.status, str(again)) == (status, str(refused.value))

    @pytest.mark.parametrize("retries", [0, 3])
    def test_so_often_and_no_more(self, app, quick, retries):
        with failing(app, *[503] * 9, retries=retries) as (client, server), pytest.raises(ServerError):
            client.classes()
        assert len(server.seen) == 1 + retries and len(quick) == retries

    def test_it_backs_off_up_to_a_limit(self, app, quick):
        with failing(app, *[503] * 12, retries=12) as (client, _):
            client.classes()
        full = [min(0.1 * 2**i, 10) for i in range(12)]
        assert all(f / 2 <= w <= f for w, f in zip(quick, full, strict=True))

    def test_retry_after(self, app, quick):
        with failing(app, Response(status_code=429, headers={"Retry-After": "7"})) as (client, _):
            client.classes()
        assert 7 < quick[0] <= 7.1
        with (
            failing(app, Response(status_code=503, headers={"Retry-After": "3600"})) as (client, server),
            pytest.raises(ServerError),
        ):
            client.classes()
        assert len(server.seen) == 1

    def test_a_page_from_before_the_server(self, app, quick):
        page = HTMLResponse("<html>\n<h1>503</h1> no server\n</html>", 503)
        with failing(app, page, retries=0) as (client, _), pytest.raises(ServerError) as refused:
            client.classes()
        assert refused.value.detail == "<html> <h1>503</h1> no server </html>"

    def test_another_server(self, app):
        with (
            failing(app, HTMLResponse("<html>hello</html>")) as (client, _),
            pytest.raises(OsmlError, match="gave no Classes"),
        ):
            client.classes()

    def test_ready_asks_once(self, app):
        with failing(app, 503) as (client, server):
            assert client.ready() is False and client.ready() is True
        assert len(server.seen) == 2


def is_class_name(name: str) -> bool:
    try:
        return s.NewName(name=name).name == name
    except ValueError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(app, port: int):
    """A real server in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


class Memory:
    """A server that loses its first answer after it has written, and knows the keys of what it wrote."""

    def __init__(self, lose):
        self.app = FastAPI()
        self.written: dict[str, list[bytes]] = {}
        self.tries: list[tuple[str, list[bytes]]] = []

        @self.app.post("/v1/classes/{name}/examples", status_code=201)
        async def enroll(name: str, request: Request):
            key = key_of(request)
            files = [await f.read() for f in (await request.form()).getlist("files")]
            self.tries.append((key, files))
            if key in self.written:
                return changed(name, len(self.written[key]))
            self.written[key] = files
            return await lose()


async def cut():
    async def half():
        yield b'{"model'
        raise ConnectionResetError

    return StreamingResponse(half(), headers={"Content-Length": "100"})


class TestOnTheWire:
    def test_an_answer_that_is_lost_is_asked_for_again_and_nothing_is_done_twice(self):
        memory, images = Memory(cut), [np.random.default_rng(i).bytes(300_000) for i in range(3)]
        with served(memory.app, free_port()) as address, Client(address) as client:
            assert client.enroll("otter", images).n_examples == 3
        (key, files), again = memory.tries
        assert files == images and again == (key, images) and list(memory.written) == [key]

    def test_an_answer_that_takes_too_long(self):
        async def slow():
            await asyncio.sleep(1)
            return changed()

        memory = Memory(slow)
        with served(memory.app, free_port()) as address, Client(address, timeout=0.3) as client:
            assert client.enroll("otter", [b"one"]).n_examples == 1
        assert len(memory.tries) >= 2 and len(memory.written) == 1

    def test_a_server_that_is_not_up_yet(self, app):
        port, found = free_port(), []
        with Client(f"http://127.0.0.1:{port}", retries=8) as client:
            assert client.ready() is False
            asking = threading.Thread(target=lambda: found.append(client.enroll("otter", [b"one"])))
            asking.start()
            time.sleep(0.2)
            with served(app, port):
                asking.join()
                assert client.ready() is True
        assert found[0].name == "otter" and len(app.state.log) == 2

    def test_refused_before_the_body_is_read_and_not_sooner_than_asked(self, app):
        came = []

        async def full(scope, receive, send):
            if scope["type"] == "http":
                came.append(time.monotonic())
                if len(came) == 1:
                    answer = JSONResponse({"detail": "too busy"}, 503, {"Retry-After": "1", "Connection": "close"})
                    return await answer(scope, receive, send)
            return await app(scope, receive, send)

        images = [np.random.default_rng(i).bytes(4_000_000) for i in range(2)]
        with served(full, free_port()) as address, Client(address) as client:
            assert client.enroll("otter", images).n_examples == 2
        assert app.state.log[0].state.files == images and came[1] - came[0] >= 1

    def test_nobody_there(self):
        address = f"http://127.0.0.1:{free_port()}"
        with Client(address, retries=1) as client, pytest.raises(OsmlError, match=f"no answer from {address}") as lost:
            client.classes()
        assert "\n" not in str(lost.value) and not isinstance(lost.value, ServerError)

    def test_any_class_name_arrives(self, app):
        with served(app, free_port()) as address, Client(address) as client:

            @settings(deadline=None, max_examples=60)
            @given(st.text(min_size=1, max_size=20).filter(is_class_name))
            @example("50%")
            @example("a%2Fb")
            @example("a?b#c&d=e+f")
            @example("...")
            @example("a;b:c@d\\'\"")
            @example("Ötter 獭")
            @example("birds/robin")
            @example("/examples/")
            def arrives(name):
                assert client.forget(name).name == name
                assert client.remove_example(name, IDS[0]).name == name

            arrives()

    def test_a_client_of_your_own_stays_open(self, app):
        with served(app, free_port()) as address, httpx2.Client(base_url=address) as http:
            with Client(http=http) as client:
                client.classes()
            assert http.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda c: c.recognize(), "expected one kind of items, such as images; got none"),
        (lambda c: c.recognize([b"x"], embeddings=[[1.0]]), "got images and embeddings"),
        (lambda c: c.enroll("a", [b"x"], observations=IDS), "got images and observation_ids"),
        (lambda c: c.embed([]), "no images"),
        (lambda c: c.embed("/nowhere/a.png"), "cannot send the image '/nowhere/a.png': .*No such file"),
        (lambda c: c.embed([7]), "cannot send the image 7"),
        (lambda c: c.embed(Image.new("CMYK", (2, 2))), "cannot write mode CMYK as PNG"),
        (lambda c: c.recognize(embeddings=[[1.0], [1.0, 2.0]]), r"embeddings must be numbers of shape \(N, D\)"),
        (lambda c: c.recognize(embeddings=[[float("nan")]]), "JSON"),
        (lambda c: c.forget(""), "expected names and ids"),
        (lambda c: c.remove_example("otter", ".."), "expected names and ids"),
        (lambda c: c.forget("otter", idempotency_key="Ö"), "cannot ask"),
        (lambda c: c.set_alpha(2), "HTTP 422"),
        (lambda c: c.unknown("f" * 32), f"there is no unknown item {'f' * 32} .HTTP 404"),
        (lambda c: Client("localhost:80").classes(), "cannot ask"),
    ],
)
def test_bad_input_is_one_line(client, call, message):
    with pytest.raises(OsmlError, match=message) as refused:
        call(client)
    assert "\n" not in str(refused.value)
