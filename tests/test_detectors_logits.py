"""Detectors on the proxies of a classification loss: each beside a slow, obvious twin, and beside pytorch-ood."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_ood.detector as peers
import torch
from conftest import sphere_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logsumexp, softmax
from scipy.stats import entropy
from torch import nn
from torch.nn.functional import normalize

from osml_plugin import OsmlError, detectors

NAMES = [
    *("ash", "energy", "entropy", "fdbd", "gen", "kl_matching", "max_logit", "movr", "msp"),
    *("nci", "nnguide", "react", "scale", "she", "vim"),
]


def made(n_classes=6, per_class=30, width=16, n_proxies=1, signed=True):
    """Embeddings, labels, proxies `(C, P, D)`, queries; of several proxies each is the best one of some items."""
    embeddings, labels, directions = sphere_classes(n_classes, per_class, width, spread=0.2, seed=3)
    draw = torch.Generator().manual_seed(4)
    proxies = normalize(directions[:, None] + 0.3 * torch.randn(n_classes, n_proxies, width, generator=draw), dim=2)
    queries = torch.cat([torch.randn(40, width, generator=draw) / width**0.5, embeddings[::9]])
    if not signed:
        embeddings, proxies, queries = (t.clamp_min(0) for t in (embeddings, proxies, queries))
    return embeddings, labels, 8 * proxies, queries


def scores_of(name, data, **params):
    embeddings, labels, proxies, queries = data
    return detectors.create(name, **params).fit(embeddings, labels, proxies).score(queries)


def head(proxies: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(proxies.shape[2], len(proxies), bias=False)
    layer.weight.data = proxies[:, 0].clone()
    return layer.requires_grad_(False)


def close(found, expected, **tolerance):
    np.testing.assert_allclose(found, expected, **{"rtol": 1e-4, "atol": 1e-5} | tolerance)


# Twins: the formula for one item, in double precision ---------------------------------------------------------


def logits_of(x, proxies):
    return np.array([max(w @ x for w in of_class) for of_class in proxies])


def gen(x, data, gamma=0.1, top=100):
    p = np.sort(softmax(logits_of(x, data[2])))[::-1][:top]
    return sum((q * (1 - q)) ** gamma for q in p)


def kl_matching(x, data):
    typical = {}
    for z in data[0]:
        p = softmax(logits_of(z, data[2]))
        typical.setdefault(p.argmax(), []).append(p)
    return min(entropy(softmax(logits_of(x, data[2])), np.mean(d, axis=0)) for d in typical.values())


def vim(x, data, share=0.5):
    z, width = data[0], data[0].shape[1]
    residual_axes = np.linalg.svd(z, full_matrices=True)[2][round(share * width) :]
    largest = np.mean([logits_of(y, data[2]).max() for y in z])
    alpha = largest / np.mean([np.linalg.norm(residual_axes @ y) for y in z])
    return alpha * np.linalg.norm(residual_axes @ x) - logsumexp(logits_of(x, data[2]))


def nnguide(x, data, k=10):
    def energy(y):
        return logsumexp(logits_of(y, data[2]))

    k = min(k, (data[1] == logits_of(x, data[2]).argmax()).sum())
    products = [energy(z) * (z @ x) / np.linalg.norm(z) / np.linalg.norm(x) for z in data[0]]
    return -energy(x) * np.mean(sorted(products)[-k:])


def best_proxies(x, data):
    return np.array([max(of_class, key=lambda w: w @ x) for of_class in data[2]])


def fdbd(x, data):
    w = best_proxies(x, data)
    best = (w @ x).argmax()
    distances = [(w[best] - w[c]) @ x / np.linalg.norm(w[best] - w[c]) for c in range(len(w)) if c != best]
    return -np.mean(distances) / np.linalg.norm(x - data[0].mean(axis=0))


def nci(x, data, alpha=0.0):
    w = best_proxies(x, data)
    centred = x - data[0].mean(axis=0)
    return -w[(w @ x).argmax()] @ centred / np.linalg.norm(centred) - alpha * np.abs(x).sum()


def she(x, data):
    predicted = np.array([logits_of(z, data[2]).argmax() for z in data[0]])
    best = logits_of(x, data[2]).argmax()
    return -x @ data[0][(data[1] == best) & (predicted == best)].mean(axis=0)


def react(x, data, percentile=0.9):
    ceiling = np.sort(data[0].ravel())[: int(percentile * (data[0].size - 1)) + 2]
    rest = percentile * (data[0].size - 1) % 1
    return -logsumexp(logits_of(np.minimum(x, (1 - rest) * ceiling[-2] + rest * ceiling[-1]), data[2]))


def ash(x, data, percentile=0.65, prune=True):
    n_kept = len(x) - round(percentile * len(x))
    kept = sorted(range(len(x)), key=lambda i: -abs(x[i]))[:n_kept]
    shaped = np.zeros_like(x) if prune else x.copy()
    shaped[kept] = x[kept]
    return -logsumexp(logits_of(shaped * np.exp(np.abs(x).sum() / np.abs(x[kept]).sum()), data[2]))


def scale(x, data, percentile=0.65):
    return ash(x, data, percentile, prune=False)


def movr(x, data, scale=32.0):
    unit = data[2] / np.linalg.norm(data[2], axis=2, keepdims=True)
    p = expit(scale * logits_of(x, unit) / np.linalg.norm(x))
    best = p.argmax()
    return -np.log(p[best]) - sum(np.log(1 - p[k]) for k in range(len(p)) if k != best)


TWINS = [
    (gen, {}),
    (gen, {"gamma": 0.5, "top": 3}),
    (kl_matching, {}),
    (vim, {}),
    (vim, {"share": 0.25}),
    (nnguide, {}),
    (nnguide, {"k": 100}),
    (fdbd, {}),
    (nci, {}),
    (nci, {"alpha": 0.1}),
    (she, {}),
    (react, {}),
    (react, {"percentile": 0.5}),
    (ash, {}),
    (ash, {"percentile": 0.0}),
    (scale, {}),
    (movr, {}),
    (movr, {"scale": 2.0}),
]


@pytest.mark.parametrize("n_proxies", [1, 3])
@pytest.mark.parametrize(("twin", "params"), TWINS, ids=[f"{t.__name__}{p or ''}" for t, p in TWINS])
def test_scores_are_their_formulas(twin, params, n_proxies):
    *data, queries = made(n_proxies=n_proxies)
    data = (*data, queries[::6])
    wide = [t.double().numpy() if t.is_floating_point() else t.numpy() for t in data]
    expected = np.array([twin(x, wide, **params) for x in wide[3]])
    close(scores_of(twin.__name__, data, **params), expected)
    classes = detectors.create(twin.__name__, **params).fit(*data[:3]).predict(data[3])[0].numpy()
    if twin not in (react, ash, scale):  # whose classes are those of the shaped embeddings
        np.testing.assert_array_equal(classes, [logits_of(x, wide[2]).argmax() for x in wide[3]])


# Peers -----------------------------------------------------------------------------------------------------------


def peer_scores(name, data, shape=False, **params):
    """pytorch-ood's scores on the same proxies, its own conventions aside."""
    embeddings, labels, proxies, queries = data
    layer = head(proxies)
    made_by = {
        "max_logit": lambda: peers.MaxLogit(None),
        "msp": lambda: peers.MaxSoftmax(None, t=params["temperature"]),
        "energy": lambda: peers.EnergyBased(None, t=params["temperature"]),
        "entropy": lambda: peers.Entropy(None),
        "gen": lambda: peers.GEN(None, **params),
        "kl_matching": lambda: peers.KLMatching(None),
        "vim": lambda: peers.ViM(None, d=params["d"], w=layer.weight, b=torch.zeros(len(proxies))),
        "nnguide": lambda: peers.NNGuide(None, layer, **params),
        "fdbd": lambda: peers.fDBD(None, layer),
        "nci": lambda: peers.NCI(None, layer, **params),
        "she": lambda: peers.SHE(None, layer),
        "react": lambda: peers.ReAct(None, lambda maps: layer(maps.flatten(1)), **params),
        "ash": lambda: peers.ASH(None, lambda maps: layer(maps.flatten(1)), **params),
        "scale": lambda: peers.SCALE(None, lambda maps: layer(maps.flatten(1)), **params),
    }
    peer = made_by[name]()
    if name in ("react", "ash", "scale"):
        if name == "react":
            peer.fit_feature_maps(embeddings[:, :, None, None], labels)
        return peer.predict_feature_maps(queries[:, :, None, None])
    if hasattr(peer, "fit_features"):
        return peer.fit_features(embeddings, labels).predict_features(queries)
    if name == "kl_matching":
        peer.fit_logits(layer(embeddings), labels)
    return peer.predict_logits(layer(queries))


