"""The one row of state, and every write: a line in the change log, once under its idempotency key."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import numpy as np
from sqlalchemy import Connection, delete, insert, select, update

from osml_plugin.errors import OsmlError

from .database import Database
from .errors import KeyReused
from .records import State, Write, Written
from .tables import changes, requests, state

REMEMBERED = timedelta(hours=24)
"""How long an idempotency key is known."""


def new_id() -> str:
    """32 hex digits, ordered by time: an UUID of version 7 (RFC 9562 §5.7), of a quarter of a microsecond (§6.2)."""
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    noise = int.from_bytes(os.urandom(8)) >> 2
    return f"{milliseconds << 80 | 0x7 << 76 | rest * 4096 // 1_000_000 << 64 | 0b10 << 62 | noise:032x}"


def now() -> datetime:
    return datetime.now(UTC)


def batches(sequence: Iterable, size: int = 500) -> Iterator[list]:
    """Lists of at most `size`: databases limit how many values one statement takes."""
    rest = iter(sequence)
    while batch := list(islice(rest, size)):
        yield batch


def to_blob(vector: np.ndarray) -> bytes:
    vector = np.asarray(vector, dtype="<f4")
    if vector.ndim != 1 or not vector.size:
        raise OsmlError(f"an embedding has the shape {vector.shape}: expected one vector (D,)")
    return vector.tobytes()


def from_blob(blob: bytes) -> np.ndarray:
    return np.frombuffer(blob, dtype="<f4")


_STATE = select(*(state.c[field.name] for field in fields(State)))


class Change:
    """A write in progress: its connection, and the state as the write leaves it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.state = read_state(connection)

    def set(self, **values: Any) -> None:
        self.connection.execute(update(state).values(values))
        self.state = replace(self.state, **values)

    def note(self, asked: Mapping[str, Any] | None) -> None:
        """What a configuration asked for, so that it asks once."""
        if asked:
            self.set(asked={**self.state.asked, **asked})

    def next_version(self, **values: Any) -> int:
        """The gallery changes, once in a write; `values` are set with it."""
        self.set(gallery_version=self.state.gallery_version + 1, **values)
        return self.state.gallery_version

    def log(self, actor: str, action: str, subject: str | None, details: dict[str, Any]) -> None:
        self.connection.execute(
            insert(changes),
            {
                "version": self.state.gallery_version,
                "at": now(),
                "actor": actor,
                "action": action,
                "subject": subject,
                "details": details,
                "model": self.state.model,
            },
        )


def read_state(connection: Connection) -> State:
    return State(*connection.execute(_STATE).one())


class Ledger:
    """What the parts of the store have in common."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def state(self) -> State:
        with self._database.read() as connection:
            return read_state(connection)

    def _write(
        self, by: Write, action: str, subject: str | None, change: Callable[[Change], dict], *, frees: bool = False
    ) -> Written:
        """Does `change`, which returns the result, and logs it; or gives the result of the same write before.

        `frees`: it makes room, and is done on a full disk as well.
        Raises `KeyReused`, and whatever `change` raises: then nothing is written.
        """
        if frees:
            return self._database.making_room(lambda: self._written(by, action, subject, change))
        return self._written(by, action, subject, change)

    def _written(self, by: Write, action: str, subject: str | None, change: Callable[[Change], dict]) -> Written:
        with self._database.write() as connection:
            this = Change(connection)
            if by.key is not None and (before := _before(connection, by)):
                return before
            result = change(this)
            this.log(by.actor, action, subject, {k: v for k, v in result.items() if k != "example_ids"})
            version = this.state.gallery_version
            if by.key is not None:
                connection.execute(
                    insert(requests),
                    {
                        "actor": by.actor,
                        "key": by.key,
                        "fingerprint": by.fingerprint,
                        "result": result,
                        "version": version,
                        "at": now(),
                    },
                )
        return Written(result, version)


def _before(connection: Connection, by: Write) -> Written | None:
    connection.execute(delete(requests).where(requests.c.at < now() - REMEMBERED))
    row = connection.execute(select(requests).where(requests.c.actor == by.actor, requests.c.key == by.key)).first()
    if row is None:
        return None
    if row.fingerprint != by.fingerprint:
        raise KeyReused(
            f"the idempotency key '{by.key}' was used for another request: expected a new key for a new request"
        )
    return Written(row.result, row.version, replayed=True)
