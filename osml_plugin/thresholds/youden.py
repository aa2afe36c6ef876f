"""The threshold of Youden's index."""

from __future__ import annotations

import numpy as np

from .base import Threshold, cuts


class Youden(Threshold, name="youden"):
    """The τ with the largest J = share of unknown items rejected − share of known items rejected (Youden 1950).

    Of equal ones the largest, which rejects least. Unlike F1 it does not depend on how many unknowns the validation
    data hold.
    """

    needs_unknown = True

    def _tau(self, known: np.ndarray, unknown: np.ndarray) -> float:
        taus, known_rejected, unknown_rejected = cuts(known, unknown)
        # In whole numbers, J · n_known · n_unknown, so that ties are ties.
        j = unknown_rejected * len(known) - known_rejected * len(unknown)
        return taus[np.flatnonzero(j == j.max())[-1]]
