"""Known items on their way into a recognizer: which are references, which set the threshold, and each of them once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .copies import copy_sets, representatives
from .errors import OsmlError

logger = logging.getLogger(__name__)

ASIDE = 5
"""One item in this many is set aside for calibration where no calibration items are given."""


@dataclass(frozen=True)
class LabelledEmbeddings:
    """Embeddings `(N, D)` and the class name of each."""

    embeddings: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def select(self, rows: Sequence[int] | np.ndarray) -> LabelledEmbeddings:
        """The items at `rows`, integers in the order that is wanted."""
        rows = np.asarray(rows, dtype=np.int64)
        return LabelledEmbeddings(self.embeddings[torch.from_numpy(rows)], tuple(self.names[i] for i in rows))


@dataclass(frozen=True)
class FitItems:
    """Items that a recognizer is made from; no item is a near-copy of another, neither in one role nor in two, but for
    references of several classes: each class keeps its own."""

    references: LabelledEmbeddings
    calibration: LabelledEmbeddings
    validation: LabelledEmbeddings | None


def fit_items(
    references: LabelledEmbeddings,
    calibration: LabelledEmbeddings | None,
    validation: LabelledEmbeddings | None,
    *,
    near_copies: bool,
    seed: int,
) -> FitItems:
    """Bring known items into their roles, one item for each set of near-copies.

    Args:
        references: known items.
        calibration: known items that are no references; None = a fifth of the references is set aside.
        validation: known and pseudo-unknown items.
        near_copies: False takes all items for different ones.

    Raises:
        OsmlError: for calibration items of classes without references, and where half of them or more are
            near-copies of references.
    """
    if calibration is not None:
        _check_classes(calibration, references)
    contested = np.zeros(len(references), dtype=bool)
    if near_copies:
        references, calibration, validation, contested = _distinct(references, calibration, validation)
    if calibration is None:
        aside = held_out(references.names, seed) & ~contested
        calibration = references.select(np.flatnonzero(aside))
        references = references.select(np.flatnonzero(~aside))
    return FitItems(references, calibration, validation)


def held_out(names: Sequence[str], seed: int) -> np.ndarray:
    """Draw a fifth of the items, bool `(N,)`, with the classes in their proportions.

    Every item of a class of two or more is drawn with the same chance, so that those drawn are exchangeable with new
    items. A fifth of each class, rounded down, would draw few from small classes, which are often the wide ones: then
    more new items are rejected than promised. What rounding leaves of one class goes to the next. A class of one item
    stays whole.
    """
    draw, names = np.random.default_rng(seed), np.array(names)
    classes = [draw.permutation(np.flatnonzero(names == name)) for name in np.unique(names)]
    sizes = np.array([len(members) if len(members) > 1 else 0 for members in classes])
    # In fifths, so that nothing is lost to rounding; the start gives every item its chance.
    ends = (np.cumsum(sizes) + draw.integers(ASIDE)) // ASIDE
    counts = np.diff(ends, prepend=0)
    if not counts.any():
        counts[sizes.argmax()] = min(1, sizes.max())
    aside = np.zeros(len(names), dtype=bool)
    for members, count in zip(classes, counts, strict=True):
        aside[members[:count]] = True
    return aside


def _check_classes(calibration: LabelledEmbeddings, references: LabelledEmbeddings) -> None:
    missing = sorted(set(calibration.names) - set(references.names))
    if missing:
        n = sum(name in missing for name in calibration.names)
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OsmlError(
            f"{n} calibration items are of classes without references, '{missing[0]}'{more}; expected items of the "
            "classes that are fitted: leave them out, or give them to validation as pseudo-unknown ones"
        )


def _distinct(
    references: LabelledEmbeddings, calibration: LabelledEmbeddings | None, validation: LabelledEmbeddings | None
) -> tuple[LabelledEmbeddings, LabelledEmbeddings | None, LabelledEmbeddings | None, np.ndarray]:
    """The first item of each set of near-copies in each role, and the references `(R,)` bool that have copies of
    another class beside them. A set that has references has no items of other roles. It has a reference in each of its
    classes: a class must not vanish because somebody put its pictures into another one, too."""
    given = {"reference": references, "calibration": calibration, "validation": validation}
    parts = {role: items for role, items in given.items() if items is not None and len(items)}
    ends = np.cumsum([len(items) for items in parts.values()])[:-1]
    names = [name for items in parts.values() for name in items.names]
    sets = np.split(copy_sets(torch.cat([items.embeddings for items in parts.values()]), names), ends)
    for of_role, (role, items) in zip(sets, parts.items(), strict=True):
        seen = np.isin(of_role, sets[0]) if role != "reference" else np.zeros(len(items), dtype=bool)
        _check_unseen(role, items, seen, references)
        classes = np.unique(items.names, return_inverse=True)[1]
        each = of_role * (classes.max() + 1) + classes if role == "reference" else of_role
        first = representatives(each)
        kept = first[~seen[first]]
        if len(kept) < len(items):
            logger.warning(
                "%d of %d %s items are near-copies of others: each set of copies counts once",
                len(items) - len(kept),
                len(items),
                role,
            )
        given[role] = items.select(kept)
        if role == "reference":
            contested = np.bincount(of_role[kept])[of_role[kept]] > 1
    return *given.values(), contested


def _check_unseen(role: str, items: LabelledEmbeddings, seen: np.ndarray, references: LabelledEmbeddings) -> None:
    """Raise `OsmlError` where half of the calibration items, or all known validation items, are near-copies of
    references."""
    known = np.isin(items.names, list(set(references.names)))
    n_known, n_seen = int(known.sum()), int((seen & known).sum())
    if n_seen and n_seen >= (n_known / 2 if role == "calibration" else n_known):
        instead = " leave calibration out to have a fifth of the references set aside," if role == "calibration" else ""
        raise OsmlError(
            f"{n_seen} of {n_known} {'known ' if role == 'validation' else ''}{role} items are near-copies of "
            "references; expected items that are no references, since a rate is that of items not seen before:"
            f"{instead} give others, or pass near_copies=False if they are different items"
        )