@pytest.mark.parametrize(
    ("name", "params", "of_peer"),
    [
        ("max_logit", {}, {}),
        ("energy", {"temperature": 2.0}, {"temperature": 2.0}),
        ("entropy", {"temperature": 1.0}, {}),
        ("kl_matching", {}, {}),
        ("vim", {"share": 0.25}, {"d": 4}),
        ("vim", {"share": 0.75}, {"d": 12}),
        ("nnguide", {"k": 10}, {"k": 10}),
        ("fdbd", {}, {}),
        ("nci", {"alpha": 0.0}, {"alpha": 0.0}),
        ("nci", {"alpha": 0.1}, {"alpha": 0.1}),
        ("she", {}, {}),
        ("react", {"percentile": 0.85}, {"percentile": 0.85}),
        ("ash", {"percentile": 0.65}, {"percentile": 0.65}),
        ("scale", {"percentile": 0.5}, {"percentile": 0.5}),
    ],
)
def test_scores_are_pytorch_oods(name, params, of_peer):
    data = made(signed=name not in ("react", "ash", "scale"))  # they shape activations, which are not negative
    close(scores_of(name, data, **params), peer_scores(name, data, **of_peer))


def test_msp_is_pytorch_oods_plus_one():
    data = made()
    close(scores_of("msp", data, temperature=2.0), 1 + peer_scores("msp", data, temperature=2.0))


