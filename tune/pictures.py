"""The pictures of a sweep, as Matplotlib figures; None where there is nothing to draw.

In all of them the best trial is orange.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import MeanDecreaseImpurityImportanceEvaluator, get_param_importances

from osml_plugin.report.pictures import FAINT, INK, KNOWN, OTHER, REJECTED, _figure, _legend, _short

from .live import columns
from .results import Dimension, Sweep, Trial, Value

AXES = 11
"""Searched parameters in one picture; the objective is one more axis."""
CURVES = 5
CURVE_POINTS = 500
FEWEST = 8
"""Trials below which nothing is said of what mattered."""
OTHERS = (KNOWN, "#332288", "#117733", "#C9A227")
"""Colours of the trade-off curves of the second and the following trials."""
SCALE = LinearSegmentedColormap.from_list("objective", ["#C9CED6", "#6FB1DC", KNOWN, "#332288"])
"""Of the objective, from bad to good."""
STATUS = {"finished": KNOWN, "stopped": REJECTED, "running": "#44AA99"}
ABSENT, BELOW = object(), -0.13
"""What a trial has for a parameter that its other choices exclude, and where its line runs."""


def search(sweep: Sweep) -> Figure:
    """The objective of each trial and the best so far, in the order of the trials' numbers."""
    figure, axes = _figure(8.2, 3.8, "Objective of each trial and the best so far")
    ranked = sorted(sweep.ranked(), key=lambda trial: trial.number)
    numbers, scores = [trial.number for trial in ranked], [_best(sweep, trial) for trial in ranked]
    for status, colour in STATUS.items():
        of = [i for i, trial in enumerate(ranked) if trial.status == status]
        if of:
            x, y = [numbers[i] for i in of], [scores[i] for i in of]
            axes.scatter(x, y, s=28, color=colour, linewidths=0, alpha=0.85, label=f"{status}: {len(of)}", zorder=3)
    if ranked:
        best = np.maximum.accumulate(scores)
        axes.step([*numbers, max(t.number for t in sweep.trials)], [*best, best[-1]], where="post", color=OTHER, lw=1.8)
        axes.plot([], [], color=OTHER, lw=1.8, label="best so far")
    if failed := [trial.number for trial in sweep.trials if trial.status == "failed"]:
        # Failed trials have no score: they stand on the axis.
        bottom = axes.get_xaxis_transform()
        label = f"failed: {len(failed)}"
        axes.scatter(failed, [0.0] * len(failed), marker="x", color=INK, transform=bottom, clip_on=False, label=label)
    axes.set(xlabel="trial", ylabel=sweep.objective)
    axes.margins(y=0.08)
    numbers = [trial.number for trial in sweep.trials]
    axes.set_xlim(min(numbers) - 0.6, max(numbers) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    _grid(axes)
    _legend(axes, columns=5)
    return figure


def learning(sweep: Sweep) -> Figure | None:
    """The objective over the epochs, of every trial that did not fail."""
    ranked = sweep.ranked()
    if not ranked:
        return None
    figure, axes = _figure(8.2, 3.8, "Objective over the epochs of each trial")
    for place, trial in reversed(list(enumerate(ranked))):
        x, y = zip(*((entry["epoch"], entry[sweep.objective]) for entry in trial.history), strict=True)
        style: dict[str, Any] = {"color": STATUS[trial.status], "lw": 1, "alpha": 0.55}
        if trial.status == "stopped":
            style["alpha"] = 0.4
        if place == 0:
            style = {"color": OTHER, "lw": 2.6, "zorder": 4}
        axes.plot(x, y, **style, marker="o" if len(x) == 1 else None, markersize=4)
    axes.plot([], [], color=OTHER, lw=2.6, label=f"best: trial {ranked[0].number}")
    for status, colour in STATUS.items():
        if any(trial.status == status for trial in ranked[1:]):
            axes.plot([], [], color=colour, lw=1, label=status)
    axes.set(xlabel="epoch", ylabel=sweep.objective)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    _grid(axes)
    _legend(axes, columns=4)
    return figure


def trade_off(sweep: Sweep) -> tuple[Figure, Figure] | None:
    """Unknown items rejected over known items rejected on validation, for all thresholds, of the best trials: the whole
    curves, and the part that costs least."""
    shown = [trial for trial in sweep.ranked() if trial.curve][:CURVES]
    if not shown:
        return None
    whole, axes = _figure(4.7, 4.5, "Trade-off curves of the best trials on validation")
    part, near = _figure(4.7, 4.5, "Trade-off curves where at most a fifth of the known items is rejected")
    near_y = []
    for place, trial in reversed(list(enumerate(shown))):
        x, y = np.array(sorted(trial.curve)).T
        thin = np.unique(np.linspace(0, len(x) - 1, CURVE_POINTS).astype(int))
        style = {"color": OTHER, "lw": 2.4} if place == 0 else {"color": OTHERS[place - 1], "lw": 1.3}
        label = f"trial {trial.number}: {sweep.objective} {_best(sweep, trial):.3f}"
        for each in (axes, near):
            each.plot(x[thin], y[thin], **style, label=label)
        near_y += y[(x > 0) & (x <= 0.2)].tolist()
    axes.plot([0, 1], [0, 1], color=FAINT, lw=0.9, zorder=0)
    axes.set(xlim=(-0.01, 1.01), ylim=(0, 1.02), aspect="equal")
    near.set(xlim=(0, 0.2), ylim=(max(0, min(near_y, default=0) - 0.03), 1.01))
    for each in (axes, near):
        each.set(xlabel="known items rejected", ylabel="unknown items rejected")
        _grid(each)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower right", frameon=False, fontsize=9, labelcolor=INK)
    return whole, part


# --- the space -------------------------------------------------------------------------------------------


def branches(sweep: Sweep) -> list[tuple[str, list[Trial]]]:
    """The ranked trials by the choice that owns most parameters, such as the loss, the branch of the best one first.

    Each branch with its name, "loss: ArcFaceLoss"; all trials under "" where nothing that was drawn tells them apart.
    """

    def owned(parent: Dimension) -> int:
        own = tuple(f"{parent.name}.{choice}." for choice in parent.choices)
        return sum(dimension.name.startswith(own) for dimension in sweep.dimensions)

    ranked = sweep.ranked()
    parent = max((d for d in sweep.dimensions if d.choices), key=owned, default=None)
    if parent is None or not owned(parent):
        return [("", ranked)]
    found: dict[str, list[Trial]] = {}
    for trial in ranked:
        if parent.name in trial.params:
            found.setdefault(f"{parent.name}: {trial.params[parent.name]}", []).append(trial)
    return list(found.items()) if len(found) > 1 else [("", ranked)]


def importances(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, float]:
    """The share of the objective's differences that each parameter explains, largest first; they sum to 1.

    Of the parameters that all these trials have, by the mean decrease in impurity of a random forest (Breiman 2001).
    With 10 to 80 trials it comes nearer to the truth than functional ANOVA, which weighs a trial by the part of the
    space around it, and than PED-ANOVA, which asks for the best trials only. Empty where it would say nothing: fewer
    than `FEWEST` trials that ended, fewer than two parameters that differ, or equal objectives.
    """
    trials = [trial for trial in trials if trial.status in ("finished", "stopped")]
    trials.sort(key=lambda trial: trial.number)  # a forest depends on the order
    scores = [_best(sweep, trial) for trial in trials]
    values = {d.name: [t.params[d.name] for t in trials if d.name in t.params] for d in sweep.dimensions}
    drawn = [d for d in sweep.dimensions if len(values[d.name]) == len(trials) and len(set(values[d.name])) > 1]
    if len(trials) < FEWEST or len(drawn) < 2 or np.ptp(scores) == 0:
        return {}
    distributions = {dimension.name: _distribution(dimension, values[dimension.name]) for dimension in drawn}
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would report a new study
    try:
        study = optuna.create_study(direction="maximize")
    finally:
        optuna.logging.set_verbosity(before)
    for trial, score in zip(trials, scores, strict=True):
        params = {name: trial.params[name] for name in distributions}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=score))
    found = get_param_importances(study, evaluator=MeanDecreaseImpurityImportanceEvaluator(seed=0))
    return {name: float(share) for name, share in sorted(found.items(), key=lambda item: -item[1])}


