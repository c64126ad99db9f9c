from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import pytest

from tests.autotune.fake_times import FakeTimes
from tests.autotune.shared import HERE, LAYER
from tests.torch_kernel import TorchKernel
from tilecast.autotune import tuner
from tilecast.autotune.gate import Verdict
from tilecast.autotune.plan import Plan, make_plan
from tilecast.autotune.search import Halving
from tilecast.autotune.tuner import Progress
from tilecast.cache_store.memory import MemoryStore
from tilecast.environment import cpu_environment
from tilecast.errors import DeviceError
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig

measure_plan = partial(tuner.measure_plan, strategy="halving")
"""All candidates start, so that what is asked here of rounds does not depend on a ranking."""
tune = partial(tuner.tune, strategy="halving")
KERNEL = TorchKernel()
REGISTRY = Registry((KERNEL,))


def plan_of(*tokens: int, policy: str = "reproducible") -> Plan:
    return make_plan([LAYER], tokens, HERE, policy=policy)


def by_block(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
    """Row blocks of the batch's size are best, chunks cost a little."""
    gap = abs(config.integer("row_block") - min(tokens, 64))
    return 200.0 + gap + 5 * (config.integer("chunk_k") > 0) + 20 * (config["layout"] == "transposed")


def keys(store: MemoryStore) -> list[str]:
    return [m.key for m in store.measurements()]


def test_the_best_configs_are_found_and_decided() -> None:
    store = MemoryStore()
    table = tune(plan_of(1, 16, 64), store, REGISTRY, measurer=FakeTimes(by_block, noise=0.01), verify=False)
    assert [d.up.config.integer("row_block") for d in table.decisions] == [0, 16, 64]
    assert [d.down.config.integer("row_block") for d in table.decisions] == [0, 16, 64]
    assert {d.certificate for d in table.decisions} == {"none"}
    assert store.table() == table


def test_every_config_and_round_is_one_measurement_and_every_candidate_has_one() -> None:
    store = MemoryStore()
    run = measure_plan(plan_of(4), store, REGISTRY, measurer=FakeTimes(by_block))
    found = store.measurements()
    assert run.measured == len(found) and run.cut == 0
    assert Counter(m.config for m in found if m.round == 0).most_common(1)[0][1] == 2  # up and down
    assert len({m.config for m in found if m.gemm.name == "up"}) == run.tasks[0].candidates == 9
    default = [m for m in found if m.gemm.name == "up" and m.config == KERNEL.config()]
    assert [(m.round, len(m.samples_us)) for m in default] == [(0, 1), (1, 2), *((r, 3) for r in range(2, 7))]
    assert all((m.error_ratio is not None) == (m.round == 0) for m in found)


def test_rounds_interleave_in_rotating_order() -> None:
    measurer = FakeTimes(by_block)
    measure_plan(plan_of(4), MemoryStore(), REGISTRY, measurer=measurer)
    of_round = [[c for g, _, c, r in measurer.log if (g, r) == ("up", number)] for number in range(7)]
    assert [r for g, _, _, r in measurer.log if g == "up"] == sorted(r for g, _, _, r in measurer.log if g == "up")
    assert set(of_round[3]) == set(of_round[4]) and len(of_round[3]) > 2
    assert of_round[3][0] != of_round[4][0]
    assert of_round[0][0] == KERNEL.config()


def test_slow_configs_leave_and_the_default_stays() -> None:
    def times(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
        return 1000.0 if config == KERNEL.config() else 10.0 + config.integer("row_block") * 3

    store = MemoryStore()
    measure_plan(plan_of(4), store, REGISTRY, measurer=FakeTimes(times))
    last = {m.config for m in store.measurements() if m.round == 6}
    assert KERNEL.config() in last
    assert all(c.integer("row_block") == 0 for c in last)


def test_operands_are_prepared_and_released_gemm_by_gemm() -> None:
    measurer = FakeTimes(by_block)
    measure_plan(plan_of(1, 4), MemoryStore(), REGISTRY, measurer=measurer)
    assert measurer.held == []


# Going on


class Killed(BaseException):
    """What ends a process in the middle, as Ctrl-C does."""


@pytest.mark.parametrize("kill_at", [0, 1, 7, 20, 33])
def test_an_interrupted_tuning_goes_on_where_it_stopped(kill_at: int) -> None:
    def kill(batch: int) -> None:
        if batch == kill_at:
            raise Killed

    plan, store, whole = plan_of(1, 16), MemoryStore(), MemoryStore()
    expected = tune(plan, whole, REGISTRY, measurer=FakeTimes(by_block, noise=0.02), verify=False)
    with pytest.raises(Killed):
        measure_plan(plan, store, REGISTRY, measurer=FakeTimes(by_block, noise=0.02, on_sample=kill))
    before = keys(store)
    assert len(before) == kill_at
    second = FakeTimes(by_block, noise=0.02)
    table = tune(plan, store, REGISTRY, measurer=second, verify=False)
    assert keys(store)[: len(before)] == before
    assert second.batches == len(keys(store)) - kill_at
    assert sorted(keys(store)) == sorted(keys(whole))
    assert table.digest == expected.digest


def test_a_finished_tuning_measures_nothing_again() -> None:
    store = MemoryStore()
    measure_plan(plan_of(1, 4), store, REGISTRY, measurer=FakeTimes(by_block))
    again = FakeTimes(by_block)
    run = measure_plan(plan_of(1, 4), store, REGISTRY, measurer=again)
    assert (again.batches, again.checks, run.measured) == (0, 0, 0)


def test_fresh_starts_a_new_run_that_then_goes_on() -> None:
    plan, store = plan_of(4), MemoryStore()
    tune(plan, store, REGISTRY, measurer=FakeTimes(by_block), verify=False)

    def kill(batch: int) -> None:
        if batch == 5:
            raise Killed

    with pytest.raises(Killed):
        measure_plan(plan, store, REGISTRY, fresh=True, measurer=FakeTimes(by_block, on_sample=kill))
    assert Counter(m.run for m in store.measurements())[1] == 5

    def inverted(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
        return 1e5 / by_block(gemm, tokens, config) ** 2

    run = measure_plan(plan, store, REGISTRY, measurer=FakeTimes(inverted))
    assert run.run == 1
    assert Counter(m.run for m in store.measurements())[1] == 5 + run.measured
    third = measure_plan(plan, store, REGISTRY, fresh=True, measurer=FakeTimes(by_block))
    assert third.run == 2


def test_new_buckets_join_the_latest_run() -> None:
    store = MemoryStore()
    measure_plan(plan_of(4), store, REGISTRY, measurer=FakeTimes(by_block))
    more = FakeTimes(by_block)
    run = measure_plan(plan_of(4, 16), store, REGISTRY, measurer=more)
    assert run.run == 0
    assert {tokens for _, tokens, _, _ in more.log} == {16}


# Failures


def test_failures_are_kept_and_never_end_the_tuning() -> None:
    kernel = TorchKernel("zeros", "raises", "no_memory", "no_compiler", "unwritten")
    store = MemoryStore()
    plan = make_plan([LAYER], [4], cpu_environment())
    table = tune(plan, store, Registry((kernel,)), strategy=Halving(rounds=1), verify=False)
    found = {m.config["variant"]: m for m in store.measurements() if m.gemm.name == "up" and m.status != "ok"}
    assert {variant: m.status for variant, m in found.items()} == {
        "zeros": "wrong_result",
        "unwritten": "wrong_result",
        "raises": "runtime_error",
        "no_memory": "resource",
        "no_compiler": "compile_error",
    }
    assert found["raises"].detail == "RuntimeError: the planted failure"
    assert not any(m.samples_us for m in found.values())
    assert all(d.up.config["variant"] == "ordered" for d in table.decisions)


def test_a_failing_default_is_a_clear_error_after_all_was_measured() -> None:
    store = MemoryStore()
    wrong = FakeTimes(by_block, verdicts={KERNEL.config(): Verdict(status="wrong_result", detail="all zero")})
    with pytest.raises(DeviceError, match=r"default config .* wrong_result on rank 0: all zero"):
        tune(plan_of(4), store, REGISTRY, measurer=wrong, verify=False)
    assert len({m.config for m in store.measurements()}) == 9


def test_ctrl_c_passes_through() -> None:
    def press(batch: int) -> None:
        if batch == 3:
            raise KeyboardInterrupt

    store = MemoryStore()
    with pytest.raises(KeyboardInterrupt):
        measure_plan(plan_of(4), store, REGISTRY, measurer=FakeTimes(by_block, on_sample=press))
    assert len(store.measurements()) == 3


def test_nothing_that_runs_is_a_device_error_before_anything_is_measured() -> None:
    store = MemoryStore()
    with pytest.raises(DeviceError, match="no kernel runs"):
        measure_plan(plan_of(4), store, Registry(), measurer=FakeTimes(by_block))
    assert store.measurements() == []


@pytest.mark.parametrize("tokens", [(), (1,)])
def test_an_empty_plan_is_done_at_once(tokens: tuple[int, ...]) -> None:
    layers = [] if tokens else [LAYER]
    store = MemoryStore()
    table = tune(make_plan(layers, tokens, HERE), store, REGISTRY, measurer=FakeTimes(by_block))
    assert len(table) == 0 and store.measurements() == []


# Policies


def test_policies_differ_where_a_config_that_is_not_invariant_is_faster() -> None:
    kernel = TorchKernel("matmul")
    registry = Registry((kernel,))

    def times(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
        return 50.0 if config["variant"] == "matmul" else by_block(gemm, tokens, config)

    store = MemoryStore()
    measurer = FakeTimes(times)
    sound = tune(plan_of(4), store, registry, measurer=measurer, verify=False)
    assert all(config["variant"] == "ordered" for _, _, config, _ in measurer.log)
    fast = tune(plan_of(4, policy="fastest"), store, registry, measurer=FakeTimes(times))
    assert sound.decisions[0].up.config["variant"] == "ordered"
    assert fast.decisions[0].up.config["variant"] == "matmul"
    assert len(store.table()) == 2


# Budget and progress


def test_progress_tells_where_it_stands() -> None:
    events: list[Progress] = []
    measure_plan(plan_of(1, 4), MemoryStore(), REGISTRY, measurer=FakeTimes(by_block), progress=events.append)
    assert [e.task for e in events] == sorted(e.task for e in events)
    assert {e.task for e in events} == {0, 1, 2, 3} and {e.tasks for e in events} == {4}
    fractions = [e.fraction for e in events]
    assert fractions == sorted(fractions) and 0 < fractions[0] < fractions[-1] <= 1
    assert events[0].label == "E4 H96 I80 top2 bf16 up 1 token"
    assert events[-1].best_us is not None and events[-1].default_us is not None
    assert events[-1].best_us <= events[-1].default_us
    assert all(e.remaining_s is not None and e.remaining_s >= 0 for e in events)


def test_another_kernel_source_goes_on_with_nothing_of_the_old_ones() -> None:
    store, before, after = MemoryStore(), FakeTimes(by_block), FakeTimes(by_block)
    measure_plan(plan_of(4), store, REGISTRY, measurer=before)
    changed = replace(plan_of(4), environment=replace(HERE, kernel_source="1" * 64))
    run = measure_plan(changed, store, REGISTRY, measurer=after)
    assert run.run == 0 and after.log == before.log
    assert len(store.environments()) == 2 and len(store.measurements()) == 2 * run.measured


# The whole, on a real kernel and a real clock


def test_a_real_tuning_decides_and_certifies() -> None:
    kernel = TorchKernel("misclassed", "zeros")
    store = MemoryStore()
    environment = cpu_environment()
    plan = make_plan([LAYER], [1, 3], environment)
    table = tune(plan, store, Registry((kernel,)), strategy=Halving(rounds=2))
    assert [d.bucket.tokens for d in table.decisions] == [1, 3]
    for decision in table.decisions:
        assert decision.certificate == "hardware"
        assert decision.up.config["variant"] == decision.down.config["variant"] == "ordered"
        assert decision.up.numerics and decision.environment == environment.digest
    assert len({d.up.config["layout"] for d in table.decisions}) == 1


class Compiled:
    """What compiles ahead: row blocks that hold the whole batch come out as one and the same code."""

    def submit(self, gemm: ExpertGemm, configs: Iterable[TileConfig]) -> None:
        pass

    def wait(self, gemm: ExpertGemm, config: TileConfig) -> str | None:
        return None

    def code(self, gemm: ExpertGemm, config: TileConfig) -> str | None:
        rows = config.integer("row_block")
        return None if rows == 0 else config.with_params(row_block=min(rows, 16)).label


@pytest.mark.parametrize("strategy", ["halving", "quick", "exhaustive"])
def test_what_compiles_to_equal_code_is_timed_once(strategy: str) -> None:
    measurer, store = FakeTimes(by_block), MemoryStore()
    plan = plan_of(16)
    run = measure_plan(plan, store, REGISTRY, measurer=measurer, ahead=Compiled(), strategy=strategy)
    found = store.measurements()
    twins = [m for m in found if m.status == "duplicate"]
    timed = {(m.gemm, m.config) for m in found if m.status == "ok"}
    assert twins and {m.config.integer("row_block") for m in twins} <= {16, 64}
    assert len(timed) == len({(gemm, Compiled().code(gemm, config) or config) for gemm, config in timed})
    for m in twins:
        named = [c for gemm, c in timed if gemm == m.gemm and m.detail == f"its launches are those of {c.label}"]
        assert len(named) == 1 and Compiled().code(m.gemm, named[0]) == Compiled().code(m.gemm, m.config)
    assert measurer.checks == len(timed), "a duplicate costs neither a check nor a sample"
    assert run.measured == len(found)
    chosen = tuner.decide(plan, store, REGISTRY, verify=False).decisions[0]
    assert {chosen.up.config.integer("row_block"), chosen.down.config.integer("row_block")} <= {16, 64}


def test_what_has_to_run_is_no_duplicate() -> None:
    class Same(Compiled):
        def code(self, gemm: ExpertGemm, config: TileConfig) -> str | None:
            return "all alike"

    store = MemoryStore()
    measure_plan(plan_of(4), store, REGISTRY, measurer=FakeTimes(by_block), ahead=Same())
    first = [m for m in store.measurements() if m.round == 0 and m.gemm == LAYER.up]
    default = KERNEL.default(LAYER.up, 4, HERE)
    assert [m.config for m in first if m.status == "ok" and m.config == default]
    for m in first:
        kernels = [KERNEL.numerics(LAYER.up, c, HERE) for c in (m.config, default)]
        alike = kernels[0] == kernels[1] and m.config["layout"] == default["layout"]
        assert m.status == ("duplicate" if alike and m.config != default else "ok")


class Compiling(FakeTimes):
    """A measurer that compiles several configs at once."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__(by_block)
        self.fails, self.compiled = fails, []  # type: ignore[var-annotated]

    def compile(self, gemm: ExpertGemm, configs: Sequence[TileConfig]) -> None:
        self.compiled.append((self.checks, gemm, tuple(configs)))
        if self.fails:
            raise RuntimeError("the compiler ended")


@pytest.mark.parametrize("fails", [False, True])
def test_configs_are_compiled_together_before_the_first_is_checked(fails: bool) -> None:
    measurer, store = Compiling(fails=fails), MemoryStore()
    measure_plan(plan_of(4), store, REGISTRY, measurer=measurer)
    of_up = [(checks, configs) for checks, gemm, configs in measurer.compiled if gemm == LAYER.up]
    ran = {m.config for m in store.measurements() if m.gemm == LAYER.up}
    assert [c for _, configs in of_up for c in configs] == list(dict.fromkeys(c for _, cs in of_up for c in cs))
    assert {c for _, configs in of_up for c in configs} == ran
    assert len(of_up) == -(-len(ran) // 8) and [checks for checks, _ in of_up] == list(range(0, len(ran), 8))
    assert {m.status for m in store.measurements()} == {"ok"}, "whoever is at fault is found when it runs"


def test_few_are_compiled_at_once_where_a_deadline_may_come_first() -> None:
    measurer = Compiling()
    measure_plan(plan_of(4), MemoryStore(), REGISTRY, measurer=measurer, budget_s=30)
    assert max(len(configs) for _, _, configs in measurer.compiled) == 2
