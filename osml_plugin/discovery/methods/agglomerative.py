"""Groups merged two by two, for small pools."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from ...errors import OsmlError
from ..pool import Pool
from .base import Method, group_numbers

MOST_NODES = 10_000


class Agglomerative(Method, name="agglomerative"):
    """Ward's merging (1963, "Hierarchical grouping to optimize an objective function") of unit vectors, where squared
    distances are twice the cosine ones. The granularity is the number of groups, each rung a cut of one tree.

    Average linkage comes out worse: it spends cuts on single outliers. All distances are in memory, 800 MB at the most
    nodes that it takes.

    Raises:
        OsmlError: more than 10,000 distinct items.
    """

    n_rungs = 34

    def ladder(self, pool: Pool, seed: int) -> Iterator[tuple[float, np.ndarray]]:
        tree = merge_tree(pool.nodes)
        for number in group_numbers(len(pool.nodes)):
            yield float(number), cut(tree, int(number))

    def of_number(self, pool: Pool, number: int, seed: int) -> np.ndarray:
        return cut(merge_tree(pool.nodes), number)


def merge_tree(nodes: np.ndarray) -> np.ndarray:
    """The M − 1 mergers of unit vectors `(M, D)`, as SciPy has them, but for their heights: 1, 2, … in their order."""
    if len(nodes) > MOST_NODES:
        raise OsmlError(
            f"method 'agglomerative' takes up to {MOST_NODES:,} different items, but there are {len(nodes):,}: "
            "take 'communities'"
        )
    tree = linkage(nodes, "ward") if len(nodes) > 1 else np.empty((0, 4))
    tree[:, 2] = np.arange(1, len(nodes))
    return tree


def cut(tree: np.ndarray, number: int) -> np.ndarray:
    """The groups `(M,)` before the last `number` − 1 mergers; with equal heights SciPy's own cuts make fewer."""
    n_nodes = len(tree) + 1
    if n_nodes == 1:
        return np.zeros(1, dtype=np.int64)
    return fcluster(tree, n_nodes - number, "distance").astype(np.int64) - 1
