"""The groups of the unknown items: as fine as a choice says, or as many as somebody says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from ..errors import OsmlError
from .at_home import FEWEST, LEFT_OUT, TOO_FEW, all_known, new_groups, with_company
from .constraints import enforce
from .granularity import BY_HAND, Choice, Counted, alone, by_number, climbed, merge, split
from .graph import own_share
from .methods import Method
from .pool import Pool


@dataclass(frozen=True)
class Grouped:
    """The N unknown items of a pool of M nodes in groups, and what they were taken from."""

    labels: np.ndarray
    """`(N,)` int64 from 0; −1: left out."""
    too_few: np.ndarray
    """`(N,)` bool: left out since there are too few of a kind, not since known ones lie there."""
    groups: np.ndarray
    """`(M,)` the groups of all nodes that say which items lie among known ones; −1: of none."""
    confidence: np.ndarray
    """`(N,)` the share of each item's links that stays in its group."""
    others: list[np.ndarray]
    """Groupings `(N,)` that nearly were taken."""
    counts: tuple[int, int]
    """The fewest and the most new classes that could as well be right."""
    granularity: float
    source: str


def as_chosen(choice: Choice, pool: Pool, in_gallery: np.ndarray, seed: int) -> Grouped:
    """The groups of a choice without those where known items lie, each link of a person kept."""
    fewest = 1 if choice.source == BY_HAND else FEWEST  # a person who asks for fine groups gets them
    new = new_groups(choice.groups, pool, in_gallery, fewest)
    new = with_company(all_known(new, pool, in_gallery), pool, seed)
    too_few, new = new == TOO_FEW, new.clip(LEFT_OUT)
    labels = enforce(pool.graph, pool.of_item, new, pool.links)
    groups = alone(choice.groups)
    confidence = _confidence(pool, groups, _moved(groups[pool.of_item], new, labels))
    too_few &= labels == LEFT_OUT
    confidence[too_few] = 0
    others = [other[pool.of_item] for other in choice.neighbours]
    return Grouped(labels, too_few, choice.groups, confidence, others, choice.counts, choice.granularity, choice.source)


def as_told(
    way: Method,
    pool: Pool,
    in_gallery: np.ndarray,
    seed: int,
    progress: Callable[[float], None],
    counted: Counted,
    number: int,
) -> Grouped:
    """`number` groups of the items that do not lie among known ones where one groups as finely as these say; of all
    items where fewer than `number` would be left, or where nothing is known.

    Groups that are linked most are merged until so many are left (`by_number`).

    Raises:
        OsmlError: cannot-links that take more groups.
    """
    n_items, groups = len(pool.of_item), np.zeros(len(pool.nodes), dtype=np.int64)
    kept, start = np.ones(n_items, dtype=bool), 0.0
    if len(pool.of_known):
        start = 0.5
        ladder = climbed(way, pool, seed, lambda done: progress(start * done), counted)
        groups = alone(ladder.groups[ladder.chosen])
        new = new_groups(groups, pool, in_gallery)
        few = with_company(new, pool, seed) == TOO_FEW  # of a class that is said to be there
        new = (enforce(pool.graph, pool.of_item, new.clip(LEFT_OUT), pool.links) >= 0) | few
        if len(np.unique(pool.links.blocks[new])) >= number:
            kept = new
    inside = pool.only(kept)
    choice = by_number(way, inside, seed, lambda done: progress(start + (1 - start) * done), number)
    mine = exactly(inside, choice.groups, number)
    labels, other = np.full((2, n_items), LEFT_OUT)
    labels[kept], other[kept] = mine, choice.neighbours[0][inside.of_item]
    confidence = np.empty(n_items)
    confidence[kept] = _confidence(inside, choice.groups, mine)
    if not kept.all():
        confidence[~kept] = own_share(pool.graph, groups)[pool.of_item[~kept]]
    return Grouped(
        labels,
        np.zeros(n_items, dtype=bool),
        groups,
        confidence,
        [other],
        choice.counts,
        choice.granularity,
        choice.source,
    )


def exactly(pool: Pool, groups: np.ndarray, number: int) -> np.ndarray:
    """`number` groups `(N,)` of the items, each link of a person kept, from groups `(M,)` of the nodes.

    Where cannot-links cut groups in parts, more of them are merged before; where groups are too few, the largest are
    halved, without tearing what must-links join.

    Raises:
        OsmlError: not even with all in one group before do cannot-links leave so few.
    """
    links = pool.links
    labels = groups[pool.of_item]
    if len(links.must_link) + len(links.cannot_link):
        for n_merged in range(min(number, groups.max() + 1), 0, -1):
            merged = merge(pool.graph, groups, n_merged)[pool.of_item]
            labels = np.unique(enforce(pool.graph, pool.of_item, merged, links), return_inverse=True)[1]
            if labels.max() < number:
                break
        else:
            raise OsmlError(
                f"n_classes is {number}, but with cannot_link no fewer than {labels.max() + 1} were found: ask for "
                "more, or take links back"
            )
    n_items, n_blocks = len(labels), links.n_blocks
    block_of = csr_matrix((np.ones(n_items, np.float32), (links.blocks, np.arange(n_items))))
    of_block = np.empty(n_blocks, dtype=np.int64)
    of_block[links.blocks] = labels
    return split(block_of @ pool.nodes[pool.of_item], of_block, number)[links.blocks]


def _moved(groups: np.ndarray, new: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The group `(N,)` of each item, in the numbers of `groups` `(N,)`, after links moved some from the new groups to
    `labels`; what links founded counts down from −2."""
    number = -2 - np.arange(max(new.max(), labels.max()) + 2)
    number[new] = groups  # that of −1 is not asked for: nothing is moved there
    return np.where(labels != new, number[labels], groups)


def _confidence(pool: Pool, groups: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """The share `(N,)` of each item's links that stays in its group, given the group of each node and of each item."""
    if (moved == groups[pool.of_item]).all():
        return own_share(pool.graph, groups)[pool.of_item]
    # A node for each group that copies of one item are in.
    n_nodes = len(pool.nodes)
    nodes, of_all = np.append(pool.of_item, pool.of_known), np.append(moved, groups[pool.of_known])
    key, unit = np.unique(of_all * n_nodes + nodes, return_inverse=True)
    node = key % n_nodes
    return own_share(pool.graph[node][:, node], key // n_nodes)[unit[: len(moved)]]
