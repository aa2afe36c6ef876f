"""Inner product with the pattern of the predicted class."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import class_means
from .logits import ProxyDetector, largest


class SHE(ProxyDetector, name="she"):
    """− x · S_ŷ, S_c the mean of the correctly classified training items of class c: simplified Hopfield energy
    (Zhang et al., ICLR 2023, Sec. 3).

    The pattern of a class without a correctly classified item is the mean of all its items.
    """

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        super()._fit(embeddings, labels, class_weights)
        nearest = torch.cat([largest(self._logits(part)) for part in embeddings.split(self.chunk_size)])
        n_classes = len(class_weights)
        right = nearest == labels
        used = right | (labels[right].bincount(minlength=n_classes) == 0)[labels]
        self.register_buffer("patterns", class_means(embeddings[used], labels[used], n_classes))

    def _item_score(self, embeddings: Tensor, logits: Tensor, nearest: Tensor) -> Tensor:
        return -(embeddings * self.patterns.index_select(0, nearest)).sum(dim=1)
