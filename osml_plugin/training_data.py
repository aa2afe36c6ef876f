"""The items of one training run, as the network takes them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from . import UNKNOWN
from .checks import check_references
from .config import Config
from .data import (
    ImageDataset,
    ImageSurvey,
    Items,
    Rendering,
    Split,
    TrainingRoles,
    augmentation,
    normalisation,
    to_float,
)
from .embedding import EmbeddingModel, embed_dataset, loading_workers
from .feature_cache import cached_features, features_key
from .hooks import OpenSetHook
from .preprocessing import Preprocessing

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the images that pretrained trunks were trained on."""


@dataclass(frozen=True)
class Shared:
    """What several trainings on the same N items have in common, made once by `TrainingData.share`.

    preprocessing: what turns an image into an input; its mean and spread are those of one training's images.
    images: `(N, channels, size, size)` uint8, or None where they do not fit in memory.
    features: `(N, F)` float32 of a frozen trunk, or None.
    network: the settings that images and features were made with; others make their own.
    """

    preprocessing: Preprocessing
    images: np.ndarray | None
    features: np.ndarray | None
    network: dict[str, Any]


class TrainingData:
    """Datasets of `(input, label)` by data role, and what turns an image into an input.

    `references` are the places, among the training items, of those that stand for their set of near-copies.

    Labels are class indices 0..C-1 in the order of the known classes' names, `UNKNOWN` for pseudo-unknown ones.
    Images that fit in memory are decoded once.
    """

    ROLES = ("train", "calibration", "validation")
    REFERENCES = 100  # a class, in the check after each epoch

    def __init__(
        self,
        items: Items,
        split: Split,
        roles: TrainingRoles,
        survey: ImageSurvey | None,
        config: Config,
        shared: Shared | None = None,
    ):
        self.config = config
        self.indices = {role: getattr(roles, role) for role in self.ROLES}
        ids = {name: i for i, name in enumerate(sorted(split.known))}
        self.used, self.seen = roles.used, roles.seen
        named = self.indices | {"references": roles.references}
        self.names = {role: [items.labels[i] for i in of] for role, of in named.items()}
        self.labels = {r: np.array([ids.get(n, UNKNOWN) for n in names], int) for r, names in self.names.items()}
        self.references = torch.from_numpy(np.searchsorted(roles.train, roles.references))
        self.preprocessing: Preprocessing | None = None
        self.workers = 0
        self.sets: dict[str, Dataset] = {}
        self.shared = shared if shared is not None and shared.network == network_settings(config) else None
        self._frozen_features: dict[str, torch.Tensor] = {}
        if survey is None:
            check_references(items.embeddings)  # here, for unit norm would make numbers of 1e-28 of those of 1e-40
            self.channels, self.size = 0, items.embeddings.shape[1]
            for role, of in self.indices.items():
                tensors = torch.from_numpy(items.embeddings[of]), torch.from_numpy(self.labels[role])
                self.sets[role] = TensorDataset(*tensors)
            return
        self.channels, self.size, self.rendering = self._input(survey.of(self.used))
        for role, of in self.indices.items():
            images = None
            if self.shared is not None and self.shared.images is not None:
                images = torch.from_numpy(self.shared.images[of])
            self.sets[role] = self._dataset([items.paths[i] for i in of], self.labels[role], images)
        self.preprocessing = self.shared.preprocessing if self.shared is not None else self._preprocessing()
        transform = to_float(self.preprocessing.mean, self.preprocessing.std)
        for images in self.sets.values():
            images.transform = transform
        if config.data.workers != "auto":
            self.workers = config.data.workers
        elif self.sets["train"].images is None:
            self.workers = loading_workers(len(self.sets["train"]))

    def _dataset(
        self, paths: Sequence[Path], labels: np.ndarray | None = None, images: torch.Tensor | None = None
    ) -> ImageDataset:
        form = {"channels": self.channels, "size": self.size, "rendering": self.rendering}
        return ImageDataset(paths, labels, images=images, **form)

    def _input(self, used: ImageSurvey) -> tuple[int, int, Rendering]:
        """Channels, size and rendering of the images as the network takes them."""
        if self.shared is not None:
            return self.shared.preprocessing.form
        config = self.config
        size = used.size if config.data.image_size == "auto" else config.data.image_size
        trunk = config.model.trunk.name
        # Trunks other than the small one are made for RGB.
        auto = used.channels if trunk == "small_cnn" or (trunk == "auto" and size <= 64) else 3
        channels = auto if config.data.channels == "auto" else config.data.channels
        return channels, size, Rendering(config.data.ground, bit_depth_of(config, used))

    def _preprocessing(self) -> Preprocessing:
        if self.config.model.weights is not None and self.channels == 3:
            mean, std = IMAGENET
        else:
            mean, std = normalisation(self._sample())
        return Preprocessing(self.size, self.channels, tuple(mean), tuple(std), **asdict(self.rendering))

    def share(self, items: Items, model: EmbeddingModel | None, device: str | None, progress: bool) -> Shared:
        """What other trainings on `items`, those that this one's indices mean, can share.

        Args:
            model: with a frozen trunk, the one whose features are wanted.
        """
        everything = self._dataset(items.paths)
        images = None if everything.images is None else everything.images.numpy()
        features = None
        if self.frozen and model is not None:
            everything.transform = self.sets["train"].transform
            bar = "features of the frozen trunk" if progress else None

            def compute() -> np.ndarray:
                return self._features(model, everything, device, bar).tensors[0].numpy()

            if ":" in self.config.model.trunk.name:
                features = compute()  # what a factory of the user's own does can change without a sign
            else:
                features = cached_features(features_key(model.trunk, self.preprocessing, items.fingerprints()), compute)
        return Shared(self.preprocessing, images, features, network_settings(self.config))

    @property
    def n_items(self) -> dict[str, int]:
        return {role: len(self.names[role]) for role in self.ROLES}

    @property
    def embedded_labels(self) -> dict[str, np.ndarray]:
        """Labels of what `TrainingRun.embed` embeds, by role: of the training items those that are references."""
        return {role: self.labels["references" if role == "train" else role] for role in self.ROLES}

    @property
    def frozen(self) -> bool:
        """Whether the trunk's features of an image never change."""
        return self.config.model.frozen and self.preprocessing is not None

    def training_set(self, model: EmbeddingModel, device: str | None, progress: bool) -> tuple[Dataset, EmbeddingModel]:
        """The dataset to train on, and the part of `model` that is trained on it."""
        train = self.sets["train"]
        if self.preprocessing is None:
            return train, model
        augment = self.config.data.augment
        if self.frozen and not isinstance(augment, list):
            # A frozen trunk gives the same features in every epoch: once is enough.
            features = self.features(model, device, progress)["train"]
            rest = EmbeddingModel(torch.nn.Identity(), model.embedder, model.unit_norm)
            return TensorDataset(features, torch.from_numpy(self.labels["train"])), rest
        augmented = copy(train)
        augmented.transform = v2.Compose([augmentation(augment, self.size), train.transform])
        return augmented, model

    def hook(self, model: EmbeddingModel, trained: EmbeddingModel, device: str | None) -> OpenSetHook:
        """Validation after each epoch, against a few references a class."""
        labels = self.labels["train"]
        few = np.concatenate([np.flatnonzero(labels == c)[: self.REFERENCES] for c in np.unique(labels)])
        sets = self.sets
        if trained is not model:
            features = self.features(model, device, progress=False)
            sets = {r: TensorDataset(features[r], torch.from_numpy(self.labels[r])) for r in features}
        patience, unit_norm = self.config.training.patience, self.config.model.unit_norm
        sets = [Subset(sets["train"], few.tolist()), sets["validation"]]
        return OpenSetHook(*sets, patience=patience, unit_norm=unit_norm, workers=self.workers)

    def features(self, model: EmbeddingModel, device: str | None, progress: bool) -> dict[str, torch.Tensor]:
        """The trunk's features `(N, F)` of all items, by role; those of a frozen trunk are computed once."""
        if self._frozen_features:
            return self._frozen_features
        found = {}
        for role, items in self.sets.items():
            if not len(items):
                continue
            if self.frozen and self.shared is not None and self.shared.features is not None:
                found[role] = torch.from_numpy(self.shared.features[self.indices[role]])
            else:
                bar = f"embedding {role}" if progress else None
                found[role] = self._features(model, items, device, bar).tensors[0]
        if self.frozen:
            self._frozen_features = found
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
        return self._dataset(some).images


def bit_depth_of(config: Config, used: ImageSurvey) -> int:
    """Bits that the values of 16-bit files are taken to fill, from the images that a model may be chosen by."""
    return used.bit_depth if config.data.bit_depth == "auto" else config.data.bit_depth


def network_settings(config: Config) -> dict[str, Any]:
    """The part of a configuration that decides what a frozen trunk makes of an image."""
    model = config.model.model_dump(include={"trunk", "weights", "frozen"})
    seed = config.seed if config.model.weights is None else None  # random weights are drawn by it
    data = config.data.model_dump(include={"image_size", "channels", "background", "bit_depth"})
    return {"data": data, "model": model, "seed": seed}
