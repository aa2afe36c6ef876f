"""How well a centred item points along the proxy of its class."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from ..errors import OsmlError
from ..registry import checked_number
from .logits import ProxyDetector, largest


class NCI(ProxyDetector, name="nci"):
    """− w_ŷ · (x − μ) / ‖x − μ‖ − α ‖x‖₁: neural collapse inspired (Liu & Qin, CVPR 2025, Sec. 4).

    μ is the mean of the training items. α weighs the size of the embedding, which unit-norm embeddings tell little by.
    """

    search_space = {"alpha": (0.0, 0.01, 0.1)}

    def __init__(self, *, alpha: float = 0.0):
        super().__init__()
        if checked_number("alpha of detector 'nci'", alpha) < 0:
            raise OsmlError(f"alpha of detector 'nci' must be at least 0; got {alpha!r}")
        self.alpha = float(alpha)

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        super()._fit(embeddings, labels, class_weights)
        self.register_buffer("mean", embeddings.mean(dim=0))

    def _score_and_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        proxies = self.class_weights.flatten(0, 1)
        best = largest(embeddings @ proxies.T)
        towards = (normalize(embeddings - self.mean) * proxies.index_select(0, best)).sum(dim=1)
        score = -towards - self.alpha * embeddings.abs().sum(dim=1) if self.alpha else -towards
        return score, best // self.class_weights.shape[1]
