"""Must-link and cannot-link: the guarantee on random graphs, a slow twin, and what is refused."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import floyd_warshall

from osml_plugin import OsmlError
from osml_plugin.discovery.constraints import Constraints, confirmed, contract, enforce, links_between, spread
from osml_plugin.discovery.graph import communities, neighbor_graph


def random_graph(rng: np.random.Generator, n: int, density: float) -> np.ndarray:
    """Symmetric weights in (0, 1), no two of them alike."""
    weights = np.triu(rng.uniform(0.01, 1, (n, n)) * (rng.random((n, n)) < density), 1)
    return weights + weights.T


def random_constraints(rng: np.random.Generator, n: int, n_must: int, n_cannot: int) -> Constraints:
    must = rng.integers(0, n, (n_must, 2))
    blocks = Constraints.of(must, None, n).blocks
    cannot = rng.integers(0, n, (n_cannot, 2))
    return Constraints.of(must, cannot[blocks[cannot[:, 0]] != blocks[cannot[:, 1]]], n)


def partition(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == group).tolist()) for group in np.unique(labels[labels >= 0])}


def holds(labels: np.ndarray, constraints: Constraints) -> bool:
    together = all(a == b or (labels[a] == labels[b] >= 0) for a, b in constraints.must_link)
    return together and all(labels[a] != labels[b] or labels[a] < 0 for a, b in constraints.cannot_link)


def slow_blocks(n: int, must: np.ndarray) -> np.ndarray:
    blocks = np.arange(n)
    for _ in range(n):
        for a, b in must:
            blocks[[a, b]] = min(blocks[a], blocks[b])
    return blocks


def slow_enforce(weights: np.ndarray, labels: np.ndarray, constraints: Constraints) -> set[frozenset[int]]:
    """The rules of `enforce`, one after another, for items that are nodes, each linked to each."""
    n = len(labels)
    labels, blocks = labels.copy(), slow_blocks(n, constraints.must_link)
    for block in set(blocks):
        members = np.flatnonzero(blocks == block)
        if len(members) > 1:
            votes = Counter(labels[members][labels[members] >= 0].tolist())
            labels[members] = min(votes, key=lambda g: (-votes[g], g)) if votes else labels.max() + 1
    result = []
    for group in set(labels[labels >= 0].tolist()):
        members = np.flatnonzero(labels == group)
        units = sorted(set(blocks[members]))
        conflicts = {
            frozenset((blocks[a], blocks[b])) for a, b in constraints.cannot_link if labels[a] == labels[b] == group
        }
        if not conflicts:
            result.append(set(members.tolist()))
            continue
        joint = np.array([[weights[np.ix_(blocks == u, blocks == v)].sum() for v in units] for u in units])
        np.fill_diagonal(joint, 0)
        distance = floyd_warshall(np.divide(1, joint, out=np.full(joint.shape, np.inf), where=joint > 0))
        seeds = [i for i, unit in enumerate(units) if any(unit in pair for pair in conflicts)]
        cell = {i: min(seeds, key=lambda s: distance[i, s]) for i in range(len(units))}
        between = {
            (a, b): sum(joint[i, j] for i in cell for j in cell if cell[i] == a and cell[j] == b)
            for a in seeds
            for b in seeds
        }
        weight = {a: sum(between[a, b] for b in seeds) for a in seeds}
        linked = [(a, b) for a, b in combinations(seeds, 2) if between[a, b] > 0]
        part = {seed: {seed} for seed in seeds}

        for a, b in sorted(linked, key=lambda p: -between[p] / (weight[p[0]] * weight[p[1]])):
            clash = any(frozenset((units[i], units[j])) in conflicts for i in part[a] for j in part[b])
            if part[a] is not part[b] and not clash:
                both = part[a] | part[b]
                for seed in both:
                    part[seed] = both
        for joined in {frozenset(p) for p in part.values()}:
            result.append({i for i in members.tolist() if cell[units.index(blocks[i])] in joined})
    return {frozenset(group) for group in result}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 14), st.integers(0, 5), st.integers(1, 8))
def test_enforce_against_a_slow_twin(seed, n, n_must, n_cannot):
    rng = np.random.default_rng(seed)
    weights = random_graph(rng, n, density=1)  # all linked, so that each join of two parts is decided by weights
    labels = rng.integers(-1, 2, n)
    constraints = random_constraints(rng, n, n_must, n_cannot)
    found = enforce(csr_matrix(weights), np.arange(n), labels, constraints)
    assert partition(found) == slow_enforce(weights, labels, constraints)


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 10**6),
    st.integers(2, 40),
    st.integers(0, 12),
    st.integers(0, 30),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.booleans(),
)
def test_every_constraint_holds_and_the_rest_stays(seed, n, n_must, n_cannot, density, copies):
    rng = np.random.default_rng(seed)
    n_nodes = max(n // 3, 1) if copies else n
    graph = csr_matrix(random_graph(rng, n_nodes, density))
    of_item = rng.integers(0, n_nodes, n) if copies else np.arange(n)
    labels = rng.integers(-1, 4, n)
    before = labels.copy()
    constraints = random_constraints(rng, n, n_must, n_cannot)
    found = enforce(graph, of_item, labels, constraints)
    assert holds(found, constraints)
    np.testing.assert_array_equal(labels, before)

    # Once is enough.
    np.testing.assert_array_equal(enforce(graph, of_item, found, constraints), found)
    # Only what must-link joins may change between the groups that there were, or leave those left out.
    several = np.bincount(constraints.blocks)[constraints.blocks] > 1
    torn = {labels[a] for a, b in constraints.cannot_link if labels[a] == labels[b]}
    torn |= set(found[several]) | set(labels[several])
    untouched = ~several & ~np.isin(labels, list(torn))
    np.testing.assert_array_equal(found[untouched], labels[untouched])
    np.testing.assert_array_equal(found[~several & (labels < 0)], -1)
    old = found <= labels.max()
    assert (found[old & ~several] == labels[old & ~several]).all()
    # A block goes to a group where none of its blocks has more items.
    for block in np.unique(constraints.blocks[several]):
        members = constraints.blocks == block
        votes = Counter(labels[members & (labels >= 0)].tolist())
        if votes and found[members][0] <= labels.max():
            assert votes[found[members][0]] == max(votes.values())


def test_without_constraints_nothing_changes():
    labels = np.array([0, 1, -1, 1])
    graph = csr_matrix(np.ones((4, 4)) - np.eye(4))
    for pairs in (None, [], np.empty((0, 2), dtype=np.int64)):
        np.testing.assert_array_equal(enforce(graph, np.arange(4), labels, Constraints.of(pairs, pairs, 4)), labels)


def test_a_block_of_noise_is_a_new_group_and_noise_is_never_together():
    graph = csr_matrix((5, 5))
    labels = np.array([0, -1, -1, -1, -1])
    found = enforce(graph, np.arange(5), labels, Constraints.of([[1, 2]], [[3, 4], [0, 3]], 5))
    np.testing.assert_array_equal(found, [0, 1, 1, -1, -1])


def test_two_copies_may_be_of_two_classes():
    graph = csr_matrix(np.array([[0, 1.0], [1, 0]]))
    found = enforce(graph, np.array([0, 0, 0, 1]), np.zeros(4, dtype=int), Constraints.of(None, [[0, 1]], 4))
    assert found[0] != found[1] and (found[[2, 3]] == found[2]).all()


def two_classes(size: int = 60) -> tuple[csr_matrix, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = np.zeros((2, 16))
    centres[:, :2] = [[1, 0.3], [0.3, 1]]
    items = np.repeat(centres, size, axis=0) + 0.12 * rng.normal(size=(2 * size, 16))
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    return neighbor_graph(items.astype(np.float32)), np.repeat([0, 1], size)


@pytest.mark.parametrize("n_pairs", [1, 3, 10])
def test_a_few_pairs_tell_two_classes_apart(n_pairs):
    graph, true = two_classes()
    # In every other pair the classes come the other way round: it is the graph that tells which items belong together.
    pairs = [[i, 60 + i] if i % 2 else [60 + i, i] for i in range(n_pairs)]
    found = enforce(graph, np.arange(120), np.zeros(120, dtype=int), Constraints.of(None, pairs, 120))
    assert len(np.unique(found)) == 2
    agree = (found == true).mean()
    assert max(agree, 1 - agree) > 0.95


def test_many_in_conflict_are_as_many_groups():
    graph, _ = two_classes()
    cannot = list(combinations(range(0, 120, 10), 2))
    found = enforce(graph, np.arange(120), np.zeros(120, dtype=int), Constraints.of(None, cannot, 120))
    assert len(np.unique(found)) == 12
    assert (found == 0).sum() == np.bincount(found).max()  # the largest keeps the number


def test_parts_that_no_link_joins_share_a_group_unless_they_conflict():
    # 0 to 3 are all alone in the graph; 0 conflicts with 1, and 2 with 3: two groups are enough.
    found = enforce(csr_matrix((5, 5)), np.arange(5), np.zeros(5, dtype=int), Constraints.of(None, [[0, 1], [2, 3]], 5))
    assert len(np.unique(found)) == 2 and found[4] == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 15), st.sampled_from([0.0, 0.2, 1.0]))
def test_spread_is_by_the_shortest_way(seed, n, density):
    rng = np.random.default_rng(seed)
    weights = random_graph(rng, n, density)
    labels = rng.integers(-1, 3, n)
    distance = floyd_warshall(np.divide(1, weights, out=np.full((n, n), np.inf), where=weights > 0))
    seeds = np.flatnonzero(labels >= 0)
    expected = labels.copy()
    for i in np.flatnonzero(labels < 0):
        if len(seeds) and np.isfinite(distance[i, seeds]).any():
            expected[i] = labels[seeds[distance[i, seeds].argmin()]]
    np.testing.assert_array_equal(spread(csr_matrix(weights), labels), expected)


def test_links_between_against_a_slow_twin():
    rng = np.random.default_rng(0)
    weights = random_graph(rng, 6, 0.5)
    node, unit = np.array([0, 0, 1, 2, 3, 3, 4, 5, 5]), np.array([0, 0, 0, 1, 1, 2, 2, 3, 0])
    expected = np.zeros((4, 4))
    for u in range(4):
        for v in range(4):
            if u != v:
                for i in set(node[unit == u]):
                    for j in set(node[unit == v]):
                        expected[u, v] += 1 if i == j else weights[i, j]
    np.testing.assert_allclose(links_between(csr_matrix(weights), node, unit).toarray(), expected)


def test_contract_against_a_slow_twin():
    rng = np.random.default_rng(0)
    weights = random_graph(rng, 8, 0.7)
    of_item = np.append(np.arange(8), [0, 1])  # items 8 and 9 are copies of 0 and 1
    constraints = Constraints.of([[8, 3], [3, 5], [6, 7]], [[0, 2], [9, 4], [5, 7]], 10)
    graph, new_node = contract(csr_matrix(weights), of_item, constraints)
    joint = [{0, 3, 5}, {1}, {2}, {4}, {6, 7}]
    assert partition(new_node) == {frozenset(j) for j in joint}
    for a in joint:
        for b in joint:
            expected = 0 if any({min(a), min(b)} == pair for pair in ({0, 2}, {1, 4}, {0, 6})) else 1
            expected *= weights[np.ix_(sorted(a), sorted(b))].sum()
            assert np.isclose(graph[new_node[min(a)], new_node[min(b)]], expected)


def test_contract_draws_the_neighbours_of_what_is_joined_together():
    cliques = np.kron(np.eye(3), np.ones((6, 6))) - np.eye(18)
    true = np.repeat([0, 1, 2], 6)
    assert partition(communities(csr_matrix(cliques), 1.0, 0)) == partition(true)
    graph, new_node = contract(csr_matrix(cliques), np.arange(18), Constraints.of([[0, 6], [1, 7], [2, 8]], None, 18))
    assert partition(communities(graph, 1.0, 0)[new_node]) == partition(true == 2)


def test_confirmed_names_become_a_chain_and_a_speaker_each():
    must, cannot = confirmed(["a", None, "b", "a", "c", "a"])
    np.testing.assert_array_equal(must, [[0, 3], [3, 5]])
    np.testing.assert_array_equal(cannot, [[0, 2], [0, 4], [2, 4]])
    for names in ([], [None, None]):
        must, cannot = confirmed(names)
        assert must.shape == cannot.shape == (0, 2)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([None, "a", "b", 3]), min_size=1, max_size=30), st.integers(0, 1000))
def test_confirmed_names_are_kept(names, seed):
    n = len(names)
    rng = np.random.default_rng(seed)
    graph = csr_matrix(random_graph(rng, n, 0.3))
    constraints = Constraints.of(*confirmed(names), n)
    assert len(constraints.must_link) < n
    found = enforce(graph, np.arange(n), rng.integers(-1, 2, n), constraints)
    for (i, a), (j, b) in combinations([(i, name) for i, name in enumerate(names) if name is not None], 2):
        assert found[i] != found[j] or (a == b) or found[i] < 0
        assert a != b or found[i] == found[j] >= 0


@pytest.mark.parametrize(
    ("must", "cannot", "message"),
    [
        ([[0, 5]], None, "must_link has item 5, but the 5 items count from 0 to 4"),
        (None, [[-1, 2]], "cannot_link has item -1"),
        (None, [[3, 3]], "cannot_link has item 3 with itself"),
        ([[0, 1], [1, 2]], [[3, 4], [2, 0]], "items 2 and 0 are cannot-linked, but must-link joins them"),
        ([0, 1], None, r"must_link must be pairs .* \(2,\)"),
        ([[0, 1, 2]], None, "must_link must be pairs"),
        ([[0.0, 1.0]], None, "must_link must be pairs .* float64"),
        ([[True, False]], None, "must_link must be pairs"),
        (None, [[0, 1], [2]], "cannot_link must be pairs"),
        (None, [["a", "b"]], "cannot_link must be pairs"),
    ],
)
def test_bad_pairs(must, cannot, message):
    with pytest.raises(OsmlError, match=message) as error:
        Constraints.of(must, cannot, 5)
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_the_links_among_some_items(seed):
    rng = np.random.default_rng(seed)
    links, kept = random_constraints(rng, 12, 4, 8), rng.random(12) < 0.7
    among, items = links.among(kept), np.flatnonzero(kept)
    for inside, pairs in ((among.must_link, links.must_link), (among.cannot_link, links.cannot_link)):
        assert [tuple(pair) for pair in items[inside]] == [(a, b) for a, b in pairs if kept[a] and kept[b]]
    assert len(among.blocks) == kept.sum() and links.n_blocks == len(set(links.blocks))
