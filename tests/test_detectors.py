"""One contract for every detector in the registry, and for each a slow, obvious twin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytorch_ood.detector as peers
import scipy.stats
import torch
from conftest import sphere_classes
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import ShrunkCovariance
from sklearn.mixture import GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize

from osml_plugin import UNKNOWN, OsmlError, detectors
from osml_plugin.neighbors import NeighborIndex

ALL = detectors.names()
SPACES = {name: detectors.registry.get(name).search_space for name in ALL}
VARIANTS = [(name, {p: value}) for name in ALL for p, values in SPACES[name].items() for value in values]
NOT_SEARCHED = [("gmm", {"n_components": 2}), ("gmm", {"covariance": "diag"})]
EVERY = [(n, {}) for n in ALL] + VARIANTS + NOT_SEARCHED
IDS = [f"{n}{p or ''}" for n, p in EVERY]


BY_LENGTH = ["norm"]
"""What tells these the unknown is the length of an embedding: it is 1 in the data for all others."""


def _data():
    embeddings, index, directions = sphere_classes(n_classes=5, per_class=40)
    labels = torch.tensor([7, 2, 30, 11, 4])[index]  # neither contiguous nor in order
    weights = 16 * directions[torch.tensor([1, 4, 0, 3, 2])]  # in the order of the labels 2, 4, 7, 11, 30
    queries = normalize(torch.randn(60, 16, generator=torch.Generator().manual_seed(1)))
    return embeddings, labels, weights, queries


UNIT = _data()
_LENGTHS = torch.rand(260, 1, generator=torch.Generator().manual_seed(4))
LONG = (UNIT[0] * (2 + _LENGTHS[:200]), *UNIT[1:3], UNIT[3] * (0.5 + _LENGTHS[200:]))
_FITTED = {}


@pytest.fixture
def data(request):
    """Embeddings, labels, class weights and queries, these of unknown items."""
    callspec = getattr(request.node, "callspec", None)
    return LONG if callspec and callspec.params.get("name") in BY_LENGTH else UNIT


def fitted(name, params, data):
    """Fitted once for all tests that only look at it."""
    key = name, repr(params)
    if key not in _FITTED:
        _FITTED[key] = freshly_fitted(name, params, data)
    return _FITTED[key]


def freshly_fitted(name, params, data):
    embeddings, labels, weights, _ = data
    return detectors.create(name, **params).fit(embeddings, labels, weights)


@pytest.mark.parametrize(("name", "params"), EVERY, ids=IDS)
class TestContract:
    def test_params_make_it_again(self, name, params, data):
        detector = detectors.create(name, **params)
        assert detector.params.items() >= params.items()
        again = freshly_fitted(name, detector.params, data)
        assert torch.equal(again.score(data[3]), fitted(name, params, data).score(data[3]))

    def test_scores_and_classes(self, name, params, data):
        embeddings, labels, _, queries = data
        detector = fitted(name, params, data)
        classes, scores = detector.predict(queries)
        assert scores.shape == classes.shape == (60,) and scores.dtype == torch.float32
        assert torch.equal(scores, detector.score(queries)) and scores.isfinite().all()
        assert set(classes.tolist()) <= set(labels.tolist())
        assert (detector.predict(embeddings)[0] == labels).float().mean() > 0.97

    def test_unknown_scores_higher(self, name, params, data):
        if name == "movr":  # made for proxies that repel each other, as its loss trains them: test_detectors_logits.py
            return
        embeddings, _, _, queries = data
        detector = fitted(name, params, data)
        assert detector.score(queries).median() > detector.score(embeddings).quantile(0.9)

    def test_refit_forgets(self, name, params, data):
        other = sphere_classes(n_classes=3, per_class=25, seed=9)
        detector = detectors.create(name, **params).fit(other[0], other[1], 9 * other[2])
        embeddings, labels, weights, queries = data
        assert torch.equal(
            detector.fit(embeddings, labels, weights).score(queries), fitted(name, params, data).score(queries)
        )

    def test_order_of_references_does_not_matter(self, name, params, data):
        embeddings, labels, weights, queries = data
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))
        shuffled = detectors.create(name, **params).fit(embeddings[order], labels[order], weights)
        close(shuffled.score(queries), fitted(name, params, data).score(queries))

    def test_subsets_and_chunks_do_not_matter(self, name, params, data, monkeypatch):
        queries = data[3]
        detector = fitted(name, params, data)
        whole = detector.score(queries)
        close(detector.score(queries[10:20]), whole[10:20])
        close(torch.cat([detector.score(q[None]) for q in queries[:9]]), whole[:9])
        monkeypatch.setattr(detector, "chunk_size", 7)
        close(detector.score(queries), whole)
        assert detector.score(queries[:0]).shape == (0,)

    def test_a_class_of_one_example(self, name, params, data):
        embeddings, labels, weights, _ = data
        alone = -embeddings.mean(dim=0, keepdim=True)
        alone = normalize(alone) * embeddings.norm(dim=1).mean()
        detector = detectors.create(name, **params).fit(
            torch.cat([embeddings, alone]),
            torch.cat([labels, torch.tensor([99])]),
            torch.cat([weights, 16 * normalize(alone)]),
        )
        classes, scores = detector.predict(alone)
        assert classes.tolist() == [99] and scores <= detector.score(embeddings).quantile(0.99)

    def test_one_example_of_every_class(self, name, params, data):
        _, labels, weights, queries = data
        detector = detectors.create(name, **params).fit(normalize(weights), labels.unique(), weights)
        assert detector.score(queries).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_precisions(self, name, params, data, dtype):
        embeddings, labels, weights, queries = data
        detector = detectors.create(name, **params).fit(embeddings.to(dtype), labels, weights.to(dtype))
        scores, expected = detector.score(queries.to(dtype)), fitted(name, params, data).score(queries)
        assert scores.dtype == torch.float32
        rank = scipy.stats.spearmanr(scores, expected).statistic
        assert rank > (0.98 if dtype == torch.float16 else 0.9999999)

    def test_save_and_load(self, name, params, data, tmp_path):
        detector = fitted(name, params, data)
        detector.save(tmp_path / "detector")
        loaded = detectors.Detector.load(tmp_path / "detector")
        assert type(loaded) is type(detector) and loaded.params == detector.params
        for mine, theirs in zip(detector.predict(data[3]), loaded.predict(data[3]), strict=True):
            assert torch.equal(mine, theirs)

    def test_a_far_point_is_unknown(self, name, params, data):
        if detectors.registry.get(name).far_point_exception:
            assert len(detectors.registry.get(name).far_point_exception) > 20  # it says why not
            return
        embeddings = data[0]
        detector = fitted(name, params, data)
        # The direction that is farthest from every training point.
        candidates = normalize(torch.randn(2000, 16, generator=torch.Generator().manual_seed(3)))
        far = candidates[(candidates @ embeddings.T).amax(dim=1).argmin()]
        assert detector.score(far[None]) > detector.score(embeddings).max()


@pytest.mark.parametrize("name", ALL)
class TestContractOfTheBase:
    """What no parameter changes."""

    def test_unfitted_raises(self, name, data, tmp_path):
        detector = detectors.create(name)
        with pytest.raises(OsmlError, match="not fitted"):
            detector.score(data[3])
        with pytest.raises(OsmlError, match="not fitted"):
            detector.save(tmp_path / "detector")

    def test_numpy_serves_too(self, name, data):
        embeddings, labels, weights, queries = data
        detector = detectors.create(name).fit(embeddings.numpy(), labels.numpy(), weights.numpy())
        assert torch.equal(detector.score(queries.numpy()), fitted(name, {}, data).score(queries))

    def test_inputs_are_left_alone(self, name, data):
        before = [t.clone() for t in data]
        embeddings, labels, weights, queries = (t.clone() for t in data)
        detector = detectors.create(name).fit(embeddings, labels, weights)
        expected = detector.score(queries)
        assert all(torch.equal(a, b) for a, b in zip((embeddings, labels, weights, queries), before, strict=True))
        embeddings.zero_(), weights.zero_()  # nor does the detector depend on them afterwards
        assert torch.equal(detector.score(queries), expected)

    def test_gradients_are_not_kept(self, name, data):
        embeddings, labels, weights, queries = data
        detector = detectors.create(name).fit(embeddings.requires_grad_(), labels, weights)
        embeddings.requires_grad_(False)
        assert not detector.score(queries.clone().requires_grad_()).requires_grad

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda e, y: (e[:, 0], y), "shape"),
            (lambda e, y: (e.index_fill(0, torch.tensor([3]), torch.nan), y), "1 of 200 embeddings hold NaN.*row 3"),
            (lambda e, y: (e.index_fill(0, torch.tensor([3]), torch.inf), y), "infinity"),
            (lambda e, y: (e, y[:-1]), "labels must be integers of shape"),
            (lambda e, y: (e, y.float()), "labels must be integers"),
            (lambda e, y: (e, y.index_fill(0, torch.tensor([0]), UNKNOWN)), "UNKNOWN"),
            (lambda e, y: (e[:0], y[:0]), "no embeddings"),
            (lambda e, y: (e.int(), y), "floating point"),
        ],
    )
    def test_bad_input_is_refused(self, name, data, spoil, message):
        embeddings, labels, weights, _ = data
        with pytest.raises(OsmlError, match=message):
            detectors.create(name).fit(*spoil(embeddings, labels), weights)

    def test_wrong_width_is_refused(self, name, data):
        with pytest.raises(OsmlError, match="9 wide, but the detector was fitted on 16"):
            fitted(name, {}, data).score(torch.zeros(3, 9))

    def test_class_weights_are_asked_for(self, name, data):
        embeddings, labels, weights, queries = data
        detector = detectors.create(name)
        if not detector.needs_class_weights:
            assert torch.equal(detector.fit(embeddings, labels).score(queries), fitted(name, {}, data).score(queries))
            return
        with pytest.raises(OsmlError, match="needs class weights"):
            detector.fit(embeddings, labels)
        with pytest.raises(OsmlError, match=r"class weights must be of shape \(5, 16\)"):
            detector.fit(embeddings, labels, weights[:4])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.index_fill(0, torch.tensor([3]), torch.nan), "1 of 5 classes hold NaN or infinity.*row 3"),
        (lambda w: w.double() * 1e300, "5 of 5 classes hold NaN or infinity"),
        (lambda w: w[:, None][:, :0], r"proxies, 16\); got \(5, 0, 16\)"),
        (lambda w: [[1.0, 2.0], [3.0]], "class weights must be numbers"),
        (lambda w: "proxies", "class weights must be numbers"),
    ],
)
def test_bad_class_weights_are_refused(data, spoil, message):
    embeddings, labels, weights, queries = data
    detector = freshly_fitted("energy", {}, data)
    with pytest.raises(OsmlError, match=message):
        detector.fit(embeddings, labels, spoil(weights))
    assert torch.equal(detector.score(queries), fitted("energy", {}, data).score(queries))  # it is as it was


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_the_largest_label_of_a_type_is_not_unknown(data, dtype):
    """PyTorch finds 255 in 8 bits without a sign equal to −1."""
    embeddings, labels, _, queries = data
    largest = {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 2**40)
    labels = torch.where(labels == 30, largest, labels)
    classes = detectors.create("knn").fit(embeddings, labels.to(dtype)).predict(queries)[0]
    assert torch.equal(classes, detectors.create("knn").fit(embeddings, labels).predict(queries)[0])
    assert largest in classes


def test_a_fit_that_fails_halfway_is_none(data, monkeypatch):
    detector = freshly_fitted("knn", {}, data)

    def broken(self):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(type(detector), "_fitted", broken)
        detector.fit(*data[:2])
    with pytest.raises(OsmlError, match="not fitted"):
        detector.score(data[3])
    assert torch.equal(detector.fit(*data[:2]).score(data[3]), fitted("knn", {}, data).score(data[3]))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_unknown_names_show_the_nearest():
    with pytest.raises(OsmlError, match=r"did you mean 'mahalanobis'.*choices: .*centroid, .*energy"):
        detectors.create("mahalanobi")
    with pytest.raises(OsmlError, match="unknown argument of detector 'knn' 'K': did you mean 'k'"):
        detectors.create("knn", K=3)
    with pytest.raises(OsmlError, match="'centroid' takes no arguments"):
        detectors.create("centroid", k=3)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("knn", {"k": 0}),
        ("knn", {"k": 2.5}),
        ("mahalanobis", {"shrinkage": 0}),
        ("energy", {"temperature": -1}),
        ("ssd", {"shrinkage": 1.5}),
        ("gmm", {"n_components": 0}),
        ("gmm", {"covariance": "round"}),
        ("gmm", {"each_class": "no"}),
        # Beyond what single precision, or double precision where it is squared, tells from 0 and infinity.
        ("energy", {"temperature": 1e-40}),
        ("entropy", {"temperature": 1e40}),
        ("ssd", {"shrinkage": 1e-12}),
    ],
)
def test_parameters_out_of_range_are_refused(name, params):
    with pytest.raises(OsmlError, match="got"):
        detectors.create(name, **params)


# Twins ------------------------------------------------------------------------------------------------------


def test_centroid_is_one_minus_the_best_cosine(data):
    embeddings, labels, _, queries = data
    expected = []
    for q in queries:
        cosines = []
        for c in labels.unique():
            mean = embeddings[labels == c].mean(dim=0)
            cosines.append(float(q @ mean / (q.norm() * mean.norm())))
        expected.append(1 - max(cosines))
    close(detectors.create("centroid").fit(embeddings, labels).score(queries), torch.tensor(expected))


@pytest.mark.parametrize("k", [1, 3, 39, 40, 100])
def test_knn_is_the_nearest_class_by_its_kth_reference(data, k):
    embeddings, labels, _, queries = data
    small = torch.cat([embeddings, embeddings[:2] * -1])  # a class of two
    small_labels = torch.cat([labels, torch.tensor([50, 50])])
    expected, classes = [], []
    for q in queries:
        kth = {}
        for c in small_labels.unique().tolist():
            distances = sorted(float((q - r).norm()) for r in small[small_labels == c])
            share = min(k, 40) * len(distances) / 40  # 40 references in the largest class
            kth[c] = distances[math.ceil(share) - 1]
        classes.append(min(kth, key=kth.get))
        expected.append(kth[classes[-1]])
    found_classes, found = detectors.create("knn", k=k).fit(small, small_labels).predict(queries)
    close(found, torch.tensor(expected))
    assert found_classes.tolist() == classes


def test_knn_with_one_class_is_scikit_learns(data):
    embeddings, _, _, queries = data
    distances, _ = NearestNeighbors(n_neighbors=7, algorithm="brute").fit(embeddings).kneighbors(queries)
    found = detectors.create("knn", k=7).fit(embeddings, torch.zeros(len(embeddings), dtype=torch.long)).score(queries)
    close(found, torch.from_numpy(distances[:, -1]).float())


@pytest.mark.parametrize("shrinkage", [0.01, 0.3])
def test_mahalanobis_is_scikit_learns_shrunk_covariance(data, shrinkage):
    embeddings, labels, _, queries = data
    means = {c: embeddings[labels == c].double().mean(0).numpy() for c in labels.unique().tolist()}
    centred = np.stack([e.double().numpy() - means[c] for e, c in zip(embeddings, labels.tolist(), strict=True)])
    precision = ShrunkCovariance(shrinkage=shrinkage, assume_centered=True).fit(centred).precision_
    distances = [[(q - m) @ precision @ (q - m) for m in means.values()] for q in queries.double().numpy()]
    expected = np.min(distances, axis=1)
    found = detectors.create("mahalanobis", shrinkage=shrinkage).fit(embeddings, labels).score(queries)
    close(found, torch.from_numpy(expected).float())

    everything = embeddings.double().numpy()
    background = ShrunkCovariance(shrinkage=shrinkage).fit(everything)
    expected = expected - background.mahalanobis(queries.double().numpy())
    found = detectors.create("relative_mahalanobis", shrinkage=shrinkage).fit(embeddings, labels).score(queries)
    close(found, torch.from_numpy(expected).float())


@pytest.mark.parametrize("shrinkage", [0.001, 0.1, 1.0])
@pytest.mark.parametrize(
    "kind", ["few classes", "more classes than dimensions", "classes of one", "one class", "no spread"]
)
def test_mahalanobis_is_its_formula(kind, shrinkage):
    rng = np.random.default_rng(0)
    sizes = {"few classes": [50, 30, 9], "more classes than dimensions": [3] * 20, "classes of one": [40, 1, 1]}
    labels = np.repeat(np.arange(20), sizes.get(kind, [40]) + [0] * (20 - len(sizes.get(kind, [40]))))
    if kind == "no spread":
        labels = np.arange(8)
    x = (3 * rng.normal(size=(20, 6))[labels] + rng.normal(size=(len(labels), 6)) * [2, 1, 1, 0.5, 0.1, 0]).astype("f4")
    queries = (4 * rng.normal(size=(30, 6))).astype("f4")

    def inverse(centred):
        covariance = centred.T @ centred / len(centred)
        average = np.trace(covariance) / 6 or 1.0
        return np.linalg.inv((1 - shrinkage) * covariance + shrinkage * average * np.eye(6))

    wide = x.astype("f8")
    means = np.stack([wide[labels == c].mean(axis=0) for c in np.unique(labels)])
    away = queries[:, None] - means
    distances = np.einsum("ncd,de,nce->nc", away, inverse(wide - means[labels]), away)
    away = queries - wide.mean(axis=0)
    background = np.einsum("nd,de,ne->n", away, inverse(wide - wide.mean(axis=0)), away)
    for name, expected in (
        ("mahalanobis", distances.min(axis=1)),
        ("relative_mahalanobis", distances.min(axis=1) - background),
    ):
        classes, scores = detectors.create(name, shrinkage=shrinkage).fit(x, labels).predict(queries)
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6 * np.abs(background).max())
        np.testing.assert_array_equal(classes, distances.argmin(axis=1))


def test_pytorch_oods_mahalanobis_shrinks_as_the_items_grow(data):
    """It takes the scatter for the covariance, without dividing by N: the same data twice look half as far."""
    embeddings, labels, _, queries = data
    contiguous = labels.unique(return_inverse=True)[1]
    for times in (1, 2):
        x, y, n = embeddings.repeat(times, 1), contiguous.repeat(times), times * len(labels)
        for ours, theirs, factor in (
            ("mahalanobis", peers.Mahalanobis(None), 2 * n),  # theirs is half the distance besides
            ("relative_mahalanobis", peers.RMD(None), n),
        ):
            expected = factor * theirs.fit_features(x, y).predict_features(queries)
            found = detectors.create(ours, shrinkage=1e-6).fit(x, y).score(queries)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def _shrunk_by_hand(groups: list[np.ndarray], shrinkage: float) -> list[np.ndarray]:
    """Friedman's covariance of each group of items, one after the other."""
    width, n = groups[0].shape[1], sum(map(len, groups))
    scatters = [sum(np.outer(x - g.mean(axis=0), x - g.mean(axis=0)) for x in g) for g in groups]
    total = sum(scatters)
    average = np.trace(total) / width or n
    total = (1 - shrinkage) * total + shrinkage * average * np.eye(width)
    return [
        ((1 - shrinkage) * s + shrinkage * total) / ((1 - shrinkage) * len(g) + shrinkage * n)
        for s, g in zip(scatters, groups, strict=True)
    ]


