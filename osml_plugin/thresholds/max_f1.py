"""The threshold of the best F1."""

from __future__ import annotations

import numpy as np

from .base import Threshold, cuts


class MaxF1(Threshold, name="max_f1"):
    """The τ with the highest F1 of «unknown» on validation items; of equal ones the largest, which rejects least.

    F1 depends on how many unknowns the validation data hold; where their share in use is not theirs, choose a rate.
    """

    needs_unknown = True

    def _tau(self, known: np.ndarray, unknown: np.ndarray) -> float:
        taus, false_positive, true_positive = cuts(known, unknown)
        # F1 = 2 TP / (2 TP + FP + FN), and TP + FN is the number of unknowns.
        f1 = 2 * true_positive / (true_positive + false_positive + len(unknown))
        return taus[np.flatnonzero(f1 == f1.max())[-1]]
