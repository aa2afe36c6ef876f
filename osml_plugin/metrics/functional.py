"""Open-set metrics as pure functions of scores, labels and predictions; float64 inside, ties exact.

`rank` sorts once; every threshold-free metric reads the `Ranking` that it returns. An item is accepted as known iff
its score is at most τ, so only distinct scores can matter as τ, and counting at those makes ties exact.

Inputs are NumPy arrays, lists, or torch tensors on any device, one value per item. Rank metrics are NaN unless there
are both known and unknown items.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import nan
from typing import Literal

import numpy as np

from .. import UNKNOWN
from ..errors import OsmlError
from .checks import Values, check_labels, check_predictions, check_rejected, check_same_length, check_scores


@dataclass(frozen=True)
class Ranking:
    """How many items are accepted at each τ that can matter: M distinct scores, and one row for "none accepted"."""

    tau: np.ndarray
    """`(M + 1,)` float64: -inf (the row where nothing is accepted), then the distinct scores in ascending order."""
    known: np.ndarray
    """`(M + 1,)` int64: known items with score <= τ; 0 first, all known items last."""
    unknown: np.ndarray
    """`(M + 1,)` int64: unknown items with score <= τ."""
    correct: np.ndarray
    """`(M + 1,)` int64: known items with score <= τ whose predicted class is their own."""

    @property
    def n_known(self) -> int:
        return int(self.known[-1])

    @property
    def n_unknown(self) -> int:
        return int(self.unknown[-1])

    @property
    def has_both(self) -> bool:
        return self.n_known > 0 and self.n_unknown > 0


def rank(scores: Values, labels: Values, predictions: Values) -> Ranking:
    """Sort the items by score and count them at each distinct score. O(N log N).

    Args:
        scores: `(N,)` unknown scores, higher = more unknown; infinities allowed.
        labels: `(N,)` int, the true known class (from 0) or `UNKNOWN`.
        predictions: `(N,)` int, the closed-set class of each item; read for known items only.

    Raises:
        OsmlError: empty input, wrong shapes or lengths, NaN scores, non-integer or too small labels or predictions.
    """
    scores, labels, predictions = check_scores(scores), check_labels(labels), check_predictions(predictions)
    check_same_length(scores=scores, labels=labels, predictions=predictions)
    order = np.argsort(scores)
    # One byte an item (0 unknown, 1 known, 2 known and correct) keeps the gather in the cache.
    kind = ((labels != UNKNOWN).astype(np.int8) + (labels == predictions))[order]
    scores = scores[order]
    last_of_ties = np.append(np.flatnonzero(scores[1:] != scores[:-1]), scores.size - 1)
    known = np.cumsum(kind > 0)[last_of_ties]
    correct = np.cumsum(kind == 2)[last_of_ties]
    return Ranking(
        tau=np.append(-np.inf, scores[last_of_ties]),
        known=np.append(0, known),
        unknown=np.append(0, last_of_ties + 1 - known),
        correct=np.append(0, correct),
    )


def auroc(ranking: Ranking) -> float:
    """P(an unknown item scores higher than a known one) + P(they tie) / 2: the Mann–Whitney statistic, in [0, 1].

    The same whichever of the two kinds is called positive.
    """
    if not ranking.has_both:
        return nan
    return _twice_area(ranking.unknown, ranking.known) / (2 * ranking.n_unknown * ranking.n_known)


def aupr_unknown(ranking: Ranking) -> float:
    """Average precision Σ (R_i − R_{i−1}) P_i with unknown = positive, by falling score, in [0, 1]."""
    if not ranking.has_both:
        return nan
    return _average_precision(_rejected(ranking.unknown), _rejected(ranking.known))


def aupr_known(ranking: Ranking) -> float:
    """Average precision Σ (R_i − R_{i−1}) P_i with known = positive, by rising score, in [0, 1]."""
    if not ranking.has_both:
        return nan
    return _average_precision(ranking.known, ranking.unknown)


def fpr95(ranking: Ranking) -> float:
    """The share of unknown items accepted, in [0, 1], at the lowest τ that accepts at least 95 % of the known items.

    Known = positive, as in the papers since ODIN (Liang et al. 2018); OpenOOD's figure of the same name is
    `fpr_at_tpr(ranking, 0.95, positive="unknown")`.
    """
    return fpr_at_tpr(ranking, 0.95)


def fpr_at_tpr(ranking: Ranking, tpr: float, positive: Literal["known", "unknown"] = "known") -> float:
    """The false-positive rate, in [0, 1], where the true-positive rate first reaches `tpr`.

    Args:
        tpr: in (0, 1].
        positive: "known": the share of unknown items accepted when at least `tpr` of the known are accepted.
            "unknown" (OpenOOD): the share of known items rejected when at least `tpr` of the unknown are rejected.

    Raises:
        OsmlError: `tpr` out of range, or another `positive`.
    """
    if not 0 < tpr <= 1:
        raise OsmlError(f"tpr must be above 0 and at most 1, not {tpr}: 0.95 is the usual one")
    if positive not in ("known", "unknown"):
        raise OsmlError(f"positive must be 'known' or 'unknown', not '{positive}'")
    if not ranking.has_both:
        return nan
    true, false = ranking.known, ranking.unknown
    if positive == "unknown":
        true, false = _rejected(ranking.unknown), _rejected(ranking.known)
    # count / total is rounded just as a decimal literal is, so 95 of 100 reaches 0.95; 0.95 * total may fall beside it.
    reached = bisect_left(true, tpr, key=lambda count: count / true[-1])
    return float(false[reached] / false[-1])


def oscr(ranking: Ranking) -> float:
    """The area under the correct-classification rate over the false-positive rate, in [0, closed-set accuracy].

    CCR(τ): known items accepted and correctly classified, of all known; FPR(τ): unknown items accepted, of all unknown
    (Dhamija et al. 2018, "Reducing network agnostophobia"; the area: Vaze et al. 2022, "Open-set recognition: a
    good closed-set classifier is all you need"). Tied items are accepted together and the trapezoid between two τ is
    kept: constant scores give half the closed-set accuracy. With every known item correct this is the AUROC.
    """
    if not ranking.has_both:
        return nan
    return _twice_area(ranking.unknown, ranking.correct) / (2 * ranking.n_unknown * ranking.n_known)


def roc_curve(ranking: Ranking) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points `(known rejected, unknown rejected, τ)`, each `(M + 1,)`, with τ falling: from (0, 0) to (1, 1).

    Unknown = positive: x is the false-positive and y the true-positive rate. τ = -inf stands for "all rejected".

    Raises:
        OsmlError: no known or no unknown items.
    """
    _require_both(ranking)
    known, unknown = _rejected(ranking.known), _rejected(ranking.unknown)
    return known / known[-1], unknown / unknown[-1], ranking.tau[::-1]


def oscr_curve(ranking: Ranking) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points `(FPR, CCR, τ)` of `oscr`, each `(M + 1,)`, with τ rising: from (0, 0) to (1, closed-set accuracy).

    Raises:
        OsmlError: no known or no unknown items.
    """
    _require_both(ranking)
    return ranking.unknown / ranking.n_unknown, ranking.correct / ranking.n_known, ranking.tau


def closed_set_accuracy(labels: Values, predictions: Values) -> float:
    """The share of known items whose predicted class is their own, nothing rejected, in [0, 1]; NaN without known."""
    labels, predictions = check_labels(labels), check_predictions(predictions)
    check_same_length(labels=labels, predictions=predictions)
    known = np.count_nonzero(labels != UNKNOWN)
    return float(np.count_nonzero(labels == predictions) / known) if known else nan


def macro_f1(labels: Values, predictions: Values, rejected: Values) -> float:
    """The mean over classes of F1 = 2 TP / (items of the class + items called so), in [0, 1], unknown being a class.

    The classes are those that occur, among the labels or among the decisions (as in scikit-learn): a class of the
    model that no item has and none was given does not count, and neither does unknown if nothing is or was called so.

    Args:
        labels: `(N,)` int, the true known class or `UNKNOWN`.
        predictions: `(N,)` int, the closed-set class of each item.
        rejected: `(N,)` bool, True where the item was called unknown.
    """
    labels, predictions, rejected = (
        check_labels(labels),
        check_predictions(predictions),
        check_rejected(rejected),
    )
    check_same_length(labels=labels, predictions=predictions, rejected=rejected)
    decided = np.where(rejected, UNKNOWN, predictions)
    if max(labels.max(), decided.max()) < labels.size:
        labels, decided = labels + 1, decided + 1
    else:  # Class numbers too large to count by.
        labels, decided = np.unique(np.stack((labels, decided)), return_inverse=True)[1].reshape(2, -1)
    size = 1 + max(labels.max(), decided.max())
    hits = np.bincount(labels[labels == decided], minlength=size)
    items = np.bincount(labels, minlength=size) + np.bincount(decided, minlength=size)
    occurs = items > 0
    return float(np.mean(2 * hits[occurs] / items[occurs]))


def known_rejected(labels: Values, rejected: Values) -> float:
    """The share of known items that were called unknown, in [0, 1]; NaN without known items."""
    return _share_rejected(labels, rejected, of_known=True)


def unknown_rejected(labels: Values, rejected: Values) -> float:
    """The share of unknown items that were called unknown, in [0, 1]; NaN without unknown items."""
    return _share_rejected(labels, rejected, of_known=False)


def _share_rejected(labels: Values, rejected: Values, of_known: bool) -> float:
    labels, rejected = check_labels(labels), check_rejected(rejected)
    check_same_length(labels=labels, rejected=rejected)
    asked = (labels != UNKNOWN) == of_known
    total = np.count_nonzero(asked)
    return float(np.count_nonzero(rejected & asked) / total) if total else nan


def _rejected(accepted: np.ndarray) -> np.ndarray:
    """Items with score > τ, for falling τ, from the items with score <= τ, for rising τ."""
    return accepted[-1] - accepted[::-1]


def _twice_area(x: np.ndarray, y: np.ndarray) -> int:
    """Twice the trapezoid area under y over x: a whole number, so exact, as long as it fits into 63 bits."""
    return int(np.diff(x) @ (y[1:] + y[:-1]))


def _average_precision(true: np.ndarray, false: np.ndarray) -> float:
    return float(np.diff(true) @ (true[1:] / (true[1:] + false[1:])) / true[-1])


def _require_both(ranking: Ranking) -> None:
    if not ranking.has_both:
        counts = f"{ranking.n_known} known and {ranking.n_unknown} unknown"
        raise OsmlError(f"a curve needs known and unknown items, but there are {counts}: give at least one of each")
