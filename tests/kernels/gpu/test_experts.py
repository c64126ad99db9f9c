"""The Triton expert kernels against the float64 oracle, in Triton's interpreter with the model of the tensor core."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from tests.cases import CASES, ODD, SMALL, Case, Operands, assert_both_gemms, error, operands, run_down, run_up
from tests.tensor_core import tensor_core
from tilecast.errors import ConfigError, InputError
from tilecast.kernels import registry
from tilecast.kernels.gpu.decode import Decode
from tilecast.kernels.gpu.grouped import Grouped, Persistent
from tilecast.kernels.gpu.layouts import LAYOUTS
from tilecast.kernels.gpu.moe import TritonExperts
from tilecast.kernels.gpu.sorting import DeviceLayout
from tilecast.kernels.gpu.split_k import SplitK
from tilecast.kernels.gpu.target import parse_target
from tilecast.kernels.gpu.tma import Tma
from tilecast.kernels.reference import reference_down
from tilecast.kernels.routing import sort_slots
from tilecast.kernels.spec import GemmWeights
from tilecast.problem import ExpertLayer, TileConfig

TILE = {"block_m": 16, "block_n": 64, "block_k": 64, "group_m": 4, "num_warps": 4, "num_stages": 3}
UNSORTED = {name: value for name, value in TILE.items() if name != "group_m"}
VARIANTS: dict[str, tuple[TritonExperts, TileConfig]] = {
    "grouped": (Grouped(), TileConfig(Grouped.name, {**TILE, "swap": 0})),
    "grouped swapped": (Grouped(), TileConfig(Grouped.name, {**TILE, "block_m": 8, "swap": 1})),
    "persistent": (Persistent(), TileConfig(Persistent.name, {**TILE, "swap": 0, "waves": 1})),
    "tma": (Tma(), TileConfig(Tma.name, {**TILE, "waves": 0, "specialize": 0})),
    "tma persistent": (Tma(), TileConfig(Tma.name, {**TILE, "waves": 1, "specialize": 0})),
    "decode": (Decode(), TileConfig(Decode.name, {**UNSORTED, "swap": 0})),
    "decode swapped": (Decode(), TileConfig(Decode.name, {**UNSORTED, "block_m": 8, "swap": 1})),
    "split-K": (SplitK(), TileConfig(SplitK.name, {**TILE, "block_n": 128, "block_k": 128, "chunk": 256})),
}
POINTERS = [name for name in VARIANTS if not name.startswith("tma")]
HARD = ("odd sizes", "absent slots", "bias", "experts with none")
"""Cases that every variant runs in every dtype that it takes."""
NOBODY = (-1, -(2**31), 2**31 - 1, None, None)
"""Ids that no expert has; None stands for E and E + 1."""
HERE = parse_target("cuda:90").environment()

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")


@pytest.fixture(autouse=True)
def model() -> Iterator[None]:
    with tensor_core(16, 25):
        yield


def dtypes_of(variant: str) -> tuple[str, ...]:
    """What a variant takes: without tensor cores neither swapping nor descriptors are of use."""
    return ("bf16", "fp16") if "swapped" in variant or "tma" in variant else ("bf16", "fp16", "fp32")


def fitted(layer: ExpertLayer, variant: str) -> ExpertLayer:
    """The layer nearest to `layer` that a variant takes: rows of whole 16 bytes, or a K that is cut."""
    # A long K is the up GEMM's; the same in the other dimension would only be more programs.
    hidden, intermediate = layer.hidden, min(layer.intermediate, 131)
    if "tma" in variant:
        hidden, intermediate = -(-hidden // 8) * 8, -(-intermediate // 8) * 8
    if variant == "split-K":
        hidden, intermediate = max(hidden, 257 + hidden % 32), 257 + intermediate % 32
    return dataclasses.replace(layer, hidden=hidden, intermediate=intermediate)


def variant_for(variant: str, dtype: str) -> tuple[TritonExperts, TileConfig]:
    """Return the kernel and its config; without tensor cores a thread holds fewer values."""
    kernel, config = VARIANTS[variant]
    return kernel, config.with_params(block_n=64, block_k=64) if dtype == "fp32" and variant == "split-K" else config


def given_for(variant: str, layer: ExpertLayer, tokens: int, routing: str = "uniform", dtype: str = "bf16") -> Operands:
    few = min(tokens, 6 if "decode" in variant or variant == "split-K" else 24)
    given = operands(dataclasses.replace(fitted(layer, variant), dtype=dtype), few, routing)
    kernel, config = variant_for(variant, dtype)
    for gemm in given.layer.gemms:
        reason = kernel.rejects(gemm, HERE) or kernel.invalid(gemm, config, HERE)
        assert reason is None, reason
    return given


def matrix() -> Iterator[object]:
    """Every variant in every case, in one dtype or, where it is hard, in all."""
    for i, case in enumerate(CASES):
        for j, variant in enumerate(VARIANTS):
            known = dtypes_of(variant)
            usual = known[(i + j) % len(known)]
            for dtype in known if case.name in HARD else [usual]:
                # The model of the tensor core is slow: where K is cut, every second of the cases that are not hard.
                quick = dtype == usual and (variant != "split-K" or case.name in HARD or i % 2 == 0)
                marks = [] if quick else [pytest.mark.long]
                yield pytest.param(case, variant, dtype, id=f"{case.name}-{variant}-{dtype}", marks=marks)


@pytest.mark.parametrize(("case", "variant", "dtype"), list(matrix()))
def test_matches_the_oracle(case: Case, variant: str, dtype: str) -> None:
    given = given_for(variant, case.layer, case.tokens, case.routing, dtype)
    assert_both_gemms(*variant_for(variant, dtype), given)


def layouts() -> Iterator[object]:
    """Every variant with every layout; quick are those that go furthest from the plain one, and what is refused."""
    for variant in VARIANTS:
        furthest = "interleaved" if "tma" in variant else "kn_interleaved"
        for layout in LAYOUTS[1:]:
            quick = layout == furthest or "tma" in variant
            yield pytest.param(variant, layout, id=f"{variant}-{layout}", marks=[] if quick else [pytest.mark.long])


@pytest.mark.parametrize(("variant", "layout"), list(layouts()))
def test_layouts_hold_the_same_weights(variant: str, layout: str) -> None:
    kernel, config = VARIANTS[variant]
    given = given_for(variant, dataclasses.replace(ODD, bias=True), 4, dtype="bf16")
    if "tma" in variant and layout.startswith("kn"):
        for run in (run_up, run_down):
            with pytest.raises(ConfigError, match=rf"^triton.moe_tma reads .* layout {layout}$"):
                run(kernel, config, given, layout=layout)
        return
    for run in (run_up, run_down):
        expected, found = (run(kernel, config, given, layout=name) for name in ("plain", layout))
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("gated", [True, False])
def test_an_interleaved_stack_without_pairs_is_plain(gated: bool) -> None:
    kernel, config = VARIANTS["grouped"]
    given = operands(dataclasses.replace(SMALL, gated=gated, bias=True), 3)
    up, down = (kernel.pack(weights, "interleaved") for weights in (given.up, given.down))
    assert torch.equal(up.data, given.up.data) is not gated
    assert torch.equal(down.data, given.down.data)
    assert_both_gemms(kernel, config, given, layout="interleaved")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bias_may_be_more_exact_than_the_weights(variant: str) -> None:
    kernel, config = VARIANTS[variant]
    given = given_for(variant, dataclasses.replace(ODD, bias=True, activation="relu"), 4, dtype="bf16")

    def finer(weights: GemmWeights) -> GemmWeights:
        # Nothing of what is added here would survive in bfloat16.
        assert weights.bias is not None
        return dataclasses.replace(weights, bias=weights.bias.float() * (1 + 2**-9), plans={})

    assert_both_gemms(kernel, config, dataclasses.replace(given, up=finer(given.up), down=finer(given.down)))
    exact = dataclasses.replace(given, down=finer(given.down))
    found, rounded = (run_down(kernel, config, each, torch.float32) for each in (exact, given))
    operand = (exact.layer, exact.intermediate, exact.down.data, exact.route, exact.topk_weights, exact.down.bias)
    assert error(found, reference_down(*operand)) < 2**-16 < error(rounded, reference_down(*operand))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_partial_sum_is_the_output_before_its_rounding(variant: str, dtype: str) -> None:
    kernel, config = VARIANTS[variant]
    given = given_for(variant, dataclasses.replace(ODD, bias=True), 7, "absent" if "decode" in variant else "uniform")
    partial, rounded = run_down(kernel, config, given, torch.float32), run_down(kernel, config, given)
    assert partial.dtype == torch.float32
    assert torch.equal(partial.to(rounded.dtype), rounded)
    assert not torch.equal(partial, rounded.float())
    expected = (given.layer, given.intermediate, given.down.data, given.route, given.topk_weights, given.down.bias)
    assert error(partial, reference_down(*expected)) < 2**-18


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_without_slots_is_zero(variant: str, out_dtype: torch.dtype) -> None:
    kernel, config = VARIANTS[variant]
    given = given_for(variant, dataclasses.replace(ODD, bias=True), 8, "absent")
    out = run_down(kernel, config, given, out_dtype)
    assert (given.route.ids[5] == -1).all()
    assert torch.equal(out[5], torch.zeros_like(out[5]))
    assert (out[torch.arange(len(out)) != 5] != 0).any(dim=1).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ["relu", "relu2", "drelu"])
@pytest.mark.parametrize("variant", ["grouped", "grouped swapped", "decode", "split-K"])
def test_dead_neurons_are_plus_zero_as_on_cpus(variant: str, activation: str) -> None:
    """A dead gate hides its up value, even a negative, infinite or NaN one; a NaN gate stays NaN."""
    kernel, config = VARIANTS[variant]
    given = operands(dataclasses.replace(SMALL, dtype="bf16", activation=activation), 3)
    width = given.layer.intermediate
    given.hidden.abs_()
    gate, up = given.up.data[:, :width], given.up.data[:, width:]
    gate.abs_()
    gate[:, :3] *= -1
    gate[:, 3] = 0
    gate[:, 4] = torch.nan
    up.abs_()
    up[:, 0] *= -1
    up[:, 1], up[:, 2] = torch.inf, torch.nan
    result = run_up(kernel, config, given)
    assert (result[:, :4] == 0).all() and not result[:, :4].signbit().any()
    assert result[:, 4].isnan().all() and (result[:, 5:] > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_id_that_no_expert_has_is_absent(variant: str) -> None:
    kernel, config = VARIANTS[variant]
    given = given_for(variant, dataclasses.replace(ODD, bias=True), 5)
    ids, experts = given.route.ids.clone(), given.layer.experts
    ids.flatten()[torch.tensor([0, 4, 6, 10, 12])] = torch.tensor(
        [experts if i == 3 else experts + 1 if i == 4 else nobody for i, nobody in enumerate(NOBODY)], dtype=torch.int32
    )
    clean = dataclasses.replace(given, route=sort_slots(ids.where((ids >= 0) & (ids < experts), -1), experts))
    garbage = dataclasses.replace(given, route=DeviceLayout(ids, experts))
    assert garbage.route.ids.min() == -(2**31), "the routing itself must hold what it was given"
    for run in (run_up, run_down):
        found, expected = run(kernel, config, garbage), run(kernel, config, clean)
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    assert_both_gemms(kernel, config, garbage)


@pytest.mark.parametrize("top_k", [1, 17, 32])
def test_unsorted_kernels_hold_all_slots_of_a_token(top_k: int) -> None:
    rows = {1: 16, 17: 32, 32: 32}[top_k]
    layer = ExpertLayer(hidden=40, intermediate=24, experts=33, top_k=top_k, dtype="bf16", bias=True)
    for swap in (0, 1):
        config = VARIANTS["decode"][1].with_params(block_m=rows, swap=swap)
        assert registry.invalid(layer.down, config, HERE) is None
        assert_both_gemms(Decode(), config, operands(layer, 2))
    if rows > 16:
        too_few = VARIANTS["decode"][1].with_params(block_m=rows // 2)
        assert "does not hold" in str(registry.invalid(layer.down, too_few, HERE))


def test_more_slots_than_a_tile_holds_are_refused() -> None:
    layer = ExpertLayer(hidden=64, intermediate=64, experts=64, top_k=33)
    assert "at most 32" in str(Decode().rejects(layer.down, HERE))


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("grouped", {"block_m": 24}),
        ("grouped", {"swap": 2}),
        ("grouped swapped", {"num_warps": 16}),
        ("persistent", {"waves": 0}),
        ("tma", {"block_n": 16}),
        ("tma", {"specialize": 2}),
        ("decode", {"block_k": 1024}),
        ("decode", {"num_stages": 1}),
        ("split-K", {"chunk": 300}),
        ("split-K", {"swap": 0}),
    ],
)
def test_a_config_outside_its_domain_is_refused(variant: str, changes: dict[str, int]) -> None:
    kernel, config = VARIANTS[variant]
    layer = ExpertLayer(hidden=512, intermediate=512, experts=4, top_k=2)
    assert registry.invalid(layer.up, config, HERE) is None
    reason = registry.invalid(layer.up, config.with_params(**changes), HERE)
    (name,) = changes
    assert reason is not None
    assert kernel.name in reason
    assert name in reason


@pytest.mark.parametrize("variant", POINTERS)
def test_a_column_tile_may_pass_the_width(variant: str) -> None:
    """Sizes below every block, and just above one: both tails in one launch."""
    kernel, config = VARIANTS[variant]
    for hidden, intermediate in ((65, 33), (7, 9)):
        layer = dataclasses.replace(ODD, hidden=hidden, intermediate=intermediate, bias=True)
        assert_both_gemms(kernel, config, given_for(variant, layer, 3), layout="kn_interleaved")


@pytest.mark.parametrize("variant", VARIANTS)
def test_sixteen_byte_boundaries_are_kept(variant: str) -> None:
    """Kernels are compiled for aligned pointers: inputs elsewhere are moved, weights and outputs refused."""
    kernel, config = VARIANTS[variant]
    given = given_for(variant, SMALL, 3)
    expected = [run_up(kernel, config, given), run_down(kernel, config, given)]
    moved = dataclasses.replace(
        given,
        hidden=elsewhere(given.hidden),
        intermediate=elsewhere(given.intermediate),
        topk_weights=elsewhere(given.topk_weights),
    )
    found = [run_up(kernel, config, moved), run_down(kernel, config, moved)]
    assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(found, expected, strict=True))
    weights = dataclasses.replace(given.up, data=elsewhere(given.up.data), plans={})
    out = elsewhere(torch.zeros(given.route.tokens * given.layer.top_k, given.layer.intermediate, dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"weights .*16-byte boundary"):
        kernel.up(config, given.hidden, weights, given.route, torch.zeros_like(out))
    with pytest.raises(InputError, match=r"output .*16-byte boundary"):
        kernel.up(config, given.hidden, given.up, given.route, out)


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element beyond a 16-byte boundary."""
    buffer = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    start = 1 + (-buffer.data_ptr() // tensor.itemsize) % (16 // tensor.itemsize)
    buffer[start : start + tensor.numel()] = tensor.flatten()
    moved = buffer[start : start + tensor.numel()].view(tensor.shape)
    assert moved.data_ptr() % 16 == tensor.itemsize
    return moved
