"""What a database holds, found out before it is used: nothing, a store and its revision, or something else."""

from __future__ import annotations

from dataclasses import dataclass

from tilecast.cache_store.layout import EXPORT_ID, HEAD, REVISIONS, STORE_ID
from tilecast.cache_store.plain import Connection, plain_rows, single_row
from tilecast.errors import CacheError, SchemaError


@dataclass(frozen=True, kw_only=True)
class State:
    """What a database holds: nothing at all (`fresh`), or a store at a revision (`""` before the first one)."""

    fresh: bool
    revision: str
    journal_mode: str = ""


def sqlite_state(connection: Connection, name: str) -> State:
    """Return what a SQLite file holds. Raises CacheError for what is no store."""
    tables = {row[0] for row in plain_rows(connection, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    # SQLite's own tables, of statistics, do not make a file one of another program.
    empty = all(table.startswith("sqlite_") for table in tables)
    (application_id,) = next(plain_rows(connection, "PRAGMA application_id"))
    if application_id == EXPORT_ID:
        raise CacheError(
            f"{name}: is an exported table, which never changes, not a store; "
            f"read it with `tilecast cache import {name}`"
        )
    if application_id != STORE_ID and not (empty and application_id == 0):
        raise CacheError(f"{name}: is a SQLite file of another program; choose another path")
    (journal,) = next(plain_rows(connection, "PRAGMA journal_mode"))
    if "alembic_version" not in tables:
        return State(fresh=empty, revision="", journal_mode=str(journal))
    row = single_row(connection, "SELECT version_num FROM alembic_version LIMIT 1")
    return State(fresh=False, revision=str((row or ("",))[0] or ""), journal_mode=str(journal))


def check_store_revision(connection: Connection, name: str) -> None:
    """Raise SchemaError unless a SQLite store is at the revision that this Tilecast reads."""
    state = sqlite_state(connection, name)
    if state.revision != HEAD:
        check_upgradable(state, name, read_only=True)


def check_upgradable(state: State, name: str, read_only: bool) -> None:
    """Raise CacheError, SchemaError for a state that this Tilecast can neither use nor upgrade."""
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
