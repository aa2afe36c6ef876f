"""Losses that pytorch-metric-learning lacks, made of its parts: reducers, distances, regularizers, statistics."""

from .arpl import ARPLLoss
from .base import ClassificationLoss
from .cac import CACLoss
from .l2_softmax import L2SoftmaxLoss
from .margin_one_vs_rest import MarginOneVsRestLoss
from .prototypical import PrototypicalLoss
from .pseudo_unknowns import PseudoUnknowns
from .reciprocal_point import ReciprocalPointLoss

__all__ = [
    "ARPLLoss",
    "CACLoss",
    "ClassificationLoss",
    "L2SoftmaxLoss",
    "MarginOneVsRestLoss",
    "PrototypicalLoss",
    "PseudoUnknowns",
    "ReciprocalPointLoss",
]
