"""What is read without SQLAlchemy must be what is written with it, and reading must not import it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.store_contract import HERE, decision, measurement
from tilecast.cache_store import layout, models
from tilecast.cache_store.bundle import export_table
from tilecast.evidence import TuningTable


def test_the_tables_have_the_columns_that_sql_has() -> None:
    assert {
        table.name: frozenset(column.name for column in table.columns) for table in models.metadata.sorted_tables
    } == layout.COLUMNS
    assert layout.export_columns(layout.EXPORT_FORMAT) == {column.name for column in models.export.columns}
    assert layout.export_columns(1) == layout.export_columns(2) - {"measurements_digest"}


@pytest.mark.parametrize("what", ["import_table", "read_bundle", "open_evidence"])
def test_a_table_is_read_without_importing_sqlalchemy(what: str, tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    export_table(TuningTable((HERE,), (decision(),)), path, [measurement()])
    program = f"""
import sys
from tilecast.cache_store import bundle
if {what!r} == "open_evidence":
    with bundle.open_evidence({str(path)!r}) as evidence:
        (layer,) = evidence.layers(evidence.layer_digests())
        assert evidence.of(evidence.table(layer).decisions[0])
else:
    assert bundle.{what}({str(path)!r})
print(sorted({{"sqlalchemy", "alembic", "torch", "typer"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
