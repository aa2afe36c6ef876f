"""The items of one training run, as the network takes them."""

from __future__ import annotations

from copy import copy

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from . import UNKNOWN
from .config import Config
from .data import ImageDataset, ImageSurvey, Items, Split, TrainingRoles, augmentation, normalisation, to_float
from .embedding import EmbeddingModel, embed_dataset, loading_workers
from .hooks import OpenSetHook
from .preprocessing import Preprocessing

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the images that pretrained trunks were trained on."""


class TrainingData:
    """Datasets of `(input, label)` by data role, and what turns an image into an input.

    Labels are class indices 0..C-1 in the order of the known classes' names, `UNKNOWN` for pseudo-unknown ones.
    Images that fit in memory are decoded once.
    """

    ROLES = ("train", "calibration", "validation")
    REFERENCES = 100  # a class, in the check after each epoch

    def __init__(self, items: Items, split: Split, roles: TrainingRoles, survey: ImageSurvey | None, config: Config):
        self.config = config
        indices = {role: getattr(roles, role) for role in self.ROLES}
        ids = {name: i for i, name in enumerate(sorted(split.known))}
        self.used = np.concatenate(list(indices.values()))
        self.names = {role: [items.labels[i] for i in of] for role, of in indices.items()}
        self.labels = {r: np.array([ids.get(n, UNKNOWN) for n in names], int) for r, names in self.names.items()}
        self.preprocessing: Preprocessing | None = None
        self.workers = 0
        self.sets: dict[str, Dataset] = {}
        if survey is None:
            self.channels, self.size = 0, items.embeddings.shape[1]
            for role, of in indices.items():
                tensors = torch.from_numpy(items.embeddings[of]), torch.from_numpy(self.labels[role])
                self.sets[role] = TensorDataset(*tensors)
            return
        used = survey.of(self.used)
        self.size = used.size if config.data.image_size == "auto" else config.data.image_size
        trunk = config.model.trunk.name
        # Trunks other than the small one are made for RGB.
        auto = used.channels if trunk == "small_cnn" or (trunk == "auto" and self.size <= 64) else 3
        self.channels = auto if config.data.channels == "auto" else config.data.channels
        for role, of in indices.items():
            paths = [items.paths[i] for i in of]
            self.sets[role] = ImageDataset(paths, self.labels[role], channels=self.channels, size=self.size)
        if config.model.weights is not None and self.channels == 3:
            mean, std = IMAGENET
        else:
            mean, std = normalisation(self._sample())
        self.preprocessing = Preprocessing(self.size, self.channels, tuple(mean), tuple(std))
        for images in self.sets.values():
            images.transform = to_float(mean, std)
        if config.data.workers != "auto":
            self.workers = config.data.workers
        elif self.sets["train"].images is None:
            self.workers = loading_workers(len(self.sets["train"]))

    @property
    def n_items(self) -> dict[str, int]:
        return {role: len(names) for role, names in self.names.items()}

    def training_set(self, model: EmbeddingModel, device: str | None, progress: bool) -> tuple[Dataset, EmbeddingModel]:
        """The dataset to train on, and the part of `model` that is trained on it."""
        train = self.sets["train"]
        if self.preprocessing is None:
            return train, model
        augment = self.config.data.augment
        if self.config.model.frozen and not isinstance(augment, list):
            # A frozen trunk gives the same features in every epoch: once is enough.
            bar = "features" if progress else None
            rest = EmbeddingModel(torch.nn.Identity(), model.embedder, model.unit_norm)
            return self._features(model, train, device, bar), rest
        augmented = copy(train)
        augmented.transform = v2.Compose([augmentation(augment, self.size), train.transform])
        return augmented, model

    def hook(self, model: EmbeddingModel, trained: EmbeddingModel, device: str | None) -> OpenSetHook:
        """Validation after each epoch, against a few references a class."""
        labels = self.labels["train"]
        few = np.concatenate([np.flatnonzero(labels == c)[: self.REFERENCES] for c in np.unique(labels)])
        sets = [Subset(self.sets["train"], few.tolist()), self.sets["validation"]]
        if trained is not model:
            sets = [self._features(model, s, device) for s in sets]
        patience, unit_norm = self.config.training.patience, self.config.model.unit_norm
        return OpenSetHook(*sets, patience=patience, unit_norm=unit_norm, workers=self.workers)

    def features(self, model: EmbeddingModel, device: str | None, progress: bool) -> dict[str, torch.Tensor]:
        """The trunk's features `(N, F)` of all items, by role."""
        found = {}
        for role, items in self.sets.items():
            if len(items):
                bar = f"embedding {role}" if progress else None
                found[role] = self._features(model, items, device, bar).tensors[0]
        return found

    def _features(
        self, model: EmbeddingModel, of: Dataset, device: str | None, bar: str | None = None
    ) -> TensorDataset:
        return TensorDataset(*embed_dataset(model.trunk, of, workers=self.workers, device=device, progress=bar))

    def _sample(self, n: int = 2000) -> torch.Tensor:
        """Training images for their mean and spread: all that are in memory, else some."""
        train = self.sets["train"]
        if train.images is not None:
            return train.images
        some = train.paths[:: max(1, len(train) // n)]
        return ImageDataset(some, None, channels=self.channels, size=self.size).images
