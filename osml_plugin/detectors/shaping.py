"""Energy of the logits after the embedding was shaped: clipped, pruned or scaled.

The papers shape the activations before the last layer, which are not negative and are many times more than a class
has use for. An embedding may be negative: ASH and SCALE then go by magnitude, |x|, which leaves them as they are on
activations and keeps the scale finite on all others.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import OsmlError
from ..registry import checked_number
from .logits import ProxyDetector, log_sum_exp


class ShapedEnergy(ProxyDetector):
    """− log Σ_c exp(logit_c), the logits those of the shaped embedding."""

    def _shaped(self, embeddings: Tensor) -> Tensor:
        raise NotImplementedError

    def _logits(self, embeddings: Tensor) -> Tensor:
        return super()._logits(self._shaped(embeddings))

    def _item_score(self, embeddings: Tensor, logits: Tensor, nearest: Tensor) -> Tensor:
        return -log_sum_exp(logits, nearest)


class ReAct(ShapedEnergy, name="react"):
    """Energy of min(x, c), c a percentile of all numbers in the training embeddings (Sun, Guo & Li, NeurIPS 2021).

    `percentile` is a share from 0 to 1, where c is the largest of these numbers.
    """

    search_space = {"percentile": (0.85, 0.9, 0.95, 0.99)}

    def __init__(self, *, percentile: float = 0.9):
        super().__init__()
        self.percentile = checked_percentile(percentile, 1.0)

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        super()._fit(embeddings, labels, class_weights)
        # Not torch.quantile: it takes no more than 16 million numbers.
        ceiling = np.quantile(embeddings.cpu().numpy(), self.percentile)
        self.register_buffer("ceiling", torch.tensor(ceiling, dtype=torch.float32, device=embeddings.device))

    def _shaped(self, embeddings: Tensor) -> Tensor:
        return embeddings.minimum(self.ceiling)


class Scaled(ShapedEnergy):
    """The share 1 − `percentile` of an item's numbers is kept: the largest |x|, and those as large as the last of them.

    `percentile` is from 0 to 0.95, where the scale is still a finite number.
    """

    search_space = {"percentile": (0.3, 0.5, 0.65)}

    def __init__(self, *, percentile: float = 0.65):
        super().__init__()
        self.percentile = checked_percentile(percentile, 0.95)

    def _kept_and_scale(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Which numbers are kept `(N, D)`, and exp(s₁ / s₂) `(N, 1)`: s₁ the sum of all |x|, s₂ of those kept."""
        size, width = embeddings.abs(), embeddings.shape[1]
        n_kept = max(1, width - round(self.percentile * width))
        kept = size >= nth_smallest(size, width - n_kept)
        of_kept = (size * kept).sum(dim=1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
        return kept, torch.exp(size.sum(dim=1, keepdim=True) / of_kept)


class ASH(Scaled, name="ash"):
    """Energy of x pruned to its largest numbers and scaled by exp(s₁ / s₂) (ASH-S: Djurisic et al., ICLR 2023).

    `percentile` is the share that is pruned, from 0 to 0.95; s₁ is the sum of all |x|, s₂ of those kept.
    """

    def _shaped(self, embeddings: Tensor) -> Tensor:
        kept, scale = self._kept_and_scale(embeddings)
        return embeddings * kept * scale


class SCALE(Scaled, name="scale"):
    """Energy of x scaled as by `ash`, but not pruned (Xu et al., ICLR 2024)."""

    def _shaped(self, embeddings: Tensor) -> Tensor:
        return embeddings * self._kept_and_scale(embeddings)[1]


def nth_smallest(size: Tensor, n: int) -> Tensor:
    """Number n of each row `(N, 1)`, counted from 0."""
    if size.device.type != "cpu":
        return size.kthvalue(n + 1, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(size.numpy(), n, axis=1)[:, n, None])  # ten times as fast as PyTorch's


def checked_percentile(percentile: float, most: float) -> float:
    if not 0 <= checked_number("percentile", percentile) <= most:
        raise OsmlError(f"percentile must be a share from 0 to {most}; got {percentile!r}")
    return float(percentile)
