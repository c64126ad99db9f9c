"""What seals an exported file: the digests of its decisions and its measurements, written last and checked first."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from tilecast.cache_store.plain import Connection, plain_rows, single_row
from tilecast.cache_store.queries import measurements_digest
from tilecast.errors import CacheError, SchemaError
from tilecast.evidence import TABLE_FORMAT

if TYPE_CHECKING:
    import sqlalchemy


def seal_measurements(connection: sqlalchemy.Connection, digest: str | None = None) -> None:
    """Write the digest of all measurements into a file that is being exported, after its last row.

    A caller that has made it on the way gives it.
    """
    sealed = measurements_digest(connection) if digest is None else digest
    connection.exec_driver_sql("UPDATE export SET measurements_digest = ?", (sealed,))


def check_measurements(connection: Connection, name: str, digest: str | None = None) -> None:
    """Raise CacheError unless measurements, whose values are checked by now, are those that the file was sealed with.

    A caller that has gone over all of them gives their digest. Stores, files of format 1, and files whose writer did
    not look at its measurements have no seal.
    """
    if not isinstance(connection, sqlite3.Connection) and connection.dialect.name != "sqlite":
        return
    if "measurements_digest" not in {row[1] for row in plain_rows(connection, "PRAGMA table_info(export)")}:
        return
    row = single_row(connection, "SELECT measurements_digest FROM export LIMIT 1")
    stored = "" if row is None else row[0]
    if stored is None:
        return
    actual = measurements_digest(connection) if digest is None else digest
    if stored != actual:
        raise CacheError(
            f"{name}: its measurements have digest {actual[:12]}, it says {str(stored)[:12]}; "
            f"it was changed after the export, so do not use it, export it again"
        )


def check_table(connection: Connection, digest: str, name: str) -> str:
    """Return an export's producer. Raises CacheError, SchemaError unless the digest is the one it was sealed with."""
    rows = list(plain_rows(connection, "SELECT table_digest, table_format, producer FROM export LIMIT 2"))
    if len(rows) != 1:
        raise CacheError(
            f"{name}: has {'several' if rows else 'no'} rows in its export table, expected 1; export it again"
        )
    stored, table_format, producer = rows[0]
    if table_format != TABLE_FORMAT:
        raise SchemaError(
            f"{name}: has table format {table_format!r}, this Tilecast reads {TABLE_FORMAT}; "
            f"upgrade Tilecast (`pip install --upgrade tilecast`) or export the table again with this one"
        )
    if stored != digest:
        raise CacheError(
            f"{name}: its decisions have digest {digest[:12]}, it says {str(stored)[:12]}; "
            f"it was changed after the export, so do not use it, export it again"
        )
    return str(producer)
