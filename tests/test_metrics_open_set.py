from __future__ import annotations

import doctest
import json
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from math import inf, isnan, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_ood.metrics import functional as pytorch_ood_functional
from scipy.integrate import trapezoid
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    roc_auc_score,
)
from sklearn.metrics import (
    precision_recall_curve as sklearn_precision_recall_curve,
)

from osml_plugin import UNKNOWN
from osml_plugin.errors import OsmlError
from osml_plugin.metrics import OpenSetMetrics, open_set, open_set_metrics
from osml_plugin.metrics.functional import (
    aupr_known,
    aupr_unknown,
    auroc,
    autc,
    best_threshold,
    ccr_at_fpr,
    closed_set_accuracy,
    fpr95,
    fpr_at_tpr,
    known_rejected,
    macro_f1,
    open_set_accuracy,
    openness,
    opis,
    oscr,
    oscr_curve,
    precision_recall_curve,
    rank,
    roc_curve,
    thin,
    unknown_rejected,
)

FEW = settings(deadline=None, max_examples=120)
TIED = st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0])
ANY = st.floats(allow_nan=False)
CLASS = st.sampled_from([0, 1, 2, 7, 10**12])


def items_of(score, with_both):
    """Scores, labels, predictions and decisions of 1 to 30 items, of both kinds if asked."""
    item = st.tuples(score, st.one_of(st.just(UNKNOWN), CLASS), CLASS, st.booleans())
    both = st.tuples(st.tuples(score, CLASS, CLASS, st.booleans()), st.tuples(score, st.just(-1), CLASS, st.booleans()))
    some = st.lists(item, min_size=1, max_size=30)
    if with_both:
        some = st.tuples(both, st.lists(item, max_size=30)).map(lambda parts: [*parts[0], *parts[1]])
    return some.map(
        lambda rows: (
            np.array([r[0] for r in rows], dtype=float),
            np.array([r[1] for r in rows]),
            np.array([r[2] for r in rows]),
            np.array([r[3] for r in rows]),
        )
    )


ITEMS = st.one_of(items_of(TIED, True), items_of(ANY, True))


def same(first: OpenSetMetrics, second: OpenSetMetrics) -> None:
    first, second = ({n: v for n, v in metrics.to_dict().items() if v is not None} for metrics in (first, second))
    assert first == pytest.approx(second, rel=1e-12, abs=1e-15)


# The slow twins: every pair, or every τ.


def pairwise_auroc(scores, labels):
    known, unknown = scores[labels >= 0], scores[labels == UNKNOWN]
    wins = sum(1.0 if u > k else 0.5 if u == k else 0.0 for u in unknown for k in known)
    return wins / (len(known) * len(unknown))


def operating_points(scores, labels, predictions):
    """Of each rule "accept the items in this mask", from none to all: accepted known, correct and unknown items."""
    masks = [np.zeros(len(scores), bool), *(scores <= tau for tau in sorted(set(scores.tolist())))]
    for accepted in masks:
        known = accepted & (labels >= 0)
        yield int(known.sum()), int((known & (labels == predictions)).sum()), int((accepted & (labels < 0)).sum())


def naive_oscr(scores, labels, predictions):
    points = list(operating_points(scores, labels, predictions))
    area = Fraction(0)
    for (_, correct_before, unknown_before), (_, correct, unknown) in pairwise(points):
        area += Fraction(unknown - unknown_before) * (correct_before + correct) / 2
    return float(area / (points[-1][0] * points[-1][2]))


def naive_average_precision(scores, positive):
    total, area, recall_before = positive.sum(), 0.0, 0.0
    for tau in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= tau
        recall = (taken & positive).sum() / total
        area += (recall - recall_before) * (taken & positive).sum() / taken.sum()
        recall_before = recall
    return area


def naive_fpr(scores, labels, tpr, positive):
    known, unknown = (labels >= 0).sum(), (labels < 0).sum()
    best = inf
    for n_known, _, n_unknown in operating_points(scores, labels, labels):
        if positive == "known":
            true, false = Fraction(n_known, int(known)), n_unknown / unknown
        else:
            true, false = Fraction(int(unknown) - n_unknown, int(unknown)), (known - n_known) / known
        if true >= Fraction(str(tpr)):
            best = min(best, false)
    return best


def naive_macro_f1(labels, predictions, rejected):
    decided = [UNKNOWN if r else p for p, r in zip(predictions, rejected, strict=True)]
    f1 = []
    for c in set(labels.tolist()) | {int(d) for d in decided}:
        hits = sum(t == c and d == c for t, d in zip(labels, decided, strict=True))
        f1.append(2 * hits / (sum(t == c for t in labels) + sum(d == c for d in decided)))
    return sum(f1) / len(f1)


