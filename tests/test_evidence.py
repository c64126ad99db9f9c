from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import TIMES, choices, decisions, measurements, tables
from tilecast.canonical import canonical_json
from tilecast.environment import Environment
from tilecast.errors import InputError
from tilecast.evidence import Choice, Decision, Measurement, TuningTable, percentile
from tilecast.problem import Bucket, ExpertLayer, TileConfig

HERE = Environment(
    device_kind="cpu", device="A CPU", arch="x86_64", features="avx2,fma", units=2, llc_bytes=1 << 25,
    kernel_source="0" * 64, torch="2.13.0", compiler="0.50.0", threads=2,
)  # fmt: skip
THERE = replace(HERE, device="Another CPU")
LAYER = ExpertLayer(hidden=4096, intermediate=1792, experts=8, top_k=2)
CONFIG = TileConfig("llvm.moe_gemm", {"mr": 6, "nr": 2, "layout": "panel"})
OTHER = CONFIG.with_params(mr=4)
CHOICE = Choice(config=CONFIG, p50_us=10.5, default=CONFIG, default_us=12.0)
MEASUREMENT = Measurement(environment=HERE.digest, gemm=LAYER.up, tokens=4, config=CONFIG, samples_us=(3.0, 1.0, 2.0))


def decision(above: int, tokens: int, **changes: Any) -> Decision:
    given_fields: dict[str, Any] = {
        "environment": HERE.digest, "layer": LAYER, "policy": "reproducible", "up": CHOICE, "down": CHOICE, **changes,
    }  # fmt: skip
    return Decision(bucket=Bucket(above=above, tokens=tokens), **given_fields)


def test_digests_are_pinned() -> None:
    """Exported tables and running ranks are compared by these."""
    table = TuningTable((HERE,), (decision(0, 1),))
    assert table.digest == "b0d2d1b50537b5f2d57e3e5f9304d16d5bb865b3172df4cc4f31d9f8d135ae34"
    assert table.decisions[0].key == "e4ba0cfee364dae70a801f2eb6c8ad1565942353fdf7ee62c1860f862250af1b"


@given(decisions())
def test_decision_survives_its_json(one: Decision) -> None:
    again = Decision.from_json(json.loads(json.dumps(one.to_json())))
    assert again == one
    assert again.key == one.key


@given(tables())
def test_table_survives_its_bytes(table: TuningTable) -> None:
    data = table.to_bytes()
    again = TuningTable.from_bytes(data)
    assert again == table
    assert again.to_bytes() == data
    assert again.digest == table.digest
    # Written piece by piece, since a table repeats its layers and configs thousandfold.
    assert data == canonical_json(table.to_json()).encode("ascii")


@given(tables(), st.randoms(use_true_random=False))
def test_the_order_of_entries_does_not_count(table: TuningTable, random: Any) -> None:
    shuffled = list(table.decisions)
    random.shuffle(shuffled)
    again = TuningTable(tuple(reversed(table.environments)) * 2, tuple(shuffled))
    assert again == table
    assert again.digest == table.digest


@given(tables(min_decisions=1))
def test_any_change_changes_the_digest(table: TuningTable) -> None:
    assert TuningTable(table.environments, table.decisions[1:]).digest != table.digest


@given(tables())
def test_for_environment_splits_a_table(table: TuningTable) -> None:
    parts = [table.for_environment(environment.digest) for environment in table.environments]
    assert sum(len(part) for part in parts) == len(table)
    for part, environment in zip(parts, table.environments, strict=True):
        assert part.environments == (environment,)
        assert all(one.environment == environment.digest for one in part.decisions)
    assert len(table.for_environment("0" * 64)) == 0


def test_an_empty_table() -> None:
    table = TuningTable()
    assert len(table) == 0
    assert TuningTable.from_bytes(table.to_bytes()) == table


@pytest.mark.parametrize(
    "second",
    [(0, 4), (0, 8), (2, 8), (3, 5), (0, 1)],
    ids=["the same", "around it", "across its end", "from inside it", "inside it"],
)
def test_overlapping_buckets_are_refused(second: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="overlap"):
        TuningTable((HERE,), (decision(0, 4), decision(*second)))


def test_buckets_may_adjoin_or_leave_gaps() -> None:
    assert len(TuningTable((HERE,), (decision(4, 8), decision(0, 4), decision(16, 32)))) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": "fastest"},
        {"routing": "zipf"},
        {"layer": replace(LAYER, top_k=1)},
        {"environment": THERE.digest},
    ],
)
def test_buckets_of_different_series_may_overlap(changes: dict[str, Any]) -> None:
    assert len(TuningTable((HERE, THERE), (decision(0, 4), decision(0, 8, **changes)))) == 2


def test_a_decision_needs_its_environment() -> None:
    with pytest.raises(InputError, match="which the table lacks"):
        TuningTable((THERE,), (decision(0, 4),))


def test_merged_takes_the_other_where_keys_are_equal() -> None:
    mine = TuningTable((HERE,), (decision(0, 4), decision(4, 8)))
    faster = decision(0, 4, up=replace(CHOICE, config=OTHER, p50_us=9.0))
    other = TuningTable((HERE, THERE), (faster, decision(8, 16), decision(0, 4, environment=THERE.digest)))
    merged = mine.merged(other)
    assert len(merged) == 4
    assert set(merged.environments) == {HERE, THERE}
    assert faster in merged.decisions
    assert decision(0, 4) not in merged.decisions
    assert len(mine) == 2


