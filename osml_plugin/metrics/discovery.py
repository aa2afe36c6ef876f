"""How well a grouping of unknown items matches their true classes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from ..errors import OsmlError
from .checks import Values, check_integers, check_same_length, check_vector

LEFT_OUT = -1
"""The found label of an item that the grouping left out."""


@dataclass(frozen=True)
class DiscoveryMetrics:
    """Agreement of a grouping with the true classes; all but `ari` (at most 1, 0 by chance) and
    `n_classes_error` are in [0, 1]."""

    accuracy: float
    """The share of items in their class, found and true classes paired one to one so that this is largest."""
    nmi: float
    """Mutual information over the arithmetic mean of the two entropies."""
    ari: float
    bcubed_precision: float
    bcubed_recall: float
    bcubed_f1: float
    n_classes_true: int
    n_classes_found: int
    n_classes_error: float
    """|found − true| / true classes, from 0; lower is better."""
    pair_precision: float
    """Of the pairs of items in one group, the share of one class."""
    pair_recall: float
    """Of the pairs of items of one class, the share in one group."""
    pair_f1: float
    accuracy_old: float | None
    """`accuracy` among the items of old classes, in the same pairing; None where there are none, or no one said so."""
    accuracy_new: float | None

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain numbers for JSON: undefined is None; without `is_old` there is no `accuracy_old`, no `accuracy_new`."""
        figures = asdict(self).items()
        return {name: None if value != value else value for name, value in figures if value is not None}


def discovery_metrics(labels_true: Values, labels_found: Values, is_old: Values | None = None) -> DiscoveryMetrics:
    """Compare a grouping with the true classes of the same items.

    Accuracy is the "v2" of generalized category discovery (Vaze et al. 2022, "Generalized category discovery"): one
    Hungarian assignment over all items, read apart for the items of old and of new classes afterwards ("v1" assigns
    each part by itself, which flatters). B-cubed precision and recall (Bagga & Baldwin 1998; Amigó et al. 2009) are
    means over items i: of the items in i's group, the share of i's class; of the items of i's class, the share in i's
    group; F1 is the harmonic mean of those two means.

    The pair measures count pairs of items; where there are no pairs in one group (of one class), none is wrong, and
    precision (recall) is 1.

    Items that the grouping left out (found label -1) are wrong in `accuracy` and are no found class; for the others
    each is a group of its own, which is pure, so leaving out trades recall for precision.

    The time is O(N log N), and the assignment's, cubic in the smaller number of classes.

    Args:
        labels_true: `(N,)` the true class of each item, as strings or as integers from 0.
        labels_found: `(N,)` int, the found group (from 0) of each item, or -1 where it was left out.
        is_old: `(N,)` bool, True where the class of the item was known before (its true class, not the found one).

    Raises:
        OsmlError: empty input, wrong shapes or lengths, labels of another type, integers too small.

    >>> discovery_metrics(["cat", "cat", "dog", "dog"], [7, 7, 3, -1]).accuracy
    0.75
    """
    true = _class_index(labels_true)
    found = check_integers(labels_found, "labels_found", LEFT_OUT)
    check_same_length(labels_true=true, labels_found=found)
    left_out = found == LEFT_OUT
    classes, groups = np.unique(found, return_inverse=True)
    n_classes_found = int(np.count_nonzero(classes != LEFT_OUT))
    groups -= classes.size - n_classes_found  # LEFT_OUT sorts first
    groups[left_out] = n_classes_found + np.arange(np.count_nonzero(left_out))
    counts = _contingency(true, groups)
    precision, recall = _bcubed(counts)
    pair_precision, pair_recall, pair_f1 = _pairs(counts)
    group_of = _pairing(counts[:, :n_classes_found])
    hits = group_of[true] == groups
    old = _check_old(is_old, true)
    return DiscoveryMetrics(
        accuracy=_mean(hits),
        nmi=float(normalized_mutual_info_score(true, groups)),
        ari=float(adjusted_rand_score(true, groups)),
        bcubed_precision=precision,
        bcubed_recall=recall,
        bcubed_f1=2 * precision * recall / (precision + recall),
        n_classes_true=counts.shape[0],
        n_classes_found=n_classes_found,
        n_classes_error=abs(n_classes_found - counts.shape[0]) / counts.shape[0],
        pair_precision=pair_precision,
        pair_recall=pair_recall,
        pair_f1=pair_f1,
        accuracy_old=None if old is None or not old.any() else _mean(hits[old]),
        accuracy_new=None if old is None or old.all() else _mean(hits[~old]),
    )


def _class_index(labels_true: Values) -> np.ndarray:
    """The true classes `(N,)` as int64, without gaps from 0."""
    labels = check_vector(labels_true, "labels_true")
    if labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels):
        labels = labels.astype(str)
    if labels.dtype.kind != "U":
        # -1 is refused too: not knowing an item's class is not a class.
        labels = check_integers(labels, "labels_true", 0)
    return np.unique(labels, return_inverse=True)[1]


def _contingency(true: np.ndarray, groups: np.ndarray) -> csr_array:
    """`(true classes, groups)` int64: how many items each pair has."""
    return coo_array((np.ones(true.size, dtype=np.int64), (true, groups))).tocsr()


def _pairing(counts: csr_array) -> np.ndarray:
    """`(true classes,)` the found class of each, -1 for none, one to one, so that most items are in their class."""
    group_of = np.full(counts.shape[0], -1)
    true, found = linear_sum_assignment(counts.toarray(), maximize=True)
    group_of[true] = found
    return group_of


def _check_old(is_old: Values | None, true: np.ndarray) -> np.ndarray | None:
    if is_old is None:
        return None
    old = check_vector(is_old, "is_old")
    if old.dtype != np.bool_:
        raise OsmlError(f"is_old must be bool, not {old.dtype}: True where the item's class was known before")
    check_same_length(labels_true=true, is_old=old)
    return old


def _mean(hits: np.ndarray) -> float:
    return float(np.count_nonzero(hits) / hits.size)


def _pairs(counts: csr_array) -> tuple[float, float, float]:
    """Precision, recall and F1 = 2 TP / (2 TP + FP + FN) of the pairs of items."""
    together, grouped, alike = (
        int((sizes * (sizes - 1)).sum()) for sizes in (counts.data, counts.sum(axis=0), counts.sum(axis=1))
    )
    return (
        together / grouped if grouped else 1.0,
        together / alike if alike else 1.0,
        2 * together / (grouped + alike) if grouped + alike else 1.0,
    )


def _bcubed(counts: csr_array) -> tuple[float, float]:
    cells = counts.tocoo()
    # Each of the n items of a cell has n items of its class in its group.
    pairs = cells.data.astype(np.float64) ** 2
    n_items = counts.sum()
    precision = np.sum(pairs / counts.sum(axis=0)[cells.col]) / n_items
    recall = np.sum(pairs / counts.sum(axis=1)[cells.row]) / n_items
    return float(precision), float(recall)
