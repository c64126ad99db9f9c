"""Damaged and hostile files, drawn at random from one good export.

`forge` is a second reader of the format, written from docs/cache-format.md: it makes a changed file's digests agree
again, so that only the checks of values can refuse it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

PAGE = 4096
TABLES = ("environment", "layer", "config", "decision", "measurement", "export")
NUMBERS: tuple[object, ...] = (
    -1, 0, 1, 1.5, -2.5, 1e308, -1e308, 5e-324, 2**31, 2**53, 2**63 - 1, -(2**63), float("inf"), float("-inf"), "NaN",
)  # fmt: skip
TEXTS: tuple[object, ...] = (
    None, "", "\0", "a\0b", "'; DROP TABLE decision; --", '"); DELETE FROM config; --', "../../etc/passwd", "%s%n{0}",
    "\u202etxt", "\ud7ff\uffff", "x" * 5000, b"", b"\xff\xfe", b"\x80\x04\x95cposix\nsystem\n", "reproducible",
    "uniform", "f" * 64, "0" * 64, "up", "ok", "[]", "[1e999]", "[" + "9" * 400 + "]", "[" * 3000, "{}", '{"a":NaN}',
)  # fmt: skip
JSON_VALUES: tuple[object, ...] = (
    None, True, -1, 0, 1, 7, 1 << 24, (1 << 24) + 1, 1 << 53, 10**300, 1.5, -0.0, "", "x", "'; DROP TABLE x", [], {},
    [1], {"a": 1}, "silu", "fp32", "x" * 500,
)  # fmt: skip
SCHEMAS = (
    "CREATE VIEW evil AS SELECT * FROM config",
    'CREATE TABLE "x\'; DROP TABLE config; --" (a)',
    "CREATE TRIGGER evil AFTER INSERT ON config BEGIN DELETE FROM decision; END",
    "CREATE INDEX evil ON decision (abs(tokens))",
    "CREATE INDEX evil ON decision (tokens) WHERE tokens > 1",
    "CREATE VIRTUAL TABLE evil USING fts5(x)",
    "CREATE VIRTUAL TABLE evil USING rtree(a, b, c)",
    "CREATE VIEW evil AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n",
    "ALTER TABLE decision ADD COLUMN evil TEXT DEFAULT 'x'",
    "ALTER TABLE decision RENAME COLUMN routing TO evil",
    "ALTER TABLE config ADD COLUMN evil AS (hex(randomblob(1000000)))",
    "DROP TABLE measurement",
    "DROP INDEX ix_measurement_environment_layer_gemm_tokens",
    "CREATE TABLE evil (a CHECK (a LIKE '%a%a%a%a%a%a%a%a%b'))",
    "ANALYZE",
)
SCHEMA_EDITS = (
    ("TEXT NOT NULL", "TEXT NOT NULL CHECK (hex(randomblob(9)) <> '')"),
    ("TEXT NOT NULL", "TEXT NOT NULL COLLATE NOCASE"),
    ("TEXT NOT NULL", "TEXT DEFAULT (randomblob(1000000000))"),
    ("TEXT NOT NULL", "INTEGER NOT NULL"),
    ("PRIMARY KEY", "PRIMARY"),
    ("CREATE TABLE", "CREATE VIEW"),
    ("VARCHAR(64)", "VARCHAR(64) AS (1)"),
    ("VARCHAR(64)", "VARCHAR(64) REFERENCES nothing(at_all)"),
    ("(", ""),
)


def connected(path: Path) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(path, isolation_level=None))


def truncated(path: Path, data: bytes, chance: random.Random) -> None:
    path.write_bytes(data[: chance.choice([chance.randrange(len(data)), PAGE * chance.randrange(len(data) // PAGE)])])


def lengthened(path: Path, data: bytes, chance: random.Random) -> None:
    path.write_bytes(data + chance.randbytes(chance.choice([1, 100, PAGE, 5 * PAGE])))


def flipped(path: Path, data: bytes, chance: random.Random) -> None:
    damaged = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 8, 64])):
        damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(damaged)


def overwritten(path: Path, data: bytes, chance: random.Random) -> None:
    damaged = bytearray(data)
    start = chance.randrange(len(data))
    noise = chance.choice([chance.randbytes(64), bytes(64), b"\xff" * 64, chance.randbytes(PAGE), bytes(PAGE)])
    damaged[start : start + len(noise)] = noise
    path.write_bytes(damaged[: len(data)])


def mixed_pages(path: Path, data: bytes, chance: random.Random) -> None:
    pages = [data[start : start + PAGE] for start in range(0, len(data), PAGE)]
    one, other = chance.randrange(len(pages)), chance.randrange(1, len(pages))
    if chance.random() < 0.5:
        pages[one], pages[other] = pages[other], pages[one]
    else:
        pages[other] = pages[one]
    path.write_bytes(b"".join(pages))


def claimed(path: Path, data: bytes, chance: random.Random) -> None:
    """A header, or the top of a page, that claims what is not so: sizes, counts, pointers."""
    damaged = bytearray(data)
    page = chance.randrange(len(data) // PAGE) * PAGE
    place = chance.choice([chance.randrange(16, 100), page + chance.randrange(108 if page == 0 else 40)])
    value = chance.choice([0, 1, 2, 13, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, chance.randrange(1 << 32)])
    size = chance.choice([1, 2, 4])
    damaged[place : place + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "big")
    path.write_bytes(damaged)


def changed_value(path: Path, data: bytes, chance: random.Random) -> None:
    path.write_bytes(data)
    table = chance.choice(TABLES)
    with connected(path) as connection, contextlib.suppress(sqlite3.Error):
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        value = chance.choice(chance.choice([NUMBERS, TEXTS]))
        where = f" WHERE rowid = (SELECT rowid FROM {table} LIMIT 1)" if chance.random() < 0.5 else ""
        connection.execute(f'UPDATE {table} SET "{chance.choice(columns)}" = ?{where}', (value,))
        if chance.random() < 0.5:
            forge(connection)


def changed_fields(path: Path, data: bytes, chance: random.Random) -> None:
    """Another value in a layer, config or environment, with every digest made to agree."""
    path.write_bytes(data)
    table = chance.choice(["environment", "layer", "config"])
    with connected(path) as connection:
        rows = connection.execute(f"SELECT digest, fields FROM {table}").fetchall()
        digest, text = chance.choice(rows)
        fields = json.loads(text)
        inner = fields["params"] if table == "config" and chance.random() < 0.6 else fields
        key = chance.choice([*inner, "new"])
        if chance.random() < 0.2:
            inner.pop(key, None)
        else:
            inner[key] = chance.choice(JSON_VALUES)
        renewed = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        with contextlib.suppress(sqlite3.Error):
            replace_entry(connection, table, digest, renewed)
        forge(connection)


def replace_entry(connection: sqlite3.Connection, table: str, digest: str, fields: str) -> str:
    """Give an entry other fields, and its digest to all who refer to it; return the digest."""
    renewed = hashlib.sha256(fields.encode()).hexdigest()
    connection.execute(f"UPDATE {table} SET fields = ?, digest = ? WHERE digest = ?", (fields, renewed, digest))
    references = [table]
    if table == "config":
        references = [f"{gemm}_{name}" for gemm in ("up", "down") for name in ("config", "default", "runner_up")]
    for column in references:
        connection.execute(f"UPDATE decision SET {column} = ? WHERE {column} = ?", (renewed, digest))
    connection.execute(f"UPDATE measurement SET {table} = ? WHERE {table} = ?", (renewed, digest))
    return renewed


def changed_rows(path: Path, data: bytes, chance: random.Random) -> None:
    path.write_bytes(data)
    table = chance.choice(TABLES)
    with connected(path) as connection, contextlib.suppress(sqlite3.Error):
        if chance.random() < 0.5:
            connection.execute(f"DELETE FROM {table} WHERE rowid = (SELECT rowid FROM {table} LIMIT 1)")
        else:
            connection.execute("PRAGMA writable_schema=ON")
            connection.execute(f"INSERT INTO {table} SELECT * FROM {table}")
        if chance.random() < 0.5:
            forge(connection)


def changed_schema(path: Path, data: bytes, chance: random.Random) -> None:
    path.write_bytes(data)
    with connected(path) as connection, contextlib.suppress(sqlite3.Error):
        if chance.random() < 0.5:
            connection.execute(chance.choice(SCHEMAS))
        else:
            old, new = chance.choice(SCHEMA_EDITS)
            connection.execute("PRAGMA writable_schema=ON")
            connection.execute(
                "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = ?", (old, new, chance.choice(TABLES))
            )


def marked(path: Path, data: bytes, chance: random.Random) -> None:
    path.write_bytes(data)
    with connected(path) as connection:
        pragma = chance.choice(["application_id", "user_version"])
        connection.execute(f"PRAGMA {pragma}={chance.choice([0, 1, 3, -1, 2**31 - 1, 0x544C5354])}")


def swollen(path: Path, data: bytes, chance: random.Random) -> None:
    """Values, and numbers of rows, far beyond what Tilecast writes."""
    path.write_bytes(data)
    table = chance.choice(["environment", "layer", "config"])
    with connected(path) as connection:
        if chance.random() < 0.5:
            connection.execute(f"UPDATE {table} SET fields = fields || printf('%.*c', 2000000, ' ')")
        else:
            numbers = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 10001) SELECT x FROM n"
            connection.execute(f"INSERT INTO environment SELECT printf('%064d', x), '{{}}' FROM ({numbers})")


def foreign(path: Path, data: bytes, chance: random.Random) -> None:
    kinds: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: chance.randbytes(chance.randrange(1, 10_000)),
        lambda: data[:16] + chance.randbytes(5000),
        lambda: json.dumps({"1": {"BLOCK_SIZE_M": 16}, "triton_version": "3.4.0"}).encode(),
        lambda: b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94",
        lambda: turbomind_text(chance),
        lambda: turbomind_raw(chance),
        lambda: b"TMGEMM2\0" + chance.randbytes(400),
    ]
    path.write_bytes(chance.choice(kinds)())


def turbomind_text(chance: random.Random) -> bytes:
    return b"".join(b"80 " + b"".join(b"%d " % chance.randrange(300) for _ in range(32)) + b"\n" for _ in range(20))


def turbomind_raw(chance: random.Random) -> bytes:
    return b"".join(struct.pack("<50i", 900, *(chance.randrange(4096) for _ in range(49))) for _ in range(20))


KINDS = (
    truncated, lengthened, flipped, flipped, overwritten, mixed_pages, claimed, claimed, changed_value, changed_value,
    changed_value, changed_fields, changed_fields, changed_rows, changed_schema, marked, swollen, foreign,
)  # fmt: skip


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def forge(connection: sqlite3.Connection) -> None:
    """Make the keys of measurements and the digests of an export agree with what is there, as far as they can."""
    with contextlib.suppress(sqlite3.Error, KeyError, TypeError, ValueError, RecursionError):
        _forge_keys(connection)
    with contextlib.suppress(sqlite3.Error, KeyError, TypeError, ValueError, RecursionError):
        connection.execute("UPDATE export SET measurements_digest = ?", (measurements_digest(connection),))
    with contextlib.suppress(sqlite3.Error, KeyError, TypeError, ValueError, RecursionError):
        connection.execute("UPDATE export SET table_digest = ?", (table_digest(connection),))


def _forge_keys(connection: sqlite3.Connection) -> None:
    names = ("config", "environment", "gemm", "layer", "rank", "round", "routing", "run", "tokens")
    for number, *values in connection.execute(f"SELECT id, {', '.join(names)} FROM measurement").fetchall():
        key = hashlib.sha256(canonical(dict(zip(names, values, strict=True))).encode()).hexdigest()
        connection.execute("UPDATE measurement SET key = ? WHERE id = ?", (key, number))


def measurements_digest(connection: sqlite3.Connection) -> str:
    """The digest of measurements, from the documentation alone."""
    names = (
        "key, environment, layer, gemm, tokens, config, routing, rank, world_size, run, round, status, samples_us, "
        "numerics, error_ratio, detail, measured_at"
    )
    rows = connection.execute(f"SELECT {names} FROM measurement ORDER BY id").fetchall()
    return hashlib.sha256("".join(canonical(list(row)) + "\n" for row in rows).encode()).hexdigest()


def table_digest(connection: sqlite3.Connection) -> str:
    """The digest of a table, from the documentation alone."""
    entries = {
        table: {key: json.loads(text) for key, text in connection.execute(f"SELECT digest, fields FROM {table}")}
        for table in ("environment", "layer", "config")
    }
    connection.row_factory = sqlite3.Row
    rows = connection.execute("SELECT * FROM decision ORDER BY environment, layer, policy, routing, tokens").fetchall()
    connection.row_factory = None
    decisions = []
    for row in rows:
        decision = {name: row[name] for name in ("environment", "policy", "routing", "tokens", "above", "certificate")}
        decision["layer"] = entries["layer"][row["layer"]]
        for gemm in ("up", "down"):
            configs = {name: row[f"{gemm}_{name}"] for name in ("config", "default", "runner_up")}
            decision[gemm] = {
                **{name: None if key is None else entries["config"][key] for name, key in configs.items()},
                **{
                    name: row[f"{gemm}_{name}"]
                    for name in ("p50_us", "default_us", "runner_up_us", "noise", "numerics")
                },
            }
        decisions.append(decision)
    environments = [entries["environment"][key] for key in sorted(entries["environment"])]
    return hashlib.sha256(
        canonical({"format": 1, "environments": environments, "decisions": decisions}).encode()
    ).hexdigest()


def damage(path: Path, data: bytes, chance: random.Random) -> str:
    """Write one damaged file and return how it was damaged."""
    for beside in path.parent.glob(f"{path.name}*"):
        beside.unlink()
    kind = chance.choice(KINDS)
    kind(path, data, chance)
    for beside in (Path(f"{path}-journal"), Path(f"{path}-wal")):
        beside.unlink(missing_ok=True)
    return kind.__name__
