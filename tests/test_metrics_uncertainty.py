"""Intervals and comparisons against their slow twins, and against how often they are right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, rankdata

from osml_plugin import UNKNOWN
from osml_plugin.errors import OsmlError
from osml_plugin.metrics import (
    bootstrap_intervals,
    bootstrap_test,
    delong_interval,
    delong_test,
    open_set_metrics,
)
from osml_plugin.metrics.functional import RANK_METRICS, rank

FEW = settings(deadline=None, max_examples=60)


def items_of(seed, n=40, levels=None, shift=1.0):
    """Two detectors' scores of the same items, which agree in part."""
    rng = np.random.default_rng(seed)
    labels = np.append([0, 0, UNKNOWN, UNKNOWN], rng.integers(-1, 3, n - 4))
    shared = rng.normal(size=n) + shift * (labels < 0)
    first, second = shared + rng.normal(size=n) / 2, shared + rng.normal(size=n) / 2
    if levels:
        first, second = np.round(first * levels), np.round(second * levels)
    return first, second, labels, np.where(rng.random(n) < 0.8, np.abs(labels), 3)


def placements(scores, labels):
    """V10 of each unknown and V01 of each known item: every pair."""
    known, unknown = scores[labels >= 0], scores[labels < 0]
    wins = (unknown[:, None] > known).astype(float) + (unknown[:, None] == known) / 2
    return wins.mean(axis=1), wins.mean(axis=0)


SEEDS, LEVELS = st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 3])


@FEW
@given(SEEDS, LEVELS)
def test_delong_is_the_variance_over_every_pair(seed, levels):
    scores, _, labels, predictions = items_of(seed, levels=levels)
    of_unknown, of_known = placements(scores, labels)
    variance = np.var(of_unknown, ddof=1) / of_unknown.size + np.var(of_known, ddof=1) / of_known.size
    found = delong_interval(rank(scores, labels, predictions), level=0.9)
    assert found.estimate == pytest.approx(of_unknown.mean())
    assert found.standard_error == pytest.approx(variance**0.5)
    z = norm.ppf(0.95)
    assert found.low == pytest.approx(max(0, found.estimate - z * variance**0.5))
    assert found.high == pytest.approx(min(1, found.estimate + z * variance**0.5))


def sun_and_xu(first, second, labels):
    """The covariance by midranks, as the authors of the fast algorithm write it."""
    unknown = labels < 0
    m, n = unknown.sum(), (~unknown).sum()
    v10, v01 = [], []
    for scores in (first, second):
        everywhere = rankdata(scores)
        v10.append((everywhere[unknown] - rankdata(scores[unknown])) / n)
        v01.append(1 - (everywhere[~unknown] - rankdata(scores[~unknown])) / m)
    return np.mean(v10, axis=1), np.cov(v10) / m + np.cov(v01) / n


@FEW
@given(SEEDS, LEVELS)
def test_the_paired_test_is_that_of_the_papers_midranks(seed, levels):
    first, second, labels, _ = items_of(seed, levels=levels)
    (a, b), covariance = sun_and_xu(first, second, labels)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    found = delong_test(first, second, labels)
    assert (found.first, found.second) == (pytest.approx(a), pytest.approx(b))
    assert found.difference.estimate == pytest.approx(a - b, abs=1e-12)
    assert found.difference.standard_error == pytest.approx(variance**0.5)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(a - b) / variance**0.5), abs=1e-9)
    back = delong_test(second, first, labels)
    assert (back.difference.low, back.p_value) == (pytest.approx(-found.difference.high), pytest.approx(found.p_value))


@FEW
@given(SEEDS, LEVELS)
def test_a_rising_map_changes_no_interval(seed, levels):
    scores, _, labels, predictions = items_of(seed, levels=levels)
    ranks = np.unique(scores, return_inverse=True)[1]
    args = labels, predictions, ("auroc", "eer")
    assert delong_interval(rank(ranks, labels, predictions)) == delong_interval(rank(scores, labels, predictions))
    assert bootstrap_intervals(ranks, *args, draws=5) == bootstrap_intervals(scores, *args, draws=5)


