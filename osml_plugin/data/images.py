"""Decoding images, and datasets of them."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .. import UNKNOWN
from ..errors import OsmlError, unknown_name
from ..registry import check_arguments
from .items import Items
from .threads import in_threads

logger = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SMALL, LARGE = 64, 224  # up to SMALL pixels images keep their size, above it they are brought to LARGE


# --- decoding --------------------------------------------------------------------------------------------


def read_image(path_or_file: str | Path | BinaryIO, channels: int, size: int | None) -> torch.Tensor:
    """The image as uint8 `(channels, H, W)`, grey (1) or RGB (3), upright; the first frame of an animation.

    With `size` it is `(channels, size, size)`: the largest centred square, resized with antialiasing; an
    image of that size is left untouched. 16-bit grey is scaled to 8 bits; transparency is dropped.
    Raises `OsmlError` naming the file and the reason: unreadable, truncated, another format, or more pixels
    than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with Image.open(path_or_file, formats=FORMATS) as image:
            return decode_opened(image, channels, size)
    except Exception as error:  # Pillow's decoders raise whatever they stumble on
        name = getattr(path_or_file, "name", None) or (path_or_file if isinstance(path_or_file, str | Path) else "")
        raise OsmlError(f"cannot read the image '{name}': {_reason(error)}") from error


def decode_opened(image: Image.Image, channels: int, size: int | None) -> torch.Tensor:
    """The same of a file that Pillow has opened and not yet decoded. Raises whatever Pillow stumbles on."""
    _check(image)
    if size is not None:
        # JPEG decodes at 1/2, 1/4 or 1/8 for far less time; twice the size leaves the rest to `fit`.
        image.draft("L" if channels == 1 else "RGB", (2 * size, 2 * size))
    return _pixels(image, channels, size)


def convert_image(image: Image.Image | np.ndarray, channels: int, size: int | None) -> torch.Tensor:
    """The same of an image in memory, which is left as it is: PIL, or uint8 pixels `(H, W)` or `(H, W, C)`."""
    try:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8:
                raise ValueError(f"its pixels are {image.dtype}; expected uint8")
            image = Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
        _check(image)
        return _pixels(image, channels, size)
    except Exception as error:  # as above
        raise OsmlError(f"cannot take the image: {_reason(error)}") from error


def _pixels(image: Image.Image, channels: int, size: int | None) -> torch.Tensor:
    image = _upright(image, "L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()


def _check(image: Image.Image) -> None:
    """What the header tells must be acceptable before a pixel is decoded."""
    # Pillow only warns below twice the limit, and turning warnings into errors is not safe in threads.
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):  # elsewhere "I" holds 16 bits
        raise ValueError("32-bit pixels; expected 8 or 16 bits")


