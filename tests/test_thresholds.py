"""One contract for every threshold, each rule against its definition, and the conformal promise over many draws."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from osml_plugin import OsmlError, thresholds
from osml_plugin.thresholds import select_unknown
from osml_plugin.thresholds.ranks import fewest

PARAMS = {"fixed": {"tau": 0.5}}
ALL = thresholds.names()
NEAREST = np.arange(300) % 3 * 7
"""Of each item of `scores`, its nearest class."""


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
        threshold = self.make(name).fit(values, NEAREST, is_unknown=is_unknown)
        decision, taus = threshold.decide(values, NEAREST), threshold.tau_of(NEAREST)
        assert decision.dtype == bool and np.array_equal(decision, values.astype(float) > taus)
        assert not threshold.decide(taus, NEAREST).any()
        tensors = torch.from_numpy(values), torch.from_numpy(NEAREST)
        assert np.array_equal(threshold.decide(*tensors), decision)
        if not threshold.by_class:
            assert set(taus) == {threshold.tau} and np.array_equal(threshold.decide(values), decision)

    def test_order_does_not_matter_and_refit_forgets(self, name, scores):
        values, is_unknown = scores
        threshold = self.make(name).fit(values, NEAREST, is_unknown=is_unknown)
        state = threshold.state()
        threshold.fit(values + 5, NEAREST % 2, is_unknown=is_unknown)
        assert threshold.fit(values[::-1], NEAREST[::-1], is_unknown=is_unknown[::-1]).state() == state

    def test_state_is_json_and_comes_back(self, name, scores):
        values, is_unknown = scores
        threshold = self.make(name).fit(values, NEAREST, is_unknown=is_unknown)
        again = thresholds.Threshold.from_state(json.loads(json.dumps(threshold.state(), allow_nan=False)))
        assert type(again) is type(threshold) and again.tau == threshold.tau and again.params == threshold.params
        assert again.state() == threshold.state() and np.array_equal(again.tau_of(NEAREST), threshold.tau_of(NEAREST))

    def test_bad_input_is_refused(self, name, scores):
        values, is_unknown = scores
        threshold = self.make(name)
        with pytest.raises(OsmlError, match="1 of 300 scores are NaN"):
            threshold.fit(np.where(np.arange(300) == 7, np.nan, values), NEAREST, is_unknown=is_unknown)
        with pytest.raises(OsmlError, match="shape"):
            threshold.fit(values[None], NEAREST, is_unknown=is_unknown)
        with pytest.raises(OsmlError, match="is_unknown must be booleans"):
            threshold.fit(values, NEAREST, is_unknown=is_unknown[:-1])
        with pytest.raises(OsmlError, match="known items"):
            threshold.fit(values, NEAREST, is_unknown=np.ones(300, bool))
        if threshold.by_class:
            with pytest.raises(OsmlError, match="differs by class: give the nearest class"):
                threshold.fit(values, is_unknown=is_unknown)
            for wrong in (NEAREST[1:], NEAREST.astype(float)):
                with pytest.raises(OsmlError, match="whole numbers of shape"):
                    threshold.fit(values, wrong, is_unknown=is_unknown)
        if threshold.needs_unknown:
            with pytest.raises(OsmlError, match="known and unknown items"):
                threshold.fit(values)
        for wrong in (["a"] * 300, [None] * 300, values > 0, values.astype(complex)):
            with pytest.raises(OsmlError, match="scores must be real numbers"):
                threshold.fit(wrong, NEAREST, is_unknown=is_unknown)
        with pytest.raises(OsmlError, match="its rows differ"):
            threshold.fit([[0.1], [0.2, 0.3]], NEAREST[:2])
        if name != "fixed":
            with pytest.raises(OsmlError, match="not fitted"):
                self.make(name).decide(values)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
    def test_tensors_are_taken_and_left_as_they_are(self, name, dtype, scores):
        values, is_unknown = (torch.from_numpy(v) for v in scores)
        values = (4 * values).to(dtype)
        plain = values.double().numpy()
        expected = self.make(name).fit(plain, NEAREST, is_unknown=is_unknown.numpy())
        wide = torch.stack([values, -values], dim=1)
        tensors = (wide.requires_grad_() if dtype.is_floating_point else wide)[:, 0]  # strided, and with a gradient
        nearest = torch.from_numpy(NEAREST).int()
        threshold = self.make(name).fit(tensors, nearest, is_unknown=is_unknown)
        assert threshold.state() == expected.state()
        assert np.array_equal(threshold.decide(tensors, nearest), expected.decide(plain, NEAREST))
        assert np.array_equal(threshold.tau_of(nearest), expected.tau_of(NEAREST))
        assert np.array_equal(tensors.detach().double().numpy(), plain)

    def test_classes_are_whole_numbers(self, name, scores):
        values, is_unknown = scores
        threshold = self.make(name).fit(values, NEAREST, is_unknown=is_unknown)
        for wrong in (None, [0.5], [[0, 1]], ["a"]):
            with pytest.raises(OsmlError, match="whole numbers of shape|differs by class"):
                threshold.tau_of(wrong)
        assert threshold.decide([], []).shape == threshold.tau_of([]).shape == (0,)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("conformal", {"alpha": 0}),
        ("conformal", {"alpha": 1.0}),
        ("quantile", {"accepted": 5}),
        ("target_rate", {"unknown_accepted": -0.1}),
        ("conformal", {"alpha": math.nan}),
        ("quantile", {"accepted": "abc"}),
        ("target_rate", {"unknown_accepted": True}),
        ("target_rate", {"known_rejected": 1.0}),
        ("conformal", {"alpha": 2}),
        ("class_conformal", {"alpha": "a"}),
        ("class_conformal", {"alpha": None}),
    ],
)
def test_rates_outside_0_and_1_are_refused(name, params):
    with pytest.raises(OsmlError, match="must be a rate between 0 and 1"):
        thresholds.create(name, **params)


@pytest.mark.parametrize("kind", [np.float32, np.float64, Fraction])
def test_a_rate_is_a_number_of_any_kind(kind):
    threshold = thresholds.create("conformal", alpha=kind(0.25)).fit(np.arange(99.0))
    assert threshold.alpha == 0.25 and type(threshold.alpha) is float and threshold.tau == 74


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


def test_quantile_is_safe_from_floating_point():
    """0.07 · 100 is 7.000000000000001, and yet 7 of 100 are enough."""
    for n in (20, 50, 100, 200):
        for percent in range(1, 100):
            tau = thresholds.create("quantile", accepted=percent / 100).fit(np.arange(1.0, n + 1)).tau
            assert tau == math.ceil(Fraction(percent, 100) * n)


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


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_target_rate_on_the_known_side_is_the_smallest_that_keeps_it(scores, rate):
    values, is_unknown = scores
    threshold = thresholds.create("target_rate", known_rejected=rate)
    tau = threshold.fit(values, is_unknown=is_unknown).tau
    known = values[~is_unknown]
    assert not threshold.needs_unknown and threshold.fit(known).tau == tau
    assert (known > tau).mean() <= rate
    assert (known >= tau).mean() > rate  # any smaller one rejects the item at τ as well


def test_target_rate_keeps_one_rate():
    assert thresholds.create("target_rate").params == {"unknown_accepted": 0.05, "known_rejected": None}
    with pytest.raises(OsmlError, match="give either unknown_accepted or known_rejected"):
        thresholds.create("target_rate", unknown_accepted=0.1, known_rejected=0.1)


TIED = st.lists(st.integers(0, 6), min_size=1, max_size=25)


def every_cut(known: list[int], unknown: list[int]) -> dict[float, tuple[Fraction, Fraction]]:
    """The slow twin: shares of known and of unknown items rejected, exactly, at each τ that differs."""
    return {
        tau: (
            Fraction(sum(s > tau for s in known), len(known)),
            Fraction(sum(s > tau for s in unknown), len(unknown)),
        )
        for tau in sorted({*known, *unknown, min(known + unknown) - 1})
    }


def rejected_at(name: str, known: list[int], unknown: list[int]) -> tuple[Fraction, Fraction]:
    values, is_unknown = np.array(known + unknown, float), np.arange(len(known + unknown)) >= len(known)
    decision = thresholds.create(name).fit(values, is_unknown=is_unknown).decide(values)
    return tuple(Fraction(int(decision[of].sum()), int(of.sum())) for of in (~is_unknown, is_unknown))


@settings(deadline=None, max_examples=150)
@given(TIED, TIED)
def test_eer_is_the_cut_of_most_equal_errors(known, unknown):
    ordered = [(abs(k - (1 - u)), k + 1 - u, k, u) for k, u in every_cut(known, unknown).values()]
    best = min(ordered, key=lambda cut: (cut[0], cut[1]))
    equal = [cut for cut in ordered if cut[:2] == best[:2]]
    assert rejected_at("eer", known, unknown) == equal[-1][2:]  # the largest τ of these


@settings(deadline=None, max_examples=150)
@given(TIED, TIED)
def test_youden_is_the_cut_of_the_largest_index(known, unknown):
    j = {tau: u - k for tau, (k, u) in every_cut(known, unknown).items()}
    tau = max(t for t in j if j[t] == max(j.values()))
    assert rejected_at("youden", known, unknown) == every_cut(known, unknown)[tau]


def test_youden_and_eer_agree_with_the_roc_curve(scores):
    from sklearn.metrics import roc_curve

    values, is_unknown = scores
    false, true, _ = roc_curve(is_unknown, values, drop_intermediate=False)
    known, unknown = values[~is_unknown], values[is_unknown]
    tau = thresholds.create("youden").fit(values, is_unknown=is_unknown).tau
    assert (unknown > tau).mean() - (known > tau).mean() == pytest.approx((true - false).max())
    tau = thresholds.create("eer").fit(values, is_unknown=is_unknown).tau
    assert abs((known > tau).mean() - (unknown <= tau).mean()) == pytest.approx(abs(false - (1 - true)).min())


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


ROUNDED = [1 - 0.9, 1 - 0.95, 1 - 0.8, 0.1 + 0.2, 0.1 * 3, np.nextafter(0.05, 0), np.nextafter(0.05, 1), 1 / 3, 1 / 7]
"""Rates as arithmetic leaves them: a little above or below what was meant."""


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 200),
    st.integers(0, 2**31),
    st.one_of(st.sampled_from([0.05, 0.1, 0.25, *ROUNDED]), st.floats(1e-3, 0.999)),
)
@example(9, 0, 1 - 0.9)
@example(19, 0, np.nextafter(0.05, 0))
@example(20, 0, 1 / 7)
def test_p_values_and_the_threshold_agree(n, seed, alpha):
    draw = np.random.default_rng(seed)
    calibration = draw.normal(size=n)
    scores = np.concatenate([draw.normal(1, 2, size=50), calibration])
    threshold = thresholds.create("conformal", alpha=alpha).fit(calibration)
    p = thresholds.p_values(scores, calibration)
    assert np.array_equal(threshold.decide(scores), p <= alpha)
    assert np.array_equal(threshold.p_values(scores), p)
    assert threshold.guarantee().possible == math.isfinite(threshold.tau) == (n >= fewest(alpha))
    assert threshold.guarantee().expected <= alpha


def by_hand(p: list[Fraction], q: Fraction, known: Fraction = Fraction(1)) -> set[int]:
    """Benjamini & Hochberg as they wrote it: the largest k with p_(k) ≤ q k / (π0 N), then all p up to that one."""
    last = max((v for k, v in enumerate(sorted(p), 1) if v * len(p) * known <= q * k), default=0)
    return {i for i, v in enumerate(p) if v <= last}


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=40),
    st.sampled_from([Fraction(1, 100), Fraction(1, 20), Fraction(1, 10), Fraction(1, 3)]),
    st.sampled_from([None, Fraction(1, 5), Fraction(1, 2)]),
)
def test_false_discovery_control_is_the_step_up(cells, q, above):
    p = [Fraction(c, 100) for c in cells]
    known = Fraction(1)
    if above is not None:
        known = (1 + sum(v > above for v in p)) / (len(p) * (1 - above))
    found = select_unknown([float(v) for v in p], float(q), above=None if above is None else float(above))
    assert set(np.flatnonzero(found)) == by_hand(p, q, known)


@pytest.mark.parametrize("above", [None, 0.5])
def test_false_discoveries_stay_below_their_rate(above):
    """Over 1000 batches, each with a calibration set of its own: the mean share of known among the rejected ≤ q."""
    draw = np.random.default_rng(0)
    q, n_known, n_unknown, shares, found = 0.2, 80, 20, [], []
    for _ in range(1000):
        calibration = draw.normal(size=200)
        scores = np.concatenate([draw.normal(size=n_known), draw.normal(3.5, 1, n_unknown)])
        selected = select_unknown(thresholds.p_values(scores, calibration), q, above=above)
        shares.append(selected[:n_known].sum() / max(1, selected.sum()))
        found.append(selected[n_known:].mean())
    error = 3 * np.std(shares) / np.sqrt(len(shares))
    assert q * 0.6 < np.mean(shares) < q + error and np.mean(found) > 0.7, (np.mean(shares), error)


def test_false_discovery_control_refuses_bad_input():
    assert select_unknown([], 0.1).shape == (0,)
    with pytest.raises(OsmlError, match="within"):
        select_unknown([0.0, 0.5], 0.1)
    with pytest.raises(OsmlError, match="real numbers"):
        select_unknown(["a"], 0.1)
    assert select_unknown(torch.tensor([0.5, 0.001], dtype=torch.bfloat16), 0.1).tolist() == [False, True]
    with pytest.raises(OsmlError, match="q must be a rate"):
        select_unknown([0.5], 1)
    with pytest.raises(OsmlError, match="above must be a rate"):
        select_unknown([0.5], 0.1, above=0)


def test_unknown_names_show_the_nearest():
    with pytest.raises(OsmlError, match="did you mean 'conformal'"):
        thresholds.create("conformel")
