"""One self-contained HTML page: tables, figures and images, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from ..data.images import read_image
from ..data.pixels import ON_WHITE, Rendering, render
from ..errors import OsmlError

THUMBNAIL = 96
"""Longest side of a thumbnail in pixels."""
LARGEST_SVG = 400_000
"""Bytes; a figure that would be larger as SVG is drawn in pixels."""
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""Of an SVG: with a date no two pages would be the same."""

ImageLike = str | Path | np.ndarray | Image.Image


class Page:
    """A page with a title and a paragraph that says the most important thing; parts appear in the order of adding.

    Figures and images are turned into text as they are added, so that what fails does so before anything is written.
    """

    def __init__(self, title: str, lead: str, rendering: Rendering = ON_WHITE):
        """rendering: how images are shown, that is as a recognizer sees them."""
        self.title, self.lead, self.rendering = title, lead, rendering
        self._sections: list[dict[str, Any]] = []

    def add_chapter(self, heading: str, note: str = "") -> None:
        """A heading over the parts that follow."""
        self._add(heading, note, kind="chapter")

    def add_table(self, heading: str, header: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        """A table whose first column names the rows. Numbers are set right; None and NaN show as a dash."""
        numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(header))]
        cells = [[_text(value) for value in row] for row in rows]
        self._add(heading, note, kind="table", header=header, rows=cells, numeric=numeric)

    def add_figure(self, heading: str, figure: Figure | Sequence[Figure], note: str = "") -> None:
        """A figure, or several side by side where there is room. `figure.set_label(text)` gives the text for those
        who cannot see it; without one it is the heading."""
        figures = [figure] if isinstance(figure, Figure) else figure
        drawn = [
            {"alt": f.get_label() or heading, "width": round(96 * f.get_figwidth()), "src": _draw(f)} for f in figures
        ]
        self._add(heading, note, kind="figure", figures=drawn)

    def add_images(
        self, heading: str, groups: Sequence[tuple[str, Sequence[tuple[ImageLike, str]]]], note: str = ""
    ) -> None:
        """Groups of thumbnails.

        Args:
            groups: of each its caption, and its images with a small caption each. An image is a file, uint8 pixels
                `(H, W)` or `(H, W, C)`, C in {1, 3, 4}, or a PIL image. A file that cannot be read is shown as such.
        """
        made = [
            (caption, [_thumbnail(image, small, self.rendering) for image, small in images])
            for caption, images in groups
        ]
        self._add(heading, note, kind="images", groups=made)

    def write(self, path: str | Path) -> None:
        """Write the page, or nothing at all. OsmlError where it cannot be written."""
        path = Path(path)
        template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        html = environment.from_string(template).render(title=self.title, lead=self.lead, sections=self._sections)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            # A file name that is no UTF-8 reaches Python with lone surrogates.
            aside.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")
            os.replace(aside, path)
        except OSError as error:
            raise OsmlError(f"cannot write the page '{path}': {error.strerror}; choose another place") from error
        finally:
            aside.unlink(missing_ok=True)

    def _add(self, heading: str, note: str, **content: Any) -> None:
        kind, inside = content["kind"], any(s["kind"] == "chapter" for s in self._sections)
        # The parts of chapters are named alike: the contents show the chapters only.
        place = {"id": f"part-{len(self._sections) + 1}", "in_contents": kind == "chapter" or not inside}
        self._sections.append({"heading": heading, "note": note, **place, **content})


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if math.isfinite(value) else "∞" if value > 0 else "-∞"


def _draw(figure: Figure) -> str:
    """A `data:` address of the figure, the same for the same figure."""
    # Text stays text: smaller, and the browser has the glyphs that Matplotlib's font lacks.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "osml"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", dpi=200, transparent=True, metadata=NO_METADATA)
        if svg.tell() <= LARGEST_SVG:
            return _data("svg+xml", svg)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=160, transparent=True)
        return _data("png", png)


def _thumbnail(image: ImageLike, caption: str, rendering: Rendering) -> dict[str, Any]:
    where = ""
    if isinstance(image, str | Path):
        where = "/".join(Path(image).parts[-2:])
        try:
            image = read_image(image, channels=3, size=None, rendering=rendering).permute(1, 2, 0).numpy()
        except OsmlError:
            return {"caption": caption, "where": where, "src": None}
    if not isinstance(image, Image.Image):
        image = _from_pixels(image)
    image = render(image, "L" if image.mode in ("1", "L") else "RGB", rendering)
    crisp = max(image.size) <= THUMBNAIL
    content = io.BytesIO()
    if crisp:
        image.save(content, "PNG")
    else:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(content, "JPEG", quality=85)
    src = _data("png" if crisp else "jpeg", content)
    return {"caption": caption, "where": where, "src": src, "crisp": crisp}


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    pixels = np.asarray(pixels)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise OsmlError(
            f"an image is uint8 pixels (H, W) or (H, W, C) with C 1, 3 or 4; got {pixels.dtype} of shape {pixels.shape}"
        )
    return Image.fromarray(pixels)


def _data(kind: str, content: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
