"""What is grouped: distinct unit vectors, and which items each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix

from .graph import neighbor_graph

SAME = 5
"""Decimals of a unit vector to which two embeddings are taken for copies of one item."""


@dataclass(frozen=True)
class Pool:
    """Unknown items and known ones together. Copies are one node, or else a photograph stored twenty times would be a
    class; nodes are sorted, so that the order of the items does not matter."""

    nodes: np.ndarray
    """`(M, D)` float32, unit vectors, all different."""
    of_item: np.ndarray
    """`(N,)` int64: the node of each unknown item."""
    of_known: np.ndarray
    """`(K,)` int64: the node of each known item; K may be 0."""
    classes: np.ndarray
    """`(K,)` int64 in 0 … C−1: the class of each known item."""

    @staticmethod
    def of(items: np.ndarray, known: np.ndarray, classes: np.ndarray) -> Pool:
        """The pool of unit vectors `(N, D)` and `(K, D)`."""
        nodes, node = np.unique(np.concatenate([items, known]).round(SAME) + 0.0, axis=0, return_inverse=True)
        return Pool(nodes, node[: len(items)], node[len(items) :], classes)

    @cached_property
    def graph(self) -> csr_matrix:
        """`(M, M)` weights of links to nearest neighbours; made once, for every method and every granularity."""
        return neighbor_graph(self.nodes)