def naive_best_youden(scores, labels):
    """The largest J over every rule, and the lowest τ that has it; -inf stands for "all rejected"."""
    rules = [(np.ones(len(scores), bool), -inf), *((scores > tau, tau) for tau in scores.tolist())]
    unknown, best = labels < 0, []
    for rejected, tau in rules:
        shares = (Fraction(int(rejected[of].sum()), int(of.sum())) for of in (unknown, ~unknown))
        best.append((next(shares) - next(shares), -tau))
    return float(max(best)[0]), -max(best)[1]


def naive_eer(scores, labels):
    """Every segment of the ROC curve, cut with the diagonal; exact."""
    points = [
        (Fraction(n_unknown), Fraction(n_known)) for n_known, _, n_unknown in operating_points(scores, labels, labels)
    ]
    n_unknown, n_known = points[-1]
    rates = [(u / n_unknown, 1 - k / n_known) for u, k in points]  # unknown accepted, known rejected
    for (x0, y0), (x1, y1) in pairwise(rates):
        if x0 <= y0 and x1 >= y1:
            return float(x0 + (x1 - x0) * (y0 - x0) / ((y0 - x0) - (y1 - x1)))
    raise AssertionError("the curve runs from below the diagonal to above it")


def naive_ccr(scores, labels, predictions, fpr):
    points = list(operating_points(scores, labels, predictions))
    n_known, _, n_unknown = points[-1]
    return max(correct for _, correct, u in points if Fraction(u, n_unknown) <= Fraction(str(fpr))) / n_known


def naive_open_auc(scores, labels, predictions):
    known, unknown = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
    wins = sum(labels[k] == predictions[k] and scores[u] > scores[k] for k in known for u in unknown)
    return wins / (len(known) * len(unknown))


def naive_opis(scores, labels, predictions, taus):
    variances = []
    for tau in taus:
        utilities = []
        for c in sorted(set(labels.tolist()) - {UNKNOWN}):
            called = [s <= tau and p == c for s, p in zip(scores, predictions, strict=True)]
            inside = [x for x, t in zip(called, labels, strict=True) if t == c]
            outside = [not x for x, t in zip(called, labels, strict=True) if t != c]
            both = sum(inside) / len(inside), sum(outside) / len(outside)
            utilities.append(2 * both[0] * both[1] / sum(both) if sum(both) else 0)
        variances.append(np.mean([(u - np.mean(utilities)) ** 2 for u in utilities]))
    return np.mean(variances)


@FEW
@given(ITEMS)
def test_the_further_metrics_are_their_slow_twins(items):
    scores, labels, predictions, rejected = items
    metrics = open_set_metrics(scores, labels, predictions, rejected, n_unknown_classes=3)
    assert metrics.fpr95_unknown_positive == naive_fpr(scores, labels, 0.95, "unknown")
    assert metrics.open_auc == pytest.approx(naive_open_auc(scores, labels, predictions), rel=1e-12)
    for name, fpr in (("ccr_at_fpr_0_1", 0.1), ("ccr_at_fpr_0_01", 0.01), ("ccr_at_fpr_0_001", 0.001)):
        assert getattr(metrics, name) == naive_ccr(scores, labels, predictions, fpr)
    youden, tau = naive_best_youden(scores, labels)
    assert metrics.best_youden == pytest.approx(youden, abs=1e-15)
    assert metrics.best_threshold == tau
    assert metrics.detection_error == pytest.approx((1 - youden) / 2, abs=1e-15)
    assert metrics.eer == pytest.approx(naive_eer(scores, labels), abs=1e-12)
    n_classes = len(set(labels.tolist()) - {UNKNOWN})
    assert metrics.openness == pytest.approx(1 - (2 * n_classes / (2 * n_classes + 3)) ** 0.5)

    decided = [UNKNOWN if r else p for p, r in zip(predictions, rejected, strict=True)]
    assert metrics.open_set_accuracy == np.mean(decided == labels)
    assert metrics.youden == np.mean(rejected[labels < 0]) - np.mean(rejected[labels >= 0])
    by_class = [np.mean(rejected[labels == c]) for c in set(labels.tolist()) - {UNKNOWN}]
    assert metrics.known_rejected_spread == pytest.approx(np.std(by_class), abs=1e-15)
    assert metrics.known_rejected_worst == max(by_class)


