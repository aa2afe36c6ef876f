"""Nearest neighbors of all items among themselves: exact for some ten thousand, about linear beyond."""

from __future__ import annotations

import math

import faiss
import numpy as np
from tqdm import tqdm

COMPARED = 10_000
"""The most nodes that a node is compared with, but for uneven cells: this keeps the search linear. Up to this many
nodes in all it is exact."""
RECALL = 0.97
"""The share of the nearest neighbours that the cells visited must hold, on trial nodes, where `COMPARED` allows it."""
N_TRIALS = 128


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
        centers, cell_of = kmeans.centroids, kmeans.index.search(nodes, 1)[1][:, 0]
        sizes = np.bincount(cell_of, minlength=n_cells)
        cells = np.split(cell_of.argsort(kind="stable").astype(np.int32), sizes.cumsum()[:-1])
        n_visited = _n_visited(nodes, k, centers, cell_of)
        used = np.flatnonzero(sizes)  # any k of these hold k nodes
        visited = used[faiss.knn(centers, centers[used], min(max(n_visited, k), len(used)))[1]]
        with tqdm(total=n_nodes, desc="neighbors", unit="item", delay=2, leave=False) as bar:
            for rows, center, near in zip(cells, centers, visited, strict=True):
                if len(rows):
                    enough = 1 + np.searchsorted(sizes[near].cumsum(), k)
                    among = np.concatenate([cells[cell] for cell in near[: max(n_visited, enough)]])
                    # About the center, because ‖x‖² − 2x·y + ‖y‖² loses small distances between long vectors.
                    found[rows] = among[faiss.knn(nodes[rows] - center, nodes[among] - center, k)[1]]
                    bar.update(len(rows))
    itself = np.arange(n_nodes, dtype=np.int32)[:, None]
    found = np.take_along_axis(found, np.argsort(found != itself, axis=1, kind="stable"), axis=1)
    found[:, :1] = itself  # it may be missing where others are nearer than single precision tells
    return found


def _n_visited(nodes: np.ndarray, k: int, centers: np.ndarray, cell_of: np.ndarray) -> int:
    """How many cells, nearest to its own, hold `RECALL` of the k nearest of a node; not more than `COMPARED`
    allows."""
    most = max(1, COMPARED * len(centers) // len(nodes))
    some = np.random.default_rng(0).choice(len(nodes), N_TRIALS, replace=False)
    ranked = faiss.knn(centers[cell_of[some]], centers, most)[1]
    holds = cell_of[faiss.knn(nodes[some], nodes, k)[1]][:, :, None] == ranked[:, None, :]
    needed = np.where(holds.any(axis=2), holds.argmax(axis=2) + 1, most)
    return int(np.quantile(needed, RECALL, method="higher"))
