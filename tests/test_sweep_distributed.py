"""Trials that two processes train together: the same result as one, and whole sweeps of them through Ray Train."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from sweeps import SPLIT, ray_here, runs_of, same, settings
from torch import Tensor, distributed, multiprocessing, nn
from torch.utils.data import BatchSampler

from osml_plugin import OsmlError, evaluate
from osml_plugin.config import Config, make_config
from osml_plugin.data import open_items, readable_items
from osml_plugin.losses.rotation import RotationTask
from osml_plugin.tune.distributed import Parts, PartTrainer
from osml_plugin.tune.folds import SweepData, sweep_data
from osml_plugin.tune.sweeping import sweep
from osml_plugin.tune.trial import fold_runs, go_on, state_of

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
    "rotation": {
        "loss": {"name": "MarginOneVsRestLoss", "scale": 8},
        "model": BASE["model"] | {"trunk": f"{__name__}:smooth_trunk"},
        "training": BASE["training"] | {"rotation": 0.5, "batch_size": 32},
        "data": {"image_size": 8, "channels": 1, "augment": "none"},
    },
}


def smooth_trunk() -> nn.Module:
    """Without batch normalisation, in which parts of a batch are no whole, and without kinks."""
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten())


def turned_by_content(images: Tensor) -> tuple[Tensor, Tensor]:
    """As many quarters for an image in one process as in the other."""
    quarters = (images.flatten(1)[:, 20:40].sum(dim=1) * 64).round().long() % 4
    turned = [image.rot90(int(quarter), (1, 2)) for image, quarter in zip(images, quarters, strict=True)]
    return torch.stack(turned), quarters


def config_of(name: str) -> Config:
    return make_config(BASE | TRAININGS[name])


@pytest.fixture(scope="module")
def data(digit_embeddings, digits_folder) -> dict[str, SweepData]:
    vectors = sweep_data(open_items(digit_embeddings), None, SPLIT, Config(), 1)
    images = sweep_data(*readable_items(open_items(digits_folder), False, False), SPLIT, Config(), 1)
    return dict.fromkeys(TRAININGS, vectors) | {"rotation": images}


def _two_epochs(rank: int, data: dict[str, SweepData], folder: Path) -> None:
    """What one of two processes does."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    RotationTask.turned = staticmethod(turned_by_content)
    for name in TRAININGS:
        runs = fold_runs(config_of(name), data[name], trainer_class=PartTrainer)
        losses = [runs[0].advance(), runs[0].advance()]
        torch.save((state_of(runs), losses), folder / f"{name}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> Path:
    """The folder of what two processes came to."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(_two_epochs, args=(data, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_come_to_what_one_comes_to(name, two, data, monkeypatch):
    monkeypatch.setattr(RotationTask, "turned", staticmethod(turned_by_content))
    state, losses = torch.load(two / f"{name}-0.pt")
    runs = fold_runs(config_of(name), data[name])
    assert losses == pytest.approx([runs[0].advance(), runs[0].advance()], rel=1e-4)
    for part, expected in state_of(runs)["folds"][0].items():
        if part.startswith(("models.", "loss_funcs.")):
            assert list(state["folds"][0][part]) == list(expected)  # plain names
            for key, value in expected.items():
                if "memory" in key:
                    continue  # each process remembers its own part first
                torch.testing.assert_close(state["folds"][0][part][key], value, atol=1e-4, rtol=1e-4)
    go_on(runs, state)  # one process goes on from the state of two
    assert runs[0].advance() < losses[0]


@pytest.mark.parametrize("name", TRAININGS)
def test_the_copies_stay_the_same(name, two):
    (one, _), (other, _) = (torch.load(two / f"{name}-{rank}.pt") for rank in (0, 1))
    for part in ("models.trunk", "models.embedder", "loss_funcs.rotation_loss"):
        for key, value in one["folds"][0].get(part, {}).items():
            torch.testing.assert_close(other["folds"][0][part][key], value, atol=0, rtol=0)


def _workers() -> list[psutil.Process]:
    """Ray Train's processes below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(name in " ".join(process.cmdline()) for name in ("RayTrainWorker", "TrainController", "Desk")):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def ray_of_module():
    with ray_here(cpus=3):
        yield


@pytest.mark.long
def test_a_sweep_of_two_workers_a_trial(ray_of_module, digit_embeddings, store, tmp_path):
    """To the end: one trial, a worker of which is killed, goes on from its checkpoint; the other fails, and is named."""
    space = {"loss": {"name": "ArcFaceLoss", "scale": {"choice": [16, 1e39]}}}
    config = settings(space=space, trials=2, resources={"workers": 2}, evaluate_every=1)
    config["config"] = BASE | {"training": {"epochs": 8, "batch_size": 64}}
    journal, killed = tmp_path / "out" / "trials.jsonl", []

    def kill_when_under_way() -> None:
        while not (journal.exists() and '"epoch": 2' in journal.read_text()):
            time.sleep(0.05)
        killed.append(next(p for p in _workers() if "RayTrainWorker" in " ".join(p.cmdline())))
        killed[0].kill()

    threading.Thread(target=kill_when_under_way, daemon=True).start()
    result = sweep(digit_embeddings, tmp_path / "out", split=SPLIT, config=config, seed=0)
    assert killed
    assert (result["trials"], result["finished"], result["failed"]) == (2, 1, 1)
    assert all("the loss is" in reason for reason in result["failures"].values())
    assert sorted(r.info.status for r in runs_of(store, result["run_id"])) == ["FAILED", "FINISHED"]
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    epochs = [e["figures"]["epoch"] for e in entries if "figures" in e]
    assert epochs.count(1) == 1 and max(epochs) == 8  # from its checkpoint, not from the beginning
    starts = [e["id"] for e in entries if e["status"] == "running" and "figures" not in e and not e.get("error")]
    assert (len(starts), len(set(starts))) == (3, 2)
    best = tmp_path / "out" / "best"
    evaluation, _ = evaluate(best, digit_embeddings, split=SPLIT)
    assert same(evaluation.to_dict(), result["test"])
    assert 0.5 < result["validation"]["oscr"] <= 1
    deadline = time.monotonic() + 30
    while _workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _workers()


def test_more_workers_than_there_is_room_for(ray_of_module, digit_embeddings, store, tmp_path):
    with pytest.raises(OsmlError, match="a trial wants 4 CPU, and there are 3 on this machine: lower .*workers"):
        sweep(digit_embeddings, tmp_path / "out", split=SPLIT, config=settings(resources={"workers": 4}))


def test_a_batch_is_shared_out_evenly():
    batches = BatchSampler(range(21), 7, drop_last=True)
    parts = [list(Parts(batches, rank, 2)) for rank in range(2)]
    assert parts == [[[0, 2, 4], [7, 9, 11], [14, 16, 18]], [[1, 3, 5], [8, 10, 12], [15, 17, 19]]]
    with pytest.raises(OsmlError, match="a batch of 7 items cannot be shared by 8 workers"):
        Parts(batches, 0, 8)
