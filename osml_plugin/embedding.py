"""The network that embeds, and the one loop that runs it over a dataset."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .errors import OsmlError

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
        """Embeddings of the trunk's features `(N, F)`, in single precision whatever the trunk runs in."""
        with torch.autocast(features.device.type, enabled=False):
            embeddings = features.float() if self.output == "trunk" else self.embedder(features.float())
        return normalize(embeddings) if self.unit_norm else embeddings


def embed_dataset(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str | None = None,
    progress: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Embeddings `(N, D)` float32 and labels `(N,)`, on the CPU, in the dataset's order.

    `dataset[i]` is `(input, label)`, or an input alone; the labels are then None.
    The model is put in eval mode for it and given back as it was. `progress` names the bar (None = no bar).
    """
    device = torch.device(device) if device is not None else default_device()
    loader = DataLoader(dataset, batch_size, num_workers=workers, pin_memory=device.type == "cuda")
    training = model.training
    model.to(device).eval()
    parts, labels = [], []
    if len(dataset) == 0:
        raise OsmlError("nothing to embed: the dataset is empty")
    try:
        with torch.inference_mode(), autocast(device):
            for batch in tqdm(loader, desc=progress, disable=progress is None, delay=1, leave=False):
                if isinstance(batch, list | tuple):
                    inputs, batch_labels = batch
                    labels.append(torch.as_tensor(batch_labels))
                else:
                    inputs = batch
                parts.append(model(inputs.to(device, non_blocking=True)).float().cpu())
    finally:
        model.train(training)
    return torch.cat(parts).clone(), torch.cat(labels) if labels else None


def loading_workers(n_items: int) -> int:
    """How many processes to decode images with: none for a few, which starting them would only delay."""
    return 0 if n_items < 1000 else min(8, os.cpu_count() or 1)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where a GPU does it well; on the CPU plain float32, which is repeatable everywhere."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
