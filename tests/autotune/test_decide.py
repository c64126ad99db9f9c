from __future__ import annotations

from dataclasses import replace

import pytest

from tests.autotune.fake_times import FakeTimes
from tests.autotune.shared import HERE, LAYER
from tests.autotune.test_tuner import measure_plan, tune
from tests.torch_kernel import TorchKernel
from tilecast.autotune.decide import decide
from tilecast.autotune.plan import make_plan
from tilecast.cache_store.memory import MemoryStore
from tilecast.errors import CoverageError, DeviceError
from tilecast.kernels.spec import Registry
from tilecast.problem import Bucket, ExpertGemm, TileConfig

KERNEL = TorchKernel("misclassed")
REGISTRY = Registry((KERNEL,))
LIAR = KERNEL.config(variant="misclassed")
PLAN = make_plan([LAYER], [1, 4], HERE)


def liar_wins(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
    return 50.0 if config == LIAR else 100.0 + 10 * (config != KERNEL.config(row_block=16))


def measured_store(times=liar_wins, plan=PLAN, registry=REGISTRY) -> MemoryStore:
    store = MemoryStore()
    measure_plan(plan, store, registry, measurer=FakeTimes(times))
    return store


def test_a_config_that_breaks_its_class_is_out_and_the_record_says_so() -> None:
    store = measured_store()
    before = len(store.measurements())
    table = decide(PLAN, store, REGISTRY)
    for decision in table.decisions:
        assert decision.certificate == "hardware"
        # Whatever the liar drove out of the race early has too few samples to win.
        assert decision.up.config == decision.up.default and decision.down.config == decision.down.default
    added = store.measurements()[before:]
    assert {(m.gemm.name, m.config, m.status) for m in added} == {
        ("up", LIAR, "unstable"),
        ("down", LIAR, "unstable"),
    }
    assert all("class check failed" in m.detail and not m.samples_us for m in added)


def test_tuning_races_again_without_what_broke_its_class() -> None:
    store = MemoryStore()
    table = tune(PLAN, store, REGISTRY, measurer=FakeTimes(liar_wins))
    assert {d.up.config for d in table.decisions} == {KERNEL.config(row_block=16)}
    assert {d.certificate for d in table.decisions} == {"hardware"}
    late = [m for m in store.measurements(gemm=LAYER.up, tokens=4) if m.config == KERNEL.config(row_block=16)]
    assert max(m.round for m in late) == 6


def test_a_recorded_failure_is_not_checked_again_and_holds_under_reproducible_alone() -> None:
    store = measured_store()
    first = decide(PLAN, store, REGISTRY)
    count = len(store.measurements())
    assert decide(PLAN, store, REGISTRY) == first
    assert len(store.measurements()) == count
    fast = decide(replace(PLAN, policy="fastest"), store, REGISTRY)
    assert all(d.up.config == LIAR and d.certificate == "none" for d in fast.decisions)


def test_without_the_check_nothing_is_certified() -> None:
    table = decide(PLAN, measured_store(), REGISTRY, verify=False)
    assert all(d.up.config == LIAR and d.certificate == "none" for d in table.decisions)


class Refuses:
    """A verifier that lets nothing pass, or all but some configs."""

    def __init__(self, allowed: TileConfig | None = None, *, blind: str | None = None) -> None:
        self.allowed = allowed
        self.blind = blind
        self.asked: list[tuple[TileConfig, Bucket]] = []
        self.releases = 0

    def verify(self, gemm: ExpertGemm, config: TileConfig, bucket: Bucket) -> str | None:
        self.asked.append((config, bucket))
        return None if config == self.allowed else "because"

    def control(self, gemm: ExpertGemm, config: TileConfig) -> str | None:
        return self.blind if gemm.name == "down" else None

    def release(self) -> None:
        self.releases += 1


def test_choosing_again_ends_with_what_passes() -> None:
    only = KERNEL.config(row_block=64)
    verifier = Refuses(only)
    table = decide(PLAN, measured_store(), REGISTRY, verifier=verifier)
    assert {d.up.config for d in table.decisions} == {only}
    assert verifier.releases == 1  # per layer
    assert len(verifier.asked) == len(set(verifier.asked)) + len(verifier.asked) // 2  # up and down


def test_a_check_that_cannot_tell_classes_apart_certifies_nothing(caplog: pytest.LogCaptureFixture) -> None:
    only = KERNEL.config(row_block=64)
    store = measured_store()
    with caplog.at_level("WARNING"):
        table = decide(PLAN, store, REGISTRY, verifier=Refuses(only))
        assert {d.certificate for d in table.decisions} == {"hardware"} and caplog.records == []
        table = decide(PLAN, store, REGISTRY, verifier=Refuses(only, blind="all sums are exact"))
    assert {d.certificate for d in table.decisions} == {"none"}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("not certified: ") and "down" in line and line.endswith("all sums are exact")


def test_when_no_class_holds_it_is_a_device_error() -> None:
    with pytest.raises(DeviceError, match="use the policy fastest"):
        decide(PLAN, measured_store(), REGISTRY, verifier=Refuses())


def test_missing_measurements_are_a_coverage_error() -> None:
    store = MemoryStore()
    store.add_environment(HERE)
    with pytest.raises(CoverageError, match="no measurements of E4 H96 I80 top2 bf16 up at 1 tokens"):
        decide(PLAN, store, REGISTRY)


def test_an_unfinished_new_run_does_not_hide_the_last_whole_one() -> None:
    store = measured_store()

    def stop(batch: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_plan(PLAN, store, REGISTRY, fresh=True, measurer=FakeTimes(liar_wins, on_sample=stop))
    assert len(decide(PLAN, store, REGISTRY)) == 2


def test_the_latest_run_decides() -> None:
    store = measured_store()

    def otherwise(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
        return 50.0 if config == KERNEL.config(row_block=64) else 100.0

    measure_plan(PLAN, store, REGISTRY, fresh=True, measurer=FakeTimes(otherwise))
    table = decide(PLAN, store, REGISTRY, verify=False)
    assert {d.up.config for d in table.decisions} == {KERNEL.config(row_block=64)}


def test_deciding_twice_gives_the_same_bytes() -> None:
    store = measured_store()
    first = decide(PLAN, store, REGISTRY)
    assert decide(PLAN, store, REGISTRY).to_bytes() == first.to_bytes()
