"""From discovered groups to examples of named classes; and what few examples of a class leave open, rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .detectors import Detector
from .errors import OsmlError
from .gallery import Gallery
from .names import further_names
from .registry import checked_number

if TYPE_CHECKING:
    from .discovery import Discovery

REHEARSALS = 6
"""Classes to enrol in play, at least, each from other examples: one example may lie far out."""
MOST_PLAYERS = 500
"""Items that play in a rehearsal; more would not change the threshold."""


@dataclass(frozen=True)
class EnrolledGroup:
    """What became of a discovered group."""

    group: int
    """Its number, as in `Discovery.labels`."""
    name: str
    """The class that its members are examples of now."""
    size: int
    """How many of them are."""
    skipped: np.ndarray
    """The others: indices of the members whose confidence is too low."""


def examples_of_groups(
    embeddings: Tensor,
    discovery: Discovery,
    names: Mapping[int, str] | None,
    min_confidence: float | None,
    class_names: list[str],
) -> tuple[dict[str, Tensor], tuple[EnrolledGroup, ...]]:
    """Examples `(M, D)` of each class that groups were named, and what each group gives to them.

    Args:
        embeddings: `(N, D)` the items that were grouped.
        names: the class of each group, by number; None: all groups, each a class of its own.
        class_names: the classes that are there already.
    """
    if len(embeddings) != len(discovery.labels):
        raise OsmlError(f"{len(embeddings)} items, but the discovery is one of {len(discovery.labels)}: give its items")
    if names is None:
        names = _numbered(discovery.n_classes, class_names)
    for group in names:
        if group not in range(discovery.n_classes) or isinstance(group, bool):
            there = f"groups are numbered 0 to {discovery.n_classes - 1}" if discovery.n_classes else "there are none"
            raise OsmlError(f"no group {group!r} in this discovery: {there}")
    names = dict(zip(names, further_names(names.values(), class_names), strict=True))
    least = 0.0 if min_confidence is None else checked_number("min_confidence", min_confidence)
    sure = np.asarray(discovery.confidence) >= least
    parts: dict[str, list[Tensor]] = {}
    report = []
    for group, name in sorted(names.items()):
        inside = discovery.labels == group
        kept = np.flatnonzero(inside & sure)
        if not len(kept):
            highest = discovery.confidence[inside].max()
            raise OsmlError(
                f"no member of group {group} has a confidence of {least:g} (the highest is {highest:.2f}): "
                "lower min_confidence, or leave the group out"
            )
        parts.setdefault(name, []).append(embeddings[torch.from_numpy(kept)])
        report.append(EnrolledGroup(group, name, len(kept), np.flatnonzero(inside & ~sure)))
    return {name: torch.cat(of) for name, of in parts.items()}, tuple(report)


def _numbered(n_groups: int, class_names: list[str]) -> dict[int, str]:
    """'new-1', 'new-2', …, but for names that are taken: groups of another discovery are other classes."""
    free = (f"new-{i}" for i in range(1, n_groups + len(class_names) + 1))
    free = (name for name in free if name not in class_names)
    return {group: next(free) for group in range(n_groups)}


def rehearsed_scores(
    items: Tensor, names: np.ndarray, size: int, gallery: Gallery, grown: Callable[[Gallery], Detector]
) -> np.ndarray:
    """Unknown scores that further items of a new class get when it is enrolled from so few examples.

    It is played with classes that are not enrolled; where they are few, several times, each with other examples. As in
    what an enrolled class is judged by, only items that are nearest to their own class count. Classes of no more items
    than `size` do not play.

    Args:
        items: `(N, D)` of classes that are not in the gallery.
        names: `(N,)` their classes.
        size: examples a class.
        grown: the detector for a gallery that has grown.
    """
    rng = np.random.default_rng(0)
    some = rng.permutation(len(names))[:MOST_PLAYERS]
    of_class = [some[names[some] == name] for name in np.unique(names[some])]
    free = _numbered(len(of_class), gallery.class_names)
    players = {free[k]: rows for k, rows in enumerate(of_class) if len(rows) > size}
    scores = [np.empty(0)]
    for _ in range(-(-REHEARSALS // len(players)) if players else 0):
        dealt = {name: rng.permutation(rows) for name, rows in players.items()}
        after = gallery.add_all({name: items[torch.from_numpy(rows[:size])] for name, rows in dealt.items()})
        rest = np.concatenate([rows[size:] for rows in dealt.values()])
        classes = np.repeat([after.id_of(name) for name in dealt], [len(rows) - size for rows in dealt.values()])
        nearest, of_rest = grown(after).predict(items[torch.from_numpy(rest)])
        scores.append(of_rest.numpy()[nearest.numpy() == classes])
    return np.concatenate(scores)
