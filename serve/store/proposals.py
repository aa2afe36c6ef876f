"""The proposed classes of a discovery: read, accepted, merged, rejected."""

from __future__ import annotations

from sqlalchemy import Connection, Row, and_, delete, func, or_, select, update

from .errors import Conflict, NotThere
from .gallery import become_examples, without_embedding_for_ever
from .ledger import Change, Ledger
from .records import Group, Write, Written
from .tables import groups, items, jobs, members


class Proposals(Ledger):
    """A group is decided upon once."""

    def groups(self, job_id: str) -> list[Group]:
        """By number. Members that were discarded or enrolled since are not listed, but for an accepted group, whose
        members are the examples that it became. Raises `NotThere` where there is no such discovery."""
        listed = or_(items.c.state == "unknown", and_(groups.c.state == "accepted", items.c.state == "example"))
        query = (
            select(members.c.number, members.c.item_id, members.c.exemplar)
            .join(items, items.c.id == members.c.item_id)
            .join(groups, and_(groups.c.job_id == members.c.job_id, groups.c.number == members.c.number))
            .where(members.c.job_id == job_id, listed)
            .order_by(members.c.number, members.c.rank)
        )
        with self._database.read() as connection:
            if (
                connection.execute(select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.kind == "discovery")).first()
                is None
            ):
                raise NotThere(f"no discovery '{job_id}': list the discoveries")
            found = connection.execute(select(groups).where(groups.c.job_id == job_id).order_by(groups.c.number)).all()
            inside: dict[int, list[Row]] = {group.number: [] for group in found}
            for row in connection.execute(query):
                inside[row.number].append(row)
        return [
            Group(
                number=group.number,
                confidence=group.confidence,
                members=tuple(row.item_id for row in inside[group.number]),
                exemplars=tuple(
                    row.item_id
                    for row in sorted(
                        (row for row in inside[group.number] if row.exemplar is not None), key=lambda row: row.exemplar
                    )
                ),
                state=group.state,
                name=group.name,
                id=group.id,
            )
            for group in found
        ]

    def group(self, job_id: str, number: int) -> Group:
        """One of them. Raises `NotThere`."""
        for group in self.groups(job_id):
            if group.number == number:
                return group
        raise NotThere(f"no group {number} in discovery '{job_id}': list its groups")

    def links(self) -> dict[str, int]:
        """Unknown items that are of one class with others, by what was merged: those of one number belong together."""
        query = select(items.c.id, items.c.linked).where(items.c.state == "unknown", items.c.linked.is_not(None))
        with self._database.read() as connection:
            return dict(connection.execute(query).all())

    def accept_group(self, by: Write, job_id: str, number: int, name: str) -> Written:
        """Its members that are still unknown become examples of a class. Result: name, n_examples, example_ids.

        Those that came without an image, by another model than the active one, stay unknown. Raises `NotThere`,
        `Conflict` where the group is decided or empty, `StaleModel` as `enroll_observations` does.
        """

        def change(this: Change) -> dict:
            _require_proposed(this.connection, job_id, number)
            inside = _members_of(job_id, number)
            query = select(items.c.id).join(members, members.c.item_id == items.c.id)
            still = query.where(*inside, items.c.state == "unknown").order_by(members.c.rank)
            unknown = list(this.connection.scalars(still))
            never = set(without_embedding_for_ever(this, unknown))
            enrolled = [id for id in unknown if id not in never]
            if not enrolled:
                raise Conflict(f"group {number} has no unknown item left: start another discovery")
            result = become_examples(this, name, enrolled)
            new = select(items.c.id).where(items.c.version == this.state.gallery_version)
            this.connection.execute(delete(members).where(*inside, members.c.item_id.not_in(new)))
            _decide(this.connection, job_id, number, state="accepted", name=result["name"])
            return result

        return self._write(by, "accept group", f"{job_id}/{number}", change)

    def merge_groups(self, by: Write, job_id: str, number: int, into: int) -> Written:
        """The members of one join another, and are linked to its members from now on (see `links`).

        Result: group, n_examples (those moved). Raises `NotThere`, `Conflict`.
        """

        def change(this: Change) -> dict:
            if number == into:
                raise Conflict(f"group {number} cannot be merged into itself: name another one")
            _require_proposed(this.connection, job_id, number)
            _require_proposed(this.connection, job_id, into)
            last = this.connection.scalar(select(func.max(members.c.rank)).where(*_members_of(job_id, into)))
            moved = update(members).where(*_members_of(job_id, number))
            behind = members.c.rank + (0 if last is None else last + 1)
            count = this.connection.execute(moved.values(number=into, rank=behind, exemplar=None)).rowcount
            _decide(this.connection, job_id, number, state="merged")
            inside = select(members.c.item_id).where(*_members_of(job_id, into))
            # Read before: SQLite would ask for it while it changes it.
            before = select(items.c.linked).where(items.c.id.in_(inside), items.c.linked.is_not(None)).distinct()
            blocks = list(this.connection.scalars(before))
            new = this.connection.scalar(select(func.coalesce(func.max(items.c.linked), 0) + 1))
            joined = or_(items.c.id.in_(inside), items.c.linked.in_(blocks))
            this.connection.execute(update(items).where(joined).values(linked=new))
            return {"group": into, "n_examples": count}

        return self._write(by, "merge groups", f"{job_id}/{number}", change)

    def reject_group(self, by: Write, job_id: str, number: int) -> Written:
        """Its members stay unknown, and are linked no more. Result: group. Raises `NotThere`, `Conflict`."""

        def change(this: Change) -> dict:
            _require_proposed(this.connection, job_id, number)
            _decide(this.connection, job_id, number, state="rejected")
            inside = select(members.c.item_id).where(*_members_of(job_id, number))
            this.connection.execute(update(items).where(items.c.id.in_(inside)).values(linked=None))
            return {"group": number}

        return self._write(by, "reject group", f"{job_id}/{number}", change)


def _members_of(job_id: str, number: int) -> list:
    return [members.c.job_id == job_id, members.c.number == number]


def _require_proposed(connection: Connection, job_id: str, number: int) -> None:
    state = connection.scalar(select(groups.c.state).where(groups.c.job_id == job_id, groups.c.number == number))
    if state is None:
        raise NotThere(f"no group {number} in discovery '{job_id}': list its groups")
    if state != "proposed":
        raise Conflict(f"group {number} was {state} already: choose one that is proposed")


def _decide(connection: Connection, job_id: str, number: int, **values: str) -> None:
    connection.execute(update(groups).where(groups.c.job_id == job_id, groups.c.number == number).values(values))
