"""Whole sweeps with a real Ray and a real MLflow store, on embeddings, where a trial takes a second."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
from mlflow import MlflowClient
from sweeps import QUICK, SPLIT, ray_here, runs_of, same, settings

from osml_plugin import OsmlError, evaluate
from osml_plugin.bundle import load_bundle
from osml_plugin.data import Split, open_items, test_indices
from osml_plugin.tune.job import prepare, settings_of
from osml_plugin.tune.sweeping import sweep


@pytest.fixture(scope="module")
def ray_of_module():
    with ray_here():
        yield


@pytest.fixture(scope="module")
def swept(ray_of_module, digit_embeddings, tmp_path_factory):
    """One sweep that many tests look at: `(folder, result, store)`."""
    room = tmp_path_factory.mktemp("swept")
    uri = f"sqlite:///{room}/mlflow.db"
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    result = sweep(digit_embeddings, room / "sweep", split=SPLIT, config=settings(search="optuna"), register="digits")
    yield room / "sweep", result, uri
    os.environ.pop("MLFLOW_TRACKING_URI")
    if before:
        os.environ["MLFLOW_TRACKING_URI"] = before


def test_it_ends_with_a_bundle_that_is_tested_once(swept, digit_embeddings):
    out, result, _ = swept
    assert (result["trials"], result["finished"], result["failed"]) == (3, 3, 0)
    evaluation, _ = evaluate(out / "best", digit_embeddings, split=SPLIT)
    assert same(evaluation.to_dict(), result["test"])
    assert 0.5 < result["validation"]["oscr"] <= 1
    assert (out / "report.html").stat().st_size > 10_000


def test_the_best_is_the_best_of_all_that_was_reported(swept):
    out, result, _ = swept
    entries = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    figures = [e["figures"]["oscr"] for e in entries if "figures" in e]
    assert len(figures) == 9  # three trials, three epochs
    assert result["validation"]["oscr"] == max(figures)


def test_the_configuration_of_the_best_makes_it_again(swept, digit_embeddings, tmp_path):
    """The split has pseudo-unknown classes, so the trial's own model is taken; trained again it is the same."""
    from osml_plugin import train

    out, result, _ = swept
    again = train(
        digit_embeddings, tmp_path / "again", split=SPLIT, config=out / "best.yaml", progress=False
    ).recognizer
    best = load_bundle(out / "best")
    assert result["best"]["epoch"] == 3  # else the trial's model is of an earlier epoch than the training's
    for name, value in best.model.state_dict().items():
        np.testing.assert_allclose(again.model.state_dict()[name], value, atol=1e-6)
    assert again.detector.params == best.detector.params
    assert again.threshold.tau == pytest.approx(best.threshold.tau, rel=1e-4)


def test_every_trial_has_one_run_and_none_is_left_running(swept):
    _, result, uri = swept
    client = MlflowClient(uri)
    parent = client.get_run(result["run_id"])
    assert parent.info.status == "FINISHED"
    assert json.loads(parent.data.tags["split"]) == SPLIT.to_dict()
    nested = runs_of(uri, result["run_id"])
    assert sorted(r.info.status for r in nested) == ["FINISHED"] * 3
    assert len({r.data.tags["osml.trial"] for r in nested}) == 3
    for run in nested:
        assert {"loss.margin", "loss.scale"} <= set(run.data.params)
        assert [m.step for m in client.get_metric_history(run.info.run_id, "oscr")] == [1, 2, 3]


def test_the_registered_model_is_the_bundle(swept, digit_embeddings):
    _, result, _ = swept
    evaluation, _ = evaluate("models:/digits@challenger", digit_embeddings, split=SPLIT)
    assert same(evaluation.to_dict(), result["test"])


def test_a_sweep_that_is_done_says_so_again(swept, digit_embeddings):
    out, result, _ = swept
    assert sweep(digit_embeddings, out, resume=True) == json.loads(json.dumps(result))
    with pytest.raises(OsmlError, match="--resume"):
        sweep(digit_embeddings, out)


def test_a_sweep_that_is_done_can_be_registered_later(swept, monkeypatch):
    out, result, uri = swept
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    later = sweep(None, out, resume=True, register="digits-later")
    assert later["model_version"] == 1
    assert later["test"] == result["test"]
    assert MlflowClient(uri).get_run(result["run_id"]).info.status == "FINISHED"


