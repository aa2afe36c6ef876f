"""One contract for every threshold, each rule against its definition, and the conformal promise over many draws."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osml_plugin import OsmlError, thresholds

PARAMS = {"fixed": {"tau": 0.5}}
ALL = thresholds.names()


@pytest.fixture(scope="module")
def scores():
    draw = np.random.default_rng(0)
    known, unknown = draw.normal(0, 1, 200), draw.normal(2, 1, 100)
    order = draw.permutation(300)
    return np.concatenate([known, unknown]).astype(np.float32)[order], (np.arange(300) >= 200)[order]


@pytest.mark.parametrize("name", ALL)
class TestContract:
    def make(self, name):
        return thresholds.create(name, **PARAMS.get(name, {}))

    def test_unknown_iff_above(self, name, scores):
        values, is_unknown = scores
        threshold = self.make(name).fit(values, is_unknown=is_unknown)
        decision = threshold.decide(values)
        assert decision.dtype == bool and np.array_equal(decision, values.astype(float) > threshold.tau)
        assert not threshold.decide(np.array([threshold.tau]))[0]
        assert np.array_equal(threshold.decide(torch.from_numpy(values)), decision)

    def test_order_does_not_matter_and_refit_forgets(self, name, scores):
        values, is_unknown = scores
        threshold = self.make(name).fit(values, is_unknown=is_unknown)
        tau = threshold.tau
        threshold.fit(values + 5, is_unknown=is_unknown)
        assert threshold.fit(values[::-1], is_unknown=is_unknown[::-1]).tau == tau

    def test_state_is_json_and_comes_back(self, name, scores):
        values, is_unknown = scores
        threshold = self.make(name).fit(values, is_unknown=is_unknown)
        again = thresholds.Threshold.from_state(json.loads(json.dumps(threshold.state(), allow_nan=False)))
        assert type(again) is type(threshold) and again.tau == threshold.tau and again.params == threshold.params

    def test_bad_input_is_refused(self, name, scores):
        values, is_unknown = scores
        threshold = self.make(name)
        with pytest.raises(OsmlError, match="1 of 300 scores are NaN"):
            threshold.fit(np.where(np.arange(300) == 7, np.nan, values), is_unknown=is_unknown)
        with pytest.raises(OsmlError, match="shape"):
            threshold.fit(values[None], is_unknown=is_unknown)
        with pytest.raises(OsmlError, match="is_unknown must be booleans"):
            threshold.fit(values, is_unknown=is_unknown[:-1])
        with pytest.raises(OsmlError, match="known items"):
            threshold.fit(values, is_unknown=np.ones(300, bool))
        if threshold.needs_unknown:
            with pytest.raises(OsmlError, match="known and unknown items"):
                threshold.fit(values)
        if name != "fixed":
            with pytest.raises(OsmlError, match="not fitted"):
                self.make(name).decide(values)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("conformal", {"alpha": 0}),
        ("conformal", {"alpha": 1.0}),
        ("quantile", {"accepted": 5}),
        ("target_rate", {"unknown_accepted": -0.1}),
        ("conformal", {"alpha": math.nan}),
        ("quantile", {"accepted": "abc"}),
        ("target_rate", {"unknown_accepted": None}),
    ],
)
def test_rates_outside_0_and_1_are_refused(name, params):
    with pytest.raises(OsmlError, match="must be a rate between 0 and 1"):
        thresholds.create(name, **params)


@pytest.mark.parametrize("tau", [math.inf, -math.inf, math.nan, None, "abc", True])
def test_a_fixed_threshold_is_a_finite_number(tau):
    with pytest.raises(OsmlError, match="tau must be a finite number; got"):
        thresholds.create("fixed", tau=tau)


def test_a_fixed_threshold_is_given():
    with pytest.raises(OsmlError, match=r"threshold 'fixed' refuses its arguments \(.*'tau'"):
        thresholds.create("fixed")


def test_minus_infinity_is_never_kept():
    threshold = thresholds.create("quantile")
    with pytest.raises(OsmlError, match="would be minus infinity"):
        threshold.fit(np.full(20, -np.inf))
    with pytest.raises(OsmlError, match="not fitted"):
        threshold.state()
    with pytest.raises(OsmlError, match="tau must be a finite number; got -inf"):
        thresholds.Threshold.from_state({"name": "quantile", "params": {}, "tau": -math.inf})


@pytest.mark.parametrize(("rate", "accepted"), [(0.29, 29), (0.57, 57), (0.005, 0), (1 - 1e-12, 99)])
def test_target_rate_is_safe_from_floating_point(rate, accepted):
    scores = np.arange(101.0)
    threshold = thresholds.create("target_rate", unknown_accepted=rate).fit(scores, is_unknown=scores > 0)
    assert (~threshold.decide(scores[1:])).sum() == accepted


def test_quantile_accepts_just_enough(scores):
    values, is_unknown = scores
    known = np.sort(values[~is_unknown])
    tau = thresholds.create("quantile", accepted=0.9).fit(values, is_unknown=is_unknown).tau
    assert (known <= tau).mean() >= 0.9 and (known < tau).mean() < 0.9


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_target_rate_is_the_largest_that_keeps_it(scores, rate):
    values, is_unknown = scores
    unknown = values[is_unknown]
    tau = thresholds.create("target_rate", unknown_accepted=rate).fit(values, is_unknown=is_unknown).tau
    assert (unknown <= tau).mean() <= rate
    above = np.sort(values[values > tau])[0]
    assert (unknown <= above).mean() > rate


def test_max_f1_beats_every_other_cut(scores):
    from sklearn.metrics import f1_score

    values, is_unknown = scores
    tau = thresholds.create("max_f1").fit(values, is_unknown=is_unknown).tau
    best = f1_score(is_unknown, values > tau)
    assert best == max(f1_score(is_unknown, values > cut) for cut in [*values, values.min() - 1])


def test_max_f1_may_reject_everything():
    values = np.array([1.0, 1.0, 2.0])
    threshold = thresholds.create("max_f1").fit(values, is_unknown=np.array([True, True, False]))
    assert threshold.decide(values).all() and math.isfinite(threshold.tau)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 400), st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.3, 1 / 3, 0.5]), st.integers(0, 2**31))
def test_conformal_is_its_order_statistic(n, alpha, seed):
    calibration = np.random.default_rng(seed).normal(size=n)
    threshold = thresholds.create("conformal", alpha=alpha).fit(calibration)
    # The smallest τ for which a further exchangeable score lies above it with probability at most α:
    # of the n + 1 equally likely ranks of that score, n + 1 − r lie above the r-th smallest.
    ranks = [r for r in range(1, n + 1) if (n + 1 - r) / (n + 1) <= alpha + 1e-9]
    assert threshold.tau == (np.sort(calibration)[ranks[0] - 1] if ranks else math.inf)


def test_conformal_keeps_its_promise_over_many_draws():
    """P(a known item is rejected) ≤ α, and ≥ α − 1/(n+1): over 3000 draws, inside the binomial bounds."""
    draw = np.random.default_rng(0)
    alpha, n, draws = 0.1, 37, 3000
    rejected = 0
    for _ in range(draws):
        values = draw.standard_cauchy(n + 1)  # whatever the distribution
        threshold = thresholds.create("conformal", alpha=alpha).fit(values[:n])
        rejected += int(threshold.decide(values[n:])[0])
    expected = thresholds.guarantee(n, alpha).expected
    assert alpha - 1 / (n + 1) <= expected <= alpha
    low, high = scipy.stats.binom.interval(0.999, draws, expected)
    assert low <= rejected <= high


def test_the_guarantee_of_one_calibration_set_holds():
    """In 95 % of calibration sets the true rejection rate is at most what the guarantee says."""
    draw = np.random.default_rng(1)
    alpha, n, draws = 0.1, 60, 2000
    bound = thresholds.guarantee(n, alpha).at_most
    rates = [
        scipy.stats.norm.sf(thresholds.create("conformal", alpha=alpha).fit(draw.normal(size=n)).tau)
        for _ in range(draws)
    ]
    low, high = scipy.stats.binom.interval(0.999, draws, 0.95)
    assert low <= np.sum(np.array(rates) <= bound) <= high


def test_too_few_calibration_items_reject_nothing():
    threshold = thresholds.create("conformal", alpha=0.05).fit(np.arange(18.0))
    assert threshold.tau == math.inf and not threshold.decide(np.array([1e30]))[0]
    assert threshold.state()["tau"] is None
    assert thresholds.create("conformal", alpha=0.05).fit(np.arange(19.0)).tau == 18.0


def test_a_level_of_almost_1_takes_the_smallest_score():
    assert thresholds.create("conformal", alpha=1 - 1e-12).fit(np.arange(19.0)).tau == 0.0


def test_p_values_are_the_share_of_calibration_scores_at_least_as_high():
    calibration = np.array([1.0, 2.0, 2.0, 3.0])
    expected = [(1 + sum(c >= s for c in calibration)) / 5 for s in (0.0, 2.0, 2.5, 9.0)]
    assert thresholds.p_values(np.array([0.0, 2.0, 2.5, 9.0]), calibration).tolist() == expected


@settings(deadline=None, max_examples=100)
@given(st.integers(20, 200), st.integers(0, 2**31), st.sampled_from([0.05, 0.1, 0.25]))
def test_p_values_and_the_threshold_agree(n, seed, alpha):
    draw = np.random.default_rng(seed)
    calibration, scores = draw.normal(size=n), draw.normal(1, 2, size=50)
    decision = thresholds.create("conformal", alpha=alpha).fit(calibration).decide(scores)
    assert np.array_equal(decision, thresholds.p_values(scores, calibration) <= alpha + 1e-12)


def test_unknown_names_show_the_nearest():
    with pytest.raises(OsmlError, match="did you mean 'conformal'"):
        thresholds.create("conformel")
