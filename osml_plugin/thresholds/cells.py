"""Calibration scores by group: what a conformal threshold, and the p-values that agree with it, are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .ranks import enough, p_values, quantile


@dataclass(frozen=True)
class Cell:
    """The calibration scores behind one τ."""

    scores: np.ndarray
    """Of the classes that it stands for."""
    floor: np.ndarray | None = None
    """Scores whose own τ this one never lies below; None: there is no such bound."""

    def tau(self, alpha: float) -> float:
        """The conformal τ of its scores, or of its floor where that is higher. Too few scores for a promise are not
        without meaning: with a floor, nothing up to the largest of them is rejected."""
        if self.floor is None:
            return quantile(self.scores, alpha)
        possible = enough(len(self.scores), alpha)
        own = quantile(self.scores, alpha) if possible else float(self.scores.max(initial=-np.inf))
        return max(own, quantile(self.floor, alpha))

    def p_values(self, scores: np.ndarray, alpha: float) -> np.ndarray:
        """Such that p ≤ α and score > τ are the same thing."""
        p = p_values(scores, self.scores)
        if self.floor is None:
            return p
        if not enough(len(self.scores), alpha):
            p = np.where(scores > self.scores.max(initial=-np.inf), 0, p)
        return np.maximum(p, p_values(scores, self.floor))


def cells_of(
    scores: np.ndarray, nearest: np.ndarray, classes: Iterable[int], alpha: float, *, floor: np.ndarray, bound: bool
) -> tuple[dict[int, Cell], tuple[int, ...]]:
    """A cell for each of `classes`, of the scores whose nearest class it is; and the classes that were pooled.

    Classes with fewer than 1/α − 1 scores share one cell; where even that holds too few, `floor` bounds it from below.

    Args:
        bound: whether `floor` bounds the others as well.
    """
    order = np.argsort(nearest, kind="stable")
    classes, ordered = sorted(classes), scores[order]
    starts, ends = (np.searchsorted(nearest[order], classes, side=side) for side in ("left", "right"))
    own = {c: ordered[start:end] for c, start, end in zip(classes, starts, ends, strict=True)}
    pooled = tuple(sorted(c for c, of in own.items() if not enough(len(of), alpha)))
    pool = np.concatenate([scores[:0], *(own[c] for c in pooled)])
    shared = Cell(pool, floor if bound or not enough(len(pool), alpha) else None)
    return {c: shared if c in pooled else Cell(of, floor if bound else None) for c, of in own.items()}, pooled
