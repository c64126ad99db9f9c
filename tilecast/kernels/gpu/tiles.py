"""Which tiles make sense where: what a tile costs on a target, and the heuristic defaults.

The rules here are those that compiled code was seen to follow (docs/gpu-kernels.md); `tilecast prescreen` holds every
config that they accept against the code itself.
"""

from __future__ import annotations

from math import isqrt

from tilecast.kernels.gpu.target import Target
from tilecast.problem import DTYPES, ExpertGemm, TileConfig, weight_format

ACCUMULATORS_PER_THREAD = 128
"""More float32 sums than this in a thread's registers spill (128×256 with 4 warps does)."""
SCRATCH_BYTES = 32 << 10
"""The most that re-laying a tile of sums for its store was seen to take, but for the down GEMM's after `wgmma`."""
FMA_VALUES_PER_THREAD = 80
"""More operands of a step and sums of a thread than this spill where there is no matrix unit (96 was seen to)."""
MAX_EXPERTS = 1024
"""The most experts that slots are sorted by."""
FP8 = "triton.moe_fp8"
"""The kernel whose rows are codes, too."""
LEAST_CODE_STEP = 64
"""Shorter steps of codes would be multiplied with K in another order (4 bits: 64 of K for 8 bytes of a lane)."""
FP8_SUMS_PER_THREAD = {"wgmma": 64, "mma.sync": 32, "tcgen05": 32, "mfma": 128}
"""Sums of a thread that are scaled and added each step, in other registers than those that they come in."""
FRAGMENT_M = 16
"""Rows of the smallest tensor-core instruction with activations on the left."""