@FEW
@given(ITEMS, st.sampled_from([0, 0.05, 0.07, 0.29, 0.5, 0.57, 1.0]))
def test_ccr_at_any_fpr_is_the_best_over_every_threshold(items, fpr):
    scores, labels, predictions, _ = items
    assert ccr_at_fpr(rank(scores, labels, predictions), fpr) == naive_ccr(scores, labels, predictions, fpr)


@FEW
@given(items_of(st.sampled_from([-3.0, 0.0, 0.5, 4.0]), True))
def test_autc_is_the_area_under_the_mean_of_both_error_rates(items):
    scores, labels, predictions, _ = items
    found = autc(rank(scores, labels, predictions))
    if len(set(scores)) == 1:
        assert isnan(found)
        return
    area, taus = Fraction(0), sorted(set(scores.tolist()))
    for low, high in pairwise(taus):  # the rates are constant from one score to the next
        rejected = scores > low
        rates = np.mean(rejected[labels >= 0]) + np.mean(~rejected[labels < 0])
        area += Fraction((high - low) / (taus[-1] - taus[0])) * Fraction(rates) / 2
    assert found == pytest.approx(float(area), abs=1e-12)


def test_autc_of_an_infinite_score_is_undefined():
    assert isnan(autc(rank([0.0, 1.0, inf], [0, 0, -1], [0, 0, 0])))
    assert isnan(autc(rank([-1.7e308, 1.7e308], [0, -1], [0, 0])))


@FEW
@given(ITEMS, st.lists(st.floats(-2, 2), min_size=1, max_size=6))
def test_opis_is_its_slow_twin(items, taus):
    scores, labels, predictions, _ = items
    if len(set(labels.tolist()) - {UNKNOWN}) < 2:
        with pytest.raises(OsmlError, match="give at least 2"):
            opis(scores, labels, predictions, taus)
        return
    found = opis(scores, labels, predictions, taus)
    assert found == pytest.approx(naive_opis(scores, labels, predictions, taus), abs=1e-12)
    assert 0 <= found <= 0.25


@pytest.mark.parametrize("levels", [7, None], ids=["ties", "distinct"])
def test_as_pytorch_ood(levels):
    rng = np.random.default_rng(5)
    labels = rng.integers(-1, 4, 3000)
    predictions = np.where(rng.random(3000) < 0.7, np.abs(labels), rng.integers(0, 4, 3000))
    scores = rng.normal(size=3000) + (labels == UNKNOWN)
    if levels:
        scores = np.round(scores * levels / 6) / levels
    s, y, p = map(torch.tensor, (scores, labels, predictions))
    metrics, theirs = open_set_metrics(scores, labels, predictions), pytorch_ood_functional
    assert metrics.auroc == pytest.approx(float(theirs.auroc(s, y)), rel=1e-12)
    assert metrics.oscr == pytest.approx(theirs.oscr_score(s, p, y), rel=1e-12)
    assert metrics.autc == pytest.approx(float(theirs.autc(s, y)), rel=1e-12)
    assert metrics.fpr95_unknown_positive == pytest.approx(float(theirs.fpr_at_tpr(s, y, 0.95)), rel=1e-12)
    assert metrics.closed_set_accuracy == pytest.approx(float(theirs.accuracy(p, y)), rel=1e-12)
    # Theirs is the trapezoid below the precision-recall curve, which is too optimistic where scores tie.
    recall, precision, _ = precision_recall_curve(rank(scores, labels, predictions))
    area = trapezoid(np.append(1.0 if levels is None else precision[0], precision), np.append(0.0, recall))
    if levels is None:
        assert metrics.aupr_unknown == pytest.approx(float(theirs.aupr(s, y)), abs=1e-3)
    else:
        assert metrics.aupr_unknown < float(theirs.aupr(s, y)) and area > metrics.aupr_unknown


def test_openness_is_that_of_the_paper():
    assert openness(10, 0) == 0
    assert openness(3, 6) == pytest.approx(pytorch_ood_functional.calc_openness(3, 9, 3))
    for wrong in ((0, 1), (1, -1), (2, 0.5), (2, "a"), (2, nan), (True, 1)):
        with pytest.raises(OsmlError, match="at least 1 known class"):
            openness(*wrong)


