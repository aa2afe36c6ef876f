"""The running server - Ray Serve, HAProxy, two replicas, real HTTP - while processes are killed, the store goes away,
its disk fills up, and the model changes: on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import mlflow
import psutil
import pytest
from serving import images_of, make_bundle, until

from osml_plugin.errors import OsmlError
from osml_plugin.serve.client import Client
from osml_plugin.tracking import log_bundle, tracking_uri

pytest_plugins = ["postgres"]

MODEL = "models:/digits@champion"
SMALL_DISK = 48 * 2**20  # bytes


class Server:
    """`osml serve` with two replicas, in processes of its own, always at the same address."""

    def __init__(self, room: Path, database: str | None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.home = room / "home"
        flags = ["--home", self.home, "--port", str(self.port), "--replicas", "2", "--follow"]
        self._command = ["serve", MODEL, *flags, *(["--database", database] if database else [])]
        self._room, self._replicas = room, {}
        self.start()

    def start(self) -> None:
        environment = os.environ | {"TMPDIR": str(self._room), "OMP_NUM_THREADS": "1"}
        with (self._room / "log").open("a") as log:
            self._process = psutil.Popen(
                [sys.executable, "-m", "osml_plugin", *self._command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        for line in self._process.stdout:
            if line.startswith("stop"):
                return
        raise RuntimeError((self._room / "log").read_text()[-3000:])

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(90)
        finally:
            self.kill()

    def kill(self) -> None:
        """All of it at once, as when the machine's power is cut."""
        if not self._process.is_running():
            return
        all_of_it = [self._process, *self._process.children(recursive=True)]
        for process in all_of_it:
            process.kill()
        psutil.wait_procs(all_of_it, timeout=10)
        self._process.stdout.close()

    def replicas(self) -> dict[int, str]:
        """The address of each replica that answers, past HAProxy, by its process id."""
        found = {}
        for process in self._process.children(recursive=True):
            try:
                if process.cmdline()[0].startswith("ray::ServeReplica:osml:Endpoint"):
                    address = self._replicas.get(process.pid) or _ready(process)
                    found |= {process.pid: address} if address else {}
            except (psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
                pass
        self._replicas = found
        return found

    def both(self) -> list[str]:
        """The addresses of both replicas, as soon as there are two that answer."""
        until(lambda: len(self.replicas()) == 2, timeout=90)
        return list(self._replicas.values())


def _ready(process: psutil.Process) -> str | None:
    for connection in process.net_connections(kind="tcp"):
        if connection.status != psutil.CONN_LISTEN:
            continue
        address = f"http://127.0.0.1:{connection.laddr.port}"
        try:
            if httpx2.get(f"{address}/readyz", timeout=5).is_success:
                return address
        except httpx2.HTTPError:
            pass  # a port of Ray's
    return None


class Load:
    """Threads that do something again and again as long as the block runs; what it gave, and what it raised."""

    def __init__(self, do: Callable[[int], Any], threads: int):
        self.answers: list[Any] = []
        self.errors: list[OsmlError] = []
        self._do, self._stop = do, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def _run(self, number: int) -> None:
        while not self._stop.wait(0.03):
            try:
                self.answers.append(self._do(number))
            except OsmlError as error:
                self.errors.append(error)


class Enroller:
    """Enrols single images, each as a request of its own; now and then it hangs up before the acknowledgment comes, and
    asks again under the same key. What broke on the way is counted."""

    def __init__(self, server: Server, digits: Path):
        self._images = [images_of(digits, digit) for digit in "6789"]
        self._tag, self._n = uuid.uuid4().hex[:6], [0] * len(self._images)
        self.broken, self.replayed = 0, 0
        hooks = {"response": [self._see]}
        self._patient = Client(http=httpx2.Client(base_url=server.address, timeout=20, event_hooks=hooks), retries=40)
        self._hasty = Client(server.address, timeout=0.02, retries=0)

    def __call__(self, thread: int) -> list[str]:
        """Ids of what was acknowledged."""
        self._n[thread] += 1
        image = self._images[thread][self._n[thread] % 40]
        request: dict[str, Any] = {"name": self.name(thread), "images": image, "idempotency_key": uuid.uuid4().hex}
        if self._n[thread] % 8 == 0:
            try:
                return self._hasty.enroll(**request).example_ids
            except OsmlError:
                self.broken += 1
        return self._patient.enroll(**request).example_ids

    def name(self, thread: int) -> str:
        return f"{self._tag} {thread}"

    def stored(self) -> list[str]:
        return [e.id for thread, n in enumerate(self._n) if n for e in self._patient.examples(self.name(thread))]

    def _see(self, response: httpx2.Response) -> None:
        self.broken += response.is_server_error
        self.replayed += response.headers.get("Idempotency-Replayed") == "true"


@pytest.fixture(scope="module")
def registered(digits_folder, tmp_path_factory) -> Iterator[mlflow.MlflowClient]:
    """Two versions of one model in a registry of the test's own."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        client = mlflow.MlflowClient(tracking_uri())  # MLflow keeps the store of the test before in mind
        run = client.create_run(client.create_experiment("digits", f"file://{folder}/artifacts")).info.run_id
        for seed in (0, 1):
            log_bundle(make_bundle(digits_folder, folder / str(seed), seed=seed), run_id=run, register="digits")
        yield client


@pytest.fixture(scope="module")
def server(request, registered) -> Iterator[Server]:
    registered.set_registered_model_alias("digits", "champion", 1)
    database = request.getfixturevalue("postgres_server").create() if request.param == "postgresql" else None
    # Sockets lie in it, whose paths may be no longer than 107 bytes.
    room = Path(tempfile.mkdtemp(prefix="sv"))
    try:
        with _small_disk(room / "home"):
            server = Server(room, database)
            try:
                yield server
                server.stop()
            finally:
                server.kill()
    finally:
        shutil.rmtree(room, ignore_errors=True)


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """The folder as a file system of its own, where this user may mount one; else a folder like others."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


sqlite = pytest.mark.parametrize("server", ["sqlite"], indirect=True)
# A server on PostgreSQL takes a minute more; the store itself is tested on both, always.
either = pytest.mark.parametrize(
    "server", ["sqlite", pytest.param("postgresql", marks=pytest.mark.long)], indirect=True
)


def kills(few: int, many: int):
    cases = [(store, n) for n in (few, many) for store in ("sqlite", "postgresql")]
    return pytest.mark.parametrize(
        ("server", "times"),
        [pytest.param(*case, marks=[] if case == ("sqlite", few) else [pytest.mark.long]) for case in cases],
        indirect=["server"],
    )


def exactly_once(enroller: Enroller, load: Load) -> None:
    """Whatever was acknowledged is there, and nothing else."""
    acknowledged = [id for ids in load.answers for id in ids]
    stored = enroller.stored()
    assert load.errors == []
    assert len(set(acknowledged)) == len(acknowledged) == len(load.answers)
    assert len(set(stored)) == len(stored)
    print(
        f"\n{len(acknowledged)} acknowledged, {len(set(acknowledged) - set(stored))} lost, "
        f"{len(set(stored) - set(acknowledged))} doubled; {enroller.broken} tries broke, {enroller.replayed} replayed"
    )
    assert set(acknowledged) == set(stored)


@kills(2, 20)
def test_replicas_are_killed_while_clients_enrol(server, times, digits_folder):
    known = images_of(digits_folder, "0", 0, 2)
    enroller, recovered = Enroller(server, digits_folder), []
    with Client(server.address) as client, Load(lambda _: client.recognize(known), 1) as recognition:
        with Load(enroller, 4) as load:
            for _ in range(times):
                server.both()
                victim, before = random.choice(list(server.replicas())), len(load.answers)
                until(lambda before=before: len(load.answers) > before)
                os.kill(victim, signal.SIGKILL)
                began = time.monotonic()
                until(lambda victim=victim: victim not in server.replicas())
                server.both()
                recovered.append(time.monotonic() - began)
        assert recognition.errors == [] and len(recognition.answers) > times
    print(
        f"\n{times} kills, two replicas again after {max(recovered):.1f} s at most; {len(recognition.answers)} recognised"
    )
    exactly_once(enroller, load)


@either
def test_both_replicas_know_a_write_within_a_second(server, digits_folder):
    addresses, took = server.both(), []
    for n in range(8):
        writer, other = addresses if n % 2 else reversed(addresses)
        with Client(writer) as client:
            version = client.enroll("agreed", images_of(digits_folder, "6", n, n + 1)).gallery_version
            written = time.monotonic()
            assert client.classes().gallery_version >= version
        with Client(other) as client:
            until(lambda client=client, version=version: client.classes().gallery_version >= version, timeout=5)
        took.append(time.monotonic() - written)
        # Through the front door, each over a connection of its own: it does not matter who answers.
        assert {httpx2.get(f"{server.address}/v1/classes").json()["gallery_version"] for _ in range(6)} == {version}
    print(f"\nthe other replica knew after {median(took):.2f} s, {max(took):.2f} s at most")
    assert median(took) < 1.0  # of several: one can be late on a busy machine


@sqlite
def test_a_change_of_champion_or_rate_fails_no_request(server, registered, digits_folder):
    with Client(server.address) as client:
        client.enroll("nine", images_of(digits_folder, "9", 0, 20))
    probe, addresses = images_of(digits_folder, "9", 20, 30), server.both()

    def shown(field: str) -> list[Any]:
        return [httpx2.get(f"{address}/v1/model").json()[field] for address in addresses]

    def ask(_: int) -> tuple[str, int]:
        with Client(server.address, retries=0) as client:
            answer = client.recognize(probe, remember=False)
        return answer.model_version, [result.label for result in answer.results].count("nine")

    def change(how: Callable[[], Any], field: str, to: Any) -> float:
        began = time.monotonic()
        how()
        until(lambda: shown(field) == [to, to], timeout=60)
        return time.monotonic() - began

    took = {}
    assert shown("model_version") == ["digits/1"] * 2
    with Load(ask, 4) as load, Client(server.address) as client:
        until(lambda: load.answers)
        move = lambda: registered.set_registered_model_alias("digits", "champion", 2)  # noqa: E731
        took["alias"] = change(move, "model_version", "digits/2")
        until(lambda: load.answers[-1][0] == "digits/2")
        took["rollback"] = change(client.rollback, "model_version", "digits/1")
        until(lambda: load.answers[-1][0] == "digits/1")
        for alpha in (0.3, 0.05):
            took[f"alpha {alpha}"] = change(lambda alpha=alpha: client.set_alpha(alpha), "alpha", alpha)
    print(f"\n{len(load.answers)} requests, {len(load.errors)} failed; {took}")
    assert load.errors == []
    # What was enrolled before is known to either model, whichever answered.
    known = {version: [n for v, n in load.answers if v == version] for version in ("digits/1", "digits/2")}
    assert min(known["digits/1"]) >= 5 and min(known["digits/2"]) >= 5


def _enroll(server: Server, image: Path) -> httpx2.Response:
    return httpx2.post(f"{server.address}/v1/classes/later/examples", files=[("files", image.read_bytes())], timeout=30)


@contextmanager
def _store_gone(server: Server, request) -> Iterator[None]:
    if "postgresql" in request.node.callspec.id:
        postgres = request.getfixturevalue("postgres_server")
        postgres.stop()
        try:
            yield
        finally:
            postgres.start()
        return
    away = server.home / "away"
    away.mkdir()
    for file in server.home.glob("store.db*"):
        file.rename(away / file.name)
    try:
        yield
    finally:
        for file in away.glob("store.db*"):
            file.rename(server.home / file.name)
        away.rmdir()


@either
def test_without_its_store_it_recognises_and_learns_again_when_it_is_back(server, request, digits_folder):
    images, pids = images_of(digits_folder, "7", 0, 6), set(server.replicas())
    assert _enroll(server, images[0]).status_code == 201
    asked = {"files": [("files", file.read_bytes()) for file in images_of(digits_folder, "0", 0, 2) + images]}
    with _store_gone(server, request):
        for image in images[1:3]:
            began = time.monotonic()
            refused = _enroll(server, image)
            took = time.monotonic() - began
            assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1, refused.text
            assert "the store cannot be used now" in refused.json()["detail"]
            assert took < 10
            began = time.monotonic()
            answer = httpx2.post(f"{server.address}/v1/recognize", timeout=30, **asked)
            assert answer.status_code == 200 and answer.json()["results"][0]["label"] == "0"
            print(f"\nrefused after {took:.1f} s, recognised in {time.monotonic() - began:.1f} s")
        assert httpx2.get(f"{server.address}/readyz").is_success
    back = time.monotonic()
    until(lambda: _enroll(server, images[3]).status_code == 201)
    print(f"written again after {time.monotonic() - back:.1f} s")
    assert set(server.replicas()) == pids, "nothing had to start again"


@sqlite
def test_a_full_disk_is_said_and_forgotten(server, digits_folder):
    if shutil.disk_usage(server.home).total > SMALL_DISK:
        pytest.skip("a disk to be filled up cannot be mounted here: that takes root")
    images, pids = images_of(digits_folder, "8"), set(server.replicas())
    assert _enroll(server, images[0]).status_code == 201
    filler = server.home / "filler"
    with filler.open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            os.write(file.fileno(), bytes(4096))
    try:
        answers = [_enroll(server, images[n % 40]) for n in range(60)]  # the journal has some room left
        assert {answer.status_code for answer in answers} <= {201, 507}
        assert answers[-1].status_code == 507 and "no room left" in answers[-1].json()["detail"]
        with Client(server.address) as client:
            results = client.recognize(images_of(digits_folder, "0", 0, 5) + images[:5]).results
            assert results[0].label == "0" and {r.observation_id for r in results} == {None}
            example = next(client.examples("later")).id
            for _ in range(6):  # either replica, over routes that it may not have counted before
                client.image(example), client.model(), client.history(), list(client.unknowns()), client.classes()
                assert httpx2.get(f"{server.address}/metrics").is_success
    finally:
        filler.unlink()
    until(lambda: _enroll(server, images[0]).status_code == 201)
    print(f"\n{sum(answer.status_code == 507 for answer in answers)} of 60 refused")
    assert set(server.replicas()) == pids, "nothing had to start again"


@pytest.mark.parametrize(
    ("server", "times"),
    [
        pytest.param("sqlite", 1, marks=pytest.mark.long),
        pytest.param("sqlite", 5, marks=pytest.mark.long),
        pytest.param("postgresql", 5, marks=pytest.mark.long),
    ],
    indirect=["server"],
)
def test_the_whole_server_is_killed_while_clients_enrol(server, times, digits_folder):
    enroller = Enroller(server, digits_folder)
    with Load(enroller, 4) as load:
        for _ in range(times):
            before = len(load.answers)
            until(lambda before=before: len(load.answers) > before + 20, timeout=60)
            server.kill()
            server.start()
    exactly_once(enroller, load)
    with Client(server.address) as client:
        labels = [r.label for r in client.recognize(images_of(digits_folder, "6", 0, 10), remember=False).results]
    assert labels.count(None) <= 5  # what was enrolled is known, if perhaps by another test's name for it


CLUSTER = """
import sys
import ray
from ray import serve
from ray.cluster_utils import Cluster
from osml_plugin.serve.deployments import build
from osml_plugin.serve.settings import ServeConfig

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes.add_node(num_cpus=1)
try:
    ray.init(nodes.address, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    serve.run(build(ServeConfig(model=sys.argv[1], home=sys.argv[2])), name="osml")
except RuntimeError:
    print(serve.status().applications["osml"].deployments["Endpoint"].message)
finally:
    serve.shutdown()
    ray.shutdown()
    nodes.shutdown()
"""


@pytest.mark.long
def test_sqlite_is_refused_where_there_is_more_than_one_node(tmp_path):
    room = tempfile.mkdtemp(prefix="sv")
    try:
        done = subprocess.run(
            [sys.executable, "-c", CLUSTER, "bundle", tmp_path / "home"],
            env=os.environ
            | {"RAY_TMPDIR": room, "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        shutil.rmtree(room, ignore_errors=True)
    assert "this cluster has 2 nodes, and a SQLite store is on one machine" in done.stdout, done.stderr[-2000:]
    assert not (tmp_path / "home" / "store.db").exists()
