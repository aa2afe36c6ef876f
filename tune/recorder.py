"""What happens in a sweep, written down as it happens: on disk, in the live table, in MLflow."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ray.tune import Callback

from .results import Sweep, Trial
from .snapshots import Snapshots
from .trial import params_of

LINES = "trials.jsonl"
FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))
LITTLE = 2**20
"""Bytes: a disk with less room than this is full."""


@dataclass
class Journal:
    """One line a report of a trial, appended to a file; reading it back gives the trials.

    A trial that is taken up again repeats epochs: the last report of an epoch counts.
    """

    file: Path

    def append(self, entry: dict[str, Any]) -> None:
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """All whole lines; the last may have been cut off."""
        found = []
        if self.file.exists():
            text = self.file.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):
                with open(self.file, "a", encoding="utf-8") as out:
                    out.write("\n")  # what comes next is a line of its own
            for line in text.splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:
                    continue
        return found


Watcher = Callable[[Sweep, Trial], None]


class Recorder:
    """Follows all trials, in the driver.

    Args:
        journal: the file to write to; what it holds already is taken over.
        blank: the sweep without trials.
        epochs_of: those of a whole trial with some parameters.
        watchers: called with the sweep so far and the trial that changed.
        snapshots: where Ray's snapshots are kept.

    A disk that is full halts the sweep: trials would die one after the other. From then on nothing is written down, and
    the end of Ray's step raises the OSError.
    """

    current: ClassVar[Recorder | None] = None
    """The one that `Relay` tells."""

    def __init__(
        self,
        journal: Path,
        blank: Sweep,
        epochs_of: Callable[[Mapping[str, Any]], int],
        watchers: Sequence[Watcher] = (),
        snapshots: Snapshots | None = None,
    ):
        self.snapshots = snapshots
        self.halted: OSError | None = None
        self.journal, self.blank, self.epochs_of, self.watchers = Journal(journal), blank, epochs_of, watchers
        self.trials: dict[str, Trial] = {}
        self.numbers: dict[str, int] = {}
        for entry in self.journal.entries():
            self.numbers[entry["id"]] = entry["number"]
            self._take(entry)

    @property
    def sweep(self) -> Sweep:
        return replace(self.blank, trials=sorted(self.trials.values(), key=lambda t: t.number))

    def meet(self, ids: Sequence[str]) -> None:
        """All trials that Ray knows, in the order in which they were drawn, by which they are numbered. Others are
        forgotten: they began after its last snapshot, and are drawn again."""
        for id_ in ids:
            if id_ not in self.numbers:
                self.numbers[id_] = max(self.numbers.values(), default=-1) + 1
        self.trials = {i: t for i, t in self.trials.items() if i in set(ids)}

    # --- what happens -------------------------------------------------------------------------------------

    def started(self, trial: Any) -> None:
        self._write(trial, status="running", error=None)

    def reported(self, trial: Any, result: dict[str, Any]) -> None:
        if "error" in result:
            fields = {"error": result["error"]}
        else:
            fields = {"figures": {name: result[name] for name in result["reported"]}}
            fields |= {"chosen": result["chosen"], "curve": result["curve"]}
        self._write(trial, status="running", seconds=result.get("time_total_s", 0.0), **fields)

    def completed(self, trial: Any) -> None:
        known = self.trials.get(trial.trial_id)
        if known is not None and known.error:
            status = "failed"
        elif known is not None and known.history and known.history[-1]["epoch"] >= self.epochs_of(known.params):
            status = "finished"
        else:
            status = "stopped"
        self._write(trial, status=status)

    def died(self, trial: Any) -> None:
        self.stumbled(trial)
        self._write(trial, status="failed", error=_reason(trial))

    def stumbled(self, trial: Any) -> None:
        """A trial has failed, for the last time or not: halt where that is for want of room."""
        folder = self.journal.file.parent
        if shutil.disk_usage(folder).free < LITTLE:
            self.halted = self.halted or OSError(errno.ENOSPC, FULL[0], str(folder))
        elif any(full in _error(trial) for full in FULL):
            where = f"where trial {self.numbers[trial.trial_id]} ran, or keeps its checkpoints"
            self.halted = self.halted or OSError(errno.ENOSPC, FULL[0], where)

    def step_ended(self, trials: Sequence[Any], last: bool = False) -> None:
        """Keep Ray's snapshot. Raises OSError where there is no room for it, or was none for something else."""
        if self.halted is None and self.snapshots is not None and trials:
            try:
                self.snapshots.keep(trials[0].local_experiment_path, now=last)
            except OSError as error:
                self.halted = error
        if self.halted is not None and not last:
            raise self.halted

    # --- inside -------------------------------------------------------------------------------------------

    def _write(self, trial: Any, **fields: Any) -> None:
        if self.halted is not None:
            return
        params = params_of(trial.config)
        number = self.numbers[trial.trial_id]
        entry = {"id": trial.trial_id, "number": number, "params": params, "time": time.time(), **fields}
        try:
            self.journal.append(entry)
        except OSError as error:
            self.halted = error
            return
        now = self._take(entry)
        for watcher in self.watchers:
            watcher(self.sweep, now)

    def _take(self, entry: dict[str, Any]) -> Trial:
        trial = self.trials.get(entry["id"])
        if trial is None:
            trial = Trial(entry["id"], entry["number"], "waiting", {})
        trial = replace(trial, params=entry["params"], status=entry["status"], error=entry.get("error", trial.error))
        trial = replace(trial, seconds=entry.get("seconds", trial.seconds))
        if figures := entry.get("figures"):
            earlier = [h for h in trial.history if h["epoch"] < figures["epoch"]]
            is_best = figures[self.blank.objective] >= max((h[self.blank.objective] for h in earlier), default=-1)
            trial = replace(trial, history=[*earlier, figures])
            if is_best or trial.chosen is None:
                trial = replace(trial, chosen=entry.get("chosen"), curve=[tuple(p) for p in entry.get("curve", [])])
        self.trials[trial.id] = trial
        return trial


def _error(trial: Any) -> str:
    return str((trial.get_error() if hasattr(trial, "get_error") else None) or "")


def _reason(trial: Any) -> str:
    """The last line of what a trial died of."""
    text = _error(trial) or "it died, and left no reason"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500]


class Relay(Callback):
    """What Ray Tune calls. Ray keeps a copy on disk and brings that back on a restore, so there is nothing in it."""

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if recorder := _told(trials):
            recorder.started(trial)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        if recorder := _told(trials):
            recorder.reported(trial, result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if recorder := _told(trials):
            recorder.completed(trial)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if recorder := _told(trials):
            recorder.died(trial)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        if recorder := _told(trials):
            recorder.stumbled(trial)

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        if recorder := Recorder.current:
            recorder.step_ended(trials)

    def on_experiment_end(self, trials: list, **info: Any) -> None:
        if recorder := _told(trials):
            recorder.step_ended(trials, last=True)


def _told(trials: list) -> Recorder | None:
    """The recorder, after it has heard which trials there are."""
    if Recorder.current is not None:
        Recorder.current.meet([trial.trial_id for trial in trials])
    return Recorder.current
