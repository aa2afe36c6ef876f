"""Distance to the k-th nearest reference of a class."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OsmlError
from ..neighbors import NeighborIndex
from .base import Detector


class KNN(Detector, name="knn"):
    """min over classes of the distance to the class's k-th nearest reference (Sun et al. 2022, class by class).

    A class of fewer than k references uses its farthest one, so that a class enrolled from one example is
    recognised beside classes of thousands.

    Scanning the references of all classes from the nearest outwards, the first class to reach its k-th
    member is the one with the smallest k-th distance: a short list of neighbours almost always decides.
    """

    search_space = {"k": (1, 3, 5, 10, 20, 50)}

    def __init__(self, *, k: int = 5):
        super().__init__()
        if not isinstance(k, int) or k < 1:
            raise OsmlError(f"knn needs k to be a whole number of at least 1; got {k!r}")
        self.k = k

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        self.register_buffer("references", embeddings.clone())
        self.register_buffer("reference_labels", labels)

    def _fitted(self) -> None:
        self._index = NeighborIndex(self.references)
        self._class_k = self.reference_labels.bincount(minlength=len(self.class_labels)).clamp(max=self.k)

    def _score_and_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        distances, indices = self._index.search(embeddings, 4 * self.k)
        labels = self.reference_labels[indices]
        nth_of_class = (labels[:, :, None] == labels[:, None, :]).tril().sum(dim=2)
        complete = nth_of_class == self._class_k[labels]
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
