"""The pictures of the Jacobian diagnostics, as PNG files beside `jacobian.json`."""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .. import UNKNOWN
from ..errors import OsmlError
from ..jacobian_diagnostics import Diagnosis, Diagnostics
from .pictures import FAINT, INK, KNOWN, OTHER, _figure, _legend

DPI = 160
BINS = 40


def check_folder(folder: Path) -> None:
    """Raise OsmlError where `write_jacobian` could not write; nothing is made."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OsmlError(f"cannot write to '{folder}': '{there}' is no folder that can be written; choose another --out")


def write_jacobian(folder: Path, diagnostics: Diagnostics) -> None:
    """Write `jacobian.json` and a PNG of each picture that there is something to draw of, over what is there; a picture
    of another model, of which there is nothing to draw now, goes. OsmlError where it cannot be written."""
    text = json.dumps(diagnostics.to_dict(), indent=1, allow_nan=False)
    files: dict[str, bytes | None] = {"jacobian.json": text.encode()}
    for name, picture in (
        ("histogram", histogram(diagnostics)),
        ("means", means(diagnostics)),
        ("difference", difference(diagnostics)),
        ("correlation", correlation(diagnostics)),
        ("davies-bouldin", davies_bouldin(diagnostics)),
    ):
        content = io.BytesIO()
        if picture is not None:
            picture.savefig(content, format="png", dpi=DPI)
        files[f"{name}.png"] = content.getvalue() or None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".jacobian.", dir=folder) as aside:
            for name, content in files.items():
                if content is not None:
                    (Path(aside) / name).write_bytes(content)
            for name, content in files.items():
                if content is None:
                    (folder / name).unlink(missing_ok=True)
                else:
                    os.replace(Path(aside) / name, folder / name)
    except OSError as error:
        raise OsmlError(f"cannot write to '{folder}': {error.strerror}; choose another --out") from error


def histogram(diagnostics: Diagnostics) -> Figure:
    """J of known and of unknown items under the last network. Each kind sums to 1."""
    last, unknown = diagnostics.networks[-1], diagnostics.labels == UNKNOWN
    where = "final model" if last.epoch is None else f"epoch {last.epoch}"
    figure, axes = _figure(6.2, 3.9, f"Histogram of the Jacobian norms of known and unknown items, {where}")
    # On a logarithmic axis, as norms spread over decades.
    positive = np.maximum(diagnostics.norms, np.finfo(np.float32).tiny)
    low, high = np.quantile(positive, [0.002, 0.998])
    bins = int(np.clip(2 * np.sqrt(len(positive)), 8, BINS))  # few items in many bins are a comb
    edges = np.geomspace(low / 1.05, high * 1.05, bins + 1)
    for kind, of, colour in (("known", ~unknown, KNOWN), ("unknown", unknown, OTHER)):
        if of.any():
            bars = np.histogram(np.clip(positive[of], edges[0], edges[-1]), edges)[0] / of.sum()
            axes.stairs(bars, edges, fill=True, color=colour, alpha=0.4)
            axes.stairs(bars, edges, color=colour, label=f"{kind}: {of.sum():,} items")
    axes.set_xscale("log")
    for form in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        form(StrMethodFormatter("{x:g}"))
    axes.tick_params(which="minor", color=FAINT, labelcolor=INK, labelsize=9)
    axes.set(xlabel=f"{_name(diagnostics)}, {where}", ylabel="share of items")
    _legend(axes, columns=2)
    return figure


def means(diagnostics: Diagnostics) -> Figure | None:
    """E[J] of the known and of the unknown items over the epochs."""
    figure = _over_epochs(diagnostics, "known", KNOWN, "known", f"mean {_name(diagnostics)}")
    if figure is not None and diagnostics.networks[0].unknown is not None:
        _line(figure, diagnostics.networks, "unknown", OTHER, "unknown")
    return figure


def difference(diagnostics: Diagnostics) -> Figure | None:
    """E_unknown[J] − E_known[J] over the epochs."""
    figure = _over_epochs(diagnostics, "difference", KNOWN, None, "mean J: unknown − known")
    if figure is not None:
        figure.axes[0].axhline(0, color=FAINT, linewidth=0.9, zorder=0)
    return figure


def correlation(diagnostics: Diagnostics) -> Figure | None:
    """AUROC of the detector over the difference of J, a point for each checkpoint; the later, the darker."""
    pearson, spearman = diagnostics.pearson, diagnostics.spearman
    if pearson is None:
        return None
    text = f"Pearson {pearson:.2f}, Spearman {spearman:.2f}"
    figure, axes = _figure(5.1, 4.2, f"AUROC over the difference of the mean Jacobian norms; {text}")
    x, y, epochs = ([getattr(n, name) for n in diagnostics.networks] for name in ("difference", "auroc", "epoch"))
    axes.plot(x, y, color=FAINT, linewidth=0.9, zorder=1)
    points = axes.scatter(x, y, c=epochs, cmap="viridis_r", s=34, linewidths=0, zorder=2)
    bar = figure.colorbar(points, ax=axes, shrink=0.8, aspect=24, label="epoch")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    axes.set(xlabel="mean J: unknown − known", ylabel=f"AUROC of {diagnostics.detector}")
    axes.set_title(text, loc="left", fontsize=10, color=INK)
    return figure


def davies_bouldin(diagnostics: Diagnostics) -> Figure | None:
    """Davies–Bouldin index of the known classes over the epochs."""
    return _over_epochs(diagnostics, "davies_bouldin", KNOWN, None, "Davies–Bouldin index of the known")


# --- parts of pictures -----------------------------------------------------------------------------------


def _over_epochs(diagnostics: Diagnostics, name: str, colour: str, label: str | None, axis: str) -> Figure | None:
    """One figure of each checkpoint; None where there are fewer than two, or where it is missing."""
    networks = diagnostics.networks
    if len(networks) < 2 or getattr(networks[0], name) is None:
        return None
    figure, axes = _figure(6.2, 3.9, f"{axis} over the epochs")
    _line(figure, networks, name, colour, label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel=axis)
    return figure


def _line(figure: Figure, networks: tuple[Diagnosis, ...], name: str, colour: str, label: str | None) -> None:
    (axes,) = figure.axes
    axes.plot(
        [n.epoch for n in networks],
        [getattr(n, name) for n in networks],
        color=colour,
        linewidth=2,
        marker="o",
        markersize=4,
        label=label,
    )
    if label is not None:
        _legend(axes, columns=2)


def _name(diagnostics: Diagnostics) -> str:
    what = "Jacobian norm" + (" before normalisation" if diagnostics.before_norm else "")
    return what if diagnostics.n_projections is None else f"{what} ({diagnostics.n_projections} projections)"
