"""Divergence from the typical softmax distribution of a class."""

from __future__ import annotations

import torch
from torch import Tensor

from .logits import MSP, LogitDetector, entropy, largest


class KLMatching(LogitDetector, name="kl_matching"):
    """min_k KL(p(x) ‖ d_k), d_k the mean softmax distribution of the items predicted as class k (Hendrycks et al.,
    ICML 2022, Sec. 4: "KL matching").

    A class that no item is predicted as has no d_k, and is none of those compared.
    """

    far_point_exception = MSP.far_point_exception

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        super()._fit(embeddings, labels, class_weights)
        n_classes = len(class_weights)
        sums = embeddings.new_zeros(n_classes, n_classes, dtype=torch.float64)
        counts = labels.new_zeros(n_classes)
        for part in embeddings.split(self.chunk_size):
            logits = self._logits(part)
            nearest = largest(logits)
            # In double precision: a probability that is 0 in single precision has a logarithm all the same.
            sums.index_add_(0, nearest, torch.softmax(logits.double(), dim=1))
            counts += nearest.bincount(minlength=n_classes)
        typical = sums[counts > 0] / counts[counts > 0, None]
        self.register_buffer("log_typical", typical.clamp_min(torch.finfo(typical.dtype).tiny).log().float())

    def _logit_score(self, logits: Tensor, nearest: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, dim=1)
        return (log_p.exp() @ -self.log_typical.T).amin(dim=1) - entropy(log_p)
