"""The contract of thresholds: a rule fitted on unknown scores; unknown iff `score > τ`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from types import MappingProxyType
from typing import ClassVar, final

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..errors import OsmlError
from ..registry import Named, Registry, checked_number

registry: Registry[Threshold] = Registry("threshold")


class Threshold(Named):
    """A subclass has a keyword-only `__init__` that keeps each argument under its own name, and writes `_tau`; one that
    differs by class writes `_fit` instead, which sets `tau`, `taus` and `pooled`."""

    registry = registry
    needs_unknown: ClassVar[bool] = False
    """Whether `fit` needs validation items of both kinds (`is_unknown`); otherwise known items are enough."""
    by_class: ClassVar[bool] = False
    """Whether `fit` needs the nearest class of each item."""

    tau: float | None = None
    """τ of every class that has none of its own."""
    taus: Mapping[int, float] = MappingProxyType({})
    """τ of each class that has one of its own; where there are some, `decide` needs the nearest class of each item."""
    pooled: tuple[int, ...] = ()
    """Of these, classes with too few items for a promise of their own, which share one τ."""

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
        is_unknown = np.zeros(len(scores), bool) if is_unknown is None else on_host("is_unknown", is_unknown)
        if is_unknown.shape != scores.shape or is_unknown.dtype != bool:
            raise OsmlError(f"is_unknown must be booleans of shape ({len(scores)},), one for each score")
        if is_unknown.all():
            raise OsmlError(f"threshold '{self.name}' needs scores of known items to fit on; got none")
        if self.needs_unknown and not is_unknown.any():
            raise OsmlError(
                f"threshold '{self.name}' is chosen on known and unknown items, and there are no unknown ones: "
                "name pseudo-unknown classes in the split, or use the threshold 'conformal'"
            )
        of_known = self._checked_classes(classes, len(scores))[~is_unknown] if self.by_class else None
        self._fit(scores[~is_unknown], scores[is_unknown], of_known)
        return self

    @final
    def decide(self, scores: ArrayLike, classes: ArrayLike | None = None) -> np.ndarray:
        """Which items are unknown: bool `(N,)`. `classes` `(N,)`: the nearest known class of each, where τ differs."""
        self._check_fitted()
        scores = checked_scores(scores)
        if not self.taus:
            return scores > self.tau
        return scores > self._taus_of(self._checked_classes(classes, len(scores)))

    def tau_of(self, classes: ArrayLike) -> np.ndarray:
        """τ `(N,)` of items with these nearest classes `(N,)`."""
        self._check_fitted()
        classes = on_host("classes", classes)
        return self._taus_of(self._checked_classes(classes, classes.size))

    def _taus_of(self, classes: np.ndarray) -> np.ndarray:
        distinct, of = np.unique(classes, return_inverse=True)
        return np.array([self.taus.get(int(c), self.tau) for c in distinct], dtype=np.float64)[of]

    def state(self) -> dict:
        """All of it, as JSON: name, parameters, and τ (null = infinite: nothing is rejected), by class where there are
        several. Needs `fit` first."""
        self._check_fitted()
        state = {"name": self.name, "params": self.params, "tau": written(self.tau)}
        if self.taus:
            state["taus"] = {str(c): written(tau) for c, tau in sorted(self.taus.items())}
            state["pooled"] = list(self.pooled)
        return state

    @staticmethod
    def from_state(state: dict) -> Threshold:
        """The threshold whose `state()` this is."""
        threshold = registry.create(state["name"], **state["params"])
        threshold.tau = read(state["tau"])
        threshold.taus = {int(c): read(tau) for c, tau in state.get("taus", {}).items()}
        threshold.pooled = tuple(state.get("pooled", ()))
        return threshold

    def _check_fitted(self) -> None:
        if self.tau is None:
            raise OsmlError(f"threshold '{self.name}' is not fitted: call fit(scores) first")

    def _checked_classes(self, classes: ArrayLike | None, n: int) -> np.ndarray:
        if classes is None:
            raise OsmlError(f"threshold '{self.name}' differs by class: give the nearest class of each item as well")
        classes = on_host("classes", classes)
        if classes.shape != (n,) or not (np.issubdtype(classes.dtype, np.integer) or not n):
            raise OsmlError(
                f"classes must be whole numbers of shape ({n},), one for each score; got {classes.dtype} of shape "
                f"{classes.shape}"
            )
        return classes

    def _checked_tau(self, tau: float) -> float:
        if tau == -math.inf:
            raise OsmlError(f"threshold '{self.name}' would be minus infinity: look at what made such scores")
        return float(tau)

    def _fit(self, known: np.ndarray, unknown: np.ndarray, classes: np.ndarray | None) -> None:
        """Fit on scores of known items (at least one) and of unknown ones; `classes`: the nearest class of each of the
        known, `by_class`."""
        self.tau = self._checked_tau(self._tau(np.sort(known), np.sort(unknown)))

    def _tau(self, known: np.ndarray, unknown: np.ndarray) -> float:
        """τ, from the sorted scores of known (at least one) and unknown items."""
        raise NotImplementedError


def on_host(what: str, values: ArrayLike) -> np.ndarray:
    """`values` as a NumPy array, tensors of any device and precision included."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise OsmlError(
            f"{what} must be one value an item, of shape (items,), but its rows differ or are no numbers ({reason})"
        ) from error


