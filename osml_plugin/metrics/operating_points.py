"""What many thresholds on the same scores would do, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import UNKNOWN
from .checks import Values, check_labels, check_predictions, check_same_length, check_scores, check_taus


@dataclass(frozen=True)
class OperatingPoints:
    """For each of T thresholds, `(T,)`: the share of known and of unknown items that it rejects (NaN where there are
    none), and the macro-F1 over the known classes and unknown."""

    tau: np.ndarray
    known_rejected: np.ndarray
    unknown_rejected: np.ndarray
    macro_f1: np.ndarray


def operating_points(scores: Values, labels: Values, predictions: Values, taus: Values) -> OperatingPoints:
    """The decisions of every τ of `(T,)` taus at once: O((N + C T) log N), where deciding one by one takes O(N T).

    Args:
        scores, labels, predictions: as for `open_set_metrics`; an item is called unknown if its score is above τ.

    The figures are those of `open_set_metrics(…, rejected=scores > τ)`.

    Raises:
        OsmlError: as `open_set_metrics`; taus that are none, NaN, or of another shape.
    """
    scores, labels, predictions = check_scores(scores), check_labels(labels), check_predictions(predictions)
    check_same_length(scores=scores, labels=labels, predictions=predictions)
    taus = check_taus(taus)
    order = np.argsort(scores)
    scores, labels, predictions = scores[order], labels[order], predictions[order]

    def accepted(of: np.ndarray) -> np.ndarray:
        return np.searchsorted(scores[of], taus, side="right")

    known = labels != UNKNOWN
    n_known, n_unknown = np.count_nonzero(known), np.count_nonzero(~known)
    known_accepted, unknown_accepted = accepted(known), accepted(~known)
    # F1 = 2 TP / (items of the class + items called so), over the classes that occur in either.
    called = len(scores) - known_accepted - unknown_accepted
    occurs = (n_unknown + called > 0).astype(np.float64)
    total = 2 * (n_unknown - unknown_accepted) / np.maximum(n_unknown + called, 1)
    for c in np.union1d(labels[known], predictions):
        is_c, called_c = labels == c, predictions == c
        size = np.count_nonzero(is_c) + accepted(called_c)
        total += 2 * accepted(is_c & called_c) / np.maximum(size, 1)
        occurs += size > 0
    return OperatingPoints(
        taus,
        1 - known_accepted / n_known if n_known else np.full(len(taus), np.nan),
        1 - unknown_accepted / n_unknown if n_unknown else np.full(len(taus), np.nan),
        total / occurs,
    )
