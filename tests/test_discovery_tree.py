"""The tree of groups: slow twins of how it grows, what holds for every tree, and a person's merges and splits."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cosine
from sklearn.metrics import adjusted_rand_score
from sknetwork.clustering import get_modularity

from osml_plugin import OsmlError
from osml_plugin.discovery.constraints import links_between
from osml_plugin.discovery.graph import communities, neighbor_graph
from osml_plugin.discovery.tree import FEW, PARTS, Tree


def random_graph(rng: np.random.Generator, n: int, density: float) -> np.ndarray:
    """Symmetric weights in (0, 1), no two of them alike."""
    weights = np.triu(rng.uniform(0.01, 1, (n, n)) * (rng.random((n, n)) < density), 1)
    return weights + weights.T


def families(n_families: int, n_members: int, size: int) -> tuple[csr_matrix, np.ndarray, np.ndarray, np.ndarray]:
    """Classes in families: the graph, its nodes, the family of each item, and its class."""
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(32)[:n_families], n_members, axis=0)
    centres += 0.08 * rng.normal(size=centres.shape)
    member = np.repeat(np.arange(len(centres)), size)
    items = centres[member] + 0.06 * rng.normal(size=(len(member), 32))
    items = (items / np.linalg.norm(items, axis=1, keepdims=True)).astype(np.float32)
    return neighbor_graph(items), items, member // n_members, member


def some_tree(seed: int, n: int = 60, density: float = 0.15, copies: bool = False) -> tuple[Tree, np.ndarray]:
    """A tree over a graph with some structure, and the labels it stands on; some items are left out."""
    rng = np.random.default_rng(seed)
    n_groups = int(rng.integers(1, 6))
    labels = rng.permutation(np.append(np.arange(n_groups), rng.integers(-1, n_groups, n - n_groups)))
    of_item = rng.integers(0, n // 2, n) if copies else np.arange(n)
    blocks = rng.integers(0, 8, n) if seed % 2 else np.zeros(n)
    weights = random_graph(rng, n, density) * (blocks[:, None] == blocks)
    return Tree.of(csr_matrix(weights), rng.normal(size=(n, 4)), of_item, labels), labels


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """The same groups under any numbers, and the same items left out."""
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist())) and ((a < 0) == (b < 0)).all()


def refines(fine: np.ndarray, coarse: np.ndarray) -> bool:
    return len(set(zip(fine.tolist(), coarse.tolist(), strict=True))) == len(set(fine.tolist()))


def check(tree: Tree) -> None:
    """What holds for every tree, after any merges and splits."""
    n_nodes = len(tree.children)
    leaf = tree.children[:, 0] < 0
    assert (tree.children[leaf] == -1).all() and n_nodes == 2 * leaf.sum() - 1 and tree.n_leaves == leaf.sum()
    assert sorted(tree.children[~leaf].ravel().tolist() + np.flatnonzero(tree.parent < 0).tolist()) == list(
        range(n_nodes)
    )
    for group, (a, b) in enumerate(tree.children):
        if not leaf[group]:
            assert tree.parent[a] == tree.parent[b] == group
            assert tree.sizes[group] == tree.sizes[a] + tree.sizes[b]
            assert tree.heights[group] >= max(tree.heights[a], tree.heights[b])
        else:
            assert tree.sizes[group] == (tree.leaf_of == group).sum() > 0
    assert (tree.heights[leaf] == 0).all() and tree.heights.max() <= 1
    assert set(tree.labels[tree.labels >= 0]) == set(tree.groups)
    np.testing.assert_array_equal(tree.labels < 0, tree.leaf_of < 0)

    cuts = [tree.cut(n) for n in range(1, tree.n_leaves + 1)]
    for n, cut in enumerate(cuts, start=1):
        sizes = np.bincount(cut[cut >= 0])
        assert len(sizes) == n and sizes.min() > 0 and (np.diff(sizes) <= 0).all()
    assert all(refines(fine, coarse) for coarse, fine in zip(cuts, cuts[1:], strict=False))
    assert alike(cuts[len(tree.groups) - 1], tree.labels)
    nested(tree)


def nested(tree: Tree) -> None:
    """The dictionary says the same, and goes through JSON."""
    state = json.loads(json.dumps(tree.to_dict()))
    seen, queue = [], [(state, -1)]
    while queue:
        entry, above = queue.pop()
        group = entry["id"]
        seen.append(group)
        assert tree.parent[group] == above and entry["size"] == tree.sizes[group]
        assert entry["height"] == tree.heights[group] and entry["stands"] == (group in tree.groups)
        assert {child["id"] for child in entry["children"]} == set(tree.children[group]) - {-1}
        queue += [(child, group) for child in entry["children"]]
    assert sorted(seen) == list(range(len(tree.children)))


# How it grows ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.2, 0.6]), st.booleans())
def test_every_tree(seed, density, copies):
    tree, labels = some_tree(seed, density=density, copies=copies)
    check(tree)
    np.testing.assert_array_equal(tree.labels, labels)
    n_groups = labels.max() + 1
    for group in range(n_groups):
        parts = np.unique(tree.leaf_of[labels == group], return_counts=True)[1]
        assert len(parts) <= PARTS and (len(parts) == 1 or parts.min() >= FEW)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))
def test_merges_against_a_slow_twin(seed, n_groups, n_apart):
    """Of all pairs, that which is linked most over chance is merged; where none is linked, that of the smallest mean
    distance, counting what the links had merged as one."""
    rng = np.random.default_rng(seed)
    n = 4 * n_groups
    labels = np.append(np.arange(n_groups), rng.integers(0, n_groups, n - n_groups))
    side = rng.integers(0, n_apart, n_groups)[labels]
    weights, nodes = random_graph(rng, n, density=1) * (side[:, None] == side), rng.normal(size=(n, 3))
    tree = Tree.of(csr_matrix(weights), nodes, np.arange(n), labels)
    groups, total, apart = labels.copy(), weights.sum(), None
    for number in range(n_groups, 2 * n_groups - 1):
        pairs = list(combinations(np.unique(groups), 2))
        assert alike(tree.cut(2 * n_groups - number), groups)
        linked = {(a, b): weights[np.ix_(groups == a, groups == b)].sum() for a, b in pairs}
        weight = {a: weights[groups == a].sum() for a in np.unique(groups)}
        if any(linked.values()):
            distance = {(a, b): weight[a] * weight[b] / (total * w) for (a, b), w in linked.items() if w > 0}
            a, b = min(distance, key=distance.get)
            height = distance[a, b] / (1 + distance[a, b])
        else:
            if apart is None:
                apart = groups.copy()
                mean = {a: nodes[apart == a].sum(axis=0) for a in np.unique(apart)}
            far = {}
            for a, b in pairs:
                both = [(i, j) for i in set(apart[groups == a]) for j in set(apart[groups == b])]
                far[a, b] = np.mean([cosine(mean[i], mean[j]) for i, j in both])
            (a, b), height = min(far, key=far.get), 1.0
        assert np.isclose(tree.heights[number], height)
        groups[groups == b] = a


def test_parts_are_the_communities_of_each_group_alone():
    """One search over all groups at once finds in each what a search of its own finds."""
    graph, nodes, family, member = families(3, 4, 30)
    tree = Tree.of(graph, nodes, np.arange(len(family)), family)
    for group in range(3):
        own = np.flatnonzero(family == group)
        alone = communities(csr_matrix(graph[own][:, own]), 1.0, 0)
        here = tree.leaf_of[own]
        assert alike(alone, here) and alike(here, member[own])
        links = links_between(graph[own][:, own], np.arange(len(own)), np.arange(len(own)))
        assert get_modularity(links, np.unique(here, return_inverse=True)[1]) >= get_modularity(links, alone) - 1e-9


def test_up_to_the_families_and_down_to_their_members():
    graph, nodes, family, member = families(4, 3, 40)
    up = Tree.of(graph, nodes, np.arange(len(member)), member)
    assert adjusted_rand_score(family, up.cut(4)) == 1
    down = Tree.of(graph, nodes, np.arange(len(member)), family)
    assert adjusted_rand_score(member, down.cut(12)) > 0.98
    # A class in itself has no parts that chance would not link; two families have.
    assert up.heights[:12].max() < 0.5 < up.heights[-1 + 2 * 12 - 1]


def test_small_communities_are_no_parts():
    # Two cliques, and a pair tied to the second: it is less than a few.
    weights = np.zeros((22, 22))
    weights[:10, :10] = weights[10:20, 10:20] = weights[20:, 20:] = 1
    weights[0, 10] = weights[10, 0] = 0.1
    weights[19, 20] = weights[20, 19] = 0.1
    np.fill_diagonal(weights, 0)
    tree = Tree.of(csr_matrix(weights), np.ones((22, 2)), np.arange(22), np.zeros(22, dtype=int))
    assert alike(tree.leaf_of, np.repeat([0, 1], [10, 12]))


def test_no_more_parts_than_a_person_can_look_at():
    weights = np.kron(np.eye(20), np.ones((6, 6))) + 0.001
    np.fill_diagonal(weights, 0)
    tree = Tree.of(csr_matrix(weights), np.ones((120, 2)), np.arange(120), np.zeros(120, dtype=int))
    assert tree.n_leaves == PARTS
    assert refines(np.repeat(np.arange(20), 6), tree.leaf_of)


def test_copies_count_as_items_but_not_as_links():
    graph, nodes, family, _ = families(2, 2, 20)
    copies = np.append(np.arange(80), np.zeros(500, dtype=int))
    few, many = (Tree.of(graph, nodes, of_item, family[of_item]) for of_item in (np.arange(80), copies))
    np.testing.assert_allclose(few.heights, many.heights)
    assert alike(few.leaf_of, many.leaf_of[:80])
    assert many.sizes.max() == 580


def test_the_same_seed_gives_the_same_tree():
    first, second = some_tree(3)[0], some_tree(3)[0]
    np.testing.assert_array_equal(first.children, second.children)
    np.testing.assert_array_equal(first.leaf_of, second.leaf_of)
    np.testing.assert_array_equal(first.heights, second.heights)


def test_one_item_no_link_and_no_group():
    one = Tree.of(csr_matrix((1, 1)), np.ones((1, 2)), np.array([0]), np.array([0]))
    check(one)
    assert one.n_leaves == 1
    alone = Tree.of(csr_matrix((30, 30)), np.eye(30), np.arange(30), np.arange(30) % 3)
    check(alone)
    assert alone.n_leaves == 3 and alone.heights.max() == 1
    same = Tree.of(csr_matrix((1, 1)), np.ones((1, 2)), np.zeros(50, dtype=int), np.arange(50) % 2)
    check(same)
    none = Tree.of(csr_matrix((2, 2)), np.eye(2), np.arange(2), np.array([-1, -1]))
    assert none.n_leaves == 0 and none.to_dict() == {} and none.labels.tolist() == [-1, -1]
    with pytest.raises(OsmlError, match="no cut into 1 groups"):
        none.cut(1)


@pytest.mark.parametrize("star", [True, False])
def test_thousands_of_groups(star):
    """Apart, or around one large group, so that the tree is as deep as it can be."""
    n = 1200
    hub = np.zeros(n - 1, dtype=int)
    weights = np.linspace(0.1, 1, n - 1)
    graph = csr_matrix((weights, (hub, np.arange(1, n))), shape=(n, n)) * star
    nodes = np.random.default_rng(0).normal(size=(n, 8))
    tree = Tree.of(csr_matrix(graph + graph.T), nodes, np.arange(n), np.arange(n))
    assert tree.n_leaves == n and tree.cut(1000).max() == 999
    state = json.loads(json.dumps(tree.to_dict()))
    leaves, queue = 0, [state]
    while queue:
        entry = queue.pop()
        queue += entry["children"]
        leaves += not entry["children"]
    assert leaves == n


# What a person does to it ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.booleans(), st.integers(0, 99), st.integers(0, 99)), max_size=8))
def test_merges_and_splits_in_any_order(seed, steps):
    tree, _ = some_tree(seed)
    for is_merge, i, j in steps:
        before, labels = tree, tree.labels
        a, b = (tree.groups[k % len(tree.groups)] for k in (i, j))
        if is_merge and a != b:
            tree = tree.merge(a, b)
            (new,) = set(tree.groups) - set(before.groups)
            np.testing.assert_array_equal(tree.labels, np.where(np.isin(labels, [a, b]), new, labels))
            np.testing.assert_array_equal(tree.split(new).labels, labels)  # and back again
        elif not is_merge and tree.children[a, 0] >= 0:
            tree = tree.split(a)
            assert len(tree.groups) == len(before.groups) + 1 and refines(tree.labels, labels)
            np.testing.assert_array_equal(tree.labels[labels != a], labels[labels != a])
        np.testing.assert_array_equal(before.labels, labels)
        assert tree.n_leaves == before.n_leaves
    check(tree)


def test_several_are_merged_at_once():
    graph, nodes, _, member = families(4, 3, 20)
    tree = Tree.of(graph, nodes, np.arange(len(member)), member).merge(0, 4, 8, 11)
    check(tree)
    assert alike(tree.labels, np.where(np.isin(member, [0, 4, 8, 11]), 99, member))
    assert alike(tree.cut(9), tree.labels)  # what a person put together is not cut while others may be


def test_what_a_person_cannot_do():
    graph, nodes, family, _ = families(2, 2, 20)
    tree = Tree.of(graph, nodes, np.arange(80), family)
    leaf = int(np.flatnonzero(tree.children[:, 0] < 0)[0])
    for action, message in [
        (lambda: tree.cut(0), "no cut into 0 groups: it has 4 leaves"),
        (lambda: tree.cut(5), "no cut into 5 groups"),
        (lambda: tree.split(2), "group 2 does not stand: choose from 0, 1"),
        (lambda: tree.split(0).split(leaf).split(leaf), "does not stand|cannot be split"),
        (lambda: tree.merge(0), "two or more different groups"),
        (lambda: tree.merge(0, 0), "two or more different groups"),
        (lambda: tree.merge(0, 7), "group 7 does not stand"),
        (lambda: Tree.of(graph, nodes, np.arange(80), family * 2), "labels skip a number"),
    ]:
        with pytest.raises(OsmlError, match=message) as error:
            action()
        assert "\n" not in str(error.value)
    part = tree.split(0).groups[-1]
    with pytest.raises(OsmlError, match=f"group {part} cannot be split: no part of its 20 items"):
        tree.split(0).split(part)
