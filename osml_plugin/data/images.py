"""Decoding images, and datasets of them."""

from __future__ import annotations

import inspect
import os
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils.data import Dataset

from .. import UNKNOWN
from ..errors import OsmlError, unknown_name
from ..registry import check_arguments
from .pixels import ON_WHITE, Rendering, check_header, render, to_eight_bits
from .threads import in_threads

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
SMALL, LARGE = 64, 224  # up to SMALL pixels images keep their size, above it they are brought to LARGE

# Python remembers every text that it warned with, and Pillow's have numbers from the file in them. What it warns of is
# either checked here (too many pixels) or no matter (odd EXIF).
warnings.filterwarnings("ignore", module=r"PIL\.")


# --- decoding --------------------------------------------------------------------------------------------


def read_image(
    path_or_file: str | Path | BinaryIO, channels: int, size: int | None, rendering: Rendering = ON_WHITE
) -> torch.Tensor:
    """The image as uint8 `(channels, H, W)`, grey (1) or RGB (3), upright; the first frame of an animation.

    With `size` it is `(channels, size, size)`: the largest centred square, resized with antialiasing; an
    image of that size is left untouched. Transparency and 16-bit samples become 8-bit pixels by `rendering`.
    Raises `OsmlError` naming the file and the reason: unreadable, truncated, another format, no regular file, or more
    pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with open_image(path_or_file) as image:
            return decode_opened(image, channels, size, rendering)
    except Exception as error:  # Pillow's decoders raise whatever they stumble on
        name = getattr(path_or_file, "name", None) or (path_or_file if isinstance(path_or_file, str | Path) else "")
        raise OsmlError(f"cannot read the image '{name}': {reason_of(error)}") from error


def open_image(path_or_file: str | Path | BinaryIO) -> Image.Image:
    """A file, opened and not yet decoded. Raises OSError, also for a pipe or a device, which might never end."""
    if isinstance(path_or_file, str | Path) and not stat.S_ISREG(os.stat(path_or_file).st_mode):
        raise OSError("no regular file")
    return Image.open(path_or_file, formats=FORMATS)


def decode_opened(image: Image.Image, channels: int, size: int | None, rendering: Rendering = ON_WHITE) -> torch.Tensor:
    """The same of a file that Pillow has opened and not yet decoded. Raises whatever Pillow stumbles on."""
    check_header(image)
    if size is not None:
        # JPEG decodes at 1/2, 1/4 or 1/8 for far less time; twice the size leaves the rest to `fit`.
        image.draft("L" if channels == 1 else "RGB", (2 * size, 2 * size))
    return _pixels(image, channels, size, rendering)


def convert_image(
    image: Image.Image | np.ndarray, channels: int, size: int | None, rendering: Rendering = ON_WHITE
) -> torch.Tensor:
    """The same of an image in memory, which is left as it is: PIL, or uint8 or uint16 pixels `(H, W)` or `(H, W, C)`
    with C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha)."""
    try:
        if isinstance(image, np.ndarray):
            image = _from_array(image, rendering)
        check_header(image)
        return _pixels(image, channels, size, rendering)
    except Exception as error:  # as above
        raise OsmlError(f"cannot take the image: {reason_of(error)}") from error


def _from_array(pixels: np.ndarray, rendering: Rendering) -> Image.Image:
    if pixels.dtype == np.uint16:
        pixels = to_eight_bits(pixels, rendering.bit_depth)
    if pixels.dtype != np.uint8:
        raise ValueError(f"its pixels are {pixels.dtype}; expected uint8, or uint16")
    return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _pixels(image: Image.Image, channels: int, size: int | None, rendering: Rendering) -> torch.Tensor:
    image = render(image, "L" if channels == 1 else "RGB", rendering)
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()


def reason_of(error: Exception) -> str:
    """One line that says why Pillow did not take an image."""
    if isinstance(error, UnidentifiedImageError):  # its text repeats the path
        return f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def load_images(
    paths: Sequence[Path], channels: int, size: int, progress: bool = True, rendering: Rendering = ON_WHITE
) -> torch.Tensor:
    """`(N, channels, size, size)` uint8, decoded in threads; see `read_image`, whose errors it raises."""
    images = torch.empty(len(paths), channels, size, size, dtype=torch.uint8)

    def read(i: int) -> None:
        images[i] = read_image(paths[i], channels, size, rendering)

    in_threads(read, range(len(paths)), "reading images", progress)
    return images


# --- datasets --------------------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """Images with the index of their class: `(float32 (channels, size, size), int)` each.

    paths: N files. labels: N integers, or None where they are not known (the label is then `UNKNOWN`).
    transform: takes the uint8 image; what it gives is brought to float32, from uint8 scaled to [0, 1].
    cache_bytes: up to so many bytes the decoded images are kept in memory, read at once here; above it each
    is decoded when it is asked for. `images` is the uint8 tensor `(N, channels, size, size)` or None; images that are
    decoded already may be passed. rendering: see `Rendering`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int] | np.ndarray | None,
        *,
        channels: int,
        size: int,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        cache_bytes: int = 512 * 2**20,
        images: torch.Tensor | None = None,
        rendering: Rendering = ON_WHITE,
    ):
        if labels is not None and len(labels) != len(paths):
            raise OsmlError(f"{len(labels)} labels for {len(paths)} images; expected one an image")
        self.paths = paths
        self.labels = [UNKNOWN] * len(paths) if labels is None else [int(label) for label in labels]
        self.channels, self.size, self.transform, self.rendering = channels, size, transform, rendering
        if images is None and len(paths) * channels * size * size <= cache_bytes:
            images = load_images(paths, channels, size, rendering=rendering)
        self.images = images

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if self.images is None:
            image = read_image(self.paths[i], self.channels, self.size, self.rendering)
        else:
            image = self.images[i]
        if self.transform is not None:
            image = self.transform(image)
        if image.dtype != torch.float32:
            from torchvision.transforms.v2.functional import to_dtype

            image = to_dtype(image, torch.float32, scale=True)
        return image, self.labels[i]


