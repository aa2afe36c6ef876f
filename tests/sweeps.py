"""What the tests of sweeps share: small settings, data, a store, and Ray in a folder of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from mlflow import MlflowClient

from osml_plugin.data import Split

SPLIT = Split(("0", "1", "2", "3"), ("4", "5"), ("6", "7", "8", "9"))
QUICK = {
    "trials": 3,
    "search": "random",
    "scheduler": "none",
    "config": {"model": {"embedder": "linear", "embedding_size": 16}, "training": {"epochs": 3, "batch_size": 64}},
    "space": {"loss": {"name": "ArcFaceLoss", "margin": {"uniform": [5, 40]}, "scale": {"loguniform": [8, 32]}}},
}


def settings(**changes) -> dict:
    return QUICK | changes


def same(a: dict, b: dict) -> bool:
    """Equal but for the last digits: JSON keeps them, other numbers of threads do not."""
    return json.dumps(a, sort_keys=True, default=float) == json.dumps(b, sort_keys=True, default=float)


def runs_of(uri: str, parent: str) -> list:
    client = MlflowClient(uri)
    experiment = client.get_run(parent).info.experiment_id
    return client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")


@contextmanager
def ray_here(cpus: int = 2) -> Iterator[None]:
    """A cluster of this process's own, ended with everything that it started."""
    folder = tempfile.mkdtemp(prefix="osml")  # short: sockets lie in it
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
