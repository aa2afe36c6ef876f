"""Near-copies: one item that was saved, photographed or filmed more than once.

A near-copy says nothing new about its class, and a rate that counts it as an item of its own promises too much. Here
stands the one relation that everything else asks: which items are one item. It is an equivalence (`(N,)` set numbers),
so that other sources of the same relation, such as groups that a user names, can be joined to it by `joined`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike

from .nearest import nearest
from .neighbors import NeighborIndex

NEAR = 0.2
"""Share of a class's width above which no two items are near-copies, however clear the gap around them."""
STEP = 1.5
"""Least ratio of the distances behind and in front of a gap. At the edge of a cluster, where items become few, smaller
gaps are no accidents and tell nothing of copies."""
CHANCE = 1e-2
"""Share of accidents among the gaps that are taken for the edge of a set of near-copies."""
RANKS = 24
"""Nearest items of the class among which a gap is looked for; where copies fill them all, among all of the class."""
NARROW = 0.3
"""Least width of a class, in widths of the typical class: a class of copies alone has no width of its own."""
WIDE = 2.0
"""Most width that counts, in the same unit: a class with outliers, or in several places, is far across, but within each
place its items are no wider apart than those of other classes."""
BURST = 0.07
"""Share of its width that a class is in which all items are one: then it is far narrower than `NARROW`."""
LOWEST = 4.0
"""Dimension where every class is too small to tell it; a low one takes little for copies."""
ACROSS = 0.25
"""Share of the radius of near-copies in one class that is left for items of two classes, of which there are more."""
ROUNDING = 4e-6
"""Distance, in lengths of the item, that rounding to float32 explains."""
LINKED = 8
"""Nearest items that each item is linked to; a set of more copies hangs together by its other members."""
BLOCK = 1024
"""Items whose distances are computed at once, so that memory stays linear."""
FEW = 200
"""Items up to which all are compared with all without an index."""
PAIRS = 400
"""Pairs drawn to measure a class; more would not change its width."""
ANCHORS = 64
"""Items of a class, of those with more than `RANKS` near items, that are compared with all of it."""


def copy_sets(embeddings: ArrayLike | torch.Tensor, labels: ArrayLike) -> np.ndarray:
    """Number the sets of near-copies: items of one set have one number, and an item without copies is alone in its set.

    The distances r₁ ≤ r₂ ≤ … of an item to the others of its class grow without gaps: where items are independent and
    m is the dimension around the item, j·m·log(r_{j+1} / r_j) is standard exponential (Rényi 1953, of the volumes r^m).
    Gaps too large for that, at a false discovery rate of `CHANCE`, end sets of near-copies. A set is never wider than
    `NEAR` widths of its class. A class that is far narrower than the others altogether is one item.

    Items of different classes are near-copies where they are far nearer than any two different items of either class
    (`ACROSS` of `radii`), and so near that fewer than `CHANCE` pairs of independent items of all classes are.

    Args:
        embeddings: `(N, D)` finite.
        labels: `(N,)` the class of each; integers or strings.

    Returns:
        `(N,)` int64, numbered from 0 in the order of each set's first item.
    """
    items, classes = _items(embeddings), np.unique(np.asarray(labels), return_inverse=True)[1]
    if len(items) < 2:
        return np.zeros(len(items), dtype=np.int64)
    of_class = np.split(np.argsort(classes, kind="stable"), np.cumsum(np.bincount(classes))[:-1])
    widths = _widths(items, of_class)
    ranked = {c: _ranked(items[members]) for c, members in enumerate(of_class) if len(members) > 2}
    dimension = _dimension(list(ranked.values()))
    reach = np.maximum(_gaps(items, of_class, widths, ranked, dimension), _rounding(items))
    links = [(members[a], members[b]) for members in of_class for a, b in [_links(items[members], reach[members])]]
    bursts = [members for members, width in zip(of_class, widths, strict=True) if _is_burst(items[members], width)]
    sets = _components(len(items), [*links, *((members, members[:1].repeat(len(members))) for members in bursts)])
    # One item of each set is enough to find its copies in other classes.
    first = representatives(sets)
    radius = ACROSS * radii(items[first], classes[first], width_of=dict(enumerate(widths)))
    # Where classes overlap, pairs of items of two classes are as many as all pairs are.
    by_chance = np.array(widths)[classes[first]] * (CHANCE / len(first) ** 2) ** (1 / dimension)
    a, b = _links(items[first], np.maximum(np.minimum(radius, by_chance), _rounding(items[first])))
    return joined(sets, _components(len(items), [(first[a], first[b])]))


