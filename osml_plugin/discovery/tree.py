"""Groups from coarse to fine, so that a person can merge some and split others."""

from __future__ import annotations

import heapq
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, diags
from sklearn.cluster import AgglomerativeClustering
from sklearn.neighbors import kneighbors_graph
from tqdm import tqdm

from ..errors import OsmlError
from .constraints import links_between
from .graph import N_NEIGHBORS, communities, mergers

FEW = 5
"""The fewest items of a part of a group; a smaller one joins the part that it is linked to most."""
PARTS = 8
"""The most parts of a group: what a person can look at."""
TINY = 1e-9
"""The least weight of a group's own links; Paris would take none for 1."""
DEEPEST = 100
"""Levels of `Tree.to_dict`: programs that read JSON refuse some hundreds."""


@dataclass(frozen=True)
class Tree:
    """A binary tree of K groups over N items, and which of them stand now. It never changes: `merge` and `split` answer
    with a new one, in which every group that stands keeps its number."""

    children: np.ndarray
    """`(K, 2)` int64: the two halves of each group; −1, −1: a leaf."""
    heights: np.ndarray
    """`(K,)` float64 in [0, 1]: how little the two halves are linked, 0.5 being as much as chance would link them and
    1 not at all; 0 for a leaf. No child is higher than its parent. Of a height h, modularity (of the items' graph)
    keeps the halves apart at resolutions above (1 − h) / h."""
    leaf_of: np.ndarray
    """`(N,)` int64: the leaf of each item; −1: left out."""
    groups: tuple[int, ...]
    """The groups that stand now, in rising order: each item that is not left out is in exactly one."""

    @staticmethod
    def of(graph: csr_matrix, nodes: np.ndarray, of_item: np.ndarray, labels: np.ndarray, seed: int = 0) -> Tree:
        """The tree above and below a grouping.

        Above, the two groups that are linked most for their size are merged, again and again, to one root (Paris:
        Bonald et al. 2018, "Hierarchical graph clustering using node pair sampling"); what has no link at all, last,
        that of the nearest means first. Below, each group is split into its own communities (Louvain, resolution 1, on
        its links alone): at most `PARTS`, of at least `FEW` items each, merged likewise.

        Time near-linear in items and links; quadratic in the groups where thousands are linked to one. Memory linear.

        Args:
            graph: `(M, M)` symmetric weights of links between nodes.
            nodes: `(M, D)` the unit vectors of the nodes.
            of_item: `(N,)` the node of each item; copies share one.
            labels: `(N,)` the group of each item, 0 … G−1, each used; −1: left out. Groups keep these numbers in the
                tree and stand; those above count on from G, those below from 2 G − 1.
            seed: Of the community search.
        """
        inside = np.flatnonzero(labels >= 0)
        n_groups = int(labels.max(initial=-1)) + 1
        if (np.bincount(labels[inside], minlength=n_groups) == 0).any():
            raise OsmlError("labels skip a number: groups count from 0, and each has at least one item")
        leaf_of = np.full(len(labels), -1)
        if n_groups == 0:
            return Tree(np.empty((0, 2), dtype=np.int64), np.empty(0), leaf_of, ())

        # Units: the copies of an item in a group.
        node = of_item[inside]
        key, unit, copies = np.unique(labels[inside] * graph.shape[0] + node, return_inverse=True, return_counts=True)
        group = key // graph.shape[0]
        links = links_between(graph, node, unit)
        degree = np.asarray(links.sum(axis=1)).ravel()

        vectors = nodes[key % graph.shape[0]]
        steps = tqdm(total=3, desc="tree", delay=2, leave=False)
        parts = _communities(links, group, copies, seed)
        steps.update()
        of_part = np.zeros(parts.max() + 1, dtype=np.int64)
        of_part[parts] = group
        n_parts = len(of_part)
        above, heights = _merges(links, group, degree, vectors, np.zeros(n_groups, dtype=np.int64))
        steps.update()
        below, height = _merges(links, parts, degree, vectors, of_part)
        steps.close()

        children = [[-1, -1]] * n_groups + above.tolist()
        heights = [0.0] * n_groups + heights.tolist()
        number = np.full(n_parts + len(below), -1)  # in the tree, of the parts and of what is merged from them
        halved = np.zeros(n_groups, dtype=np.int64)
        of_pair = of_part[_first_leaf(below, n_parts)]
        for i in reversed(range(len(below))):
            g, both = of_pair[i], below[i]
            whole = number[n_parts + i] if number[n_parts + i] >= 0 else g
            if halved[g] == PARTS - 1:
                number[both] = whole
                continue
            halved[g] += 1
            number[both] = len(children), len(children) + 1
            children[whole], heights[whole] = number[both].tolist(), float(height[i])
            children += [[-1, -1], [-1, -1]]
            heights += [0.0, 0.0]
        number = np.where(number[:n_parts] >= 0, number[:n_parts], of_part)
        leaf_of[inside] = number[parts][unit]
        children = np.array(children, dtype=np.int64)
        return Tree(children, _lowered(children, np.array(heights)), leaf_of, tuple(range(n_groups)))

    @cached_property
    def parent(self) -> np.ndarray:
        """`(K,)` int64: the group that each is a half of; −1: the root."""
        parent = np.full(len(self.children), -1)
        inner = np.flatnonzero(self.children[:, 0] >= 0)
        parent[self.children[inner]] = inner[:, None]
        return parent

    @property
    def n_leaves(self) -> int:
        """How many groups there can be at most."""
        return int((self.children[:, 0] < 0).sum())

    @cached_property
    def sizes(self) -> np.ndarray:
        """`(K,)` int64: how many items are in each group."""
        sizes = np.bincount(self.leaf_of[self.leaf_of >= 0], minlength=len(self.children))
        for group in reversed(_from_the_root(self.children)):
            if self.children[group, 0] >= 0:
                sizes[group] = sizes[self.children[group]].sum()
        return sizes

    @property
    def labels(self) -> np.ndarray:
        """`(N,)` int64: the group of each item among those that stand; −1: left out."""
        return self._labels(self.groups)

    def cut(self, n_classes: int) -> np.ndarray:
        """The labels `(N,)`, 0 … n_classes−1 from the largest group on, −1 left out, of so many groups.

        The groups that stand are merged from the lowest on, or split from the highest on: fewer groups never cut
        through one that stands, and more never join two.

        Raises:
            OsmlError: `n_classes` outside 1 … `n_leaves`.
        """
        if not 1 <= n_classes <= self.n_leaves:
            raise OsmlError(
                f"the tree has no cut into {n_classes} groups: it has {self.n_leaves} leaves, so give 1 to that many"
            )
        above = set()
        for group in self.groups:
            while (group := int(self.parent[group])) >= 0 and group not in above:
                above.add(group)
        root = int(np.flatnonzero(self.parent < 0)[0])
        groups, queue = {root}, [(root not in above, 0.0, -root)]
        while len(groups) < n_classes:
            group = -heapq.heappop(queue)[2]  # of equal heights the last that was merged is the first to be split
            if self.children[group, 0] < 0:
                continue
            groups.remove(group)
            for child in self.children[group].tolist():
                groups.add(child)
                heapq.heappush(queue, (child not in above, -float(self.heights[child]), -child))
        groups = np.array(sorted(groups))
        rank = np.full(len(self.children) + 1, -1)  # −1 finds the last
        rank[groups[np.argsort(-self.sizes[groups], kind="stable")]] = np.arange(n_classes)
        return rank[self._labels(groups)]

    def split(self, group: int) -> Tree:
        """The tree in which the halves of a group stand in its place.

        Raises:
            OsmlError: The group does not stand, or is a leaf.
        """
        self._check_stands(group)
        if self.children[group, 0] < 0:
            raise OsmlError(f"group {group} cannot be split: no part of its {self.sizes[group]} items stands apart")
        return self._standing({group}, self.children[group].tolist())

    def merge(self, *groups: int) -> Tree:
        """The tree in which one group stands in the place of several, wherever they were: a new number, see `groups`.

        The others move to the side of the first one; what each of them was a half of is no more, and its number is
        the number of the merged group.

        Raises:
            OsmlError: Fewer than two groups, one of them twice, or one that does not stand.
        """
        if len(set(groups)) < 2 or len(set(groups)) < len(groups):
            raise OsmlError(f"merge takes two or more different groups, but was given {list(groups)}")
        for group in groups:
            self._check_stands(group)
        children, heights, parent = self.children.copy(), self.heights.copy(), self.parent.copy()

        def put(group: int, above: int, instead_of: int) -> None:
            parent[group] = above
            if above >= 0:
                children[above][children[above] == instead_of] = group

        merged, *others = groups
        for other in others:
            joint = parent[other]
            if parent[merged] != joint:
                put(children[joint].sum() - other, parent[joint], instead_of=joint)
                put(joint, parent[merged], instead_of=merged)
                children[joint] = merged, other
                parent[[merged, other]] = joint
            heights[joint] = max(heights[merged], heights[other])
            merged = int(joint)
        return replace(self, children=children, heights=_lowered(children, heights))._standing(set(groups), [merged])

    def to_dict(self) -> dict[str, Any]:
        """Nested, for JSON: `id`, `size`, `height`, `stands` (now), and `children`, of the root; {} without groups.

        What lies deeper than 100 levels follows as leaves of the last one.
        """
        if not self.groups:
            return {}
        stands = set(self.groups)

        def entry(group: int, depth: int) -> dict[str, Any]:
            below = self.children[group].tolist() if self.children[group, 0] >= 0 else []
            if depth == DEEPEST:
                below = [leaf for leaf in _from_the_root(self.children, group) if self.children[leaf, 0] < 0 and below]
            return {
                "id": int(group),
                "size": int(self.sizes[group]),
                "height": float(self.heights[group]),
                "stands": group in stands,
                "children": [entry(child, depth + 1) for child in below],
            }

        return entry(int(np.flatnonzero(self.parent < 0)[0]), 0)

    def _check_stands(self, group: int) -> None:
        if group not in self.groups:
            raise OsmlError(f"group {group} does not stand: choose from {', '.join(map(str, self.groups))}")

    def _standing(self, gone: set[int], new: list[int]) -> Tree:
        return replace(self, groups=tuple(sorted(set(self.groups) - gone | set(new))))

    def _labels(self, groups: np.ndarray | tuple[int, ...]) -> np.ndarray:
        """`(N,)`: which of these groups, none below another, each item is in."""
        group_of = np.full(len(self.children) + 1, -1)  # −1 finds the last
        for group in groups:
            group_of[_from_the_root(self.children, group)] = group
        return group_of[self.leaf_of]


