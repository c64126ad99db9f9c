"""What a budget leaves out of a tuning, whom it is shared out to, and that the rest is measured the next time."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.autotune.fake_times import FakeTimes
from tests.autotune.shared import HERE, LAYER
from tests.autotune.test_tuner import KERNEL, REGISTRY, by_block, keys, measure_plan, plan_of, tune
from tilecast.autotune.race import FEW
from tilecast.autotune.tuner import Progress
from tilecast.cache_store.memory import MemoryStore
from tilecast.errors import InputError, UsageError


@pytest.mark.parametrize("budget_s", [0, -1, float("nan"), float("inf")])
def test_a_budget_must_be_a_positive_time(budget_s: float) -> None:
    with pytest.raises(UsageError, match="budget"):
        measure_plan(plan_of(4), MemoryStore(), REGISTRY, budget_s=budget_s)
    with pytest.raises(UsageError, match="no such"):
        measure_plan(plan_of(4), MemoryStore(), REGISTRY, strategy="no such")


def test_a_budget_cuts_and_says_so_and_each_task_gets_its_part() -> None:
    def slow(batch: int) -> None:
        time.sleep(0.004)

    store = MemoryStore()
    events: list[Progress] = []
    run = measure_plan(
        plan_of(1, 4, 16, 64),
        store,
        REGISTRY,
        measurer=FakeTimes(lambda *_: 4000.0, on_sample=slow),
        budget_s=0.4,
        progress=events.append,
    )
    assert run.cut > 0 and run.elapsed_s < 1.5
    assert sum(task.cut for task in run.tasks) == run.cut
    for gemm in LAYER.gemms:
        for tokens in (1, 4, 16, 64):
            configs = {m.config for m in store.measurements(gemm=gemm, tokens=tokens)}
            assert KERNEL.default(gemm, tokens, HERE) in configs
            assert len(configs) >= 1 + FEW
    assert sum(max((e.cut for e in events if e.task == task), default=0) for task in range(8)) == run.cut


def test_a_budget_too_small_for_all_configs_leaves_time_to_tell_the_best_from_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def slow(batch: int) -> None:
        now[0] += 1.0

    store = MemoryStore()
    run = measure_plan(plan_of(4), store, REGISTRY, measurer=FakeTimes(by_block, on_sample=slow), budget_s=20.0)
    assert run.cut > 0 and run.elapsed_s <= 20.0
    for gemm in LAYER.gemms:
        rounds = Counter(m.round for m in store.measurements(gemm=gemm))
        assert rounds[0] >= 1 + FEW
        assert rounds[1] > 0


def test_more_of_a_budget_goes_to_what_is_called_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def slow(batch: int) -> None:
        now[0] += 1.0

    def started(**weights: float) -> list[int]:
        now[0] = 0.0
        shares = {int(name[1:]): share for name, share in weights.items()}
        run = measure_plan(
            plan_of(1, 16), MemoryStore(), REGISTRY, measurer=FakeTimes(by_block, on_sample=slow), budget_s=60.0,
            weights=shares,
        )  # fmt: skip
        assert run.cut > 0
        return [task.samples for task in run.tasks if task.gemm.name == "up"]

    short, long = started(t1=0.99, t16=0.01), started(t1=0.01, t16=0.99)
    assert short[0] > long[0] and short[1] < long[1]


def test_weights_that_no_bucket_has_a_share_of_are_refused_before_anything_is_measured() -> None:
    measurer = FakeTimes(by_block)
    with pytest.raises(InputError, match="no share"):
        measure_plan(plan_of(4), MemoryStore(), REGISTRY, measurer=measurer, weights={5: 1.0})
    assert measurer.log == []


def test_one_slow_set_up_does_not_make_every_config_look_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def packs_once(batch: int) -> None:
        now[0] += 10.0 if batch == 0 else 0.1

    store = MemoryStore()
    measure_plan(plan_of(4), store, REGISTRY, measurer=FakeTimes(by_block, on_sample=packs_once), budget_s=39.0)
    assert Counter(m.round for m in store.measurements(gemm=LAYER.up))[0] == 9


def test_a_spent_budget_still_measures_every_default() -> None:
    store = MemoryStore()

    def slow(batch: int) -> None:
        time.sleep(0.01)

    run = measure_plan(plan_of(1, 4, 16), store, REGISTRY, measurer=FakeTimes(by_block, on_sample=slow), budget_s=1e-6)
    assert run.measured == 6 and run.cut == 6 * 8
    table = tune(plan_of(1, 4, 16), store, REGISTRY, measurer=FakeTimes(by_block), verify=False)
    assert len(table) == 3


def test_what_a_budget_cut_is_measured_the_next_time() -> None:
    store = MemoryStore()
    measure_plan(plan_of(4), store, REGISTRY, measurer=FakeTimes(by_block), budget_s=1e-6)
    rest = FakeTimes(by_block)
    run = measure_plan(plan_of(4), store, REGISTRY, measurer=rest)
    assert run.run == 0 and run.cut == 0
    whole = MemoryStore()
    measure_plan(plan_of(4), whole, REGISTRY, measurer=FakeTimes(by_block))
    assert sorted(keys(store)) == sorted(keys(whole))
