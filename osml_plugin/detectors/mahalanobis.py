"""Mahalanobis distance to the nearest class, plain and relative to a background."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OsmlError
from ..registry import checked_number
from .base import Detector, class_means
from .moments import part_of, rounded_off

LEAST_SHRINKAGE = 1e-6


class Mahalanobis(Detector, name="mahalanobis"):
    """min_c (x − μ_c)ᵀ Σ⁻¹ (x − μ_c), one Σ shared by all classes (Lee et al. 2018, eq. 2).

    Σ is the within-class covariance, shrunk towards a multiple of the identity,
    (1 − λ) Σ + λ tr(Σ)/D · I, because metric learning makes it nearly singular; λ is from 1e-6 to 1.

    Everything is computed along the principal axes of the spread within the classes: they are the same for every λ,
    and along them shrinking is one number an axis.
    """

    incremental = True
    class_buffers = ("class_means",)
    search_space = {"shrinkage": (0.001, 0.01, 0.1, 0.3)}

    def __init__(self, *, shrinkage: float = 0.01):
        super().__init__()
        self.shrinkage = checked_shrinkage(shrinkage)

    @classmethod
    def _fit_all(
        cls, detectors: Sequence[Mahalanobis], embeddings: Tensor, labels: Tensor, class_weights: Tensor | None
    ) -> None:
        # Means are subtracted in float64: the spread within a class is small beside its mean.
        embeddings = embeddings.double()
        means = class_means(embeddings, labels, len(detectors[0].class_labels))
        centred = embeddings - means[labels]
        within = centred.T @ centred
        variances, axes = _principal_axes(within / len(labels))
        for detector in detectors:
            detector._keep(means, within, variances, axes)

    def _keep(self, means: Tensor, within: Tensor, variances: Tensor, axes: Tensor) -> None:
        self.register_buffer("class_means", means)
        self.register_buffer("within", within)
        self.register_buffer("variances", variances)
        self.register_buffer("axes", axes)

    def _update(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None, sign: int) -> None:
        centred, factors, away, means = part_of(embeddings.double(), labels, self.class_means, self.class_counts, sign)
        within = self.within + sign * centred.T @ centred + (factors[:, None] * away).T @ away
        within = rounded_off(within, self.within) if sign < 0 else within
        self._keep(means, within, *_principal_axes(within / self.class_counts.sum()))

    def _fitted(self) -> None:
        if "within" in self._buffers:  # files of earlier versions hold what follows from it, and no more
            shares = self.class_counts.double() / self.class_counts.sum()
            self._fit_along_axes(self.variances, self.class_means @ self.axes, shares)

    def _fit_along_axes(self, variances: Tensor, means: Tensor, shares: Tensor) -> None:
        """Variances `(D,)` within classes and class means `(C, D)`, along the axes; shares `(C,)` of items by class."""
        self.scales = inverse_deviations(variances, variances.mean(), self.shrinkage)
        self.means = means * self.scales

    @classmethod
    def _score_all(cls, detectors: Sequence[Mahalanobis], embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        along_axes = embeddings.double() @ detectors[0].axes
        return [detector._class_distances(along_axes).min(dim=1) for detector in detectors]

    def _class_distances(self, along_axes: Tensor) -> Tensor:
        """(x − μ_c)ᵀ Σ⁻¹ (x − μ_c) for every item and class, `(N, C)`."""
        return torch.cdist(along_axes * self.scales, self.means).square()


class RelativeMahalanobis(Mahalanobis, name="relative_mahalanobis"):
    """Mahalanobis to the nearest class minus Mahalanobis to all the data as one class (Ren et al. 2021, eq. 4).

    What is far from everything, known classes included, in directions that carry no class, cancels. One class alone is
    all the data, and everything does: there is nothing left to tell.
    """

    far_point_exception = "the background distance grows like the class distance, so that far points can cancel"

    def _fit_along_axes(self, variances: Tensor, means: Tensor, shares: Tensor) -> None:
        super()._fit_along_axes(variances, means, shares)
        mean = shares @ means
        # The spread of all data is that within the classes plus that of the class means, RᵀR; R has min(C, D) rows.
        between = torch.linalg.qr(shares.sqrt()[:, None] * (means - mean), mode="r").R
        average = variances.mean() + between.square().sum() / len(variances)
        scales = inverse_deviations(variances, average, self.shrinkage)
        between = (1 - self.shrinkage) ** 0.5 * between * scales
        # (I + RᵀR)⁻¹ = I − Rᵀ(I + RRᵀ)⁻¹R = I − BᵀB (Woodbury): what remains to invert is small.
        identity = torch.eye(len(between), dtype=between.dtype, device=between.device)
        lower = torch.linalg.cholesky(identity + between @ between.T)
        self.background_scales = scales
        self.background_mean = mean * scales
        self.background_between = torch.linalg.solve_triangular(lower, between, upper=False)

    def _class_distances(self, along_axes: Tensor) -> Tensor:
        x = along_axes * self.background_scales - self.background_mean
        background = x.square().sum(dim=1) - (x @ self.background_between.T).square().sum(dim=1)
        return super()._class_distances(along_axes) - background[:, None]


def _principal_axes(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Variances `(D,)` and the axes `(D, D)` that they are along, in columns."""
    variances, axes = torch.linalg.eigh(covariance)
    return variances.clamp_min(0), axes.contiguous()


def inverse_deviations(variances: Tensor, average: Tensor, shrinkage: float) -> Tensor:
    """σ⁻¹ `(D,)` of the shrunk variances σ² = (1 − λ) variance + λ average."""
    # One example a class leaves no spread at all; ones then give the Euclidean distance.
    average = average if average > 0 else torch.ones_like(average)
    return ((1 - shrinkage) * variances + shrinkage * average).rsqrt()


def checked_shrinkage(shrinkage: float) -> float:
    # Less would not show in double precision where classes share it twice, as those of `ssd` and `gmm` do.
    if not LEAST_SHRINKAGE <= checked_number("shrinkage", shrinkage) <= 1:
        raise OsmlError(f"shrinkage must be from {LEAST_SHRINKAGE} to 1; got {shrinkage!r}")
    return float(shrinkage)
