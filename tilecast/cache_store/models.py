"""The SQL tables, the same in a live store and in an exported file.

Layers, configs and environments are kept once, as canonical JSON under their digest. Rows are never changed,
except that decisions are replaced; only decisions are ever deleted.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
)

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

metadata = MetaData(naming_convention=NAMING)
"""Tables of a live store."""
export_metadata = MetaData(naming_convention=NAMING)
"""The one table that only an exported file has."""


def _digest(name: str, **options: Any) -> Column[str]:
    return Column(name, String(64), nullable=False, **options)


def _reference(name: str, table: str, *, nullable: bool = False) -> Column[str]:
    return Column(name, String(64), ForeignKey(f"{table}.digest"), nullable=nullable)


def _keyed(name: str) -> Table:
    return Table(name, metadata, _digest("digest", primary_key=True), Column("fields", Text, nullable=False))


environment = _keyed("environment")
layer = _keyed("layer")
config = _keyed("config")

measurement = Table(
    "measurement",
    metadata,
    Column("id", Integer, primary_key=True),
    _digest("key"),
    _reference("environment", "environment"),
    _reference("layer", "layer"),
    Column("gemm", Text, nullable=False),
    Column("tokens", Integer, nullable=False),
    _reference("config", "config"),
    Column("routing", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("world_size", Integer, nullable=False),
    Column("run", BigInteger, nullable=False),
    Column("round", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    Column("samples_us", Text, nullable=False),
    Column("numerics", Text, nullable=False),
    Column("error_ratio", Double, nullable=True),
    Column("detail", Text, nullable=False),
    Column("measured_at", Double, nullable=False),
    UniqueConstraint("key"),
    Index(None, "environment", "layer", "gemm", "tokens"),
)


def _choice(gemm: str) -> tuple[Column[Any], ...]:
    return (
        _reference(f"{gemm}_config", "config"),
        Column(f"{gemm}_p50_us", Double, nullable=False),
        _reference(f"{gemm}_default", "config"),
        Column(f"{gemm}_default_us", Double, nullable=False),
        _reference(f"{gemm}_runner_up", "config", nullable=True),
        Column(f"{gemm}_runner_up_us", Double, nullable=True),
        Column(f"{gemm}_noise", Double, nullable=False),
        Column(f"{gemm}_numerics", Text, nullable=False),
    )


decision = Table(
    "decision",
    metadata,
    _reference("environment", "environment"),
    _reference("layer", "layer"),
    Column("policy", Text, nullable=False),
    Column("routing", Text, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("above", Integer, nullable=False),
    Column("certificate", Text, nullable=False),
    *_choice("up"),
    *_choice("down"),
    PrimaryKeyConstraint("environment", "layer", "policy", "routing", "tokens"),
)

export = Table(
    "export",
    export_metadata,
    _digest("table_digest", primary_key=True),
    Column("table_format", Integer, nullable=False),
    Column("producer", Text, nullable=False),
    # NULL where the writer copied measurements without reading them.
    Column("measurements_digest", String(64), nullable=True),
)