@FEW
@given(ITEMS)
def test_the_precision_recall_curve_is_that_of_scikit_learn(items):
    scores, labels, predictions, _ = items
    ranking = rank(scores, labels, predictions)
    # By way of the ranks: scikit-learn takes no infinite scores.
    ranks = np.unique(scores, return_inverse=True)[1]
    for positive, values in (("unknown", ranks), ("known", -ranks)):
        recall, precision, tau = precision_recall_curve(ranking, positive)
        p, r, _ = sklearn_precision_recall_curve((labels < 0) == (positive == "unknown"), values)
        assert np.allclose(recall, r[-2::-1]) and np.allclose(precision, p[-2::-1]) and len(tau) == len(recall)
        assert tau[-1] == (-inf if positive == "unknown" else scores.max())
    with pytest.raises(OsmlError, match="'known' or 'unknown', not 'ood'"):
        precision_recall_curve(ranking, "ood")


@FEW
@given(ITEMS, st.integers(2, 12))
def test_a_thin_ranking_has_some_of_the_rows_and_both_ends(items, points):
    ranking = rank(*items[:3])
    few = thin(ranking, points)
    assert 2 <= few.tau.size <= points
    rows = np.searchsorted(ranking.known + ranking.unknown, few.known + few.unknown)
    assert rows[0] == 0 and rows[-1] == ranking.tau.size - 1 and (np.diff(rows) > 0).all()
    for column in ("tau", "known", "unknown", "correct"):
        assert (getattr(few, column) == getattr(ranking, column)[rows]).all()


def test_thin_curves_keep_low_rates_and_the_shape():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, -1], 50_000)
    ranking = rank(rng.normal(size=100_000) + 2 * (labels < 0), labels, np.zeros(100_000, int))
    few = thin(ranking, 400)
    x, y, _ = roc_curve(few)
    assert trapezoid(y, x) == pytest.approx(auroc(ranking), abs=1e-3)
    assert (oscr_curve(few)[0] < 1e-3).sum() > 30
    assert ccr_at_fpr(few, 1e-3) == pytest.approx(ccr_at_fpr(ranking, 1e-3), abs=0.02)


def test_a_curve_of_fewer_than_two_points_is_refused():
    with pytest.raises(OsmlError, match="at least 2"):
        thin(rank([1, 2], [0, -1], [0, 0]), 1)
    with pytest.raises(OsmlError, match="points must be a whole number"):
        thin(rank([1, 2], [0, -1], [0, 0]), 2.5)


@FEW
@given(ITEMS)
def test_counting_on_a_torch_device_gives_the_same_ranking(items):
    scores, labels, predictions, _ = items
    expected = rank(scores, labels, predictions)
    for given_ in (items[:3], [torch.tensor(values) for values in items[:3]]):
        found = rank(*given_, device="cpu")
        for column in ("tau", "known", "unknown", "correct"):
            assert (getattr(found, column) == getattr(expected, column)).all()
            assert getattr(found, column).dtype == getattr(expected, column).dtype


@FEW
@given(ITEMS)
def test_more_blocks_change_nothing(items):
    expected = open_set_metrics(*items)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("functional", "ranking", "decisions"):
            patch.setattr(f"osml_plugin.metrics.{module}.BLOCK", 3)
        same(open_set_metrics(*items), expected)


@FEW
@given(ITEMS)
def test_every_metric_is_its_slow_twin(items):
    scores, labels, predictions, rejected = items
    known = labels >= 0
    metrics = open_set_metrics(scores, labels, predictions, rejected)
    assert metrics.n_known_items == known.sum() and metrics.n_unknown_items == (~known).sum()
    assert metrics.auroc == pytest.approx(pairwise_auroc(scores, labels), rel=1e-12)
    assert metrics.oscr == pytest.approx(naive_oscr(scores, labels, predictions), rel=1e-12)
    assert metrics.aupr_unknown == pytest.approx(naive_average_precision(scores, ~known), rel=1e-12)
    assert metrics.aupr_known == pytest.approx(naive_average_precision(-scores, known), rel=1e-12)
    assert metrics.fpr95 == naive_fpr(scores, labels, 0.95, "known")
    assert metrics.macro_f1 == pytest.approx(naive_macro_f1(labels, predictions, rejected), rel=1e-12)
    assert metrics.closed_set_accuracy == np.mean(labels[known] == predictions[known])
    assert metrics.known_rejected == np.mean(rejected[known])
    assert metrics.unknown_rejected == np.mean(rejected[~known])


@FEW
@given(ITEMS, st.sampled_from([0.05, 0.07, 0.29, 0.5, 0.57, 0.8, 0.95, 1.0]), st.sampled_from(["known", "unknown"]))
def test_fpr_at_any_tpr_is_the_best_over_every_threshold(items, tpr, positive):
    scores, labels, predictions, _ = items
    assert fpr_at_tpr(rank(scores, labels, predictions), tpr, positive) == naive_fpr(scores, labels, tpr, positive)


