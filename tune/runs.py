"""The MLflow runs of a sweep: a parent, and one nested run a trial."""

from __future__ import annotations

import logging
import math
import posixpath
import re
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from osml_plugin.errors import OsmlError
from osml_plugin.tracking import mlflow_calls, pages
from osml_plugin.tracking_file import ARTIFACTS, sqlite_file

logger = logging.getLogger(__name__)

STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
"""What MLflow calls the end of a trial."""
MAX_KEY, MAX_PARAM, MAX_RUN_TAG = 250, 6_000, 8_000


@dataclass
class _Run:
    """What a trial's run holds already."""

    id: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    steps: dict[str, int]
    """The last step of each metric."""


class SweepRuns:
    """The runs of one sweep: a parent, and a nested run for each trial, found again by their tags `osml.sweep` and
    `osml.trial`. For the driver; it can be pickled, with what could not be stored yet.

    Args:
        uri: the store, as `tracking_uri` gives it.
        experiment: the name of the experiment; made if there is none.
        sweep_id: what tells this sweep from others.
    """

    def __init__(self, uri: str, experiment: str, sweep_id: str):
        self.__setstate__({"uri": uri, "experiment": experiment, "sweep_id": sweep_id, "_waiting": {}})

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("uri", "experiment", "sweep_id", "_waiting")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._parent: _Run | None = None
        self._runs: dict[str, _Run] | None = None
        """By trial; None = to be looked up."""
        self._monitor: Any = None
        self._away = False
        self._not_before = 0.0

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
        """The id of the parent run, which is RUNNING from now on: a new one, or the one that is there. Raises OsmlError
        where the store does not answer."""
        with mlflow_calls(self.uri):
            self._look_up()
            if self._parent is None:
                self._parent = self._new_run(name, {})
            elif self._parent.status != "RUNNING":
                self._client.update_run(self._parent.id, status="RUNNING")
                self._parent.status = "RUNNING"
            self._log(self._parent, params=params, tags=tags)
            self._start_monitor()
        return self._parent.id

    def record(
        self,
        trial_id: str,
        *,
        number: int,
        params: Mapping[str, Any],
        history: Sequence[Mapping[str, float]],
        status: str,
        error: str | None = None,
        extra_tags: Mapping[str, Any] | None = None,
    ) -> bool:
        """Bring a trial's run up to date; what it holds already is not stored again.

        Args:
            params: a value that is no longer the first one becomes the metric or tag `param.<name>`.
            history: the entries so far; `epoch` is the step.
            status: as `Trial.status`; finished, stopped and failed end the run.

        Returns:
            False if the store does not answer: all that waits is stored by a later call, or by `close`.
        """
        self._waiting[trial_id] = {
            "number": number,
            "params": dict(params),
            "history": [dict(entry) for entry in history],
            "status": status,
            "error": error,
            "extra_tags": dict(extra_tags or {}),
        }
        return time.monotonic() >= self._not_before and self._flush(retries=0)

    def drop(self, trial_ids_known: Collection[str]) -> None:
        """Delete the runs of other trials than these: they were never saved, and are drawn again."""
        with mlflow_calls(self.uri):
            self._look_up()
            for trial_id in [t for t in self._runs if t not in trial_ids_known]:
                self._client.delete_run(self._runs.pop(trial_id).id)
        for trial_id in [t for t in self._waiting if t not in trial_ids_known]:
            del self._waiting[trial_id]

    def close(
        self,
        status: Literal["FINISHED", "FAILED", "KILLED"],
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, Any] | None = None,
        artifacts: Sequence[str | Path] = (),
        keep: Collection[str] = (),
    ) -> bool:
        """End the parent, and as KILLED the run of every trial that is still RUNNING and not in `keep`.

        Args:
            artifacts: files and folders for the parent.

        Returns:
            False if the store does not answer: nothing raises, and resuming the sweep stores what is missing.
        """
        self._stop_monitor()
        flushed = self._flush(retries=1)
        try:
            with mlflow_calls(self.uri, retries=1 if flushed else 0):
                self._look_up()
                for trial_id, run in self._runs.items():
                    if run.status == "RUNNING" and trial_id not in keep:
                        self._end(run, "KILLED")
                self._log(self._parent, metrics=[(0, metrics or {})], tags=tags or {})
                for path in map(Path, artifacts):
                    if path.is_dir():
                        self._client.log_artifacts(self._parent.id, str(path), path.name)
                    else:
                        self._client.log_artifact(self._parent.id, str(path))
                self._end(self._parent, status)
        except OsmlError as error:
            # An error that says how to go on is on its way, unless the sweep is done.
            level = logging.WARNING if status == "FINISHED" else logging.INFO
            logger.log(level, "the sweep's end could not be stored (%s); resuming the sweep stores it", error)
            return False
        return flushed

    # Inside -----------------------------------------------------------------------------------------------

    def _flush(self, retries: int) -> bool:
        """Store what waits; warns once when the store goes away."""
        if not self._waiting:
            return True
        began = time.monotonic()
        trial_id = None
        try:
            with mlflow_calls(self.uri, retries=retries):
                if self._runs is None:
                    self._look_up()
                for trial_id in list(self._waiting):
                    self._store(trial_id, **self._waiting[trial_id])
                    del self._waiting[trial_id]
        except OsmlError as error:
            # What was sent may have arrived all the same: look again before anything is made anew.
            self._runs = None
            if trial_id is not None:
                self._waiting[trial_id] = self._waiting.pop(trial_id)  # the next time after the others
            # An address that swallows packets holds up the sweep: a sixth of the time, not all of it.
            self._not_before = time.monotonic() + 5 * (time.monotonic() - began)
            if not self._away:
                logger.warning("not stored for now, the sweep goes on and tries again: %s", error)
            self._away = True
            return False
        self._away = False
        return True

    def _store(
        self,
        trial_id: str,
        number: int,
        params: Mapping[str, Any],
        history: Sequence[Mapping[str, float]],
        status: str,
        error: str | None,
        extra_tags: Mapping[str, Any],
    ) -> None:
        run = self._runs.get(trial_id)
        if run is None:
            tags = {"mlflow.parentRunId": self._parent.id, "osml.trial": trial_id, "osml.number": str(number)}
            run = self._runs[trial_id] = self._new_run(f"trial {number}", tags)
        metrics = [
            (int(entry["epoch"]), {k: v for k, v in entry.items() if k != "epoch"})
            for entry in sorted(history, key=lambda entry: entry["epoch"])
        ]
        tags = dict(extra_tags)
        if error is not None:
            tags["osml.error"] = error
        elif "osml.error" in run.tags:  # it failed before, and was taken up again
            self._client.delete_tag(run.id, "osml.error")
            del run.tags["osml.error"]
        self._log(run, params=params, metrics=metrics, tags=tags)
        if status in STATUS:
            if run.status != STATUS[status]:
                self._end(run, STATUS[status])
        elif run.status != "RUNNING":
            self._client.update_run(run.id, status="RUNNING")
            run.status = "RUNNING"

    def _log(
        self,
        run: _Run,
        params: Mapping[str, Any] | None = None,
        metrics: Sequence[tuple[int, Mapping[str, float]]] = (),
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """One batch of what the run does not hold; `metrics` are steps in order, with their values."""
        from mlflow.entities import Metric, Param, RunTag

        given = {_key(k): str(v)[:MAX_PARAM] for k, v in (params or {}).items()}
        tags = {_key(k): str(v)[:MAX_RUN_TAG] for k, v in (tags or {}).items()}
        metrics = [(step, {_key(k): v for k, v in values.items()}) for step, values in metrics]
        for name, value in (params or {}).items():
            name, now = _key(name), f"param.{_key(name)}"
            if given[name] == run.params.get(name, given[name]) and now not in {**run.steps, **run.tags}:
                continue
            if isinstance(value, int | float) and not isinstance(value, bool):
                metrics = [*metrics, (metrics[-1][0] if metrics else 0, {now: value})]
            else:
                tags[now] = given[name]
        new_params = {k: v for k, v in given.items() if k not in run.params}
        new_tags = {k: v for k, v in tags.items() if run.tags.get(k) != v}
        steps, new_metrics, at = dict(run.steps), [], int(time.time() * 1000)
        for step, values in metrics:
            for name, value in values.items():
                if _is_number(value) and step > steps.get(name, -1):
                    new_metrics.append(Metric(name, float(value), at, step))
                    steps[name] = step
        self._client.log_batch(
            run.id,
            metrics=new_metrics,
            params=[Param(k, v) for k, v in new_params.items()],
            tags=[RunTag(k, v) for k, v in new_tags.items()],
        )
        run.params |= new_params
        run.tags |= new_tags
        run.steps = steps

    def _end(self, run: _Run, status: str) -> None:
        self._client.set_terminated(run.id, status)
        run.status = status

    def _new_run(self, name: str, tags: dict[str, str]) -> _Run:
        tags = {**tags, "osml.sweep": self.sweep_id}
        made = self._client.create_run(self._experiment_id(), run_name=name, tags=tags)
        return _Run(made.info.run_id, "RUNNING", {}, dict(made.data.tags), {})

    def _look_up(self) -> None:
        """The runs of this sweep that are there."""
        found = {}
        query = f"tags.`osml.sweep` = '{self.sweep_id}'"
        for run in pages(self._client.search_runs, experiment_ids=[self._experiment_id()], filter_string=query):
            # The only place where MLflow tells the steps without a request for each metric.
            steps = {metric.key: metric.step for metric in run.data._metric_objs}
            known = _Run(run.info.run_id, run.info.status, dict(run.data.params), dict(run.data.tags), steps)
            if "mlflow.parentRunId" in known.tags:
                found[known.tags["osml.trial"]] = known
            else:
                self._parent = known
        self._runs = found

    @property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            # Beside the SQLite file, wherever the driver was started; a server decides for itself.
            file = sqlite_file(self.uri)
            try:
                return self._client.create_experiment(self.experiment, file and (file.parent / ARTIFACTS).as_uri())
            except MlflowException:  # another process made it in between
                found = self._client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise OsmlError(f"experiment '{self.experiment}' was deleted in MLflow: restore it, or choose another name")
        return found.experiment_id

    def _start_monitor(self) -> None:
        """CPU, memory and GPU of the driver's machine, as MLflow itself takes them."""
        try:
            import psutil  # noqa: F401
        except ImportError:
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        for name in ("mlflow.system_metrics", "mlflow.store.db", "urllib3"):  # its thread outlives `mlflow_calls`
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._stop_monitor()
        self._monitor = SystemMetricsMonitor(self._parent.id, resume_logging=True, tracking_uri=self.uri)
        self._monitor.start()

    def _stop_monitor(self) -> None:
        if self._monitor is not None:
            # While a server is away it waits for it with all of MLflow's retries.
            stop = threading.Thread(target=self._monitor.finish, daemon=True)
            stop.start()
            stop.join(5)
            self._monitor = None


def _key(name: str) -> str:
    """A name that MLflow takes for a metric, parameter or tag."""
    return posixpath.normpath(re.sub(r"[^/\w.\- ]", "_", str(name))).lstrip("./")[:MAX_KEY] or "_"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not math.isnan(value)
