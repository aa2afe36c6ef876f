"""The pictures of an evaluation, as Matplotlib figures; None where there is nothing to draw.

Colours are those of Paul Tol ("Colour schemes", 2021), which the colour-blind can tell apart; the lightest are darker
here, as the page turns lightness over on dark screens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from .. import UNKNOWN
from ..discovery.tree import Tree
from ..evaluation import Evaluation
from ..metrics.discovery import LEFT_OUT
from ..metrics.functional import Ranking, oscr_curve, rank, roc_curve

KNOWN, OTHER, INK, FAINT, REJECTED = "#0077BB", "#EE7733", "#333333", "#BBBBBB", "#9AA0A8"
CLASSES = ("#CC6677", "#332288", "#C9A227", "#117733", "#3FA7D6", "#882255", "#44AA99", "#999933", "#AA4499")
"""Colours of classes; they repeat."""

CURVE_POINTS = 2000
MAP_ITEMS = 2000
MAP_GROUPED, MAP_KNOWN = 1500, 500
"""Items, and known ones behind them, of the map of a discovery."""
MAP_LABELS = 20
"""Classes up to which a map names them."""
MAP_NUMBERS = 100
"""Groups, the largest, that a map numbers."""
TREE_BRANCHES = 40
"""Branches of a tree that are drawn."""
CONFUSION_CLASSES = 30
GROUPS = 40
WRITTEN_CELLS = 14
"""Columns up to which a heat map has its figures written into it."""


def score_histogram(evaluation: Evaluation) -> Figure:
    """The unknown scores of known and of unknown items, and the threshold. Each kind sums to 1."""
    scores, unknown = evaluation.recognition.scores, evaluation.labels == UNKNOWN
    figure, axes = _figure(6.2, 3.9, "Histogram of the unknown scores of known and unknown items, with the threshold")
    edges = _edges(scores, evaluation.threshold)
    for kind, of, colour, share in (
        ("known", ~unknown, KNOWN, evaluation.metrics.known_rejected),
        ("unknown", unknown, OTHER, evaluation.metrics.unknown_rejected),
    ):
        if of.any():
            bars = np.histogram(np.clip(scores[of], edges[0], edges[-1]), edges)[0] / of.sum()
            label = f"{kind}: {of.sum():,} items, {share:.1%} rejected"
            axes.stairs(bars, edges, fill=True, color=colour, alpha=0.4)
            axes.stairs(bars, edges, color=colour, label=label)
    if math.isfinite(evaluation.threshold):
        label = f"τ = {evaluation.threshold:.4g}"
        axes.axvline(evaluation.threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label=label)
    axes.set(xlabel="unknown score", ylabel="share of items", xlim=(edges[0], edges[-1]))
    _legend(axes)
    return figure


def roc(evaluation: Evaluation) -> Figure | None:
    """Unknown items rejected over known items rejected, for all thresholds."""
    ranking, metrics = _ranking(evaluation), evaluation.metrics
    if not ranking.has_both:
        return None
    x, y, _ = roc_curve(ranking)
    figure, axes = _figure(4.7, 4.5, f"ROC curve, AUROC {metrics.auroc:.3f}")
    if (alpha := evaluation.alpha) is not None:
        axes.axvline(alpha, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label=f"asked for: {alpha:g}")
    _curve(axes, x, y, KNOWN, f"AUROC {metrics.auroc:.3f}")
    _operating_point(axes, metrics.known_rejected, metrics.unknown_rejected)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.9, zorder=0)
    axes.set(xlabel="known items rejected", ylabel="unknown items rejected")
    _legend(axes, loc="lower right")
    return figure


def oscr(evaluation: Evaluation) -> Figure | None:
    """Known items accepted and correctly classified over unknown items accepted, for all thresholds."""
    ranking, metrics = _ranking(evaluation), evaluation.metrics
    if not ranking.has_both:
        return None
    x, y, _ = oscr_curve(ranking)
    figure, axes = _figure(4.7, 4.5, f"OSCR curve, area {metrics.oscr:.3f}")
    _curve(axes, x, y, "#117733", f"OSCR {metrics.oscr:.3f}")
    correct = np.count_nonzero((evaluation.labels != UNKNOWN) & (evaluation.labels == evaluation.recognition.labels))
    _operating_point(axes, 1 - metrics.unknown_rejected, correct / metrics.n_known_items)
    axes.set(xlabel="unknown items accepted", ylabel="known items accepted and correct")
    _legend(axes, loc="lower right")
    return figure


def maps(evaluation: Evaluation, *, seed: int = 0) -> tuple[Figure, Figure]:
    """The embeddings in the plane, coloured by true class, and by what the recognizer said.

    t-SNE (van der Maaten & Hinton 2008) from a PCA; of at most `MAP_ITEMS` items, drawn by `seed`.
    """
    n = len(evaluation.labels)
    chosen = np.random.default_rng(seed).permutation(n)[:MAP_ITEMS]
    xy = _plane(evaluation.embeddings.numpy()[chosen], seed)
    true = np.array(evaluation.names)[chosen]
    answer = np.array([name or "" for name in evaluation.recognition.names])[chosen]
    unknown = evaluation.labels[chosen] == UNKNOWN
    known_names, unknown_names = _known_names(evaluation), _unknown_names(evaluation)
    colour = {name: CLASSES[i % len(CLASSES)] for i, name in enumerate([*known_names, *unknown_names])}
    first = _map("true class", xy, true, unknown, colour)
    second = _map("the answer; rejected items are grey", xy, answer, unknown, colour | {"": REJECTED})
    return first, second


def confusion(evaluation: Evaluation) -> Figure | None:
    """The answers (known classes and unknown) to the items of each true class; None above `CONFUSION_CLASSES`."""
    known, unknown = _known_names(evaluation), _unknown_names(evaluation)
    if len(known) + len(unknown) > CONFUSION_CLASSES:
        return None
    rows, columns = [*known, *unknown], [*known, None]
    counts = _counts(evaluation.names, evaluation.recognition.names, rows, columns)
    figure, axes = _heat_map(counts, rows, [*known, "unknown"], "Answers to the items of each true class")
    axes.set(xlabel="answer", ylabel="true class")
    axes.axvline(len(known) - 0.5, color=INK, linewidth=1)
    if known and unknown:
        axes.axhline(len(known) - 0.5, color=INK, linewidth=1)
    return figure


def groups(evaluation: Evaluation) -> Figure | None:
    """In which found group the items of each unknown class are; None without groups, or above `GROUPS` of either."""
    found, rows = evaluation.groups, _unknown_names(evaluation)
    if found is None or max(found.n_classes, len(rows)) > GROUPS:
        return None
    true = [name for name, label in zip(evaluation.names, evaluation.labels, strict=True) if label == UNKNOWN]
    left_out = [LEFT_OUT] if (found.labels == LEFT_OUT).any() else []
    columns = [*range(found.n_classes), *left_out]
    counts = _counts(true, found.labels.tolist(), rows, columns)
    # Groups stand in the order of the class that most of their items are of.
    order = np.lexsort((-counts.max(axis=0), counts.argmax(axis=0)))
    order = np.array([*(i for i in order if i < found.n_classes), *range(found.n_classes, len(columns))], dtype=int)
    names = [*map(str, range(found.n_classes)), "none"]
    figure, axes = _heat_map(counts[:, order], rows, [names[i] for i in order], "Found groups of each unknown class")
    axes.set(xlabel="found group", ylabel="true unknown class")
    return figure


def group_map(embeddings: np.ndarray, labels: np.ndarray, known: np.ndarray, *, seed: int = 0) -> Figure:
    """Items `(N, D)` in the plane, coloured and numbered by group `(N,)`, with known items `(R, D)` in grey.

    As `maps`, of at most `MAP_GROUPED` items and `MAP_KNOWN` known ones.
    """
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(embeddings))[:MAP_GROUPED]
    behind = draw.permutation(len(known))[:MAP_KNOWN]
    xy = _plane(np.concatenate([embeddings[chosen], known[behind]]), seed)
    items, references, groups = xy[: len(chosen)], xy[len(chosen) :], labels[chosen]
    numbers = np.unique(groups[groups != LEFT_OUT])
    crowded = len(numbers) > MAP_LABELS
    side = 7.6 if crowded else 6.4
    figure, axes = _figure(side, side, "Map of the embeddings, coloured by group")
    size = float(np.clip(16_000 / len(xy), 8, 36))
    axes.scatter(*references.T, s=size, color=FAINT, linewidths=0, alpha=0.6, rasterized=True)
    out = groups == LEFT_OUT
    axes.scatter(*items[out].T, s=size, color=INK, marker="x", linewidths=1, alpha=0.8, rasterized=True)
    colours = np.array(CLASSES)[groups[~out] % len(CLASSES)]
    axes.scatter(*items[~out].T, s=size, c=colours, linewidths=0, alpha=0.8, rasterized=True)
    for group in numbers[:MAP_NUMBERS]:
        _label(axes, items[groups == group], str(group), 8 if crowded else 11)
    for label, marker, colour in (("known item", "o", FAINT), ("left out", "x", INK)):
        if marker == "o" or out.any():
            axes.scatter([], [], s=30, color=colour, marker=marker, linewidths=int(marker == "x"), label=label)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    _legend(axes, columns=2)
    return figure


def group_tree(tree: Tree, names: Sequence[int]) -> Figure | None:
    """How the groups that stand merge, from the right to the left, to fewer and at last to one; None for a single one.
    `names` are the numbers that they are shown by.

    At most `TREE_BRANCHES` branches are opened, from the coarsest on; groups behind them are told as a number.
    """
    if len(tree.groups) < 2:
        return None
    stand, ends = set(tree.groups), {int(np.flatnonzero(tree.parent < 0)[0])}
    while len(ends) < TREE_BRANCHES and (closed := ends - stand):
        opened = max(closed, key=lambda group: (tree.heights[group], -group))
        ends = ends - {opened} | set(tree.children[opened].tolist())
    behind: dict[int, list[int]] = {end: [] for end in ends}
    for group in tree.groups:
        behind[_end_of(tree, group, ends)].append(group)

    figure, axes = _figure(
        6.2, 0.9 + 0.24 * len(ends), "Tree of the groups, from coarse on the left to fine on the right"
    )
    lowest = min(tree.heights[group] for group in set(tree.parent[list(ends)].tolist()))
    right = lowest - 0.05 * max(1 - lowest, 0.1)  # where all are as far apart as can be, there is still a width
    rows = count()

    def draw(group: int) -> tuple[float, float]:
        """The place of a branch; what is right of it is drawn."""
        if group in ends:
            y, groups = next(rows), behind[group]
            axes.plot(
                right, y, "o", color=CLASSES[names[group] % len(CLASSES)] if group in stand else FAINT, clip_on=False
            )
            name = ", ".join(str(names[g]) for g in groups) if len(groups) <= 4 else f"{len(groups)} groups"
            text = f"{name}: {tree.sizes[group]:,} items"
            axes.annotate(text, (right, y), (8, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
            return right, y
        x = tree.heights[group]
        larger_first = sorted(tree.children[group].tolist(), key=lambda child: (-tree.sizes[child], child))
        places = [draw(child) for child in larger_first]
        for start, y in places:
            axes.plot([start, x], [y, y], color=REJECTED, linewidth=1.2, zorder=0)
        axes.plot([x, x], [y for _, y in places], color=REJECTED, linewidth=1.2, zorder=0)
        return x, float(np.mean([y for _, y in places]))

    draw(int(np.flatnonzero(tree.parent < 0)[0]))
    axes.set(yticks=[], ylim=(len(ends) - 0.5, -0.5), xlim=(1 + 0.02 * (1 - right), right))
    axes.set_xlabel("how little the two are linked (0.5: as by chance; 1: not at all)")
    axes.spines["left"].set_visible(False)
    return figure


# --- parts of pictures -----------------------------------------------------------------------------------


def _figure(width: float, height: float, text: str) -> tuple[Figure, Axes]:
    """An empty figure; `text` is for those who cannot see it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.set_label(text)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _legend(axes: Axes, loc: str | None = None, columns: int = 1) -> None:
    where = {"loc": loc} if loc else {"loc": "lower left", "bbox_to_anchor": (0, 1)}
    axes.legend(**where, ncols=columns, frameon=False, fontsize=9, labelcolor=INK)


