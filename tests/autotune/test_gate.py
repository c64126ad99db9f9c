from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.autotune.shared import HERE, LAYER
from tests.torch_kernel import TorchKernel
from tilecast.autotune import gate as module
from tilecast.autotune.gate import Gate, error_ratio
from tilecast.autotune.workload import Workload
from tilecast.problem import ExpertLayer

LAYERS = [
    LAYER,
    replace(LAYER, dtype="fp32"),
    replace(LAYER, dtype="fp16", bias=True, activation="swiglu_oai"),
    replace(LAYER, gated=False, activation="relu2"),
    replace(LAYER, hidden=33, intermediate=47, top_k=1),
    replace(LAYER, experts=2, global_experts=8, top_k=3),
    replace(LAYER, experts=16, global_experts=16, top_k=8),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.label)
@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
def test_sound_configs_pass(layer: ExpertLayer, tokens: int) -> None:
    kernel = TorchKernel()
    gate = Gate(Workload(HERE))
    for gemm in layer.gemms:
        for config in (kernel.config(), kernel.config(layout="transposed"), kernel.config(variant="matmul")):
            verdict = gate.check(gemm, tokens, config, kernel)
            assert (verdict.status, verdict.detail) == ("ok", "")
            assert verdict.error_ratio is not None and verdict.error_ratio <= 2


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("variant", ["zeros", "off_by_one"])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["up", "down"])
def test_wrong_values_are_caught(dtype: str, variant: str, tokens: int, name: str) -> None:
    kernel = TorchKernel(variant)
    layer = replace(LAYER, dtype=dtype)
    gemm = layer.up if name == "up" else layer.down
    verdict = Gate(Workload(HERE)).check(gemm, tokens, kernel.config(variant=variant), kernel)
    assert verdict.status == "wrong_result"
    assert verdict.error_ratio is not None and verdict.error_ratio > 2
    assert "times that of torch" in verdict.detail


@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_rows_left_unwritten_are_caught(name: str, tokens: int) -> None:
    kernel = TorchKernel("unwritten")
    gemm = LAYER.up if name == "up" else LAYER.down
    verdict = Gate(Workload(HERE)).check(gemm, tokens, kernel.config(variant="unwritten"), kernel)
    assert verdict.status == "wrong_result"
    assert "not written" in verdict.detail


def test_writing_rows_of_absent_slots_is_caught() -> None:
    kernel = TorchKernel("overwrites")
    verdict = Gate(Workload(HERE)).check(LAYER.up, 40, kernel.config(variant="overwrites"), kernel)
    assert verdict.status == "wrong_result"
    assert "absent" in verdict.detail


def test_reading_rows_of_absent_slots_is_caught() -> None:
    class Reads(TorchKernel):
        """Multiplies absent slots by zero instead of leaving them out."""

        def down(self, config, intermediate, weights, route, topk_weights, out):
            super().down(config, intermediate, weights, route, topk_weights, out)
            absent = (route.ids < 0).flatten()
            touched = intermediate.float().sum(1) * 0 * absent
            out += touched.view(route.tokens, route.top_k).sum(1, keepdim=True).to(out.dtype)

    kernel = Reads()
    verdict = Gate(Workload(HERE)).check(LAYER.down, 8, kernel.config(), kernel)
    assert verdict.status == "wrong_result"


def test_what_a_kernel_raises_passes_through() -> None:
    kernel = TorchKernel("raises")
    with pytest.raises(RuntimeError, match="planted"):
        Gate(Workload(HERE)).check(LAYER.up, 4, kernel.config(variant="raises"), kernel)


def test_one_wrong_element_among_many_is_seen() -> None:
    exact = torch.randn(64, 4096, dtype=torch.float64)
    as_torch = exact.to(torch.bfloat16).double()
    good = exact.to(torch.bfloat16)
    assert error_ratio(good, exact, as_torch, 4096) < 1.1
    good[17, 300] += 1
    assert error_ratio(good, exact, as_torch, 4096) > 2


def test_a_small_error_everywhere_is_seen() -> None:
    exact = torch.randn(64, 4096, dtype=torch.float64)
    as_torch = exact.to(torch.bfloat16).double()
    drifted = (exact + 0.01).to(torch.bfloat16)
    assert error_ratio(drifted, exact, as_torch, 4096) > 2


def test_a_float32_chain_is_not_blamed_for_its_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 4096, generator=generator)
    weight = torch.randn(4096, 64, generator=generator) / 64
    chain = torch.zeros(4, 64)
    for k in range(4096):
        chain = chain + rows[:, k : k + 1] * weight[k]
    exact = rows.double() @ weight.double()
    assert error_ratio(chain, exact, (rows @ weight).double(), 4096) < 2
    # Half-precision accumulation, on the other hand, is an error.
    assert error_ratio((rows.half() @ weight.half()).float(), exact, (rows @ weight).double(), 4096) > 2


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.label)
def test_the_oracle_says_the_same_of_several_counts_at_once(
    layer: ExpertLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = (1, 3, 40)
    asked = {"reference_up": 0, "reference_down": 0}
    for name in asked:
        real = getattr(module, name)

        def counted(*arguments: object, name: str = name, real: Callable[..., torch.Tensor] = real) -> torch.Tensor:
            asked[name] += 1
            return real(*arguments)

        monkeypatch.setattr(module, name, counted)
    kernel = TorchKernel()
    for gemm in layer.gemms:
        alone, together = Gate(Workload(HERE)), Gate(Workload(HERE), counts)
        own = {tokens: alone._expected(gemm, tokens, "") for tokens in counts}
        before = dict(asked)
        for tokens in counts:
            assert together.check(gemm, tokens, kernel.config(), kernel).status == "ok"
            for (exact, _), (other, _) in zip(own[tokens], together._expected(gemm, tokens, ""), strict=True):
                torch.testing.assert_close(exact, other, rtol=1e-12, atol=1e-12)
        assert sum(asked.values()) == sum(before.values()) + 2, "once in float64, once in the layer's dtype"
