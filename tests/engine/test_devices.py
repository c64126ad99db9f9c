"""One process, several kinds of device: a runtime for each over one table; kernels that stand in for each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.engine.tables import LAYER, decided, default_config, inputs, weights
from tests.fake_gpus import H200, L40S, Gpus, fresh
from tests.torch_kernel import SortedTorchKernel, TorchKernel
from tilecast.cache_store.bundle import export_table
from tilecast.engine import runtime
from tilecast.engine.agreement import startup
from tilecast.engine.experts import prepare_experts
from tilecast.engine.functional import fused_experts
from tilecast.engine.group import Group
from tilecast.engine.operands import check_device
from tilecast.engine.runtime import use_table
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import Environment, cpu_environment, cuda_environment
from tilecast.errors import ConfigError, CoverageError, DeviceError
from tilecast.evidence import TuningTable
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig
from tilecast.settings import Settings

__all__ = ["fresh"]

HERE = cpu_environment()


@pytest.fixture
def gpus(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """A machine with two different GPUs."""
    return Gpus(monkeypatch, H200, L40S)


def registry() -> Registry:
    kernel = TorchKernel(name="gpu.moe_gemm")
    kernel.device_kind = "cuda"
    return Registry((MoeGemm(), kernel))


def decided_on_gpu(environment: Environment | None = None) -> TuningTable:
    config = TorchKernel(name="gpu.moe_gemm").config(row_block=16)
    return decided(LAYER, environment=environment or cuda_environment(), choose=lambda gemm, tokens: config)


def test_a_gpu_is_the_main_device_and_the_cpu_has_its_own_runtime(gpus: Gpus) -> None:
    main = use_table(None, registry=registry())
    assert main is runtime.current() is runtime.current("cuda")
    assert main.environment == cuda_environment() and runtime.current("cpu").environment == HERE
    assert runtime.current("cpu") is runtime.current("cpu")
    w, operands = weights(LAYER), inputs(LAYER, 3)
    prepared = prepare_experts(w.w13, w.w2, top_k=2)
    assert prepared.runtime is runtime.current("cpu")
    assert torch.equal(prepared(*operands), fused_experts(operands[0], w.w13, w.w2, *operands[1:]))
    runtime.lookup(LAYER, 9)
    assert [(m.tokens, m.count) for m in runtime.misses()] == [(3, 2), (9, 1)]


def test_each_device_sees_its_own_decisions(gpus: Gpus) -> None:
    table = decided_on_gpu().merged(decided(LAYER, tokens=(2,)))
    assert use_table(table, registry=registry()).environment.device_kind == "cuda"
    assert [b.tokens for b in runtime.current("cuda").buckets(LAYER)] == [1, 4, 16]
    assert [b.tokens for b in runtime.current("cpu").buckets(LAYER)] == [2]
    assert runtime.current("cpu").lookup(LAYER, 1).up == default_config(LAYER.up, 2)
    assert runtime.current("cuda").lookup(LAYER, 1).up["row_block"] == 16


def test_a_table_for_the_cpu_alone_serves_the_cpu(gpus: Gpus) -> None:
    assert use_table(decided(LAYER), registry=registry(), miss="error").environment == HERE
    assert runtime.lookup(LAYER, 1).hit
    with pytest.raises(CoverageError, match=f"{LAYER.label} is decided for other devices only, not for NVIDIA H200"):
        runtime.current("cuda").lookup(LAYER, 1)


def test_a_table_that_fits_no_device_here_is_refused(gpus: Gpus) -> None:
    table = decided_on_gpu(cuda_environment(1))
    with pytest.raises(CoverageError, match="device: here 'NVIDIA H200', there 'NVIDIA L40S'"):
        use_table(table, registry=registry())
    gpus.devices = ()
    with pytest.raises(CoverageError, match="device_kind: here 'cpu', there 'cuda'"):
        use_table(table, registry=registry())


def test_decisions_for_another_cpu_are_refused_when_the_cpu_is_asked_for(gpus: Gpus) -> None:
    elsewhere = decided(LAYER, environment=replace(HERE, device="another CPU"))
    assert use_table(decided_on_gpu().merged(elsewhere), registry=registry()).lookup(LAYER, 1).hit
    with pytest.raises(CoverageError, match="there 'another CPU'"):
        runtime.current("cpu")


def test_kinds_of_device_that_are_not_here() -> None:
    use_table(None)
    with pytest.raises(DeviceError, match="torch sees no GPU"):
        runtime.current("cuda")
    w = weights(LAYER)
    with pytest.raises(DeviceError, match="no kernel runs on meta"):
        prepare_experts(w.w13.to("meta"), w.w2.to("meta"), top_k=2)


def test_weights_on_another_gpu_must_be_on_an_equal_one(gpus: Gpus) -> None:
    here = use_table(None, registry=registry())
    on: list[torch.Tensor] = [SimpleNamespace(device=torch.device("cuda", i)) for i in range(2)]  # type: ignore[misc]
    check_device(on[0], here)
    with pytest.raises(DeviceError, match=r"on cuda:1, a NVIDIA L40S \(sm_89\).*NVIDIA H200 \(sm_90\)"):
        check_device(on[1], here)
    with pytest.raises(DeviceError, match="on cpu, but the table in use is for cuda"):
        check_device(weights(LAYER).w13, here)
    with pytest.raises(DeviceError, match="on cuda:0, but the table in use is for cpu"):
        check_device(on[0], runtime.current("cpu"))


def test_starting_on_a_gpu(gpus: Gpus, tmp_path: Path) -> None:
    def start(table: TuningTable) -> Runtime:
        path = tmp_path / "table.db"
        export_table(table, path)
        settings = Settings(cache_dir=tmp_path, import_from=str(path))
        return startup([LAYER], settings, group=Group.alone(), registry=registry())

    assert start(decided_on_gpu()).environment == cuda_environment()
    assert start(decided(LAYER)).environment == HERE
    assert start(decided_on_gpu().merged(decided(LAYER))).environment == cuda_environment()
    assert runtime.current("cpu").lookup(LAYER, 1).hit


# Kernels that stand in for each other, and the order of the intermediate --------------------------------------


def test_up_and_down_of_an_entry_must_take_the_same_order() -> None:
    kernel = SortedTorchKernel()

    def choose(gemm: ExpertGemm, tokens: int) -> TileConfig:
        return kernel.config(order="sorted" if gemm.name == "down" and tokens == 4 else "slot")

    with pytest.raises(ConfigError, match=r"2–4 tokens, reproducible, down: it reads .* sorted order, but up .* slot"):
        Runtime(decided(LAYER, choose=choose), environment=HERE, registry=Registry((kernel,)))


def test_defaults_that_do_not_go_together_give_way_to_configs_that_do() -> None:
    class Uneven(SortedTorchKernel):
        """Prefers another order for `up` than for `down`."""

        def default(self, gemm, tokens, environment, like=None):
            config = super().default(gemm, tokens, environment, like)
            return config.with_params(order="sorted" if gemm.name == "up" else "slot")

    here = Runtime(TuningTable(), environment=HERE, registry=Registry((Uneven(),)))
    w, operands = weights(LAYER), inputs(LAYER, 5)
    out = prepare_experts(w.w13, w.w2, top_k=2, runtime=here)(*operands)
    entry = here.lookup(LAYER, 5)
    assert entry.up["order"] == entry.down["order"] == "sorted"
    even = Runtime(TuningTable(), environment=HERE, registry=Registry((SortedTorchKernel(),)))
    assert torch.equal(out, prepare_experts(w.w13, w.w2, top_k=2, runtime=even)(*operands))

    class Stuck(Uneven):
        def space(self, gemm, tokens, environment):
            return iter(())

    with pytest.raises(ConfigError, match=r"in sorted order, .* reads it in slot order"):
        Runtime(TuningTable(), environment=HERE, registry=Registry((Stuck(),))).lookup(LAYER, 5)


def test_a_default_may_be_another_kernels() -> None:
    class Few(TorchKernel):
        def __init__(self) -> None:
            super().__init__(name="few.moe_gemm")

        def invalid(self, gemm, config, environment):
            return "it has no such parameter" if config["row_block"] else None

        def default(self, gemm, tokens, environment, like=None):
            if tokens > 2:
                return many.default(gemm, tokens, environment, like)
            return super().default(gemm, tokens, environment, like)

    class Many(TorchKernel):
        def default(self, gemm, tokens, environment, like=None):
            if tokens <= 2:
                return few.default(gemm, tokens, environment, like)
            return super().default(gemm, tokens, environment, like)

        def numerics(self, gemm, config, environment):
            return few.numerics(gemm, config, environment)

    few, many = Few(), Many()
    here = Runtime(TuningTable(), environment=HERE, registry=Registry((many, few)))
    w, operands = weights(LAYER), inputs(LAYER, 20)
    prepared = prepare_experts(w.w13, w.w2, top_k=2, runtime=here)
    whole = prepared(*operands)
    alone = torch.cat([prepared(*(tensor[row : row + 1] for tensor in operands)) for row in range(20)])
    assert torch.equal(alone, whole)
    assert few.launches == 40 and many.launches == 2
    assert here.anchor(LAYER).up_kernel is few and here.lookup(LAYER, 20).up_kernel is many
