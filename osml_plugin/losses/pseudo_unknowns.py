"""Embeddings between classes, as negatives of no class."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor, nn
from torch.distributions import Beta

from .. import UNKNOWN
from ..errors import OsmlError
from ..registry import checked_positive


class PseudoUnknowns(BaseMetricLossFunction):
    """Gives a loss, beside the batch, mixtures λ f_i + (1 − λ) f_j of embeddings of different classes, labelled
    `UNKNOWN`; λ is drawn from Beta(α, α) (manifold mixup, Verma et al. 2019; as negatives of no class: Zhou et al.
    2021, "Learning Placeholders for Open-Set Recognition").

    A miner cannot do this: PML's miners give indices into the batch. A batch of one class is left as it is. Distance,
    reducer, regularizers and statistics are those of the loss inside.

    Args:
        loss: one with `takes_unknown`: MarginOneVsRestLoss, ReciprocalPointLoss, ARPLLoss.
        share: mixtures for each item of the batch, above 0.
        alpha: α > 0; the larger, the nearer to the middle. At 1 and below, many mixtures are nearly one of the items.
    """

    def __init__(self, loss: nn.Module, share: float = 0.5, alpha: float = 2.0):
        super().__init__()
        if not getattr(loss, "takes_unknown", False):
            raise OsmlError(
                "PseudoUnknowns needs a loss that can use items of no class: expected MarginOneVsRestLoss, "
                f"ReciprocalPointLoss or ARPLLoss; got {type(loss).__name__}"
            )
        self.loss = loss
        self.share = checked_positive("share of PseudoUnknowns", share)
        self.alpha = checked_positive("alpha of PseudoUnknowns", alpha)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings `(N, D)` and labels `(N,)`; `indices_tuple` is about these alone."""
        c_f.labels_required(labels)
        c_f.check_shapes(embeddings, labels)
        c_f.ref_not_supported(None, None, ref_emb, ref_labels)
        mixtures = self.mix(embeddings, labels)
        unknown = torch.full((len(mixtures),), UNKNOWN, dtype=labels.dtype, device=embeddings.device)
        return self.loss(
            torch.cat([embeddings, mixtures]), torch.cat([labels.to(embeddings.device), unknown]), indices_tuple
        )

    def mix(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mixtures `(round(share · N), D)` of embeddings `(N, D)`, N counting those that are of a class; gradients flow
        into both parts."""
        labels = labels.to(embeddings.device)
        embeddings, labels = embeddings[labels != UNKNOWN], labels[labels != UNKNOWN]
        others = (labels[:, None] != labels).float()
        if not others.any():
            return embeddings[:0]
        n = max(1, round(self.share * len(labels)))
        first = torch.randint(len(labels), (n,), device=labels.device)
        second = torch.multinomial(others[first], 1)[:, 0]
        share = Beta(self.alpha, self.alpha).sample((n, 1)).to(embeddings)
        return share * embeddings[first] + (1 - share) * embeddings[second]
