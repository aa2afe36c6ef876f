"""What two levels buy: a sweep against a plain Tune grid over margin × scale × threshold, with the same training.

python benchmarks/sweep.py [--data DIR] [--epochs 20] [--only grid|overhead|combinations]

Without --data the digits of scikit-learn are used (known 0–4, pseudo-unknown 5 and 6). Three figures, each a ratio of
two measurements in one run:

grid          wall time until a sweep reports a validation OSCR as good as the best of the whole grid, over the time
              of the grid. Both train the same network on the same items, one CPU a trial; the grid does what a
              script does: nearest centroid, a fixed τ.
combinations  detector × threshold combinations judged a second inside a trial, over as trials of their own.
overhead      time of a trial, judging, checkpoints and reports included, over bare training for as many epochs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import ray
import torch
from PIL import Image
from ray import tune
from sklearn.datasets import load_digits

from osml_plugin import UNKNOWN, thresholds
from osml_plugin.config import load_config
from osml_plugin.data import Split, draw_split, open_items
from osml_plugin.detectors import create
from osml_plugin.metrics import open_set_metrics
from osml_plugin.training_run import TrainingRun
from osml_plugin.tune import make_tuner, prepare, settings_of
from osml_plugin.tune.folds import SweepData, share
from osml_plugin.tune.judging import Embedded, judge
from osml_plugin.tune.recorder import Recorder
from osml_plugin.tune.results import Sweep

MARGINS, SCALES, TAUS = (5, 15, 25, 35), (8, 16, 32), (0.2, 0.3, 0.4, 0.5, 0.6)
DIGITS = Split(("0", "1", "2", "3", "4"), ("5", "6"), ("7", "8", "9"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--only", choices=("grid", "overhead", "combinations"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        room = Path(room)
        source = options.data or write_digits(room / "digits")
        split = DIGITS if options.data is None else draw_split(open_items(source).class_names(), seed=0)
        settings = settings_of(
            {
                "trials": 12,
                "folds": 1,
                "config": {
                    "training": {"epochs": options.epochs, "batch_size": 64},
                    "model": {"trunk": {"name": "small_cnn", "width": 32}},
                    "loss": {"name": "ArcFaceLoss", "margin": MARGINS[0], "scale": SCALES[0]},
                },
                "space": {
                    "loss": {
                        "name": "ArcFaceLoss",
                        "margin": {"uniform": [min(MARGINS), max(MARGINS)]},
                        "scale": {"loguniform": [min(SCALES), max(SCALES)]},
                    }
                },
            }
        )
        job = prepare(source, settings, split=split)
        data = share(job.data, settings.config)
        os.environ.update(RAY_AIR_NEW_OUTPUT="0", RAY_USAGE_STATS_ENABLED="0")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        try:
            if options.only in (None, "combinations"):
                combinations(data, job.plan)
            if options.only in (None, "overhead"):
                overhead(data, job.plan, room)
            if options.only in (None, "grid"):
                grid(data, job.plan, room)
        finally:
            ray.shutdown()


def write_digits(folder: Path) -> Path:
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / str(label) / f"{i:04d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(place)
    return folder


def plain_trial(params: dict, data: SweepData, epochs: int) -> None:
    """What a script does in a grid: train, nearest centroid, a fixed threshold."""
    torch.set_num_threads(1)
    config = load_config(
        overrides=[
            f"training.epochs={epochs}",
            "training.batch_size=64",
            "model.trunk={name: small_cnn, width: 32}",
            f"loss={{name: ArcFaceLoss, margin: {params['margin']}, scale: {params['scale']}}}",
        ]
    )
    run = TrainingRun(data.of_fold(data.folds[0], config), config, progress=False)
    for _ in range(run.n_epochs):
        run.advance()
    embedded, labels = run.embed()["embedder"].embeddings, run.data.labels
    classes, scores = create("centroid").fit(embedded["train"], labels["train"]).predict(embedded["validation"])
    rejected = thresholds.create("fixed", tau=params["tau"]).fit(scores.numpy()).decide(scores.numpy())
    metrics = open_set_metrics(scores.numpy(), labels["validation"], classes.numpy(), rejected)
    tune.report({"oscr": metrics.oscr, "macro_f1": metrics.macro_f1})


def plain_grid(data: SweepData, epochs: int, room: Path, name: str, **space: tuple) -> tuple[float, tune.ResultGrid]:
    """Seconds, and results, of the whole grid."""
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(plain_trial, data=data, epochs=epochs), {"CPU": 1}),
        param_space={key: tune.grid_search(list(values)) for key, values in space.items()},
        tune_config=tune.TuneConfig(metric="oscr", mode="max", reuse_actors=True),
        run_config=tune.RunConfig(name=name, storage_path=str(room), verbose=0),
    )
    began = perf_counter()
    results = tuner.fit()
    return perf_counter() - began, results


def grid(data: SweepData, plan, room: Path) -> None:
    seconds, results = plain_grid(data, plan.epochs, room, "grid", margin=MARGINS, scale=SCALES, tau=TAUS)
    goal = max(r.metrics["oscr"] for r in results)
    print(f"\ngrid: {len(results)} trials of {plan.epochs} epochs, best validation OSCR {goal:.4f} in {seconds:.1f} s")
    times = []
    for seed in range(2):
        journal = room / f"trials-{seed}.jsonl"
        blank = Sweep([], plan.space.dimensions, "oscr", plan.settings.trials)
        reached: list[float] = []

        def watch(sweep: Sweep, trial, reached=reached) -> None:
            if trial.history and trial.history[-1]["oscr"] >= goal:
                reached.append(perf_counter())

        Recorder.current = Recorder(journal, blank, plan.epochs_of, [watch])
        tuner = make_tuner(data, plan, storage=room, name=f"sweep-{seed}")
        began = perf_counter()
        tuner.fit()
        whole = perf_counter() - began
        best = Recorder.current.sweep.ranked()[0].best("oscr")["oscr"]
        Recorder.current = None
        times.append(reached[0] - began if reached else float("inf"))
        print(
            f"sweep {seed}: reached it after {times[-1]:.1f} s; all {plan.settings.trials} trials {whole:.1f} s, "
            f"best {best:.4f}"
        )
    print(f"wall time to the grid's best: {median(times) / seconds:.3f} of the grid's (aim: 0.1; at least 0.2)")


def combinations(data: SweepData, plan) -> None:
    config = plan.settings.config
    torch.set_num_threads(1)
    run = TrainingRun(data.of_fold(data.folds[0], config), config, progress=False)
    run.advance()
    folds = [Embedded(run.embed(), run.data.labels)]
    seconds = []
    for _ in range(5):
        began = perf_counter()
        judged = judge(folds, plan.detectors(config), plan.rules(config))
        seconds.append(perf_counter() - began)
    inside = judged.n_combinations / median(seconds)
    with tempfile.TemporaryDirectory() as room:
        plain_grid(data, 1, Path(room), "warm", margin=(5, 6), scale=(8,), tau=(0.2,))
        took, results = plain_grid(data, plan.epochs, Path(room), "one", margin=(5, 25), scale=(16,), tau=TAUS)
    apart = len(results) / took
    n_unknown = int((run.data.labels["validation"] == UNKNOWN).sum())
    print(
        f"\ncombinations: {judged.n_combinations} judged in {median(seconds):.2f} s ({inside:,.0f} a second) on "
        f"{len(run.data.labels['validation'])} validation items ({n_unknown} unknown); as trials of their own "
        f"{apart:.2f} a second, two at a time: {inside / apart:,.0f} ×"
    )


def overhead(data: SweepData, plan, room: Path) -> None:
    """One trial at a time, the second and third of three: the first one imports everything."""
    config = plan.settings.config
    torch.set_num_threads(1)
    bare = []
    for _ in range(2):
        run = TrainingRun(data.of_fold(data.folds[0], config), config, progress=False)
        began = perf_counter()
        for _ in range(run.n_epochs):
            run.advance()
        bare.append(perf_counter() - began)
    settings = plan.settings.model_copy(update={"trials": 3, "search": "random", "scheduler": "none", "concurrent": 1})
    plan = type(plan)(settings, plan.space, plan.epochs)
    journal = room / "overhead.jsonl"
    Recorder.current = Recorder(journal, Sweep([], plan.space.dimensions, "oscr", 3), plan.epochs_of)
    make_tuner(data, plan, storage=room, name="overhead").fit()
    Recorder.current = None
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    walls, parts = [], {"train": [], "embed": [], "judge": []}
    for trial in list(dict.fromkeys(e["id"] for e in entries))[1:]:
        of = [e for e in entries if e["id"] == trial]
        walls.append(of[-1]["time"] - of[0]["time"])
        for part, found in parts.items():
            found.append(sum(e["figures"][f"{part}_seconds"] for e in of if "figures" in e))
    shares = {part: median(found) for part, found in parts.items()}
    rest = median(walls) - sum(shares.values())
    print(
        f"\noverhead: a trial takes {median(walls):.2f} s (training {shares['train']:.2f}, embedding "
        f"{shares['embed']:.2f}, judging {shares['judge']:.2f}, reports and the rest {rest:.2f}) where bare training "
        f"takes {median(bare):.2f} s: {median(walls) / median(bare) - 1:+.1%} (aim: under 10 %)"
    )


if __name__ == "__main__":
    main()
