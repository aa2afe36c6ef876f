"""Open-set metrics in any pytorch-metric-learning tester."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor

from .. import UNKNOWN, detectors
from .open_set import OpenSetMetrics, open_set_metrics

OPEN_SET = ("auroc", "aupr_unknown", "aupr_known", "fpr95", "oscr", "closed_set_accuracy")

UNDEFINED = OpenSetMetrics(0, 0, *[math.nan] * 6, None, None, None)


class OpenSetAccuracyCalculator(AccuracyCalculator):
    """PML's `AccuracyCalculator` with auroc, aupr_unknown, aupr_known, fpr95, oscr and closed_set_accuracy.

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

    def calculate_auroc(self, open_set: OpenSetMetrics, **kwargs: Any) -> float:
        return open_set.auroc

    def calculate_aupr_unknown(self, open_set: OpenSetMetrics, **kwargs: Any) -> float:
        return open_set.aupr_unknown

    def calculate_aupr_known(self, open_set: OpenSetMetrics, **kwargs: Any) -> float:
        return open_set.aupr_known

    def calculate_fpr95(self, open_set: OpenSetMetrics, **kwargs: Any) -> float:
        return open_set.fpr95

    def calculate_oscr(self, open_set: OpenSetMetrics, **kwargs: Any) -> float:
        return open_set.oscr

    def calculate_closed_set_accuracy(self, open_set: OpenSetMetrics, **kwargs: Any) -> float:
        return open_set.closed_set_accuracy

    def _get_accuracy(self, function_dict: dict, **kwargs: Any) -> dict[str, float]:
        """Called by PML once a split, with everything that its metrics take."""
        if set(OPEN_SET) & set(function_dict):
            kwargs["open_set"] = UNDEFINED if kwargs["ref_includes_query"] else self._open_set(**kwargs)
        return super()._get_accuracy(function_dict, **kwargs)

    def _open_set(
        self,
        query: Tensor,
        query_labels: Tensor,
        reference: Tensor,
        reference_labels: Tensor,
        **kwargs: Any,
    ) -> OpenSetMetrics:
        query_labels, reference_labels = query_labels.flatten().long(), reference_labels.flatten().long()
        known = reference_labels != UNKNOWN  # PML takes the unknowns for one more class
        classes, scores = self.detector.fit(reference[known], reference_labels[known]).predict(query)
        unknown = ~torch.isin(query_labels, reference_labels[known])
        # Ids from 0: PML's labels may be any integers.
        _, ids = np.unique(torch.cat([query_labels, classes]).cpu().numpy(), return_inverse=True)
        labels = np.where(unknown.cpu().numpy(), UNKNOWN, ids[: len(query_labels)])
        return open_set_metrics(scores, labels, ids[len(query_labels) :])
