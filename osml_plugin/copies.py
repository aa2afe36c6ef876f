"""Near-copies: one item that was saved, photographed or filmed more than once.

A near-copy says nothing new about its class, and a rate that counts it as an item of its own promises too much. Here
stands the one relation that everything else asks: which items are one item. It is an equivalence (`(N,)` set numbers),
so that other sources of the same relation, such as groups that a user names, can be joined to it by `joined`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from .neighbors import NeighborIndex

NEAR = 0.2
"""Share of a class's width above which no two items are near-copies, however clear the gap around them."""
CHANCE = 1e-3
"""Expected number of independent items, in the whole data set, that are taken for near-copies."""
RANKS = 24
"""Nearest items of the class among which a gap is looked for."""
NARROW = 0.1
"""Least width of a class, in widths of the typical class: a class of copies alone has no width of its own."""
ROUNDING = 4e-6
"""Distance, in lengths of the item, that rounding to float32 explains."""
LINKED = 8
"""Nearest items that each item is linked to; a set of more copies hangs together by its other members."""
EXACT_UP_TO = 20_000
"""Items up to which all are compared with all; beyond it only with those in the nearest cells."""
PAIRS = 400
"""Pairs drawn to measure a class; more would not change its width."""


@dataclass(frozen=True)
class Width:
    """Width of one class: the upper quartile of the distances between its items, and what they tell of dimension."""

    distance: float
    spread: float
    """Standard deviation of the logarithm of the distances, from their upper half."""


def copy_sets(embeddings: ArrayLike | torch.Tensor, labels: ArrayLike) -> np.ndarray:
    """Number the sets of near-copies: items of one set have one number, and an item without copies is alone in its set.

    Two rules find them, both with distances that the data set themselves:

    - The number of independent items of a class within r of each other grows as r^m, m being the dimension of the
      class. Pairs so close that fewer than `CHANCE` of them are expected are near-copies (`radii`).
    - The distances r₁ ≤ r₂ ≤ … of an item to its neighbors grow without gaps: j·m·log(r_{j+1} / r_j) is standard
      exponential where items are independent (Rényi's representation of the volumes r^m). A gap that has a chance below
      `CHANCE` in the whole data set ends a set of near-copies.

    Items of different classes are near-copies by the first rule alone, with the smaller radius of the two classes.

    Args:
        embeddings: `(N, D)` finite.
        labels: `(N,)` the class of each; integers or strings.

    Returns:
        `(N,)` int64, numbered from 0 in the order of each set's first item.
    """
    items, classes = _items(embeddings), np.unique(np.asarray(labels), return_inverse=True)[1]
    if len(items) < 2:
        return np.zeros(len(items), dtype=np.int64)
    radius = radii(items, classes)
    of_class = np.split(np.argsort(classes, kind="stable"), np.cumsum(np.bincount(classes))[:-1])
    reach = np.maximum(radius, _gaps(items, of_class, len(items)))
    within = [(members[a], members[b]) for members in of_class for a, b in [_links(items[members], reach[members])]]
    sets = _components(len(items), within)
    # One item of each set is enough to find its copies in other classes.
    first = representatives(sets)
    a, b = _links(items[first], radius[first])
    return joined(sets, _components(len(items), [*within, (first[a], first[b])]))


def sets_within(embeddings: ArrayLike | torch.Tensor, radius: float | np.ndarray) -> np.ndarray:
    """Number the sets `(N,)` of items that hang together by distances of at most `radius`, a number or `(N,)`; of two
    items the smaller one counts."""
    items = _items(embeddings)
    if len(items) < 2:
        return np.zeros(len(items), dtype=np.int64)
    reach = np.maximum(np.broadcast_to(radius, len(items)), _rounding(items))
    return _components(len(items), [_links(items, reach)])


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
    nearest = _nearest(_items(embeddings[candidates]), 1)[0][:, 0]
    crowded = torch.from_numpy(nearest) <= 2 * reach[candidates]  # twice, since another item may reach farther
    taken: list[int] = []
    for i in candidates[crowded].tolist():
        if not ((embeddings[taken] - embeddings[i]).norm(dim=1) <= reach[i]).any():
            taken.append(i)
    return torch.cat([candidates[~crowded], torch.tensor(taken, dtype=torch.int64)]).sort().values


def radii(embeddings: ArrayLike | torch.Tensor, labels: ArrayLike) -> np.ndarray:
    """Distance `(N,)` below which another item of the class is a near-copy, by the first rule of `copy_sets`.

    It is never above `NEAR` widths of the class, and 0 but for rounding where no class has three items.
    """
    items, classes = _items(embeddings), np.unique(np.asarray(labels), return_inverse=True)[1]
    sizes = np.bincount(classes)
    return np.maximum(_class_radii(items, classes, sizes)[classes], _rounding(items))


def seen_radii(embeddings: ArrayLike | torch.Tensor, labels: ArrayLike, sets: np.ndarray) -> np.ndarray:
    """Distance `(N,)` within which an item that comes later is a near-copy of one of these: the radius of its class, or
    half the least distance between two different items of it, whichever is larger.

    An independent item lies that near with a chance of about 2^−m of what made the closest pair.

    Args:
        sets: `(N,)` near-copies among these, as `copy_sets` gives them.
    """
    items, classes = _items(embeddings), np.unique(np.asarray(labels), return_inverse=True)[1]
    found = radii(items, classes)
    for c in range(int(classes.max(initial=-1)) + 1):
        members = np.flatnonzero(classes == c)
        width, first = _width(items[members]), members[representatives(sets[members])]
        if width is not None and len(first) > 2:
            least = min(_nearest(items[first], 1)[0].min() / 2, NEAR * width.distance)
            found[members] = np.maximum(found[members], least)
    return found


