"""Run by alembic, on the connection and in the transaction of `Database`; there is no alembic.ini."""

from __future__ import annotations

from alembic import context

from osml_plugin.serve.store.database import VERSION_TABLE
from osml_plugin.serve.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE
)
with context.begin_transaction():
    context.run_migrations()