def test_gen_is_pytorch_oods_sum_and_goes_on_where_that_clamps():
    """Theirs is the mean of the terms, and clamps probabilities to [1e-7, 1 − 1e-7]: beyond, it tells nothing apart."""
    data = made()
    gentle = (*data[:2], data[2] / 8, data[3])
    close(scores_of("gen", gentle, gamma=0.1), 6 * peer_scores("gen", gentle, gamma=0.1))
    close(scores_of("gen", gentle, gamma=0.5, top=2), 2 * peer_scores("gen", gentle, gamma=0.5, M=2))
    surer = torch.eye(3) * torch.tensor([[20.0], [40.0], [60.0]])
    sure = (torch.eye(3), torch.arange(3), torch.eye(3)[:, None], surer)
    assert len(peer_scores("gen", sure, gamma=0.1).unique()) == 1
    found = scores_of("gen", sure, gamma=0.1)
    assert found[0] > found[1] > found[2] > 0


def test_kl_matching_is_finite_where_pytorch_oods_divides_by_nothing():
    """Where a class's mean probability of another rounds to 0 in single precision, theirs takes its logarithm as −3e38, and
    any probability at all makes an item of that very class the most unknown of all."""
    data = (torch.eye(2), torch.arange(2), 120 * torch.eye(2)[:, None], torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    theirs, ours = peer_scores("kl_matching", data), scores_of("kl_matching", data)
    assert theirs[0] > 1e10
    wide = [t.double().numpy() for t in data]
    close(ours, [kl_matching(x, wide) for x in wide[3]])
    assert ours[0] < 1e-6 < ours[1]


def test_nci_at_the_mean_is_no_nan():
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    data = (embeddings, torch.arange(2), embeddings[:, None], embeddings.mean(dim=0, keepdim=True))
    assert peer_scores("nci", data).isnan().all()  # 0 / 0
    assert scores_of("nci", data).tolist() == [0]


def test_fdbd_of_two_equal_proxies_is_no_nan():
    """Two classes whose proxies are the same have no boundary that an item could be away from: it counts as distance 0."""
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    data = (x, torch.arange(3), torch.tensor([[1.0, 0], [1, 0], [0, 1]])[:, None], torch.tensor([[2.0, 0.0]]))
    assert peer_scores("fdbd", data).isnan().all()
    away = np.linalg.norm([2 - 1.9 / 3, -1.1 / 3])
    close(scores_of("fdbd", data), [-(0 + 2 / 2**0.5) / 2 / away])


def test_she_has_a_pattern_for_a_class_that_is_never_predicted_right():
    x = torch.tensor([[1.0, 0.1], [1.0, 0.3], [0.1, 1.0]])
    data = (x, torch.tensor([1, 1, 0]), torch.eye(2)[:, None], torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    with pytest.raises(ValueError, match="No correct predictions"):
        peer_scores("she", data)
    close(scores_of("she", data), [-(2 * 0.1 + 1 * 1.0), -(1 * 1.0 + 3 * 0.2)])


def test_vim_of_fewer_items_than_dimensions_stays_bounded():
    """Theirs takes the part of the training items outside their own span, which is rounding error, as the unit."""
    embeddings, labels, proxies, queries = made(n_classes=5, per_class=1, width=32)
    data = (embeddings, labels, proxies, queries)
    assert peer_scores("vim", data, d=16).abs().max() > 1e4
    found = scores_of("vim", data, share=0.5)
    assert found.isfinite().all() and found.abs().max() < 1e3


@pytest.mark.parametrize("name", ["ash", "scale"])
def test_shaping_an_embedding_of_any_sign_stays_finite(name):
    """Theirs divides sums of signed numbers, which cancel: activations are meant, and an embedding is not such."""
    embeddings, labels, proxies, _ = made()
    data = (embeddings, labels, proxies, -torch.linspace(1e-4, 1, 16)[None].square())
    assert not peer_scores(name, data, percentile=0.8).isfinite().all()
    assert scores_of(name, data, percentile=0.8).isfinite().all()


def test_ash_keeps_all_numbers_as_large_as_the_last_it_keeps():
    embeddings, labels, proxies, _ = made(width=4)
    x = torch.tensor([[3.0, 1.0, -1.0, 0.5]])
    by_hand = torch.tensor([[3.0, 1, -1, 0]]) * np.exp(5.5 / 5) @ proxies[:, 0].T
    close(scores_of("ash", (embeddings, labels, proxies, x), percentile=0.5), -by_hand.logsumexp(dim=1))


def test_movr_tells_unknown_items_where_proxies_repel_each_other():
    """As its loss trains them: the proxies of C classes at cosine −1 / (C − 1)."""
    n_classes = 6
    simplex = normalize(torch.eye(n_classes) - 1 / n_classes)
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(n_classes).repeat_interleave(30)
    known = normalize(simplex[labels] + 0.1 * torch.randn(len(labels), n_classes, generator=draw))
    unknown = normalize(torch.randn(200, n_classes, generator=draw))
    detector = detectors.create("movr").fit(known, labels, simplex)
    assert detector.score(unknown).quantile(0.1) > detector.score(known).quantile(0.9)


def test_movr_tells_items_apart_that_hardly_lose_anything():
    """At T = 32 the loss of items near a proxy is far below the rounding of T cos(x, w), which no term may be added to."""
    simplex = normalize(torch.eye(4) - 1 / 4)
    near = normalize(simplex[0] + torch.linspace(0, 0.05, 8)[:, None] * simplex[1])
    wide = near.double().numpy(), torch.zeros(8).numpy(), simplex.double()[:, None].numpy()
    expected = np.array([np.logaddexp(0, 32 * np.array([-1, 1, 1, 1]) * (wide[2][:, 0] @ x)).sum() for x in wide[0]])
    found = scores_of("movr", (near, torch.arange(8) % 4, simplex, near))
    assert expected.max() < 1e-3
    close(found, expected, rtol=1e-4, atol=0)


# Edges and invariants --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kind", ["two classes", "more classes than dimensions", "one item a class", "one class", "zeros", "all the same"]
)
def test_edges(name, kind):
    sizes = {
        "two classes": (2, 20, 16),
        "more classes than dimensions": (30, 3, 4),
        "one item a class": (5, 1, 32),
        "one class": (1, 20, 8),
    }
    embeddings, labels, proxies, queries = made(*sizes.get(kind, (4, 10, 8)))
    if kind in ("zeros", "all the same"):
        embeddings = torch.full_like(embeddings, float(kind == "all the same"))
    queries = torch.cat([queries, torch.zeros(2, embeddings.shape[1]), embeddings[:2]])
    classes, scores = detectors.create(name).fit(embeddings, labels, proxies).predict(queries)
    assert scores.isfinite().all() and torch.isin(classes, labels).all()
    assert scores[-4] == scores[-3]  # ties stay ties


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=8)
@given(order=st.permutations(range(6)))
def test_names_of_classes_do_not_matter(name, order):
    embeddings, labels, proxies, queries = made(n_proxies=2)
    order = torch.tensor(order)
    renamed = scores_of(name, (embeddings, order[labels], proxies[order.argsort()], queries))
    close(renamed, scores_of(name, (embeddings, labels, proxies, queries)))


