"""One contract for all methods of grouping, and each against an independent twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist
from sklearn.cluster import HDBSCAN, AgglomerativeClustering
from sklearn.cluster import KMeans as ScikitKMeans
from sklearn.metrics import adjusted_rand_score

from osml_plugin.discovery import discover
from osml_plugin.discovery.methods import agglomerative, create, density, names, semi_supervised_kmeans
from osml_plugin.discovery.pool import Pool
from osml_plugin.errors import OsmlError

METHODS = names()
NONE_KNOWN = np.empty((0, 16), np.float32), np.empty(0, dtype=np.int64)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def blobs(n_classes: int, size: int, spread: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`size` items around each of `n_classes` orthogonal directions, about `spread` from it."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(16, 16)))[0][:n_classes]
    noise = rng.normal(size=(n_classes * size, 16)) * spread / 4
    return unit(np.repeat(centres, size, axis=0) + noise), np.repeat(np.arange(n_classes), size)


def pool_of(items: np.ndarray, true: np.ndarray, known: np.ndarray) -> Pool:
    """A pool in which the items of `known` (bool) are known with their classes."""
    return Pool.of(items[~known], items[known], np.unique(true[known], return_inverse=True)[1])


def check(ladder: list[tuple[float, np.ndarray]], n_nodes: int, n_rungs: int) -> None:
    """What holds for every ladder."""
    assert 1 <= len(ladder) <= n_rungs
    granularities, counts = [], []
    for granularity, groups in ladder:
        assert isinstance(granularity, float)
        assert groups.shape == (n_nodes,) and groups.dtype == np.int64
        used = np.unique(groups)
        np.testing.assert_array_equal(used[used >= 0], np.arange(groups.max() + 1))
        assert used[0] >= -1 and used[-1] >= 0
        granularities.append(granularity)
        counts.append(groups.max() + 1)
    assert (np.diff(granularities) > 0).all()
    # Where there are few groups, a seed may make one more or less.
    assert (np.diff(counts) >= -np.maximum(1, 0.2 * np.array(counts[:-1]))).all()
    assert counts[-1] == max(counts)


# The contract ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("n_classes", "size", "spread", "n_known"), [(6, 60, 0.3, 3), (6, 60, 2.0, 0), (10, 40, 1.0, 7)]
)
def test_ladder(name, n_classes, size, spread, n_known):
    items, true = blobs(n_classes, size, spread)
    pool = pool_of(items, true, true < n_known)
    before = [part.copy() for part in (pool.nodes, pool.of_item, pool.of_known, pool.classes)]
    graph = pool.graph.copy()
    method = create(name)
    ladder = list(method.ladder(pool, 3))
    check(ladder, len(items), method.n_rungs)
    for old, new in zip(before, (pool.nodes, pool.of_item, pool.of_known, pool.classes), strict=True):
        np.testing.assert_array_equal(new, old)
    assert (pool.graph != graph).nnz == 0
    again = list(create(name).ladder(pool, 3))
    assert len(again) == len(ladder)
    for (granularity, groups), (same_granularity, same_groups) in zip(ladder, again, strict=True):
        assert granularity == same_granularity
        np.testing.assert_array_equal(groups, same_groups)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("n_classes", "size", "n_known"), [(2, 40, 0), (5, 60, 2), (12, 30, 6), (12, 30, 0)])
def test_separate_classes_are_a_rung(name, n_classes, size, n_known):
    items, true = blobs(n_classes, size)
    pool = pool_of(items, true, true < n_known)
    of_all = np.concatenate([pool.of_known, pool.of_item])
    best = max(adjusted_rand_score(true, groups[of_all]) for _, groups in create(name).ladder(pool, 0))
    assert best == 1


@pytest.mark.parametrize("name", METHODS)
def test_order_of_the_items_does_not_matter(name):
    items, true = blobs(5, 30, spread=1.5)
    known = true < 2
    order = np.random.default_rng(0).permutation(150)
    pool, shuffled = pool_of(items, true, known), pool_of(items[order], true[order], known[order])
    ladders = create(name).ladder(pool, 0), create(name).ladder(shuffled, 0)
    for (_, groups), (_, same) in zip(*ladders, strict=True):
        of_all, of_shuffled = np.empty(150), np.empty(150)
        of_all[known], of_all[~known] = groups[pool.of_known], groups[pool.of_item]
        of_shuffled[known[order]], of_shuffled[~known[order]] = same[shuffled.of_known], same[shuffled.of_item]
        np.testing.assert_array_equal(of_all[order], of_shuffled)


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=10)
@given(n=st.integers(1, 40), n_known=st.integers(0, 40), n_classes=st.integers(1, 5), seed=st.integers(0, 99))
def test_small_pools(name, n, n_known, n_classes, seed):
    rng = np.random.default_rng(seed)
    items = unit(rng.normal(size=(n, 16)))
    known, classes = items[:0], np.empty(0, dtype=np.int64)
    if n_known:
        # Some known items are copies of unknown ones.
        known = np.concatenate([items[: n_known // 2], unit(rng.normal(size=(n_known - n_known // 2, 16)))])[:n_known]
        classes = np.unique(rng.integers(0, n_classes, len(known)), return_inverse=True)[1]
    pool = Pool.of(items, known, classes)
    method = create(name)
    check(list(method.ladder(pool, seed)), len(pool.nodes), method.n_rungs)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 17])
def test_fewer_nodes_than_neighbours(name, n):
    items, _ = blobs(1, n)
    pool = Pool.of(items, *NONE_KNOWN)
    method = create(name)
    ladder = list(method.ladder(pool, 0))
    check(ladder, n, method.n_rungs)
    for number in sorted({1, (n + 1) // 2, n}):
        groups = method.of_number(pool, number, 0)
        assert groups.shape == (n,) and groups.dtype == np.int64


@pytest.mark.parametrize("name", METHODS)
def test_all_known_are_of_one_class_or_one_item(name):
    items, true = blobs(4, 40)
    method = create(name)
    for known in (true == 0, np.arange(160) == 7, np.arange(160) != 7):
        for classes in (np.zeros_like(true), true):
            check(list(method.ladder(pool_of(items, classes, known), 0)), 160, method.n_rungs)


@pytest.mark.parametrize("name", METHODS)
def test_of_number(name):
    items, true = blobs(6, 50)
    pool = Pool.of(items, *NONE_KNOWN)
    assert adjusted_rand_score(true, create(name).of_number(pool, 6, 0)[pool.of_item]) == 1


@pytest.mark.parametrize("name", ["agglomerative", "kmeans"])
def test_of_number_is_exact(name):
    items, _ = blobs(4, 50, spread=2.0)
    pool = Pool.of(items, *NONE_KNOWN)
    for number in (1, 2, 7, 50):
        np.testing.assert_array_equal(np.unique(create(name).of_number(pool, number, 0)), np.arange(number))


# Through `discover` ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("references", [False, True])
def test_discover(name, references):
    items, true = blobs(8, 50)
    known = true < 4
    options = {"known_embeddings": items[known], "known_labels": true[known]} if references else {}
    found = discover(items[~known], method=name, **options)
    assert found.labels.shape == found.confidence.shape == (200,)
    assert found.granularity_source == ("known classes" if references else "default")
    assert found.confidence.min() >= 0 and found.confidence.max() <= 1
    np.testing.assert_array_equal(np.setdiff1d(found.labels, -1), np.arange(found.n_classes))
    if name in ("communities", "density"):  # the others have no range of granularities with one grouping
        assert found.n_classes == 4
        assert adjusted_rand_score(true[~known], found.labels) == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("references", [False, True])
def test_discover_told_the_number(name, references):
    items, true = blobs(8, 30, spread=1.5)
    known = true < 4
    options = {"known_embeddings": items[known], "known_labels": true[known]} if references else {}
    for n_classes in (1, 3, 4, 9, 120):
        found = discover(items[~known], method=name, n_classes=n_classes, **options)
        np.testing.assert_array_equal(np.setdiff1d(found.labels, -1), np.arange(n_classes))
        assert references or (found.labels >= 0).all()


# Each against its twin -------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_cluster_size", [4, 7, 15, 40])
@pytest.mark.parametrize("seed", range(3))
def test_density_finds_the_leaves_of_hdbscan(min_cluster_size, seed):
    items, _ = blobs(5, 40, spread=1.2, seed=seed)
    # Mutual reachability has ties, which scikit-learn breaks as it comes; plain distances have none.
    tree = minimum_spanning_tree(cdist(items, items)).tocoo()
    found = density.leaves(*density.hierarchy(tree), min_cluster_size)
    # With one sample, mutual reachability along the tree is the tree's own length.
    peer = HDBSCAN(
        min_cluster_size=min_cluster_size,
        min_samples=1,
        metric="precomputed",
        cluster_selection_method="leaf",
        copy=True,
    ).fit((tree + tree.T).tocsr())
    assert adjusted_rand_score(peer.labels_, found) == 1
    np.testing.assert_array_equal(peer.labels_ == -1, found == -1)


def test_spanning_tree_is_that_of_all_pairs():
    """Of 16 nodes each is linked to every other one, so nothing is left out of the graph."""
    items = unit(np.random.default_rng(0).normal(size=(16, 16)))
    pool = Pool.of(items, *NONE_KNOWN)
    distance = cdist(pool.nodes.astype(np.float64), pool.nodes.astype(np.float64))
    core = np.sort(distance, axis=1)[:, density.MIN_SAMPLES]  # the first is the node itself
    reach = np.maximum(distance, np.maximum(core[:, None], core))
    np.fill_diagonal(reach, 0)
    tree = density.spanning_tree(pool)
    assert tree.nnz == 15
    np.testing.assert_allclose(np.sort(tree.data), np.sort(minimum_spanning_tree(reach).data), rtol=1e-5)


def test_parts_without_a_link_are_joined_last():
    items, true = blobs(3, 40, spread=0.1)
    pool = Pool.of(items, *NONE_KNOWN)
    tree = density.spanning_tree(pool)
    assert tree.nnz == 119
    assert np.count_nonzero(tree.data == density.FARTHEST) == 2
    order, splits = density.hierarchy(tree)
    np.testing.assert_array_equal(np.sort(order), np.arange(120))
    groups = density.leaves(order, splits, 30)
    assert adjusted_rand_score(true, groups[pool.of_item]) == 1


def test_nodes_between_leaves_join_where_their_links_weigh_most():
    links = {(0, 1): 1.0, (1, 2): 0.6, (2, 3): 0.3, (3, 4): 0.9, (4, 5): 1.0, (6, 7): 1.0}
    rows, columns = np.array(list(links)).T
    graph = csr_matrix((list(links.values()), (rows, columns)), shape=(8, 8))
    groups = density.joined((graph + graph.T).tocsr(), np.array([0, 0, -1, -1, -1, 1, -1, -1]))
    np.testing.assert_array_equal(groups, [0, 0, 0, 1, 1, 1, -1, -1])


def test_kmeans_is_as_good_as_another():
    items, _ = blobs(6, 80, spread=1.5)
    pool = Pool.of(items, *NONE_KNOWN)

    def similarity(groups: np.ndarray) -> float:
        centres = unit(np.array([pool.nodes[groups == group].mean(axis=0) for group in range(6)]))
        return float(np.mean((pool.nodes * centres[groups]).sum(axis=1)))

    peer = ScikitKMeans(6, n_init=10, random_state=0).fit_predict(pool.nodes)
    assert similarity(create("kmeans").of_number(pool, 6, 0)) > similarity(peer) - 0.005


def test_ward_is_that_of_scikit_learn():
    items, _ = blobs(4, 40, spread=1.5)
    pool = Pool.of(items, *NONE_KNOWN)
    for number in (2, 5, 20):
        peer = AgglomerativeClustering(number, linkage="ward").fit_predict(pool.nodes)
        assert adjusted_rand_score(peer, create("agglomerative").of_number(pool, number, 0)) == 1


def test_agglomerative_without_known_items_finds_few_groups():
    """Not the finest cuts: of one tree these are the most stable ones."""
    for n_classes, spread in ((4, 1.0), (10, 1.0)):
        items, true = blobs(n_classes, 60, spread=spread)
        found = discover(items, method="agglomerative")
        assert n_classes <= found.n_classes <= 1.5 * n_classes
        assert adjusted_rand_score(true, found.labels) > 0.8


def test_too_many_items_for_agglomerative(monkeypatch):
    monkeypatch.setattr(agglomerative, "MOST_NODES", 30)
    items, _ = blobs(2, 20)
    with pytest.raises(OsmlError, match="up to 30 different items, but there are 40: take 'communities'"):
        discover(items, method="agglomerative")


def test_known_items_stay_with_their_class():
    items, true = blobs(5, 40, spread=2.5)
    fixed = np.where((true < 3) & (np.arange(200) % 2 == 0), true, -1)
    groups = semi_supervised_kmeans.semi_supervised_kmeans(items, fixed, 5, seed=0)
    np.testing.assert_array_equal(groups[fixed >= 0], fixed[fixed >= 0])
    np.testing.assert_array_equal(np.unique(groups), np.arange(5))
    # All others are with the nearest centre of their groups (once settled, up to the last moves).
    centres = unit(np.array([items[groups == group].mean(axis=0) for group in range(5)]))
    free = fixed < 0
    assert np.mean((items[free] @ centres.T).argmax(axis=1) == groups[free]) > 0.97


def test_semi_supervised_kmeans_without_known_items_is_kmeans():
    items, true = blobs(5, 40, spread=0.5)
    groups = semi_supervised_kmeans.semi_supervised_kmeans(items, np.full(200, -1), 5, seed=0)
    assert adjusted_rand_score(true, groups) == 1


def test_every_other_known_class_comes_first():
    items, true = blobs(6, 40)
    pool = pool_of(items, true, true < 4)
    for granularity, groups in create("semi_supervised_kmeans").ladder(pool, 0):
        assert granularity >= 2
        for group, told in enumerate((0, 2)):
            assert (groups[pool.of_known[pool.classes == told]] == group).all()


def test_told_classes_fall_apart_where_groups_are_too_many():
    items, true = blobs(6, 40, spread=2.5)
    pool = pool_of(items, true, true < 4)
    whole = [
        all(len(np.unique(groups[pool.of_known[pool.classes == told]])) == 1 for told in (0, 2))
        for _, groups in create("semi_supervised_kmeans").ladder(pool, 0)
    ]
    assert not whole[-1]


def test_further_centres_are_different_nodes():
    items = unit(np.random.default_rng(0).normal(size=(12, 16)))
    rng = np.random.default_rng(0)
    centres = semi_supervised_kmeans.with_further(items[:2], items[2:], 12, rng)
    assert len(np.unique(centres, axis=0)) == 12
    assert len(semi_supervised_kmeans.with_further(items[:2], items[2:], 50, rng)) == 12
