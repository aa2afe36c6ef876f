"""Sweeps whose driver or machine dies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from mlflow import MlflowClient
from ray import tune
from sweeps import SPLIT, runs_of, settings

from osml_plugin.tune.sweeping import sweep
from osml_plugin.tune.trial import STATE, is_there, last_checkpoint


@pytest.mark.long
def test_a_driver_that_is_killed_is_resumed(digit_embeddings, store, tmp_path):
    """SIGKILL in mid-sweep: --resume runs exactly what is left, each trial from its checkpoint, each with one run."""
    out = tmp_path / "out"
    config = settings(trials=5, concurrent=2)
    config["config"] = config["config"] | {"training": {"epochs": 30, "batch_size": 32}}
    config["evaluate_every"] = 1
    (tmp_path / "sweep.yaml").write_text(json.dumps(config))
    (tmp_path / "split.json").write_text(json.dumps(SPLIT.to_dict()))
    command = [sys.executable, "-m", "osml_plugin.cli", "tune", "--out", str(out), "--json"]
    start = [
        "--data",
        str(digit_embeddings),
        "--split",
        str(tmp_path / "split.json"),
        "-c",
        str(tmp_path / "sweep.yaml"),
    ]
    driver = subprocess.Popen([*command, *start], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path)
    journal = out / "trials.jsonl"

    def entries() -> list[dict]:
        return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []

    def under_way() -> set[str]:
        """Trials with a checkpoint that are far from their end, once another has ended."""
        ended = {e["id"] for e in entries() if e["status"] == "finished"}
        reached = {e["id"]: e["figures"]["epoch"] for e in entries() if "figures" in e}
        return {id_ for id_, epoch in reached.items() if 4 <= epoch <= 12 and id_ not in ended} if ended else set()

    try:
        deadline = time.monotonic() + 120
        while not (busy := under_way()):
            assert driver.poll() is None, driver.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(3)  # a snapshot
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    before = entries()
    done = {e["id"] for e in before if e["status"] == "finished"}
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert resumed.returncode == 0, resumed.stderr
    result = json.loads(resumed.stdout)
    assert (result["trials"], result["finished"]) == (5, 5), result["failures"]
    after = entries()[len(before) :]
    assert not done & {e["id"] for e in after}
    went_on = [e["figures"]["epoch"] for e in after if "figures" in e and e["id"] in busy - done]
    assert went_on and min(went_on) > 1  # from the checkpoint, not from the beginning
    nested = runs_of(store, result["run_id"])
    assert len(nested) == len({r.data.tags["osml.trial"] for r in nested}) == 5
    assert {r.info.status for r in nested} == {"FINISHED"}
    client = MlflowClient(store)
    for run in nested:
        assert [m.step for m in client.get_metric_history(run.info.run_id, "oscr")] == list(range(1, 31))


@pytest.mark.parametrize(
    ("there", "found"),
    [((2, 3, 4), 2), ((1, 3, 4), 3), ((1, 10), 10), ((1,), None), ((), None)],
)
def test_a_checkpoint_that_was_deleted_after_the_last_snapshot_is_the_next_one(there, found, tmp_path, monkeypatch):
    for number in there:
        (tmp_path / f"checkpoint_{number:06d}").mkdir()
        (tmp_path / f"checkpoint_{number:06d}" / STATE).touch()
    (tmp_path / "checkpoint_000002").mkdir(exist_ok=True)  # one that is just being deleted may be there, and empty
    named = tune.Checkpoint.from_directory(tmp_path / "checkpoint_000002")
    monkeypatch.setattr(tune, "get_checkpoint", lambda: named)
    assert is_there(named) == (2 in there)
    checkpoint = last_checkpoint()
    assert (checkpoint and checkpoint.path) == (found and str(tmp_path / f"checkpoint_{found:06d}"))


def test_a_trial_that_begins_has_no_checkpoint(monkeypatch):
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    assert last_checkpoint() is None


def test_a_node_that_is_killed_costs_no_trial(digit_embeddings, store, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    killed = []

    def kill_when_under_way() -> None:
        journal = tmp_path / "out" / "trials.jsonl"
        while True:
            lines = journal.read_text().splitlines() if journal.exists() else []
            busy = {json.loads(line)["id"] for line in lines if "figures" in line}
            if len(busy) >= 3:  # a trial is under way on every node
                break
            time.sleep(0.1)
        cluster.remove_node(nodes[0], allow_graceful=False)
        killed.append(nodes[0])

    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        config = settings(trials=5, address=cluster.address, evaluate_every=1)
        config["config"] = config["config"] | {"training": {"epochs": 12, "batch_size": 32}}
        killer = threading.Thread(target=kill_when_under_way, daemon=True)
        killer.start()
        result = sweep(digit_embeddings, tmp_path / "out", split=SPLIT, config=config)
        assert killed
        assert (result["trials"], result["finished"], result["failed"]) == (5, 5, 0)
        assert {r.info.status for r in runs_of(store, result["run_id"])} == {"FINISHED"}
        entries = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
        starts = Counter(e["id"] for e in entries if e["status"] == "running" and "figures" not in e)
        assert max(starts.values()) > 1  # the trial of that node was taken up again
        for id_, n in starts.items():
            epochs = [e["figures"]["epoch"] for e in entries if e["id"] == id_ and "figures" in e]
            assert max(epochs) == 12 and (n == 1 or epochs.count(1) == 1)  # from its checkpoint
    finally:
        ray.shutdown()
        cluster.shutdown()
