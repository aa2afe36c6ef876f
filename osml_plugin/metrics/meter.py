"""Open-set metrics over batches, and over the processes of a distributed run."""

from __future__ import annotations

import numpy as np
from torch import distributed

from ..errors import OsmlError
from .checks import Values, check_labels, check_predictions, check_rejected, check_same_length, check_scores
from .open_set import OpenSetMetrics, open_set_metrics

Batch = tuple[np.ndarray, ...]


class OpenSetMeter:
    """Collects batches; `compute` gives the exact `open_set_metrics` of all of them, nothing binned.

    It keeps 24 bytes an item on the host, 25 with decisions. Where `torch.distributed` is initialised, `compute`
    gathers the items of all processes: each must call it, and each gets the figures of all. Items that a distributed
    sampler repeats to fill its last batch count as often as they come.

    >>> meter = OpenSetMeter()
    >>> meter.update([0.1, 0.4], labels=[0, 1], predictions=[0, 1])
    >>> meter.update([0.3, 0.9], labels=[-1, -1], predictions=[1, 0])
    >>> meter.compute().auroc
    0.75
    """

    def __init__(self):
        self._batches: list[Batch] = []

    def update(self, scores: Values, labels: Values, predictions: Values, rejected: Values | None = None) -> None:
        """Add a batch; arguments as for `open_set_metrics`. Decisions come with all batches or with none.

        Raises:
            OsmlError: as `open_set_metrics`; decisions with some batches only. The meter stays as it was.
        """
        arrays = {
            "scores": check_scores(scores),
            "labels": check_labels(labels),
            "predictions": check_predictions(predictions),
        }
        if rejected is not None:
            arrays["rejected"] = check_rejected(rejected)
        check_same_length(**arrays)
        batch = tuple(array.copy() for array in arrays.values())  # the caller may fill its buffers anew
        _check_alike([*self._batches[:1], batch])
        self._batches.append(batch)

    def merge(self, other: OpenSetMeter) -> None:
        """Add the batches of another meter, which keeps them.

        Raises:
            OsmlError: only one of the two has decisions.
        """
        _check_alike([*self._batches[:1], *other._batches[:1]])
        self._batches = [*self._batches, *other._batches]

    def reset(self) -> None:
        """Forget all batches."""
        self._batches = []

    def compute(self, *, n_unknown_classes: int | None = None) -> OpenSetMetrics:
        """The metrics of all items so far, in all processes. More batches may follow.

        Args:
            n_unknown_classes: as for `open_set_metrics`.

        Raises:
            OsmlError: there are no items; decisions in some processes only.
        """
        self._batches = _joined(self._batches)
        batches = self._batches
        if distributed.is_available() and distributed.is_initialized():
            by_process: list = [None] * distributed.get_world_size()
            distributed.all_gather_object(by_process, batches)
            batches = _joined([batch for batches in by_process for batch in batches])
        if not batches:
            raise OsmlError("the meter has no items: update it with at least one batch")
        return open_set_metrics(*batches[0], n_unknown_classes=n_unknown_classes)


def _joined(batches: list[Batch]) -> list[Batch]:
    """The same items as one batch, or none."""
    _check_alike(batches)
    return [tuple(np.concatenate(arrays) for arrays in zip(*batches, strict=True))] if batches else []


def _check_alike(batches: list[Batch]) -> None:
    if len({len(batch) for batch in batches}) > 1:
        raise OsmlError("decisions came with some batches only: give `rejected` with all batches, or with none")
