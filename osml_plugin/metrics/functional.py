"""Open-set metrics as pure functions of scores, labels and predictions; float64 inside, ties exact.

`rank` sorts once; every threshold-free metric reads the `Ranking` that it returns. An item is accepted as known iff
its score is at most τ, so only distinct scores can matter as τ, and counting at those makes ties exact. The metrics of
decisions (`macro_f1` and so on) are those of `osml_plugin.metrics.decisions`.

Inputs are NumPy arrays, lists, or torch tensors on any device, one value per item. Rank metrics are NaN unless there
are both known and unknown items.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import partial
from math import inf, nan, sqrt
from numbers import Integral
from typing import Literal

import numpy as np

from .. import UNKNOWN
from ..errors import OsmlError
from ..registry import checked_number
from .checks import Values, check_labels, check_predictions, check_same_length
from .decisions import known_rejected, macro_f1, open_set_accuracy, opis, unknown_rejected
from .ranking import BLOCK, Ranking, rank, thin

__all__ = [
    "RANK_METRICS",
    "Ranking",
    "aupr_known",
    "aupr_unknown",
    "auroc",
    "autc",
    "best_threshold",
    "best_youden",
    "ccr_at_fpr",
    "closed_set_accuracy",
    "detection_error",
    "eer",
    "fpr95",
    "fpr_at_tpr",
    "known_rejected",
    "macro_f1",
    "open_auc",
    "open_set_accuracy",
    "openness",
    "opis",
    "oscr",
    "oscr_curve",
    "precision_recall_curve",
    "rank",
    "roc_curve",
    "thin",
    "unknown_rejected",
]

Kind = Literal["known", "unknown"]


def auroc(ranking: Ranking) -> float:
    """P(an unknown item scores higher than a known one) + P(they tie) / 2: the Mann–Whitney statistic, in [0, 1].

    The same whichever of the two kinds is called positive.
    """
    if not ranking.has_both:
        return nan
    return _total(_twice_area, ranking.unknown, ranking.known) / (2 * ranking.n_unknown * ranking.n_known)


def aupr_unknown(ranking: Ranking) -> float:
    """Average precision Σ (R_i − R_{i−1}) P_i with unknown = positive, by falling score, in [0, 1]."""
    if not ranking.has_both:
        return nan
    n_unknown, n_known = ranking.n_unknown, ranking.n_known

    def precision_sum(unknown: np.ndarray, known: np.ndarray) -> float:
        rejected = n_unknown - unknown[:-1]  # with score >= the τ that the row ends at
        return np.diff(unknown) @ (rejected / (rejected + (n_known - known[:-1])))

    return float(_total(precision_sum, ranking.unknown, ranking.known) / n_unknown)


def aupr_known(ranking: Ranking) -> float:
    """Average precision Σ (R_i − R_{i−1}) P_i with known = positive, by rising score, in [0, 1]."""
    if not ranking.has_both:
        return nan

    def precision_sum(known: np.ndarray, unknown: np.ndarray) -> float:
        return np.diff(known) @ (known[1:] / (known[1:] + unknown[1:]))

    return float(_total(precision_sum, ranking.known, ranking.unknown) / ranking.n_known)


def fpr95(ranking: Ranking) -> float:
    """The share of unknown items accepted, in [0, 1], at the lowest τ that accepts at least 95 % of the known items.

    Known = positive, as in the papers since ODIN (Liang et al. 2018); OpenOOD's figure of the same name is
    `fpr_at_tpr(ranking, 0.95, positive="unknown")`.
    """
    return fpr_at_tpr(ranking, 0.95)


def fpr_at_tpr(ranking: Ranking, tpr: float, positive: Kind = "known") -> float:
    """The false-positive rate, in [0, 1], where the true-positive rate first reaches `tpr`.

    Args:
        tpr: in (0, 1].
        positive: "known": the share of unknown items accepted when at least `tpr` of the known are accepted.
            "unknown" (OpenOOD): the share of known items rejected when at least `tpr` of the unknown are rejected.

    Raises:
        OsmlError: `tpr` out of range, or another `positive`.
    """
    if not 0 < checked_number("tpr", tpr) <= 1:
        raise OsmlError(f"tpr must be above 0 and at most 1, not {tpr}: 0.95 is the usual one")
    _check_kind(positive)
    if not ranking.has_both:
        return nan
    n_known, n_unknown = ranking.n_known, ranking.n_unknown
    # count / total is rounded just as a decimal literal is, so 95 of 100 reaches 0.95; 0.95 * total may fall beside it.
    if positive == "known":
        row = bisect_left(ranking.known, tpr, key=lambda accepted: accepted / n_known)
        return float(ranking.unknown[row] / n_unknown)
    # The last row that still rejects enough.
    row = bisect_right(ranking.unknown, -tpr, key=lambda accepted: -(n_unknown - accepted) / n_unknown) - 1
    return float((n_known - ranking.known[row]) / n_known)


def eer(ranking: Ranking) -> float:
    """The equal error rate, in [0, 1]: known items rejected = unknown items accepted, where the ROC curve with straight
    lines between its points crosses the diagonal. Constant scores give 0.5."""
    if not ranking.has_both:
        return nan
    n_known, n_unknown = ranking.n_known, ranking.n_unknown

    def excess(row: int) -> int:
        """Unknown accepted − known rejected, times both totals: rising from below 0 to above."""
        return int(ranking.unknown[row]) * n_known - (n_known - int(ranking.known[row])) * n_unknown

    row = bisect_left(range(ranking.tau.size), 0, key=excess)
    before, after = excess(row - 1), excess(row)
    start, end = int(ranking.unknown[row - 1]), int(ranking.unknown[row])
    return (start + (end - start) * -before / (after - before)) / n_unknown


def best_youden(ranking: Ranking) -> float:
    """Youden's J = unknown rejected − known rejected at the τ where it is largest, in [0, 1] (Youden 1950)."""
    if not ranking.has_both:
        return nan
    known, unknown = int(ranking.known[ranking.best_row]), int(ranking.unknown[ranking.best_row])
    n_known, n_unknown = ranking.n_known, ranking.n_unknown
    return (known * n_unknown - unknown * n_known) / (n_known * n_unknown)


