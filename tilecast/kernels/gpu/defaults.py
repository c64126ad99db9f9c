"""The heuristic default of the Triton kernels: which kernel, and which config of it, for how many tokens.

Both GEMMs of a layer get the same order of rows, since that follows from the tokens and from the order of the config
they are to be like, nothing else.
"""

from __future__ import annotations

from tilecast.kernels.gpu.target import Target
from tilecast.kernels.gpu.tiles import default_tile
from tilecast.problem import ExpertGemm, TileConfig

GROUPED = "triton.moe_gemm"
DECODE = "triton.moe_decode"
DECODE_TOKENS = 4
"""Up to this many tokens launches cost more than work: the unsorted kernel is the default."""
MAX_TOP_K = 32
"""Slots of a token that one tile of the unsorted kernel holds."""


def default_config(gemm: ExpertGemm, tokens: int, target: Target, like: TileConfig | None = None) -> TileConfig:
    """Return the unsorted kernel's default for few tokens, else the grouped one's; the class is that of `like`."""
    swap = swapped(like)
    may_decode = like is None or like.kernel == DECODE
    if may_decode and tokens <= DECODE_TOKENS and gemm.layer.top_k <= MAX_TOP_K:
        return decode_default(gemm, tokens, target, swap=swap)
    return TileConfig(GROUPED, {**sorted_tile(gemm, tokens, target, swap=swap), "swap": swap})


def swapped(config: TileConfig | None) -> int:
    """Return 1 for a config whose weights are the left operand."""
    return 0 if config is None else int(dict(config.params).get("swap", 0))


def sorted_tile(gemm: ExpertGemm, tokens: int, target: Target, *, swap: int = 0) -> dict[str, int]:
    """Return the default tile of a kernel over sorted rows."""
    tile = default_tile(gemm, tokens, target)
    if swap:
        # The left operand is the weights': the large instructions want 64 of their columns.
        tile["block_n"] = max(64, tile["block_n"])
    return tile


def decode_default(gemm: ExpertGemm, tokens: int, target: Target, *, swap: int = 0) -> TileConfig:
    """Return the unsorted kernel's default: enough programs for every SM, then as deep a pipeline as fits."""
    fp32 = gemm.layer.dtype == "fp32"
    columns = tokens * (gemm.layer.top_k if gemm.name == "up" else 1) * gemm.n
    widths = (64, 32) if fp32 else (64, 32, 16)
    block_n = 64 if swap else next((width for width in widths if columns // width >= 2 * target.units), widths[-1])
    # The narrowest tile brings few bytes a step: rows twice as long, and more of them on their way.
    long = block_n == 16 and gemm.k % 256 == 0
    shallow = 2 if target.kind == "hip" or fp32 else 0
    deep = 8 if long else 5
    return TileConfig(
        DECODE,
        {
            "block_m": least_rows(gemm, swap=bool(swap), target=target),
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
