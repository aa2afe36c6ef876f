"""Detectors that learn and forget single items: always what a fit on the items that are left gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import sphere_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.functional import normalize

from osml_plugin import UNKNOWN, OsmlError, detectors, neighbors
from osml_plugin.detectors import Detector

INCREMENTAL = [n for n in detectors.names() if detectors.registry.get(n).incremental]
OTHERS = [n for n in detectors.names() if n not in INCREMENTAL]
EVERY = [(name, {}) for name in INCREMENTAL] + [
    (name, {p: values[-1]}) for name in INCREMENTAL for p, values in detectors.registry.get(name).search_space.items()
]
IDS = [f"{n}{p or ''}" for n, p in EVERY]

EMBEDDINGS, _INDEX, DIRECTIONS = sphere_classes(n_classes=6, per_class=15, width=12, spread=0.3)
NAMES = torch.tensor([40, 3, 17, 8, 25, 1])
LABELS = NAMES[_INDEX]
QUERIES = normalize(torch.randn(50, 12, generator=torch.Generator().manual_seed(1)))
QUERIES = torch.cat([QUERIES, EMBEDDINGS[::7]])


def weights_of(labels):
    """The class weights of these labels' classes, in their order."""
    return 16 * torch.stack([DIRECTIONS[(c == NAMES).nonzero()[0, 0]] for c in labels.unique()])


def fit(name, params, rows):
    return detectors.create(name, **params).fit(EMBEDDINGS[rows], LABELS[rows], weights_of(LABELS[rows]))


def is_the_same(detector: Detector, expected: Detector) -> None:
    assert torch.equal(detector.class_labels, expected.class_labels)
    (classes, scores), (expected_classes, expected_scores) = detector.predict(QUERIES), expected.predict(QUERIES)
    torch.testing.assert_close(scores, expected_scores, rtol=2e-6, atol=2e-6)
    assert torch.equal(classes, expected_classes)


def of(*classes):
    return torch.isin(LABELS, torch.tensor(classes))


SOME = torch.arange(len(LABELS)) % 3 != 0
SPLITS = {  # what is known first
    "more of each class": SOME,
    "a new class, sorted first": ~of(1),
    "a new class, sorted last": ~of(40),
    "new classes and more of the others": SOME & ~of(8, 17),
    "one class at first": of(17),
    "one example at first": torch.arange(len(LABELS)) == 33,
    "one example later": torch.arange(len(LABELS)) != 33,
}


@pytest.mark.parametrize(("name", "params"), EVERY, ids=IDS)
class TestContract:
    @pytest.mark.parametrize("first", SPLITS.values(), ids=SPLITS)
    def test_learning_in_two_steps_is_learning_at_once(self, name, params, first):
        detector = fit(name, params, first)
        assert detector.partial_fit(EMBEDDINGS[~first], LABELS[~first], weights_of(LABELS)) is detector
        is_the_same(detector, fit(name, params, slice(None)))

    @pytest.mark.parametrize("rest", SPLITS.values(), ids=SPLITS)
    def test_without_is_never_having_learnt(self, name, params, rest):
        detector = fit(name, params, slice(None))
        before = detector.predict(QUERIES)
        left = detector.without(EMBEDDINGS[~rest], LABELS[~rest])
        is_the_same(left, fit(name, params, rest))
        assert all(map(torch.equal, detector.predict(QUERIES), before))
        is_the_same(
            left.partial_fit(EMBEDDINGS[~rest], LABELS[~rest], weights_of(LABELS)), fit(name, params, slice(None))
        )
        assert all(map(torch.equal, detector.predict(QUERIES), before))

    def test_the_first_time_it_is_fit(self, name, params):
        detector = detectors.create(name, **params).partial_fit(EMBEDDINGS, LABELS, weights_of(LABELS))
        assert all(map(torch.equal, detector.predict(QUERIES), fit(name, params, slice(None)).predict(QUERIES)))

    def test_order_and_types_do_not_matter(self, name, params):
        rest = (~SOME).nonzero()[:, 0]
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(2))]
        detector = fit(name, params, SOME)
        detector.partial_fit(EMBEDDINGS[rest].double().numpy(), LABELS[rest].int().numpy(), weights_of(LABELS).numpy())
        is_the_same(detector, fit(name, params, slice(None)))

    def test_one_by_one_without_a_drift(self, name, params):
        detector = fit(name, params, of(17))
        for i in (~of(17)).nonzero()[:, 0]:
            known = torch.cat([detector.class_labels, LABELS[i : i + 1]])
            detector.partial_fit(EMBEDDINGS[i : i + 1], LABELS[i : i + 1], weights_of(known))
        is_the_same(detector, fit(name, params, slice(None)))

    def test_it_goes_on_after_save_and_load(self, name, params, tmp_path):
        fit(name, params, SOME).without(EMBEDDINGS[of(8) & SOME], LABELS[of(8) & SOME]).save(tmp_path / "detector")
        detector = Detector.load(tmp_path / "detector")
        rest = ~SOME & ~of(8)
        detector.partial_fit(EMBEDDINGS[rest], LABELS[rest], weights_of(LABELS[~of(8)]))
        is_the_same(detector, fit(name, params, ~of(8)))

    def test_nothing_is_left_of_a_spread_that_has_gone(self, name, params):
        """One example a class is left, in which there is none."""
        one_each = torch.zeros(len(LABELS), dtype=torch.bool)
        one_each[::15] = True
        left = fit(name, params, slice(None)).without(EMBEDDINGS[~one_each], LABELS[~one_each])
        is_the_same(left, fit(name, params, one_each))

    @settings(deadline=None, max_examples=10)
    @given(st.lists(st.integers(0, 2**16), min_size=2, max_size=6))
    def test_any_history_is_what_is_left_of_it(self, name, params, seeds):
        present = SOME.clone()
        detector = fit(name, params, present)
        for seed in seeds:
            draw = np.random.default_rng(seed)
            chosen = torch.from_numpy(draw.random(len(LABELS)) < draw.random())
            leaving, coming = chosen & present, chosen & ~present
            if leaving.any() and not torch.equal(leaving, present):
                detector = detector.without(EMBEDDINGS[leaving], LABELS[leaving])
                present = present & ~leaving
            if coming.any():
                present = present | coming
                detector.partial_fit(EMBEDDINGS[coming], LABELS[coming], weights_of(LABELS[present]))
        is_the_same(detector, fit(name, params, present))


