"""Groups have ids that last from discovery to discovery, and merging them links their items."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("osml_state", sa.Column("next_group", sa.Integer, nullable=False, server_default="0"))
    op.add_column("osml_items", sa.Column("linked", sa.Integer))
    op.add_column("osml_groups", sa.Column("id", sa.Integer, nullable=False, server_default="0"))

    # What the discoveries until now had in common is not known: each of their groups is one of its own.
    state = sa.table("osml_state", sa.column("next_group"))
    groups = sa.table("osml_groups", sa.column("job_id"), sa.column("number"), sa.column("id"))
    connection = op.get_bind()
    there = connection.execute(sa.select(groups.c.job_id, groups.c.number).order_by(groups.c.job_id, groups.c.number))
    for id, (job, number) in enumerate(there.all()):
        one = sa.update(groups).where(groups.c.job_id == job, groups.c.number == number)
        connection.execute(one.values(id=id))
        connection.execute(sa.update(state).values(next_group=id + 1))
