"""Nearest reference against the nearest of another class."""

from __future__ import annotations

import torch
from torch import Tensor

from ..neighbors import NeighborIndex
from .base import Detector


class NearestRatio(Detector, name="nearest_ratio"):
    """d(nearest reference) / d(nearest reference of another class), in [0, 1]: OSNN (Mendes Júnior et al. 2017).

    0 at a reference, 1 midway between two classes, near 1 far from all. Of one class alone there is no ratio: the
    score is then the distance itself.
    """

    searches_references = True

    def __init__(self):
        super().__init__()

    def _fit(self, index: NeighborIndex, labels: Tensor, class_weights: Tensor | None) -> None:
        self.register_buffer("references", index.references)
        self.register_buffer("reference_labels", labels)
        self._index = index

    def _fitted(self) -> None:
        if getattr(self, "_index", None) is None or self._index.references is not self.references:  # loaded, or moved
            self._index = NeighborIndex(self.references, self.reference_labels)
        # An index for each class: each reference is in one of them, so that all are compared with once.
        self._of_class = [self._index.without(self.reference_labels != c) for c in range(len(self.class_labels))]

    def _score_and_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        distances = torch.cat([index.search(embeddings, 1)[0] for index in self._of_class], dim=1)
        if distances.shape[1] == 1:
            return distances[:, 0], torch.zeros_like(distances[:, 0], dtype=torch.long)
        (nearest, other), classes = (t.unbind(dim=1) for t in distances.topk(2, dim=1, largest=False))
        return torch.where(other > 0, nearest / other, 1.0), classes[0]
