# mypy: ignore-errors
"""GEMMs on quantised weights: codes are read as checkpoints store them and become numbers in registers. Jit only.

KIND: `awq`, `int4`, `int8` or `fp8`. GROUP: elements of K that share a scale, which then multiplies each weight before
it is rounded to the rows' dtype; 0 where a scale holds for all of K and multiplies the sum instead. A tile of codes is
[BLOCK_N, bytes of BLOCK_K], or words of eight where codes have 4 bits, K contiguous. BITWISE: e4m3 is widened by
moving bits, for want of an instruction.
"""

import triton
import triton.language as tl

from tilecast.kernels.gpu._tiles import (
    activate,
    add_bias,
    finish_tile,
    row_pointers,
    split_gate,
    store_tile,
    tile_columns,
    tile_position,
)


@triton.jit
def code_values(codes, KIND: tl.constexpr, BITWISE: tl.constexpr):
    """Return what loaded codes stand for, 128 more where they have 4 bits: float32 [BLOCK_N, BLOCK_K].

    Codes of integers become floats as low bits of a larger number's significand: conversions are slow instructions.
    """
    if KIND == "awq" or KIND == "int4":
        # Nibble k of a word is weight k: those of k and k + 4 become two bfloat16 128 + code at once.
        words = codes.to(tl.uint32, bitcast=True)
        pair0 = (words & 0x000F000F) | 0x43004300
        pair1 = ((words >> 4) & 0x000F000F) | 0x43004300
        pair2 = ((words >> 8) & 0x000F000F) | 0x43004300
        pair3 = ((words >> 12) & 0x000F000F) | 0x43004300
        first = tl.join(tl.join(pair0 << 16, pair1 << 16), tl.join(pair2 << 16, pair3 << 16))
        upper: tl.constexpr = 0xFFFF0000
        second = tl.join(tl.join(pair0 & upper, pair1 & upper), tl.join(pair2 & upper, pair3 & upper))
        # The bits of k, least first, are the last three dimensions: all of a word stays in one thread.
        bits = tl.join(first, second).permute(0, 1, 4, 3, 2).reshape(codes.shape[0], 8 * codes.shape[1])
        values = bits.to(tl.float32, bitcast=True)
    elif KIND == "int8":
        # 2**23 + 128 + code, less what is too much of it.
        words = (codes.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint32)
        values = (words | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    elif BITWISE:
        # e4m3 within the bits of a float16 is 2**-8 times its value, subnormals too; but for NaN.
        wide = codes.to(tl.uint16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        values = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        values = tl.where((codes & 0x7F) == 0x7F, float("nan"), values)
    else:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return values


@triton.jit
def scaled(values, scale, zero, KIND: tl.constexpr):
    """Return (code - zero) · scale, rounded once in float32; scale and zero are broadcast to the values."""
    wide = scale.to(tl.float32)
    if KIND == "awq" or KIND == "int4":
        if KIND == "awq":
            base = zero.to(tl.float32) + 128.0
        else:
            base = wide * 0.0 + 136.0
        if scale.dtype == tl.float32:
            return (values - base) * wide
        else:
            # Exact, and so the same: the scale has 11 bits at most, what it multiplies 8.
            return tl.fma(values, wide.broadcast_to(values.shape), (-base * wide).broadcast_to(values.shape))
    else:
        return values * wide


@triton.jit
def weight_values(codes, scales, zeros, k, KIND: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
                  BITWISE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Return the weights of a step that begins at k, float32 [BLOCK_N, BLOCK_K]; codes alone where GROUP is 0.

    scales and zeros are pointers [BLOCK_N] to the first group of each row.
    """
    values = code_values(codes, KIND, BITWISE)
    if GROUP >= BLOCK_K:
        scale = tl.load(scales + k // GROUP)
        if KIND == "awq":
            zero = tl.load(zeros + k // GROUP)
        else:
            zero = scale
        values = scaled(values, scale[:, None], zero[:, None], KIND)
    elif GROUP > 0:
        parts: tl.constexpr = BLOCK_K // GROUP
        groups = k // GROUP + tl.arange(0, parts)
        inside = (groups < (K + GROUP - 1) // GROUP)[None, :]
        scale = tl.load(scales[:, None] + groups[None, :], mask=inside, other=0.0)
        if KIND == "awq":
            zero = tl.load(zeros[:, None] + groups[None, :], mask=inside, other=0)
        else:
            zero = scale
        values = values.reshape(BLOCK_N, parts, GROUP)
        values = scaled(values, scale[:, :, None], zero[:, :, None], KIND).reshape(BLOCK_N, BLOCK_K)
    return values


@triton.jit
def scale_places(expert, columns, which, SCALE_EXPERT: tl.constexpr, SCALE_ROW: tl.constexpr,
                 SCALE_BLOCK: tl.constexpr, SCALE_UP: tl.constexpr):  # fmt: skip
    """Return where scales of weight columns begin: SCALE_BLOCK columns share them, SCALE_UP rows lie before up's."""
    rows = which * SCALE_UP + columns // SCALE_BLOCK
    return expert.to(tl.int64) * SCALE_EXPERT + rows.to(tl.int64) * SCALE_ROW


@triton.jit
def scale_sums(acc, scales, SWAP: tl.constexpr):
    """Return sums times the scales [BLOCK_N] of their columns, which hold for all of K."""
    values = tl.load(scales).to(tl.float32)
    if SWAP:
        return acc * values[:, None]
    else:
        return acc * values[None, :]


@triton.jit
def code_tile(tile, m_tiles, rows, weights, scales, zeros, bias, out, slots, topk_weights, tile_experts, tile_starts,
              tile_ends, UP: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
              N_TILES: tl.constexpr, EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr,
              UP_STRIDE: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SCALE_EXPERT: tl.constexpr,
              SCALE_ROW: tl.constexpr, SCALE_BLOCK: tl.constexpr, SCALE_UP: tl.constexpr, BITWISE: tl.constexpr,
              ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_EXPERT: tl.constexpr,
              BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """Compute one output tile over expert-sorted rows."""
    tile_m, tile_n = tile_position(tile, m_tiles, N_TILES, GROUP_M)
    expert = tl.load(tile_experts + tile_m)
    start = tl.load(tile_starts + tile_m)
    end = tl.load(tile_ends + tile_m)
    positions = start + tl.arange(0, BLOCK_M)
    rows_inside = positions < end
    # As in `grouped_tile`: rows of padding compute on the expert's last row, columns beyond the last one on that.
    safe = tl.minimum(positions, end - 1)
    if UP:
        numbers = tl.load(slots + safe) // TOP_K
    else:
        numbers = safe
    a_pointers = row_pointers(rows, numbers, 0, K, BLOCK_K, SWAP)
    columns, which = tile_columns(tile_n, BLOCK_N, UP and GATED)
    columns = tl.minimum(columns, WIDTH - 1)
    held: tl.constexpr = 8 if KIND == "awq" or KIND == "int4" else 1
    offsets = expert.to(tl.int64) * EXPERT_STRIDE + columns.to(tl.int64) * COLUMN_STRIDE + which * UP_STRIDE
    b_pointers = weights + offsets[:, None] + tl.arange(0, BLOCK_K // held)[None, :]
    places = scale_places(expert, columns, which, SCALE_EXPERT, SCALE_ROW, SCALE_BLOCK, SCALE_UP)
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_pointers)
            codes = tl.load(b_pointers)
        else:
            inside = tl.arange(0, BLOCK_K) < K - k
            if SWAP:
                a = tl.load(a_pointers, mask=inside[:, None], other=0.0)
            else:
                a = tl.load(a_pointers, mask=inside[None, :], other=0.0)
            codes = tl.load(b_pointers, mask=(tl.arange(0, BLOCK_K // held) < (K - k) // held)[None, :], other=0)
        values = weight_values(
            codes, scales + places, zeros + places, k, KIND, GROUP, K, BITWISE, BLOCK_N, BLOCK_K
        ).to(a.dtype)  # fmt: skip
        if SWAP:
            acc = tl.dot(values, a, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, values.T, acc, input_precision="ieee")
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K // held
    if GROUP == 0:
        acc = scale_sums(acc, scales + places, SWAP)
    finish_tile(
        acc, bias, out, slots, topk_weights, expert, positions, rows_inside, tile_n, UP, WIDTH, ACTIVATION, GATED,
        HAS_BIAS, BIAS_EXPERT, BIAS_COLUMN, BIAS_UP, BLOCK_M, BLOCK_N, SWAP,
    )  # fmt: skip


@triton.jit
def code_grouped(rows, weights, scales, zeros, bias, out, slots, topk_weights, tile_count, tile_experts, tile_starts,
                 tile_ends, UP: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
                 N_TILES: tl.constexpr, EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr,
                 UP_STRIDE: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SCALE_EXPERT: tl.constexpr,
                 SCALE_ROW: tl.constexpr, SCALE_BLOCK: tl.constexpr, SCALE_UP: tl.constexpr, BITWISE: tl.constexpr,
                 ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_EXPERT: tl.constexpr,
                 BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """One tile a program; grid (max_tiles · N_TILES,)."""
    m_tiles = tl.load(tile_count)
    tile = tl.program_id(0)
    if tile >= m_tiles * N_TILES:
        return
    code_tile(
        tile, m_tiles, rows, weights, scales, zeros, bias, out, slots, topk_weights, tile_experts, tile_starts,
        tile_ends, UP, K, WIDTH, TOP_K, N_TILES, EXPERT_STRIDE, COLUMN_STRIDE, UP_STRIDE, KIND, GROUP, SCALE_EXPERT,
        SCALE_ROW, SCALE_BLOCK, SCALE_UP, BITWISE, ACTIVATION, GATED, HAS_BIAS, BIAS_EXPERT, BIAS_COLUMN, BIAS_UP,
        EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SWAP,
    )  # fmt: skip


@triton.jit
def code_persistent(rows, weights, scales, zeros, bias, out, slots, topk_weights, tile_count, tile_experts,
                    tile_starts, tile_ends, UP: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
                    TOP_K: tl.constexpr, N_TILES: tl.constexpr, EXPERT_STRIDE: tl.constexpr,
                    COLUMN_STRIDE: tl.constexpr, UP_STRIDE: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
                    SCALE_EXPERT: tl.constexpr, SCALE_ROW: tl.constexpr, SCALE_BLOCK: tl.constexpr,
                    SCALE_UP: tl.constexpr, BITWISE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
                    HAS_BIAS: tl.constexpr, BIAS_EXPERT: tl.constexpr, BIAS_COLUMN: tl.constexpr,
                    BIAS_UP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """Each program takes every num_programs-th tile of the same order."""
    m_tiles = tl.load(tile_count)
    for tile in range(tl.program_id(0), m_tiles * N_TILES, tl.num_programs(0)):
        code_tile(
            tile, m_tiles, rows, weights, scales, zeros, bias, out, slots, topk_weights, tile_experts, tile_starts,
            tile_ends, UP, K, WIDTH, TOP_K, N_TILES, EXPERT_STRIDE, COLUMN_STRIDE, UP_STRIDE, KIND, GROUP,
            SCALE_EXPERT, SCALE_ROW, SCALE_BLOCK, SCALE_UP, BITWISE, ACTIVATION, GATED, HAS_BIAS, BIAS_EXPERT,
            BIAS_COLUMN, BIAS_UP, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SWAP,
        )  # fmt: skip


@triton.jit
def code_decode_up(rows, weights, scales, zeros, bias, out, ids, EXPERTS: tl.constexpr, K: tl.constexpr,
                   WIDTH: tl.constexpr, TOP_K: tl.constexpr, EXPERT_STRIDE: tl.constexpr,
                   COLUMN_STRIDE: tl.constexpr, UP_STRIDE: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
                   SCALE_EXPERT: tl.constexpr, SCALE_ROW: tl.constexpr, SCALE_BLOCK: tl.constexpr,
                   SCALE_UP: tl.constexpr, BITWISE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
                   HAS_BIAS: tl.constexpr, BIAS_EXPERT: tl.constexpr, BIAS_COLUMN: tl.constexpr,
                   BIAS_UP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   SWAP: tl.constexpr):  # fmt: skip
    """One slot and one column tile a program, as `decode_up`; grid (slots, column tiles); writes row `slot`."""
    slot = tl.program_id(0)
    tile_n = tl.program_id(1)
    expert = tl.load(ids + slot)
    if (expert < 0) | (expert >= EXPERTS):
        return
    row = rows + (slot // TOP_K).to(tl.int64) * K
    m = tl.arange(0, BLOCK_M)
    offsets_k = tl.arange(0, BLOCK_K)
    held: tl.constexpr = 8 if KIND == "awq" or KIND == "int4" else 1
    codes_k = tl.arange(0, BLOCK_K // held)
    columns, which = tile_columns(tile_n, BLOCK_N, GATED)
    safe = tl.minimum(columns, WIDTH - 1)
    offsets = expert.to(tl.int64) * EXPERT_STRIDE + safe.to(tl.int64) * COLUMN_STRIDE + which * UP_STRIDE
    b_pointers = weights + offsets[:, None] + codes_k[None, :]
    places = scale_places(expert, safe, which, SCALE_EXPERT, SCALE_ROW, SCALE_BLOCK, SCALE_UP)
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        a_pointers = row + offsets_k[:, None] + m[None, :] * 0
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        a_pointers = row + offsets_k[None, :] + m[:, None] * 0
    for k in range(0, K, BLOCK_K):
        inside = offsets_k < K - k
        # Only the first row is read; the others are zeros that belong to nobody.
        if SWAP:
            a = tl.load(a_pointers, mask=inside[:, None] & (m == 0)[None, :], other=0.0)
        else:
            a = tl.load(a_pointers, mask=inside[None, :] & (m == 0)[:, None], other=0.0)
        if K % BLOCK_K == 0:
            codes = tl.load(b_pointers, eviction_policy="evict_first")
        else:
            b_mask = (codes_k < (K - k) // held)[None, :]
            codes = tl.load(b_pointers, mask=b_mask, other=0, eviction_policy="evict_first")
        values = weight_values(
            codes, scales + places, zeros + places, k, KIND, GROUP, K, BITWISE, BLOCK_N, BLOCK_K
        ).to(a.dtype)  # fmt: skip
        if SWAP:
            acc = tl.dot(values, a, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, values.T, acc, input_precision="ieee")
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K // held
    if GROUP == 0:
        acc = scale_sums(acc, scales + places, SWAP)
    if HAS_BIAS:
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
def code_decode_down(rows, weights, scales, zeros, bias, out, ids, topk_weights, EXPERTS: tl.constexpr,
                     K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
                     EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr, KIND: tl.constexpr,
                     GROUP: tl.constexpr, SCALE_EXPERT: tl.constexpr, SCALE_ROW: tl.constexpr,
                     SCALE_BLOCK: tl.constexpr, BITWISE: tl.constexpr, HAS_BIAS: tl.constexpr,
                     BIAS_EXPERT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     SWAP: tl.constexpr):  # fmt: skip
    """One token and one column tile a program, over all its experts in slot order, as `decode_down`.

    Row j of the tile is slot j; grid (T, column tiles).
    """
    token = tl.program_id(0).to(tl.int64)
    tile_n = tl.program_id(1)
    m = tl.arange(0, SLOTS)
    offsets_k = tl.arange(0, BLOCK_K)
    held: tl.constexpr = 8 if KIND == "awq" or KIND == "int4" else 1
    codes_k = tl.arange(0, BLOCK_K // held)
    experts = tl.load(ids + token * TOP_K + m, mask=m < TOP_K, other=-1)
    here = (experts >= 0) & (experts < EXPERTS)
    order = tl.cumsum(here.to(tl.int32), 0) - 1
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_inside = columns < WIDTH
    safe = tl.minimum(columns, WIDTH - 1)
    column_offsets = safe.to(tl.int64) * COLUMN_STRIDE
    row_offsets = (token * TOP_K + m) * K
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if SWAP:
        acc = tl.zeros((BLOCK_N, SLOTS), tl.float32)
    else:
        acc = tl.zeros((SLOTS, BLOCK_N), tl.float32)
    for step in range(0, tl.sum(here.to(tl.int32), 0) * steps):
        start = step % steps * BLOCK_K
        inside = start + offsets_k < K
        current = here & (order == step // steps)
        expert = tl.sum(tl.where(current, experts, 0), 0)
        base = weights + expert.to(tl.int64) * EXPERT_STRIDE + start // held
        if SWAP:
            a_pointers = rows + row_offsets[None, :] + (start + offsets_k)[:, None]
            a = tl.load(a_pointers, mask=inside[:, None] & current[None, :], other=0.0)
        else:
            a_pointers = rows + row_offsets[:, None] + (start + offsets_k)[None, :]
            a = tl.load(a_pointers, mask=inside[None, :] & current[:, None], other=0.0)
        b_pointers = base + column_offsets[:, None] + codes_k[None, :]
        if K % BLOCK_K == 0:
            codes = tl.load(b_pointers, eviction_policy="evict_first")
        else:
            b_mask = (codes_k < (K - start) // held)[None, :]
            codes = tl.load(b_pointers, mask=b_mask, other=0, eviction_policy="evict_first")
        places = scale_places(expert, safe, safe * 0, SCALE_EXPERT, SCALE_ROW, SCALE_BLOCK, 0)
        values = weight_values(
            codes, scales + places, zeros + places, start, KIND, GROUP, K, BITWISE, BLOCK_N, BLOCK_K
        ).to(a.dtype)  # fmt: skip
        if SWAP:
            acc = tl.dot(values, a, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, values.T, acc, input_precision="ieee")
    total = tl.zeros((BLOCK_N,), tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(ids + token * TOP_K + slot)
        present = (expert >= 0) & (expert < EXPERTS)
        known = tl.where(present, expert, 0)
        if SWAP:
            value = tl.sum(tl.where((m == slot)[None, :], acc, 0.0), 1)
        else:
            value = tl.sum(tl.where((m == slot)[:, None], acc, 0.0), 0)
        if GROUP == 0:
            places = scale_places(known, safe, safe * 0, SCALE_EXPERT, SCALE_ROW, SCALE_BLOCK, 0)
            value = value * tl.load(scales + places).to(tl.float32)
        if HAS_BIAS:
            offset = known.to(tl.int64) * BIAS_EXPERT
            value += tl.load(bias + offset + columns, mask=columns_inside & present, other=0.0).to(tl.float32)
        weight = tl.load(topk_weights + token * TOP_K + slot)
        total += tl.where(present, value * weight, 0.0)
    tl.store(out + token * WIDTH + columns, total.to(out.dtype.element_ty), mask=columns_inside)
