"""The embedding as it is compared when the unknown are grouped: whitened by how known classes vary."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.covariance import ledoit_wolf_shrinkage, shrunk_covariance

from .graph import BLOCK

SHRINKAGE = 0.1
"""The least of the covariance that is replaced by a multiple of the identity of the same trace; more where the known
items are few (Ledoit & Wolf 2004). Without it, directions in which a few items happen not to differ would count for
all."""
NO_SPREAD = 1e-10
"""Mean variance of a unit vector's coordinates within classes below which the known items are but copies."""


def whitened(items: np.ndarray, known: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Unit rows `(N, D)` of `items`, in which known classes are on average about as wide in all directions.

        z = S_w^(-1/2) (x − μ),  z / ‖z‖

    with μ the mean of the known items and S_w their covariance within classes, shrunk towards a multiple of the
    identity. It is the whitening of linear discriminant analysis, and of relevant component analysis (Bar-Hillel et
    al. 2003, "Learning distance functions using equivalence relations").

    A network trained on some classes spreads them along few directions and leaves little length to all others, and
    there lies what tells unknown classes apart. In those directions known classes are narrow too, so that whitening
    lengthens them. The unknown items take no part: an item lies at the same place whatever it is grouped with.

    Without two known items of one class, or if all of them are copies, nothing is known, and `items` are returned.

    Time is O((N + K)·D² + D³), memory linear.

    Args:
        items: `(N, D)` unit vectors.
        known: `(K, D)` unit vectors that training did not see; K may be 0.
        classes: `(K,)` int64 in 0 … C−1: their classes.

    Returns:
        `(N, D)` float32. An item that lies exactly at μ has no direction: a row of zeros.
    """
    if len(known) == 0:
        return items
    size = np.bincount(classes)
    sums = csr_matrix((np.ones(len(known)), (classes, np.arange(len(known))))) @ known
    inside = known - (sums / np.maximum(size, 1)[:, None])[classes]
    inside = inside[size[classes] > 1]  # an item alone in its class tells nothing
    if not len(inside) or np.square(inside).mean() < NO_SPREAD:
        return items
    shrinkage = max(SHRINKAGE, ledoit_wolf_shrinkage(inside, assume_centered=True))
    variances, axes = np.linalg.eigh(shrunk_covariance(inside.T @ inside / len(inside), shrinkage))
    root, center = axes / np.sqrt(variances) @ axes.T, known.mean(axis=0, dtype=np.float64)
    result = np.empty(items.shape, dtype=np.float32)
    for start in range(0, len(items), BLOCK):
        moved = (items[start : start + BLOCK] - center) @ root
        length = np.linalg.norm(moved, axis=1, keepdims=True)
        result[start : start + BLOCK] = np.divide(moved, length, out=np.zeros_like(moved), where=length > 0)
    return result
