"""From data to a registered recogniser by way of many trials: one sweep, whole."""

from __future__ import annotations

import json
import logging
import os
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pyarrow.fs import FileSelector, FileSystem
from ray import tune

from osml_plugin import commands, tracking
from osml_plugin.data import Split
from osml_plugin.errors import OsmlError
from osml_plugin.tracking_names import model_name

from .asked import ASKED, Asked, how_to_resume, resumable, sweep_lock, write_json
from .cluster_session import ray_session
from .folds import share
from .job import Job, check_same, job_of, settings_of
from .live import LiveTable
from .page import write_page
from .recorder import LINES, Recorder
from .results import Sweep, Trial
from .runs import SweepRuns
from .snapshots import FILE as SNAPSHOT
from .snapshots import Snapshots, put_back
from .trial import trainable
from .tuner import make_tuner
from .winner import Winner, find_winner, write_config, write_winner

RESULT, PAGE, BUNDLE, TRIALS = "result.json", "report.html", "best", "trials"
EXPERIMENT = "osml"

logger = logging.getLogger(__name__)


class Interrupted(OsmlError):
    """The sweep was stopped before its trials had ended; it can be resumed."""


def sweep(
    data: str | Path | None,
    out: str | Path,
    *,
    split: str | Path | Split | None = None,
    n_known: int | None = None,
    loss: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
    trials: int | None = None,
    seed: int | None = None,
    alpha: float | None = None,
    address: str | None = None,
    register: str | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Search, make the best recogniser, test it once, and log all of it; returns what `osml tune --json` prints.

    Args:
        data, split, n_known, skip_bad: as for `osml_plugin.train`.
        out: the sweep's folder: all that a resume needs, `best` (the bundle), `best.yaml`, `report.html`.
        loss: its name; with its default space where the configuration names none.
        config: a YAML file with the keys of `SweepConfig`, or its values; `trials`, `seed`, `alpha`, `address` and
            `overrides` (of the training's configuration, such as `training.epochs=20`) win over it.
        register: the registered model's name; the winner becomes its `challenger`.
        resume: go on with the sweep in `out`, with all that it was asked; where there is none, begin.

    Raises:
        OsmlError: for bad input, before anything is trained or written; where no trial came through.
        Interrupted: after Ctrl-C, with everything saved.
    """
    out = Path(out)
    if out.exists() and not resume:
        raise OsmlError(f"'{out}' exists: pass --resume to go on with it, or choose another --out")
    if register is not None:
        register = model_name(register)
    said = {"loss": loss, "trials": trials, "seed": seed, "alpha": alpha, "address": address}
    overrides = list(overrides)
    settings = settings_of(config, overrides=overrides, **said)
    begun, given, before = (out / ASKED).is_file(), tracking.given_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    if begun:
        anything = config is not None or overrides or any(value is not None for value in said.values())
        asked = Asked.read(out).again(out, data, settings if anything else None, register)
    elif data is None:
        raise OsmlError(f"there is no sweep in '{out}' to resume: name the --data to start one")
    else:
        uri = tracking.tracking_uri()
        source = str(Path(data).resolve())
        asked = Asked(uuid.uuid4().hex[:12], source, {}, settings, skip_bad, register, uri, data_fingerprint="")
    os.environ["MLFLOW_TRACKING_URI"] = asked.tracking_uri
    try:
        make = not begun or given is not None  # a store that is gone is not replaced by an empty one unasked
        if (out / RESULT).is_file():
            if data is not None:
                check_same(asked, out, data, progress)
            with sweep_lock(out), resumable(out):
                return _concluded(asked, out, make, progress)
        tracking.check_tracking(asked.tracking_uri, make=make)
        return _swept(asked, out, split, n_known, progress)
    finally:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _swept(asked: Asked, out: Path, split: str | Path | Split | None, n_known: int | None, progress: bool) -> dict:
    job = job_of(asked, out, split, n_known, progress)
    asked = replace(asked, data=job.source, split=job.split.to_dict(), data_fingerprint=job.fingerprint)
    with ray_session(asked.settings.address, asked.settings.resources):
        job = replace(job, data=share(job.data, asked.settings.config, progress=progress))
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OsmlError(f"cannot write '{out}': {error.strerror}; choose another --out") from error
        with sweep_lock(out), resumable(out):
            asked.write(out)
            return _run(asked, job, out, progress)


def _run(asked: Asked, job: Job, out: Path, progress: bool) -> dict[str, Any]:
    settings = asked.settings
    runs = _runs(asked)
    run_id = runs.start(out.name, _flat(settings.model_dump(mode="json")), _tags(job))
    table = LiveTable() if progress else None

    def store(sweep: Sweep, trial: Trial) -> None:
        _record(runs, trial)
        if table:
            table.update(sweep)

    recorder = Recorder(out / LINES, _blank(job), job.plan.epochs_of, [store], Snapshots(out / SNAPSHOT))
    for trial in recorder.sweep.trials:
        store(recorder.sweep, trial)  # what the store missed, and who is done already
    ended = "FAILED"
    try:
        try:
            results = _fit(asked, job, out, recorder)
        finally:
            if table:
                table.stop()
        swept = recorder.sweep
        open_ones = sum(t.status in ("running", "waiting") for t in swept.trials)
        if open_ones or len(swept.trials) < settings.trials:
            ended = "KILLED"
            raise Interrupted(
                f"interrupted with {len(swept.trials) - open_ones} of {settings.trials} trials ended; all is saved: "
                f"{how_to_resume(out)} goes on"
            )
        result = _finish(asked, job, out, swept, results, run_id, progress)
        ended = "FINISHED"
    except KeyboardInterrupt:
        ended = "KILLED"
        raise Interrupted(f"interrupted; all is saved: {how_to_resume(out)} goes on") from None
    finally:
        if ended != "FINISHED":
            runs.close(ended)
    return _stored(asked, out, result, runs, recorder)


def _fit(asked: Asked, job: Job, out: Path, recorder: Recorder) -> tune.ResultGrid:
    """Run the trials, or those that are left."""
    # A trial that began after the last snapshot is drawn again on a resume: take one often.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")
    storage, name = _place(asked, out)
    path = f"{storage.rstrip('/')}/{name}"
    Recorder.current = recorder
    try:
        if put_back(out / SNAPSHOT, path):
            tuner = tune.Tuner.restore(path, trainable(job.data, job.plan), resume_errored=True)
        else:
            tuner = make_tuner(job.data, job.plan, storage=storage, name=name)
        return tuner.fit()
    finally:
        Recorder.current = None


def _place(asked: Asked, out: Path) -> tuple[str, str]:
    """The storage of the trials, and the name of the experiment's folder there: the sweep's folder may be renamed."""
    if (storage := asked.settings.storage) is None:
        return str(out.resolve()), TRIALS
    if "://" not in storage and not os.path.isabs(storage):
        raise OsmlError(
            f"storage '{storage}' is no address: expected an absolute folder or one such as s3://bucket/folder"
        )
    filesystem, folder = FileSystem.from_uri(storage)
    there = filesystem.get_file_info(FileSelector(folder, allow_not_found=True))
    begun = [entry.base_name for entry in there if entry.base_name.endswith(f"-{asked.id}")]
    return storage, begun[0] if begun else f"{out.name}-{asked.id}"


def _finish(
    asked: Asked, job: Job, out: Path, swept: Sweep, results: tune.ResultGrid, run_id: str, progress: bool
) -> dict[str, Any]:
    """The winner's bundle, its one test, the page, the registry."""
    counts = Counter(t.status for t in swept.trials)
    ranked = swept.ranked()
    if not ranked:
        write_page(out / PAGE, swept)
        first = next((t.error for t in swept.trials if t.error), "no reason was left")
        raise OsmlError(f"none of {len(swept.trials)} trials came through; the first failed with: {first}")
    winner = find_winner(ranked, results, job.plan)
    bundle = out / BUNDLE
    write_config(winner.config, out / "best.yaml")
    write_winner(
        winner,
        bundle,
        source=job.source,
        split=job.split,
        data=job.data,
        plan=job.plan,
        data_fingerprint=job.fingerprint,
        skip_bad=job.skip_bad,
        progress=progress,
    )
    test = _tested(job, bundle, progress)
    result = {
        "trials": len(swept.trials),
        "finished": counts["finished"],
        "stopped": counts["stopped"],
        "failed": counts["failed"],
        "failures": {t.number: t.error for t in swept.trials if t.status == "failed"},
        "best": _described(winner),
        "validation": winner.figures,
        "test": test,
        **_paths(asked, out),
        "run_id": run_id,
        "model": None,
        "registered": None,
        "model_version": None,
        "stored": False,
    }
    write_json(out / RESULT, result)  # before anything else can fail: the test is not looked at twice
    _write_page(out, swept, result)
    return result


def _stored(asked: Asked, out: Path, result: dict[str, Any], runs: SweepRuns, recorder: Recorder) -> dict[str, Any]:
    """The result, with its bundle logged as a model, registered where that was asked for, and all runs ended. A store
    that is away costs a warning: resuming the sweep stores what is missing."""
    try:
        runs.drop({t.id for t in recorder.sweep.trials})
        if result["model"] is None or asked.register not in (None, result["registered"]):
            oscr = f"{result['validation']['oscr']:.6f}"
            tags = {"sweep": asked.id, "data_path": asked.data, "validation_oscr": oscr}
            uri, version = tracking.log_bundle(
                out / BUNDLE, run_id=result["run_id"], register=asked.register, tags=tags
            )
            result = result | {"model": uri, "registered": asked.register, "model_version": version}
            write_json(out / RESULT, result)
        files = [out / name for name in ("best.yaml", PAGE, RESULT) if (out / name).is_file()]
        stored = runs.close("FINISHED", _prefixed(result), {"best_trial": result["best"]["trial"]}, files)
    except OsmlError as error:
        runs.close("FAILED")
        logger.warning("the sweep is done, but not all of it is stored (%s); --resume stores it", error)
        return result
    result = result | {"stored": stored}
    write_json(out / RESULT, result)
    return result


def _concluded(asked: Asked, out: Path, make: bool, progress: bool) -> dict[str, Any]:
    """The result of a sweep whose trials are done; what the disk or the store did not take then, or was not asked to,
    it gets."""
    result = json.loads((out / RESULT).read_text(encoding="utf-8")) | _paths(asked, out)
    has_page = (out / PAGE).is_file()
    if result["stored"] and has_page and asked.register in (None, result["registered"]):
        return result
    blank = Sweep([], [], asked.settings.objective, 0)
    recorder = Recorder(out / LINES, blank, lambda params: 0)
    if not has_page:
        job = job_of(asked, out, None, None, progress)
        asked = replace(asked, data=job.source)
        _write_page(out, replace(_blank(job), trials=recorder.sweep.trials), result)
    tracking.check_tracking(asked.tracking_uri, make=make)
    asked.write(out)
    runs = _runs(asked)
    runs.start(out.name, {}, {})
    for trial in recorder.sweep.trials:
        _record(runs, trial)
    return _stored(asked, out, result, runs, recorder)


def _paths(asked: Asked, out: Path) -> dict[str, str]:
    """What lies where: a sweep may be moved."""
    where = {"bundle": out / BUNDLE, "report": out / PAGE, "tracking_uri": tracking.shown(asked.tracking_uri)}
    return {name: str(place) for name, place in where.items()}


def _blank(job: Job) -> Sweep:
    """The sweep before its first trial."""
    settings = job.plan.settings
    return Sweep([], job.plan.space.dimensions, settings.objective, settings.trials, _facts(job))


def _write_page(out: Path, swept: Sweep, result: Mapping[str, Any]) -> None:
    figures = {"validation": _shown(result["validation"]), "test": _shown(result["test"] or {})}
    write_page(out / PAGE, swept, figures)


def _runs(asked: Asked) -> SweepRuns:
    return SweepRuns(asked.tracking_uri, os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT), asked.id)


def _record(runs: SweepRuns, trial: Trial) -> None:
    runs.record(
        trial.id,
        number=trial.number,
        params=trial.params,
        history=trial.history,
        status=trial.status,
        error=trial.error,
        extra_tags={"osml.status": trial.status, "chosen": json.dumps(trial.chosen)},
    )


def _tested(job: Job, bundle: Path, progress: bool) -> dict[str, Any] | None:
    """The figures on test items, looked at once; None where the source holds none."""
    try:
        evaluation, _ = commands.evaluate(bundle, job.source, split=job.split, skip_bad=job.skip_bad, progress=progress)
    except OsmlError as error:
        print(f"osml: warning: not tested: {error}", file=sys.stderr)
        return None
    return evaluation.to_dict()


def _shown(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Those that say how good it is."""
    return {k: v for k, v in _flat(figures).items() if not k.endswith("_seconds") and not k.startswith("system/")}


def _described(winner: Winner) -> dict[str, Any]:
    return {
        "trial": winner.trial.number,
        "id": winner.trial.id,
        "epoch": winner.epoch,
        "params": winner.trial.params,
        "chosen": winner.chosen,
    }


def _facts(job: Job) -> dict[str, Any]:
    settings = job.plan.settings
    return {
        "data": job.source,
        "data fingerprint": job.fingerprint,
        "split": job.split.to_dict(),
        "folds": [f.split.to_dict() for f in job.data.folds],
        "items": {role: len(getattr(job.data.folds[0].roles, role)) for role in ("train", "calibration", "validation")},
        "epochs": job.plan.epochs,
        "search": settings.search,
        "seed": settings.config.seed,
        "alpha": settings.config.alpha,
    }


def _tags(job: Job) -> dict[str, str]:
    facts = _facts(job)
    return {name.replace(" ", "_"): v if isinstance(v, str) else json.dumps(v) for name, v in facts.items()}


def _prefixed(result: dict[str, Any]) -> dict[str, float]:
    """The winner's figures under names that tell validation from test."""
    found = {}
    for part in ("validation", "test"):
        for name, value in _flat(result[part] or {}).items():
            if isinstance(value, int | float) and not name.startswith("system/"):
                found[f"{part}_{name}"] = value
    return found


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value and key != "space":
            found |= _flat(value, f"{before}{key}.")
        else:
            found[before + key] = yaml.safe_dump(value).strip() if isinstance(value, Mapping | list) else value
    return found