def _upright(image: Image.Image, mode: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow would clip deep grey at 255; the upper 8 of its 16 bits are kept
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    return image.convert(mode)


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("L", "1", "LA") or image.mode.startswith("I")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text repeats the path
        return f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


@dataclass(frozen=True, eq=False)
class ImageSurvey:
    """What `inspect_images` found: indices of the readable images, the others with the reason, and of each readable
    one its longer side and whether it is grey."""

    good: np.ndarray
    bad: list[tuple[Path, str]]
    sides: np.ndarray
    grey: np.ndarray

    def of(self, readable: np.ndarray) -> ImageSurvey:
        """The survey of some of the readable images: what is chosen for a model is not to depend on test images."""
        return ImageSurvey(self.good[readable], [], self.sides[readable], self.grey[readable])

    @property
    def size(self) -> int:
        """The side in pixels that suits them: their most common one if that is at most 64, else 224."""
        sides, counts = np.unique(self.sides, return_counts=True)
        side = int(sides[counts.argmax()])
        return side if side <= SMALL else LARGE

    @property
    def channels(self) -> int:
        """1 if all are grey, else 3."""
        return 1 if self.grey.all() else 3


def inspect_images(paths: Sequence[Path], *, skip_bad: bool = False, progress: bool = True) -> ImageSurvey:
    """Decode every image once, in threads.

    Raises `OsmlError` naming unreadable images, unless `skip_bad`; and if none is readable.
    """
    found = in_threads(_inspect, paths, "checking images", progress)
    bad = [(Path(path), result) for path, result in zip(paths, found, strict=True) if isinstance(result, str)]
    good = np.array([i for i, result in enumerate(found) if not isinstance(result, str)], dtype=np.int64)
    if bad and (not skip_bad or not len(good)):
        named = ", ".join(f"'{path}' ({reason})" for path, reason in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise OsmlError(
            f"{len(bad)} of {len(paths)} images cannot be read: {named}{more}; remove them or pass --skip-bad"
        )
    if not len(good):
        raise OsmlError("there are no images; expected at least one")
    sides, grey = zip(*(found[i] for i in good), strict=True)
    return ImageSurvey(good, bad, np.array(sides), np.array(grey))


def readable_items(items: Items, skip_bad: bool, progress: bool) -> tuple[Items, ImageSurvey | None]:
    """The items whose images can be read, and their survey (None for embeddings); each one skipped is logged.

    Raises `OsmlError` where some cannot be read and they may not be skipped.
    """
    if items.embeddings is not None:
        return items, None
    survey = inspect_images(items.paths, skip_bad=skip_bad, progress=progress)
    for path, reason in survey.bad:
        logger.warning("skipped '%s': %s", path, reason)
    return (items if len(survey.good) == len(items) else items.select(survey.good)), survey


def _inspect(path: Path) -> tuple[int, bool] | str:
    """(longer side, is grey) of a readable image, else the reason why it is not."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check(image)
            side, grey = max(image.size), _is_grey(image)
            image.draft(None, (1, 1))  # JPEG: all of the file is read, but 1/64 of the pixels are made
            _upright(image, "L" if grey else "RGB")
        return side, grey
    except Exception as error:  # Pillow's decoders raise whatever they stumble on
        return _reason(error)


def load_images(paths: Sequence[Path], channels: int, size: int, progress: bool = True) -> torch.Tensor:
    """`(N, channels, size, size)` uint8, decoded in threads; see `read_image`, whose errors it raises."""
    images = torch.empty(len(paths), channels, size, size, dtype=torch.uint8)

    def read(i: int) -> None:
        images[i] = read_image(paths[i], channels, size)

    in_threads(read, range(len(paths)), "reading images", progress)
    return images


# --- datasets --------------------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """Images with the index of their class: `(float32 (channels, size, size), int)` each.

    paths: N files. labels: N integers, or None where they are not known (the label is then `UNKNOWN`).
    transform: takes the uint8 image; what it gives is brought to float32, from uint8 scaled to [0, 1].
    cache_bytes: up to so many bytes the decoded images are kept in memory, read at once here; above it each
    is decoded when it is asked for. `images` is the uint8 tensor `(N, channels, size, size)` or None; images that are
    decoded already may be passed.
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
    ):
        if labels is not None and len(labels) != len(paths):
            raise OsmlError(f"{len(labels)} labels for {len(paths)} images; expected one an image")
        self.paths = paths
        self.labels = [UNKNOWN] * len(paths) if labels is None else [int(label) for label in labels]
        self.channels, self.size, self.transform = channels, size, transform
        if images is None and len(paths) * channels * size * size <= cache_bytes:
            images = load_images(paths, channels, size)
        self.images = images

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = read_image(self.paths[i], self.channels, self.size) if self.images is None else self.images[i]
        if self.transform is not None:
            image = self.transform(image)
        if image.dtype != torch.float32:
            image = v2.functional.to_dtype(image, torch.float32, scale=True)
        return image, self.labels[i]


# --- transforms ------------------------------------------------------------------------------------------


def augmentation(spec: str | Sequence[Mapping], size: int) -> nn.Module:
    """The random changes of a training image `(C, size, size)`; `to_float` comes after it.

    spec: "none"; "auto"; or a list of `{"name": <class of torchvision.transforms.v2>, **arguments}`.
    "auto" shifts images of up to 64 pixels by up to an eighth (digits and letters are not mirror-symmetric),
    and crops, flips and tints larger ones (no hue: it costs more than all the others). Raises `OsmlError`.
    """
    if spec == "none":
        return v2.Identity()
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
    classes = {name: cls for name, cls in vars(v2).items() if inspect.isclass(cls) and issubclass(cls, v2.Transform)}
    name, arguments = entry["name"], {key: value for key, value in entry.items() if key != "name"}
    if name not in classes:
        raise unknown_name("augmentation", name, classes)
    check_arguments("augmentation", name, arguments, inspect.signature(classes[name]).parameters)
    try:
        return classes[name](**arguments)
    except Exception as error:  # any transform, any argument
        raise OsmlError(f"augmentation '{name}' does not take {arguments}: {_reason(error)}") from error


def _try(transform: nn.Module, size: int) -> None:
    """A transform that changes the shape, or wants more than an image, fails here and not in training."""
    with torch.random.fork_rng(devices=[]):
        try:
            shape = tuple(transform(torch.zeros(3, size, size, dtype=torch.uint8)).shape)
        except Exception as error:  # any transform, any argument
            raise OsmlError(f"the augmentation fails on an image: {_reason(error)}") from error
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