def _edges(scores: np.ndarray, tau: float) -> np.ndarray:
    """The edges of a histogram's bars: the finite scores but for the far tails, and τ."""
    finite = scores[np.isfinite(scores)].astype(np.float64)
    ends = np.quantile(finite, [0.002, 0.995]).tolist() if finite.size else [0.0, 1.0]
    if math.isfinite(tau):
        ends.append(tau)
    low, high = min(ends), max(ends)
    margin = 0.02 * (high - low) or max(abs(high), 1) * 0.01
    return np.linspace(low - margin, high + margin, 61)


def _ranking(evaluation: Evaluation) -> Ranking:
    """Of scores, true labels and closed-set answers, by new numbers of the names."""
    n = len(evaluation.labels)
    _, ids = np.unique(np.array([*evaluation.names, *evaluation.recognition.nearest]), return_inverse=True)
    return rank(evaluation.recognition.scores, np.where(evaluation.labels == UNKNOWN, UNKNOWN, ids[:n]), ids[n:])


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    thin = np.unique(np.linspace(0, len(x) - 1, CURVE_POINTS).astype(int))
    axes.plot(x[thin], y[thin], color=colour, linewidth=2, label=label)
    axes.fill_between(x[thin], y[thin], color=colour, alpha=0.08, linewidth=0)
    axes.set(xlim=(-0.01, 1.01), ylim=(0, 1.02), aspect="equal")
    axes.grid(color=FAINT, alpha=0.4, linewidth=0.6)
    axes.set_axisbelow(True)


