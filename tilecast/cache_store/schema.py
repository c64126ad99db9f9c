"""Schema versions of a live store: found out, made and upgraded.

Opening for writing makes a fresh store and upgrades an older one by itself: a migration is one transaction, so it
happens wholly or not at all. Opening an older store read-only is a SchemaError that names the fix, and so is any
store that a newer Tilecast wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from tilecast.cache_store.files import network_filesystem
from tilecast.cache_store.layout import HEAD, STORE_ID
from tilecast.cache_store.plain import BUSY_TIMEOUT_S
from tilecast.cache_store.revision import State, check_upgradable, sqlite_state
from tilecast.cache_store.session import Database
from tilecast.errors import CacheError

MIGRATIONS = Path(__file__).parent / "migrations"

log = logging.getLogger(__name__)


def prepare(database: Database, *, path: Path | None, read_only: bool) -> None:
    """Make sure that the store is at the revision HEAD, upgrading it where that is allowed.

    `path` is the SQLite file, None for a server. Raises CacheError, SchemaError.
    """
    with database.reading() as connection:
        state = _state(connection, database.name)
    if state.revision != HEAD:
        check_upgradable(state, database.name, read_only)
        with _init_lock(path):
            _upgrade(database)
    if path is not None and not read_only:
        _choose_journal(database, path, state.journal_mode)


def _state(connection: Connection, name: str) -> State:
    if connection.dialect.name == "sqlite":
        return sqlite_state(connection, name)
    tables = inspect(connection).get_table_names()
    if "alembic_version" not in tables:
        return State(fresh=not tables, revision="")
    revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return State(fresh=False, revision=str(revision or ""))


def _upgrade(database: Database) -> None:
    # Alembic is imported only where it is needed: a store at HEAD opens without it.
    from alembic import command
    from alembic.config import Config

    with database.writing() as connection:
        state = _state(connection, database.name)
        if state.revision == HEAD:
            return  # Another process was faster.
        check_upgradable(state, database.name, read_only=False)
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        if database.dialect == "sqlite":
            connection.exec_driver_sql(f"PRAGMA application_id={STORE_ID}")


def _choose_journal(database: Database, path: Path, present: str) -> None:
    """Switch to WAL, or away from it where a store was moved to a network file system."""
    kind = network_filesystem(path.resolve())
    if kind is not None:
        log.warning(
            "%s lies on a network file system (%s): tune into a local store and export it; "
            "this one is slower and must not be written from two machines at once",
            path,
            kind,
        )
    # Without WAL any rollback journal will do; SQLite starts with the one named DELETE.
    if (present == "wal") != (kind is None):
        with _init_lock(path):
            _set_journal_mode(database, "WAL" if kind is None else "DELETE")


def _set_journal_mode(database: Database, mode: str) -> None:
    # SQLite ignores the busy timeout here, so the retrying is ours.
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            database.set_journal_mode(mode)
            return
        except CacheError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


@contextlib.contextmanager
def _init_lock(path: Path | None) -> Iterator[None]:
    """Let one process at a time make, upgrade or switch stores in a folder. The kernel frees a dead one's lock.

    The folder itself is locked, so that no lock file stays behind. Correctness does not hang on it: each step is
    a transaction or is retried. Where a file system has no such locks, or a process hangs while it has this one,
    it is skipped.
    """
    if path is None:
        yield
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            return