@pytest.mark.parametrize("name", INCREMENTAL)
class TestRefusals:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda e, y: (e.index_fill(0, torch.tensor([3]), torch.nan), y), "hold NaN"),
            (lambda e, y: (e[:, :5], y), "5 wide, but the detector was fitted on 12"),
            (lambda e, y: (e, y.index_fill(0, torch.tensor([0]), UNKNOWN)), "UNKNOWN"),
            (lambda e, y: (e, y[:-1]), "labels must be integers of shape"),
            (lambda e, y: (e[:0], y[:0]), "no embeddings"),
        ],
    )
    @pytest.mark.parametrize("call", ["partial_fit", "without"])
    def test_bad_items_change_nothing(self, name, call, spoil, message):
        detector = fit(name, {}, SOME)
        buffers, before = dict(detector.named_buffers()), detector.predict(QUERIES)
        with pytest.raises(OsmlError, match=message):
            getattr(detector, call)(*spoil(EMBEDDINGS[SOME], LABELS[SOME]))
        assert dict(detector.named_buffers()).keys() == buffers.keys()
        assert all(now is buffers[key] for key, now in detector.named_buffers())
        assert all(map(torch.equal, detector.predict(QUERIES), before))

    def test_a_failure_halfway_changes_nothing(self, name, monkeypatch):
        detector = fit(name, {}, ~of(1))
        before = detector.predict(QUERIES)

        def broken(self):
            raise MemoryError

        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(type(detector), "_fitted", broken)
            detector.partial_fit(EMBEDDINGS[of(1)], LABELS[of(1)], weights_of(LABELS))
        assert all(map(torch.equal, detector.predict(QUERIES), before))

    def test_only_items_that_it_has_can_go(self, name):
        detector = fit(name, {}, ~of(1))
        with pytest.raises(OsmlError, match="15 items of class 1 are to be left out, but the detector was fitted on 0"):
            detector.without(EMBEDDINGS[of(1)], LABELS[of(1)])
        twice = EMBEDDINGS[of(3)].repeat(2, 1)
        with pytest.raises(OsmlError, match="30 items of class 3 .* fitted on 15"):
            detector.without(twice, torch.full((30,), 3))
        with pytest.raises(OsmlError, match="all items are to be left out"):
            detector.without(EMBEDDINGS[~of(1)], LABELS[~of(1)])
        with pytest.raises(OsmlError, match="not fitted"):
            detectors.create(name).without(EMBEDDINGS, LABELS)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("call", ["partial_fit", "without"])
