"""A sweep that is ready to run: its settings, its data wherever they lie, the folds, and the plan of its trials."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osml_plugin.config import Config
from osml_plugin.data import Items, Split, check_pictures, open_items, readable_items, tell_shared_files
from osml_plugin.errors import OsmlError
from osml_plugin.network import epochs
from osml_plugin.pipeline import check_choices, sets_of, split_of, threshold_of
from osml_plugin.schema import apply_override, checked, read_yaml
from osml_plugin.training_data import bit_depth_of

from .asked import Asked
from .folds import SweepData, sweep_data
from .settings import SweepConfig
from .space import Space
from .trial import Plan, with_part


@dataclass(frozen=True)
class Job:
    """A sweep that is ready to run: `make_tuner(job.data, job.plan, storage=…)` gives its Tuner."""

    source: str
    split: Split
    data: SweepData
    """What trials receive."""
    plan: Plan
    items: Items
    """All of the source, the test's too: for the driver alone, after the winner is found."""
    fingerprint: str
    """Of these."""
    skip_bad: bool


def settings_of(
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Iterable[str] = (),
    loss: str | None = None,
    trials: int | None = None,
    seed: int | None = None,
    alpha: float | None = None,
    address: str | None = None,
) -> SweepConfig:
    """The sweep's settings of a file or values, and of what is said beside it; see `sweep`."""
    values = deepcopy(dict(config)) if isinstance(config, Mapping) else read_yaml(config) if config is not None else {}
    base = values["config"] = values.get("config") or {}
    if not isinstance(base, dict):
        raise OsmlError(f"'config' of a sweep holds keys and values of a training; got {base!r}")
    if loss is not None:
        if "loss" in (values.get("space") or {}):
            raise OsmlError("the sweep's space names the losses already: leave out --loss, or take 'loss' out of it")
        base["loss"] = loss
    for override in overrides:
        apply_override(base, override, Config)
    base.update({k: v for k, v in (("seed", seed), ("alpha", alpha)) if v is not None})
    values.update({k: v for k, v in (("trials", trials), ("address", address)) if v is not None})
    return checked(values, SweepConfig)


def prepare(
    source: str | Path,
    settings: SweepConfig,
    *,
    split: str | Path | Split | None = None,
    n_known: int | None = None,
    skip_bad: bool = False,
    progress: bool = True,
) -> Job:
    """Open the data, draw the folds, and check that all of it can work, before anything is trained.

    For a Tuner of one's own, and its trials without MLflow, page and bundle:

    >>> job = prepare("photos", settings_of("sweep.yaml"), n_known=6)                     # doctest: +SKIP
    >>> tuner = make_tuner(job.data, job.plan, storage="/tmp/sweeps")                     # doctest: +SKIP
    >>> results = tuner.fit()                                                             # doctest: +SKIP
    """
    config = settings.config
    space = Space(settings.space, config, levels=settings.levels)
    if settings.search == "pbt" and not space.movable:
        raise OsmlError(
            "pbt moves numbers of loss, miner and optimizer while trials run, and the space has none: search one, "
            "such as optimizer.lr, or use search optuna"
        )
    items = open_items(source)
    split = split_of(split, items, n_known, config.seed)
    items, survey = readable_items(items, skip_bad, progress, config.data.ground)
    n_epochs = epochs(config, 0 if survey is None else 1)
    if config.training.patience is not None:
        raise OsmlError("training.patience has no place in a sweep, whose scheduler stops trials: leave it out")
    sets = sets_of(items, None if survey is None else survey.signatures, split, config)
    data = sweep_data(items, survey, split, config, settings.folds, sets)
    tell_shared_files(items)
    if survey is not None:
        check_pictures(items, survey, bit_depth_of(config, data.survey))
    plan = Plan(settings, space, n_epochs)
    if settings.winner == "as-is" and not data.own:
        raise OsmlError(
            "the winner cannot be taken as it is: the split names no pseudo-unknown classes, so every trial holds out "
            "some known ones; name some, or use winner: retrain"
        )
    threshold_of(config)  # refuses a rate that is said twice
    # The winner may be trained again, on the split itself.
    for trained_on in (data.folds[0].split, split):
        for name, params in plan.rules(config):
            check_choices(with_part(config, "threshold", name, params), trained_on, n_epochs, rate_is_said=True)
    return Job(str(source), split, data, plan, items, items.fingerprint(), skip_bad)


def job_of(asked: Asked, out: Path, split: str | Path | Split | None, n_known: int | None, progress: bool) -> Job:
    """On the data of the sweep, wherever they lie now: they are known by their fingerprint."""
    begun = bool(asked.data_fingerprint)
    places = [place for place in asked.places(out) if Path(place).exists()] if begun else [asked.data]
    if not places:
        raise OsmlError(f"the data of the sweep in '{out}' are not in '{asked.data}' any more: name them with --data")
    for place in places:
        try:
            job = prepare(
                place,
                asked.settings,
                split=Split.from_dict(asked.split) if asked.split else split,
                n_known=None if asked.split else n_known,
                skip_bad=asked.skip_bad,
                progress=progress,
            )
        except OsmlError:
            if place == places[-1]:
                raise
            continue  # something else lies there now
        if not begun or job.fingerprint == asked.data_fingerprint:
            return job
    raise _other_data(places[-1], out)


def check_same(asked: Asked, out: Path, data: str | Path, progress: bool) -> None:
    """Raise OsmlError unless these are the data of the sweep."""
    items, _ = readable_items(open_items(data), asked.skip_bad, progress, asked.settings.config.data.ground)
    if items.fingerprint() != asked.data_fingerprint:
        raise _other_data(data, out)


def _other_data(data: str | Path, out: Path) -> OsmlError:
    return OsmlError(
        f"'{data}' does not hold the data of the sweep in '{out}', or they have changed since it began: name them with "
        "--data, or start a new sweep with another --out"
    )
