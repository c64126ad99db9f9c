"""Experts on two devices. Here both are the CPU, by the same code: the bits of one device, whatever is placed where."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.cases import assert_as_good_as_torch, error
from tests.engine.tables import LAYER, decided, default_config, inputs, weights
from tests.torch_kernel import TorchKernel
from tilecast.autotune.classes import same_bits
from tilecast.engine import placement_stream, recording
from tilecast.engine.experts import PreparedExperts, prepare_experts
from tilecast.engine.placement import PlacedExperts, break_even, choose_near, place_experts
from tilecast.engine.runtime import misses, use_table
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import cpu_environment
from tilecast.errors import DeviceError, InputError, UsageError
from tilecast.evidence import TuningTable
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.formats import quantize
from tilecast.kernels.reference import reference_layer
from tilecast.kernels.routing import sort_slots
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

SHAPE = replace(LAYER, hidden=96, intermediate=64, experts=8, global_experts=8, top_k=3)
WIDE = replace(SHAPE, experts=10, global_experts=10, top_k=8)
SPLITS: tuple[tuple[int, ...], ...] = ((), (0,), (1, 4, 6), tuple(range(8)))
TOKENS = (0, 1, 4, 64)
EMPTY = TuningTable()
LAYERS = [
    *(replace(SHAPE, dtype=dtype) for dtype in TORCH_DTYPES),
    replace(SHAPE, dtype="bf16", bias=True, activation="swiglu_oai"),
    replace(WIDE, dtype="bf16"),
    replace(SHAPE, hidden=128, dtype="fp16", weight_format="awq_g32"),
    replace(SHAPE, hidden=128, dtype="bf16", weight_format="fp8_block128", bias=True),
]
MORE = [
    replace(SHAPE, dtype="fp16", gated=False, bias=True, activation="relu2"),
    replace(SHAPE, dtype="bf16", activation="relu"),
    replace(SHAPE, hidden=128, dtype="fp16", weight_format="int8_channel"),
    replace(SHAPE, hidden=128, dtype="fp32", weight_format="int4_g32", bias=True),
]


@cache
def given(layer: ExpertLayer) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """Return the weights of a layer, and the options that go with them."""
    w = weights(replace(layer, weight_format="dense"))
    stacks = (w.w13, w.w2)
    if layer.weight_format != "dense":
        stacks = (quantize(w.w13, layer.up), quantize(w.w2, layer.down))  # type: ignore[assignment]
    options = {"activation": layer.activation, "gated": layer.gated, "bias13": w.bias13, "bias2": w.bias2}
    return stacks, {"top_k": layer.top_k, "dtype": TORCH_DTYPES[layer.dtype], **options}


def prepared(layer: ExpertLayer, runtime: Runtime | None = None) -> PreparedExperts:
    stacks, options = given(layer)
    return prepare_experts(*stacks, **options, runtime=runtime)


def placed(layer: ExpertLayer, near_experts: tuple[int, ...], **more: Any) -> PlacedExperts:
    stacks, options = given(layer)
    return place_experts(*stacks, near_experts=near_experts, **{"near": "cpu", **options, **more})


def routed(layer: ExpertLayer, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return operands; from the fourth token on with absent slots of every kind."""
    hidden, ids, scales = inputs(layer, tokens)
    ids = ids.long()
    if tokens > 3:
        ids[1, 0], ids[2, -1], ids[3, 0] = -1, layer.experts, 1 << 40
        ids[tokens // 2 + 1] = -1
    return hidden, ids, scales


# Bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [*LAYERS, *(pytest.param(layer, marks=pytest.mark.long) for layer in MORE)], ids=lambda layer: layer.label
)
def test_no_split_changes_a_bit(layer: ExpertLayer) -> None:
    use_table(None)
    alone = prepared(layer)
    whole = tuple(range(layer.experts))
    for near_experts in (*SPLITS[:-1], whole):
        for stream_from in (None, 4) if len(near_experts) in (0, 3) else (None,):
            experts = placed(layer, near_experts, stream_from=stream_from)
            assert experts.one_class and experts.near_experts == near_experts
            assert sorted(experts.near_experts + experts.far_experts) == list(whole)
            for tokens in TOKENS:
                operands = routed(layer, tokens)
                for out_dtype in (None, torch.float32) if len(near_experts) == 3 else (None,):
                    found = experts(*operands, out_dtype=out_dtype)
                    wanted = alone(*operands, out_dtype=out_dtype)
                    assert found.dtype is wanted.dtype and found.shape == wanted.shape
                    assert same_bits(found, wanted), (near_experts, stream_from, tokens, out_dtype)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_the_error_is_no_larger_than_on_one_device(dtype: str) -> None:
    use_table(None)
    layer = replace(SHAPE, dtype=dtype)
    (w13, w2), _ = given(layer)
    hidden, ids, scales = routed(layer, 64)
    route = sort_slots(ids, layer.experts)
    exact = reference_layer(layer, hidden, w13, w2, route, scales)
    torchs = reference_layer(layer, hidden, w13, w2, route, scales, dtype=TORCH_DTYPES[dtype])
    one_device = error(prepared(layer)(hidden, ids, scales), exact)
    for near_experts in SPLITS:
        found = placed(layer, near_experts)(hidden, ids, scales)
        assert error(found, exact) <= one_device
        assert_as_good_as_torch(found, exact, torchs)


