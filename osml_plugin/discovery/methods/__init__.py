"""Methods of grouping by name: `create("communities").ladder(pool, seed=0)`."""

from __future__ import annotations

from .base import Method, registry
from .communities import Communities

create = registry.create
names = registry.names

__all__ = ["Communities", "Method", "create", "names"]
