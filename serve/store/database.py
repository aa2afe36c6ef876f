"""One database, SQLite or PostgreSQL: short transactions, limits of time, and the schema brought up to date."""

from __future__ import annotations

import os
import sqlite3
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import pg8000
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock
from sqlalchemy import URL, Connection, Engine, QueuePool, create_engine, event, make_url, select, text
from sqlalchemy.exc import ArgumentError, DisconnectionError, SQLAlchemyError

from osml_plugin.errors import OsmlError

from .errors import StoreFull, StoreUnavailable, translated
from .reserve import Reserve
from .tables import state

T = TypeVar("T")
PATIENCE = 5.0
"""Seconds that connecting, waiting for a lock, or an answer on the wire may take."""
VERSION_TABLE = "osml_schema"
SSL_MODES = {
    "disable": lambda: False,
    "prefer": lambda: None,
    "require": lambda: True,
    "verify-full": ssl.create_default_context,
}
_upgrading = threading.Lock()  # alembic's context is one per process


class Database:
    """The database at `url`: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST[:PORT]/NAME[?sslmode=require]`.

    Opening it brings the schema up to date. It can be used by any number of threads, and the database by any number of
    processes. A lost connection fails the call it is lost in; the next one connects again.

    Raises `OsmlError` for a URL of another kind and for a schema newer than this program, `StoreUnavailable` where the
    database cannot be reached, locked or read in time.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):
            raise OsmlError(_expected("this is no URL of a database")) from None
        with _translating():
            if parsed.drivername == "sqlite" and parsed.database and parsed.database != ":memory:":
                file = Path(parsed.database).absolute()
                file.parent.mkdir(parents=True, exist_ok=True)
                self.file, self.reserve = file, Reserve(file.with_name(f"{file.name}.reserve"))
                self._serve(_sqlite(file))
                # Changing a file to WAL is the one thing for which SQLite does not wait for other processes.
                with FileLock(f"{file}.lock", timeout=60):
                    file.touch(mode=0o600)
                    self._bring_up_to_date()
                    self.reserve_room()
            elif parsed.drivername in ("postgresql", "postgresql+pg8000") and parsed.username and parsed.database:
                self._serve(_postgresql(parsed))
                self._bring_up_to_date()
            else:
                raise OsmlError(_expected(f"no store can be at '{parsed.render_as_string(hide_password=True)}'"))
        self._turn, self._thread = threading.Lock(), threading.local()

    file: Path | None = None
    """Of SQLite; None: the database is PostgreSQL's."""
    reserve: Reserve | None = None
    """Of the disk that SQLite's file is on; how PostgreSQL's is kept from filling up is its own affair."""

    def _serve(self, engine: Engine) -> None:
        self._engine, self._writing = engine, engine.execution_options(writes=True)

    def close(self) -> None:
        """The last one to close a SQLite file leaves all of it in that one file, without a log beside it."""
        self._engine.dispose()

    def is_read_only(self) -> bool:
        """Whether it can be read and, for now, not be written: its file or disk is read-only, or it is a standby."""
        if self.file is not None:
            return self.file.exists() and not all(os.access(p, os.W_OK) for p in (self.file, self.file.parent))
        with self.read() as connection:
            standby = connection.scalar(text("SELECT pg_is_in_recovery()"))
            return standby or connection.scalar(text("SHOW default_transaction_read_only")) == "on"

    def copy_to(self, file: Path) -> None:
        """Write a SQLite database as it is at one moment into a new file, while others read and write it."""
        with _translating(), self._engine.connect() as connection:
            # On the driver's own connection: SQLAlchemy would begin a transaction, in which this cannot be done.
            connection.connection.driver_connection.execute("VACUUM INTO ?", (str(file),))

    def reserve_room(self) -> None:
        if self.reserve is not None:
            self.reserve.fill()

    def making_room(self, write: Callable[[], T]) -> T:
        """Do a write that makes room; on a full disk once more, with the room that is reserved for it."""
        try:
            return write()
        except StoreFull:
            if self.reserve is None or not self.reserve.spend():
                raise
        self._thread.sparing = True
        try:
            return write()
        finally:
            self._thread.sparing = False

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one moment of the database."""
        with _translating(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is alone in writing; it is committed and on disk when this returns."""
        # Threads of one process wait here, in their turn: SQLite's own waiting is sleeping and trying again.
        if not self._turn.acquire(timeout=PATIENCE):
            raise StoreUnavailable(f"the store cannot be used now (busy for {PATIENCE:g} s): try again")
        try:
            with _translating(), self._writing.begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.execute(select(state.c.id).with_for_update())
                with _sparing(connection) if getattr(self._thread, "sparing", False) else nullcontext():
                    yield connection
        finally:
            self._turn.release()

    def _bring_up_to_date(self) -> None:
        config = Config()
        config.set_main_option("script_location", f"{__package__}:migrations")
        scripts = ScriptDirectory.from_config(config)
        with self._writing.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(7216470)"))
            there = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
            if there is not None and there not in {script.revision for script in scripts.walk_revisions()}:
                raise OsmlError(
                    f"the store was written by a newer version of osml-plugin (schema '{there}'; this one knows up to "
                    f"'{scripts.get_current_head()}'): update osml-plugin"
                )
            if there != scripts.get_current_head():
                config.attributes["connection"] = connection
                with _upgrading:
                    command.upgrade(config, "head")


