"""Damaged and hostile files: refused with one line, or imported as what they say. Nothing else, and not for long."""

from __future__ import annotations

import collections
import contextlib
import math
import random
import re
import sqlite3
import struct
import time
from pathlib import Path

import pytest

from tests.cache_store import damage
from tests.store_contract import CONFIG, HERE, LAYER, THERE, decision, measurement
from tilecast.cache_store.bundle import Bundle, export_table, import_table, open_evidence, read_bundle
from tilecast.cache_store.foreign import described
from tilecast.cache_store.layout import EXPORT_ID
from tilecast.cache_store.merge import merge_files
from tilecast.errors import CacheError, InputError
from tilecast.evidence import TuningTable

TABLE = TuningTable((HERE, THERE), (decision(), decision(4, 16), decision(policy="fastest")))
MEASUREMENTS = tuple(
    measurement(round=number, detail="a" * 300, samples_us=tuple(1.5 + n for n in range(40))) for number in range(20)
)
HANG_S = 5


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    path = tmp_path / "good.db"
    export_table(TABLE, path, MEASUREMENTS)
    return path.read_bytes()


def check_sound(bundle: Bundle) -> None:
    """What a forged file may say at most: values that could have been measured, for things that there could be."""
    for found in bundle.table.decisions:
        assert 0 <= found.bucket.above < found.bucket.tokens <= 1 << 24
        assert found.policy in ("reproducible", "fastest")
        for choice in (found.up, found.down):
            for time_us in (choice.p50_us, choice.default_us, choice.runner_up_us):
                assert time_us is None or (0 < time_us < math.inf)
            assert 0 <= choice.noise < math.inf
            for value in dict(choice.config.params).values():
                assert isinstance(value, int | str)
        for size in (found.layer.hidden, found.layer.intermediate, found.layer.experts, found.layer.top_k):
            assert 1 <= size <= 1 << 24
    for kept in bundle.measurements:
        assert all(0 < sample < math.inf for sample in kept.samples_us)
        assert kept.error_ratio is None or 0 <= kept.error_ratio < math.inf
        assert math.isfinite(kept.measured_at)


def check_parts(path: Path, whole: Bundle | None) -> None:
    """What is read layer by layer is what is read at once; what is refused at once ends in nothing but one line.

    A part may be refused of a file that is sound but for an index, which reading all of it does not use.
    """
    try:
        with open_evidence(path) as evidence:
            parts = [evidence.table(layer) for layer in evidence.layers(evidence.layer_digests())]
            found = {m.key: m for part in parts for d in part.decisions for m in evidence.of(d)}
            digest = evidence.digest()
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
        assert len(str(error).splitlines()) == 1
        return
    if whole is not None:
        decisions = sorted((d for part in parts for d in part.decisions), key=lambda d: d.sort_key)
        assert decisions == list(whole.table.decisions)
        assert digest == whole.table.digest
        assert found.items() <= {m.key: m for m in whole.measurements}.items()


def check_files(folder: Path, data: bytes, count: int, seed: int) -> None:
    chance, path = random.Random(seed), folder / "file.db"
    refused: collections.Counter[str] = collections.Counter()
    tried: collections.Counter[str] = collections.Counter()
    for number in range(count):
        kind = damage.damage(path, data, chance)
        tried[kind] += 1
        before, started = path.read_bytes(), time.process_time()
        try:
            bundle = read_bundle(path, measurements=True)
        except InputError as error:
            refused[kind] += 1
            assert str(error).startswith(f"{path}: "), (number, kind)
            assert len(str(error).splitlines()) == 1, (number, kind)
            assert len(str(error)) < 1500, (number, kind)
            check_parts(path, None)
        else:
            check_sound(bundle)
            check_parts(path, bundle)
            if kind not in ("changed_value", "changed_fields", "changed_rows"):  # Those may be forged.
                assert (bundle.table, bundle.measurements) == (TABLE, MEASUREMENTS), (number, kind)
        assert time.process_time() - started < HANG_S, (number, kind)
        assert path.read_bytes() == before, (number, kind)
    assert set(tried) == {kind.__name__ for kind in damage.KINDS}
    for kind in ("truncated", "lengthened", "swollen", "foreign"):
        assert refused[kind] == tried[kind], kind


