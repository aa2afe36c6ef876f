"""Split-conformal rejection: an error rate that was chosen and is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike

from ..errors import OsmlError
from .base import Threshold, checked_rate, checked_scores
from .cells import Cell, cells_of
from .ranks import conformal_rank, enough, fewest, p_values, topped_up

__all__ = ["Conformal", "Guarantee", "conformal_rank", "guarantee", "p_values"]


class Conformal(Threshold, name="conformal"):
    """τ = the ⌈(n+1)(1−α)⌉-th smallest of n calibration scores of known items.

    A new known item, exchangeable with these, is then rejected with probability at most α (Vovk et al. 2005;
    Angelopoulos & Bates 2023, theorem 1), whatever the detector and the data. Fewer than 1/α − 1 items cannot
    carry the promise: τ is then infinite and nothing is rejected.

    Classes that are enrolled later get a τ of their own by `fit_enrolled`, never below this one: so the promise to the
    items of the other classes holds whatever is enrolled.
    """

    _general: Cell | None = None
    _cells: Mapping[int, Cell] = MappingProxyType({})
    _enrolled: frozenset[int] = frozenset()

    def __init__(self, *, alpha: float = 0.05):
        self.alpha = checked_rate("alpha", alpha)

    def _fit(self, known: np.ndarray, unknown: np.ndarray, classes: np.ndarray | None) -> None:
        self._calibration, self._groups = known, [len(known)]
        self._take(Cell(known), {}, ())

    def fit_enrolled(
        self,
        scores: ArrayLike,
        classes: ArrayLike,
        enrolled: Iterable[int],
        rehearsed: Mapping[int, ArrayLike] = MappingProxyType({}),
    ) -> Conformal:
        """Give enrolled classes a τ of their own, on top of a `fit` on the calibration items of the others.

        A class with at least 1/α − 1 scores has its own conformal τ; those with fewer share that of all their scores.
        Where these are too few as well, as many rehearsed ones as are missing join them; without, nothing is promised,
        and τ is the largest of them. No τ is below the one that all calibration items ask for.

        The scores are cross-conformal (Vovk 2015): each of an example by a detector that was fitted without it. Of new
        items of an enrolled class that are nearest to it about α are rejected. Less is proven, and only for detectors
        whose scores more references never raise (`knn`): 2α + (1 − K/n) / (K + 1) for n examples in K folds, 2α where
        each example is a fold (Barber et al. 2021, theorems 1 and 4). Others rely on being stable.

        Args:
            scores: `(M,)` of enrolled examples.
            classes: `(M,)` the nearest class of each; those nearest to a class that was not enrolled are left out.
            enrolled: the classes that were enrolled, those without a score included.
            rehearsed: for classes that are `lacking`, scores of other new classes when these were enrolled from as few
                examples.
        """
        self._check_scores()
        scores, enrolled = checked_scores(scores), frozenset(int(c) for c in enrolled)
        classes = self._checked_classes(classes, len(scores))
        cells, pooled = cells_of(scores, classes, enrolled, self.alpha, floor=self._calibration, bound=True)
        for c, others in rehearsed.items():
            if c in pooled:
                cells[c] = replace(cells[c], scores=topped_up(cells[c].scores, checked_scores(others), self.alpha))
        pooled = (*pooled, *(c for c in self.pooled if c not in enrolled))
        self._take(self._general, {**self._cells, **cells}, pooled, enrolled)
        return self

    @property
    def lacking(self) -> tuple[int, ...]:
        """Enrolled classes whose scores, even pooled, are too few for the rate."""
        return tuple(c for c in sorted(self._enrolled) if not enough(len(self._cells[c].scores), self.alpha))

    def p_values(self, scores: ArrayLike, classes: ArrayLike | None = None) -> np.ndarray:
        """Conformal p-values `(N,)` given the nearest class of each item; p ≤ α and rejected are the same thing."""
        self._check_scores()
        scores = checked_scores(scores)
        p = self._general.p_values(scores, self.alpha)
        if self._cells:
            classes = self._checked_classes(classes, len(scores))
            for c in np.unique(classes):
                if c in self._cells:
                    p[classes == c] = self._cells[c].p_values(scores[classes == c], self.alpha)
        return p

    def guarantee(self) -> Guarantee:
        """What the calibration items promise of the classes that they are of; enrolled ones are not among these."""
        self._check_scores()
        confidence = 1 - 0.05 / len(self._groups)  # of all groups at once (Bonferroni)
        worst = max((guarantee(n, self.alpha, confidence=confidence) for n in self._groups), key=lambda g: g.at_most)
        return replace(worst, groups=len(self._groups), enrolled=len(self._enrolled))

    def _check_scores(self) -> None:
        """What `from_state` brings back decides, and has no scores."""
        if self._general is None:
            raise OsmlError(f"threshold '{self.name}' has no calibration scores: call fit(scores) first")

    def _take(
        self,
        general: Cell,
        cells: Mapping[int, Cell],
        pooled: tuple[int, ...],
        enrolled: frozenset[int] = frozenset(),
    ) -> None:
        tau = self._checked_tau(general.tau(self.alpha))
        taus = {c: self._checked_tau(cell.tau(self.alpha)) for c, cell in cells.items()}
        self._general, self._cells, self._enrolled = general, cells, enrolled
        self.tau, self.taus, self.pooled = tau, taus, tuple(sorted(pooled))


@dataclass(frozen=True)
class Guarantee:
    """What n calibration items at level α promise of the share of known items rejected."""

    alpha: float
    n: int
    expected: float
    """The rate to expect over all calibration sets of this size; at most α."""
    at_most: float
    """With 95 % confidence the rate of **this** calibration set is at most this."""
    groups: int = 1
    """Classes with a τ of their own, and pools of classes; where there are several, the above are of the worst, and the
    confidence is that all of them keep to `at_most`."""
    pooled: tuple[str, ...] = ()
    """Classes without a promise of their own."""
    enrolled: int = 0
    """Classes that were enrolled, whose own examples set their τ: of them nothing above is said."""
    left: int | None = None
    """Calibration items that are left since classes were forgotten, where they are too few for the rate: the promise is
    the last one before that. None: it is one of today."""

    @property
    def possible(self) -> bool:
        """Whether there are enough items for any promise; without it nothing is rejected."""
        return enough(self.n, self.alpha)

    def __str__(self) -> str:
        if not self.possible:
            return (
                f"nothing is rejected: at {self.alpha:.1%} at least {fewest(self.alpha)} calibration items are needed, "
                f"and there are {self.n}; give more images, or a larger alpha"
            )
        if self.groups == 1:
            text = (
                f"at most {self.alpha:.1%} of known items rejected on average ({self.n} calibration items); "
                f"for this calibration set at most {self.at_most:.1%} with 95 % confidence"
            )
        else:
            text = (
                f"at most {self.alpha:.1%} of known items rejected on average, whichever class is nearest; for this "
                f"calibration set at most {self.at_most:.1%} in the worst of {self.groups} groups ({self.n} items) "
                "with 95 % confidence"
            )
        if self.enrolled:
            text += f"; enrolled classes: about {self.alpha:.1%} of what is nearest to them"
        if self.pooled:
            text += f"; pooled, for want of items: {', '.join(self.pooled)}"
        if self.left is not None:
            text += (
                f"; kept from before classes were forgotten: {self.left} of these items are left, and "
                f"{fewest(self.alpha)} are needed; train again, or choose a larger alpha"
            )
        return text


def guarantee(n: int, alpha: float, *, confidence: float = 0.95) -> Guarantee:
    """The rejection rate given the calibration set is Beta(n + 1 − r, r), r = ⌈(n+1)(1−α)⌉ (Vovk 2012)."""
    rank = conformal_rank(n, alpha)
    if rank > n:
        return Guarantee(alpha, n, 0.0, 0.0)
    from scipy.stats import beta  # a second of imports, which recognizing does without

    return Guarantee(alpha, n, (n + 1 - rank) / (n + 1), float(beta.ppf(confidence, n + 1 - rank, rank)))
