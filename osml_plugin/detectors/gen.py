"""Generalised entropy of the softmax probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import checked_count, checked_positive
from .logits import MSP, LogitDetector, of_class, others


class GEN(LogitDetector, name="gen"):
    """Σ_j p_j^γ (1 − p_j)^γ over the `top` largest softmax probabilities (Liu, Lochman & Zach, CVPR 2023, Sec. 3).

    A small γ makes the tail of the distribution count, which a sure but wrong prediction does not hide. The paper takes
    γ = 0.1, and of ImageNet's 1000 classes the top 100; fewer classes all count.
    """

    incremental = True
    search_space = {"gamma": (0.01, 0.1, 0.5)}
    far_point_exception = MSP.far_point_exception

    def __init__(self, *, gamma: float = 0.1, top: int = 100):
        super().__init__()
        self.gamma = checked_positive("gamma of detector 'gen'", gamma)
        self.top = checked_count("top of detector 'gen'", top)

    def _logit_score(self, logits: Tensor, nearest: Tensor) -> Tensor:
        p = torch.softmax(logits, dim=1)
        variances = (p * (1 - p)).scatter_(1, nearest[:, None], (of_class(p, nearest) * others(p, nearest))[:, None])
        if self.top < p.shape[1]:  # the largest p(1 − p) are those of the largest p
            variances = variances.topk(self.top, dim=1, sorted=False).values
        return variances.pow(self.gamma).sum(dim=1)
