"""The whole line on real images, in under three minutes: what `make demo` runs.

scikit-learn's digits: five are known, two are pseudo-unknown (held out to choose by), two are unknown and come in
unannounced, and one more comes only after these have been learned. Sweep, register and promote the winner, test, group
the rejected, enrol what was found, test again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from osml_plugin import UNKNOWN
from osml_plugin.bundle import load_bundle
from osml_plugin.data import Split, open_items, test_indices
from osml_plugin.discovery import Discovery
from osml_plugin.evaluation import Evaluation, evaluate_embeddings
from osml_plugin.metrics import DiscoveryMetrics, discovery_metrics
from osml_plugin.report import Page, add_evaluation, summary
from osml_plugin.tracking import download_bundle
from osml_plugin.tune import promote, sweep

SPLIT = Split(known=("0", "1", "2", "3", "4"), pseudo_unknown=("5", "6"), unknown=("7", "8", "9"))
NEVER_MET = "9"
"""This digit comes only after the others have been learned: it has to stay unknown."""
SWEEP = {
    "trials": 6,
    "folds": 2,
    "config": {
        "model": {"trunk": {"name": "small_cnn", "width": 64}},
        "miner": {"name": "MultiSimilarityMiner", "epsilon": 0.1},
        "training": {"epochs": 20, "batch_size": 64},
    },
    "space": {
        "loss": {"name": "ArcFaceLoss", "margin": {"uniform": [5, 40]}, "scale": {"loguniform": [8, 64]}},
        "optimizer": {"lr": {"loguniform": [5e-4, 8e-3]}},
    },
}
MODEL = "digits"
"""Its name in the registry."""


@dataclass(frozen=True)
class Found:
    """The groups among what was rejected, and the name that a person gave each after a look at its exemplars."""

    items: np.ndarray
    """Indices, among the items met, of those rejected."""
    groups: Discovery
    names: list[str]
    metrics: DiscoveryMetrics


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for images, bundle and page")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    console, start, out = Console(), time.monotonic(), options.out
    if out.exists():
        if not (out / "report.html").exists() and not (out / "data").is_dir():
            arguments.error(f"'{out}' exists and is not of an earlier demo: choose another --out")
        for made in ("data", "sweep", "learned", "mlartifacts"):
            shutil.rmtree(out / made, ignore_errors=True)
        for made in out.glob("mlflow.db*"):
            made.unlink()
    write_digits(out / "data")
    store = f"sqlite:///{out.resolve()}/mlflow.db"
    os.environ["MLFLOW_TRACKING_URI"] = store

    console.print(f"[bold]1[/] sweeping on the digits {', '.join(SPLIT.known)}: margin, scale and learning rate")
    swept = sweep(out / "data", out / "sweep", split=SPLIT, config=SWEEP, seed=options.seed, register=MODEL)
    best, figures = swept["best"], swept["validation"]
    drawn = ", ".join(f"{name} {value:.3g}" for name, value in best["params"].items())
    console.print(
        f"[bold]2[/] of {swept['trials']} trials ({swept['stopped']} stopped early), on validation with digits held "
        f"out, the best: {drawn}; of {figures['combinations']} detectors and thresholds: {best['chosen']['detector']} "
        f"{best['chosen']['params'] or ''} (OSCR {figures['oscr']:.3f})"
    )
    promoted = promote(MODEL, progress=False)
    champion = f"models:/{MODEL}@champion"
    console.print(f"[bold]3[/] {champion} is version {promoted.version}: {promoted.reason}")
    recognizer = load_bundle(download_bundle(champion))

    items = open_items(out / "data")
    seen = np.array(recognizer.details["seen"], dtype=np.uint64)
    items = items.select(test_indices(items, SPLIT.known, SPLIT.pseudo_unknown, seen=seen))
    embeddings = recognizer.embed(items.paths, progress="embedding the test images")
    labels = np.array(items.labels)
    first = np.random.default_rng(options.seed).random(len(items)) < 0.5  # half is met now, half later
    met = np.flatnonzero(first & (labels != NEVER_MET))
    later = np.flatnonzero(~first)

    before = evaluate_embeddings(recognizer, embeddings[met], labels[met], seed=options.seed)
    console.print(f"[bold]4[/] met {len(met)} new images, {before.metrics.n_unknown_items} of them of unknown digits")
    found = group_the_rejected(recognizer, embeddings[met], before, options.seed)
    console.print(f"[bold]5[/] grouped the {len(found.items)} rejected: {found.groups.n_classes} groups")
    names = dict.fromkeys(found.names)
    for name in names:
        members = np.isin(found.groups.labels, [g for g, n in enumerate(found.names) if n == name])
        recognizer.enroll(name, embeddings[met][found.items[members]])
    recognizer.save(out / "learned")
    console.print(f"[bold]6[/] enrolled, without training: {', '.join(names)}")

    after = evaluate_embeddings(recognizer, embeddings[later], labels[later], seed=options.seed)
    rows = rows_of(before, after, found)
    write_page(out / "report.html", rows, (before, met), (after, later), found, items.paths)
    table = Table("", "before", "after enrolment", title="Open-set recognition of digits")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"pages   {out / 'report.html'}, of the sweep {swept['report']}\nbundle  {out / 'learned'}")
    console.print(f"runs    mlflow ui --backend-store-uri {store}")
    console.print(f"took    {time.monotonic() - start:.0f} s")


def write_digits(folder: Path) -> None:
    """scikit-learn's digits as `folder/<class>/*.png`."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / str(label) / f"{i:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(place)


