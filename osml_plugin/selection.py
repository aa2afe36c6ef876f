"""The detector chosen on validation, from cached embeddings: seconds where training takes minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from . import UNKNOWN, detectors
from .metrics import open_set_metrics

DEFAULT = "knn"
"""The detector where there is no pseudo-unknown class to choose one by."""


@dataclass(frozen=True)
class Candidate:
    """A detector with parameters, and what it reaches on validation."""

    detector: str
    params: dict[str, Any]
    oscr: float
    auroc: float


def candidates(names: Sequence[str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Every detector (or the named ones) with every combination of its search space."""
    found = []
    for name in names or detectors.names():
        space = detectors.registry.get(name).search_space
        found += [(name, dict(zip(space, values, strict=True))) for values in product(*space.values())]
    return found


def select_detector(
    embeddings: Tensor,
    labels: Tensor,
    validation: Tensor,
    validation_labels: np.ndarray,
    class_weights: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> list[Candidate]:
    """All candidates, best first by OSCR on validation, which needs no threshold; ties go to the simpler name.

    Args:
        embeddings: `(N, D)` of the training role, with `labels` `(N,)`.
        validation: `(M, D)` of known and pseudo-unknown items.
        validation_labels: `(M,)`, `UNKNOWN` for the pseudo-unknown.
        class_weights: as for `Detector.fit`; without them the detectors that need them are left out.
    """
    found = []
    for name, params in candidates(names):
        detector = detectors.create(name, **params)
        if detector.needs_class_weights and class_weights is None:
            continue
        if params.get("k", 0) > 1 and params["k"] > labels.unique(return_counts=True)[1].max():
            continue  # the same as a smaller k: no class has so many references
        classes, scores = detector.fit(embeddings, labels, class_weights).predict(validation)
        metrics = open_set_metrics(scores, validation_labels, classes)
        found.append(Candidate(name, params, metrics.oscr, metrics.auroc))
    return sorted(found, key=lambda c: -c.oscr)


def has_unknown(labels: np.ndarray) -> bool:
    """Whether validation labels can choose anything: they hold known and unknown items."""
    return bool((labels == UNKNOWN).any() and (labels != UNKNOWN).any())
