"""All open-set metrics in one pass."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import isnan

from . import functional
from .checks import Values, check_labels, check_predictions, check_rejected, check_same_length, check_scores


@dataclass(frozen=True)
class OpenSetMetrics:
    """Open-set metrics, each in [0, 1]; NaN where undefined: all but the accuracy, the F1 and the share of known
    rejected need unknown items, and all but the F1 and the share of unknown rejected need known ones. The last three
    describe a decision, and are None where none was given. See `osml_plugin.metrics.functional` for the definitions."""

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
    macro_f1: float | None
    """Over the known classes, and unknown as one more."""
    known_rejected: float | None
    """Lower is better."""
    unknown_rejected: float | None

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain numbers for JSON: what is undefined (NaN) or was not asked for is None."""
        return {name: None if value is None or isnan(value) else value for name, value in asdict(self).items()}


def open_set_metrics(
    scores: Values, labels: Values, predictions: Values, rejected: Values | None = None
) -> OpenSetMetrics:
    """Every open-set metric of one test set, from one sort. O(N log N).

    Args:
        scores: `(N,)` unknown scores, higher = more unknown; infinities allowed, NaN not.
        labels: `(N,)` int, the true known class (from 0) or `UNKNOWN`.
        predictions: `(N,)` int, the closed-set class (from 0) of each item, rejected ones too. Those of unknown items
            matter for `macro_f1` only.
        rejected: `(N,)` bool, the decision at a threshold: True where the item was called unknown.

    Raises:
        OsmlError: empty input, wrong shapes or lengths, NaN scores, non-integer or too small labels or predictions,
            decisions that are not bool.

    >>> metrics = open_set_metrics(scores=[0.1, 0.4, 0.3, 0.9], labels=[0, 1, -1, -1], predictions=[0, 1, 1, 0])
    >>> metrics.auroc, metrics.oscr, metrics.fpr95, metrics.macro_f1
    (0.75, 0.75, 0.5, None)
    """
    scores, labels, predictions = check_scores(scores), check_labels(labels), check_predictions(predictions)
    ranking = functional.rank(scores, labels, predictions)
    macro_f1 = known_rejected = unknown_rejected = None
    if rejected is not None:
        rejected = check_rejected(rejected)
        check_same_length(scores=scores, rejected=rejected)
        macro_f1 = functional.macro_f1(labels, predictions, rejected)
        known_rejected = functional.known_rejected(labels, rejected)
        unknown_rejected = functional.unknown_rejected(labels, rejected)
    return OpenSetMetrics(
        n_known_items=ranking.n_known,
        n_unknown_items=ranking.n_unknown,
        closed_set_accuracy=functional.closed_set_accuracy(labels, predictions),
        auroc=functional.auroc(ranking),
        aupr_unknown=functional.aupr_unknown(ranking),
        aupr_known=functional.aupr_known(ranking),
        fpr95=functional.fpr95(ranking),
        oscr=functional.oscr(ranking),
        macro_f1=macro_f1,
        known_rejected=known_rejected,
        unknown_rejected=unknown_rejected,
    )
