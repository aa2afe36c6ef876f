"""One trial: train on every fold side by side, embed, search detectors and thresholds, report, write a checkpoint."""

from __future__ import annotations

import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyarrow.fs import FileSelector
from ray import tune

from osml_plugin import thresholds
from osml_plugin.config import Config
from osml_plugin.errors import OsmlError
from osml_plugin.pipeline import rate_of, tried
from osml_plugin.training import Trainer
from osml_plugin.training_run import TrainingRun

from .folds import SweepData
from .judging import Embedded, Rule, judge
from .settings import SweepConfig
from .space import Space

STATE = "state.pt"


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep have in common beside the data."""

    settings: SweepConfig
    space: Space
    epochs: int
    """Of a trial whose parameters do not say otherwise."""

    @property
    def longest(self) -> int:
        """Epochs of the longest trial."""
        searched = [d for d in self.space.dimensions if d.name == "training.epochs"]
        ends = [v for d in searched for v in (d.choices if d.kind == "choice" else (d.high,))]
        return max([self.epochs_of({"training.epochs": v}) for v in ends], default=self.epochs)

    def epochs_of(self, params: Mapping[str, Any]) -> int:
        """Epochs of the trial with these parameters."""
        given = params.get("training.epochs", "auto")
        return self.epochs if given == "auto" else int(given)

    @property
    def grace(self) -> int:
        """Epochs before a trial may be stopped."""
        grace = self.settings.grace
        return max(1, round(self.longest / 4)) if grace == "auto" else min(grace, max(self.longest, 1))

    @property
    def evaluate_every(self) -> int:
        every = self.settings.evaluate_every
        return self.grace if every == "auto" else every

    def detectors(self, config: Config) -> list[Rule]:
        """The detectors that a trial tries on its embeddings."""
        return self.space.inner_detectors or tried(config)

    def rules(self, config: Config) -> list[Rule]:
        """The threshold rules that a trial tries, with all their parameters."""
        named = self.space.inner_thresholds or [(config.threshold.name, config.threshold.args)]
        return [(name, thresholds.create(name, **rate_of(name, config.alpha) | args).params) for name, args in named]


DRAWN = "drawn"
"""Under which a trial's parameters lie where they were all drawn beforehand."""


def params_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A trial's parameters, of what Ray Tune hands it."""
    return config.get(DRAWN, config)


def run_trial(config: Mapping[str, Any], data: SweepData, plan: Plan) -> None:
    """What Ray Tune runs. What a configuration cannot do (a loss that diverges, arguments that are refused) ends the
    trial as failed, with the reason reported; what befalls the machine is left to Ray, which takes the trial up again.
    """
    try:
        _run(params_of(config), data, plan)
    except OsmlError as error:
        report_failure(error, plan)


def _run(params: Mapping[str, Any], data: SweepData, plan: Plan) -> None:
    config = plan.space.config(params)
    torch.set_num_threads(max(1, int(plan.settings.resources.cpu)))
    runs = fold_runs(config, data)
    if checkpoint := last_checkpoint():
        go_on(runs, _load(checkpoint))
    for loss, seconds in advanced(runs, plan):
        report(evaluated(runs, config, plan, loss, seconds), lambda file: torch.save(state_of(runs), file))


def advanced(runs: list[TrainingRun], plan: Plan) -> Iterator[tuple[float, float]]:
    """Train all folds side by side to their last epoch; stops wherever an evaluation is due, with the last epoch's mean
    loss and the seconds since."""
    n_epochs, since = runs[0].n_epochs, time.perf_counter()
    while True:
        loss = 0.0  # where nothing is trained: embeddings are taken as they are
        if runs[0].epoch < n_epochs:
            loss = sum(run.advance() for run in runs) / len(runs)
            if runs[0].epoch % plan.evaluate_every and runs[0].epoch < n_epochs:
                continue
        yield loss, time.perf_counter() - since
        if runs[0].epoch >= n_epochs:
            return
        since = time.perf_counter()


