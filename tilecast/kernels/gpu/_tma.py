# mypy: ignore-errors
"""Grouped GEMM whose weights, and for down the expert-sorted rows, come through tensor descriptors (TMA). Jit only.

The copy engine computes the addresses and fills what lies outside with zeros. A gated stack is described as
[E, 2, I, K], so that one load brings the gate and the up columns of a tile; down's as rows [E·H, K].
"""

import triton
import triton.language as tl

from tilecast.kernels.gpu._tiles import finish_tile, row_pointers, tile_position


@triton.jit
def load_weights(weights, expert, tile_n, k, UP: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Return a weight tile [BLOCK_N, BLOCK_K]; rows of the next expert or zeros beyond the last column."""
    if UP and GATED:
        return weights.load([expert, 0, tile_n * (BLOCK_N // 2), k]).reshape(BLOCK_N, BLOCK_K)
    else:
        return weights.load([expert * WIDTH + tile_n * BLOCK_N, k])


@triton.jit
def tma_tile(tile, m_tiles, rows, weights, bias, out, slots, scale, tile_experts, tile_starts, tile_ends,
             UP: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, N_TILES: tl.constexpr,
             ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_EXPERT: tl.constexpr,
             BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SPECIALIZE: tl.constexpr):  # fmt: skip
    """Compute one output tile."""
    tile_m, tile_n = tile_position(tile, m_tiles, N_TILES, GROUP_M)
    expert = tl.load(tile_experts + tile_m)
    start = tl.load(tile_starts + tile_m)
    end = tl.load(tile_ends + tile_m)
    positions = start + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if UP:
        numbers = tl.load(slots + tl.minimum(positions, end - 1)) // TOP_K
        a_pointers = row_pointers(rows, numbers, 0, K, BLOCK_K, False)
        for k in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                a = tl.load(a_pointers)
            else:
                # The weights are zero there; the rows may hold NaN.
                a = tl.load(a_pointers, mask=(tl.arange(0, BLOCK_K) < K - k)[None, :], other=0.0)
            b = load_weights(weights, expert, tile_n, k, UP, WIDTH, GATED, BLOCK_N, BLOCK_K)
            acc = tl.dot(a, b.T, acc)
            a_pointers += BLOCK_K
    else:
        for k in tl.range(0, K, BLOCK_K, warp_specialize=SPECIALIZE):
            # Rows beyond `end` are the next expert's: computed, not stored.
            a = rows.load([start, k])
            b = load_weights(weights, expert, tile_n, k, UP, WIDTH, GATED, BLOCK_N, BLOCK_K)
            acc = tl.dot(a, b.T, acc)
    finish_tile(
        acc, bias, out, slots, scale, expert, positions, positions < end, tile_n, UP, WIDTH, ACTIVATION, GATED,
        HAS_BIAS, BIAS_EXPERT, BIAS_COLUMN, BIAS_UP, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip


@triton.jit
def tma_tiles(rows, weights, bias, out, slots, scale, tile_count, tile_experts, tile_starts, tile_ends,
              UP: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, N_TILES: tl.constexpr,
              ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, BIAS_EXPERT: tl.constexpr,
              BIAS_COLUMN: tl.constexpr, BIAS_UP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PERSISTENT: tl.constexpr,
              SPECIALIZE: tl.constexpr):  # fmt: skip
    """One tile a program, grid (max_tiles · N_TILES,), or with PERSISTENT every num_programs-th tile."""
    m_tiles = tl.load(tile_count)
    if PERSISTENT:
        for tile in range(tl.program_id(0), m_tiles * N_TILES, tl.num_programs(0)):
            tma_tile(
                tile, m_tiles, rows, weights, bias, out, slots, scale, tile_experts, tile_starts, tile_ends, UP, K,
                WIDTH, TOP_K, N_TILES, ACTIVATION, GATED, HAS_BIAS, BIAS_EXPERT, BIAS_COLUMN, BIAS_UP, BLOCK_M,
                BLOCK_N, BLOCK_K, GROUP_M, SPECIALIZE,
            )  # fmt: skip
    else:
        tile = tl.program_id(0)
        if tile >= m_tiles * N_TILES:
            return
        tma_tile(
            tile, m_tiles, rows, weights, bias, out, slots, scale, tile_experts, tile_starts, tile_ends, UP, K, WIDTH,
            TOP_K, N_TILES, ACTIVATION, GATED, HAS_BIAS, BIAS_EXPERT, BIAS_COLUMN, BIAS_UP, BLOCK_M, BLOCK_N, BLOCK_K,
            GROUP_M, SPECIALIZE,
        )  # fmt: skip
