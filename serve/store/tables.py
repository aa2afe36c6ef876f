"""The tables. Their names begin with `osml_`, so that a PostgreSQL database can be shared with other programs."""

from __future__ import annotations

from datetime import UTC

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)
from sqlalchemy.types import TypeDecorator

from osml_plugin.errors import OsmlError


class Words(TypeDecorator):
    """Unicode text. NUL and lone surrogates, which PostgreSQL and UTF-8 refuse, are an `OsmlError` everywhere."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value, dialect):
        if value is not None:
            try:
                refused = b"\0" in value.encode()
            except UnicodeEncodeError:
                refused = True
            if refused:
                raise OsmlError(f"{value!r} holds NUL or half a character: expected text that can be stored as UTF-8")
        return value


class Moment(TypeDecorator):
    """A time: stored as UTC without its zone, and read back with it."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value, dialect):
        return None if value is None else value.replace(tzinfo=UTC)


metadata = MetaData()

# One row. PostgreSQL locks it for each write, so that writes are serial as they are in SQLite.
state = Table(
    "osml_state",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("gallery_version", BigInteger, nullable=False),
    Column("keys_version", BigInteger, nullable=False),
    Column("model", Words),
    Column("pending", Words),
    Column("alpha", Double),
    Column("asked", JSON, nullable=False),
    Column("next_group", Integer, nullable=False),  # the id of the next new group: never one that was used before
)

# Unknown items, examples, and the ids of examples that are gone (replicas must learn of those).
items = Table(
    "osml_items",
    metadata,
    Column("id", Words, primary_key=True),
    Column("state", Words, nullable=False),  # unknown, example, gone
    Column("name", Words),  # the class of an example
    Column("version", BigInteger),  # the gallery version that changed it last; None: never in the gallery
    Column("created_at", Moment, nullable=False),
    Column("has_image", Boolean, nullable=False),
    Column("score", Double),
    Column("nearest", Words),
    Column("p_value", Double),
    Column("linked", Integer),  # unknown items of one number are of one class, said who merged their groups
)
Index("osml_items_state", items.c.state, items.c.id)
_in_gallery = items.c.version.is_not(None)
Index("osml_items_name", items.c.name, items.c.id, sqlite_where=_in_gallery, postgresql_where=_in_gallery)
Index("osml_items_version", items.c.version, sqlite_where=_in_gallery, postgresql_where=_in_gallery)

images = Table(
    "osml_images",
    metadata,
    Column("item_id", Words, ForeignKey(items.c.id, ondelete="CASCADE"), primary_key=True),
    Column("media_type", Words, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

embeddings = Table(
    "osml_embeddings",
    metadata,
    Column("item_id", Words, ForeignKey(items.c.id, ondelete="CASCADE"), primary_key=True),
    Column("model", Words, primary_key=True),
    Column("vector", LargeBinary, nullable=False),  # float32, little-endian
)

models = Table(
    "osml_models",
    metadata,
    Column("serial", Integer, primary_key=True),
    Column("version", Words, nullable=False, unique=True),
    Column("source", Words, nullable=False),
    Column("classes", JSON, nullable=False),
    Column("activated_at", Moment),
    Column("activated_in", BigInteger),  # the gallery version
)

# What became of classes of bundles.
trained_classes = Table(
    "osml_trained_classes",
    metadata,
    Column("name", Words, primary_key=True),
    Column("current", Words),  # None: forgotten
)

changes = Table(
    "osml_changes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("at", Moment, nullable=False),
    Column("actor", Words, nullable=False),
    Column("action", Words, nullable=False),
    Column("subject", Words),
    Column("details", JSON, nullable=False),
    Column("model", Words),
)

requests = Table(
    "osml_requests",
    metadata,
    Column("actor", Words, primary_key=True),
    Column("key", Words, primary_key=True),
    Column("fingerprint", Words),
    Column("result", JSON, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("at", Moment, nullable=False, index=True),
)

jobs = Table(
    "osml_jobs",
    metadata,
    Column("id", Words, primary_key=True),
    Column("kind", Words, nullable=False),
    Column("args", JSON, nullable=False),
    Column("actor", Words, nullable=False),
    Column("state", Words, nullable=False),
    Column("progress", Double, nullable=False),
    Column("error", Words),
    Column("created_at", Moment, nullable=False),
    Column("finished_at", Moment),
    Column("result", JSON(none_as_null=True)),
    Column("worker", Words),
    Column("lease_until", Moment),
    Column("attempts", Integer, nullable=False),
)

groups = Table(
    "osml_groups",
    metadata,
    Column("job_id", Words, ForeignKey(jobs.c.id, ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("id", Integer, nullable=False),  # the same in each discovery that finds the group again
    Column("confidence", Double, nullable=False),
    Column("state", Words, nullable=False),
    Column("name", Words),
)

members = Table(
    "osml_members",
    metadata,
    Column("job_id", Words, primary_key=True),
    Column("item_id", Words, ForeignKey(items.c.id, ondelete="CASCADE"), primary_key=True, index=True),
    Column("number", Integer, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("exemplar", Integer),  # its rank among the exemplars
    ForeignKeyConstraint(["job_id", "number"], [groups.c.job_id, groups.c.number], ondelete="CASCADE"),
)

keys = Table(
    "osml_keys",
    metadata,
    Column("id", Words, primary_key=True),
    Column("name", Words, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("digest", Words, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("revoked_at", Moment),
)
