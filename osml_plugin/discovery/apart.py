"""Unknown items that lie apart from all known ones, and links that are too long to join items of one class."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from .graph import BLOCK, nearest

BESIDE = 0.95
"""The share of known items that lie beside another known one; an unknown item that is farther off lies apart."""
WITHIN = 0.99
"""The share of pairs of known items of one class that no link of the graph is longer than."""
PAIRS = 100
"""Pairs drawn for each known item to estimate that."""


def joined_by_class(
    nodes: np.ndarray, graph: csr_matrix, of_known: np.ndarray, classes: np.ndarray
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

    Args:
        nodes: `(M, D)` distinct vectors.
        graph: `(M, M)` their links to nearest neighbors, in both directions.
        of_known: `(K,)` the node of each known item; K may be 0.
        classes: `(K,)` their classes.
    """
    known = np.zeros(len(nodes), dtype=bool)
    known[of_known] = True
    if not known.any():
        return graph, known
    beside, within = reaches(nodes, of_known, classes)
    links = graph.tocoo()
    length = np.empty(links.nnz, dtype=np.float32)
    for start in range(0, links.nnz, BLOCK):
        part = slice(start, start + BLOCK)
        length[part] = np.linalg.norm(nodes[links.row[part]] - nodes[links.col[part]], axis=1)
    to_known = known[links.col]
    distance = np.full(len(nodes), np.inf, dtype=np.float32)
    np.minimum.at(distance, links.row[to_known], length[to_known])
    apart = ~known & (distance > beside)
    kept = (length <= within) & ~(apart[links.row] & to_known) & ~(known[links.row] & apart[links.col])
    return csr_matrix((links.data[kept], (links.row[kept], links.col[kept])), shape=graph.shape), apart


def reaches(nodes: np.ndarray, of_known: np.ndarray, classes: np.ndarray) -> tuple[float, float]:
    """How far known nodes lie from the nearest other one (the quantile `BESIDE`), and from others of their class
    (`WITHIN`); a node alone in its class is not asked. Minus and plus infinity where none is left."""
    of_class, node = np.unique(np.stack([classes, of_known]), axis=1)
    size = np.bincount(of_class)[of_class]
    asked, of_class, size = node[size > 1], of_class[size > 1], size[size > 1]
    if not len(asked):
        return -np.inf, np.inf
    distinct = np.unique(node)
    beside = distinct[nearest(nodes[distinct], 2)[:, 1]][np.searchsorted(distinct, asked)]
    # The items of a class are one stretch; a step of 1 … size − 1 in it, around its end, leads to another one.
    first = np.searchsorted(of_class, of_class)
    place, rng = np.arange(len(asked)) - first, np.random.default_rng(0)
    lengths = []
    for _ in range(PAIRS):
        step = 1 + (rng.random(len(asked)) * (size - 1)).astype(np.int64)
        lengths.append(np.linalg.norm(nodes[asked] - nodes[asked[first + (place + step) % size]], axis=1))
    return (
        float(np.quantile(np.linalg.norm(nodes[asked] - nodes[beside], axis=1), BESIDE, method="higher")),
        float(np.quantile(lengths, WITHIN)),
    )
