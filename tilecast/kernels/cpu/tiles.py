"""Register tiles worth trying on a CPU, likeliest first: what its registers hold of a GEMM's operands and sums."""

from __future__ import annotations

from tilecast.kernels.cpu._micro import CACHE_LINE
from tilecast.kernels.cpu._nibbles import TURN
from tilecast.kernels.cpu.isa import Isa
from tilecast.problem import ExpertGemm, weight_format

SHORTS = "int16"
"""The value of `dot` that multiplies integer codes with rows as integers of 16 bits."""


def rows_per_expert(gemm: ExpertGemm, tokens: int) -> int:
    """Return the expected rows of an expert that has any, rounded up, under uniform routing."""
    layer = gemm.layer
    return max(1, -(-tokens * layer.top_k // layer.global_experts))


def prefetch_lines(isa: Isa, nv: int, unroll: int, dtype: str) -> int:
    """Return the cache lines that a tile's loop consumes a turn, as far as the domain of `prefetch` goes."""
    consumed = unroll * nv * isa.lanes * (2 if dtype == "fp16" else 4) // CACHE_LINE
    return max(lines for lines in (1, 2, 4, 8) if lines <= max(1, consumed))


def tile_shapes(isa: Isa, tokens: int, rows: int, dtype: str) -> tuple[tuple[int, int], ...]:
    """Return the register tiles (rows, vectors) worth trying for this many rows of one expert, likeliest first."""
    wide = isa.registers > 16
    if tokens == 1:
        return ((1, 8), (1, 4), (2, 4), (3, 4))
    if wide:
        few, many = ((8, 2), (6, 4), (4, 4), (2, 8), (1, 8)), ((12, 2), (14, 2), (8, 2), (6, 4), (4, 4))
        return ((4, 4), (8, 2), (6, 4), (2, 8), (1, 8)) if rows == 1 else few if rows <= 6 else many
    # Widening two words of bf16 takes the registers of a sixth row.
    first = ((5, 2), (6, 2)) if dtype == "bf16" else ((6, 2), (5, 2))
    if rows == 1:
        return ((3, 4), first[0], (4, 2), (2, 4), (1, 8))
    return (*first, (4, 2), (3, 4), (2, 4))


def shapes_of(gemm: ExpertGemm, isa: Isa, tokens: int, rows: int, dot: str = "fma") -> tuple[tuple[int, int], ...]:
    """Return the register tiles worth trying for a GEMM: `tile_shapes`, or those for codes."""
    if gemm.layer.weight_format == "dense":
        return tile_shapes(isa, tokens, rows, gemm.layer.dtype)
    wide = isa.registers > 16
    if dot == SHORTS:
        if tokens == 1:
            # Fastest from the last-level cache: one stream of 4-bit codes, two of 8-bit ones, asked for ahead.
            few = (1, 2) if weight_format(gemm.layer.weight_format).bits == 4 else (1, 4)
            return tuple(dict.fromkeys((few, (1, 4), (1, 8), (1, 2))))
        if rows <= 6:
            return ((4, 4), (8, 2), (6, 4), (2, 8)) if wide else ((4, 2), (2, 4), (6, 2), (3, 2))
        return ((12, 2), (8, 2), (6, 4)) if wide else ((5, 2), (6, 2), (4, 2), (2, 4))
    if weight_format(gemm.layer.weight_format).bits == 4:
        # Three or four sums for each row and vector; rows need registers for their bytes, codes are read again cheaply.
        if wide:
            return ((1, 4), (2, 4), (4, 2)) if rows == 1 else ((2, 4), (4, 2), (1, 4))
        # Two rows share what is loaded of codes; the four sums of fp32 rows leave no room for a second one.
        return ((1, 2), (2, 2), (4, 1)) if rows == 1 or gemm.layer.dtype == "fp32" else ((2, 2), (1, 2), (4, 1))
    if tokens == 1:
        return ((1, 8), (1, 4), (2, 4))
    # Eight sums leave room for what becomes of the codes in tiles of 1, 2 and 4 rows; more rows make up for less room.
    if rows <= 6:
        return ((4, 4), (8, 2), (6, 4), (2, 8)) if wide else ((4, 2), (2, 4), (6, 2), (1, 8))
    # Staged fp8 codes are words of two bf16, as dense weights are.
    first = ((5, 2), (6, 2)) if weight_format(gemm.layer.weight_format).kind == "fp8" else ((6, 2), (5, 2))
    return ((12, 2), (8, 2), (6, 4)) if wide else (*first, (4, 2))


def takes_shorts(gemm: ExpertGemm) -> bool:
    """Return whether a GEMM's codes are integers, and its rows of a dtype that loses next to nothing in 16 bits."""
    return weight_format(gemm.layer.weight_format).kind in ("awq", "int4", "int8") and gemm.layer.dtype != "fp32"


def most_vectors(gemm: ExpertGemm, isa: Isa, nv: int, block_n: int, dot: str = "fma") -> int:
    """Return the vectors of the widest tile for jobs of few rows: as many sums as before, in fewer rows."""
    if dot == SHORTS:
        return max(nv, min(4, block_n // isa.lanes))
    nibbles = weight_format(gemm.layer.weight_format).bits == 4
    return max(nv, min((4 if isa.registers > 16 else 2) if nibbles else 8, block_n // isa.lanes))


def turn_steps(gemm: ExpertGemm, nv: int, stage: int, dot: str = "fma") -> int:
    """Return the default `unroll`: a step of codes is a whole word of them, long enough as it is."""
    if dot == SHORTS:
        return 4 if stage else 1
    if weight_format(gemm.layer.weight_format).bits == 4:
        return TURN
    if gemm.layer.weight_format != "dense":
        return 4 if stage else 1
    return 2 if nv > 2 else 4
