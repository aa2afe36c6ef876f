"""How fine to group: what the known classes say, what was asked for, or what is stable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.cluster.hierarchy import cut_tree
from scipy.sparse import csr_matrix
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix
from tqdm import tqdm

from .graph import mergers, quotient
from .methods import Method
from .pool import Pool

STABLE = 0.9
"""Without known classes: the finest grouping that is this stable (adjusted Rand index, see `stability`)."""
MATCHED = 0.5
"""Groups and classes are of about one size if these have at least this share of the items of those."""
STEPS = 3
"""How often the number of groups, and so their size, is corrected."""
BY_HAND = "given granularity"
DRAWS, DRAWN = 5, 30_000
"""How many thinned pools are grouped for a number, and the most items of all of them together; but one at least."""
WHOLE = 0.5
"""The share of the work, as it is told, that the whole pool is where thinned ones may follow."""

Counted = Callable[[np.ndarray, Pool], int]
"""How many new classes there are among the groups of the nodes of a pool."""


@dataclass(frozen=True)
class Choice:
    """The grouping that is taken, and what it was taken from."""

    groups: np.ndarray
    """`(M,)` int64: the group of each node, from 0; −1: of none."""
    neighbours: list[np.ndarray]
    """The next coarser and the next finer grouping, or the same made again from another seed."""
    counts: tuple[int, int]
    """The fewest and the most new classes in the groupings that could as well be the right one."""
    granularity: float
    source: str


@dataclass(frozen=True)
class Ladder:
    """The groupings of a pool, from coarse to fine, and which of them the evidence is for."""

    granularities: list[float]
    groups: list[np.ndarray]
    counts: np.ndarray
    """`(R,)` new classes of each."""
    chosen: int
    plausible: np.ndarray
    """Rungs that could as well be right, the chosen one among them."""
    behind: np.ndarray
    """`(R,)` by how many standard errors each groups the known classes worse than the best one does; 0 without them."""

    def taken(self, chosen: int, counts: tuple[int, int], source: str) -> Choice:
        beside = [self.groups[i] for i in (chosen - 1, chosen + 1) if 0 <= i < len(self.groups)]
        groups = self.groups[chosen]
        return Choice(groups, beside or [groups], counts, self.granularities[chosen], source)

    @property
    def span(self) -> tuple[int, int]:
        counts = self.counts[self.plausible]
        return int(counts.min()), int(counts.max())


def by_evidence(way: Method, pool: Pool, seed: int, progress: Callable[[float], None], counted: Counted) -> Choice:
    """The rung that the known classes speak for (see `climbed`), at equal sizes.

    A large class falls apart at a coarser rung than a small one. So where unknown groups have more than twice as many
    items as known classes have on average, the unknown items are thinned, at random, until groups are of the size of
    the classes; how many there are is asked of several such pools, and of the whole pool the rung is taken that comes
    nearest to that; of several the one that groups the known classes best. Since the size of the groups depends on
    their number, this is done again with the new number.
    """
    ladder = climbed(way, pool, seed, _part(progress, 0, WHOLE if telling(pool) else 1), counted)
    number, span = float(ladder.counts[ladder.chosen]), ladder.span
    if not telling(pool):
        return ladder.taken(ladder.chosen, span, "default")
    size, chosen = len(np.unique(pool.of_known)) / len(np.unique(pool.classes)), ladder.chosen
    for step in range(STEPS):
        share = size * max(number, 1) / len(np.unique(pool.of_item))
        if share > MATCHED:
            break
        draws = max(1, min(DRAWS, DRAWN // int(share * len(pool.of_item) + len(pool.of_known))))
        ends = WHOLE + (1 - WHOLE) * (step + np.arange(draws + 1) / draws) / STEPS
        thinned = [
            climbed(way, pool.thinned(share, seed + n), seed + n, _part(progress, ends[n], ends[n + 1]), counted)
            for n in range(draws)
        ]
        before, number = number, float(np.mean([one.counts[one.chosen] for one in thinned]))
        low, high = np.mean([one.span for one in thinned], axis=0)
        off = np.abs(ladder.counts - round(number))
        away = np.abs(np.arange(len(off)) - ladder.chosen)
        chosen = int(np.lexsort((away, ladder.behind, off))[0])
        count = int(ladder.counts[chosen])
        span = min(round(low), count), max(round(high), count)
        if abs(number - before) < 0.5:
            break
    return ladder.taken(chosen, span, "known classes")


def climbed(way: Method, pool: Pool, seed: int, progress: Callable[[float], None], counted: Counted) -> Ladder:
    """The middle of the rungs, each weighted by exp(−z² / 2): z is by how many standard errors it groups the known
    classes worse than the best one does. Those up to two errors are plausible. Where a grouping of those up to one is
    the same on the rungs beside it, there is nothing to weigh: it is taken, the finest of such.

    Where the known items do not tell, it is the finest stable rung, and all stable ones are plausible.
    """
    granularities, ladder, scores = [], [], []
    linked = np.diff(pool.graph.indptr) > 0
    for granularity, groups in _rungs(way, pool, seed, progress):
        if ladder and len(np.unique(groups[linked])) > np.count_nonzero(linked) / 2:
            break  # a class of one item is none; that each is alone would be very stable
        granularities.append(granularity)
        ladder.append(groups)
        if telling(pool):
            scores.append(bcubed(pool.classes, groups[pool.of_known]))
            if scores[-1].mean() < max(score.mean() for score in scores) / 2:
                break  # far too fine by now
    unknown = np.unique(pool.of_item)  # copies are never parted: many of them would make all rungs stable
    steady = stability([alone(groups)[unknown] for groups in ladder])
    if scores:
        behind, error = behind_the_best(np.array(scores), pool.classes)
        z = np.divide(behind, error, out=np.where(behind > 0, np.inf, 0), where=error > 0)
        chosen = int(np.average(np.arange(len(ladder)), weights=np.exp(-(z**2) / 2)).round())
        repeated = np.flatnonzero((z <= 1) & (steady == 1))
        chosen = int(repeated[-1]) if len(repeated) else chosen
        plausible = np.union1d(np.flatnonzero(z <= 2), chosen)
    else:
        z = np.zeros(len(ladder))
        plausible = np.flatnonzero(steady >= min(STABLE, steady.max()))
        chosen = int(plausible[-1])
    counts = np.array([counted(groups, pool) for groups in ladder])
    return Ladder(granularities, ladder, counts, chosen, plausible, z)


def by_hand(
    way: Method, pool: Pool, seed: int, progress: Callable[[float], None], counted: Counted, wanted: float
) -> Choice:
    """The rung whose granularity is nearest to what is `wanted`."""
    granularities, ladder = [], []
    for granularity, groups in _rungs(way, pool, seed, progress):
        granularities.append(granularity)
        ladder.append(groups)
        if granularity - wanted > np.abs(np.array(granularities) - wanted).min():
            break  # there is the next finer one, too
    wanted = np.clip(wanted, granularities[0], granularities[-1])  # far outside, all would be equally far off
    chosen = int(np.abs(np.array(granularities) - wanted).argmin())
    counts = np.array([counted(groups, pool) for groups in ladder])
    whole = Ladder(granularities, ladder, counts, chosen, np.array([chosen]), np.zeros(len(ladder)))
    return whole.taken(chosen, whole.span, BY_HAND)


def by_number(way: Method, pool: Pool, seed: int, progress: Callable[[float], None], number: int) -> Choice:
    """`number` groups, or as many as the method tells apart; no node is of none."""
    found = []
    for other in (seed, seed + way.n_rungs):
        way.made = _part(progress, len(found) / 2, (len(found) + 1) / 2)
        way.made(0.0)
        groups = alone(way.of_number(pool, min(number, len(pool.nodes)), other))
        found.append(merge(pool.graph, groups, number))
    groups, again = found
    return Choice(groups, [again], (number, number), float(number), "given n_classes")


def _rungs(way: Method, pool: Pool, seed: int, progress: Callable[[float], None]) -> Iterator[tuple[float, np.ndarray]]:
    progress(0.0)
    way.made = progress
    rungs = tqdm(way.ladder(pool, seed), total=way.n_rungs, desc="discovery", delay=2, leave=False)
    for rung, (granularity, groups) in enumerate(rungs, start=1):
        progress(rung / way.n_rungs)
        yield granularity, groups


def _part(progress: Callable[[float], None], start: float, end: float) -> Callable[[float], None]:
    """What tells `progress` of a part of the work, from `start` to `end` of the whole."""
    return lambda done: progress(float(start + (end - start) * done))


def telling(pool: Pool) -> bool:
    """Whether the known items say how fine classes are: of one class, or each of its own, any grouping that is coarse,
    or fine, enough is perfect."""
    return 1 < len(np.unique(pool.classes)) < len(np.unique(pool.of_known))


def alone(groups: np.ndarray) -> np.ndarray:
    """Each node of no group (−1) in a group of its own."""
    groups = groups.copy()
    lone = np.flatnonzero(groups < 0)
    groups[lone] = groups.max(initial=-1) + 1 + np.arange(len(lone))
    return groups


def bcubed(classes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """How well each labelled item is grouped: the harmonic mean `(N,)` of its B-cubed precision and recall.

    Of the items in its group, the share of its class; of the items of its class, the share in its group (Bagga &
    Baldwin 1998, "Entity-based cross-document coreferencing using the vector space model"). An item of no group (−1)
    is alone.
    """
    _, classes, class_size = np.unique(classes, return_inverse=True, return_counts=True)
    _, groups, group_size = np.unique(alone(groups), return_inverse=True, return_counts=True)
    _, cell, cell_size = np.unique(classes * len(group_size) + groups, return_inverse=True, return_counts=True)
    return 2 * cell_size[cell] / (class_size[classes] + group_size[groups])


def behind_the_best(scores: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each row of `(R, N)` is, in the mean, behind the best one, and the standard error of that `(R,)`.

    The standard-error rule of Breiman et al. 1984 (Classification and Regression Trees, §3.4.3), on paired differences.
    The items of one class are grouped wrongly together, not independently, so it is the classes that are counted
    (Liang & Zeger 1986, "Longitudinal data analysis using generalized linear models"): with C of them,
    error² = C / (C − 1) · Σ_c (Σ_{i in c} (d_i − mean d))² / N². Of one class the error is unknown, and taken for 0.
    """
    means = scores.mean(axis=1).round(12)  # rounding errors shall not part rows that are equally good
    behind, mean = scores[means.argmax()] - scores, means.max() - means
    of_class = np.stack([np.bincount(classes, row) for row in behind - mean[:, None]])
    n_classes = max(len(np.unique(classes)), 2)
    return mean, np.sqrt(n_classes / (n_classes - 1) * (of_class**2).sum(axis=1)) / scores.shape[1]


