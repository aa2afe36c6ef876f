"""L2-Softmax: a softmax over embeddings that all have the same norm."""

from __future__ import annotations

import torch
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..registry import checked_positive
from .base import ClassificationLoss


class L2SoftmaxLoss(ClassificationLoss):
    """−log softmax(W · α f/‖f‖)_y (Ranjan et al. 2017, arXiv 1703.09507), without its bias: a bias would prefer some
    classes before anything was seen.

    Args:
        scale: α > 0, the norm that all embeddings get. For C classes at probability p it has to be at least
            log(p(C − 2)/(1 − p)), they show: 5.5 for 30 classes at 0.9.
        learn_scale: whether α is a weight, which starts at `scale`.
    """

    def __init__(self, num_classes: int, embedding_size: int, scale: float = 16, learn_scale: bool = False, **kwargs):
        super().__init__(num_classes, embedding_size, **kwargs)
        c_f.assert_distance_type(self, DotProductSimilarity, normalize_embeddings=False)
        scale = checked_positive("scale of L2SoftmaxLoss", scale)
        self.scale = nn.Parameter(torch.tensor(scale)) if learn_scale else scale
        self.add_to_recordable_attributes(list_of_names=["scale"], is_stat=False)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        return self.scale * self.distance(self.distance.normalize(embeddings), self.W.t().to(embeddings.dtype))

    def _known_losses(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self.get_logits(embeddings), labels, reduction="none")}

    def get_default_distance(self) -> DotProductSimilarity:
        return DotProductSimilarity(normalize_embeddings=False)

    def get_default_weight_init_func(self) -> c_f.TorchInitWrapper:
        return c_f.TorchInitWrapper(nn.init.xavier_normal_)
