"""The items of one training run, as the network takes them."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from . import UNKNOWN
from .config import Config
from .data import ImageDataset, ImageSurvey, Items, Split, TrainingRoles, augmentation, normalisation, to_float
from .embedding import EmbeddingModel, embed_dataset
from .hooks import OpenSetHook
from .preprocessing import Preprocessing

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the images that pretrained trunks were trained on."""


class TrainingData:
    """The items of one training run, as the network takes them."""

    ROLES = ("train", "calibration", "validation")
    REFERENCES = 100  # a class, in the check after each epoch

    def __init__(self, items: Items, split: Split, roles: TrainingRoles, survey: ImageSurvey | None, config: Config):
        self.items, self.roles, self.config = items, roles, config
        self.used = np.concatenate([getattr(roles, r) for r in self.ROLES])
        self.n_items = {r: len(getattr(roles, r)) for r in self.ROLES}
        self.class_ids = {name: i for i, name in enumerate(sorted(split.known))}
        self.images: ImageDataset | None = None
        self.preprocessing: Preprocessing | None = None
        self.workers = 0
        if survey is None:
            self.channels, self.size = 0, items.embeddings.shape[1]
            return
        seen = survey.of(self.used)
        self.size = seen.size if config.data.image_size == "auto" else config.data.image_size
        trunk = config.model.trunk.name
        # Trunks other than the small one are made for RGB.
        auto = seen.channels if trunk == "small_cnn" or (trunk == "auto" and self.size <= 64) else 3
        self.channels = auto if config.data.channels == "auto" else config.data.channels
        self.images = self._dataset(roles.train, None)
        if config.model.weights is not None and self.channels == 3:
            mean, std = IMAGENET
        else:
            mean, std = normalisation(self._sample())
        self.preprocessing = Preprocessing(self.size, self.channels, tuple(mean), tuple(std))
        if config.data.workers != "auto":
            self.workers = config.data.workers
        elif self.images.images is None:
            self.workers = min(8, os.cpu_count() or 1)

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return np.array([self.class_ids.get(self.items.labels[i], UNKNOWN) for i in indices], dtype=np.int64)

    def training_set(self, model: EmbeddingModel, device: str | None, progress: bool):
        """The dataset to train on and the part of `model` that is trained on it."""
        labels = torch.from_numpy(self.labels(self.roles.train))
        if self.images is None:
            return TensorDataset(torch.from_numpy(self.items.embeddings[self.roles.train]), labels), model
        augment = self.config.data.augment
        if self.config.model.frozen and not isinstance(augment, list):
            # A frozen trunk gives the same features in every epoch: once is enough.
            features = self.embeddings(model.trunk, self.roles.train, "train", device, progress)
            return TensorDataset(features, labels), EmbeddingModel(torch.nn.Identity(), model.embedder, model.unit_norm)
        self.images.labels = labels.tolist()
        normalise = to_float(self.preprocessing.mean, self.preprocessing.std)
        self.images.transform = v2.Compose([augmentation(augment, self.size), normalise])
        return self.images, model

    def hook(self, model: EmbeddingModel, trained: EmbeddingModel, config: Config, device: str | None) -> OpenSetHook:
        """Validation after each epoch, against a few references a class."""
        labels = self.labels(self.roles.train)
        few = np.concatenate([np.flatnonzero(labels == c)[: self.REFERENCES] for c in self.class_ids.values()])
        sets = []
        for indices in (self.roles.train[few], self.roles.validation):
            inputs = self._inputs(indices)
            if trained is not model:
                inputs = self.embeddings(model.trunk, indices, "validation", device, False)
            sets.append(_Labelled(inputs, self.labels(indices)))
        return OpenSetHook(
            *sets, patience=config.training.patience, unit_norm=config.model.unit_norm, workers=self.workers
        )

    def embeddings(self, model, indices: np.ndarray, role: str, device: str | None, progress: bool) -> torch.Tensor:
        if len(indices) == 0:
            return torch.empty(0, 1)
        bar = f"embedding {role}" if progress else None
        return embed_dataset(model, self._inputs(indices), workers=self.workers, device=device, progress=bar)[0]

    def _inputs(self, indices: np.ndarray):
        if self.preprocessing is None:
            return torch.from_numpy(self.items.embeddings[indices])
        return self.preprocessing.dataset([self.items.paths[i] for i in indices])

    def _dataset(self, indices: np.ndarray, labels: np.ndarray | None) -> ImageDataset:
        paths = [self.items.paths[i] for i in indices]
        return ImageDataset(paths, labels, channels=self.channels, size=self.size)

    def _sample(self, n: int = 2000) -> torch.Tensor:
        """Training images for their mean and spread: all that are in memory, else some."""
        if self.images.images is not None:
            return self.images.images
        some = self.roles.train[:: max(1, len(self.roles.train) // n)]
        return self._dataset(some, None).images


class _Labelled(Dataset):
    """Inputs with labels."""

    def __init__(self, inputs, labels: np.ndarray):
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        return self.inputs[i], int(self.labels[i])