def test_no_trial_sees_a_test_item(digit_embeddings, ray_of_module):
    """Neither a test item of a known class nor anything of an unknown class is in what trials receive."""
    job = prepare(digit_embeddings, settings_of(QUICK | {"folds": 4}), split=SPLIT)
    items = open_items(digit_embeddings)
    given = set(job.data.items.fingerprints().tolist())
    assert set(job.data.items.labels) == {*SPLIT.known, *SPLIT.pseudo_unknown}
    assert job.data.items.roles is None
    used = {f for fold in job.data.folds for of in vars(fold.roles).values() for f in job.data.items.fingerprints()[of]}
    assert used == given
    tested = items.select(
        test_indices(items, SPLIT.known, SPLIT.pseudo_unknown, seen=np.array(sorted(given), np.uint64))
    )
    assert not given & set(tested.fingerprints().tolist())
    assert len(given) + len(tested) == len(items)
    assert not hasattr(job.data.folds[0].roles, "test")


def test_trials_that_fail_are_named_and_the_rest_goes_on(ray_of_module, digit_embeddings, store, tmp_path):
    space = {"loss": {"name": "ArcFaceLoss", "scale": {"choice": [16, 1e39]}}}
    result = sweep(digit_embeddings, tmp_path / "out", split=SPLIT, config=settings(space=space, trials=6))
    assert result["trials"] == 6
    assert 0 < result["failed"] < 6
    assert all("loss is" in error for error in result["failures"].values())
    nested = runs_of(store, result["run_id"])
    assert sorted(r.info.status for r in nested) == ["FAILED"] * result["failed"] + ["FINISHED"] * result["finished"]


def test_a_sweep_in_which_all_fail_says_why(ray_of_module, digit_embeddings, store, tmp_path):
    space = {"loss": {"name": "ArcFaceLoss", "scale": {"uniform": [1e39, 1e40]}}}
    with pytest.raises(OsmlError, match="none of 2 trials came through; the first failed with: the loss is"):
        sweep(digit_embeddings, tmp_path / "out", split=SPLIT, config=settings(space=space, trials=2))


def test_random_search_is_the_same_for_the_same_seed(ray_of_module, digit_embeddings, store, tmp_path):
    one, two = (
        sweep(digit_embeddings, tmp_path / f"out{i}", split=SPLIT, config=settings(trials=2), seed=5) for i in (1, 2)
    )
    assert one["best"]["params"] == two["best"]["params"]
    timed = ("seconds", "system/")
    for part in ("validation", "test"):
        a, b = ({k: v for k, v in r[part].items() if not any(t in k for t in timed)} for r in (one, two))
        assert a == b


def test_pbt_moves_what_it_may(ray_of_module, digit_embeddings, store, tmp_path):
    config = settings(search="pbt", trials=4, grace=2)
    config["config"] = config["config"] | {"training": {"epochs": 8, "batch_size": 64}}
    config["space"] = config["space"] | {"optimizer": {"lr": {"loguniform": [1e-5, 1e-1]}}}
    result = sweep(digit_embeddings, tmp_path / "out", split=SPLIT, config=config)
    assert (result["trials"], result["failed"]) == (4, 0)
    params = {}
    lines = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
    for line in lines:
        entry = json.loads(line)
        params.setdefault(entry["id"], set()).add(json.dumps(entry["params"], sort_keys=True))
    assert max(len(seen) for seen in params.values()) > 1  # at least one trial took over another's and moved on
    best, entries = result["best"], [json.loads(line) for line in lines]
    assert best["params"] in [
        e["params"]
        for e in entries
        if "figures" in e and e["id"] == best["id"] and e["figures"]["epoch"] == best["epoch"]
    ]
    assert {r.info.status for r in runs_of(store, result["run_id"])} == {"FINISHED"}


def test_the_threshold_as_one_more_dimension(ray_of_module, digit_embeddings, store, tmp_path):
    space = {"detector": "centroid", "threshold": {"name": "fixed", "tau": {"uniform": [0.2, 1.2]}}}
    config = settings(space=space, levels=1, objective="macro_f1", trials=3)
    result = sweep(digit_embeddings, tmp_path / "out", split=SPLIT, config=config)
    assert set(result["best"]["params"]) == {"threshold.tau"}
    assert load_bundle(tmp_path / "out" / "best").threshold.tau == pytest.approx(
        result["best"]["params"]["threshold.tau"]
    )


