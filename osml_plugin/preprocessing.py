"""From an image, in whatever form, to what the network takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .data.images import convert_image, read_image, to_float
from .data.pixels import DEEP, ON_WHITE, WHITE, Color, Rendering
from .errors import OsmlError


@dataclass(frozen=True)
class Preprocessing:
    """Side in pixels, channels (1 grey, 3 RGB), the mean and standard deviation of each channel in [0, 1], and how
    transparency and 16-bit samples become 8-bit pixels (see `Rendering`)."""

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    background: Color | None = WHITE
    bit_depth: int = DEEP

    @property
    def rendering(self) -> Rendering:
        return Rendering(self.background, self.bit_depth)

    @property
    def form(self) -> tuple[int, int, Rendering]:
        """Channels, side and rendering: what `read_image` takes after the file."""
        return self.channels, self.size, self.rendering

    def dataset(self, images: Sequence) -> Dataset:
        """Network inputs of images: files, open binary files, PIL images, or uint8 or uint16 arrays `(H, W[, C])`."""
        return _Inputs(images, self)

    def from_tensor(self, images: Tensor) -> Tensor:
        """Network inputs `(N, C, H, W)` float32 of uint8 images `(N, C, H, W)` that already have the right size."""
        expected = (self.channels, self.size, self.size)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != expected:
            raise OsmlError(
                f"image tensors must be uint8 of shape (N, {', '.join(map(str, expected))}); got {images.dtype} of "
                f"shape {tuple(images.shape)}: pass files or PIL images to have them resized"
            )
        return to_float(self.mean, self.std)(images)


def rendering_of(preprocessing: Preprocessing | None) -> Rendering:
    """The rendering of image files; the usual one for a recognizer of embeddings, which sees none."""
    return ON_WHITE if preprocessing is None else preprocessing.rendering


class _Inputs(Dataset):
    def __init__(self, images: Sequence, preprocessing: Preprocessing):
        self.images = images
        self.preprocessing = preprocessing
        self.transform = to_float(preprocessing.mean, preprocessing.std)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        image, form = self.images[i], self.preprocessing.form
        in_memory = isinstance(image, np.ndarray | Image.Image)
        return self.transform(convert_image(image, *form) if in_memory else read_image(image, *form))
