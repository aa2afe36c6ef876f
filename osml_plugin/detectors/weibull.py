"""Maximum-likelihood Weibull distributions of many tails at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_SHAPE = 1e8
"""The shape of a tail whose values are all the same: a step."""

STEPS = 50


def fit_weibull(values: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shape κ and scale λ of the two-parameter Weibull distribution, F(x) = 1 − exp(−(x/λ)^κ), for each of R samples.

    The likelihood is largest where κ · m(κ) = 1, m(κ) = Σ xᵏ ln x / Σ xᵏ − mean ln x, and λ = (mean xᵏ)^(1/κ)
    (Rinne 2008, ch. 11). ln(κ · m(κ)) as a function of ln κ rises nearly straight, with a slope from 1 to about 2:
    Newton's steps on it need no safeguard.

    Args:
        values: `(R, n)`, above 0 where they count.
        present: bool `(R, n)`, which values count, at least one in each row; without it all do.

    Returns:
        shapes and scales, `(R,)` float64 each. Shapes are at most `MAX_SHAPE`.
    """
    present = torch.ones_like(values, dtype=torch.bool) if present is None else present
    n = present.sum(dim=1, keepdim=True)
    values = values.double().where(present, 0)
    largest = values.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # Logarithms relative to the largest value: xᵏ then overflows for no κ.
    y = (values / largest).where(present, 1).clamp_min(1e-300).log()
    mean = y.sum(dim=1, keepdim=True) / n
    away = (y - mean).where(present, 0)
    # ln x of a Weibull variable has the standard deviation π / (κ √6).
    spread = (away.square().sum(dim=1, keepdim=True) / n).sqrt()
    log_shape = (math.pi / math.sqrt(6) / spread).log().clamp_max(math.log(MAX_SHAPE))
    for _ in range(STEPS):
        shape = log_shape.exp()
        powers = (shape * y).exp().where(present, 0)
        total = powers.sum(dim=1, keepdim=True)
        m = ((powers * away).sum(dim=1, keepdim=True) / total).clamp_min(1e-300)
        variance = (powers * away.square()).sum(dim=1, keepdim=True) / total - m.square()
        step = (log_shape + m.log()) / (1 + shape * variance.clamp_min(0) / m)
        before, log_shape = log_shape, (log_shape - step).clamp_max(math.log(MAX_SHAPE))
        if ((log_shape - before).abs() < 1e-9).all():  # the error is about the square of that
            break
    shape = log_shape.exp()
    powers = (shape * y).exp().where(present, 0)
    return shape[:, 0], (largest * (powers.sum(dim=1, keepdim=True) / n).pow(1 / shape))[:, 0]


def weibull_cdf(x: Tensor, shape: Tensor, scale: Tensor) -> Tensor:
    """F(x) = 1 − exp(−(x/λ)^κ), 0 below 0."""
    return -torch.expm1(-(x.clamp_min(0) / scale).pow(shape))