# --- transforms ------------------------------------------------------------------------------------------


def augmentation(spec: str | Sequence[Mapping], size: int) -> nn.Module:
    """The random changes of a training image `(C, size, size)`; `to_float` comes after it.

    spec: "none"; "auto"; or a list of `{"name": <class of torchvision.transforms.v2>, **arguments}`.
    "auto" shifts images of up to 64 pixels by up to an eighth (digits and letters are not mirror-symmetric),
    and crops, flips and tints larger ones (no hue: it costs more than all the others). Raises `OsmlError`.
    """
    if spec == "none":
        return nn.Identity()
    from torchvision.transforms import v2  # takes longer than torch; reading and recognizing images do without it

    if spec == "auto" and size <= SMALL:
        return v2.RandomCrop(size, padding=max(1, size // 8), padding_mode="edge")
    if spec == "auto":
        crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)
        return nn.Sequential(crop, v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2))
    if isinstance(spec, str):
        raise unknown_name("augmentation", spec, ("auto", "none", "a list of transforms"))
    transform = nn.Sequential(*(_transform(entry) for entry in spec))
    _try(transform, size)
    return transform


def _transform(entry: Mapping) -> nn.Module:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise OsmlError(f'an augmentation is {{"name": <class of torchvision.transforms.v2>, ...}}, not {entry!r}')
    from torchvision.transforms import v2

    classes = {name: cls for name, cls in vars(v2).items() if inspect.isclass(cls) and issubclass(cls, v2.Transform)}
    name, arguments = entry["name"], {key: value for key, value in entry.items() if key != "name"}
    if name not in classes:
        raise unknown_name("augmentation", name, classes)
    check_arguments("augmentation", name, arguments, inspect.signature(classes[name]).parameters)
    try:
        return classes[name](**arguments)
    except Exception as error:  # any transform, any argument
        raise OsmlError(f"augmentation '{name}' does not take {arguments}: {reason_of(error)}") from error


def _try(transform: nn.Module, size: int) -> None:
    """A transform that changes the shape, or wants more than an image, fails here and not in training."""
    with torch.random.fork_rng(devices=[]):
        try:
            shape = tuple(transform(torch.zeros(3, size, size, dtype=torch.uint8)).shape)
        except Exception as error:  # any transform, any argument
            raise OsmlError(f"the augmentation fails on an image: {reason_of(error)}") from error
    if shape != (3, size, size):
        raise OsmlError(f"the augmentation makes {shape} of an image (3, {size}, {size}); expected the same shape")


def to_float(mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """`ToDtype(float32, scale=True)` and `Normalize(mean, std)` in one pass: 5 instead of 38 µs at 28 x 28.

    mean, std: per channel, for pixels in [0, 1]. The module takes uint8 or floating images, one or a batch.
    """
    return _ToFloat(mean, std)


class _ToFloat(nn.Module):
    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images if images.dtype == torch.uint8 else 255 * images
        return pixels.sub(self.mean).div_(self.std)


def normalisation(images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (at least 1e-3) of each channel of uint8 images `(N, C, H, W)`, for pixels
    in [0, 1]. Exact, from the histogram of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
        mean.append(float(share @ values))
        std.append(max(float(share @ (values - mean[-1]) ** 2) ** 0.5, 1e-3))
    return mean, std