def _unbalanced(data, kind):
    embeddings, labels = data[:2]
    kept = {"large classes": 40, "few examples": 4, "one example each": 1}[kind]
    order = torch.cat([(labels == c).nonzero()[: 40 if c == 7 and kept > 1 else kept, 0] for c in labels.unique()])
    return embeddings[order] * 3, labels[order]


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["large classes", "few examples", "one example each"])
def test_ssd_is_its_formula(data, kind, shrinkage):
    embeddings, labels = _unbalanced(data, kind)
    unit = normalize(embeddings).double().numpy()
    groups = [unit[labels == c] for c in labels.unique()]
    inverses = [np.linalg.inv(s) for s in _shrunk_by_hand(groups, shrinkage)]
    expected = [
        [mahalanobis(q, g.mean(axis=0), inverse) ** 2 for g, inverse in zip(groups, inverses, strict=True)]
        for q in data[3].double().numpy()
    ]
    classes, scores = detectors.create("ssd", shrinkage=shrinkage).fit(embeddings, labels).predict(5 * data[3])
    np.testing.assert_allclose(scores, np.min(expected, axis=1), rtol=1e-4)
    np.testing.assert_array_equal(classes, labels.unique()[np.argmin(expected, axis=1)])


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("kind", ["large classes", "few examples", "one example each"])
def test_gmm_of_one_gaussian_a_class_is_its_formula(data, kind, covariance):
    embeddings, labels = _unbalanced(data, kind)
    wide = embeddings.double().numpy()
    groups = [wide[labels == c] for c in labels.unique()]
    densities = np.zeros((len(data[3]), len(groups)))
    for c, (g, sigma) in enumerate(zip(groups, _shrunk_by_hand(groups, 0.1), strict=True)):
        if covariance == "diag":
            sigma = np.diag(np.diag(sigma))
        gaussian = scipy.stats.multivariate_normal(g.mean(axis=0), sigma)
        densities[:, c] = np.log(len(g) / len(wide)) + gaussian.logpdf(data[3].double().numpy())
    detector = detectors.create("gmm", covariance=covariance).fit(embeddings, labels)
    classes, scores = detector.predict(data[3])
    np.testing.assert_allclose(scores, -scipy.special.logsumexp(densities, axis=1), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(classes, labels.unique()[densities.argmax(axis=1)])


def test_gmm_is_its_peers(data):
    embeddings, labels, _, queries = data
    found = detectors.create("gmm", shrinkage=1e-6).fit(embeddings, labels).score(queries)
    theirs = peers.GMM(None, reg=1e-10).fit_features(embeddings, labels).predict_features(queries)
    torch.testing.assert_close(found, theirs.float(), rtol=1e-4, atol=1e-3)

    diagonal = detectors.create("gmm", shrinkage=1e-6, covariance="diag").fit(embeddings, labels)
    bayes = GaussianNB(var_smoothing=0).fit(embeddings.double(), labels)
    expected = -scipy.special.logsumexp(bayes.predict_joint_log_proba(queries.double()), axis=1)
    torch.testing.assert_close(diagonal.score(queries), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(diagonal.predict(queries)[0], bayes.predict(queries.double()))


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_gmm_finds_what_scikit_learn_finds(data, covariance):
    """On clusters that lie apart EM ends at one answer: the classes, here without their labels, or within one class."""
    embeddings, labels, _, queries = data
    expected = GaussianMixture(5, covariance_type=covariance, reg_covar=1e-9, n_init=5, random_state=1)
    expected = -expected.fit(embeddings.double()).score_samples(queries.double())
    for kwargs, y in (({"each_class": False}, labels), ({}, torch.full_like(labels, 3))):
        detector = detectors.create("gmm", n_components=5, covariance=covariance, shrinkage=1e-6, **kwargs)
        detector.fit(embeddings, y)
        np.testing.assert_allclose(detector.score(queries), expected, rtol=1e-4, atol=1e-3)
        assert torch.equal(detector.predict(embeddings)[0], y)


def test_gmm_takes_no_more_gaussians_than_items():
    embeddings, labels, _ = sphere_classes(n_classes=3, per_class=4)
    embeddings, labels = torch.cat([embeddings[:5], embeddings[4:5]]), torch.tensor([0, 0, 0, 0, 1, 1])
    detector = detectors.create("gmm", n_components=9).fit(embeddings, labels)  # class 1 has one item, twice
    assert detector.class_shares.shape[1] == 5 and detector.score(embeddings).isfinite().all()


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_gmm_of_items_that_are_all_repetitions_goes_by_the_distance(covariance, size):
    """Each Gaussian has no spread but what rounding leaves, of its mean and of how far others belong to it: none."""
    points = size * torch.randn(3, 33, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(3).repeat(7)
    detector = detectors.create("gmm", n_components=5, covariance=covariance, each_class=False)
    near = points + 0.1 * size
    classes, scores = detector.fit(points[labels], labels).predict(torch.cat([points, near]))
    assert scores.isfinite().all() and scores[:3].max() < scores[3:].min()
    assert torch.equal(classes, torch.arange(3).repeat(2))


def test_logit_scores_are_their_formulas(data):
    embeddings, labels, weights, queries = data
    logits = (queries.double() @ weights.double().T).numpy()
    p = scipy.special.softmax(logits / 2, axis=1)
    expected = {
        ("max_logit", ()): -logits.max(axis=1),
        ("energy", (("temperature", 2.0),)): -2 * scipy.special.logsumexp(logits / 2, axis=1),
        ("msp", (("temperature", 2.0),)): 1 - p.max(axis=1),
        ("entropy", (("temperature", 2.0),)): scipy.stats.entropy(p, axis=1),
    }
    for (name, params), scores in expected.items():
        found = detectors.create(name, **dict(params)).fit(embeddings, labels, weights).score(queries)
        close(found, torch.from_numpy(scores).float())


def test_knn_takes_any_k_in_bounded_memory(data):
    """Comparing all pairs of 4 k neighbours would take gigabytes here."""
    embeddings = normalize(torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(3000) % 3
    found = detectors.create("knn", k=900).fit(embeddings, labels).score(embeddings[:600])
    by_hand = [torch.cdist(embeddings[:50], embeddings[labels == c]).kthvalue(900).values for c in range(3)]
    close(found[:50], torch.stack(by_hand).amin(dim=0))


def test_several_proxies_a_class_count_as_their_best(data):
    embeddings, labels, weights, queries = data
    worse = torch.stack([weights - 1, weights], dim=1)
    two = detectors.create("max_logit").fit(embeddings, labels, worse).score(queries)
    by_hand = torch.maximum(queries @ (weights - 1).T, queries @ weights.T).amax(dim=1)
    close(two, -by_hand)


def test_msp_stays_exact_where_softmax_saturates():
    weights = torch.eye(3) * 60
    scores = detectors.create("msp").fit(torch.eye(3), torch.arange(3), weights).score(torch.eye(3)[:1])
    assert 0 < float(scores) < 1e-20  # 1 − p in float32 would be 0, and rank nothing


def test_approximate_search_finds_almost_the_same():
    references = normalize(torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)))
    queries = normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(1)))
    exact, _ = NeighborIndex(references).search(queries, 10)
    approximate, _ = NeighborIndex(references, exact_up_to=100).search(queries, 10)
    assert (exact == approximate).float().mean() > 0.95
    assert (approximate >= exact - 1e-6).all()


