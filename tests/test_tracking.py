"""Real SQLite stores and one real server: runs are stored once, models without pickle, and nothing is lost."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

import osml_plugin
from osml_plugin import OsmlError, tracking
from osml_plugin.data import write_embeddings
from osml_plugin.tracking import check_tracking, download_bundle, log_bundle
from osml_plugin.tune.runs import SweepRuns


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A SQLite store with its tables, which take seconds to make."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    check_tracking(f"sqlite:///{file}")
    return file.read_bytes()


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "to be forgotten")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    Path("mlflow.db").write_bytes(empty_store)
    return tracking.tracking_uri()


@pytest.fixture(scope="module")
def bundle(digit_vectors, tmp_path_factory):
    """Of vectors."""
    folder = tmp_path_factory.mktemp("vectors")
    vectors, labels = digit_vectors
    write_embeddings(folder / "digits.npz", vectors[:600], labels[:600])
    osml_plugin.train(folder / "digits.npz", folder / "bundle", n_known=5, seed=0, progress=False)
    return folder / "bundle"


@pytest.fixture(scope="module")
def image_bundle(digits_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "bundle"
    osml_plugin.train(digits_folder, out, n_known=5, seed=0, overrides=["training.epochs=0"], progress=False)
    return out


def runs_of(uri, sweep="s"):
    """By trial; the parent under None."""
    client = MlflowClient(uri)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()], f"tags.`osml.sweep` = '{sweep}'")
    by_trial = {run.data.tags.get("osml.trial"): run for run in found}
    assert len(by_trial) == len(found)  # none doubled
    return by_trial


def steps(uri, run, metric):
    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run.info.run_id, metric)]


def epochs(n, **more):
    return [{"epoch": e, "oscr": e / 10, **more} for e in range(1, n + 1)]


# --- the store -------------------------------------------------------------------------------------------


def test_the_default_store_is_named_absolutely(store, tmp_path, monkeypatch):
    assert store == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db?timeout=5")
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/other.db?timeout=5"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert tracking.tracking_uri() == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("sqlite:///{tmp}/none/x.db", "No such file or directory"),
        ("sqlite:///{tmp}/text.db", "not a database"),
        ("localhost:5000", "no such kind of store"),
        ("ftp://there", "no such kind of store"),
        ("http://user:secret@127.0.0.1:9", "Connection refused"),
    ],
)
def test_a_store_that_cannot_be_reached_is_one_line(uri, says, tmp_path):
    import mlflow  # noqa: F401  (its first import sets a variable of its own)

    (tmp_path / "text.db").write_text("no database, whatever its name says\n" * 40)
    before = dict(os.environ)
    with pytest.raises(OsmlError, match=says) as caught:
        check_tracking(uri.format(tmp=tmp_path))
    assert "\n" not in str(caught.value) and "MLFLOW_TRACKING_URI" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert dict(os.environ) == before


def test_a_server_that_takes_the_call_and_says_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(OsmlError, match="no answer within 1 seconds"):
        check_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=1)


def test_without_mlflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(OsmlError, match=r"pip install 'osml-plugin\[mlflow\]'"):
        check_tracking("sqlite:///mlflow.db")


def test_importing_it_does_not_import_mlflow():
    code = "import sys, osml_plugin.tracking, osml_plugin.presence as t; assert t.is_model_uri('models:/a@b') and not t.is_model_uri('a/b')"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'mlflow' not in sys.modules"], check=True)


# --- models ----------------------------------------------------------------------------------------------


def test_a_bundle_comes_back_from_the_registry(store, bundle, digit_vectors, capfd, recwarn):
    run_id = SweepRuns(store, "digits", "s").start("sweep", {}, {})
    capfd.readouterr()
    uri, number = log_bundle(bundle, run_id=run_id, register="digits", tags={"data_path": "/data"})
    assert capfd.readouterr() == ("", "") and not recwarn.list
    assert (uri, number) == ("models:/digits/1", 1)
    client = MlflowClient()
    found = client.get_model_version_by_alias("digits", "challenger")
    recognizer = osml_plugin.OpenSetRecognizer.load(bundle)
    assert found.version in (1, "1") and found.run_id == run_id
    assert float(found.tags["threshold"]) == recognizer.threshold.tau
    assert json.loads(found.tags["classes"]) == recognizer.class_names
    assert found.tags["detector"] == recognizer.detector.name and found.tags["alpha"] == "0.05"
    assert found.tags["dimension"] == "64" and found.tags["data_path"] == "/data"
    assert found.tags["data"] == recognizer.details["provenance"]["data"]

    loaded = osml_plugin.OpenSetRecognizer.load(download_bundle("models:/digits@challenger"))
    assert np.array_equal(loaded.predict(digit_vectors[0]).scores, recognizer.predict(digit_vectors[0]).scores)
    assert download_bundle("models:/digits/1") == download_bundle("models:/digits@challenger")
    assert (download_bundle(f"runs:/{run_id}/model") / "bundle.json").is_file()

    assert log_bundle(bundle, run_id=run_id) == (
        client.search_logged_models([run_experiment(run_id)])[0].model_uri,
        None,
    )
    assert log_bundle(bundle, run_id=run_id, register="digits") == ("models:/digits/2", 2)
    assert int(client.get_model_version_by_alias("digits", "challenger").version) == 2


def run_experiment(run_id):
    return MlflowClient().get_run(run_id).info.experiment_id


def test_what_does_not_exist_is_named_with_what_does(store, bundle):
    with pytest.raises(OsmlError, match="no model is registered"):
        download_bundle("models:/digits@champion")
    log_bundle(bundle, run_id=SweepRuns(store, "digits", "s").start("sweep", {}, {}), register="digits")
    for uri, says in [
        ("models:/digit/1", "did you mean 'digits'"),
        ("models:/digits@champion", "no alias 'champion'; it has challenger"),
        ("models:/digits/7", "no version 7; it has 1"),
        ("models:/digits", "expected models:/NAME@alias"),
        ("models:/", "expected models:/NAME@alias"),
        ("runs:/0123/model", "0123"),
    ]:
        with pytest.raises(OsmlError, match=says) as caught:
            download_bundle(uri)
        assert "\n" not in str(caught.value)


def test_a_damaged_bundle_is_not_registered(store, bundle, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundle.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    next(copy.glob("gallery-*")).write_bytes(b"x")
    with pytest.raises(OsmlError, match="damaged"):
        log_bundle(copy, run_id=SweepRuns(store, "digits", "s").start("sweep", {}, {}), register="digits")
    assert not MlflowClient().search_registered_models()


def test_no_pickle_and_pinned_requirements(store, bundle, digit_vectors, tmp_path):
    uri, _ = log_bundle(bundle, run_id=SweepRuns(store, "digits", "s").start("sweep", {}, {}), register="digits")
    folder = download_bundle(uri).parents[1]
    files = {file.name for file in folder.rglob("*") if file.is_file()}
    assert {"MLmodel", "mlflow_model.py", "input_example.json", "requirements.txt", "bundle.json"} <= files
    assert not [name for name in files if Path(name).suffix in (".pkl", ".pickle", ".bin", ".pt", ".joblib")]
    assert not [file for file in folder.rglob("*") if file.is_file() and file.read_bytes()[:1] == b"\x80"]
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert f"osml-plugin=={osml_plugin.__version__}" in lines and len(lines) > 10
    assert all(line.count("==") == 1 and "@" not in line and "+" not in line for line in lines)

    np.save(tmp_path / "vectors.npy", digit_vectors[0][:20])
    code = (
        "import numpy as np, mlflow; m = mlflow.pyfunc.load_model('models:/digits@challenger');"
        "m.predict(np.load('vectors.npy')).to_json('found.json', orient='split')"
    )
    forbidden = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_TRACKING_URI": store}
    done = subprocess.run([sys.executable, "-c", code], env=forbidden, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "" and "`predict`" not in done.stderr, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    found = {name: [row[i] for row in found["data"]] for i, name in enumerate(found["columns"])}
    expected = osml_plugin.predict(osml_plugin.OpenSetRecognizer.load(bundle), [bundle.parent / "digits.npz"])[0]
    assert found["label"] == list(expected.names[:20]) and found["nearest"] == list(expected.nearest[:20])
    assert found["known"] == [name is not None for name in expected.names[:20]]
    assert np.allclose(found["score"], expected.scores[:20]) and np.allclose(found["p_value"], expected.p_values[:20])
    assert np.allclose(found["threshold"], expected.threshold)


def test_an_image_model_takes_bytes_and_base64(store, image_bundle, digits_folder):
    import mlflow
    import pandas as pd

    uri, _ = log_bundle(image_bundle, run_id=SweepRuns(store, "digits", "s").start("sweep", {}, {}), register="digits")
    model = mlflow.pyfunc.load_model(uri)
    files = sorted(digits_folder.glob("*/0*.png"))[::40]
    expected = osml_plugin.predict(image_bundle, files, progress=False)[0]
    webp = io.BytesIO()
    Image.open(files[0]).save(webp, "WEBP", lossless=True)
    content = [file.read_bytes() for file in files]
    found = model.predict(pd.DataFrame({"image": [*content, webp.getvalue()]}))
    assert np.allclose(found["score"], [*expected.scores, expected.scores[0]])
    assert [None if pd.isna(v) else v for v in found["label"]][:-1] == list(expected.names)
    assert np.allclose(model.predict(model.input_example)["threshold"], expected.threshold)
    inner = model.unwrap_python_model()
    text = pd.DataFrame({"image": [base64.b64encode(c).decode() for c in content]})
    assert np.allclose(inner.predict(None, text)["score"], expected.scores)
    gif = io.BytesIO()
    Image.new("L", (8, 8)).save(gif, "GIF")
    for bad in (b"", b"\x89PNG\r\n\x1a\nno more", gif.getvalue(), content[0][:-40], "no base64!", None):
        with pytest.raises(ValueError, match=r"row 1\b") as caught:
            inner.predict(None, pd.DataFrame({"image": [content[0], bad]}))
        assert "\n" not in str(caught.value)


# --- the runs of a sweep ---------------------------------------------------------------------------------


def test_a_sweep_is_stored(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    runs = SweepRuns(store, "digits", "s")
    parent = runs.start("digits sweep", {"trials": 3}, {"data": "abc"})
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("x")
    for n in (1, 2, 3):
        assert runs.record(
            "a", number=0, params={"lr": 0.1, "loss": "ArcFaceLoss"}, history=epochs(n), status="running"
        )
    runs.record("a", number=0, params={"lr": 0.1}, history=epochs(3), status="finished", extra_tags={"chosen": "knn"})
    runs.record("b", number=1, params={"lr": 1.0}, history=epochs(1, **{"system/ram": 2.0}), status="stopped")
    history = [{"epoch": 1, "oscr": float("nan"), "odd {key}": 1.0, "text": None}]
    runs.record("c", number=2, params={"lr": 9.0}, history=history, status="failed", error="boom")
    runs.record("d", number=3, params={}, history=[], status="running")
    runs.record("e", number=4, params={}, history=[], status="waiting")
    time.sleep(2.5)  # for a sample of the machine
    assert runs.close("FINISHED", {"oscr": 0.5}, {"best": "a"}, [tmp_path / "page", tmp_path / "mlflow.db"], keep={"e"})

    found = runs_of(store)
    status = {trial: run.info.status for trial, run in found.items()}
    assert status == {None: "FINISHED", "a": "FINISHED", "b": "FINISHED", "c": "FAILED", "d": "KILLED", "e": "RUNNING"}
    assert all(found[t].data.tags["mlflow.parentRunId"] == parent for t in "abcde")
    assert found[None].data.params == {"trials": "3"} and found[None].data.tags["data"] == "abc"
    assert found[None].data.metrics["oscr"] == 0.5 and found[None].data.tags["best"] == "a"
    assert any(key.startswith("system/cpu") for key in found[None].data.metrics)
    assert {a.path for a in MlflowClient(store).list_artifacts(parent)} == {"page", "mlflow.db"}
    assert found["a"].data.params == {"lr": "0.1", "loss": "ArcFaceLoss"} and found["a"].data.tags["chosen"] == "knn"
    assert steps(store, found["a"], "oscr") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert found["b"].data.metrics["system/ram"] == 2.0
    assert found["c"].data.tags["osml.error"] == "boom" and found["c"].data.metrics == {"odd _key_": 1.0}


def test_a_resumed_sweep_doubles_nothing(store):
    runs = SweepRuns(store, "digits", "s")
    first = runs.start("sweep", {"trials": 2}, {})
    runs.record("a", number=0, params={"lr": 0.1}, history=epochs(2), status="running")
    runs.record("lost", number=1, params={}, history=epochs(1), status="running")
    runs.record("b", number=2, params={}, history=epochs(1), status="failed", error="boom")
    resumed = pickle.loads(pickle.dumps(runs))
    runs.close("KILLED")

    assert resumed.start("sweep", {"trials": 3}, {}) == first
    assert runs_of(store)[None].info.status == "RUNNING"
    resumed.drop({"a", "b"})
    resumed.record("a", number=0, params={"lr": 0.1}, history=epochs(1), status="running")  # from an older checkpoint
    assert runs_of(store)["a"].info.status == "RUNNING"
    resumed.record("a", number=0, params={"lr": 0.1}, history=epochs(4), status="finished")
    resumed.record("b", number=2, params={}, history=epochs(2), status="finished")
    assert resumed.close("FINISHED")
    found = runs_of(store)
    assert set(found) == {None, "a", "b"} and {run.info.status for run in found.values()} == {"FINISHED"}
    assert steps(store, found["a"], "oscr") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert "osml.error" not in found["b"].data.tags
    assert found[None].data.params == {"trials": "2"} and found[None].data.metrics["param.trials"] == 3


def test_parameters_that_change_on_the_way(store):
    runs = SweepRuns(store, "digits", "s")
    runs.start("sweep", {}, {})
    for n, (lr, miner) in enumerate([(0.1, "none"), (0.2, "none"), (0.1, "hard")], start=1):
        assert runs.record("a", number=0, params={"lr": lr, "miner": miner}, history=epochs(n), status="running")
    runs.close("FINISHED")
    run = runs_of(store)["a"]
    assert run.data.params == {"lr": "0.1", "miner": "none"} and run.data.tags["param.miner"] == "hard"
    assert steps(store, run, "param.lr") == [(2, 0.2), (3, 0.1)]


def test_a_second_process_reads_meanwhile(store):
    runs = SweepRuns(store, "digits", "s")
    runs.start("sweep", {}, {})
    code = (
        "import sys; from mlflow import MlflowClient; c = MlflowClient(sys.argv[1]); print('ready', flush=True)\n"
        "for line in sys.stdin: print(len(c.search_runs(['1'])), flush=True)"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, store], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert reader.stdout.readline() == "ready\n"
        for n in range(1, 6):
            reader.stdin.write("\n")
            reader.stdin.flush()  # it reads while this process writes
            assert runs.record(str(n), number=n, params={"n": n}, history=epochs(50), status="finished")
            assert int(reader.stdout.readline()) in (n, n + 1)
    finally:
        reader.stdin.close()
        reader.wait(20)
    assert runs.close("FINISHED") and len(runs_of(store)) == 6


# --- a server --------------------------------------------------------------------------------------------


def start_server(port, folder):
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/files"]
    log = open(folder / "log", "ab")  # noqa: SIM115
    lean = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # further processes, which take long to start
    process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, cwd=folder, env=lean)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return process
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
    raise AssertionError("the server did not start")


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)  # the server and its workers: a session of their own
    process.wait()


def test_a_server_that_goes_away_and_comes_back(empty_store, bundle, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    (tmp_path / "server.db").write_bytes(empty_store)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    server = start_server(port, tmp_path)
    try:
        check_tracking(tracking.tracking_uri())
        runs = SweepRuns(uri, "digits", "s")
        parent = runs.start("sweep", {}, {})
        assert runs.record("a", number=0, params={"lr": 0.1}, history=epochs(2), status="running")
        kill(server)
        with caplog.at_level(logging.WARNING, "osml_plugin"):
            assert not runs.record("a", number=0, params={"lr": 0.1}, history=epochs(3), status="running")
            assert not runs.record("b", number=1, params={"lr": 0.2}, history=epochs(1), status="running")
            assert not runs.record("b", number=1, params={"lr": 0.2}, history=epochs(2), status="finished")
            waiting = pickle.loads(pickle.dumps(runs))
        assert len([r for r in caplog.records if r.name == "osml_plugin.tune.runs"]) == 1
        assert not pickle.loads(pickle.dumps(runs)).close("FINISHED")  # nothing raises, nothing is lost
        server = start_server(port, tmp_path)
        waiting.start("sweep", {}, {})
        assert waiting.record("c", number=2, params={}, history=epochs(1), status="running")
        found = runs_of(uri)
        assert steps(uri, found["a"], "oscr") == [(1, 0.1), (2, 0.2), (3, 0.3)]
        assert steps(uri, found["b"], "oscr") == [(1, 0.1), (2, 0.2)] and found["b"].info.status == "FINISHED"
        log_bundle(bundle, run_id=parent, register="digits")
        assert (download_bundle("models:/digits@challenger") / "bundle.json").is_file()
        assert waiting.close("FINISHED", artifacts=[tmp_path / "log"])
        found = runs_of(uri)
        assert {t: run.info.status for t, run in found.items()} == {
            None: "FINISHED", "a": "KILLED", "b": "FINISHED", "c": "KILLED",
        }  # fmt: skip
        assert [a.path for a in MlflowClient(uri).list_artifacts(parent)] == ["log"]
    finally:
        kill(server)
    assert capfd.readouterr().out == ""


# --- a store that is only read, and one that was moved ----------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a@b", "a/b", "a:b", "50%", "what?", "#1", "a;b", "", " ", " a", "a ", "..", "a\nb", "x" * 201]
)
def test_a_name_that_could_never_be_read_is_refused_wherever_it_is_given(name, tmp_path, monkeypatch):
    from osml_plugin.tune.promotion import promote, rollback
    from osml_plugin.tune.sweeping import sweep

    monkeypatch.chdir(tmp_path)
    calls = [
        lambda: sweep("data", "out", register=name),
        lambda: log_bundle("bundle", run_id="1", register=name),
        lambda: promote(name),
        lambda: rollback(name),
    ]
    if name.strip() and not set(name) & set("/\n"):
        calls += [
            lambda: download_bundle(f"models:/{name}@champion"),
            lambda: tracking.resolve_model(f"models:/{name}/1"),
        ]
    for call in calls:
        with pytest.raises(OsmlError, match="cannot name a registered model") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b""])
def test_reading_makes_no_store(content, tmp_path, monkeypatch, osml):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "to be forgotten")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "mlflow.db").write_bytes(content)
    (tmp_path / "a.jpg").write_bytes(b"never read")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for command in (
        ["evaluate", "models:/birds@champion", "--data", "."],
        ["predict", "models:/birds/1", "a.jpg"],
        ["predict", "runs:/1234/model", "a.jpg"],
        ["promote", "birds"],
        ["rollback", "birds"],
    ):
        status, out, err = osml(*command)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert "there is no store" in err and "MLFLOW_TRACKING_URI" in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_store_that_is_moved_or_copied_keeps_its_models(empty_store, bundle, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "to be forgotten")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    old, new = tmp_path / "ein Möwen #1", tmp_path / "new"
    old.mkdir()
    (old / "mlflow.db").write_bytes(empty_store)
    monkeypatch.chdir(old)
    run_id = SweepRuns(tracking.tracking_uri(), "digits", "s").start("sweep", {}, {})
    old.rename(new)  # before there is any model
    monkeypatch.chdir(new)
    log_bundle(bundle, run_id=run_id, register="digits")
    assert not old.exists()
    assert (download_bundle(f"runs:/{run_id}/model") / "bundle.json").is_file()
    shutil.copytree(new, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    log_bundle(bundle, run_id=run_id, register="digits")  # beside the copy, not beside the original
    shutil.rmtree(new)
    (tmp_path / "copy").rename(old)
    (tmp_path / "link").symlink_to(old)
    for folder in (old, tmp_path / "link"):
        monkeypatch.chdir(folder)
        for version in (1, 2):
            tracking._downloads.clear()
            found = download_bundle(f"models:/digits/{version}")
            assert (found / "bundle.json").read_bytes() == (bundle / "bundle.json").read_bytes()
    assert len(mlflow.pyfunc.load_model("models:/digits@challenger").metadata.signature.inputs) == 1  # MLflow itself


def test_artifacts_that_were_put_elsewhere_on_purpose_stay_there(empty_store, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "to be forgotten")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    Path("mlflow.db").write_bytes(empty_store)
    place = (tmp_path / "big disk" / "mlartifacts").as_uri()
    (tmp_path / "big disk").mkdir()
    MlflowClient(tracking.tracking_uri()).create_experiment("digits", place)
    run_id = SweepRuns(tracking.tracking_uri(), "digits", "s").start("sweep", {}, {})
    log_bundle(bundle, run_id=run_id, register="digits")
    (tmp_path / "mlartifacts").mkdir()
    assert (download_bundle("models:/digits/1") / "bundle.json").is_file()
    assert MlflowClient(tracking.tracking_uri()).get_experiment_by_name("digits").artifact_location == place
    assert not list((tmp_path / "mlartifacts").iterdir())
