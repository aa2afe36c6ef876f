"""Mahalanobis distance to the nearest class, plain and relative to a background."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OsmlError
from ..registry import checked_number
from .base import Detector, class_means


class Mahalanobis(Detector, name="mahalanobis"):
    """min_c (x − μ_c)ᵀ Σ⁻¹ (x − μ_c), one Σ shared by all classes (Lee et al. 2018, eq. 2).

    Σ is the within-class covariance, shrunk towards a multiple of the identity,
    (1 − λ) Σ + λ tr(Σ)/D · I, because metric learning makes it nearly singular.
    """

    search_space = {"shrinkage": (0.001, 0.01, 0.1, 0.3)}

    def __init__(self, *, shrinkage: float = 0.01):
        super().__init__()
        self.shrinkage = checked_shrinkage(shrinkage)

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        # Means are subtracted in float64: the spread within a class is small beside its mean.
        embeddings = embeddings.double()
        means = class_means(embeddings, labels, len(self.class_labels))
        whiten = whitening(embeddings - means[labels], self.shrinkage)
        self.register_buffer("means", means)
        self.register_buffer("whiten", whiten)

    def _class_scores(self, embeddings: Tensor) -> Tensor:
        return squared_distances(embeddings.double(), self.means, self.whiten)


class RelativeMahalanobis(Mahalanobis, name="relative_mahalanobis"):
    """Mahalanobis to the nearest class minus Mahalanobis to all the data as one class (Ren et al. 2021, eq. 4).

    What is far from everything, known classes included, in directions that carry no class, cancels.
    """

    far_point_exception = "the background distance grows like the class distance, so that far points can cancel"

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        super()._fit(embeddings, labels, class_weights)
        embeddings = embeddings.double()
        mean = embeddings.mean(dim=0, keepdim=True)
        self.register_buffer("background_mean", mean)
        self.register_buffer("background_whiten", whitening(embeddings - mean, self.shrinkage))

    def _class_scores(self, embeddings: Tensor) -> Tensor:
        background = squared_distances(embeddings.double(), self.background_mean, self.background_whiten)
        return super()._class_scores(embeddings) - background


def whitening(centred: Tensor, shrinkage: float) -> Tensor:
    """W `(D, D)` with W Wᵀ = Σ⁻¹, for the shrunk covariance Σ of centred rows `(N, D)`."""
    width = centred.shape[1]
    covariance = centred.T @ centred / len(centred)
    # One example a class leaves no spread at all; the identity then gives the Euclidean distance.
    scale = covariance.trace() / width
    scale = scale if scale > 0 else torch.ones_like(scale)
    identity = torch.eye(width, dtype=centred.dtype, device=centred.device)
    shrunk = (1 - shrinkage) * covariance + shrinkage * scale * identity
    return torch.linalg.solve_triangular(torch.linalg.cholesky(shrunk), identity, upper=False).T


def squared_distances(embeddings: Tensor, means: Tensor, whiten: Tensor) -> Tensor:
    """(x − μ_c)ᵀ W Wᵀ (x − μ_c) for every item and class, `(N, C)`."""
    return torch.cdist(embeddings @ whiten, means @ whiten).square()


def checked_shrinkage(shrinkage: float) -> float:
    if not 0 < checked_number("shrinkage", shrinkage) <= 1:
        raise OsmlError(f"shrinkage must be above 0 and at most 1; got {shrinkage!r}")
    return float(shrinkage)
