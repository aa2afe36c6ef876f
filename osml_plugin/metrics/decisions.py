"""Metrics of decisions at a threshold, and how far one threshold treats the classes alike."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import numpy as np

from .. import UNKNOWN
from ..errors import OsmlError
from .checks import (
    Values,
    check_labels,
    check_predictions,
    check_rejected,
    check_same_length,
    check_scores,
    check_taus,
)
from .ranking import BLOCK


@dataclass(frozen=True)
class ClassCounts:
    """Items by class, `(C + 1,)` int64 each: unknown first, then the classes in their order."""

    items: np.ndarray
    """Items whose true class this is."""
    rejected: np.ndarray
    """Of these: called unknown."""
    hits: np.ndarray
    """Of these: called what they are. Unknown items that were rejected are hits."""
    called: np.ndarray
    """Items called so."""

    @property
    def macro_f1(self) -> float:
        occurs = self.items + self.called > 0
        return float(np.mean(2 * self.hits[occurs] / (self.items + self.called)[occurs]))

    @property
    def open_set_accuracy(self) -> float:
        return float(self.hits.sum() / self.items.sum())

    @property
    def known_rejected(self) -> float:
        known = self.items[1:].sum()
        return float(self.rejected[1:].sum() / known) if known else nan

    @property
    def unknown_rejected(self) -> float:
        return float(self.rejected[0] / self.items[0]) if self.items[0] else nan

    @property
    def youden(self) -> float:
        """Unknown rejected − known rejected."""
        return self.unknown_rejected - self.known_rejected

    @property
    def rejected_by_class(self) -> np.ndarray:
        """The share rejected of each known class that has items."""
        occurs = self.items[1:] > 0
        return self.rejected[1:][occurs] / self.items[1:][occurs]

    @property
    def rejected_spread(self) -> float:
        return float(np.std(self.rejected_by_class)) if self.rejected_by_class.size else nan

    @property
    def rejected_worst(self) -> float:
        return float(np.max(self.rejected_by_class)) if self.rejected_by_class.size else nan


def count_by_class(labels: Values, predictions: Values, rejected: Values) -> ClassCounts:
    """Count decisions by class; arguments as for `macro_f1`. O(N), or O(N log N) where a class number is above N."""
    labels, predictions, rejected = check_labels(labels), check_predictions(predictions), check_rejected(rejected)
    check_same_length(labels=labels, predictions=predictions, rejected=rejected)
    if max(labels.max(), predictions.max()) >= labels.size:  # Class numbers too large to count by.
        classes = np.unique(np.concatenate(([UNKNOWN], labels, predictions)))
        labels, predictions = (np.searchsorted(classes, values) - 1 for values in (labels, predictions))
    size = 2 + int(max(labels.max(), predictions.max()))
    by_class, called = np.zeros((size, 4), dtype=np.int64), np.zeros(size, dtype=np.int64)
    block = max(BLOCK, 4 * size)
    for start in range(0, labels.size, block):
        rows = slice(start, start + block)
        decided = np.where(rejected[rows], UNKNOWN, predictions[rows])
        code = 4 * (labels[rows] + 1) + 2 * rejected[rows] + (labels[rows] == decided)
        by_class += np.bincount(code, minlength=4 * size).reshape(size, 4)
        called += np.bincount(decided + 1, minlength=size)
    return ClassCounts(
        items=by_class.sum(axis=1),
        rejected=by_class[:, 2:].sum(axis=1),
        hits=by_class[:, 1::2].sum(axis=1),
        called=called,
    )


def macro_f1(labels: Values, predictions: Values, rejected: Values) -> float:
    """The mean over classes of F1 = 2 TP / (items of the class + items called so), in [0, 1], unknown being a class.

    The classes are those that occur, among the labels or among the decisions (as in scikit-learn): a class of the
    model that no item has and none was given does not count, and neither does unknown if nothing is or was called so.

    Args:
        labels: `(N,)` int, the true known class or `UNKNOWN`.
        predictions: `(N,)` int, the closed-set class of each item.
        rejected: `(N,)` bool, True where the item was called unknown.
    """
    return count_by_class(labels, predictions, rejected).macro_f1


def open_set_accuracy(labels: Values, predictions: Values, rejected: Values) -> float:
    """The share of all items called what they are, in [0, 1]: known ones their class, unknown ones unknown.

    It depends on the share of unknown items. Arguments as for `macro_f1`.
    """
    return count_by_class(labels, predictions, rejected).open_set_accuracy


def known_rejected(labels: Values, rejected: Values) -> float:
    """The share of known items that were called unknown, in [0, 1]; NaN without known items."""
    return _share_rejected(labels, rejected, of_known=True)


def unknown_rejected(labels: Values, rejected: Values) -> float:
    """The share of unknown items that were called unknown, in [0, 1]; NaN without unknown items."""
    return _share_rejected(labels, rejected, of_known=False)


def opis(scores: Values, labels: Values, predictions: Values, taus: Values) -> float:
    """How unlike one threshold serves the classes: the variance over the known classes of their utility, averaged over
    a range of τ; in [0, 0.25], lower is better, 0 = every class is served alike.

    The operating-point-inconsistency score of Zhang et al. 2024 ("Threshold-consistent margin loss for open-world deep
    metric learning"), 1/(T C) Σ_τ Σ_c (U_c(τ) − Ū(τ))², brought from pairs to decisions: U_c is the harmonic mean of
    class c's sensitivity (of its items, those accepted as c) and specificity (of all other items, unknown ones
    included, those not accepted as c). Classes without items are left out. Needs at least two classes.

    Args:
        scores, labels, predictions: as for `open_set_metrics`.
        taus: `(T,)` the range that the threshold may come from, evenly spaced.

    Raises:
        OsmlError: as `open_set_metrics`; fewer than two known classes with items.
    """
    scores, labels, predictions = check_scores(scores), check_labels(labels), check_predictions(predictions)
    check_same_length(scores=scores, labels=labels, predictions=predictions)
    taus = np.sort(check_taus(taus))
    classes, items = np.unique(labels[labels != UNKNOWN], return_counts=True)
    if classes.size < 2:
        raise OsmlError(f"consistency compares known classes, but there are items of {classes.size}: give at least 2")
    first = np.searchsorted(taus, scores)  # the first τ that accepts the item

    def accepted(chosen: np.ndarray) -> np.ndarray:
        """`(C, T)` of the chosen items, those accepted as each class at each τ."""
        chosen = np.flatnonzero(chosen & (first < taus.size) & np.isin(predictions, classes))
        cell = np.searchsorted(classes, predictions[chosen]) * taus.size + first[chosen]
        return np.bincount(cell, minlength=classes.size * taus.size).reshape(classes.size, -1).cumsum(axis=1)

    right = labels == predictions
    sensitivity = accepted(right) / items[:, None]
    specificity = 1 - accepted(~right) / (labels.size - items)[:, None]
    sum_of_both = sensitivity + specificity
    utility = 2 * sensitivity * specificity / np.where(sum_of_both > 0, sum_of_both, 1)
    return float(utility.var(axis=0).mean())


def _share_rejected(labels: Values, rejected: Values, of_known: bool) -> float:
    labels, rejected = check_labels(labels), check_rejected(rejected)
    check_same_length(labels=labels, rejected=rejected)
    asked = (labels != UNKNOWN) == of_known
    total = np.count_nonzero(asked)
    return float(np.count_nonzero(rejected & asked) / total) if total else nan