@pytest.mark.parametrize("levels", [3, 50, None], ids=["heavy ties", "ties", "distinct"])
def test_as_scikit_learn(levels):
    rng = np.random.default_rng(3)
    labels = rng.integers(-1, 12, 5000)
    predictions = np.where(rng.random(5000) < 0.7, np.abs(labels), rng.integers(0, 12, 5000))
    scores = rng.normal(size=5000) + (labels == UNKNOWN)
    if levels:
        scores = np.round(scores * levels / 6) / levels
    rejected = scores > 0.8
    unknown = labels == UNKNOWN
    metrics = open_set_metrics(scores, labels, predictions, rejected)
    assert metrics.auroc == pytest.approx(roc_auc_score(unknown, scores), rel=1e-12)
    assert metrics.aupr_unknown == pytest.approx(average_precision_score(unknown, scores), rel=1e-12)
    assert metrics.aupr_known == pytest.approx(average_precision_score(~unknown, -scores), rel=1e-12)
    decided = np.where(rejected, UNKNOWN, predictions)
    assert metrics.macro_f1 == pytest.approx(f1_score(labels, decided, average="macro"), rel=1e-12)
    assert metrics.open_set_accuracy == pytest.approx(accuracy_score(labels, decided), rel=1e-12)


@FEW
@given(items_of(ANY, False))
def test_macro_f1_is_that_of_scikit_learn_whatever_occurs(items):
    _, labels, predictions, rejected = items
    expected = f1_score(labels, np.where(rejected, UNKNOWN, predictions), average="macro")
    assert macro_f1(labels, predictions, rejected) == pytest.approx(expected, rel=1e-12)


@FEW
@given(ITEMS)
def test_a_strictly_rising_map_of_the_scores_changes_nothing(items):
    scores, labels, predictions, rejected = items
    # By way of the ranks, so that the map is strictly rising in floats too.
    ranks = np.unique(scores, return_inverse=True)[1]
    for mapped in (ranks, ranks**3 - 7.0, -1.0 / (1.0 + ranks)):
        found, before = (open_set_metrics(s, labels, predictions, rejected) for s in (mapped, scores))
        # These two are about the scores themselves.
        assert replace(found, autc=0, best_threshold=0) == replace(before, autc=0, best_threshold=0)


@FEW
@given(items_of(st.sampled_from([-3.0, 0.0, 0.5, 4.0]), True))
def test_a_change_of_unit_and_origin_leaves_autc_alone_and_takes_the_best_threshold_along(items):
    scores, labels, predictions, _ = items
    before, after = rank(scores, labels, predictions), rank(2 * scores + 1, labels, predictions)
    assert autc(after) == pytest.approx(autc(before), nan_ok=True)
    assert best_threshold(after) == 2 * best_threshold(before) + 1


@FEW
@given(ITEMS, st.randoms(use_true_random=False))
def test_the_order_of_the_items_changes_nothing(items, random):
    order = random.sample(range(len(items[0])), len(items[0]))
    assert open_set_metrics(*(values[order] for values in items)) == open_set_metrics(*items)


@FEW
@given(ITEMS)
def test_every_item_twice_changes_the_counts_only(items):
    once = open_set_metrics(*items)
    twice = open_set_metrics(*(np.concatenate((values, values)) for values in items))
    counts = {"n_known_items": 2 * once.n_known_items, "n_unknown_items": 2 * once.n_unknown_items}
    same(twice, replace(once, **counts))


@FEW
@given(ITEMS, st.permutations([0, 1, 2, 7, 10**12]))
def test_renaming_the_classes_changes_nothing(items, names):
    scores, labels, predictions, rejected = items
    rename = dict(zip([0, 1, 2, 7, 10**12], names, strict=True)) | {UNKNOWN: UNKNOWN}
    renamed = [np.array([rename[int(c)] for c in values]) for values in (labels, predictions)]
    same(open_set_metrics(scores, *renamed, rejected), open_set_metrics(*items))


@FEW
@given(ITEMS)
def test_turning_the_scores_around_turns_auroc_around(items):
    scores, labels, predictions, _ = items
    there, back = (auroc(rank(s, labels, predictions)) for s in (scores, -scores))
    assert there + back == pytest.approx(1, abs=1e-15)