def evaluated(runs: list[TrainingRun], config: Config, plan: Plan, loss: float, train_seconds: float) -> dict[str, Any]:
    """What a trial reports: its figures, what was chosen, and the curve. OsmlError where the objective is no number."""
    since = time.perf_counter()
    folds = [Embedded(run.embed(), run.data.embedded_labels) for run in runs]
    embedded, since = time.perf_counter() - since, time.perf_counter()
    objective = plan.settings.objective
    judged = judge(folds, plan.detectors(config), plan.rules(config), objective=objective, seed=config.seed)
    if not math.isfinite(judged.figures[objective]):
        raise OsmlError(f"{objective} is {judged.figures[objective]} in epoch {runs[0].epoch}")
    found = time.perf_counter() - since
    best = judged.best
    figures: dict[str, Any] = judged.figures | {
        "epoch": runs[0].epoch,
        "loss": loss,
        "train_seconds": train_seconds,
        "embed_seconds": embedded,
        "judge_seconds": found,
        "combinations": judged.n_combinations,
        **_system_figures(),
    }
    threshold = {"name": judged.threshold[0], "params": judged.threshold[1]}
    chosen = {"output": best.output, "detector": best.detector, "params": best.params, "threshold": threshold}
    return figures | {"reported": list(figures), "chosen": chosen, "curve": judged.curve}


def report(figures: dict[str, Any], write_state: Callable[[Path], Any]) -> None:
    """Report to Ray Tune, with the checkpoint whose file `write_state` writes."""
    with tempfile.TemporaryDirectory() as folder:
        write_state(Path(folder, STATE))
        tune.report(figures, checkpoint=tune.Checkpoint.from_directory(folder))


def report_failure(error: OsmlError, plan: Plan) -> None:
    """The last report of a trial whose configuration cannot do."""
    checkpoint = last_checkpoint()
    epoch = _load(checkpoint)["epoch"] if checkpoint else 0
    tune.report({"epoch": epoch, plan.settings.objective: 0.0, "error": " ".join(str(error).split())})


def last_checkpoint() -> tune.Checkpoint | None:
    """From which the trial goes on.

    Where a sweep was killed, its last snapshot may name one that has been deleted since. Ray deletes a checkpoint only
    after the next one was reported, so that the next that is there is the right one.
    """
    if (named := tune.get_checkpoint()) is None:
        return None
    folder, name = named.path.rsplit("/", 1)
    beside = named.filesystem.get_file_info(FileSelector(folder, allow_not_found=True))
    kind = name.rstrip("0123456789")
    later = sorted(file.base_name for file in beside if file.base_name.startswith(kind) and file.base_name >= name)
    found = (tune.Checkpoint(f"{folder}/{other}", named.filesystem) for other in later)
    return next(filter(is_there, found), None)


def is_there(checkpoint: tune.Checkpoint) -> bool:
    """Whether its file is still in the storage."""
    return checkpoint.filesystem.get_file_info(f"{checkpoint.path}/{STATE}").is_file


def state_of(runs: list[TrainingRun]) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {"epoch": runs[0].epoch, "folds": [run.state() for run in runs]}


def go_on(runs: list[TrainingRun], state: Mapping[str, Any]) -> None:
    """From what a checkpoint held."""
    for run, saved in zip(runs, state["folds"], strict=True):
        run.load_state(saved)


def fold_runs(
    config: Config, data: SweepData, *, device: torch.device | str | None = None, trainer_class: type[Trainer] = Trainer
) -> list[TrainingRun]:
    made = {"device": device, "trainer_class": trainer_class, "progress": False}
    return [TrainingRun(data.of_fold(fold, config), config, **made) for fold in data.folds]


def load_run(config: Config, data: SweepData, checkpoint: tune.Checkpoint) -> TrainingRun:
    """The first fold's run as a checkpoint of a trial holds it."""
    run = TrainingRun(data.of_fold(data.folds[0], config), config, progress=False)
    run.load_state(_load(checkpoint)["folds"][0])
    return run


def with_part(config: Config, field: str, name: str, params: Mapping[str, Any]) -> Config:
    """The configuration with another detector or threshold."""
    part = type(config.threshold)(name=name, **params)
    return config.model_copy(update={field: part})


def _load(checkpoint: tune.Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder, STATE), map_location="cpu", weights_only=True)


def _system_figures() -> dict[str, float]:
    """The trial's own process, under the prefix by which MLflow tells such figures."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"system/process_memory_megabytes": peak / (2**20 if sys.platform == "darwin" else 2**10)}
    figures["system/process_cpu_seconds"] = sum(os.times()[:2])
    if torch.cuda.is_available():
        figures["system/gpu_memory_megabytes"] = torch.cuda.max_memory_allocated() / 2**20
    return figures


def trainable(data: SweepData, plan: Plan) -> Any:
    """What a `tune.Tuner` takes: `run_trial` with its data in the object store, and the resources of a trial."""
    resources = plan.settings.resources
    if resources.workers > 1:
        from .distributed import trainable_together  # which builds on this module

        return trainable_together(data, plan)
    bundle = {"CPU": resources.cpu} | ({"GPU": resources.gpu} if resources.gpu else {})
    return tune.with_resources(tune.with_parameters(run_trial, data=data, plan=plan), bundle)
