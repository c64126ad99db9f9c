from __future__ import annotations

from dataclasses import replace

from tests.store_contract import CONFIG, HERE, LAYER, THERE, decision
from tilecast.cache_store.diff import diff
from tilecast.evidence import TuningTable

BASE = decision()


def changed(us: float = 2.5, **fields: object) -> TuningTable:
    up = replace(BASE.up, p50_us=us, **fields)  # type: ignore[arg-type]
    return TuningTable((HERE,), (replace(BASE, up=up),))


def table(*decisions: object) -> TuningTable:
    return TuningTable((HERE, THERE), decisions)  # type: ignore[arg-type]


def test_equal_tables_do_not_differ() -> None:
    found = diff(table(BASE), table(BASE))
    assert found.differences == ()
    assert found.same == 1


def test_buckets_that_only_one_has() -> None:
    a, b = table(BASE, decision(4, 8)), table(BASE, decision(4, 16), decision(policy="fastest"))
    found = diff(a, b)
    assert [(d.kind, d.decision.bucket.tokens, d.decision.policy) for d in found.differences] == [
        ("only in B", 4, "fastest"), ("only in A", 8, "reproducible"), ("only in B", 16, "reproducible"),
    ]  # fmt: skip
    assert found.same == 1
    assert all(d.change is None and not d.beyond_noise for d in found.differences)


def test_times_count_beyond_the_noise_only() -> None:
    assert diff(table(BASE), changed(2.52)).differences == ()
    for us, change in ((3.0, 0.1), (2.0, -0.1)):
        (found,) = diff(table(BASE), changed(us)).differences
        assert (found.kind, found.beyond_noise) == ("time", True)
        assert found.change is not None
        assert abs(found.change - change) < 1e-9


def test_other_configs_differ_even_in_equal_time() -> None:
    (found,) = diff(table(BASE), changed(config=CONFIG.with_params(mr=4))).differences
    assert (found.kind, found.change, found.beyond_noise) == ("config", 0.0, False)


def test_another_certificate_differs() -> None:
    (found,) = diff(table(BASE), table(replace(BASE, certificate="hardware"))).differences
    assert found.kind == "certificate"


def test_an_upgraded_machine_is_compared_with_itself() -> None:
    upgraded = replace(HERE, torch="2.14.0", kernel_source="1" * 64)
    there = TuningTable((upgraded, THERE), (decision(environment=upgraded.digest),))
    found = diff(table(BASE), there)
    assert found.differences == ()
    ((mine, theirs, fields),) = found.environments
    assert (mine, theirs) == (HERE, upgraded)
    assert {f.field for f in fields} == {"torch", "kernel_source"}


def test_other_devices_are_not_compared() -> None:
    found = diff(table(BASE), table(decision(environment=THERE.digest)))
    assert sorted(d.kind for d in found.differences) == ["only in A", "only in B"]


def test_layers_of_equal_labels_are_told_apart() -> None:
    other = replace(LAYER, global_experts=8)
    found = diff(table(BASE), table(decision(layer=other)))
    assert len(found.differences) == 2
