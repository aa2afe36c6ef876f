"""Discovery: synthetic classes on the sphere, the digits, the edges, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, jaccard_score

from osml_plugin import OsmlError
from osml_plugin.discovery import Constraints, Discovery, confirmed, discover
from osml_plugin.discovery.at_home import AT_HOME, FEWEST, among_known, new_groups
from osml_plugin.discovery.granularity import bcubed, behind_the_best, merge, persistence, split, stability
from osml_plugin.discovery.graph import N_NEIGHBORS, ONE_WAY, communities, neighbor_graph, own_share
from osml_plugin.discovery.methods import create
from osml_plugin.discovery.pool import Pool
from osml_plugin.metrics import discovery_metrics


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def blobs(n_classes: int, size: int, spread: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`size` items around each of `n_classes` orthogonal directions, about `spread` from it."""
    rng = np.random.default_rng(seed)
    width = max(n_classes, 16)
    centres = np.linalg.qr(rng.normal(size=(width, width)))[0][:n_classes]
    noise = rng.normal(size=(n_classes * size, width)) * spread / np.sqrt(width)
    return unit(np.repeat(centres, size, axis=0) + noise), np.repeat(np.arange(n_classes), size)


def families(n_families: int, n_members: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes in families: items, the family of each, and the member class of each."""
    rng = np.random.default_rng(seed)
    width = 32
    family = np.linalg.qr(rng.normal(size=(width, width)))[0][:n_families]
    member = np.repeat(family, n_members, axis=0) + 0.35 * unit(rng.normal(size=(n_families * n_members, width)))
    items = np.repeat(member, size, axis=0) + 0.45 * rng.normal(size=(len(member) * size, width)) / np.sqrt(width)
    member_of = np.repeat(np.arange(len(member)), size)
    return unit(items), member_of // n_members, member_of


def check(found: Discovery, n: int) -> None:
    """What holds for every result."""
    assert found.labels.shape == found.confidence.shape == (n,)
    assert found.labels.dtype == np.int64
    assert found.confidence.min() >= 0 and found.confidence.max() <= 1
    sizes = np.bincount(found.labels[found.labels >= 0], minlength=found.n_classes)
    assert len(sizes) == found.n_classes == len(found.exemplars)
    assert (sizes >= 1).all() and (np.diff(sizes) <= 0).all()
    assert found.labels.min() >= -1
    assert found.group_confidence.shape == (found.n_classes,)
    assert (found.group_confidence >= 0).all() and (found.group_confidence <= 1).all()
    assert found.known_class.shape == (n,)
    assert all(name is None for name in found.known_class[found.labels >= 0])
    assert (found.note == "") == (found.n_classes > 0)
    low, high = found.n_classes_interval
    assert 0 <= low <= found.n_classes <= high <= n
    for group, exemplars in enumerate(found.exemplars):
        assert 1 <= len(exemplars) <= 9 and len(set(exemplars)) == len(exemplars)
        assert (found.labels[exemplars] == group).all()


# Synthetic classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_classes", "size"), [(1, 200), (2, 40), (5, 60), (12, 40), (4, 200), (150, 20)])
def test_separate_classes_are_found_without_references(n_classes, size):
    items, true = blobs(n_classes, size)
    found = discover(items)
    check(found, len(items))
    assert found.granularity_source == "default"
    assert found.n_classes == n_classes
    assert discovery_metrics(true, found.labels).accuracy > 0.99


@pytest.mark.parametrize(("n_known", "n_unknown", "size"), [(3, 1, 80), (4, 6, 50), (2, 4, 150), (75, 75, 20)])
def test_separate_classes_are_found_with_references(n_known, n_unknown, size):
    items, true = blobs(n_known + n_unknown, size)
    known = true < n_known
    found = discover(items[~known], known_embeddings=items[known], known_labels=true[known])
    check(found, n_unknown * size)
    assert found.granularity_source == "known classes"
    assert found.n_classes == n_unknown
    assert discovery_metrics(true[~known], found.labels).accuracy > 0.99


def test_granularity_follows_the_references():
    items, family, member = families(8, 4, 40)
    known = family < 4
    coarse = discover(items[~known], known_embeddings=items[known], known_labels=family[known])
    fine = discover(items[~known], known_embeddings=items[known], known_labels=member[known])
    assert (coarse.n_classes, fine.n_classes) == (4, 16)
    assert discovery_metrics(family[~known], coarse.labels).accuracy > 0.99
    assert discovery_metrics(member[~known], fine.labels).accuracy > 0.95
    assert coarse.granularity < fine.granularity


def test_a_handful_of_items_is_a_class():
    items, true = blobs(6, 100)
    items, true = items[:505], true[:505]
    assert discovery_metrics(true, discover(items).labels).accuracy == 1
    known = true < 2
    found = discover(items[~known], known_embeddings=items[known], known_labels=true[known])
    assert found.n_classes == 4
    assert np.bincount(found.labels)[3] == 5


def test_wrongly_rejected_known_items_are_left_out():
    items, true = blobs(6, 100)
    rejected = np.zeros(600, dtype=bool)
    rejected[[0, 1, 100, 101, 102]] = True  # of classes 0 and 1, which are known
    unknown = rejected | (true >= 3)
    found = discover(items[unknown], known_embeddings=items[~unknown], known_labels=true[~unknown])
    assert found.n_classes == 3
    np.testing.assert_array_equal(found.labels == -1, rejected[unknown])
    assert found.known_class[rejected[unknown]].tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("method", ["communities", "semi_supervised_kmeans"])
def test_wrongly_rejected_known_items_are_left_out_when_the_number_is_told(method):
    items, true = blobs(6, 100)
    rejected = np.zeros(600, dtype=bool)
    rejected[[0, 1, 100, 101, 102]] = True
    unknown = rejected | (true >= 3)
    how = {"known_embeddings": items[~unknown], "known_labels": true[~unknown], "method": method}
    found = discover(items[unknown], n_classes=3, **how)
    check(found, unknown.sum())
    np.testing.assert_array_equal(found.labels == -1, rejected[unknown])
    assert found.known_class[rejected[unknown]].tolist() == [0, 0, 1, 1, 1]
    assert adjusted_rand_score(true[unknown & ~rejected], found.labels[found.labels >= 0]) == 1
    # Nobody is left out where there would be too few for so many classes.
    assert (discover(items[rejected], n_classes=3, **how).labels >= 0).all()


def test_a_single_known_item_that_strays_leaves_no_group_out():
    groups = np.repeat([0, 1, 2, 1, 2, 3], [300, 5, 4, 1, 3, 3])  # of unknown items, then of the known ones
    n = len(groups)
    nobody_said = Constraints.of(None, None, n - 7)
    pool = Pool(np.eye(n, dtype=np.float32), np.arange(n - 7), np.arange(n - 7, n), np.zeros(7, np.int64), nobody_said)
    new = new_groups(groups, pool, np.ones(7, dtype=bool))
    np.testing.assert_array_equal(new, np.repeat([0, 1, -1], [300, 5, 4]))


def test_a_pool_that_is_all_known_proposes_nothing_and_says_so():
    items, true = blobs(5, 120, spread=0.8)
    names = np.array(["ant", "bee", "cat", "dog", "eel"])[true]
    few = np.arange(600) % 10 == 0  # a tenth of each class, wrongly rejected
    half = np.arange(600) % 2 == 0
    for pool in (few, half, ~few):
        found = discover(items[pool], items[~pool], names[~pool])
        check(found, pool.sum())
        assert found.n_classes == 0 and found.exemplars == ()
        assert "lie among known classes" in found.note
        assert (found.labels == -1).all()
        assert found.too_few.mean() <= 0.05  # as many known items lie apart
        assert (found.known_class == names[pool])[~found.too_few].mean() > 0.95


def test_a_class_that_is_not_in_the_gallery_is_found_where_it_is_frequent():
    items, true = blobs(6, 100)
    known = (true < 4) & (np.arange(600) % 2 == 0)
    in_gallery = true[known] < 3
    unknown = (true == 3) & ~known | (true >= 4)
    found = discover(items[unknown], items[known], true[known], in_gallery=in_gallery)
    assert found.n_classes == 3
    unknown = np.flatnonzero((true == 3) & ~known)[:1]
    unknown = np.append(unknown, np.flatnonzero(true >= 4))
    found = discover(items[unknown], items[known], true[known], in_gallery=in_gallery)
    assert found.n_classes == 2
    assert found.labels[0] == -1 and found.known_class[0] == 3


def test_group_confidence_is_lower_for_a_group_that_falls_apart():
    items, _, _ = families(4, 4, 40)
    single, _ = blobs(1, 160, spread=0.3, seed=5)
    tight = np.zeros((160, 33))
    tight[:, 32] = 1
    tight[:, :16] += 0.2 * single
    found = discover(unit(np.concatenate([np.c_[items, np.zeros(len(items))], tight])), granularity=0.2)
    of_tight = found.labels[-1]
    assert (found.labels[-160:] == of_tight).all()
    others = np.delete(found.group_confidence, of_tight)
    assert found.group_confidence[of_tight] > 0.99
    assert others.min() < 0.9


def test_granularity_by_hand_is_the_nearest_rung():
    items, family, _ = families(8, 4, 40)
    resolutions = [rung for rung, _ in create("communities").ladder(Pool.of(items.astype(np.float32), *nobody(32)), 0)]
    for wanted in (-1.0, resolutions[0], 0.3, 2.0, 1e9):
        found = discover(items, granularity=wanted)
        check(found, len(items))
        assert found.granularity == min(resolutions, key=lambda r: abs(r - wanted))
        assert found.granularity_source == "given granularity"
        assert found.n_classes_interval == (found.n_classes, found.n_classes)
    known = family < 4
    options = {"known_embeddings": items[known], "known_labels": family[known]}
    chosen = discover(items[~known], **options)
    again = discover(items[~known], **options, granularity=chosen.granularity)
    np.testing.assert_array_equal(again.labels, chosen.labels)
    finer = discover(items[~known], **options, granularity=20 * chosen.granularity)
    assert finer.n_classes > chosen.n_classes


def nobody(width: int) -> tuple[np.ndarray, np.ndarray]:
    """No known items, and none of their classes."""
    return np.empty((0, width), dtype=np.float32), np.empty(0, dtype=np.int64)


def test_labels_of_known_classes_may_be_names():
    items, true = blobs(6, 50)
    known = true < 3
    names = np.array(["ant", "bee", "cat"], dtype=object)[true[known]]
    by_name = discover(items[~known], known_embeddings=items[known], known_labels=names)
    by_number = discover(items[~known], known_embeddings=items[known], known_labels=torch.tensor(true[known]))
    np.testing.assert_array_equal(by_name.labels, by_number.labels)


def test_confidence_is_lower_between_classes():
    items, _ = blobs(2, 200, spread=0.4)
    between = unit(items[:1] + items[200:201] + 0.01)
    found = discover(np.concatenate([items, between]), n_classes=2)
    assert found.confidence[-1] < np.quantile(found.confidence[:-1], 0.05)


def test_exemplars_are_nearest_to_the_mean_and_no_copies():
    items, _ = blobs(2, 50)
    items = np.concatenate([items, np.repeat(items[:1], 30, axis=0)])
    found = discover(items, n_classes=2)
    for group, exemplars in enumerate(found.exemplars):
        inside = np.unique(items[found.labels == group].round(5), axis=0)
        typical = items @ inside.mean(axis=0)
        assert (np.diff(typical[exemplars]) <= 1e-6).all()
        assert len(np.unique(items[exemplars].round(5), axis=0)) == 9


# The digits: real, and without a network -------------------------------------------------------------------


def digits() -> tuple[np.ndarray, np.ndarray]:
    pixels, true = load_digits(return_X_y=True)
    return pixels - pixels.mean(axis=0), true


@pytest.mark.parametrize("unknown_digits", [(5, 6, 7, 8, 9), (0, 1, 2, 3, 4), (0, 2, 4, 6, 8)])
def test_digits(unknown_digits):
    pixels, true = digits()
    unknown = np.isin(true, unknown_digits)
    found = discover(pixels[unknown], known_embeddings=pixels[~unknown], known_labels=true[~unknown])
    check(found, unknown.sum())
    assert 4 <= found.n_classes <= 8
    assert discovery_metrics(true[unknown], found.labels).accuracy > 0.8


def test_number_of_classes_is_honoured_on_digits():
    pixels, true = digits()
    for n_classes in (1, 2, 7, 10, 25):
        found = discover(pixels, n_classes=n_classes)
        check(found, len(pixels))
        assert found.n_classes == n_classes and found.n_classes_interval == (n_classes, n_classes)
        assert found.granularity_source == "given n_classes"
    assert discovery_metrics(true, discover(pixels, n_classes=10).labels).accuracy > 0.8


# Invariants ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), references=st.booleans(), n_classes=st.none() | st.integers(1, 30))
def test_order_does_not_matter_and_the_seed_decides(seed, references, n_classes):
    rng = np.random.default_rng(seed)
    items, true = blobs(6, 20, spread=1.0, seed=seed)
    known = true < 2
    options = {"known_embeddings": items[known], "known_labels": true[known]} if references else {}
    items = items[~known]
    order = rng.permutation(len(items))
    first = discover(items, n_classes=n_classes, seed=seed, **options)
    check(first, len(items))
    again = discover(torch.from_numpy(items), n_classes=n_classes, seed=seed, **options)
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(first.confidence, again.confidence)
    shuffled = discover(items[order], n_classes=n_classes, seed=seed, **options)
    assert adjusted_rand_score(first.labels[order], shuffled.labels) == 1
    assert shuffled.n_classes == first.n_classes
    np.testing.assert_allclose(shuffled.confidence, first.confidence[order])


def test_length_of_the_embeddings_does_not_matter_and_they_are_left_as_they_are():
    items, _ = blobs(4, 50)
    longer = items * np.random.default_rng(0).uniform(0.5, 20, (200, 1))
    before = longer.copy()
    np.testing.assert_array_equal(discover(longer).labels, discover(items).labels)
    np.testing.assert_array_equal(longer, before)


# Edges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_few_items(n, references):
    items, true = blobs(4, 50)
    options = {"known_embeddings": items[:100], "known_labels": true[:100]} if references else {}
    check(discover(items[150 : 150 + n], **options), n)
    for n_classes in range(1, n + 1):
        found = discover(items[150 : 150 + n], n_classes=n_classes, **options)
        check(found, n)
        assert found.n_classes == n_classes


def test_few_alike_items_are_one_class():
    items, _ = blobs(1, 12)
    for n in (1, 2, 3, 10):
        assert discover(items[:n]).n_classes == 1


def test_identical_items_are_one_class_unless_more_are_asked_for():
    items = np.ones((50, 8))
    assert discover(items).n_classes == 1
    np.testing.assert_array_equal(discover(items).confidence, 1)
    found = discover(items, n_classes=7)
    check(found, 50)
    assert found.n_classes == 7


@pytest.mark.parametrize("n_classes", [2, 39])
def test_identical_items_in_several_classes_have_a_tree(n_classes):
    found = discover(np.ones((40, 16)), n_classes=n_classes)
    np.testing.assert_array_equal(found.tree.labels, found.labels)
    assert found.tree.cut(1).max() == 0


def test_many_identical_items_are_quick():
    found = discover(np.ones((100_000, 16)))
    assert found.n_classes == 1 and found.exemplars[0].tolist() == [0]


def test_noise_is_not_cut_up():
    noise = unit(np.random.default_rng(0).normal(size=(600, 32)))
    found = discover(noise)
    check(found, 600)
    assert found.n_classes == 1
    clear = discover(blobs(5, 120)[0])
    assert found.confidence.mean() <= clear.confidence.mean()
    items, true = blobs(5, 60)
    check(discover(noise, np.c_[items, np.zeros((300, 16))], true), 600)


def test_copies_of_an_item_are_no_class_of_their_own():
    items, _ = blobs(3, 60)
    copies = np.concatenate([items, np.repeat(items[:1], 40, axis=0)])
    found = discover(copies)
    assert found.n_classes == 3
    assert (found.labels[180:] == found.labels[1]).all()


@pytest.mark.parametrize("references", [False, True])
def test_many_copies_of_one_item_do_not_change_the_number_of_classes(references):
    items, true = blobs(12, 60, spread=0.5)
    known = (items[::10], true[::10]) if references else ()
    how = {"in_gallery": np.zeros(72, dtype=bool)} if references else {}
    found = discover(np.concatenate([items[1:], np.repeat(items[1:2], 5000, axis=0)]), *known, **how)
    assert adjusted_rand_score(true[1:], found.labels[: len(items) - 1]) > 0.9


def test_one_known_class_and_one_known_item():
    items, true = blobs(4, 50)
    for known in (slice(0, 50), slice(0, 1)):
        check(discover(items[50:], known_embeddings=items[known], known_labels=true[known]), 150)


# What is refused -------------------------------------------------------------------------------------------

GOOD = np.eye(4)


@pytest.mark.parametrize(
    ("embeddings", "options", "message"),
    [
        (np.empty((0, 4)), {}, "at least one item"),
        (np.empty((4, 0)), {}, r"shape \(items, width\); got \(4, 0\)"),
        (np.ones(4), {}, r"shape \(items, width\)"),
        (np.ones((2, 3, 4)), {}, r"shape \(items, width\)"),
        ([[1.0, 2.0], [3.0]], {}, r"shape \(items, width\)"),
        ([["a", "b"]], {}, "numbers"),
        (np.where(GOOD == 1, np.nan, 1), {}, "NaN"),
        (np.where(GOOD == 1, np.inf, 1), {}, "infinity"),
        (np.zeros((3, 4)), {}, "zeros"),
        (GOOD, {"n_classes": 0}, "from 1 to the 4 items"),
        (GOOD, {"n_classes": 5}, "from 1 to the 4 items"),
        (GOOD, {"granularity": np.nan}, "granularity must be a finite number"),
        (GOOD, {"granularity": "fine"}, "granularity must be a finite number"),
        (GOOD, {"granularity": 1.0, "n_classes": 2}, "give one of them"),
        (GOOD, {"method": "comunities"}, "did you mean 'communities'"),
        (GOOD, {"in_gallery": [True]}, "in_gallery is about known_embeddings"),
        (GOOD, {"known_embeddings": GOOD, "known_labels": [0, 1, 2, 3], "in_gallery": [True]}, "4 bools"),
        (GOOD, {"known_embeddings": GOOD, "known_labels": [0, 1, 2, 3], "in_gallery": [0, 1, 1, 0]}, "4 bools"),
        (GOOD, {"known_embeddings": GOOD}, "both or neither"),
        (GOOD, {"known_labels": [0, 1]}, "both or neither"),
        (GOOD, {"known_embeddings": np.ones((2, 3)), "known_labels": [0, 1]}, "one model"),
        (GOOD, {"known_embeddings": np.full((2, 4), np.nan), "known_labels": [0, 1]}, "known_embeddings hold NaN"),
        (GOOD, {"known_embeddings": GOOD, "known_labels": [0, 1]}, "as many known_labels"),
        (GOOD, {"known_embeddings": GOOD, "known_labels": GOOD}, "known_labels must have one value per item"),
    ],
)
def test_bad_input(embeddings, options, message):
    with pytest.raises(OsmlError, match=message) as error:
        discover(embeddings, **options)
    assert "\n" not in str(error.value)


# The parts, against slow twins -----------------------------------------------------------------------------


def test_graph_against_a_slow_twin():
    nodes, _ = blobs(3, 15, spread=0.8)
    nodes = nodes.astype(np.float32)
    n = len(nodes)
    near = np.zeros((n, n), dtype=bool)
    for i, similarity in enumerate(nodes @ nodes.T):
        near[i, np.argsort(-similarity)[: N_NEIGHBORS + 1]] = True
    expected = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j and (near[i, j] or near[j, i]):
                both = 1 if near[i, j] and near[j, i] else ONE_WAY
                expected[i, j] = both * jaccard_score(near[i], near[j])
    graph = neighbor_graph(nodes)
    np.testing.assert_allclose(graph.toarray(), expected)
    groups = np.arange(n) // 7
    share = [expected[i][groups == groups[i]].sum() / expected[i].sum() for i in range(n)]
    np.testing.assert_allclose(own_share(graph, groups), share)


def test_communities_are_the_same_for_the_same_seed():
    nodes, _ = blobs(6, 60, spread=1.5)
    graph = neighbor_graph(nodes.astype(np.float32))
    first = communities(graph, 1.0, seed=3)
    for _ in range(3):
        np.testing.assert_array_equal(communities(graph, 1.0, seed=3), first)
    assert any((communities(graph, 1.0, seed=s) != first).any() for s in range(4, 10))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_bcubed_against_a_slow_twin(pairs):
    classes, groups = np.array(pairs).T
    expected = []
    for c, g in pairs:
        both = np.sum((classes == c) & (groups == g))
        precision, recall = both / np.sum(groups == g), both / np.sum(classes == c)
        expected.append(2 * precision * recall / (precision + recall))
    np.testing.assert_allclose(bcubed(classes, groups), expected)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 6))
def test_behind_the_best_against_a_slow_twin(seed, n_rungs, n_classes):
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, n_classes, 40)
    hundredths = rng.integers(0, 101, (n_rungs, 40))  # their sums are exact
    scores = hundredths / 100
    mean, error = behind_the_best(scores, classes)
    of_best = max(range(n_rungs), key=lambda rung: hundredths[rung].sum())
    best = scores[of_best]
    present = sorted(set(classes))
    for row, whole, m, e in zip(scores, hundredths, mean, error, strict=True):
        np.testing.assert_allclose(m, (hundredths[of_best].sum() - whole.sum()) / 4000)
        sums = [sum(best[i] - row[i] - m for i in range(40) if classes[i] == c) for c in present]
        correction = len(present) / (len(present) - 1) if len(present) > 1 else 2
        np.testing.assert_allclose(e, np.sqrt(correction * sum(x * x for x in sums)) / 40, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(*[st.integers(-1, 3)] * 3), min_size=1, max_size=40))
def test_persistence_against_a_slow_twin(rows):
    groups, *others = np.array(rows).T
    groups = np.unique(np.append(groups, -1), return_inverse=True)[1][:-1] - 1  # without gaps
    expected = []
    for g in range(groups.max() + 1):
        best = [
            max(
                (jaccard_score(groups == g, other == h) for h in set(other) - {-1}),
                default=0,
            )
            for other in others
        ]
        expected.append(np.mean(best))
    np.testing.assert_allclose(persistence(groups, others), expected)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(-1, 4), st.sampled_from(["unknown", "gallery", "aside"])), min_size=1, max_size=60)
)
def test_new_groups_against_a_slow_twin(rows):
    rows = [*rows, (0, "unknown")]
    groups = np.array([g for g, _ in rows])
    used = sorted(set(groups) - {-1})
    groups = np.array([used.index(g) if g >= 0 else -1 for g in groups])
    kind = np.array([k for _, k in rows])
    unknown, known = np.flatnonzero(kind == "unknown"), np.flatnonzero(kind != "unknown")
    pool = Pool(
        np.eye(len(rows), dtype=np.float32),
        unknown,
        known,
        np.zeros(len(known), dtype=np.int64),
        Constraints.of(None, None, 0),
    )
    new, few = [], []
    for g in range(len(used)):
        u, k, c = (np.sum(groups[at] == g) for at in (unknown, known, np.flatnonzero(kind == "gallery")))
        n_u, n_k = np.sum(groups[unknown] >= 0), np.sum(groups[known] >= 0)
        rare = k > 1 and k / n_k > AT_HOME * u / n_u if n_u else True
        if u > 0 and c < AT_HOME * u and not rare:
            (new if u + k >= FEWEST or not len(known) else few).append(g)
    expected = [new.index(g) if g in new else -2 if g in few else -1 for g in groups[unknown]]
    np.testing.assert_array_equal(new_groups(groups, pool, kind[known] == "gallery"), expected)


def test_among_known_against_a_slow_twin():
    items, true = blobs(6, 30, spread=0.6)
    known = np.arange(len(items)) % 3 > 0
    in_gallery = true[known] != 2
    pool = Pool.of(items[~known].astype(np.float32), items[known].astype(np.float32), true[known])
    unknown, gallery = set(pool.of_item), set(pool.of_known[in_gallery])
    shares = []
    for a in unknown:
        to_unknown = sum(pool.graph[a, b] for b in unknown)
        to_gallery = sum(pool.graph[a, b] for b in gallery)
        shares.append(to_gallery / (to_gallery + to_unknown) if to_gallery else 0)
    expected = np.median(shares) / (len(gallery) / (len(unknown) + len(gallery) - 1))
    assert 0 < among_known(pool, in_gallery) == pytest.approx(expected)
    assert among_known(pool, np.zeros_like(in_gallery)) == 0


def test_among_known_is_near_one_for_known_items_and_near_none_for_new_ones():
    items, labels = load_digits(return_X_y=True)
    items = items / np.linalg.norm(items, axis=1, keepdims=True)
    first = np.arange(len(items)) % 2 == 0
    for n_known, low, high in ((10, 0.9, 1.1), (5, 0, 0.2)):
        known = ~first & (labels < n_known)
        queries = first & ((labels >= n_known) if n_known < 10 else (labels >= 0))
        pool = Pool.of(items[queries].astype(np.float32), items[known].astype(np.float32), labels[known])
        assert low <= among_known(pool, np.ones(known.sum(), dtype=bool)) <= high


# What a person said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["communities", "kmeans"])
def test_links_are_kept(method):
    items, true = blobs(5, 30, spread=0.5)
    rng = np.random.default_rng(0)
    pairs = rng.integers(len(items), size=(60, 2))
    must, cannot = (pairs[(true[pairs[:, 0]] == true[pairs[:, 1]]) == same] for same in (True, False))
    found = discover(items, method=method, must_link=must, cannot_link=cannot)
    check(found, len(items))
    assert (found.labels[must[:, 0]] == found.labels[must[:, 1]]).all()
    assert (found.labels[cannot[:, 0]] != found.labels[cannot[:, 1]]).all()


def test_two_classes_that_lie_together_are_told_apart_by_names():
    items, family, member = families(4, 2, 60)
    asked, coarse = np.flatnonzero(family == 0), {"granularity": 0.02}
    alone = discover(items[asked], **coarse)
    names = [None] * len(asked)
    for i in (0, 1, 2, 60, 61, 62):
        names[i] = str(member[asked[i]])
    must, cannot = confirmed(names)
    named = discover(items[asked], **coarse, must_link=must, cannot_link=cannot)
    assert (alone.n_classes, named.n_classes) == (1, 2)
    assert discovery_metrics(member[asked], named.labels).accuracy > 0.95


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), n_classes=st.integers(4, 40), references=st.booleans())
def test_links_and_a_number_of_classes_are_both_kept(seed, n_classes, references):
    items, true = blobs(5, 20, spread=0.8, seed=seed)
    rng = np.random.default_rng(seed)
    pairs = np.stack([rng.integers(0, 60, 25), rng.integers(0, 60, 25)], axis=1)
    must, cannot = (pairs[(true[pairs[:, 0]] == true[pairs[:, 1]]) == same] for same in (True, False))
    options = {"known_embeddings": items[60:], "known_labels": true[60:]} if references else {}
    found = discover(items[:60], n_classes=n_classes, must_link=must, cannot_link=cannot, seed=seed, **options)
    check(found, 60)
    assert found.n_classes == n_classes
    assert (found.labels[must[:, 0]] == found.labels[must[:, 1]]).all()
    assert (found.labels[cannot[:, 0]] != found.labels[cannot[:, 1]]).all()


def test_numbers_of_classes_that_links_do_not_leave_are_refused():
    items, true = blobs(3, 20)
    with pytest.raises(OsmlError, match="n_classes is 60, but must_link leaves 59"):
        discover(items, n_classes=60, must_link=[[0, 1]])
    three = [[0, 20], [20, 40], [0, 40]]
    with pytest.raises(OsmlError, match="n_classes is 2, but with cannot_link no fewer than 3 were found"):
        discover(items, n_classes=2, cannot_link=three)
    assert adjusted_rand_score(discover(items, n_classes=3, cannot_link=three).labels, true) == 1


def test_a_number_of_classes_and_links_across_the_classes():
    """Two classes are one, a third is two, and there are as many as ever."""
    items, _ = blobs(4, 30)
    found = discover(items, n_classes=4, must_link=[[0, 30]], cannot_link=[[60, 61]])
    check(found, 120)
    assert (found.labels[:60] == found.labels[0]).all()
    assert (found.labels[60:90] != found.labels[0]).all() and found.labels[60] != found.labels[61]
    assert (found.labels[90:] == found.labels[90]).all()


def test_the_tree_is_of_the_classes():
    items, family, _ = families(4, 3, 40)
    found = discover(items)
    check(found, len(items))
    np.testing.assert_array_equal(found.tree.cut(found.n_classes), found.labels)
    assert discovery_metrics(family, found.tree.cut(4)).accuracy > 0.99


def test_stability():
    a, b, c = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 2]), np.arange(6)
    ab, bc = adjusted_rand_score(a, b), adjusted_rand_score(b, c)
    np.testing.assert_allclose(stability([a, b, c]), [ab, (ab + bc) / 2, bc])
    np.testing.assert_array_equal(stability([a]), [1])


def test_merge_joins_what_is_linked_most():
    items, family, member = families(3, 2, 40)
    graph = neighbor_graph(items.astype(np.float32))
    assert adjusted_rand_score(merge(graph, member, 3), family) == 1
    for n_groups in range(1, 7):
        assert len(np.unique(merge(graph, member, n_groups))) == n_groups


def test_split_halves_the_largest():
    items, true = blobs(2, 20)
    groups = split(items, np.zeros(40, dtype=np.int64), 2)
    assert adjusted_rand_score(groups, true) == 1
    assert len(np.unique(split(items, groups, 40))) == 40
