"""From the bytes of an image file that somebody sent to the pixels that the network takes."""

from __future__ import annotations

import io
import re

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from osml_plugin.data.images import decode_opened
from osml_plugin.errors import OsmlError
from osml_plugin.preprocessing import Preprocessing

from .settings import Limits

FORMATS = ("JPEG", "PNG", "WEBP")
MEDIA_TYPES = {"JPEG": "image/jpeg", "MPO": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
"""MPO: the JPEG of a camera that keeps a preview or a depth map behind the picture."""

_STARTS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)

READS = 100_000
"""A file read in more pieces is refused: 16 MB can be millions of empty segments, at microseconds each."""
SCANS = 100
"""Of a progressive JPEG, each of which goes over all pixels and may be a few bytes; ten are usual."""


class BadImage(OsmlError):
    """An image that cannot be taken, and why, in one line."""


def decode(content: bytes, preprocessing: Preprocessing, limits: Limits) -> tuple[Tensor, str]:
    """The image as uint8 `(channels, size, size)`, with the pixels that `osml_plugin.data.read_image` gives, and its
    media type.

    JPEG, PNG and WEBP, told by their content. Pixels and frames are counted before a pixel is decoded.
    Raises `BadImage`, whatever the bytes are.
    """
    try:
        file = io.BytesIO(content) if len(content) <= READS else _Pieces(content)
        with Image.open(file, formats=FORMATS) as image:
            _check(image, content, limits)
            return decode_opened(image, *preprocessing.form), MEDIA_TYPES[image.format]
    except Exception as error:  # Pillow's decoders raise whatever they stumble on
        raise BadImage(f"the image cannot be read: {_reason(error, limits)}") from None


def begins_as_image(head: bytes) -> bool:
    """True for the first 12 bytes, or more, of a JPEG, PNG or WEBP file."""
    return _STARTS.match(head) is not None


def pixels_of(content: bytes) -> int:
    """As the file's head says; 0 where it has none that can be read."""
    try:
        with Image.open(_Pieces(content), formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # `decode` says what is wrong
        return 0


class _Pieces(io.BytesIO):
    """Counts how often it is read from."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > READS:
            raise BadImage("it is of too many small pieces")
        return super().read(size)


def _check(image: Image.Image, content: bytes, limits: Limits) -> None:
    if image.width * image.height > limits.pixels:
        raise BadImage(f"{image.width} x {image.height} pixels are more than {limits.pixels:,}: send a smaller one")
    frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1  # no animation: the first is the picture
    if frames > limits.frames:
        raise BadImage(f"{frames} frames are more than {limits.frames}")
    if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > SCANS:
        raise BadImage(f"more than {SCANS} scans")


def _reason(error: Exception, limits: Limits) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {limits.pixels:,} pixels"
    text = " ".join(str(error).split())
    # What is not meant for people is left out: keys, addresses of objects in memory, and the like.
    readable = isinstance(error, (OSError, SyntaxError, ValueError)) and text and " at 0x" not in text
    return text[:200] if readable else f"it is damaged ({type(error).__name__})"
