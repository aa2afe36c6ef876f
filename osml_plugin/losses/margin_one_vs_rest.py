"""m-OvR: one yes-or-no question a class, with an angular margin."""

from __future__ import annotations

import math

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from ..errors import OsmlError
from ..registry import checked_not_negative, checked_positive
from .base import ClassificationLoss


class MarginOneVsRestLoss(ClassificationLoss):
    """L = −Σ_k [1{y=k} log p_k + 1{y≠k} log(1 − p_k)] with p_k = σ(T · cos(θ_k + m)), where θ_k is the angle between
    the embedding and the class's proxy (Park et al., arXiv 2209.11436). The margin is on every k, as published.

    An item labelled `UNKNOWN` is a negative for every class.

    Args:
        scale: T > 0.
        margin: m in radians, 0 to π.
    """

    takes_unknown = True

    def __init__(self, num_classes: int, embedding_size: int, scale: float = 32, margin: float = 0.5, **kwargs):
        super().__init__(num_classes, embedding_size, **kwargs)
        c_f.assert_distance_type(self, CosineSimilarity)
        self.scale = checked_positive("scale of MarginOneVsRestLoss", scale)
        self.margin = checked_not_negative("margin of MarginOneVsRestLoss", margin)
        if margin > math.pi:
            raise OsmlError(f"margin of MarginOneVsRestLoss is in radians, 0 to π (0.5 is usual); got {margin!r}")
        self.add_to_recordable_attributes(list_of_names=["scale", "margin"], is_stat=False)
        self.add_to_recordable_attributes(name="avg_angle", is_stat=True)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """T · cos θ_k, without the margin."""
        return self.scale * self._cosine(embeddings)

    def _cosine(self, embeddings: Tensor) -> Tensor:
        return self.distance(embeddings, self.W.t().to(embeddings.dtype))

    def _margin_logits(self, cosine: Tensor) -> Tensor:
        # cos(arccos(c) + m), without arccos: its slope has no bound at ±1.
        sine = (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
        return self.scale * (cosine * math.cos(self.margin) - sine * math.sin(self.margin))

    def _known_losses(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        cosine = self._cosine(embeddings)
        own = one_hot(labels, self.num_classes).bool()
        if self.collect_stats and len(labels):
            self.avg_angle = cosine.detach()[own].clamp(-1, 1).arccos().mean().rad2deg().item()
        logits = self._margin_logits(cosine)
        return {"loss": -logsigmoid(torch.where(own, logits, -logits)).sum(dim=1)}

    def _unknown_losses(self, embeddings: Tensor) -> Tensor:
        return -logsigmoid(-self._margin_logits(self._cosine(embeddings))).sum(dim=1)

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()
