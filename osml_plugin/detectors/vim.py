"""A virtual logit for what lies outside the subspace of the known items."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OsmlError
from ..registry import checked_number
from .logits import ProxyDetector, log_sum_exp


class ViM(ProxyDetector, name="vim"):
    """α ‖x⊥‖ − log Σ_c exp(logit_c): virtual logit matching (Wang et al., CVPR 2022, Sec. 4).

    x⊥ is the part of x outside the principal subspace, which are the first `share` · D eigenvectors of XᵀX of the
    training items; the origin is that of the logits (proxies have no bias, so it is 0). α makes the mean virtual logit
    of the training items as large as the mean of their largest logits. The paper's score is the softmax probability of
    the virtual logit, a rising function of this one that does not saturate.

    Fewer directions are principal where the training items have no part outside them: with fewer items than dimensions
    anything new would be outside, and α without bound.
    """

    search_space = {"share": (0.25, 0.5, 0.75)}

    def __init__(self, *, share: float = 0.5):
        super().__init__()
        if not 0 < checked_number("share", share) < 1:
            raise OsmlError(f"share must be above 0 and below 1; got {share!r}")
        self.share = float(share)

    @classmethod
    def _fit_all(
        cls, detectors: Sequence[ViM], embeddings: Tensor, labels: Tensor, class_weights: Tensor | None
    ) -> None:
        parts = embeddings.split(cls.chunk_size)
        variances, axes = torch.linalg.eigh(torch.stack([(part.T @ part).double() for part in parts]).sum(dim=0))
        rank = int((variances > 1e-6 * variances[-1]).sum())  # the smallest come first
        for detector in detectors:
            detector._fit(embeddings, labels, class_weights)
        largest = torch.stack([detectors[0]._logits(part).amax(dim=1).sum() for part in parts]).sum()
        for detector in detectors:
            detector._fit_outside(parts, axes, rank, largest)

    def _fit_outside(self, parts: Sequence[Tensor], axes: Tensor, rank: int, largest: Tensor) -> None:
        """Which of the axes `(D, D)` are not principal, and α from the sum of the largest logits."""
        n_principal = max(0, min(round(self.share * len(axes)), rank - 1))
        self.register_buffer("residual_axes", axes[:, : len(axes) - n_principal].float().contiguous())
        residual = torch.stack([self._residual(part).sum() for part in parts]).sum()
        self.register_buffer("alpha", largest / residual.clamp_min(torch.finfo(residual.dtype).tiny))

    def _residual(self, embeddings: Tensor) -> Tensor:
        return (embeddings @ self.residual_axes).norm(dim=1)

    def _item_score(self, embeddings: Tensor, logits: Tensor, nearest: Tensor) -> Tensor:
        return self.alpha * self._residual(embeddings) - log_sum_exp(logits, nearest)
