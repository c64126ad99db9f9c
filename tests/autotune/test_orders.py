"""Configs that write and read the intermediate sorted by expert, from the gate to the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.autotune.fake_times import FakeTimes
from tests.autotune.shared import HERE, LAYER
from tests.torch_kernel import SortedTorchKernel
from tilecast.autotune.classes import ClassVerifier
from tilecast.autotune.decide import decide
from tilecast.autotune.gate import Gate
from tilecast.autotune.measure import DeviceMeasurer
from tilecast.autotune.plan import make_plan
from tilecast.autotune.prescreen import describe
from tilecast.autotune.search import Halving
from tilecast.autotune.search.elimination import survivors
from tilecast.autotune.timing import Timing
from tilecast.autotune.tuner import measure_plan, tune
from tilecast.autotune.workload import MAX_SORTED_BYTES, Workload, in_order, in_slot_order, present_slots
from tilecast.cache_store.memory import MemoryStore
from tilecast.engine.experts import prepare_experts
from tilecast.engine.table_runtime import Runtime
from tilecast.errors import DeviceError
from tilecast.kernels.reference import reference_layer
from tilecast.kernels.routing import sort_slots
from tilecast.kernels.spec import Registry
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer, TileConfig

KERNEL = SortedTorchKernel("misclassed")
REGISTRY = Registry((KERNEL,))
SHARE = replace(LAYER, experts=2, global_experts=8, top_k=3)
TINY = ExpertLayer(hidden=32, intermediate=24, experts=4, top_k=2)


def sorted_config(**params: object) -> TileConfig:
    return KERNEL.config(order="sorted", **params)  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [LAYER, SHARE], ids=lambda layer: layer.label)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_gate_passes_sorted_configs(layer: ExpertLayer, tokens: int) -> None:
    gate = Gate(Workload(HERE))
    for gemm in layer.gemms:
        verdict = gate.check(gemm, tokens, sorted_config(), KERNEL)
        assert (verdict.status, verdict.detail) == ("ok", "")
        assert verdict == gate.check(gemm, tokens, KERNEL.config(), KERNEL)


class WrongOrder(SortedTorchKernel):
    """Claims the one order and uses the other."""

    def order(self, gemm: ExpertGemm, config: TileConfig) -> str:
        return "slot" if config["order"] == "sorted" else "sorted"


@pytest.mark.parametrize("order", ["slot", "sorted"])
@pytest.mark.parametrize("name", ["up", "down"])
def test_a_config_of_another_order_than_it_claims_is_caught(order: str, name: str) -> None:
    kernel = WrongOrder()
    gemm = SHARE.up if name == "up" else SHARE.down
    assert Gate(Workload(HERE)).check(gemm, 9, kernel.config(order=order), kernel).status == "wrong_result"


def test_rows_written_beyond_the_present_slots_are_caught() -> None:
    class Spills(SortedTorchKernel):
        def up(self, config, hidden, weights, route, out):
            super().up(config, hidden, weights, route, out)
            out[int(route.offsets[-1]) :][:1] = 0

    kernel = Spills()
    verdict = Gate(Workload(HERE)).check(LAYER.up, 9, kernel.config(order="sorted"), kernel)
    assert verdict.status == "wrong_result"
    assert verdict.detail.startswith("1 rows beyond the ")


def test_rows_change_order_and_back() -> None:
    work = Workload(HERE)
    given = work.inputs(SHARE.down, 5, 0)
    slots = present_slots(given.route)
    made = in_order(SHARE.down, given, "sorted")
    assert 0 < len(slots) < 15
    assert torch.equal(made.rows[: len(slots)], given.rows[slots])
    assert bool(made.rows[len(slots) :].isnan().all())
    assert in_order(SHARE.down, given, "slot") is given
    back = in_slot_order(replace(SHARE, hidden=80, intermediate=80).up, made.rows, given.route, "sorted")
    absent = torch.ones(15, dtype=torch.bool)
    absent[slots] = False
    assert torch.equal(back[slots], given.rows[slots]) and bool(back[absent].isnan().all())


def test_sorted_rows_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(HERE)
    first = work.inputs(LAYER.down, 5, 0, "sorted")
    assert work.inputs(LAYER.down, 5, 0, "sorted") is first
    assert 2 * first.rows.nbytes < MAX_SORTED_BYTES
    monkeypatch.setattr("tilecast.autotune.workload.MAX_SORTED_BYTES", 2 * first.rows.nbytes)
    for seed in (1, 2):
        work.inputs(LAYER.down, 5, seed, "sorted")
    again = work.inputs(LAYER.down, 5, 0, "sorted")
    assert again is not first and torch.equal(again.rows, first.rows)


@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("bucket", [Bucket(above=0, tokens=1), Bucket(above=4, tokens=20)], ids=str)
def test_members_of_a_class_pass_in_any_order(name: str, bucket: Bucket) -> None:
    verifier = ClassVerifier(HERE, REGISTRY)
    gemm = LAYER.up if name == "up" else LAYER.down
    assert verifier.verify(gemm, sorted_config(row_block=16), bucket) is None
    assert verifier.control(gemm, sorted_config()) is None
    assert verifier.verify(gemm, sorted_config(variant="misclassed"), bucket) is not None


def test_the_best_of_each_order_stays_in_the_race() -> None:
    configs = [KERNEL.config(), KERNEL.config(row_block=16), sorted_config(), sorted_config(row_block=16)]
    candidates = [describe(LAYER.up, c, HERE, REGISTRY, is_default=c == KERNEL.config()) for c in configs]
    times = dict(zip(configs, (300.0, 145.0, 100.0, 101.0), strict=True))
    timings = {c: Timing(config=c, p50_us=us, error=0.01, samples=3) for c, us in times.items()}
    kept = survivors(candidates, timings, within=1.2, policy="reproducible")
    assert [c.config for c in kept] == configs
    times[configs[1]] = 160.0
    timings = {c: Timing(config=c, p50_us=us, error=0.01, samples=3) for c, us in times.items()}
    assert [c.config for c in survivors(candidates, timings, within=1.2, policy="reproducible")] == [
        configs[0],
        *configs[2:],
    ]


def neither_is_best(gemm: ExpertGemm, tokens: int, config: TileConfig) -> float:
    """The fastest up is sorted, the fastest down is not; together the sorted ones win."""
    if config.integer("chunk_k") or config["layout"] != "plain" or config["variant"] != "ordered":
        return 400.0
    slot = config["order"] == "slot"
    best = (150.0 if slot else 100.0) if gemm.name == "up" else (120.0 if slot else 140.0)
    return best + config.integer("row_block")


def run_layer(runtime: Runtime, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    w13 = torch.randn(4, 48, 32, generator=generator, dtype=torch.float32).to(torch.bfloat16) / 6
    w2 = torch.randn(4, 32, 24, generator=generator, dtype=torch.float32).to(torch.bfloat16) / 5
    hidden = torch.randn(tokens, 32, generator=generator).to(torch.bfloat16)
    ids = torch.rand(tokens, 4, generator=generator).argsort(1)[:, :2].to(torch.int32)
    ids[0, 1] = -1
    scale = torch.rand(tokens, 2, generator=generator)
    out = prepare_experts(w13, w2, top_k=2, runtime=runtime)(hidden, ids, scale)
    return out, reference_layer(TINY, hidden, w13, w2, sort_slots(ids, 4), scale)


def test_a_layer_is_tuned_to_one_order_and_runs_in_it() -> None:
    plan, store = make_plan([TINY], [1, 4], HERE), MemoryStore()
    table = tune(plan, store, REGISTRY, measurer=FakeTimes(neither_is_best))
    for decision in table.decisions:
        assert (decision.up.config, decision.down.config) == (sorted_config(), sorted_config())
        assert decision.certificate == "hardware"
        assert decision.down.runner_up is not None and decision.down.runner_up["order"] == "sorted"
        assert (decision.tuned_us, decision.default_us) == pytest.approx((240.0, 270.0))
    runtime = Runtime(table, environment=HERE, registry=REGISTRY)
    slot = Runtime(replace(table, decisions=()), environment=HERE, registry=REGISTRY)
    for tokens in (1, 3, 4):
        out, exact = run_layer(runtime, tokens)
        assert runtime.lookup(TINY, tokens).hit
        torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)
        assert torch.equal(out, run_layer(slot, tokens)[0])


def test_real_measurements_pass_the_gate_and_decide_in_one_order() -> None:
    kernel = SortedTorchKernel(default_order="sorted")
    registry = Registry((kernel,))
    plan, store = make_plan([TINY], [3], HERE), MemoryStore()
    measure_plan(plan, store, registry, measurer=DeviceMeasurer(HERE, registry), strategy=Halving(rounds=1))
    assert {m.status for m in store.measurements()} == {"ok"}
    assert {m.config["order"] for m in store.measurements()} == {"slot", "sorted"}
    (decision,) = decide(plan, store, registry).decisions
    assert decision.up.config["order"] == decision.down.config["order"]
    out, exact = run_layer(Runtime(replace(decide(plan, store, registry)), environment=HERE, registry=registry), 3)
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)


def test_what_breaks_its_class_in_one_gemm_may_change_the_order_of_both() -> None:
    """The sorted up lies about its class; without it the slot order is best, for down as well."""
    kernel = SortedTorchKernel()

    class Lies(SortedTorchKernel):
        def up(self, config, hidden, weights, route, out):
            lying = config["order"] == "sorted" and route.tokens > 1
            super().up(config.with_params(variant="misclassed") if lying else config, hidden, weights, route, out)

    registry = Registry((Lies(),))
    plan, store = make_plan([LAYER], [4], HERE), MemoryStore()
    measure_plan(plan, store, registry, measurer=FakeTimes(neither_is_best))
    (decision,) = decide(plan, store, registry).decisions
    assert (decision.up.config, decision.down.config) == (kernel.config(), kernel.config())
    assert decision.certificate == "hardware"
    assert {m.gemm.name for m in store.measurements() if m.status == "unstable"} == {"up"}


def test_a_lost_device_ends_the_tuning_and_the_next_goes_on_without_the_config() -> None:
    plan, store = make_plan([TINY], [1], HERE), MemoryStore()

    def lose(batch: int) -> None:
        if batch == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    with pytest.raises(DeviceError, match=r"left the device unusable .* run tune again"):
        measure_plan(plan, store, REGISTRY, measurer=FakeTimes(neither_is_best, on_sample=lose))
    (lost,) = [m for m in store.measurements() if m.status == "runtime_error"]
    assert len(store.measurements()) == 3
    second = FakeTimes(neither_is_best)
    measure_plan(plan, store, REGISTRY, measurer=second)
    assert (lost.gemm.name, 1, lost.config) not in [(g, t, c) for g, t, c, _ in second.log]
