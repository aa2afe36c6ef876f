"""Which of the unknown items lie among known ones after all."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from .granularity import alone
from .graph import communities, own_share
from .pool import Pool

AT_HOME = 3
"""A group lies among known items if it has this many times as many of the gallery as unknown ones, or if it is this
many times as frequent among all known items as among the unknown ones, and has at least two of them: where few are
known, a single one that strays there is a large share of them."""
AMONG = 0.5
"""Unknown items are all known if they have this share of the links to the gallery that known ones would have: between
0.0 to 0.1 for pools of new classes with some known items in them, and 0.6 to 1.1 for pools that were all known."""
MOST = 0.5
"""The share of a group's items that lie apart where it is not known, whatever the others are."""
FAINT = 1e-9
"""What an item of its group counts for against a link of its own, when an item's known class is told."""
FEWEST = 5
"""The fewest different items that are a class, where there are known ones that they could belong to as well."""
LEFT_OUT = -1
TOO_FEW = -2


def new_groups(groups: np.ndarray, pool: Pool, in_gallery: np.ndarray, fewest: int = FEWEST) -> np.ndarray:
    """The groups of the unknown items `(N,)` from 0; −1 for those of no group, and where known ones lie; −2 for groups
    of fewer than `fewest` items.

    Shares are compared as well as numbers: there may be many more known items than unknown ones, or fewer. Copies count
    once.

    Args:
        groups: `(M,)` the group of each node, from 0; −1: of none.
        in_gallery: `(K,)` bool: the known items whose class can be recognised.
    """
    n_groups = int(groups.max()) + 1

    def sizes(nodes: np.ndarray) -> np.ndarray:
        of_each = groups[np.unique(nodes)]
        return np.bincount(of_each[of_each >= 0], minlength=n_groups)

    unknown, known, gallery = map(sizes, (pool.of_item, pool.of_known, pool.of_known[in_gallery]))
    frequent = (known > 1) & (_share(known) > AT_HOME * _share(unknown))
    new = (unknown > 0) & (AT_HOME * unknown > gallery) & ~frequent
    few = new & (len(pool.of_known) > 0) & (unknown + known < fewest)
    new &= ~few
    number = np.where(new, np.cumsum(new) - 1, np.where(few, TOO_FEW, LEFT_OUT))
    return np.append(number, LEFT_OUT)[groups[pool.of_item]]


def with_company(new: np.ndarray, pool: Pool, seed: int) -> np.ndarray:
    """The groups `(N,)` of `new_groups`, in which items that lie apart from known ones and are in none have the company
    of one another: communities of `FEWEST` of them or more are groups, if most of their links stay inside, since a
    twentieth of known items lies apart, too, and is linked to the others; smaller ones are −2."""
    loose = pool.apart.copy()
    loose[pool.of_item[new >= 0]] = False
    loose = np.flatnonzero(loose)
    if not len(loose):
        return new
    found = communities(pool.graph[loose][:, loose], 1.0, seed)
    large = np.bincount(found) >= FEWEST
    of_all = np.arange(len(pool.nodes)) + len(large)
    of_all[loose] = found
    own = np.bincount(found, own_share(pool.graph, of_all)[loose]) / np.bincount(found)
    new_class = large & (own >= MOST)
    number = np.where(new_class, max(new.max(), LEFT_OUT) + np.cumsum(new_class), np.where(large, LEFT_OUT, TOO_FEW))
    of_node = np.full(len(pool.nodes), LEFT_OUT)
    of_node[loose] = number[found]
    return np.where(of_node[pool.of_item] != LEFT_OUT, of_node[pool.of_item], new)


def lacking(too_few: np.ndarray, pool: Pool) -> int:
    """How many more different items the largest set of those `(N,)` bool that are too few, and linked, would take to be
    a group; 0 where there are none."""
    nodes = np.unique(pool.of_item[too_few])
    if not len(nodes):
        return 0
    linked = np.bincount(connected_components(pool.graph[nodes][:, nodes], directed=False)[1])
    return max(FEWEST - int(linked.max()), 1)


def all_known(new: np.ndarray, pool: Pool, in_gallery: np.ndarray) -> np.ndarray:
    """The groups `(N,)` without those that lie among known ones where the unknown items do so as a whole (see
    `among_known`): all but the groups most items of which lie apart."""
    if among_known(pool, in_gallery) < AMONG:
        return new
    n_groups = int(new.max(initial=-1)) + 1
    inside = new >= 0
    (group, node) = np.unique(np.stack([new[inside], pool.of_item[inside]]), axis=1)
    apart = np.bincount(group, pool.apart[node], n_groups) / np.maximum(np.bincount(group, minlength=n_groups), 1)
    number = np.where(apart >= MOST, np.cumsum(apart >= MOST) - 1, LEFT_OUT)
    return np.where(inside, np.append(number, LEFT_OUT)[new.clip(LEFT_OUT)], new)


def among_known(pool: Pool, in_gallery: np.ndarray) -> float:
    """How much of an unknown item's links lead to the gallery `(K,)` bool rather than to other unknown ones, over what
    it would be if all were of the same classes, in the median: near 0 for new classes, near 1 for known ones.

    The nearest-neighbour test of two samples (Schilling 1986, "Multivariate two-sample tests based on nearest
    neighbors"), on the graph. The median, since a few known items beside few of the gallery count for many times one.
    """
    unknown, gallery = np.zeros((2, len(pool.nodes)), dtype=bool)
    unknown[pool.of_item] = True
    gallery[pool.of_known[in_gallery]] = True  # and unknown, too, where one is a copy of the other
    if not gallery.any():
        return 0.0
    links = pool.graph[np.flatnonzero(unknown)]
    to_gallery, to_unknown = links @ gallery, links @ unknown
    both = to_gallery + to_unknown
    share = np.divide(to_gallery, both, out=np.zeros_like(both), where=both > 0)
    chance = gallery.sum() / (gallery.sum() + unknown.sum() - 1)
    return float(np.median(share)) / chance


def _share(counts: np.ndarray) -> np.ndarray:
    return counts / max(counts.sum(), 1)


def known_class(pool: Pool, groups: np.ndarray, labels: np.ndarray, names: np.ndarray) -> np.ndarray:
    """The name `(N,)` of the class that most links of an item left out lead to, or, where none leads to a known item,
    that most known items of its group are of; None for items of new classes, and where there is neither."""
    found = np.full(len(labels), None, dtype=object)
    left = np.flatnonzero(labels == LEFT_OUT)
    if len(left) and len(names):
        group, ones = alone(groups), np.ones(len(pool.classes))
        of_class = csr_matrix((ones, (pool.of_known, pool.classes)), shape=(len(groups), len(names)))
        of_group = csr_matrix((ones, (group[pool.of_known], pool.classes)), shape=(group.max() + 1, len(names)))
        nodes = pool.of_item[left]
        votes = (pool.graph[nodes] @ of_class + of_class[nodes] + FAINT * of_group[group[nodes]]).tocsr()
        any_vote = np.diff(votes.indptr) > 0
        found[left[any_vote]] = names[np.asarray(votes[any_vote].argmax(axis=1)).ravel()]
    return found
