"""Rejection over a batch, at a chosen share of false discoveries."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .base import checked_p_values, checked_rate


def select_unknown(p_values: ArrayLike, q: float, *, above: float | None = None) -> np.ndarray:
    """Which items of a batch to call unknown, such that on average at most the share `q` of those called so is known.

    A threshold keeps the share of **known** items that is rejected; where nearly all items are known, most of what it
    rejects is known all the same. This keeps the share of the **rejected** that is known (false discovery rate), by
    Benjamini & Hochberg (1995): of N p-values in order, up to the last with p_(k) ≤ q k / N.

    Conformal p-values of one calibration set depend on each other, but positively (PRDS), which suffices (Bates,
    Candès, Lei, Romano & Sesia 2023), also with Storey's estimate. The promise is an average over calibration
    sets and batches, for items that come independently and known ones that are exchangeable with the calibration items.
    It is proven for one calibration set (`conformal`); p-values by class, or after enrolment, carry it as far as they
    are valid. A p-value is at least 1/(n+1) for n calibration items, so k unknown items among N can be found only where
    1/(n+1) ≤ q k / N.

    Args:
        p_values: `(N,)` in (0, 1] of the whole batch, known and unknown.
        q: the false discovery rate.
        above: λ of Storey's estimate of the share of known items, (1 + #{p > λ}) / (N (1 − λ)), such as 0.5: with many
            unknown items it finds more of them at the same q. None: all may be known.

    Returns:
        bool `(N,)`.

    Raises:
        OsmlError: for p-values outside (0, 1] or of another shape, and for rates outside (0, 1).
    """
    from scipy.stats import false_discovery_control  # a second of imports, which recognizing does without

    p, q = checked_p_values(p_values), checked_rate("q", q)
    if len(p) == 0:
        return np.zeros(0, dtype=bool)
    known = 1.0
    if above is not None:
        above = checked_rate("above", above)
        known = (1 + np.count_nonzero(p > above)) / (len(p) * (1 - above))
    # q / π0 may pass 1: then all are below it. Rounded, as (3 / 60) · 1 may be a little more than 0.05.
    return np.round(false_discovery_control(p, method="bh"), 12) <= np.round(q / known, 12)
