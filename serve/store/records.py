"""What goes into the store and comes out of it: plain frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np

JobState = Literal["queued", "running", "done", "failed"]
GroupState = Literal["proposed", "accepted", "rejected", "merged"]


@dataclass(frozen=True)
class Write:
    """Who writes, and under which idempotency key: the same key again gives the first answer, and changes nothing."""

    actor: str
    key: str | None = None
    fingerprint: str | None = None
    """Of the request; another one under the same key is refused."""


@dataclass(frozen=True)
class Written:
    """An acknowledged write: it is committed."""

    result: dict[str, Any]
    """Plain JSON."""
    gallery_version: int
    replayed: bool = False


@dataclass(frozen=True)
class State:
    """What every replica looks at several times a second."""

    gallery_version: int
    keys_version: int
    model: str | None
    """The active model version."""
    pending: str | None
    """The model version that is being prepared."""
    alpha: float | None
    """Set by a user; None: the bundle's own threshold."""
    asked: Mapping[str, Any]
    """What configurations have asked for last: `model` (a version), `alpha`. What was changed by hand since stays."""


@dataclass(frozen=True)
class NewItem:
    """What was sent with its embedding, or an embedding alone, on its way in."""

    embedding: np.ndarray
    """`(D,)` float32."""
    content: bytes | None = None
    """The file of an image, or a vector, for other models to embed; None: an embedding, which no other can."""
    media_type: str | None = None


@dataclass(frozen=True)
class Observation:
    """A rejected item on its way into the unknown pool."""

    id: str
    item: NewItem
    model: str
    score: float
    nearest: str
    p_value: float | None


@dataclass(frozen=True)
class Unknown:
    """A row of the unknown pool."""

    id: str
    created_at: datetime
    score: float
    nearest: str
    p_value: float | None
    has_image: bool


@dataclass(frozen=True)
class Example:
    """A row of the gallery."""

    id: str
    created_at: datetime
    has_image: bool


@dataclass(frozen=True)
class ItemChange:
    """What an item of the gallery is since a version."""

    id: str
    name: str | None
    """The class; None: it is no example any more."""
    embedding: np.ndarray | None
    """By the model that was asked for; None where there is none (an embedding that came without an image)."""


@dataclass(frozen=True)
class Changes:
    """All that a replica must know to go from one version to another."""

    state: State
    trained: Mapping[str, str | None]
    """What became of classes of the bundle: a new name, or None where forgotten; those not named are as they were."""
    items: tuple[ItemChange, ...]


@dataclass(frozen=True)
class ModelRecord:
    version: str
    source: str
    classes: tuple[str, ...]
    """Of the bundle."""
    activated_at: datetime | None
    active: bool


@dataclass(frozen=True)
class Job:
    """Work in the background: `discovery` or `model` (the embeddings of another model version)."""

    id: str
    kind: Literal["discovery", "model"]
    args: dict[str, Any]
    state: JobState
    progress: float
    error: str | None
    created_at: datetime
    finished_at: datetime | None
    result: dict[str, Any] | None


@dataclass(frozen=True)
class Group:
    """A proposed class."""

    number: int
    confidence: float
    members: tuple[str, ...]
    """Item ids, the most typical first."""
    exemplars: tuple[str, ...]
    state: GroupState = "proposed"
    name: str | None = None
    id: int | None = None
    """The same in each discovery that finds the group again; the store gives it."""


@dataclass(frozen=True)
class KeyRecord:
    """An API key as it is stored: never the key itself."""

    id: str
    """The public part of the key, by which it is found."""
    name: str
    scopes: tuple[str, ...]
    digest: str
    """SHA-256 of the secret part, hex."""
    created_at: datetime = field(default_factory=lambda: datetime.now().astimezone())
    revoked_at: datetime | None = None
