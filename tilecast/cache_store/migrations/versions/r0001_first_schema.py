"""First schema: environments, layers, configs, measurements and decisions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("environment", "layer", "config"):
        op.create_table(
            name,
            sa.Column("digest", sa.String(64), nullable=False),
            sa.Column("fields", sa.Text, nullable=False),
            sa.PrimaryKeyConstraint("digest", name=f"pk_{name}"),
        )
    op.create_table(
        "measurement",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("environment", sa.String(64), nullable=False),
        sa.Column("layer", sa.String(64), nullable=False),
        sa.Column("gemm", sa.Text, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("config", sa.String(64), nullable=False),
        sa.Column("routing", sa.Text, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("world_size", sa.Integer, nullable=False),
        sa.Column("run", sa.BigInteger, nullable=False),
        sa.Column("round", sa.BigInteger, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("samples_us", sa.Text, nullable=False),
        sa.Column("numerics", sa.Text, nullable=False),
        sa.Column("error_ratio", sa.Double, nullable=True),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("measured_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_measurement"),
        sa.UniqueConstraint("key", name="uq_measurement_key"),
        *(_reference("measurement", name, name) for name in ("environment", "layer", "config")),
    )
    columns = ("environment", "layer", "gemm", "tokens")
    op.create_index("ix_measurement_" + "_".join(columns), "measurement", columns)
    configs = [f"{gemm}_{name}" for gemm in ("up", "down") for name in ("config", "default", "runner_up")]
    op.create_table(
        "decision",
        sa.Column("environment", sa.String(64), nullable=False),
        sa.Column("layer", sa.String(64), nullable=False),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("routing", sa.Text, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("above", sa.Integer, nullable=False),
        sa.Column("certificate", sa.Text, nullable=False),
        *_choice("up"),
        *_choice("down"),
        sa.PrimaryKeyConstraint("environment", "layer", "policy", "routing", "tokens", name="pk_decision"),
        *(_reference("decision", name, name) for name in ("environment", "layer")),
        *(_reference("decision", name, "config") for name in configs),
    )


def _reference(table: str, column: str, referred: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{referred}.digest"], name=f"fk_{table}_{column}_{referred}")


def _choice(gemm: str) -> tuple[sa.Column[object], ...]:
    return (
        sa.Column(f"{gemm}_config", sa.String(64), nullable=False),
        sa.Column(f"{gemm}_p50_us", sa.Double, nullable=False),
        sa.Column(f"{gemm}_default", sa.String(64), nullable=False),
        sa.Column(f"{gemm}_default_us", sa.Double, nullable=False),
        sa.Column(f"{gemm}_runner_up", sa.String(64), nullable=True),
        sa.Column(f"{gemm}_runner_up_us", sa.Double, nullable=True),
        sa.Column(f"{gemm}_noise", sa.Double, nullable=False),
        sa.Column(f"{gemm}_numerics", sa.Text, nullable=False),
    )
