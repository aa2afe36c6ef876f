"""What was learned, in one file after a clean end; copied while it is written; and served from the copy."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from test_replicas import BY, NAMES, bundle, same

from osml_plugin import OsmlError
from osml_plugin.serve.backup import back_up
from osml_plugin.serve.live import Live
from osml_plugin.serve.service import change_model
from osml_plugin.serve.settings import ServeConfig
from osml_plugin.serve.shelf import Shelf
from osml_plugin.serve.store import NewItem, Store

MODEL = "model"


@pytest.fixture
def config(tmp_path):
    """A home in which an endpoint has learned six otters."""
    bundle(tmp_path, 0)
    config = ServeConfig(home=tmp_path / "home")
    with closing(Store(config.database_url)) as store:
        change_model(store, (shelf := Shelf(config.home)), BY, shelf.resolve(str(tmp_path / "bundle0")))
        enroll(store, 6)
    shutil.rmtree(tmp_path / "bundle0")  # the home has its own
    return config


def enroll(store: Store, n: int = 1) -> None:
    rows = np.eye(8, dtype=np.float32)[np.arange(n) % 8]
    store.enroll(
        BY, "otter", [NewItem(row, row.tobytes(), "application/x-vector") for row in rows], store.state().model
    )


def test_a_store_that_was_closed_is_one_file(config):
    assert not [file.name for file in config.home.glob("store.db-*")]
    with closing(sqlite3.connect(config.home / "store.db")) as copy:
        assert copy.execute("SELECT count(*) FROM osml_items WHERE name = 'otter'").fetchone() == (6,)


def test_a_copy_made_while_others_write_can_be_served(config, tmp_path):
    stop, written = threading.Event(), []

    def write() -> None:
        with closing(Store(config.database_url)) as store:
            while not stop.is_set():
                enroll(store)
                written.append(store.state().gallery_version)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while len(written) < 5:
            pass
        first = written[-1]
        found = back_up(config, tmp_path / "monday")
    finally:
        stop.set()
        writer.join()
    # One moment of it: as many examples as there were writes by then.
    assert first <= found["gallery_version"] <= written[-1] and found["n_examples"] == found["gallery_version"] + 5
    assert sorted(os.listdir(tmp_path / "monday")) == ["models", "store.db"]
    assert (tmp_path / "monday" / "store.db").stat().st_mode & 0o077 == 0

    shutil.rmtree(config.home)
    copy = ServeConfig(home=tmp_path / "monday")
    with closing(Store(copy.database_url)) as store:
        snapshot = Live(store, Shelf(copy.home)).snapshot
        assert snapshot.gallery_version == found["gallery_version"]
        assert set(snapshot.recognizer.class_names) == {*NAMES[:3], "otter"}
        enroll(store)


def test_a_copy_is_what_it_is_of(config, tmp_path):
    back_up(config, tmp_path / "copy")
    with closing(Store(config.database_url)) as here, closing(Store(f"sqlite:///{tmp_path}/copy/store.db")) as there:
        same(Live(here, Shelf(config.home)).snapshot, Live(there, Shelf(tmp_path / "copy")).snapshot)


def test_nothing_is_written_over_and_nothing_is_left_half_written(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OsmlError, match="is there already"):
        back_up(config, out)
    out.rmdir()
    with monkeypatch.context() as patch, pytest.raises(OsmlError, match="No space left on device"):
        patch.setattr(os, "fsync", _full)
        back_up(config, out)
    with pytest.raises(OsmlError, match="pg_dump"):
        back_up(config.model_copy(update={"database": "postgresql://me:secret@here/osml"}), out)
    assert sorted(os.listdir(tmp_path)) == ["home"]


def _full(_: int) -> None:
    raise OSError(28, os.strerror(28))


def test_the_command(config, tmp_path, osml):
    status, out, _ = osml("backup", tmp_path / "copy", "--home", config.home)
    assert status == 0 and "4 classes, 6 examples" in out and f"osml serve --home {tmp_path}/copy" in out
    status, out, _ = osml("backup", tmp_path / "copy2", "--home", config.home, "--json")
    assert status == 0 and '"n_examples": 6' in out and Path(tmp_path / "copy2" / "store.db").is_file()
    for words, says in {
        ("backup", tmp_path / "copy", "--home", config.home): "is there already",
        ("backup", tmp_path / "x", "--home", tmp_path / "nowhere"): "there is no store in",
    }.items():
        status, out, error = osml(*words)
        assert status == 2 and out == "" and says in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists() and not (tmp_path / "nowhere").exists()