def group_the_rejected(recognizer, embeddings, before: Evaluation, seed: int) -> Found:
    rejected = np.flatnonzero(before.recognition.labels == UNKNOWN)
    groups = recognizer.group(embeddings[rejected], seed=seed)
    true = np.array(before.names)[rejected]
    # A person would look at each group's exemplars and say what they are; here their labels stand in for that.
    names = [Counter(true[exemplars].tolist()).most_common(1)[0][0] for exemplars in groups.exemplars]
    unknown = before.labels[rejected] == UNKNOWN
    return Found(rejected, groups, names, discovery_metrics(true[unknown], groups.labels[unknown]))


def rows_of(before: Evaluation, after: Evaluation, found: Found) -> list[tuple[str, str, str]]:
    """The table that a person understands."""
    b, a = before.metrics, after.metrics
    old = np.isin(after.names, SPLIT.known)
    new = np.isin(after.names, list(set(found.names) - set(SPLIT.known)))
    answers, true = np.array(after.recognition.names, dtype=object), np.array(after.names, dtype=object)

    def rate(of: np.ndarray, right: np.ndarray) -> str:
        return f"{right[of].mean():.1%}" if of.any() else "–"

    known, was_right = before.labels != UNKNOWN, before.recognition.labels == before.labels
    return [
        ("known classes", str(len(SPLIT.known)), str(len(set(SPLIT.known) | set(found.names)))),
        ("known accuracy (nearest class)", f"{b.closed_set_accuracy:.1%}", f"{a.closed_set_accuracy:.1%}"),
        (f"known rejected (asked for: {before.alpha:.0%})", f"{b.known_rejected:.1%}", f"{a.known_rejected:.1%}"),
        (
            f"unknown rejected (after: the {NEVER_MET}, never met)",
            f"{b.unknown_rejected:.1%}",
            f"{a.unknown_rejected:.1%}" if a.n_unknown_items else "–",
        ),
        ("AUROC", f"{b.auroc:.3f}", f"{a.auroc:.3f}"),
        ("OSCR", f"{b.oscr:.3f}", f"{a.oscr:.3f}"),
        ("classes found / true", f"{found.groups.n_classes} / {found.metrics.n_classes_true}", ""),
        ("accuracy of the grouping", f"{found.metrics.accuracy:.1%}", ""),
        ("old classes recognised by name", rate(known, was_right), rate(old, answers == true)),
        ("new classes recognised by name", "0.0%", rate(new, answers == true)),
    ]


def write_page(file: Path, rows, before, after, found: Found, paths) -> None:
    (before, met), (after, later) = ((e, [paths[i] for i in of]) for e, of in (before, after))
    page = Page(
        "Open-set recognition of digits",
        f"A model that was trained on the digits {', '.join(SPLIT.known)} met others. It rejected them, grouped what "
        f"it had rejected, learned the groups under their names ({', '.join(dict.fromkeys(found.names))}) without "
        "training, and was tested again on new images.",
    )
    page.add_table("Before and after", ("", "before", "after enrolment"), rows)
    cards = [
        (
            f"Group {g}, {int((found.groups.labels == g).sum())} images: named {name}",
            [(met[found.items[i]], before.names[found.items[i]]) for i in exemplars],
        )
        for g, (name, exemplars) in enumerate(zip(found.names, found.groups.exemplars, strict=True))
    ]
    page.add_images("What was rejected, grouped", cards, "The most typical of each group, with their true class.")
    page.add_chapter("Before enrolment", summary(before))
    add_evaluation(page, before, met)
    page.add_chapter("After enrolment", summary(after))
    add_evaluation(page, after, later)
    page.write(file)


if __name__ == "__main__":
    main()
