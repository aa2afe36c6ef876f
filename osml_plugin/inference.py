"""The open-set counterpart of pytorch-metric-learning's `InferenceModel`."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.utils.inference import InferenceModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import UNKNOWN
from .detectors import Detector
from .embedding import joined
from .errors import OsmlError
from .labels import read_labels
from .pml_batches import BatchReader
from .recognizer import OpenSetRecognizer
from .thresholds import Threshold


class OpenSetInferenceModel(InferenceModel):
    """A trained trunk and embedder that answer with a label, or with `UNKNOWN`.

    >>> model = OpenSetInferenceModel(trunk, embedder, alpha=0.05).fit(train_set, held_out_set)   # doctest: +SKIP
    >>> model.predict(images)                                                                     # doctest: +SKIP
    tensor([ 3, -1,  0])
    >>> model.enroll(17, images_of_a_new_class)                                                   # doctest: +SKIP

    All that `InferenceModel` does, this does too. Labels are the data sets' own integers.

    Args:
        trunk, embedder, and further keywords: as for `InferenceModel`.
        detector, threshold, alpha: as for `OpenSetRecognizer`.
        data_and_label_getter, label_hierarchy_level: how batches of datasets are read, as PML's trainers and testers
            take them. None: a batch is `(inputs, labels)`, or inputs alone where no labels are wanted, and labels have
            one column.
    """

    def __init__(
        self,
        trunk: nn.Module,
        embedder: nn.Module | None = None,
        *args: Any,
        detector: str | Detector = "knn",
        threshold: str | Threshold = "conformal",
        alpha: float = 0.05,
        data_and_label_getter: Callable[[Any], tuple[Any, Any]] | None = None,
        label_hierarchy_level: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(trunk, embedder, *args, **kwargs)
        self.recognizer = OpenSetRecognizer(detector, threshold, alpha=alpha)
        if not isinstance(label_hierarchy_level, Integral | None):
            raise OsmlError(
                f"label_hierarchy_level is {label_hierarchy_level!r}, expected one column: an answer is one label"
            )
        self.reader = BatchReader(data_and_label_getter, label_hierarchy_level)

    def fit(
        self,
        reference: Dataset,
        calibration: Dataset | None = None,
        validation: Dataset | None = None,
        batch_size: int = 64,
    ) -> OpenSetInferenceModel:
        """Make the gallery and choose the threshold from datasets of `(input, label)`.

        Args:
            reference: known items, usually the training set.
            calibration: known items that training did not see. Without it a fifth of the reference is set aside,
                and where that was trained on, the rate of rejection in use will be higher than alpha.
            validation: known and pseudo-unknown items, for thresholds that are chosen on both.

        Raises:
            OsmlError: for datasets that give no labels, text or other labels that are no integers, and what
                `OpenSetRecognizer.fit` refuses.
        """
        for part in (self.trunk, self.embedder):
            part.to(self.data_device)
        embeddings, labels = self._labelled(reference, batch_size)
        held = self._labelled(calibration, batch_size) if calibration is not None else None
        validation = self._labelled(validation, batch_size) if validation is not None else None
        self.recognizer.fit(embeddings, labels, calibration=held, validation=validation)
        return self

    def predict(self, inputs: Tensor | list[Tensor] | Dataset, batch_size: int = 64) -> Tensor:
        """Labels `(N,)` of the inputs, `UNKNOWN` (−1) where none fits."""
        embeddings = self.get_embeddings_from_tensor_or_dataset(inputs, batch_size).cpu()
        names = self.recognizer.recognize(embeddings, neighbours=0).names
        return torch.tensor([UNKNOWN if name is None else int(name) for name in names])

    def enroll(self, label: int, inputs: Tensor | list[Tensor] | Dataset, batch_size: int = 64) -> None:
        """Learn a new class, or more of one, without training. OsmlError for a label that is no integer from 0 on."""
        [label] = read_labels([label], 1, "label")
        if isinstance(label, str):
            raise OsmlError(f"label '{label}' is text, expected an integer: an inference model answers with integers")
        self.recognizer.enroll(str(label), self.get_embeddings_from_tensor_or_dataset(inputs, batch_size).cpu())

    def get_embeddings_from_tensor_or_dataset(self, inputs: Tensor | list[Tensor] | Dataset, batch_size: int) -> Tensor:
        """Embeddings `(N, D)`, of a dataset's items by the model's own way of reading batches; all else is PML's."""
        if isinstance(inputs, Dataset):
            return self._embed(inputs, batch_size)[0]
        return super().get_embeddings_from_tensor_or_dataset(inputs, batch_size)

    def _embed(self, dataset: Dataset, batch_size: int) -> tuple[Tensor, Tensor | np.ndarray | None]:
        embeddings, labels = [], []
        for batch in tqdm(DataLoader(dataset, batch_size), desc="embedding", delay=1, leave=False):
            inputs, of_batch = self.reader(batch)
            embeddings.append(self.get_embeddings(inputs))
            labels += [] if of_batch is None else [of_batch]
        if not embeddings:
            raise OsmlError("nothing to embed: the dataset is empty")
        return torch.cat(embeddings), joined(labels) if labels else None

    def _labelled(self, dataset: Dataset, batch_size: int) -> tuple[Tensor, Tensor]:
        embeddings, labels = self._embed(dataset, batch_size)
        if labels is None:
            raise OsmlError("these datasets must give (input, label); this one gives inputs alone")
        if not isinstance(labels, Tensor):
            raise OsmlError(
                f"labels are text such as '{labels.flat[0]}', expected integers: number the classes, by a "
                "data_and_label_getter if need be, or use OpenSetRecognizer, which takes names"
            )
        return embeddings.cpu(), labels
