"""What a person knows of pairs of items: these two are of one class (must-link), those two are not (cannot-link)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import coo_matrix, csr_matrix, identity
from scipy.sparse.csgraph import connected_components, dijkstra

from ..errors import OsmlError


@dataclass(frozen=True)
class Constraints:
    """Checked pairs of N items, and what they join."""

    must_link: np.ndarray
    """`(P, 2)` int64: pairs of items of one class."""
    cannot_link: np.ndarray
    """`(Q, 2)` int64: pairs of items of different classes."""
    blocks: np.ndarray
    """`(N,)` int64 from 0: items that must-link joins, directly or by way of others, have the same number."""

    @staticmethod
    def of(must_link: ArrayLike | None, cannot_link: ArrayLike | None, n_items: int) -> Constraints:
        """Check the pairs `(P, 2)` and `(Q, 2)` of item indices (None or empty: no such pairs). Linear time.

        Raises:
            OsmlError: A wrong shape or type, an index outside 0 … n_items−1, or a cannot-link of an item with itself
                or with an item that must-link joins it to.
        """
        must = _pairs(must_link, "must_link", n_items)
        cannot = _pairs(cannot_link, "cannot_link", n_items)
        links = csr_matrix((np.ones(len(must)), (must[:, 0], must[:, 1])), shape=(n_items, n_items))
        blocks = connected_components(links, directed=False)[1].astype(np.int64)
        for a, b in cannot[blocks[cannot[:, 0]] == blocks[cannot[:, 1]]][:1]:
            if a == b:
                raise OsmlError(f"cannot_link has item {a} with itself: a pair is of two different items")
            raise OsmlError(f"items {a} and {b} are cannot-linked, but must-link joins them: take a link back")
        return Constraints(must, cannot, blocks)

    @property
    def n_blocks(self) -> int:
        """How many items there are if those that must-link joins are one."""
        return int(self.blocks.max(initial=-1)) + 1

    def among(self, kept: np.ndarray) -> Constraints:
        """The pairs of which both items are `kept` `(N,)` bool, in the numbers of these alone."""
        place = np.cumsum(kept) - 1
        must, cannot = (place[pairs[kept[pairs].all(axis=1)]] for pairs in (self.must_link, self.cannot_link))
        return Constraints.of(must, cannot, int(kept.sum()))


def confirmed(names: Sequence[Hashable | None]) -> tuple[np.ndarray, np.ndarray]:
    """What a person's names say: must-link `(P, 2)` within a name, cannot-link `(Q, 2)` between any two names.

    A chain through the items of a name, and one item of each to speak for it: with C names of n items in all that is
    n − C must-links and C (C − 1) / 2 cannot-links.

    Args:
        names: `(N,)` the name (or id) that a person gave each item; None: none was given.
    """
    members: dict[Hashable, list[int]] = {}
    for item, name in enumerate(names):
        if name is not None:
            members.setdefault(name, []).append(item)
    must = [pair for items in members.values() for pair in pairwise(items)]
    cannot = list(combinations([items[0] for items in members.values()], 2))
    return np.array(must, dtype=np.int64).reshape(-1, 2), np.array(cannot, dtype=np.int64).reshape(-1, 2)


def contract(graph: csr_matrix, of_item: np.ndarray, constraints: Constraints) -> tuple[csr_matrix, np.ndarray]:
    """The graph in which items joined by must-link are one node, and cannot-linked ones have no link.

    A method that sees only the graph then groups by what a person said too: it draws the neighbours of joined items
    together. It guarantees nothing yet (see `enforce`).

    Args:
        graph: `(M, M)` symmetric weights of links between nodes.
        of_item: `(N,)` the node of each item; copies share one.
        constraints: Those of the N items.

    Returns:
        The sums of the weights `(U, U)`, links within a joined node on the diagonal, and the new node `(M,)` of each
        old one: groups of the old nodes are `groups[new_node]`.
    """
    a, b = of_item[constraints.must_link].T
    new_node = connected_components(csr_matrix((np.ones(len(a)), (a, b)), shape=graph.shape), directed=False)[1]
    member = csr_matrix((np.ones(len(new_node)), (np.arange(len(new_node)), new_node)))
    links = csr_matrix(member.T @ graph @ member).tocoo()
    a, b = np.sort(new_node[of_item[constraints.cannot_link]], axis=1).T
    size = links.shape[0]
    low, high = np.sort(np.stack([links.row, links.col]).astype(np.int64), axis=0)
    kept = ~np.isin(low * size + high, a * size + b)
    return csr_matrix((links.data[kept], (links.row[kept], links.col[kept])), shape=links.shape), new_node


def enforce(graph: csr_matrix, of_item: np.ndarray, labels: np.ndarray, constraints: Constraints) -> np.ndarray:
    """Change a grouping until every constraint holds, and no more than that: the new `(N,)` int64 groups.

    Items joined by must-link go where most of them are (of equals, the group of the lowest number; a new group where
    none is in one). A group with a cannot-link inside is split: each of its items goes with that of the items in
    conflict which is nearest along the graph, a link of weight w being 1/w long. Items in conflict that no cannot-link
    separates stay together, first those whose neighbourhoods are linked most for their size. The largest part keeps
    the number of the group, together with what the graph does not link to any part; the others get numbers from the
    highest on. A group that is in no conflict keeps its items, but for those that must-link takes or brings.

    Time m log m in the links of the torn groups, linear otherwise; memory linear.

    Args:
        graph: `(M, M)` symmetric weights of links between nodes, in (0, 1].
        of_item: `(N,)` the node of each item; copies share one.
        labels: `(N,)` int64 the group of each item, from 0; −1: in no group, and with nothing together.
        constraints: Those of the N items.
    """
    blocks = constraints.blocks
    before, labels = labels, _together(labels, blocks)
    a, b = constraints.cannot_link.T
    clash = (labels[a] == labels[b]) & (labels[a] >= 0)
    if not clash.any():
        return labels
    a, b = blocks[a[clash]], blocks[b[clash]]

    items = np.flatnonzero(np.isin(labels, labels[constraints.cannot_link[clash]]))
    block, node = blocks[items], of_item[items]
    # What moves as one: a block in a constraint; otherwise the copies of an item in a group.
    bound = (np.bincount(blocks)[block] > 1) | np.isin(block, np.append(a, b))
    key = np.stack([bound, labels[items], np.where(bound, block, node)])
    key, unit = np.unique(key, axis=1, return_inverse=True)
    links = links_between(graph, node, unit).tocoo()
    own = key[1][links.row] == key[1][links.col]
    links = csr_matrix((links.data[own], (links.row[own], links.col[own])), shape=links.shape)

    of_block = np.zeros(len(blocks), dtype=np.int64)
    of_block[block] = unit
    seeds, ends = np.unique(of_block[np.stack([a, b])], return_inverse=True)
    nearest = np.full(key.shape[1], -1)
    nearest[seeds] = np.arange(len(seeds))
    nearest = spread(links, nearest)
    part = np.append(_parts(_quotient(links, nearest, len(seeds)), ends.reshape(2, -1)), -1)[nearest][unit]

    reached = part >= 0
    cell = np.stack([labels[items[reached]], part[reached]])
    (group, _), cell, size = np.unique(cell, axis=1, return_inverse=True, return_counts=True)
    by_size = np.lexsort((-size, group))
    keeps = np.zeros(len(size), dtype=bool)
    keeps[by_size[np.append(True, np.diff(group[by_size]) > 0)]] = True
    highest = max(before.max(), labels.max())
    labels[items[reached]] = np.where(keeps, group, highest + np.cumsum(~keeps))[cell]
    return labels


def spread(graph: csr_matrix, labels: np.ndarray) -> np.ndarray:
    """Give every node without a label (−1) that of the labelled node nearest along the graph: `(M,)`.

    A link of weight w is 1/w long; what no labelled node reaches keeps −1. Dijkstra's algorithm from all labelled
    nodes at once: m log m, memory linear.
    """
    seeds = np.flatnonzero(labels >= 0)
    if len(seeds) == 0:
        return labels.copy()
    lengths = graph.copy()
    lengths.data = 1 / lengths.data
    source = dijkstra(lengths, indices=seeds, min_only=True, return_predecessors=True)[2]
    return np.append(labels, -1)[np.maximum(source, -1)]  # −9999: reached by none


def links_between(graph: csr_matrix, node: np.ndarray, unit: np.ndarray) -> csr_matrix:
    """The sums of the weights of the links between U sets of items: `(U, U)`, without those of a set with itself.

    Args:
        graph: `(M, M)` weights of links between nodes.
        node: `(N,)` the node of each item. Items on one node count once in a set; in two sets they are linked by 1.
        unit: `(N,)` the set of each item, 0 … U−1, each used.
    """
    member = csr_matrix((np.ones(len(node)), (node, unit)), shape=(graph.shape[0], unit.max() + 1))
    member.data[:] = 1
    links = csr_matrix(member.T @ (graph + identity(graph.shape[0], format="csr")) @ member)
    links.setdiag(0)
    links.eliminate_zeros()
    return links


def _pairs(pairs: ArrayLike | None, name: str, n_items: int) -> np.ndarray:
    """`pairs` as int64 `(P, 2)`, each from 0 to n_items − 1."""
    try:
        array = np.asarray([] if pairs is None else pairs)
    except ValueError as error:
        raise OsmlError(f"{name} must be pairs of item indices, shape (P, 2): {error}") from error
    if array.size == 0:
        return np.empty((0, 2), dtype=np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise OsmlError(
            f"{name} must be pairs of item indices, integers of shape (P, 2), but is {array.dtype} {array.shape}"
        )
    outside = (array < 0) | (array >= n_items)
    if outside.any():
        raise OsmlError(f"{name} has item {array[outside][0]}, but the {n_items} items count from 0 to {n_items - 1}")
    return array.astype(np.int64)


def _together(labels: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """The groups `(N,)` with each block of several items in one: that of most of them, or a new one."""
    labels = labels.astype(np.int64)
    several = np.bincount(blocks)[blocks] > 1
    (block, group), count = np.unique(np.stack([blocks, labels])[:, several], axis=1, return_counts=True)
    home = np.full(len(blocks), -1)
    order = np.lexsort((-group, np.where(group >= 0, count, 0), block))  # the last of a block is its home
    home[block[order]] = group[order]
    homeless = np.unique(block)
    homeless = homeless[home[homeless] < 0]
    home[homeless] = labels.max(initial=-1) + 1 + np.arange(len(homeless))
    labels[several] = home[blocks[several]]
    return labels


def _quotient(links: csr_matrix, cells: np.ndarray, n_cells: int) -> coo_matrix:
    """The links between cells of nodes, over what chance would put there: `(n_cells, n_cells)`."""
    inside = np.flatnonzero(cells >= 0)
    member = csr_matrix((np.ones(len(inside)), (inside, cells[inside])), shape=(len(cells), n_cells))
    between = csr_matrix(member.T @ links @ member).tocoo()
    weight = np.bincount(between.row, between.data, n_cells)
    between.data /= weight[between.row] * weight[between.col]
    return between


def _parts(linked: coo_matrix, conflicts: np.ndarray) -> np.ndarray:
    """The part `(S,)`, from 0, of each of S seeds, so that no two in conflict `(2, Q)` share one; there is no smaller
    number of parts by joining two whole ones.

    Greedy, in two rounds: what is linked most is joined first, then colours are given out, first to the parts with the
    most conflicts (Welsh & Powell 1967).
    """
    foes: list[set[int]] = [set() for _ in range(conflicts.max() + 1)]
    for a, b in conflicts.T.tolist():
        foes[a].add(b)
        foes[b].add(a)
    part = list(range(len(foes)))
    members = [[seed] for seed in part]

    for i in np.lexsort((linked.col, linked.row, -linked.data)):
        a, b = part[linked.row[i]], part[linked.col[i]]
        if a == b or b in foes[a]:
            continue
        if len(members[a]) < len(members[b]):
            a, b = b, a
        for seed in members[b]:
            part[seed] = a
        members[a] += members[b]
        for foe in foes[b]:
            foes[foe].discard(b)
            foes[foe].add(a)
        foes[a] |= foes[b]

    colour: dict[int, int] = {}
    for a in sorted(set(part), key=lambda a: (-len(foes[a]), a)):
        taken = {colour.get(foe) for foe in foes[a]}
        colour[a] = next(c for c in range(len(taken) + 1) if c not in taken)
    return np.array([colour[a] for a in part])
