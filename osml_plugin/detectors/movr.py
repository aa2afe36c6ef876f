"""The margin one-vs-rest loss of an item, as its unknown score."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize, softplus

from .logits import LogitDetector, checked_factor, of_class


class MarginOneVsRest(LogitDetector, name="movr"):
    """− log p_ŷ − Σ_{k≠ŷ} log(1 − p_k), p_k = σ(T · cos(x, w_k)) (Park et al. 2023, eq. 2 and Sec. 5.3).

    The one-vs-rest loss at the predicted class ŷ, without the margin, which belongs to training. `scale` is T: 32 in
    the paper, and from 1e-6 to 1e6. Lengths of embeddings and proxies do not count.
    """

    incremental = True
    search_space = {"scale": (8.0, 16.0, 32.0)}
    far_point_exception = (
        "likeness to any other class counts against an item: where proxies are alike, a far point that is like none of "
        "them loses less than a known one"
    )

    def __init__(self, *, scale: float = 32.0):
        super().__init__()
        self.scale = checked_factor("scale of detector 'movr'", scale)

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        self.register_buffer("class_weights", normalize(class_weights, dim=2))

    def _logits(self, embeddings: Tensor) -> Tensor:
        return super()._logits(normalize(embeddings))

    def _logit_score(self, logits: Tensor, nearest: Tensor) -> Tensor:
        # −log(1 − σ(z)) = softplus(z), and −log σ(z) = softplus(−z): no difference in which what is small is lost.
        against = (self.scale * logits).scatter_(1, nearest[:, None], -self.scale * of_class(logits, nearest)[:, None])
        return softplus(against).sum(dim=1)