def checked_scores(scores: ArrayLike) -> np.ndarray:
    """Scores `(N,)` as float64 on the host; OsmlError for NaN, for what is no real number, and for another shape."""
    scores = on_host("scores", scores)
    if scores.ndim != 1:
        raise OsmlError(f"scores must be of shape (items,); got {scores.shape}")
    if scores.dtype.kind not in "fiu":
        raise OsmlError(f"scores must be real numbers; got {scores.dtype}")
    scores = scores.astype(np.float64)
    if np.isnan(scores).any():
        raise OsmlError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN: look at what made them")
    return scores


def checked_rate(what: str, rate: float) -> float:
    if not isinstance(rate, Real) or not 0 < rate < 1:
        raise OsmlError(f"{what} must be a rate between 0 and 1, such as 0.05; got {rate!r}")
    return float(rate)


def just_below(score: float) -> float:
    """The largest τ that still rejects an item of this score; scores are float32, so one step of float32."""
    return float(np.nextafter(np.float32(score), np.float32(-np.inf)))


def checked_p_values(p_values: ArrayLike) -> np.ndarray:
    """p-values `(N,)` as float64; OsmlError for another shape and for values outside (0, 1]."""
    p = on_host("p-values", p_values)
    if p.dtype.kind not in "fiu":
        raise OsmlError(f"p-values must be real numbers; got {p.dtype}")
    p = p.astype(np.float64)
    if p.ndim != 1 or not ((p > 0) & (p <= 1)).all():
        raise OsmlError(
            f"p-values must be of shape (items,) and within (0, 1]; got shape {p.shape}"
            + (f" with values from {p.min():g} to {p.max():g}" if p.size else "")
        )
    return p


def cuts(known: np.ndarray, unknown: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every τ that decides differently on these sorted scores, ascending, from one that rejects all to one that rejects
    none; and the numbers of known and of unknown items that each rejects."""
    taus = np.unique(np.concatenate([known, unknown]))
    taus = np.concatenate([[just_below(taus[0])], taus])
    return taus, *(len(of) - np.searchsorted(of, taus, side="right") for of in (known, unknown))


def written(tau: float) -> float | None:
    """τ as JSON has it: null where it is infinite."""
    return None if tau == math.inf else tau


def read(tau: float | None) -> float:
    """The τ that `written` wrote."""
    return math.inf if tau is None else checked_number("tau", tau)