def test_slots_are_added_in_their_own_order_whoever_ran_them() -> None:
    """Three slots of which two cancel: any other order, near ones first say, loses the small one or does not."""
    use_table(None)
    w13, w2 = torch.zeros(3, 2, 1), torch.tensor([1e8, 1.0, -1e8]).view(3, 1, 1)
    w13[:, :] = 1.0
    hidden, scales = torch.ones(1, 1), torch.ones(1, 3)
    options: dict[str, Any] = {"top_k": 3, "activation": "relu"}
    seen = set()
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 0, 1]):
        ids = torch.tensor([order])
        wanted = prepare_experts(w13, w2, **options)(hidden, ids, scales)
        seen.add(float(wanted))
        for near_experts in ([], [0], [1], [2], [0, 1], [0, 2], [1, 2]):
            found = place_experts(w13, w2, near="cpu", near_experts=near_experts, **options)(hidden, ids, scales)
            assert torch.equal(found, wanted), (order, near_experts)
    assert seen == {0.0, 1.0}


def test_each_share_runs_what_its_table_decided() -> None:
    near_layer = replace(SHAPE, experts=3, global_experts=8)
    far_layer = replace(SHAPE, experts=5, global_experts=8)
    use_table(None)
    operands = [routed(SHAPE, tokens) for tokens in (1, 4, 16)]
    wanted = [prepared(SHAPE)(*each) for each in operands]

    def choose(gemm: ExpertGemm, tokens: int) -> TileConfig:
        found = default_config(gemm, tokens)
        return found.with_params(layout="panel32", mr=1, nv=4, block_n=128) if gemm.layer == far_layer else found

    use_table(decided(near_layer, far_layer, choose=choose), miss="error")
    for stream_from in (None, 2):
        experts = placed(SHAPE, (1, 4, 6), stream_from=stream_from)
        for each, result in zip(operands, wanted, strict=True):
            assert torch.equal(experts(*each), result)
    assert misses() == ()