def best_threshold(ranking: Ranking) -> float:
    """The lowest τ that reaches `best_youden`; -inf, which stands for "all rejected", where no τ is better."""
    return float(ranking.tau[ranking.best_row]) if ranking.has_both else nan


def detection_error(ranking: Ranking) -> float:
    """The least mean of the two error rates over all τ, in [0, 0.5]: (1 − J) / 2 (Liang et al. 2018, §4.2)."""
    return (1 - best_youden(ranking)) / 2


def autc(ranking: Ranking) -> float:
    """The mean of the known rejected and of the unknown accepted, over all τ of the scores' range, in [0, 1]; lower is
    better (Humblot-Renaux et al. 2023, "Beyond AUROC & co.", AUTC).

    Exact, with the scores brought to [0, 1] by the smallest and the largest: (mean of known + 1 − mean of unknown) / 2.
    Of all rank metrics this alone depends on more than the order. NaN where a score is infinite or all are the same.
    """
    low, span = float(ranking.tau[1]), float(ranking.tau[-1]) - float(ranking.tau[1])
    if not ranking.has_both or not 0 < span < inf:
        return nan

    def score_sums(known: np.ndarray, unknown: np.ndarray, tau: np.ndarray) -> np.ndarray:
        scores = (tau[1:] - low) / span
        return np.array([np.diff(known) @ scores, np.diff(unknown) @ scores])

    known, unknown = _total(score_sums, ranking.known, ranking.unknown, ranking.tau)
    return float((known / ranking.n_known + 1 - unknown / ranking.n_unknown) / 2)


