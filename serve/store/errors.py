"""What can go wrong with the store, and the one place where the errors of databases and drivers become ours."""

from __future__ import annotations

import sqlite3

from pg8000.exceptions import DatabaseError as PostgresError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from osml_plugin.errors import OsmlError


class StoreUnavailable(Exception):
    """The database is gone, locked by somebody else, or does not answer in time. Nothing was written, unless the
    connection broke in the very commit: repeat the write under its idempotency key."""


class StoreFull(StoreUnavailable):
    """There is no room left for a write. Nothing was written."""


class StaleModel(Exception):
    """An item was embedded by another model version than the active one: embed it again."""


class KeyReused(OsmlError):
    """An idempotency key that was used for another request."""


class NotThere(OsmlError):
    """No such class, item, job, group or image."""


class Conflict(OsmlError):
    """The request does not fit what is in the store now."""


def translated(error: Exception) -> Exception | None:
    """What `error` of SQLAlchemy, a driver or the operating system means; None: it is a defect of ours.

    SQLite: https://www.sqlite.org/rescode.html. PostgreSQL: its appendix A; class 22 is data and class 23 integrity.
    """
    cause = error.orig if isinstance(error, StatementError) else error
    if isinstance(cause, OsmlError):  # a text that no database takes: SQLAlchemy wraps what column types raise
        return cause
    if isinstance(cause, PostgresError) and isinstance(cause.args[0], dict):
        fields = cause.args[0]
        code, text = fields.get("C", ""), fields.get("M", "")
        full, ours = code == "53100", code[:2] in ("22", "23")
    elif isinstance(cause, sqlite3.Error):
        text = str(cause)
        full = getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        ours = not isinstance(cause, sqlite3.OperationalError) and type(cause) is not sqlite3.DatabaseError
    else:
        text = str(cause) or type(cause).__name__
        full, ours = False, isinstance(error, SQLAlchemyError) and not isinstance(error, DBAPIError | PoolTimeout)
    if ours:
        return None
    line = " ".join(text.split())
    if full:
        return StoreFull(f"the store has no room left ({line}): free some, then try again")
    return StoreUnavailable(f"the store cannot be used now ({line}): try again")
