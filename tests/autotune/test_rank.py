"""The cost model: what makes a launch slower in reality makes its prediction slower."""

from dataclasses import replace

import pytest

from tests.autotune.shared import HERE
from tests.cases import SMALL
from tests.torch_kernel import TorchKernel
from tilecast.autotune.calibrate import Calibration, device_key, nominal
from tilecast.autotune.prescreen import prescreen
from tilecast.autotune.rank import CostModel, ModelRanker
from tilecast.engine.runtime import default_registry
from tilecast.environment import cpu_environment
from tilecast.kernels.cpu.sparse import NAME as SPARSE
from tilecast.kernels.gpu.target import parse_target
from tilecast.kernels.spec import Registry
from tilecast.kernels.work import Predictable, Work
from tilecast.problem import ExpertLayer, TileConfig

HERE_TWO = replace(HERE, threads=2)
LAYER = ExpertLayer(hidden=2048, intermediate=1024, experts=8, top_k=2, dtype="fp32")
CALIBRATION = Calibration(
    device=device_key(HERE_TWO), memory_bytes_s=10e9, cache_bytes_s=100e9, flops_s={"fma": 100e9, "library_fp32": 80e9},
    launch_us=5.0, program_us=0.3, latency_us=0.1,
)  # fmt: skip
WORK = Work(
    weight_bytes=10e6, row_bytes=0, out_bytes=0, flops=1e6, useful_flops=1e6, programs=100, path="fma", largest=0.01
)


def test_reading_and_computing_hide_behind_each_other_as_far_as_said() -> None:
    model = CostModel(HERE_TWO, CALIBRATION)
    both = replace(WORK, flops=50e6)
    hidden, exposed = model.work_us(both), model.work_us(replace(both, overlap=0.0))
    assert exposed - hidden == pytest.approx(500 * 1.005)
    assert hidden == pytest.approx(5 + 100 * 0.3 / 2 + 1000 * 1.005)


def test_slower_devices_and_less_efficient_tiles_take_longer() -> None:
    model = CostModel(HERE_TWO, CALIBRATION)
    base = model.work_us(WORK)
    slower = CostModel(HERE_TWO, replace(CALIBRATION, memory_bytes_s=5e9)).work_us(WORK)
    assert slower == pytest.approx(2 * base, rel=0.03)
    compute = replace(WORK, flops=1e9)
    assert model.work_us(replace(compute, efficiency=0.5)) == pytest.approx(2 * model.work_us(compute), rel=0.01)
    assert model.work_us(WORK, threads=1) > base
    # One job on two threads is one thread's work.
    assert model.work_us(replace(compute, largest=1.0, programs=1)) == pytest.approx(2e4, rel=0.1)


def test_a_last_wave_costs_a_full_one() -> None:
    environment = parse_target("cuda:90").environment()
    model = CostModel(environment, nominal(environment))
    full = replace(WORK, weight_bytes=0, flops=1e12, path="tensor", programs=132, largest=1 / 132)
    over = replace(full, programs=133, flops=1e12 * 133 / 132)
    assert model.work_us(over) == pytest.approx(2 * model.work_us(full), rel=0.02)
    waiting = replace(full, flops=1.0, latency_steps=1000.0)
    assert model.work_us(replace(waiting, resident=2, programs=264)) == pytest.approx(model.work_us(waiting), rel=0.02)


def test_a_kernel_that_cannot_tell_is_ranked_in_the_middle() -> None:
    kernel = TorchKernel()
    assert not isinstance(kernel, Predictable)
    registry = Registry((*default_registry(), kernel))
    unknown = kernel.default(LAYER.up, 8, HERE_TWO)
    environment = cpu_environment()
    model = CostModel(environment, replace(CALIBRATION, device=device_key(environment)))
    known = [c.config for c in prescreen(LAYER.up, 8, environment, default_registry()).candidates]
    assert model.predict_us(LAYER.up, 8, unknown, kernel) is None
    ranked = list(model.rank(LAYER.up, 8, [*known, unknown], registry))
    assert abs(ranked.index(unknown) - len(known) / 2) <= 1 + len(known) % 2
    assert model.rank(LAYER.up, 8, [unknown], registry) == {unknown: 1.0}
    assert set(ModelRanker(model, registry).rank(LAYER.up, 8, [*known, unknown])) == set(known)


