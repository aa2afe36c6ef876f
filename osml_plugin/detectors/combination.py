"""Several detectors as one, their scores made comparable by what each says of known items."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import OsmlError, unknown_name
from .base import Detector, registry

FOLDS = 5
"""Parts into which the fitted items are cut to score each one by members that have not seen it."""

HOW = ("rank", "p_value")


class Combination(Detector, name="combination"):
    """The mean rank, or Fisher's combination of the p-values, of the scores of several detectors.

    Each member's score s is placed among the n scores that it gives known items. Rank: the share of these that are
    below s, ties counting half, averaged over the members; in [0, 1]. P-value: p = (1 + #{≥ s}) / (n + 1), combined as
    −2 Σ ln p (Fisher 1925). Beyond the largest of the n nothing is told apart.

    The known items are the fitted ones, each scored by members fitted without it, in five parts that cut every class
    alike (held out: a reference is its own neighbour, and would make whatever is new look strange). Of a class with one
    example there is none to hold out; where all have but one, all score alike. That costs five more fits.

    The class is that of the first member.

    Args:
        members: names of detectors, or `{"name": "knn", "k": 10}` for one with parameters.
        how: "rank" or "p_value".
    """

    tried_by_auto = False
    search_space = {"how": HOW}

    def __init__(self, *, members: Sequence[str | Mapping[str, Any]] = ("knn", "mahalanobis"), how: str = "rank"):
        super().__init__()
        listed = isinstance(members, Sequence) and not isinstance(members, str)
        if not (listed and members and all(isinstance(m, str | Mapping) for m in members)):
            raise OsmlError(
                f"members must be a list of detectors, each a name or {{'name': …, parameter: value}}; got {members!r}"
            )
        if how not in HOW:
            raise unknown_name("way to combine (how)", how, HOW)
        self._members = _made(members)
        # The members' own numbers, which a file can hold whatever type was given.
        self.members = [
            m if isinstance(m, str) else {k: m[k] if k == "name" else made.params[k] for k in m}
            for m, made in zip(members, self._members, strict=True)
        ]
        self.how = how
        # Of this object, not of the class: it is the members' matter.
        self.needs_class_weights = any(m.needs_class_weights for m in self._members)

    @classmethod
    def _fit_all(
        cls, detectors: Sequence[Combination], embeddings: Tensor, labels: Tensor, class_weights: Tensor | None
    ) -> None:
        alike: dict[str, list[Combination]] = {}
        for detector in detectors:
            alike.setdefault(json.dumps(detector.members), []).append(detector)
        for first, *others in alike.values():
            first._fit(embeddings, labels, class_weights)
            for other in others:
                other._buffers |= first._buffers

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        for i, member in enumerate(self._members):
            member.fit(embeddings, labels, class_weights)
            for name, buffer in member._buffers.items():
                self.register_buffer(f"{i}_{name}", buffer)
        fold = folds(embeddings, labels)
        scores = [embeddings.new_zeros(len(self._members), 0)]
        for f in tqdm(range(int(fold.max()) + 1), desc="held-out scores", delay=2, leave=False):
            out = fold == f
            members = _made(self.members)
            # Every class keeps an item, so that the class weights are those of the same classes.
            parts = [m.fit(embeddings[~out], labels[~out], class_weights).score(embeddings[out]) for m in members]
            scores.append(torch.stack(parts))
        self.register_buffer("known_scores", torch.cat(scores, dim=1).sort(dim=1).values)

    def _fitted(self) -> None:
        for i, member in enumerate(self._members):
            prefix = f"{i}_"
            member._buffers = {k.removeprefix(prefix): v for k, v in self._buffers.items() if k.startswith(prefix)}
            member._fitted()

    def _score_and_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        found = [member.predict(embeddings) for member in self._members]
        scores = torch.stack([score for _, score in found])
        n = self.known_scores.shape[1]
        below = torch.searchsorted(self.known_scores, scores, side="left")
        at_most = torch.searchsorted(self.known_scores, scores, side="right")
        if self.how == "rank":
            combined = (below + at_most).double().mean(dim=0) / (2 * max(n, 1))
        else:
            combined = -2 * ((1 + n - below).double() / (n + 1)).log().sum(dim=0)
        return combined, found[0][0]


def folds(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The part of each item, `(N,)` in 0 … FOLDS − 1: of each class about as many in each; −1 of a class of one.

    It depends on the items alone, not on their order.
    """
    order = embeddings.double().sum(dim=1).argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    nth = torch.empty_like(labels)
    nth[order] = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    return torch.where(counts[labels] > 1, nth % FOLDS, -1)


def _made(members: Sequence[str | Mapping[str, Any]]) -> list[Detector]:
    made = []
    for member in members:
        params = {"name": member} if isinstance(member, str) else dict(member)
        if "name" not in params:
            raise OsmlError(f"a member of detector 'combination' has no name: {member!r}; give {{'name': …}}")
        made.append(registry.create(params.pop("name"), **params))
    return made
