"""A look at all images of a source before anything is made of them: what can be read, and what is in it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import OsmlError
from .images import LARGE, SMALL, open_image, reason_of
from .items import Items
from .likeness import SIDE, image_signature
from .pixels import DEEP, WHITE, Color, Rendering, check_header, deep_samples, is_deep, is_grey, render
from .threads import in_threads

logger = logging.getLogger(__name__)

SIGHT = 4 * SIDE
"""Least side in pixels to which a large JPEG is decoded for its signature."""
NAMED = 3
"""Files that a message names."""


class Seen(NamedTuple):
    """Facts about one readable image.

    side: the longer one in pixels. bits: those that the values of a 16-bit file fill, all but the brightest in a
    thousand; 0 for other files. varies: bits that differ between darkest and brightest pixel, 0 = one color.
    color: RGB of the darkest, in the file's own samples. signature: see `image_signature`.
    """

    side: int
    grey: bool
    bits: int
    varies: int
    color: tuple[int, int, int]
    signature: np.ndarray


@dataclass(frozen=True, eq=False)
class ImageSurvey:
    """Result of `inspect_images`: indices of the N readable images, the others with the reason, and facts of each
    readable one, see `Seen`: sides, grey, bits, varies `(N,)`, colors `(N, 3)`."""

    good: np.ndarray
    bad: list[tuple[Path, str]]
    sides: np.ndarray
    grey: np.ndarray
    bits: np.ndarray
    varies: np.ndarray
    colors: np.ndarray
    signatures: np.ndarray

    def of(self, readable: np.ndarray) -> ImageSurvey:
        """The survey of some of the readable images: what is chosen for a model is not to depend on test images."""
        facts = (self.good, self.sides, self.grey, self.bits, self.varies, self.colors, self.signatures)
        good, *others = (fact[readable] for fact in facts)
        return ImageSurvey(good, [], *others)

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

    @property
    def bit_depth(self) -> int:
        """Bits that the values of the 16-bit files fill, 8 to 16; one file in a hundred may fill more."""
        bits = np.sort(self.bits[self.bits > 0])
        return max(8, int(bits[len(bits) - 1 - len(bits) // 100])) if len(bits) else DEEP

    def blank(self, bit_depth: int) -> np.ndarray:
        """`(N,)` bool: images that are of one color where 16-bit files are taken to fill `bit_depth` bits."""
        return self.varies <= self._shift(bit_depth)

    def colors_shown(self, bit_depth: int) -> np.ndarray:
        """`(N, 3)` color in 0..255 of the darkest pixel."""
        return np.minimum(self.colors >> self._shift(bit_depth)[:, None], 255)

    def _shift(self, bit_depth: int) -> np.ndarray:
        return np.where(self.bits > 0, bit_depth - 8, 0)


def inspect_images(
    paths: Sequence[Path], *, background: Color | None = WHITE, skip_bad: bool = False, progress: bool = True
) -> ImageSurvey:
    """Decode every image once, in threads; transparency is composed on `background`, see `Rendering`.

    Raises `OsmlError` naming unreadable images, unless `skip_bad`; and if none is readable.
    """
    found = in_threads(partial(_inspect, rendering=Rendering(background)), paths, "checking images", progress)
    bad = [(Path(path), result) for path, result in zip(paths, found, strict=True) if isinstance(result, str)]
    good = np.array([i for i, result in enumerate(found) if not isinstance(result, str)], dtype=np.int64)
    if bad and (not skip_bad or not len(good)):
        named = ", ".join(f"'{path}' ({reason})" for path, reason in bad[:NAMED])
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise OsmlError(
            f"{len(bad)} of {len(paths)} images cannot be read: {named}{more}; remove them or pass --skip-bad"
        )
    if not len(good):
        raise OsmlError("there are no images; expected at least one")
    return ImageSurvey(good, bad, *(np.array(facts) for facts in zip(*(found[i] for i in good), strict=True)))


def readable_items(
    items: Items, skip_bad: bool, progress: bool, background: Color | None = WHITE
) -> tuple[Items, ImageSurvey | None]:
    """The items whose images can be read, and their survey (None for embeddings); each one skipped is logged.

    Raises `OsmlError` where some cannot be read and they may not be skipped.
    """
    if items.embeddings is not None:
        return items, None
    survey = inspect_images(items.paths, background=background, skip_bad=skip_bad, progress=progress)
    for path, reason in survey.bad:
        logger.warning("skipped '%s': %s", path, reason)
    return (items if len(survey.good) == len(items) else items.select(survey.good)), survey


def _inspect(path: Path, rendering: Rendering) -> Seen | str:
    """Facts about a readable image, else the reason why it is not."""
    try:
        with open_image(path) as image:
            check_header(image)
            side, grey = max(image.size), is_grey(image, rendering)
            if is_deep(image):
                bits, varies, color = _deep_facts(deep_samples(image))
                # Its own range: that of the whole data set is not yet known.
                own = Rendering(rendering.background, max(8, bits))
                with open_image(path) as again:
                    return Seen(side, grey, bits, varies, color, image_signature(render(again, "RGB", own)))
            image.draft(None, (SIGHT, SIGHT))  # JPEG: all of the file is read, but as little as 1/64 of the pixels made
            shrunk = max(image.size) < side
            rendered = render(image, "L" if grey else "RGB", rendering)
            varies, color = _facts(rendered)
        if not varies and shrunk:  # a fine pattern may have become one color
            with open_image(path) as image:
                varies, color = _facts(render(image, "L" if grey else "RGB", rendering))
        return Seen(side, grey, 0, varies, color, image_signature(rendered))
    except Exception as error:  # Pillow's decoders raise whatever they stumble on
        return reason_of(error)


def _facts(image: Image.Image) -> tuple[int, Color]:
    """`varies` and `color` of 8-bit pixels."""
    extrema = image.getextrema() if image.mode == "RGB" else [image.getextrema()] * 3
    return _varies(extrema), tuple(low for low, _ in extrema)


def _deep_facts(samples: np.ndarray) -> tuple[int, int, Color]:
    """`bits`, `varies` and `color` of the visible ones of 16-bit samples `(H, W, C)`."""
    n_colors = 1 if samples.shape[2] < 3 else 3
    alpha = samples[:, :, n_colors:]
    visible = samples[alpha[:, :, 0] > 0] if alpha.size else samples.reshape(-1, n_colors)
    if not len(visible):
        return 1, 0, (0, 0, 0)
    visible = visible[:, :n_colors]
    extrema = list(zip(visible.min(axis=0).tolist(), visible.max(axis=0).tolist(), strict=True)) * (3 // n_colors)
    varies = DEEP if alpha.size and alpha.min() != alpha.max() else _varies(extrema)
    last = visible.size - 1 - visible.size // 1000
    brightest = int(np.partition(visible, last, axis=None)[last])
    return max(1, brightest.bit_length()), varies, tuple(low for low, _ in extrema)


def _varies(extrema: Sequence[tuple[int, int]]) -> int:
    return max((low ^ high).bit_length() for low, high in extrema)


# --- what a user is to know before training --------------------------------------------------------------


def check_pictures(items: Items, survey: ImageSurvey, bit_depth: int) -> None:
    """Log how many of the readable images are of one color, and how many 16-bit files come out dark beside others.

    Raises `OsmlError` where more than half of all images are of one and the same color.
    """
    blank = survey.blank(bit_depth)
    _check_blank([items.paths[i] for i in np.flatnonzero(blank)], survey.colors_shown(bit_depth)[blank], len(blank))
    deep, dark = survey.bits > 0, (survey.bits > 0) & (survey.bits <= bit_depth - 4)
    if dark.sum() > 0.1 * deep.sum():
        named = _named([items.paths[i] for i in np.flatnonzero(dark)])
        logger.warning(
            "%d of %d 16-bit images, such as %s, are dark: all are scaled alike, as values of %d bits; "
            "if they come from another source, convert them to 8 bits, or set data.bit_depth",
            *(dark.sum(), deep.sum(), named, bit_depth),
        )


def _check_blank(paths: list[Path], colors: np.ndarray, n: int) -> None:
    if not paths:
        return
    color, of_one = max(zip(*np.unique(colors, axis=0, return_counts=True), strict=True), key=lambda pair: pair[1])
    what_to_do = "look at them; set data.background if they are transparent, data.bit_depth if they are of 16 bits"
    if 2 * of_one > n:
        raise OsmlError(
            f"{of_one} of {n} images are nothing but the color rgb{tuple(color.tolist())}, such as {_named(paths)}: "
            f"{what_to_do}, or remove them"
        )
    logger.warning("%d of %d images are of one color, such as %s: %s", len(paths), n, _named(paths), what_to_do)


def tell_shared_files(items: Items) -> None:
    """Log the items that lie, byte for byte, in more than one class."""
    if items.labels is None:
        return
    labels, fingerprints = np.array(items.labels), items.fingerprints()
    of_content: dict[int, list[int]] = defaultdict(list)
    for i, fingerprint in enumerate(fingerprints.tolist()):
        of_content[fingerprint].append(i)
    shared = [same for same in of_content.values() if len(set(labels[same])) > 1]
    if shared:
        pairs = [(same[0], next(i for i in same if labels[i] != labels[same[0]])) for same in shared[:NAMED]]
        name = (lambda i: f"row {i}") if items.paths is None else (lambda i: f"'{items.paths[i]}'")
        named = "; ".join(f"{name(a)} ({labels[a]}) and {name(b)} ({labels[b]})" for a, b in pairs)
        what = "1 item lies" if len(shared) == 1 else f"{len(shared)} items lie"
        logger.warning("%s in more than one class, such as %s: keep each in one", what, named)


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(f"'{path}'" for path in paths[:NAMED])
