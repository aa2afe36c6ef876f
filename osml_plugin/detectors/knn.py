"""Distance to the k-th nearest reference of a class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OsmlError
from ..neighbors import NeighborIndex
from ..registry import checked_count
from .base import Detector

MAX_NEIGHBOURS = 2**22
"""Neighbours looked at at once: 32 MiB of rows."""


class KNN(Detector, name="knn"):
    """min over classes of the distance to the class's k-th nearest reference (Sun et al. 2022, class by class).

    k is that of the largest class; a class of n_c references out of n in the largest uses ⌈k n_c / n⌉, the same share
    of its own, so that a class enrolled from a few examples is measured as those of thousands are.

    Scanning the references of all classes from the nearest outwards, the first class to reach its k-th
    member is the one with the smallest k-th distance: a short list of neighbours almost always decides.
    """

    searches_references = True
    incremental = True
    search_space = {"k": (1, 3, 5, 10, 20, 50)}

    def __init__(self, *, k: int = 5):
        super().__init__()
        self.k = checked_count("k of detector 'knn'", k)
        self._index: NeighborIndex | None = None

    @classmethod
    def _fit_all(
        cls, detectors: Sequence[KNN], index: NeighborIndex, labels: Tensor, class_weights: Tensor | None
    ) -> None:
        for detector in detectors:
            detector.register_buffer("references", index.references)
            detector.register_buffer("reference_labels", labels)
            detector._index = index

    def _update(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None, sign: int) -> None:
        if sign < 0:
            left_out = self._rows_of(embeddings, labels)
            self._index = self._index.without(left_out)
            self.reference_labels = self.reference_labels.masked_fill(left_out, -1)
            return
        kept = self.reference_labels >= 0
        if 2 * int(kept.sum()) < len(kept):  # most have gone: their memory goes too
            references, self.reference_labels = self.references[kept], self.reference_labels[kept]
            self._index = NeighborIndex.of_copy(references, self.reference_labels)
        self.reference_labels = torch.cat([self.reference_labels, labels])
        self._index = self._index.extended(embeddings, self.reference_labels)
        self.references = self._index.references

    def _take_classes(self, rows: Tensor) -> None:
        moved = torch.full_like(self.class_labels, -1)
        moved[rows[rows >= 0]] = (rows >= 0).nonzero()[:, 0]
        of = self.reference_labels
        self.reference_labels = torch.where(of >= 0, moved[of], -1)
        super()._take_classes(rows)

    def _rows_of(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Which references these items are, bool `(R,)`: of several that are alike, as many as there are items."""
        of_classes = torch.isin(self.reference_labels, labels).nonzero()[:, 0]
        both = torch.cat([self.references[of_classes], embeddings]).double()
        labelled = torch.cat([both, torch.cat([self.reference_labels[of_classes], labels])[:, None].double()], dim=1)
        alike = labelled.unique(dim=0, return_inverse=True)[1]
        here, wanted = alike[: len(of_classes)], alike[len(of_classes) :].bincount(minlength=int(alike.max()) + 1)
        nth = _nth_of_its_class(here[None])[0]
        if (here.bincount(minlength=len(wanted)) < wanted).any():
            raise OsmlError("some of these items are not among the references: give items that it was fitted on")
        left_out = torch.zeros_like(self.reference_labels, dtype=torch.bool)
        left_out[of_classes[nth <= wanted[here]]] = True
        return left_out

    def _fitted(self) -> None:
        if self._index is None or self._index.references is not self.references:  # loaded, or on another device
            left_out = self.reference_labels < 0
            self._index = NeighborIndex(self.references, self.reference_labels).without(left_out)
        if "class_counts" not in self._buffers:  # a file of an earlier version
            here = self.reference_labels[self.reference_labels >= 0]
            self.register_buffer("class_counts", here.bincount(minlength=len(self.class_labels)))
        counts = self.class_counts
        k = min(self.k, int(counts.max()))
        self._class_k = -(-k * counts // counts.max())  # rounded up

    @classmethod
    def _score_all(cls, detectors: Sequence[KNN], embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        # What the largest k needs serves the others: their neighbours are the first of these.
        n = 4 * max(detector.k for detector in detectors)
        neighbours = detectors[0]._neighbours(embeddings, n)
        return [detector._first_complete(embeddings, n, *neighbours) for detector in detectors]

    def _neighbours(self, embeddings: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each item's n neighbours, nearest first: distances, classes, and the how-manieth of its class each is."""
        distances, rows = self._index.search(embeddings, n)
        classes = self.reference_labels[rows]
        return distances, classes, _nth_of_its_class(classes)

    def _first_complete(
        self, embeddings: Tensor, n: int, distances: Tensor, classes: Tensor, nth: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score and class of each item, from its n neighbours, and from more of them where these do not decide."""
        complete = nth == self._class_k[classes]
        first = complete.int().argmax(dim=1, keepdim=True)
        scores, nearest = distances.gather(1, first)[:, 0], classes.gather(1, first)[:, 0]
        undecided = (~complete.any(dim=1)).nonzero()[:, 0]
        if not len(undecided):
            return scores, nearest
        # One neighbour more than all classes can have without being complete decides.
        n = min(4 * n, int((self._class_k - 1).sum()) + 1)
        for rows in undecided.split(max(1, MAX_NEIGHBOURS // n)):
            wider = self._neighbours(embeddings[rows], n)
            scores[rows], nearest[rows] = self._first_complete(embeddings[rows], n, *wider)
        return scores, nearest


def _nth_of_its_class(labels: Tensor) -> Tensor:
    """For each of K neighbours `(N, K)`, nearest first, the how-manieth of its class it is: 1, 2, …"""
    order = labels.argsort(dim=1, stable=True)
    grouped = labels.gather(1, order)
    position = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    first = torch.ones_like(grouped, dtype=torch.bool)
    first[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    start = torch.where(first, position, 0).cummax(dim=1).values
    return torch.empty_like(labels).scatter_(1, order, position - start + 1)
