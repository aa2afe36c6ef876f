"""Means and scatter of classes, kept up to date as items come and go."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import class_means


def part_of(
    embeddings: Tensor, labels: Tensor, means: Tensor, counts: Tensor, sign: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What items that are added (sign 1) or taken away (−1) do to the moments (Chan et al. 1983, eq. 2.1; every step
    is about a mean, so that nothing is lost to large means).

    Args:
        embeddings: `(M, D)` float64.
        labels: `(M,)` in 0..C-1.
        means: `(C, D)` before.
        counts: `(C,)` afterwards.

    Returns:
        the items about their own means, `(M, D)`; the factors f `(C,)` and rows δ `(C, D)` such that the scatter of
        class c grows by sign · (that of the items about their own mean) + f_c δ_c δ_cᵀ; the means afterwards.
    """
    own = class_means(embeddings, labels, len(means))
    change = sign * labels.bincount(minlength=len(means)).to(means)
    after = counts.to(means).clamp_min(1)
    away = own - means
    return embeddings - own[labels], (after - change) * change / after, away, means + (change / after)[:, None] * away


def scatters_of(centred: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """Σ x xᵀ over the items of each class, `(C, D, D)`."""
    width = centred.shape[1]
    scatters = centred.new_zeros(n_classes, width, width)
    present, sizes = labels.unique(return_counts=True)
    for c, of_class in zip(present.tolist(), centred[labels.argsort()].split(sizes.tolist()), strict=True):
        scatters[c] = of_class.T @ of_class
    return scatters


def rounded_off(scatter: Tensor, before: Tensor) -> Tensor:
    """Scatter `(…, D, D)` from which some was taken: what rounding leaves where all of it has gone is none."""
    left, there = (s.diagonal(dim1=-2, dim2=-1).sum(dim=-1) for s in (scatter, before))
    return torch.where((left > 1e-12 * there)[..., None, None], scatter, 0.0)
