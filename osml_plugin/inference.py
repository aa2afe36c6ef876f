"""The open-set counterpart of pytorch-metric-learning's `InferenceModel`."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.utils.inference import InferenceModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from .detectors import Detector
from .embedding import EmbeddingModel, embed_dataset
from .errors import OsmlError
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
    """

    def __init__(
        self,
        trunk: nn.Module,
        embedder: nn.Module | None = None,
        *,
        detector: str | Detector = "knn",
        threshold: str | Threshold = "conformal",
        alpha: float = 0.05,
        **kwargs: Any,
    ):
        super().__init__(trunk, embedder, **kwargs)
        self.recognizer = OpenSetRecognizer(detector, threshold, alpha=alpha)

    def fit(
        self, reference: Dataset, calibration: Dataset | None = None, validation: Dataset | None = None
    ) -> OpenSetInferenceModel:
        """Make the gallery and choose the threshold from datasets of `(input, label)`.

        Args:
            reference: known items, usually the training set.
            calibration: known items that training did not see. Without it a fifth of the reference is set aside,
                and where that was trained on, the rate of rejection in use will be higher than alpha.
            validation: known and pseudo-unknown items, for thresholds that are chosen on both.
        """
        embeddings, labels = self._embed(reference)
        held = self._embed(calibration) if calibration is not None else None
        validation = self._embed(validation) if validation is not None else None
        self.recognizer.fit(embeddings, labels, calibration=held, validation=validation)
        return self

    def predict(self, inputs: Tensor | list[Tensor] | Dataset, batch_size: int = 64) -> Tensor:
        """Labels `(N,)` of the inputs, `UNKNOWN` (−1) where none fits."""
        embeddings = self.get_embeddings_from_tensor_or_dataset(inputs, batch_size).cpu()
        return torch.from_numpy(self.recognizer.recognize(embeddings, neighbours=0).labels)

    def enroll(self, label: int, inputs: Tensor | list[Tensor] | Dataset, batch_size: int = 64) -> None:
        """Learn a new class, or more of one, without training."""
        self.recognizer.enroll(str(label), self.get_embeddings_from_tensor_or_dataset(inputs, batch_size).cpu())

    def _embed(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        model = EmbeddingModel(self.trunk, self.embedder, self.normalize_embeddings).eval()
        embeddings, labels = embed_dataset(model, dataset, device=self.data_device, progress="embedding")
        if labels is None:
            raise OsmlError("these datasets must give (input, label); this one gives inputs alone")
        return embeddings, labels