@pytest.mark.parametrize("name", ["movr", "openmax", "react", "scale"])
def test_a_file_gives_the_very_same_scores_at_any_width(name, tmp_path):
    """In a file tensors follow each other closely, and where a row starts in memory decides how a product is rounded."""
    draw = torch.Generator().manual_seed(0)
    for width in (5, 7, 16, 17, 33, 63, 65):
        for n_classes, n_queries in ((1, 3), (1, 17), (5, 1)):
            labels = torch.arange(n_classes).repeat_interleave(4)
            weights = torch.randn(n_classes, width, generator=draw)
            embeddings = weights[labels] + 0.3 * torch.randn(len(labels), width, generator=draw)
            detector = detectors.create(name).fit(embeddings, labels, weights)
            detector.save(tmp_path / "detector")
            queries = torch.randn(n_queries, width, generator=draw)
            loaded = detectors.Detector.load(tmp_path / "detector")
            assert torch.equal(loaded.score(queries), detector.score(queries))


def test_a_file_that_cannot_be_written_is_said_in_one_line(data, tmp_path):
    with pytest.raises(OsmlError, match="cannot write the detector .*name a file in a folder that is there"):
        fitted("knn", {}, data).save(tmp_path / "missing" / "detector")


def test_a_file_that_is_no_detector_is_said_in_one_line(tmp_path):
    (tmp_path / "text").write_text("no safetensors")
    for file in (tmp_path / "missing", tmp_path / "text"):
        with pytest.raises(OsmlError, match="cannot read the detector"):
            detectors.Detector.load(file)
