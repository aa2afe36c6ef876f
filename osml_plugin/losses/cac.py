"""Class Anchor Clustering: each class is drawn to an anchor that was fixed before training."""

from __future__ import annotations

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmin

from ..registry import checked_not_negative, checked_positive
from .base import ClassificationLoss


class CACLoss(ClassificationLoss):
    """L = log(1 + Σ_{j≠y} exp(d_y − d_j)) + λ d_y, where d_c is the distance of the logits z = f · W from the anchor of
    class c, which is α in the direction of the c-th axis (Miller et al. 2021, arXiv 2004.02434). Its
    sub-losses are `tuplet_loss` and `anchor_loss`.

    The authors' logit layer has a bias; here it has none, so that logits stay linear in the embedding.

    Args:
        magnitude: α > 0.
        anchor_weight: λ ≥ 0.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, magnitude: float = 10, anchor_weight: float = 0.1, **kwargs
    ):
        super().__init__(num_classes, embedding_size, **kwargs)
        c_f.assert_distance_type(self, LpDistance, normalize_embeddings=False, p=2, power=1)
        self.magnitude = checked_positive("magnitude of CACLoss", magnitude)
        self.anchor_weight = checked_not_negative("anchor_weight of CACLoss", anchor_weight)
        self.add_to_recordable_attributes(list_of_names=["magnitude", "anchor_weight"], is_stat=False)
        self.add_to_recordable_attributes(name="avg_anchor_distance", is_stat=True)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        return embeddings @ self.W.to(embeddings.dtype)

    def distances(self, embeddings: Tensor, centers: Tensor | None = None) -> Tensor:
        """Distances `(N, C)` of the logits from the anchors, or from other centres `(C, C)`, one a row."""
        logits = self.get_logits(embeddings)
        if centers is None:
            centers = self.magnitude * torch.eye(self.num_classes, dtype=logits.dtype, device=logits.device)
        return self.distance(logits, centers)

    @torch.no_grad()
    def score(self, embeddings: Tensor, centers: Tensor | None = None) -> Tensor:
        """The authors' unknown score `(N,)`, min_c d_c (1 − softmin(d)_c): higher = more unknown.

        Args:
            embeddings: as the loss has them, neither scaled nor normalised since.
            centers: `(C, C)`; the authors put each class's mean logits here when training is over. None = the anchors.
        """
        distances = self.distances(embeddings, centers)
        return (distances * (1 - softmin(distances, dim=1))).amin(dim=1)

    def _known_losses(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        distances = self.distances(embeddings)
        own = distances.gather(1, labels[:, None])[:, 0]
        if self.collect_stats and len(own):
            self.avg_anchor_distance = own.mean().item()
        # The 1 in the logarithm is exp(d_y − d_y): a softmin over all classes, and safe for any distance.
        return {
            "tuplet_loss": cross_entropy(-distances, labels, reduction="none"),
            "anchor_loss": self.anchor_weight * own,
        }

    def _sub_loss_names(self) -> list[str]:
        return ["tuplet_loss", "anchor_loss"]

    def get_default_distance(self) -> LpDistance:
        return LpDistance(normalize_embeddings=False)

    def get_default_weight_init_func(self) -> c_f.TorchInitWrapper:
        return c_f.TorchInitWrapper(nn.init.normal_, std=0.01)
