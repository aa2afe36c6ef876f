"""Unknown items grouped into the new classes that they are, and counted."""

from __future__ import annotations

from .discover import Discovery, discover

__all__ = ["Discovery", "discover"]
