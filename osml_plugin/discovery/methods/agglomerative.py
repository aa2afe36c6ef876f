"""Groups merged two by two, for small pools."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from ...errors import OsmlError
from ..pool import Pool
from .base import Method, group_numbers
from .semi_supervised_kmeans import directions

MOST_NODES = 10_000


class Agglomerative(Method, name="agglomerative"):
    """Ward's merging (1963, "Hierarchical grouping to optimize an objective function") of unit vectors, where squared
    distances are twice the cosine ones. The granularity is the number of groups, each rung a cut of one tree.

    Cuts of one tree are stable however fine they are. So where it is stability that chooses, without two known classes,
    there are two trees, each of one half of the nodes, and rungs are cuts of them in turn; the nodes of the other half
    join the group whose mean is nearest.

    Average linkage comes out worse: it spends cuts on single outliers. All distances are in memory, 800 MB at the most
    nodes that it takes.

    Raises:
        OsmlError: more than 10,000 distinct items.
    """

    n_rungs = 34

    def ladder(self, pool: Pool, seed: int) -> Iterator[tuple[float, np.ndarray]]:
        check_size(pool)
        parts = [np.arange(len(pool.nodes))]
        if len(np.unique(pool.classes)) < 2 and len(pool.nodes) > 1:
            parts = np.array_split(np.random.default_rng(seed).permutation(len(pool.nodes)), 2)
        trees = [merge_tree(pool.nodes[part]) for part in parts]
        for rung, number in enumerate(group_numbers(len(parts[-1]))):
            part, groups = parts[rung % len(parts)], cut(trees[rung % len(parts)], int(number))
            centres = directions(pool.nodes[part], groups)
            everyone = (pool.nodes @ centres.T).argmax(axis=1)
            everyone[part] = groups
            yield float(number), everyone

    def of_number(self, pool: Pool, number: int, seed: int) -> np.ndarray:
        check_size(pool)
        return cut(merge_tree(pool.nodes), number)


def check_size(pool: Pool) -> None:
    if len(pool.nodes) > MOST_NODES:
        raise OsmlError(
            f"method 'agglomerative' takes up to {MOST_NODES:,} different items, but there are {len(pool.nodes):,}: "
            "take 'communities'"
        )


def merge_tree(nodes: np.ndarray) -> np.ndarray:
    """The M − 1 mergers of unit vectors `(M, D)`, as SciPy has them, but for their heights: 1, 2, … in their order."""
    tree = linkage(nodes, "ward") if len(nodes) > 1 else np.empty((0, 4))
    tree[:, 2] = np.arange(1, len(nodes))
    return tree


def cut(tree: np.ndarray, number: int) -> np.ndarray:
    """The groups `(M,)` before the last `number` − 1 mergers; with equal heights SciPy's own cuts make fewer."""
    n_nodes = len(tree) + 1
    if n_nodes == 1:
        return np.zeros(1, dtype=np.int64)
    return fcluster(tree, n_nodes - number, "distance").astype(np.int64) - 1
