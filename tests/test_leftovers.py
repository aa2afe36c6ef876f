"""What a killed server left behind is ended, and nothing else; and who holds a port is named."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from osml_plugin import OsmlError
from osml_plugin.serve import leftovers
from osml_plugin.serve.server import _free_port

LISTEN = "import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(s.getsockname()[1], flush=True); s.accept()"


@contextmanager
def listening(*words: str, room=None):
    """A process with these words in its command line, and the port that it holds; started by the server of `room`."""
    environment = os.environ | ({leftovers.MARK: str(room)} if room else {})
    command = [sys.executable, "-c", LISTEN, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def room():
    room = leftovers.make_room()
    yield room
    leftovers.shutil.rmtree(room, ignore_errors=True)


def test_what_runs_in_the_room_of_a_killed_server_is_ended_and_nothing_else(room, tmp_path):
    with pytest.raises(KeyboardInterrupt), leftovers.recorded(tmp_path, room):
        record = (tmp_path / leftovers.RECORD).read_text()
        raise KeyboardInterrupt
    assert not (tmp_path / leftovers.RECORD).exists(), "an end, not a kill"
    assert leftovers.clear(tmp_path) == []

    (tmp_path / leftovers.RECORD).write_text(record)
    with (
        listening("-f", f"{room}/haproxy.cfg", room=room) as (mine, port),
        listening("-f", f"{room}/haproxy.cfg") as (reader, _),
        listening("-f", f"{room}x/haproxy.cfg") as (neighbor, _),
        listening("-f", str(room.parent)) as (other, _),
    ):
        with pytest.raises(OsmlError, match=rf"{port}: Address already in use by process {mine.pid} \(.*: stop it, or"):
            _free_port("127.0.0.1", port)
        (ended,) = leftovers.clear(tmp_path)
        assert f"process {mine.pid} (" in ended and mine.poll() is not None
        assert neighbor.poll() is None and other.poll() is None and reader.poll() is None
        assert _free_port("127.0.0.1", port) == port
    assert not room.exists() and not (tmp_path / leftovers.RECORD).exists()


@pytest.mark.parametrize(
    "record",
    ["", "[]", "{}", '{"room": 3}', '{"room": "/usr"}', '{"room": "/tmp"}', '{"room": "/"}', '{"room": "HERE"}'],
)
def test_a_damaged_record_ends_nothing(tmp_path, record):
    (tmp_path / "precious").mkdir()
    text = record.replace("HERE", str(tmp_path / "precious"))
    (tmp_path / leftovers.RECORD).write_text(text)
    named = json.loads(text)["room"] if "/" in text else "x"
    with listening(f"{named}/x", room=named) as (process, _):
        assert leftovers.clear(tmp_path) == []
        assert process.poll() is None
    assert (tmp_path / "precious").exists()


def test_nobody_holds_a_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        assert leftovers.holder_of(probe.getsockname()[1]) is None
