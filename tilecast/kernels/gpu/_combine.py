# mypy: ignore-errors
"""The ordered combine: a token's slots are summed in slot order in float32, with one rounding. Jit only."""

import triton
import triton.language as tl


@triton.jit
def combine(partial, ids, out, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Sum float32 partial [T·k, WIDTH], already weighted, into out [T, WIDTH]; grid (T, column blocks)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for position in tl.static_range(TOP_K):
        slot = token * TOP_K + position
        expert = tl.load(ids + slot)
        present = (expert >= 0) & (expert < EXPERTS)
        total += tl.load(partial + slot * WIDTH + columns, mask=inside & present, other=0.0)
    tl.store(out + token * WIDTH + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["split_stride"])
def combine_splits(partial, bias, ids, scale, out, split_stride: tl.int64, SPLITS: tl.constexpr, EXPERTS: tl.constexpr,
                   TOP_K: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_EXPERT: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """As `combine`, from unweighted partial sums [SPLITS, T·k, WIDTH] that are added in the order of K first."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for position in tl.static_range(TOP_K):
        slot = token * TOP_K + position
        expert = tl.load(ids + slot)
        present = (expert >= 0) & (expert < EXPERTS)
        mask = inside & present
        value = tl.load(partial + slot * WIDTH + columns, mask=mask, other=0.0)
        for split in tl.static_range(1, SPLITS):
            value += tl.load(partial + split * split_stride + slot * WIDTH + columns, mask=mask, other=0.0)
        if HAS_BIAS:
            value += tl.load(bias + expert.to(tl.int64) * BIAS_EXPERT + columns, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(scale + slot, mask=present, other=0.0)
        total += value * weight
    tl.store(out + token * WIDTH + columns, total.to(out.dtype.element_ty), mask=inside)
