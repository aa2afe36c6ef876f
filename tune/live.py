"""What is seen of a sweep while it runs: a live table on a terminal, elsewhere a line whenever a trial ends."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .results import Dimension, Sweep, Trial, Value

ROWS = 12
AROUND = 6
"""Lines of a terminal that are not rows: two of progress, the header and its rule, the prompt before and after."""
WIDEST = 18
"""Characters of a cell."""
GAP = 2
COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}
ENDED = ("finished", "stopped", "failed")


class LiveTable:
    """The state of a sweep on standard error.

    Give `update` every new state, however often: a terminal is drawn on four times a second, and a file or pipe gets
    one line for each trial that ends. What was drawn stays there after `stop`. A pickled copy knows of which trials was
    told, and starts its clock anew.
    """

    def __init__(self, console: Console | None = None):
        self._console = console
        self._live: Live | None = None
        self._sweep: Sweep | None = None
        self._told: set[str] = set()
        self._start: tuple[float, float] | None = None

    def update(self, sweep: Sweep) -> None:
        """Show this state."""
        self._sweep = replace(sweep, trials=list(sweep.trials))  # drawn by another thread while its owner goes on
        if self._start is None:
            # Trials that ended before a resume say nothing about the time that trials take.
            self._start = time.monotonic(), _done(sweep)
        if self._console is None:
            # Left to itself, rich would draw into files where FORCE_COLOR is set.
            self._console = Console(stderr=True, force_terminal=sys.stderr.isatty())
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            self._tell()
        elif self._live is None:
            # Standard output is left alone: it may carry the one object of `--json`.
            self._live = Live(
                get_renderable=self._draw, console=self._console, refresh_per_second=4, redirect_stdout=False
            )
            self._live.start()

    def stop(self) -> None:
        """Draw the last state and leave it there; nothing where nothing was drawn."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __getstate__(self) -> dict:
        # Consoles and threads belong to their process, and so does its clock.
        return self.__dict__ | {"_console": None, "_live": None, "_start": None}

    def _tell(self) -> None:
        sweep, left = self._sweep, self._left()
        for trial in sweep.trials:
            if trial.status in ENDED and trial.id not in self._told:
                self._told.add(trial.id)
                line = f"trial {trial.number} {trial.status}: {_outcome(sweep, trial)}, {_ended(sweep)}/{sweep.asked}"
                if left != "–" and _ended(sweep) < sweep.asked:
                    line += f", {'' if left.startswith('<') else 'about '}{left} left"
                self._console.print(Text(line), soft_wrap=True)

    def _draw(self) -> Group:
        return Group(self._progress(), _table(self._sweep, self._console.width, self._console.height))

    def _progress(self) -> Text:
        sweep, ranked = self._sweep, self._sweep.ranked()
        counts = Counter(trial.status for trial in sweep.trials)
        parts = [f"{_ended(sweep)}/{sweep.asked} trials"]
        parts += [f"{counts[status]} {status}" for status in ("stopped", "failed") if counts[status]]
        if ranked:
            parts.append(f"best {sweep.objective} {_best(sweep, ranked[0]):.3f} (trial {ranked[0].number})")
        parts.append(f"{_duration(time.monotonic() - self._start[0])} so far")
        if _ended(sweep) < sweep.asked:
            parts.append(f"{self._left()} left")
        return Text(" · ".join(parts), style="bold")

    def _left(self) -> str:
        """At the speed of this process so far; a dash before there is one."""
        start, before = self._start
        done = _done(self._sweep)
        if done <= before:
            return "–"
        return _duration((time.monotonic() - start) * max(self._sweep.asked - done, 0) / (done - before))


