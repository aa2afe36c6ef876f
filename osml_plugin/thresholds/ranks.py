"""Ranks among calibration scores: the arithmetic of conformal prediction."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .base import checked_scores


def at_most(rate: float, n: int) -> int:
    """The largest k with k / n <= rate. The quotient is rounded just as a decimal literal is, so 29 of 100 are 0.29,
    while 0.29 · 100 is 28.999999999999996."""
    near = round(rate * n)
    return near if near / n <= rate else near - 1


def at_least(rate: float, n: int) -> int:
    """The smallest k with k / n >= rate."""
    near = round(rate * n)
    return near if near / n >= rate else near + 1


def conformal_rank(n: int, alpha: float) -> int:
    """⌈(n+1)(1−α)⌉, counted such that a score has a p-value of at most α iff it lies above that of this rank."""
    return n + 1 - at_most(alpha, n + 1)


def enough(n: int, alpha: float) -> bool:
    """Whether n calibration scores can promise the rate α: n ≥ 1/α − 1."""
    return conformal_rank(n, alpha) <= n


def fewest(alpha: float) -> int:
    """The smallest such n."""
    near = round(1 / alpha)
    return max(1, near - 1 if 1 / near <= alpha else near)


def quantile(scores: np.ndarray, alpha: float) -> float:
    """The ⌈(n+1)(1−α)⌉-th smallest of n scores; infinite where there is none such."""
    rank = conformal_rank(len(scores), alpha)
    return float(np.partition(scores, rank - 1)[rank - 1]) if rank <= len(scores) else np.inf


def p_values(scores: ArrayLike, calibration_scores: ArrayLike) -> np.ndarray:
    """(1 + #{calibration scores ≥ score}) / (n + 1) for each score: how usual it would be for a known item."""
    calibration = np.sort(checked_scores(calibration_scores))
    at_least = len(calibration) - np.searchsorted(calibration, checked_scores(scores), side="left")
    return (1 + at_least) / (len(calibration) + 1)


def topped_up(scores: np.ndarray, others: np.ndarray, alpha: float) -> np.ndarray:
    """`scores`, and of the others as many as are missing to promise the rate α, evenly from their whole range: the more
    there are of one's own the less the others count."""
    missing = min(max(0, fewest(alpha) - len(scores)), len(others))
    if not missing:
        return scores
    levels = np.arange(1, missing + 1) / (missing + 1)
    return np.concatenate([scores, np.quantile(others, levels, method="inverted_cdf")])
