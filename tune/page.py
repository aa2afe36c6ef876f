"""The page of a sweep: what won, how the search went, and what mattered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from osml_plugin.report import Page
from osml_plugin.report.evaluation import MEANING

from . import pictures
from .live import columns, reason, value, written
from .results import Sweep, Trial

SHOWN_TRIALS = 10
SHOWN_BRANCHES = 6
SHOWN_PARAMETERS = 6
NO_BREAK = "\N{NO-BREAK SPACE}"


def write_page(path: str | Path, sweep: Sweep, best: dict[str, Any] | None = None) -> None:
    """Write the page of a sweep: one self-contained HTML file.

    Args:
        path: where to; what is there is replaced.
        sweep: it may still run.
        best: the figures of the winner by name, `{"validation": {...}, "test": {...}}`, a test as `Evaluation.to_dict`
            gives it, or None; those that have a plain sentence are shown.

    Raises:
        OsmlError: the page cannot be written.
    """
    page = Page("Sweep", summary(sweep, best or {}))
    if best:
        _winner(page, best)
    parts = (_best_trials, _search, _space, _trade_off, _learning, _mattered, _failed, _facts)
    for part in tqdm(parts, desc="page of the sweep", unit="part", leave=False):
        part(page, sweep)
    page.write(path)


# --- the parts, in order ---------------------------------------------------------------------------------


def _winner(page: Page, best: dict[str, Any]) -> None:
    validation, test = best.get("validation") or {}, best.get("test") or {}
    test = test | (test.get("discovery") or {})
    figures = [name for name in MEANING if name in validation or name in test]
    rows = [(name, validation.get(name), test.get(name), MEANING[name].format(asked="")) for name in figures]
    note = "It was chosen on validation, so only the figures on test are free of that choice."
    header = ("figure", "validation", "test", "in plain words")
    page.add_table("The winner, on validation and once on test", header, rows, note)


def _best_trials(page: Page, sweep: Sweep) -> None:
    shown, searched = sweep.ranked()[:SHOWN_TRIALS], columns(sweep.dimensions)
    figures = list(dict.fromkeys([sweep.objective, "auroc", "oscr"]))
    rows = []
    for trial in shown:
        entry = trial.best(sweep.objective)
        parts = [trial.number, *(entry.get(name) for name in figures), int(trial.history[-1]["epoch"]), trial.status]
        rows.append(
            [*parts, _detector(trial).replace(" ", NO_BREAK), *(value(trial, names) for names in searched.values())]
        )
    note = f"Ranked by {sweep.objective} on validation. Figures are those of the best epoch, means over the folds."
    note = note if shown else "No trial has a result."
    page.add_table(
        "Best configurations", ("trial", *figures, "epochs", "status", "chosen detector", *searched), rows, note
    )


def _search(page: Page, sweep: Sweep) -> None:
    if sweep.trials:
        note = (
            "A dot is a trial at its best epoch. A line still rising at the end means that more trials may find more."
        )
        page.add_figure("The run of the search", pictures.search(sweep), note)


def _space(page: Page, sweep: Sweep) -> None:
    groups = pictures.branches(sweep)
    shown = groups[:SHOWN_BRANCHES]
    figures = [pictures.parallel(sweep, name, of) for name, of in shown if of]
    figures = [figure for figure in figures if figure is not None]
    if figures:
        note = f"A line is a trial; the darker, the better its {sweep.objective}; the best one is orange. "
        note += "Lines through one choice are spread, so that one sees how many they are."
        if len(groups) > len(shown):
            note += f" The {len(shown)} best of {len(groups)} branches are shown."
        page.add_figure("The space", figures, note)


def _trade_off(page: Page, sweep: Sweep) -> None:
    figures = pictures.trade_off(sweep)
    if figures:
        note = (
            "What is gained against what it costs on validation, for every threshold at once; the second picture is "
            "the part where a threshold is mostly chosen."
        )
        page.add_figure("Trade-off of the best trials", figures, note)


def _learning(page: Page, sweep: Sweep) -> None:
    figure = pictures.learning(sweep)
    if figure is not None:
        stopped = any(trial.status == "stopped" for trial in sweep.ranked())
        note = "Grey ones were stopped early, as they fell behind." if stopped else ""
        page.add_figure("Learning curves", figure, note)


def _mattered(page: Page, sweep: Sweep) -> None:
    groups = pictures.branches(sweep)
    if len(groups) > 1:
        groups = [("", sweep.ranked()), *groups[:SHOWN_BRANCHES]]
    figures = []
    for name, trials in groups:
        if shares := pictures.importances(sweep, trials):
            figures.append(pictures.importance(sweep, shares, f"{name or 'all trials'} ({len(trials)})"))
    if figures:
        note = f"How much of the differences in {sweep.objective} between trials each parameter explains, in the range "
        note += "that was searched, as a random forest tells it. Rough where trials are few."
        page.add_figure("What mattered", figures, note)
    else:
        page.add_table("What mattered", (), (), _why_not(sweep))


def _why_not(sweep: Sweep) -> str:
    ended = sum(trial.status in ("finished", "stopped") for trial in sweep.ranked())
    if ended < pictures.FEWEST:
        return f"It takes {pictures.FEWEST} trials with a result to tell what mattered; there are {ended}."
    if len(sweep.dimensions) < 2:
        return "There is nothing to compare where only one parameter was searched."
    return "The trials that ended do not differ enough to tell what mattered."


def _failed(page: Page, sweep: Sweep) -> None:
    rows = [(t.number, reason(t), ", ".join(_drawn(sweep, t))) for t in sweep.trials if t.status == "failed"]
    if rows:
        page.add_table("Failed trials", ("trial", "error", "parameters"), rows, "They are in no picture of results.")


def _facts(page: Page, sweep: Sweep) -> None:
    if sweep.facts:
        page.add_table("Facts", ("fact", "value"), list(_flat(sweep.facts)))


# --- words -----------------------------------------------------------------------------------------------


def summary(sweep: Sweep, best: dict[str, Any]) -> str:
    """What won and how the trials ended, in a few sentences."""
    counts, ranked, name = Counter(trial.status for trial in sweep.trials), sweep.ranked(), sweep.objective
    ends = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "still running"}
    said = ", ".join(f"{counts[status]} {words}" for status, words in ends.items() if counts[status])
    trials = f"{sweep.asked} trial{'s' if sweep.asked != 1 else ''} asked for: {said or 'none has begun'}."
    if not ranked:
        return f"No trial has a result. {trials}"
    first = ranked[0]
    lead = f"The best {name} on validation is {first.best(name)[name]:.4f}, of trial {first.number}"
    what = _drawn(sweep, first)
    if (more := len(what) - SHOWN_PARAMETERS) > 0:
        what[SHOWN_PARAMETERS:] = [f"{more} more below"]
    if first.chosen:
        what.append(f"detector {_detector(first)}")
    if what:
        lead += f": {', '.join(what)}"
    tested = (best.get("test") or {}).get(name)
    return f"{lead}. {'' if tested is None else f'On test it is {tested:.4f}. '}{trials}"


def _drawn(sweep: Sweep, trial: Trial) -> list[str]:
    """What was drawn for it: "margin 0.3"."""
    drawn = {heading: value(trial, names) for heading, names in columns(sweep.dimensions).items()}
    return [f"{heading} {text}" for heading, text in drawn.items() if text != "–"]


def _detector(trial: Trial) -> str:
    """What the inner search chose: "knn (k 5) on embedding"."""
    chosen = trial.chosen or {}
    if not chosen.get("detector"):
        return "–"
    params = ", ".join(f"{name} {written(of)}" for name, of in (chosen.get("params") or {}).items())
    output = f" on {chosen['output']}" if chosen.get("output") else ""
    return chosen["detector"] + (f" ({params})" if params else "") + output


def _flat(facts: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Facts within facts under joined names, numbered where they are many."""
    for name, fact in facts.items():
        if isinstance(fact, list | tuple) and any(isinstance(part, dict) for part in fact):
            fact = {str(i): part for i, part in enumerate(fact, 1)}
        if isinstance(fact, dict):
            yield from _flat(fact, f"{before}{name}.")
        elif isinstance(fact, list | tuple):
            yield before + name, ", ".join(map(written, fact)) or "–"
        else:
            yield before + name, "–" if fact is None else written(fact)
