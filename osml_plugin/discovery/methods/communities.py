"""Communities of the graph of nearest neighbours, by modularity."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..graph import communities
from ..pool import Pool
from .base import Method

RESOLUTIONS = 0.02 * 1.4 ** np.arange(24)
"""From a few groups in all to groups of about as many items as have each other among their nearest."""


class Communities(Method, name="communities"):
    """Louvain's communities of the graph; the granularity is the resolution of modularity (Blondel et al.
    2008;
    Reichardt & Bornholdt 2006)."""

    n_rungs = len(RESOLUTIONS)

    def ladder(self, pool: Pool, seed: int) -> Iterator[tuple[float, np.ndarray]]:
        for rung, resolution in enumerate(RESOLUTIONS):
            # Other seeds, so that stability is not feigned.
            yield float(resolution), communities(pool.graph, resolution, seed + rung)
