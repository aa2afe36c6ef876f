"""OpenMax: logits recalibrated by how unusual an item's distance from the mean of its class is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..registry import checked_count
from .logits import LogitDetector
from .weibull import fit_weibull, weibull_cdf

TRANSLATION = 1e4
"""Where the smallest distance of a tail is moved to before the Weibull fit (the constant of libMR)."""

TAIL_SHARE = 10
"""A tail is at most one item in so many of a class: what lies further in is not its tail."""

MIN_TAIL = 3
"""Distances from which a tail is fitted."""


class OpenMax(LogitDetector, name="openmax"):
    """Log-odds of the unknown class after recalibration (Bendale & Boult 2016, algorithms 1 and 2).

    A class is the mean logit vector of its correctly classified training items and a Weibull distribution of the
    largest Euclidean distances from it. The i-th largest of an item's logits v_c, i = 1 … α, loses its share
    ω_c = (α + 1 − i)/α · F_c(distance from the mean), which the unknown class gains: v_0 = Σ ω_c v_c,
    v_c ← (1 − ω_c) v_c. P(unknown) = softmax(v)_0 is `score.sigmoid()`; as log-odds it does not round to 1.

    The paper has activations of 0 and more in mind: from a negative logit the unknown class would lose. So where an
    item has one, its logits are counted from its smallest, which changes no softmax.

    A class with fewer than 3 items in its tail, or all of them equally far, takes the tails of all classes together.

    Args:
        tail: distances to fit a class's tail to; fewer where that is more than a tenth of the class.
        alpha: logits to recalibrate, the largest first; at most all.
    """

    search_space = {"tail": (10, 20), "alpha": (3, 10)}
    far_point_exception = (
        "the unknown class gains a share of the logits, and these are largest in the tail of a class: an item far from "
        "all classes has less to give"
    )

    def __init__(self, *, tail: int = 20, alpha: int = 10):
        super().__init__()
        self.tail = checked_count("tail of detector 'openmax'", tail)
        self.alpha = checked_count("alpha of detector 'openmax'", alpha)

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        super()._fit(embeddings, labels, class_weights)
        n_classes = len(class_weights)
        if class_weights.shape[1] == 1:
            self.register_buffer("root", torch.linalg.qr(class_weights[:, 0].double(), mode="r").R.T.contiguous())
        chunks = embeddings.split(self.chunk_size)
        right = torch.cat([self._logits(e).argmax(dim=1) for e in chunks]) == labels
        # A class of which nothing is right keeps all.
        right |= (labels[right].bincount(minlength=n_classes) == 0)[labels]
        embeddings, labels = embeddings[right], labels[right]
        counts = labels.bincount(minlength=n_classes)

        def of_chunks() -> Iterator[tuple[Tensor, Tensor]]:
            for e, y in zip(embeddings.split(self.chunk_size), labels.split(self.chunk_size), strict=True):
                yield self._points(e), y

        sums = 0.0
        for points, y in of_chunks():
            sums = points.new_zeros(n_classes, points.shape[1]).index_add_(0, y, points) + sums
        self.register_buffer("means", sums / counts[:, None])
        distances = torch.cat([(points - self.means[y]).norm(dim=1) for points, y in of_chunks()])
        self._fit_tails(*largest_of_classes(distances, labels, counts, min(self.tail, len(labels))))

    def _fit_tails(self, tails: Tensor, present: Tensor) -> None:
        """Register the distribution of each class's tail: distances `(C, n)`, and which of them count."""
        largest = tails.where(present, 0).amax(dim=1)
        lowest = tails.where(present, torch.inf).amin(dim=1)
        alone = (present.sum(dim=1) < MIN_TAIL) | (largest - lowest <= 1e-6 * largest)
        together = tails[present][None]
        shape, scale = fit_weibull(tails - lowest[:, None] + TRANSLATION, present)
        shape_together, scale_together = fit_weibull(together - together.min() + TRANSLATION)
        self.register_buffer("lowest", torch.where(alone, together.min(), lowest))
        self.register_buffer("shapes", torch.where(alone, shape_together, shape))
        self.register_buffer("scales", torch.where(alone, scale_together, scale))

    def _points(self, embeddings: Tensor) -> Tensor:
        """Points as far from each other as the logits of these items are, in double precision.

        With one proxy a class these are linear in the embedding, W x, and with W = Q R as far apart as R x: points of
        the width of the embedding at most, however many classes there are.
        """
        if "root" in self._buffers:
            return embeddings.double() @ self.root
        return torch.einsum("nd,cpd->ncp", embeddings.double(), self.class_weights.double()).amax(dim=2)

    @classmethod
    def _score_all(cls, detectors: Sequence[OpenMax], embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        logits, points = detectors[0]._logits(embeddings), detectors[0]._points(embeddings)
        return [detector._log_odds(logits, points) for detector in detectors]

    def _log_odds(self, logits: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Score and class of each item."""
        alpha = min(self.alpha, logits.shape[1])
        logits = logits - logits.amin(dim=1, keepdim=True).clamp_max(0)
        top, classes = logits.topk(alpha, dim=1)
        # To all classes, though only α count: a product of matrices in double precision beats gathering their means.
        distances = torch.cdist(points, self.means, compute_mode="use_mm_for_euclid_dist").gather(1, classes)
        x = distances - self.lowest[classes] + TRANSLATION
        share = torch.arange(alpha, 0, -1, device=x.device) / alpha
        lost = top * share * weibull_cdf(x, self.shapes[classes], self.scales[classes]).float()
        revised = logits.scatter(1, classes, top - lost)
        return lost.sum(dim=1) - revised.logsumexp(dim=1), classes[:, 0]


def largest_of_classes(distances: Tensor, labels: Tensor, counts: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """The largest distances of each class `(C, n)`, and which of the places are taken."""
    sizes = (-(-counts // TAIL_SHARE)).clamp_max(tail)
    order = distances.argsort(descending=True)
    order = order[labels[order].argsort(stable=True)]  # class by class, the farthest first
    labels = labels[order]
    nth = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels]
    kept = nth < sizes[labels]
    tails = distances.new_zeros(len(counts), int(sizes.max()))
    present = torch.zeros_like(tails, dtype=torch.bool)
    tails[labels[kept], nth[kept]] = distances[order][kept]
    present[labels[kept], nth[kept]] = True
    return tails, present
