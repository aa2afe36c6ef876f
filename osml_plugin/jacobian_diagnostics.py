"""The diagnostics of Park et al. (arXiv 2209.11436) over the checkpoints of a training.

They look at unknown items: they explain a model, and nothing is chosen by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import davies_bouldin_score
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import UNKNOWN
from .detectors import Detector
from .embedding import EmbeddingModel, default_device, embed_dataset, loading_workers
from .jacobian import estimate_jacobian_norm, jacobian_norm
from .metrics.functional import auroc, rank

BATCH = 64
FEWEST = 3
"""Checkpoints below which a correlation says nothing."""


@dataclass(frozen=True)
class Network:
    """A network to look at, with a fitted detector of its embeddings; the epoch is None for a bundle's own."""

    epoch: int | None
    model: EmbeddingModel
    detector: Detector


@dataclass(frozen=True)
class Diagnosis:
    """Of one network. Figures that need unknown items are None where there are none."""

    epoch: int | None
    known: float
    """Mean J of the known items: E_known[J]."""
    unknown: float | None
    """Mean J of the unknown items: E_unknown[J]."""
    auroc: float | None
    """Of the detector's score."""
    jacobian_auroc: float | None
    """Of J itself as the score."""
    davies_bouldin: float | None
    """Davies–Bouldin index of the known classes' embeddings (lower = tighter, further apart); None below two classes
    or without a class of two items."""

    @property
    def difference(self) -> float | None:
        """E_unknown[J] − E_known[J]: above 0 where the paper's explanation holds."""
        return None if self.unknown is None else self.unknown - self.known

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"difference": self.difference}


@dataclass(frozen=True)
class Diagnostics:
    """Of a training: one entry a checkpoint by epoch, or of the final model alone."""

    networks: tuple[Diagnosis, ...]
    detector: str
    norms: np.ndarray
    """`(N,)` J of each item under the last of the networks."""
    labels: np.ndarray
    """`(N,)` class ids, `UNKNOWN` for unknown classes."""
    n_projections: int | None
    """Of the estimate; None = J is exact."""
    before_norm: bool

    @property
    def pearson(self) -> float | None:
        """Correlation of `difference` with `auroc` over the checkpoints; None below 3 of them or where one of the two
        never changes."""
        return self._correlation(pearsonr)

    @property
    def spearman(self) -> float | None:
        """The same of their ranks."""
        return self._correlation(spearmanr)

    def _correlation(self, of: Any) -> float | None:
        pairs = [(n.difference, n.auroc) for n in self.networks if n.difference is not None]
        if len(pairs) < FEWEST or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
            return None
        return float(of(*zip(*pairs, strict=True)).statistic)

    def to_dict(self) -> dict[str, Any]:
        """The object that `osml jacobian --json` prints."""
        unknown = self.labels == UNKNOWN
        return {
            "networks": [network.to_dict() for network in self.networks],
            "pearson": self.pearson,
            "spearman": self.spearman,
            "detector": self.detector,
            "n_projections": self.n_projections,
            "before_norm": self.before_norm,
            "n_known_items": int((~unknown).sum()),
            "n_unknown_items": int(unknown.sum()),
        }


def diagnose(
    networks: Iterable[Network],
    n_networks: int,
    inputs: Dataset | Tensor,
    labels: np.ndarray,
    *,
    n_projections: int | None = None,
    before_norm: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Diagnostics:
    """Look at each of `n_networks` networks, at least one, on the same items.

    Args:
        inputs: N network inputs without labels.
        labels: `(N,)` class ids as the detectors know them, `UNKNOWN` for unknown classes; at least one is known.
        n_projections: estimate J from so many projections; None = exact.
        seed: of the projections.
    """
    device, found = default_device(), []
    unknown = labels == UNKNOWN
    loader = DataLoader(inputs, BATCH, num_workers=loading_workers(len(labels)))
    with tqdm(total=n_networks * len(labels), desc="Jacobian norms", unit="item", disable=not progress) as bar:
        for network in networks:
            embeddings, _ = embed_dataset(network.model, inputs, device=device)
            parts = []
            for i, x in enumerate(loader):
                x = x.to(device)
                if n_projections is None:
                    norms = jacobian_norm(network.model, x, before_norm=before_norm)
                else:
                    norms, _ = estimate_jacobian_norm(
                        network.model, x, n_projections, seed + i, before_norm=before_norm
                    )
                parts.append(norms.cpu())
                bar.update(len(x))
            norms = torch.cat(parts).numpy()
            classes, scores = network.detector.predict(embeddings)
            found.append(
                Diagnosis(
                    epoch=network.epoch,
                    known=float(norms[~unknown].mean(dtype=float)),
                    unknown=float(norms[unknown].mean(dtype=float)) if unknown.any() else None,
                    auroc=auroc(rank(scores, labels, classes)) if unknown.any() else None,
                    jacobian_auroc=auroc(rank(norms, labels, classes)) if unknown.any() else None,
                    davies_bouldin=_davies_bouldin(embeddings[~unknown], labels[~unknown]),
                )
            )
            name = network.detector.name
    return Diagnostics(tuple(found), name, norms, labels, n_projections, before_norm)


def _davies_bouldin(embeddings: Tensor, labels: Sequence[int]) -> float | None:
    n_classes = len(set(labels))
    if not 2 <= n_classes < len(labels):
        return None
    return float(davies_bouldin_score(embeddings.numpy(), labels))
