"""How fine to group: what the known classes say, what was asked for, or what is stable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.cluster.hierarchy import cut_tree
from scipy.sparse import csr_matrix
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import contingency_matrix
from sknetwork.hierarchy import Paris
from tqdm import tqdm

from .methods import Method
from .pool import Pool

STABLE = 0.9
"""Without known classes: the finest grouping that is this stable (adjusted Rand index, see `stability`)."""


@dataclass(frozen=True)
class Choice:
    """The grouping that is taken, and what it was taken from."""

    groups: np.ndarray
    """`(M,)` int64: the group of each node, from 0; −1: of none."""
    neighbours: list[np.ndarray]
    """The next coarser and the next finer grouping, or the same made again from another seed."""
    plausible: list[np.ndarray]
    """The groupings that could as well be the right one, the chosen one among them."""
    granularity: float
    source: str


def by_known_classes(way: Method, pool: Pool, seed: int, progress: Callable[[float], None]) -> Choice:
    """The middle of the rungs, each weighted by exp(−z² / 2): z is by how many standard errors it groups the known
    classes worse than the best one does. Those up to two errors are plausible. Where a grouping of those up to one is
    the same on the rungs beside it, there is nothing to weigh: it is taken, the finest of such.

    Without known classes it is the finest stable rung, and all stable ones are plausible.
    """
    granularities, ladder, scores = [], [], []
    for granularity, groups in _rungs(way, pool, seed, progress):
        if ladder and groups.max() + 1 > len(pool.nodes) / 2:
            break  # a class of one item is none; that each is alone would be very stable
        granularities.append(granularity)
        ladder.append(groups)
        if len(pool.classes):
            scores.append(bcubed(pool.classes, groups[pool.of_known]))
            if scores[-1].mean() < max(score.mean() for score in scores) / 2:
                break  # far too fine by now
    steady = stability([alone(groups)[pool.of_item] for groups in ladder])
    if scores:
        behind, error = behind_the_best(np.array(scores), pool.classes)
        z = np.divide(behind, error, out=np.where(behind > 0, np.inf, 0), where=error > 0)
        chosen = int(np.average(np.arange(len(ladder)), weights=np.exp(-(z**2) / 2)).round())
        repeated = np.flatnonzero((z <= 1) & (steady == 1))
        chosen, source = (repeated[-1] if len(repeated) else chosen), "known classes"
        plausible = np.union1d(np.flatnonzero(z <= 2), chosen)
    else:
        plausible = np.flatnonzero(steady >= min(STABLE, steady.max()))
        chosen, source = plausible[-1], "default"
    return _choice(ladder, chosen, plausible, granularities, source)


def by_hand(way: Method, pool: Pool, seed: int, progress: Callable[[float], None], wanted: float) -> Choice:
    """The rung whose granularity is nearest to what is `wanted`."""
    granularities, ladder = [], []
    for granularity, groups in _rungs(way, pool, seed, progress):
        granularities.append(granularity)
        ladder.append(groups)
        if granularity - wanted > np.abs(np.array(granularities) - wanted).min():
            break  # there is the next finer one, too
    chosen = np.abs(np.array(granularities) - wanted).argmin()
    return _choice(ladder, chosen, [chosen], granularities, "given granularity")


def by_number(way: Method, pool: Pool, seed: int, number: int) -> Choice:
    """`number` groups, or as many as the method tells apart; no node is of none."""
    groups, again = (
        merge(pool.graph, alone(way.of_number(pool, min(number, len(pool.nodes)), other)), number)
        for other in (seed, seed + way.n_rungs)
    )
    return Choice(groups, [again], [groups], float(number), "given n_classes")


def _rungs(way: Method, pool: Pool, seed: int, progress: Callable[[float], None]) -> Iterator[tuple[float, np.ndarray]]:
    rungs = tqdm(way.ladder(pool, seed), total=way.n_rungs, desc="discovery", delay=2, leave=False)
    for rung, (granularity, groups) in enumerate(rungs):
        progress(rung / way.n_rungs)
        yield granularity, groups


def _choice(
    ladder: list[np.ndarray], chosen: int, plausible: Sequence[int], granularities: list[float], source: str
) -> Choice:
    beside = [ladder[i] for i in (chosen - 1, chosen + 1) if 0 <= i < len(ladder)]
    return Choice(
        ladder[chosen], beside or [ladder[chosen]], [ladder[i] for i in plausible], granularities[chosen], source
    )


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
    behind = scores[scores.mean(axis=1).argmax()] - scores
    mean = behind.mean(axis=1)
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
    """Merge groups that are linked most for their size until `n_groups` of them are left (at most those there are).

    Bonald et al. 2018, "Hierarchical graph clustering using node pair sampling".
    """
    member = csr_matrix((np.ones(len(groups)), (np.arange(len(groups)), groups)))
    if n_groups >= member.shape[1]:
        return groups
    tree = Paris().fit_predict(csr_matrix(member.T @ graph @ member))
    return cut_tree(tree, n_clusters=n_groups)[:, 0][groups]


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
