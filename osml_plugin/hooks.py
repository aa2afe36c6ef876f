"""Open-set validation at the end of each epoch of any pytorch-metric-learning trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import isnan
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.trainers import BaseTrainer
from pytorch_metric_learning.utils.common_functions import return_input
from torch import Tensor, nn
from torch.utils.data import Dataset

from . import UNKNOWN, detectors
from .embedding import EmbeddingModel, embed_dataset
from .errors import OsmlError, unknown_name
from .metrics import OpenSetMetrics, open_set_metrics
from .pml_batches import BatchReader, KnownClasses, Level, numbered

logger = logging.getLogger(__name__)

HIGHER_IS_BETTER = ("auroc", "aupr_unknown", "aupr_known", "oscr", "closed_set_accuracy")


class OpenSetHook:
    """An `end_of_epoch_hook`: how well the known are told from the unknown after this epoch, without a threshold.

    >>> hook = OpenSetHook(train_set, validation_set, patience=3)                         # doctest: +SKIP
    >>> trainer = MetricLossOnly(..., end_of_epoch_hook=hook); trainer.train()            # doctest: +SKIP
    >>> hook.history[-1]["oscr"]                                                          # doctest: +SKIP

    Args:
        reference: a dataset of `(input, label)` of known classes; a few hundred items a class are enough.
        validation: a dataset of `(input, label)`; an item is unknown if its label is `UNKNOWN`, or none of
            the reference. Pseudo-unknown classes, never those of the test.
        detector: by name; one that needs no class weights.
        metric: what `patience` watches: auroc, aupr_unknown, aupr_known, oscr or closed_set_accuracy.
        patience: epochs without a better value after which training stops; `restore_best` then gives back the
            weights of the best epoch. None = never.
        data_and_label_getter, label_hierarchy_level, collate_fn: how batches of these datasets are read, as a trainer
            takes them. None: as the trainer reads its own.
    """

    def __init__(
        self,
        reference: Dataset,
        validation: Dataset,
        *,
        detector: str = "centroid",
        metric: str = "oscr",
        patience: int | None = None,
        unit_norm: bool = True,
        batch_size: int = 256,
        workers: int = 0,
        data_and_label_getter: Callable[[Any], tuple[Any, Any]] | None = None,
        label_hierarchy_level: Level = None,
        collate_fn: Callable | None = None,
    ):
        if metric not in HIGHER_IS_BETTER:
            raise unknown_name("metric to watch", metric, HIGHER_IS_BETTER)
        self.reference, self.validation = reference, validation
        self.detector = detectors.create(detector)
        self.metric, self.patience = metric, patience
        self.unit_norm, self.batch_size, self.workers = unit_norm, batch_size, workers
        self.reader = BatchReader(data_and_label_getter, label_hierarchy_level)
        self.collate_fn = collate_fn
        self._trainer: BaseTrainer | None = None  # the last that called: it reads batches where the hook does not
        self.history: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self._best_state: dict[str, torch.Tensor] | None = None

    def __call__(self, trainer) -> bool:
        """Called by the trainer; False tells it to stop."""
        model = EmbeddingModel(trainer.models["trunk"], trainer.models["embedder"], self.unit_norm).eval()
        self._trainer = trainer
        metrics = self.evaluate(model, trainer.data_device)
        value = getattr(metrics, self.metric)
        if isnan(value):
            raise OsmlError(
                f"{self.metric} is undefined on these validation items: they must hold known and unknown ones "
                f"(there are {metrics.n_known_items} and {metrics.n_unknown_items})"
            )
        self.history.append({"epoch": trainer.epoch, **metrics.to_dict()})
        logger.info("epoch %d: validation %s %.4f, AUROC %.4f", trainer.epoch, self.metric, value, metrics.auroc)
        trainer.epoch_note = f", validation {self.metric} {value:.3f}"
        if self.best_epoch is None or value > self.history[self.best_epoch][self.metric]:
            self.best_epoch = len(self.history) - 1
            if self.patience is not None:
                self._best_state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        return self.patience is None or len(self.history) - 1 - self.best_epoch < self.patience

    def evaluate(self, model: nn.Module, device: torch.device | str | None = None) -> OpenSetMetrics:
        """The metrics of a model as it is now.

        Raises:
            OsmlError: for batches that cannot be read so, and labels that are missing or NaN.
        """
        embeddings, labels = self._embed(model, self.reference, device)
        queries, query_labels = self._embed(model, self.validation, device)
        labels, query_labels = numbered(labels, query_labels)
        classes, of_reference = KnownClasses.of(labels)
        known = of_reference != UNKNOWN
        predicted, scores = self.detector.fit(embeddings[known], of_reference[known]).predict(queries)
        return open_set_metrics(scores, classes.truth(query_labels, predicted), predicted)

    def _embed(
        self, model: nn.Module, dataset: Dataset, device: torch.device | str | None
    ) -> tuple[Tensor, Tensor | np.ndarray]:
        def of_trainer(setting: str, own: Any = None) -> Any:
            return getattr(self._trainer, setting, None) if own is None else own

        getter = of_trainer("data_and_label_getter", self.reader.getter)
        level = of_trainer("label_hierarchy_level", self.reader.level)
        embeddings, labels = embed_dataset(
            model,
            dataset,
            batch_size=self.batch_size,
            workers=self.workers,
            device=device,
            read=BatchReader(None if getter is return_input else getter, level),
            dtype=of_trainer("dtype"),
            collate_fn=of_trainer("collate_fn", self.collate_fn),
        )
        if labels is None:
            raise OsmlError("the datasets of OpenSetHook must give (input, label); this one gives inputs alone")
        return embeddings, labels

    def restore_best(self, model: EmbeddingModel) -> None:
        """Load the weights of the best epoch, where `patience` had them kept."""
        if self._best_state is not None:
            model.load_state_dict(self._best_state)
