"""How sure a metric is: intervals, and the paired comparison of two detectors on the same items.

For the AUROC there is DeLong's closed form; for any rank metric the bootstrap, which draws known and unknown items
anew, each kind as many as there were, and counts the draws along the one sort: it never sorts again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan, sqrt

import numpy as np
from scipy.stats import norm
from tqdm import tqdm

from .. import UNKNOWN
from ..errors import OsmlError, unknown_name
from ..registry import checked_count, checked_number
from .checks import Values, check_labels, check_predictions, check_scores, check_vector
from .functional import RANK_METRICS, Ranking, auroc, rank


@dataclass(frozen=True)
class Interval:
    """A metric and its confidence interval."""

    estimate: float
    low: float
    high: float
    standard_error: float


@dataclass(frozen=True)
class Comparison:
    """Two detectors on the same items."""

    first: float
    second: float
    difference: Interval
    """first − second."""
    p_value: float
    """Two-sided, of the hypothesis that both are equal."""


def delong_interval(ranking: Ranking, level: float = 0.95) -> Interval:
    """The AUROC with its normal interval, cut to [0, 1]. O(M) after the sort (Sun & Xu 2014, "Fast implementation of
    DeLong's algorithm"; DeLong et al. 1988).

    The variance is that of the items' placements: S²(V of unknown) / n_unknown + S²(V of known) / n_known. Where the
    AUROC is 0 or 1 it is 0, and the interval a point, which says that there are too few items, not that it is certain.

    Raises:
        OsmlError: fewer than two items of a kind; `level` not inside (0, 1).
    """
    if not isinstance(ranking, Ranking):
        raise OsmlError("delong_interval takes a ranking: give functional.rank(scores, labels, predictions)")
    z = _quantile(level)
    _check_enough(ranking)
    of_unknown, of_known = _placements(ranking)
    unknown, known = np.diff(ranking.unknown), np.diff(ranking.known)
    estimate = auroc(ranking)

    def variance_of_mean(placements: np.ndarray, counts: np.ndarray, n: int) -> float:
        return float(counts @ (placements - estimate) ** 2) / (n - 1) / n

    error = sqrt(
        variance_of_mean(of_unknown, unknown, ranking.n_unknown) + variance_of_mean(of_known, known, ranking.n_known)
    )
    return Interval(estimate, max(0.0, estimate - z * error), min(1.0, estimate + z * error), error)


def delong_test(
    first: Values, second: Values, labels: Values, level: float = 0.95, *, groups: Values | None = None
) -> Comparison:
    """Whether two detectors' AUROCs differ on the same items (DeLong et al. 1988, eq. 5). O(N log N).

    Args:
        first, second: `(N,)` the unknown scores of the two detectors.
        labels: `(N,)` int, the true known class or `UNKNOWN`.
        level: of the interval of the difference.
        groups: `(N,)` integers or strings: items of one group, such as near-copies, count once in the variance
            (Obuchowski 1997, "Nonparametric analysis of clustered ROC curve data"); None = all are apart.

    Raises:
        OsmlError: as `functional.rank`; fewer than two items of a kind; `level` not inside (0, 1).
    """
    z = _quantile(level)
    scores, labels = [check_scores(first), check_scores(second)], check_labels(labels)
    rankings = [rank(s, labels, np.zeros_like(labels)) for s in scores]
    unknown = labels == UNKNOWN
    _check_enough(rankings[0])
    of_unknown, of_known = [], []
    for ranking, values in zip(rankings, scores, strict=True):
        row = np.searchsorted(ranking.tau[1:], values)
        placed = _placements(ranking)
        of_unknown.append(placed[0][row[unknown]])
        of_known.append(placed[1][row[~unknown]])
    # The difference of two means over the same items is the mean of the items' differences.
    numbers = np.arange(len(labels)) if groups is None else _check_groups(groups, len(labels))
    error = sqrt(_clustered_variance(numbers, (unknown, ~unknown), (of_unknown, of_known)))
    estimates = [auroc(ranking) for ranking in rankings]
    difference = estimates[0] - estimates[1]
    p_value = float(2 * norm.sf(abs(difference) / error)) if error else float(difference == 0)
    return Comparison(*estimates, Interval(difference, difference - z * error, difference + z * error, error), p_value)


def _clustered_variance(
    groups: np.ndarray, kinds: Sequence[np.ndarray], placements: Sequence[Sequence[np.ndarray]]
) -> float:
    """Variance of the sum of two means, over the unknown and over the known items, of differences that are independent
    between groups: that of each group's deviation, and G / (G − 1) of each kind for the mean that was estimated."""
    numbers = np.unique(groups, return_inverse=True)[1]
    total = np.zeros(numbers.max() + 1)
    for kind, (a, b) in zip(kinds, placements, strict=True):
        difference = (a - b) - (a - b).mean()
        n_groups = len(np.unique(numbers[kind]))
        scale = sqrt(n_groups / (n_groups - 1)) / len(a) if n_groups > 1 else nan
        total += scale * np.bincount(numbers[kind], difference, len(total))
    return float(total @ total)


def bootstrap_intervals(
    scores: Values,
    labels: Values,
    predictions: Values,
    metrics: Sequence[str] = ("auroc", "oscr", "fpr95"),
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: Values | None = None,
) -> dict[str, Interval]:
    """Percentile intervals (Efron 1979) of rank metrics, the known and the unknown items drawn apart.

    O(N log N) once and O(N) a draw; the memory is that of a few rankings, whatever the number of draws.

    Args:
        scores, labels, predictions: as for `open_set_metrics`, with items of both kinds.
        metrics: names in `functional.RANK_METRICS`.
        draws: how often the items are drawn.
        level: of the intervals.
        seed: the same seed gives the same draws.
        groups: `(N,)` integers or strings: items of one group, such as near-copies (`copies.copy_sets`), are drawn
            together (cluster bootstrap: Field & Welsh 2007), so that each group weighs once in how sure the metric
            is; None = every item is a group of its own.

    Raises:
        OsmlError: as `open_set_metrics`; items of one kind only; an unknown metric; arguments out of range.
    """
    _check_names(metrics)
    _quantile(level)
    items = [_Items(scores, labels, predictions, groups)]
    drawn = np.array([[RANK_METRICS[name](r) for name in metrics] for (r,) in _draws(items, draws, seed)])
    estimates = [RANK_METRICS[name](items[0].ranking) for name in metrics]
    return {
        name: _percentiles(estimate, column, level)
        for name, estimate, column in zip(metrics, estimates, drawn.T, strict=True)
    }


def bootstrap_test(
    first: tuple[Values, Values],
    second: tuple[Values, Values],
    labels: Values,
    metric: str = "auroc",
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: Values | None = None,
) -> Comparison:
    """Whether two detectors differ in a rank metric, on the same draws of the same items.

    Args:
        first, second: the `(scores, predictions)` of the two detectors, `(N,)` each.
        labels: `(N,)` int, the true known class or `UNKNOWN`.
        metric: a name in `functional.RANK_METRICS`.
        draws, level, seed, groups: as for `bootstrap_intervals`.

    The p-value is twice the smaller share of draws, (b + 1) / (draws + 1), on which the difference is not above, or
    not below 0 (Davison & Hinkley 1997, §4.2): it is never below 2 / (draws + 1).

    Raises:
        OsmlError: as `bootstrap_intervals`.
    """
    _check_names([metric])
    _quantile(level)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in (first, second)):
        raise OsmlError("bootstrap_test takes the pair (scores, predictions) of each detector")
    items = [_Items(scores, labels, predictions, groups) for scores, predictions in (first, second)]
    figure = RANK_METRICS[metric]
    drawn = np.array([figure(one) - figure(other) for one, other in _draws(items, draws, seed)])
    estimates = [figure(each.ranking) for each in items]
    sides = [(np.count_nonzero(side) + 1) / (draws + 1) for side in (drawn <= 0, drawn >= 0)]
    p_value = nan if np.isnan(drawn).any() else min(1.0, 2 * float(min(sides)))
    return Comparison(*estimates, _percentiles(estimates[0] - estimates[1], drawn, level), p_value)


