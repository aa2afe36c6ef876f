"""A threshold that is given."""

from __future__ import annotations

import numpy as np

from ..registry import checked_number
from .base import Threshold


class Fixed(Threshold, name="fixed"):
    """τ = `tau`, whatever the scores are."""

    def __init__(self, *, tau: float):
        self.tau = checked_number("tau", tau)

    def _tau(self, known: np.ndarray, unknown: np.ndarray) -> float:
        return self.tau
