"""Ranks among calibration scores: the arithmetic of conformal prediction."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .base import checked_scores


def conformal_rank(n: int, alpha: float) -> int:
    """⌈(n+1)(1−α)⌉, safe from floating point: (19+1)(1−0.05) is 19, not 19.000000000000004 and so 20."""
    return max(1, int(np.ceil(np.round((n + 1) * (1 - alpha), 9))))


def enough(n: int, alpha: float) -> bool:
    """Whether n calibration scores can promise the rate α: n ≥ 1/α − 1."""
    return conformal_rank(n, alpha) <= n


def fewest(alpha: float) -> int:
    """The smallest such n."""
    return max(1, int(np.ceil(np.round(1 / alpha - 1, 9))))


def quantile(scores: np.ndarray, alpha: float) -> float:
    """The ⌈(n+1)(1−α)⌉-th smallest of n scores; infinite where there is none such."""
    rank = conformal_rank(len(scores), alpha)
    return float(np.partition(scores, rank - 1)[rank - 1]) if rank <= len(scores) else np.inf


def p_values(scores: ArrayLike, calibration_scores: ArrayLike) -> np.ndarray:
    """(1 + #{calibration scores ≥ score}) / (n + 1) for each score: how usual it would be for a known item."""
    calibration = np.sort(checked_scores(calibration_scores))
    at_least = len(calibration) - np.searchsorted(calibration, checked_scores(scores), side="left")
    return (1 + at_least) / (len(calibration) + 1)