def sets_within(
    embeddings: ArrayLike | torch.Tensor, radius: float | np.ndarray, near: np.ndarray | None = None
) -> np.ndarray:
    """Number the sets `(N,)` of items that hang together by distances of at most `radius`, a number or `(N,)`; of two
    items the smaller one counts. `near` are the items' nearest, as `nearest` gives them, where they are known."""
    items = _items(embeddings)
    if len(items) < 2:
        return np.zeros(len(items), dtype=np.int64)
    reach = np.maximum(np.broadcast_to(radius, len(items)), _rounding(items))
    return _components(len(items), [_links(items, reach, near)])


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Join two such relations `(N,)`: items that either holds together are in one set."""
    ends = np.unique(second, return_index=True)[1][np.unique(second, return_inverse=True)[1]]
    starts = np.unique(first, return_index=True)[1][np.unique(first, return_inverse=True)[1]]
    everyone = np.arange(len(first))
    return _components(len(first), [(everyone, starts), (everyone, ends)])


def representatives(sets: np.ndarray) -> np.ndarray:
    """Indices `(S,)` of the first item of each set `(N,)`, in order."""
    return np.sort(np.unique(sets, return_index=True)[1])


def new_items(embeddings: torch.Tensor, references: torch.Tensor, radius: float) -> torch.Tensor:
    """Indices of the items `(M, D)` that are near-copies neither of a reference `(R, D)` nor of an item before them
    that is not one itself.

    Items that come one by one are taken and left out as those that come at once.
    """
    reach = torch.from_numpy(np.maximum(radius, _rounding(_items(embeddings))))
    candidates = torch.arange(len(embeddings))
    if len(references) and len(embeddings):
        distances = NeighborIndex(references, torch.zeros(len(references), dtype=torch.int64)).search(embeddings, 1)[0]
        candidates = candidates[distances[:, 0] > reach]
    if len(candidates) < 2:
        return candidates
    crowded = _nearest_distance(embeddings[candidates]) <= 2 * reach[candidates]  # twice: another one may reach farther
    taken: list[int] = []
    for i in candidates[crowded].tolist():
        if not ((embeddings[taken] - embeddings[i]).norm(dim=1) <= reach[i]).any():
            taken.append(i)
    return torch.cat([candidates[~crowded], torch.tensor(taken, dtype=torch.int64)]).sort().values


def radii(
    embeddings: ArrayLike | torch.Tensor, labels: ArrayLike, *, width_of: Mapping[int, float] | None = None
) -> np.ndarray:
    """Distance `(N,)` within which an item that comes later is a near-copy of one of these different items: half the
    least distance between two of its class, and no more than `NEAR` widths of the class.

    An independent item lies that near with a chance of about 2^−m of what made the closest pair.

    Args:
        width_of: width of each class, by its place among the sorted labels; None = measured.
    """
    items, classes = _items(embeddings), np.unique(np.asarray(labels), return_inverse=True)[1]
    found = _rounding(items)
    of_class = np.split(np.argsort(classes, kind="stable"), np.cumsum(np.bincount(classes))[:-1])
    widths = _widths(items, of_class) if width_of is None else [width_of[c] for c in range(len(of_class))]
    for members, width in zip(of_class, widths, strict=True):
        # A class of one item is taken for as narrow as classes come.
        least = _nearest(items[members], 1)[0].min() / 2 if len(members) > 1 else BURST * width
        found[members] = np.maximum(found[members], min(least, NEAR * width))
    return found


def copy_radius(embeddings: ArrayLike | torch.Tensor, labels: ArrayLike) -> float:
    """Distance within which items of a class that is not here yet are near-copies: the least of `radii` among these
    different items `(N, D)` with labels `(N,)`, since a new class may be as narrow; 0 for no items."""
    return float(radii(embeddings, labels).min(initial=np.inf)) if len(labels) else 0.0


def _items(embeddings: ArrayLike | torch.Tensor) -> np.ndarray:
    if isinstance(embeddings, torch.Tensor):
        embeddings = embeddings.detach().cpu().numpy()
    return np.ascontiguousarray(embeddings, dtype=np.float32)


def _rounding(items: np.ndarray) -> np.ndarray:
    return ROUNDING * np.linalg.norm(items, axis=1)


def _widths(items: np.ndarray, of_class: list[np.ndarray]) -> list[float]:
    """Width of each class: the upper quartile of the distances between its items, and no less than `NARROW` and no more
    than `WIDE` of the typical class's; 0 where no class has two different items."""
    own = [_width(items[members]) for members in of_class]
    typical = float(np.median([width for width in own if width > 0] or [0.0]))
    return [min(max(width, NARROW * typical), WIDE * typical) for width in own]


