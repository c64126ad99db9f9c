"""The one place that opens engines, commits, rolls back and translates database errors."""

from __future__ import annotations

import contextlib
import operator
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, Insert, create_engine, event, pool, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tilecast.errors import CacheError

PlainRow = tuple[Any, ...]

BUSY_TIMEOUT_S = 30.0
"""How long a transaction waits for another process's lock."""
CONNECT_TIMEOUT_S = 10
"""How long a server may take to answer a new connection."""
ROWS_AT_ONCE = 2000
"""Rows that a server sends at a time."""
CHECKPOINT_PAGES = 8192
"""Pages of 4 KiB that SQLite's log grows to before it is folded into the file, which waits for the disk. Measurements'
keys are digests, so a few hundred rows touch as many pages: SQLite's own 1,000 fill up with every few batches."""
MAX_TEXT_BYTES = 1 << 20
"""Longest value that is read from a file from outside."""
STEPS_BASE, STEPS_PER_BYTE = 20_000_000, 10
"""SQLite instructions that reading a file from outside may take: an honest one takes less than one per byte, a file
whose pages refer to each other in circles would take forever."""
STEPS_BETWEEN_CHECKS = 100_000
WRITE_LOCK = 0x54494C45
"""Number of the PostgreSQL lock under which one transaction at a time writes, as SQLite has it by nature."""

ADVICE = {
    "locked": "another process keeps it locked; wait for that process or stop it",
    "busy": "another process keeps it locked; wait for that process or stop it",
    "readonly": "it is not writable; check its permissions or choose another path",
    "not a database": "it is damaged; restore a copy or delete it",
    "malformed": "it is damaged; restore a copy or delete it",
    "no such table": "it is damaged or not Tilecast's; restore a copy or delete it",
    "no such column": "it is damaged or not Tilecast's; restore a copy or delete it",
    "too big": "it holds a longer text than Tilecast writes; do not use it",
    "decode": "it is damaged; restore a copy or delete it",
    "interrupted": "its pages refer to each other in circles; do not use it",
    "lock timeout": "another process keeps it locked; wait for that process or stop it",
    "connection": "check the URL and that the server runs and can be reached",
    "full": "free some space and try again",
    "disk i/o": "check the disk, its free space and the file-size limit, and try again",
}
"""What to do, by a part of the database's own message."""


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


def plain_rows(connection: Connection, sql: str, parameters: Mapping[str, Any] | None = None) -> Iterator[PlainRow]:
    """Return a query's rows, each read when it is asked for; `sql` names its parameters as `:name`.

    SQLite's driver is asked directly: a table has thousands of rows, a store millions, and SQLAlchemy's rows and
    its compiler take as long as reading them.
    """
    if connection.dialect.name != "sqlite":
        found = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(text(sql), dict(parameters or {}))
        return map(tuple, found)
    raw = connection.connection.driver_connection
    assert raw is not None, "SQLite's driver has connections of its own"
    rows: Iterator[PlainRow] = raw.execute(sql, parameters or {})
    return rows


def translate(error: Exception, name: str) -> CacheError:
    """Return the CacheError, one line, for an error of SQLAlchemy or SQLite."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    words = " ".join(str(original).split()) or type(original).__name__
    for part, advice in ADVICE.items():
        if part in words.lower():
            return CacheError(f"{name}: {words}; {advice}")
    advice = (
        "the URL, the server and your rights there" if "://" in name else "the path, its permissions and its folder's"
    )
    return CacheError(f"{name}: {words}; check {advice}")


def open_sqlite(path: Path, *, read_only: bool = False, untrusted: bool = False) -> Database:
    """Return the database of a SQLite file; nothing is read or made yet.

    With `untrusted` (implies read-only) SQLite itself is told to distrust the file's schema and contents.
    """
    read_only = read_only or untrusted

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            _uri(path, read_only), uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(connection, read_only, untrusted)
            if untrusted:
                _limit_steps(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine("sqlite+pysqlite://", creator=connect, poolclass=pool.QueuePool)
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


def _uri(path: Path, read_only: bool) -> str:
    uri = f"file:{quote(os.fsencode(path))}"
    if not read_only:
        return f"{uri}?mode=rwc"
    # SQLite cannot read a WAL file without a -shm beside it; where none can be made, nobody writes either.
    still = not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists()
    return f"{uri}?mode=ro" + ("&immutable=1" if still else "")


def _prepare(connection: sqlite3.Connection, read_only: bool, untrusted: bool) -> None:
    if untrusted:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_TEXT_BYTES)
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA cell_size_check=ON")
    if read_only:
        connection.execute("PRAGMA query_only=ON")
        return
    connection.execute("PRAGMA foreign_keys=ON")
    # In WAL mode NORMAL cannot corrupt the file, and a killed process loses nothing that was committed.
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    connection.execute(f"PRAGMA synchronous={'NORMAL' if mode == 'wal' else 'FULL'}")
    connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")


def _limit_steps(connection: sqlite3.Connection, path: Path) -> None:
    size = 0
    for file in (path, Path(f"{path}-wal")):
        with contextlib.suppress(OSError):
            size += file.stat().st_size
    left = iter(range((STEPS_BASE + STEPS_PER_BYTE * size) // STEPS_BETWEEN_CHECKS))
    connection.set_progress_handler(lambda: next(left, None) is None, STEPS_BETWEEN_CHECKS)


def _begin_on_server(connection: Connection) -> None:
    if connection.get_execution_options().get("tilecast_write", False):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_TIMEOUT_S}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")


def _begin(connection: Connection) -> None:
    # The driver's own BEGIN is deferred and comes too late: two readers that both turn writers would deadlock.
    write = connection.get_execution_options().get("tilecast_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