def oscr(ranking: Ranking) -> float:
    """The area under the correct-classification rate over the false-positive rate, in [0, closed-set accuracy].

    CCR(τ): known items accepted and correctly classified, of all known; FPR(τ): unknown items accepted, of all unknown
    (Dhamija et al. 2018, "Reducing network agnostophobia"; the area: Vaze et al. 2022, "Open-set recognition: a
    good closed-set classifier is all you need"). Tied items are accepted together and the trapezoid between two τ is
    kept: constant scores give half the closed-set accuracy. With every known item correct this is the AUROC.
    """
    if not ranking.has_both:
        return nan
    return _total(_twice_area, ranking.unknown, ranking.correct) / (2 * ranking.n_unknown * ranking.n_known)


def open_auc(ranking: Ranking) -> float:
    """P(a known item is correct, and an unknown one scores strictly higher), in [0, `oscr`] (Wang et al. 2022,
    "OpenAUC", eq. 7). As `oscr`, but a tie is a loss, as the paper writes it."""
    if not ranking.has_both:
        return nan

    def wins(unknown: np.ndarray, correct: np.ndarray) -> int:
        return int(np.diff(unknown) @ correct[:-1])

    return _total(wins, ranking.unknown, ranking.correct) / (ranking.n_unknown * ranking.n_known)


def ccr_at_fpr(ranking: Ranking, fpr: float) -> float:
    """The largest share of known items accepted and correctly classified, in [0, 1], at a τ that accepts at most `fpr`,
    in [0, 1], of the unknown ones: one point of `oscr_curve` (CCR@FPR of Dhamija et al. 2018; face recognition calls it
    DIR@FAR, the open-set identification rate).

    Raises:
        OsmlError: `fpr` out of range.
    """
    if not 0 <= checked_number("fpr", fpr) <= 1:
        raise OsmlError(f"fpr must be at least 0 and at most 1, not {fpr}: 0.01 is a usual one")
    if not ranking.has_both:
        return nan
    row = bisect_right(ranking.unknown, fpr, key=lambda accepted: accepted / ranking.n_unknown) - 1
    return float(ranking.correct[row] / ranking.n_known)


def accuracy(ranking: Ranking) -> float:
    """`closed_set_accuracy` from the ranking; NaN without known items."""
    return float(ranking.correct[-1] / ranking.n_known) if ranking.n_known else nan


RANK_METRICS: dict[str, Callable[[Ranking], float]] = {
    "closed_set_accuracy": accuracy,
    "auroc": auroc,
    "aupr_unknown": aupr_unknown,
    "aupr_known": aupr_known,
    "fpr95": fpr95,
    "oscr": oscr,
    "fpr95_unknown_positive": partial(fpr_at_tpr, tpr=0.95, positive="unknown"),
    "open_auc": open_auc,
    "ccr_at_fpr_0_1": partial(ccr_at_fpr, fpr=0.1),
    "ccr_at_fpr_0_01": partial(ccr_at_fpr, fpr=0.01),
    "ccr_at_fpr_0_001": partial(ccr_at_fpr, fpr=0.001),
    "eer": eer,
    "detection_error": detection_error,
    "best_youden": best_youden,
    "autc": autc,
}
"""The scalars that a ranking gives, by the name of their field in `OpenSetMetrics`."""


