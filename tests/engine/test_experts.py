from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from tests.engine.tables import LAYER, decided, default_config, inputs, weights
from tilecast.engine import runtime
from tilecast.engine.experts import MoeBlock, prepare_experts
from tilecast.engine.functional import fused_experts
from tilecast.engine.operands import layer_of
from tilecast.engine.runtime import use_table
from tilecast.errors import CoverageError, InputError
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.reference import reference_layer
from tilecast.kernels.routing import route, sort_slots
from tilecast.problem import ExpertGemm, ExpertLayer, TileConfig

CASES = [
    LAYER,
    replace(LAYER, dtype="bf16"),
    replace(LAYER, hidden=33, intermediate=47, top_k=1),
    replace(LAYER, hidden=33, intermediate=47, dtype="bf16", bias=True, activation="swiglu_oai"),
    replace(LAYER, gated=False, activation="relu2", bias=True),
    replace(LAYER, experts=1, global_experts=1, top_k=1),
    replace(LAYER, experts=16, global_experts=16, top_k=16),
]


def run_both(layer: ExpertLayer, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the prepared, the functional and the float64 result."""
    w = weights(layer)
    hidden, ids, scales = inputs(layer, tokens)
    options = {"activation": layer.activation, "gated": layer.gated, "bias13": w.bias13, "bias2": w.bias2}
    prepared = prepare_experts(w.w13, w.w2, top_k=layer.top_k, **options)  # type: ignore[arg-type]
    assert prepared.layer == layer
    functional = fused_experts(hidden, w.w13, w.w2, ids, scales, **options)  # type: ignore[arg-type]
    wanted = reference_layer(layer, hidden, w.w13, w.w2, sort_slots(ids, layer.experts), scales, w.bias13, w.bias2)
    return prepared(hidden, ids, scales), functional, wanted


@pytest.mark.parametrize("layer", CASES, ids=lambda layer: layer.label)
@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_both_forms_give_the_layers_result_and_the_same_bits(layer: ExpertLayer, tokens: int) -> None:
    use_table(None)
    prepared, functional, wanted = run_both(layer, tokens)
    assert prepared.dtype == functional.dtype == TORCH_DTYPES[layer.dtype]
    assert prepared.shape == functional.shape == (tokens, layer.hidden)
    assert torch.equal(prepared, functional)
    relative = 1e-5 if layer.dtype == "fp32" else 2e-2
    torch.testing.assert_close(prepared.double(), wanted, rtol=relative, atol=relative)


def test_a_decided_config_runs_and_gives_the_same_bits_as_any_other() -> None:
    w, (hidden, ids, scales) = weights(LAYER), inputs(LAYER, 16)
    use_table(None)
    wanted = prepare_experts(w.w13, w.w2, top_k=2)(hidden, ids, scales)

    def choose(gemm: ExpertGemm, tokens: int) -> TileConfig:
        return default_config(gemm, tokens).with_params(layout="panel32", mr=1, nv=4, block_n=128)

    use_table(decided(LAYER, tokens=(4, 16), choose=choose))
    tuned = prepare_experts(w.w13, w.w2, top_k=2)
    assert torch.equal(tuned(hidden, ids, scales), wanted)
    assert torch.equal(fused_experts(hidden, w.w13, w.w2, ids, scales), wanted)
    alone = [tuned(hidden[t : t + 1], ids[t : t + 1], scales[t : t + 1]) for t in range(16)]
    assert torch.equal(torch.cat(alone), wanted)
    assert runtime.misses() == ()


def test_prepared_experts_keep_the_table_they_were_made_with() -> None:
    w, operands = weights(LAYER), inputs(LAYER, 3)
    use_table(decided(LAYER, choose=lambda g, t: default_config(g, t).with_params(layout="panel32")))
    prepared = prepare_experts(w.w13, w.w2, top_k=2)
    wanted = prepared(*operands)
    use_table(None)
    assert torch.equal(prepared(*operands), wanted)
    assert runtime.misses() == ()
    assert prepared.runtime.misses() == ()


def test_packed_weights_outlive_the_plain_ones() -> None:
    use_table(None)
    w, operands = weights(LAYER), inputs(LAYER, 3)
    prepared = prepare_experts(w.w13, w.w2, top_k=2)
    wanted = prepared(*operands)
    w.w13.fill_(torch.nan)
    w.w2.fill_(torch.nan)
    assert torch.equal(prepared(*operands), wanted)


def test_the_functional_form_sees_weights_changed_in_place_and_replaced() -> None:
    use_table(None)
    w, (hidden, ids, scales) = weights(LAYER), inputs(LAYER, 3)
    first = fused_experts(hidden, w.w13, w.w2, ids, scales)
    w.w2.mul_(2)
    assert torch.equal(fused_experts(hidden, w.w13, w.w2, ids, scales), first * 2)
    other = w.w2 / 2
    assert torch.equal(fused_experts(hidden, w.w13, other, ids, scales), first)
    w.w13.data = weights(LAYER, seed=9).w13
    changed = fused_experts(hidden, w.w13, other, ids, scales)
    assert not torch.equal(changed, first)
    assert torch.equal(changed, fused_experts(hidden, w.w13.clone(), other, ids, scales))


def test_outputs_are_fresh_each_time() -> None:
    use_table(None)
    w, operands = weights(LAYER), inputs(LAYER, 3)
    prepared = prepare_experts(w.w13, w.w2, top_k=2)
    first = prepared(*operands)
    kept = first.clone()
    second = prepared(*operands)
    second.zero_()
    assert torch.equal(first, kept)


def test_shapes_id_dtypes_and_weight_dtypes_that_are_taken() -> None:
    use_table(None)
    w, (hidden, ids, scales) = weights(LAYER), inputs(LAYER, 6)
    prepared = prepare_experts(w.w13, w.w2, top_k=2)
    wanted = prepared(hidden, ids, scales)
    assert torch.equal(prepared(hidden.view(2, 3, 64), ids.view(2, 3, 2), scales.view(2, 3, 2)).view(6, 64), wanted)
    assert prepared(hidden.view(2, 3, 64), ids, scales).shape == (2, 3, 64)
    assert torch.equal(prepared(hidden[0], ids[:1], scales[:1]), wanted[0])
    assert torch.equal(prepared(hidden.T.contiguous().T, ids.long(), scales.double()), wanted)
    assert torch.equal(prepared(hidden, ids.T.contiguous().T, scales.T.contiguous().T), wanted)
    half = scales.to(torch.bfloat16)
    assert torch.equal(prepared(hidden, ids, half), prepared(hidden, ids, half.float()))
    assert prepared(hidden.view(2, 3, 64)[:0], ids[:0], scales[:0]).shape == (0, 3, 64)


def test_absent_slots_count_as_zero() -> None:
    use_table(None)
    w, (hidden, ids, scales) = weights(LAYER), inputs(LAYER, 4)
    prepared = prepare_experts(w.w13, w.w2, top_k=2)
    absent = ids.long()
    absent[0] = -1
    absent[1, 1] = LAYER.experts
    absent[2, 0] = 1 << 40
    out = prepared(hidden, absent, scales)
    assert torch.equal(out[0], torch.zeros(64))
    assert torch.equal(out[1:2], prepared(hidden[1:2], ids[1:2], scales[1:2] * torch.tensor([[1.0, 0.0]])))
    assert torch.equal(out[3:], prepared(hidden, ids, scales)[3:])


def test_a_partial_sum_is_float32_and_not_rounded() -> None:
    use_table(None)
    layer = replace(LAYER, dtype="bf16")
    w, operands = weights(layer), inputs(layer, 4)
    prepared = prepare_experts(w.w13, w.w2, top_k=2)
    partial = prepared(*operands, out_dtype=torch.float32)
    assert partial.dtype == torch.float32
    assert not torch.equal(partial, partial.bfloat16().float())
    assert torch.equal(partial.bfloat16(), prepared(*operands))
    with pytest.raises(InputError, match=r"out_dtype is torch.float16, expected torch.bfloat16"):
        prepared(*operands, out_dtype=torch.float16)


def test_the_policy_of_one_layer_can_be_another() -> None:
    use_table(decided(LAYER, policy="fastest"), policy="reproducible", miss="error")
    w, operands = weights(LAYER), inputs(LAYER, 4)
    assert prepare_experts(w.w13, w.w2, top_k=2, policy="fastest")(*operands).shape == (4, 64)
    with pytest.raises(CoverageError, match="decided for fastest"):
        prepare_experts(w.w13, w.w2, top_k=2)(*operands)


def test_weights_that_do_not_fit() -> None:
    w = weights(replace(LAYER, bias=True))
    w13, w2, bias13, bias2 = w
    assert bias13 is not None and bias2 is not None
    for message, arguments, options in [
        (r"w13 is float32 \(4, 192, 64\), expected \(4, 96, 64\).*gated=False", (w13, w2), {"gated": False}),
        (r"w13 is float32 \(192, 64\).*expected \[E, 2I, H\]", (w13[0], w2), {}),
        (r"w13 is torch.float32 and w2 torch.bfloat16", (w13, w2.bfloat16()), {}),
        (r"w13 is torch.float64", (w13.double(), w2.double()), {}),
        (r"w13 \(4, 192, 64\) is not contiguous", (w13.mT.contiguous().mT, w2), {}),
        (r"top-k is 0", (w13, w2), {"top_k": 0}),
        (r"top-k is 5, more than the 4", (w13, w2), {"top_k": 5}),
        (r"activation is 'mish'", (w13, w2), {"activation": "mish"}),
        (r"one of bias13 and bias2", (w13, w2), {"bias13": bias13}),
        (r"bias2 is float32 \(4, 192\), expected floats \(4, 64\)", (w13, w2), {"bias13": bias13, "bias2": bias13}),
        (r"number of global experts is 3", (w13, w2), {"global_experts": 3}),
        (r"number of experts E is 0", (w13[:0], w2[:0]), {}),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            layer_of(*arguments, **{"top_k": 2, **options})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_operands_that_do_not_fit() -> None:
    use_table(None)
    w, (hidden, ids, scales) = weights(LAYER), inputs(LAYER, 6)
    prepared = prepare_experts(w.w13, w.w2, top_k=2)
    for message, arguments in [
        (r"hidden is torch.bfloat16, expected torch.float32", (hidden.bfloat16(), ids, scales)),
        (r"hidden is float32 \(6, 63\), expected \[..., 64\]", (hidden[:, 1:], ids, scales)),
        (r"topk_ids is int32 \(5, 2\), expected int32 or int64 \(6, 2\)", (hidden, ids[1:], scales)),
        (r"topk_ids is int32 \(6, 1\)", (hidden, ids[:, :1], scales[:, :1])),
        (r"topk_ids is float32", (hidden, scales, scales)),
        (r"topk_ids is uint8", (hidden, ids.to(torch.uint8), scales)),
        (r"topk_weights is float32 \(2, 6\)", (hidden, ids, scales.T)),
        (r"topk_weights is int32", (hidden, ids, ids)),
        (r"topk_ids is int32 \(\)", (hidden, ids[0, 0], scales)),
        (r"hidden requires grad.*inference_mode", (hidden.clone().requires_grad_(), ids, scales)),
        (r"on meta.*expected one device", (hidden, ids.to("meta"), scales)),
    ]:
        with pytest.raises(InputError, match=message):
            prepared(*arguments)
        if "6, 1" not in message:  # the functional form takes top-k from the ids
            with pytest.raises(InputError):
                fused_experts(arguments[0], w.w13, w.w2, *arguments[1:])
    with torch.no_grad():
        assert prepared(hidden.clone().requires_grad_(), ids, scales).shape == hidden.shape


def test_parameters_are_taken_without_becoming_part_of_a_graph() -> None:
    use_table(None)
    w, operands = weights(LAYER), inputs(LAYER, 6)
    w13, w2 = torch.nn.Parameter(w.w13), torch.nn.Parameter(w.w2)
    out = fused_experts(operands[0], w13, w2, *operands[1:])
    assert not out.requires_grad
    assert torch.equal(prepare_experts(w13, w2, top_k=2)(*operands), out)


@pytest.mark.parametrize(("scoring", "renormalize"), [("softmax", True), ("softmax", False), ("sigmoid", True)])
def test_a_block_routes_and_runs(scoring: str, renormalize: bool) -> None:
    use_table(None)
    w, (hidden, _, _) = weights(LAYER), inputs(LAYER, 6)
    router = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    block = MoeBlock(router, w.w13, w.w2, top_k=2, scoring=scoring, renormalize=renormalize)
    ids, scales = route(hidden, router, 2, scoring=scoring, renormalize=renormalize)
    wanted = fused_experts(hidden, w.w13, w.w2, ids, scales)
    assert torch.equal(block(hidden), wanted)
    assert torch.equal(block(hidden.view(3, 2, 64)).view(6, 64), wanted)
    assert block(hidden[:0]).shape == (0, 64)
    rows = torch.cat([block(hidden[t : t + 1]) for t in range(6)])
    assert torch.equal(rows, wanted)


def test_a_block_does_not_change_dtype_and_has_no_state() -> None:
    use_table(None)
    w, (hidden, _, _) = weights(LAYER), inputs(LAYER, 6)
    block = MoeBlock(torch.nn.Parameter(torch.ones(4, 64)), w.w13, w.w2, top_k=2)
    wanted = block(hidden)
    assert block.state_dict() == {} and list(block.parameters()) == []
    assert torch.equal(block.to(torch.bfloat16)(hidden), wanted)
    with pytest.raises(InputError, match=r"hidden is float32 \(6, 63\)"):
        block(hidden[:, 1:])
    with pytest.raises(InputError, match="router_weight is float32"):
        MoeBlock(torch.ones(5, 64), w.w13, w.w2, top_k=2)
    with pytest.raises(InputError, match="scoring is 'tanh'"):
        MoeBlock(torch.ones(4, 64), w.w13, w.w2, top_k=2, scoring="tanh")


def test_the_table_may_hold_a_kernel_that_cannot_read_plain_weights(caplog: pytest.LogCaptureFixture) -> None:
    """The functional form then takes plain weights in the same class, quietly."""
    w, operands = weights(LAYER), inputs(LAYER, 3)
    use_table(decided(LAYER, choose=lambda g, t: default_config(g, t).with_params(layout="panel16")))
    wanted = prepare_experts(w.w13, w.w2, top_k=2)(*operands)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(fused_experts(operands[0], w.w13, w.w2, *operands[1:]), wanted)
    assert caplog.records == []
