"""Which of a table's configs mean the same in vLLM's and SGLang's kernel, and which one to write for a bucket.

Their kernel (`fused_moe_kernel`) computes one tile of BLOCK_SIZE_M expert-sorted rows and BLOCK_SIZE_N columns of the
weight a program, BLOCK_SIZE_K of the reduction a step, GROUP_SIZE_M row tiles sweeping all columns together. That is
`triton.moe_gemm` with rows on the left: its block_n counts columns of the weight, too, gate and up together. Integer
weights are dequantised in it as in ours; fp8 ones are multiplied with rows rounded to fp8, which is `triton.moe_fp8`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from tilecast.cache_store.interop.pinned import Span
from tilecast.evidence import Choice, Decision, Measurement
from tilecast.problem import TileConfig, weight_format

Times = dict["EngineTile", float]
Evidence = Mapping[tuple[str, str, str, int, str], Mapping[TileConfig, float]]
"""Medians in µs by (environment, layer's digest, GEMM, tokens, routing) and config."""


@dataclass(frozen=True, order=True, kw_only=True)
class EngineTile:
    """One config as the engines have it. `num_warps` and `num_stages` are 0 where they are left to Triton."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int = 0
    num_stages: int = 0
    tma: bool = False

    def row(self, *, down: bool = False) -> dict[str, int | bool]:
        """Return the row of a file; in SGLang's separate files of the down projection it has USE_TMA."""
        row: dict[str, int | bool] = {
            "BLOCK_SIZE_M": self.block_m,
            "BLOCK_SIZE_N": self.block_n,
            "BLOCK_SIZE_K": self.block_k,
            "GROUP_SIZE_M": self.group_m,
        }
        if self.num_warps:
            row |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**row, "USE_TMA": self.tma} if down else row

    @property
    def label(self) -> str:
        """A short human form: `16×128×64 group 1 warps 4 stages 3`."""
        shape = f"{self.block_m}×{self.block_n}×{self.block_k} group {self.group_m}"
        return f"{shape} warps {self.num_warps} stages {self.num_stages}{' TMA' if self.tma else ''}"


def default_tiles(engine: str, experts: int, *, hip: bool) -> list[Span[EngineTile]]:
    """Return what an engine runs for 16-bit weights without a file, for every token count.

    Source: `get_default_config` of vLLM 0.33 and of SGLang 0.5.23.
    """
    if engine == "sglang":
        few = EngineTile(block_m=16, block_n=32, block_k=64, group_m=1)
        many = EngineTile(block_m=64, block_n=64, block_k=32, group_m=8)
        return [Span(1, experts, few), Span(experts + 1, None, many)]
    # The last count of each step; groups come in where an expert has more than 128 tokens, rounded down.
    ends = sorted({32, 64, 96, 128, 512, 129 * experts - 1})
    found, low = [], 1
    for end in ends:
        found.append(Span(low, end, _vllm_default(end, experts, hip=hip)))
        low = end + 1
    return [*found, Span(low, None, _vllm_default(low, experts, hip=hip))]


def _vllm_default(tokens: int, experts: int, *, hip: bool) -> EngineTile:
    heights = {32: 16, 96: 32, 512: 64}
    return EngineTile(
        block_m=next((height for end, height in heights.items() if tokens <= end), 128),
        block_n=64 if tokens <= 64 else 128,
        block_k=128 if tokens <= 64 else 64,
        group_m=16 if tokens // experts > 128 else 1,
        num_warps=4 if tokens <= 128 else 8,
        num_stages=2 if hip else 4 if tokens <= 32 else 3,
    )


def kernel_of(weights: str) -> str:
    """Return which of our kernels is the engines' one on weights of a format."""
    return "triton.moe_fp8" if weight_format(weights).kind == "fp8" else "triton.moe_gemm"


def engine_tile(config: TileConfig, *, weights: str = "dense", tma: bool = False) -> EngineTile | str:
    """Return a config for weights of a format as the engines have it, or why they have none that means the same.

    With `tma`, for SGLang's down projection, tensor descriptors can be said, too.
    """
    params = dict(config.params)
    if config.kernel == kernel_of(weights):
        if params.get("swap"):
            return "swapped operands (swap=1) have no setting there"
    elif config.kernel == "triton.moe_gemm":
        return f"rows of 16 bits with {weights} weights have no files there: rows are rounded to fp8"
    elif config.kernel == "triton.moe_tma":
        if not tma:
            return "tensor descriptors (triton.moe_tma) have no setting there"
        if params.get("waves") or params.get("specialize"):
            return "persistent and specialised loops of triton.moe_tma have no setting there"
    else:
        return f"{config.kernel} has no counterpart there"
    names = ("block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages")
    values = {name: config.integer(name) for name in names}
    return EngineTile(**values, tma=config.kernel == "triton.moe_tma")


