"""Communities of the graph of nearest neighbours, by modularity."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from ..graph import communities, quotient
from ..pool import Pool
from .base import Method

RESOLUTIONS = 0.02 * 1.4 ** np.arange(24)
"""From a few groups in all to groups of about as many items as have each other among their nearest."""
GROUPED = 60_000
"""How many nodes are grouped one by one over all rungs; but at least those of two rungs are."""


class Communities(Method, name="communities"):
    """Louvain's communities of the graph; the granularity is the resolution of modularity (Blondel et al. 2008;
    Reichardt & Bornholdt 2006).

    The rungs of a large graph are made in a few chains, dealt out in turn: the finest rung of a chain groups the nodes,
    each other one the groups of the rung before. So all rungs take little more time than two, and neighbouring ones
    have no step in common; each has its own seed too, so that stability is not feigned.
    """

    n_rungs = len(RESOLUTIONS)

    def ladder(self, pool: Pool, seed: int) -> Iterator[tuple[float, np.ndarray]]:
        n_chains = min(max(2, GROUPED // len(pool.nodes)), self.n_rungs)
        chains = [pool.joined] * n_chains  # the groups as a graph, and the group of each node
        rungs = []
        for rung in tqdm(range(self.n_rungs)[::-1], desc="communities", delay=2, leave=False):
            graph, group_of = chains[rung % n_chains]
            joined = communities(graph, RESOLUTIONS[rung], seed + rung)
            chains[rung % n_chains] = quotient(graph, joined), joined[group_of]
            rungs.append((float(RESOLUTIONS[rung]), joined[group_of]))
            self.made(len(rungs) / self.n_rungs)
        yield from reversed(rungs)
