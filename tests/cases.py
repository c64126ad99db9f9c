"""Cases every kernel is held to, their operands, and how a result is judged."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.formats import quantize
from tilecast.kernels.reference import reference_down, reference_up
from tilecast.kernels.routing import ExpertLayout, sort_slots
from tilecast.kernels.spec import PLAIN, GemmWeights, Kernel
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

SMALL = ExpertLayer(hidden=64, intermediate=96, experts=4, top_k=2)
ODD = ExpertLayer(hidden=33, intermediate=47, experts=5, top_k=3)


@dataclass(frozen=True)
class Case:
    name: str
    layer: ExpertLayer
    tokens: int
    routing: str = "uniform"


CASES = [
    Case("zero tokens", SMALL, 0),
    Case("one token", SMALL, 1),
    Case("all to one expert", dataclasses.replace(SMALL, top_k=1), 21, "one"),
    Case("experts with none", dataclasses.replace(SMALL, experts=16, global_experts=16), 3),
    Case("odd sizes", ODD, 37),
    Case("absent slots", ODD, 19, "absent"),
    Case("nothing present", SMALL, 3, "none"),
    Case("bias", dataclasses.replace(ODD, bias=True), 18),
    Case("not gated", dataclasses.replace(SMALL, gated=False, activation="relu2"), 9),
    Case("clamped", dataclasses.replace(SMALL, activation="swiglu_oai", bias=True), 9),
    Case("gelu", dataclasses.replace(ODD, activation="gelu"), 9),
    Case("gelu by tanh", dataclasses.replace(ODD, activation="gelu_tanh", gated=False), 9),
    Case("identity", dataclasses.replace(ODD, activation="identity", gated=False, bias=True), 9),
    Case("relu", dataclasses.replace(SMALL, activation="relu"), 9),
    Case("longer than a chain", ExpertLayer(hidden=700, intermediate=513, experts=3, top_k=2), 11),
    Case("one column", ExpertLayer(hidden=1, intermediate=1, experts=1, top_k=1), 5),
]


@dataclass(frozen=True)
class Operands:
    layer: ExpertLayer
    route: ExpertLayout
    topk_weights: torch.Tensor
    up: GemmWeights
    down: GemmWeights
    hidden: torch.Tensor
    intermediate: torch.Tensor


def draw_ids(layer: ExpertLayer, tokens: int, routing: str, generator: torch.Generator) -> torch.Tensor:
    if routing == "one":
        return torch.full((tokens, layer.top_k), layer.experts - 1)
    if routing == "none":
        return torch.full((tokens, layer.top_k), -1)
    ids = torch.rand(tokens, layer.experts, generator=generator).argsort(1)[:, : layer.top_k]
    if routing == "absent":
        ids[::2, 0] = -1
        ids[1::3, 1] = layer.experts + 7
        ids[5] = -1
    return ids


def weights_of(gemm: ExpertGemm, generator: torch.Generator) -> GemmWeights:
    layer = gemm.layer
    dtype = TORCH_DTYPES[layer.dtype]
    drawn = torch.randn(layer.experts, gemm.n, gemm.k, generator=generator) / math.sqrt(gemm.k)
    data = drawn.to(dtype) if layer.weight_format == "dense" else quantize(drawn, gemm)
    bias = torch.randn(layer.experts, gemm.n, generator=generator).to(dtype) if layer.bias else None
    return GemmWeights(gemm=gemm, layout=PLAIN, data=data, bias=bias)


def operands(layer: ExpertLayer, tokens: int, routing: str = "uniform") -> Operands:
    generator = torch.Generator().manual_seed(7)
    dtype = TORCH_DTYPES[layer.dtype]
    route = sort_slots(draw_ids(layer, tokens, routing, generator), layer.experts)
    intermediate = torch.randn(tokens * layer.top_k, layer.intermediate, generator=generator).to(dtype)
    # Rows of absent slots hold garbage in real use: nothing may read them.
    present = route.slots[: int(route.offsets[-1])].long()
    poisoned = torch.full_like(intermediate, torch.nan)
    poisoned[present] = intermediate[present]
    return Operands(
        layer=layer,
        route=route,
        topk_weights=torch.rand(tokens, layer.top_k, generator=generator),
        up=weights_of(layer.up, generator),
        down=weights_of(layer.down, generator),
        hidden=torch.randn(tokens, layer.hidden, generator=generator).to(dtype),
        intermediate=poisoned,
    )


def run_up(kernel: Kernel, config: TileConfig, given: Operands, *, layout: str | None = None) -> torch.Tensor:
    """Return the up GEMM's rows in slot order, whatever order the config writes."""
    slots = given.route.tokens * given.route.top_k
    out = torch.full((slots, given.layer.intermediate), torch.nan, dtype=given.hidden.dtype)
    packed = kernel.pack(given.up, layout or kernel.layout(given.layer.up, config))
    kernel.up(config, given.hidden, packed, given.route, out)
    if kernel.order(given.layer.up, config) == "slot":
        return out
    present = given.route.slots[: int(given.route.offsets[-1])].long()
    assert torch.isnan(out[len(present) :]).all(), "rows past the present slots were written"
    by_slot = torch.full_like(out, torch.nan)
    by_slot[present] = out[: len(present)]
    return by_slot