def _table(sweep: Sweep, width: int, height: int) -> Table:
    """The trials that matter most now, best first: the best, and those that run."""
    ranked = sweep.ranked()
    running = [t for t in ranked if t.status == "running"]
    running += [t for t in sweep.trials if t.status == "running" and not t.history]
    ended = [t for t in ranked if t.status != "running"]
    rows = max(1, min(ROWS, height - AROUND))
    ended = ended[: max(1, rows - len(running))]
    shown = ended + running[: rows - len(ended)]
    place = {trial.id: i for i, trial in enumerate(ranked)}
    shown.sort(key=lambda trial: place.get(trial.id, len(ranked)))

    searched = columns(sweep.dimensions)
    header = ["trial", "status", "epoch", sweep.objective, "best", *searched]
    cells = [_cells(sweep, trial) + [_cut(value(trial, names)) for names in searched.values()] for trial in shown]
    widths = [max(cell_len(row[i]) for row in [header, *cells]) + GAP for i in range(len(header))]
    fitting = max(i for i in range(1, len(header) + 1) if i == 1 or sum(widths[:i]) <= width)

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, GAP - 1, 0, 0), header_style="dim")
    for name in header[:fitting]:
        table.add_column(Text(name), no_wrap=True, justify="left" if name in ("status", *searched) else "right")
    for trial, row in zip(shown, cells, strict=True):
        row = [Text(cell) for cell in row[:fitting]]
        row[1:2] = [Text(cell.plain, COLOURS.get(trial.status, "")) for cell in row[1:2]]
        table.add_row(*row, style="bold" if place.get(trial.id) == 0 else "")
    return table


def _cells(sweep: Sweep, trial: Trial) -> list[str]:
    if not trial.history:
        return [str(trial.number), trial.status, "–", "–", "–"]
    latest, epochs = trial.history[-1], _epochs(sweep, trial)
    epoch = f"{latest['epoch']:g}" + (f"/{epochs}" if epochs else "")
    return [str(trial.number), trial.status, epoch, f"{latest[sweep.objective]:.3f}", f"{_best(sweep, trial):.3f}"]


def _outcome(sweep: Sweep, trial: Trial) -> str:
    if trial.status == "failed":
        return reason(trial)
    if not trial.history:
        return "it reported nothing"
    best = sweep.ranked()[0]
    score = f"{sweep.objective} {_best(sweep, trial):.3f}"
    return f"{score} (best {_best(sweep, best):.3f}, trial {best.number})"


def _best(sweep: Sweep, trial: Trial) -> float:
    return trial.best(sweep.objective)[sweep.objective]


def _ended(sweep: Sweep) -> int:
    return sum(trial.status in ENDED for trial in sweep.trials)


def _done(sweep: Sweep) -> float:
    """Trials that ended, and the part done of those that run."""
    done = float(_ended(sweep))
    for trial in sweep.trials:
        epochs = _epochs(sweep, trial)
        if trial.status == "running" and trial.history and epochs:
            done += min(1, trial.history[-1]["epoch"] / epochs)
    return done


def _epochs(sweep: Sweep, trial: Trial) -> Any:
    """Of a whole trial, which can be searched as well; None where nobody knows."""
    return trial.params.get("training.epochs", sweep.facts.get("epochs"))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 60:
        return "<1 min"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


# --- words that the page uses as well --------------------------------------------------------------------


def columns(dimensions: Sequence[Dimension]) -> dict[str, list[str]]:
    """Short headings for the searched parameters, each with the names of the dimensions that it stands for.

    What two choices have each of their own, like `loss.ArcFaceLoss.margin` and `loss.CosFaceLoss.margin`, shares one
    heading, as no trial has both. A heading has as many of the last parts of a name as tell it from the others.
    """
    owned: dict[str, list[str]] = {}
    for dimension in dimensions:
        name = dimension.name
        for parent in sorted((d for d in dimensions if d.choices), key=lambda d: -len(d.name)):
            for choice in parent.choices:
                if name.startswith(f"{parent.name}.{choice}."):
                    name = parent.name + name.removeprefix(f"{parent.name}.{choice}")
        owned.setdefault(name, []).append(dimension.name)
    tails = {name: [".".join(name.split(".")[-n:]) for n in range(1, name.count(".") + 2)] for name in owned}
    taken = Counter(tail for each in tails.values() for tail in each)
    return {next((t for t in tails[name] if taken[t] == 1), name): names for name, names in owned.items()}


def value(trial: Trial, names: Sequence[str]) -> str:
    """What a trial has for the dimensions of one heading; a dash where it has none."""
    return next((written(trial.params[name]) for name in names if name in trial.params), "–")


def written(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def reason(trial: Trial) -> str:
    """The line of its error that says why a trial failed: of a traceback that is the last, without colours."""
    lines = [line.strip() for line in Text.from_ansi(trial.error or "").plain.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
