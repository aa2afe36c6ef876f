"""The part of an embedding that lies outside the subspace of the known ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import OsmlError
from ..registry import checked_number
from .base import Detector, class_means


class Residual(Detector, name="residual"):
    """‖x − P x‖, P the projection on the principal subspace of the known embeddings (Wang et al. 2022).

    The residual of ViM, its origin where logits without a bias have it.

    The class is that of the nearest mean, by cosine.

    Args:
        share: of the D dimensions, those that the subspace has, in (0, 1); never more than the embeddings span.
    """

    tried_by_auto = False
    search_space = {"share": (0.1, 0.2, 0.5)}
    far_point_exception = "what lies opposite to the known embeddings lies in their subspace too"

    def __init__(self, *, share: float = 0.2):
        super().__init__()
        self.share = checked_number("share", share)
        if not 0 < self.share < 1:
            raise OsmlError(f"share must be above 0 and below 1; got {share!r}")

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        wide, width = embeddings.double(), embeddings.shape[1]
        energy, axes = torch.linalg.eigh(wide.T @ wide)  # from the least to the most
        spanned = int((energy > width * torch.finfo(energy.dtype).eps * energy[-1]).sum())
        outside = width - min(max(1, round(self.share * width)), spanned, max(1, width - 1))
        self.register_buffer("outside", axes[:, :outside].float().contiguous())
        self.register_buffer("means", normalize(class_means(embeddings, labels, len(self.class_labels))))

    def _score_and_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        return (embeddings @ self.outside).norm(dim=1), (embeddings @ self.means.T).argmax(dim=1)
