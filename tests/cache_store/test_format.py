"""The example in docs/cache-format.md is what the code writes, and is read as what it says."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sqlite3
from pathlib import Path

import pytest

from tilecast.cache_store import models
from tilecast.cache_store.bundle import MAX_ROWS, export_table, import_table
from tilecast.environment import Environment
from tilecast.evidence import Choice, Decision, TuningTable
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
    export_table(example(), tmp_path / "table.db")
    # The writer's version is for people only, and moves on.
    written = re.sub(r"'tilecast [^']*'", "'tilecast 0.1.0'", dumped(tmp_path / "table.db"))
    assert blocks("sql") == [written]
    assert blocks("json") == [example().to_bytes().decode("ascii")]


def test_example_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(blocks("sql")[0])
    assert import_table(path) == example()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (digest,) = connection.execute("SELECT table_digest FROM export").fetchone()
    assert hashlib.sha256(blocks("json")[0].encode("ascii")).hexdigest() == digest


@pytest.mark.parametrize("table", [*models.metadata.sorted_tables, models.export], ids=lambda table: table.name)
def test_every_table_and_column_is_documented(table: models.Table) -> None:
    text = DOC.read_text(encoding="utf-8")
    assert f"`{table.name}`" in text
    for column in table.columns:
        assert re.search(rf"^\| (\w+, )*{column.name}(, \w+)* \|", text, re.MULTILINE), column.name


def test_numbers_in_the_text_are_those_in_the_code() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert f"0x{models.EXPORT_ID:08X}" in text
    assert f"0x{models.STORE_ID:08X}" in text
    assert f"format {models.EXPORT_FORMAT}\n" in text.splitlines(keepends=True)[0]
    for rows in MAX_ROWS.values():
        assert f"{rows:,}" in text
