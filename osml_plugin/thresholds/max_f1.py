"""The threshold of the best F1."""

from __future__ import annotations

import numpy as np

from .base import Threshold, just_below


class MaxF1(Threshold, name="max_f1"):
    """The τ with the highest F1 of «unknown» on validation items; of equal ones the largest, which rejects least.

    F1 depends on how many unknowns the validation data hold; where their share in use is not theirs, choose a rate.
    """

    needs_unknown = True

    def _tau(self, known: np.ndarray, unknown: np.ndarray) -> float:
        candidates = np.unique(np.concatenate([known, unknown]))
        candidates = np.concatenate([[just_below(candidates[0])], candidates])
        true_positive = len(unknown) - np.searchsorted(unknown, candidates, side="right")
        false_positive = len(known) - np.searchsorted(known, candidates, side="right")
        # F1 = 2 TP / (2 TP + FP + FN), and TP + FN is the number of unknowns.
        f1 = 2 * true_positive / (true_positive + false_positive + len(unknown))
        return candidates[np.flatnonzero(f1 == f1.max())[-1]]
