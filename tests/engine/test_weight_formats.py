"""Quantised layers through every way of running one, on the tests' own kernel: numbers, bits, errors, handles."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import assert_as_good_as_torch
from tests.engine.tables import inputs
from tests.torch_kernel import TorchKernel
from tilecast.engine import recording
from tilecast.engine.experts import MoeBlock, PreparedExperts, prepare_experts
from tilecast.engine.functional import fused_experts
from tilecast.engine.group import Group
from tilecast.engine.operands import layer_of
from tilecast.engine.parallel import TensorParallelExperts, local_ids, shard_experts
from tilecast.engine.runtime import use_runtime
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import Environment, cpu_environment
from tilecast.errors import DeviceError, InputError, ModelError
from tilecast.evidence import TuningTable
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.formats import QuantizedStack, quantize
from tilecast.kernels.reference import reference_layer
from tilecast.kernels.routing import sort_slots
from tilecast.kernels.spec import Registry
from tilecast.models.sharding import layer_for_rank
from tilecast.problem import WEIGHT_FORMATS, ExpertGemm, ExpertLayer, TileConfig

FORMATS = [form for form in WEIGHT_FORMATS if form != "dense"]
LAYER = ExpertLayer(hidden=128, intermediate=256, experts=4, top_k=2, dtype="fp32", weight_format="awq_g32")


class Packing(TorchKernel):
    """The tests' kernel, whose default stores weights in a layout of its own."""

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        found = super().default(gemm, tokens, environment, like)
        return found if like is not None else found.with_params(layout="transposed")


def runtime_with(kernel: TorchKernel) -> Runtime:
    return Runtime(TuningTable(), environment=cpu_environment(), registry=Registry((kernel,)))


@pytest.fixture(autouse=True)
def tests_kernel() -> Iterator[Runtime]:
    torch._dynamo.reset()
    yield use_runtime(runtime_with(TorchKernel()))
    torch._dynamo.reset()


def stacks(layer: ExpertLayer) -> tuple[QuantizedStack, QuantizedStack]:
    draw = torch.Generator().manual_seed(5)
    up, down = (
        quantize(torch.randn(layer.experts, gemm.n, gemm.k, generator=draw) / gemm.k**0.5, gemm) for gemm in layer.gemms
    )
    return up, down


def biases(layer: ExpertLayer) -> dict[str, torch.Tensor | None]:
    draw = torch.Generator().manual_seed(6)
    made = [torch.randn(layer.experts, gemm.n, generator=draw) if layer.bias else None for gemm in layer.gemms]
    return dict(zip(("bias13", "bias2"), made, strict=True))


def prepared(layer: ExpertLayer, runtime: Runtime | None = None) -> PreparedExperts:
    return prepare_experts(
        *stacks(layer), top_k=layer.top_k, activation=layer.activation, gated=layer.gated,
        dtype=TORCH_DTYPES[layer.dtype], runtime=runtime, **biases(layer),
    )  # fmt: skip


