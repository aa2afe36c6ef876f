"""Communities of the graph of nearest neighbours, by modularity."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from ..graph import communities, contracted, quotient
from ..pool import Pool
from .base import Method

RESOLUTIONS = 0.02 * 1.4 ** np.arange(40)
"""From a few groups in all; how far, is said by `FINE`."""
COARSE = 24
"""How many rungs there are at least: the last is of resolution 46."""
FINE = 200
"""The finest resolution is one part in so many of the number of nodes: there, two groups of 20 nodes are merged only
where at least a tenth of the links of each leads to the other."""
GROUPED = 60_000
"""How many nodes are grouped one by one over all rungs, but at least those of two rungs; more nodes than this are
contracted first."""


class Communities(Method, name="communities"):
    """Louvain's communities of the graph; the granularity is the resolution of modularity (Blondel et al. 2008;
    Reichardt & Bornholdt 2006).

    The rungs of a large graph are made in a few chains, dealt out in turn: the finest rung of a chain groups the nodes,
    each other one the groups of the rung before. So all rungs take little more time than two, and neighbouring ones
    have no step in common, but that nodes of a very large graph were contracted to begin with; each has its own seed
    too, so that stability is not feigned.
    """

    n_rungs = len(RESOLUTIONS)

    def ladder(self, pool: Pool, seed: int) -> Iterator[tuple[float, np.ndarray]]:
        graph, group_of = pool.joined
        n_rungs = max(COARSE, int(np.searchsorted(RESOLUTIONS, graph.shape[0] / FINE)))
        n_chains = min(max(2, GROUPED // graph.shape[0]), n_rungs)
        if graph.shape[0] > GROUPED:
            atoms = contracted(graph)
            graph, group_of = quotient(graph, atoms), atoms[group_of]
        chains = [(graph, group_of)] * n_chains  # the groups as a graph, and the group of each node
        rungs = []
        for rung in tqdm(range(n_rungs)[::-1], desc="communities", delay=2, leave=False):
            graph, group_of = chains[rung % n_chains]
            joined = communities(graph, RESOLUTIONS[rung], seed + rung)
            chains[rung % n_chains] = quotient(graph, joined), joined[group_of]
            rungs.append((float(RESOLUTIONS[rung]), joined[group_of]))
            self.made(len(rungs) / n_rungs)
        yield from reversed(rungs)
