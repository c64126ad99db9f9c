"""Cutting and turning stacks of every format keeps the numbers that they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tilecast.errors import InputError
from tilecast.kernels.formats import QuantizedStack, quantize
from tilecast.kernels.stacks import backward, cut_stack, detached, reversal, tensors_of
from tilecast.problem import WEIGHT_FORMATS, ExpertGemm, ExpertLayer, weight_format

FORMATS = [form for form in WEIGHT_FORMATS if form != "dense"]


def stack_of(gemm: ExpertGemm) -> QuantizedStack:
    generator = torch.Generator().manual_seed(3)
    return quantize(torch.randn(gemm.layer.experts, gemm.n, gemm.k, generator=generator), gemm)


def dense(stack: QuantizedStack, gemm: ExpertGemm) -> torch.Tensor:
    return torch.stack([stack.dequantized(gemm, expert) for expert in range(gemm.layer.experts)])


def layer(form: str, *, hidden: int = 256, intermediate: int = 256, gated: bool = True) -> ExpertLayer:
    return ExpertLayer(
        hidden=hidden, intermediate=intermediate, experts=3, top_k=1, weight_format=form, gated=gated, activation="relu"
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_the_parts_are_parts_of_the_dequantised_whole(form: str, gated: bool) -> None:
    whole = layer(form, gated=gated)
    half = replace(whole, intermediate=128, experts=2, global_experts=3)
    starts = (0, 256) if gated else (0,)
    rows = [range(start + 128, start + 256) for start in starts]
    up, down = stack_of(whole.up), stack_of(whole.down)
    first = cut_stack(up, whole.up, slice(1, 3), rows)
    first.check(half.up)
    expected = torch.cat([dense(up, whole.up)[1:, part.start : part.stop] for part in rows], dim=1)
    assert torch.equal(dense(first, half.up), expected)
    second = cut_stack(down, whole.down, slice(1, 3), [range(256)], range(128, 256))
    second.check(half.down)
    assert torch.equal(dense(second, half.down), dense(down, whole.down)[1:, :, 128:])


def test_cuts_inside_a_group_or_a_block_are_refused() -> None:
    grouped = layer("awq_g128")
    with pytest.raises(InputError, match="a cut at 64 elements of K is inside a block of 128"):
        cut_stack(stack_of(grouped.down), grouped.down, slice(None), [range(256)], range(64))
    blocks = layer("fp8_block128")
    with pytest.raises(InputError, match="a cut at 64 rows is inside a block of 128"):
        cut_stack(stack_of(blocks.up), blocks.up, slice(None), [range(64), range(256, 320)])


@pytest.mark.parametrize("form", FORMATS)
def test_weights_turned_around_are_those_of_the_turned_columns(form: str) -> None:
    # A last block of fp8 that is not whole stays in its place.
    hidden = 200 if form.startswith("fp8") else 256
    gemm = layer(form, hidden=hidden).up
    order = reversal(gemm)
    assert sorted(order.tolist()) == list(range(hidden))
    assert order[0] == (127 if form == "fp8_block128" else hidden - 1)
    stack = stack_of(gemm)
    turned = backward(stack, gemm)
    assert isinstance(turned, QuantizedStack)
    turned.check(gemm)
    assert torch.equal(dense(turned, gemm), dense(stack, gemm)[..., order])


def test_dense_weights_are_turned_whole() -> None:
    gemm = ExpertLayer(hidden=33, intermediate=7, experts=2, top_k=1).up
    weights = torch.randn(2, 14, 33)
    turned = backward(weights, gemm)
    assert isinstance(turned, torch.Tensor) and torch.equal(turned, weights.flip(-1))


@pytest.mark.parametrize("form", ["awq_g32", "int8_g64", "fp8_block128", "fp8_tensor"])
def test_rows_of_an_expert_alone_are_rows_of_all(form: str) -> None:
    gemm = layer(form).up
    stack = stack_of(gemm)
    rows = slice(120, 300)
    assert torch.equal(stack.dequantized(gemm, 1, rows=rows), stack.dequantized(gemm, 1)[rows])


def test_detached_stacks_share_memory_but_no_tensor() -> None:
    stack = stack_of(layer("awq_g64").up)
    other = detached(stack)
    pairs = list(zip(tensors_of(stack), tensors_of(other), strict=True))
    assert len(pairs) == (3 if weight_format(stack.format).kind == "awq" else 2)
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)
