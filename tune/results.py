"""What a sweep leaves behind, as plain data: what the live table, the page, MLflow and `--json` are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Trial:
    """One trial.

    params: what was drawn for it, flat: `{"loss": "ArcFaceLoss", "loss.ArcFaceLoss.margin": 20.0, "optimizer.lr": …}`;
        a dimension that its other choices exclude is absent.
    history: for each evaluated epoch the figures that were reported: epoch, loss, oscr, auroc, …, means over the
        folds.
    chosen: what the inner search chose at the best epoch: `{"output": …, "detector": …, "params": {…}}`.
    curve: the trade-off on validation at the best epoch: `(share of known items rejected, of unknown items rejected)`.
    """

    id: str
    number: int
    status: Literal["running", "finished", "stopped", "failed", "waiting"]
    """finished: all epochs; stopped: by the scheduler, as it fell behind; failed: `error` says why."""
    params: dict[str, Value]
    history: Sequence[dict[str, float]] = ()
    chosen: dict[str, Any] | None = None
    curve: Sequence[tuple[float, float]] = ()
    error: str | None = None
    seconds: float = 0.0

    def best(self, objective: str) -> dict[str, float] | None:
        """The entry of the history with the highest objective; None before the first."""
        return max(self.history, key=lambda entry: entry[objective], default=None)


@dataclass(frozen=True)
class Dimension:
    """One searched parameter: `kind` "float" or "int" with `low`, `high`, `log`; or "choice" with `choices`."""

    name: str
    kind: Literal["float", "int", "choice"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """All trials of a sweep."""

    trials: list[Trial]
    dimensions: list[Dimension]
    objective: str
    asked: int
    """Trials asked for."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else a reader wants to know: data, split, folds, epochs, seed."""

    def ranked(self) -> list[Trial]:
        """Trials that reported anything, best first."""
        some = [t for t in self.trials if t.history and t.status != "failed"]
        return sorted(some, key=lambda t: -t.best(self.objective)[self.objective])
