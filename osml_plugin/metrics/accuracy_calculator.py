"""Open-set metrics in any pytorch-metric-learning tester."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor

from .. import UNKNOWN, detectors
from .functional import RANK_METRICS, Ranking, rank

OPEN_SET = tuple(RANK_METRICS)


class OpenSetAccuracyCalculator(AccuracyCalculator):
    """PML's `AccuracyCalculator` with the threshold-free open-set metrics: auroc, oscr, fpr95, closed_set_accuracy and
    the others of `osml_plugin.metrics.functional.RANK_METRICS`.

    The reference split holds the known classes. A query is unknown if its label is `UNKNOWN`, or none of the
    reference's (PML leaves such queries out of its own metrics). Where queries are their own reference, there is
    nothing to tell apart, and the open-set metrics are NaN.

    >>> calculator = OpenSetAccuracyCalculator(include=("precision_at_1", "auroc", "oscr"), k=1)   # doctest: +SKIP
    >>> tester = GlobalEmbeddingSpaceTester(accuracy_calculator=calculator)                        # doctest: +SKIP
    >>> tester.test(datasets, epoch, trunk, embedder, splits_to_eval=[("val", ["train"])])         # doctest: +SKIP

    Args:
        detector: name of the detector that scores the queries, fitted on the reference.
        detector_params: its arguments.
        Everything else as PML.
    """

    def __init__(self, *args: Any, detector: str = "knn", detector_params: dict | None = None, **kwargs: Any):
        self.detector = detectors.create(detector, **(detector_params or {}))
        super().__init__(*args, **kwargs)

    def _get_accuracy(self, function_dict: dict, **kwargs: Any) -> dict[str, float]:
        """Called by PML once a split, with everything that its metrics take."""
        if set(OPEN_SET) & set(function_dict):
            kwargs["open_set"] = None if kwargs["ref_includes_query"] else self._open_set(**kwargs)
        return super()._get_accuracy(function_dict, **kwargs)

    def _open_set(
        self,
        query: Tensor,
        query_labels: Tensor,
        reference: Tensor,
        reference_labels: Tensor,
        **kwargs: Any,
    ) -> Ranking:
        query_labels, reference_labels = query_labels.flatten().long(), reference_labels.flatten().long()
        known = reference_labels != UNKNOWN  # PML takes the unknowns for one more class
        classes, scores = self.detector.fit(reference[known], reference_labels[known]).predict(query)
        unknown = ~torch.isin(query_labels, reference_labels[known])
        # Ids from 0: PML's labels may be any integers.
        _, ids = np.unique(torch.cat([query_labels, classes]).cpu().numpy(), return_inverse=True)
        labels = np.where(unknown.cpu().numpy(), UNKNOWN, ids[: len(query_labels)])
        return rank(scores, labels, ids[len(query_labels) :])


def _calculates(name: str) -> Callable[..., float]:
    def calculate(self, open_set: Ranking | None, **kwargs: Any) -> float:
        return math.nan if open_set is None else RANK_METRICS[name](open_set)

    return calculate


for _name in OPEN_SET:  # PML finds its metrics by the names of the methods
    setattr(OpenSetAccuracyCalculator, f"calculate_{_name}", _calculates(_name))
