"""Unknown items grouped into the new classes that they are, and counted."""

from __future__ import annotations

from . import methods
from .constraints import Constraints, confirmed
from .discover import Discovery, discover
from .identity import Identities, Update, identify, join
from .tree import Tree

__all__ = [
    "Constraints",
    "Discovery",
    "Identities",
    "Tree",
    "Update",
    "confirmed",
    "discover",
    "identify",
    "join",
    "methods",
]