def test_streaming_sends_used_experts_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    use_table(None)
    layer = replace(SHAPE, dtype="bf16", bias=True)
    each = sum(gemm.weight_bytes(1) for gemm in layer.gemms) + 2 * (layer.up.n + layer.down.n)
    sent: list[list[int]] = []
    arrived = placement_stream.WeightStream._arrived

    def noted(self: Any, room: int, chosen: list[int]) -> Any:
        sent.append([room, *chosen])
        return arrived(self, room, chosen)

    monkeypatch.setattr(placement_stream.WeightStream, "_arrived", noted)
    hidden, ids, scales = routed(layer, 20)
    ids[ids == 5] = 0
    wanted = prepared(layer)(hidden, ids, scales)
    for experts_at_once, batches in ((1, [1] * 4), (2, [2, 2]), (3, [3, 1]), (100, [4])):
        monkeypatch.setattr(placement_stream, "CHUNK_BYTES", each * experts_at_once)
        # Experts 0, 1 and 4 are near; of the far ones expert 5, at place 2, has no rows.
        experts = placed(layer, (0, 1, 4), stream_from=20)
        sent.clear()
        assert torch.equal(experts(hidden, ids, scales), wanted)
        assert [len(chosen) for _, *chosen in sent] == batches
        assert [expert for _, *chosen in sent for expert in chosen] == [0, 1, 3, 4]
        assert [room for room, *_ in sent] == [number % 2 for number in range(len(batches))]
        assert torch.equal(experts(hidden[:19], ids[:19], scales[:19]), wanted[:19]) and len(sent) == len(batches)
    hidden, ids, scales = (tensor[:20] for tensor in (hidden, torch.full_like(ids, 4), scales))
    sent.clear()
    assert torch.equal(experts(hidden, ids, scales), prepared(layer)(hidden, ids, scales)) and sent == []


def test_rooms_are_shared_by_layers_of_one_shape_and_go_with_the_last() -> None:
    use_table(None)
    before = len(placement_stream._rings)
    first, second = placed(SHAPE, (1,), stream_from=4), placed(SHAPE, (2,), stream_from=4)
    assert first._stream is not None and second._stream is not None
    assert first._stream._ring is second._stream._ring and len(placement_stream._rings) == before + 1
    del first, second
    gc.collect()
    assert len(placement_stream._rings) == before


# Two classes ----------------------------------------------------------------------------------------------------


def runtime_of(**params: Any) -> Runtime:
    """Return a runtime whose only kernel sums as `params` say; its classes are not the CPU kernels'."""

    class Chosen(TorchKernel):
        def default(self, *args: Any, **options: Any) -> TileConfig:
            return super().default(*args, **options).with_params(**params)

    return Runtime(EMPTY, environment=cpu_environment(), registry=Registry((Chosen(),)))


def test_an_expert_has_the_bits_of_the_device_it_is_on() -> None:
    use_table(None)
    near = runtime_of(chunk_k=64)
    ids = torch.arange(8)[:, None]
    hidden, _, _ = inputs(SHAPE, 8)
    layer, scales = replace(SHAPE, top_k=1), torch.ones(8, 1)
    here, there = prepared(layer, near)(hidden, ids, scales), prepared(layer)(hidden, ids, scales)
    assert not torch.equal(here, there)
    experts = placed(layer, (1, 4, 6), near_runtime=near)
    assert not experts.one_class
    chosen = torch.tensor([expert in (1, 4, 6) for expert in range(8)])[:, None]
    found = experts(hidden, ids, scales)
    assert torch.equal(found, torch.where(chosen, here, there))
    # The same for every batch: deterministic, and free of the other rows.
    for row in range(8):
        assert torch.equal(experts(hidden[row : row + 1], ids[row : row + 1], scales[row : row + 1])[0], found[row])


def test_streaming_between_classes_needs_the_fastest_policy() -> None:
    use_table(None)
    near = runtime_of(chunk_k=64)
    with pytest.raises(UsageError, match=r"stream_from is 4 under the reproducible policy.*two numerics classes") as no:
        placed(SHAPE, (1,), near_runtime=near, stream_from=4)
    assert "\n" not in str(no.value)
    with pytest.raises(UsageError, match="two numerics classes"):
        placed(SHAPE, (), near_runtime=near, stream_from=4)
    experts = placed(SHAPE, (1,), near_runtime=near, policy="fastest", stream_from=4)
    operands = routed(SHAPE, 8)
    wanted = prepared(SHAPE, near)(*operands)
    assert torch.equal(experts(*operands), wanted)
    assert not torch.equal(placed(SHAPE, (1,), near_runtime=near)(*operands), wanted)


