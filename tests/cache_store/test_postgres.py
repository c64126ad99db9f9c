"""The same contracts on a real PostgreSQL server, which the tests bring along and start."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine, make_url, text

from tests.store_contract import HERE, LAYER, SharedStoreContract, StoreContract, decision, in_threads, measurement
from tilecast.cache_store import session
from tilecast.cache_store.adopt import adopt_under
from tilecast.cache_store.bundle import export_store, import_table, open_evidence, read_bundle
from tilecast.cache_store.gc import Unwanted, collect
from tilecast.cache_store.merge import merge_files
from tilecast.cache_store.session import open_server
from tilecast.cache_store.store import open_store
from tilecast.errors import CacheError
from tilecast.problem import TileConfig
from tilecast.store import Store

pgserver = pytest.importorskip("pgserver", reason="no embedded PostgreSQL for this machine and Python")
pytest.importorskip("psycopg", reason="the driver for PostgreSQL is not installed: tilecast[postgresql]")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[URL]:
    with tempfile.TemporaryDirectory(prefix="tilecast-pg-") as folder:
        running = pgserver.get_server(folder, cleanup_mode="stop")
        try:
            yield make_url(running.get_uri()).set(drivername="postgresql+psycopg")
        finally:
            running.cleanup()


@pytest.fixture
def where(server: URL) -> str:
    """The URL of a database that is as new."""
    engine = create_engine(server)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return server.render_as_string(hide_password=False)


class TestPostgresStore(StoreContract):
    @pytest.fixture
    def store(self, where: str) -> Iterator[Store]:
        with open_store(where) as store:
            yield store


class TestSharedPostgresStore(SharedStoreContract):
    pass


def test_processes_write_at_once(where: str) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/store_writes.py", "--url", where, "--processes", "8", "--each", "100"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    writes = json.loads(done.stdout)["writes"]
    assert (writes["failures"], writes["lost"], writes["doubled"]) == ([], 0, 0)


def test_table_goes_from_server_to_file_and_is_read_from_either(where: str, tmp_path: Path) -> None:
    with open_store(where) as store:
        store.add_environment(HERE)
        store.put_decisions([decision()])
        store.add_measurements([measurement()])
        export_store(store, tmp_path / "table.db")
        assert import_table(where) == import_table(tmp_path / "table.db") == store.table()
    assert read_bundle(where, measurements=True).measurements == (measurement(),)


def test_read_only_store_of_an_empty_server_says_how_to_make_one(where: str) -> None:
    with pytest.raises(CacheError, match="holds no store yet"):
        open_store(where, read_only=True)


def test_writer_that_hangs_is_waited_for_no_longer_than_said(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "BUSY_TIMEOUT_S", 0.1)
    with open_store(where) as store, contextlib.closing(open_server(make_url(where))) as other:
        with other.writing(), pytest.raises(CacheError, match="another process keeps it locked") as caught:
            store.add_environment(HERE)
        assert "\n" not in str(caught.value)
        store.add_environment(HERE)


def test_server_that_is_not_there_is_one_line_without_the_password(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://me:secret@/fleet?host={tmp_path}"
    with pytest.raises(CacheError, match="check the URL and that the server runs") as caught:
        open_store(url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_connections_that_the_server_cut_are_made_anew(where: str, server: URL) -> None:
    with open_store(where) as store:
        store.add_environment(HERE)
        engine = create_engine(server)
        with engine.connect() as connection:
            cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = "
            connection.execute(text(f"{cut} current_database()"))
        engine.dispose()
        assert store.environments() == [HERE]


def test_threads_of_several_stores_do_not_deadlock(where: str) -> None:
    def add(number: int) -> None:
        with open_store(where) as store:
            store.add_environment(HERE)
            rounds = range(30) if number % 2 else reversed(range(30))
            store.add_measurements([measurement(round=round_) for round_ in rounds])

    in_threads(6, add)
    with open_store(where) as store:
        assert len(store.measurements()) == 30


def test_what_is_old_is_taken_out_of_a_server(where: str) -> None:
    old, new = measurement(measured_at=10.0), measurement(tokens=16, measured_at=30.0)
    with open_store(where) as store:
        store.add_environment(HERE)
        store.add_measurements([old, new])
        store.put_decisions([decision(), decision(4, 16)])
        found = collect(where, Unwanted(older_than=20.0))
        assert (found.decisions, found.measurements) == ((decision(),), 1)
        assert store.table().decisions == (decision(4, 16),)
        assert store.measurements() == [new]


def test_a_server_is_merged_with_a_file(where: str, tmp_path: Path) -> None:
    with open_store(where) as store:
        store.add_environment(HERE)
        store.add_measurements([measurement(), measurement(round=1)])
        store.put_decisions([decision()])
        export_store(store, tmp_path / "before.db")
        store.add_measurements([measurement(round=2)])
    merged = merge_files([where, tmp_path / "before.db"], tmp_path / "out.db")
    assert [(part.measurements, part.new_measurements) for part in merged.parts] == [(3, 3), (2, 0)]
    found = read_bundle(tmp_path / "out.db", measurements=True)
    assert found.measurements == tuple(measurement(round=number) for number in range(3))
    # And back: what the file holds is adopted under a policy.
    assert adopt_under(found, where, "newest").measurements == 0


def test_a_servers_decisions_are_read_layer_by_layer_with_what_they_rest_on(where: str) -> None:
    wider = replace(LAYER, hidden=128)
    odd = TileConfig("fake.kernel", {"name": "a\\b"})
    with open_store(where) as store:
        store.add_environment(HERE)
        kept = [measurement(), measurement(gemm=LAYER.down), measurement(config=odd)]
        store.add_measurements([*kept, measurement(gemm=wider.up)])
        store.put_decisions([decision(layer=wider), decision(4, 16), decision()])
        whole = store.table()
    with open_evidence(where) as evidence:
        parts = [evidence.table(layer) for layer in evidence.layers(evidence.layer_digests())]
        assert [d for part in parts for d in part.decisions] == list(whole.decisions)
        assert evidence.digest() == whole.digest
        assert sorted(m.key for m in evidence.of(decision())) == sorted(m.key for m in kept)
    engine = create_engine(where)
    with engine.begin() as connection:
        connection.execute(text("UPDATE measurement SET samples_us = '[-1.0]'"))
    engine.dispose()
    with open_evidence(where) as evidence, pytest.raises(CacheError, match=r"^postgresql.*sample is -1\.0") as caught:
        evidence.of(decision())
    assert "\n" not in str(caught.value)
