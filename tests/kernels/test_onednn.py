"""`onednn.linear` against the float64 oracle, its reasons, and what it must not let in."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

from tilecast.environment import Environment, cpu_environment
from tilecast.errors import ConfigError, DeviceError
from tilecast.kernels.cpu.onednn import KERNEL, ONEDNN, cannot_prepack_here
from tilecast.kernels.reference import reference_down, reference_up
from tilecast.kernels.routing import ExpertLayout, sort_slots
from tilecast.kernels.spec import PLAIN, TORCH_DTYPES, GemmWeights, Kernel, numerics_class
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
    data = (torch.randn(layer.experts, gemm.n, gemm.k, generator=generator) / math.sqrt(gemm.k)).to(dtype)
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


def config_of(prepack: str = "no", row_block: int = 0) -> TileConfig:
    return TileConfig(KERNEL.name, {"prepack": prepack, "row_block": row_block})


def run_up(config: TileConfig, given: Operands) -> torch.Tensor:
    slots = given.route.tokens * given.route.top_k
    out = torch.full((slots, given.layer.intermediate), torch.nan, dtype=given.hidden.dtype)
    KERNEL.up(config, given.hidden, KERNEL.pack(given.up, KERNEL.layout(given.layer.up, config)), given.route, out)
    return out


def run_down(config: TileConfig, given: Operands, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    out = torch.full((given.route.tokens, given.layer.hidden), torch.nan, dtype=out_dtype or given.hidden.dtype)
    packed = KERNEL.pack(given.down, KERNEL.layout(given.layer.down, config))
    KERNEL.down(config, given.intermediate, packed, given.route, given.topk_weights, out)
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


def usable_configs(layer: ExpertLayer) -> list[TileConfig]:
    everything = [config_of(prepack, block) for prepack in ("no", "yes") for block in (0, 1, 4, 16)]
    return [config for config in everything if KERNEL.invalid(layer.up, config, cpu_environment()) is None]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_gemms_are_as_exact_as_torch(case: Case, dtype: str) -> None:
    layer = dataclasses.replace(case.layer, dtype=dtype)
    given = operands(layer, case.tokens, case.routing)
    torch_dtype = TORCH_DTYPES[dtype]
    present = given.route.slots[: int(given.route.offsets[-1])].long()
    absent = torch.ones(case.tokens * layer.top_k, dtype=torch.bool)
    absent[present] = False
    exact_up = reference_up(layer, given.hidden, given.up.data, given.route, given.up.bias)
    torch_up = reference_up(layer, given.hidden, given.up.data, given.route, given.up.bias, torch_dtype)
    down = (layer, given.intermediate, given.down.data, given.route, given.topk_weights, given.down.bias)
    exact_down, torch_down = reference_down(*down), reference_down(*down, torch_dtype)
    for config in usable_configs(layer):
        result = run_up(config, given)
        assert_as_good_as_torch(result[present], exact_up[present], torch_up[present])
        assert torch.isnan(result[absent]).all(), "rows of absent slots were written"
        assert_as_good_as_torch(run_down(config, given), exact_down, torch_down)


def test_partial_sum_in_float32_is_not_rounded() -> None:
    given = operands(dataclasses.replace(ODD, dtype="bf16"), 11)
    partial = run_down(config_of(), given, out_dtype=torch.float32)
    assert not torch.equal(partial, partial.bfloat16().float())
    assert torch.equal(partial.bfloat16(), run_down(config_of(), given))


def test_padding_rows_do_not_reach_real_rows() -> None:
    """With an infinite weight a zero padding row turns into NaN; real rows with it must stay their own."""
    given = operands(dataclasses.replace(SMALL, dtype="fp32", activation="relu"), 3)
    given.up.data[:, 0, 0] = torch.inf
    plain, padded = run_up(config_of(), given), run_up(config_of(row_block=16), given)
    assert torch.equal(plain.isfinite(), padded.isfinite())
    columns = torch.arange(SMALL.intermediate) > 0
    assert padded[:, columns].isfinite().all()


def test_weights_that_need_gradients_leave_no_graph() -> None:
    given = operands(dataclasses.replace(SMALL, dtype="fp32"), 4)
    given.up.data.requires_grad_(True)
    assert not run_up(config_of(), given).requires_grad


def test_autocast_and_narrow_float32_do_not_change_bits() -> None:
    given = operands(dataclasses.replace(SMALL, dtype="fp32"), 8)
    expected = run_up(config_of(), given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run_up(config_of(), given), expected)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(run_up(config_of(), given), expected)
        assert torch.get_float32_matmul_precision() == "medium", "the caller's setting was not put back"
    finally:
        torch.set_float32_matmul_precision(before)


def environment_with(**changes: object) -> Environment:
    base = Environment(
        device_kind="cpu", device="some CPU", arch="x86_64", features="avx2,f16c,fma", units=2, llc_bytes=1 << 25,
        kernel_source="0" * 64, torch="2.13.0", compiler="0.50.0", threads=2,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "features", "missing"),
    [
        ("fp32", "avx2", None),
        ("bf16", "avx2,fma", "avx512bw and avx512vl"),
        ("bf16", "avx512bw,avx512f,avx512vl", None),
        ("fp16", "avx512_bf16,avx512bw,avx512vl", "avx512_fp16"),
        ("fp16", "avx512_fp16", None),
    ],
)
def test_prepacking_is_refused_by_feature(dtype: str, features: str, missing: str | None) -> None:
    gemm = dataclasses.replace(SMALL, dtype=dtype).up
    environment = environment_with(features=features)
    reason = KERNEL.invalid(gemm, config_of("yes"), environment)
    assert (reason is None) if missing is None else (reason is not None and missing in reason)
    assert KERNEL.invalid(gemm, config_of("no"), environment) is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_packing_agrees_with_what_is_said_about_this_machine(dtype: str) -> None:
    """A config that is called valid here packs; one that is refused ends in a DeviceError, never a crash."""
    given = operands(dataclasses.replace(SMALL, dtype=dtype), 2)
    if KERNEL.invalid(given.layer.up, config_of("yes"), cpu_environment()) is None:
        packed = KERNEL.pack(given.up, ONEDNN)
        assert packed.layout == ONEDNN and len(packed.data) == SMALL.experts
    else:
        with pytest.raises(DeviceError, match="prepack=no"):
            KERNEL.pack(given.up, ONEDNN)


def test_prepacking_float32_works_wherever_onednn_does() -> None:
    assert (cannot_prepack_here("fp32") is None) == torch.backends.mkldnn.is_available()


def test_packing_leaves_the_plain_weights_as_they_were() -> None:
    given = operands(dataclasses.replace(SMALL, dtype="fp32"), 2)
    before = given.up.data.clone()
    assert KERNEL.pack(given.up, PLAIN) is given.up
    KERNEL.pack(given.up, ONEDNN)
    assert torch.equal(given.up.data, before)


def test_wrong_layouts_are_errors() -> None:
    given = operands(dataclasses.replace(SMALL, dtype="fp32"), 2)
    with pytest.raises(ConfigError, match="no weight layout 'panels'"):
        KERNEL.pack(given.up, "panels")
    packed = KERNEL.pack(given.up, ONEDNN)
    with pytest.raises(ConfigError, match="packs plain weights"):
        KERNEL.pack(packed, ONEDNN)
    out = torch.empty(4, SMALL.intermediate)
    with pytest.raises(ConfigError, match="reads layout 'plain'"):
        KERNEL.up(config_of(), given.hidden, packed, given.route, out)


@pytest.mark.parametrize(
    "params",
    [
        {"prepack": "no"},
        {"prepack": "maybe", "row_block": 0},
        {"prepack": "no", "row_block": 3},
        {"prepack": "no", "row_block": 0, "threads": 2},
    ],
)
def test_parameters_outside_the_domain_have_a_reason(params: dict[str, int | str]) -> None:
    assert KERNEL.invalid(SMALL.up, TileConfig(KERNEL.name, params), cpu_environment())


def test_other_devices_are_rejected() -> None:
    assert KERNEL.rejects(SMALL.up, environment_with()) is None
    assert "cuda" in str(KERNEL.rejects(SMALL.up, environment_with(device_kind="cuda")))


@pytest.mark.parametrize("tokens", [1, 16, 256, 8192])
def test_space_is_ordered_unique_and_inside_the_domain(tokens: int) -> None:
    environment = environment_with(features="avx512bw,avx512vl")
    found = list(KERNEL.space(SMALL.up, tokens, environment))
    assert found == list(KERNEL.space(SMALL.up, tokens, environment))
    assert len(set(found)) == len(found)
    assert KERNEL.default(SMALL.up, tokens, environment) in found
    assert all(KERNEL.invalid(SMALL.up, config, environment) is None for config in found)


def test_default_like_keeps_layout_and_class() -> None:
    kernel: Kernel = KERNEL
    environment = cpu_environment()
    like = config_of("yes", 16)
    assert kernel.default(SMALL.up, 64, environment, like=like) == like
    assert kernel.default(SMALL.up, 64, environment, like=TileConfig("other.kernel")) == config_of()


def test_every_config_and_shape_is_a_class_of_its_own_and_claims_no_invariance() -> None:
    environment = cpu_environment()
    gemms = [SMALL.up, SMALL.down, ODD.up, dataclasses.replace(SMALL, dtype="fp32").up]
    configs = [config_of(prepack, block) for prepack in ("no", "yes") for block in (0, 4)]
    classes = {numerics_class(KERNEL, gemm, config, environment) for gemm in gemms for config in configs}
    assert len(classes) == len(gemms) * len(configs)
    assert not any(KERNEL.batch_invariant(gemm, config) for gemm in gemms for config in configs)
