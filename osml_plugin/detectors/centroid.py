"""Cosine to the nearest class centroid."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from .base import Detector, class_means


class CentroidCosine(Detector, name="centroid"):
    """1 − max_c cos(x, μ_c), in [0, 2]: the nearest-class-mean rule of open-world metric learning.

    μ_c is the mean of the class's unit-norm embeddings.
    """

    def __init__(self):
        super().__init__()

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        means = class_means(normalize(embeddings), labels, len(self.class_labels))
        self.register_buffer("centroids", normalize(means))

    def _class_scores(self, embeddings: Tensor) -> Tensor:
        return 1 - normalize(embeddings) @ self.centroids.T
