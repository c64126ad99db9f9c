from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store_contract import CONFIG, HERE, SharedStoreContract, StoreContract, decision, measurement
from tilecast.cache_store import plain
from tilecast.cache_store.bundle import export_table
from tilecast.cache_store.memory import MemoryStore
from tilecast.cache_store.store import open_store
from tilecast.errors import CacheError
from tilecast.evidence import TuningTable
from tilecast.store import Store

ROOT = Path(__file__).parents[2]


class TestSqlStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        with open_store(tmp_path / "store.db") as store:
            yield store


class TestSharedSqlStore(SharedStoreContract):
    @pytest.fixture
    def where(self, tmp_path: Path) -> str:
        return str(tmp_path / "store.db")


OPEN = """
import sys, time
from tests.store_contract import HERE, measurement
from tilecast.cache_store.store import open_store
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
with open_store(sys.argv[1]) as store:
    store.add_environment(HERE)
    store.add_measurements([measurement(rank=int(sys.argv[3]), world_size=64, round=n) for n in range(5)])
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def pragma(path: Path, name: str) -> object:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_processes_open_a_fresh_store_at_the_same_instant(tmp_path: Path) -> None:
    """Whole interpreters; test_processes.py has many more, forked."""
    path = tmp_path / "new" / "folder" / "store.db"
    start = time.time() + 4
    running = [python(OPEN, path, start, rank) for rank in range(3)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    with open_store(path) as store:
        assert len(store.measurements()) == 15
    assert pragma(path, "journal_mode") == "wal"
    # The last process to leave folds the log back in; no lock file or the like stays.
    assert [p.name for p in path.parent.iterdir()] == ["store.db"]


def test_forked_child_uses_its_own_connections(tmp_path: Path) -> None:
    with open_store(tmp_path / "store.db") as store:
        store.add_environment(HERE)
        child = os.fork()
        if child == 0:
            try:
                store.add_measurements([measurement(round=1)])
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        store.add_measurements([measurement(round=2)])
        assert [m.round for m in store.measurements()] == [1, 2]


@pytest.mark.parametrize("where", [None, ":memory:", "sqlite://", "sqlite:///:memory:"])
def test_memory_by_name(where: str | None) -> None:
    with open_store(where) as store:
        assert isinstance(store, MemoryStore)


def test_path_and_url_name_the_same_store(tmp_path: Path) -> None:
    path = tmp_path / "a b%20?#.db"
    with open_store(path) as store:
        store.add_environment(HERE)
    with open_store(str(path)) as store:
        assert store.environments() == [HERE]
    plain = tmp_path / "plain.db"
    with open_store(f"sqlite:///{plain}") as store:
        store.add_environment(HERE)
    with open_store(plain, create=False) as store:
        assert store.environments() == [HERE]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("mysql://host/db", "unknown kind of store"),
        ("nonsense+://x", "nonsense"),
        ("sqlite:///x.db?mode=ro", "without options"),
        ("postgresql+nodriver://user:secret@host/db", "nodriver"),
    ],
)
def test_bad_urls(where: str, message: str) -> None:
    with pytest.raises(CacheError, match=message) as caught:
        open_store(where)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_missing_store(tmp_path: Path) -> None:
    path = tmp_path / "none.db"
    for options in ({"create": False}, {"read_only": True}):
        with pytest.raises(CacheError, match="there is no store"):
            open_store(path, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_store_is_left_alone(tmp_path: Path) -> None:
    text, other, folder = tmp_path / "notes.txt", tmp_path / "other.db", tmp_path / "folder"
    text.write_text("not a database, just some notes\n" * 9)
    folder.mkdir()
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE mine (x)")
    exported = tmp_path / "table.db"
    export_table(TuningTable(), exported)
    before = {path: path.read_bytes() for path in (text, other, exported)}
    expected = {
        text: "is not a SQLite file",
        other: "another program",
        folder: "is a directory",
        exported: "is an exported table",
        text / "under" / "store.db": "cannot be made",
    }
    for path, message in expected.items():
        with pytest.raises(CacheError, match=message) as caught:
            open_store(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before


def test_empty_file_becomes_a_store(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.touch()
    with pytest.raises(CacheError, match="holds no store yet"):
        open_store(path, read_only=True)
    with open_store(path) as store:
        store.add_environment(HERE)


def test_read_only_store_reads_and_refuses_to_write(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with open_store(path) as store:
        store.add_environment(HERE)
        store.put_decisions([decision()])
    with open_store(path, read_only=True) as store:
        assert store.table().decisions == (decision(),)
        for write in (
            lambda: store.add_environment(HERE),
            lambda: store.add_measurements([measurement()]),
            lambda: store.put_decisions([decision()]),
        ):
            with pytest.raises(CacheError, match="read-only"):
                write()


def test_damaged_row_is_an_error_that_names_store_and_entry(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with open_store(path) as store:
        store.add_environment(HERE)
        store.put_decisions([decision()])
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE config SET fields = replace(fields, '\"mr\":6', '\"mr\":7')")
    with open_store(path) as store, pytest.raises(CacheError, match=f"store.db: config '{CONFIG.digest[:12]}'"):
        store.table()


def test_locked_store_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "BUSY_TIMEOUT_S", 0.05)
    path = tmp_path / "store.db"
    with open_store(path) as store, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CacheError, match=r"store.db: database is locked; another process keeps it locked"):
            store.add_environment(HERE)
        other.execute("ROLLBACK")
        store.add_environment(HERE)


def test_full_disk_is_an_error_and_the_store_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with open_store(path) as store:
        store.add_environment(HERE)
    code = """
import resource, sys
from tests.store_contract import measurement
from tilecast.cache_store.store import open_store
from tilecast.errors import CacheError
store = open_store(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    for number in range(1000):
        store.add_measurements([measurement(round=number, samples_us=(1.5,) * 500)])
except CacheError as error:
    print(number, error)
"""
    process = python(code, path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    kept, message = output.split(" ", 1)
    assert str(path) in message
    with open_store(path) as store:
        assert len(store.measurements()) == int(kept)
