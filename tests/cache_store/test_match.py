from __future__ import annotations

from dataclasses import replace

import pytest

from tests.store_contract import HERE, LAYER, THERE, decision
from tilecast.cache_store.match import covered, match
from tilecast.environment import Mismatch
from tilecast.evidence import TuningTable

SMALL, LARGE, FAR = decision(0, 4), decision(4, 16), decision(32, 64)
TABLE = TuningTable((HERE,), (SMALL, LARGE, FAR))


@pytest.mark.parametrize(("tokens", "wanted"), [(1, SMALL), (4, SMALL), (5, LARGE), (16, LARGE), (33, FAR), (64, FAR)])
def test_hit(tokens: int, wanted: object) -> None:
    found = match(TABLE, HERE, LAYER, tokens, "reproducible")
    assert found.hit
    assert found.decision == wanted
    assert found.environment == HERE
    assert found.differences == ()
    assert found.reasons == ()


@pytest.mark.parametrize("tokens", [0, 17, 32, 65, 1 << 24])
def test_tokens_not_covered(tokens: int) -> None:
    found = match(TABLE, HERE, LAYER, tokens, "reproducible")
    assert not found.hit
    assert found.reasons == (f"no decision covers {tokens} tokens; covered: 1…16, 33…64",)


def test_empty_table() -> None:
    assert match(TuningTable(), HERE, LAYER, 4, "reproducible").reasons == ("the table is empty",)


def test_environment_without_decisions() -> None:
    table = TuningTable((HERE, THERE), (decision(environment=THERE.digest),))
    found = match(table, HERE, LAYER, 4, "reproducible")
    assert found.reasons == ("the table has no decision for this environment",)


def test_other_device_names_the_hard_fields() -> None:
    here = replace(THERE, units=4, driver="580.1", threads=2)
    found = match(TABLE, here, LAYER, 4, "reproducible")
    assert found.decision is None
    assert found.environment == HERE
    assert found.reasons == (
        "the table was made in another environment: "
        "device: here 'Another CPU', there 'Some CPU'; units: here '4', there '8'",
    )
    assert Mismatch(field="driver", here="580.1", there=HERE.driver, hard=False) in found.differences
    assert all(d.field != "threads" for d in found.differences), "0 is not known"


def test_nearest_of_several_environments_is_named() -> None:
    far = replace(THERE, arch="aarch64", features="asimd")
    table = TuningTable((HERE, far), (decision(), decision(environment=far.digest)))
    found = match(table, replace(HERE, units=16), LAYER, 4, "reproducible")
    assert found.environment == HERE
    assert found.reasons == (
        "none of the table's 2 environments fits; in the nearest one: units: here '16', there '8'",
    )


def test_soft_differences_hit_and_are_told() -> None:
    here = replace(HERE, torch="2.13.1", system="Linux")
    found = match(TABLE, here, LAYER, 4, "reproducible")
    assert found.decision == SMALL
    assert [m.field for m in found.differences] == ["torch", "system"]


def test_least_different_environment_is_asked_first() -> None:
    near = replace(HERE, system="Linux")
    far = replace(HERE, system="BSD", driver="1")
    table = TuningTable((near, far), (decision(environment=near.digest), decision(environment=far.digest)))
    assert match(table, HERE, LAYER, 4, "reproducible").environment == near
    # Where the nearer one has no decision, the other serves.
    table = TuningTable((near, far), (decision(8, 9, environment=near.digest), decision(environment=far.digest)))
    assert match(table, HERE, LAYER, 4, "reproducible").environment == far


def test_nearest_layer_is_explained_field_by_field() -> None:
    other = replace(LAYER, hidden=128, intermediate=1, dtype="fp16")
    table = TuningTable((HERE,), (SMALL, decision(layer=other)))
    found = match(table, HERE, replace(LAYER, dtype="fp32"), 4, "reproducible")
    assert [(m.field, m.here, m.there) for m in found.differences] == [("dtype", "fp32", "bf16")]
    assert found.reasons == (
        "no decision is for this layer, policy and routing; the nearest is for E4 H64 I96 top2 bf16",
        "dtype: here 'fp32', there 'bf16'",
    )


def test_policy_routing_and_tokens_are_explained_together() -> None:
    found = match(TABLE, HERE, LAYER, 20, "fastest", routing="zipf")
    assert found.reasons[1:] == (
        "policy: here 'fastest', there 'reproducible'",
        "routing: here 'zipf', there 'uniform'",
        "no decision covers 20 tokens; covered: 1…16, 33…64",
    )


def test_covered() -> None:
    assert covered([]) == ""
    assert covered([decision(7, 8), decision(0, 1)]) == "1, 8"
