"""A recognizer on test items: recognition, and the grouping of what is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from . import UNKNOWN
from .data import ON_WHITE, Rendering
from .discovery import Discovery
from .metrics import DiscoveryMetrics, OpenSetMetrics, discovery_metrics, open_set_metrics
from .names import check_apart, item_labels
from .preprocessing import rendering_of
from .recognizer import OpenSetRecognizer, Recognition
from .thresholds.base import written


@dataclass(frozen=True)
class Evaluation:
    """Figures, and what they were made from (for pictures)."""

    metrics: OpenSetMetrics
    discovery: DiscoveryMetrics | None
    """Of the grouping of all items of unknown classes; None if there are none."""
    detector: str
    threshold: float
    class_thresholds: dict[str, float]
    """τ of the classes that have one of their own, by name; `threshold` is that of all others."""
    alpha: float | None
    """The share of known items that may be rejected; None where the threshold follows another rule."""
    recognition: Recognition
    names: tuple[str, ...]
    """`(N,)` the true class name of each item."""
    labels: np.ndarray
    """`(N,)` the same as class ids, `UNKNOWN` for unknown classes."""
    embeddings: Tensor
    groups: Discovery | None
    """Of the items of unknown classes, in their order."""
    rendering: Rendering = ON_WHITE
    """Rule by which the recognizer sees image files."""

    def to_dict(self) -> dict[str, Any]:
        """The object that `osml evaluate --json` prints."""
        return {
            **self.metrics.to_dict(),
            "detector": self.detector,
            "threshold": written(self.threshold),
            "thresholds": {name: written(tau) for name, tau in self.class_thresholds.items()},
            "alpha": self.alpha,
            "discovery": None if self.discovery is None else self.discovery.to_dict(),
        }


def evaluate_embeddings(
    recognizer: OpenSetRecognizer, embeddings: Tensor, names: Sequence[str], *, seed: int = 0
) -> Evaluation:
    """Evaluate on test embeddings `(N, D)` of the recognizer's own network, and their true class names.

    A class is known iff it is in the gallery, in whatever Unicode form it is named. The grouping sees the items of
    unknown classes only, so that its figures do not depend on the threshold.
    """
    ids = {name: i for i, name in recognizer.gallery.classes.items()}
    names = item_labels(names)
    check_apart(names, ids)
    labels = np.array([ids.get(n, UNKNOWN) for n in names])
    recognition = recognizer.recognize(embeddings)
    nearest = np.array([ids[n] for n in recognition.nearest])
    unknown = labels == UNKNOWN
    metrics = open_set_metrics(
        recognition.scores,
        labels,
        nearest,
        rejected=recognition.labels == UNKNOWN,
        n_unknown_classes=len(set(names) - ids.keys()),
    )
    groups = discovery = None
    if unknown.any():
        groups = recognizer.group(embeddings[unknown], seed=seed)
        discovery = discovery_metrics([n for n, u in zip(names, unknown, strict=True) if u], groups.labels)
    return Evaluation(
        metrics=metrics,
        discovery=discovery,
        detector=recognizer.detector.name,
        threshold=recognizer.threshold.tau,
        class_thresholds=recognizer.class_thresholds,
        alpha=recognizer.kept_rate,
        recognition=recognition,
        names=tuple(names),
        labels=labels,
        embeddings=embeddings,
        groups=groups,
        rendering=rendering_of(recognizer.preprocessing),
    )
