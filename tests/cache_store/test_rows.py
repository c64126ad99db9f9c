"""Rows that surely pass take a short way: it must give what the long way gives, and refuse nothing less."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import sqlite3
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis.strategies import lists

from tests.store_contract import HERE, decision, measurement
from tests.strategies import measurements
from tilecast.cache_store import decision_rows, measurement_rows
from tilecast.cache_store.decision_rows import (
    CHOICE_KINDS,
    DECISION_KINDS,
    DecisionColumns,
    decision_configs,
    decision_from_row,
    decision_row,
    decisions_from_rows,
)
from tilecast.cache_store.keyed import Lookup, keyed_row
from tilecast.cache_store.measurement_rows import (
    MEASUREMENT_KINDS,
    measurement_from_row,
    measurement_row,
    measurements_from_rows,
    plain_samples,
)
from tilecast.cache_store.queries import plain_line, read_digest, read_table, sealed_line
from tilecast.cache_store.store import open_store
from tilecast.canonical import canonical_json, digest
from tilecast.errors import InputError
from tilecast.evidence import Decision, Measurement, TuningTable
from tilecast.problem import ExpertLayer, TileConfig


def lookups(layers: list[ExpertLayer], configs: list[TileConfig]) -> tuple[Lookup[ExpertLayer], Lookup[TileConfig]]:
    return (
        Lookup("layer", ExpertLayer.from_json, [tuple(keyed_row(layer).values()) for layer in layers]),
        Lookup("config", TileConfig.from_json, [tuple(keyed_row(config).values()) for config in configs]),
    )


@given(measurements())
@settings(max_examples=60, deadline=None)
def test_both_ways_give_the_same_measurement(wanted: Measurement) -> None:
    row = measurement_row(wanted)
    assert list(row) == list(MEASUREMENT_KINDS)
    assert row["samples_us"] == canonical_json(list(wanted.samples_us))
    found = lookups([wanted.gemm.layer], [wanted.config])
    values = tuple(row.values())
    short, long = measurement_from_row(values, *found), measurement_rows._measurement_checked(row, *found)
    assert short == long == wanted
    assert vars(short).keys() == {f.name for f in dataclasses.fields(Measurement)} | {"key"}
    assert short.key == long.key == wanted.key
    if plain_samples(values) is not None:
        assert plain_line(values) == sealed_line(values)


def test_a_measurement_key_is_the_digest_of_its_fields() -> None:
    found = measurement()
    names = {"layer": found.gemm.layer.digest, "gemm": found.gemm.name, "config": found.config.digest}
    others = ("environment", "tokens", "routing", "rank", "run", "round")
    assert found.key == digest({**names, **{name: getattr(found, name) for name in others}})


def test_most_measurements_take_the_short_way() -> None:
    found = measurement()
    assert plain_samples(tuple(measurement_row(found).values())) == found.samples_us


WRONG: list[dict[str, Any]] = [
    {"key": "0" * 64},
    {"key": None},
    {"environment": b"\0"},
    {"gemm": "both"},
    {"tokens": 0},
    {"tokens": True},
    {"tokens": 1.5},
    {"rank": 1},
    {"rank": -1},
    {"run": -1},
    {"round": 1 << 40},
    {"status": "fine"},
    {"samples_us": "[]"},
    {"samples_us": "[1.0,NaN]"},
    {"samples_us": "[1.0,-1.0]"},
    {"samples_us": "[1.0,true]"},
    {"samples_us": "[1.0,1e999]"},
    {"samples_us": "[1.0] "},
    {"samples_us": "[1.0]]"},
    {"samples_us": '{"a":1.0}'},
    {"samples_us": b"[1.0]"},
    {"numerics": 1},
    {"numerics": "a" * 257},
    {"numerics": "a\0"},
    {"error_ratio": -1.0},
    {"error_ratio": math.inf},
    {"detail": "a\0"},
    {"detail": "a" * 5000},
    {"measured_at": math.inf},
    {"measured_at": "1.0"},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_measurement_that_does_not_fit_is_left_to_the_long_way(change: dict[str, Any]) -> None:
    found = measurement()
    values = tuple({**measurement_row(found), **change}.values())
    assert plain_samples(values) is None
    if change == {"samples_us": "[1.0] "}:
        return  # JSON all the same.
    with pytest.raises(InputError):
        measurement_from_row(values, *lookups([found.gemm.layer], [found.config]))


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_columns_with_a_measurement_that_does_not_fit_are_left_to_the_long_way(change: dict[str, Any]) -> None:
    found = measurement()
    right, wrong = (tuple({**measurement_row(found), **more}.values()) for more in ({}, change))
    given = lookups([found.gemm.layer], [found.config])
    if change == {"samples_us": "[1.0] "}:
        assert measurements_from_rows([right, wrong], *given) == [found, dataclasses.replace(found, samples_us=(1.0,))]
        return
    with pytest.raises(InputError):
        measurements_from_rows([right, wrong, right], *given)


@given(lists(measurements(), max_size=6))
@settings(max_examples=60, deadline=None)
def test_whole_columns_give_what_single_measurements_give(wanted: list[Measurement]) -> None:
    rows = [tuple(measurement_row(one).values()) for one in wanted]
    found = lookups([one.gemm.layer for one in wanted], [one.config for one in wanted])
    assert measurements_from_rows(rows, *found) == wanted
    assert [one.key for one in measurements_from_rows(rows, *found)] == [one.key for one in wanted]


def test_most_measurements_are_read_by_whole_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [measurement(round=number, samples_us=(1.5, 2.5)[: number % 2 + 1]) for number in range(4)]
    wanted.append(measurement(status="timeout", samples_us=(), detail="too slow", round=4, error_ratio=0.5))
    rows = [tuple(measurement_row(one).values()) for one in wanted]
    monkeypatch.setattr(measurement_rows, "measurement_from_row", lambda *_: pytest.fail("these rows are plain"))
    found = measurements_from_rows(rows, *lookups([wanted[0].gemm.layer], [wanted[0].config]))
    assert found == wanted
    assert vars(found[0]).keys() == {f.name for f in dataclasses.fields(Measurement)} | {"key"}


@pytest.mark.parametrize(
    "texts",
    [
        ("[1.0],[2.0", "3.0]"), ("[1.0]\n[2.0", "3.0]"), ("[1.0", "2.0]"), ("1.0", "[2.0]"), ("[1.0]\n[2.0]", ""),
        ("[[1.0]", "[2.0]]"), ('["]', '["]'), ("[1.0]]", "[[2.0]"), ("[1.0,", "]"), ("", "[1.0],[2.0]"),
        ("[1.0]", "[2]]"),
    ],
)  # fmt: skip
def test_samples_that_are_lists_only_together_are_refused(texts: tuple[str, str]) -> None:
    found = [measurement(round=number) for number in range(2)]
    rows = [
        tuple({**measurement_row(one), "samples_us": text}.values()) for one, text in zip(found, texts, strict=True)
    ]
    with pytest.raises(InputError):
        measurements_from_rows(rows, *lookups([found[0].gemm.layer], [found[0].config]))


def test_both_ways_give_the_same_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = decision()
    values = tuple(decision_row(wanted)[name] for name in DECISION_KINDS)
    found = lookups([wanted.layer], decision_configs(wanted))
    assert decision_from_row(values, *found) == wanted
    monkeypatch.setattr(Decision, "__post_init__", lambda self: pytest.fail("this row is plain"))
    assert decision_from_row(values, *found) == wanted


WRONG_DECISIONS: list[dict[str, Any]] = [
    {"policy": "best"},
    {"certificate": "sure"},
    {"environment": "0" * 63},
    {"tokens": 0},
    *(
        {f"{gemm}_{name}": value}
        for gemm in ("up", "down")
        for name in CHOICE_KINDS
        if name.endswith("_us")
        for value in (0.0, -1.0, math.inf, math.nan, "1.0")
    ),
    {"up_noise": -0.5},
    {"down_noise": math.nan},
    {"up_runner_up": None, "up_runner_up_us": 1.0},
    {"up_config": "0" * 64},
]


def raced(above: int = 0, tokens: int = 4) -> Decision:
    """Return a decision whose choices have runners-up: nothing in its row is missing."""
    made = decision(above, tokens)
    second = dataclasses.replace(made.up, runner_up=made.up.default, runner_up_us=2.75)
    return dataclasses.replace(made, up=second, down=second)


@pytest.mark.parametrize("change", WRONG_DECISIONS, ids=str)
def test_a_decision_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    wanted = raced()
    row = {**decision_row(wanted), **change}
    values, right = (tuple(one[name] for name in DECISION_KINDS) for one in (row, decision_row(wanted)))
    found = lookups([wanted.layer], decision_configs(wanted))
    with pytest.raises(InputError):
        decision_from_row(values, *found)
    with pytest.raises(InputError):
        decisions_from_rows([right, values, right], *found)


def test_whole_columns_give_what_single_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [raced(1, 2), raced(2, 4), decision(4, 8), raced(8, 16)]
    first = wanted[0]
    rows = [tuple(decision_row(one)[name] for name in DECISION_KINDS) for one in wanted]
    found = lookups([first.layer], [c for one in wanted for c in decision_configs(one)])
    assert sorted(decisions_from_rows(rows, *found), key=lambda one: one.bucket) == wanted
    assert decisions_from_rows([], *found) == []
    monkeypatch.setattr(decision_rows, "decision_from_row", lambda *_: pytest.fail("these rows are plain"))
    assert decisions_from_rows(rows, *found) == wanted
    assert decisions_from_rows(rows[2:3], *found) == wanted[2:3]
    assert decisions_from_rows(rows[::-1], *found) == wanted
    assert decisions_from_rows(rows, *found) == wanted
    assert vars(decisions_from_rows(rows, *found)[0]).keys() == {f.name for f in dataclasses.fields(Decision)}


@pytest.mark.parametrize("collecting", [True, False])
def test_reading_leaves_the_collector_as_it_was(collecting: bool, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with open_store(path) as store:
        store.add_environment(HERE)
        store.add_measurements([measurement()])
        was = gc.isenabled()
        try:
            (gc.enable if collecting else gc.disable)()
            assert len(store.measurements()) == 1
            assert gc.isenabled() is collecting
            with sqlite3.connect(path) as raw:
                raw.execute("UPDATE measurement SET tokens = 5")
            raw.close()
            with pytest.raises(InputError, match="its fields have key"):
                store.measurements()
            assert gc.isenabled() is collecting
        finally:
            (gc.enable if was else gc.disable)()


def test_a_table_has_the_digest_that_is_read_without_it(tmp_path: Path) -> None:
    """By whole columns, and the long way: a time that SQL gives back as an integer."""
    path = tmp_path / "store.db"
    with open_store(path) as store:
        store.add_environment(HERE)
        store.put_decisions([raced(1, 2), decision(4, 8), raced(2, 4)])
        wanted = store.table().digest
    with contextlib.closing(sqlite3.connect(path)) as raw:
        assert read_digest(raw) == wanted
        assert read_digest(raw, sealed=True) == wanted
        table = read_table(raw, sealed=True)
        assert vars(table)["digest"] == wanted == TuningTable(table.environments, table.decisions).digest
        with unittest.mock.patch.object(DecisionColumns, "of", return_value=None):
            assert read_digest(raw) == wanted
            assert "digest" not in vars(read_table(raw, sealed=True))
