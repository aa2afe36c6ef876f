"""Drift of the known-rejection rate: the fit against other ways to it, and what it promises, by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom, truncexpon

from osml_plugin import OsmlError, thresholds
from osml_plugin.thresholds import DriftWatch, drift

ALPHA = 0.05


def in_use(rng, n_calibration, n_known, unknown=0.0, delta=0.0):
    """Conformal p-values of known items, their scores shifted by `delta`, among a share of far unknown ones."""
    calibration, known = rng.normal(size=n_calibration), rng.normal(delta, 1, n_known)
    far = np.full(round(n_known * unknown / (1 - unknown)), 9.0)
    return thresholds.p_values(rng.permutation(np.concatenate([known, far])), calibration)


def lehmann(rng, gamma, n):
    """P(p ≤ x) = x^γ."""
    return (1 - rng.random(n)) ** (1 / gamma)


def false_alarms(n_trials, rate):
    """As many as a rate gives by chance, save once in a thousand."""
    return binom.ppf(0.999, n_trials, rate)


class TestFit:
    @pytest.mark.parametrize("gamma", [0.3, 1.0, 2.5])
    @pytest.mark.parametrize("above", [0.2, 0.5])
    def test_it_is_the_maximum_of_the_likelihood(self, gamma, above):
        p = lehmann(np.random.default_rng(1), gamma, 5000)
        used = p[p > above]

        def loss(g):  # density γ p^(γ−1) / (1 − λ^γ)
            return -np.sum(np.log(g) + (g - 1) * np.log(used) - np.log(1 - above**g))

        best = minimize_scalar(loss, bounds=(1e-3, 10), method="bounded", options={"xatol": 1e-9}).x
        found = drift(p, ALPHA, above=above)
        assert found.n == len(used)
        assert found.gamma == pytest.approx(best, abs=1e-5)
        assert found.known_rejected == ALPHA**found.gamma

    @pytest.mark.parametrize("gamma", [0.3, 1.0, 2.5])
    @pytest.mark.parametrize("above", [0.2, 0.5])
    def test_its_mean_and_variance_are_those_of_the_truncated_exponential(self, gamma, above):
        p = lehmann(np.random.default_rng(2), gamma, 20_000)
        found = drift(p, ALPHA, above=above, confidence=0.95)
        length = -np.log(above)

        def law(g):
            return truncexpon(b=g * length, scale=1 / g)

        y = -np.log(p[p > above])
        assert law(found.gamma).mean() == pytest.approx(y.mean(), rel=1e-9)
        # Both ends of the interval, carried back to the mean, are 1.96 standard errors away.
        step = 1.959964 * np.sqrt(law(min(found.gamma, 1)).var() / len(y))
        for end, way in zip(found.interval, (-1, 1), strict=True):
            assert law(np.log(end) / np.log(ALPHA)).mean() == pytest.approx(y.mean() + way * step, rel=1e-6)

    @pytest.mark.parametrize("n_calibration", [20, 101, 1000])
    def test_discrete_p_values_against_the_likelihood_of_their_cells(self, n_calibration):
        p = in_use(np.random.default_rng(3), n_calibration, 5000)
        cells = n_calibration + 1
        first = math.ceil(cells / 2)
        k = np.round(p * cells)
        k = k[k > first]

        def loss(g):
            return -np.sum(np.log((k**g - (k - 1) ** g) / (cells**g - first**g)))

        best = minimize_scalar(loss, bounds=(1e-3, 10), method="bounded", options={"xatol": 1e-9}).x
        found = drift(p, ALPHA, n_calibration=n_calibration)
        assert found.n == len(k)
        assert found.gamma == pytest.approx(best, abs=0.02)

    def test_every_cell_once_is_no_drift_at_all(self):
        for n in (19, 20, 99, 1000):
            p = np.tile(np.arange(1, n + 2) / (n + 1), 40)
            assert drift(p, ALPHA, n_calibration=n).gamma == pytest.approx(1, abs=1e-6)

    @settings(deadline=None, max_examples=60)
    @given(
        st.lists(st.floats(1e-6, 1), min_size=30, max_size=60),
        st.floats(0.001, 0.5),
        st.floats(0.05, 0.95),
        st.sampled_from([None, 1, 7, 100]),
    )
    def test_whatever_comes(self, p, alpha, above, n_calibration):
        found = drift(p, alpha, above=above, n_calibration=n_calibration)
        if found is None:
            assert sum(v > above for v in p) < 30 or n_calibration is not None
            return
        assert 30 <= found.n <= len(p) and found.gamma >= 0
        low, high = found.interval
        assert 0 <= low <= found.known_rejected <= high <= 1
        assert found.stale == (low > alpha)
        again = drift([*p[::-1], 1e-9], alpha, above=above, n_calibration=n_calibration)
        assert again.gamma == pytest.approx(found.gamma, rel=1e-6)

    def test_the_ends(self):
        usual = drift(np.ones(50), ALPHA)
        assert (usual.gamma, usual.known_rejected, usual.stale) == (math.inf, 0.0, False)
        strange = drift(np.full(500, 0.5001), ALPHA)
        assert (strange.gamma, strange.known_rejected, strange.interval, strange.stale) == (0, 1, (1, 1), True)

    def test_too_few_say_nothing(self):
        assert drift([], ALPHA) is None
        assert drift(np.r_[np.full(29, 0.7), np.full(1000, 0.4)], ALPHA) is None
        assert drift(np.full(30, 0.7), ALPHA).n == 30


class TestPromise:
    @pytest.mark.parametrize("unknown", [0.0, 0.3, 0.6])
    def test_the_estimate_is_near_alpha_while_calibration_holds(self, unknown):
        p = in_use(np.random.default_rng(4), 40_000, 40_000, unknown)
        found = drift(p, ALPHA, n_calibration=40_000)
        assert found.interval[0] < ALPHA < found.interval[1] and not found.stale
        assert found.known_rejected == pytest.approx(ALPHA, abs=0.025)

    @pytest.mark.parametrize("unknown", [0.0, 0.6])
    @pytest.mark.parametrize("n_calibration", [20, 100, 1000])
    def test_false_alarms_over_calibration_sets(self, n_calibration, unknown):
        rng, trials = np.random.default_rng(5), 1000
        found = [
            drift(in_use(rng, n_calibration, 1000, unknown), ALPHA, n_calibration=n_calibration) for _ in range(trials)
        ]
        assert sum(f.stale for f in found) <= false_alarms(trials, 0.005)

    def test_the_stated_rate_is_used_up(self):
        rng, trials = np.random.default_rng(6), 1000
        alarms = sum(
            drift(in_use(rng, 200, 1000), ALPHA, confidence=0.8, n_calibration=200).stale for _ in range(trials)
        )
        assert binom.ppf(0.001, trials, 0.1) <= alarms <= false_alarms(trials, 0.1)

    def test_without_its_size_a_small_calibration_set_would_raise_alarms(self):
        rng = np.random.default_rng(7)
        p = [in_use(rng, 100, 1000) for _ in range(300)]
        assert sum(drift(x, ALPHA).stale for x in p) > 30
        assert sum(drift(x, ALPHA, n_calibration=100).stale for x in p) <= false_alarms(300, 0.005)

    @pytest.mark.parametrize("gamma", [0.6, 1.0, 1.5])
    def test_the_interval_holds_the_true_rate(self, gamma):
        rng, trials = np.random.default_rng(8), 1000
        missed = 0
        for _ in range(trials):
            low, high = drift(lehmann(rng, gamma, 2000), ALPHA, confidence=0.9).interval
            missed += not low <= ALPHA**gamma <= high
        assert missed <= false_alarms(trials, 0.1)

    @pytest.mark.parametrize("unknown", [0.0, 0.6])
    def test_a_shift_is_found_with_enough_items(self, unknown):
        rng = np.random.default_rng(9)
        found = [drift(in_use(rng, 1000, 4000, unknown, delta=0.5), ALPHA, n_calibration=1000) for _ in range(100)]
        assert sum(f.stale for f in found) >= 90
        assert all(f.gamma < 1 for f in found)
        # Known items that look more usual than the calibration ones are no alarm.
        found = [drift(in_use(rng, 1000, 4000, unknown, delta=-0.5), ALPHA, n_calibration=1000) for _ in range(100)]
        assert not any(f.stale for f in found)

    def test_what_it_cannot_see(self):
        rng = np.random.default_rng(10)
        p = 1 - rng.random(4000)
        tail = np.where(p < 0.4, p / 8, p)  # 40 % of the known items are rejected, and none of them lies above λ
        assert np.mean(tail <= ALPHA) > 0.35
        assert drift(tail, ALPHA) == drift(p, ALPHA) and not drift(tail, ALPHA).stale


class TestWatch:
    def test_it_is_drift_of_the_latest(self):
        rng = np.random.default_rng(11)
        watch = DriftWatch(ALPHA, size=500, n_calibration=999)
        assert watch.drift() is None
        p = in_use(rng, 999, 3000, 0.5)
        for batch in np.array_split(p, 50):
            watch.add(batch)
        latest = p[p > 0.5][-500:]
        assert watch.drift() == drift(latest, ALPHA, n_calibration=999)
        assert watch.drift().n == 500 and not watch.drift().stale
        watch.add(in_use(rng, 999, 3000, 0.5, delta=1.0))
        assert watch.drift().stale

    def test_unknown_items_do_not_push_known_ones_out(self):
        watch = DriftWatch(ALPHA, size=100)
        watch.add(np.full(60, 0.8))
        watch.add(np.full(10_000, 0.001))
        assert watch.drift().n == 60


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: drift([0.0, 0.5], ALPHA), r"within \(0, 1\]; got shape \(2,\) with values from 0 to 0.5"),
        (lambda: drift([0.5, np.nan], ALPHA), "within"),
        (lambda: drift([0.5, 1.2], ALPHA), "within"),
        (lambda: drift([[0.5]], ALPHA), r"shape \(items,\)"),
        (lambda: drift([0.5], 0), "alpha must be a rate"),
        (lambda: drift([0.5], ALPHA, above=1.0), "above must be a rate"),
        (lambda: drift([0.5], ALPHA, confidence=99), "confidence must be a rate"),
        (lambda: drift([0.5], ALPHA, n_calibration=0), "n_calibration must be a whole number of at least 1"),
        (lambda: DriftWatch(2), "alpha must be a rate"),
        (lambda: DriftWatch(ALPHA, 0), "size must be a whole number"),
        (lambda: DriftWatch(ALPHA).add([-1.0]), "within"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(OsmlError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)
