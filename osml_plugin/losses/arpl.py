"""ARPL: reciprocal points with an adversarial margin."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu

from ..registry import checked_not_negative
from .reciprocal_point import ReciprocalPointLoss


class ARPLLoss(ReciprocalPointLoss):
    """L = −log softmax((d − f · P) / T)_y + λ max(d_y − R + margin, 0): distance and direction from the reciprocal
    points, and known items kept within R (Chen et al. 2021, "Adversarial Reciprocal Points Learning for Open Set
    Recognition"). Items labelled `UNKNOWN` take the place of its confusing samples, which a GAN makes there.

    Args:
        temperature: T > 0.
        radius_weight: λ ≥ 0.
        margin: 1 in the authors' code, 0 in their paper.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        temperature: float = 1.0,
        radius_weight: float = 0.1,
        margin: float = 1.0,
        **kwargs,
    ):
        super().__init__(num_classes, embedding_size, temperature, radius_weight, **kwargs)
        self.margin = checked_not_negative("margin of ARPLLoss", margin)
        self.add_to_recordable_attributes(list_of_names=["margin"], is_stat=False)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """d − f · P `(N, C)`: higher = more like the class."""
        return self._distances(embeddings) - embeddings @ self.W.to(embeddings.dtype)

    def _radius_losses(self, own: Tensor) -> Tensor:
        return relu(own - self.radius + self.margin)
