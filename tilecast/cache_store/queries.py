"""Reading tables and measurements out of a connection, for the live store and for files from outside alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, cast

from sqlalchemy import Connection, Select, Table, select

from tilecast.cache_store import models
from tilecast.cache_store.rows import (
    DECISION_KINDS,
    MEASUREMENT_KINDS,
    Lookup,
    Row,
    decision_from_row,
    measurement_from_row,
)
from tilecast.canonical import canonical_json
from tilecast.environment import Environment
from tilecast.evidence import Measurement, TuningTable
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

ROWS_AT_ONCE = 10_000
"""Rows held at once where a whole table is gone through."""


def read_environments(connection: Connection) -> list[Environment]:
    """Return all environments, ordered by digest. Raises CacheError."""
    return _environments(connection).all()


def read_table(
    connection: Connection,
    *,
    environment: str | None = None,
    policy: str | None = None,
    all_environments: bool = False,
) -> TuningTable:
    """Return matching decisions and their environments (or all environments) as a table. Raises InputError."""
    table = models.decision
    query = select(*(table.c[name] for name in DECISION_KINDS))
    if environment is not None:
        query = query.where(table.c.environment == environment)
    if policy is not None:
        query = query.where(table.c.policy == policy)
    layers, configs = _layers(connection), _configs(connection)
    found = tuple(decision_from_row(row, layers, configs) for row in connection.execute(query).all())
    places = _environments(connection)
    kept = places.all() if all_environments else [places[key] for key in {d.environment for d in found}]
    return TuningTable(tuple(kept), found)


def read_measurements(
    connection: Connection,
    *,
    environment: str | None = None,
    gemm: ExpertGemm | None = None,
    tokens: int | None = None,
    routing: str | None = None,
    run: int | None = None,
) -> list[Measurement]:
    """Return matching measurements in the order they were added. Raises InputError."""
    table = models.measurement
    filters: dict[str, Any] = {"environment": environment, "tokens": tokens, "routing": routing, "run": run}
    if gemm is not None:
        filters |= {"layer": gemm.layer.digest, "gemm": gemm.name}
    conditions = [table.c[name] == value for name, value in filters.items() if value is not None]
    query = select(*(table.c[name] for name in MEASUREMENT_KINDS)).where(*conditions).order_by(table.c.id)
    layers = _layers(connection)
    configs = _configs(connection, select(table.c.config).where(*conditions))
    return [measurement_from_row(row, layers, configs) for row in _rows(connection, query)]


def measurements_digest(connection: Connection) -> str:
    """Return the SHA-256 over all measurements as stored: each row's canonical JSON list and a newline, ordered by id.

    Nothing is parsed, so that it takes seconds for a million. Values must be of their columns' types.
    """
    table = models.measurement
    query = select(*(table.c[name] for name in MEASUREMENT_KINDS)).order_by(table.c.id)
    total = hashlib.sha256()
    for rows in connection.execute(query).partitions(ROWS_AT_ONCE):
        total.update("".join(f"{canonical_json(list(row))}\n" for row in rows).encode("ascii"))
    return total.hexdigest()


def _environments(connection: Connection) -> Lookup[Environment]:
    return Lookup("environment", Environment.from_json, _keyed_rows(connection, models.environment))


def _layers(connection: Connection) -> Lookup[ExpertLayer]:
    return Lookup("layer", ExpertLayer.from_json, _keyed_rows(connection, models.layer))


def _configs(connection: Connection, digests: Select[Any] | None = None) -> Lookup[TileConfig]:
    return Lookup("config", TileConfig.from_json, _keyed_rows(connection, models.config, digests))


def _keyed_rows(connection: Connection, table: Table, digests: Select[Any] | None = None) -> Iterable[Row]:
    query = select(table.c.digest, table.c.fields)
    if digests is not None:
        query = query.where(table.c.digest.in_(digests))
    return _rows(connection, query)


def _rows(connection: Connection, query: Select[Any]) -> Iterable[Row]:
    # SQLAlchemy types its mappings' keys as more than str.
    return cast(Iterable[Row], connection.execute(query).mappings())
