"""The untrained network that a configuration describes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from . import trunks
from .config import Config
from .embedding import EmbeddingModel
from .errors import OsmlError
from .registry import refusing


def build_model(config: Config, *, channels: int, size: int, factories: Sequence[str] | None = None) -> EmbeddingModel:
    """The untrained network for images `(channels, size, size)`, or for vectors of width `size` (channels = 0)."""
    name, args = config.model.trunk.name, config.model.trunk.args
    if name == "auto":
        name = "identity" if channels == 0 else "small_cnn" if size <= 64 else "resnet18"
    if (name == "identity") != (channels == 0):
        raise OsmlError("trunk 'identity' is for embeddings files, and they take no other: set model.trunk to auto")
    trunk = trunks.build(name, args, channels=channels, factories=factories)
    if config.model.weights is not None:
        trunks.load_weights(trunk, name, config.model.weights)
    trunk.requires_grad_(not config.model.frozen)
    shape = (2, size) if channels == 0 else (2, channels, size, size)
    width = feature_width(trunk, torch.zeros(shape))
    embedder = config.model.embedder
    if embedder == "auto":
        embedder = "linear" if channels or epochs(config, channels) else "identity"
    return EmbeddingModel(trunk, build_embedder(embedder, width, config.model.embedding_size), config.model.unit_norm)


def build_embedder(name: str, width: int, embedding_size: int) -> nn.Module:
    if name == "identity":
        return nn.Identity()
    if name == "linear":
        return nn.Linear(width, embedding_size)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, embedding_size))


def epochs(config: Config, channels: int) -> int:
    """How many epochs `auto` stands for: embeddings files are taken as they are."""
    if config.training.epochs != "auto":
        return config.training.epochs
    return 30 if channels else 0


@torch.no_grad()
def feature_width(trunk: nn.Module, batch: torch.Tensor) -> int:
    """Width F of the trunk's features `(N, F)`."""
    training = trunk.training
    try:
        with refusing(
            f"the trunk cannot take a batch of shape {tuple(batch.shape)}",
            "set data.image_size or data.channels, or choose another trunk",
        ):
            features = trunk.eval()(batch)
    finally:
        trunk.train(training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise OsmlError("a trunk must return features of shape (items, width): end it with pooling and nn.Flatten()")
    return features.shape[1]
