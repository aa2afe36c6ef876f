"""From embeddings of unknown items to proposed classes, their number included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix

from ..errors import OsmlError
from ..metrics.checks import check_vector
from ..registry import checked_number, refusing
from .constraints import Constraints, enforce
from .granularity import alone, by_evidence, by_hand, by_number, persistence, split
from .graph import own_share
from .methods import create
from .pool import Pool
from .tree import Tree

AT_HOME = 3
"""A group lies among known items if it has this many times as many of the gallery as unknown ones, or if it is this
many times as frequent among all known items as among the unknown ones."""
AMONG = 0.5
"""Unknown items are all known if they have this share of the links to the gallery that known ones would have: between
0.0 to 0.1 for pools of new classes with some known items in them, and 0.6 to 1.1 for pools that were all known."""
FAINT = 1e-9
"""What an item of its group counts for against a link of its own, when an item's known class is told."""
N_EXEMPLARS = 9
HIGHEST_SEED = 2**31
LEFT_OUT = -1
ALL_KNOWN = "all items lie among known classes"
ALL_NOISE = "the method takes all items for noise"


@dataclass(frozen=True)
class Discovery:
    """Proposed classes of N unknown items."""

    labels: np.ndarray
    """`(N,)` int64: 0 … n_classes−1, the largest class first; -1: left out, since it lies among known items, or since
    the method took it for noise."""
    n_classes: int
    """0: nothing is proposed; `note` says why."""
    confidence: np.ndarray
    """`(N,)` float64 in [0, 1]: the share of the item's links to its nearest neighbours, weighted by how many
    neighbours both share, that stay in its group; for an item left out, in the group of known items where it lies. Of
    noise it is 0."""
    exemplars: tuple[np.ndarray, ...]
    """For each class the indices of up to 9 different items, those nearest to the mean of its different items first."""
    n_classes_interval: tuple[int, int]
    """The fewest and the most classes among the groupings that fit the known classes up to two standard errors of the
    best, and the chosen one; without known classes among all stable ones."""
    granularity: float
    """Of the grouping, in the method's terms, higher being finer: of communities the resolution of modularity, on the
    graph of these items."""
    granularity_source: str
    """'known classes', 'given n_classes', 'given granularity', or 'default': the finest stable grouping, where there
    are not two known classes, or all are of one item."""
    group_confidence: np.ndarray
    """`(n_classes,)` float64 in [0, 1]: how much of the class stays together in the next coarser and the next finer
    grouping (mean best Jaccard index); with `n_classes`, in the grouping from another seed."""
    known_class: np.ndarray
    """`(N,)` objects: the known class, as given in `known_labels`, where an item left out lies; None for all others."""
    note: str
    """Why nothing is proposed, or empty."""
    pool: Pool = field(repr=False)
    """What was grouped, and its graph."""

    @cached_property
    def tree(self) -> Tree:
        """The classes from coarse to fine, to split and to merge them; made when it is first asked for (about 10 s for
        100,000 items)."""
        return Tree.of(self.pool.graph, self.pool.nodes, self.pool.of_item, self.labels)


