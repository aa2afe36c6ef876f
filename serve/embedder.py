"""The network of a recogniser, run on batches of decoded images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from osml_plugin import OpenSetRecognizer
from osml_plugin.embedding import autocast, default_device

CHUNK = 256
"""Images in one forward pass at most: bounds the memory."""


class Embedder:
    """Embeddings of uint8 images `(N, C, H, W)`, on a GPU if there is one."""

    def __init__(self, recognizer: OpenSetRecognizer):
        self.device = default_device()
        self._preprocessing = recognizer.preprocessing
        self._model = recognizer.model.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """`(N, D)` float32 on the CPU."""
        parts = []
        with autocast(self.device):
            for chunk in images.split(CHUNK):
                inputs = self._preprocessing.from_tensor(chunk).to(self.device, non_blocking=True)
                parts.append(self._model(inputs).float().cpu())
        return torch.cat(parts).clone()


def embed_together(embedder: Embedder, requests: Sequence[Tensor]) -> list[Tensor]:
    """Each request's images `(n, C, H, W)`, all in one pass."""
    embeddings = embedder(torch.cat(list(requests)) if len(requests) > 1 else requests[0])
    return list(embeddings.split([len(r) for r in requests]))
