"""A copy of what an endpoint has learned, made while it runs: a folder that can be served like the one it is of."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from osml_plugin.errors import OsmlError

from .settings import ServeConfig
from .store import Store, StoreUnavailable, shown

STORE = "store.db"


def back_up(config: ServeConfig, out: Path) -> dict[str, int | str]:
    """Copy store and models of an endpoint with a SQLite store into the new folder `out`, checked, in one step.

    Returns:
        What the copy holds: model, gallery_version, n_classes, n_examples, n_unknowns and bytes.

    Raises:
        OsmlError: where `out` is there already or cannot be written, the store is PostgreSQL's, or cannot be read.
    """
    if not config.database_url.startswith("sqlite"):
        raise OsmlError(
            f"the store '{shown(config.database_url)}' is PostgreSQL's: copy it with pg_dump, and the folder "
            f"'{config.home / 'models'}' with cp"
        )
    if os.path.lexists(out):
        raise OsmlError(f"'{out}' is there already: name a folder that is not")
    room = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        with closing(Store(config.database_url)) as store:
            store.copy_to(room / STORE)
        os.chmod(room / STORE, 0o600)
        _copy_models(config.home / "models", room / "models")
        found = _checked(room / STORE)
        _on_disk(room)
        os.rename(room, out)  # refused where something came there meanwhile, unless it is an empty folder
        _sync(out.parent)
        return found
    except StoreUnavailable as error:
        raise OsmlError(str(error)) from error
    except OSError as error:
        raise OsmlError(f"cannot write the copy '{out}': {error.strerror or error}; name another place") from error
    finally:
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)


def _copy_models(models: Path, to: Path) -> None:
    """Versions never change, and lie in their place whole or not at all; what begins with a dot is on its way there."""
    if models.is_dir():
        shutil.copytree(models, to, ignore=lambda folder, names: [n for n in names if n.startswith(".")])


def _checked(file: Path) -> dict[str, int | str]:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        verdict = connection.execute("PRAGMA integrity_check").fetchone()[0]
        broken = connection.execute("PRAGMA foreign_key_check").fetchone()
    if verdict != "ok" or broken:
        reason = broken if verdict == "ok" else verdict
        raise OsmlError(f"the copy is damaged ({reason}): check the disks, then try again")
    size = file.stat().st_size
    with closing(Store(f"sqlite:///{file}")) as store:
        state, classes = store.state(), store.classes()
        n_unknowns = store.unknowns(0)[0]
    for rest in (f"{file.name}.lock", f"{file.name}.reserve"):
        (file.parent / rest).unlink(missing_ok=True)
    return {
        "model": state.model or "",
        "gallery_version": state.gallery_version,
        "n_classes": len(classes),
        "n_examples": sum(classes.values()),
        "n_unknowns": n_unknowns,
        "bytes": size,
    }


def _on_disk(folder: Path) -> None:
    """Written to the disk itself, with all that is in it."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place) / name)
        _sync(Path(place))


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
