"""Dense regions of the graph of nearest neighbours, as HDBSCAN finds them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from ..pool import Pool
from .base import Method

MIN_SAMPLES = 5
"""The distance to the so-manieth nearest node says how dense it is around a node."""
SMALLEST = 4
"""Nodes of the smallest dense region that counts."""
FARTHEST = 2.0
"""No two unit vectors are farther apart; parts of the graph without a link are taken to be."""


class Density(Method, name="density"):
    """HDBSCAN's clusters, and with each of them what lies around it.

    The minimum spanning tree of the mutual reachability distances gives a hierarchy; pruned of branches with fewer
    than `min_cluster_size` nodes it is HDBSCAN's condensed tree, and its leaves are the clusters (Campello, Moulavi &
    Sander 2013, "Density-based clustering based on hierarchical density estimates"; `cluster_selection_method="leaf"`
    in scikit-learn). HDBSCAN leaves out all nodes between the leaves, most of them where classes touch; here they join
    the group to which their links weigh most, from the leaves outwards. Noise is what no link leads to.

    Distances are those along the links of the pool's graph alone, so time is M log M and memory linear. The granularity
    is M / `min_cluster_size`; at 1 all is one group.
    """

    n_rungs = 24

    def ladder(self, pool: Pool, seed: int) -> Iterator[tuple[float, np.ndarray]]:
        n_nodes = len(pool.nodes)
        yield 1.0, np.zeros(n_nodes, dtype=np.int64)
        if n_nodes < 2 * SMALLEST:
            return
        order, splits = hierarchy(spanning_tree(pool))
        sizes = np.unique(np.geomspace(SMALLEST, n_nodes // 2, self.n_rungs - 1).astype(int))[::-1]
        before = np.empty(0)
        for min_cluster_size in sizes:
            found = leaves(order, splits, int(min_cluster_size))
            if found.max() < 0:
                continue
            if not np.array_equal(found, before):
                before, groups = found, joined(pool.graph, found)
            yield n_nodes / min_cluster_size, groups


def spanning_tree(pool: Pool) -> coo_matrix:
    """The minimum spanning tree `(M, M)` of mutual reachability, M − 1 edges; the metric is the chord, ‖x − y‖."""
    links = pool.graph.tocoo()
    length = np.linalg.norm(pool.nodes[links.row] - pool.nodes[links.col], axis=1).astype(np.float64)
    # A node's links lead to its nearest ones, and to farther ones that have it among theirs.
    by_length = np.lexsort((length, links.row))
    n_links = np.bincount(links.row, minlength=len(pool.nodes))
    kth = np.cumsum(n_links) - n_links + np.minimum(MIN_SAMPLES, n_links) - 1
    core = length[by_length][kth]
    length = np.maximum(length, np.maximum(core[links.row], core[links.col]))
    _, part = connected_components(pool.graph, directed=False)
    first = np.unique(part, return_index=True)[1]
    rows, columns = np.append(links.row, first[:-1]), np.append(links.col, first[1:])
    lengths = np.append(length, np.full(len(first) - 1, FARTHEST))
    return minimum_spanning_tree(csr_matrix((lengths, (rows, columns)), shape=links.shape)).tocoo()


def hierarchy(tree: coo_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Single linkage from a spanning tree: the nodes `(M,)` in an order in which every branch is one stretch, and for
    each merger `(M − 1, 3)` where the first of the two branches starts, where the second does, and where that ends."""
    n_nodes = tree.shape[0]
    shortest_first = np.lexsort((tree.col, tree.row, tree.data))
    top = list(range(2 * n_nodes - 1))  # union-find with path halving: the branch that holds a branch
    size = np.ones(2 * n_nodes - 1, dtype=np.int64)
    children = np.empty((n_nodes - 1, 2), dtype=np.int64)
    edges = zip(tree.row[shortest_first].tolist(), tree.col[shortest_first].tolist(), strict=True)
    for merged, (a, b) in enumerate(edges, start=n_nodes):
        for side, branch in enumerate((a, b)):
            while top[branch] != branch:
                top[branch] = branch = top[top[branch]]
            children[merged - n_nodes, side] = branch
            top[branch] = merged
        size[merged] = size[children[merged - n_nodes]].sum()
    start = np.zeros(2 * n_nodes - 1, dtype=np.int64)
    for merged in range(2 * n_nodes - 2, n_nodes - 1, -1):
        left, right = children[merged - n_nodes]
        start[left], start[right] = start[merged], start[merged] + size[left]
    first, second = children.T
    return np.argsort(start[:n_nodes]), np.column_stack([start[first], start[second], start[second] + size[second]])


def leaves(order: np.ndarray, splits: np.ndarray, min_cluster_size: int) -> np.ndarray:
    """The leaf `(M,)` of the condensed tree that each node is in, from 0; −1: none."""
    start, middle, end = splits.T
    true = (middle - start >= min_cluster_size) & (end - middle >= min_cluster_size)
    starts, ends = np.append(start[true], middle[true]), np.append(middle[true], end[true])
    outer_first = np.lexsort((-ends, starts))
    starts, ends = starts[outer_first], ends[outer_first]
    innermost = np.append(starts[1:], len(order)) >= ends  # branches are nested or apart
    groups = np.full(len(order), -1, dtype=np.int64)
    for group, (a, b) in enumerate(zip(starts[innermost], ends[innermost], strict=True)):
        groups[order[a:b]] = group
    return groups


def joined(graph: csr_matrix, groups: np.ndarray) -> np.ndarray:
    """`groups` `(M,)` with each node of none (−1) in the one that its links weigh most for, in rounds outwards."""
    groups = groups.copy()
    outside = np.flatnonzero(groups < 0)
    while len(outside):
        inside = np.flatnonzero(groups >= 0)
        member = csr_matrix((np.ones(len(inside)), (inside, groups[inside])), shape=(len(groups), groups.max() + 1))
        weight = (graph[outside] @ member).tocsr()
        reached = np.diff(weight.indptr) > 0
        if not reached.any():
            break
        groups[outside[reached]] = weight[reached].argmax(axis=1).A1
        outside = outside[~reached]
    return groups
