"""Detector and embedding output chosen on validation, from cached embeddings: seconds where training takes minutes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import UNKNOWN, detectors
from .metrics import open_set_metrics

DEFAULT = "knn"
"""The detector where there is no pseudo-unknown class to choose one by."""


MAX_VALIDATION = 5000
"""Validation items to choose by; more would not change what is chosen."""


@dataclass(frozen=True)
class Candidate:
    """An output of the model and a detector with parameters, and what they reach on validation."""

    output: str
    detector: str
    params: dict[str, Any]
    oscr: float
    auroc: float


@dataclass(frozen=True)
class Cached:
    """The embeddings of one output of the model that there is to choose by.

    Args:
        embeddings: by data role, `(N, D)` each: train, and validation where there is any.
        class_weights: as for `Detector.fit`; without them the detectors that need them are left out.
    """

    embeddings: Mapping[str, Tensor]
    class_weights: Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """What a detector that was fitted on the training items says of others, by data role: the nearest class and the
    unknown score, `(N,)` each."""

    output: str
    detector: str
    params: dict[str, Any]
    classes: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]


def candidates(names: Sequence[str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The named detectors, else all that are `tried_by_auto`, with every combination of their search spaces."""
    registry, found = detectors.registry, []
    for name in names or [name for name in detectors.names() if registry.get(name).tried_by_auto]:
        space = registry.get(name).search_space
        found += [(name, dict(zip(space, values, strict=True))) for values in product(*space.values())]
    return found


def scored(
    outputs: Mapping[str, Cached],
    labels: np.ndarray,
    tried: Sequence[tuple[str, dict[str, Any]]],
    of: Mapping[str, np.ndarray],
    *,
    progress: bool = True,
) -> Iterator[Scored]:
    """Every detector on every output of the model, in this order; those that can share work do (`Detector.scan`).

    Args:
        outputs: by name, what each output of the model makes of the same items.
        labels: `(N,)` of the training items.
        tried: detectors and parameters, as `candidates` lists them.
        of: the items to score, as indices by data role.
    """
    ends = np.cumsum([len(items) for items in of.values()])[:-1]
    with tqdm(total=len(outputs) * len(tried), desc="choosing", delay=2, leave=False, disable=not progress) as bar:
        for output, cached in outputs.items():
            made = [(name, params, detectors.create(name, **params)) for name, params in tried]
            if cached.class_weights is None:
                made = [m for m in made if not m[2].needs_class_weights]
            queries = torch.cat([cached.embeddings[role][items] for role, items in of.items()])
            found: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(made)
            fitted_on = cached.embeddings["train"], labels
            for i, classes, scores in detectors.Detector.scan(
                [detector for _, _, detector in made], *fitted_on, queries, cached.class_weights
            ):
                found[i] = classes.numpy(), scores.numpy()
                bar.update()
            bar.update(len(tried) - len(made))
            for (name, params, _), both in zip(made, found, strict=True):
                classes, scores = (dict(zip(of, np.split(values, ends), strict=True)) for values in both)
                yield Scored(output, name, params, classes, scores)


def select(
    outputs: Mapping[str, Cached],
    labels: np.ndarray,
    validation_labels: np.ndarray,
    tried: Sequence[tuple[str, dict[str, Any]]],
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[Candidate]:
    """All candidates, best first by OSCR on validation, which needs no threshold.

    Args:
        outputs, labels, tried: as for `scored`.
        validation_labels: `(M,)`, `UNKNOWN` for the pseudo-unknown.
    """
    some = drawn(len(validation_labels), seed)
    found = []
    for s in scored(outputs, labels, tried, {"validation": some}, progress=progress):
        metrics = open_set_metrics(s.scores["validation"], validation_labels[some], s.classes["validation"])
        found.append(Candidate(s.output, s.detector, s.params, metrics.oscr, metrics.auroc))
    return sorted(found, key=lambda c: -c.oscr)


def drawn(n: int, seed: int) -> np.ndarray:
    """The validation items to choose by, of n."""
    return np.random.default_rng(seed).permutation(n)[:MAX_VALIDATION]


def has_unknown(labels: np.ndarray) -> bool:
    """Whether validation labels can choose anything: they hold known and unknown items."""
    return bool((labels == UNKNOWN).any() and (labels != UNKNOWN).any())