def test_two_hundred_damaged_files(tmp_path: Path, good: bytes) -> None:
    check_files(tmp_path, good, 250, seed=1)


@pytest.mark.long
def test_two_thousand_damaged_files(tmp_path: Path, good: bytes) -> None:
    check_files(tmp_path, good, 2000, seed=2)


def test_digests_are_what_the_documentation_says(tmp_path: Path, good: bytes) -> None:
    """`damage.forge`, which knows nothing but the documentation, finds nothing to change in an honest file."""
    with contextlib.closing(sqlite3.connect(tmp_path / "good.db", isolation_level=None)) as connection:
        stored = connection.execute("SELECT table_digest, measurements_digest FROM export").fetchone()
        assert stored == (damage.table_digest(connection), damage.measurements_digest(connection))
        keys = connection.execute("SELECT key FROM measurement").fetchall()
        damage.forge(connection)
        assert connection.execute("SELECT key FROM measurement").fetchall() == keys
        assert connection.execute("SELECT table_digest, measurements_digest FROM export").fetchone() == stored


def test_changed_sample_is_found_out(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "good.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE measurement SET samples_us = '[99.5]' WHERE id = 7")
    assert import_table(path) == TABLE
    with pytest.raises(CacheError, match="its measurements have digest"):
        read_bundle(path, measurements=True)
    with pytest.raises(CacheError, match="its measurements have digest"):
        merge_files([path], tmp_path / "merged.db")
    assert not (tmp_path / "merged.db").exists()


