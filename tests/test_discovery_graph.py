"""The pool, the graph of nearest neighbours and its communities: against slow twins, and where items are many."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix, kron
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors
from sknetwork.clustering import get_modularity

from osml_plugin import nearest as nearest_module
from osml_plugin.discovery.graph import (
    N_NEIGHBORS,
    ONE_WAY,
    communities,
    contracted,
    mergers,
    neighbor_graph,
    quotient,
)
from osml_plugin.discovery.methods import communities as communities_module
from osml_plugin.discovery.methods import create
from osml_plugin.discovery.pool import Pool
from osml_plugin.discovery.representation import whitened
from osml_plugin.nearest import nearest

NONE = np.empty((0, 8), dtype=np.float32)
NO_CLASSES = np.empty(0, dtype=np.int64)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def mixture(n: int, width: int = 8, n_classes: int = 40, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    classes = rng.integers(n_classes, size=n)
    return unit(rng.normal(size=(n_classes, width))[classes] + spread * rng.normal(size=(n, width))), classes


# The pool --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(0, 9), max_size=10))
def test_pool_against_unique_rows(items, known):
    rows = unit(np.random.default_rng(1).normal(size=(10, 8)))
    pool = Pool.of(rows[items], rows[known].reshape(-1, 8), np.zeros(len(known), dtype=np.int64))
    assert len(pool.nodes) == len(set(items) | set(known))
    space = whitened(rows.round(5), rows[known].reshape(-1, 8).round(5), pool.classes)
    np.testing.assert_allclose(pool.nodes[pool.of_item], space[items], atol=1e-6)
    np.testing.assert_allclose(pool.nodes[pool.of_known], space[known].reshape(-1, 8), atol=1e-6)


def test_pool_does_not_depend_on_the_order_and_copies_may_differ_a_little():
    rows, _ = mixture(500)
    order = np.random.default_rng(2).permutation(500)
    pool, shuffled = (
        Pool.of(some, rows[mine], np.zeros(len(mine), dtype=np.int64))
        for some, mine in ((rows, np.arange(9)), (rows[order], np.arange(9)[::-1]))
    )
    np.testing.assert_allclose(pool.nodes, shuffled.nodes, atol=1e-6)
    np.testing.assert_array_equal(pool.of_item[order], shuffled.of_item)
    np.testing.assert_array_equal(pool.of_item[:9], shuffled.of_known[::-1])
    rounded = rows.round(5)
    close = Pool.of(np.concatenate([rounded, rounded + np.float32(2e-6)]), NONE, NO_CLASSES)
    np.testing.assert_array_equal(close.of_item[:500], close.of_item[500:])


def test_many_identical_items_are_one_node():
    pool = Pool.of(np.full((100_000, 8), 8**-0.5, dtype=np.float32), NONE, NO_CLASSES)
    assert pool.nodes.shape == (1, 8)
    assert pool.graph.shape == (1, 1) and pool.graph.nnz == 0
    assert all(groups.tolist() == [0] for _, groups in create("communities").ladder(pool, 0))


# Neighbours ------------------------------------------------------------------------------------------------


def test_nearest_of_few_is_exact():
    nodes, _ = mixture(600)
    expected = NearestNeighbors(n_neighbors=7).fit(nodes.astype(np.float64)).kneighbors(nodes)[1]
    np.testing.assert_array_equal(nearest(nodes, 7), expected)


@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_nearest_of_many_holds_the_recall(spread):
    nodes, _ = mixture(12_000, spread=spread)
    found = nearest(nodes, 16)
    np.testing.assert_array_equal(found[:, 0], np.arange(12_000))
    assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all()  # each once
    expected = NearestNeighbors(n_neighbors=16, algorithm="brute").fit(nodes).kneighbors(nodes[:2000])[1]
    assert np.mean([np.isin(f, e).mean() for f, e in zip(found, expected, strict=False)]) > 0.95
    np.testing.assert_array_equal(nearest(nodes, 16), found)


def test_nearest_ones_of_small_cells_are_other_nodes():
    centres = np.random.default_rng(0).normal(
        size=(525, 16)
    )  # as many as cells, so that one cell holds most neighbours
    nodes = unit(np.repeat(centres, 20, axis=0) + 1e-3 * np.random.default_rng(1).normal(size=(10_500, 16)))
    found = nearest(nodes, 16)
    assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all()  # each once
    assert np.mean(found // 20 == np.arange(10_500)[:, None] // 20) > 0.97


def test_nearest_compares_no_more_than_it_may_where_there_is_no_structure(monkeypatch):
    monkeypatch.setattr(nearest_module, "COMPARED", 1000)
    nodes = unit(np.random.default_rng(0).normal(size=(4000, 64)))
    compared = []
    knn = nearest_module.faiss.knn

    def counting(queries, among, k):
        if k == 16:
            compared.append(len(queries) * len(among))
        return knn(queries, among, k)

    monkeypatch.setattr(nearest_module.faiss, "knn", counting)
    found = nearest(nodes, 16)
    assert found.min() >= 0
    trials = nearest_module.N_TRIALS * 4000
    assert sum(compared) - trials < 2 * 1000 * 4000  # cells are uneven


def test_near_ones_are_told_apart_far_from_the_origin():
    rng = np.random.default_rng(0)
    centres = unit(rng.normal(size=(60, 16)))
    nodes = (np.repeat(centres, 200, axis=0) + 2e-4 * rng.normal(size=(12_000, 16))).astype(np.float32)
    expected = NearestNeighbors(n_neighbors=16).fit(nodes[:200].astype(np.float64)).kneighbors(nodes[:200])[1]
    found = nearest(nodes, 16)[:200]
    assert np.mean([np.isin(f, e).mean() for f, e in zip(found, expected, strict=True)]) > 0.95


def test_nearest_of_nodes_in_one_spot_compares_no_more_than_elsewhere(monkeypatch):
    nodes = (8**-0.5 + 1e-4 * np.random.default_rng(0).normal(size=(20_000, 8))).astype(np.float32)
    compared = []
    knn = nearest_module.faiss.knn

    def counting(queries, among, k):
        compared.append(len(queries) * len(among))
        return knn(queries, among, k)

    monkeypatch.setattr(nearest_module.faiss, "knn", counting)
    nearest(nodes, 16)
    assert sum(compared) < 20_000 * nearest_module.COMPARED


# The graph -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 40])
def test_graph_against_a_slow_twin(n):
    nodes, _ = mixture(n)
    near = np.zeros((n, n), dtype=bool)
    for i, row in enumerate(nodes.astype(np.float64)):
        near[i, np.argsort(((nodes - row) ** 2).sum(axis=1))[: N_NEIGHBORS + 1]] = True
    expected = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j and (near[i, j] or near[j, i]):
                jaccard = np.sum(near[i] & near[j]) / np.sum(near[i] | near[j])
                expected[i, j] = (1 if near[i, j] and near[j, i] else ONE_WAY) * jaccard
    np.testing.assert_allclose(neighbor_graph(nodes).toarray(), expected)


def test_large_graph_is_symmetric_and_has_few_links():
    graph = neighbor_graph(mixture(12_000)[0])
    assert (graph != graph.T).nnz == 0
    assert graph.diagonal().sum() == 0
    assert graph.nnz <= 2 * N_NEIGHBORS * 12_000
    assert graph.data.min() > 0 and graph.data.max() <= 1


# Communities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_nodes", range(2, 60))
def test_mergers_come_after_what_they_are_of_where_all_are_linked_alike(n_nodes):
    found = mergers(csr_matrix(np.ones((n_nodes, n_nodes))))
    assert (found[:, :2].max(axis=1) < np.arange(n_nodes, 2 * n_nodes - 1)).all()
    assert sorted(found[:, :2].ravel()) == list(range(2 * n_nodes - 2))
    assert (np.diff(found[:, 2]) >= 0).all() and found[-1, 3] == n_nodes


def test_mergers_join_what_is_linked_most_and_last_what_nothing_links():
    links = np.zeros((5, 5))
    for a, b, weight in ((0, 1, 9), (0, 2, 1), (1, 2, 1), (3, 4, 9)):
        links[a, b] = links[b, a] = weight
    found = mergers(csr_matrix(links))
    assert [set(pair) for pair in found[:, :2].tolist()] == [{3, 4}, {0, 1}, {2, 6}, {5, 7}]
    assert np.isfinite(found[:3, 2]).all() and np.isinf(found[3, 2])


def test_quotient_keeps_modularity():
    graph = neighbor_graph(mixture(800)[0])
    fine = communities(graph, 20.0, seed=0)
    small = quotient(graph, fine)
    expected = np.zeros(small.shape)
    links = graph.tocoo()
    np.add.at(expected, (fine[links.row], fine[links.col]), links.data)
    np.testing.assert_allclose(small.toarray(), expected)
    coarse = communities(small, 1.0, seed=0)
    assert coarse.max() < fine.max()
    np.testing.assert_allclose(
        get_modularity(csr_matrix(small), coarse, resolution=1.0), get_modularity(graph, coarse[fine], resolution=1.0)
    )


def test_contracted_parts_no_class_and_joins_none():
    items, classes = mixture(4000, width=32, spread=0.05)
    graph = neighbor_graph(items)
    atoms = contracted(graph)
    np.testing.assert_array_equal(np.unique(atoms), np.arange(atoms.max() + 1))
    assert 40 < atoms.max() + 1 < 4000 / 2
    assert len(set(zip(atoms, classes, strict=True))) == atoms.max() + 1  # each of one class
    np.testing.assert_array_equal(contracted(graph), atoms)
    coarse = communities(quotient(graph, atoms), 1.0, seed=0)[atoms]
    assert adjusted_rand_score(coarse, communities(graph, 1.0, seed=0)) == 1


def test_many_small_classes_are_told_apart_on_finer_rungs_alone(monkeypatch):
    monkeypatch.setattr(communities_module, "GROUPED", 0)
    ring = np.roll(np.eye(1000), 1, axis=1)
    classes = np.repeat(np.arange(1000), 20)
    graph = kron(csr_matrix(np.eye(1000) + 0.07 * (ring + ring.T)), np.ones((20, 20)), format="csr")
    graph.setdiag(0)
    rungs = list(create("communities").ladder(SimpleNamespace(joined=(graph, np.arange(20_000))), seed=0))
    at_least = communities_module.COARSE
    assert max(groups.max() for _, groups in rungs[:at_least]) < 999
    assert max(adjusted_rand_score(classes, groups) for _, groups in rungs[at_least:]) == 1


@pytest.mark.parametrize("seed", [1, 2])
def test_seeds_group_otherwise_where_nodes_were_contracted(seed, monkeypatch):
    monkeypatch.setattr(communities_module, "GROUPED", 0)
    pool = Pool.of(mixture(2500)[0], NONE, NO_CLASSES)
    ladders = [dict(create("communities").ladder(pool, other)) for other in (0, seed)]
    assert any((one != other).any() for one, other in zip(*(ladder.values() for ladder in ladders), strict=True))


@pytest.mark.parametrize("grouped", [0, 10_000, 100_000])
def test_ladder_rises_is_repeatable_and_as_modular_as_from_scratch(grouped, monkeypatch):
    monkeypatch.setattr(communities_module, "GROUPED", grouped)  # contracted and in 2 chains, in 4, each rung by itself
    n = 2500
    items, classes = mixture(n)
    pool = Pool.of(items, NONE, NO_CLASSES)
    ladder = list(create("communities").ladder(pool, seed=3))
    granularities, groups = zip(*ladder, strict=True)
    assert (np.diff(granularities) > 0).all()
    for rung in groups:
        assert rung.shape == (len(pool.nodes),) and rung.dtype == np.int64
        np.testing.assert_array_equal(np.unique(rung), np.arange(rung.max() + 1))
    assert groups[0].max() < groups[-1].max()
    for rung in (4, 12, 20):
        resolution = granularities[rung]
        alone = communities(pool.graph, resolution, seed=3 + rung)
        got, best = (get_modularity(pool.graph, labels, resolution=resolution) for labels in (groups[rung], alone))
        assert got > best - 0.01
    again = [rung for _, rung in create("communities").ladder(pool, seed=3)]
    for one, other in zip(groups, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert max(adjusted_rand_score(classes, rung[pool.of_item]) for rung in groups) > 0.6
