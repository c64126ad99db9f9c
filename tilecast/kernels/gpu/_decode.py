# mypy: ignore-errors
"""Few tokens, no sorting: each slot, or each token with all its slots, is a program's own. Jit only.

Bound by the bytes of the weights: a tile of the tensor core holds one real row, and the expert is read from the
routing itself. Sums are the chains of the grouped kernels, so the bits are theirs.
"""

import triton
import triton.language as tl

from tilecast.kernels.gpu._tiles import (
    activate,
    add_bias,
    split_gate,
    store_tile,
    tile_columns,
    weight_pointers,
)


@triton.jit
def decode_up(rows, weights, bias, out, ids, EXPERTS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
              TOP_K: tl.constexpr, EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr,
              UP_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
              HAS_BIAS: tl.constexpr, BIAS_EXPERT: tl.constexpr, BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr,
              EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
              SWAP: tl.constexpr):  # fmt: skip
    """One slot and one column tile a program; grid (slots, column tiles); writes row `slot`."""
    slot = tl.program_id(0)
    tile_n = tl.program_id(1)
    expert = tl.load(ids + slot)
    if (expert < 0) | (expert >= EXPERTS):
        return
    row = rows + (slot // TOP_K).to(tl.int64) * K
    m = tl.arange(0, BLOCK_M)
    offsets_k = tl.arange(0, BLOCK_K)
    b_pointers, columns_inside = weight_pointers(
        weights, expert, tile_n, 0, EXPERT_STRIDE, COLUMN_STRIDE, UP_STRIDE, K_STRIDE, WIDTH, BLOCK_N, BLOCK_K, GATED,
        SWAP,
    )  # fmt: skip
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        a_pointers = row + offsets_k[:, None] + m[None, :] * 0
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        a_pointers = row + offsets_k[None, :] + m[:, None] * 0
    masks_n: tl.constexpr = K_STRIDE != 1 and not EVEN_N
    for k in range(0, K, BLOCK_K):
        inside = offsets_k < K - k
        # Only the first row is read; the others are zeros that belong to nobody.
        if SWAP:
            a = tl.load(a_pointers, mask=inside[:, None] & (m == 0)[None, :], other=0.0)
            b_mask = inside[None, :]
        else:
            a = tl.load(a_pointers, mask=inside[None, :] & (m == 0)[:, None], other=0.0)
            b_mask = inside[:, None]
        if masks_n:
            b_mask = b_mask & columns_inside
        if K % BLOCK_K == 0 and not masks_n:
            b = tl.load(b_pointers, eviction_policy="evict_first")
        else:
            b = tl.load(b_pointers, mask=b_mask, other=0.0, eviction_policy="evict_first")
        if SWAP:
            acc = tl.dot(b, a, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K * K_STRIDE
    if HAS_BIAS:
        columns, which = tile_columns(tile_n, BLOCK_N, GATED)
        acc = add_bias(acc, bias, columns, which, expert, WIDTH, BIAS_COLUMN, BIAS_UP, BIAS_EXPERT, SWAP)
    if GATED:
        gate, up = split_gate(acc, BLOCK_M, BLOCK_N, SWAP)
        value = activate(gate, up, ACTIVATION, True)
        columns = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        value = activate(acc, acc, ACTIVATION, False)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    store_tile(out, value, slot + m * 0, m == 0, columns, WIDTH, SWAP)


@triton.jit
def decode_down(rows, weights, bias, out, ids, scale, EXPERTS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
                TOP_K: tl.constexpr, SLOTS: tl.constexpr, EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr,
                K_STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_EXPERT: tl.constexpr, EVEN_N: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """One token and one column tile a program, over all its experts in slot order; grid (T, column tiles).

    Row j of the tile is slot j. While expert j's weights pass, the other rows are zeros, which add nothing to
    their sums (as long as weights are finite). So one pipelined loop runs over all experts, and the sum over slots
    needs no memory and no other launch. rows is the intermediate [T·k, I] in slot order; SLOTS is a power of two,
    at least TOP_K.
    """
    token = tl.program_id(0).to(tl.int64)
    tile_n = tl.program_id(1)
    m = tl.arange(0, SLOTS)
    offsets_k = tl.arange(0, BLOCK_K)
    # Loaded once: an index load within the loop would take pipeline stages from the weights.
    experts = tl.load(ids + token * TOP_K + m, mask=m < TOP_K, other=-1)
    # Only present slots take steps: under expert parallelism most of a token's experts are elsewhere.
    here = (experts >= 0) & (experts < EXPERTS)
    order = tl.cumsum(here.to(tl.int32), 0) - 1
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_inside = columns < WIDTH
    column_offsets = tl.minimum(columns, WIDTH - 1).to(tl.int64) * COLUMN_STRIDE
    row_offsets = (token * TOP_K + m) * K
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if SWAP:
        acc = tl.zeros((BLOCK_N, SLOTS), tl.float32)
    else:
        acc = tl.zeros((SLOTS, BLOCK_N), tl.float32)
    for step in range(0, tl.sum(here.to(tl.int32), 0) * steps):
        k = step % steps * BLOCK_K + offsets_k
        inside = k < K
        current = here & (order == step // steps)
        expert = tl.sum(tl.where(current, experts, 0), 0)
        base = weights + expert.to(tl.int64) * EXPERT_STRIDE
        if SWAP:
            a_mask = inside[:, None] & current[None, :]
            a = tl.load(rows + row_offsets[None, :] + k[:, None], mask=a_mask, other=0.0)
            b_mask = inside[None, :] & columns_inside[:, None]
            b_pointers = base + column_offsets[:, None] + k[None, :].to(tl.int64) * K_STRIDE
            b = tl.load(b_pointers, mask=b_mask, other=0.0, eviction_policy="evict_first")
            acc = tl.dot(b, a, acc, input_precision="ieee")
        else:
            a_mask = inside[None, :] & current[:, None]
            a = tl.load(rows + row_offsets[:, None] + k[None, :], mask=a_mask, other=0.0)
            b_mask = inside[:, None] & columns_inside[None, :]
            b_pointers = base + column_offsets[None, :] + k[:, None].to(tl.int64) * K_STRIDE
            b = tl.load(b_pointers, mask=b_mask, other=0.0, eviction_policy="evict_first")
            acc = tl.dot(a, b, acc, input_precision="ieee")
    total = tl.zeros((BLOCK_N,), tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(ids + token * TOP_K + slot)
        present = (expert >= 0) & (expert < EXPERTS)
        # All but one of the summands are zeros: a selection, not a sum.
        if SWAP:
            value = tl.sum(tl.where((m == slot)[None, :], acc, 0.0), 1)
        else:
            value = tl.sum(tl.where((m == slot)[:, None], acc, 0.0), 0)
        if HAS_BIAS:
            offset = tl.where(present, expert, 0).to(tl.int64) * BIAS_EXPERT
            value += tl.load(bias + offset + columns, mask=columns_inside & present, other=0.0).to(tl.float32)
        weight = tl.load(scale + token * TOP_K + slot)
        total += tl.where(present, value * weight, 0.0)
    tl.store(out + token * WIDTH + columns, total.to(out.dtype.element_ty), mask=columns_inside)
