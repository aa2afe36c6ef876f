"""What the trials of a sweep work on: items without any test role, and several draws of pseudo-unknown classes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from osml_plugin.config import Config
from osml_plugin.data import Fractions, ImageSurvey, Items, Split, TrainingRoles, training_roles
from osml_plugin.errors import OsmlError
from osml_plugin.network import build_model
from osml_plugin.pipeline import roles_of
from osml_plugin.training import seed_everything
from osml_plugin.training_data import Shared, TrainingData

FEWEST = 4
"""Distinct items that a class needs to be known in a fold of its own drawing."""


@dataclass(frozen=True)
class Fold:
    """One draw: which classes are known and which pseudo-unknown, and what each item does."""

    split: Split
    roles: TrainingRoles


@dataclass(frozen=True, eq=False)
class SweepData:
    """All that a trial receives: no test item and no unknown class is in it.

    folds: their indices mean `items`. With `own` the first is the split that the user gave.
    """

    items: Items
    survey: ImageSurvey | None
    folds: tuple[Fold, ...]
    own: bool
    shared: Shared | None = None
    sets: np.ndarray | None = None
    """`(N,)` near-copies have one number; None where only items of identical content are one."""

    def of_fold(self, fold: Fold, config: Config) -> TrainingData:
        return TrainingData(self.items, fold.split, fold.roles, self.survey, config, self.shared)


def sweep_data(
    items: Items,
    survey: ImageSurvey | None,
    split: Split,
    config: Config,
    n_folds: int,
    sets: np.ndarray | None = None,
) -> SweepData:
    """The data roles of a training on `split`, test left out, and `n_folds` draws of pseudo-unknown classes.

    The first is the split's own, where it names pseudo-unknown classes. Every further one trains on some of these and
    holds out as many others, so that in turn all classes are held out. Near-copies share a role in all of them.

    Args:
        sets: `(N,)` near-copies have one number, as `pipeline.sets_of` gives them.

    Raises:
        OsmlError: for a class with too few items, and for too few classes to hold any out.
    """
    real = roles_of(items, split, config, sets)
    kept = real.seen  # the copies, too: nobody may test on them
    place = np.full(len(items), -1)
    place[kept] = np.arange(len(kept))
    real = TrainingRoles(**{role: place[of] for role, of in vars(real).items()})
    items = replace(items.select(kept), roles=None)  # what they declare has been followed
    survey = None if survey is None else survey.of(kept)
    sets = None if sets is None else sets[kept]
    own = bool(split.pseudo_unknown)
    folds = [Fold(replace(split, unknown=()), real)] if own else []
    fractions = _fractions(items, split, real)
    for known, pseudo in _draws(items, sets, split, config.seed):
        if len(folds) >= n_folds:
            break
        drawn = Split(known, pseudo)
        cut = training_roles(items, drawn, sets=sets, fractions=fractions, seed=config.seed + len(folds))
        folds.append(Fold(drawn, cut))
    for fold in folds:
        if not np.isin(np.array(items.labels)[fold.roles.validation], fold.split.known).any():
            raise OsmlError(
                "no known item is left to validate on: set data.fractions.validation above 0, or declare some items"
            )
    return SweepData(items, survey, tuple(folds), own, sets=sets)


def _fractions(items: Items, split: Split, roles: TrainingRoles) -> Fractions:
    """How the known classes of the split were cut, without the test."""
    known = np.isin(np.array(items.labels), split.known)
    counts = np.array([np.count_nonzero(known[of]) for of in (roles.references, roles.calibration, roles.validation)])
    if not counts[2]:  # all of what was declared as validation is of pseudo-unknown classes
        counts = np.array([0.7, 0.2, 0.1])
    train, calibration, validation = (counts / counts.sum()).tolist()
    return Fractions(train, calibration, validation, 0.0)


def _draws(
    items: Items, sets: np.ndarray | None, split: Split, seed: int
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Known and pseudo-unknown classes of one draw after another; each class is held out about as often as others."""
    labels, sets = np.array(items.labels), items.fingerprints() if sets is None else sets
    classes = sorted({*split.known, *split.pseudo_unknown})
    # A class that is too small to be known stays pseudo-unknown.
    small = [c for c in split.pseudo_unknown if len(np.unique(sets[labels == c])) < FEWEST]
    free = [c for c in classes if c not in small]
    n_held = max(1, len(split.pseudo_unknown) - len(small)) if split.pseudo_unknown else max(1, round(0.3 * len(free)))
    if len(free) - n_held < 2:
        if split.pseudo_unknown:
            return  # the split's own draw is all that there is
        raise OsmlError(
            f"{len(free)} known classes are too few to hold any out, and the split names no pseudo-unknown classes: "
            "name some, or give at least 3 known classes"
        )
    rng = random.Random(seed)
    times_held = {c: int(c in split.pseudo_unknown) for c in free}
    while True:
        held = sorted(free, key=lambda c: (times_held[c], rng.random()))[:n_held]
        for c in held:
            times_held[c] += 1
        yield tuple(c for c in free if c not in held), tuple(sorted([*held, *small]))


def share(data: SweepData, config: Config, *, device: str | None = None, progress: bool = True) -> SweepData:
    """The same with decoded images and, for a frozen trunk, its features: computed once for all trials."""
    if data.survey is None:
        return data
    fold = data.of_fold(data.folds[0], config)
    model = None
    if fold.frozen:
        seed_everything(config.seed)
        model = build_model(config, channels=fold.channels, size=fold.size)
    return replace(data, shared=fold.share(data.items, model, device, progress))
