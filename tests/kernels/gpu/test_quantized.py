"""Quantised weights in the Triton kernels: against the oracle, and bit for bit against dense kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from tests.cases import Operands, assert_both_gemms, operands, run_down, run_up
from tests.kernels.gpu.test_experts import TILE, UNSORTED, elsewhere
from tests.tensor_core import tensor_core
from tilecast.autotune.certify import certify
from tilecast.errors import ConfigError, InputError
from tilecast.kernels import registry
from tilecast.kernels.formats import QuantizedStack
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.gpu.grouped import Grouped, Persistent
from tilecast.kernels.gpu.moe import TritonExperts
from tilecast.kernels.gpu.target import TARGETS, Target, parse_target
from tilecast.kernels.gpu.tiles import FP8
from tilecast.kernels.spec import PLAIN, GemmWeights, numerics_class
from tilecast.problem import WEIGHT_FORMATS, ExpertGemm, ExpertLayer, TileConfig, weight_format

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tilecast.kernels.gpu._quantized import code_values  # noqa: E402

FORMATS = WEIGHT_FORMATS[1:]
VARIANTS: dict[str, tuple[TritonExperts, TileConfig]] = {
    "grouped": (Grouped(), TileConfig(Grouped.name, {**TILE, "swap": 0})),
    "grouped swapped": (Grouped(), TileConfig(Grouped.name, {**TILE, "block_m": 8, "block_k": 128, "swap": 1})),
    "persistent": (Persistent(), TileConfig(Persistent.name, {**TILE, "swap": 0, "waves": 1})),
    "decode": (Decode(), TileConfig(Decode.name, {**UNSORTED, "swap": 0})),
    "decode swapped": (Decode(), TileConfig(Decode.name, {**UNSORTED, "block_m": 8, "block_k": 128, "swap": 1})),
}
PAIRS = [
    ("awq_g32", "grouped"), ("awq_g64", "decode swapped"), ("awq_g128", "grouped swapped"), ("int4_g32", "decode"),
    ("int4_g128", "persistent"), ("int8_g64", "grouped"), ("int8_channel", "decode"), ("fp8_block128", "grouped"),
    ("fp8_block128", "decode swapped"), ("fp8_channel", "grouped swapped"), ("fp8_tensor", "decode"),
    ("fp8_tensor", "persistent"),
]  # fmt: skip
HERE = parse_target("cuda:90").environment()
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not triton.knobs.runtime.interpret, reason="runs in Triton's interpreter"
)


@pytest.fixture(autouse=True)
def model() -> Iterator[None]:
    with tensor_core(16, 25):
        yield


def layer_of(name: str, dtype: str = "bf16") -> ExpertLayer:
    """Sizes that end within steps of K; those of fp8 within a block, too, and odd."""
    hidden, intermediate = (131, 70) if weight_format(name).kind == "fp8" else (160, 96)
    group = weight_format(name).group
    if group > 32 and weight_format(name).kind != "fp8":
        hidden, intermediate = 3 * group if group == 64 else group, group
    return ExpertLayer(
        hidden=hidden, intermediate=intermediate, experts=3, top_k=2, dtype=dtype, weight_format=name, bias=True
    )


@interpreted
@pytest.mark.parametrize(("name", "variant"), PAIRS)
def test_matches_the_oracle(name: str, variant: str) -> None:
    kernel, config = VARIANTS[variant]
    given = operands(layer_of(name, "fp16" if variant == "persistent" else "bf16"), 4)
    for gemm in given.layer.gemms:
        assert (kernel.rejects(gemm, HERE) or kernel.invalid(gemm, config, HERE)) is None
    assert_both_gemms(kernel, config, given)


@interpreted
def test_fp32_rows_keep_their_bits() -> None:
    kernel, config = VARIANTS["grouped"]
    assert_both_gemms(kernel, config.with_params(block_k=32, block_n=32), operands(layer_of("awq_g32", "fp32"), 3))


def dense_of(given: Operands) -> Operands:
    """The same operands with weights dequantised in float32 and rounded once."""
    layer = dataclasses.replace(given.layer, weight_format="dense")

    def dense(weights: GemmWeights, gemm: ExpertGemm) -> GemmWeights:
        stack = [
            weights.data.dequantized(weights.gemm, expert, torch.float32).to(given.hidden.dtype)
            for expert in range(layer.experts)
        ]
        return GemmWeights(gemm=gemm, layout=PLAIN, data=torch.stack(stack), bias=weights.bias)

    return dataclasses.replace(
        given, layer=layer, up=dense(given.up, layer.up), down=dense(given.down, layer.down)
    )  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", ["awq_g32", "int4_g64", "int8_g32", "fp8_block128"])
def test_bits_are_those_of_dense_weights_rounded_once(name: str) -> None:
    kernel, config = VARIANTS["grouped"]
    given = operands(layer_of(name), 3)
    for run in (run_up, run_down):
        found, expected = run(kernel, config, given), run(kernel, config, dense_of(given))
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@interpreted
@pytest.mark.parametrize("name", ["awq_g32", "int4_g32"])
def test_scales_of_any_dtype_give_the_bits_of_their_values(name: str) -> None:
    """16-bit scales take one multiply-add, float32 ones two roundings: as long as both are exact, the same."""
    kernel, config = VARIANTS["grouped"]
    given = operands(dataclasses.replace(layer_of(name), intermediate=32), 2)
    wide = dataclasses.replace(given.up.data, scales=given.up.data.scales.float())
    finer = dataclasses.replace(given, up=dataclasses.replace(given.up, data=wide, plans={}))
    assert torch.equal(run_up(kernel, config, finer).view(torch.int16), run_up(kernel, config, given).view(torch.int16))
    # Scales that 16 bits do not hold are not rounded to them.
    uneven = dataclasses.replace(wide, scales=wide.scales * (1 + 2**-9 + 2**-20))
    assert_both_gemms(
        kernel, config, dataclasses.replace(given, up=dataclasses.replace(given.up, data=uneven, plans={}))
    )  # fmt: skip


@triton.jit
def widened(codes, out, KIND: tl.constexpr, BITWISE: tl.constexpr):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    if KIND == "awq":
        words = tl.load(codes + row * 4 + tl.arange(0, 4)[None, :])
        tl.store(out + row * 32 + tl.arange(0, 32)[None, :], code_values(words, KIND, BITWISE))
    else:
        tl.store(out + row * 16 + column, code_values(tl.load(codes + row * 16 + column), KIND, BITWISE))


@interpreted
@pytest.mark.parametrize("bitwise", [False, True])
def test_every_e4m3_code_is_widened_exactly(bitwise: bool) -> None:
    codes, out = torch.arange(256, dtype=torch.uint8), torch.empty(256)
    widened[(1,)](codes, out, KIND="fp8", BITWISE=bitwise)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert expected.isnan().sum() == 2
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@interpreted
def test_every_integer_code_is_widened_exactly() -> None:
    codes, out = torch.arange(256, dtype=torch.uint8), torch.empty(256)
    widened[(1,)](codes.view(torch.int8), out, KIND="int8", BITWISE=False)
    assert torch.equal(out, codes.view(torch.int8).float())
    both = torch.empty(512)
    widened[(1,)](codes.view(torch.int32), both, KIND="awq", BITWISE=False)
    assert torch.equal(both.view(256, 2) - 128, torch.stack((codes & 15, codes >> 4), dim=1).float())


@interpreted
def test_steps_and_groups_of_any_length_give_the_same_bits() -> None:
    """A step within a group, and one of several groups, within one numerics class."""
    given = operands(dataclasses.replace(layer_of("awq_g64"), hidden=192), 3)
    kernel, config = VARIANTS["grouped"]
    shapes = [config, config.with_params(block_k=128, block_n=32), config.with_params(block_m=32, block_k=256)]
    for gemm in given.layer.gemms:
        assert len({numerics_class(kernel, gemm, each, HERE) for each in shapes}) == 1
    first, *others = ([run_up(kernel, each, given), run_down(kernel, each, given)] for each in shapes)
    for other in others:
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(first, other, strict=True))


@interpreted
@pytest.mark.parametrize("variant", ["grouped", "decode"])
def test_operands_that_do_not_fit_are_refused_in_one_line(variant: str) -> None:
    kernel, config = VARIANTS[variant]
    given = operands(dataclasses.replace(layer_of("awq_g32"), intermediate=32, hidden=32), 2)
    out = torch.zeros(4, 32, dtype=torch.bfloat16)

    def refused(message: str, data: object, layer: ExpertLayer = given.layer) -> None:
        weights = GemmWeights(gemm=layer.up, layout=PLAIN, data=data, bias=given.up.bias)
        with pytest.raises(InputError, match=message):
            kernel.up(config, given.hidden, weights, given.route, out)

    stack = given.up.data
    assert isinstance(stack, QuantizedStack)
    refused(r"^weights are a Tensor, expected a stack of awq_g32$", torch.zeros(3, 64, 32, dtype=torch.bfloat16))
    refused(r"^weights are a stack of awq_g32, the layer's are dense$", stack,
            dataclasses.replace(given.layer, weight_format="dense"))  # fmt: skip
    refused(r"^weights are awq_g32 .*expected int4_g32", stack,
            dataclasses.replace(given.layer, weight_format="int4_g32"))  # fmt: skip
    refused(r"16-byte boundary", dataclasses.replace(stack, scales=elsewhere(stack.scales)))
    with pytest.raises(ConfigError, match=r"^weights of awq_g32 are read as plain, not as interleaved$"):
        kernel.pack(given.up, "interleaved")
    assert kernel.pack(given.up, PLAIN) is given.up
    assert kernel.unpack(given.up).data is stack


def test_sizes_that_cut_a_group_and_other_kernels_are_refused() -> None:
    cut = ExpertLayer(hidden=100, intermediate=64, experts=2, top_k=1, weight_format="awq_g64")
    assert "cuts a group of 64" in str(Grouped().rejects(cut.up, HERE))
    assert Grouped().rejects(cut.down, HERE) is None
    assert registry["triton.moe_tma"].rejects(cut.down, HERE) == "weight format awq_g64 is not dense"
    short = VARIANTS["grouped"][1].with_params(block_k=32)
    assert "steps of 32" in str(registry.invalid(cut.down, short, HERE))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_default_is_valid_and_of_the_class_it_is_to_be_like(target: Target) -> None:
    environment, checked = target.environment(), 0
    for name in ("awq_g32", "fp8_block128"):
        layer = ExpertLayer(hidden=2048, intermediate=768, experts=32, top_k=4, weight_format=name)
        # A bias takes registers beside the sums.
        for gemm in (layer.up, dataclasses.replace(layer, bias=True).down):
            for kernel in (k for k in registry if isinstance(k, TritonExperts)):
                if kernel.rejects(gemm, environment):
                    continue
                likes: list[TileConfig | None] = [None]
                given = [c for tokens in (16, 512) for c in kernel.space(gemm, tokens, environment)]
                space = [config for config in given if not kernel.invalid(gemm, config, environment)]
                likes += {class_of(gemm, config, target): config for config in space}.values()
                assert space, (kernel.name, name)
                for like in likes:
                    for tokens in (1, 8, 100, 4096):
                        config = kernel.default(gemm, tokens, environment, like)
                        reason = registry.invalid(gemm, config, environment)
                        assert reason is None, (name, gemm.name, tokens, config.label, reason)
                        assert like is None or class_of(gemm, config, target) == class_of(gemm, like, target)
                        checked += 1
    assert checked > 60


def class_of(gemm: ExpertGemm, config: TileConfig, target: Target) -> str:
    return numerics_class(registry[config.kernel], gemm, config, target.environment())


def test_classes_name_format_instruction_and_place_of_the_scale() -> None:
    layer = ExpertLayer(hidden=256, intermediate=256, experts=2, top_k=1)
    small = VARIANTS["grouped"][1]
    large = small.with_params(block_m=64, block_n=128)
    dense = {numerics_class(Grouped(), layer.up, config, HERE) for config in (small, large)}
    assert len(dense) == 1
    classes = {
        numerics_class(Grouped(), dataclasses.replace(layer, weight_format=name).up, config, HERE)
        for name in FORMATS
        for config in (small, large)
    }
    assert len(classes) == 2 * len(FORMATS)
    assert not classes & dense
    for name, where in (("awq_g32", "times scale"), ("int8_channel", "scale after the sum")):
        fields = Grouped().numerics(dataclasses.replace(layer, weight_format=name).up, small, HERE)
        assert where in str(fields["weights"]) and "activations" not in fields


CERTIFIED = {
    "awq_g32": [VARIANTS["grouped"][1], VARIANTS["decode"][1].with_params(block_k=256), VARIANTS["grouped swapped"][1]],
    "fp8_block128": [
        TileConfig(FP8, {**TILE, "block_m": 16, "block_k": 128, "swap": 1}),
        TileConfig(FP8, {**TILE, "block_m": 32, "block_n": 128, "block_k": 128, "swap": 1}),
        VARIANTS["grouped"][1],
    ],
}


@interpreted
@pytest.mark.parametrize("name", CERTIFIED)
def test_a_certificate_holds_members_of_each_class_to_one_another(name: str) -> None:
    """Wide exponents and cancellation; K reversed gives other bits, in rows of codes as well."""
    layer = ExpertLayer(hidden=512, intermediate=16, experts=2, top_k=1, weight_format=name, activation="relu")
    result = certify(layer.up, CERTIFIED[name], HERE, registry, inputs=6, seed=3)
    assert len(result.classes) == 2 and result.unpromised == 0
    assert [len(each.members) for each in result.classes] == [2, 1]
    for each in result.classes:
        assert not each.error and not each.control_error
        assert all(member.equal == 6 and not member.different and not member.error for member in each.members)
        assert each.control > 3


@pytest.mark.parametrize("kernel", ["triton.moe_gemm", "triton.moe_decode"])
def test_work_counts_the_bytes_of_codes(kernel: str) -> None:
    layer = ExpertLayer(hidden=1024, intermediate=512, experts=4, top_k=2)
    config = VARIANTS["grouped" if kernel == "triton.moe_gemm" else "decode"][1]
    found = registry[kernel]
    assert isinstance(found, TritonExperts)
    dense = found.work(layer.up, config, HERE, [3, 0, 1, 0])
    for name, share in (("awq_g128", 0.26), ("int8_channel", 0.51), ("fp8_block128", 0.51)):
        coded = found.work(dataclasses.replace(layer, weight_format=name).up, config, HERE, [3, 0, 1, 0])
        assert 0.9 * share < coded.weight_bytes / dense.weight_bytes <= 1.03 * share
        assert coded.row_bytes == dense.row_bytes and coded.flops == dense.flops
        assert coded.cache_bytes < dense.cache_bytes and coded.efficiency < dense.efficiency
