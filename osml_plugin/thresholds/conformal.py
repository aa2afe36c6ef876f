"""Split-conformal rejection: an error rate that was chosen and is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta

from .base import Threshold, checked_rate, checked_scores


class Conformal(Threshold, name="conformal"):
    """τ = the ⌈(n+1)(1−α)⌉-th smallest of n calibration scores of known items.

    A new known item, exchangeable with these, is then rejected with probability at most α (Vovk et al. 2005;
    Angelopoulos & Bates 2023, theorem 1), whatever the detector and the data. Fewer than 1/α − 1 items cannot
    carry the promise: τ is then infinite and nothing is rejected.
    """

    def __init__(self, *, alpha: float = 0.05):
        self.alpha = checked_rate("alpha", alpha)

    def _tau(self, known: np.ndarray, unknown: np.ndarray) -> float:
        rank = conformal_rank(len(known), self.alpha)
        return known[rank - 1] if rank <= len(known) else np.inf


@dataclass(frozen=True)
class Guarantee:
    """What n calibration items at level α promise of the share of known items rejected."""

    alpha: float
    n: int
    expected: float
    """The rate to expect over all calibration sets of this size; at most α."""
    at_most: float
    """With 95 % confidence the rate of **this** calibration set is at most this."""

    @property
    def possible(self) -> bool:
        """Whether there are enough items for any promise; without it nothing is rejected."""
        return conformal_rank(self.n, self.alpha) <= self.n

    def __str__(self) -> str:
        if not self.possible:
            needed = int(np.ceil(np.round(1 / self.alpha - 1, 9)))
            return (
                f"nothing is rejected: at {self.alpha:.1%} at least {needed} calibration items are needed, and there "
                f"are {self.n}; give more images, or a larger alpha"
            )
        return (
            f"at most {self.alpha:.1%} of known items rejected on average ({self.n} calibration items); "
            f"for this calibration set at most {self.at_most:.1%} with 95 % confidence"
        )


def guarantee(n: int, alpha: float) -> Guarantee:
    """The rejection rate given the calibration set is Beta(n + 1 − r, r), r = ⌈(n+1)(1−α)⌉ (Vovk 2012)."""
    rank = conformal_rank(n, alpha)
    if rank > n:
        return Guarantee(alpha, n, 0.0, 0.0)
    return Guarantee(alpha, n, (n + 1 - rank) / (n + 1), float(beta.ppf(0.95, n + 1 - rank, rank)))


def conformal_rank(n: int, alpha: float) -> int:
    """⌈(n+1)(1−α)⌉, safe from floating point: (19+1)(1−0.05) is 19, not 19.000000000000004 and so 20."""
    return max(1, int(np.ceil(np.round((n + 1) * (1 - alpha), 9))))


def p_values(scores: ArrayLike, calibration_scores: ArrayLike) -> np.ndarray:
    """(1 + #{calibration scores ≥ score}) / (n + 1) for each score: how usual it would be for a known item."""
    calibration = np.sort(checked_scores(calibration_scores))
    at_least = len(calibration) - np.searchsorted(calibration, checked_scores(scores), side="left")
    return (1 + at_least) / (len(calibration) + 1)
