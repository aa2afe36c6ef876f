"""A real PostgreSQL of the tests' own: started on loopback in a temporary folder, and stopped by its process id."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pg8000
import pytest


class Postgres:
    """A server that can be stopped, frozen and started again; each test makes its database with `create`."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder, self._process, self._databases = programs, folder, None, 0
        # PostgreSQL refuses to run as root.
        self._user = pwd.getpwnam("postgres" if _exists("postgres") else "nobody") if os.getuid() == 0 else None
        if self._user:
            os.chown(folder, self._user.pw_uid, self._user.pw_gid)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = ["-D", folder / "data", "-U", "osml", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        subprocess.run(
            [programs / "initdb", *options], check=True, stdout=subprocess.DEVNULL, cwd=folder, **self._as_user()
        )
        self.start()

    def start(self) -> None:
        settings = ["fsync=off", "unix_socket_directories=", "listen_addresses=127.0.0.1", "max_connections=60"]
        self._process = subprocess.Popen(
            [
                self._programs / "postgres",
                *("-D", self._folder / "data", "-p", str(self.port)),
                *(part for setting in settings for part in ("-c", setting)),
            ],
            stderr=(self._folder / "log").open("a"),
            cwd=self._folder,
            start_new_session=True,
            **self._as_user(),
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                self._connect().close()
                return
            except (pg8000.InterfaceError, pg8000.DatabaseError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self._folder / "log").read_text()[-2000:]) from None
                time.sleep(0.05)

    def stop(self) -> None:
        """At once, as a crash would: connections break."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=30)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Alive but silent, like a machine behind a broken wire: all the server's processes are suspended."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        pids = [self._process.pid, *map(int, children)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def create(self) -> str:
        """The URL of a new and empty database."""
        self._databases += 1
        connection = self._connect()
        connection.autocommit = True
        connection.cursor().execute(f"CREATE DATABASE test_{self._databases}")
        connection.close()
        return self.url(f"test_{self._databases}")

    def url(self, database: str) -> str:
        return f"postgresql://osml@127.0.0.1:{self.port}/{database}"

    def _connect(self) -> pg8000.Connection:
        return pg8000.connect("osml", host="127.0.0.1", port=self.port, database="postgres", timeout=10)

    def _as_user(self) -> dict:
        return {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []} if self._user else {}


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running server; skips the test where PostgreSQL's server programs are not installed."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL's server programs (initdb, postgres) are not installed")
    # In memory where there is room: removing its thousands of files from a disk can take minutes.
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2**30
    folder = Path(tempfile.mkdtemp(prefix="pg", dir=memory if roomy else None))
    server = None
    try:
        server = Postgres(programs, folder)
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path | None:
    told = shutil.which("pg_config")
    places = [Path(subprocess.run([told, "--bindir"], capture_output=True, text=True).stdout.strip())] if told else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


def _exists(user: str) -> bool:
    try:
        return bool(pwd.getpwnam(user))
    except KeyError:
        return False


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: Postgres) -> str:
    """A new and empty database on the one server of this test run."""
    return postgres_server.create()
