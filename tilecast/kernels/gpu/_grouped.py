# mypy: ignore-errors
"""Grouped GEMM over expert-sorted rows: one tile a program, or a persistent grid over all tiles. Jit only.

`up` reads hidden [T, H] through `slots`, `down` reads the intermediate [S, I] in sorted order. The grid is an upper
bound known without asking the device; programs beyond the real number of tiles leave at once.
"""

import triton
import triton.language as tl

from tilecast.kernels.gpu._tiles import finish_tile, multiply, row_pointers, tile_position, weight_pointers


@triton.jit
def grouped_tile(tile, m_tiles, rows, weights, bias, out, slots, scale, tile_experts, tile_starts, tile_ends,
                 UP: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, N_TILES: tl.constexpr,
                 EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr, UP_STRIDE: tl.constexpr,
                 K_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
                 BIAS_EXPERT: tl.constexpr, BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr, EVEN_K: tl.constexpr,
                 EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                 GROUP_M: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """Compute one output tile."""
    tile_m, tile_n = tile_position(tile, m_tiles, N_TILES, GROUP_M)
    expert = tl.load(tile_experts + tile_m)
    start = tl.load(tile_starts + tile_m)
    end = tl.load(tile_ends + tile_m)
    positions = start + tl.arange(0, BLOCK_M)
    rows_inside = positions < end
    # Rows of padding compute on the expert's last row and are not stored: no mask in the loop.
    safe = tl.minimum(positions, end - 1)
    if UP:
        numbers = tl.load(slots + safe) // TOP_K
    else:
        numbers = safe
    a_pointers = row_pointers(rows, numbers, 0, K, BLOCK_K, SWAP)
    b_pointers, columns_inside = weight_pointers(
        weights, expert, tile_n, 0, EXPERT_STRIDE, COLUMN_STRIDE, UP_STRIDE, K_STRIDE, WIDTH, BLOCK_N, BLOCK_K,
        UP and GATED, SWAP,
    )  # fmt: skip
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = multiply(acc, a_pointers, b_pointers, columns_inside, 0, K, K_STRIDE, EVEN_K, EVEN_N, BLOCK_K, SWAP)
    finish_tile(
        acc, bias, out, slots, scale, expert, positions, rows_inside, tile_n, UP, WIDTH, ACTIVATION, GATED, HAS_BIAS,
        BIAS_EXPERT, BIAS_COLUMN, BIAS_UP, BLOCK_M, BLOCK_N, SWAP,
    )  # fmt: skip


@triton.jit
def grouped(rows, weights, bias, out, slots, scale, tile_count, tile_experts, tile_starts, tile_ends,
            UP: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, N_TILES: tl.constexpr,
            EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr, UP_STRIDE: tl.constexpr,
            K_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
            BIAS_EXPERT: tl.constexpr, BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr, EVEN_K: tl.constexpr,
            EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
            GROUP_M: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """One tile a program; grid (max_tiles · N_TILES,)."""
    m_tiles = tl.load(tile_count)
    tile = tl.program_id(0)
    if tile >= m_tiles * N_TILES:
        return
    grouped_tile(
        tile, m_tiles, rows, weights, bias, out, slots, scale, tile_experts, tile_starts, tile_ends, UP, K, WIDTH,
        TOP_K, N_TILES, EXPERT_STRIDE, COLUMN_STRIDE, UP_STRIDE, K_STRIDE, ACTIVATION, GATED, HAS_BIAS, BIAS_EXPERT,
        BIAS_COLUMN, BIAS_UP, EVEN_K, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SWAP,
    )  # fmt: skip


@triton.jit
def persistent(rows, weights, bias, out, slots, scale, tile_count, tile_experts, tile_starts, tile_ends,
               UP: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, N_TILES: tl.constexpr,
               EXPERT_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr, UP_STRIDE: tl.constexpr,
               K_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
               BIAS_EXPERT: tl.constexpr, BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr, EVEN_K: tl.constexpr,
               EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
               GROUP_M: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """Each program takes every num_programs-th tile of the same order."""
    m_tiles = tl.load(tile_count)
    for tile in range(tl.program_id(0), m_tiles * N_TILES, tl.num_programs(0)):
        grouped_tile(
            tile, m_tiles, rows, weights, bias, out, slots, scale, tile_experts, tile_starts, tile_ends, UP, K,
            WIDTH, TOP_K, N_TILES, EXPERT_STRIDE, COLUMN_STRIDE, UP_STRIDE, K_STRIDE, ACTIVATION, GATED, HAS_BIAS,
            BIAS_EXPERT, BIAS_COLUMN, BIAS_UP, EVEN_K, EVEN_N, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SWAP,
        )  # fmt: skip
