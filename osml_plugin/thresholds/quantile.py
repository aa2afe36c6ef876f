"""An empirical quantile of known scores."""

from __future__ import annotations

import numpy as np

from .base import Threshold, checked_rate
from .ranks import at_least


class Quantile(Threshold, name="quantile"):
    """The smallest τ that accepts at least the share `accepted` of the known items it is fitted on.

    It promises nothing for new items; `conformal` does.
    """

    def __init__(self, *, accepted: float = 0.95):
        self.accepted = checked_rate("accepted", accepted)

    def _tau(self, known: np.ndarray, unknown: np.ndarray) -> float:
        return known[at_least(self.accepted, len(known)) - 1]
