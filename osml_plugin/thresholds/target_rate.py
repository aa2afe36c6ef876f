"""A rate asked for on either side."""

from __future__ import annotations

import numpy as np

from ..errors import OsmlError
from .base import Threshold, checked_rate, just_below
from .ranks import at_most


class TargetRate(Threshold, name="target_rate"):
    """A rate on validation items that is kept at the least cost to the other side.

    With `unknown_accepted`: the largest τ at which at most this share of the unknown items is accepted, for uses where
    accepting a stranger is what costs (false-alarm rate, DIR@FAR). With `known_rejected`: the smallest τ at which at
    most this share of the known items is rejected; it promises nothing for new items, `conformal` does. Give one of
    them; with neither, `unknown_accepted` is 0.05.
    """

    needs_unknown = True

    def __init__(self, *, unknown_accepted: float | None = None, known_rejected: float | None = None):
        if unknown_accepted is not None and known_rejected is not None:
            raise OsmlError("target_rate keeps one rate: give either unknown_accepted or known_rejected")
        if known_rejected is not None:
            known_rejected = checked_rate("known_rejected", known_rejected)
        else:
            unknown_accepted = checked_rate("unknown_accepted", 0.05 if unknown_accepted is None else unknown_accepted)
        self.unknown_accepted, self.known_rejected = unknown_accepted, known_rejected
        self.needs_unknown = known_rejected is None

    def _tau(self, known: np.ndarray, unknown: np.ndarray) -> float:
        # Rejected are those with score > τ.
        if self.known_rejected is not None:
            return known[len(known) - 1 - at_most(self.known_rejected, len(known))]
        # Accepted are those with score <= τ, so τ lies just below the first score that may not be.
        return just_below(unknown[at_most(self.unknown_accepted, len(unknown))])
