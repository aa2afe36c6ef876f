"""The bundle of the best trial."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from ray import tune

from osml_plugin.bundle import save_bundle
from osml_plugin.config import Config, make_config
from osml_plugin.data import Fractions, Split
from osml_plugin.errors import OsmlError
from osml_plugin.pipeline import assemble, seen_items, train
from osml_plugin.selection import Candidate

from .folds import SweepData
from .results import Trial
from .trial import Plan, is_there, load_run, params_of


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
            if not is_there(checkpoint):  # of a sweep that was killed: replaced after the last snapshot
                continue
            before = kept.get(metrics["trial_id"])
            if before is None or metrics[plan.settings.objective] > before[1][plan.settings.objective]:
                kept[metrics["trial_id"]] = (checkpoint, metrics)
    left = [trial for trial in ranked if trial.id in kept]
    if not left:
        raise OsmlError("no trial left a checkpoint to make a recogniser of: look at the failed trials")
    # Of those that are kept: a trial of pbt may have left its best behind.
    trial = max(left, key=lambda t: kept[t.id][1][plan.settings.objective])
    checkpoint, metrics = kept[trial.id]
    trial = replace(trial, params=dict(params_of(metrics["config"])))  # pbt may have moved on since
    figures = {name: metrics[name] for name in metrics["reported"]}
    config = _config_of(plan.space.config(trial.params), metrics["chosen"])
    return Winner(trial, metrics["epoch"], figures, metrics["chosen"], config, checkpoint)


def _config_of(config: Config, chosen: dict[str, Any]) -> Config:
    """The trial's configuration with what was chosen in it; the rate of the threshold is `alpha`."""
    values = config.model_dump(mode="json", exclude_none=True)
    threshold = dict(chosen["threshold"]["params"])
    if (name := chosen["threshold"]["name"]) == "conformal":
        values["alpha"] = threshold.pop("alpha")
    elif name == "quantile":
        values["alpha"] = 1 - threshold.pop("accepted")
    values["threshold"] = {"name": name, **threshold}
    values["detector"] = {"name": chosen["detector"], **chosen["params"]}
    values["model"]["output"] = chosen["output"]
    if config.data.fractions == Fractions():
        del values["data"]["fractions"]  # where they are not said, calibration gets what the rate needs
    return make_config(values)


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
        of_images = None if data.survey is None else data.survey.signatures
        recognizer = assemble(
            run,
            run.embed(),
            [best],
            split=split,
            items=data.items,
            seen=seen_items(data.items, of_images, data.folds[0].roles, data.sets),
            data_fingerprint=data_fingerprint,
        )
        save_bundle(recognizer, bundle)
    else:
        train(source, bundle, split=split, config=winner.config, skip_bad=skip_bad, overwrite=True, progress=progress)


def write_config(config: Config, file: Path) -> None:
    """As YAML that `osml train -c` takes."""
    values = config.model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
