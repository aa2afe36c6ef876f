"""The durable store: SQLite, or PostgreSQL where replicas span machines. It is the truth; all else is a cache of it."""

from .database import shown
from .errors import Conflict, KeyReused, NotThere, StaleModel, StoreFull, StoreUnavailable
from .ledger import new_id
from .records import (
    Changes,
    Example,
    Group,
    ItemChange,
    Job,
    KeyRecord,
    ModelRecord,
    NewItem,
    Observation,
    State,
    Unknown,
    Write,
    Written,
)
from .store import Store

__all__ = [
    "Changes",
    "Conflict",
    "Example",
    "Group",
    "ItemChange",
    "Job",
    "KeyRecord",
    "KeyReused",
    "ModelRecord",
    "NewItem",
    "NotThere",
    "Observation",
    "StaleModel",
    "State",
    "Store",
    "StoreFull",
    "StoreUnavailable",
    "Unknown",
    "Write",
    "Written",
    "new_id",
    "shown",
]
