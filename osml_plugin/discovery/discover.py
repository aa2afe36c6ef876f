"""From embeddings of unknown items to proposed classes, their number included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..registry import checked_number
from .arguments import check_wishes, checked_seed, known_items, unit_rows
from .at_home import LEFT_OUT, known_class, lacking, new_groups
from .constraints import Constraints
from .granularity import by_evidence, by_hand, persistence
from .grouped import Grouped, as_chosen, as_told
from .methods import create
from .pool import Pool
from .tree import Tree

N_EXEMPLARS = 9
ALL_KNOWN = "all items lie among known classes"
ALL_NOISE = "the method takes all items for noise"
TOO_FEW = "too few to group"


@dataclass(frozen=True)
class Discovery:
    """Proposed classes of N unknown items."""

    labels: np.ndarray
    """`(N,)` int64: 0 … n_classes−1, the largest class first; -1: left out, since it lies among known items, since
    there are too few of its kind (`too_few`), or since the method took it for noise."""
    n_classes: int
    """0: nothing is proposed; `note` says why."""
    confidence: np.ndarray
    """`(N,)` float64 in [0, 1]: the share of the item's links to its nearest neighbours, weighted by how many
    neighbours both share, that stay in its group; for an item left out, in the group of known items where it lies. Of
    noise, and of what is too few to group, it is 0."""
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
    too_few: np.ndarray
    """`(N,)` bool: left out though it lies apart from known items, since fewer than five different ones like it are
    there; near-copies count once."""
    lacking: int
    """How many more different items would make a group of those that are too few; 0 where there are none."""
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
    (of more where there are more than 9,000 items) the middle one is taken of those that group the known items about as
    well by class as the best one does (B-cubed F, weighted by the standard error of the difference). Where unknown
    groups have more items than known classes, that is asked of pools that are thinned until they have as many, and it
    is the number of classes that is taken over.

    A group is left out, as one of wrongly rejected known items, if it has three times as many items of the gallery as
    unknown ones, or at least two of the known items and a share of all of them three times that of all unknown ones. If
    the unknown items have, in the median, at least half as many links to the gallery as they would have if they were of
    its classes, all are, but for groups most items of which lie apart from known ones.

    An item lies apart if it is farther from the nearest known item than 95 % of these are from one another
    (`distances.py`). It is never taken for known: it is in a group, or, where fewer than five different ones are
    together, too few to group. Near-copies are one item: those nearer to one another than items of the known classes
    are by chance, and sets that a gap parts from others of their class.

    With `n_classes` the items that lie among known ones are found in the same way and left out, unless fewer than
    `n_classes` are left. Of the others the coarsest resolution with at least so many groups is taken, and the groups
    that are linked most are merged.

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
        n_classes: The number of new classes, where it is known: then there are exactly so many.
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
            number, both of these, links that contradict each other or leave no `n_classes`, or a seed that is none.
    """
    items = unit_rows(embeddings, "embeddings")
    known, names, classes, in_gallery = known_items(known_embeddings, known_labels, in_gallery, items.shape[1])
    links = Constraints.of(must_link, cannot_link, len(items))
    check_wishes(n_classes, granularity, links, len(items))
    seed = checked_seed(seed)
    pool = Pool.of(items, known, classes, links)
    way = create("communities" if method == "auto" else method)
    progress = _rising(progress or (lambda done: None))

    def counted(groups: np.ndarray, pool: Pool) -> int:
        return max(int(new_groups(groups, pool, in_gallery).max()), LEFT_OUT) + 1

    if n_classes is not None:
        found = as_told(way, pool, in_gallery, seed, progress, counted, int(n_classes))
    elif granularity is not None:
        wanted = checked_number("granularity", granularity)
        found = as_chosen(by_hand(way, pool, seed, progress, counted, wanted), pool, in_gallery, seed)
    else:
        found = as_chosen(by_evidence(way, pool, seed, progress, counted), pool, in_gallery, seed)

    labels = by_size(found.labels)
    n_found = int(labels.max()) + 1
    of_group = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels + 1)))[1:-1]
    low, high = min(found.counts[0], n_found), max(found.counts[1], n_found)  # links may change it
    missing = lacking(found.too_few, pool)
    progress(1.0)
    return Discovery(
        labels=labels,
        n_classes=n_found,
        confidence=found.confidence,
        exemplars=tuple(_exemplars(pool, members) for members in of_group),
        n_classes_interval=(low, high) if n_found else (0, 0),
        granularity=found.granularity,
        granularity_source=found.source,
        group_confidence=persistence(labels, found.others),
        known_class=np.where(found.too_few, None, known_class(pool, found.groups, labels, names)),
        pool=pool,
        too_few=found.too_few,
        lacking=missing,
        note="" if n_found else _note(found, pool, missing),
    )


def _note(found: Grouped, pool: Pool, missing: int) -> str:
    """Why nothing is proposed."""
    if not found.too_few.any():
        return ALL_KNOWN if (found.groups[pool.of_item] >= 0).any() else ALL_NOISE
    more = f"{TOO_FEW}: {missing} more different {'item' if missing == 1 else 'items'} of one class would do"
    n_few, n_items = np.count_nonzero(found.too_few), len(found.too_few)
    return more if n_few == n_items else f"{n_items - n_few} items lie among known classes; {n_few} are {more}"


def _rising(progress: Callable[[float], None]) -> Callable[[float], None]:
    """What tells `progress` only of more than it was told of."""
    most = -1.0

    def tell(done: float) -> None:
        nonlocal most
        if done > most:
            most = done
            progress(done)

    return tell


def by_size(labels: np.ndarray) -> np.ndarray:
    """The groups `(N,)` numbered from 0 without gaps, the largest first; −1 stays."""
    labels = np.unique(np.append(LEFT_OUT, labels), return_inverse=True)[1][1:] - 1
    largest_first = np.argsort(-np.bincount(labels[labels >= 0]), kind="stable")
    return np.append(np.argsort(largest_first), LEFT_OUT)[labels]  # -1 finds the last


def _exemplars(pool: Pool, members: np.ndarray) -> np.ndarray:
    """The members nearest to their mean, nearest first; of copies only one, in the mean too."""
    nodes, first = np.unique(pool.of_item[members], return_index=True)
    inside = pool.nodes[nodes]
    return members[first[np.argsort(-(inside @ inside.mean(axis=0)), kind="stable")[:N_EXEMPLARS]]]
