"""The one sort that all threshold-free metrics share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .. import UNKNOWN
from ..errors import OsmlError
from ..registry import checked_count
from .checks import Values, check_labels, check_predictions, check_same_length, check_scores

BLOCK = 1 << 15
"""Rows or items taken at a time, so that what is made of them stays in the processor's cache."""


@dataclass(frozen=True)
class Ranking:
    """How many items are accepted at each τ that can matter: M distinct scores, and one row for "none accepted"."""

    tau: np.ndarray
    """`(M + 1,)` float64: -inf (the row where nothing is accepted), then the distinct scores in ascending order."""
    known: np.ndarray
    """`(M + 1,)` int64: known items with score <= τ; 0 first, all known items last."""
    unknown: np.ndarray
    """`(M + 1,)` int64: unknown items with score <= τ."""
    correct: np.ndarray
    """`(M + 1,)` int64: known items with score <= τ whose predicted class is their own."""

    @property
    def n_known(self) -> int:
        return int(self.known[-1])

    @property
    def n_unknown(self) -> int:
        return int(self.unknown[-1])

    @property
    def has_both(self) -> bool:
        return self.n_known > 0 and self.n_unknown > 0

    @cached_property
    def best_row(self) -> int:
        """The first row at which the share of unknown items rejected exceeds that of known ones by most."""

        def gain(start: int) -> np.ndarray:
            rows = slice(start, start + BLOCK)
            return self.known[rows] * self.n_unknown - self.unknown[rows] * self.n_known

        start = max(range(0, self.tau.size, BLOCK), key=lambda start: gain(start).max())
        return start + int(gain(start).argmax())


def rank(scores: Values, labels: Values, predictions: Values, device: torch.device | str | None = None) -> Ranking:
    """Sort the items by score and count them at each distinct score.

    O(N log N) time. Memory beside the input: 32 bytes a distinct score for the result, and some 40 bytes an item
    until it is there.

    Args:
        scores: `(N,)` unknown scores, higher = more unknown; infinities allowed.
        labels: `(N,)` int, the true known class (from 0) or `UNKNOWN`.
        predictions: `(N,)` int, the closed-set class of each item; read for known items only.
        device: a torch device on which to sort and to count, so that only the counts come to the host. By default the
            device of scores on CUDA, and NumPy for all others (which shares the memory of a CPU tensor).

    Raises:
        OsmlError: empty input, wrong shapes or lengths, NaN scores, non-integer or too small labels or predictions.
    """
    if device is None and isinstance(scores, torch.Tensor) and scores.is_cuda:
        device = scores.device
    scores = check_scores(scores, device)
    labels, predictions = check_labels(labels, device), check_predictions(predictions, device)
    check_same_length(scores=scores, labels=labels, predictions=predictions)
    counts = _count_on_host if device is None else _count_on_device
    tau, known, unknown, correct = counts(scores, labels != UNKNOWN, labels == predictions)
    return Ranking(np.append(-np.inf, tau), np.append(0, known), np.append(0, unknown), np.append(0, correct))


def _count_on_host(scores: np.ndarray, known: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, ...]:
    order = np.argsort(scores)
    # One byte an item (0 unknown, 1 known, 2 known and correct) keeps the gather in the cache.
    kind = (known.view(np.int8) + correct.view(np.int8))[order]
    scores = scores[order]
    last_of_ties = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    known, correct = np.cumsum(kind > 0), np.cumsum(kind == 2)
    if last_of_ties.size < scores.size:
        scores, known, correct = scores[last_of_ties], known[last_of_ties], correct[last_of_ties]
    return scores, known, last_of_ties + 1 - known, correct


def _count_on_device(scores: torch.Tensor, known: torch.Tensor, correct: torch.Tensor) -> tuple[np.ndarray, ...]:
    scores, order = torch.sort(scores)
    end = torch.ones(1, dtype=torch.bool, device=scores.device)
    last_of_ties = torch.cat((scores[1:] != scores[:-1], end)).nonzero().squeeze(1)
    known, correct = (torch.cumsum(kind[order], 0)[last_of_ties] for kind in (known, correct))
    counts = scores[last_of_ties], known, last_of_ties + 1 - known, correct
    return tuple(count.cpu().numpy() for count in counts)


def thin(ranking: Ranking, points: int) -> Ranking:
    """At most `points` of the rows, for curves to draw or to store: the first, the last, and between them half evenly
    along the ROC curve, half in equal ratios of the unknown items accepted, so that low rates keep their detail.

    What is left are true points; areas under them are not exact.

    Raises:
        OsmlError: fewer than 2 points.
    """
    if checked_count("points", points) < 2:
        raise OsmlError(f"points must be at least 2, not {points}: the two ends of a curve")
    if ranking.tau.size <= points:
        return ranking
    evenly = (points + 1) // 2
    along = ranking.known / max(ranking.n_known, 1) + ranking.unknown / max(ranking.n_unknown, 1)
    at = np.searchsorted(along, np.linspace(0, along[-1], evenly))
    ratios = np.geomspace(1, max(ranking.n_unknown, 1), points - evenly)
    rows = np.union1d(at, np.searchsorted(ranking.unknown, ratios)).clip(max=ranking.tau.size - 1)
    rows = np.unique(np.append(rows[1:-1], [0, ranking.tau.size - 1]))
    return Ranking(ranking.tau[rows], ranking.known[rows], ranking.unknown[rows], ranking.correct[rows])