def run_down(
    kernel: Kernel,
    config: TileConfig,
    given: Operands,
    out_dtype: torch.dtype | None = None,
    *,
    layout: str | None = None,
) -> torch.Tensor:
    out = torch.full((given.route.tokens, given.layer.hidden), torch.nan, dtype=out_dtype or given.hidden.dtype)
    packed = kernel.pack(given.down, layout or kernel.layout(given.layer.down, config))
    rows = given.intermediate
    if kernel.order(given.layer.down, config) == "sorted":
        present = given.route.slots[: int(given.route.offsets[-1])].long()
        rows = torch.full_like(rows, torch.nan)
        rows[: len(present)] = given.intermediate[present]
    kernel.down(config, rows, packed, given.route, given.topk_weights, out)
    return out


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the root-mean-square error relative to the exact result's; 0 for nothing."""
    if exact.numel() == 0:
        return 0.0
    scale = exact.square().mean().sqrt().clamp(min=1e-30)
    return float((result.double() - exact).square().mean().sqrt() / scale)


def assert_as_good_as_torch(result: torch.Tensor, exact: torch.Tensor, same_dtype: torch.Tensor) -> None:
    assert torch.isfinite(result).all()
    # Two float32 roundings of slack, for the cases in which torch's own error is zero.
    assert error(result, exact) <= 2 * error(same_dtype, exact) + 2**-22


def assert_both_gemms(
    kernel: Kernel, config: TileConfig, given: Operands, *, down: TileConfig | None = None, layout: str | None = None
) -> None:
    """Hold both GEMMs to the float64 oracle, absent rows to their poison; `down` is its config, if another one."""
    layer, dtype = given.layer, given.hidden.dtype
    present = given.route.slots[: int(given.route.offsets[-1])].long()
    absent = torch.ones(given.route.tokens * layer.top_k, dtype=torch.bool)
    absent[present] = False
    up = (layer, given.hidden, given.up.data, given.route, given.up.bias)
    result = run_up(kernel, config, given, layout=layout)
    assert_as_good_as_torch(result[present], reference_up(*up)[present], reference_up(*up, dtype)[present])
    assert torch.isnan(result[absent]).all(), "rows of absent slots were written"
    expected = (layer, given.intermediate, given.down.data, given.route, given.topk_weights, given.down.bias)
    result = run_down(kernel, down or config, given, layout=layout)
    assert_as_good_as_torch(result, reference_down(*expected), reference_down(*expected, dtype))
