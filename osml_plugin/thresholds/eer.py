"""The threshold of equal error rates."""

from __future__ import annotations

import numpy as np

from .base import Threshold, cuts


class EER(Threshold, name="eer"):
    """The τ at which the share of known items rejected and that of unknown items accepted are most nearly equal.

    Of equally near ones the one with the smaller sum of both, then the largest, which rejects least. For comparing
    detectors, as biometrics does; it weighs both errors alike, and promises neither.
    """

    needs_unknown = True

    def _tau(self, known: np.ndarray, unknown: np.ndarray) -> float:
        taus, known_rejected, unknown_rejected = cuts(known, unknown)
        # Whole numbers, both rates times n_known · n_unknown, so that ties are ties.
        false_rejection = known_rejected * len(unknown)
        false_acceptance = (len(unknown) - unknown_rejected) * len(known)
        order = np.lexsort((-taus, false_rejection + false_acceptance, abs(false_rejection - false_acceptance)))
        return taus[order[0]]
