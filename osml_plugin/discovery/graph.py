"""The graph whose communities are the classes: nearest neighbours, weighted by how many neighbours they share."""

from __future__ import annotations

import math

import faiss
import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import reverse_cuthill_mckee
from sknetwork.clustering import Louvain
from sknetwork.hierarchy import Paris
from tqdm import tqdm

N_NEIGHBORS = 15
ONE_WAY = 0.1
"""What a link counts for that only one of its two items has among its nearest; it keeps outliers attached."""
COMPARED = 10_000
"""The most nodes that a node is compared with, but for uneven cells: this keeps the search linear. Up to so many nodes
in all it is exact."""
RECALL = 0.97
"""The share of the nearest neighbours that the cells visited must hold, on trial nodes, where `COMPARED` allows it."""
N_TRIALS = 128
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


def nearest(nodes: np.ndarray, k: int) -> np.ndarray:
    """The k nearest of the distinct vectors `(M, D)` to each of them, Euclidean: `(M, k)` int32, itself first.

    Exact up to `COMPARED` nodes. Beyond, they are cut into cells by k-means, and the nodes of a cell are compared, all
    at once, with those of the cells nearest to it; with how many, is found by trial. Memory: a copy of the nodes,
    another of those in k-means' sample, and 4k bytes a node.
    """
    n_nodes = len(nodes)
    found = np.empty((n_nodes, k), dtype=np.int32)
    if n_nodes <= COMPARED:
        found[:] = faiss.knn(nodes, nodes, k)[1]
    else:
        nodes = nodes - nodes.mean(axis=0)  # or k-means finds few cells where all lie in one spot
        n_cells = round(2.5 * math.sqrt(n_nodes))
        kmeans = faiss.Kmeans(nodes.shape[1], n_cells, niter=4, max_points_per_centroid=32, seed=0)
        kmeans.train(nodes)
        centres, cell_of = kmeans.centroids, kmeans.index.search(nodes, 1)[1][:, 0]
        sizes = np.bincount(cell_of, minlength=n_cells)
        cells = np.split(cell_of.argsort(kind="stable").astype(np.int32), sizes.cumsum()[:-1])
        n_visited = _n_visited(nodes, k, centres, cell_of)
        used = np.flatnonzero(sizes)  # any k of these hold k nodes
        visited = used[faiss.knn(centres, centres[used], min(max(n_visited, k), len(used)))[1]]
        with tqdm(total=n_nodes, desc="neighbours", unit="item", delay=2, leave=False) as bar:
            for rows, centre, near in zip(cells, centres, visited, strict=True):
                if len(rows):
                    enough = 1 + np.searchsorted(sizes[near].cumsum(), k)
                    among = np.concatenate([cells[cell] for cell in near[: max(n_visited, enough)]])
                    # About the centre, because ‖x‖² − 2x·y + ‖y‖² loses small distances between long vectors.
                    found[rows] = among[faiss.knn(nodes[rows] - centre, nodes[among] - centre, k)[1]]
                    bar.update(len(rows))
    itself = np.arange(n_nodes, dtype=np.int32)[:, None]
    found = np.take_along_axis(found, np.argsort(found != itself, axis=1, kind="stable"), axis=1)
    found[:, :1] = itself  # it may be missing where others are nearer than single precision tells
    return found


def _n_visited(nodes: np.ndarray, k: int, centres: np.ndarray, cell_of: np.ndarray) -> int:
    """How many cells, nearest to its own, hold `RECALL` of the k nearest of a node; not more than `COMPARED`
    allows."""
    most = max(1, COMPARED * len(centres) // len(nodes))
    some = np.random.default_rng(0).choice(len(nodes), N_TRIALS, replace=False)
    ranked = faiss.knn(centres[cell_of[some]], centres, most)[1]
    holds = cell_of[faiss.knn(nodes[some], nodes, k)[1]][:, :, None] == ranked[:, None, :]
    needed = np.where(holds.any(axis=2), holds.argmax(axis=2) + 1, most)
    return int(np.quantile(needed, RECALL, method="higher"))


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