def exact(layer: ExpertLayer, given: tuple[torch.Tensor, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    hidden, ids, scales = given
    route = sort_slots(ids, layer.experts)
    return reference_layer(layer, hidden, *stacks(layer), route, scales, **biases(layer), dtype=dtype)


VARIED = [
    *(replace(LAYER, weight_format=form) for form in FORMATS),
    replace(LAYER, dtype="bf16", weight_format="fp8_block128", bias=True),
    replace(LAYER, dtype="fp16", weight_format="int4_g64", gated=False, activation="relu2"),
]


@pytest.mark.parametrize("layer", VARIED, ids=lambda layer: layer.label)
def test_prepared_and_functional_experts_give_one_result_in_every_format(layer: ExpertLayer) -> None:
    given = inputs(layer, 5)
    experts = prepared(layer)
    assert experts.layer == layer
    out = experts(*given)
    assert_as_good_as_torch(out, exact(layer, given), exact(layer, given, TORCH_DTYPES[layer.dtype]))
    assert torch.equal(experts.unpacked()[0].data.codes.view(torch.uint8), stacks(layer)[0].codes.view(torch.uint8))
    hidden, ids, scales = given
    functional = fused_experts(
        hidden, *stacks(layer), ids, scales, activation=layer.activation, gated=layer.gated, **biases(layer)
    )
    assert torch.equal(functional, out)


def test_packed_stacks_have_the_bits_of_plain_ones_and_come_back() -> None:
    given = inputs(LAYER, 4)
    packed = prepared(LAYER, runtime_with(Packing()))
    assert packed.packed and not prepared(LAYER).packed
    assert torch.equal(packed(*given), prepared(LAYER)(*given))
    for found, stack in zip(packed.unpacked(), stacks(LAYER), strict=True):
        assert isinstance(found.data, QuantizedStack) and torch.equal(found.data.codes, stack.codes)


def test_another_top_k_shares_the_stacks() -> None:
    first = prepared(LAYER)
    other = first.with_top_k(1)
    assert other is not None and other.unpacked()[0].data is first.unpacked()[0].data
    one = replace(LAYER, top_k=1)
    given = inputs(one, 3)
    assert torch.equal(other(*given), prepared(one)(*given))


def test_a_whole_block_runs_on_stacks() -> None:
    draw = torch.Generator().manual_seed(2)
    router = torch.randn(LAYER.experts, LAYER.hidden, generator=draw)
    block = MoeBlock(router, *stacks(LAYER), top_k=2, dtype=torch.float32)
    hidden = torch.randn(2, 3, LAYER.hidden, generator=draw)
    assert block(hidden).shape == hidden.shape and torch.isfinite(block(hidden)).all()


def test_calls_of_quantised_layers_are_recorded(tmp_path: Path) -> None:
    for runtime in (None, runtime_with(Packing())):
        experts = prepared(LAYER, runtime)
        recording.start(str(tmp_path / "record.json"))
        recorder = recording.active()
        assert recorder is not None
        experts(*inputs(LAYER, 3))
        (record,) = recorder.record().layers
        recording.stop()
        assert record.layer == LAYER and len(record.loads) == 1


@pytest.mark.parametrize("packing", [False, True])
def test_compiled_prepared_experts_have_the_eager_bits(packing: bool) -> None:
    experts = prepared(LAYER, runtime_with(Packing()) if packing else None)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for tokens in (3, 6):
        assert torch.equal(compiled(*inputs(LAYER, tokens)), experts(*inputs(LAYER, tokens)))


@pytest.mark.parametrize("form", ["awq_g32", "fp8_channel"])
def test_the_compiled_functional_form_has_the_eager_bits(form: str) -> None:
    layer = replace(LAYER, weight_format=form)
    w13, w2 = stacks(layer)

    def call(hidden: torch.Tensor, ids: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return fused_experts(hidden, w13, w2, ids, scales)

    given = inputs(layer, 3)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*given), call(*given))


def test_the_functional_form_keeps_no_stack_alive() -> None:
    w13, w2 = stacks(LAYER)
    hidden, ids, scales = inputs(LAYER, 2)
    fused_experts(hidden, w13, w2, ids, scales)
    gone = weakref.ref(w13.codes)
    del w13
    gc.collect()
    assert gone() is None


def test_the_functional_form_sees_that_scales_were_replaced() -> None:
    w13, w2 = stacks(LAYER)
    hidden, ids, scales = inputs(LAYER, 2)
    before = fused_experts(hidden, w13, w2, ids, scales)
    other = replace(w2, scales=w2.scales * 2)
    assert torch.equal(fused_experts(hidden, w13, other, ids, scales), 2 * before)


def mixed() -> tuple[Any, Any]:
    return stacks(LAYER)[0], stacks(replace(LAYER, weight_format="int4_g32"))[1]


@pytest.mark.parametrize(
    ("weights", "dtype", "message"),
    [
        (stacks(LAYER), None, "dtype is None with awq_g32 weights, expected the hidden states', one of fp32"),
        (
            stacks(LAYER),
            torch.float64,
            r"dtype is torch\.float64 with awq_g32 weights, expected the hidden",
        ),
        (
            mixed(),
            torch.float32,
            r"w13 is awq_g32 \(4, 512, 128\) and w2 int4_g32 .* expected one weight format",
        ),
        ((stacks(LAYER)[0], torch.zeros(4, 128, 256)), torch.float32, "expected one weight format for both"),
        (
            (torch.zeros(4, 512, 128), torch.zeros(4, 128, 256)),
            torch.bfloat16,
            r"dtype is torch\.bfloat16, expected torch\.f",
        ),
    ],
)
def test_weights_that_make_no_layer_are_refused(weights: tuple[Any, Any], dtype: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        layer_of(*weights, top_k=2, dtype=dtype)


def test_hidden_states_of_another_dtype_are_refused() -> None:
    hidden, ids, scales = inputs(LAYER, 2)
    with pytest.raises(InputError, match=r"expected torch\.float32 as the experts were prepared for"):
        prepared(LAYER)(hidden.bfloat16(), ids, scales)


def test_where_no_kernel_runs_the_format_one_line_says_so() -> None:
    runtime = runtime_with(TorchKernel(rejection="weight format awq_g32 is not dense"))
    with pytest.raises(DeviceError, match=r"no kernel runs E4 H128 I256 top2 fp32 awq_g32 .*is not dense") as caught:
        prepared(LAYER, runtime)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["awq_g32", "int4_g128", "int8_channel", "fp8_block128", "fp8_tensor"])
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2)])
def test_the_shards_add_up_to_the_layer(form: str, tp: int, ep: int) -> None:
    layer = replace(LAYER, weight_format=form, bias=True)
    hidden, ids, scales = given = inputs(layer, 4)
    total = torch.zeros(4, layer.hidden)
    for rank in range(tp * ep):
        shard = shard_experts(*stacks(layer), tp=tp, ep=ep, rank=rank, **biases(layer))
        local = layer_for_rank(layer, rank, tp=tp, ep=ep)
        part = prepare_experts(
            shard.w13, shard.w2, top_k=2, bias13=shard.bias13, bias2=shard.bias2, global_experts=4, dtype=torch.float32
        )
        assert part.layer == local
        mine = local_ids(ids, rank // tp * local.experts, local.experts)
        total += part(hidden, mine, scales, out_dtype=torch.float32)
    torch.testing.assert_close(total.double(), exact(layer, given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "tp", "message"),
    [
        ("awq_g32", 3, r"columns of I inside a group of 32 that shares a scale \(awq_g32\); tp that work: 1, 2, 4, 8$"),
        ("int4_g128", 4, "inside a group of 128 that shares a scale .*; tp that work: 1, 2$"),
        ("fp8_block128", 3, "inside a block of 128 that shares a scale"),
    ],
)
def test_cuts_inside_a_group_are_refused_with_what_works(form: str, tp: int, message: str) -> None:
    layer = replace(LAYER, weight_format=form)
    with pytest.raises(ModelError, match=message):
        shard_experts(*stacks(layer), tp=tp, rank=0)
    with pytest.raises(ModelError, match=message):
        layer_for_rank(layer, 0, tp=tp)


def test_formats_without_groups_are_cut_anywhere() -> None:
    layer = replace(LAYER, weight_format="int8_channel")
    assert layer_for_rank(layer, 0, tp=3).intermediate == 86
    assert shard_experts(*stacks(layer), tp=3, rank=2).w2.shape == (4, 128, 85)


def test_one_rank_holds_the_whole_layer() -> None:
    given = inputs(LAYER, 3)
    group = Group.connect(launched=False)
    experts = TensorParallelExperts(*stacks(LAYER), top_k=2, dtype=torch.float32, group=group)
    assert torch.equal(experts(*given), prepared(LAYER)(*given))
