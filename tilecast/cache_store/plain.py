"""SQLite through its driver alone: connections, rows and errors, for files from outside and below SQLAlchemy.

A table is read without SQLAlchemy, which takes ten times as long to import as a thousand decisions to read.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union
from urllib.parse import quote

from tilecast.errors import CacheError

if TYPE_CHECKING:
    import sqlalchemy

Connection = Union[sqlite3.Connection, "sqlalchemy.Connection"]
"""What queries can be asked of; SQLAlchemy's may be a server's."""
PlainRow = tuple[Any, ...]

BUSY_TIMEOUT_S = 30.0
"""How long a transaction waits for another process's lock."""
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


@contextlib.contextmanager
def reading_untrusted(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a file from outside in a transaction that sees one state of it throughout. Raises CacheError."""
    try:
        with contextlib.closing(connect(path, untrusted=True)) as connection:
            connection.execute("BEGIN")
            yield connection
    # A damaged file may put bytes into SQLite's own messages that its driver cannot decode.
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise translate(error, str(path)) from error


def connect(path: Path, *, read_only: bool = False, untrusted: bool = False) -> sqlite3.Connection:
    """Return a connection to a SQLite file; nothing is read or made yet.

    With `untrusted` (implies read-only) SQLite itself is told to distrust the file's schema and contents.
    """
    read_only = read_only or untrusted
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


def plain_rows(connection: Connection, sql: str, parameters: Mapping[str, Any] | None = None) -> Iterator[PlainRow]:
    """Return a query's rows, each read when it is asked for; `sql` names its parameters as `:name`.

    SQLite's driver is asked directly: a table has thousands of rows, a store millions, and SQLAlchemy's rows and
    its compiler take as long as reading them.
    """
    if isinstance(connection, sqlite3.Connection):
        return connection.execute(sql, parameters or {})
    if connection.dialect.name != "sqlite":
        from sqlalchemy import text

        found = connection.execution_options(yield_per=ROWS_AT_ONCE).execute(text(sql), dict(parameters or {}))
        return map(tuple, found)
    raw = connection.connection.driver_connection
    assert raw is not None, "SQLite's driver has connections of its own"
    rows: Iterator[PlainRow] = raw.execute(sql, parameters or {})
    return rows


def single_row(connection: Connection, sql: str) -> PlainRow | None:
    """Return the first row of a query that has few, None if there is none."""
    # All are read: a server's cursor would stay open.
    return next(iter(list(plain_rows(connection, sql))), None)


def translate(error: Exception, name: str) -> CacheError:
    """Return the CacheError, one line, for an error of SQLAlchemy or SQLite."""
    # SQLAlchemy keeps the driver's error there.
    original = getattr(error, "orig", None) or error
    words = " ".join(str(original).split()) or type(original).__name__
    for part, advice in ADVICE.items():
        if part in words.lower():
            return CacheError(f"{name}: {words}; {advice}")
    advice = (
        "the URL, the server and your rights there" if "://" in name else "the path, its permissions and its folder's"
    )
    return CacheError(f"{name}: {words}; check {advice}")


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
