"""`tune --routing` and `--from-record`: from what serving wrote down to a table that it uses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import LAYER, SPEC, Command
from tilecast.autotune.record import Calls, LayerRecord, Load, ServingRecord
from tilecast.autotune.routing_profiles import load_profile
from tilecast.cache_store.bundle import import_table
from tilecast.engine.runtime import use_table
from tilecast.errors import DeviceError

OTHER = replace(LAYER, hidden=32)
BUDGET = ("--budget", "0.5s")


@pytest.fixture
def record(tmp_path: Path) -> Path:
    seen = (
        LayerRecord(layer=LAYER, tokens={1: Calls(9, 0), 3: Calls(5, 5)}, loads=(Load((9, 5, 5, 5)),)),
        LayerRecord(layer=OTHER, tokens={2: Calls(1, 1)}, loads=(Load((2, 1, 1, 0)),)),
    )
    path = tmp_path / "seen.json"
    path.write_text(json.dumps(ServingRecord(layers=seen).to_json()))
    return path


def test_a_table_tuned_for_a_profile_is_used_by_whoever_imports_it(cli: Command, tmp_path: Path) -> None:
    out = tmp_path / "skewed.db"
    done = cli("tune", SPEC, "--tokens", "2", "--routing", "zipf:1.50", "--export", out, *BUDGET, "--json")
    assert done.code == 0, done.err
    assert [d["routing"] for d in json.loads(done.out)["table"]["decisions"]] == ["zipf:1.5"]
    assert use_table(import_table(str(out))).lookup(LAYER, 2).hit


def test_exactly_what_was_missed_is_tuned(cli: Command, record: Path, tmp_path: Path) -> None:
    out = tmp_path / "more.db"
    done = cli("tune", "--from-record", record, "--export", out, *BUDGET)
    assert done.code == 0, done.err
    assert {(d.layer, d.bucket.tokens) for d in import_table(str(out)).decisions} == {(LAYER, 3), (OTHER, 2)}
    assert "5 calls missed, at 3 tokens" in done.err


@pytest.mark.parametrize(
    ("options", "weights"),
    [((), {1: 9 / 15, 2: 1 / 15, 3: 5 / 15}), ((SPEC,), {1: 9 / 14, 3: 5 / 14}), (("--weights", "3=1"), {3: 1.0})],
)
def test_calls_as_recorded_weigh_the_buckets_unless_weights_are_given(
    cli: Command,
    record: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    weights: dict[int, float],
) -> None:
    seen: list[object] = []

    def decided(*given: object, **named: object) -> None:
        seen.append(named["weights"])
        raise DeviceError("far enough")

    monkeypatch.setattr("tilecast.engine.tuning.decide", decided)
    line = ["tune", "--from-record", record, "--tokens", "4", *BUDGET, *options]
    done = cli(*line)
    assert done.code != 0 and "far enough" in done.err
    assert seen == [weights]
    assert ("weights as recorded: 1=0.6" in done.err) == (weights != {3: 1.0})


def test_a_recorded_histogram_is_tuned_for(cli: Command, record: Path, tmp_path: Path) -> None:
    out = tmp_path / "more.db"
    done = cli("tune", SPEC, "--tokens", "2", "--routing", record, "--export", out, *BUDGET)
    assert done.code == 0, done.err
    assert {d.routing for d in import_table(str(out)).decisions} == {load_profile(str(record)).name}


def test_a_record_extends_the_table_in_use_for_one_model(
    cli: Command, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, out = tmp_path / "first.db", tmp_path / "more.db"
    assert cli("tune", SPEC, "--tokens", "1", "--export", first, *BUDGET).code == 0
    monkeypatch.setenv("TM_GEMM_IMPORT", str(first))
    line = ["tune", SPEC, "--from-record", record, "--tokens", "1,4", "--export", out, *BUDGET]
    done = cli(*line)
    assert done.code == 0, done.err
    assert [(d.layer, d.bucket.above, d.bucket.tokens) for d in import_table(str(out)).decisions] == [
        (LAYER, 0, 1),
        (LAYER, 1, 4),
    ]
    assert "1 layer of the record left out" in done.err


def test_a_record_without_misses_leaves_the_table_as_it_is(cli: Command, tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    path.write_text(json.dumps(ServingRecord(layers=()).to_json()))
    done = cli("tune", "--from-record", path, "--json")
    assert done.code == 0 and json.loads(done.out)["table"]["decisions"] == []
    assert "no misses" in done.err


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (("tune",), 2, "neither MODEL nor --from-record"),
        (("tune", SPEC, "--routing", "zipf:-1"), 3, "zipf:-1"),
        (("tune", SPEC, "--routing", "nowhere.json"), 3, "nowhere.json"),
        (("tune", "--from-record", "nowhere.json"), 3, "nowhere.json"),
    ],
)
def test_wrong_profiles_and_records_are_one_line(cli: Command, line: tuple[str, ...], code: int, words: str) -> None:
    cli(*line).failed(code, words)


def test_doctor_says_when_serving_routes_otherwise_than_the_table_was_tuned_for(
    cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, path = tmp_path / "table.db", tmp_path / "seen.json"
    assert cli("tune", SPEC, "--tokens", "2", "--export", table, *BUDGET).code == 0
    monkeypatch.setenv("TM_GEMM_RECORD", str(path))
    assert json.loads(cli("doctor", "--table", table, "--json").out)["routing_drift"] is None
    hot = LayerRecord(layer=LAYER, tokens={2: Calls(9, 0)}, loads=(Load((970, 10, 10, 10)),))
    path.write_text(json.dumps(ServingRecord(layers=(hot,)).to_json()))
    done = cli("doctor", "--table", table)
    assert done.code == 0 and "97.0%, expected 25.0%" in done.err
    assert f"--routing {path}" in json.loads(cli("doctor", "--table", table, "--json").out)["routing_drift"]
