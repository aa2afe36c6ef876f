"""Methods of grouping by name: `create("communities").ladder(pool, seed=0)`."""

from __future__ import annotations

from .agglomerative import Agglomerative
from .base import Method, registry
from .communities import Communities
from .density import Density
from .kmeans import KMeans
from .semi_supervised_kmeans import SemiSupervisedKMeans

create = registry.create
names = registry.names

__all__ = [
    "Agglomerative",
    "Communities",
    "Density",
    "KMeans",
    "Method",
    "SemiSupervisedKMeans",
    "create",
    "names",
]
