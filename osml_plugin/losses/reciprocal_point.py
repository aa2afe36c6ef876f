"""RPL: each class has a point that stands for all that it is not, and moves away from it."""

from __future__ import annotations

import math

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from ..registry import checked_not_negative, checked_positive
from .base import ClassificationLoss


class ReciprocalPointLoss(ClassificationLoss):
    """L = −log softmax(d / T)_y + λ (d_y − R)², where d_c = ‖f − P_c‖² / D is the distance from the class's reciprocal
    point, the c-th column of `W`, and R is learned (Chen et al. 2020, "Learning Open Set Network with Discriminative
    Reciprocal Points"; with one point a class and one R, as in their code). Far from P_y means like y. Its
    sub-losses are `loss` and `radius_loss`.

    An item labelled `UNKNOWN` is to be equally far from all points: its loss is Σ_c p_c log(C p_c) with p = softmax(d),
    which is 0 where p is uniform. (The authors minimise the exponential of the batch's mean of Σ_c p_c log p_c.)

    Args:
        temperature: T > 0.
        radius_weight: λ ≥ 0.
    """

    takes_unknown = True

    def __init__(
        self, num_classes: int, embedding_size: int, temperature: float = 1.0, radius_weight: float = 0.1, **kwargs
    ):
        super().__init__(num_classes, embedding_size, **kwargs)
        c_f.assert_distance_type(self, LpDistance, p=2, power=2)
        self.temperature = checked_positive("temperature", temperature)
        self.radius_weight = checked_not_negative("radius_weight", radius_weight)
        self.radius = nn.Parameter(torch.zeros(()))
        self.add_to_recordable_attributes(list_of_names=["temperature", "radius_weight", "radius"], is_stat=False)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """d `(N, C)`: higher = more like the class."""
        return self._distances(embeddings)

    def _distances(self, embeddings: Tensor) -> Tensor:
        return self.distance(embeddings, self.W.t().to(embeddings.dtype)) / len(self.W)

    def _radius_losses(self, own: Tensor) -> Tensor:
        """Of distances `(N,)` from the points of the items' own classes."""
        return (own - self.radius).square()

    def _known_losses(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        own = self._distances(embeddings).gather(1, labels[:, None])[:, 0]
        return {
            "loss": cross_entropy(self.get_logits(embeddings) / self.temperature, labels, reduction="none"),
            "radius_loss": self.radius_weight * self._radius_losses(own),
        }

    def _unknown_losses(self, embeddings: Tensor) -> Tensor:
        log_p = log_softmax(self._distances(embeddings), dim=1)
        return (log_p.exp() * log_p).sum(dim=1) + math.log(self.num_classes)

    def _sub_loss_names(self) -> list[str]:
        return ["loss", "radius_loss"]

    def get_default_distance(self) -> LpDistance:
        return LpDistance(normalize_embeddings=False, power=2)

    def get_default_weight_init_func(self) -> c_f.TorchInitWrapper:
        return c_f.TorchInitWrapper(nn.init.normal_, std=0.1)