@settings(deadline=None, max_examples=20)
@given(length=st.floats(1e-3, 1e3), of_proxies=st.floats(1e-3, 1e3))
def test_movr_does_not_depend_on_lengths(length, of_proxies):
    embeddings, labels, proxies, queries = made()
    close(
        scores_of("movr", (embeddings, labels, of_proxies * proxies, length * queries)),
        scores_of("movr", (embeddings, labels, proxies, queries)),
    )


@settings(deadline=None, max_examples=20)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 2**16))
def test_softmax_scores_do_not_depend_on_a_shift_of_all_logits(shift, seed):
    """A number more in every embedding, against 1 in every proxy, adds the same to all logits."""
    embeddings, labels, proxies, queries = made()
    column = torch.full((len(queries), 1), shift)
    wider = (
        torch.cat([embeddings, torch.zeros(len(embeddings), 1)], dim=1),
        labels,
        torch.cat([proxies, torch.ones(6, 1, 1)], dim=2),
        torch.cat([queries, column], dim=1),
    )
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed))
    for name in ("msp", "entropy", "gen", "kl_matching"):
        shifted = scores_of(name, (*wider[:3], wider[3][order]))
        close(shifted, scores_of(name, (embeddings, labels, proxies, queries))[order], rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("gen", {"gamma": 0}, "gamma of detector 'gen' must be above 0; got 0"),
        ("gen", {"top": 0}, "whole number"),
        ("vim", {"share": 1}, "share must be above 0 and below 1; got 1"),
        ("nnguide", {"k": 1.5}, "whole number"),
        ("nci", {"alpha": -1}, "at least 0; got -1"),
        ("react", {"percentile": 1.5}, "percentile must be a share from 0 to 1.0; got 1.5"),
        ("ash", {"percentile": 0.99}, "percentile must be a share from 0 to 0.95; got 0.99"),
        ("scale", {"percentile": "most"}, "finite number"),
        ("movr", {"scale": -1}, "scale of detector 'movr' must be from 1e-6 to 1e6; got -1"),
    ],
)
def test_parameters_out_of_range_are_refused(name, params, message):
    with pytest.raises(OsmlError, match=message):
        detectors.create(name, **params)