def importance(sweep: Sweep, shares: dict[str, float], title: str) -> Figure:
    """Bars of what `importances` found."""
    figure, axes = _figure(4.7, 0.7 + 0.27 * len(shares), f"What mattered, {title}")
    heading = _headings(sweep)
    bars = axes.barh(range(len(shares)), shares.values(), color=KNOWN, height=0.66)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares.values()], padding=4, fontsize=9, color=INK)
    axes.set_yticks(range(len(shares)), [_short(heading[name]) for name in shares])
    axes.set(xticks=[], xlim=(0, 1.15 * max(shares.values())), ylim=(len(shares) - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(_plain(title), loc="left", fontsize=10, color=INK)
    return figure


def parallel(sweep: Sweep, branch: str, trials: Sequence[Trial]) -> Figure | None:
    """A line for each trial of a branch, best first, through its parameters to its objective; the darker, the better.

    Where there are more than `AXES` parameters those that mattered most are shown.
    """
    # The choice that makes a branch is in its name.
    drawn = [d for d in sweep.dimensions if any(d.name in t.params for t in trials)]
    drawn = [d for d in drawn if not branch.startswith(f"{d.name}: ")]
    if not drawn:
        return None
    if len(drawn) > AXES:
        shares = importances(sweep, trials)
        chosen = sorted(drawn, key=lambda d: -shares.get(d.name, 0))[:AXES]
        drawn = [d for d in drawn if d in chosen]
    heading, scores = _headings(sweep), [_best(sweep, trial) for trial in trials]
    names = [*(heading[d.name] for d in drawn), sweep.objective]
    parts = [_axis(d, [t.params.get(d.name, ABSENT) for t in trials]) for d in drawn]
    parts.append(_axis(Dimension(sweep.objective, "float", min(scores), max(scores)), scores))

    # The places of the axes in inches: the labels of each stand before it.
    names = [_stacked(name) for name in names]
    room = [0.3 + 0.068 * max(len(label) for _, label in ticks) for _, ticks in parts]
    wide = [0.15 + 0.088 * max(map(len, name.split("\n"))) for name in names]
    x = np.cumsum([max(room[0], wide[0] / 2), *map(max, room[1:], wide[1:], wide[:-1], repeat(7.4 / len(parts)))])
    title = f"{branch or 'all trials'} ({len(trials)}); best: trial {trials[0].number}, {scores[0]:.3f}"
    figure, axes = _figure(x[-1] + 0.6, 4.0, f"The searched parameters and the objective, {title}")
    every = [_best(sweep, trial) for trial in sweep.ranked()]
    low, high = float(np.quantile(every, 0.1)), max(every)  # one bad trial would make all others look alike
    colours = SCALE(Normalize(low, high if high > low else low + 1, clip=True)(scores))
    lines = np.array([[*zip(x, y, strict=True)] for y in zip(*(y for y, _ in parts), strict=True)])
    axes.add_collection(LineCollection(lines[:0:-1], colors=colours[:0:-1], linewidths=1.2, alpha=0.75, zorder=2))
    axes.plot(*lines[0].T, color=OTHER, lw=2.6, zorder=3)
    box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    for at, name, (_, ticks) in zip(x, names, parts, strict=True):
        axes.plot([at, at], [0, 1], color=INK, lw=0.8, zorder=4)
        axes.text(at, 1.06, name, ha="center", va="bottom", fontsize=9, weight="bold", color=INK)
        for y, label in ticks:
            axes.plot([at - 0.04, at], [y, y], color=INK, lw=0.8, zorder=4)
            axes.text(at - 0.07, y, label, ha="right", va="center", fontsize=8, color=INK, bbox=box, zorder=5)
    axes.set(xlim=(0, x[-1] + 0.5), ylim=(min(0, *lines[:, :, 1].flat) - 0.04, 1.05), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=10, color=INK)
    return figure


def _axis(dimension: Dimension, values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """The heights in [0, 1] of the values of one parameter, and of its labels; ABSENT lies below."""
    drawn = [value for value in values if value is not ABSENT]
    if dimension.kind == "choice":
        options = [*dimension.choices, *dict.fromkeys(v for v in drawn if v not in dimension.choices)]
        step = 1 / len(options)
        heights = [0.0] * len(values)
        for place, option in enumerate(options):
            members = [i for i, value in enumerate(values) if value == option]
            _spread(heights, members, (place + 0.5) * step, 0.6 * step)
        ticks = [((place + 0.5) * step, _short(str(option))) for place, option in enumerate(options)]
    else:
        # What is exchanged between trials can leave the space.
        low, high = min(dimension.low, *drawn), max(dimension.high, *drawn)
        marks = _marks(low, high, dimension.log, dimension.kind == "int")
        low, high, *scaled = np.log([low, high, *drawn, *marks]) if dimension.log else [low, high, *drawn, *marks]
        scaled = [(v - low) / (high - low) if high > low else 0.5 for v in scaled]
        inside = iter(scaled)
        heights = [0.0 if value is ABSENT else next(inside) for value in values]
        ticks = [
            (y, f"{mark:.4g}" if dimension.kind == "float" else f"{mark:.0f}")
            for y, mark in zip(inside, marks, strict=True)
        ]
    if absent := [i for i, value in enumerate(values) if value is ABSENT]:
        _spread(heights, absent, BELOW, 0.1)
        ticks.append((BELOW, "unused"))
    return heights, ticks


def _spread(heights: list[float], members: Sequence[int], place: float, most: float) -> None:
    """Put lines that would share one place beside each other, the best on top, so that one sees how many they are."""
    half = min(most, 0.015 * (len(members) - 1)) / 2
    for i, offset in zip(members, np.linspace(half, -half, len(members)), strict=True):
        heights[i] = place + float(offset)


def _marks(low: float, high: float, log: bool, whole: bool) -> list[float]:
    """Two to eight round numbers between the ends, or the ends."""
    if low == high:
        return [low]
    if log:
        tens = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = tens[:: 1 + len(tens) // 8] if high / low >= 100 else np.outer(tens, [1, 2, 5]).ravel()
    else:
        marks = MaxNLocator(5, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    margin = 1e-9 * max(abs(low), abs(high))
    inside = [float(mark) for mark in marks if low - margin <= mark <= high + margin]
    return inside if len(inside) > 1 else [low, high]


# --- parts of pictures -----------------------------------------------------------------------------------


def _distribution(dimension: Dimension, values: Sequence[Value]) -> BaseDistribution:
    if dimension.kind == "choice":
        return CategoricalDistribution(list(dict.fromkeys([*dimension.choices, *values])))
    kind = IntDistribution if dimension.kind == "int" else FloatDistribution
    return kind(min(dimension.low, *values), max(dimension.high, *values), log=dimension.log)


def _headings(sweep: Sweep) -> dict[str, str]:
    """Of each dimension, by its name."""
    return {name: heading for heading, names in columns(sweep.dimensions).items() for name in names}


def _best(sweep: Sweep, trial: Trial) -> float:
    return trial.best(sweep.objective)[sweep.objective]


def _stacked(name: str) -> str:
    """In short lines, broken after dots and underscores."""
    lines = textwrap.wrap(re.sub(r"([._])", r"\1 ", name), 12, break_long_words=False)
    return "\n".join(_short(line.replace(" ", "")) for line in lines)


def _plain(text: str) -> str:
    """As Matplotlib is to write it: no formula."""
    return text.replace("$", r"\$")


def _grid(axes: Axes) -> None:
    axes.grid(color=FAINT, alpha=0.4, linewidth=0.6)
    axes.set_axisbelow(True)
