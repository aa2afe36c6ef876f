"""Ray Serve: the registered model as an endpoint that learns new classes while it runs.

    osml serve models:/birds@champion

`settings.py` says what can be set, `schemas.py` what goes over HTTP, `store/` keeps what was learned, `live.py` is one
replica's recogniser, `application.py` the HTTP around it, `deployments.py` the Ray Serve around that.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time `_WHERE` is read
    from .client import Client
    from .deployments import build
    from .live import learned
    from .server import running
    from .settings import ServeConfig

_WHERE = {"Client": "client", "ServeConfig": "settings", "build": "deployments", "learned": "live", "running": "server"}

__all__ = ["Client", "ServeConfig", "build", "learned", "running"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
