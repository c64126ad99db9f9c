"""Reading the measurements of one decision, whatever else a file holds."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.store_contract import HERE, LAYER, THERE, decision, measurement
from tilecast.cache_store.bundle import export_table, open_evidence, read_bundle
from tilecast.cache_store.store import open_store
from tilecast.errors import CacheError
from tilecast.evidence import TuningTable

WIDER = replace(LAYER, hidden=128)
MINE = [measurement(), measurement(gemm=LAYER.down), measurement(tokens=16)]
OTHERS = [measurement(gemm=WIDER.up), measurement(environment=THERE.digest), measurement(routing="zipf:1")]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    path = tmp_path / "table.db"
    export_table(TuningTable((HERE, THERE), (decision(), decision(layer=WIDER))), path, MINE + OTHERS)
    return path


def damage(path: Path, tokens: int) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE measurement SET samples_us = '[-1.0]' WHERE tokens = ?", (tokens,))


def test_only_what_a_decision_rests_on_is_read(exported: Path) -> None:
    with open_evidence(exported) as evidence:
        whole = read_bundle(exported).table
        parts = [evidence.table(layer) for layer in evidence.layers(evidence.layer_digests())]
        assert [d for part in parts for d in part.decisions] == list(whole.decisions)
        assert all(part.environments == (HERE,) for part in parts)
        assert evidence.digest() == whole.digest
        assert sorted(m.key for m in evidence.of(decision())) == sorted(m.key for m in MINE)
        assert evidence.of(decision(layer=WIDER)) == (OTHERS[0],)


def test_what_is_read_is_checked(exported: Path) -> None:
    damage(exported, 16)
    with open_evidence(exported) as evidence:
        assert evidence.of(decision(layer=WIDER)) == (OTHERS[0],)
        with pytest.raises(CacheError, match=r"^.*table\.db: sample is -1\.0") as caught:
            evidence.of(decision())
    assert "\n" not in str(caught.value)


def test_the_table_is_checked_wholly(exported: Path) -> None:
    with closing(sqlite3.connect(exported)) as connection, connection:
        connection.execute("UPDATE decision SET up_p50_us = 0.5")
    with pytest.raises(CacheError, match="changed after the export"), open_evidence(exported):
        raise AssertionError("a table that was changed is opened")


def test_a_live_store_is_read_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with open_store(path) as store:
        store.add_environment(HERE)
        store.add_measurements(MINE)
        store.put_decisions([decision()])
        with open_evidence(path) as evidence:
            assert {m.key for m in evidence.of(decision())} == {m.key for m in MINE}