@FEW
@given(ITEMS)
def test_turning_scores_and_kinds_around_swaps_the_two_conventions(items):
    scores, labels, predictions, _ = items
    ranking = rank(scores, labels, predictions)
    swapped = rank(-scores, np.where(labels == UNKNOWN, 0, UNKNOWN), predictions)
    assert aupr_known(ranking) == pytest.approx(aupr_unknown(swapped), rel=1e-12)
    assert fpr95(ranking) == fpr_at_tpr(swapped, 0.95, positive="unknown")


@FEW
@given(ITEMS)
def test_oscr_is_auroc_where_every_known_item_is_correct_and_never_above_it_or_the_accuracy(items):
    scores, labels, predictions, _ = items
    perfect = rank(scores, labels, np.abs(labels))
    assert oscr(perfect) == auroc(perfect)
    ranking = rank(scores, labels, predictions)
    assert 0 <= oscr(ranking) <= min(auroc(ranking), closed_set_accuracy(labels, predictions))


@FEW
@given(ITEMS)
def test_the_decision_at_a_threshold_is_a_point_of_the_curves(items):
    scores, labels, predictions, _ = items
    ranking = rank(scores, labels, predictions)
    x, y, taus = roc_curve(ranking)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert (np.diff(taus[:-1]) < 0).all() and len(taus) == len(set(scores.tolist())) + 1
    for x_at, y_at, tau in zip(x[:-1], y[:-1], taus[:-1], strict=True):
        assert x_at == pytest.approx(known_rejected(labels, scores > tau), abs=1e-15)
        assert y_at == pytest.approx(unknown_rejected(labels, scores > tau), abs=1e-15)
    assert trapezoid(y, x) == pytest.approx(auroc(ranking), abs=1e-12)

    fpr, ccr, taus = oscr_curve(ranking)
    assert (fpr[0], ccr[0], taus[0], fpr[-1]) == (0, 0, -inf, 1)
    assert ccr[-1] == closed_set_accuracy(labels, predictions)
    for fpr_at, ccr_at, tau in zip(fpr[1:], ccr[1:], taus[1:], strict=True):
        accepted = scores <= tau
        assert fpr_at == np.mean(accepted[labels == UNKNOWN])
        assert ccr_at == np.mean((accepted & (labels == predictions))[labels >= 0])
    assert trapezoid(ccr, fpr) == pytest.approx(oscr(ranking), abs=1e-12)


def cut_between_items_oscr(scores, labels, predictions):
    """The peers' way, one cut after each item even inside a tie: what comes out depends on the order of tied items."""
    order = np.argsort(scores, kind="stable")
    unknown = labels[order] == UNKNOWN
    fpr = np.append(0, np.cumsum(unknown)) / unknown.sum()
    ccr = np.append(0, np.cumsum((labels == predictions)[order])) / (~unknown).sum()
    return trapezoid(ccr, fpr)


def test_constant_scores_at_accuracy_one_give_oscr_one_half_where_the_code_of_vaze_et_al_gives_zero():
    labels = np.r_[np.full(50, UNKNOWN), np.arange(50)]
    scores, predictions = np.zeros(100), np.abs(labels)
    assert oscr(rank(scores, labels, predictions)) == 0.5
    assert cut_between_items_oscr(scores, labels, predictions) == 0
    assert cut_between_items_oscr(scores[::-1], labels[::-1], predictions[::-1]) == 1
    # Without ties the two agree.
    scores = np.random.default_rng(0).permutation(100)
    assert oscr(rank(scores, labels, predictions)) == pytest.approx(cut_between_items_oscr(scores, labels, predictions))


def test_constant_scores_give_half_of_everything_rank_based():
    metrics = open_set_metrics(np.full(8, 2.0), [0, 0, 1, 1, -1, -1, -1, -1], [0, 0, 1, 0, 0, 0, 0, 0])
    assert (metrics.auroc, metrics.oscr, metrics.fpr95, metrics.aupr_known) == (0.5, 0.375, 1.0, 0.5)
    assert (metrics.eer, metrics.detection_error, metrics.best_youden, metrics.open_auc) == (0.5, 0.5, 0, 0)
    assert metrics.best_threshold == -inf and metrics.to_dict()["best_threshold"] is None


LOWER_IS_BETTER = {"fpr95", "fpr95_unknown_positive", "eer", "detection_error", "known_rejected"} | {
    "known_rejected_spread",
    "known_rejected_worst",
}


def test_perfect_separation_with_certainly_unknown_items():
    labels = np.array([0, 1, 2, -1, -1])
    metrics = open_set_metrics([-inf, 0, 1, inf, inf], labels, [0, 1, 2, 0, 0], labels == -1)
    for name, value in metrics.to_dict().items():
        if name in ("autc", "openness"):  # undefined with infinite scores; not asked for
            assert value is None
        elif name == "best_threshold":
            assert value == 1
        elif not name.startswith("n_"):
            assert value == (0 if name in LOWER_IS_BETTER else 1), name