def _operating_point(axes: Axes, x: float, y: float) -> None:
    axes.plot(
        x, y, "o", color=OTHER, markeredgecolor="white", markersize=9, label=f"at τ: ({x:.3f}, {y:.3f})", clip_on=False
    )


def _plane(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """`(N, D)` embeddings as `(N, 2)`."""
    n, width = embeddings.shape
    if not np.ptp(embeddings, axis=0).any():
        return np.zeros((n, 2))
    principal = PCA(min(50, n, width), random_state=seed).fit_transform(embeddings)
    if n < 30 or width <= 2:
        return np.pad(principal[:, :2], ((0, 0), (0, max(0, 2 - principal.shape[1]))))
    return TSNE(init="pca", perplexity=min(30, n / 4), random_state=seed).fit_transform(principal)


def _map(title: str, xy: np.ndarray, names: np.ndarray, unknown: np.ndarray, colour: dict[str, str]) -> Figure:
    figure, axes = _figure(5.1, 5.1, f"Map of the embeddings, coloured by {title}")
    size = float(np.clip(12_000 / len(xy), 6, 36))
    colours = np.array([colour[name] for name in names])
    for of, marker, line, label in ((~unknown, "o", 0, "known class"), (unknown, "x", 1, "unknown class")):
        if of.any():
            # Thousands of points are far smaller as pixels; the text stays text.
            axes.scatter(*xy[of].T, s=size, c=colours[of], marker=marker, linewidths=line, alpha=0.8, rasterized=True)
            axes.scatter([], [], s=30, color=INK, marker=marker, linewidths=line, label=label)
    named = sorted(set(names.tolist()) - {""})
    if len(named) <= MAP_LABELS:
        for name in named:
            _label(axes, xy[names == name], _short(name), 9)
    axes.set(xticks=[], yticks=[], title="")
    axes.set_title(title, loc="left", fontsize=10, color=INK, pad=22)
    axes.spines[:].set_visible(False)
    _legend(axes, columns=2)
    return figure


def _end_of(tree: Tree, group: int, ends: set[int]) -> int:
    while group not in ends:
        group = int(tree.parent[group])
    return group


def _label(axes: Axes, members: np.ndarray, text: str, size: float) -> None:
    """A name in the middle of the points `(N, 2)` that have it."""
    # The item nearest to the median, as the median itself may lie between two islands.
    place = members[np.linalg.norm(members - np.median(members, axis=0), axis=1).argmin()]
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    axes.text(*place, text, ha="center", va="center", fontsize=size, weight="bold", color=INK, bbox=box)


def _heat_map(counts: np.ndarray, rows: Sequence[str], columns: Sequence[str], text: str) -> tuple[Figure, Axes]:
    """Counts `(rows, columns)`, each row as shares of its sum."""
    written = len(columns) <= WRITTEN_CELLS
    cell = 0.46 if written else 0.29
    beside, below = (0.09 * max(len(_short(name)) for name in names) for names in (rows, columns))
    turned = below > cell
    width = 0.5 + beside + cell * len(columns) + (0 if written else 1)
    figure, axes = _figure(max(3, width), 0.6 + (below if turned else 0.1) + cell * len(rows), text)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal", interpolation="nearest")
    if written:
        for (i, j), share in np.ndenumerate(shares):
            if counts[i, j]:
                # A cell that would read as 0 or 100 though it is not whole shows the next figure.
                percent = 100 if share == 1 else min(max(round(100 * share), 1), 99)
                axes.text(j, i, percent, ha="center", va="center", fontsize=8, color="white" if share > 0.55 else INK)
    axes.set_xticks(range(len(columns)), [_short(n) for n in columns], rotation=90 if turned else 0)
    axes.set_yticks(range(len(rows)), [_short(n) for n in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if not written:
        bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=24, format=lambda share, _: f"{share:.0%}")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    return figure, axes


def _counts(true: Sequence, answer: Sequence, rows: Sequence, columns: Sequence) -> np.ndarray:
    """`(rows, columns)` int64: how many items each pair has."""
    row, column = {r: i for i, r in enumerate(rows)}, {c: i for i, c in enumerate(columns)}
    counts = np.zeros((len(rows), len(columns)), dtype=np.int64)
    np.add.at(counts, ([row[t] for t in true], [column[a] for a in answer]), 1)
    return counts


def _known_names(evaluation: Evaluation) -> list[str]:
    """Known classes that items are of, or were taken for, in the order of their ids."""
    names = dict(zip(evaluation.labels.tolist(), evaluation.names, strict=True))
    names |= dict(zip(evaluation.recognition.labels.tolist(), evaluation.recognition.names, strict=True))
    return [names[i] for i in sorted(names) if i != UNKNOWN]


def _unknown_names(evaluation: Evaluation) -> list[str]:
    return sorted({n for n, label in zip(evaluation.names, evaluation.labels, strict=True) if label == UNKNOWN})


def _short(name: str) -> str:
    """A class name as Matplotlib is to write it: not too long, and no formula."""
    name = name if len(name) <= 18 else name[:17] + "…"
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")
