"""Detector and embedding output chosen on validation, from cached embeddings: seconds where training takes minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
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
        train: `(N, D)`.
        validation: `(M, D)` of known and pseudo-unknown items.
        class_weights: as for `Detector.fit`; without them the detectors that need them are left out.
    """

    train: Tensor
    validation: Tensor
    class_weights: Tensor | None = None


def candidates(names: Sequence[str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Every detector (or the named ones) with every combination of its search space."""
    found = []
    for name in names or detectors.names():
        space = detectors.registry.get(name).search_space
        found += [(name, dict(zip(space, values, strict=True))) for values in product(*space.values())]
    return found


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
        outputs: by name, what each output of the model makes of the same items.
        labels: `(N,)` of the training items; `validation_labels` `(M,)`, `UNKNOWN` for the pseudo-unknown.
        tried: detectors and parameters, as `candidates` lists them.
    """
    some = np.random.default_rng(seed).permutation(len(validation_labels))[:MAX_VALIDATION]
    found = []
    runs = [(o, n, p) for o in outputs for n, p in tried]
    for output, name, params in tqdm(runs, desc="choosing", delay=2, leave=False, disable=not progress):
        cached, detector = outputs[output], detectors.create(name, **params)
        if detector.needs_class_weights and cached.class_weights is None:
            continue
        detector.fit(cached.train, labels, cached.class_weights)
        classes, scores = detector.predict(cached.validation[some])
        metrics = open_set_metrics(scores, validation_labels[some], classes)
        found.append(Candidate(output, name, params, metrics.oscr, metrics.auroc))
    return sorted(found, key=lambda c: -c.oscr)


def has_unknown(labels: np.ndarray) -> bool:
    """Whether validation labels can choose anything: they hold known and unknown items."""
    return bool((labels == UNKNOWN).any() and (labels != UNKNOWN).any())
