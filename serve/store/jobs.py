"""Work in the background: queued, taken by one worker at a time under a lease, finished once."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from sqlalchemy import Connection, Row, and_, delete, insert, or_, select, update

from .errors import NotThere
from .ledger import Change, Ledger, batches, new_id, now
from .records import Group, Job, Write, Written
from .tables import groups, items, jobs, members, state

KEPT = 20
"""So many jobs of a kind that are done are remembered, and so many that failed."""
ATTEMPTS = 10
"""A job whose worker was lost so often fails: it may be what kills them."""

_COLUMNS = [
    jobs.c[name] for name in ("id", "kind", "args", "state", "progress", "error", "created_at", "finished_at", "result")
]


class Jobs(Ledger):
    """Leases go by the clocks of the machines that work. A clock that is wrong makes two of them do the same work; it
    is still finished once."""

    def start_discovery(self, by: Write, args: dict[str, Any], model: str) -> Written:
        """Queues the grouping of the unknowns, as embedded by `model` (which joins the job's `args`). Result: id."""

        def change(this: Change) -> dict:
            return {"id": queue(this.connection, by.actor, "discovery", {**args, "model": model})}

        return self._write(by, "discover", None, change)

    def claim_job(self, worker: str, lease_s: float) -> Job | None:
        """The oldest job that waits, or whose worker was lost; it is this worker's for `lease_s` seconds."""
        with self._database.read() as connection:  # asked often, and mostly in vain: without the lock of the writers
            if connection.execute(select(jobs.c.id).where(_claimable()).limit(1)).first() is None:
                return None
        with self._database.write() as connection:
            query = select(jobs.c.id, jobs.c.attempts).where(_claimable()).order_by(jobs.c.created_at, jobs.c.id)
            for id, attempts in connection.execute(query).all():
                if attempts >= ATTEMPTS:
                    end_job(connection, id, "failed", error=f"its worker was lost {attempts} times")
                    continue
                lease = {"worker": worker, "lease_until": now() + timedelta(seconds=lease_s), "attempts": attempts + 1}
                connection.execute(update(jobs).where(jobs.c.id == id).values(state="running", **lease))
                return Job(*connection.execute(select(*_COLUMNS).where(jobs.c.id == id)).one())
        return None

    def renew(self, job_id: str, worker: str, progress: float, lease_s: float) -> bool:
        """False: the job is another's by now, or over. Stop."""
        with self._database.write() as connection:
            lease_until = now() + timedelta(seconds=lease_s)
            mine = update(jobs).where(*_held(job_id, worker)).values(progress=progress, lease_until=lease_until)
            return connection.execute(mine).rowcount == 1

    def finish_discovery(self, job_id: str, worker: str, found: Sequence[Group], result: dict[str, Any]) -> bool:
        """Writes the groups down. Members that are no longer in the store are left out. False: see `renew`.

        They get the ids of the groups of the last discovery that they continue (see `identify`), others new ones; what
        happened to those joins `result` as `changes`. A group most of whose items were rejected there is rejected.
        """
        from osml_plugin.discovery import Identities, identify  # it brings torch, which `osml keys` can do without

        with self._database.write() as connection:
            if not _holds(connection, job_id, worker):
                return False
            last = _last_groups(connection)
            previous = Identities(
                of_item={row.item_id: row.id for row in last}, next_id=connection.scalar(select(state.c.next_group))
            )
            rejected = {row.item_id for row in last if row.state == "rejected"}
            keys = [id for group in found for id in group.members]
            of_key = np.repeat(np.arange(len(found)), [len(group.members) for group in found])
            carried = identify(previous, keys, of_key)
            connection.execute(update(state).values(next_group=carried.identities.next_id))
            there = set()
            for batch in batches(id for group in found for id in group.members):
                there.update(connection.scalars(select(items.c.id).where(items.c.id.in_(batch))))
            proposed, rows = [], []
            for group, lasting in zip(found, carried.ids.tolist(), strict=True):
                again = 2 * len(rejected.intersection(group.members)) > len(group.members)
                proposed.append(
                    {
                        "job_id": job_id,
                        "number": group.number,
                        "id": lasting,
                        "confidence": group.confidence,
                        "state": "rejected" if again else group.state,
                        "name": group.name,
                    }
                )
                exemplar = {id: rank for rank, id in enumerate(group.exemplars)}
                rows += [
                    {
                        "job_id": job_id,
                        "item_id": id,
                        "number": group.number,
                        "rank": rank,
                        "exemplar": exemplar.get(id),
                    }
                    for rank, id in enumerate(group.members)
                    if id in there
                ]
            if proposed:
                connection.execute(insert(groups), proposed)
            if rows:
                connection.execute(insert(members), rows)
            end_job(connection, job_id, "done", result={**result, "changes": carried.sentences() if last else []})
            return True

    def fail_job(self, job_id: str, worker: str, reason: str) -> bool:
        """False: see `renew`. A model version that cannot be prepared is no longer pending."""
        with self._database.write() as connection:
            if not _holds(connection, job_id, worker):
                return False
            end_job(connection, job_id, "failed", error=reason)
            return True

    def job(self, id: str) -> Job:
        """Raises `NotThere`."""
        with self._database.read() as connection:
            row = connection.execute(select(*_COLUMNS).where(jobs.c.id == id)).first()
        if row is None:
            raise NotThere(f"no job '{id}': it was never started, or is not among the last {KEPT}")
        return Job(*row)

    def jobs(self, kind: str, limit: int) -> list[Job]:
        """The newest first."""
        query = select(*_COLUMNS).where(jobs.c.kind == kind).order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
        with self._database.read() as connection:
            return [Job(*row) for row in connection.execute(query.limit(limit))]


def queue(connection: Connection, actor: str, kind: str, args: dict[str, Any]) -> str:
    id = new_id()
    connection.execute(
        insert(jobs),
        {
            "id": id,
            "kind": kind,
            "args": args,
            "actor": actor,
            "state": "queued",
            "progress": 0.0,
            "created_at": now(),
            "attempts": 0,
        },
    )
    return id


def end_job(
    connection: Connection, id: str, to: str, *, error: str | None = None, result: dict[str, Any] | None = None
) -> None:
    """`to`: done or failed. Old jobs of its kind are dropped; a model version whose job failed is not pending."""
    values = {"state": to, "error": error, "result": result, "finished_at": now(), "worker": None, "lease_until": None}
    if to == "done":
        values["progress"] = 1.0
    connection.execute(update(jobs).where(jobs.c.id == id).values(values))
    kind, args = connection.execute(select(jobs.c.kind, jobs.c.args).where(jobs.c.id == id)).one()
    if to == "failed" and kind == "model":
        connection.execute(update(state).where(state.c.pending == args["version"]).values(pending=None))
    finished = select(jobs.c.id).where(jobs.c.kind == kind, jobs.c.state == to)
    old = list(connection.scalars(finished.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).offset(KEPT)))
    if old:
        connection.execute(delete(jobs).where(jobs.c.id.in_(old)))


def _last_groups(connection: Connection) -> Sequence[Row]:
    """The unknown items of the last discovery that found groups: `item_id`, and `id` and `state` of the group."""
    done = select(groups.c.job_id).join(jobs, jobs.c.id == groups.c.job_id)
    last = done.order_by(jobs.c.finished_at.desc(), jobs.c.id.desc()).limit(1)
    query = (
        select(members.c.item_id, groups.c.id, groups.c.state)
        .join(groups, and_(groups.c.job_id == members.c.job_id, groups.c.number == members.c.number))
        .join(items, items.c.id == members.c.item_id)
        .where(members.c.job_id == last.scalar_subquery(), items.c.state == "unknown")
    )
    return connection.execute(query).all()


def _claimable():
    return or_(jobs.c.state == "queued", and_(jobs.c.state == "running", jobs.c.lease_until < now()))


def _held(job_id: str, worker: str) -> list:
    return [jobs.c.id == job_id, jobs.c.worker == worker, jobs.c.state == "running"]


def _holds(connection: Connection, job_id: str, worker: str) -> bool:
    return connection.execute(select(jobs.c.id).where(*_held(job_id, worker))).first() is not None
