"""The contract of thresholds: a rule fitted on unknown scores; unknown iff `score > τ`."""

from __future__ import annotations

import math
from typing import ClassVar, final

import numpy as np
from numpy.typing import ArrayLike

from ..errors import OsmlError
from ..registry import Named, Registry, checked_number

registry: Registry[Threshold] = Registry("threshold")


class Threshold(Named):
    """A subclass has a keyword-only `__init__` that keeps each argument under its own name, and writes `_tau`."""

    registry = registry
    needs_unknown: ClassVar[bool] = False
    """Whether `fit` needs validation items of both kinds (`is_unknown`); otherwise known items are enough."""

    tau: float | None = None

    @final
    def fit(
        self, scores: ArrayLike, classes: ArrayLike | None = None, is_unknown: ArrayLike | None = None
    ) -> Threshold:
        """Choose τ.

        Args:
            scores: `(N,)` unknown scores of items that training did not see.
            classes: `(N,)` the nearest known class of each, for thresholds that differ by class.
            is_unknown: `(N,)` bool; None = all items are of known classes.

        Raises:
            OsmlError: for NaN, wrong shapes, no known item, or no unknown item where one is needed, and for a τ of
                minus infinity.
        """
        scores = checked_scores(scores)
        is_unknown = np.zeros(len(scores), bool) if is_unknown is None else np.asarray(is_unknown)
        if is_unknown.shape != scores.shape or is_unknown.dtype != bool:
            raise OsmlError(f"is_unknown must be booleans of shape ({len(scores)},), one for each score")
        if is_unknown.all():
            raise OsmlError(f"threshold '{self.name}' needs scores of known items to fit on; got none")
        if self.needs_unknown and not is_unknown.any():
            raise OsmlError(
                f"threshold '{self.name}' is chosen on known and unknown items, and there are no unknown ones: "
                "name pseudo-unknown classes in the split, or use the threshold 'conformal'"
            )
        tau = float(self._tau(np.sort(scores[~is_unknown]), np.sort(scores[is_unknown])))
        if tau == -math.inf:
            raise OsmlError(f"threshold '{self.name}' would be minus infinity: look at what made such scores")
        self.tau = tau
        return self

    @final
    def decide(self, scores: ArrayLike, classes: ArrayLike | None = None) -> np.ndarray:
        """Which items are unknown: bool `(N,)`."""
        self._check_fitted()
        return checked_scores(scores) > self.tau

    def state(self) -> dict:
        """All of it, as JSON: name, parameters, and τ (null = infinite: nothing is rejected). Needs `fit` first."""
        self._check_fitted()
        return {"name": self.name, "params": self.params, "tau": None if self.tau == math.inf else self.tau}

    @staticmethod
    def from_state(state: dict) -> Threshold:
        """The threshold whose `state()` this is."""
        threshold = registry.create(state["name"], **state["params"])
        threshold.tau = math.inf if state["tau"] is None else checked_number("tau", state["tau"])
        return threshold

    def _check_fitted(self) -> None:
        if self.tau is None:
            raise OsmlError(f"threshold '{self.name}' is not fitted: call fit(scores) first")

    def _tau(self, known: np.ndarray, unknown: np.ndarray) -> float:
        """τ, from the sorted scores of known (at least one) and unknown items."""
        raise NotImplementedError


def checked_scores(scores: ArrayLike) -> np.ndarray:
    """Scores `(N,)` as float64 on the host; OsmlError for NaN or another shape."""
    scores = scores.detach().cpu().numpy() if hasattr(scores, "detach") else np.asarray(scores)
    if scores.ndim != 1:
        raise OsmlError(f"scores must be of shape (items,); got {scores.shape}")
    scores = scores.astype(np.float64)
    if np.isnan(scores).any():
        raise OsmlError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN: look at what made them")
    return scores


def checked_rate(what: str, rate: float) -> float:
    if not isinstance(rate, int | float) or not 0 < rate < 1:
        raise OsmlError(f"{what} must be a rate between 0 and 1, such as 0.05; got {rate!r}")
    return float(rate)


def just_below(score: float) -> float:
    """The largest τ that still rejects an item of this score; scores are float32, so one step of float32."""
    return float(np.nextafter(np.float32(score), np.float32(-np.inf)))
