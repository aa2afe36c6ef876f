"""The graph whose communities are the classes: nearest neighbours, weighted by how many neighbours they share."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import reverse_cuthill_mckee
from sknetwork.clustering import Louvain
from sknetwork.hierarchy import Paris

from ..nearest import nearest

N_NEIGHBORS = 15
ONE_WAY = 0.1
"""What a link counts for that only one of its two items has among its nearest; it keeps outliers attached."""
ATOM = 25
"""Nodes are taken together first where they would be at a resolution of one part in so many of their number."""
BLOCK = 8192
"""Rows at a time, so that memory stays linear in the items."""


def neighbor_graph(nodes: np.ndarray) -> csr_matrix:
    """Link each of the distinct unit vectors `(M, D)` to its nearest ones, in both directions: `(M, M)` weights.

    The weight of a link is the Jaccard index of the two neighbourhoods, each node being in its own (as in
    PhenoGraph: Levine et al. 2015, "Data-driven phenotypic dissection of AML"), times `ONE_WAY` where the two are not
    each other's neighbours. It is low between classes even where their items touch, and it knows no distances, so
    it is the same in tight and in loose classes.

    Memory beside the nodes: about 1.5 kB a node at the most, 350 bytes of it for what is returned.
    """
    n_nodes = len(nodes)
    k = min(N_NEIGHBORS + 1, n_nodes)
    near = nearest(nodes, k)
    jaccard = np.empty((n_nodes, k - 1))
    for start in range(0, n_nodes, BLOCK):
        own = near[start : start + BLOCK]
        others = near[own[:, 1:]]
        in_own = np.zeros(others.shape, dtype=bool)
        for column in range(k):
            in_own |= others == own[:, None, column : column + 1]
        shared = np.count_nonzero(in_own, axis=2)
        jaccard[start : start + BLOCK] = shared / (2 * k - shared)
    starts = np.arange(0, jaccard.size + 1, k - 1) if k > 1 else np.zeros(n_nodes + 1)
    links = csr_matrix((jaccard.ravel(), near[:, 1:].ravel(), starts.astype(np.int32)), shape=(n_nodes, n_nodes))
    back = links.T.tocsr()
    return (links.minimum(back) * (1 - ONE_WAY) + links.maximum(back) * ONE_WAY).tocsr()


def communities(graph: csr_matrix, resolution: float, seed: int) -> np.ndarray:
    """The group `(M,)` of each node, from 0: modularity at a resolution (higher: more groups), by Louvain.

    Blondel et al. 2008, "Fast unfolding of communities in large networks". Not Leiden: scikit-network's draws from
    C's `rand()`, which no seed reaches.
    """
    return _louvain(graph, resolution, shuffle_nodes=True, random_state=seed)


def contracted(graph: csr_matrix) -> np.ndarray:
    """The group `(M,)` of each node, from 0, of a few nodes each that no coarser grouping has a reason to part: the
    first sweeps of Louvain at a resolution of M / `ATOM`.

    Louvain looks up the groups of a node's neighbours, and in a graph that no cache holds that is what takes the time;
    so this one pass over the whole graph goes through it in an order in which neighbours are near one another (Cuthill
    & McKee 1969).
    """
    order = reverse_cuthill_mckee(graph, symmetric_mode=True)
    groups = np.empty(len(order), dtype=np.int64)
    groups[order] = _louvain(graph[order][:, order], graph.shape[0] / ATOM, n_aggregations=1)
    return groups


def _louvain(graph: csr_matrix, resolution: float, **options: int | bool) -> np.ndarray:
    if graph.nnz == 0:
        return np.arange(graph.shape[0])
    # Newman's modularity is the default one where weights are symmetric.
    louvain = Louvain(resolution, modularity="newman", return_probs=False, return_aggregate=False, **options)
    return louvain.fit_predict(graph).astype(np.int64)


def quotient(graph: csr_matrix, groups: np.ndarray) -> csr_matrix:
    """The graph `(G, G)` whose nodes are the groups 0 … G−1 of those of `graph`: the weights between each two, and
    within each on the diagonal. A grouping of it has the modularity of the same grouping of `graph`."""
    n_groups = int(groups.max()) + 1
    links = graph.tocoo()
    return coo_matrix((links.data, (groups[links.row], groups[links.col])), shape=(n_groups, n_groups)).tocsr()


def mergers(graph: csr_matrix) -> np.ndarray:
    """The mergers `(M − 1, 4)` of what is linked most for its size, as SciPy has them: none is lower than, or comes
    before, those that it is of; what no link joins comes last, at infinite height. M is at least 2.

    Bonald et al. 2018, "Hierarchical graph clustering using node pair sampling" (Paris).
    """
    found = Paris(reorder=False).fit_predict(graph)
    n_nodes = len(found) + 1
    heights = [0.0] * n_nodes
    for a, b, height, _ in found.tolist():
        heights.append(max(height, heights[int(a)], heights[int(b)]))  # of equal ones, rounding makes some lower
    found[:, 2] = heights[n_nodes:]
    order = np.argsort(found[:, 2], kind="stable")
    number = np.arange(2 * n_nodes - 1)
    number[n_nodes + order] = np.arange(n_nodes, 2 * n_nodes - 1)
    found[:, :2] = number[found[:, :2].astype(int)]
    return found[order]


def own_share(graph: csr_matrix, groups: np.ndarray) -> np.ndarray:
    """For each node the share `(M,)`, in [0, 1], of the weight of its links that stays in its group."""
    links = graph.tocoo()
    total = np.bincount(links.row, links.data, len(groups))
    own = np.bincount(links.row, links.data * (groups[links.row] == groups[links.col]), len(groups))
    return np.divide(own, total, out=np.ones(len(groups)), where=total > 0)
