"""The sweep as a plain `tune.Tuner`."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from .folds import SweepData
from .recorder import Relay
from .settings import Resources
from .space import Space
from .trial import DRAWN, Plan, params_of, trainable


def make_tuner(data: SweepData, plan: Plan, *, storage: str | Path, name: str = "trials") -> tune.Tuner:
    """The Tuner of a sweep: `make_tuner(…).fit()` runs it, and whatever is passed to `tune.Tuner` may be changed first.

    Args:
        storage: the folder (or s3://… address) in which the experiment's folder `name` is made.
    """
    settings = plan.settings
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search, param_space = None, {}
    if settings.search == "optuna":
        search = optuna_search(plan)
    else:
        # Drawn beforehand, so that the same seed means the same trials. And PBT takes no search algorithm.
        param_space = {DRAWN: tune.grid_search(draw(plan.space, settings.trials, settings.config.seed))}
    return tune.Tuner(
        trainable(data, plan),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            metric=settings.objective,
            mode="max",
            search_alg=search,
            scheduler=scheduler(plan),
            num_samples=settings.trials if search else 1,
            max_concurrent_trials=settings.concurrent or _at_once(settings.resources),
            reuse_actors=True,  # the next trial need not import everything again
            trial_dirname_creator=_folder,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(storage),
            callbacks=[Relay()],
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=tune.CheckpointConfig(
                # A trial of PBT goes on from another's checkpoint, whenever there is room for it: all are kept.
                num_to_keep=None if settings.search == "pbt" else settings.keep_checkpoints,
                checkpoint_score_attribute=settings.objective,
                checkpoint_score_order="max",
            ),
            verbose=0,
        ),
    )


def _at_once(resources: Resources) -> int | None:
    """Trials that there is room for, where Ray Train reserves what they take; None = Ray Tune finds out itself."""
    if resources.workers == 1:
        return None
    there = ray.cluster_resources()
    wanted = {"CPU": resources.cpu * resources.workers, "GPU": resources.gpu * resources.workers}
    return max(1, min(int(there.get(kind, 0) / each) for kind, each in wanted.items() if each))


def _folder(trial: Any) -> str:
    """Ray's own would hold all parameters, and be too long for some."""
    return f"trial-{trial.trial_id}"


def optuna_search(plan: Plan) -> Searcher:
    """Tree-structured Parzen estimators (Bergstra et al. 2011) over the whole space at once, conditional parameters in
    groups. The first trial is the configuration as it is, where the space holds it."""
    settings = plan.settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=max(4, min(10, settings.trials // 3)),
            multivariate=True,
            group=True,
            constant_liar=True,  # trials that run side by side are not drawn alike
            seed=settings.config.seed,
        )
    first = plan.space.defaults()
    return OptunaSearch(
        plan.space.suggest,
        metric=settings.objective,
        mode="max",
        sampler=sampler,
        points_to_evaluate=[first] if first else None,
    )


def draw(space: Space, n: int, seed: int) -> list[dict[str, Any]]:
    """n points of the space at random; the first is the configuration as it is, where the space holds it."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    if first := space.defaults():
        study.enqueue_trial(first)
    points = []
    for _ in range(n):
        trial = study.ask()
        space.suggest(trial)
        points.append(trial.params)
    return points


def scheduler(plan: Plan) -> TrialScheduler:
    settings = plan.settings
    grace = plan.grace
    if settings.search == "pbt":
        rng = random.Random(settings.config.seed)

        def explore(config: dict[str, Any]) -> dict[str, Any]:
            return {DRAWN: plan.space.explore(params_of(config), rng)}

        return PopulationBasedTraining(
            time_attr="epoch", perturbation_interval=grace, custom_explore_fn=explore, synch=False
        )
    if settings.scheduler == "asha" and plan.longest > grace:
        return ASHAScheduler(time_attr="epoch", grace_period=grace, max_t=plan.longest, reduction_factor=3)
    return FIFOScheduler()
