"""What a sweep can be told: one YAML file, checked as the training's is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from osml_plugin.config import Config
from osml_plugin.schema import Section

OBJECTIVES = ("oscr", "auroc", "aupr_unknown", "aupr_known", "closed_set_accuracy", "macro_f1")
"""What trials can be ranked by, on validation; all but macro_f1 need no threshold."""


class Resources(Section):
    """What one trial takes. Fractions of a GPU are logical: trials that share one must fit its memory together."""

    cpu: Annotated[float, Field(gt=0)] = 1
    gpu: Annotated[float, Field(ge=0)] = 0
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes that train one trial together through Ray Train; each takes `cpu` and `gpu`."""


class SweepConfig(Section):
    """All that `osml tune` can be told."""

    trials: Annotated[int, Field(ge=1)] = 20
    search: Literal["optuna", "random", "pbt"] = "optuna"
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops trials that fall behind; pbt has a schedule of its own and ignores this."""
    objective: Literal[OBJECTIVES] = "oscr"
    levels: Literal[1, 2] = 2
    """2: detector and threshold are searched inside each trial, on its cached embeddings; 1: they are dimensions of the
    outer search like any other."""
    folds: Annotated[int, Field(ge=1)] = 2
    """Draws of pseudo-unknown classes. The first is the split's own; every further one holds out other classes."""
    evaluate_every: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Epochs between two evaluations, each of which is reported and written as a checkpoint; auto = `grace`."""
    grace: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Epochs before a trial may be stopped, and between two exchanges of pbt; auto = a quarter of the epochs."""
    winner: Literal["auto", "as-is", "retrain"] = "auto"
    """The bundle: the best trial's model as it is, or trained again on the split; auto = as it is where the split has
    pseudo-unknown classes, so that one of the folds is the split itself."""
    config: Config = Config()
    """What stays the same in all trials: the configuration of a training."""
    space: dict[str, Any] | None = None
    """What is searched, under the same names; None = the default space of the loss."""
    resources: Resources = Resources()
    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Trials at the same time; None = as many as the resources allow."""
    address: str | None = None
    """A running Ray cluster: 'auto' on one of its machines, or host:6379; None = one on this machine for this sweep."""
    storage: str | None = None
    """Where trials keep their checkpoints: a shared folder or s3://…, needed on more than one machine; None = in the
    sweep's own folder."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 1
    """Of each trial: its best ones; the latest is kept as well. (pbt keeps all until the end.)"""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a trial is taken up again after its machine or process died."""
