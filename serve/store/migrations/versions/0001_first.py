"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    state = op.create_table(
        "osml_state",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("gallery_version", sa.BigInteger, nullable=False),
        sa.Column("keys_version", sa.BigInteger, nullable=False),
        sa.Column("model", sa.Text),
        sa.Column("pending", sa.Text),
        sa.Column("alpha", sa.Double),
        sa.Column("asked", sa.JSON, nullable=False),
    )
    op.bulk_insert(state, [{"id": 1, "gallery_version": 0, "keys_version": 0, "asked": {}}])

    items = op.create_table(
        "osml_items",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("name", sa.Text),
        sa.Column("version", sa.BigInteger),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("has_image", sa.Boolean, nullable=False),
        sa.Column("score", sa.Double),
        sa.Column("nearest", sa.Text),
        sa.Column("p_value", sa.Double),
    )
    op.create_index("osml_items_state", "osml_items", ["state", "id"])
    in_gallery = items.c.version.is_not(None)
    for name, columns in (("osml_items_name", ["name", "id"]), ("osml_items_version", ["version"])):
        op.create_index(name, "osml_items", columns, sqlite_where=in_gallery, postgresql_where=in_gallery)

    op.create_table(
        "osml_images",
        sa.Column("item_id", sa.Text, sa.ForeignKey("osml_items.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("media_type", sa.Text, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "osml_embeddings",
        sa.Column("item_id", sa.Text, sa.ForeignKey("osml_items.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("vector", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "osml_models",
        sa.Column("serial", sa.Integer, primary_key=True),
        sa.Column("version", sa.Text, nullable=False, unique=True),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("classes", sa.JSON, nullable=False),
        sa.Column("activated_at", sa.DateTime),
        sa.Column("activated_in", sa.BigInteger),
    )
    op.create_table(
        "osml_trained_classes",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("current", sa.Text),
    )
    op.create_table(
        "osml_changes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("at", sa.DateTime, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("subject", sa.Text),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("model", sa.Text),
    )
    op.create_table(
        "osml_requests",
        sa.Column("actor", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("fingerprint", sa.Text),
        sa.Column("result", sa.JSON, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("at", sa.DateTime, nullable=False, index=True),
    )
    op.create_table(
        "osml_jobs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("args", sa.JSON, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("progress", sa.Double, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("finished_at", sa.DateTime),
        sa.Column("result", sa.JSON),
        sa.Column("worker", sa.Text),
        sa.Column("lease_until", sa.DateTime),
        sa.Column("attempts", sa.Integer, nullable=False),
    )
    op.create_table(
        "osml_groups",
        sa.Column("job_id", sa.Text, sa.ForeignKey("osml_jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("confidence", sa.Double, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("name", sa.Text),
    )
    op.create_table(
        "osml_members",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("item_id", sa.Text, sa.ForeignKey("osml_items.id", ondelete="CASCADE"), primary_key=True, index=True),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("exemplar", sa.Integer),
        sa.ForeignKeyConstraint(["job_id", "number"], ["osml_groups.job_id", "osml_groups.number"], ondelete="CASCADE"),
    )
    op.create_table(
        "osml_keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("revoked_at", sa.DateTime),
    )
