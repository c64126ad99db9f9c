"""Whatever the base types allow goes through both stores and through an exported file unchanged."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import environments, measurements, tables
from tilecast.cache_store.bundle import adopt, export_store, export_table, import_table, read_bundle
from tilecast.cache_store.memory import MemoryStore
from tilecast.cache_store.store import open_store
from tilecast.environment import Environment
from tilecast.evidence import Measurement, TuningTable
from tilecast.store import Store


@st.composite
def filled(draw: st.DrawFn) -> tuple[TuningTable, list[Measurement]]:
    """A table, with one more environment, and measurements made in its environments."""
    table = draw(tables())
    table = TuningTable((*table.environments, draw(environments())), table.decisions)
    places = st.sampled_from([environment.digest for environment in table.environments])
    drawn = draw(st.lists(places.flatmap(measurements), max_size=4, unique_by=lambda m: m.key))
    return table, drawn


def fill(store: Store, table: TuningTable, kept: list[Measurement]) -> None:
    for environment in table.environments:
        store.add_environment(environment)
    assert store.add_measurements(kept) == len(kept)
    store.put_decisions(list(table.decisions))


def in_use(table: TuningTable, kept: list[Measurement]) -> tuple[Environment, ...]:
    used = {d.environment for d in table.decisions} | {m.environment for m in kept}
    return tuple(e for e in table.environments if e.digest in used)


@pytest.mark.parametrize("kind", ["memory", "sql"])
@settings(max_examples=25)
@given(content=filled())
def test_through_a_store(kind: str, content: tuple[TuningTable, list[Measurement]]) -> None:
    table, kept = content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "store.db")
        with open_store(":memory:" if kind == "memory" else path) as store:
            fill(store, table, kept)
            for again in [store] if kind == "memory" else [store, open_store(path, read_only=True)]:
                assert again.environments() == list(table.environments)
                assert again.measurements() == kept
                assert again.table() == TuningTable(in_use(table, []), table.decisions)
                for environment in table.environments:
                    part = again.table(environment=environment.digest)
                    assert part.decisions == table.for_environment(environment.digest).decisions
                if again is not store:
                    again.close()


@settings(max_examples=40)
@given(content=filled())
def test_through_an_exported_file(content: tuple[TuningTable, list[Measurement]]) -> None:
    table, kept = content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.db")
        export_table(table, path)
        assert import_table(path) == table
        assert import_table(path).digest == table.digest
        assert read_bundle(path, measurements=True).measurements == ()
        export_table(table, path, kept)
        assert import_table(path) == table
        assert read_bundle(path, measurements=True).measurements == tuple(kept)


@settings(max_examples=25)
@given(content=filled())
def test_from_store_to_file_to_store(content: tuple[TuningTable, list[Measurement]]) -> None:
    table, kept = content
    with tempfile.TemporaryDirectory() as folder, MemoryStore() as first, MemoryStore() as second:
        path = Path(folder, "table.db")
        fill(first, table, kept)
        written = export_store(first, path)
        bundle = read_bundle(path, measurements=True)
        assert bundle.table == written == TuningTable(in_use(table, kept), table.decisions)
        assert adopt(bundle, second) == len(kept)
        assert adopt(bundle, second) == 0
        assert second.table() == first.table()
        assert second.measurements() == first.measurements()
