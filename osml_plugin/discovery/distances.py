"""Distances that known classes show: what lies apart from them, which links no class has, and what is too near."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from ..nearest import nearest
from .graph import BLOCK

BESIDE = 0.95
"""The share of known items that lie beside another known one; an unknown item that is farther off lies apart."""
WITHIN = 0.99
"""The share of pairs of known items of one class that no link of the graph is longer than."""
PAIRS = 100
"""Pairs drawn for each known item to measure that."""
RANKS = 24
"""Nearest items among which the edge of a set of near-copies is looked for; a larger set is seen as several."""
CHANCE = 1e-3
"""The expected number of such edges in a whole pool of independent items."""
NORMAL = 0.05
"""The share of known items in such sets above which they are no sign of copies."""
NARROWER = 0.9
"""Greatest width of a set of near-copies, in widths of the narrowest known class."""


@dataclass(frozen=True)
class Distances:
    """Euclidean distances between known nodes."""

    beside: float = -np.inf
    """To the nearest other one; `BESIDE` of them have none that is longer."""
    within: float = np.inf
    """Between two of one class; `WITHIN` of the pairs are no longer."""
    width: float = 0.0
    """The same for three quarters of the pairs of the narrowest class."""

    @staticmethod
    def of(nodes: np.ndarray, of_known: np.ndarray, classes: np.ndarray) -> Distances:
        """Measure the nodes `(M, D)` that known items are at, `(K,)`, with their classes `(K,)`. A node alone in its
        class is not asked; where none is left, nothing is known, and these are infinite or 0."""
        of_class, node = np.unique(np.stack([classes, of_known]), axis=1)
        size = np.bincount(of_class)[of_class]
        asked, of_class, size = node[size > 1], of_class[size > 1], size[size > 1]
        if not len(asked):
            return Distances()
        distinct = np.unique(node)
        other = distinct[nearest(nodes[distinct], 2)[:, 1]][np.searchsorted(distinct, asked)]
        beside = np.quantile(np.linalg.norm(nodes[asked] - nodes[other], axis=1), BESIDE, method="higher")
        # The items of a class are one stretch; a step of 1 … size − 1 in it, around its end, leads to another one.
        first = np.searchsorted(of_class, of_class)
        place, rng = np.arange(len(asked)) - first, np.random.default_rng(0)
        steps = 1 + (rng.random((PAIRS, len(asked))) * (size - 1)).astype(np.int64)
        lengths = [np.linalg.norm(nodes[asked] - nodes[asked[first + (place + step) % size]], axis=1) for step in steps]
        by_class = np.split(np.array(lengths), np.flatnonzero(np.diff(of_class)) + 1, axis=1)
        upper = [np.quantile(of_one, 0.75) for of_one in by_class]
        return Distances(float(beside), float(np.quantile(lengths, WITHIN)), float(min(upper)))


def lengths_of(links: csr_matrix, nodes: np.ndarray) -> np.ndarray:
    """The distance `(L,)` between the two nodes of each link, in the order of a COO matrix."""
    links = links.tocoo()
    length = np.empty(links.nnz, dtype=np.float32)
    for start in range(0, links.nnz, BLOCK):
        part = slice(start, start + BLOCK)
        length[part] = np.linalg.norm(nodes[links.row[part]] - nodes[links.col[part]], axis=1)
    return length


def tight_sets(nodes: np.ndarray, near: np.ndarray, of_known: np.ndarray, distances: Distances) -> np.ndarray:
    """The number `(M,)`, from 0, of the set of near-copies that each node is in; most are alone in theirs.

    The distances r₁ ≤ r₂ ≤ … of an item to its neighbors grow without gaps: of independent items in m dimensions
    j·m·log(r_{j+1} / r_j) is standard exponential (Rényi 1953, "On the theory of order statistics"). So a wide gap is
    the edge of a set: a small class, or near-copies of an item. These are narrower than any class that is known, and
    behind the gap, no farther than the items of a class are, are others of their class. A narrow class that stands
    alone has no others there: it stays as it is. Where known items `(K,)` lie in such sets too, these are how classes
    are here, and nothing is taken for copies.

    Args:
        near: `(M, k)` the nearest nodes of each, itself first.
    """
    n_nodes, k = near.shape
    alone = np.arange(n_nodes)
    if k < 4 or not distances.width:
        return alone
    near = near[:, 1:]
    length = np.concatenate(
        [
            np.linalg.norm(nodes[near[i : i + BLOCK // 8]] - nodes[i : i + BLOCK // 8, None], axis=2)
            for i in range(0, n_nodes, BLOCK // 8)
        ]
    )
    length = np.maximum.accumulate(np.maximum(length, 1e-12), axis=1)
    rank = np.arange(1, k - 1)
    gap = np.log(length[:, 1:] / length[:, :-1])
    growth = rank * gap
    dimension = np.log(2) / max(float(np.median(growth)), 1e-12)  # the median is that of an exponential, and edges few
    edge = growth * dimension > np.log(n_nodes * len(rank) / CHANCE)
    edge &= (length[:, :-1] <= NARROWER * distances.width) & (length[:, 1:] <= distances.within)
    last = len(rank) - 1 - edge[:, ::-1].argmax(axis=1)
    reach = np.where(edge.any(axis=1), length[alone, last], 0.0)
    own = length <= np.minimum(reach[:, None], reach[near])
    links = csr_matrix((np.ones(own.sum()), (alone.repeat(own.sum(axis=1)), near[own])), shape=(n_nodes, n_nodes))
    sets = connected_components(links, directed=False)[1]
    copied = np.bincount(sets)[sets] > 1
    return alone if copied[of_known].mean() > NORMAL else sets


def joined_by_class(
    graph: csr_matrix, nodes: np.ndarray, of_known: np.ndarray, distances: Distances
) -> tuple[csr_matrix, np.ndarray]:
    """The links `(M, M)` that items of one class could have, and the unknown nodes `(M,)` bool that lie apart.

    A graph of nearest neighbors links an item to fifteen others, however far they are. So a few items of a new class
    are linked to known ones for want of company, and whatever counts links takes them for known. Distances need no
    company, and known classes say how long they are:

    - An unknown node lies apart if it is farther from the nearest known node than `BESIDE` of the known ones are: its
      conformal p-value is at most 1 − `BESIDE` (Ramaswamy et al. 2000, "Efficient algorithms for mining outliers from
      large data sets"). It keeps no link to known nodes.
    - No link is longer than `WITHIN` of the pairs of known items of one class.

    Where no known class has two items, nothing says how far they lie from one another: all unknown nodes lie apart.
    """
    known = np.zeros(len(nodes), dtype=bool)
    known[of_known] = True
    if not known.any():
        return graph, known
    links, length = graph.tocoo(), lengths_of(graph, nodes)
    to_known = known[links.col]
    nearest_known = np.full(len(nodes), np.inf, dtype=np.float32)
    np.minimum.at(nearest_known, links.row[to_known], length[to_known])
    apart = ~known & (nearest_known > distances.beside)
    kept = (length <= distances.within) & ~(apart[links.row] & to_known) & ~(known[links.row] & apart[links.col])
    return csr_matrix((links.data[kept], (links.row[kept], links.col[kept])), shape=graph.shape), apart
