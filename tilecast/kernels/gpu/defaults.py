"""The heuristic default of the Triton kernels: which kernel, and which config of it, for how many tokens.

Both GEMMs of a layer get the same order of rows, since that follows from the tokens and from the order of the config
they are to be like, nothing else.
"""

from __future__ import annotations

from tilecast.kernels.gpu.target import Target
from tilecast.kernels.gpu.tiles import default_tile, instruction
from tilecast.problem import ExpertGemm, TileConfig

GROUPED = "triton.moe_gemm"
DECODE = "triton.moe_decode"
DECODE_TOKENS = 4
"""Up to this many tokens launches cost more than work: the unsorted kernel is the default."""
MAX_TOP_K = 32
"""Slots of a token that one tile of the unsorted kernel holds."""


def default_config(gemm: ExpertGemm, tokens: int, target: Target, like: TileConfig | None = None) -> TileConfig:
    """Return the unsorted kernel's default for few tokens, else the grouped one's; the class is that of `like`."""
    may_decode = like is None or like.kernel == DECODE
    if may_decode and tokens <= DECODE_TOKENS and gemm.layer.top_k <= MAX_TOP_K:
        return decode_default(gemm, tokens, target, like)
    return TileConfig(GROUPED, {**sorted_tile(gemm, tokens, target, like), "swap": swapped(like)})


def swapped(config: TileConfig | None) -> int:
    """Return 1 for a config whose weights are the left operand."""
    return 0 if config is None else int(dict(config.params).get("swap", 0))


def bound_unit(gemm: ExpertGemm, target: Target, like: TileConfig | None) -> str | None:
    """Return `large` or `small`, the instruction that `like`'s class needs; None where both give the same bits.

    Where the sum of the target's matrix units is not known, or weights are codes, each kind is a class of its own.
    """
    known = target.group and gemm.layer.weight_format == "dense"
    if like is None or known or len(target.mma) < 2:
        return None
    return "large" if instruction(gemm, like, target) == target.mma[0] else "small"


def sorted_tile(
    gemm: ExpertGemm, tokens: int, target: Target, like: TileConfig | None = None, *, most_rows: int = 128
) -> dict[str, int]:
    """Return the default tile of a kernel over sorted rows; with `like`, one of its class."""
    unit = bound_unit(gemm, target, like)
    swap = swapped(like)
    least = 64 if unit == "large" and not swap else 16
    most = min(32, most_rows) if unit == "small" else most_rows
    tile = default_tile(gemm, tokens, target, least_rows=least, most_rows=most)
    if swap:
        # The left operand is the weights': the large instructions want 64 of their columns.
        tile["block_n"] = 32 if unit == "small" else max(64, tile["block_n"])
    return tile


def decode_default(gemm: ExpertGemm, tokens: int, target: Target, like: TileConfig | None = None) -> TileConfig:
    """Return the unsorted kernel's default: enough programs for every SM, then as deep a pipeline as fits."""
    swap = swapped(like)
    unit = bound_unit(gemm, target, like)
    fp32 = gemm.layer.dtype == "fp32"
    columns = tokens * (gemm.layer.top_k if gemm.name == "up" else 1) * gemm.n
    widths = (64, 32) if fp32 else (64, 32, 16)
    block_m = least_rows(gemm, swap=bool(swap), target=target)
    block_n = next((width for width in widths if columns // width >= 2 * target.units), widths[-1])
    if swap:
        block_m = max(16, block_m) if unit == "large" else block_m
        block_n = 32 if unit == "small" else 64
    # The narrowest tile brings few bytes a step: rows twice as long, and more of them on their way.
    long = block_n == 16 and gemm.k % 256 == 0
    shallow = 2 if target.kind == "hip" or fp32 else 0
    deep = 8 if long else 5
    return TileConfig(
        DECODE,
        {
            "block_m": block_m,
            "block_n": block_n,
            "block_k": 32 if fp32 else 256 if long else 128,
            "num_warps": 4,
            "num_stages": shallow or (deep if target.shared_bytes > 128 << 10 else 4),
            "swap": swap,
        },
    )


def least_rows(gemm: ExpertGemm, *, swap: bool, target: Target) -> int:
    """Return the unsorted kernel's smallest tile: what the matrix unit takes and, for down, what holds the slots."""
    least = 8 if swap and target.kind == "cuda" else 16
    slots = gemm.layer.top_k if gemm.name == "down" else 1
    while least < slots:
        least *= 2
    return least