def _width(items: np.ndarray) -> float:
    if len(items) < 2:
        return 0.0
    few = len(items) * (len(items) - 1) <= 2 * PAIRS
    a, b = np.triu_indices(len(items), 1) if few else np.random.default_rng(0).integers(len(items), size=(2, PAIRS))
    return float(np.quantile(_distances(items, a[a != b], b[a != b]), 0.75))


def _is_burst(items: np.ndarray, width: float) -> bool:
    """True where a class is so narrow, beside others, that all of it is one item."""
    from_first = _distances(items, np.zeros(len(items), dtype=np.int64), np.arange(len(items)))
    return len(items) > 1 and bool(from_first.max() <= BURST * width)


def _gaps(
    items: np.ndarray,
    of_class: list[np.ndarray],
    widths: list[float],
    ranked: Mapping[int, np.ndarray],
    dimension: float,
) -> np.ndarray:
    """Distance `(N,)` of each item to the last of its near-copies; 0 where there is no gap.

    Args:
        ranked: by class, the ranked distances of its items, for classes of three or more.
    """
    reach = np.zeros(len(items))
    surprises = {c: _surprises(of, dimension, NEAR * widths[c]) for c, of in ranked.items()}
    least = _least_surprise(np.concatenate([s.ravel() for s in surprises.values()] or [reach[:0]]), len(items))
    for c, members in enumerate(of_class):
        if c in ranked:
            reach[members] = _last(ranked[c], surprises[c] >= least)
            crowded = members[(ranked[c][:, -1] <= NEAR * widths[c]) & (len(members) - 1 > ranked[c].shape[1])]
            if len(crowded):
                reach[crowded] = np.maximum(reach[crowded], _far_gap(items, members, crowded, dimension, widths[c]))
    return reach


def _far_gap(
    items: np.ndarray, members: np.ndarray, crowded: np.ndarray, dimension: float, width: float
) -> np.ndarray | float:
    """Reach `(n,)` of items with more than `RANKS` near-copies: some are compared with all of their class."""
    anchors = crowded if len(crowded) <= ANCHORS else np.random.default_rng(0).permutation(crowded)[:ANCHORS]
    profile = np.stack([np.sort(_distances(items, np.full(len(members), i), members))[1:] for i in anchors])
    found = _last(profile, _surprises(profile, dimension, NEAR * width) >= np.log(len(items) / CHANCE))
    if len(anchors) == len(crowded):
        return found
    return float(np.median(found[found > 0])) if (found > 0).any() else 0.0


def _surprises(ranked: np.ndarray, dimension: float, near: float) -> np.ndarray:
    """Surprise −log (p / w) of each gap `(n, k − 1)` behind the j-th of the ranked distances `(n, k)`; 0 where that
    distance is above `near`, and for gaps below `STEP`. The weights w = 6 / (π j)² share an item's one test among its
    ranks."""
    gap = np.log(np.maximum(ranked[:, 1:], 1e-30) / np.maximum(ranked[:, :-1], 1e-30))
    counts, rank = (ranked[:, :-1] <= near) & (gap >= np.log(STEP)), np.arange(1, ranked.shape[1])
    return np.where(counts, rank * dimension * gap - np.log(np.pi**2 / 6 * rank**2), 0)


