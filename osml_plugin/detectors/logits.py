"""Detectors on the logits of a classification loss's proxies: the baselines of the field."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OsmlError
from ..registry import checked_number
from .base import Detector


class ProxyDetector(Detector):
    """Logits of item x and class c: max over the class's proxies of x · w. The class is that of the largest logit."""

    needs_class_weights = True

    def __init__(self):
        super().__init__()

    def _fit(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None) -> None:
        self.register_buffer("class_weights", class_weights.clone())

    def _proxy_logits(self, embeddings: Tensor) -> Tensor:
        """Of every proxy, `(N, C, P)`."""
        return (embeddings @ self.class_weights.flatten(0, 1).T).unflatten(1, self.class_weights.shape[:2])

    def _logits(self, embeddings: Tensor) -> Tensor:
        logits = self._proxy_logits(embeddings)
        return logits.amax(dim=2) if logits.shape[2] > 1 else logits[:, :, 0]

    def _score_and_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(embeddings)
        nearest = largest(logits)
        return self._item_score(embeddings, logits, nearest), nearest

    def _item_score(self, embeddings: Tensor, logits: Tensor, nearest: Tensor) -> Tensor:
        """The unknown score `(N,)` of items `(N, D)`, given their logits `(N, C)` and classes `(N,)`."""
        raise NotImplementedError


class LogitDetector(ProxyDetector):
    """A score that needs nothing of an item but its logits.

    One that fits nothing but the proxies is `incremental`.
    """

    class_buffers = ("class_weights",)

    def _update(self, embeddings: Tensor, labels: Tensor, class_weights: Tensor | None, sign: int) -> None:
        if class_weights is not None:
            self._fit(embeddings, labels, class_weights)

    @classmethod
    def _score_all(cls, detectors: Sequence[LogitDetector], embeddings: Tensor) -> list[tuple[Tensor, Tensor]]:
        logits = detectors[0]._logits(embeddings)
        nearest = largest(logits)
        return [(detector._logit_score(logits, nearest), nearest) for detector in detectors]

    def _logit_score(self, logits: Tensor, nearest: Tensor) -> Tensor:
        """The unknown score `(N,)` of logits `(N, C)`, the largest of which are those of the classes `nearest`."""
        raise NotImplementedError


class TemperedLogitDetector(LogitDetector):
    """A score of logits divided by a temperature T, from 1e-6 to 1e6."""

    incremental = True
    search_space = {"temperature": (0.5, 1.0, 2.0, 5.0, 10.0)}

    def __init__(self, *, temperature: float = 1.0):
        super().__init__()
        self.temperature = checked_factor("temperature", temperature)

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1 else logits / self.temperature


class MaxLogit(LogitDetector, name="max_logit"):
    """− max_c logit_c (Vaze et al. 2022)."""

    incremental = True

    def _logit_score(self, logits: Tensor, nearest: Tensor) -> Tensor:
        return -of_class(logits, nearest)


class Energy(TemperedLogitDetector, name="energy"):
    """− T · log Σ_c exp(logit_c / T) (Liu et al. 2020, eq. 4)."""

    def _logit_score(self, logits: Tensor, nearest: Tensor) -> Tensor:
        return -self.temperature * log_sum_exp(self._tempered(logits), nearest)


class MSP(TemperedLogitDetector, name="msp"):
    """1 − max_c softmax(logits / T)_c (Hendrycks & Gimpel 2017)."""

    far_point_exception = "softmax divides out how large the logits are: a far point can be as sure as a near one"

    def _logit_score(self, logits: Tensor, nearest: Tensor) -> Tensor:
        return others(torch.softmax(self._tempered(logits), dim=1), nearest)


class Entropy(TemperedLogitDetector, name="entropy"):
    """Entropy in nats of softmax(logits / T)."""

    far_point_exception = MSP.far_point_exception

    def _logit_score(self, logits: Tensor, nearest: Tensor) -> Tensor:
        logits = self._tempered(logits)
        p = torch.softmax(logits, dim=1)
        # − log p_c = (logit_ŷ − logit_c) − log p_ŷ
        below = of_class(logits, nearest)[:, None] - logits
        return below.mul_(p).sum(dim=1) - of_class(p, nearest).log()


def checked_factor(what: str, value: float) -> float:
    """What logits are divided or multiplied by: from 1e-6 to 1e6, beyond which single precision overflows."""
    if not 1e-6 <= checked_number(what, value) <= 1e6:
        raise OsmlError(f"{what} must be from 1e-6 to 1e6; got {value!r}")
    return float(value)


def largest(logits: Tensor) -> Tensor:
    """The index `(N,)` of the largest of each row; the first of several."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=1)
    return torch.from_numpy(logits.numpy().argmax(axis=1))  # several times as fast as PyTorch's


def of_class(values: Tensor, classes: Tensor) -> Tensor:
    """Of values `(N, C)` those of the items' classes `(N,)`; for the class of the largest, sooner than a maximum."""
    return values.gather(1, classes[:, None])[:, 0]


def log_sum_exp(logits: Tensor, nearest: Tensor) -> Tensor:
    """log Σ_c exp(logit_c) `(N,)`: the largest logit, that of `nearest`, less the log of its softmax probability, which
    is at least 1 / C; on the CPU in half the time of torch.logsumexp."""
    return of_class(logits, nearest) - of_class(torch.softmax(logits, dim=1), nearest).log()


def entropy(log_p: Tensor) -> Tensor:
    """In nats `(N,)`, of the logarithms of probabilities `(N, C)`."""
    return -(log_p.exp() * log_p).sum(dim=1)


def others(p: Tensor, nearest: Tensor) -> Tensor:
    """1 − p_nearest `(N,)` of probabilities `(N, C)`, as the sum of the others: exact where p_nearest rounds to 1. It
    writes zeros over p_nearest."""
    return p.scatter_(1, nearest[:, None], 0).sum(dim=1)