class _Items:
    """A ranking, and the row in it of each known and of each unknown item, in the order of the labels."""

    def __init__(self, scores: Values, labels: Values, predictions: Values, groups: Values | None = None):
        self.ranking = rank(scores, labels, predictions)
        if not self.ranking.has_both:
            counts = f"{self.ranking.n_known} known and {self.ranking.n_unknown} unknown"
            raise OsmlError(f"a bootstrap draws known and unknown items, but there are {counts}: give some of each")
        scores, labels, predictions = check_scores(scores), check_labels(labels), check_predictions(predictions)
        rows = np.searchsorted(self.ranking.tau[1:], scores)
        known = labels != UNKNOWN
        self.unknown = rows[~known]
        self.known = 2 * rows[known] + (labels == predictions)[known]  # odd where correct
        groups = None if groups is None else _check_groups(groups, len(scores))
        self.members = None if groups is None else tuple(_members(groups[kind]) for kind in (known, ~known))

    def drawn(self, known: np.ndarray, unknown: np.ndarray) -> Ranking:
        """The ranking of the items drawn, by their place among the known and among the unknown."""
        n_rows = self.ranking.tau.size - 1
        n_unknown = np.bincount(self.unknown[unknown], minlength=n_rows)
        n_known = np.bincount(self.known[known], minlength=2 * n_rows).reshape(n_rows, 2)
        n_correct, n_known = n_known[:, 1], n_known.sum(axis=1)
        occurs = np.flatnonzero(n_known + n_unknown)
        counts = (np.append(0, np.cumsum(n[occurs])) for n in (n_known, n_unknown, n_correct))
        return Ranking(np.append(-np.inf, self.ranking.tau[1:][occurs]), *counts)