def test_a_detector_does_not_differ_from_itself():
    first, _, labels, predictions = items_of(0)
    assert delong_test(first, 2 * first + 1, labels).p_value == 1
    assert bootstrap_test((first, predictions), (2 * first, predictions), labels, draws=20).p_value == 1


def test_perfect_separation_leaves_delong_no_variance():
    found = delong_interval(rank([0, 1, 2, 3], [0, 0, -1, -1], [0, 0, 0, 0]))
    assert (found.low, found.estimate, found.high, found.standard_error) == (1, 1, 1, 0)
    other = delong_test([0, 1, 2, 3], [3, 2, 1, 0], [0, 0, -1, -1])
    assert (other.difference.estimate, other.p_value) == (1, 0)


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_delong_covers_the_true_auroc_as_often_as_it_says(shift):
    truth = norm.cdf(shift / 2**0.5)
    rng = np.random.default_rng(1)
    labels = np.repeat([0, -1], 60)
    covered = 0
    for _ in range(400):
        found = delong_interval(rank(rng.normal(size=120) + shift * (labels < 0), labels, np.zeros(120, int)), 0.9)
        covered += found.low <= truth <= found.high
    # 0.9 ± 4 standard deviations of 400 draws, and 0.02 for an interval that is right in the limit only.
    assert abs(covered / 400 - 0.9) < 4 * (0.09 / 400) ** 0.5 + 0.02


def redrawn(seed, labels, draws):
    """The items of each draw, drawn the slow way: whole copies of the items."""
    rng = np.random.default_rng(seed)
    known, unknown = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
    for _ in range(draws):
        yield np.append(
            known[rng.integers(known.size, size=known.size)],
            unknown[rng.integers(unknown.size, size=unknown.size)],
        )


@FEW
@given(SEEDS, LEVELS)
def test_the_bootstrap_is_the_metrics_of_items_drawn_and_sorted_anew(seed, levels):
    scores, other, labels, predictions = items_of(seed, levels=levels)
    names = [name for name in RANK_METRICS if name != "autc"]  # undefined where a draw has one score only
    found = bootstrap_intervals(scores, labels, predictions, names, draws=8, level=0.8, seed=seed)
    drawn = [open_set_metrics(scores[i], labels[i], predictions[i]) for i in redrawn(seed, labels, 8)]
    estimate = open_set_metrics(scores, labels, predictions)
    for name in names:
        values = [getattr(metrics, name) for metrics in drawn]
        assert found[name].estimate == getattr(estimate, name)
        assert (found[name].low, found[name].high) == tuple(pytest.approx(np.quantile(values, q)) for q in (0.1, 0.9))
        assert found[name].standard_error == pytest.approx(np.std(values, ddof=1), abs=1e-12)

    test = bootstrap_test((scores, predictions), (other, predictions), labels, "oscr", draws=8, seed=seed)
    values = [
        open_set_metrics(scores[i], labels[i], predictions[i]).oscr
        - open_set_metrics(other[i], labels[i], predictions[i]).oscr
        for i in redrawn(seed, labels, 8)
    ]
    assert test.difference.low == pytest.approx(np.quantile(values, 0.025), abs=1e-12)
    sides = min(sum(v <= 0 for v in values), sum(v >= 0 for v in values))
    assert test.p_value == pytest.approx(min(1, 2 * (sides + 1) / 9))


def test_the_bootstrap_agrees_with_delong_and_sorts_once(monkeypatch):
    first, second, labels, predictions = items_of(3, n=1500)
    sorts = []
    argsort = np.argsort
    monkeypatch.setattr(np, "argsort", lambda *args, **kwargs: sorts.append(1) or argsort(*args, **kwargs))
    drawn = bootstrap_intervals(first, labels, predictions, ["auroc"], draws=400)["auroc"]
    assert len(sorts) == 1
    exact = delong_interval(rank(first, labels, predictions))
    assert drawn.standard_error == pytest.approx(exact.standard_error, rel=0.15)
    assert (drawn.low, drawn.high) == (pytest.approx(exact.low, abs=0.005), pytest.approx(exact.high, abs=0.005))

    test = bootstrap_test((first, predictions), (second, predictions), labels, draws=400)
    exact = delong_test(first, second, labels)
    assert test.difference.standard_error == pytest.approx(exact.difference.standard_error, rel=0.15)
    # Paired: the noise that both share falls out.
    alone = [delong_interval(rank(s, labels, predictions)).standard_error for s in (first, second)]
    assert exact.difference.standard_error < 0.8 * np.hypot(*alone)


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    scores, _, labels, predictions = items_of(4)
    a, b, c = (bootstrap_intervals(scores, labels, predictions, draws=20, seed=seed) for seed in (1, 1, 2))
    assert a == b != c


