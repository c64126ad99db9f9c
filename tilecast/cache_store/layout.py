"""What files of ours look like: the numbers that name their versions, and the tables with their columns.

Known without SQLAlchemy, so that a table can be read where nothing is ever written; `models` has the same as SQL.
"""

from __future__ import annotations

from tilecast.cache_store.decision_rows import DECISION_KINDS
from tilecast.cache_store.measurement_rows import MEASUREMENT_KINDS

REVISIONS = ("0001",)
"""Alembic revisions that a store may be at, oldest first."""
HEAD = REVISIONS[-1]
"""The revision that this Tilecast reads and writes."""

STORE_ID = int.from_bytes(b"TLST", "big")
"""SQLite `application_id` of a live store."""
EXPORT_ID = int.from_bytes(b"TLCS", "big")
"""SQLite `application_id` of an exported file."""
EXPORT_FORMATS = (1, 2)
"""SQLite `user_version`s of exported files that this Tilecast reads, oldest first."""
EXPORT_FORMAT = EXPORT_FORMATS[-1]
"""The one that it writes. Format 1 had no `measurements_digest`."""

COLUMNS: dict[str, frozenset[str]] = {
    "environment": frozenset({"digest", "fields"}),
    "layer": frozenset({"digest", "fields"}),
    "config": frozenset({"digest", "fields"}),
    "decision": frozenset(DECISION_KINDS),
    "measurement": frozenset({"id", *MEASUREMENT_KINDS}),
}
"""Columns of the tables that stores and exported files have."""


def export_columns(export_format: int) -> frozenset[str]:
    """Return the columns of the one table that only an exported file has."""
    first = frozenset({"table_digest", "table_format", "producer"})
    return first if export_format == 1 else first | {"measurements_digest"}