def _from_the_root(children: np.ndarray, root: int | None = None) -> list[int]:
    """A group and all below it, parents before children; of the whole tree if none is named."""
    if root is None:
        root = next(iter(np.setdiff1d(np.arange(len(children)), children)), None)
        if root is None:
            return []
    order, queue = [], [int(root)]
    while queue:
        order.append(queue.pop())
        queue += [child for child in children[order[-1]].tolist() if child >= 0]
    return order


def _lowered(children: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The heights `(K,)`, none above its parent's: what the graph and a person put together comes first."""
    heights = heights.copy()
    for group in _from_the_root(children):
        if children[group, 0] >= 0:
            heights[children[group]] = np.minimum(heights[children[group]], heights[group])
    return heights


def _communities(links: csr_matrix, groups: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
    """The part `(U,)`, from 0, of each unit: the communities of its group's own links, of at least `FEW` items each.

    Smaller ones join that to which they are linked most (or the largest); of fewer than two there is but one part.
    """
    own = _own(links, groups)
    weight = np.bincount(groups, np.asarray(own.sum(axis=1)).ravel())
    # With all groups of one weight, resolution G is resolution 1 in each, and one search is enough for all.
    scale = np.divide(1, weight, out=np.zeros(len(weight)), where=weight > 0)
    parts = communities(csr_matrix(diags(scale[groups]) @ own), float(len(weight)), seed)

    parts = np.unique(parts * len(weight) + groups, return_inverse=True)[1]
    of_part = np.zeros(parts.max() + 1, dtype=np.int64)
    of_part[parts] = groups
    size = np.bincount(parts, sizes)
    large = size >= FEW
    biggest = np.zeros(len(weight), dtype=np.int64)
    order = np.argsort(size, kind="stable")
    biggest[of_part[order]] = order  # the largest is written last
    large[biggest] = True
    member = csr_matrix((large[parts].astype(float), (np.arange(len(parts)), parts)), shape=(len(parts), len(size)))
    part = csr_matrix((np.ones(len(parts)), (np.arange(len(parts)), parts)))
    to_large = csr_matrix(part.T @ own @ member)
    linked = np.asarray(to_large.sum(axis=1)).ravel() > 0
    home = np.where(linked, np.asarray(to_large.argmax(axis=1)).ravel(), biggest[of_part])
    home[large] = np.flatnonzero(large)
    return np.unique(home[parts], return_inverse=True)[1]


def _merges(
    links: csr_matrix, parts: np.ndarray, degree: np.ndarray, vectors: np.ndarray, within: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merge P parts of the units until each set of parts is one: pairs `(P − sets, 2)`, the i-th of which becomes
    number P + i, and their heights.

    Of all links, chance would put w₁ w₂ / w between two parts (w: the degrees of all units in them; and in total); the
    height is chance over chance plus links. The next pair is that of the smallest height (Paris); last, what has no
    links, that of the nearest means.

    Args:
        links: `(U, U)` weights of links between units.
        parts: `(U,)` the part of each unit.
        degree: `(U,)` the weight of each unit's links.
        vectors: `(U, D)` the unit vector of each unit.
        within: `(P,)` the set of each part.
    """
    n = len(within)
    member = csr_matrix((np.ones(len(parts)), (np.arange(len(parts)), parts)))
    between = _own(csr_matrix(member.T @ links @ member), within)
    between = csr_matrix(between - diags(between.diagonal()))
    between.eliminate_zeros()
    pairs, heights = [], []
    if between.nnz:
        inner = np.bincount(parts, degree) - np.asarray(between.sum(axis=1)).ravel()
        merges = mergers(csr_matrix(between + diags(np.maximum(inner, TINY))))
        merges = merges[np.isfinite(merges[:, 2])]
        pairs, heights = merges[:, :2].astype(int).tolist(), (merges[:, 2] / (1 + merges[:, 2])).tolist()
    total, of = list(member.T.astype(vectors.dtype) @ vectors), within.tolist()  # by cosine the same as the mean
    for a, b in pairs:
        total.append(total[a] + total[b])
        of.append(of[a])
    roots: dict[int, list[int]] = {}
    for root in sorted(set(range(n + len(pairs))).difference(*pairs)):
        roots.setdefault(of[root], []).append(root)
    for apart in roots.values():
        for a, b in _nearest_first(np.array([total[root] for root in apart])).tolist():
            apart.append(n + len(pairs))
            pairs.append([apart[a], apart[b]])
            heights.append(1.0)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2), np.array(heights)


def _nearest_first(vectors: np.ndarray) -> np.ndarray:
    """Merge C vectors `(C, D)` to one: pairs `(C − 1, 2)`, the i-th of which becomes number C + i.

    The next pair is that of the smallest mean cosine distance, among neighbours: memory stays linear.
    """
    if len(vectors) < 3:
        return np.arange(2 * len(vectors) - 2).reshape(-1, 2)
    near = kneighbors_graph(vectors, min(N_NEIGHBORS, len(vectors) - 1), metric="cosine")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the number of connected components")  # it links them by their nearest
        return AgglomerativeClustering(metric="cosine", linkage="average", connectivity=near).fit(vectors).children_


def _own(links: csr_matrix, groups: np.ndarray) -> csr_matrix:
    """The links `(U, U)` that do not leave a group."""
    links = links.tocoo()
    own = groups[links.row] == groups[links.col]
    return csr_matrix((links.data[own], (links.row[own], links.col[own])), shape=links.shape)


def _first_leaf(pairs: np.ndarray, n: int) -> np.ndarray:
    """One of the first n numbers that is in each pair; the i-th pair is number n + i."""
    first = list(range(n))
    for a, _ in pairs.tolist():
        first.append(first[a])
    return np.array(first[n:], dtype=np.int64)
