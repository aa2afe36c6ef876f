"""The versions of the model: which is active, which is being prepared, and the embeddings by each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sqlalchemy import Connection, func, insert, select, update

from .errors import Conflict
from .gallery import recognized_names
from .jobs import end_job, queue
from .ledger import Change, Ledger, batches, now, to_blob
from .records import ModelRecord, Write, Written
from .tables import embeddings, images, items, jobs, models, state


class Models(Ledger):
    """A version becomes active when every image has its embedding; until then the old one answers."""

    def models(self) -> list[ModelRecord]:
        """The newest first."""
        with self._database.read() as connection:
            return _records(connection, models.c.serial.desc())

    def previous_model(self) -> ModelRecord | None:
        """The one that was active before the present one."""
        with self._database.read() as connection:
            activated = [m for m in _records(connection, models.c.activated_in.desc()) if m.activated_at is not None]
        return next((m for m in activated if not m.active), None)

    def ask_model(
        self,
        by: Write,
        version: str,
        source: str,
        classes: Sequence[str],
        asked: Mapping[str, Any] | None = None,
    ) -> Written:
        """A model version is to be the active one. Result: target, state: active (it is) or preparing (a job does).

        Replaces what is pending. The first model of a store leaves the gallery at its version. `asked`: what a
        configuration asked for, see `State`.
        """

        def change(this: Change) -> dict:
            this.note(asked)
            if this.connection.execute(select(models.c.serial).where(models.c.version == version)).first() is None:
                this.connection.execute(
                    insert(models), {"version": version, "source": source, "classes": list(classes)}
                )
            active = version == this.state.model
            if this.state.pending is not None and (active or version != this.state.pending):
                _supersede(this)
            if active:
                pass
            elif this.state.model is None or not _missing(this.connection, version):
                _activate(this, version)
                active = True
            elif this.state.pending is None:
                this.set(pending=version)
                queue(this.connection, by.actor, "model", {"version": version})
            return {"target": version, "state": "active" if active else "preparing"}

        return self._write(by, "model", version, change)

    def without_embedding(self, model: str, limit: int) -> list[tuple[str, bytes]]:
        """Images that `model` has not embedded yet, with their item ids: of examples first, then of unknown items."""
        query = select(items.c.id, images.c.data).join(images, images.c.item_id == items.c.id)
        query = query.where(_lacks(model)).order_by(items.c.state, items.c.id).limit(limit)
        with self._database.read() as connection:
            return [(id, bytes(data)) for id, data in connection.execute(query)]

    def count_without_embedding(self, model: str) -> int:
        query = select(func.count()).select_from(items).where(_lacks(model))
        with self._database.read() as connection:
            return connection.scalar(query)

    def add_embeddings(self, model: str, vectors: Mapping[str, np.ndarray | None]) -> None:
        """Embeddings `(D,)` by `model` of items, by their ids; None: it cannot embed the item, and is not to try again.
        Items that went meanwhile are passed over, and so are those that another replica embedded meanwhile: replicas
        hold these already, and embeddings of one image in two batches differ in their last digits."""
        with self._database.write() as connection:
            for batch in batches(vectors):
                there = connection.scalars(select(items.c.id).where(items.c.id.in_(batch), _has_no(model))).all()
                blobs = {id: b"" if vectors[id] is None else to_blob(vectors[id]) for id in there}
                rows = [{"item_id": id, "model": model, "vector": blob} for id, blob in blobs.items()]
                if rows:
                    connection.execute(insert(embeddings), rows)

    def finish_model(self, job_id: str, version: str) -> bool:
        """Makes `version` active if nothing is left to embed. False: go on (or stop, if `renew` says so)."""
        with self._database.write() as connection:
            this = Change(connection)
            job = connection.execute(select(jobs.c.state, jobs.c.actor).where(jobs.c.id == job_id)).first()
            if job is None or job.state != "running" or this.state.pending != version or _missing(connection, version):
                return False
            _activate(this, version)
            end_job(connection, job_id, "done")
            this.log(job.actor, "model", version, {"target": version, "state": "active"})
            return True


def _records(connection: Connection, order) -> list[ModelRecord]:
    active = connection.scalar(select(state.c.model))
    rows = connection.execute(select(models).order_by(order))
    return [
        ModelRecord(row.version, row.source, tuple(row.classes), row.activated_at, row.version == active)
        for row in rows
    ]


def _lacks(model: str):
    """An item that came as something to be embedded, and has no embedding by `model`."""
    return items.c.id.in_(select(images.c.item_id)) & _has_no(model)


def _has_no(model: str):
    """An item that is there and has no embedding by `model`."""
    by_model = select(embeddings.c.item_id).where(embeddings.c.item_id == items.c.id, embeddings.c.model == model)
    return (items.c.state != "gone") & ~by_model.exists()


def _missing(connection: Connection, model: str) -> bool:
    return connection.execute(select(items.c.id).where(_lacks(model)).limit(1)).first() is not None


def _activate(this: Change, version: str) -> None:
    left = recognized_names(this.connection, version)
    if this.state.model is not None and len(left) < 2:
        raise Conflict(f"model '{version}' would know {len(left)} of the classes that are left: enrol others by images")
    if this.state.model is None:
        this.set(model=version, pending=None)
    else:
        this.next_version(model=version, pending=None)
    values = {"activated_at": now(), "activated_in": this.state.gallery_version}
    this.connection.execute(update(models).where(models.c.version == version).values(values))


def _supersede(this: Change) -> None:
    waiting = select(jobs.c.id).where(jobs.c.kind == "model", jobs.c.state.in_(("queued", "running")))
    for id in this.connection.scalars(waiting).all():
        end_job(this.connection, id, "failed", error="superseded")
    this.set(pending=None)