def stability(ladder: list[np.ndarray]) -> np.ndarray:
    """How little each of R groupings `(N,)` differs from the next coarser and the next finer one: `(R,)`, at most 1.

    It is the mean adjusted Rand index with the two; the ends have one neighbour.
    """
    step = [adjusted_rand_score(a, b) for a, b in pairwise(ladder)]
    if not step:
        return np.ones(len(ladder))
    return (np.array([step[0], *step]) + np.array([*step, step[-1]])) / 2


def persistence(groups: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """How much of each group from 0 is a group in other groupings too: the mean `(G,)` over them of its best Jaccard
    index (Hennig 2007, "Cluster-wise assessment of cluster stability"). Items of no group (−1) are in none."""
    inside = groups >= 0
    size = np.bincount(groups[inside])
    best = np.zeros(len(size))
    for other in others:
        both = inside & (other >= 0)
        common = contingency_matrix(groups[both], other[both], sparse=True).tocoo()
        mine, theirs = np.unique(groups[both]), np.unique(other[both])
        other_size = np.bincount(other[other >= 0], minlength=1)
        union = size[mine[common.row]] + other_size[theirs[common.col]] - common.data
        index = np.zeros(len(size))
        np.maximum.at(index, mine[common.row], common.data / union)
        best += index / len(others)
    return best


def merge(graph: csr_matrix, groups: np.ndarray, n_groups: int) -> np.ndarray:
    """Merge groups that are linked most for their size (see `mergers`) until `n_groups` are left, at most those there
    are."""
    if n_groups > groups.max():
        return groups
    return cut_tree(mergers(quotient(graph, groups)), n_clusters=n_groups)[:, 0][groups]


def split(nodes: np.ndarray, groups: np.ndarray, n_groups: int) -> np.ndarray:
    """Halve the largest group again and again, from its item farthest from its mean on, until there are `n_groups`.

    For numbers of classes beyond what the graph tells apart: a few items a class, or copies of one item.
    """
    groups = groups.copy()
    for new in range(groups.max() + 1, n_groups):
        members = np.flatnonzero(groups == np.bincount(groups).argmax())
        inside = nodes[members]
        far = inside[(inside @ inside.mean(axis=0)).argmin()]
        groups[members[np.argsort(-(inside @ far), kind="stable")[: len(members) // 2]]] = new
    return groups
