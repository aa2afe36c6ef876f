"""Trials that two processes train together: the same result as one, and whole sweeps of them through Ray Train."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from osml_plugin.tune.distributed import PartTrainer, Parts
from osml_plugin.tune.folds import SweepData, sweep_data
from osml_plugin.tune.sweep import sweep
from osml_plugin.tune.trial import fold_runs, go_on, state_of
from sweeps import SPLIT, ray_here, runs_of, same, settings
from torch import distributed, multiprocessing
from torch.utils.data import BatchSampler

from osml_plugin import OsmlError, evaluate
from osml_plugin.config import Config, make_config
from osml_plugin.data import open_items

BASE = {"model": {"embedder": "linear", "embedding_size": 16}, "training": {"epochs": 3, "batch_size": 64}}
TRAININGS = {
    "classification": {"loss": "CosFaceLoss"},
    "classification-sgd": {"loss": {"name": "ArcFaceLoss", "scale": 16}, "optimizer": {"name": "SGD", "lr": 0.05}},
    "pairs": {
        "loss": "MultiSimilarityLoss",
        "miner": "MultiSimilarityMiner",
        "sampler": {"name": "MPerClassSampler", "m": 8},
    },
    "memory": {"loss": {"name": "CrossBatchMemory", "loss": "ContrastiveLoss", "memory_size": 128}},
}


def config_of(name: str) -> Config:
    return make_config(BASE | TRAININGS[name], Config)


@pytest.fixture(scope="module")
def data(digit_embeddings) -> SweepData:
    return sweep_data(open_items(digit_embeddings), None, SPLIT, Config(), 1)


def _two_epochs(rank: int, data: SweepData, folder: Path) -> None:
    """One of two processes: after the first epoch it goes on from the state, as a resumed trial does."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for name in TRAININGS:
        state, losses = None, []
        for _ in range(2):
            runs = fold_runs(config_of(name), data, trainer_class=PartTrainer)
            if state:
                go_on(runs, state)
            losses.append(runs[0].advance())
            state = state_of(runs)
        torch.save((state, losses), folder / f"{name}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> Path:
    """The folder of what two processes came to."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(_two_epochs, args=(data, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_come_to_what_one_comes_to(name, two, data):
    state, losses = torch.load(two / f"{name}-0.pt")
    runs = fold_runs(config_of(name), data)
    assert losses == pytest.approx([runs[0].advance(), runs[0].advance()], rel=1e-4)
    for part, expected in state_of(runs)["folds"][0].items():
        if part.startswith(("models.", "loss_funcs.")):
            assert list(state["folds"][0][part]) == list(expected)  # plain names
            for key, value in expected.items():
                torch.testing.assert_close(state["folds"][0][part][key], value, atol=1e-4, rtol=1e-4)
    go_on(runs, state)  # one process goes on from the state of two
    assert runs[0].advance() < losses[0]


@pytest.mark.parametrize("name", TRAININGS)
def test_the_copies_stay_the_same(name, two):
    (one, _), (other, _) = (torch.load(two / f"{name}-{rank}.pt") for rank in (0, 1))
    for part in ("models.trunk", "models.embedder"):
        for key, value in one["folds"][0][part].items():
            torch.testing.assert_close(other["folds"][0][part][key], value, atol=0, rtol=0)