# Around it ------------------------------------------------------------------------------------------------------


def test_one_graph_of_torch_compile_holds_the_call_as_one_operator() -> None:
    torch._dynamo.reset()
    use_table(None)
    experts = placed(replace(SHAPE, dtype="bf16"), (1, 4, 6), stream_from=9)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *operands: experts(*operands) * 2, fullgraph=True, backend=counter)
    for tokens in (5, 9, 2):
        operands = routed(experts.layer, tokens)
        for tensor in operands:
            torch._dynamo.mark_dynamic(tensor, 0)
        assert torch.equal(compiled(*operands), experts(*operands) * 2)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_weights_may_go_and_outputs_are_fresh() -> None:
    use_table(None)
    w = weights(SHAPE)
    operands = routed(SHAPE, 6)
    for stream_from in (None, 2):
        w13, w2 = w.w13.clone(), w.w2.clone()
        experts = place_experts(w13, w2, top_k=3, near_experts=[0, 5], near="cpu", stream_from=stream_from)
        first = experts(*operands)
        kept = first.clone()
        w13.fill_(torch.nan)
        w2.fill_(torch.nan)
        assert torch.equal(experts(*operands), kept)
        experts(*operands).zero_()
        assert torch.equal(first, kept)


def test_leading_dimensions_and_parameters() -> None:
    use_table(None)
    w, (hidden, ids, scales) = weights(SHAPE), inputs(SHAPE, 6)
    parameters = torch.nn.Parameter(w.w13), torch.nn.Parameter(w.w2)
    experts = place_experts(*parameters, top_k=3, near_experts=[0, 5], near="cpu", stream_from=6)
    out = experts(hidden, ids, scales)
    assert not out.requires_grad
    assert torch.equal(experts(hidden.view(2, 3, 96), ids.view(2, 3, 3), scales.view(2, 3, 3)), out.view(2, 3, 96))
    assert torch.equal(experts(hidden.double().to(torch.float32), ids.long(), scales.double()), out)
    assert experts(hidden.view(2, 3, 96)[:0], ids[:0], scales[:0]).shape == (0, 3, 96)


def test_both_shares_are_recorded_with_their_own_ids(tmp_path: Path) -> None:
    use_table(None)
    recording.start(str(tmp_path / "seen.json"))
    recorder = recording.active()
    assert recorder is not None
    try:
        experts = placed(SHAPE, (1, 4, 6))
        hidden, _, scales = inputs(SHAPE, 2)
        experts(hidden, torch.tensor([[1, 6, 0], [6, 7, -1]]), scales)
    finally:
        recording.stop()
    seen = {record.layer.experts: record for record in recorder.record().layers}
    assert {count: record.loads[0].slots for count, record in seen.items()} == {3: (1, 0, 2), 5: (1, 0, 0, 0, 1)}
    assert all(record.layer.global_experts == 8 and record.tokens[2].calls == 1 for record in seen.values())


def test_placements_that_do_not_fit() -> None:
    use_table(None)
    w = weights(SHAPE)
    for problem, message, options in [
        (InputError, r"near expert is 8, expected an integer from 0 to 7", {"near_experts": [0, 8]}),
        (InputError, r"near expert 3 is given twice", {"near_experts": [3, 3]}),
        (InputError, r"the near device is meta, expected cpu or cuda", {"near": "meta"}),
        (InputError, r"the near device is nowhere, expected", {"near": "nowhere"}),
        (InputError, r"the far device is cuda, expected cpu", {"far": "cuda"}),
        (InputError, r"stream_from is 0, expected", {"stream_from": 0}),
        (InputError, r"top-k is 9, more than the 8", {"top_k": 9}),
        (InputError, r"dtype is torch.float64", {"dtype": torch.float64}),
    ]:
        with pytest.raises(problem, match=message) as caught:
            place_experts(w.w13, w.w2, **{"top_k": 3, "near_experts": [0], "near": "cpu", **options})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="the near device is cuda:0, but torch sees 0 GPUs"):
            place_experts(w.w13, w.w2, top_k=3, near_experts=[0], near="cuda:0")
    experts = place_experts(w.w13, w.w2, top_k=3, near_experts=[0], near="cpu")
    hidden, ids, scales = inputs(SHAPE, 4)
    with pytest.raises(InputError, match=r"out_dtype is torch.float16, expected torch.float32"):
        experts(hidden, ids, scales, out_dtype=torch.float16)
    with pytest.raises(InputError, match=r"topk_ids is int32 \(4, 2\)"):
        experts(hidden, ids[:, :2], scales)


