"""The contract of a method of grouping: a ladder of groupings, from coarse to fine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from ...registry import Named, Registry
from ..pool import Pool

registry: Registry[Method] = Registry("discovery method")


class Method(Named):
    """A way to group the nodes of a pool. It proposes groupings of every granularity; which one is taken is decided
    outside, in the same way for all methods (`granularity.py`)."""

    registry = registry
    n_rungs: ClassVar[int]
    """The most rungs of its ladder."""

    def ladder(self, pool: Pool, seed: int) -> Iterator[tuple[float, np.ndarray]]:
        """Granularity and groups of each rung, from coarse to fine; made one at a time, since whoever asks may stop.

        The granularity is a number that rises; what it means the method says. Groups are `(M,)` int64 from 0, each
        number used, over all nodes of the pool, known ones included; −1 is a node of no group (noise). The same seed
        gives the same groups.
        """
        raise NotImplementedError
