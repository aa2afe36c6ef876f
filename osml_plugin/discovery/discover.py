"""From embeddings of unknown items to proposed classes, their number included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from ..errors import OsmlError
from ..metrics.checks import check_vector
from .granularity import as_good_as_the_best, bcubed, merge, split, stability
from .graph import own_share
from .methods import create
from .pool import Pool

STABLE = 0.9
"""Without known classes: the finest grouping that is this stable (adjusted Rand index, see `stability`)."""
AT_HOME = 4
"""A group is one of known items if it is this many times as frequent among them as among the unknown ones."""
N_EXEMPLARS = 9
LEFT_OUT = -1


@dataclass(frozen=True)
class Discovery:
    """Proposed classes of N unknown items."""

    labels: np.ndarray
    """`(N,)` int64: 0 … n_classes−1, the largest class first; -1: left out, since it lies among known items."""
    n_classes: int
    confidence: np.ndarray
    """`(N,)` float64 in [0, 1]: the share of the item's links to its nearest neighbours, weighted by how many
    neighbours both share, that stay in its group; for an item left out, in the group of known items where it lies."""
    exemplars: tuple[np.ndarray, ...]
    """For each class the indices of up to 9 different items, those nearest to the mean of its different items first."""
    n_classes_interval: tuple[int, int]
    """The fewest and the most classes among the groupings that fit the evidence about as well as the chosen one."""
    granularity: float
    """The resolution (of modularity, on the graph of these items) of the grouping: higher means finer."""
    granularity_source: str
    """'known classes', 'given n_classes', or 'default' (the finest stable grouping)."""


def discover(
    embeddings: ArrayLike | torch.Tensor,
    *,
    known_embeddings: ArrayLike | torch.Tensor | None = None,
    known_labels: ArrayLike | torch.Tensor | None = None,
    in_gallery: ArrayLike | None = None,
    n_classes: int | None = None,
    method: str = "auto",
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Discovery:
    """Group unknown items into the classes that they are, and count the classes.

    A graph links every item, known ones included, to its 15 nearest by cosine; its communities (Louvain) are
    groups, and a resolution says how fine. Of 24 resolutions those are kept that group the known items best by
    class (B-cubed F, up to the error of its estimate), and of these the one whose grouping of the unknown items is
    the most stable is taken (the finest of equals). A group is left out, as one of wrongly rejected known items, if
    its share of all known items is more than four times its share of all unknown ones.

    With `n_classes` the known items play no part: the coarsest resolution with at least so many groups is taken,
    and the groups that are linked most are merged; nothing is left out.

    Time: 24 times linear, and the search for neighbours, exact and quadratic up to 100,000 items, approximate above.
    Memory is linear. More items of a class make it fall apart at a lower resolution, so known classes of about the
    size of the unknown ones tell the most; with far fewer items a class they make the grouping too fine. A class in
    several parts, of more than 15 items each and far from one another, is found as several.

    Args:
        embeddings: `(N, D)` items of unknown classes; wrongly rejected known items may be among them.
        known_embeddings: `(M, D)` items of known classes that **training did not see**, since classes trained on are
            tighter than new ones. Pseudo-unknown classes tell the most. None: the finest grouping is taken that
            agrees with the next coarser and finer ones (mean adjusted Rand index at least 0.9).
        known_labels: `(M,)` their classes, integers or strings.
        in_gallery: `(M,)` bool: those whose class can be recognised already, None = all. Groups of these are left out;
            the others (of pseudo-unknown classes, say) set the granularity only, and may be found as new classes.
        n_classes: The number of classes, where it is known: then there are exactly so many.
        method: `methods.names()`, or auto.
        seed: Of the community search; the same seed gives the same groups, in whatever order the items come (the
            approximate search above 100,000 items excepted).
        progress: Told how far it is, from 0 to 1; what it raises ends the work.

    Raises:
        OsmlError: Empty or non-finite embeddings, a wrong shape, known embeddings without labels or of another
            width, or `n_classes` outside 1 … N.
    """
    items = _unit_rows(embeddings, "embeddings")
    known, classes = _known(known_embeddings, known_labels, items.shape[1])
    n = len(items)
    if n_classes is not None and not 1 <= n_classes <= n:
        raise OsmlError(f"n_classes is {n_classes}, but must be from 1 to the {n} items: give another, or none")

    if n_classes is not None:
        known, classes = known[:0], classes[:0]  # nothing is left for them to decide

    pool = Pool.of(items, known, classes)
    of_item, of_known = pool.of_item, pool.of_known
    of_gallery = of_known if in_gallery is None or not len(known) else of_known[np.asarray(in_gallery, dtype=bool)]

    ladder, granularities, counts, scores = [], [], [], []
    way = create("communities" if method == "auto" else method)
    rungs = tqdm(way.ladder(pool, seed), total=way.n_rungs, desc="discovery", delay=2, leave=False)
    for rung, (granularity, groups) in enumerate(rungs):
        if progress is not None:
            progress(rung / way.n_rungs)
        if n_classes is None and ladder and groups.max() + 1 > len(pool.nodes) / 2:
            break  # a class of one item is none; that each is alone would be very stable
        ladder.append(groups)
        granularities.append(granularity)
        counts.append(int(_new_groups(groups, of_item, of_gallery).max()) + 1)
        if n_classes is not None and counts[-1] >= n_classes:
            break
        if len(known):
            scores.append(bcubed(classes, groups[of_known]))
            if scores[-1].mean() < max(score.mean() for score in scores) / 2:
                break  # far too fine by now

    if n_classes is not None:
        source, chosen, interval = "given n_classes", len(ladder) - 1, (n_classes, n_classes)
        groups = merge(pool.graph, ladder[chosen], min(n_classes, counts[chosen]))
        labels = split(items, groups[of_item], n_classes)
        groups[of_item] = labels
    else:
        steady = stability([groups[of_item] for groups in ladder])
        if len(known):
            source, fit = "known classes", np.flatnonzero(as_good_as_the_best(np.array(scores)))
            chosen = fit[steady[fit] == steady[fit].max()][-1]
        else:
            source, fit = "default", np.flatnonzero(steady >= min(STABLE, steady.max()))
            chosen = fit[-1]
        interval = (min(counts[i] for i in fit), max(counts[i] for i in fit))
        groups = ladder[chosen]
        labels = _new_groups(groups, of_item, of_gallery)[of_item]

    by_size = np.argsort(-np.bincount(labels[labels >= 0]), kind="stable")
    rank = np.append(np.argsort(by_size), LEFT_OUT)  # -1 finds the last
    return Discovery(
        labels=rank[labels],
        n_classes=len(by_size),
        confidence=own_share(pool.graph, groups)[of_item],
        exemplars=tuple(_exemplars(items, of_item, np.flatnonzero(labels == group)) for group in by_size),
        n_classes_interval=interval,
        granularity=granularities[chosen],
        granularity_source=source,
    )


def _new_groups(groups: np.ndarray, of_item: np.ndarray, of_known: np.ndarray) -> np.ndarray:
    """The nodes' groups `(M,)` numbered anew; -1 for groups without unknown items, and for those of known ones.

    Shares are compared, not numbers: there may be many more known items than unknown ones, or fewer.
    """
    share = np.bincount(groups[of_item], minlength=groups.max() + 1) / len(of_item)
    known_share = np.bincount(groups[of_known], minlength=len(share)) / max(len(of_known), 1)
    new = (share > 0) & (share * AT_HOME >= known_share)
    return np.where(new, np.cumsum(new) - 1, LEFT_OUT)[groups]


def _exemplars(items: np.ndarray, of_item: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The members nearest to their mean, nearest first; of copies only one, in the mean too."""
    members = members[np.unique(of_item[members], return_index=True)[1]]
    inside = items[members]
    return members[np.argsort(-(inside @ inside.mean(axis=0)), kind="stable")[:N_EXEMPLARS]]


def _known(
    embeddings: ArrayLike | torch.Tensor | None, labels: ArrayLike | torch.Tensor | None, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The known items `(M, width)` and their class indices `(M,)`; none of either if none are given."""
    if (embeddings is None) != (labels is None):
        raise OsmlError("known_embeddings and known_labels belong together: give both or neither")
    if embeddings is None:
        return np.empty((0, width), dtype=np.float32), np.empty(0, dtype=np.int64)
    known = _unit_rows(embeddings, "known_embeddings")
    if known.shape[1] != width:
        raise OsmlError(
            f"known_embeddings are {known.shape[1]} wide, but embeddings {width}: both must come from one model"
        )
    classes = check_vector(labels, "known_labels")
    if len(classes) != len(known):
        raise OsmlError(f"{len(known)} known_embeddings need as many known_labels, but there are {len(classes)}")
    return known, np.unique(classes, return_inverse=True)[1]


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
