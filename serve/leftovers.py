"""Processes of this machine: what a killed `osml serve` left behind, and who holds a port."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

RECORD = "running.json"
"""In the home of a running server: its room, whose name no other server's has."""
MARK = "OSML_SERVE_ROOM"
"""Environment variable that all processes of a server inherit: its room."""
PATIENCE = 10.0
"""Seconds for processes to end."""


@contextmanager
def recorded(home: Path, room: Path) -> Iterator[None]:
    """As long as the server runs, its home tells which room is its own."""
    record = home / RECORD
    record.write_text(json.dumps({"room": str(room)}))
    try:
        yield
    finally:
        record.unlink(missing_ok=True)


def clear(home: Path) -> list[str]:
    """End what the server before left behind in this home, if it was killed, and nothing else; the processes, in words.

    Ended is who was started by that server (`MARK`) and runs a program or a configuration that lies in its room, which
    is a folder that was made for it alone under a random name. Nobody may be serving from this home now.
    """
    record = home / RECORD
    try:
        room = Path(json.loads(record.read_text())["room"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    left = list(_of_room(room))
    names = [shown(process) for process in left]
    for process in left:
        with suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(left, timeout=PATIENCE / 2)[1]:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=PATIENCE / 2)
    if _is_room(room) and room.is_dir() and not room.is_symlink() and room.stat().st_uid == os.getuid():
        shutil.rmtree(room, ignore_errors=True)
    record.unlink(missing_ok=True)
    return names


def holder_of(port: int) -> str | None:
    """The process that listens on a TCP port, in words; None: nobody, or nobody who can be seen."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return shown(psutil.Process(connection.pid))
    return None


def shown(process: psutil.Process) -> str:
    try:
        line = " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        line = "of another user"
    return f"process {process.pid} ({line if len(line) <= 100 else line[:97] + '...'})"


def _of_room(room: Path) -> Iterator[psutil.Process]:
    """Processes of this user that the room's server started, and whose command line names a file in the room: who only
    looks at such a file, in another terminal, is neither."""
    if not _is_room(room):
        return
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            mine = process.pid != os.getpid() and process.uids().real == os.getuid()
            in_room = mine and any(f"{room}/" in word for word in process.cmdline())
            if in_room and process.environ().get(MARK) == str(room):
                yield process


def make_room() -> Path:
    """A folder for what only lives while the server runs. Sockets lie in it, whose paths HAProxy wants to be 97 bytes
    at most, of which Serve and we use 81: where TMPDIR is longer than the rest, it is in /tmp."""
    place = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="osml", dir=place if len(os.fsencode(place)) <= 16 else "/tmp"))


def _is_room(room: Path) -> bool:
    """Of a name that `make_room` gives: a record that is damaged names no other folder."""
    return re.fullmatch(r"osml[a-z0-9_]{8}", room.name) is not None