def test_the_two_conventions_of_fpr95_differ():
    scores, labels = np.arange(200), np.r_[np.zeros(96, int), [-1, -1], np.zeros(4, int), np.full(98, -1)]
    ranking = rank(scores, labels, np.zeros(200, int))
    assert fpr95(ranking) == 0
    assert fpr_at_tpr(ranking, 0.95, positive="unknown") == 0
    assert fpr_at_tpr(ranking, 0.99) == 0.02
    assert fpr_at_tpr(ranking, 0.99, positive="unknown") == 0.04


def test_a_rate_that_a_whole_number_of_items_reaches_is_reached_there():
    assert 0.07 * 100 > 7  # so a count compared with tpr * total would ask for an eighth item
    labels = np.r_[np.zeros(7, int), UNKNOWN, np.zeros(93, int)]
    assert fpr_at_tpr(rank(np.arange(101), labels, np.zeros(101, int)), 0.07) == 0


def test_only_known_items_leave_what_needs_no_unknown_ones():
    metrics = open_set_metrics([0.1, 0.2, 0.9], [0, 1, 1], [0, 1, 0], [False, False, True])
    # F1: class 0 is 1, class 1 is 2/3, and unknown, which one item was called, 0.
    kept = {name: value for name, value in metrics.to_dict().items() if value is not None}
    assert kept == {
        "n_known_items": 3,
        "n_unknown_items": 0,
        "closed_set_accuracy": pytest.approx(2 / 3),
        "macro_f1": pytest.approx(5 / 9),
        "known_rejected": pytest.approx(1 / 3),
        "open_set_accuracy": pytest.approx(2 / 3),
        "known_rejected_spread": pytest.approx(0.25),
        "known_rejected_worst": pytest.approx(0.5),
    }
    assert isnan(metrics.auroc)


def test_only_unknown_items():
    metrics = open_set_metrics([0.1, 0.9], [-1, -1], [0, 1], [False, True]).to_dict()
    kept = {name: value for name, value in metrics.items() if value is not None}
    assert kept == {
        "n_known_items": 0,
        "n_unknown_items": 2,
        "macro_f1": pytest.approx(1 / 3),
        "unknown_rejected": 0.5,
        "open_set_accuracy": 0.5,
    }


def test_without_a_decision_its_fields_are_none():
    metrics = open_set_metrics([0.1, 0.9], [0, -1], [0, 0])
    assert (metrics.macro_f1, metrics.known_rejected, metrics.unknown_rejected) == (None, None, None)
    assert metrics.auroc == 1


