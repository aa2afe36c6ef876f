"""Detectors by name: `create("knn", k=5).fit(embeddings, labels).score(embeddings)`."""

from __future__ import annotations

from .base import Detector, registry
from .centroid import CentroidCosine
from .combination import Combination
from .evm import EVM
from .fdbd import FDBD
from .gen import GEN
from .gmm import GMM
from .kl_matching import KLMatching
from .knn import KNN
from .logits import MSP, Energy, Entropy, MaxLogit
from .mahalanobis import Mahalanobis, RelativeMahalanobis
from .movr import MarginOneVsRest
from .nci import NCI
from .nearest_ratio import NearestRatio
from .nnguide import NNGuide
from .norm import Norm
from .openmax import OpenMax
from .residual import Residual
from .shaping import ASH, SCALE, ReAct
from .she import SHE
from .ssd import SSD
from .vim import ViM

create = registry.create
names = registry.names

__all__ = [
    "ASH",
    "EVM",
    "FDBD",
    "GEN",
    "GMM",
    "KNN",
    "MSP",
    "NCI",
    "SCALE",
    "SHE",
    "SSD",
    "CentroidCosine",
    "Combination",
    "Detector",
    "Energy",
    "Entropy",
    "KLMatching",
    "Mahalanobis",
    "MarginOneVsRest",
    "MaxLogit",
    "NNGuide",
    "NearestRatio",
    "Norm",
    "OpenMax",
    "ReAct",
    "RelativeMahalanobis",
    "Residual",
    "ViM",
    "create",
    "names",
]