GOOD = ([0.1, 0.2, 0.3, 0.4], [0, 0, -1, -1], [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: delong_interval(rank(*GOOD), level=1), "level must be above 0 and below 1, not 1"),
        (lambda: delong_interval(rank([0, 1, 2], [0, 0, -1], [0, 0, 0])), "2 known and 1 unknown"),
        (lambda: delong_test([0, 1, 2], [0, 1, 2], [0, -1, -1]), "1 known and 2 unknown"),
        (lambda: delong_test([0, 1, 2], [0, 1], [0, -1, -1]), "lengths differ"),
        (lambda: bootstrap_intervals(*GOOD, ["aurok"]), "did you mean 'auroc'"),
        (lambda: bootstrap_intervals(*GOOD, "auroc"), r"give \['auroc'\]"),
        (lambda: bootstrap_intervals(*GOOD, level="a"), "level must be a finite number"),
        (lambda: bootstrap_intervals(*GOOD, draws=0), "draws must be a whole number of at least 1"),
        (lambda: bootstrap_intervals(*GOOD, level=95), "level must be above 0 and below 1, not 95"),
        (lambda: bootstrap_intervals([0, 1], [0, 0], [0, 0]), "2 known and 0 unknown"),
        (lambda: bootstrap_test(GOOD[::2], GOOD[::2], GOOD[1], "oscar"), "did you mean 'oscr'"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(OsmlError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_what_is_given_in_the_wrong_shape_is_told_the_right_one():
    scores, labels = [0.1, 0.2, 0.3, 0.4], [0, 0, -1, -1]
    with pytest.raises(OsmlError, match="functional.rank"):
        delong_interval(scores)
    with pytest.raises(OsmlError, match="pair"):
        bootstrap_test(scores, scores, labels)


# --- groups ----------------------------------------------------------------------------------------------


@FEW
@given(SEEDS, LEVELS)
def test_groups_of_one_change_nothing(seed, levels):
    first, second, labels, predictions = items_of(seed, levels=levels)
    apart = [f"g{i}" for i in range(len(labels))]
    grouped, plain = delong_test(first, second, labels, groups=apart), delong_test(first, second, labels)
    assert vars(grouped.difference) == pytest.approx(vars(plain.difference)) and grouped.p_value == pytest.approx(
        plain.p_value
    )
    interval = bootstrap_intervals(first, labels, predictions, draws=200, groups=np.arange(len(labels)))
    assert interval == bootstrap_intervals(first, labels, predictions, draws=200)


@FEW
@given(SEEDS, st.integers(2, 5))
def test_copies_do_not_make_an_interval_narrower(seed, times):
    first, second, labels, predictions = items_of(seed)
    copied = [np.repeat(values, times) for values in (first, second, labels, predictions)]
    groups = np.repeat(np.arange(len(labels)), times)
    once, often = delong_test(first, second, labels), delong_test(*copied[:3], groups=groups)
    assert often.difference.standard_error == pytest.approx(once.difference.standard_error)
    assert often.p_value == pytest.approx(once.p_value)
    figures = {"metrics": ["auroc", "oscr"], "draws": 50}
    wide = bootstrap_intervals(copied[0], copied[2], copied[3], groups=groups, **figures)
    for name, of in bootstrap_intervals(first, labels, predictions, **figures).items():
        assert vars(wide[name]) == pytest.approx(vars(of))


def test_groups_that_are_none_are_refused():
    first, second, labels, predictions = items_of(0)
    for groups, said in (([1], "1 groups for 40 items"), ([None] * 40, "none missing"), (np.full(40, 0.5), "integers")):
        with pytest.raises(OsmlError, match=said):
            delong_test(first, second, labels, groups=groups)
        with pytest.raises(OsmlError, match=said):
            bootstrap_intervals(first, labels, predictions, groups=groups)
