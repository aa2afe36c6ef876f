"""Mahalanobis distance with a covariance for each class, on unit-norm embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import Detector, class_means
from .mahalanobis import checked_shrinkage
from .moments import part_of, rounded_off, scatters_of


class SSD(Detector, name="ssd"):
    """min_c (z − μ_c)ᵀ Σ_c⁻¹ (z − μ_c), z = x / ‖x‖ (Sehwag et al. 2021, eq. 2; the classes are the clusters: SSD+).

    A class of few examples does not have a covariance of its own: Σ_c is shrunk as `shrunk_covariances` says. (Scaling
    each dimension to unit variance, as the authors do first, changes nothing about a Mahalanobis distance.)

    Memory: C · D² float64 numbers fitted, C · D² float32 ones to score.
    """

    incremental = True
    class_buffers = ("class_means", "scatters")
    tried_by_auto = False
    search_space = {"shrinkage": (0.01, 0.1, 0.3)}

    def __init__(self, *, shrinkage: float = 0.1):
        super().__init__()
        self.shrinkage = checked_shrinkage(shrinkage)

    @classmethod
    def _fit_all(cls, detectors, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        unit = normalize(embeddings).double()
        means = class_means(unit, labels, len(detectors[0].class_labels))
        scatters = scatters_of(unit - means[labels], labels, len(means))
        for detector in detectors:
            detector.register_buffer("class_means", means)
            detector.register_buffer("scatters", scatters)

    def _update(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None, sign: int) -> None:
        unit = normalize(embeddings).double()
        centred, factors, away, means = part_of(unit, labels, self.class_means, self.class_counts, sign)
        changed = labels.unique()
        before, scatters = self.scatters[changed], self.scatters.clone()
        after = before + sign * scatters_of(centred, labels, len(means))[changed]
        after += factors[changed, None, None] * away[changed, :, None] * away[changed, None, :]
        scatters[changed] = rounded_off(after, before) if sign < 0 else after
        self.register_buffer("class_means", means)
        self.register_buffer("scatters", scatters)

    def _fitted(self) -> None:
        self._centres = self.class_means.float()
        covariances = shrunk_covariances(self.scatters, self.class_counts.double(), self.shrinkage)
        self._whitening = whitening(covariances)

    def _class_scores(self, embeddings: Tensor) -> Tensor:
        return squared_distances(normalize(embeddings), self._centres, self._whitening)


def shrunk_covariances(scatters: Tensor, counts: Tensor, shrinkage: float) -> Tensor:
    """Covariance of each of G groups of items, full `(G, D, D)` or of the axes only `(G, D)`, as the scatters are.

    Regularised discriminant analysis (Friedman 1989, eqs. 16 to 18), with one λ for both of its steps: Σ_g is
    ((1 − λ) S_g + λ S) / ((1 − λ) n_g + λ n), where S and n are those of all groups together; S is shrunk before,
    towards a multiple of the identity, (1 − λ) S + λ tr(S)/D · I. A group of few items takes the shape of all, a large
    one keeps its own; λ = 1 gives one sphere.

    Args:
        scatters: Σ (x − μ_g)(x − μ_g)ᵀ over each group, or its diagonal.
        counts: `(G,)` items of each, whole or fractional.
    """
    full = scatters.ndim == 3
    total, n = scatters.sum(dim=0), counts.sum()
    average = (total.trace() / len(total)) if full else total.mean()
    # One example a group leaves no spread at all; ones then give the Euclidean distance.
    average = average if average > 0 else n
    sphere = average * (torch.eye(len(total)).to(total) if full else torch.ones_like(total))
    total = (1 - shrinkage) * total + shrinkage * sphere
    weights = (1 - shrinkage) * counts + shrinkage * n
    return ((1 - shrinkage) * scatters + shrinkage * total) / weights.reshape(-1, *[1] * (scatters.ndim - 1))


def whitening(covariances: Tensor) -> Tensor:
    """W_g with ‖(x − μ_g) W_g‖² = (x − μ_g)ᵀ Σ_g⁻¹ (x − μ_g), float32: `(G, D, D)`, or `(G, D)` along the axes."""
    if covariances.ndim == 2:
        return covariances.rsqrt().float()
    identity = torch.eye(covariances.shape[-1]).to(covariances)
    lower = torch.linalg.cholesky(covariances)
    return torch.linalg.solve_triangular(lower, identity, upper=False).mT.contiguous().float()


def squared_distances(embeddings: Tensor, centres: Tensor, whitening: Tensor) -> Tensor:
    """Squared Mahalanobis distance of each item `(N, D)` to each group, `(N, G)`."""
    distances = embeddings.new_empty(len(embeddings), len(centres))
    for g, (centre, scale) in enumerate(zip(centres, whitening, strict=True)):
        # The mean goes first: the spread within a group is small beside it, and float32 has to do.
        away = embeddings - centre
        distances[:, g] = (away @ scale if scale.ndim == 2 else away * scale).square().sum(dim=1)
    return distances
