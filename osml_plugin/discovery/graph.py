"""The graph whose communities are the classes: nearest neighbours, weighted by how many neighbours they share."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix, identity, vstack
from sknetwork.clustering import Louvain

from ..neighbors import NeighborIndex

N_NEIGHBORS = 15
ONE_WAY = 0.1
"""What a link counts for that only one of its two items has among its nearest; it keeps outliers attached."""
BLOCK = 8192
"""Rows at a time, so that memory stays linear in the items."""


def neighbor_graph(nodes: np.ndarray) -> csr_matrix:
    """Link each of the distinct unit vectors `(M, D)` to its nearest ones, in both directions: `(M, M)` weights.

    The weight of a link is the Jaccard index of the two neighbourhoods, each node being in its own (as in
    PhenoGraph: Levine et al. 2015, "Data-driven phenotypic dissection of AML"), times `ONE_WAY` where the two are not
    each other's neighbours. It is low between classes even where their items touch, and it knows no distances, so
    it is the same in tight and in loose classes.
    """
    n_nodes = len(nodes)
    k = min(N_NEIGHBORS + 1, n_nodes)
    vectors = torch.from_numpy(nodes)
    index = NeighborIndex(vectors)
    nearest = torch.cat([index.search(block, k)[1] for block in vectors.split(BLOCK)]).numpy()
    starts = np.arange(0, n_nodes * k + 1, k)
    near = csr_matrix((np.ones(n_nodes * k), nearest.ravel(), starts), shape=(n_nodes, n_nodes))
    near = near.maximum(identity(n_nodes, format="csr"))
    links = (near.minimum(near.T) * (1 - ONE_WAY) + near.maximum(near.T) * ONE_WAY).tocsr()
    links.setdiag(0)
    links.eliminate_zeros()
    size = np.diff(near.indptr)
    blocks = []
    for start in range(0, n_nodes, BLOCK):
        rows = slice(start, start + BLOCK)
        shared = (near[rows] @ near.T).multiply(links[rows] > 0).tocoo()
        jaccard = shared.data / (size[rows][shared.row] + size[shared.col] - shared.data)
        blocks.append(csr_matrix((jaccard, (shared.row, shared.col)), shape=shared.shape).multiply(links[rows]))
    return vstack(blocks, format="csr")


def communities(graph: csr_matrix, resolution: float, seed: int) -> np.ndarray:
    """The group `(M,)` of each node, from 0: modularity at a resolution (higher: more groups), by Louvain.

    Blondel et al. 2008, "Fast unfolding of communities in large networks". Not Leiden: scikit-network's draws from
    C's `rand()`, which no seed reaches.
    """
    if graph.nnz == 0:  # a single node
        return np.zeros(graph.shape[0], dtype=np.int64)
    louvain = Louvain(resolution=resolution, shuffle_nodes=True, random_state=seed)
    return louvain.fit_predict(graph).astype(np.int64)


def own_share(graph: csr_matrix, groups: np.ndarray) -> np.ndarray:
    """For each node the share `(M,)`, in [0, 1], of the weight of its links that stays in its group."""
    links = graph.tocoo()
    total = np.bincount(links.row, links.data, len(groups))
    own = np.bincount(links.row, links.data * (groups[links.row] == groups[links.col]), len(groups))
    return np.divide(own, total, out=np.ones(len(groups)), where=total > 0)
