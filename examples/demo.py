"""The whole line on real images, in under four minutes: what `make demo` runs.

scikit-learn's digits: five are known, two are pseudo-unknown (held out to choose by), two are unknown and come in
unannounced, and one more comes only after these have been learned. Sweep, register, promote and serve the winner; then,
over HTTP, recognise, group the rejected, name the groups, and recognise what was named. At last the endpoint is stopped
and what it has learned is tested.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

from osml_plugin import UNKNOWN
from osml_plugin.bundle import load_bundle
from osml_plugin.data import Split, open_items, test_indices
from osml_plugin.evaluation import Evaluation, evaluate_embeddings
from osml_plugin.metrics import DiscoveryMetrics, discovery_metrics
from osml_plugin.report import Page, add_evaluation, summary
from osml_plugin.serve import learned
from osml_plugin.serve.client import Client
from osml_plugin.serve.schemas import GroupOut
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
    """The groups that the endpoint proposed, and the name that a person gave each after a look at its exemplars."""

    groups: list[GroupOut]
    exemplars: list[list[int]]
    """Of each group, indices among the items met."""
    names: list[str]
    metrics: DiscoveryMetrics


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for images, models and page")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--keep", action="store_true", help="leave the endpoint running")
    options = arguments.parse_args()
    console, start, out = Console(), time.monotonic(), options.out
    if out.exists():
        if not (out / "report.html").exists() and not (out / "data").is_dir():
            arguments.error(f"'{out}' exists and is not of an earlier demo: choose another --out")
        stop_endpoint(out)
        for made in ("data", "sweep", "learned", "mlartifacts", "endpoint"):
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

    items = open_items(out / "data")
    recognizer = load_bundle(download_bundle(champion))
    seen = np.array(recognizer.details["seen"], dtype=np.uint64)
    items = items.select(test_indices(items, SPLIT.known, SPLIT.pseudo_unknown, seen=seen))
    labels = np.array(items.labels)
    first = np.random.default_rng(options.seed).random(len(items)) < 0.5  # half is met now, half later
    met = np.flatnonzero(first & (labels != NEVER_MET))
    later = np.flatnonzero(~first)

    with endpoint(champion, out / "endpoint", keep=options.keep) as address, Client(address) as client:
        served = client.model()
        console.print(f"[bold]4[/] {served.model_version} is served: {address}/docs")
        found = use(console, client, [items.paths[i] for i in met], labels[met], options.seed)
        following = next(i for i in later if labels[i] == found.names[0])
        answer = client.recognize(items.paths[following]).results[0]
        console.print(f"[bold]8[/] the next image of a {labels[following]} comes back as {answer.label or 'unknown'}")

    # The memory is the store's, not the process's: it is read again where the endpoint has ended.
    after_serving = learned(out / "endpoint")
    after_serving.save(out / "learned")
    embeddings = recognizer.embed(items.paths, progress="embedding the test images")
    before = evaluate_embeddings(recognizer, embeddings[met], labels[met], seed=options.seed)
    after = evaluate_embeddings(after_serving, embeddings[later], labels[later], seed=options.seed)
    rows = rows_of(before, after, found)
    write_page(out / "report.html", rows, (before, met), (after, later), found, items.paths)
    table = Table("", "before", "after enrolment", title="Open-set recognition of digits")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"pages   {out / 'report.html'}, of the sweep {swept['report']}\nbundle  {out / 'learned'}")
    console.print(f"runs    mlflow ui --backend-store-uri {store}")
    if options.keep:
        console.print(f"serving {address}/docs, until: kill {pid_of(out)}")
    else:
        console.print(f"serve   osml serve --home {out / 'endpoint'}")
    console.print(f"took    {time.monotonic() - start:.0f} s")


def use(console: Console, client: Client, paths: list[Path], labels: np.ndarray, seed: int) -> Found:
    """What a user does over HTTP: have images recognised, the unknown grouped, and name the groups."""
    place, n_unknown = {}, 0
    for begin in track(range(0, len(paths), 32), "recognising over HTTP", console=console, transient=True):
        for i, result in enumerate(client.recognize(paths[begin : begin + 32]).results, begin):
            n_unknown += not result.known
            if result.observation_id is not None:
                place[result.observation_id] = i
    unknown = int((~np.isin(labels, SPLIT.known)).sum())
    console.print(
        f"[bold]5[/] sent {len(paths)} new images, {unknown} of them of unknown digits: {n_unknown} are unknown to it"
    )
    proposed = client.discover(seed=seed)
    console.print(f"[bold]6[/] asked what these are: {proposed.n_classes} groups")
    groups, names, exemplars, true, assigned = proposed.groups, [], [], [], []
    for group in groups:
        inside = [place[i] for i in client.members(proposed.id, group.group).members]
        true += labels[inside].tolist()
        assigned += [group.group] * len(inside)
        exemplars.append([place[i] for i in group.exemplars])
        # A person would look at the exemplars and say what they are; here their labels stand in for that.
        names.append(Counter(labels[exemplars[-1]].tolist()).most_common(1)[0][0])
    for group, name in zip(groups, names, strict=True):
        client.accept(proposed.id, group.group, name)
    console.print(f"[bold]7[/] named them, and so taught them, without training: {', '.join(dict.fromkeys(names))}")
    new = ~np.isin(true, SPLIT.known)
    metrics = discovery_metrics(np.array(true)[new], np.array(assigned)[new])
    return Found(groups, exemplars, names, metrics)


@contextmanager
def endpoint(model: str, home: Path, keep: bool) -> Iterator[str]:
    """`osml serve`, as on a command line of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "osml_plugin", "serve", model, "--home", home.resolve(), "--port", str(port)]
    with open(home / "output.txt", "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    (home / "pid").write_text(str(server.pid))
    address, ready = f"http://127.0.0.1:{port}", False
    try:
        with Client(address, retries=0) as client:
            while not client.ready():
                if server.poll() is not None:
                    raise SystemExit((home / "output.txt").read_text())
                time.sleep(0.2)
        yield address
        ready = True
    finally:
        if not (keep and ready):
            server.terminate()
            server.wait(timeout=60)
            (home / "pid").unlink()


def pid_of(out: Path) -> int | None:
    """Of the endpoint of an earlier demo in this folder, if it still runs: it was kept, or the demo was cut off."""
    try:
        pid = int((out / "endpoint" / "pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if os.fsencode((out / "endpoint").resolve()) in words else None


def stop_endpoint(out: Path) -> None:
    pid, end = pid_of(out), time.monotonic() + 60
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
    while pid_of(out) is not None and time.monotonic() < end:
        time.sleep(0.1)


def write_digits(folder: Path) -> None:
    """scikit-learn's digits as `folder/<class>/*.png`."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / str(label) / f"{i:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(place)


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
        ("classes found / true", f"{len(found.groups)} / {found.metrics.n_classes_true}", ""),
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
        "training while it was served, and was tested again on new images.",
    )
    page.add_table("Before and after", ("", "before", "after enrolment"), rows)
    cards = [
        (
            f"Group {group.group}, {group.size} images: named {name}",
            [(met[i], before.names[i]) for i in exemplars],
        )
        for group, name, exemplars in zip(found.groups, found.names, found.exemplars, strict=True)
    ]
    page.add_images("What was rejected, grouped", cards, "The most typical of each group, with their true class.")
    page.add_chapter("Before enrolment", summary(before))
    add_evaluation(page, before, met)
    page.add_chapter("After enrolment", summary(after))
    add_evaluation(page, after, later)
    page.write(file)


if __name__ == "__main__":
    main()
