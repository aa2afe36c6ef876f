"""Conformal rejection by class: the groups, the promise of each, and that of a recognizer after enrolment."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import sphere_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from osml_plugin import UNKNOWN, OpenSetRecognizer, OsmlError, thresholds

SPREAD = np.array([1.0, 3.0, 0.2])
"""Of the scores of three classes."""


def draw(rng, sizes):
    """Scores and nearest classes of known items, so many of each class."""
    nearest = np.repeat(np.arange(len(sizes)), sizes)
    return rng.normal(size=len(nearest)) * SPREAD[nearest % 3], nearest


def quantile(scores, alpha):
    """The slow twin: the smallest score (or none) above which a further one lies with probability at most α."""
    n = len(scores)
    fit = [s for r, s in enumerate(sorted(scores), 1) if (n + 1 - r) / (n + 1) <= alpha + 1e-9]
    return fit[0] if fit else math.inf


def taus_by_hand(scores, nearest, alpha):
    of = {c: [s for s, k in zip(scores, nearest, strict=True) if k == c] for c in set(nearest.tolist())}
    small = sorted(c for c in of if quantile(of[c], alpha) == math.inf)
    pool = [s for c in small for s in of[c]]
    shared = quantile(pool, alpha)
    if small and shared == math.inf:
        shared = max(max(pool), quantile(scores, alpha))
    return {c: shared if c in small else quantile(of[c], alpha) for c in of}, tuple(small)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum),
    st.sampled_from([0.05, 0.1, 1 / 3, 0.9]),
    st.integers(0, 2**31),
)
def test_each_class_has_its_quantile_and_small_ones_are_pooled(sizes, alpha, seed):
    scores, nearest = draw(np.random.default_rng(seed), sizes)
    threshold = thresholds.create("class_conformal", alpha=alpha).fit(scores, nearest)
    taus, pooled = taus_by_hand(scores, nearest, alpha)
    assert threshold.taus == taus and threshold.pooled == pooled
    assert threshold.tau_of(nearest).tolist() == [taus[c] for c in nearest.tolist()]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum),
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
    st.sampled_from(["conformal", "class_conformal"]),
    st.sampled_from([0.05, 0.1, 1 / 3, 1 - 0.9, 0.1 + 0.2]),
    st.integers(0, 2**31),
)
def test_p_values_and_the_threshold_agree(sizes, new, name, alpha, seed):
    rng = np.random.default_rng(seed)
    calibration, nearest = draw(rng, sizes)
    threshold = thresholds.create(name, alpha=alpha).fit(calibration, nearest)
    enrolled = 10 + np.repeat(np.arange(len(new)), new)
    threshold.fit_enrolled(rng.normal(1, 1, len(enrolled)), enrolled, range(10, 10 + len(new)))
    classes = rng.choice([*range(len(sizes)), *range(10, 10 + len(new))], size=60)
    scores = np.concatenate([rng.normal(0, 3, 40), rng.choice(threshold.tau_of(classes), 20)])  # and ties with τ
    p = threshold.p_values(scores, classes)
    assert ((p > 0) & (p <= 1)).all()
    assert np.array_equal(threshold.decide(scores, classes), p <= alpha)


def test_enrolled_classes_by_hand():
    """Class 10 has enough scores, 11 and 12 share theirs, and where those are too few the largest counts."""
    rng = np.random.default_rng(0)
    calibration = rng.normal(size=200)
    tau = quantile(calibration, 0.1)
    threshold = thresholds.create("conformal", alpha=0.1).fit(calibration)
    wide, few = rng.normal(3, 1, 30), rng.normal(4, 1, 12)
    classes = np.repeat([10, 11, 12], [30, 6, 6])
    threshold.fit_enrolled(np.concatenate([wide, few]), classes, [10, 11, 12, 13])
    assert threshold.taus == {10: quantile(wide, 0.1)} | dict.fromkeys((11, 12, 13), quantile(few, 0.1))
    assert threshold.pooled == (11, 12, 13) and threshold.tau == tau
    threshold.fit(calibration).fit_enrolled(few[:5], np.full(5, 11), [11])
    assert threshold.taus == {11: few[:5].max()}
    threshold.fit(calibration).fit_enrolled([], np.zeros(0, int), [11])
    assert threshold.taus == {11: tau}
    tight = rng.normal(-9, 1, 30)  # never below what the others need
    assert threshold.fit(calibration).fit_enrolled(tight, np.full(30, 10), [10]).taus == {10: tau}
    # What is nearest to a class that was not enrolled is left out.
    assert threshold.fit(calibration).fit_enrolled(wide, np.full(30, 3), [10]).taus == {10: tau}
    assert threshold.fit(calibration).taus == {} and threshold.pooled == ()  # refit forgets


def test_enrolled_classes_may_be_numbers_of_any_kind():
    rng = np.random.default_rng(0)
    scores, classes = rng.normal(size=25), np.repeat([10, 11], [20, 5])
    plain = thresholds.create("conformal").fit(rng.normal(size=50)).fit_enrolled(scores, classes, [10, 11]).state()
    for enrolled in (np.array([10, 11]), torch.tensor([10, 11]), {np.int32(10), np.int64(11)}):
        again = thresholds.create("conformal").fit(np.random.default_rng(0).normal(size=75)[25:])
        state = again.fit_enrolled(scores, torch.from_numpy(classes), enrolled).state()
        assert json.loads(json.dumps(state)) == json.loads(json.dumps(plain))


def test_what_comes_back_decides_but_has_no_scores():
    scores, nearest = draw(np.random.default_rng(0), [50, 50, 5])
    threshold = thresholds.create("class_conformal", alpha=0.05).fit(scores, nearest)
    state = json.loads(json.dumps(threshold.state(), allow_nan=False))
    assert state["pooled"] == [2] and set(state["taus"]) == {"0", "1", "2"}
    again = thresholds.Threshold.from_state(state)
    assert np.array_equal(again.decide(scores, nearest), threshold.decide(scores, nearest))
    for call in (lambda: again.p_values(scores, nearest), lambda: again.fit_enrolled([1.0], [3], [3]), again.guarantee):
        with pytest.raises(OsmlError, match="has no calibration scores"):
            call()
    with pytest.raises(OsmlError, match="give the nearest class"):
        again.decide(scores)


# --- the promise, over many draws ------------------------------------------------------------------------


def test_the_promise_holds_for_each_class_and_for_the_pool():
    """P(rejected | nearest class) lies in [α − 1/(n+1), α] for a class of its own and for the pool of the small ones: over
    2000 draws, within the binomial bounds. The global rule breaks it for the wide class."""
    rng = np.random.default_rng(0)
    alpha, sizes, draws = 0.1, [60, 40, 8, 7], 2000
    n_of = [60, 40, 15, 15]
    rejected, rejected_by_all = np.zeros(4), np.zeros(4)
    weights = np.array([0, 0, 8, 7]) / 15
    for _ in range(draws):
        scores, nearest = draw(rng, sizes)
        new = rng.normal(size=4) * SPREAD[np.arange(4) % 3]
        threshold = thresholds.create("class_conformal", alpha=alpha).fit(scores, nearest)
        assert threshold.pooled == (2, 3)
        rejected += threshold.decide(new, np.arange(4))
        rejected_by_all += thresholds.create("conformal", alpha=alpha).fit(scores).decide(new)
    rates = [rejected[0], rejected[1], weights @ rejected]
    for rate, n in zip(rates, n_of, strict=False):
        expected = thresholds.guarantee(n, alpha).expected
        assert alpha - 1 / (n + 1) <= expected <= alpha
        low, high = binom.interval(0.999, draws, expected)
        assert low <= rate <= high, (rates, draws)
    assert rejected_by_all[1] > binom.ppf(0.999, draws, alpha)


def test_the_guarantee_of_the_worst_class_holds():
    """In 95 % of calibration sets no class is rejected more often than the guarantee says."""
    rng = np.random.default_rng(1)
    alpha, sizes, draws = 0.1, [60, 30, 90], 1000
    threshold = thresholds.create("class_conformal", alpha=alpha)
    said = threshold.fit(*draw(rng, sizes)).guarantee()
    taus = np.array([threshold.fit(*draw(rng, sizes)).tau_of(np.arange(3)) for _ in range(draws)])
    held = (norm.sf(taus / SPREAD) <= said.at_most).all(axis=1).sum()
    assert held >= binom.ppf(0.001, draws, 0.95)
    assert said.groups == 3 and said.n == 30 and said.at_most > thresholds.guarantee(30, alpha).at_most
    assert "in the worst of 3 groups (30 items)" in str(said)


def test_the_promise_of_a_pool_that_is_too_small_is_that_over_all():
    rng = np.random.default_rng(2)
    alpha, draws, rejected, of_small = 0.05, 2000, 0, 0
    for _ in range(draws):
        scores, nearest = draw(rng, [20, 20, 6])
        which = rng.choice(3, p=np.array([20, 20, 6]) / 46)
        threshold = thresholds.create("class_conformal", alpha=alpha).fit(scores, nearest)
        assert threshold.pooled == (2,)
        one = threshold.decide(rng.normal(size=1) * SPREAD[which], [which])[0]
        rejected += one
        of_small += one and which == 2
    assert rejected <= binom.ppf(0.999, draws, alpha) and of_small == 0
    assert threshold.guarantee().groups == 3


def test_the_promise_after_enrolment():
    """Over 40 recognizers: items of the trained classes are rejected at α at most, whatever was enrolled, and of items
    of an enrolled class that are nearest to it about α is rejected."""
    alpha, old_rates, new_rejected, new_items = 0.1, [], 0, 0
    for seed in range(40):
        embeddings, labels, _ = sphere_classes(n_classes=5, per_class=100, spread=0.12, seed=seed)
        wide, of_wide, _ = sphere_classes(n_classes=5, per_class=100, spread=0.25, seed=seed)
        half = torch.arange(500) % 2 == 0
        old = labels < 4
        recognizer = OpenSetRecognizer(alpha=alpha).fit(embeddings[old & half], labels[old & half], seed=seed)
        recognizer.enroll("wide", wide[half & (of_wide == 4)])
        old_rates.append((recognizer.predict(embeddings[old & ~half]).labels == UNKNOWN).mean())
        found = recognizer.predict(wide[~half & (of_wide == 4)])
        own = np.array(found.nearest) == "wide"
        new_rejected, new_items = new_rejected + (found.labels[own] == UNKNOWN).sum(), new_items + own.sum()
        assert (
            set(found.thresholds[own]) == {recognizer.threshold.taus[4]} and found.thresholds[own][0] > found.threshold
        )
    error = 3 * np.std(old_rates) / np.sqrt(len(old_rates))
    assert alpha - 0.04 - error < np.mean(old_rates) < alpha + error
    # Cross-conformal scores come from detectors with fewer references, so the rate is a little below α.
    assert alpha * 0.4 < new_rejected / new_items < alpha * 1.2


# --- in a recognizer -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    return sphere_classes(n_classes=6, per_class=150, spread=0.15)


@pytest.mark.parametrize("name", ["conformal", "class_conformal"])
@pytest.mark.parametrize("detector", ["knn", "centroid", "mahalanobis"])
def test_recognition_says_the_threshold_of_each_item(data, name, detector, tmp_path):
    embeddings, labels, _ = data
    known = labels < 4
    recognizer = OpenSetRecognizer(detector, name, alpha=0.1).fit(embeddings[known][::2], labels[known][::2])
    recognizer.enroll("many", embeddings[labels == 4][:60]).enroll("few", embeddings[labels == 5][:3])
    answer = recognizer.predict(embeddings)
    assert np.array_equal(answer.labels == UNKNOWN, answer.scores > answer.thresholds)
    assert np.array_equal(answer.labels == UNKNOWN, answer.p_values <= 0.1)
    assert recognizer.class_thresholds == {
        recognizer.gallery.classes[c]: t for c, t in recognizer.threshold.taus.items()
    }
    ids = {n: i for i, n in recognizer.gallery.classes.items()}
    taus = recognizer.threshold.taus
    expected = [taus.get(ids[n], answer.threshold) for n in answer.nearest]
    assert answer.thresholds.tolist() == expected
    assert {ids["many"], ids["few"]} <= set(taus) and recognizer.threshold.pooled[-1] == ids["few"]
    assert (
        min(taus[ids[n]] for n in ("many", "few"))
        >= thresholds.create("conformal", alpha=0.1).fit(recognizer.calibration_scores).tau
    )
    text = str(recognizer.guarantee)
    assert "enrolled classes: about 10.0%" in text and text.endswith("pooled, for want of items: few")

    recognizer.save(tmp_path / "bundle")
    loaded = OpenSetRecognizer.load(tmp_path / "bundle")
    assert loaded.threshold.state() == recognizer.threshold.state() and loaded.guarantee == recognizer.guarantee
    again = loaded.predict(embeddings)
    assert again.names == answer.names and np.array_equal(again.p_values, answer.p_values)

    recognizer.forget("few").forget("many")
    assert "enrolled" not in str(recognizer.guarantee)
    assert set(recognizer.threshold.taus) == (set() if name == "conformal" else set(range(4)))


def test_another_rate_keeps_the_rule(data):
    embeddings, labels, _ = data
    recognizer = OpenSetRecognizer(threshold="class_conformal", alpha=0.1).fit(embeddings, labels).keep_rate(0.2)
    assert recognizer.threshold.name == "class_conformal" and recognizer.kept_rate == recognizer.alpha == 0.2
    recognizer = OpenSetRecognizer(threshold="quantile").fit(embeddings, labels).keep_rate(0.2)
    assert recognizer.threshold.name == "conformal"


def test_more_examples_of_a_trained_class_leave_the_threshold(data):
    """It has calibration items, which say more than examples that someone chose."""
    embeddings, labels, _ = data
    known = labels < 4
    recognizer = OpenSetRecognizer().fit(embeddings[known][::2], labels[known][::2])
    assert recognizer.enroll("2", embeddings[known & (labels == 2)][1::2]).threshold.taus == {}


def test_a_forgotten_training_leaves_the_enrolled(data):
    embeddings, labels, _ = data
    recognizer = OpenSetRecognizer(alpha=0.1).fit(embeddings[labels < 2], labels[labels < 2])
    for c in (3, 4):
        recognizer.enroll(f"new {c}", embeddings[labels == c][:50])
    recognizer.forget("0").forget("1")
    assert recognizer.guarantee is None and math.isfinite(recognizer.threshold.tau)
    assert (recognizer.predict(embeddings[labels == 3][50:]).labels == UNKNOWN).mean() < 0.3
