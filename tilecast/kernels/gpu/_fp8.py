# mypy: ignore-errors
"""e4m3 weights times rows rounded to e4m3, one scale for each 128 of K of a row. Jit only.

`round_rows` writes rows as codes and scales; `fp8_tiles` multiplies. What a tensor core sums of 128 of K is scaled and
added in float32: the sums within the unit keep fewer bits.
"""

import triton
import triton.language as tl

from tilecast.kernels.gpu._quantized import scale_places, scale_sums
from tilecast.kernels.gpu._tiles import finish_tile, row_pointers, tile_columns, tile_position


@triton.jit
def round_rows(rows, codes, row_scales, K: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Round rows [R, K] to codes [R, GROUPS · 128], zeros beyond K, and scales [R, GROUPS]; grid (R, group blocks)."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    values = tl.load(rows + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    peaks = tl.max(tl.abs(values), 1)
    # Divisions as IEEE has them, so that codes are those of the oracle; comparisons, so that NaN stays NaN.
    scales = tl.div_rn(peaks, tl.full((BLOCK,), 448.0, tl.float32))
    scales = tl.where(scales < 1e-12, 1e-12, scales)
    ratios = tl.div_rn(values, scales[:, None].broadcast_to(BLOCK, 128))
    ratios = tl.where(ratios > 448.0, 448.0, ratios)
    ratios = tl.where(ratios < -448.0, -448.0, ratios)
    inside = groups < GROUPS
    tl.store(codes + row * (GROUPS * 128) + columns, ratios.to(tl.float8e4nv), mask=inside[:, None])
    tl.store(row_scales + row * GROUPS + groups, scales, mask=inside)


@triton.jit
def fp8_tiles(rows, row_scales, weights, scales, bias, out, slots, topk_weights, tile_count, tile_experts, tile_starts,
              tile_ends, UP: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
              N_TILES: tl.constexpr, EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr,
              UP_STRIDE: tl.constexpr, GROUP: tl.constexpr, SCALE_EXPERT: tl.constexpr, SCALE_ROW: tl.constexpr,
              SCALE_BLOCK: tl.constexpr, SCALE_UP: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
              HAS_BIAS: tl.constexpr, BIAS_EXPERT: tl.constexpr, BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """One tile a program, as `grouped`; grid (max_tiles · N_TILES,). GROUP is 128 or, for scales of all of K, 0."""
    m_tiles = tl.load(tile_count)
    tile = tl.program_id(0)
    if tile >= m_tiles * N_TILES:
        return
    tile_m, tile_n = tile_position(tile, m_tiles, N_TILES, GROUP_M)
    expert = tl.load(tile_experts + tile_m)
    start = tl.load(tile_starts + tile_m)
    end = tl.load(tile_ends + tile_m)
    positions = start + tl.arange(0, BLOCK_M)
    rows_inside = positions < end
    safe = tl.minimum(positions, end - 1)
    if UP:
        numbers = tl.load(slots + safe) // TOP_K
    else:
        numbers = safe
    steps: tl.constexpr = (K + 127) // 128
    a_pointers = row_pointers(rows, numbers, 0, steps * 128, 128, SWAP)
    sx_pointers = row_scales + numbers.to(tl.int64) * steps
    columns, which = tile_columns(tile_n, BLOCK_N, UP and GATED)
    columns = tl.minimum(columns, WIDTH - 1)
    k = tl.arange(0, 128)
    offsets = expert.to(tl.int64) * EXPERT_STRIDE + columns.to(tl.int64) * COLUMN_STRIDE + which * UP_STRIDE
    sw_pointers = scales + scale_places(expert, columns, which, SCALE_EXPERT, SCALE_ROW, SCALE_BLOCK, SCALE_UP)
    if SWAP:
        b_pointers = weights + offsets[:, None] + k[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        b_pointers = weights + offsets[None, :] + k[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, steps):
        a = tl.load(a_pointers)
        if K % 128 == 0:
            b = tl.load(b_pointers)
        else:
            inside = k < K - step * 128
            if SWAP:
                b = tl.load(b_pointers, mask=inside[None, :], other=0.0)
            else:
                b = tl.load(b_pointers, mask=inside[:, None], other=0.0)
        sx = tl.load(sx_pointers + step)
        if SWAP:
            product = tl.dot(b, a)
            factor = sx[None, :]
        else:
            product = tl.dot(a, b)
            factor = sx[:, None]
        if GROUP > 0:
            sw = tl.load(sw_pointers + step).to(tl.float32)
            if SWAP:
                factor = factor * sw[:, None]
            else:
                factor = factor * sw[None, :]
        acc += product * factor
        a_pointers += 128
        b_pointers += 128
    if GROUP == 0:
        acc = scale_sums(acc, sw_pointers, SWAP)
    finish_tile(
        acc, bias, out, slots, topk_weights, expert, positions, rows_inside, tile_n, UP, WIDTH, ACTIVATION, GATED,
        HAS_BIAS, BIAS_EXPERT, BIAS_COLUMN, BIAS_UP, BLOCK_M, BLOCK_N, SWAP,
    )  # fmt: skip