def gather(measurements: Iterable[Measurement]) -> Evidence:
    """Return the median time of every config that ran well, over its rounds."""
    found: dict[tuple[str, str, str, int, str], dict[TileConfig, list[float]]] = {}
    for m in measurements:
        if m.status == "ok":
            key = (m.environment, m.gemm.layer.digest, m.gemm.name, m.tokens, m.routing)
            found.setdefault(key, {}).setdefault(m.config, []).append(m.p50_us)
    return {key: {config: median(times) for config, times in by.items()} for key, by in found.items()}


@dataclass(frozen=True, kw_only=True)
class Picked:
    """What is written for one bucket: tiles of both GEMMs, their summed time (None if not all known), and a remark."""

    up: EngineTile
    down: EngineTile
    sum_us: float | None
    remark: str = ""


def shared_tile(decision: Decision, evidence: Evidence) -> Picked | str:
    """Return the one tile for both GEMMs with the smallest sum of their times, or why there is none (vLLM)."""
    up, down = _times(decision, "up", evidence), _times(decision, "down", evidence)
    both = {tile: up[tile] + down[tile] for tile in up if tile in down}
    if both:
        best = min(both, key=lambda tile: (both[tile], tile))
        return Picked(up=best, down=best, sum_us=both[best], remark=_loss(decision, both[best]))
    for gemm, other in (("up", "down"), ("down", "up")):
        chosen = decision.choice("up" if gemm == "up" else "down").config
        tile = engine_tile(chosen, weights=decision.layer.weight_format)
        if isinstance(tile, EngineTile):
            remark = f"no config was timed for both GEMMs; {gemm}'s is written, its time for {other} is unknown"
            return Picked(up=tile, down=tile, sum_us=None, remark=remark)
    return _reasons(decision, tma=False)


def tile_pair(decision: Decision, evidence: Evidence) -> Picked | str:
    """Return a tile for each GEMM, or why there are none (SGLang).

    Both have one BLOCK_SIZE_M, as SGLang sorts rows once for both: where the decided ones differ in it, the pair with
    the smallest sum is taken.
    """
    weights = decision.layer.weight_format
    up_tile = engine_tile(decision.up.config, weights=weights)
    down_tile = engine_tile(decision.down.config, weights=weights, tma=True)
    if isinstance(up_tile, EngineTile) and isinstance(down_tile, EngineTile) and up_tile.block_m == down_tile.block_m:
        return Picked(up=up_tile, down=down_tile, sum_us=decision.tuned_us)
    up, down = _times(decision, "up", evidence), _times(decision, "down", evidence, tma=True)
    pairs = []
    for height in sorted({tile.block_m for tile in up} & {tile.block_m for tile in down}):
        best = [min((us, tile) for tile, us in times.items() if tile.block_m == height) for times in (up, down)]
        pairs.append((best[0][0] + best[1][0], best[0][1], best[1][1]))
    if not pairs:
        reason = _reasons(decision, tma=True)
        return reason or "no two configs of one BLOCK_SIZE_M were timed, and both GEMMs share one there"
    sum_us, first, second = min(pairs)
    return Picked(up=first, down=second, sum_us=sum_us, remark=_loss(decision, sum_us))


def known_times(decision: Decision, gemm: str, evidence: Evidence) -> dict[TileConfig, float]:
    """Return the known times in µs of one GEMM's configs: the decision's, and measured ones over them."""
    choice: Choice = decision.up if gemm == "up" else decision.down
    known: dict[TileConfig, float] = {choice.default: choice.default_us}
    if choice.runner_up is not None and choice.runner_up_us is not None:
        known[choice.runner_up] = choice.runner_up_us
    known[choice.config] = choice.p50_us
    key = (decision.environment, decision.layer.digest, gemm, decision.bucket.tokens, decision.routing)
    return known | dict(evidence.get(key, {}))


def _times(decision: Decision, gemm: str, evidence: Evidence, *, tma: bool = False) -> Times:
    known = known_times(decision, gemm, evidence)
    weights = decision.layer.weight_format
    tiles = ((engine_tile(config, weights=weights, tma=tma), us) for config, us in known.items())
    return {tile: us for tile, us in tiles if isinstance(tile, EngineTile)}


def _loss(decision: Decision, sum_us: float) -> str:
    """Return how much slower what is written is than what was decided, empty below half a percent."""
    loss = sum_us / decision.tuned_us - 1
    return f"{100 * loss:.1f}% slower than the decided configs" if loss >= 0.005 else ""


def _reasons(decision: Decision, *, tma: bool) -> str:
    found = []
    for gemm, choice in (("up", decision.up), ("down", decision.down)):
        tile = engine_tile(choice.config, weights=decision.layer.weight_format, tma=tma and gemm == "down")
        if isinstance(tile, str):
            found.append(f"{gemm}: {tile}")
    return "; ".join(found)
