"""Names of classes are in Unicode's composed form, so that one name is one class."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from osml_plugin.names import canonical

revision = "0003"
down_revision = "0002"

models = sa.table("osml_models", sa.column("serial"), sa.column("classes", sa.JSON))
trained = sa.table("osml_trained_classes", sa.column("name"), sa.column("current"))


def upgrade() -> None:
    connection = op.get_bind()
    for table, column in (("items", "name"), ("items", "nearest"), ("groups", "name"), ("trained_classes", "current")):
        _compose(connection, sa.table(f"osml_{table}", sa.column(column)), column)
    bundles = {serial: classes for serial, classes in connection.execute(sa.select(models.c.serial, models.c.classes))}
    _compose_trained(connection, [set(classes) for classes in bundles.values()])
    for serial, classes in bundles.items():
        composed = list(dict.fromkeys(map(canonical, classes)))
        if composed != classes:
            connection.execute(sa.update(models).where(models.c.serial == serial).values(classes=composed))


def _compose(connection: sa.Connection, table: sa.TableClause, column: str) -> None:
    there = table.c[column]
    for name in connection.scalars(sa.select(there).where(there.is_not(None)).distinct()).all():
        if name != canonical(name):
            connection.execute(sa.update(table).where(there == name).values({column: canonical(name)}))


def _compose_trained(connection: sa.Connection, bundles: list[set[str]]) -> None:
    """What became of a class of the bundles. Of one that was two, for it has two forms of one name, counts what became
    of the composed form, or of the other where that one was forgotten: nothing is forgotten that was not."""
    before = dict(connection.execute(sa.select(trained.c.name, trained.c.current)).all())
    rows = {name: current for name, current in before.items() if name == canonical(name)}
    for name, current in before.items():
        composed = canonical(name)
        both = any({name, composed} <= classes for classes in bundles)
        if name != composed and rows.get(composed) is None and (composed in rows or not both):
            rows[composed] = current
    for other in set().union(*bundles) - before.keys():  # forms that are as they were
        composed = canonical(other)
        if other != composed and rows.get(composed, other) is None and any({other, composed} <= c for c in bundles):
            del rows[composed]
    connection.execute(sa.delete(trained))
    if rows:
        connection.execute(sa.insert(trained), [{"name": name, "current": now} for name, now in rows.items()])
