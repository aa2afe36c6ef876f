"""Detectors on tails of distances, on what is outside, and on other detectors: each against a slow, obvious twin."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import sphere_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_ood.detector import OpenMax as PeerOpenMax
from pytorch_ood.detector import ViM as PeerViM
from pytorch_ood.detector.openmax.libnotmr import LibNotMR
from scipy.optimize import brentq
from torch.nn.functional import normalize

from osml_plugin import OsmlError, detectors, thresholds
from osml_plugin.detectors import evm
from osml_plugin.detectors.combination import folds
from osml_plugin.detectors.openmax import TRANSLATION, largest_of_classes
from osml_plugin.detectors.weibull import MAX_SHAPE, fit_weibull, weibull_cdf


def items(n_classes=6, per_class=60, spread=0.2, seed=0, n_queries=80):
    """Embeddings, labels, class weights and queries: items of the classes, and random directions."""
    embeddings, labels, directions = sphere_classes(n_classes, per_class, spread=spread, seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)
    queries = normalize(torch.randn(n_queries, embeddings.shape[1], generator=draw))
    near = normalize(directions.repeat(5, 1) + spread * torch.randn(5 * n_classes, embeddings.shape[1], generator=draw))
    return embeddings, labels, 16 * directions, torch.cat([queries, near])


# Weibull ------------------------------------------------------------------------------------------------------


def slow_weibull(x: np.ndarray) -> tuple[float, float]:
    """The root of the likelihood equation as textbooks write it; at most `MAX_SHAPE`, where values hardly differ."""

    def slope(log_shape):
        powers = (x / x.max()) ** np.exp(log_shape)
        return (powers * log_x).sum() / powers.sum() - np.exp(-log_shape) - log_x.mean()

    log_x = np.log(x / x.max())  # ln x of values that hardly differ keeps few digits of the difference
    largest = np.log(MAX_SHAPE)
    shape = np.exp(brentq(slope, -7, largest, xtol=1e-14)) if slope(largest) > 0 else MAX_SHAPE
    return shape, x.max() * ((x / x.max()) ** shape).mean() ** (1 / shape)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(2, 40), st.floats(0.3, 30), st.sampled_from([0, 1, 1e4]), st.floats(1e-3, 1e3)
)
def test_weibull_is_the_root_of_its_equation(seed, n, shape, shift, scale):
    x = scale * np.random.default_rng(seed).weibull(shape, size=n) + 1e-9 + shift
    found = fit_weibull(torch.from_numpy(x)[None])
    expected = slow_weibull(x)
    assert float(found[0]) == pytest.approx(expected[0], rel=1e-6)
    assert float(found[1]) == pytest.approx(expected[1], rel=1e-9)


@pytest.mark.parametrize("shape", [0.5, 2.0, 40.0])
def test_weibull_is_scipys(shape):
    x = 3 * np.random.default_rng(1).weibull(shape, size=50)
    found = fit_weibull(torch.from_numpy(x)[None])
    kappa, _, scale = scipy.stats.weibull_min.fit(x, floc=0)
    assert float(found[0]) == pytest.approx(kappa, rel=1e-3) and float(found[1]) == pytest.approx(scale, rel=1e-3)
    at = np.linspace(-1, 6, 40)
    ours = weibull_cdf(torch.from_numpy(at), *found)
    np.testing.assert_allclose(
        ours, scipy.stats.weibull_min.cdf(at, *[float(found[0]), 0, float(found[1])]), atol=1e-12
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_weibull_scales_with_its_values(seed, factor):
    x = torch.from_numpy(np.random.default_rng(seed).weibull(3, size=(4, 12)))
    (shape, scale), (same, larger) = fit_weibull(x), fit_weibull(factor * x)
    torch.testing.assert_close(same, shape, rtol=1e-9, atol=0)
    torch.testing.assert_close(larger, factor * scale, rtol=1e-9, atol=0)


def test_weibull_of_many_rows_of_different_lengths_is_that_of_each():
    rng = np.random.default_rng(2)
    rows = [rng.weibull(rng.uniform(0.5, 9), size=n) for n in rng.integers(2, 30, size=50)]
    values, present = torch.full((50, 30), torch.nan, dtype=torch.float64), torch.zeros(50, 30, dtype=torch.bool)
    for i, row in enumerate(rows):
        places = torch.randperm(30, generator=torch.Generator().manual_seed(i))[: len(row)]
        values[i, places], present[i, places] = torch.from_numpy(row), True
    found = torch.stack(fit_weibull(values, present), dim=1)
    np.testing.assert_allclose(found, [slow_weibull(row) for row in rows], rtol=1e-8)


def test_weibull_of_values_that_are_all_the_same_is_a_step():
    values = torch.tensor([[2.0, 2, 2], [1e4, 1e4, 1e4], [1e-300, 1e-300, 1e-300], [5, 0, 0]], dtype=torch.float64)
    shape, scale = fit_weibull(values, values > 0)
    assert shape.tolist() == pytest.approx([MAX_SHAPE] * 4)
    assert scale.tolist() == pytest.approx([2.0, 1e4, 1e-300, 5.0], abs=1e-250)
    at = weibull_cdf(torch.tensor([1.9999, 2.0001], dtype=torch.float64), shape[:1], scale[:1])
    assert at.tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("spread", [1.0, 30.0])  # at 0.01 the search of the peer stops too early, by 0.5 %
def test_weibull_at_libmrs_translation_is_at_least_as_likely_as_the_peers(spread):
    distances = spread * np.random.default_rng(3).gamma(8, size=200)
    peer = LibNotMR(tailsize=20)
    peer.fit_high(distances)
    tail = np.sort(distances)[-20:]
    x = tail - tail.min() + TRANSLATION
    shape, scale = (float(v) for v in fit_weibull(torch.from_numpy(x)[None]))
    at = np.linspace(tail.min() - 2 * spread, tail.max() + 2 * spread, 30)
    ours = weibull_cdf(torch.from_numpy(at - tail.min() + TRANSLATION), torch.tensor(shape), torch.tensor(scale))
    likelihood = [scipy.stats.weibull_min.logpdf(x, c, 0, s).sum() for c, s in ((shape, scale), (peer.c, peer.scale))]
    assert likelihood[0] >= likelihood[1] - 1e-6
    np.testing.assert_allclose(ours, peer.w_score(at), atol=2e-3)


# OpenMax ------------------------------------------------------------------------------------------------------


def slow_openmax(logits, labels, queries, tail, alpha):
    """Item by item, class by class, from logits."""
    means, tails = {}, {}
    for c in range(logits.shape[1]):
        right = logits[(labels == c) & (logits.argmax(axis=1) == c)]
        right = right if len(right) else logits[labels == c]
        means[c] = right.mean(axis=0)
        distances = np.sort([np.linalg.norm(v - means[c]) for v in right])
        tails[c] = distances[-min(tail, int(np.ceil(len(right) / 10))) :]
    together = np.concatenate(list(tails.values()))
    scores = []
    for v in queries:
        shown = v - min(v.min(), 0)
        revised, unknown = shown.copy(), 0.0
        for i, c in enumerate(np.argsort(-v)[: min(alpha, len(v))]):
            of = tails[c] if len(tails[c]) >= 3 else together
            shape, scale = slow_weibull(of - of.min() + 1e4)
            x = np.linalg.norm(v - means[c]) - of.min() + 1e4
            share = (min(alpha, len(v)) - i) / min(alpha, len(v)) * scipy.stats.weibull_min.cdf(x, shape, 0, scale)
            unknown += share * shown[c]
            revised[c] -= share * shown[c]
        p = scipy.special.softmax(np.append(revised, unknown))[-1]
        scores.append(np.log(p) - np.log1p(-p))
    return np.array(scores)


@pytest.mark.parametrize("proxies", [1, 2])
@pytest.mark.parametrize(("tail", "alpha"), [(20, 10), (5, 2), (4, 1)])
def test_openmax_is_its_algorithm(proxies, tail, alpha):
    embeddings, labels, weights, queries = items(spread=0.4)  # some items are classified wrongly
    embeddings, labels = embeddings[45:], labels[45:]  # the first class keeps 15: its tail is too short
    weights = weights[:, None].repeat(1, proxies, 1) + torch.tensor([0.0, 2.0])[None, :proxies, None]
    logits, of_queries = (
        torch.einsum("nd,cpd->ncp", e.double(), weights.double()).amax(dim=2).numpy() for e in (embeddings, queries)
    )
    assert 0.5 < (logits.argmax(axis=1) == labels.numpy()).mean() < 1
    classes, scores = (
        detectors.create("openmax", tail=tail, alpha=alpha).fit(embeddings, labels, weights).predict(queries)
    )
    expected = slow_openmax(logits, labels.numpy(), of_queries, tail, alpha)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(classes, of_queries.argmax(axis=1))


def positive(**kwargs):
    """Items whose logits are all above 0, as the peer wants them: one number more, the same for all, lifts them."""
    embeddings, labels, weights, queries = items(per_class=150, **kwargs)
    embeddings, queries = (torch.cat([e, torch.ones(len(e), 1)], dim=1) for e in (embeddings, queries))
    weights = torch.cat([weights, torch.full((len(weights), 1), 17.0)], dim=1)
    return embeddings, labels, weights, queries


def peer_openmax(embeddings, labels, weights, alpha):
    logits = embeddings @ weights.T
    right = logits.argmax(dim=1) == labels  # the paper's; the peer takes whatever it is given
    return PeerOpenMax(None, tailsize=12, alpha=alpha).fit_logits(logits[right], labels[right])


@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_openmax_is_pytorch_oods(alpha):
    embeddings, labels, weights, queries = positive()
    expected = peer_openmax(embeddings, labels, weights, alpha).predict_logits(queries @ weights.T)
    found = detectors.create("openmax", tail=12, alpha=alpha).fit(embeddings, labels, weights).score(queries)
    np.testing.assert_allclose(found.sigmoid(), expected, atol=2e-3)  # its fit is good to three digits
    assert expected.min() < 0.01 and expected.max() > 0.9


def test_openmax_of_the_peer_depends_on_what_else_is_in_the_batch():
    """pytorch-ood computes distances to those classes only that are some query's first: to others they are 0, as if the
    query were their mean."""
    embeddings, labels, weights, queries = positive()
    peer = peer_openmax(embeddings, labels, weights, 6)
    whole = peer.predict_logits(queries @ weights.T)
    alone = torch.cat([peer.predict_logits(q[None] @ weights.T) for q in queries])
    assert (whole - alone).abs().max() > 0.1
    detector = detectors.create("openmax", tail=12, alpha=6).fit(embeddings, labels, weights)
    torch.testing.assert_close(torch.cat([detector.score(q[None]) for q in queries]), detector.score(queries))


def test_openmax_of_the_peer_takes_negative_logits_for_known():
    """As cosines are: the farther from every class, the less unknown."""
    embeddings, labels, weights, queries = items(per_class=150, n_queries=400)
    logits = queries @ weights.T
    far = logits.amax(dim=1) < 0
    peer = peer_openmax(embeddings, labels, weights, 3).predict_logits(logits)
    ours = detectors.create("openmax", tail=12, alpha=3).fit(embeddings, labels, weights).score(queries).sigmoid()
    assert far.sum() > 3 and peer[far].max() < 0.5 and ours[far].min() > 0.9


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_openmax_of_the_peer_is_cut_where_ours_is_not(caplog):
    """It cuts logits at 709 in place of subtracting the largest, which makes large ones equal."""
    embeddings, labels, weights, queries = positive()
    caplog.set_level(logging.CRITICAL)
    peer = peer_openmax(embeddings, labels, 500 * weights, 3).predict_logits(queries @ (500 * weights).T)
    ours = detectors.create("openmax", tail=12, alpha=3).fit(embeddings, labels, 500 * weights).score(queries)
    assert peer.unique().numel() < 0.6 * len(queries) and ours.unique().numel() == len(queries)


def test_largest_of_classes():
    distances = torch.tensor([3.0, 1.0, 2.0, 9.0, 8.0, 7.0]).repeat(10)
    labels = torch.tensor([0, 0, 0, 1, 1, 2]).repeat(10)
    tails, present = largest_of_classes(distances, labels, labels.bincount(), 2)
    assert tails.tolist() == [[3, 3], [9, 9], [7, 0]] and present.tolist() == [
        [True, True],
        [True, True],
        [True, False],
    ]


def test_openmax_takes_any_tail_and_alpha():
    embeddings, labels, weights, queries = items()
    expected = detectors.create("openmax", tail=60, alpha=6).fit(embeddings, labels, weights).score(queries)
    found = detectors.create("openmax", tail=10**30, alpha=10**30).fit(embeddings, labels, weights).score(queries)
    assert torch.equal(found, expected)


# EVM ----------------------------------------------------------------------------------------------------------


def slow_inclusion(embeddings, labels, tail):
    """The inclusion function of each reference, as (reference, shape, scale)."""
    found = []
    for x, y in zip(embeddings, labels, strict=True):
        half = np.sort(np.linalg.norm(embeddings[labels != y] - x, axis=1))[:tail] / 2
        found.append((x, *slow_weibull(half[half > 1e-6 * half[-1]])))
    return found


def slow_evm(inclusion, classes, queries):
    scores, nearest = [], []
    for q in queries:
        exponents = [(np.linalg.norm(q - x) / scale) ** shape for x, shape, scale in inclusion]
        scores.append(np.log1p(min(exponents)))
        nearest.append(classes[int(np.argmin(exponents))])
    return np.array(scores), np.array(nearest)


@pytest.mark.parametrize(("tail", "pairs"), [(20, 2**24), (7, 500), (1000, 2**24)])
def test_evm_is_its_formula(tail, pairs, monkeypatch):
    monkeypatch.setattr(evm, "MAX_PAIRS", pairs)
    embeddings, labels, _, queries = items(per_class=20, spread=0.3)
    embeddings = torch.cat([embeddings, embeddings[:3]])  # repeated, in another class
    labels = torch.cat([labels, torch.tensor([5, 5, 5])])
    wide = embeddings.double().numpy()
    expected, nearest = slow_evm(slow_inclusion(wide, labels.numpy(), tail), labels.numpy(), queries.double().numpy())
    classes, scores = detectors.create("evm", tail=tail).fit(embeddings, labels).predict(queries)
    np.testing.assert_allclose(scores, expected, rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(classes, nearest)
    inclusion = np.exp(-np.expm1(expected))  # the paper's: 1 − max Ψ
    np.testing.assert_allclose(torch.exp(-torch.expm1(scores.double())), inclusion, atol=1e-4)


def test_evm_takes_long_vectors():
    embeddings, labels, _, queries = items(per_class=20, spread=0.3)
    near = detectors.create("evm").fit(embeddings, labels).score(queries)
    moved = detectors.create("evm").fit(embeddings + 100, labels).score(queries + 100)
    torch.testing.assert_close(moved, near, rtol=1e-2, atol=1e-3)


def test_evm_of_one_class_ranks_as_the_nearest_reference():
    embeddings, _, _, queries = items(n_classes=1)
    labels = torch.zeros(len(embeddings), dtype=torch.long)
    scores = detectors.create("evm").fit(embeddings, labels).score(queries)
    nearest = detectors.create("knn", k=1).fit(embeddings, labels).score(queries)
    assert scipy.stats.spearmanr(scores, nearest).statistic > 0.9999999


@pytest.mark.parametrize("pairs", [2**24, 60])
@pytest.mark.parametrize("cover", [0.2, 0.5, 0.9])
def test_evm_keeps_what_covers_the_rest(cover, pairs, monkeypatch):
    monkeypatch.setattr(evm, "MAX_PAIRS", pairs)
    embeddings, labels, _, queries = items(per_class=25, spread=0.1)
    wide = embeddings.double().numpy()
    inclusion, kept = slow_inclusion(wide, labels.numpy(), 20), []
    for c in range(6):
        rows = np.flatnonzero(labels == c)
        covers = {
            i: {
                j
                for j in rows
                if np.exp(-((np.linalg.norm(wide[j] - wide[i]) / inclusion[i][2]) ** inclusion[i][1])) >= cover
            }
            for i in rows
        }
        left = set(rows)
        while left:
            best = max(rows, key=lambda i: (len(covers[i] & left), inclusion[i][2]))
            kept.append(best)
            left -= covers[best]
    kept = np.sort(kept)
    detector = detectors.create("evm", cover=cover).fit(embeddings, labels)
    assert len(kept) < len(labels)
    np.testing.assert_allclose(detector.references + detector.mean, wide[kept], atol=1e-6)
    expected, _ = slow_evm([inclusion[i] for i in kept], labels.numpy()[kept], queries.double().numpy())
    np.testing.assert_allclose(detector.score(queries), expected, rtol=2e-4, atol=1e-5)


def test_evm_covers_alike_in_any_order():
    """Many references include as many others: which of them is kept must not be the first."""
    embeddings, labels, _, queries = items(per_class=25, spread=0.1)
    expected = detectors.create("evm", cover=0.5).fit(embeddings, labels).score(queries)
    for seed in range(5):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        found = detectors.create("evm", cover=0.5).fit(embeddings[order], labels[order]).score(queries)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cover", [None, 0.5])
def test_evm_of_references_that_others_repeat_as_often_as_the_tail_is_long(cover):
    """They have no margin at all, and what they include is nothing but themselves; the others are as before."""
    embeddings, labels, _, queries = items(per_class=20, spread=0.1)
    repeated, of_others = embeddings[:1].repeat(20, 1), torch.arange(20) % 5 + 1
    x, y = torch.cat([embeddings, repeated]), torch.cat([labels, of_others])
    scores = detectors.create("evm", tail=10, cover=cover).fit(x, y).score(queries)
    assert scores.isfinite().all() and scores[-30:].median() < scores[:80].median()
    same = detectors.create("evm", cover=cover).fit(torch.ones(6, 4), torch.arange(6) % 2)
    here, near, far = same.score(torch.tensor([1.0, 1.01, 2.0])[:, None].expand(-1, 4)).tolist()
    assert here < near < far < np.inf


# Nearest ratio, residual, norm --------------------------------------------------------------------------------


def test_nearest_ratio_is_its_formula():
    embeddings, labels, _, queries = items(per_class=20, spread=0.3)
    queries = torch.cat([queries, embeddings[:5]])
    embeddings = torch.cat([embeddings, embeddings[:1]])
    labels = torch.cat([labels, torch.tensor([4])])  # the first reference is one of two classes
    expected, nearest = [], []
    for q in queries:
        distances = (embeddings - q).norm(dim=1)
        c = labels[distances.argmin()]
        one, other = float(distances.min()), float(distances[labels != c].min())
        expected.append(one / other if other else 1.0)
        nearest.append(int(c))
    classes, scores = detectors.create("nearest_ratio").fit(embeddings, labels).predict(queries)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert scores[-5:].tolist() == [1, 0, 0, 0, 0]
    assert classes[: len(queries) - 5].tolist() == nearest[: len(queries) - 5]


def test_nearest_ratio_of_one_class_is_the_distance():
    embeddings, _, _, queries = items(n_classes=1)
    labels = torch.full((len(embeddings),), 3)
    scores = detectors.create("nearest_ratio").fit(embeddings, labels).score(queries)
    torch.testing.assert_close(scores, torch.cdist(queries, embeddings).amin(dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_residual_is_what_singular_vectors_leave(share):
    embeddings, labels, _, queries = items()
    axes = np.linalg.svd(embeddings.double().numpy(), full_matrices=False)[2][: max(1, round(share * 16))]
    wide = queries.double().numpy()
    found = detectors.create("residual", share=share).fit(embeddings, labels).score(queries)
    np.testing.assert_allclose(found, np.linalg.norm(wide - wide @ axes.T @ axes, axis=1), rtol=1e-4, atol=1e-5)


def test_residual_is_that_of_pytorch_oods_vim():
    embeddings, labels, weights, queries = items()
    peer = PeerViM(None, d=8, w=weights, b=torch.zeros(6)).fit_features(embeddings, labels)
    found = detectors.create("residual", share=0.5).fit(embeddings, labels).score(queries)
    torch.testing.assert_close(found, (queries @ peer.principal_subspace).norm(dim=1), rtol=1e-4, atol=1e-5)


def test_residual_never_takes_more_dimensions_than_the_known_embeddings_span():
    embeddings = torch.eye(16)[:3].repeat(4, 1)
    detector = detectors.create("residual", share=0.75).fit(embeddings, torch.arange(3).repeat(4))
    torch.testing.assert_close(detector.score(torch.eye(16)), torch.tensor([0.0] * 3 + [1.0] * 13), atol=1e-6, rtol=0)


def test_norm_is_the_negative_length():
    embeddings, labels, _, queries = items()
    lengths = torch.linspace(0.1, 7, len(queries))
    detector = detectors.create("norm").fit(5 * embeddings, labels)
    classes, scores = detector.predict(queries * lengths[:, None])
    torch.testing.assert_close(scores, -lengths)
    means = normalize(torch.stack([embeddings[labels == c].mean(dim=0) for c in range(6)]))
    assert classes.tolist() == (queries @ means.T).argmax(dim=1).tolist()


# Combination --------------------------------------------------------------------------------------------------

MEMBERS = ["knn", {"name": "mahalanobis", "shrinkage": 0.1}, "energy"]


def slow_combination(embeddings, labels, weights, queries):
    """Each member's scores of the held-out items, and of the queries."""
    by_hand = torch.full_like(labels, -1)
    for c in labels.unique():
        rows = (labels == c).nonzero()[:, 0]
        for i, row in enumerate(rows[embeddings[rows].double().sum(dim=1).argsort()]):
            by_hand[row] = i % 5 if len(rows) > 1 else -1
    known, found = [], []
    for member in MEMBERS:
        params = {"name": member} if isinstance(member, str) else dict(member)
        name = params.pop("name")
        parts = []
        for f in range(5):
            rest = by_hand != f
            parts.append(
                detectors.create(name, **params).fit(embeddings[rest], labels[rest], weights).score(embeddings[~rest])
            )
        known.append(torch.cat(parts).numpy())
        found.append(detectors.create(name, **params).fit(embeddings, labels, weights).score(queries).numpy())
    return known, found


