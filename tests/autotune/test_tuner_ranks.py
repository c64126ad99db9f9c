"""Several ranks that tune together, here as threads; processes are in tests/engine."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from tests.autotune.fake_times import FakeTimes
from tests.autotune.shared import HERE, LAYER
from tests.autotune.test_tuner import KERNEL, REGISTRY, by_block, keys, measure_plan, plan_of
from tilecast.autotune.decide import decide
from tilecast.autotune.plan import Plan
from tilecast.autotune.search import Halving
from tilecast.cache_store.memory import MemoryStore
from tilecast.evidence import Measurement
from tilecast.problem import ExpertGemm, TileConfig


class ThreadPeers:
    """Ranks that are threads of one process."""

    class Table:
        def __init__(self, world_size: int) -> None:
            self.barrier = threading.Barrier(world_size, timeout=20)
            self.said: dict[int, tuple[list[Measurement], bool]] = {}

    def __init__(self, table: Table, rank: int, world_size: int) -> None:
        self.table, self.rank, self.world_size = table, rank, world_size
        self.merges = 0

    def merge(self, measurements, stop):
        self.merges += 1
        self.table.said[self.rank] = (list(measurements), stop)
        self.table.barrier.wait()
        said = [self.table.said[rank] for rank in range(self.world_size)]
        self.table.barrier.wait()
        return [m for part, _ in said for m in part], any(flag for _, flag in said)


def tune_as_two(plan: Plan, stores: list[MemoryStore], measurers: list[FakeTimes], **options: object) -> list:
    table = ThreadPeers.Table(2)
    peers = [ThreadPeers(table, rank, 2) for rank in (0, 1)]
    runs: list = [None, None]

    def work(rank: int) -> None:
        try:
            runs[rank] = measure_plan(
                plan, stores[rank], REGISTRY, measurer=measurers[rank], peers=peers[rank], **options
            )
        except BaseException:
            table.barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert peers[0].merges == peers[1].merges
    assert all(run is not None for run in runs)
    return runs


def test_ranks_keep_the_same_survivors_and_the_slowest_decides() -> None:
    def other(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
        """The best config of rank 0 is a bad one on rank 1."""
        return by_block(gemm, tokens, config) * (2 if config.integer("row_block") == 16 else 1)

    stores = [MemoryStore(), MemoryStore()]
    measurers = [FakeTimes(by_block, noise=0.01, seed=1), FakeTimes(other, noise=0.01, seed=2)]
    tune_as_two(plan_of(16), stores, measurers)
    assert [entry[2:] for entry in measurers[0].log] == [entry[2:] for entry in measurers[1].log]
    assert sorted(keys(stores[0])) == sorted(keys(stores[1]))
    assert {(m.rank, m.world_size) for m in stores[0].measurements()} == {(0, 2), (1, 2)}
    table = tune_table(stores[0], 16)
    assert table.decisions[0].up.config.integer("row_block") != 16
    assert table == tune_table(stores[1], 16)


def tune_table(store: MemoryStore, *tokens: int):
    return decide(plan_of(*tokens), store, REGISTRY, verify=False)


def test_ranks_go_on_together_though_only_one_has_the_store() -> None:
    stores = [MemoryStore(), MemoryStore()]
    tune_as_two(plan_of(16), stores, [FakeTimes(by_block), FakeTimes(by_block)])
    again = [FakeTimes(by_block), FakeTimes(by_block)]
    runs = tune_as_two(plan_of(16), [stores[0], MemoryStore()], again)
    assert [run.run for run in runs] == [0, 0]
    assert [m.batches for m in again] == [0, 0]


def test_another_number_of_ranks_is_a_new_run() -> None:
    store = MemoryStore()
    measure_plan(plan_of(16), store, REGISTRY, measurer=FakeTimes(by_block))
    runs = tune_as_two(plan_of(16), [store, MemoryStore()], [FakeTimes(by_block), FakeTimes(by_block)])
    assert [run.run for run in runs] == [1, 1]
    assert runs[0].measured == runs[1].measured > 0


def test_back_at_the_first_number_of_ranks_is_one_more_run_that_then_goes_on() -> None:
    store = MemoryStore()
    measure_plan(plan_of(16), store, REGISTRY, measurer=FakeTimes(by_block))
    tune_as_two(plan_of(16), [store, MemoryStore()], [FakeTimes(by_block), FakeTimes(by_block)])
    back = measure_plan(plan_of(16), store, REGISTRY, measurer=FakeTimes(by_block))
    again = measure_plan(plan_of(16), store, REGISTRY, measurer=FakeTimes(by_block))
    assert (back.run, again.run, again.measured) == (2, 2, 0)
    assert back.measured > 0


def test_only_the_latest_run_and_broken_classes_are_sent_to_the_other_ranks() -> None:
    store = MemoryStore()
    for fresh in (False, True):
        measure_plan(plan_of(4, 16), store, REGISTRY, measurer=FakeTimes(by_block), fresh=fresh)
    broken = replace(
        store.measurements(tokens=4)[0], status="unstable", samples_us=(), round=1 << 30, detail="class check failed"
    )
    store.add_measurements([broken])

    class Listening(ThreadPeers):
        def merge(self, measurements, stop):
            sent.append(list(measurements))
            return list(measurements), stop

    sent: list[list[Measurement]] = []
    peers = Listening(ThreadPeers.Table(1), 0, 1)
    measure_plan(plan_of(16), store, REGISTRY, measurer=FakeTimes(by_block), peers=peers)
    assert {(m.run, m.tokens) for m in sent[0]} == {(1, 16), (0, 4)}
    assert [m for m in sent[0] if m.tokens == 4] == [broken]


def test_a_config_that_broke_its_class_elsewhere_does_not_race() -> None:
    store = MemoryStore()
    measure_plan(plan_of(4), store, REGISTRY, measurer=FakeTimes(by_block))
    bad = next(m for m in store.measurements(gemm=LAYER.up) if m.config.integer("row_block") == 64)
    store.add_measurements([replace(bad, status="unstable", samples_us=(), round=1 << 30, detail="class check failed")])
    measurer = FakeTimes(by_block)
    measure_plan(plan_of(16), store, REGISTRY, measurer=measurer)
    assert ("down", bad.config) in {(gemm, config) for gemm, _, config, _ in measurer.log}
    assert ("up", bad.config) not in {(gemm, config) for gemm, _, config, _ in measurer.log}


def test_a_budget_spent_on_one_rank_stops_both() -> None:
    def slow(batch: int) -> None:
        time.sleep(0.01)

    stores = [MemoryStore(), MemoryStore()]
    measurers = [FakeTimes(by_block), FakeTimes(by_block, on_sample=slow)]
    tune_as_two(plan_of(4, 16), stores, measurers, budget_s=0.3)
    rounds = [{m.round for m in stores[0].measurements() if m.rank == rank} for rank in (0, 1)]
    assert max(rounds[0]) - max(rounds[1]) <= 1
    assert len(tune_table(stores[0], 4, 16)) == 2


def test_ranks_that_split_measure_less_and_the_finalists_on_both() -> None:
    stores = [MemoryStore(), MemoryStore()]
    measurers = [FakeTimes(by_block, noise=0.01), FakeTimes(by_block, noise=0.01, seed=1)]
    runs = tune_as_two(plan_of(16), stores, measurers, split=True)
    assert sorted(keys(stores[0])) == sorted(keys(stores[1]))
    found = stores[0].measurements()
    first = [m for m in found if m.round == 0 and m.gemm.name == "up"]
    shared = {m.config for m in first if m.rank == 0} & {m.config for m in first if m.rank == 1}
    default = KERNEL.default(LAYER.up, 16, HERE)
    candidates = {m.config for m in first}
    assert default in shared and len(shared) < len(candidates) == runs[0].tasks[0].candidates
    assert all(len([m for m in first if m.rank == rank]) < len(candidates) for rank in (0, 1))
    late = {(m.gemm.name, m.config, m.rank) for m in found if m.round >= 2}
    assert late and {(name, config, 1 - rank) for name, config, rank in late} == late
    (decision,) = decide(plan_of(16), stores[0], REGISTRY, verify=False).decisions
    assert decision.up.config.integer("row_block") == 16
    for choice, name in ((decision.up, "up"), (decision.down, "down")):
        assert {rank for n, config, rank in late if (n, config) == (name, choice.config)} == {0, 1}
    assert runs[0].measured + runs[1].measured == len(found)


def test_a_strategy_that_is_content_early_still_ends_on_all_ranks_that_split() -> None:
    """One round is all the strategy wants; what is chosen must have run on both ranks at the same time."""
    stores = [MemoryStore(), MemoryStore()]
    measurers = [FakeTimes(by_block), FakeTimes(by_block)]
    tune_as_two(plan_of(16), stores, measurers, split=True, strategy=Halving(rounds=1))
    (decision,) = decide(plan_of(16), stores[0], REGISTRY, verify=False).decisions
    assert decision.up.config.integer("row_block") == 16
    rounds = {m.round for m in stores[0].measurements()}
    assert len(rounds) > 1
