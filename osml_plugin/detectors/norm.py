"""The length of an embedding."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from .base import Detector, class_means


class Norm(Detector, name="norm"):
    """−‖x‖: a network answers what it knows with longer embeddings than what it does not (Dhamija et al. 2018).

    For embeddings as they leave the network; of unit-norm ones there is nothing to tell. The class is that of the
    nearest mean, by cosine.
    """

    far_point_exception = "a far point is a long one, which counts as known; where all norms are one, all score alike"

    def __init__(self):
        super().__init__()

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        self.register_buffer("means", normalize(class_means(embeddings, labels, len(self.class_labels))))

    def _score_and_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        return -embeddings.norm(dim=1), (embeddings @ self.means.T).argmax(dim=1)