@pytest.fixture(scope="module")
def combined():
    embeddings, labels, weights, queries = items(per_class=13)
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[1:13] = False  # a class of one
    data = embeddings[keep], labels[keep], weights, queries
    return data, slow_combination(*data)


def test_combination_by_rank_is_the_mean_rank(combined):
    data, (known, found) = combined
    scores = detectors.create("combination", members=MEMBERS, how="rank").fit(*data[:3]).score(data[3])
    ranks = [
        [scipy.stats.percentileofscore(k, s, kind="mean") / 100 for s in f] for k, f in zip(known, found, strict=True)
    ]
    np.testing.assert_allclose(scores, np.mean(ranks, axis=0), rtol=1e-6)


def test_combination_by_p_value_is_fishers(combined):
    data, (known, found) = combined
    classes, scores = detectors.create("combination", members=MEMBERS, how="p_value").fit(*data[:3]).predict(data[3])
    p = np.stack([thresholds.p_values(f, k) for k, f in zip(known, found, strict=True)])
    expected = [scipy.stats.combine_pvalues(of_one, method="fisher").statistic for of_one in p.T]
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(classes, detectors.create("knn").fit(*data[:3]).predict(data[3])[0])


def test_combination_ranks_are_in_bounds_and_known_items_are_spread_evenly():
    embeddings, labels, _, _ = items(per_class=600, seed=4)
    fresh = torch.arange(len(labels)) % 2 == 0
    detector = detectors.create("combination", members=["mahalanobis"]).fit(embeddings[~fresh], labels[~fresh])
    ranks = detector.score(embeddings[fresh])
    assert ranks.min() >= 0 and ranks.max() <= 1
    assert scipy.stats.kstest(ranks, "uniform").statistic < 0.05


