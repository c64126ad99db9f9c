from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.store_contract import CONFIG, HERE, LAYER, THERE, decision, measurement
from tilecast.cache_store.bundle import (
    adopt,
    check_exportable,
    export_store,
    export_table,
    import_table,
    read_bundle,
)
from tilecast.cache_store.layout import EXPORT_FORMAT, EXPORT_ID
from tilecast.cache_store.memory import MemoryStore
from tilecast.cache_store.store import open_store
from tilecast.errors import CacheError, SchemaError
from tilecast.evidence import TuningTable

ROOT = Path(__file__).parents[2]
TABLE = TuningTable((HERE, THERE), (decision(), decision(4, 16), decision(policy="fastest")))


def refused(path: Path, message: str = ".", kind: type[CacheError] = CacheError) -> None:
    """Importing raises exactly `kind`, one line that names the file."""
    with pytest.raises(CacheError, match=message) as caught:
        import_table(path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    path = tmp_path / "table.db"
    export_table(TABLE, path, [measurement()])
    return path


def edit(path: Path, *statements: str) -> None:
    """Change a file the way someone with the sqlite3 shell would."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA writable_schema=ON")
        for statement in statements:
            connection.execute(statement)


def test_export_is_one_plain_file_with_its_marks(exported: Path) -> None:
    assert [p.name for p in exported.parent.iterdir()] == ["table.db"]
    with contextlib.closing(sqlite3.connect(exported)) as connection:
        values = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version", "journal_mode", "quick_check", "encoding")
        }
        about = connection.execute("SELECT table_digest, table_format FROM export").fetchall()
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert values == {
        "application_id": EXPORT_ID,
        "user_version": EXPORT_FORMAT,
        "journal_mode": "delete",
        "quick_check": "ok",
        "encoding": "UTF-8",
    }
    assert exported.read_bytes()[68:72] == b"TLCS"
    assert about == [(TABLE.digest, 1)]


def test_same_table_gives_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.db"
    export_table(TuningTable(TABLE.environments[::-1], TABLE.decisions[::-1]), again, [measurement()])
    assert again.read_bytes() == exported.read_bytes()


def test_import_leaves_nothing_beside(exported: Path) -> None:
    before = exported.read_bytes()
    assert import_table(str(exported)) == TABLE
    assert import_table(f"sqlite:///{exported}") == TABLE
    assert [p.name for p in exported.parent.iterdir()] == ["table.db"]
    assert exported.read_bytes() == before


def test_import_from_a_read_only_folder(exported: Path) -> None:
    exported.chmod(0o400)
    exported.parent.chmod(0o500)
    try:
        assert import_table(exported) == TABLE
    finally:
        exported.parent.chmod(0o700)


def test_live_store_is_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with open_store(path) as store:
        store.add_environment(HERE)
        store.put_decisions([decision()])
        store.add_measurements([measurement()])
        assert import_table(path) == TuningTable((HERE,), (decision(),))
        bundle = read_bundle(path, measurements=True)
        assert bundle.measurements == (measurement(),)
        assert bundle.producer == ""


def test_measurements_travel_when_asked_for(exported: Path) -> None:
    bundle = read_bundle(exported, measurements=True)
    assert bundle.measurements == (measurement(),)
    assert bundle.producer.startswith("tilecast ")
    assert read_bundle(exported).measurements == ()
    with MemoryStore() as store:
        assert adopt(bundle, store) == 1
        assert store.table().decisions == TABLE.decisions


def test_export_of_a_store_keeps_environments_in_use(tmp_path: Path) -> None:
    with MemoryStore() as store:
        for environment in (HERE, THERE, replace(HERE, units=1)):
            store.add_environment(environment)
        store.put_decisions([decision()])
        store.add_measurements([measurement(environment=THERE.digest)])
        assert export_store(store, tmp_path / "all.db").environments == TuningTable((HERE, THERE)).environments
        assert export_store(store, tmp_path / "table.db", measurements=False) == store.table()
    assert read_bundle(tmp_path / "all.db", measurements=True).measurements[0].environment == THERE.digest


def test_measurement_of_an_environment_that_the_table_lacks(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="which the table lacks"):
        export_table(TuningTable((HERE,)), tmp_path / "t.db", [measurement(environment=THERE.digest)])
    assert list(tmp_path.iterdir()) == []


# Wrong files


def test_missing_and_odd_paths(tmp_path: Path, exported: Path) -> None:
    refused(tmp_path / "none.db", "does not exist")
    refused(tmp_path, "is a directory")
    refused(exported / "below", "does not exist")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused(pipe, "is not a regular file")
    refused(tmp_path / ("x" * 300), "cannot be looked at")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\0" * 4096, "is not a SQLite file"),
        (b"hello", "is not a SQLite file"),
        (b"SQLite format 3\0", "is truncated"),
    ],
)
def test_not_sqlite(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "file.db"
    path.write_bytes(data)
    refused(path, message)


def test_every_truncation_is_refused(exported: Path) -> None:
    data = exported.read_bytes()
    for length in (101, 511, 4095, 4096, 8192, len(data) // 2, len(data) - 4096, len(data) - 1):
        exported.write_bytes(data[:length])
        refused(exported)
    exported.write_bytes(data + b"\0" * 4096)
    refused(exported, "its header says")


def test_random_damage_is_refused_or_harmless(exported: Path) -> None:
    """No flipped byte gives another table, and none gives another error than CacheError."""
    data, chance, rejected = exported.read_bytes(), random.Random(3), 0
    for _ in range(60):
        position, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
        exported.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
        try:
            assert import_table(exported) == TABLE
        except CacheError as error:
            rejected += 1
            assert "\n" not in str(error)
    assert rejected > 0


def test_other_sqlite_files(exported: Path, tmp_path: Path) -> None:
    edit(exported, "PRAGMA application_id=7")
    refused(exported, "of another program")
    other = tmp_path / "other.db"
    edit(other, "CREATE TABLE decision (x)")
    refused(other, "of another program")


def test_file_from_the_future(exported: Path) -> None:
    edit(exported, "PRAGMA user_version=3")
    with pytest.raises(SchemaError) as caught:
        import_table(exported)
    assert str(caught.value) == (
        f"{exported}: has export format 3, this Tilecast reads up to 2; upgrade Tilecast "
        f"(`pip install --upgrade tilecast`) or export the table again with this one"
    )
    edit(exported, "PRAGMA user_version=2", "UPDATE export SET table_format=2")
    refused(exported, "has table format 2", SchemaError)


CHANGES = {
    "time": ("UPDATE decision SET up_p50_us = up_p50_us + 0.5", "have digest"),
    "bucket": ("UPDATE decision SET tokens = 17 WHERE tokens = 16", "digest"),
    "row lost": ("DELETE FROM decision WHERE tokens = 16", "digest"),
    "environment lost": (f"DELETE FROM environment WHERE digest = '{THERE.digest}'", "digest"),
    "used environment lost": (f"DELETE FROM environment WHERE digest = '{HERE.digest}'", "which the table lacks"),
    "wrong digest": ("UPDATE export SET table_digest = 'abc'", "it says abc"),
    "no digest": ("DELETE FROM export", "has no rows in its export table"),
    "NaN": ("UPDATE decision SET up_p50_us = 'NaN'", "'up_p50_us' is 'NaN', expected number"),
    "infinity": ("UPDATE decision SET up_noise = 9e999", "noise is inf"),
    "negative": ("UPDATE decision SET down_default_us = -1", "default's time is -1"),
    "text for number": (
        "UPDATE decision SET tokens = 'many' WHERE tokens = 16",
        "'tokens' is 'many', expected integer",
    ),
    "bytes for text": ("UPDATE decision SET routing = x'00'", "'routing' is b'.x00', expected string"),
    "number for text": ("UPDATE config SET fields = 5", "expected an object|expected JSON text"),
    "broken text": ("UPDATE decision SET routing = CAST(x'ff' AS TEXT)", "decode"),
    "unknown policy": ("UPDATE decision SET policy = 'whatever' WHERE tokens = 16", "policy is 'whatever'"),
    "empty bucket": ("UPDATE decision SET above = tokens", "bucket's tokens"),
    "unknown field": ('UPDATE layer SET fields = replace(fields, \'"bias"\', \'"odd":1,"bias"\')', "unknown fields"),
    "JSON NaN": ("UPDATE layer SET fields = replace(fields, '64', 'NaN')", "NaN is not a number"),
    "deep JSON": ("UPDATE layer SET fields = printf('%.*c', 500000, '[')", "not JSON"),
    "spaced JSON": ("UPDATE config SET fields = fields || ' '", "not canonical"),
    "another layer's fields": ("UPDATE layer SET fields = replace(fields, '64', '65')", "have digest"),
    "config absent": (f"DELETE FROM config WHERE digest = '{CONFIG.digest}'", "referred to but absent"),
    "config's parameter": (
        "UPDATE config SET fields = replace(fields, ':6', ':1.5')",
        "expected an integer or a string",
    ),
    "oversized text": ("UPDATE config SET fields = fields || printf('%.*c', 2000000, ' ')", "too big"),
    "column gone": ("ALTER TABLE decision DROP COLUMN certificate", "other columns"),
    "column more": ("ALTER TABLE decision ADD COLUMN extra", "'decision' is made with 'extra'"),
    "column twice": ("ALTER TABLE layer ADD COLUMN tokens INTEGER", "other columns"),
    "generated column": ("ALTER TABLE config ADD COLUMN tokens AS (1)", "'config' is made with 'AS'"),
    "index on an expression": ("CREATE INDEX extra ON layer (abs(fields))", "'extra' is made with 'extra'"),
    "index with a condition": ("CREATE INDEX ix_x ON layer (fields) WHERE fields > 1", "'ix_x' is made with 'WHERE'"),
    "statistics": ("ANALYZE", "unknown table 'sqlite_stat1'"),
    "terminal codes": ("UPDATE decision SET routing = char(27) || '[2J'", "printable characters"),
    "names beyond measure": ("UPDATE decision SET certificate = printf('%.*c', 900000, 'x')", "certificate is 'xxx"),
    "table gone": ("DROP TABLE measurement", "lacks the table 'measurement'"),
    "table more": ("CREATE TABLE extra (x)", "unknown table 'extra'"),
    "view": ("CREATE VIEW extra AS SELECT 1", "unknown view 'extra'"),
    "trigger": ("CREATE TRIGGER extra DELETE ON config BEGIN SELECT 1; END", "unknown trigger 'extra'"),
    "broken schema": ("UPDATE sqlite_master SET sql = 'CREATE TABLE nothing' WHERE name = 'config'", "malformed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_after_the_export(exported: Path, change: str) -> None:
    statement, message = CHANGES[change]
    edit(exported, statement)
    refused(exported, message)


def test_view_in_place_of_a_table(exported: Path) -> None:
    edit(exported, "ALTER TABLE config RENAME TO extra", "CREATE VIEW config AS SELECT * FROM extra")
    refused(exported, "unknown")


def test_forged_measurement(exported: Path) -> None:
    edit(exported, "UPDATE measurement SET round = 5")
    assert import_table(exported) == TABLE
    with pytest.raises(CacheError, match="its fields have key"):
        read_bundle(exported, measurements=True)


def test_store_of_another_schema(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    open_store(path).close()
    edit(path, "UPDATE alembic_version SET version_num = '9999'")
    refused(path, "has schema 9999, this Tilecast reads up to 0001", SchemaError)


# Paths that cannot be written


def unwritable_paths(folder: Path) -> dict[str, Path]:
    (folder / "file").touch()
    (folder / "folder").mkdir()
    (folder / "notes.txt").write_text("precious")
    (folder / "truncated.db").write_bytes(b"SQLite format 3\0")
    open_store(folder / "store.db").close()
    with contextlib.closing(sqlite3.connect(folder / "other.db")) as connection:
        connection.execute("CREATE TABLE mine (x)")
    return {
        "no such folder": folder / "no" / "t.db",
        "a file as folder": folder / "file" / "t.db",
        "a folder": folder / "folder",
        "system files": Path("/proc/t.db"),
        "a device": Path("/dev/null"),
        "other text": folder / "notes.txt",
        "a live store": folder / "store.db",
        "another program's file": folder / "other.db",
        "a stump": folder / "truncated.db",
        "too long": folder / ("x" * 300),
        "zero byte": folder / "a\0b",
    }


@pytest.mark.parametrize("export", [lambda path: export_table(TABLE, path), check_exportable])
def test_unwritable(tmp_path: Path, export: Callable[[Path], None]) -> None:
    paths = unwritable_paths(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for path in paths.values():
        with pytest.raises(CacheError) as caught:
            export(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_check_exportable_accepts_what_can_be_written(exported: Path, tmp_path: Path) -> None:
    before = exported.read_bytes()
    check_exportable(exported)
    check_exportable(tmp_path / "new.db")
    assert [p.name for p in tmp_path.iterdir()] == ["table.db"]
    assert exported.read_bytes() == before


def test_export_through_a_link_replaces_what_it_points_to(exported: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    link.symlink_to(exported)
    export_table(TuningTable(), link)
    assert link.is_symlink()
    assert import_table(exported) == TuningTable()


def test_full_disk_leaves_the_old_file(exported: Path) -> None:
    code = """
import resource, sys
from tests.store_contract import HERE, decision
from tilecast.cache_store.bundle import export_table
from tilecast.errors import CacheError
from tilecast.evidence import TuningTable
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    export_table(TuningTable((HERE,), (decision(),)), sys.argv[1])
except CacheError as error:
    print(error)
"""
    output = subprocess.run(
        [sys.executable, "-c", code, str(exported)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert f"{exported}: cannot be written (File too large)" in output
    assert import_table(exported) == TABLE
    assert [p.name for p in exported.parent.iterdir()] == ["table.db"]


def test_layer_objects_are_shared(exported: Path) -> None:
    """A table of thousands of decisions holds each layer and config once."""
    layers = {id(d.layer) for d in import_table(exported).decisions}
    assert len(layers) == 1
    assert import_table(exported).decisions[0].layer == LAYER
