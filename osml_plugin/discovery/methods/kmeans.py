"""Spherical k-means with a growing number of groups."""

from __future__ import annotations

from collections.abc import Iterator

import faiss
import numpy as np

from ..pool import Pool
from .base import Method, group_numbers

ITERATIONS = 25
SETTLED = 1e-3
"""Gain of an iteration, relative, at which it ends."""
TRIES = 3
FEW = 50
"""Groups up to which it is tried so often; with more of them tries end up alike."""
A_GROUP = 1024
"""Nodes a group that the centres are found from, at most; drawn at random where there are more."""


class KMeans(Method, name="kmeans"):
    """k-means by cosine (Dhillon & Modha 2001, "Concept decompositions for large sparse text data using clustering"),
    from k-means++ (Arthur & Vassilvitskii 2007); the granularity is the number of groups.

    It takes classes for balls of one size. Time is linear in nodes times groups.
    """

    n_rungs = 34

    def ladder(self, pool: Pool, seed: int) -> Iterator[tuple[float, np.ndarray]]:
        for rung, number in enumerate(group_numbers(len(pool.nodes))):
            # Other seeds, so that stability is not feigned.
            yield float(number), self.of_number(pool, int(number), seed + rung)

    def of_number(self, pool: Pool, number: int, seed: int) -> np.ndarray:
        centres = faiss.Kmeans(
            pool.nodes.shape[1],
            number,
            spherical=True,
            niter=ITERATIONS,
            early_stop_threshold=SETTLED,
            nredo=TRIES if number <= FEW else 1,
            seed=seed % 2**31,  # a C int
            init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            min_points_per_centroid=1,
            max_points_per_centroid=A_GROUP,
        )
        centres.train(pool.nodes)
        nearest = centres.index.search(pool.nodes, 1)[1][:, 0]
        return np.unique(nearest, return_inverse=True)[1]