@pytest.mark.parametrize("how", ["rank", "p_value"])
def test_combination_saves_and_loads_its_members(combined, how, tmp_path):
    data, _ = combined
    nested = [*MEMBERS, {"name": "combination", "members": ["knn", {"name": "knn", "k": 1}]}]
    detector = detectors.create("combination", members=nested, how=how).fit(*data[:3])
    detector.save(tmp_path / "detector")
    loaded = detectors.Detector.load(tmp_path / "detector")
    assert loaded.params == detector.params == {"members": nested, "how": how}
    for mine, theirs in zip(detector.predict(data[3]), loaded.predict(data[3]), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(loaded.to(torch.device("cpu")).score(data[3]), detector.score(data[3]))


def test_combination_needs_what_its_members_need(combined):
    data, _ = combined
    assert not detectors.create("combination", members=["knn", "centroid"]).needs_class_weights
    needing = detectors.create("combination", members=["knn", {"name": "combination", "members": ["energy"]}])
    assert needing.needs_class_weights and not detectors.create("combination").needs_class_weights
    with pytest.raises(OsmlError, match="'combination' needs class weights"):
        needing.fit(*data[:2])


def test_combination_takes_numbers_of_any_type(combined, tmp_path):
    data, _ = combined
    members = [{"name": "knn", "k": np.int64(3)}, {"name": "mahalanobis", "shrinkage": np.float32(0.5)}]
    detector = detectors.create("combination", members=members).fit(*data[:2])
    detector.save(tmp_path / "detector")
    loaded = detectors.Detector.load(tmp_path / "detector")
    assert loaded.members == [{"name": "knn", "k": 3}, {"name": "mahalanobis", "shrinkage": 0.5}]
    assert torch.equal(loaded.score(data[3]), detector.score(data[3]))


def test_combination_forgets_what_its_members_were(combined):
    """OpenMax keeps one tensor more of one proxy a class than of two."""
    embeddings, labels, weights, queries = combined[0]
    twice = torch.stack([weights, weights.roll(1, dims=1)], dim=1)
    made = [detectors.create("combination", members=["openmax"], how=how) for how in ("rank", "p_value")]
    for detector in made:
        detector.fit(embeddings, labels, weights)
    found = {i: scores for i, _, scores in detectors.Detector.scan(made, embeddings, labels, queries, twice)}
    for i, how in enumerate(("rank", "p_value")):
        fresh = detectors.create("combination", members=["openmax"], how=how).fit(embeddings, labels, twice)
        assert torch.equal(found[i], fresh.score(queries))


def test_combinations_that_differ_in_how_share_their_members(combined):
    data, _ = combined
    made = [
        detectors.create("combination", members=m, how=how) for how in ("rank", "p_value") for m in (["knn"], MEMBERS)
    ]
    found = {i: (c, s) for i, c, s in detectors.Detector.scan(made, *data[:2], data[3], data[2])}
    for i, detector in enumerate(made):
        alone = detectors.create("combination", **detector.params).fit(*data[:3])
        assert torch.equal(found[i][1], alone.score(data[3]))
    assert made[1].known_scores is made[3].known_scores


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 6))
def test_folds_cut_every_class_alike_in_any_order(seed, n, n_classes):
    draw = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, 3, generator=draw)
    labels = torch.randint(n_classes, (n,), generator=draw)
    labels = labels.unique(return_inverse=True)[1]
    fold, order = folds(embeddings, labels), torch.randperm(n, generator=draw)
    assert torch.equal(folds(embeddings[order], labels[order]), fold[order])
    for c in labels.unique():
        of_class = fold[labels == c]
        if len(of_class) == 1:
            assert of_class.tolist() == [-1]
        else:
            sizes = of_class.bincount(minlength=5)
            assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("openmax", {"tail": 0}, "tail of detector 'openmax' must be a whole number of at least 1"),
        ("openmax", {"alpha": 1.5}, "alpha of detector 'openmax' must be a whole number"),
        ("evm", {"tail": -1}, "tail of detector 'evm'"),
        ("evm", {"cover": 1}, "cover must be above 0 and below 1, or None; got 1"),
        ("residual", {"share": 1.0}, "share must be above 0 and below 1"),
        ("combination", {"members": "knn"}, "members must be a list of detectors"),
        ("combination", {"members": []}, "members must be a list of detectors"),
        ("combination", {"members": ["kn"]}, "unknown detector 'kn': did you mean 'knn'"),
        ("combination", {"members": [{"k": 3}]}, "has no name"),
        ("combination", {"members": [3]}, "members must be a list of detectors"),
        ("combination", {"members": [{"name": "knn", "q": 3}]}, "unknown argument of detector 'knn' 'q'"),
        ("combination", {"how": "ranks"}, "did you mean 'rank'"),
    ],
)
def test_parameters_out_of_range_are_refused(name, params, message):
    with pytest.raises(OsmlError, match=message):
        detectors.create(name, **params)
