"""`osml serve` as a user starts it: what it says, where it listens, how it ends, what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import closing

import psutil
import pytest
from serving import images_of, make_bundle, until

from osml_plugin.serve.client import Client
from osml_plugin.serve.keys import make_key
from osml_plugin.serve.settings import ServeConfig
from osml_plugin.serve.store import Store


@pytest.fixture(scope="module")
def bundle(digits_folder, tmp_path_factory):
    return make_bundle(digits_folder, tmp_path_factory.mktemp("bundle") / "digits")


def osml(*words, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "osml_plugin", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def start(output, cwd, *words) -> tuple[subprocess.Popen, str, str]:
    """A server that answers, its output so far, and its address."""
    with open(output, "w") as file:
        command = [sys.executable, "-m", "osml_plugin", "serve", *map(str, words)]
        server = subprocess.Popen(command, cwd=cwd, stdout=file, stderr=file, start_new_session=True)
    until(lambda: "stop       Ctrl-C" in output.read_text() or server.poll() is not None, timeout=180)
    text = output.read_text()
    if server.poll() is not None:
        raise RuntimeError(text)
    return server, text, next(line.split()[1] for line in text.splitlines() if line.startswith("serving"))


def killed_but_for_its_proxy(server: subprocess.Popen, port: int) -> psutil.Process:
    """All of a server but HAProxy is killed, which goes on holding the port."""
    started = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    holding = {c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port}
    (proxy,) = [process for process in started if process.pid in holding]
    assert proxy.name() == "haproxy"
    for process in started:
        if process.is_running() and process != proxy:
            process.kill()
    server.wait()
    return proxy


def test_from_start_to_end(bundle, digits_folder, tmp_path):
    output = tmp_path / "output"
    server, _, address = start(output, tmp_path, bundle, "--port", 0)
    port = address.rsplit(":", 1)[1]
    proxy = killed_but_for_its_proxy(server, int(port))
    # Another home's server names who has the port, and leaves it alone; that of this home ends its own.
    taken = osml("serve", bundle, "--port", port, "--home", "other", cwd=tmp_path)
    assert taken.returncode == 2 and f"already in use by process {proxy.pid} (" in taken.stderr.splitlines()[-1]
    assert proxy.is_running()

    server, text, address = start(output, tmp_path, "--port", port, "--root-path", "vision")
    try:
        assert f"ended process {proxy.pid} (" in text and not proxy.is_running() and address.endswith(f":{port}/vision")
        assert f"{address}/docs" in text and "for this machine alone" in text and "curl -F files=@" in text

        started = [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]
        listening = {
            c.laddr.ip for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in started
        }
        assert listening and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}

        with Client(address) as client:
            assert client.recognize(images_of(digits_folder, "1", 0, 1)).results[0].label == "1"
            client.enroll("7", images_of(digits_folder, "7", 0, 5))
            # Over the whole stack a body that is too large is refused before it is read.
            assert client._http.post("/v1/recognize", content=b"x" * (33 * 2**20)).status_code == 413
            openapi = client._http.get("/openapi.json").json()
            assert "/v1/recognize" in openapi["paths"] and openapi["servers"] == [{"url": "/vision"}]
            # HAProxy passes both on: with the prefix, and without, as a proxy before it would leave it.
            assert Client(address.removesuffix("/vision")).ready()
            assert client._http.get("/").headers["location"] == "/vision/docs"
            assert "osml_gallery_references" in client._http.get("/metrics").text

        os.kill(server.pid, signal.SIGINT)
        assert server.wait(timeout=60) == 0
        until(lambda: not any(psutil.pid_exists(pid) for pid in started[1:]), timeout=20)
        assert "Traceback" not in output.read_text()
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
    # All that was learned is in one file, a copy of which knows it.
    assert not list((tmp_path / "osml-serve").glob("store.db-*"))
    shutil.copyfile(tmp_path / "osml-serve" / "store.db", tmp_path / "copy.db")
    with closing(Store(f"sqlite:///{tmp_path}/copy.db")) as store:
        assert store.classes()["7"] == 5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("serve",), "nothing to serve"),
        (("serve", "no-such-bundle"), "no bundle at"),
        (("serve", "{bundle}", "--host", "0.0.0.0"), "osml keys add"),
        (("serve", "{bundle}", "--set", "limits.pixel=3"), "pixels"),
        (("serve", "{bundle}", "--database", "mysql://x/y"), "postgresql"),
        (("serve", "{bundle}", "--port", "99999"), "port"),
        (("keys", "add", "x", "--scope", "everything"), "admin"),
        (("keys", "revoke", "x"), "no store"),
        (("keys", "list"), "no store"),
    ],
)
def test_what_is_refused_is_said_in_one_line(bundle, tmp_path, words, says):
    done = osml(*(word.format(bundle=bundle) for word in words), cwd=tmp_path)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.endswith("looking at model and store")]
    assert len(lines) == 1 and says in lines[0]


def test_keys_are_made_listed_and_revoked(tmp_path):
    made = osml("keys", "add", "lab", "--scope", "enroll", "--scope", "recognize", cwd=tmp_path)
    assert made.returncode == 0
    plain = made.stdout.strip()
    assert osml("keys", "add", "lab", "--scope", "admin", cwd=tmp_path).returncode == 2
    listed = osml("keys", "list", cwd=tmp_path)
    assert "lab" in listed.stdout and plain.split("_", 2)[2] not in listed.stdout
    stored = (tmp_path / "osml-serve" / "store.db").read_bytes()
    assert plain.split("_", 2)[2].encode() not in stored
    unknown = osml("keys", "revoke", "x", cwd=tmp_path)
    assert unknown.returncode == 2 and "no key 'x'" in unknown.stderr and "lab" in unknown.stderr
    assert osml("keys", "revoke", "lab", cwd=tmp_path).returncode == 0
    assert "revoked" in osml("keys", "list", cwd=tmp_path).stdout


def test_other_addresses_are_served_once_there_is_a_key(bundle, tmp_path):
    from osml_plugin.serve.server import _checked, is_open

    config = ServeConfig(model=str(bundle), home=tmp_path / "home", host="0.0.0.0", port=0)
    config.home.mkdir()
    with closing(Store(config.database_url)) as store:
        store.add_key(make_key("lab", ["recognize"])[1])
    checked = _checked(config)
    assert checked.port > 0
    assert not is_open(checked)
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", checked.port))  # it was only looked at, not kept
