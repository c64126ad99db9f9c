"""`llvm.moe_gemm` on quantised weights: as exact as torch on what they stand for, one class a format."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.cases import Operands, assert_as_good_as_torch, error, operands, run_down, run_up
from tilecast.environment import cpu_environment
from tilecast.errors import InputError
from tilecast.kernels.cpu.isa import CROSS, host_isa
from tilecast.kernels.cpu.jit import compile_assembly
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.quantized import PanelStack
from tilecast.kernels.cpu.tiles import takes_shorts
from tilecast.kernels.cpu.work import variant_of
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.formats import QuantizedStack, quantize
from tilecast.kernels.reference import reference_down, reference_up
from tilecast.kernels.routing import sort_slots
from tilecast.kernels.spec import PLAIN, GemmWeights, numerics_class, outside_domain
from tilecast.problem import WEIGHT_FORMATS, ExpertGemm, ExpertLayer, TileConfig, weight_format

KERNEL = MoeGemm()
HERE = cpu_environment()
FORMATS = [name for name in WEIGHT_FORMATS if name != "dense"]
FEW = ("awq_g64", "fp8_block128")
WHOLE = ("awq_g64", "int4_g32", "int8_g128", "int8_channel")
"""Formats whose codes are integers."""
KINDS = ["awq_g64", "int4_g32", "int8_g128", "int8_channel", "fp8_block128", "fp8_channel", "fp8_tensor"]


def layer_of(form: str, **changes: object) -> ExpertLayer:
    """A layer with sizes as odd as its format lets them be."""
    unit = weight_format(form).group if "fp8" not in form else 0
    sizes = (2 * unit, unit) if unit else (333, 147)
    base = ExpertLayer(hidden=sizes[0], intermediate=sizes[1], experts=3, top_k=2, weight_format=form)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def default(layer: ExpertLayer, tokens: int, dot: str = "", kernel: MoeGemm = KERNEL) -> TileConfig:
    """The default config, or the one of a class."""
    found = kernel.default(layer.up, tokens, HERE)
    return kernel.default(layer.up, tokens, HERE, like=found.with_params(dot=dot)) if dot else found


def quantized(layer: ExpertLayer, tokens: int, routing: str = "") -> Operands:
    """Operands with codes of all sizes and scales that differ by more than a factor of two."""
    routing = routing or ("absent" if tokens > 5 else "uniform")
    given = operands(dataclasses.replace(layer, weight_format="dense"), tokens, routing)

    def stack(weights: GemmWeights, gemm: ExpertGemm) -> GemmWeights:
        data = quantize(weights.data.to(torch.float32), gemm)
        spread = torch.rand(data.scales.shape, generator=torch.Generator().manual_seed(4)) + 0.5
        data = dataclasses.replace(data, scales=(data.scales.to(torch.float32) * spread).to(data.scales.dtype))
        return GemmWeights(gemm=gemm, layout=PLAIN, data=data, bias=weights.bias)

    return dataclasses.replace(given, layer=layer, up=stack(given.up, layer.up), down=stack(given.down, layer.down))


def dense(weights: GemmWeights) -> torch.Tensor:
    stack: QuantizedStack = weights.data
    return torch.stack([stack.dequantized(weights.gemm, expert) for expert in range(weights.gemm.layer.experts)])


def assert_both(config: TileConfig, given: Operands, kernel: MoeGemm = KERNEL) -> None:
    """Hold both GEMMs to float64 on the dequantised weights, as the dense ones are held."""
    layer, dtype = given.layer, given.hidden.dtype
    present = given.route.slots[: int(given.route.offsets[-1])].long()
    absent = torch.ones(given.route.tokens * layer.top_k, dtype=torch.bool)
    absent[present] = False
    up = (layer, given.hidden, dense(given.up), given.route, given.up.bias)
    down = (layer, given.intermediate, dense(given.down), given.route, given.topk_weights, given.down.bias)
    result = run_up(kernel, config, given)
    assert_as_good_as_torch(result[present], reference_up(*up)[present], reference_up(*up, dtype)[present])
    assert torch.isnan(result[absent]).all(), "rows of absent slots were written"
    assert_as_good_as_torch(run_down(kernel, config, given), reference_down(*down), reference_down(*down, dtype))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("form", FORMATS)
def test_as_exact_as_torch_on_the_dequantised_weights(form: str, dtype: str) -> None:
    given = quantized(layer_of(form, dtype=dtype), 7)
    for dot in ("int16", "fma") if takes_shorts(given.layer.up) else ("fma",):
        assert_both(default(given.layer, 7, dot).with_params(mr=2, nv=2, block_n=16), given)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("outlier", [1.0, 300.0])
@pytest.mark.parametrize("form", ["awq_g128", "int8_g128"])
def test_rows_of_16_bits_lose_no_more_than_weights_of_the_layers_dtype(form: str, outlier: float, dtype: str) -> None:
    """An element far above the rest of its group takes bits from them, in fp16 about as many as torch then loses."""
    layer = ExpertLayer(
        hidden=2048, intermediate=128, experts=1, top_k=1, dtype=dtype, gated=False, activation="identity",
        weight_format=form,
    )  # fmt: skip
    given = quantized(layer, 8, "uniform")
    given.hidden[:, ::512] *= outlier
    up = (layer, given.hidden, dense(given.up), given.route, None)
    exact, torchs = reference_up(*up), reference_up(*up, given.hidden.dtype)
    found = {dot: error(run_up(KERNEL, default(layer, 8, dot), given), exact) for dot in ("int16", "fma")}
    assert found["int16"] <= (1.1 if dtype == "fp16" and outlier > 1 else 0.9) * error(torchs, exact)
    assert found["int16"] <= 1.3 * found["fma"]


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("form", ["int4_g128", "awq_g128"])
def test_long_fp32_rows_are_as_exact_as_torch_with_4_bits(form: str, spread: bool) -> None:
    """Rows become integers of 30 bits, a group at a time: what 4096 of K lose by it, against float64."""
    layer = ExpertLayer(hidden=256, intermediate=4096, experts=1, top_k=1, dtype="fp32", weight_format=form)
    given = quantized(layer, 3)
    if spread:
        wide_exponents(given)
    for tokens in (1, 64):
        config = KERNEL.default(layer.down, tokens, HERE)
        down = (layer, given.intermediate, dense(given.down), given.route, given.topk_weights, given.down.bias)
        exact, torchs = reference_down(*down), reference_down(*down, torch.float32)
        found = run_down(KERNEL, config, given)
        assert_as_good_as_torch(found, exact, torchs)
        assert error(found, exact) < 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"gated": False, "activation": "relu2", "bias": True},
        {"activation": "swiglu_oai", "bias": True},
        {"gated": False, "activation": "identity"},
    ],
)
@pytest.mark.parametrize("form", ["awq_g32", "int8_channel", "fp8_block128"])
def test_activations_and_biases(form: str, changes: dict[str, object]) -> None:
    given = quantized(layer_of(form, **changes), 9)
    for tokens in (1, 9):
        assert_both(KERNEL.default(given.layer.up, tokens, HERE), given)


def test_nothing_and_no_present_slots() -> None:
    for tokens, routing in ((0, "uniform"), (3, "none")):
        given = quantized(layer_of("awq_g32"), tokens, routing)
        assert_both(KERNEL.default(given.layer.up, 1, HERE), given)


def tiles(layer: ExpertLayer, dot: str = "") -> list[TileConfig]:
    base = default(layer, 1, dot)
    changes: list[dict[str, int | str]] = [
        {},
        {"layout": PLAIN, "stage": 1, "mr": 2, "nv": 2, "block_n": 64, "prefetch": 0},
        {"mr": 1, "nv": 1, "block_n": 16, "layout": "panel16"},
        {"mr": 4, "nv": 1, "prefetch": 2, "block_k": 256, "layout": "panel64", "block_n": 128, "threads": 1},
        {"mr": 3, "nv": 1, "prefetch": 1, "block_k": 512, "layout": "panel32", "threads": 2},
        {"mr": 2, "nv": 2, "prefetch": 1, "layout": "panel16", "block_n": 128},
    ]
    eights: list[dict[str, int | str]] = [
        {},
        {"layout": PLAIN, "stage": 1, "mr": 3, "nv": 4, "unroll": 2, "block_n": 64, "prefetch": 0},
        {"mr": 1, "nv": 1, "unroll": 2, "block_n": 16, "layout": "panel16"},
        {"mr": 4, "nv": 2, "prefetch": 2, "block_k": 256, "layout": "panel64", "block_n": 128, "threads": 1},
        {"mr": 6, "nv": 2, "stage": 1, "unroll": 4, "layout": "panel32", "block_k": 512, "threads": 2},
    ]
    limbs = weight_format(layer.weight_format).bits == 4 and base["dot"] == "fma"
    found = [base.with_params(**change) for change in (changes if limbs else eights)]
    assert all(KERNEL.invalid(layer.up, c, HERE) is None and outside_domain(KERNEL, c) is None for c in found)
    return found


def wide_exponents(given: Operands) -> Operands:
    generator = torch.Generator().manual_seed(3)
    for tensor in (given.hidden, given.up.data.scales, given.down.data.scales, given.intermediate):
        tensor *= torch.exp2(torch.randint(-4, 5, tensor.shape, generator=generator)).to(tensor.dtype)
    return given


@pytest.mark.parametrize(
    ("form", "dtype", "dot"),
    [
        pytest.param(
            form, dtype, dot, marks=[pytest.mark.long] * (form not in (*FEW, "int8_channel") or dtype == "fp32")
        )
        for form in KINDS
        for dtype, dot in (("fp32", "fma"), ("bf16", "fma"), ("bf16", "int16"))
        if dot == "fma" or form in WHOLE
    ],
)
def test_every_tile_and_batch_gives_the_same_bits(form: str, dtype: str, dot: str) -> None:
    size = 640 if "fp8" not in form else 700
    layer = dataclasses.replace(layer_of(form, dtype=dtype), hidden=size, intermediate=128)
    given = wide_exponents(quantized(layer, 13))
    configs = tiles(layer, dot)
    assert len({numerics_class(KERNEL, layer.up, config, HERE) for config in configs}) == 1
    up, down = run_up(KERNEL, configs[0], given), run_down(KERNEL, configs[0], given)
    for config in configs[1:]:
        assert torch.equal(run_up(KERNEL, config, given).nan_to_num(), up.nan_to_num()), config.label
        assert torch.equal(run_down(KERNEL, config, given), down), config.label
    route = given.route
    for rows in (torch.tensor([4]), torch.tensor([12, 3, 7])):
        part = dataclasses.replace(
            given, route=sort_slots(route.ids[rows], layer.experts), hidden=given.hidden[rows].contiguous()
        )
        alone = run_up(KERNEL, default(layer, len(rows), dot), part).view(len(rows), -1)
        assert torch.equal(alone.nan_to_num(), up.view(13, -1)[rows].nan_to_num())


def test_another_grouping_gives_other_bits() -> None:
    """The negative control: the same weights scaled by other groups differ in the last bits."""
    given = wide_exponents(quantized(layer_of("int8_g128", dtype="fp32"), 5))
    finer = dataclasses.replace(given.layer, weight_format="int8_g32")

    def split(weights: GemmWeights) -> GemmWeights:
        scales = weights.data.scales.repeat_interleave(4, dim=-1)
        stack = QuantizedStack(format="int8_g32", codes=weights.data.codes, scales=scales)
        return GemmWeights(gemm=dataclasses.replace(weights.gemm, layer=finer), layout=PLAIN, data=stack)

    other = dataclasses.replace(given, layer=finer, up=split(given.up), down=split(given.down))
    assert torch.equal(dense(other.up), dense(given.up))
    config = KERNEL.default(given.layer.up, 5, HERE)
    assert KERNEL.numerics(finer.up, config, HERE) != KERNEL.numerics(given.layer.up, config, HERE)
    assert not torch.equal(run_up(KERNEL, config, other).nan_to_num(), run_up(KERNEL, config, given).nan_to_num())


@pytest.mark.parametrize("lanes", [4, pytest.param(16, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("form", "dtype", "dot"),
    [
        ("awq_g32", "bf16", "fma"), ("awq_g64", "fp32", "fma"), ("fp8_block128", "bf16", "fma"),
        ("int8_channel", "bf16", "fma"), ("awq_g32", "bf16", "int16"), ("int8_channel", "fp16", "int16"),
    ],
)  # fmt: skip
def test_other_lane_counts_give_the_same_bits(form: str, dtype: str, dot: str, lanes: int) -> None:
    registers = 32 if lanes == 16 else 16
    isa = dataclasses.replace(host_isa(), name=f"lanes{lanes}", lanes=lanes, registers=registers, byte_pairs=False)
    given = wide_exponents(quantized(layer_of(form, activation="relu", bias=True, dtype=dtype), 6))
    kernel = MoeGemm(isa)
    for config in (default(given.layer, 6, dot, kernel), tiles(given.layer, dot)[1].with_params(block_n=128)):
        here = default(given.layer, 6, dot)
        assert torch.equal(run_down(kernel, config, given), run_down(KERNEL, here, given)), config.label
        result = run_up(kernel, config, given).nan_to_num()
        assert torch.equal(result, run_up(KERNEL, here, given).nan_to_num()), config.label


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMATS)
def test_unpacking_gives_back_what_was_packed(form: str, scales: torch.dtype) -> None:
    given = quantized(layer_of(form), 1)
    for weights in (given.up, given.down):
        stack = dataclasses.replace(weights.data, scales=weights.data.scales.to(scales))
        plain = dataclasses.replace(weights, data=stack)
        for layout in ("panel16", "panel64"):
            packed = KERNEL.pack(plain, layout)
            assert isinstance(packed.data, PanelStack) and packed.data.nbytes >= stack.nbytes
            back = KERNEL.unpack(packed).data
            assert back.codes.dtype is stack.codes.dtype and back.format == form
            assert torch.equal(back.codes.view(torch.uint8), stack.codes.view(torch.uint8))
            assert back.scales.dtype is scales and torch.equal(back.scales, stack.scales)
            assert (back.zeros is None) == (stack.zeros is None)
            assert stack.zeros is None or torch.equal(back.zeros, stack.zeros)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_scales_of_every_dtype_are_used_as_they_are(scales: torch.dtype) -> None:
    given = quantized(layer_of("awq_g32"), 3)
    stack = dataclasses.replace(given.up.data, scales=given.up.data.scales.to(scales))
    given = dataclasses.replace(given, up=dataclasses.replace(given.up, data=stack))
    for config in tiles(given.layer)[:2]:
        assert_both(config, given)


def test_every_code_of_fp8_is_read_as_its_number() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    layer = ExpertLayer(
        hidden=1, intermediate=254, experts=1, top_k=1, dtype="fp32", gated=False, activation="identity",
        weight_format="fp8_channel",
    )  # fmt: skip
    stack = QuantizedStack(
        format="fp8_channel", codes=codes.view(1, 254, 1).view(torch.float8_e4m3fn), scales=torch.ones(1, 254, 1)
    )
    weights = GemmWeights(gemm=layer.up, layout=PLAIN, data=stack)
    route = sort_slots(torch.zeros(1, 1, dtype=torch.int64), 1)
    for like in (None, KERNEL.default(layer.up, 1, HERE).with_params(layout=PLAIN)):
        config = KERNEL.default(layer.up, 1, HERE, like=like)
        out = torch.full((1, 254), torch.nan)
        KERNEL.up(config, torch.ones(1, 1), KERNEL.pack(weights, KERNEL.layout(layer.up, config)), route, out)
        assert torch.equal(out[0], codes.view(torch.float8_e4m3fn).float())


def test_rows_beyond_the_usual_range_stay_finite() -> None:
    """Powers of two that the codes leave over are moved to the rows: those have room for them."""
    given = quantized(layer_of("fp8_channel", dtype="bf16", gated=False, activation="identity"), 2)
    for factor in (2.0**50, 2.0**-40):
        scaled = dataclasses.replace(given, hidden=given.hidden * factor)
        config = KERNEL.default(given.layer.up, 2, HERE)
        present = given.route.slots[: int(given.route.offsets[-1])].long()
        exact = reference_up(given.layer, scaled.hidden, dense(given.up), given.route)[present]
        assert error(run_up(KERNEL, config, scaled)[present], exact) < 4e-3


def split_row(row: list[float], dtype: str = "fp32") -> tuple[list[float], list[float]]:
    """One row of 32 through weights of 1, 7 and -7: what comes out, and the exact sums."""
    layer = ExpertLayer(
        hidden=32, intermediate=32, experts=1, top_k=1, dtype=dtype, gated=False, activation="identity",
        weight_format="int4_g32",
    )  # fmt: skip
    codes = torch.full((1, 32, 16), 0x99, dtype=torch.uint8)
    codes[0, 1], codes[0, 2] = 0xFF, 0x11
    stack = QuantizedStack(format="int4_g32", codes=codes, scales=torch.ones(1, 32, 1))
    config = KERNEL.default(layer.up, 1, HERE)
    weights = KERNEL.pack(GemmWeights(gemm=layer.up, layout=PLAIN, data=stack), KERNEL.layout(layer.up, config))
    hidden = torch.tensor([row + [0.0] * (32 - len(row))]).to(TORCH_DTYPES[dtype])
    out = torch.full((1, 32), torch.nan, dtype=hidden.dtype)
    KERNEL.up(config, hidden, weights, sort_slots(torch.zeros(1, 1, dtype=torch.int64), 1), out)
    total = hidden.double().sum().item()
    return out[0, :3].tolist(), [total, 7 * total, -7 * total]


@pytest.mark.parametrize(
    "row",
    [
        [],
        [1.0, -1.0, 2.0**-29],
        [3.0e38, -3.0e38, 3 * 2.0**98],
        [3.0 * 2.0**-126, 2.0**-120, -(2.0**-126)],
        [2.0**-99, -(2.0**-98), 2.0**-126],
        [-1.9999999, 2.0**-28, 0.0078125],
    ],
)
def test_what_stands_within_30_bits_of_a_groups_largest_is_exact(row: list[float]) -> None:
    found, exact = split_row(row)
    assert found == [torch.tensor(value).float().item() for value in exact]


def test_what_lies_further_below_is_rounded_to_nearest() -> None:
    step = 2.0**-29
    for tail, wanted in ((0.49 * step, 0.0), (0.51 * step, step), (-0.51 * step, -step), (1.5 * step, 2 * step)):
        found, _ = split_row([1.0, -1.0, tail])
        assert found[0] == wanted


@pytest.mark.parametrize("row", [[], [1.0, -1.0, 2.0**-14], [1.9921875, 2.0**-14], [-3.0e38, 3.0e38, 3 * 2.0**113]])
def test_what_stands_within_15_bits_of_a_groups_largest_is_exact(row: list[float]) -> None:
    found, exact = split_row(row, "bf16")
    assert found == [torch.tensor(value).bfloat16().item() for value in exact]


def test_what_lies_below_15_bits_is_rounded_to_nearest() -> None:
    step = 2.0**-14
    for tail, wanted in ((0.498046875, 0.0), (0.50390625, 1.0), (-0.50390625, -1.0), (1.5, 2.0), (0.5, 0.0)):
        found, _ = split_row([1.0, -1.0, tail * step], "bf16")
        assert found[0] == wanted * step


@pytest.mark.parametrize("form", WHOLE)
def test_the_largest_sums_of_pairs_fit(form: str) -> None:
    """Every code the largest and every element of all bits: nothing wraps around in 32 bits."""
    layer = layer_of(form, gated=False, activation="identity", top_k=1, experts=1)
    if form == "int8_channel":
        layer = dataclasses.replace(layer, hidden=1024)
    given = quantized(layer, 2, "uniform")
    for codes, zeros in ((-128, 15), (127, 0)) if weight_format(form).bits == 8 else ((0, 15), (0xFF - 256, 0)):
        stack = given.up.data
        stack.codes.view(torch.int8).fill_(codes)
        stack.scales.fill_(2.0**-10)
        if stack.zeros is not None:
            stack.zeros.fill_(zeros)
        given.hidden.fill_(-1.9921875)
        exact = reference_up(layer, given.hidden, dense(given.up), given.route, given.up.bias)
        for tokens in (1, 100):
            assert torch.equal(run_up(KERNEL, default(layer, tokens, "int16"), given), exact.to(given.hidden.dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dot", ["int16", "fma"])
def test_what_is_not_finite_spoils_its_row_alone(dot: str, bad: float) -> None:
    given = quantized(layer_of("awq_g32", gated=False, activation="identity"), 3)
    config = default(given.layer, 3, dot)
    before = run_up(KERNEL, config, given).view(3, 2, -1)
    given.hidden[1, 40] = bad
    after = run_up(KERNEL, config, given).view(3, 2, -1)
    assert after[1].isnan().all() and torch.equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("layout", ["panel16", PLAIN])
def test_nan_codes_are_refused(layout: str) -> None:
    given = quantized(layer_of("fp8_channel"), 2)
    given.up.data.codes.view(torch.uint8)[1, 5, 7] = 0xFF
    like = KERNEL.default(given.layer.up, 2, HERE).with_params(layout=layout)
    config = KERNEL.default(given.layer.up, 2, HERE, like=like)
    with pytest.raises(InputError, match="expert 1 hold NaN"):
        run_up(KERNEL, config, given)


@pytest.mark.parametrize("layout", ["panel16", PLAIN])
@pytest.mark.parametrize("form", ["fp8_channel", "awq_g32", "dense"])
def test_flushing_subnormal_numbers_changes_no_bits(form: str, layout: str) -> None:
    """The smallest fp8 codes would be read as zeros: an error of some percent that nothing would tell."""
    base = ExpertLayer(hidden=64, intermediate=32, experts=3, top_k=2, activation="relu", gated=False)
    layer = dataclasses.replace(base, weight_format=form)
    given = operands(layer, 3, "uniform") if form == "dense" else quantized(layer, 3)
    if form == "dense":
        given.hidden.mul_(2.0**-126)
    like = KERNEL.default(layer.up, 3, HERE).with_params(layout=layout)
    config = KERNEL.default(layer.up, 3, HERE, like=like)
    up, down = run_up(KERNEL, config, given), run_down(KERNEL, config, given)
    assert ((up != 0) & ((up.abs() < 2.0**-126) | (form != "dense"))).any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes no subnormal numbers")
    try:
        flushed = run_up(KERNEL, config, given), run_down(KERNEL, config, given)
        assert not bool(torch.tensor([2.0**-127]) * 2.0**20 > 0), "the caller's setting was not restored"
    finally:
        torch.set_flush_denormal(False)
    bits = torch.int16
    assert torch.equal(flushed[0].view(bits), up.view(bits)) and torch.equal(flushed[1].view(bits), down.view(bits))


def test_what_does_not_fit_is_refused() -> None:
    layer = layer_of("awq_g32")
    cut = dataclasses.replace(layer, intermediate=48)
    assert "multiples of 32" in str(KERNEL.rejects(cut.down, HERE))
    config = KERNEL.default(layer.up, 1, HERE)
    assert "bf16 weights" in str(KERNEL.invalid(layer.up, config.with_params(dot="bf16"), HERE))
    for other in (layer_of("fp8_tensor"), layer_of("awq_g32", dtype="fp32"), layer_of("dense")):
        assert "integer codes" in str(KERNEL.invalid(other.up, config.with_params(dot="int16"), HERE))
    given = quantized(layer, 2)
    packed = KERNEL.pack(given.up, "panel16")
    out = torch.empty(4, layer.intermediate, dtype=torch.bfloat16)
    wrong = [
        dataclasses.replace(packed.data, codes=packed.data.codes.clone()),
        dataclasses.replace(packed.data, format="int4_g32"),
        given.up.data,
    ]
    for data in wrong:
        with pytest.raises(InputError, match="weights in layout panel16"):
            KERNEL.up(config, given.hidden, dataclasses.replace(packed, data=data, plans={}), given.route, out)
    plain = KERNEL.default(layer.up, 2, HERE, like=config.with_params(layout=PLAIN))
    for data in (given.down.data, torch.zeros(3, 64, 64, dtype=torch.bfloat16)):
        with pytest.raises(InputError, match="weights"):
            KERNEL.up(plain, given.hidden, dataclasses.replace(given.up, data=data, plans={}), given.route, out)


@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16", "neon", "sse2"])
@pytest.mark.parametrize("form", ["awq_g128", "fp8_block128"])
def test_space_and_default_on_every_instruction_set(isa: str, form: str) -> None:
    kernel = MoeGemm(CROSS[isa])
    layer = ExpertLayer(hidden=256, intermediate=128, experts=4, top_k=2, weight_format=form)
    for gemm in layer.gemms:
        for tokens in (1, 4, 64):
            found = list(kernel.space(gemm, tokens, HERE))
            assert len(set(found)) == len(found)
            assert all(outside_domain(kernel, config) is None for config in found)
            valid = [config for config in found if kernel.invalid(gemm, config, HERE) is None]
            assert 4 <= len(valid) <= 120
            config = kernel.default(gemm, tokens, HERE)
            pairs = form == "awq_g128" and isa.startswith("avx")
            assert kernel.invalid(gemm, config, HERE) is None and config["dot"] == ("int16" if pairs else "fma")
            assert len({kernel.layout(gemm, config) for config in valid}) > 1


@pytest.mark.parametrize(
    ("isa", "form", "dot", "wanted"),
    [
        ("avx2", "awq_g128", "fma", ("vpmaddubsw", "vpaddw", "vpmaddwd", "vfmadd")),
        ("avx2", "awq_g128", "int16", ("vpmaddwd", "vpaddd", "vcvtdq2ps", "vfmadd")),
        ("avx512", "awq_g128", "fma", ("vpmaddubsw", "zmm")),
        ("avx512", "int8_g128", "int16", ("vpmaddwd", "zmm")),
        ("avx512_bf16", "int8_g128", "int16", ("vpdpwssd", "zmm")),
        ("avx512", "fp8_block128", "fma", ("vpsrad", "vpand", "vfmadd")),
        ("neon", "int8_g128", "fma", ("scvtf", "fmla")),
        ("neon", "int8_g128", "int16", ("mla", "scvtf")),
        ("neon", "int4_g64", "fma", ("mla", "8h")),
        ("sse2", "awq_g32", "fma", ("pmullw", "cvtdq2ps", "mulps")),
        ("sse2", "awq_g32", "int16", ("cvtdq2ps", "mulps")),
    ],
)
def test_compiles_for_cpus_that_are_not_here(isa: str, form: str, dot: str, wanted: tuple[str, ...]) -> None:
    kernel = MoeGemm(CROSS[isa])
    layer = ExpertLayer(hidden=256, intermediate=128, experts=4, top_k=2, weight_format=form)
    config = default(layer, 1, dot, kernel)
    variant = dataclasses.replace(variant_of(CROSS[isa], layer.up, config, 64))
    assembly = compile_assembly(variant, CROSS[isa])
    assert all(name in assembly for name in wanted)


def test_work_counts_the_bytes_of_codes_and_scales() -> None:
    layer = ExpertLayer(hidden=2048, intermediate=512, experts=4, top_k=2, weight_format="awq_g128")
    config = KERNEL.default(layer.up, 1, HERE)
    work = KERNEL.work(layer.up, config, HERE, [1, 0, 1, 0])
    assert work.weight_bytes == layer.up.weight_bytes(2)
    dense_layer = dataclasses.replace(layer, weight_format="dense")
    whole = KERNEL.work(dense_layer.up, KERNEL.default(dense_layer.up, 1, HERE), HERE, [1, 0, 1, 0])
    assert 3.7 < whole.weight_bytes / work.weight_bytes < 4 and work.useful_flops == whole.useful_flops
