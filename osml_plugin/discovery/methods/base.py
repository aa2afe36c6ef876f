"""The contract of a method of grouping: a ladder of groupings, from coarse to fine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np

from ...registry import Named, Registry
from ..pool import Pool

registry: Registry[Method] = Registry("discovery method")


def group_numbers(n_nodes: int) -> np.ndarray:
    """The rungs of methods that are told how many groups to make: 1 … 10, then a fifth more each, up to 795."""
    numbers = np.append(np.arange(1, 11), (10 * 1.2 ** np.arange(1, 25)).round().astype(int))
    return numbers[numbers <= n_nodes]


class Method(Named):
    """A way to group the nodes of a pool. It proposes groupings of every granularity; which one is taken is decided
    outside, in the same way for all methods (`granularity.py`)."""

    registry = registry
    n_rungs: ClassVar[int]
    """The most rungs of its ladder."""
    made: Callable[[float], None] = staticmethod(lambda done: None)
    """What a ladder whose rungs are all made before the first is out tells how much is made, from 0 to 1."""

    def ladder(self, pool: Pool, seed: int) -> Iterator[tuple[float, np.ndarray]]:
        """Granularity and groups of each rung, from coarse to fine; made one at a time, since whoever asks may stop.

        The granularity is a number that rises; what it means the method says. Groups are `(M,)` int64 from 0, each
        number used, over all nodes of the pool, known ones included; −1 is a node of no group (noise). The same seed
        gives the same groups.
        """
        raise NotImplementedError

    def of_number(self, pool: Pool, number: int, seed: int) -> np.ndarray:
        """The groups `(M,)` where the number of groups, 1 … M, is known: exactly so many if the method can, else those
        of the coarsest rung with at least so many, or of the finest one."""
        groups = np.zeros(len(pool.nodes), dtype=np.int64)
        for _, groups in self.ladder(pool, seed):
            if groups.max() + 1 >= number:
                break
        return groups
