"""Cosine to the nearest class centroid."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from .base import Detector


class CentroidCosine(Detector, name="centroid"):
    """1 − max_c cos(x, μ_c), in [0, 2]: the nearest-class-mean rule of open-world metric learning.

    μ_c is the mean of the class's unit-norm embeddings.
    """

    incremental = True
    class_buffers = ("sums",)

    def __init__(self):
        super().__init__()

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        self.register_buffer("sums", _sums(embeddings, labels, len(self.class_labels)))

    def _update(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None, sign: int) -> None:
        self.register_buffer("sums", self.sums + sign * _sums(embeddings, labels, len(self.sums)))

    def _fitted(self) -> None:
        if "sums" in self._buffers:  # files of earlier versions hold the centroids themselves
            self.centroids = normalize(self.sums).float()

    def _class_scores(self, embeddings: Tensor) -> Tensor:
        return 1 - normalize(embeddings) @ self.centroids.T


def _sums(embeddings: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Sum of the unit-norm embeddings of each class, `(C, D)`; in float64, so that what is added can be taken away."""
    unit = normalize(embeddings).double()
    return unit.new_zeros(n_classes, unit.shape[1]).index_add_(0, labels, unit)
