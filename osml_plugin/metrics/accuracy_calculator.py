"""Open-set metrics in any pytorch-metric-learning tester."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor

from .. import UNKNOWN, detectors
from ..errors import OsmlError
from ..pml_batches import KnownClasses, labels_of
from .functional import RANK_METRICS, Ranking, rank

OPEN_SET = tuple(RANK_METRICS)


class OpenSetAccuracyCalculator(AccuracyCalculator):
    """PML's `AccuracyCalculator` with the threshold-free open-set metrics: auroc, oscr, fpr95, closed_set_accuracy and
    the others of `osml_plugin.metrics.functional.RANK_METRICS`.

    The reference split holds the known classes. A query is unknown if its label is `UNKNOWN`, or equals none of the
    reference's (PML leaves such queries out of its own metrics), and correct if its label equals the predicted one.
    Equal means what `label_comparison_fn` says; without it labels of several columns `(N, L)` are equal where all
    columns are. Where queries are their own reference, or the reference holds no known item, there is nothing to tell
    apart, and the open-set metrics are NaN.

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

    def get_accuracy(
        self,
        query: Tensor | np.ndarray,
        query_labels: Tensor | np.ndarray,
        reference: Tensor | np.ndarray | None = None,
        reference_labels: Tensor | np.ndarray | None = None,
        ref_includes_query: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> dict[str, float]:
        """As PML's. OsmlError for labels that are no numbers, and for integers so large that single precision, in which
        PML compares labels, takes two of them for one."""
        query_labels = _class_numbers(query_labels)
        if reference is not None:
            reference_labels = _class_numbers(reference_labels)
        return super().get_accuracy(
            query, query_labels, reference, reference_labels, ref_includes_query, include, exclude
        )

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
    ) -> Ranking | None:
        classes, of_reference = KnownClasses.of(reference_labels, self.label_comparison_fn)
        known = of_reference != UNKNOWN  # PML takes the unknowns for one more class
        if not known.any():
            return None
        predicted, scores = self.detector.fit(reference[known], of_reference[known]).predict(query)
        return rank(scores, classes.truth(query_labels, predicted), predicted)


def _class_numbers(labels: Any) -> Tensor:
    found = labels_of(labels)
    if not isinstance(found, Tensor):
        raise OsmlError(
            f"labels are text such as '{found.flat[0]}', and PML compares numbers: number the classes from 0"
        )
    if not found.is_floating_point():
        distinct = found.long().unique()
        if len(distinct.float().unique()) < len(distinct):
            raise OsmlError(
                f"labels go up to {int(distinct.max())}, and PML compares them in single precision, where some of them "
                "are the same: number the classes from 0"
            )
    return found


def _calculates(name: str) -> Callable[..., float]:
    def calculate(self, open_set: Ranking | None, **kwargs: Any) -> float:
        return math.nan if open_set is None else RANK_METRICS[name](open_set)

    calculate.__name__ = f"calculate_{name}"  # by which pickle finds the method
    calculate.__qualname__ = f"{OpenSetAccuracyCalculator.__name__}.{calculate.__name__}"
    return calculate


for _name in OPEN_SET:  # PML finds its metrics by the names of the methods
    setattr(OpenSetAccuracyCalculator, f"calculate_{_name}", _calculates(_name))
