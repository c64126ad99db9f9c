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
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from tilecast.cache_store.files import network_filesystem
from tilecast.cache_store.models import EXPORT_ID, HEAD, REVISIONS, STORE_ID
from tilecast.cache_store.session import BUSY_TIMEOUT_S, Database
from tilecast.errors import CacheError, SchemaError

MIGRATIONS = Path(__file__).parent / "migrations"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class State:
    """What a database holds: nothing at all (`fresh`), or a store at a revision (`""` before the first one)."""

    fresh: bool
    revision: str
    journal_mode: str = ""


def prepare(database: Database, *, path: Path | None, read_only: bool) -> None:
    """Make sure that the store is at the revision HEAD, upgrading it where that is allowed.

    `path` is the SQLite file, None for a server. Raises CacheError, SchemaError.
    """
    with database.reading() as connection:
        state = _state(connection, database.name)
    if state.revision != HEAD:
        _check_upgradable(state, database.name, read_only)
        with _init_lock(path):
            _upgrade(database)
    if path is not None and not read_only:
        _choose_journal(database, path, state.journal_mode)


def _state(connection: Connection, name: str) -> State:
    journal = ""
    empty = not inspect(connection).get_table_names()
    if connection.dialect.name == "sqlite":
        application_id = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
        if application_id == EXPORT_ID:
            raise CacheError(
                f"{name}: is an exported table, which never changes, not a store; "
                f"read it with `tilecast cache import {name}`"
            )
        if application_id != STORE_ID and not (empty and application_id == 0):
            raise CacheError(f"{name}: is a SQLite file of another program; choose another path")
        journal = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one())
    if not inspect(connection).has_table("alembic_version"):
        return State(fresh=empty, revision="", journal_mode=journal)
    revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return State(fresh=False, revision=str(revision or ""), journal_mode=journal)


def check_store_revision(connection: Connection, name: str) -> None:
    """Raise SchemaError unless the store is at the revision that this Tilecast reads."""
    state = _state(connection, name)
    if state.revision != HEAD:
        _check_upgradable(state, name, read_only=True)


def _check_upgradable(state: State, name: str, read_only: bool) -> None:
    if state.revision and state.revision not in REVISIONS:
        raise SchemaError(
            f"{name}: has schema {state.revision}, this Tilecast reads up to {HEAD}; "
            f"upgrade Tilecast (`pip install --upgrade tilecast`) or use another store"
        )
    if state.fresh and read_only:
        raise CacheError(f"{name}: holds no store yet; `tilecast tune --store {name}` makes one")
    if read_only:
        raise SchemaError(
            f"{name}: has schema {state.revision or 'none'}, this Tilecast reads {HEAD}; "
            f"open it for writing once to upgrade it, as `tilecast tune --store {name}` does"
        )


def _upgrade(database: Database) -> None:
    # Alembic is imported only where it is needed: a store at HEAD opens without it.
    from alembic import command
    from alembic.config import Config

    with database.writing() as connection:
        state = _state(connection, database.name)
        if state.revision == HEAD:
            return  # Another process was faster.
        _check_upgradable(state, database.name, read_only=False)
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
