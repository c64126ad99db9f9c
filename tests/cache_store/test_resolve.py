from __future__ import annotations

from dataclasses import replace

import pytest

from tests.store_contract import CONFIG, HERE, LAYER, OTHER, THERE, decision
from tilecast.cache_store.resolve import Resolution, covers_bucket, resolve
from tilecast.errors import CacheError, UsageError
from tilecast.evidence import Choice, Decision, TuningTable
from tilecast.problem import Bucket

FASTER = CONFIG.with_params(mr=4)


def made(
    us: float, *, above: int = 0, tokens: int = 4, default_us: float = 6.0, numerics: str = "a" * 64,
    noise: float = 0.02, config: object = CONFIG, **changes: object,
) -> Decision:  # fmt: skip
    """A decision whose GEMMs take `us` each."""
    choice = Choice(
        config=config, p50_us=us, default=OTHER, default_us=default_us, noise=noise, numerics=numerics,  # type: ignore[arg-type]
    )  # fmt: skip
    return decision(above, tokens, up=choice, down=choice, **changes)


def table(*decisions: Decision) -> TuningTable:
    return TuningTable((HERE, THERE), decisions)


def merged(ours: Decision, theirs: Decision, policy: str = "best") -> Resolution:
    return resolve(table(ours), table(theirs), policy)


def test_what_does_not_overlap_is_united() -> None:
    low, high, fast = made(3), made(3, above=4, tokens=16), made(3, policy="fastest")
    other_place = made(3, environment=THERE.digest)
    found = resolve(table(low, fast), table(high, other_place, low), "best")
    assert found.table == table(low, high, fast, other_place)
    assert (found.added, found.equal, found.conflicts) == (2, 1, ())


@pytest.mark.parametrize(
    ("us", "kept", "reason"),
    [(2.0, "theirs", "faster by 50.0%"), (2.97, "ours", "within the noise of 2.0%"), (4.0, "ours", "slower")],
)
def test_best_believes_only_a_win_beyond_the_noise(us: float, kept: str, reason: str) -> None:
    ours, theirs = made(3), made(us, config=FASTER)
    found = merged(ours, theirs)
    assert found.table == table(theirs if kept == "theirs" else ours)
    (conflict,) = found.conflicts
    assert conflict.kept == kept
    assert reason in conflict.reason
    assert "\n" not in str(conflict)
    assert str(conflict).startswith("E4 H64 I96 top2 bf16, 1–4 tokens, reproducible, routing uniform, environment ")


def test_best_keeps_what_is_faster_whichever_comes_first() -> None:
    slow, fast = made(3), made(2, config=FASTER)
    assert merged(slow, fast).table == merged(fast, slow).table == table(fast)


def test_best_goes_by_the_larger_noise_of_both() -> None:
    assert merged(made(3), made(2.5, config=FASTER, noise=0.3)).table == table(made(3))


def test_best_does_not_believe_a_machine_that_was_faster_that_day() -> None:
    ours, theirs = made(3, default_us=6), made(2, default_us=4, config=FASTER)
    found = merged(ours, theirs)
    assert found.table == table(ours)
    assert "the default was faster there, too" in found.conflicts[0].reason
    # Over another default the times themselves have to do.
    changed = Choice(config=FASTER, p50_us=2, default=FASTER, default_us=2, noise=0.02, numerics="a" * 64)
    theirs = replace(theirs, up=changed, down=changed)
    assert merged(ours, theirs).table == table(theirs)


def test_the_same_configs_with_other_times_stay_ours() -> None:
    assert merged(made(3), made(2)).table == table(made(3))


def test_best_never_compares_across_environments() -> None:
    there = made(1, environment=THERE.digest, config=FASTER)
    assert merged(made(3), there).conflicts == ()


def test_other_buckets_do_not_compare() -> None:
    ours, theirs = (made(3, tokens=8),), (made(1, tokens=4, config=FASTER), made(1, above=4, tokens=8, config=FASTER))
    found = resolve(table(*ours), table(*theirs), "best")
    assert found.table == table(*ours)
    assert "do not compare" in found.conflicts[0].reason
    # Whole groups are taken, so that no token count is left uncovered.
    assert resolve(table(*ours), table(*theirs), "theirs").table == table(*theirs)
    assert resolve(table(*theirs), table(*ours), "theirs").table == table(*ours)


def test_ours_and_theirs() -> None:
    ours, theirs = made(3), made(2, config=FASTER)
    assert merged(ours, theirs, "ours").table == table(ours)
    assert merged(theirs, ours, "theirs").table == table(ours)


def test_newest_needs_to_know_when() -> None:
    ours, theirs = made(3), made(2, config=FASTER)
    for mine, other, kept in ((1.0, 2.0, theirs), (2.0, 1.0, ours), (2.0, 2.0, ours)):
        found = resolve(table(ours), table(theirs), "newest", ages=({ours: mine}, {theirs: other}))
        assert found.table == table(kept)
    for ages in (({}, {theirs: 2.0}), ({ours: 1.0}, {})):
        found = resolve(table(ours), table(theirs), "newest", ages=ages)
        assert found.table == table(ours)
        assert "not known" in found.conflicts[0].reason


def test_error_names_the_first_conflict_and_counts_the_others() -> None:
    ours = table(made(3), made(3, above=4, tokens=16))
    theirs = table(made(2), made(2, above=4, tokens=16))
    with pytest.raises(CacheError, match="E4 H64 I96 top2 bf16 at 1–4 tokens, reproducible and 1 more"):
        resolve(ours, theirs, "error")
    assert resolve(ours, ours, "error").table == ours


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(UsageError, match="'fastest', expected one of best, ours"):
        merged(made(3), made(2), "fastest")


def test_series_of_other_classes_are_taken_whole() -> None:
    ours = table(made(3), made(3, above=4, tokens=16))
    theirs = table(
        made(2, numerics="b" * 64, config=FASTER), made(2, above=4, tokens=16, numerics="b" * 64, config=FASTER)
    )
    assert resolve(ours, theirs, "best").table == theirs
    assert resolve(theirs, ours, "best").table == theirs
    assert len(resolve(ours, theirs, "ours").conflicts) == 1
    # One bucket alone, of another class, would be refused by the engine beside the others.
    one = table(made(2, above=4, tokens=16, numerics="b" * 64, config=FASTER))
    found = resolve(ours, one, "best")
    assert found.table == ours
    assert "theirs do not all cover 1–4" in found.conflicts[0].reason
    assert resolve(ours, one, "theirs").table == one


def test_layouts_exclude_each_other_under_any_policy() -> None:
    packed = CONFIG.with_params(layout="nk16")
    ours = table(made(3, policy="fastest"), made(3, above=4, tokens=16, policy="fastest"))
    theirs = table(made(1, above=16, tokens=32, policy="fastest", config=packed))
    assert resolve(ours, theirs, "best").table == ours
    plain = table(made(1, above=16, tokens=32, policy="fastest", config=CONFIG.with_params(layout="plain")))
    assert len(resolve(ours, plain, "best").table) == 3


@pytest.mark.parametrize(
    ("by", "wanted"), [([(0, 4), (4, 9)], True), ([(0, 4), (5, 9)], False), ([(0, 4)], False), ([], False)]
)
def test_covers_bucket(by: list[tuple[int, int]], wanted: bool) -> None:
    assert covers_bucket(Bucket(above=2, tokens=8), [Bucket(above=a, tokens=t) for a, t in by]) is wanted


def test_layers_are_never_mixed() -> None:
    wider = replace(LAYER, hidden=128)
    assert len(merged(made(3), made(1, layer=wider)).table) == 2
