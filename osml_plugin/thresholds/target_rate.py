"""A rate asked for on the unknown side."""

from __future__ import annotations

import numpy as np

from .base import Threshold, checked_rate, just_below


class TargetRate(Threshold, name="target_rate"):
    """The largest τ at which at most the share `unknown_accepted` of the validation unknowns is accepted.

    For uses where accepting a stranger is what costs (false-alarm rate, DIR@FAR).
    """

    needs_unknown = True

    def __init__(self, *, unknown_accepted: float = 0.05):
        self.unknown_accepted = checked_rate("unknown_accepted", unknown_accepted)

    def _tau(self, known: np.ndarray, unknown: np.ndarray) -> float:
        # Accepted are those with score <= τ, so τ lies just below the first score that may not be.
        # Rounded first, since 0.29 · 100 is 28.999999999999996.
        n_accepted = int(np.floor(np.round(self.unknown_accepted * len(unknown), 9)))
        return just_below(unknown[min(n_accepted, len(unknown) - 1)])
