"""Detectors on the logits of a classification loss's proxies: the baselines of the field."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OsmlError
from ..registry import checked_number
from .base import Detector


class LogitDetector(Detector):
    """Logits of item x and class c: max over the class's proxies of x · w."""

    needs_class_weights = True

    def __init__(self):
        super().__init__()

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        self.register_buffer("class_weights", class_weights.clone())

    def _logits(self, embeddings: Tensor) -> Tensor:
        return torch.einsum("nd,cpd->ncp", embeddings, self.class_weights).amax(dim=2)

    @classmethod
    def _score_all(cls, detectors: Sequence[LogitDetector], embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        logits = detectors[0]._logits(embeddings)
        nearest = logits.argmax(dim=1)
        return [(detector._logit_score(logits), nearest) for detector in detectors]

    def _logit_score(self, logits: Tensor) -> Tensor:
        """The unknown score `(N,)` of logits `(N, C)`."""
        raise NotImplementedError


class TemperedLogitDetector(LogitDetector):
    """A score of logits divided by a temperature T > 0."""

    search_space = {"temperature": (0.5, 1.0, 2.0, 5.0, 10.0)}

    def __init__(self, *, temperature: float = 1.0):
        super().__init__()
        self.temperature = checked_number("temperature", temperature)
        if self.temperature <= 0:
            raise OsmlError(f"temperature must be above 0; got {temperature!r}")


class MaxLogit(LogitDetector, name="max_logit"):
    """− max_c logit_c (Vaze et al. 2022)."""

    def _logit_score(self, logits: Tensor) -> Tensor:
        return -logits.amax(dim=1)


class Energy(TemperedLogitDetector, name="energy"):
    """− T · log Σ_c exp(logit_c / T) (Liu et al. 2020, eq. 4)."""

    def _logit_score(self, logits: Tensor) -> Tensor:
        return -self.temperature * torch.logsumexp(logits / self.temperature, dim=1)


class MSP(TemperedLogitDetector, name="msp"):
    """1 − max_c softmax(logits / T)_c (Hendrycks & Gimpel 2017)."""

    far_point_exception = "softmax divides out how large the logits are: a far point can be as sure as a near one"

    def _logit_score(self, logits: Tensor) -> Tensor:
        # 1 − p_max as the sum of the others: exact where p_max rounds to 1.
        p = torch.softmax(logits / self.temperature, dim=1)
        return p.sort(dim=1).values[:, :-1].sum(dim=1)


class Entropy(TemperedLogitDetector, name="entropy"):
    """Entropy in nats of softmax(logits / T)."""

    far_point_exception = MSP.far_point_exception

    def _logit_score(self, logits: Tensor) -> Tensor:
        return torch.special.entr(torch.softmax(logits / self.temperature, dim=1)).sum(dim=1)
