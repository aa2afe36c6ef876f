"""Distance to the k-th nearest reference of a class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..neighbors import NeighborIndex
from ..registry import checked_count
from .base import Detector


class KNN(Detector, name="knn"):
    """min over classes of the distance to the class's k-th nearest reference (Sun et al. 2022, class by class).

    k is that of the largest class; a class of n_c references out of n in the largest uses ⌈k n_c / n⌉, the same share
    of its own, so that a class enrolled from a few examples is measured as those of thousands are.

    Scanning the references of all classes from the nearest outwards, the first class to reach its k-th
    member is the one with the smallest k-th distance: a short list of neighbours almost always decides.
    """

    search_space = {"k": (1, 3, 5, 10, 20, 50)}

    def __init__(self, *, k: int = 5):
        super().__init__()
        self.k = checked_count("k of detector 'knn'", k)

    @classmethod
    def _fit_all(
        cls, detectors: Sequence[KNN], embeddings: Tensor, labels: Tensor, class_weights: Tensor | None
    ) -> None:
        references = embeddings.clone()
        for detector in detectors:
            detector.register_buffer("references", references)
            detector.register_buffer("reference_labels", labels)

    def _fitted(self) -> None:
        self.__dict__.pop("_index", None)
        counts = self.reference_labels.bincount(minlength=len(self.class_labels))
        k = min(self.k, int(counts.max()))
        self._class_k = -(-k * counts // counts.max())  # rounded up

    @cached_property
    def _index(self) -> NeighborIndex:
        return NeighborIndex(self.references)

    @classmethod
    def _score_all(cls, detectors: Sequence[KNN], embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        # What the largest k needs serves the others: their neighbours are the first of these.
        first, k = detectors[0], max(detector.k for detector in detectors)
        distances, indices = first._index.search(embeddings, 4 * k)
        labels = first.reference_labels[indices]
        nth = _nth_of_its_class(labels)
        return [detector._first_complete(embeddings, distances, labels, nth) for detector in detectors]

    def _first_complete(
        self, embeddings: Tensor, distances: Tensor, labels: Tensor, nth: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score and class, from each item's neighbours, nearest first, and the how-manieth of its class each is."""
        complete = nth == self._class_k[labels]
        first = complete.int().argmax(dim=1, keepdim=True)
        scores, classes = distances.gather(1, first)[:, 0], labels.gather(1, first)[:, 0]
        undecided = ~complete.any(dim=1)
        if undecided.any():
            scores[undecided], classes[undecided] = self._class_scores(embeddings[undecided]).min(dim=1)
        return scores, classes

    def _class_scores(self, embeddings: Tensor) -> Tensor:
        rows = max(1, 2**25 // len(self.references))  # bounds the distance matrix to 128 MiB
        return torch.cat([self._kth_distances(e) for e in embeddings.split(rows)])

    def _kth_distances(self, embeddings: Tensor) -> Tensor:
        distances = torch.cdist(embeddings, self.references, compute_mode="donot_use_mm_for_euclid_dist")
        columns = [
            distances[:, self.reference_labels == c].kthvalue(int(k), dim=1).values for c, k in enumerate(self._class_k)
        ]
        return torch.stack(columns, dim=1)


def _nth_of_its_class(labels: Tensor) -> Tensor:
    """For each of K neighbours `(N, K)`, nearest first, the how-manieth of its class it is: 1, 2, …"""
    order = labels.argsort(dim=1, stable=True)
    grouped = labels.gather(1, order)
    position = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    first = torch.ones_like(grouped, dtype=torch.bool)
    first[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    start = torch.where(first, position, 0).cummax(dim=1).values
    return torch.empty_like(labels).scatter_(1, order, position - start + 1)
