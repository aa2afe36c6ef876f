"""Energy, guided by how alike the nearest training items are."""

from __future__ import annotations

import faiss
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..registry import checked_count
from .logits import ProxyDetector

MAX_PRODUCTS = 2**25
"""Products held at once on a GPU: 128 MiB."""


class NNGuide(ProxyDetector, name="nnguide"):
    """− E(x) · mean over the k largest of E(z) cos(x, z), z the training items (Park, Jung & Teoh, ICCV 2023, Sec. 3).

    E is the log-sum-exp of the logits. All training items are compared, where the paper takes a sample. k is at most
    the number of items of the class with the largest logit, so that a class enrolled from a few examples is measured
    by these alone.
    """

    search_space = {"k": (1, 10, 100)}

    def __init__(self, *, k: int = 10):
        super().__init__()
        self.k = checked_count("k of detector 'nnguide'", k)

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        super()._fit(embeddings, labels, class_weights)
        parts = embeddings.split(self.chunk_size)
        bank = [normalize(part) * self._logits(part).logsumexp(dim=1, keepdim=True) for part in parts]
        self.register_buffer("bank", torch.cat(bank))
        self.register_buffer("class_sizes", labels.bincount())

    def _item_score(self, embeddings: Tensor, logits: Tensor, nearest: Tensor) -> Tensor:
        sums = self._largest_products(normalize(embeddings)).cumsum(dim=1)
        k = self.class_sizes[nearest].clamp_max(sums.shape[1])
        guidance = sums.gather(1, k[:, None] - 1)[:, 0] / k
        return -torch.logsumexp(logits, dim=1) * guidance

    def _largest_products(self, queries: Tensor) -> Tensor:
        """The k largest inner products `(N, k)` with the bank, the largest first."""
        k = min(self.k, len(self.bank))
        if self.bank.device.type != "cpu":
            rows = max(1, MAX_PRODUCTS // len(self.bank))
            return torch.cat([(q @ self.bank.T).topk(k).values for q in queries.split(rows)])
        return torch.from_numpy(faiss.knn(queries.numpy(), self.bank.numpy(), k, faiss.METRIC_INNER_PRODUCT)[0])
