"""The network that embeds, and the one loop that runs it over a dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .errors import OsmlError
from .pml_batches import BatchReader

READER = BatchReader()
OUTPUTS = ("embedder", "trunk")


class EmbeddingModel(nn.Module):
    """trunk → embedder → unit norm (unless `unit_norm` is off): a batch in, embeddings `(N, D)` out.

    With the output "trunk" the embedder serves training only, and the trunk's features are the embeddings: an embedder
    that was trained on few classes may have forgotten what tells all others apart.
    """

    def __init__(self, trunk: nn.Module, embedder: nn.Module, unit_norm: bool = True, output: str = "embedder"):
        super().__init__()
        self.trunk = trunk
        self.embedder = embedder
        self.unit_norm = unit_norm
        self.output = output

    def forward(self, batch: Tensor) -> Tensor:
        return self.embed_features(self.trunk(batch))

    def embed_features(self, features: Tensor) -> Tensor:
        """Embeddings of the trunk's features `(N, F)`, in the embedder's precision whatever the trunk runs in."""
        precision = next((p.dtype for p in self.embedder.parameters()), torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            embeddings = features.float() if self.output == "trunk" else self.embedder(features.to(precision))
        return normalize(embeddings) if self.unit_norm else embeddings


def embed_dataset(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str | None = None,
    progress: str | None = None,
    read: BatchReader = READER,
    dtype: torch.dtype | None = None,
    collate_fn: Callable | None = None,
) -> tuple[Tensor, Tensor | np.ndarray | None]:
    """Embeddings `(N, D)` float32 and labels `(N,)`, on the CPU, in the dataset's order.

    `dataset[i]` is `(input, label)`, or an input alone; the labels are then None. `read` takes batches of another make
    apart, and gives labels as it says.
    The model is put in eval mode for it and given back as it was. `progress` names the bar (None = no bar).
    `dtype` is that of the model's inputs (None = as they come), `collate_fn` the loader's.
    """
    device = torch.device(device) if device is not None else default_device()
    pinned = device.type == "cuda"
    loader = DataLoader(dataset, batch_size, num_workers=workers, pin_memory=pinned, collate_fn=collate_fn)
    training = model.training
    model.to(device).eval()
    parts, labels = [], []
    if len(dataset) == 0:
        raise OsmlError("nothing to embed: the dataset is empty")
    try:
        with torch.inference_mode(), autocast(device):
            for batch in tqdm(loader, desc=progress, disable=progress is None, delay=1, leave=False):
                inputs, batch_labels = read(batch)
                if isinstance(inputs, Tensor):  # else the model takes them as they are: texts, dictionaries
                    inputs = inputs.to(device, dtype, non_blocking=True)
                if batch_labels is not None:
                    labels.append(batch_labels)
                parts.append(model(inputs).float().cpu())
    finally:
        model.train(training)
    return torch.cat(parts).clone(), joined(labels) if labels else None


def joined(labels: Sequence[Tensor | np.ndarray]) -> Tensor | np.ndarray:
    """The labels of all batches in one."""
    return torch.cat(list(labels)) if isinstance(labels[0], Tensor) else np.concatenate(labels)


def loading_workers(n_items: int) -> int:
    """How many processes to decode images with: none for a few, which starting them would only delay."""
    return 0 if n_items < 1000 else min(8, os.cpu_count() or 1)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where a GPU does it well; on the CPU plain float32, which is repeatable everywhere."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
