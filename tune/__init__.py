"""Sweeps with Ray Tune: what makes a recogniser good is searched, tracked in MLflow, and registered."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time `_WHERE` is read
    from .job import prepare, settings_of
    from .promotion import promote, rollback
    from .settings import SweepConfig
    from .space import Space
    from .sweeping import sweep
    from .tuner import make_tuner

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

__all__ = ["Space", "SweepConfig", "make_tuner", "prepare", "promote", "rollback", "settings_of", "sweep"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