def discover(
    embeddings: ArrayLike | torch.Tensor,
    known_embeddings: ArrayLike | torch.Tensor | None = None,
    known_labels: ArrayLike | torch.Tensor | None = None,
    *,
    in_gallery: ArrayLike | None = None,
    n_classes: int | None = None,
    method: str = "auto",
    granularity: float | None = None,
    must_link: ArrayLike | None = None,
    cannot_link: ArrayLike | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Discovery:
    """Group unknown items into the classes that they are, and count the classes.

    Embeddings are whitened by how the known classes vary (`representation.py`). A graph links every item, known ones
    included, to its 15 nearest; its communities (Louvain) are groups, and a resolution says how fine. Of 24 resolutions
    the middle one is taken of those that group the known items about as well by class as the best one does (B-cubed F,
    weighted by the standard error of the difference). Where unknown groups have more items than known classes, that is
    asked of pools that are thinned until they have as many, and it is the number of classes that is taken over.

    A group is left out, as one of wrongly rejected known items, if it has three times as many items of the gallery as
    unknown ones, or a share of all known items three times that of all unknown ones. If the unknown items have, in
    the median, at least half as many links to the gallery as they would have if they were of its classes, all are.

    With `n_classes` the known items play no part beyond the whitening: the coarsest resolution with at least so many
    groups is taken, and the groups that are linked most are merged; nothing is left out.

    Time and memory are about linear: neighbours are searched exactly up to 10,000 items, and above among some 10,000
    candidates each. A class in several parts, of more than 15 items each and far from one another, is found as several.

    Args:
        embeddings: `(N, D)` items of unknown classes; wrongly rejected known items may be among them.
        known_embeddings: `(M, D)` items of known classes that **training did not see**, since classes trained on are
            tighter than new ones. Pseudo-unknown classes tell the most. None: the finest grouping is taken that
            agrees with the next coarser and finer ones (mean adjusted Rand index at least 0.9).
        known_labels: `(M,)` their classes, integers or strings.
        in_gallery: `(M,)` bool: those whose class can be recognised already, None = all. The others (of pseudo-unknown
            classes, say) may be found as new classes, where they are as frequent among the unknown items.
        n_classes: The number of classes, where it is known: then there are exactly so many.
        method: `methods.names()`, or auto (communities).
        granularity: How fine, in the method's terms, where it is to be another than the known classes say: the nearest
            that the method has is taken. They still say what lies among them.
        must_link: `(P, 2)` pairs of indices of items that are of one class, as somebody said. They come out together.
        cannot_link: `(Q, 2)` those of different classes. They never come out together.
        seed: Of the method, 0 … 2³¹; the same seed gives the same groups, in whatever order the items come (the
            search above 10,000 items is approximate).
        progress: Told how far it is, from 0 to 1; what it raises ends the work.

    Raises:
        OsmlError: Empty or non-finite embeddings, a wrong shape, known embeddings without labels or of another
            width, labels that are neither integers nor strings, `n_classes` outside 1 … N, a granularity that is no
            number, both of these, links that contradict each other, links together with `n_classes`, or a seed that is
            none.
    """
    items = _unit_rows(embeddings, "embeddings")
    known, names, classes, in_gallery = _known(known_embeddings, known_labels, in_gallery, items.shape[1])
    links = Constraints.of(must_link, cannot_link, len(items))
    _check_wishes(n_classes, granularity, links, len(items))
    if not isinstance(seed, Integral) or not 0 <= seed <= HIGHEST_SEED:
        raise OsmlError(f"seed must be a whole number from 0 to {HIGHEST_SEED}; got {seed!r}")
    seed = int(seed)
    pool = Pool.of(items, known, classes, links)
    if n_classes is not None:
        pool, in_gallery = pool.without_known(), in_gallery[:0]  # nothing is left for them to decide
    items = pool.nodes[pool.of_item]
    way = create("communities" if method == "auto" else method)
    progress = progress or (lambda done: None)

    def counted(groups: np.ndarray, pool: Pool) -> int:
        return int(new_groups(groups, pool, in_gallery).max()) + 1

    if n_classes is not None:
        choice = by_number(way, pool, seed, progress, int(n_classes))
    elif granularity is not None:
        choice = by_hand(way, pool, seed, progress, counted, checked_number("granularity", granularity))
    else:
        choice = by_evidence(way, pool, seed, progress, counted)

    groups = choice.groups.copy()
    if n_classes is not None:
        labels = split(items, groups[pool.of_item], n_classes)
        groups[pool.of_item] = moved = labels  # copies of an item may be in several
    else:
        new = new_groups(groups, pool, in_gallery)
        labels = enforce(pool.graph, pool.of_item, new, links)
        moved = _moved(alone(groups)[pool.of_item], new, labels)
        if among_known(pool, in_gallery) >= AMONG:
            labels[:] = LEFT_OUT
        labels = np.unique(np.append(LEFT_OUT, labels), return_inverse=True)[1][1:] - 1  # a group may be gone
    by_size = np.argsort(-np.bincount(labels[labels >= 0]), kind="stable")
    labels = np.append(np.argsort(by_size), LEFT_OUT)[labels]  # -1 finds the last
    of_group = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels + 1)))[1:-1]
    low, high = (min(choice.counts[0], len(by_size)), max(choice.counts[1], len(by_size)))  # links may change it
    progress(1.0)
    return Discovery(
        labels=labels,
        n_classes=len(by_size),
        confidence=_confidence(pool, alone(groups), moved),
        exemplars=tuple(_exemplars(items, pool.of_item, members) for members in of_group),
        n_classes_interval=(low, high) if len(by_size) else (0, 0),
        granularity=choice.granularity,
        granularity_source=choice.source,
        group_confidence=persistence(labels, [other[pool.of_item] for other in choice.neighbours]),
        known_class=_known_class(pool, groups, labels, names),
        pool=pool,
        note="" if len(by_size) else ALL_KNOWN if (groups[pool.of_item] >= 0).any() else ALL_NOISE,
    )