def test_a_ranker_predicts_for_its_profile() -> None:
    environment, registry = cpu_environment(), default_registry()
    model = CostModel(environment, CALIBRATION)
    layer = replace(LAYER, experts=64, global_experts=64)
    config = registry.default_kernel(layer.up, environment).default(layer.up, 8, environment)
    uniform, skewed = (ModelRanker(model, registry, name).rank(layer.up, 8, [config]) for name in ("uniform", "zipf:2"))
    assert skewed[config] < uniform[config], "fewer experts are read"


def test_dead_neurons_make_the_sparse_kernel_faster_and_no_other() -> None:
    environment, registry = cpu_environment(), default_registry()
    model = CostModel(environment, CALIBRATION)
    layer = replace(LAYER, activation="relu")
    for gemm in layer.gemms:
        configs = {name: registry[name].default(gemm, 1, environment) for name in ("llvm.moe_gemm", SPARSE)}
        alive, dead = (
            ModelRanker(model, registry, f"uniform+sparsity:{share}").rank(gemm, 1, list(configs.values()))
            for share in ("0.1", "0.95")
        )
        dense, sparse = configs.values()
        assert dead[dense] == alive[dense] and dead[sparse] < 0.75 * alive[sparse]
        assert dead[sparse] < dead[dense]


def test_ranking_is_ascending_and_does_not_depend_on_the_order_asked() -> None:
    environment, registry = cpu_environment(), default_registry()
    model = CostModel(environment, CALIBRATION)
    configs = [c.config for c in prescreen(LAYER.up, 8, environment, registry).candidates]
    ranked = model.rank(LAYER.up, 8, configs, registry)
    assert list(ranked.values()) == sorted(ranked.values())
    assert list(ranked) == list(CostModel(environment, CALIBRATION).rank(LAYER.up, 8, configs[::-1], registry))
    assert set(ranked) == set(configs)


def test_more_tokens_and_more_active_experts_take_longer() -> None:
    environment, registry = cpu_environment(), default_registry()
    model = CostModel(environment, CALIBRATION)
    kernel = registry.default_kernel(LAYER.up, environment)
    config = kernel.default(LAYER.up, 16, environment)

    def predicted(tokens: int) -> float:
        value = model.predict_us(LAYER.up, tokens, config, kernel)
        assert value is not None
        return value

    assert predicted(1) < predicted(16) < predicted(256) < predicted(1024)
    one, eight = (model.predict_us(LAYER.up, 4, config, kernel, counts=[counts]) for counts in ([8, *[0] * 7], [1] * 8))
    assert one is not None and eight is not None and one < eight


def test_counts_are_those_of_the_profile_and_always_the_same() -> None:
    model = CostModel(HERE_TWO, CALIBRATION)
    uniform, skewed = (model.counts(SMALL, 64, routing) for routing in ("uniform", "zipf:1.5"))
    assert uniform == CostModel(HERE_TWO, CALIBRATION).counts(SMALL, 64)
    assert all(sum(counts) == 128 for counts in (*uniform, *skewed))
    assert max(map(max, skewed)) > max(map(max, uniform))


def test_threads_of_a_config_bound_what_it_uses() -> None:
    environment, registry = replace(cpu_environment(), threads=2), default_registry()
    model = CostModel(environment, CALIBRATION)
    kernel = registry["llvm.moe_gemm"]
    config: TileConfig = kernel.default(LAYER.up, 64, environment)
    one, two = (model.predict_us(LAYER.up, 64, config.with_params(threads=n), kernel) for n in (1, 2))
    assert one is not None and two is not None and one > 1.3 * two
