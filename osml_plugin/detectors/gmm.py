"""Density of the known embeddings, as a mixture of Gaussians."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import OsmlError
from ..registry import checked_count
from .base import Detector
from .mahalanobis import checked_shrinkage
from .ssd import shrunk_covariances, squared_distances, whitening

COVARIANCES = ("full", "diag")


class GMM(Detector, name="gmm"):
    """− log Σ_g π_g N(x; μ_g, Σ_g): how rare the item is among the known ones, in nats (Bishop 2006, eq. 9.7).

    Each class has Gaussians of its own; or (`each_class=False`) all items together have them, labels aside. The class
    of an item is the most likely one, argmax_c Σ_g p(g|x) P(c|g). Of one Gaussian a class nothing is searched; more are
    found by EM (scikit-learn), from a fixed seed. Covariances are shrunk as `shrunk_covariances` says.

    Args:
        n_components: Gaussians a class (or altogether); a class that has fewer different items takes as many as those.
        covariance: 'full' or 'diag'.
        shrinkage: λ from 1e-6 to 1.
        each_class: whether every class has its own.
    """

    tried_by_auto = False
    search_space = {"shrinkage": (0.01, 0.1, 0.3)}  # EM takes too long to be searched without being asked for

    def __init__(
        self, *, n_components: int = 1, covariance: str = "full", shrinkage: float = 0.1, each_class: bool = True
    ):
        super().__init__()
        if covariance not in COVARIANCES:
            raise OsmlError(f"covariance of detector 'gmm' must be one of {', '.join(COVARIANCES)}; got {covariance!r}")
        self.n_components = checked_count("n_components of detector 'gmm'", n_components)
        self.covariance = covariance
        self.shrinkage = checked_shrinkage(shrinkage)
        if not isinstance(each_class, bool | np.bool_):
            raise OsmlError(f"each_class of detector 'gmm' must be true or false; got {each_class!r}")
        self.each_class = bool(each_class)

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        n_classes, x = len(self.class_labels), embeddings.double()
        groups = labels if self.each_class else torch.zeros_like(labels)
        parts = [(groups == g).nonzero()[:, 0] for g in range(int(groups.max()) + 1)]
        counts, means, scatters, shares = [], [], [], []
        for rows in tqdm(parts, desc="fitting mixtures", delay=2, leave=False):
            belongs = self._belonging(x[rows])
            for r in belongs.T:
                mean = r @ x[rows] / r.sum()
                away = x[rows] - mean
                away[away.abs() < 1e-12 * x[rows].abs().amax(dim=0)] = 0  # what rounding leaves of items that are alike
                full = self.covariance == "full"
                scatters.append((r[:, None] * away).T @ away if full else r @ away.square())
                counts.append(r.sum())
                means.append(mean)
                shares.append(x.new_zeros(n_classes).index_add_(0, labels[rows], r) / r.sum())
        counts = torch.stack(counts)
        self.register_buffer("weights", counts / len(x))
        self.register_buffer("means", torch.stack(means).float())
        self.register_buffer("covariances", shrunk_covariances(torch.stack(scatters), counts, self.shrinkage))
        self.register_buffer("class_shares", torch.stack(shares, dim=1))

    def _belonging(self, x: Tensor) -> Tensor:
        """How far each item `(N, D)` belongs to each Gaussian, `(N, G)`: rows sum to 1."""
        n = self.n_components if self.n_components == 1 else min(self.n_components, len(x.unique(dim=0)))
        if n == 1:
            return torch.ones_like(x[:, :1])
        from sklearn.exceptions import ConvergenceWarning  # here, for it takes a second and no other detector needs it
        from sklearn.mixture import GaussianMixture

        # In an order of their own, so that EM starts the same whatever order they come in.
        order = np.lexsort(x.T.cpu().numpy())
        ordered = x.cpu().numpy()[order]
        spread = ordered.var(axis=0).mean() or 1.0
        mixture = GaussianMixture(
            n, covariance_type=self.covariance, reg_covar=self.shrinkage * spread, max_iter=30, random_state=0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is a start; what follows needs no exact optimum
            found = mixture.fit(ordered).predict_proba(ordered)
        belongs = np.empty_like(found)
        belongs[order] = np.where(found > 1e-9, found, 0)  # what is hardly there would be all the spread of repetitions
        kept = belongs[:, belongs.sum(axis=0) > 1e-6]
        return torch.from_numpy(kept).to(x)

    def _fitted(self) -> None:
        self._whitening = whitening(self.covariances)
        full = self.covariances.ndim == 3
        determinants = self.covariances.logdet() if full else self.covariances.log().sum(dim=1)
        width = self.covariances.shape[-1]
        self._log_peaks = (self.weights.log() - 0.5 * (determinants + width * math.log(2 * math.pi))).float()

    def _score_and_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        logs = self._log_peaks - 0.5 * squared_distances(embeddings, self.means, self._whitening)
        posterior = logs.softmax(dim=1) @ self.class_shares.float().T
        return -logs.logsumexp(dim=1), posterior.argmax(dim=1)
