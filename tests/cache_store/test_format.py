"""The example in docs/cache-format.md is what the code writes, and is read as what it says."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sqlite3
from pathlib import Path

import pytest

from tilecast.cache_store import layout, models
from tilecast.cache_store.bundle import MAX_ROWS, Bundle, export_table, read_bundle
from tilecast.cache_store.measurement_rows import MEASUREMENT_KINDS
from tilecast.canonical import canonical_json
from tilecast.environment import Environment
from tilecast.evidence import Choice, Decision, Measurement, TuningTable
from tilecast.problem import Bucket, ExpertLayer, TileConfig

DOC = Path(__file__).parents[2] / "docs" / "cache-format.md"


def example() -> TuningTable:
    environment = Environment(
        device_kind="cpu",
        device="Example CPU 9000",
        arch="x86_64",
        features="avx2,f16c,fma",
        units=8,
        llc_bytes=33554432,
        kernel_source=hashlib.sha256(b"the kernels' source text").hexdigest(),
        torch="2.13.0",
        compiler="0.50.0",
        threads=8,
        system="Linux 6.1 python 3.11.7",
    )
    default = TileConfig("llvm.moe_gemm", {"mr": 4, "nr": 16})
    tuned = default.with_params(mr=6)
    numerics = hashlib.sha256(b"a numerics class").hexdigest()
    return TuningTable(
        (environment,),
        (
            Decision(
                environment=environment.digest,
                layer=ExpertLayer(hidden=1024, intermediate=3584, experts=8, top_k=2),
                bucket=Bucket(above=0, tokens=16),
                policy="reproducible",
                up=Choice(
                    config=tuned,
                    p50_us=812.5,
                    default=default,
                    default_us=1020.25,
                    runner_up=default,
                    runner_up_us=1020.25,
                    noise=0.015,
                    numerics=numerics,
                ),
                down=Choice(config=default, p50_us=420.0, default=default, default_us=420.0, numerics=numerics),
            ),
        ),
    )


def evidence() -> Measurement:
    """One of the measurements that the example rests on."""
    (found,) = example().decisions
    return Measurement(
        environment=found.environment,
        gemm=found.layer.up,
        tokens=16,
        config=found.up.config,
        samples_us=(811.0, 812.5, 815.75),
        numerics=found.up.numerics,
        error_ratio=1.0,
        measured_at=1.7e9,
    )


def dumped(path: Path) -> str:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        marks = [
            f"PRAGMA {name}={connection.execute(f'PRAGMA {name}').fetchone()[0]};"
            for name in ("application_id", "user_version")
        ]
        lines = [line.replace("\t", "  ").replace(" \n", "\n") for line in connection.iterdump()]
    return "\n".join([*marks, *lines])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", DOC.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_example_is_what_the_code_writes(tmp_path: Path) -> None:
    export_table(example(), tmp_path / "table.db", [evidence()])
    # The writer's version is for people only, and moves on.
    written = re.sub(r"'tilecast [^']*'", "'tilecast 0.1.0'", dumped(tmp_path / "table.db"))
    assert blocks("sql") == [written]
    with contextlib.closing(sqlite3.connect(tmp_path / "table.db")) as connection:
        row = connection.execute(f"SELECT {', '.join(MEASUREMENT_KINDS)} FROM measurement").fetchone()
    key = {
        name: value
        for name, value in zip(MEASUREMENT_KINDS, row, strict=True)
        if name in ["config", "environment", "gemm", "layer", "rank", "round", "routing", "run", "tokens"]
    }
    assert blocks("json") == [example().to_bytes().decode("ascii"), canonical_json(key), canonical_json(list(row))]


def test_example_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(blocks("sql")[0])
    bundle = read_bundle(path, measurements=True)
    assert (bundle.table, bundle.measurements) == (example(), (evidence(),))
    table, key, row = (text.encode("ascii") for text in blocks("json"))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        digests = connection.execute("SELECT table_digest, measurements_digest FROM export").fetchone()
        keys = connection.execute("SELECT key FROM measurement").fetchone()
    assert digests == (hashlib.sha256(table).hexdigest(), hashlib.sha256(row + b"\n").hexdigest())
    assert keys == (hashlib.sha256(key).hexdigest(),)


def test_files_of_the_first_format_are_read(tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((Path(__file__).parent / "fixtures" / "export_1.sql").read_text(encoding="utf-8"))
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert read_bundle(path, measurements=True) == Bundle(table=example(), producer="tilecast 0.1.0")
    # And replaced by what this Tilecast writes.
    export_table(example(), path)
    assert read_bundle(path, measurements=True).table == example()


@pytest.mark.parametrize("table", [*models.metadata.sorted_tables, models.export], ids=lambda table: table.name)
def test_every_table_and_column_is_documented(table: models.Table) -> None:
    text = DOC.read_text(encoding="utf-8")
    assert f"`{table.name}`" in text
    for column in table.columns:
        assert re.search(rf"^\| (\w+, )*{column.name}(, \w+)* \|", text, re.MULTILINE), column.name


def test_numbers_in_the_text_are_those_in_the_code() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert f"0x{layout.EXPORT_ID:08X}" in text
    assert f"0x{layout.STORE_ID:08X}" in text
    assert f"format {layout.EXPORT_FORMAT}\n" in text.splitlines(keepends=True)[0]
    for rows in MAX_ROWS.values():
        assert f"{rows:,}" in text