def _draws(items: Sequence[_Items], draws: int, seed: int) -> Iterator[list[Ranking]]:
    rng = np.random.default_rng(seed)
    sizes, members = (items[0].known.size, items[0].unknown.size), items[0].members
    for _ in tqdm(range(checked_count("draws", draws)), desc="bootstrap", unit="draw", delay=1):
        if members is None:
            places = [rng.integers(n, size=n) for n in sizes]
        else:
            places = [np.concatenate([of[g] for g in rng.integers(len(of), size=len(of))]) for of in members]
        yield [each.drawn(*places) for each in items]


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """Places of the members of each group."""
    numbers = np.unique(groups, return_inverse=True)[1]
    return np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])


def _check_groups(groups: Values, n_items: int) -> np.ndarray:
    groups = check_vector(groups, "groups")
    if len(groups) != n_items:
        raise OsmlError(f"{len(groups)} groups for {n_items} items: give one for each item")
    if groups.dtype.kind not in "iuUO" or any(group != group or group is None for group in groups.tolist()):
        raise OsmlError(f"groups must be integers or strings, none missing; got {groups.dtype}")
    return groups


def _placements(ranking: Ranking) -> tuple[np.ndarray, np.ndarray]:
    """`(M,)` each: of an unknown item at each score the share of known items below it, of a known item the share of
    unknown ones above it; ties count half."""
    of_unknown = (ranking.known[1:] + ranking.known[:-1]) / (2 * ranking.n_known)
    of_known = 1 - (ranking.unknown[1:] + ranking.unknown[:-1]) / (2 * ranking.n_unknown)
    return of_unknown, of_known


def _percentiles(estimate: float, drawn: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), float(np.std(drawn, ddof=1)) if drawn.size > 1 else nan)


def _quantile(level: float) -> float:
    if not 0 < checked_number("level", level) < 1:
        raise OsmlError(f"level must be above 0 and below 1, not {level}: 0.95 is the usual one")
    return float(norm.ppf((1 + level) / 2))


def _check_enough(ranking: Ranking) -> None:
    if min(ranking.n_known, ranking.n_unknown) < 2:
        counts = f"{ranking.n_known} known and {ranking.n_unknown} unknown"
        raise OsmlError(f"a variance needs two items of each kind, but there are {counts}: give more")


def _check_names(metrics: Sequence[str]) -> None:
    if isinstance(metrics, str):
        raise OsmlError(f"metrics must be a list of names, not the name '{metrics}': give ['{metrics}']")
    for name in metrics:
        if name not in RANK_METRICS:
            raise unknown_name("rank metric", name, RANK_METRICS)
