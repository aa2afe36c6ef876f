"""Sweeps with Ray Tune: what makes a recogniser good is searched, tracked in MLflow, and registered."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "Space": "space",
    "SweepConfig": "settings",
    "make_tuner": "tuner",
    "prepare": "job",
    "promote": "promotion",
    "rollback": "promotion",
    "settings_of": "job",
    "sweep": "sweeping",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
