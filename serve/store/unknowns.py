"""The unknown pool: what was rejected and is remembered for a while."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
from sqlalchemy import delete, func, or_, select

from .errors import NotThere
from .gallery import insert_items, is_image, require_unknown
from .ledger import Change, Ledger, batches, from_blob, now
from .records import Observation, Unknown, Write, Written
from .tables import embeddings, images, items

_COLUMNS = (items.c.id, items.c.created_at, items.c.score, items.c.nearest, items.c.p_value, items.c.has_image)
_UNKNOWN = items.c.state == "unknown"


class Unknowns(Ledger):
    """Observations in, for discovery and enrolment; the pool's bounds."""

    def observe(self, observations: Sequence[Observation]) -> None:
        """Adds them in one transaction. One that is there already (the call was repeated) is left as it is."""
        with self._database.write() as connection:
            there = set()
            for batch in batches(o.id for o in observations):
                there.update(connection.scalars(select(items.c.id).where(items.c.id.in_(batch))))
            by_model: dict[str, list] = {}
            for o in observations:
                if o.id not in there:
                    columns = {"state": "unknown", "score": o.score, "nearest": o.nearest, "p_value": o.p_value}
                    by_model.setdefault(o.model, []).append((o.id, o.item, columns))
            for model, new in by_model.items():
                insert_items(connection, model, new)

    def unknowns(self, limit: int, after: str | None = None) -> tuple[int, list[Unknown], str | None]:
        """How many there are, a page of them, the newest first, and what to give as `after` for the next page."""
        query = select(*_COLUMNS).where(_UNKNOWN).order_by(items.c.id.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(items.c.id < after)
        with self._database.read() as connection:
            total = connection.scalar(select(func.count()).where(_UNKNOWN))
            found = [Unknown(*row) for row in connection.execute(query)]
        return total, found[:limit], found[limit - 1].id if len(found) > limit else None

    def unknown(self, id: str) -> Unknown:
        """Raises `NotThere`."""
        with self._database.read() as connection:
            row = connection.execute(select(*_COLUMNS).where(_UNKNOWN, items.c.id == id)).first()
        if row is None:
            raise NotThere(f"no unknown item '{id}': it was discarded, enrolled, or never seen")
        return Unknown(*row)

    def image(self, id: str) -> tuple[bytes, str]:
        """The image of an unknown item or an example, and its media type. Raises `NotThere`."""
        with self._database.read() as connection:
            row = connection.execute(select(images.c.data, images.c.media_type).where(images.c.item_id == id)).first()
        if row is None or not is_image(row.media_type):
            raise NotThere(f"no image of item '{id}': it is not there, or came as an embedding")
        return bytes(row.data), row.media_type

    def unknown_embeddings(self, model: str, newest: int) -> tuple[list[str], np.ndarray]:
        """Ids and embeddings `(N, D)` float32 by `model`, the newest first."""
        query = (
            select(items.c.id, embeddings.c.vector)
            .join(embeddings, (embeddings.c.item_id == items.c.id) & (embeddings.c.model == model))
            .where(_UNKNOWN, embeddings.c.vector != b"")
            .order_by(items.c.id.desc())
            .limit(newest)
        )
        with self._database.read() as connection:
            rows = connection.execute(query, execution_options={"yield_per": 5000}).all()
        if not rows:
            return [], np.empty((0, 0), np.float32)
        return [row.id for row in rows], np.stack([from_blob(row.vector) for row in rows])

    def discard(self, by: Write, ids: Sequence[str]) -> Written:
        """Removes unknown items for good. Result: n_examples, example_ids. Raises `NotThere`: then none is removed."""

        def change(this: Change) -> dict:
            unique = require_unknown(this.connection, ids)
            for batch in batches(unique):
                this.connection.execute(delete(items).where(items.c.id.in_(batch)))
            return {"n_examples": len(unique), "example_ids": unique}

        return self._write(by, "discard", None, change, frees=True)

    def prune_unknowns(self, keep: int, days: float) -> int:
        """Leaves the newest `keep` of the pool, and none older than `days`; how many went. Never an example."""
        old = items.c.created_at < now() - timedelta(days=days)

        def some() -> int:
            with self._database.write() as connection:
                newest = select(items.c.id).where(_UNKNOWN).order_by(items.c.id.desc())
                first_out = connection.scalar(newest.offset(keep).limit(1))
                beyond = or_(old, items.c.id <= first_out) if first_out is not None else old
                batch = list(connection.scalars(select(items.c.id).where(_UNKNOWN, beyond).limit(500)))
                if batch:
                    connection.execute(delete(items).where(items.c.id.in_(batch)))
                return len(batch)

        pruned = 0
        while True:  # in short transactions: others write in between
            n = self._database.making_room(some)
            pruned += n
            if n < 500:
                return pruned