def test_merged_displaces_what_the_other_overlaps_in_the_same_series() -> None:
    elsewhere = (decision(0, 8, environment=THERE.digest), decision(0, 8, policy="fastest"))
    mine = TuningTable((HERE, THERE), (decision(0, 2), decision(2, 8), decision(8, 16), *elsewhere))
    other = TuningTable((HERE,), (decision(0, 4), decision(4, 6)))
    merged = mine.merged(other)
    assert set(merged.decisions) == {*other.decisions, decision(8, 16), *elsewhere}
    assert set(other.merged(mine).decisions) == set(mine.decisions)


@given(tables(), tables())
def test_merging_tables_keeps_all_of_the_other(mine: TuningTable, other: TuningTable) -> None:
    assert set(other.decisions) <= set(mine.merged(other).decisions)


@given(tables())
def test_merging_with_itself_or_nothing_changes_nothing(table: TuningTable) -> None:
    assert table.merged(table) == table.merged(TuningTable()) == TuningTable().merged(table) == table


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", "µ".encode(), b"[]", b"null", b"[" * 100_000, b'{"format":1}',
     b'{"format":2,"environments":[],"decisions":[]}', b'{"format":"1","environments":[],"decisions":[]}',
     b'{"format":1,"environments":[1],"decisions":[]}', b'{"format":1,"environments":[],"decisions":[{}]}'],
)  # fmt: skip
def test_bytes_that_are_no_table(data: bytes) -> None:
    with pytest.raises(InputError):
        TuningTable.from_bytes(data)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "-1.0", "0", "1e999", "true", '"1"'])
def test_times_in_bytes_are_checked(value: str) -> None:
    data = TuningTable((HERE,), (decision(0, 1),)).to_bytes()
    assert data.count(b'"p50_us":10.5') == 2
    with pytest.raises(InputError):
        TuningTable.from_bytes(data.replace(b'"p50_us":10.5', f'"p50_us":{value}'.encode()))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"policy": "quick"}, "policy is 'quick'"),
        ({"certificate": "sworn"}, "certificate is 'sworn'"),
        ({"environment": "abc"}, "environment digest is 'abc'"),
    ],
)
def test_decision_refuses(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        decision(0, 1, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"p50_us": 0.0}, "time is 0.0"),
        ({"p50_us": math.nan}, "time is nan"),
        ({"p50_us": True}, "time is True"),
        ({"default_us": -1.0}, "default's time is -1.0"),
        ({"default_us": math.inf}, "default's time is inf"),
        ({"runner_up": OTHER}, "a runner-up needs a time"),
        ({"runner_up_us": 5.0}, "a time needs a runner-up"),
        ({"runner_up": OTHER, "runner_up_us": 0.0}, "runner-up's time"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": math.nan}, "noise is nan"),
    ],
)
def test_choice_refuses(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        replace(CHOICE, **changes)


def test_choice_and_decision_sums() -> None:
    assert CHOICE.margin is None
    choice = replace(CHOICE, config=OTHER, p50_us=8.0, runner_up=CONFIG, runner_up_us=10.0)
    assert choice.margin == pytest.approx(0.25)
    both = decision(0, 1, up=choice)
    assert (both.tuned_us, both.default_us) == (18.5, 24.0)
    assert both.choice("up") is choice
    assert both.choice("down") is CHOICE


@given(choices())
def test_choice_survives_its_json(choice: Choice) -> None:
    assert Choice.from_json(json.loads(json.dumps(choice.to_json()))) == choice


@given(measurements())
def test_percentiles_are_ordered(measurement: Measurement) -> None:
    assert measurement.p20_us <= measurement.p50_us <= measurement.p80_us
    if measurement.samples_us:
        assert min(measurement.samples_us) <= measurement.p50_us <= max(measurement.samples_us)
    else:
        assert measurement.p50_us == math.inf


@given(st.lists(TIMES, min_size=1, max_size=9))
def test_percentile_ends(samples: list[float]) -> None:
    assert (percentile(samples, 0), percentile(samples, 100)) == (min(samples), max(samples))


def test_percentile_interpolates() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([10.0, 20.0], 20) == 12.0


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"tokens": 5}, False),
        ({"routing": "zipf"}, False),
        ({"config": OTHER}, False),
        ({"gemm": LAYER.down}, False),
        ({"environment": THERE.digest}, False),
        ({"run": 1}, False),
        ({"round": 1}, False),
        ({"rank": 1, "world_size": 2}, False),
        ({"world_size": 2}, True),
        ({"samples_us": (9.0,)}, True),
        ({"status": "unstable", "detail": "spread"}, True),
        ({"measured_at": 1.0, "numerics": "abc"}, True),
    ],
)
def test_what_a_measurement_is_known_by(changes: dict[str, Any], same: bool) -> None:
    assert (replace(MEASUREMENT, **changes).key == MEASUREMENT.key) is same


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"status": "fine"}, "status is 'fine'"),
        ({"tokens": 0}, "tokens is 0"),
        ({"rank": 1}, "rank is 1, expected an integer from 0 to 0"),
        ({"world_size": 0}, "world size is 0"),
        ({"round": -1}, "round is -1"),
        ({"samples_us": ()}, "at least one sample"),
        ({"samples_us": (1.0, 0.0)}, "sample is 0.0"),
        ({"samples_us": (math.nan,)}, "sample is nan"),
        ({"error_ratio": -1.0}, "error ratio is -1.0"),
        ({"error_ratio": math.inf}, "error ratio is inf"),
    ],
)
def test_measurement_refuses(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        replace(MEASUREMENT, **changes)


def test_a_failed_measurement_needs_no_samples() -> None:
    failed = replace(MEASUREMENT, status="timeout", samples_us=(), detail="10 s")
    assert failed.p50_us == math.inf
