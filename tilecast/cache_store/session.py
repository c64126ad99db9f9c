"""The one place that opens engines, commits, rolls back and translates database errors."""

from __future__ import annotations

import contextlib
import operator
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, Insert, create_engine, event, pool
from sqlalchemy.exc import SQLAlchemyError

from tilecast.cache_store.plain import BUSY_TIMEOUT_S, connect, translate
from tilecast.errors import CacheError

CONNECT_TIMEOUT_S = 10
"""How long a server may take to answer a new connection."""
WRITE_LOCK = 0x54494C45
"""Number of the PostgreSQL lock under which one transaction at a time writes, as SQLite has it by nature."""


class Database:
    """An engine with a name for messages, and its transactions."""

    def __init__(self, engine: Engine, name: str) -> None:
        """Take over the engine; `name` never holds a password."""
        self.name = name
        self._engine = engine
        self._process = os.getpid()
        self._closed = False

    @property
    def dialect(self) -> str:
        """The SQL dialect: `sqlite` or `postgresql`."""
        return self._engine.dialect.name

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a transaction that sees one state of the store throughout. Raises CacheError."""
        with self._translated(), self._ready().connect() as connection:
            if self.dialect == "postgresql":
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction that is committed at the end, rolled back on any exception. Raises CacheError.

        One transaction at a time writes, whatever the database: none can deadlock with another, and what one
        checks first still holds when it writes. Readers wait for nobody.
        """
        with self._translated(), self._ready().connect() as connection:
            connection = connection.execution_options(tilecast_write=True)
            with connection.begin():
                yield connection

    def prepared(self, insert: Insert, columns: Sequence[str]) -> tuple[str, Callable[[Mapping[str, Any]], Any]]:
        """Return an INSERT as the driver itself takes it, and what makes a row of its mapping: no step per value."""
        compiled = insert.compile(dialect=self._engine.dialect, column_keys=list(columns))
        if compiled.positiontup is None:
            return str(compiled), dict
        return str(compiled), operator.itemgetter(*compiled.positiontup)

    def set_journal_mode(self, mode: str) -> None:
        """Set a SQLite file's journal mode, outside any transaction. Raises CacheError.

        Fails at once where another connection is in a transaction, whatever the busy timeout: callers retry.
        """
        with self._translated(), contextlib.closing(self._ready().raw_connection()) as raw:
            raw.cursor().execute(f"PRAGMA journal_mode={mode}")
        # Connections made from here on choose their `synchronous` by the new mode.
        self._engine.dispose()

    def close(self) -> None:
        """Close all connections; later transactions raise CacheError."""
        self._closed = True
        self._engine.dispose()

    def _ready(self) -> Engine:
        if self._closed:
            raise CacheError(f"{self.name}: the store is closed; open it again")
        if self._process != os.getpid():
            # A forked child must not use its parent's connections: SQLite's locks belong to the process.
            self._engine.dispose(close=False)
            self._process = os.getpid()
        return self._engine

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        # A damaged file may put bytes into SQLite's own messages that its driver cannot decode.
        except (SQLAlchemyError, sqlite3.Error, UnicodeDecodeError) as error:
            raise translate(error, self.name) from error


def open_sqlite(path: Path, *, read_only: bool = False, untrusted: bool = False) -> Database:
    """Return the database of a SQLite file; nothing is read or made yet.

    With `untrusted` (implies read-only) SQLite itself is told to distrust the file's schema and contents.
    """

    def made() -> sqlite3.Connection:
        return connect(path, read_only=read_only, untrusted=untrusted)

    engine = create_engine("sqlite+pysqlite://", creator=made, poolclass=pool.QueuePool)
    event.listen(engine, "begin", _begin)
    return Database(engine, str(path))


def open_server(url: URL) -> Database:
    """Return the database at a server's URL. Raises CacheError for an unknown dialect or a missing driver."""
    name = url.render_as_string(hide_password=True)
    if url.get_backend_name() != "postgresql":
        raise CacheError(f"{name}: unknown kind of store; expected a path, sqlite:///PATH or postgresql+DRIVER://…")
    known = url.get_driver_name() in ("psycopg", "psycopg2") and "connect_timeout" not in url.query
    arguments = {"connect_timeout": CONNECT_TIMEOUT_S} if known else {}
    try:
        engine = create_engine(url, pool_pre_ping=True, connect_args=arguments)
        event.listen(engine, "begin", _begin_on_server)
        return Database(engine, name)
    except ImportError as error:
        raise CacheError(f"{name}: its driver is not installed ({error}); install it with pip") from error
    except SQLAlchemyError as error:
        raise translate(error, name) from error


def _begin_on_server(connection: Connection) -> None:
    if connection.get_execution_options().get("tilecast_write", False):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_TIMEOUT_S}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")


def _begin(connection: Connection) -> None:
    # The driver's own BEGIN is deferred and comes too late: two readers that both turn writers would deadlock.
    write = connection.get_execution_options().get("tilecast_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