def test_endless_numbers_in_samples_are_refused(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "good.db"
    with damage.connected(path) as connection:
        connection.execute("UPDATE measurement SET samples_us = ?", ("[" + "9" * 400 + "]",))
        damage.forge(connection)
    with pytest.raises(CacheError, match="sample is"):
        read_bundle(path, measurements=True)


def test_forged_negative_time_is_refused_for_its_value(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "good.db"
    with damage.connected(path) as connection:
        connection.execute("UPDATE decision SET up_p50_us = -2.5")
        damage.forge(connection)
    with pytest.raises(CacheError, match=r"chosen config's time is -2\.5"):
        import_table(path)


def test_schema_that_computes_is_refused_before_it_does(tmp_path: Path, good: bytes) -> None:
    """A CHECK would be evaluated by SQLite's quick_check, row by row."""
    path = tmp_path / "good.db"
    with damage.connected(path) as connection:
        connection.execute("PRAGMA writable_schema=ON")
        check = "TEXT NOT NULL CHECK (fields LIKE '%a%b%c%d%e%f%g%')"
        connection.execute(
            "UPDATE sqlite_master SET sql = replace(sql, 'TEXT NOT NULL', ?) WHERE name = 'layer'", [check]
        )
    with pytest.raises(CacheError, match="'layer' is made with 'CHECK'"):
        import_table(path)


def circles(page: int = 512, depth: int = 12) -> bytes:
    """A file whose schema is a tree of few pages, most of which refer to the next one dozens of times.

    Its leaves are one table and, as often as the tree has paths, the index of its key, which SQLite takes each time.
    """
    pages = [bytearray(page) for _ in range(depth + 2)]
    for number in range(depth):
        start = 100 if number == 0 else 0
        cells = (page - start - 12) // 8
        pages[number][start : start + 12] = struct.pack(">BHHHBI", 5, 0, cells, 0, 0, number + 2)
        for cell in range(cells):
            child = depth + 2 if number == cell == 0 else number + 2
            place = page - 5 * (cell + 1)
            pages[number][place : place + 5] = struct.pack(">IB", child, cell + 1)
            pages[number][start + 12 + 2 * cell : start + 14 + 2 * cell] = struct.pack(">H", place)
    leaves = (
        (b"index", b"sqlite_autoindex_t_1", b"t", 3, b""),
        (b"table", b"t", b"t", 2, b"CREATE TABLE t(a PRIMARY KEY)"),
    )
    for leaf, (kind, name, table, root, sql) in zip(pages[depth:], leaves, strict=True):
        sizes = [13 + 2 * len(text) for text in (kind, name, table)]
        record = bytes([6, *sizes, 1, 13 + 2 * len(sql) if sql else 0]) + kind + name + table + bytes([root]) + sql
        cell_bytes = bytes([len(record), 1]) + record
        leaf[:10] = struct.pack(">BHHHBH", 13, 0, 1, page - len(cell_bytes), 0, page - len(cell_bytes))
        leaf[page - len(cell_bytes) :] = cell_bytes
    header = bytearray(100)
    header[:16] = b"SQLite format 3\0"
    header[16:24] = struct.pack(">HBBBBBB", page, 1, 1, 0, 64, 32, 32)
    header[24:32] = struct.pack(">II", 1, len(pages))
    for place, value in ((44, 4), (56, 1), (60, 2), (68, EXPORT_ID), (92, 1)):
        header[place : place + 4] = struct.pack(">I", value)
    pages[0][:100] = header
    return b"".join(bytes(p) for p in pages)


def test_file_that_would_take_forever_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "circles.db"
    path.write_bytes(circles())
    started = time.process_time()
    with pytest.raises(CacheError, match="refer to each other in circles") as caught:
        import_table(path)
    assert time.process_time() - started < HANG_S
    assert len(str(caught.value).splitlines()) == 1


def test_turbomind_files_are_recognised(tmp_path: Path) -> None:
    chance, path = random.Random(4), tmp_path / "tm"
    for data, kind in (
        (damage.turbomind_text(chance), "the text form of 2024"),
        (damage.turbomind_raw(chance), "a raw dump of its records"),
        (b"TMGEMM2\0" + bytes(100), "binary, TMGEMM2"),
    ):
        path.write_bytes(data)
        with pytest.raises(
            CacheError, match=re.escape(f"is TurboMind's GEMM cache ({kind}): its entries name")
        ) as caught:
            import_table(path)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("data", "start"),
    [
        (b"1 2 3\n4 5 6\n", None),
        (b"hello", None),
        (bytes(400), None),
        (b"", None),
        (b" \n{\"1\": {}}", "looks like JSON"),
        (b"\x80\x04\x95", "is a pickle"),
        (b"PK\x03\x04", "is a ZIP archive"),
        (b"\x1f\x8b\x08", "is compressed with gzip"),
    ],
)  # fmt: skip
def test_other_files_by_their_first_bytes(data: bytes, start: str | None) -> None:
    found = described(data)
    assert found is None if start is None else found is not None and found.startswith(start)


def test_names_of_the_contract_are_in_the_file(good: bytes) -> None:
    """Or else nothing above damages what it means to."""
    for digest in (CONFIG.digest, LAYER.digest, HERE.digest):
        assert digest.encode() in good


@pytest.mark.parametrize("text", ["\x1b[2J", "\x7f", "\x9b31m", "two\nlines"])
def test_config_that_would_command_a_terminal_is_refused(tmp_path: Path, good: bytes, text: str) -> None:
    path = tmp_path / "good.db"
    with damage.connected(path) as connection:
        fields = damage.canonical({"kernel": "llvm.moe_gemm", "params": {"mr": text}})
        damage.replace_entry(connection, "config", CONFIG.digest, fields)
        damage.forge(connection)
    with pytest.raises(CacheError, match="printable characters") as caught:
        import_table(path)
    assert str(caught.value).isprintable()