@FEW
@given(items_of(TIED, False))
def test_the_dictionary_is_plain_json(items):
    metrics = open_set_metrics(*items).to_dict()
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert {type(value) for value in metrics.values()} <= {int, float, type(None)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_tensors_are_taken_and_left_as_they_are(dtype):
    rng = np.random.default_rng(1)
    labels, predictions, rejected = rng.integers(-1, 3, 200), rng.integers(0, 3, 200), rng.random(200) < 0.5
    scores = torch.tensor(rng.integers(0, 100, 200)).to(dtype)
    if dtype.is_floating_point:
        scores.requires_grad_()
    tensors = [scores, *map(torch.tensor, (labels.astype(np.int32), predictions, rejected))]
    copies = [tensor.clone() for tensor in tensors]
    expected = open_set_metrics(scores.detach().double().numpy(), labels, predictions, rejected)
    assert open_set_metrics(*tensors) == expected
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


GOOD = {"scores": [0.1, 0.2, 0.9], "labels": [0, 1, -1], "predictions": [0, 1, 0], "rejected": [False, False, True]}
BAD = [
    ("scores", [0.1, 0.2], "lengths differ: scores 2, labels 3"),
    ("labels", [0, 1], "lengths differ"),
    ("predictions", [0, 1, 0, 0], "lengths differ"),
    ("rejected", [True], "lengths differ: scores 3, rejected 1"),
    ("scores", [[0.1], [0.2], [0.9]], r"shape \(3, 1\)"),
    ("scores", [[0.1], [0.2, 0.3], []], "its rows differ"),
    ("scores", 0.5, r"shape \(\)"),
    ("scores", torch.tensor(0.5), r"shape \(\)"),
    ("scores", [torch.zeros(2, requires_grad=True)] * 3, r"shape \(N,\)"),
    ("scores", [True, False, True], "scores must be real numbers"),
    ("labels", torch.zeros(3, 1, dtype=torch.long), r"labels .* shape \(3, 1\)"),
    ("scores", [], "scores is empty"),
    ("labels", [], "labels is empty"),
    ("scores", [0.1, nan, 0.9], "1 NaN among 3"),
    ("scores", ["a", "b", "c"], "scores must be real numbers"),
    ("scores", [0.1, None, 0.9], "scores must be real numbers"),
    ("scores", [1j, 0, 0], "scores must be real numbers"),
    ("labels", [0.0, 1.0, -1.0], "labels must be integers, not float64"),
    ("labels", [True, False, True], "labels must be integers, not bool"),
    ("labels", np.array([0, 1, 2**64 - 1], dtype=np.uint64), "labels must be integers, not uint64"),
    ("labels", [0, 1, -2], "labels must be at least -1, but has -2"),
    ("predictions", [0, 1, -1], "predictions must be at least 0, but has -1"),
    ("predictions", [0.0, 1.0, 0.0], "predictions must be integers"),
    ("rejected", [0, 0, 1], "rejected must be bool"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_input_is_refused_in_one_line(name, value, message):
    open_set_metrics(**GOOD)
    with pytest.raises(OsmlError, match=message) as raised:
        open_set_metrics(**{**GOOD, name: value})
    assert "\n" not in str(raised.value)
    if name != "rejected":
        with pytest.raises(OsmlError, match=message.replace("int64", "(torch.)?int64")):
            rank(**{**{k: v for k, v in GOOD.items() if k != "rejected"}, name: value}, device="cpu")


@pytest.mark.parametrize("device", [None, "cpu"])
def test_arrays_of_any_strides_and_byte_order_are_taken(device):
    rng = np.random.default_rng(0)
    items = rng.integers(0, 9, 60) / 4, rng.integers(-1, 3, 60), rng.integers(0, 3, 60)
    expected = rank(*items)
    turned = [column[::-1] for column in items]
    swapped = [column.astype(column.dtype.newbyteorder()) for column in items]
    strided = [np.stack([column, column], axis=1)[:, 0] for column in items]
    frozen = [column.copy() for column in items]
    for column in frozen:
        column.flags.writeable = False
    for given_items in (turned, swapped, strided, frozen):
        ranking = rank(*given_items, device=device)
        for field in ("tau", "known", "unknown", "correct"):
            assert np.array_equal(getattr(ranking, field), getattr(expected, field))


@pytest.mark.parametrize("tpr", [0, -0.5, 1.01, 95, nan, "a", None, True])
def test_a_rate_that_is_none_is_refused(tpr):
    with pytest.raises(OsmlError, match="tpr must be (above 0|a finite number)"):
        fpr_at_tpr(rank(GOOD["scores"], GOOD["labels"], GOOD["predictions"]), tpr)


@pytest.mark.parametrize("fpr", [-0.1, 1.01, 10, nan, "a", None, True])
def test_a_false_positive_rate_that_is_none_is_refused(fpr):
    with pytest.raises(OsmlError, match="fpr must be (at least 0|a finite number)"):
        ccr_at_fpr(rank(GOOD["scores"], GOOD["labels"], GOOD["predictions"]), fpr)


def test_a_positive_that_is_no_kind_is_refused():
    with pytest.raises(OsmlError, match="'known' or 'unknown', not 'ood'"):
        fpr_at_tpr(rank(GOOD["scores"], GOOD["labels"], GOOD["predictions"]), 0.95, "ood")


@pytest.mark.parametrize("curve", [roc_curve, oscr_curve, precision_recall_curve])
def test_a_curve_of_one_kind_is_refused(curve):
    with pytest.raises(OsmlError, match="3 known and 0 unknown"):
        curve(rank([1, 2, 3], [0, 0, 0], [0, 0, 0]))


@pytest.mark.parametrize(
    "call",
    [
        lambda: closed_set_accuracy([0, 1], [0]),
        lambda: macro_f1([0, 1], [0, 1], [True]),
        lambda: known_rejected([0, 1], [True]),
        lambda: unknown_rejected([0, 1], [True]),
        lambda: open_set_accuracy([0, 1], [0, 1], [True]),
        lambda: opis([0.0, 1.0], [0, 1], [0], [0.5]),
    ],
)
def test_the_functions_on_arrays_check_lengths_too(call):
    with pytest.raises(OsmlError, match="lengths differ"):
        call()


def test_the_example_in_the_docstring():
    assert doctest.testmod(open_set) == (0, 2)
