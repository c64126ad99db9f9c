# mypy: ignore-errors
"""Split-K: each program takes one stretch of K; float32 partial sums are added in the order of K. Jit only."""

import triton
import triton.language as tl

from tilecast.kernels.gpu._tiles import (
    activate,
    multiply,
    row_pointers,
    store_tile,
    tile_columns,
    tile_position,
    weight_pointers,
)


@triton.jit(do_not_specialize=["split_stride"])
def split_tiles(rows, weights, partial, slots, tile_count, tile_experts, tile_starts, tile_ends,
                split_stride: tl.int64, UP: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr,
                N_TILES: tl.constexpr, EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr,
                UP_STRIDE: tl.constexpr, K_STRIDE: tl.constexpr, GATED: tl.constexpr, CHUNK: tl.constexpr,
                EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):  # fmt: skip
    """Write one stretch's partial sums; grid (max_tiles · N_TILES, splits).

    partial is float32 [splits, S, N]: rows by position for up (gate columns, then up columns), by slot for down.
    """
    m_tiles = tl.load(tile_count)
    tile = tl.program_id(0)
    if tile >= m_tiles * N_TILES:
        return
    split = tl.program_id(1)
    tile_m, tile_n = tile_position(tile, m_tiles, N_TILES, GROUP_M)
    expert = tl.load(tile_experts + tile_m)
    end = tl.load(tile_ends + tile_m)
    positions = tl.load(tile_starts + tile_m) + tl.arange(0, BLOCK_M)
    rows_inside = positions < end
    safe = tl.minimum(positions, end - 1)
    slot_numbers = tl.load(slots + safe)
    k_begin = split * CHUNK
    if UP:
        a_pointers = row_pointers(rows, slot_numbers // TOP_K, k_begin, K, BLOCK_K, False)
    else:
        a_pointers = row_pointers(rows, safe, k_begin, K, BLOCK_K, False)
    b_pointers, columns_inside = weight_pointers(
        weights, expert, tile_n, k_begin, EXPERT_STRIDE, COLUMN_STRIDE, UP_STRIDE, K_STRIDE, WIDTH, BLOCK_N, BLOCK_K,
        UP and GATED, False,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k_end = tl.minimum(k_begin + CHUNK, K)
    acc = multiply(
        acc, a_pointers, b_pointers, columns_inside, k_begin, k_end, K_STRIDE, EVEN_K, EVEN_N, BLOCK_K, False
    )  # fmt: skip
    partial += split.to(tl.int64) * split_stride
    columns, which = tile_columns(tile_n, BLOCK_N, UP and GATED)
    if UP and GATED:
        inside = columns < WIDTH
        # Columns outside go where the store's own bound cuts them off.
        columns = tl.where(inside, columns + which * WIDTH, 2 * WIDTH)
        store_tile(partial, acc, positions, rows_inside, columns, 2 * WIDTH, False)
    elif UP:
        store_tile(partial, acc, positions, rows_inside, columns, WIDTH, False)
    else:
        store_tile(partial, acc, slot_numbers, rows_inside, columns, WIDTH, False)


@triton.jit(do_not_specialize=["split_stride"])
def finish_up(partial, bias, out, slots, ids, offsets, split_stride: tl.int64, SPLITS: tl.constexpr,
              EXPERTS: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
              HAS_BIAS: tl.constexpr, BIAS_EXPERT: tl.constexpr, BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Sum the splits in order, add the bias, activate and store; grid (S, column blocks), rows by position."""
    position = tl.program_id(0)
    if position >= tl.load(offsets + EXPERTS):
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    expert = tl.load(ids + tl.load(slots + position)).to(tl.int64)
    row = partial + position.to(tl.int64) * (WIDTH * 2 if GATED else WIDTH)
    gate = tl.load(row + columns, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        gate += tl.load(row + split * split_stride + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        gate += tl.load(bias + expert * BIAS_EXPERT + columns * BIAS_COLUMN, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(row + WIDTH + columns, mask=inside, other=0.0)
        for split in tl.static_range(1, SPLITS):
            up += tl.load(row + split * split_stride + WIDTH + columns, mask=inside, other=0.0)
        if HAS_BIAS:
            offset = expert * BIAS_EXPERT + columns * BIAS_COLUMN + BIAS_UP
            up += tl.load(bias + offset, mask=inside, other=0.0).to(tl.float32)
        value = activate(gate, up, ACTIVATION, True)
    else:
        value = activate(gate, gate, ACTIVATION, False)
    out += position.to(tl.int64) * WIDTH
    tl.store(out + columns, value.to(out.dtype.element_ty), mask=inside)