def rows_per_expert(gemm: ExpertGemm, tokens: int) -> int:
    """Return the expected rows of an expert, rounded up, under uniform routing."""
    layer = gemm.layer
    return max(1, -(-tokens * layer.top_k // layer.global_experts))


def tile_shape(config: TileConfig) -> tuple[int, int, int]:
    """Return (M, N, K) of the product as the matrix unit sees it: with swap, weights are on the left."""
    m, n, k = (config.integer(f"block_{axis}") for axis in "mnk")
    return (n, m, k) if _optional(config, "swap") else (m, n, k)


def _optional(config: TileConfig, name: str) -> int:
    value = dict(config.params).get(name, 0)
    return value if isinstance(value, int) else 0


def instruction(gemm: ExpertGemm, config: TileConfig, target: Target) -> str:
    """Return the kind of instruction that multiplies: `wgmma`, `mma.sync`, `tcgen05`, `mfma` or `fma`."""
    if target.kind == "hip":
        return "mfma"
    if gemm.layer.dtype == "fp32":
        return "fma"
    m, n, _ = tile_shape(config)
    # Triton gives eight columns, which only swapped operands have, to the small instruction.
    large = m >= 64 and n >= 16 and config.integer("num_warps") >= 4
    return target.mma[0] if large else target.mma[-1]


def operand_bytes(gemm: ExpertGemm, config: TileConfig) -> tuple[float, float]:
    """Return the bytes of one element of the rows and of the weights, as they are loaded."""
    rows = 1.0 if config.kernel == FP8 else float(DTYPES[gemm.layer.dtype])
    form = weight_format(gemm.layer.weight_format)
    return rows, form.bits / 8 if form.bits else rows


def shared_bytes(gemm: ExpertGemm, config: TileConfig, target: Target) -> int:
    """Return an upper bound of the shared memory that a config's operand buffers take.

    `wgmma` and `tcgen05` read operands from shared memory while the next ones arrive: one buffer a stage. The others
    hold operands in registers by then: one less, but for a specialised loop, whose producer writes them. The
    epilogue's scratch takes the same memory afterwards: a small tile of sums whole, a large one in parts.
    """
    m, n, k = tile_shape(config)
    stages = config.integer("num_stages")
    buffers = stages if instruction(gemm, config, target) in ("wgmma", "tcgen05") else max(1, stages - 1)
    if _optional(config, "specialize"):
        buffers = stages
    if target.kind == "cuda" and gemm.layer.dtype == "fp32":
        buffers = max(1, stages)
    # The sums of `wgmma` are stored as float32 by down: a tile of them takes its whole size, whatever that is.
    whole = gemm.name == "down" and instruction(gemm, config, target) == "wgmma"
    scratch = 4 * m * n if whole else min(4 * m * n, SCRATCH_BYTES)
    rows, weights = operand_bytes(gemm, config)
    block_m, block_n = config.integer("block_m"), config.integer("block_n")
    loaded = buffers * k * (block_m * rows + block_n * weights)
    if gemm.layer.weight_format != "dense":
        loaded += _scale_bytes(gemm, config) * max(buffers, stages)
        if config.kernel != FP8:
            # Weights that codes became are handed to the matrix unit through shared memory.
            loaded += block_n * k * DTYPES[gemm.layer.dtype]
    return int(max(loaded, scratch)) + 1024


def _scale_bytes(gemm: ExpertGemm, config: TileConfig) -> int:
    """Return an upper bound of what the scales and zero points of one step take."""
    form = weight_format(gemm.layer.weight_format)
    groups = max(1, config.integer("block_k") // form.group) if form.group else 0
    return config.integer("block_n") * groups * 8 + (4 * config.integer("block_m") if config.kernel == FP8 else 0)


def tile_reason(gemm: ExpertGemm, config: TileConfig, target: Target) -> str | None:
    """Return why a tile cannot run well on a target: shared memory, registers, or a shape no instruction has."""
    m, n, k = tile_shape(config)
    warps = config.integer("num_warps")
    needed = shared_bytes(gemm, config, target)
    if needed > target.shared_bytes:
        return f"needs {needed} bytes of shared memory, {target.name} has {target.shared_bytes} for a program"
    sums = m * n // (target.warp_size * warps)
    limit = ACCUMULATORS_PER_THREAD if target.kind == "cuda" else 2 * ACCUMULATORS_PER_THREAD
    if gemm.layer.weight_format != "dense":
        if k < LEAST_CODE_STEP and gemm.layer.dtype != "fp32":
            return f"steps of {k}, codes are multiplied in steps of {LEAST_CODE_STEP} or more"
        if config.kernel == FP8:
            limit = FP8_SUMS_PER_THREAD[instruction(gemm, config, target)]
    if sums > limit:
        return f"{m}×{n} sums over {warps} warps are {sums} a thread, more than {limit} spill"
    walks = bool(_optional(config, "waves"))
    if target.kind == "cuda" and sums == ACCUMULATORS_PER_THREAD and crowds(gemm, target, walks=walks, warps=warps):
        return f"{sums} sums a thread leave no registers for {'a bias' if gemm.layer.bias else 'the next tile'}"
    if instruction(gemm, config, target) == "mma.sync" and sums >= ACCUMULATORS_PER_THREAD // 2 and k >= 128:
        return f"fragments of steps of {k} beside {sums} sums a thread spill"
    values = ((m + n) * k + m * n) // (target.warp_size * warps)
    if instruction(gemm, config, target) == "fma" and values > FMA_VALUES_PER_THREAD:
        return f"{values} operands and sums a thread, more than {FMA_VALUES_PER_THREAD} spill without a matrix unit"
    if gemm.layer.dtype != "fp32" and m < FRAGMENT_M:
        return f"{m} rows on the left of the product, the matrix unit takes {FRAGMENT_M}"
    if gemm.layer.dtype != "fp32" and target.arch == "gfx950" and k < 32:
        # Shorter steps compile to gfx942's instruction: other sums within one numerics class.
        return f"steps of {k}, the matrix unit of {target.name} sums 32 at once"
    if m * n < 8 * 8 * warps:
        return f"{warps} warps have less than one instruction's tile each in {m}×{n}"
    if gemm.name == "up" and gemm.layer.gated and config.integer("block_n") < 16:
        return "a gated tile needs 8 gate and 8 up columns"
    return None


def crowds(gemm: ExpertGemm, target: Target, *, walks: bool, warps: int) -> bool:
    """Return whether a bias or a next tile does not fit beside as many sums as a thread can hold."""
    return (walks and "tcgen05" in target.mma) or (gemm.layer.bias and (walks or warps == 4))


def block_rows(rows: int, low: int = 16, high: int = 128) -> int:
    """Return the power of two from `low` to `high` that holds `rows`."""
    block = low
    while block < min(rows, high):
        block *= 2
    return block


def likely_rows(rows: int) -> int:
    """Return what nearly every expert's rows stay below: two standard deviations above the mean `rows`."""
    return rows + isqrt(4 * rows)


def default_tile(
    gemm: ExpertGemm, tokens: int, target: Target, *, least_rows: int = 16, most_rows: int = 128
) -> dict[str, int]:
    """Return the heuristic tile of a sorted kernel: block sizes, group_m, warps and stages.

    Few rows an expert: the weights' bytes count, so short tiles, deep pipelines and enough programs for every SM; a
    tile holds more than the mean, as a second tile of an expert reads its weights again. Many: 128×256 is the only
    tile whose shared-memory traffic leaves `wgmma` busy, see docs/gpu-kernels.md. least_rows and most_rows bound
    block_m.
    """
    layer = gemm.layer
    rows = rows_per_expert(gemm, tokens)
    block_m = block_rows(rows) if rows > 64 else min(64, block_rows(likely_rows(rows)))
    block_m = max(least_rows, min(most_rows, block_m))
    if layer.dtype == "fp32":
        wide = block_m >= 64
        return _tile(min(block_m, 64), 64, 32, group=8, warps=8 if wide else 4, stages=2)
    if target.kind == "hip":
        if block_m >= 64:
            return _tile(block_m, 128, 64, group=8, warps=8, stages=2)
        return _tile(block_m, 64, 128, group=8, warps=4, stages=2)
    hopper = target.mma[0] != "mma.sync"
    roomy = target.shared_bytes > 128 << 10
    coded = layer.weight_format != "dense"
    if block_m == 128:
        # Weights made of codes take the registers that as many sums again would.
        if hopper and not coded:
            # One program fills an SM's registers anyway: a fourth buffer is free.
            return _tile(128, 256, 64, group=8, warps=8, stages=4)
        return _tile(128, 128, 64 if roomy or coded else 32, group=8, warps=8, stages=3)
    if block_m == 64:
        return _tile(64, 128, 64, group=8, warps=4, stages=4 if hopper else 3)
    active = min(layer.experts, tokens * layer.top_k)
    narrow = active * -(-gemm.n // 128) < 2 * target.units
    # Of 128 columns four warps would make 128 weights a thread each step: with 16 rows that spilled on sm_80.
    block_n = 64 if narrow or coded else 128
    # With four stages 32×128×128 leaves room for one program on an SM, with three for two.
    stages = 4 if roomy and block_m + block_n < 160 else 3
    return _tile(block_m, block_n, 128 if roomy else 64, group=8, warps=4, stages=stages)


def _tile(block_m: int, block_n: int, block_k: int, *, group: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "block_m": block_m, "block_n": block_n, "block_k": block_k, "group_m": group,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
