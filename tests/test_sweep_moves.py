"""Sweeps on a disk that is full for a while, in folders that are renamed, moved and copied."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ray import cloudpickle
from sweeps import SPLIT, ray_here, runs_of, same, settings

from osml_plugin import OsmlError, evaluate, tracking
from osml_plugin.data import open_items
from osml_plugin.tune.asked import Asked
from osml_plugin.tune.promotion import promote
from osml_plugin.tune.settings import SweepConfig
from osml_plugin.tune.snapshots import Snapshots, put_back
from osml_plugin.tune.sweeping import sweep


@pytest.fixture(scope="module")
def ray_of_module():
    with ray_here():
        yield


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking.check_tracking(f"sqlite:///{file}")
    return file.read_bytes()


def fill_once_a_trial_has_ended(journal: Path) -> threading.Thread:
    """From then on the journal is on a device that is full; what was written is in `journal.before`."""

    def fill() -> None:
        deadline = time.monotonic() + 120
        while not (journal.is_file() and '"finished"' in journal.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.link(journal, journal.with_suffix(".before"))
        journal.with_suffix(".full").symlink_to("/dev/full")
        os.replace(journal.with_suffix(".full"), journal)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_a_disk_that_was_full_and_a_project_that_was_moved(
    search, ray_of_module, empty_store, digit_embeddings, tmp_path, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    project = tmp_path / "Möwen #1"
    project.mkdir()
    (project / "mlflow.db").write_bytes(empty_store)
    shutil.copy(digit_embeddings, project / "the data.npz")
    monkeypatch.chdir(project)
    Path("sweep").mkdir()
    filler = fill_once_a_trial_has_ended(project / "sweep" / "trials.jsonl")
    config = settings(search=search, concurrent=1)
    with pytest.raises(OsmlError, match="the disk is full.*make room, and osml tune --out sweep --resume") as raised:
        sweep("the data.npz", "sweep", split=SPLIT, config=config, resume=True, progress=False)
    filler.join()
    assert "\n" not in str(raised.value)
    os.replace("sweep/trials.before", "sweep/trials.jsonl")
    before = {e["id"] for line in Path("sweep/trials.jsonl").read_text().splitlines() if (e := json.loads(line))}
    newest = max(Path("sweep/trials").glob("experiment_state-*"))
    newest.write_bytes(newest.read_bytes()[:1000])  # cut off, as a full disk leaves it

    moved = tmp_path / "elsewhere" / "birds"
    moved.parent.mkdir()
    project.rename(moved)
    (moved / "sweep").rename(moved / "the sweep")
    monkeypatch.chdir(moved.parent)
    result = sweep(None, "birds/the sweep", resume=True, register="möwe 1", progress=False)
    assert (result["trials"], result["finished"], result["failed"]) == (3, 3, 0), result["failures"]
    entries = [json.loads(line) for line in (moved / "the sweep" / "trials.jsonl").read_text().splitlines()]
    assert before < {e["id"] for e in entries}  # trials that were drawn before the move, and after it
    assert not project.exists()  # nothing was written where it was
    store = f"sqlite:///{moved}/mlflow.db"
    assert [r.info.status for r in runs_of(store, result["run_id"])] == ["FINISHED"] * 3
    assert MlflowClient(store).list_artifacts(result["run_id"])

    # A finished one that is moved once more, with its model.
    again = tmp_path / "again"
    moved.rename(again)
    monkeypatch.chdir(again)
    assert not moved.exists()
    done = sweep("the data.npz", "the sweep", resume=True)
    assert done["bundle"] == "the sweep/best" and done["test"] == json.loads(json.dumps(result["test"]))
    evaluation, _ = evaluate("models:/möwe 1@challenger", "the data.npz", split=SPLIT)
    assert same(evaluation.to_dict(), result["test"])
    assert promote("mo\u0308we 1").version == 1  # another Unicode form of the same name
    with pytest.raises(OsmlError, match="does not hold the data of the sweep"):
        sweep(empty_data(again, digit_embeddings), "the sweep", resume=True)


def empty_data(folder: Path, source: Path) -> Path:
    """Other data: half of them."""
    from osml_plugin.data import write_embeddings

    items = open_items(source)
    write_embeddings(folder / "other.npz", items.embeddings[::2], items.labels[::2])
    return folder / "other.npz"


# --- what a sweep was asked, in a folder that is no longer where it was -----------------------------------


def asked_in(out: Path, data: Path, store: Path) -> Asked:
    out.mkdir(parents=True)
    asked = Asked("1234", str(data), SPLIT.to_dict(), SweepConfig(), False, None, f"sqlite:///{store}", "print")
    asked.write(out)
    return asked


def test_a_copy_of_a_sweep_has_runs_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "project" / "sweep"
    data, store = tmp_path / "project" / "data", tmp_path / "project" / "mlflow.db"
    asked_in(out, data, store)
    store.touch()
    shutil.copytree(out, tmp_path / "project" / "copy")
    shutil.copytree(tmp_path / "project", tmp_path / "other")
    here = Asked.read(out).again(out, None, None, None)
    assert here.id == "1234" and here.tracking_uri == f"sqlite:///{store}"
    beside = Asked.read(tmp_path / "project" / "copy").again(tmp_path / "project" / "copy", None, None, None)
    assert beside.id != "1234" and beside.tracking_uri == f"sqlite:///{store}"
    copy = tmp_path / "other" / "sweep"
    there = Asked.read(copy).again(copy, None, None, None)
    assert there.tracking_uri == f"sqlite:///{tmp_path}/other/mlflow.db"
    assert there.places(copy) == [str(tmp_path / "other" / "data"), str(data)]
    assert there.again(copy, "given", None, None).places(copy) == [str(Path("given").resolve())]
    (tmp_path / "link").symlink_to(tmp_path / "project")
    linked = Asked.read(tmp_path / "link" / "sweep").again(tmp_path / "link" / "sweep", None, None, None)
    assert linked.id == "1234" and linked.places(tmp_path / "link" / "sweep") == [str(data)]
    shared = replace(here, settings=SweepConfig(storage="/shared"))
    with pytest.raises(OsmlError, match="is a copy of .* whose trials are in '/shared'"):
        shared.again(copy, None, None, None)


def test_a_sweep_of_an_earlier_version_can_be_resumed(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    asked_in(tmp_path / "out", tmp_path / "data", tmp_path / "mlflow.db")
    values = json.loads((tmp_path / "out" / "sweep.json").read_text())
    del values["folder"], values["relative"]
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(values))
    asked = Asked.read(tmp_path / "out").again(tmp_path / "out", None, None, None)
    assert (asked.id, asked.places(tmp_path / "out")) == ("1234", [str(tmp_path / "data")])


def test_a_store_that_is_gone_is_not_replaced_by_an_empty_one(tmp_path, digit_embeddings, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    asked_in(tmp_path / "out", digit_embeddings, tmp_path / "mlflow.db")
    with pytest.raises(OsmlError, match="there is no store; set MLFLOW_TRACKING_URI"):
        sweep(None, tmp_path / "out", resume=True)
    assert not (tmp_path / "mlflow.db").exists()


def test_data_that_are_gone_can_be_named(tmp_path, empty_store, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    asked_in(tmp_path / "out", tmp_path / "data", tmp_path / "mlflow.db")
    with pytest.raises(OsmlError, match="are not in '.*data' any more: name them with --data"):
        sweep(None, tmp_path / "out", resume=True)


# --- snapshots -------------------------------------------------------------------------------------------


def test_a_snapshot_is_kept_whole_or_not_at_all(tmp_path):
    staging, kept = tmp_path / "staging", tmp_path / "search.zip"
    Snapshots(kept).keep(staging)  # before the first
    staging.mkdir()
    (staging / "searcher-state-1.pkl").write_bytes(b"old")
    assert not kept.exists()
    (staging / "experiment_state-1.json").write_text("{}")
    snapshots = Snapshots(kept)
    snapshots.keep(staging)
    first = kept.read_bytes()
    snapshots.keep(staging, now=True)  # nothing is new
    assert kept.read_bytes() == first
    full = Path(f"{kept}.full")
    full.symlink_to("/dev/full/x")
    (staging / "experiment_state-2.json").write_text("{}")
    with pytest.raises(OSError):
        Snapshots(full / "search.zip").keep(staging)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["search.zip", "search.zip.full", "staging"]


@pytest.mark.parametrize(
    ("tuner", "state"),
    [(b"", b"{}"), (cloudpickle.dumps({}), None), (cloudpickle.dumps({}), b'{"trial_da'), (None, b"{}")],
)
def test_a_sweep_that_left_nothing_whole_begins_again(tuner, state, tmp_path):
    for name, content in (("tuner.pkl", tuner), ("experiment_state-1.json", state)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    assert not put_back(tmp_path / "search.zip", str(tmp_path))
    assert not put_back(tmp_path / "search.zip", str(tmp_path / "nowhere"))


def test_of_several_snapshots_the_latest_whole_one_is_taken(tmp_path):
    (tmp_path / "tuner.pkl").write_bytes(cloudpickle.dumps({}))
    for number, text in enumerate(('{"trial_data": [], "n": 0}', '{"trial_data": [], "n": 1}', '{"trial_da')):
        (tmp_path / f"experiment_state-{number}.json").write_text(text)
        os.utime(tmp_path / f"experiment_state-{number}.json", (number, number))
    assert put_back(tmp_path / "search.zip", str(tmp_path))
    assert [json.loads(p.read_text())["n"] for p in tmp_path.glob("experiment_state-*")] == [1]
