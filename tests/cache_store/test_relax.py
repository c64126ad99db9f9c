from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.store_contract import HERE, LAYER, THERE, decision
from tilecast.cache_store.bundle import export_table, import_table
from tilecast.cache_store.match import RELAXABLE, blocking, check_relax, match
from tilecast.cache_store.relax import relax_table
from tilecast.errors import UsageError
from tilecast.evidence import TuningTable

OLDER = replace(HERE, torch="2.9.1", kernel_source="1" * 64)
TABLE = TuningTable((OLDER,), (replace(decision(environment=OLDER.digest), certificate="hardware"),))


def test_relaxed_decisions_are_adopted_and_say_so(tmp_path: Path) -> None:
    found = relax_table(TABLE, HERE, ["torch", "kernel_source"])
    assert found.decisions == 1
    ((there, made_up),) = found.adopted
    assert there == OLDER
    assert HERE.accepts(made_up)
    assert made_up.system == (
        f"relaxed: kernel_source was '111111111111', torch was '2.9.1', in environment {OLDER.digest[:12]}"
    )
    adopted = found.table.for_environment(made_up.digest).decisions
    # Nothing was certified in an environment that is made up; the original stays what it is.
    assert [d.certificate for d in adopted] == ["none"]
    assert found.table.for_environment(OLDER.digest) == TABLE
    path = tmp_path / "table.db"
    export_table(found.table, path)
    answer = match(import_table(path), HERE, LAYER, 4, "reproducible")
    assert answer.hit
    assert [d.field for d in answer.differences] == ["system"]
    assert "relaxed" in str(answer.differences[0])


def test_all_that_differs_must_be_named() -> None:
    assert relax_table(TABLE, HERE, ["torch"]).adopted == ()
    assert relax_table(TABLE, HERE, []).table == TABLE


def test_what_fits_anyway_is_left_alone() -> None:
    table = TuningTable((HERE,), (decision(),))
    assert relax_table(table, HERE, ["torch"]).table == table


def test_two_environments_stay_apart() -> None:
    other = replace(OLDER, torch="2.8.0")
    table = TuningTable((OLDER, other), tuple(decision(environment=e.digest) for e in (OLDER, other)))
    found = relax_table(table, HERE, ["torch", "kernel_source"])
    assert len({made_up.digest for _, made_up in found.adopted}) == 2
    assert found.decisions == 2


def test_only_hard_fields_can_be_relaxed() -> None:
    assert check_relax(["torch", "device", "torch"]) == ("torch", "device")
    for name in ("device_kind", "driver", "dtype", ""):
        with pytest.raises(UsageError, match="expected a hard field of the environment: device, arch"):
            check_relax([name])
    assert "device_kind" not in RELAXABLE


def test_a_relaxed_field_lets_a_decision_match_and_is_told() -> None:
    answer = match(TABLE, HERE, LAYER, 4, "reproducible", relax=("torch", "kernel_source"))
    assert answer.hit
    assert [d.field for d in answer.relaxed] == ["kernel_source", "torch"]
    answer = match(TABLE, HERE, LAYER, 4, "reproducible", relax=("torch",))
    assert not answer.hit
    assert answer.relaxed == ()
    assert [d.field for d in blocking(HERE, OLDER, ("torch",))] == ["kernel_source"]
    assert [d.field for d in blocking(HERE, THERE)] == ["device"]


def test_an_environment_that_fits_is_asked_before_a_relaxed_one() -> None:
    fitting = decision()
    table = TuningTable((HERE, OLDER), (fitting, *TABLE.decisions))
    assert match(table, HERE, LAYER, 4, "reproducible", relax=("torch", "kernel_source")).decision == fitting


def test_reach_bounds_how_far_a_bucket_serves() -> None:
    table = TuningTable((HERE,), (decision(0, 64),))
    for tokens, hit in ((8, True), (64, True), (7, False)):
        assert match(table, HERE, LAYER, tokens, "reproducible", reach=8).hit is hit
    answer = match(table, HERE, LAYER, 1, "reproducible", reach=8)
    assert answer.reasons == ("covered only by what was tuned for 64, 64 times 1 token; reach is 8",)
    assert match(table, HERE, LAYER, 1, "reproducible").hit
