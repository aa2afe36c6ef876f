"""Detectors by name: `create("knn", k=5).fit(embeddings, labels).score(embeddings)`."""

from __future__ import annotations

from .base import Detector, registry
from .centroid import CentroidCosine
from .knn import KNN
from .logits import MSP, Energy, Entropy, MaxLogit
from .mahalanobis import Mahalanobis, RelativeMahalanobis

create = registry.create
names = registry.names

__all__ = [
    "KNN",
    "MSP",
    "CentroidCosine",
    "Detector",
    "Energy",
    "Entropy",
    "Mahalanobis",
    "MaxLogit",
    "RelativeMahalanobis",
    "create",
    "names",
]