@contextmanager
def _sparing(connection: Connection) -> Iterator[None]:
    """Deletes without overwriting what is deleted, where SQLite was built to: in the log this takes as much room as the
    deleted takes in the file. The next writes overwrite it."""
    before = connection.exec_driver_sql("PRAGMA secure_delete").scalar()
    connection.exec_driver_sql("PRAGMA secure_delete = FAST")
    try:
        yield
    finally:
        connection.exec_driver_sql(f"PRAGMA secure_delete = {before}")


def shown(url: str) -> str:
    """Without a password."""
    return make_url(url).render_as_string(hide_password=True)


@contextmanager
def _translating() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        known = translated(error)
        if known is None:
            raise
        raise known from error


def _expected(what: str) -> str:
    return f"{what}: expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"


def _sqlite(file: Path) -> Engine:
    def connect() -> sqlite3.Connection:
        # mode=rw: a file that was taken away is an error, not a new and empty store.
        uri = f"file:{quote(str(file))}?mode=rw"
        connection = sqlite3.connect(
            uri, uri=True, timeout=PATIENCE, isolation_level=None, check_same_thread=False, cached_statements=512
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def which() -> tuple[int, int]:
        found = os.stat(file)
        return found.st_dev, found.st_ino

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_timeout=PATIENCE)

    @event.listens_for(engine, "connect")
    def opened(connection, record) -> None:
        record.info["file"] = which()

    @event.listens_for(engine, "checkout")
    def still_that_file(connection, record, proxy) -> None:
        # Where the file was replaced or removed, SQLite would go on writing into the one that nobody sees any more.
        if record.info["file"] != which():
            raise DisconnectionError("the file was replaced")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if _writes(connection) else "BEGIN")

    return engine


def _postgresql(url: URL) -> Engine:
    mode = url.query.get("sslmode", "prefer")
    if url.query.keys() - {"sslmode"} or mode not in SSL_MODES:
        raise OsmlError(_expected(f"of options, '?sslmode=' can be given, and be one of {', '.join(SSL_MODES)}"))
    # The server gives up a statement just before this end of the wire does. A client that vanished in a transaction
    # holds the lock of all writers: its session ends soon.
    limits = {
        "statement_timeout": str(round(PATIENCE * 900)),
        "idle_in_transaction_session_timeout": "30000",
        "tcp_keepalives_idle": "10",
        "tcp_keepalives_interval": "5",
        "tcp_keepalives_count": "3",
    }
    engine = create_engine(
        url.set(drivername="postgresql+pg8000", query={}),
        connect_args={
            "timeout": PATIENCE,
            "ssl_context": SSL_MODES[mode](),
            "application_name": "osml",
            "startup_params": limits,
        },
        pool_pre_ping=True,
        pool_timeout=PATIENCE,
    )

    @event.listens_for(engine, "handle_error")
    def broken(context) -> None:
        # pg8000 lets some errors of the socket through as they are; such a connection is of no more use.
        if isinstance(context.original_exception, OSError | pg8000.InterfaceError):
            context.is_disconnect = True

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if not _writes(connection):
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")

    return engine


def _writes(connection: Connection) -> bool:
    return connection.get_execution_options().get("writes", False)
