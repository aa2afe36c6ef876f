"""The bundle of the best trial."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from ray import tune

from osml_plugin.bundle import save_bundle
from osml_plugin.config import Config
from osml_plugin.data import Split
from osml_plugin.errors import OsmlError
from osml_plugin.pipeline import assemble, train
from osml_plugin.selection import Candidate

from .folds import SweepData
from .results import Trial
from .trial import Plan, load_run, params_of, with_part


@dataclass(frozen=True)
class Winner:
    """The best trial, with what its inner search chose at its best epoch."""

    trial: Trial
    epoch: int
    figures: dict[str, float]
    chosen: dict[str, Any]
    config: Config
    """Of a training that makes this recognizer: detector, threshold and output of the model are named."""
    checkpoint: tune.Checkpoint


def find_winner(ranked: list[Trial], results: tune.ResultGrid, plan: Plan) -> Winner:
    """The best of the trials whose checkpoint is still there, `ranked` from the best on."""
    kept = {}
    for result in results:
        for checkpoint, metrics in result.best_checkpoints or []:
            before = kept.get(metrics["trial_id"])
            if before is None or metrics[plan.settings.objective] > before[1][plan.settings.objective]:
                kept[metrics["trial_id"]] = (checkpoint, metrics)
    for trial in ranked:
        if trial.id in kept:
            checkpoint, metrics = kept[trial.id]
            chosen = metrics["chosen"]
            trial = replace(trial, params=dict(params_of(metrics["config"])))  # pbt may have moved on since
            config = with_part(plan.space.config(trial.params), "detector", chosen["detector"], chosen["params"])
            threshold = chosen["threshold"]
            config = with_part(config, "threshold", threshold["name"], _given(threshold["params"], config))
            config = config.model_copy(update={"model": config.model.model_copy(update={"output": chosen["output"]})})
            figures = {name: metrics[name] for name in metrics["reported"]}
            return Winner(trial, metrics["epoch"], figures, chosen, config, checkpoint)
    raise OsmlError("no trial left a checkpoint to make a recogniser of: look at the failed trials")


def _given(params: dict[str, Any], config: Config) -> dict[str, Any]:
    """A threshold's parameters without those that `alpha` stands for already."""
    return {k: v for k, v in params.items() if not (k == "alpha" and v == config.alpha)}


def write_winner(
    winner: Winner,
    bundle: Path,
    *,
    source: str | Path,
    split: Split,
    data: SweepData,
    plan: Plan,
    data_fingerprint: str,
    skip_bad: bool,
    progress: bool,
) -> None:
    """Write its bundle: the trial's own model, or one that is trained again on the split; see `SweepConfig.winner`."""
    how = plan.settings.winner
    if how == "as-is" or (how == "auto" and data.own):
        run = load_run(winner.config, data, winner.checkpoint)
        chosen = winner.chosen
        best = Candidate(
            chosen["output"], chosen["detector"], chosen["params"], winner.figures["oscr"], winner.figures["auroc"]
        )
        recognizer = assemble(
            run, run.embed(), [best], split=split, items=data.items, data_fingerprint=data_fingerprint
        )
        save_bundle(recognizer, bundle)
    else:
        train(source, bundle, split=split, config=winner.config, skip_bad=skip_bad, overwrite=True, progress=progress)


def write_config(config: Config, file: Path) -> None:
    """As YAML that `osml train -c` takes."""
    values = config.model_dump(mode="json", exclude_none=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
