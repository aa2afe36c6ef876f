"""A tracking store that is a SQLite file: whether it is there, and where its artifacts are after it was moved.

MLflow writes down absolutely where artifacts are. `osml` keeps them in the folder `mlartifacts` beside the file.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .errors import OsmlError

ARTIFACTS = "mlartifacts"
PREFIX = "sqlite:///"
_PLACES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
"""Tables of MLflow, with the column that says where something is."""


def sqlite_file(uri: str) -> Path | None:
    """The file of a store; None for one of another kind."""
    return Path(uri.removeprefix(PREFIX).partition("?")[0]) if uri.startswith(PREFIX) else None


def with_sqlite_file(uri: str, file: str | Path) -> str:
    """The address with another file, and the options that it had."""
    _, mark, options = uri.partition("?")
    return f"{PREFIX}{file}{mark}{options}"


def check_sqlite_file(file: Path, make: bool) -> None:
    """Raise OSError or sqlite3.Error where the file cannot be opened, which MLflow would try for minutes, and
    FileNotFoundError where there is no store and none shall be made."""
    if not file.is_file() or not file.stat().st_size:
        if not make:
            raise FileNotFoundError(0, "there is no store")
        with tempfile.TemporaryFile(dir=file.parent):
            return
    with closing(sqlite3.connect(file, timeout=5)) as connection:
        if make:
            connection.execute("BEGIN IMMEDIATE")
        elif not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
            raise FileNotFoundError(0, "there is no store in this file")


def bring_home(file: Path) -> None:
    """Correct the places of artifacts in a store that was moved, or copied, together with its `mlartifacts`.

    Raises:
        OsmlError: where the file cannot be written, and the artifacts are no longer where it says.
    """
    home = file.parent / ARTIFACTS
    with closing(sqlite3.connect(file, timeout=20)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'logged_models'").fetchone():
            return  # it has just been made, or by an earlier version of MLflow
        moved = [old for old in list(_roots(connection)) if _is_moved(connection, old, home)]
        try:
            for old in moved:
                with connection:
                    for table, column in _PLACES.items():
                        connection.execute(
                            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                            f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                            (home.as_uri(), len(old) + 1, old, len(old) + 1, f"{old}/"),
                        )
        except sqlite3.Error as error:
            if any(not _folder(old).is_dir() for old in moved):
                raise OsmlError(
                    f"the store '{file}' was moved, and says that its artifacts are in '{_folder(moved[0])}'; they are "
                    f"in '{home}', which cannot be written down ({error}): make the file writable once"
                ) from error


def _roots(connection: sqlite3.Connection) -> Iterator[str]:
    """Folders called `mlartifacts` that experiments name."""
    for (place,) in connection.execute("SELECT DISTINCT artifact_location FROM experiments"):
        if place and place.rstrip("/").endswith(f"/{ARTIFACTS}") and urlsplit(place).scheme in ("", "file"):
            yield place


def _is_moved(connection: sqlite3.Connection, old: str, home: Path) -> bool:
    """Whether the artifacts of `old` are in `home`: all models are there, or there is no model yet, and the folder of
    the project that `old` was in is gone."""
    there = _folder(old)
    if there.resolve() == home.resolve():
        return False
    places = connection.execute(
        "SELECT artifact_location FROM logged_models WHERE substr(artifact_location, 1, ?) = ?",
        (len(old) + 1, f"{old}/"),
    ).fetchall()
    if not places:
        return not there.parent.is_dir()
    return all((home / unquote(place[len(old) + 1 :])).is_dir() for (place,) in places)


def _folder(place: str) -> Path:
    return Path(unquote(urlsplit(place).path)) if place.startswith("file:") else Path(place)
