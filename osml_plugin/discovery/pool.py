"""What is grouped: distinct unit vectors, and which items each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix

from ..copies import copy_radius, sets_within
from ..nearest import nearest
from .constraints import Constraints, contract
from .distances import RANKS, Distances, joined_by_class, tight_sets
from .graph import BLOCK, neighbor_graph
from .representation import whitened

SAME = 5
"""Decimals of a unit vector to which two embeddings are taken for the same, before distances are asked."""


@dataclass(frozen=True)
class Pool:
    """Unknown items and known ones together. Copies and near-copies are one node, or else a photograph stored twenty
    times would be a class; nodes are sorted, so that the order of the items does not matter."""

    nodes: np.ndarray
    """`(M, D)` float32, unit vectors, whitened (see `representation.py`); no two are of copies."""
    of_item: np.ndarray
    """`(N,)` int64: the node of each unknown item."""
    of_known: np.ndarray
    """`(K,)` int64: the node of each known item; K may be 0."""
    classes: np.ndarray
    """`(K,)` int64 in 0 … C−1: the class of each known item."""
    links: Constraints
    """What a person said of pairs of the unknown items."""
    unit: np.ndarray | None = None
    """`(M, D)` the nodes before whitening, where distances are measured: a few known items, which whitening was
    made from, lie nearer to one another after it than new items of their classes do. None: as `nodes`."""

    @staticmethod
    def of(items: np.ndarray, known: np.ndarray, classes: np.ndarray, links: Constraints | None = None) -> Pool:
        """The pool of unit vectors `(N, D)` and `(K, D)`. Memory: one copy of both."""
        _, first, node = np.unique(np.concatenate([_keys(items), _keys(known)]), return_index=True, return_inverse=True)
        nodes = np.empty((len(first), items.shape[1]), dtype=np.float32)
        of_items = first < len(items)
        nodes[of_items] = items[first[of_items]]
        nodes[~of_items] = known[first[~of_items] - len(items)]
        nodes.round(SAME, out=nodes)
        nodes, of_node, near = without_copies(nodes, node[len(items) :], classes)
        node = of_node[node]
        # Before whitening: where known classes are one or two, these lie around the origin then, and look wide.
        of_known = node[len(items) :]
        nodes, of_node = one_of_each(nodes, tight_sets(nodes, near, of_known, Distances.of(nodes, of_known, classes)))
        node = of_node[node]
        of_item, of_known = node[: len(items)], node[len(items) :]
        unit = nodes
        nodes = whitened(nodes, nodes[of_known], classes)
        return Pool(nodes, of_item, of_known, classes, links or Constraints.of(None, None, len(items)), unit)

    def only(self, kept: np.ndarray) -> Pool:
        """The unknown items that are `kept` `(N,)` bool, where they are, and no known ones."""
        if kept.all() and not len(self.of_known):
            return self
        used, of_item = np.unique(self.of_item[kept], return_inverse=True)
        return Pool(self.nodes[used], of_item, self.of_known[:0], self.classes[:0], self.links.among(kept))

    def thinned(self, share: float, seed: int) -> Pool:
        """A share of the unknown items, drawn at random, one at least, beside all known ones."""
        drawn = np.random.default_rng(seed).random(len(self.nodes))[self.of_item]
        kept = self.of_item[drawn <= max(share, drawn.min())]
        used, node = np.unique(np.concatenate([kept, self.of_known]), return_inverse=True)
        links = Constraints.of(None, None, len(kept))
        unit = None if self.unit is None else self.unit[used]
        return Pool(self.nodes[used], node[: len(kept)], node[len(kept) :], self.classes, links, unit)

    @property
    def graph(self) -> csr_matrix:
        """`(M, M)` weights of links to nearest neighbors, but for links that no class has (see `apart.py`)."""
        return self._linked[0]

    @property
    def apart(self) -> np.ndarray:
        """`(M,)` bool: the nodes of unknown items that lie apart from all known ones."""
        return self._linked[1]

    @cached_property
    def _linked(self) -> tuple[csr_matrix, np.ndarray]:
        """Made once, for every method and every granularity."""
        unit = self.nodes if self.unit is None else self.unit
        distances = Distances.of(unit, self.of_known, self.classes)
        return joined_by_class(neighbor_graph(self.nodes), unit, self.of_known, distances)

    @cached_property
    def joined(self) -> tuple[csr_matrix, np.ndarray]:
        """The graph `(U, U)` in which items that are linked by a person are one node, and the node `(M,)` of each of
        the others."""
        if not len(self.links.must_link) + len(self.links.cannot_link):
            return self.graph, np.arange(len(self.nodes))
        return contract(self.graph, self.of_item, self.links)


def without_copies(
    nodes: np.ndarray, of_known: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One node of each set of near-copies `(S, D)`, for each of the nodes `(M, D)` its place among these `(M,)`, and
    the nearest of each of these among them `(S, k)`.

    Known items `(K,)` of two classes or more say how near is too near (`copy_radius`); without them it is rounding.
    """
    place = np.arange(len(nodes))
    several = len(np.unique(classes)) > 1  # one alone may be of several kinds, and wide
    radius = copy_radius(nodes[of_known], classes) if several else 0.0
    while True:  # a large set may hang together only when its parts are one
        near = nearest(nodes, min(RANKS + 1, len(nodes)))
        fewer, of_node = one_of_each(nodes, sets_within(nodes, radius, near))
        if len(fewer) == len(nodes):
            return nodes, place, near
        nodes, place = fewer, of_node[place]


def one_of_each(nodes: np.ndarray, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first node of each set `(S, D)`, in their order, and for each of the nodes `(M, D)` its place among these
    `(M,)`."""
    _, first, number = np.unique(sets, return_index=True, return_inverse=True)
    return nodes[np.sort(first)], np.argsort(np.argsort(first))[number]


def _keys(rows: np.ndarray) -> np.ndarray:
    """A number `(N,)` uint64 for each of the rows `(N, D)`: the same for copies, and else another but for one chance in
    2⁶⁴ a pair. Sorting numbers takes a fraction of the time and memory of sorting rows."""
    factors = np.random.default_rng(0).integers(2**64, size=rows.shape[1], dtype=np.uint64)
    blocks = np.split(rows, range(BLOCK, len(rows), BLOCK))
    # Products and sums wrap around, as they are meant to.
    return np.concatenate([np.rint(block * 10**SAME).astype(np.int64).view(np.uint64) @ factors for block in blocks])
