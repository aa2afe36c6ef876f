"""How fine to group: what the known classes say, what was asked for, or what is stable."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy.cluster.hierarchy import cut_tree
from scipy.sparse import csr_matrix
from sklearn.metrics import adjusted_rand_score
from sknetwork.hierarchy import Paris

ERRORS = 3
"""Three rather than one or two, because items of one class are grouped wrongly together, not independently."""


def bcubed(classes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """How well each labelled item is grouped: the harmonic mean `(N,)` of its B-cubed precision and recall.

    Of the items in its group, the share of its class; of the items of its class, the share in its group (Bagga &
    Baldwin 1998, "Entity-based cross-document coreferencing using the vector space model").
    """
    _, classes, class_size = np.unique(classes, return_inverse=True, return_counts=True)
    _, groups, group_size = np.unique(groups, return_inverse=True, return_counts=True)
    _, cell, cell_size = np.unique(classes * len(group_size) + groups, return_inverse=True, return_counts=True)
    return 2 * cell_size[cell] / (class_size[classes] + group_size[groups])


def as_good_as_the_best(scores: np.ndarray) -> np.ndarray:
    """Which rows of `(R, N)` have a mean at most `ERRORS` standard errors, of the paired difference, below the best.

    As the one-standard-error rule of Breiman et al. 1984 (Classification and Regression Trees, §3.4.3).
    """
    behind = scores[scores.mean(axis=1).argmax()] - scores
    return behind.mean(axis=1) <= ERRORS * behind.std(axis=1) / np.sqrt(scores.shape[1])


def stability(ladder: list[np.ndarray]) -> np.ndarray:
    """How little each of R groupings `(N,)` differs from the next coarser and the next finer one: `(R,)`, at most 1.

    It is the mean adjusted Rand index with the two; the ends have one neighbour.
    """
    step = [adjusted_rand_score(a, b) for a, b in pairwise(ladder)]
    if not step:
        return np.ones(len(ladder))
    return (np.array([step[0], *step]) + np.array([*step, step[-1]])) / 2


def merge(graph: csr_matrix, groups: np.ndarray, n_groups: int) -> np.ndarray:
    """Merge groups that are linked most for their size until `n_groups` of them are left (at most those there are).

    Bonald et al. 2018, "Hierarchical graph clustering using node pair sampling".
    """
    member = csr_matrix((np.ones(len(groups)), (np.arange(len(groups)), groups)))
    if n_groups == member.shape[1]:
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
