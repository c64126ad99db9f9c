"""The bytes of an exported file, made in memory (docs/cache-format.md)."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Table, create_engine, insert

from tilecast._version import VERSION
from tilecast.cache_store import models
from tilecast.cache_store.decision_rows import decision_configs, decision_row
from tilecast.cache_store.keyed import Keyed, keyed_row
from tilecast.cache_store.layout import EXPORT_FORMAT, EXPORT_ID
from tilecast.cache_store.measurement_rows import Row, measurement_row
from tilecast.cache_store.seal import seal_measurements
from tilecast.evidence import TABLE_FORMAT, Measurement, TuningTable


def database_bytes(table: TuningTable, measurements: Sequence[Measurement]) -> bytes:
    """Return the exported file. It is built in memory, so nothing can be left beside it."""
    engine = create_engine("sqlite+pysqlite://")
    try:
        with engine.connect() as connection:
            models.metadata.create_all(connection)
            models.export_metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA application_id={EXPORT_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version={EXPORT_FORMAT}")
            for target, rows in _export_rows(table, measurements):
                if rows:
                    connection.execute(insert(target), rows)
            seal_measurements(connection)
            connection.commit()
            raw = connection.connection.driver_connection
            assert raw is not None
            return bytes(raw.serialize())
    finally:
        engine.dispose()


def _export_rows(table: TuningTable, measurements: Sequence[Measurement]) -> list[tuple[Table, list[Row]]]:
    layers = [d.layer for d in table.decisions] + [m.gemm.layer for m in measurements]
    configs = [c for d in table.decisions for c in decision_configs(d)] + [m.config for m in measurements]
    about = {
        "table_digest": table.digest,
        "table_format": TABLE_FORMAT,
        "producer": f"tilecast {VERSION}",
    }
    return [
        (models.export, [about]),
        (models.environment, _keyed_rows(table.environments)),
        (models.layer, _keyed_rows(layers)),
        (models.config, _keyed_rows(configs)),
        (models.decision, [decision_row(d) for d in table.decisions]),
        (models.measurement, [measurement_row(m) for m in measurements]),
    ]


def _keyed_rows(entries: Sequence[Keyed]) -> list[Row]:
    found = {entry.digest: entry for entry in entries}
    return [keyed_row(found[digest]) for digest in sorted(found)]
