"""From the samples of an image file to 8-bit pixels: transparency composed on a ground, 16-bit samples scaled."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageColor, ImageOps

from ..errors import OsmlError

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
DEEP = 16
FULL = 0xFFFF


@dataclass(frozen=True)
class Rendering:
    """Rule by which the samples of a file become 8-bit pixels, the same for all images of a data set.

    background: RGB in 0..255, the ground that transparent pixels are composed on. None drops transparency and shows
        what lies beneath it, as bundles do that were trained so.
    bit_depth: 8 to 16, bits that the values of 16-bit files fill; the upper 8 of them are kept, and what is brighter
        is white.
    """

    background: Color | None = WHITE
    bit_depth: int = DEEP


ON_WHITE = Rendering()


def parse_color(color: str | Sequence[int]) -> Color:
    """RGB in 0..255 of a name ("white"), a hexadecimal or CSS color ("#c0ffee", "rgb(0, 0, 0)") or three integers.

    Raises `OsmlError`."""
    try:
        numbers = tuple(ImageColor.getrgb(color)) if isinstance(color, str) else tuple(color)
        if len(numbers) == 3 and all(type(n) is int and 0 <= n <= 255 for n in numbers):
            return numbers
    except (ValueError, TypeError):
        pass
    raise OsmlError(f"'{color}' is no color: expected a name such as white, '#rrggbb', or [red, green, blue] in 0..255")


def render(image: Image.Image, mode: str, rendering: Rendering) -> Image.Image:
    """The image upright in 8 bits, `mode` "L" or "RGB". Raises whatever Pillow stumbles on."""
    if is_deep(image) and not _pillow_does(image, rendering.bit_depth):
        image = Image.fromarray(to_eight_bits(deep_samples(image), rendering.bit_depth))
    else:
        image = ImageOps.exif_transpose(image)
    if rendering.background is not None and image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = Image.new("RGBA", transparent.size, (*rendering.background, 255))
        image.alpha_composite(transparent)
    return image.convert(mode)


def check_header(image: Image.Image) -> None:
    """Raise ValueError where a file is refused before a pixel of it is decoded."""
    # Pillow only warns below twice the limit, and turning warnings into errors is not safe in threads.
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):  # elsewhere "I" holds 16 bits
        raise ValueError("32-bit pixels; expected 8 or 16 bits")


def is_grey(image: Image.Image, rendering: Rendering) -> bool:
    """True of an image that is not yet decoded and has no color, nor gets one from the ground."""
    if image.mode not in ("L", "1", "LA") and not _one_deep_channel(image) and _layout(image) != "LA;16B":
        return False
    ground = rendering.background
    return ground is None or len(set(ground)) == 1 or not image.has_transparency_data


# --- 16 bits ---------------------------------------------------------------------------------------------


def is_deep(image: Image.Image) -> bool:
    """True of an image whose samples have 16 bits, and which is not yet decoded if it has several channels."""
    return _one_deep_channel(image) or ";16" in _layout(image)


def deep_samples(image: Image.Image) -> np.ndarray:
    """`(H, W, C)` uint16 samples of a deep image, upright: C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha)."""
    if _one_deep_channel(image):
        samples = np.asarray(ImageOps.exif_transpose(image)).clip(0, FULL).astype(np.uint16)[:, :, None]
    elif image.format == "PPM":
        samples = _from_ppm(image)
    else:
        samples = _several_channels(image)
    beneath = image.info.get("transparency")
    if beneath is not None and samples.shape[2] in (1, 3):
        opaque = (samples != np.array(beneath)).any(axis=2, keepdims=True)
        samples = np.concatenate([samples, np.where(opaque, FULL, 0).astype(np.uint16)], axis=2)
    return samples


def to_eight_bits(samples: np.ndarray, bit_depth: int) -> np.ndarray:
    """uint16 samples whose values fill `bit_depth` bits as uint8, without the last axis where it is 1."""
    pixels = np.minimum(samples >> (bit_depth - 8), 255).astype(np.uint8)
    return pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


def _pillow_does(image: Image.Image, bit_depth: int) -> bool:
    """True where Pillow itself keeps the upper 8 of 16 bits, in less time and memory."""
    keyed = "transparency" in image.info  # a color of 16 bits, which it would look for among 8
    return bit_depth == DEEP and not (_one_deep_channel(image) or image.format == "PPM" or keyed)


def _one_deep_channel(image: Image.Image) -> bool:
    return image.mode.startswith("I")


def _layout(image: Image.Image) -> str:
    """The order and size of the samples in a file that is not yet decoded, as Pillow names it; "" without one."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    args = tiles[0].args
    if tiles[0].codec_name == "ppm":
        return f"{args[0]};16B" if args[1] > 255 else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _several_channels(image: Image.Image) -> np.ndarray:
    """Pillow keeps the upper 8 of 16 bits in images of several channels: the lower ones are read in a second pass, as
    the upper ones of the other byte order."""
    layout = _layout(image)
    if layout.startswith("LA"):  # four bytes a pixel
        quads = _read_as("RGBA", image).astype(np.uint16)
        return (quads[:, :, ::2] << 8) | quads[:, :, 1::2]
    premultiplied = layout.startswith("RGBa")
    layout = layout.replace("RGBa", "RGBA")
    other_order = layout[:-1] + ("L" if layout.endswith("B") else "B")
    if layout.endswith("N") and sys.byteorder == "big":
        other_order = layout[:-1] + "L"
    high, low = _read_as(layout, image), _read_as(other_order, image)
    samples = (high.astype(np.uint16) << 8) | low
    if layout.startswith("RGBX"):
        return samples[:, :, :3]
    if premultiplied:
        alpha = np.maximum(samples[:, :, 3:], 1) / FULL
        samples[:, :, :3] = np.minimum(samples[:, :, :3] / alpha, FULL).astype(np.uint16)
    return samples


def _read_as(layout: str, image: Image.Image) -> np.ndarray:
    """`(H, W, C)` uint8, upright: the file of an image that is not yet decoded, as if its samples had this layout."""
    with _file_again(image) as file, Image.open(file, formats=(image.format,)) as again:
        again.tile = [
            tile._replace(args=(layout, *tile.args[1:]) if isinstance(tile.args, tuple) else layout)
            for tile in again.tile
        ]
        return np.asarray(ImageOps.exif_transpose(again))


def _from_ppm(image: Image.Image) -> np.ndarray:
    """RGB of 16 bits, of which Pillow would keep 8; brought to the full range from the file's own, as it does grey."""
    highest = image.tile[0].args[1]
    shape = image.height, image.width, 3
    with _file_again(image) as file:
        file.seek(image.tile[0].offset)
        content = file.read(2 * math.prod(shape))
    samples = np.frombuffer(content, ">u2", math.prod(shape)).reshape(shape)
    return (np.minimum(samples, highest) * (FULL / highest)).round().astype(np.uint16)


@contextmanager
def _file_again(image: Image.Image) -> Iterator[BinaryIO]:
    """The file that an image was opened from, at its start; a file of the user's is left where it stood."""
    if image.filename:
        with open(image.filename, "rb") as file:
            yield file
        return
    place = image.fp.tell()
    try:
        image.fp.seek(0)
        yield image.fp
    finally:
        image.fp.seek(place)
