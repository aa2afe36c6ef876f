"""Whether a chosen rejection rate still holds in use, where nobody says which items are unknown."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..registry import checked_count
from .base import checked_p_values, checked_rate

FEWEST = 30
"""Usable p-values below which nothing is said: the intervals rest on the normal law of a mean."""
SMALLEST = 1e-4
"""γ below it counts as 0: α^γ is then 1 for any α in use."""


@dataclass(frozen=True)
class Drift:
    """What the p-values in use say of the known items among them."""

    n: int
    """Usable p-values: those above the cut, most of them of known items."""
    gamma: float
    """1: calibration holds; below 1: known items look stranger than the calibration ones; at least 0."""
    known_rejected: float
    """Estimated share of known items rejected now, α^γ: carried over from the bulk of p-values to the tail."""
    interval: tuple[float, float]
    """Of `known_rejected`, two-sided, with the confidence that was asked for."""
    alpha: float
    """The share that was chosen."""
    stale: bool
    """Whether the whole interval lies above α: calibrate again. A false alarm has probability (1 − confidence) / 2."""


def drift(
    p_values: ArrayLike,
    alpha: float,
    *,
    above: float = 0.5,
    confidence: float = 0.99,
    n_calibration: int | None = None,
) -> Drift | None:
    """Estimate the share of known items that is rejected at level `alpha`, from unlabelled p-values in use.

    A known item's conformal p-value is uniform while calibration holds, an unknown one's lies near 0. So only
    p > λ = `above` is looked at (Storey 2002), and the Lehmann alternative F(p) = p^γ (Lehmann 1953), truncated to
    (λ, 1], is fitted there by maximum likelihood: −log p is then exponential with rate γ, truncated at L = −log λ,
    and γ solves mean(−log p) = 1/γ − L / (e^{γL} − 1). The interval is that of the mean, whose variance per item is
    the Fisher information of γ, brought over to γ and to α^γ.

    It assumes independent items (frames of one film are not), continuous scores (ties raise p and hide drift), and a
    shift of the Lehmann form all the way from λ down to α. Take `stale` as an alarm, and `known_rejected` as a
    direction: a normal shift that in truth rejects 12.6 % at α = 5 % is read as nearly all from above 0.5.

    It cannot see drift that moves only the tail below λ, nor drift that leaves fewer than 30 values above λ: watch the
    rate of rejection too. Unknown items with p > λ look like known ones: where they are many and lie towards λ they
    pass for drift, and evenly spread ones hide it. A smaller `above` sees smaller drifts (from n known items γ has
    the standard error 7.2/√n at 0.5, 2.6/√n at 0.2) but more of the unknown, so only with a detector that leaves few.

    Args:
        p_values: `(N,)` in (0, 1], of all items, known and unknown.
        alpha: the share of known items that may be rejected.
        above: λ.
        confidence: of the interval.
        n_calibration: the number of calibration scores behind the p-values. They are multiples of 1/(n+1), and
            their cells above λ carry weights that are Dirichlet(1, …, 1) over calibration sets; the interval is widened
            by that, so that a small or unlucky calibration set is no drift. None: p-values as from an endless one.

    Returns:
        None below 30 usable p-values.

    Raises:
        OsmlError: for p-values outside (0, 1] or of another shape, and for rates outside (0, 1).
    """
    from scipy.special import ndtri, xlogy  # not with the module: most who import it never ask for drift

    alpha, above = checked_rate("alpha", alpha), checked_rate("above", above)
    confidence = checked_rate("confidence", confidence)
    p = checked_p_values(p_values)
    if n_calibration is None:
        y, cut, variance_of_calibration = -np.log(p[p > above]), above, 0.0
    else:
        cells = checked_count("n_calibration", n_calibration) + 1
        first = math.ceil(round(above * cells, 9))  # only whole cells above λ
        # A p-value k/(n+1) stands for its cell ((k−1)/(n+1), k/(n+1)]: the mean of −log over it, which keeps γ = 1
        # unbiased whatever n is, and needs no care at p = 1.
        high = p[p > (first + 0.5) / cells]
        low = high - 1 / cells
        y, cut = 1 - (xlogy(high, high) - xlogy(low, low)) * cells, first / cells
        variance_of_calibration = 1 / (cells - first + 1)
    if len(y) < FEWEST:
        return None

    length, mean = -math.log(cut), float(y.mean())
    gamma = _rate(mean, length)
    # Above γ = 1 the variance at 1, which is larger: of few items the estimate's own would promise too much.
    spread = math.sqrt(_information(min(gamma, 1.0), length) * (1 / len(y) + variance_of_calibration))
    half = ndtri((1 + confidence) / 2) * spread
    low, high = alpha ** _rate(mean - half, length), alpha ** _rate(mean + half, length)
    return Drift(len(y), gamma, alpha**gamma, (low, high), alpha, stale=low > alpha)


class DriftWatch:
    """`drift` of the latest p-values in use. One calibration, one watch: after a new one, begin again.

    It keeps the last `size` usable p-values (above `above`), so that a flood of unknown items does not blind it.
    Windows overlap and share their calibration set, so ask about once a window; each asking may be a false alarm.
    """

    def __init__(
        self,
        alpha: float,
        size: int = 1000,
        *,
        above: float = 0.5,
        confidence: float = 0.99,
        n_calibration: int | None = None,
    ):
        self.alpha, self.size = checked_rate("alpha", alpha), checked_count("size", size)
        self.above, self.confidence = checked_rate("above", above), checked_rate("confidence", confidence)
        self.n_calibration = None if n_calibration is None else checked_count("n_calibration", n_calibration)
        self._latest: deque[float] = deque(maxlen=self.size)

    def add(self, p_values: ArrayLike) -> None:
        """Take `(N,)` p-values of items in the order in which they came."""
        p = checked_p_values(p_values)
        self._latest.extend(p[p > self.above].tolist())

    def drift(self) -> Drift | None:
        """What the window says; None below 30 usable p-values."""
        return drift(
            list(self._latest),
            self.alpha,
            above=self.above,
            confidence=self.confidence,
            n_calibration=self.n_calibration,
        )


def _mean(gamma: float, length: float) -> float:
    """E[y] of an exponential of rate γ > 0 truncated to [0, L)."""
    return 1 / gamma - length * math.exp(-gamma * length) / -math.expm1(-gamma * length)


def _rate(mean: float, length: float) -> float:
    """The γ ≥ 0 whose mean this is: 0 from L/2 up, infinite from 0 down."""
    if mean <= 0:
        return math.inf
    if mean >= _mean(SMALLEST, length):
        return 0.0
    from scipy.optimize import brentq

    return brentq(lambda gamma: _mean(gamma, length) - mean, SMALLEST, 2 / mean)  # E[y] < 1/γ


def _information(gamma: float, length: float) -> float:
    """Fisher information of one item on γ, the variance of its y."""
    if gamma < 0.01 / length:  # two nearly equal squares: the limit, off by less than 1e-5 of it
        return length**2 / 12
    return 1 / gamma**2 - (length / (2 * math.sinh(gamma * length / 2))) ** 2