def _last(ranked: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Distance `(n,)` in front of the last gap that ends a set, a trifle more for rounding; 0 where none does."""
    if not ends.shape[1]:
        return np.zeros(len(ranked))
    last = ends.shape[1] - 1 - ends[:, ::-1].argmax(axis=1)
    return np.where(ends.any(axis=1), ranked[np.arange(len(ranked)), last] * (1 + 1e-6), 0)


def _least_surprise(surprises: np.ndarray, n_tests: int) -> float:
    """Surprise above which gaps are no accidents, at a false discovery rate of `CHANCE` (Benjamini & Hochberg 1995,
    with weights: Genovese et al. 2006): where many items have a copy, a smaller gap is enough; infinite where none is
    surprising."""
    falling = np.sort(surprises)[::-1]
    enough = np.flatnonzero(falling >= np.log(n_tests / (CHANCE * np.arange(1, len(falling) + 1))))
    return float(falling[enough[-1]]) if len(enough) else np.inf


def _nearest_distance(items: torch.Tensor) -> torch.Tensor:
    """Distance `(n,)` of each item to its nearest other. Of few items without an index, which takes longer to make."""
    if len(items) > FEW:
        return torch.from_numpy(_nearest(_items(items), 1)[0][:, 0])
    items = torch.from_numpy(_items(items))
    distances = torch.cdist(items, items, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.fill_diagonal_(torch.inf).min(dim=1).values


def _ranked(items: np.ndarray) -> np.ndarray:
    """Distances `(n, k)` of each of the items of a class to its nearest others, nearest first."""
    return _nearest(items, min(RANKS + 1, len(items) - 1))[0]


def _dimension(ranked: list[np.ndarray]) -> float:
    """Median of the local dimension around items (Levina & Bickel 2004, eq. 8), from the upper half of each item's
    ranks, since copies may fill the others; `LOWEST` where no class has nine items."""
    found = []
    for distances in ranked:
        k = distances.shape[1]
        if k < 8:
            continue
        ranks = np.arange(k // 2 + 1, k)
        apart = distances[distances[:, k // 2] > 0]  # identical items tell nothing of a dimension
        mean_log = np.log(apart[:, -1:] / apart[:, ranks - 1]).mean(axis=1)
        expected = np.mean([(1 / np.arange(j, k)).sum() for j in ranks])
        found.append(expected / np.maximum(mean_log, 1e-12))
    found = np.concatenate(found) if found else np.empty(0)
    return float(np.median(found)) if len(found) else LOWEST


def _distances(items: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distances between the items at two lists of places."""
    return np.linalg.norm(items[a].astype(np.float64) - items[b], axis=1)


def _nearest(items: np.ndarray, k: int, near: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices `(n, k)` of the k nearest others of each item, nearest first."""
    if near is None:
        near = nearest(items - items.mean(axis=0), k + 1)  # far from the origin small distances would be lost
    others = near[:, 1 : k + 1]
    distances = np.concatenate(
        [
            np.linalg.norm(items[others[i : i + BLOCK]].astype(np.float64) - items[i : i + BLOCK, None], axis=2)
            for i in range(0, len(items), BLOCK)
        ]
    )
    order = np.argsort(distances, axis=1, kind="stable")  # faiss loses small distances
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(others, order, axis=1).astype(np.int64)


def _links(items: np.ndarray, reach: np.ndarray, near: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of items, as two index arrays, that lie within the smaller `reach` `(n,)` of the two."""
    if len(items) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    distances, others = _nearest(items, min(LINKED, len(items) - 1), near)
    a = np.repeat(np.arange(len(items)), others.shape[1])
    b = others.ravel()
    close = distances.ravel() <= np.minimum(reach[a], reach[b])
    return a[close], b[close]


def _components(n_items: int, links: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Set number `(N,)` of each item, from pairs that belong together, in the order of the sets' first items."""
    from scipy.sparse import coo_matrix  # here, because recognizing does without SciPy
    from scipy.sparse.csgraph import connected_components

    a, b = (np.concatenate([link[side] for link in links]) for side in (0, 1))
    graph = coo_matrix((np.ones(len(a), dtype=bool), (a, b)), shape=(n_items, n_items))
    found = connected_components(graph, directed=False)[1]
    first, inverse = np.unique(found, return_index=True, return_inverse=True)[1:]
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)
