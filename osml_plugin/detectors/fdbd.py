"""Distance to the decision boundaries."""

from __future__ import annotations

import torch
from torch import Tensor

from .logits import ProxyDetector, largest

LEAST_DISTANCE = 1e-8
"""From the mean of the training items; nearer ones count as this far."""


class FDBD(ProxyDetector, name="fdbd"):
    """− mean over c ≠ ŷ of (logit_ŷ − logit_c) / ‖w_ŷ − w_c‖, divided by ‖x − μ‖ (fDBD: Liu & Qin, ICML 2024, Sec. 3).

    How far x is from the boundary with each other class, on average, and per distance from the mean μ of the training
    items. Of several proxies a class, w is the one whose logit is the largest. With one class there is no boundary.
    """

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        super()._fit(embeddings, labels, class_weights)
        self.register_buffer("mean", embeddings.mean(dim=0))
        proxies = class_weights.flatten(0, 1).double()
        apart = torch.cdist(proxies, proxies, compute_mode="donot_use_mm_for_euclid_dist")
        # Two equal proxies have equal logits; 0 / 0 is then no distance.
        self.register_buffer(
            "between", torch.where(apart > 0, 1 / apart, 0).float().unflatten(1, class_weights.shape[:2])
        )

    def _score_and_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._proxy_logits(embeddings)
        n_classes, n_proxies = logits.shape[1:]
        best = largest(logits.flatten(1))
        away = (logits.amax(dim=(1, 2), keepdim=True) - logits) * self.between.index_select(0, best)
        if n_proxies > 1:
            away = away.gather(2, logits.argmax(dim=2, keepdim=True))
        boundary = away.sum(dim=(1, 2)) / max(1, n_classes - 1)
        return -boundary / (embeddings - self.mean).norm(dim=1).clamp_min(LEAST_DISTANCE), best // n_proxies