def copy_radius(embeddings: ArrayLike | torch.Tensor, labels: ArrayLike) -> float:
    """Distance below which items of a class that is not here yet are near-copies: that of the narrowest class among
    these items `(N, D)` with labels `(N,)`, since a new class may be as narrow."""
    items, classes = _items(embeddings), np.unique(np.asarray(labels), return_inverse=True)[1]
    found = _class_radii(items, classes, np.bincount(classes))
    return float(max(found.min(), np.median(_rounding(items))))


def _items(embeddings: ArrayLike | torch.Tensor) -> np.ndarray:
    if isinstance(embeddings, torch.Tensor):
        embeddings = embeddings.detach().cpu().numpy()
    return np.ascontiguousarray(embeddings, dtype=np.float32)


def _rounding(items: np.ndarray) -> np.ndarray:
    return ROUNDING * np.linalg.norm(items, axis=1)


def _class_radii(items: np.ndarray, classes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Radius `(C,)` of each class."""
    widths = [_width(items[classes == c]) for c in range(len(sizes))]
    spreads = [w.spread for w in widths if w is not None and w.spread > 0]
    if not spreads:
        return np.zeros(len(sizes))
    dimension = 1 / (2 * float(np.median(spreads)) ** 2)
    typical = float(np.median([w.distance for w in widths if w is not None]))
    width = np.array([typical * NARROW if w is None else max(w.distance, NARROW * typical) for w in widths])
    # n² / 2 pairs, three quarters of them within the width: so many within r are CHANCE on average.
    expected = 0.375 * np.maximum(sizes, 3.0) ** 2
    return width * np.minimum((CHANCE / len(sizes) / expected) ** (1 / dimension), NEAR)


def _width(items: np.ndarray) -> Width | None:
    """Width of the class of these items; None for fewer than three, or where most are copies of one."""
    if len(items) < 3:
        return None
    draw = np.random.default_rng(0)
    a, b = draw.integers(len(items), size=(2, PAIRS))
    distances = np.linalg.norm(items[a[a != b]].astype(np.float64) - items[b[a != b]], axis=1)
    middle, upper = np.quantile(distances, [0.5, 0.75])
    if middle <= ROUNDING * np.linalg.norm(items[0]):
        return None
    return Width(float(upper), float(np.log(upper / middle)) / 0.6745)


def _gaps(items: np.ndarray, of_class: list[np.ndarray], n_items: int) -> np.ndarray:
    """Distance `(N,)` of each item to the last of its near-copies, by the second rule; 0 where there is no gap."""
    reach = np.zeros(n_items)
    near = {c: _ranked(items[members]) for c, members in enumerate(of_class) if len(members) > 4}
    dimensions = [_dimensions(ranked) for ranked in near.values() if ranked.shape[1] >= 8]
    if not sum(map(len, dimensions)):
        return reach
    dimension = float(np.median(np.concatenate(dimensions)))
    least = np.log(n_items * RANKS / CHANCE)
    for c, ranked in near.items():
        width = _width(items[of_class[c]])
        if width is None:
            continue
        rank = np.arange(1, ranked.shape[1])
        gap = np.log(np.maximum(ranked[:, 1:], 1e-30) / np.maximum(ranked[:, :-1], 1e-30))
        ends = (rank * dimension * gap > least) & (ranked[:, :-1] <= NEAR * width.distance)
        last = ranked.shape[1] - 2 - ends[:, ::-1].argmax(axis=1)
        found = ends.any(axis=1)
        reach[of_class[c][found]] = ranked[found, last[found]] * (1 + 1e-6)
    return reach


def _ranked(items: np.ndarray) -> np.ndarray:
    """Distances `(n, k)` of each of the items of a class to its nearest others, nearest first."""
    return _nearest(items, min(RANKS + 1, len(items) - 1))[0]


def _dimensions(ranked: np.ndarray) -> np.ndarray:
    """Local dimension around each item that is not identical to half of its ranks (Levina & Bickel 2004, eq. 8). It is
    that of the upper half of the ranks, since copies may fill the others."""
    k = ranked.shape[1]
    ranks = np.arange(k // 2 + 1, k)
    apart = ranked[ranked[:, k // 2] > 0]  # identical items tell nothing of a dimension
    mean_log = np.log(apart[:, -1:] / apart[:, ranks - 1]).mean(axis=1)
    expected = np.mean([(1 / np.arange(j, k)).sum() for j in ranks])
    return expected / np.maximum(mean_log, 1e-12)


def _nearest(items: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices `(n, k)` of the k nearest others of each item."""
    references = torch.from_numpy(items)
    index = NeighborIndex(references, torch.zeros(len(items), dtype=torch.int64), exact_up_to=EXACT_UP_TO)
    distances, indices = (t.numpy() for t in index.search(references, k + 1))
    # Of identical items the search may name another one first: the item itself is dropped where it stands.
    own = indices == np.arange(len(items))[:, None]
    own[~own.any(axis=1), -1] = True
    return distances[~own].reshape(len(items), k), indices[~own].reshape(len(items), k)


def _links(items: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of items, as two index arrays, that lie within the smaller `reach` `(n,)` of the two."""
    if len(items) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    distances, others = _nearest(items, min(LINKED, len(items) - 1))
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
