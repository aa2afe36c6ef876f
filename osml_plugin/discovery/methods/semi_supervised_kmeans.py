"""k-means in which items of known classes stay with their class."""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np
from scipy.sparse import csr_matrix

from ..pool import Pool
from .base import Method, group_numbers

ITERATIONS = 25
SETTLED = 1e-3
"""Share of the nodes that still change their group at which it ends."""
DRAWN = 5
"""Candidates for each of the first centres."""


class SemiSupervisedKMeans(Method, name="semi_supervised_kmeans"):
    """Spherical k-means with the centres of known classes first, and k-means++ for the others (Vaze et al. 2022,
    "Generalized category discovery", §3). Known items belong to their class's group, whatever is nearer; all other
    nodes go to the nearest centre.

    The granularity is the number of groups. Vaze et al. choose it by known classes that k-means was not told; so the
    ladder is told every other known class, whose groups come first, and the rest show which number is right. Without
    known classes it is spherical k-means. In the end all nodes go to the nearest centre, known ones too: if these
    stayed, to group too finely would cost the told classes nothing. Time is linear in nodes times groups, memory in
    nodes.
    """

    n_rungs = 34

    def ladder(self, pool: Pool, seed: int) -> Iterator[tuple[float, np.ndarray]]:
        fixed = np.full(len(pool.nodes), -1, dtype=np.int64)
        told = pool.classes % 2 == 0
        fixed[pool.of_known[told]] = pool.classes[told]
        is_told = fixed >= 0
        fixed[is_told] = np.unique(fixed[is_told], return_inverse=True)[1]
        coarsest = max(int(fixed.max()) + 1, 1)
        for rung, number in enumerate(coarsest - 1 + group_numbers(len(pool.nodes) - coarsest + 1)):
            # Other seeds, so that stability is not feigned.
            groups = semi_supervised_kmeans(pool.nodes, fixed, int(number), seed + rung)
            yield float(number), nearest(pool.nodes, directions(pool.nodes, groups))


def semi_supervised_kmeans(nodes: np.ndarray, fixed: np.ndarray, number: int, seed: int) -> np.ndarray:
    """The group `(M,)` of each unit vector `(M, D)`, at most `number` of them; `fixed` `(M,)` is it for those that are
    known, from 0, each number used, and −1 for the others."""
    free = fixed < 0
    groups = fixed.copy()
    if not free.any():
        return groups
    centres = directions(nodes[~free], fixed[~free])
    centres = with_further(centres, nodes[free], number, np.random.default_rng(seed))
    for _ in range(ITERATIONS):
        before = groups.copy()
        groups[free] = faiss.knn(nodes[free], centres, 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]
        groups = np.unique(groups, return_inverse=True)[1]  # known groups are never empty, so they stay the first
        if np.mean(groups != before) < SETTLED:
            break
        centres = directions(nodes, groups)
    return groups


def nearest(nodes: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The nearest of the centres `(G, D)` to each node `(M,)`, numbered from 0 without those that no node is nearest
    to."""
    found = faiss.knn(nodes, centres, 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]
    return np.unique(found, return_inverse=True)[1]


def directions(nodes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The direction `(G, D)` of the mean of each group; each number from 0 is used."""
    n, n_groups = len(nodes), groups.max(initial=-1) + 1
    member = csr_matrix((np.ones(n, np.float32), (groups, np.arange(n))), shape=(n_groups, n))
    total = member @ nodes
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def with_further(centres: np.ndarray, nodes: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """The centres, and after them some of the nodes until there are `number`, or no other node is left.

    Each is the best of a few that are drawn by the square of the distance to the nearest centre so far (greedy
    k-means++: Arthur & Vassilvitskii 2007, §3; as in scikit-learn).
    """
    squared = np.full(len(nodes), 2.0, dtype=np.float32)
    for centre in centres:
        squared = np.clip(2 - 2 * (nodes @ centre), 0, squared)
    chosen = []
    while len(centres) + len(chosen) < number and squared.any():
        drawn = rng.choice(len(nodes), DRAWN, p=squared / squared.sum(dtype=np.float64))
        left = np.clip(2 - 2 * (nodes @ nodes[drawn].T), 0, squared[:, None])
        best = left.sum(axis=0).argmin()
        chosen.append(drawn[best])
        squared = left[:, best]
        squared[chosen[-1]] = 0
    return np.concatenate([centres, nodes[chosen]]) if chosen else centres