# What goes where, and from when on ------------------------------------------------------------------------------


def test_the_hottest_experts_are_near() -> None:
    counts = [3, 9, 0, 9, 4]
    assert choose_near(5, 0, counts=counts) == ()
    assert choose_near(5, 1, counts=counts) == (1,)
    assert choose_near(5, 3, counts=counts) == (1, 3, 4)
    assert choose_near(5, 5, counts=counts) == (0, 1, 2, 3, 4)
    assert choose_near(5, 2) == choose_near(5, 2, counts=[7] * 5) == (0, 1)
    assert choose_near(5, [4, 0]) == (0, 4) and choose_near(5, []) == ()


def test_as_many_experts_as_fit_are_near() -> None:
    counts = [1, 2, 3]
    for free, wanted in ((0, ()), (-5, ()), (99, ()), (100, (2,)), (299, (1, 2)), (1 << 50, (0, 1, 2))):
        assert choose_near(3, "auto", counts=counts, expert_bytes=100, free_bytes=free) == wanted


def test_choices_that_do_not_fit() -> None:
    for message, experts, options in [
        (r"number of near experts is 5, expected an integer from 0 to 4", 5, {}),
        (r"number of near experts is -1", -1, {}),
        (r"near experts are 'most', expected a number, auto or ids", "most", {}),
        (r"bytes of an expert is 0", "auto", {"free_bytes": 5}),
        (r"free memory is not known; give a number", "auto", {"expert_bytes": 5}),
        (r"near expert is 4, expected", [0, 4], {}),
        (r"near expert is 1.5", [1.5], {}),
        (r"near expert 2 is given twice", [2, 0, 2], {}),
        (r"counts are of 3 experts, the layer has 4", 2, {"counts": [1, 2, 3]}),
        (r"counts hold a number that is negative or not finite", 2, {"counts": [1, 2, 3, float("nan")]}),
    ]:
        with pytest.raises(InputError, match=message):
            choose_near(4, experts, **options)  # type: ignore[arg-type]


def test_the_break_even_is_where_streaming_wins_from_then_on() -> None:
    far = {1: 0.1, 16: 0.4, 64: 1.6, 256: 6.4}
    near = dict.fromkeys((1, 16, 64, 256, 512), 0.1)
    size, rate = 10, 20.0

    def found(**changes: Any) -> int | None:
        given = {"near_times": near, "far_times": far, "bytes_to_stream": size, "bytes_per_second": rate, **changes}
        return break_even(SHAPE, **given)

    assert found() == 64
    assert found(bytes_to_stream=0) == 16
    assert found(bytes_per_second=1.0) is None
    assert found(bytes_per_second=5.0) == 256
    assert found(far_times={**far, 64: 9.0, 256: 0.5}) is None
    assert found(far_times={**far, 16: 9.0, 64: 0.5}) == 256
    assert found(far_times={}) is None and found(near_times={3: 1e-9}) is None
    for message, changes in [
        (r"bytes per second is 0", {"bytes_per_second": 0}),
        (r"bytes per second is nan", {"bytes_per_second": float("nan")}),
        (r"bytes to stream is -1", {"bytes_to_stream": -1}),
        (r"far time at 16 tokens is -1", {"far_times": {16: -1.0}}),
        (r"tokens is 0", {"near_times": {0: 1.0}}),
    ]:
        with pytest.raises(InputError, match=message):
            found(**changes)