def new_groups(groups: np.ndarray, pool: Pool, in_gallery: np.ndarray) -> np.ndarray:
    """The groups of the unknown items `(N,)` numbered anew; -1 for those of no group, and where known ones lie.

    Shares are compared as well as numbers: there may be many more known items than unknown ones, or fewer.

    Args:
        groups: `(M,)` the group of each node, from 0; −1: of none.
        in_gallery: `(K,)` bool: the known items whose class can be recognised.
    """
    mine, theirs = groups[pool.of_item], groups[pool.of_known]
    n_groups = int(groups.max()) + 1
    unknown = np.bincount(mine[mine >= 0], minlength=n_groups)
    known = np.bincount(theirs[theirs >= 0], minlength=n_groups)
    gallery = np.bincount(theirs[in_gallery & (theirs >= 0)], minlength=n_groups)
    new = (unknown > 0) & (AT_HOME * unknown > gallery) & (AT_HOME * _share(unknown) >= _share(known))
    return np.append(np.where(new, np.cumsum(new) - 1, LEFT_OUT), LEFT_OUT)[mine]


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


def _share(counts: np.ndarray) -> np.ndarray:
    return counts / max(counts.sum(), 1)


def _known_class(pool: Pool, groups: np.ndarray, labels: np.ndarray, names: np.ndarray) -> np.ndarray:
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


def _exemplars(items: np.ndarray, of_item: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The members nearest to their mean, nearest first; of copies only one, in the mean too."""
    members = members[np.unique(of_item[members], return_index=True)[1]]
    inside = items[members]
    return members[np.argsort(-(inside @ inside.mean(axis=0)), kind="stable")[:N_EXEMPLARS]]


def _check_wishes(n_classes: int | None, granularity: float | None, links: Constraints, n_items: int) -> None:
    if n_classes is not None and granularity is not None:
        raise OsmlError("n_classes and granularity both say how fine to group: give one of them")
    if n_classes is not None and len(links.must_link) + len(links.cannot_link):
        raise OsmlError("links may not leave so many classes as n_classes says: give one of them")
    whole = isinstance(n_classes, Integral) and not isinstance(n_classes, bool)
    if n_classes is not None and not (whole and 1 <= n_classes <= n_items):
        raise OsmlError(
            f"n_classes is {n_classes!r}, but must be whole, from 1 to the {n_items} items: give another, or none"
        )


def _known(
    embeddings: ArrayLike | torch.Tensor | None,
    labels: ArrayLike | torch.Tensor | None,
    in_gallery: ArrayLike | None,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The known items `(K, width)`, the names of the classes `(C,)`, the index of each item's class `(K,)`, and whether
    it is in the gallery `(K,)`; none of any if none are given."""
    if (embeddings is None) != (labels is None):
        raise OsmlError("known_embeddings and known_labels belong together: give both or neither")
    if embeddings is None:
        if in_gallery is not None:
            raise OsmlError("in_gallery is about known_embeddings: give these, or leave it out")
        return np.empty((0, width), np.float32), np.empty(0, object), np.empty(0, np.int64), np.empty(0, bool)
    known = _unit_rows(embeddings, "known_embeddings")
    if known.shape[1] != width:
        raise OsmlError(
            f"known_embeddings are {known.shape[1]} wide, but embeddings {width}: both must come from one model"
        )
    labels = check_vector(labels, "known_labels")
    if len(labels) != len(known):
        raise OsmlError(f"{len(known)} known_embeddings need as many known_labels, but there are {len(labels)}")
    with refusing("known_labels cannot be told apart", "give integers, or strings"):
        names, classes = np.unique(labels, return_inverse=True)
    if any(name != name for name in names.tolist()):
        raise OsmlError("known_labels has NaN: give each of known_embeddings its class, an integer or a string")
    in_gallery = np.ones(len(known), dtype=bool) if in_gallery is None else np.asarray(in_gallery)
    if in_gallery.shape != classes.shape or in_gallery.dtype != np.bool_:
        raise OsmlError(f"in_gallery must be {len(known)} bools, one for each of known_embeddings")
    return known, names.astype(object), classes, in_gallery


def _unit_rows(embeddings: ArrayLike | torch.Tensor, name: str) -> np.ndarray:
    """`embeddings` as float32 unit vectors `(N, D)` on the CPU."""
    if isinstance(embeddings, torch.Tensor):
        embeddings = embeddings.detach().cpu().double().numpy()
    try:
        rows = np.asarray(embeddings, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OsmlError(f"{name} must be numbers of shape (N, D): {error}") from error
    if rows.ndim != 2 or 0 in rows.shape:
        raise OsmlError(f"{name} must have shape (N, D), at least one item, but has shape {rows.shape}")
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(length).all():
        raise OsmlError(f"{name} has NaN or infinite values: leave out those items, or repair the model")
    if not length.all():
        raise OsmlError(f"{name} has rows of zeros, which have no direction: leave out those items")
    return (rows / length).astype(np.float32)
