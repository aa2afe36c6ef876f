"""All open-set metrics in one pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isfinite, nan

import numpy as np

from .. import UNKNOWN
from . import functional
from .checks import Values, check_labels, check_predictions, check_rejected, check_same_length
from .decisions import count_by_class


@dataclass(frozen=True)
class OpenSetMetrics:
    """Open-set metrics, each in [0, 1] but for `best_threshold`, and `youden`, which is in [-1, 1].

    NaN where undefined: what is threshold-free, all but the accuracy, needs items of both kinds. From `macro_f1` on the
    fields describe a decision, and are None where none was given. See `osml_plugin.metrics.functional` for the
    definitions."""

    n_known_items: int
    n_unknown_items: int
    closed_set_accuracy: float
    """Of the known items; nothing rejected."""
    auroc: float
    aupr_unknown: float
    """Unknown = positive."""
    aupr_known: float
    """Known = positive."""
    fpr95: float
    """The share of unknown items accepted where at least 95 % of the known are. Lower is better."""
    oscr: float
    fpr95_unknown_positive: float
    """The share of known items rejected where at least 95 % of the unknown are. Lower is better."""
    open_auc: float
    """As `oscr`, but a tie is a loss."""
    ccr_at_fpr_0_1: float
    """Known items accepted and correctly classified where at most 0.1 of the unknown are accepted (DIR@FAR)."""
    ccr_at_fpr_0_01: float
    ccr_at_fpr_0_001: float
    eer: float
    """Where as many of the known are rejected as of the unknown accepted. Lower is better."""
    detection_error: float
    """The least mean of the two error rates. Lower is better."""
    best_youden: float
    """Unknown rejected − known rejected at the best threshold."""
    autc: float
    """The mean of both error rates over the range of the scores. Lower is better."""
    best_threshold: float
    """The τ of `best_youden`, in the units of the scores."""
    openness: float | None
    """0 is a closed set; None where the number of unknown classes was not given."""
    macro_f1: float | None
    """Over the known classes, and unknown as one more."""
    known_rejected: float | None
    """Lower is better."""
    unknown_rejected: float | None
    youden: float | None
    """Unknown rejected − known rejected."""
    open_set_accuracy: float | None
    """Of all items: known ones called their class, unknown ones unknown."""
    known_rejected_spread: float | None
    """The standard deviation over the known classes of the share rejected. Lower is better: one threshold fits all."""
    known_rejected_worst: float | None
    """The largest share rejected of a known class."""

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain numbers for JSON: what is undefined (NaN), infinite or was not asked for is None."""
        return {name: None if value is None or not isfinite(value) else value for name, value in asdict(self).items()}


def open_set_metrics(
    scores: Values,
    labels: Values,
    predictions: Values,
    rejected: Values | None = None,
    *,
    n_unknown_classes: int | None = None,
) -> OpenSetMetrics:
    """Every open-set metric of one test set, from one sort. O(N log N); for memory see `functional.rank`.

    Scores on CUDA are sorted and counted there.

    Args:
        scores: `(N,)` unknown scores, higher = more unknown; infinities allowed, NaN not.
        labels: `(N,)` int, the true known class (from 0) or `UNKNOWN`.
        predictions: `(N,)` int, the closed-set class (from 0) of each item, rejected ones too. Those of unknown items
            matter for the decisions only.
        rejected: `(N,)` bool, the decision at a threshold: True where the item was called unknown.
        n_unknown_classes: how many classes the unknown items have, for `openness`; labels do not tell.

    Raises:
        OsmlError: empty input, wrong shapes or lengths, NaN scores, non-integer or too small labels or predictions,
            decisions that are not bool.

    >>> metrics = open_set_metrics(scores=[0.1, 0.4, 0.3, 0.9], labels=[0, 1, -1, -1], predictions=[0, 1, 1, 0])
    >>> metrics.auroc, metrics.oscr, metrics.fpr95, metrics.macro_f1
    (0.75, 0.75, 0.5, None)
    """
    ranking = functional.rank(scores, labels, predictions)
    openness = None
    if n_unknown_classes is not None:
        labels = check_labels(labels)
        n_known_classes = np.unique(labels[labels != UNKNOWN]).size
        openness = functional.openness(n_known_classes, n_unknown_classes) if n_known_classes else nan
    decided = None
    if rejected is not None:
        labels, predictions, rejected = check_labels(labels), check_predictions(predictions), check_rejected(rejected)
        check_same_length(scores=labels, rejected=rejected)
        decided = count_by_class(labels, predictions, rejected)
    return OpenSetMetrics(
        n_known_items=ranking.n_known,
        n_unknown_items=ranking.n_unknown,
        **{name: metric(ranking) for name, metric in functional.RANK_METRICS.items()},
        best_threshold=functional.best_threshold(ranking),
        openness=openness,
        macro_f1=decided and decided.macro_f1,
        known_rejected=decided and decided.known_rejected,
        unknown_rejected=decided and decided.unknown_rejected,
        youden=decided and decided.youden,
        open_set_accuracy=decided and decided.open_set_accuracy,
        known_rejected_spread=decided and decided.rejected_spread,
        known_rejected_worst=decided and decided.rejected_worst,
    )