def test_the_others_say_which_can(name, call):
    detector = fit(name, {}, slice(None))
    with pytest.raises(
        OsmlError, match=f"'{name}' cannot learn or forget single items.*: .*centroid.*knn.*mahalanobis"
    ):
        getattr(detector, call)(EMBEDDINGS[:3], LABELS[:3])


# What earlier versions saved --------------------------------------------------------------------------------


def _earlier_buffers(name: str) -> dict[str, torch.Tensor]:
    """By the formulas of the version that had no `partial_fit`."""
    classes, index = LABELS.unique(return_inverse=True)
    if name == "knn":
        return {"references": EMBEDDINGS, "reference_labels": index}
    if name == "centroid":
        means = [normalize(EMBEDDINGS[c == LABELS]).mean(dim=0) for c in classes]
        return {"centroids": normalize(torch.stack(means))}
    wide = EMBEDDINGS.double()
    means = torch.stack([wide[c == LABELS].mean(dim=0) for c in classes])
    centred = wide - means[index]
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(wide))
    scales = (0.99 * variances + 0.01 * variances.mean()).rsqrt()
    return {"axes": axes.contiguous(), "scales": scales, "means": means @ axes * scales}


@pytest.mark.parametrize("name", ["centroid", "knn", "mahalanobis"])
def test_files_of_earlier_versions_score(name, tmp_path):
    detector = fit(name, {}, slice(None))
    buffers = {"class_labels": LABELS.unique(), "width": torch.tensor(12), **_earlier_buffers(name)}
    save_file(buffers, tmp_path / "detector", {"detector": name, "params": str(detector.params).replace("'", '"')})
    loaded = Detector.load(tmp_path / "detector")
    is_the_same(loaded, detector)
    if name == "knn":  # the references are all that there is to know
        rest = loaded.without(EMBEDDINGS[~SOME], LABELS[~SOME])
        is_the_same(rest, fit(name, {}, SOME))
        is_the_same(rest.partial_fit(EMBEDDINGS[~SOME], LABELS[~SOME]), detector)
    else:
        with pytest.raises(OsmlError, match="saved by a version that kept nothing to learn on from"):
            loaded.partial_fit(EMBEDDINGS[:3], LABELS[:3])
    is_the_same(loaded.fit(EMBEDDINGS, LABELS), detector)


# What is particular to one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mahalanobis", "relative_mahalanobis"])
def test_large_means_cost_no_precision(name):
    """Σ x xᵀ − n μ μᵀ would lose 8 of 16 digits here."""
    far = EMBEDDINGS + 1000
    expected = detectors.create(name).fit(far, LABELS).score(QUERIES + 1000)
    grown = detectors.create(name).fit(far[SOME], LABELS[SOME]).partial_fit(far[~SOME], LABELS[~SOME])
    torch.testing.assert_close(grown.score(QUERIES + 1000), expected, rtol=1e-6, atol=1e-6)


def test_of_references_that_are_alike_as_many_go_as_are_given():
    twice, labels = EMBEDDINGS.repeat(2, 1), LABELS.repeat(2)
    detector = detectors.create("knn", k=1).fit(twice, labels)
    once = detector.without(EMBEDDINGS, LABELS)
    assert (once.reference_labels >= 0).sum() == len(LABELS)
    is_the_same(once, fit("knn", {"k": 1}, slice(None)))
    swapped = torch.where(LABELS == 3, 8, LABELS)  # the embeddings are there, but of another class
    with pytest.raises(OsmlError, match="not among the references"):
        fit("knn", {}, slice(None)).without(EMBEDDINGS[:1], torch.tensor([1]))
    with pytest.raises(OsmlError, match="not among the references"):
        detector.without(EMBEDDINGS[of(3)][:2], swapped[of(3)][:2])


def test_cells_are_shared_with_the_detector_that_has_more(monkeypatch):
    """What takes seconds at a million references is not done again for a few new ones."""
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 2000)
    embeddings, labels, _ = sphere_classes(n_classes=8, per_class=400)
    detector = detectors.create("knn").fit(embeddings[:-400], labels[:-400])
    detector.score(embeddings[:2])
    cells = detector._index._parts[0]
    detector.partial_fit(embeddings[-400:], labels[-400:])
    assert detector._index._parts[0] is cells is not None
    assert (detector.predict(embeddings[-400:])[0] == 7).float().mean() > 0.99
    fewer = detector.without(embeddings[:50], labels[:50])
    assert fewer._index._parts[0] is cells