def test_a_split_without_pseudo_unknown_classes_is_swept_by_leaving_classes_out(
    ray_of_module, digit_embeddings, store, tmp_path
):
    split = Split(("0", "1", "2", "3", "4", "5"), (), ("6", "7"))
    result = sweep(digit_embeddings, tmp_path / "out", split=split, config=settings(trials=1, folds=3))
    assert load_bundle(tmp_path / "out" / "best").class_names == list(split.known)  # trained again, on all of them
    assert result["test"]["n_unknown_items"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space": {"loss": {"name": "ArcFaceLoss", "margn": {"uniform": [5, 40]}}}}, "margin"),
        ({"objective": "ocsr"}, "oscr"),
        ({"trails": 3}, "trials"),
        ({"resources": {"cpu": 1000}}, "1000 CPU"),
        ({"search": "pbt", "space": {"model": {"embedding_size": {"choice": [8, 16]}}}}, "pbt"),
        ({"winner": "as-is", "folds": 0}, "folds"),
        ({"config": "abc"}, "config"),
        ({"config": {"training": {"patience": 3}}}, "patience"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(
    changes, said, ray_of_module, digit_embeddings, store, tmp_path
):
    with pytest.raises(OsmlError, match=said) as raised:
        sweep(digit_embeddings, tmp_path / "out", split=SPLIT, config=settings(**changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_tracking_server_that_is_away_is_said_within_ten_seconds(digit_embeddings, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(OsmlError, match="127.0.0.1:9"):
        sweep(digit_embeddings, tmp_path / "out", split=SPLIT, config=QUICK)
    assert time.monotonic() - began < 10
    assert not (tmp_path / "out").exists()


def test_a_store_that_goes_away_costs_a_warning_and_a_resume_stores_the_rest(
    ray_of_module, digit_embeddings, store, tmp_path, monkeypatch
):
    from osml_plugin.tune import runs as runs_module

    out = tmp_path / "out"
    with monkeypatch.context() as away:
        calls = []

        def fail_from_the_third(*args, **kwargs):
            calls.append(1)
            if len(calls) > 2:
                raise OsmlError("the store does not answer")
            return real(*args, **kwargs)

        real = runs_module.mlflow_calls
        away.setattr(runs_module, "mlflow_calls", fail_from_the_third)
        result = sweep(digit_embeddings, out, split=SPLIT, config=settings(trials=2))
    assert result["stored"] is False
    assert result["finished"] == 2
    assert load_bundle(out / "best").class_names == list(SPLIT.known)
    again = sweep(None, out, resume=True)
    assert again["stored"] is True
    assert again["test"] == json.loads(json.dumps(result["test"]))
    client = MlflowClient(store)
    assert client.get_run(again["run_id"]).info.status == "FINISHED"
    nested = runs_of(store, again["run_id"])
    assert [r.info.status for r in nested] == ["FINISHED"] * 2
    for run in nested:
        assert [m.step for m in client.get_metric_history(run.info.run_id, "oscr")] == [1, 2, 3]


def test_a_resume_with_other_settings_is_refused(swept):
    out, _, _ = swept
    with pytest.raises(OsmlError, match="trials = 3, not 50"):
        sweep(None, out, resume=True, config=settings(search="optuna"), trials=50)


def test_two_processes_on_one_sweep(swept):
    from osml_plugin.tune.asked import sweep_lock

    out, _, _ = swept
    with sweep_lock(out), pytest.raises(OsmlError, match="another process"):
        sweep(None, out, resume=True)


@pytest.mark.parametrize(
    ("overrides", "alpha"), [(["threshold=quantile"], 0.1), (["threshold={name: conformal, alpha: 0.2}"], None)]
)
def test_the_rate_of_the_winner_is_the_one_that_was_asked_for(
    overrides, alpha, ray_of_module, digit_embeddings, store, tmp_path
):
    from osml_plugin import train

    out = tmp_path / "out"
    sweep(digit_embeddings, out, split=SPLIT, config=settings(trials=1), overrides=overrides, alpha=alpha)
    assert load_bundle(out / "best").alpha == pytest.approx(alpha or 0.2)
    again = train(digit_embeddings, tmp_path / "again", split=SPLIT, config=out / "best.yaml", progress=False)
    assert again.recognizer.threshold.tau == pytest.approx(load_bundle(out / "best").threshold.tau, rel=1e-3)