def roc_curve(ranking: Ranking) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points `(known rejected, unknown rejected, τ)`, each `(M + 1,)`, with τ falling: from (0, 0) to (1, 1).

    Unknown = positive: x is the false-positive and y the true-positive rate. τ = -inf stands for "all rejected".
    `roc_curve(thin(ranking, 500))` has at most 500 points.

    Raises:
        OsmlError: no known or no unknown items.
    """
    _require_both(ranking)
    known, unknown = _rejected(ranking.known), _rejected(ranking.unknown)
    return known / known[-1], unknown / unknown[-1], ranking.tau[::-1]


def oscr_curve(ranking: Ranking) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points `(FPR, CCR, τ)` of `oscr`, each `(M + 1,)`, with τ rising: from (0, 0) to (1, closed-set accuracy).

    Also known as the DIR@FAR curve.

    Raises:
        OsmlError: no known or no unknown items.
    """
    _require_both(ranking)
    return ranking.unknown / ranking.n_unknown, ranking.correct / ranking.n_known, ranking.tau


def precision_recall_curve(ranking: Ranking, positive: Kind = "unknown") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The points `(recall, precision, τ)`, each `(M,)`, with rising recall, which ends at 1.

    Args:
        positive: "unknown": what is rejected (score > τ), with τ falling to -inf. "known": what is accepted, with τ
            rising to the largest score.

    Raises:
        OsmlError: no known or no unknown items, or another `positive`.
    """
    _check_kind(positive)
    _require_both(ranking)
    if positive == "unknown":
        true, false, tau = _rejected(ranking.unknown), _rejected(ranking.known), ranking.tau[::-1]
    else:
        true, false, tau = ranking.known, ranking.unknown, ranking.tau
    return true[1:] / true[-1], true[1:] / (true[1:] + false[1:]), tau[1:]


def closed_set_accuracy(labels: Values, predictions: Values) -> float:
    """The share of known items whose predicted class is their own, nothing rejected, in [0, 1]; NaN without known."""
    labels, predictions = check_labels(labels), check_predictions(predictions)
    check_same_length(labels=labels, predictions=predictions)
    known = np.count_nonzero(labels != UNKNOWN)
    return float(np.count_nonzero(labels == predictions) / known) if known else nan


def openness(n_known_classes: int, n_unknown_classes: int) -> float:
    """1 − √(2 K / (2 K + U)), in [0, 1), of a test with K known and U unknown classes: 0 is a closed set.

    Scheirer et al. 2013, "Toward open set recognition", 1 − √(2 · training / (testing + target classes)): training and
    target classes are the known ones, testing ones are both kinds.

    Raises:
        OsmlError: no known class, or a negative number of unknown ones.
    """
    whole = all(isinstance(n, Integral) and not isinstance(n, bool) for n in (n_known_classes, n_unknown_classes))
    if not whole or n_known_classes < 1 or n_unknown_classes < 0:
        raise OsmlError(
            f"openness needs whole numbers, at least 1 known class and 0 unknown ones, not {n_known_classes!r} and "
            f"{n_unknown_classes!r}"
        )
    return 1 - sqrt(2 * n_known_classes / (2 * n_known_classes + n_unknown_classes))


def _rejected(accepted: np.ndarray) -> np.ndarray:
    """Items with score > τ, for falling τ, from the items with score <= τ, for rising τ."""
    return accepted[-1] - accepted[::-1]


def _total(term: Callable, *columns: np.ndarray) -> float:
    """Σ of `term` over the steps from each row to the next, a block of them at a time."""
    blocks = range(0, columns[0].size - 1, BLOCK)
    return sum(term(*(column[start : start + BLOCK + 1] for column in columns)) for start in blocks)


def _twice_area(x: np.ndarray, y: np.ndarray) -> int:
    """Twice the trapezoid area under y over x: a whole number, so exact, as long as a block fits into 63 bits."""
    return int(np.diff(x) @ (y[1:] + y[:-1]))


def _check_kind(positive: str) -> None:
    if positive not in ("known", "unknown"):
        raise OsmlError(f"positive must be 'known' or 'unknown', not '{positive}'")


def _require_both(ranking: Ranking) -> None:
    if not ranking.has_both:
        counts = f"{ranking.n_known} known and {ranking.n_unknown} unknown"
        raise OsmlError(f"a curve needs known and unknown items, but there are {counts}: give at least one of each")
