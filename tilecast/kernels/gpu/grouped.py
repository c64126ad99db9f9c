"""`triton.moe_gemm` and `triton.moe_persistent`: grouped GEMMs over expert-sorted rows.

The first runs one tile a program and hides a tile's beginning and end behind other programs; the second keeps one
grid for all tiles. Both take operands through pointers, so they run any layout on any target.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from tilecast.environment import Environment
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.defaults import GROUPED, default_config, sorted_tile, swapped
from tilecast.kernels.gpu.moe import (
    BLOCKS,
    TILE_MAP,
    Domain,
    TritonExperts,
    combine_build,
    float32_like,
    gemm_constants,
    launch_combine,
    make_build,
    tile_arguments,
    weight_signature,
)
from tilecast.kernels.gpu.quantized import CODE_CONSTANTS, code_constants, quantized
from tilecast.kernels.gpu.target import Target, target_of
from tilecast.kernels.gpu.tiles import block_rows, crowds, rows_per_expert
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import WEIGHT_FORMATS, ExpertGemm, TileConfig

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.gpu.launch import Plan
    from tilecast.kernels.gpu.sorting import DeviceLayout

CONSTANTS = (
    "UP", "K", "WIDTH", "TOP_K", "N_TILES", "EXPERT_STRIDE", "COLUMN_STRIDE", "UP_STRIDE", "K_STRIDE", "ACTIVATION",
    "GATED", "HAS_BIAS", "BIAS_EXPERT", "BIAS_COLUMN", "BIAS_UP", "EVEN_K", "EVEN_N", "BLOCK_M", "BLOCK_N", "BLOCK_K",
    "GROUP_M", "SWAP",
)  # fmt: skip
CODED = (
    "UP", "K", "WIDTH", "TOP_K", "N_TILES", "EXPERT_STRIDE", "COLUMN_STRIDE", "UP_STRIDE", *CODE_CONSTANTS,
    "ACTIVATION", "GATED", "HAS_BIAS", "BIAS_EXPERT", "BIAS_COLUMN", "BIAS_UP", "EVEN_K", "BLOCK_M", "BLOCK_N",
    "BLOCK_K", "GROUP_M", "SWAP",
)  # fmt: skip


class Grouped(TritonExperts):
    """One tile a program. Parameters:

    block_m rows and block_n weight columns (gate and up together) of a tile, block_k of K a step; group_m row tiles
    sweep all columns together; swap 1: weights are the left operand, so that few rows still fill the tensor core.
    """

    name = GROUPED
    function = "grouped"
    formats = WEIGHT_FORMATS
    domain: Domain = {  # noqa: RUF012  # the protocol wants an instance's view
        "block_m": BLOCKS[:5],
        "block_n": BLOCKS[1:],
        "block_k": (16, 32, 64, 128, 256),
        "group_m": (1, 4, 8, 16, 32),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5, 6),
        "swap": (0, 1),
    }

    def unfit(self, gemm: ExpertGemm, config: TileConfig, target: Target) -> str | None:
        """Return why a tile is not worth the operands' places."""
        if config["swap"] and gemm.layer.dtype == "fp32":
            return "swapped operands feed tensor cores, fp32 has none"
        if config.integer("block_m") < 16 and not config["swap"]:
            return "fewer than 16 rows need swapped operands"
        if config["swap"] and target.kind == "hip" and config.integer("block_m") < 16:
            return "the matrix unit takes 16 columns"
        return None

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield every config worth considering for this many tokens, in a fixed order; some may be invalid."""
        target = target_of(environment)
        if target is None:
            return
        for tile in tile_space(gemm, tokens, target):
            yield TileConfig(self.name, {**tile, "swap": 0})
        if gemm.layer.dtype == "fp32":
            return
        rows = min(64, block_rows(rows_per_expert(gemm, tokens), 8))
        for block_m, block_n, block_k, warps, stages in product(
            sorted({rows, max(8, rows // 2), min(64, 2 * rows)}), (64, 128), (64, 128, 256), (4, 8), stage_range(target)
        ):
            tile = {"block_m": block_m, "block_n": block_n, "block_k": block_k, "group_m": 1}
            yield TileConfig(self.name, {**tile, "num_warps": warps, "num_stages": stages, "swap": 1})

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return the heuristic config, for few tokens the unsorted kernel's; with `like`, one of its class."""
        target = target_of(environment)
        assert target is not None, "asked for a default in an environment that was rejected"
        return default_config(gemm, tokens, target, like)

    def builds(
        self,
        gemm: ExpertGemm,
        config: TileConfig,
        target: Target,
        *,
        layout: str = PLAIN,
        out_dtype: str | None = None,
        bias_dtype: str | None = None,
        scale_dtype: str | None = None,
    ) -> tuple[Build, ...]:
        """Return what a launch of `config` compiles: the GEMM, and for down the combine."""
        dtype, is_up = gemm.layer.dtype, gemm.name == "up"
        constants = gemm_constants(gemm, config, layout, bias=gemm.layer.bias)
        constants |= {"GROUP_M": config.integer("group_m"), "SWAP": bool(config["swap"])}
        names: tuple[str, ...] = CONSTANTS
        module, function, scale = "_grouped", self.function, "scale"
        if quantized(gemm):
            module, function, scale = "_quantized", f"code_{function}", "topk_weights"
            names, constants = CODED, constants | code_constants(gemm, target)
        signature = (
            ("rows", f"*{dtype}"), *weight_signature(gemm, scale_dtype, bias_dtype),
            ("out", f"*{dtype}" if is_up else "*fp32"), ("slots", "*i32"), (scale, "*i32" if is_up else "*fp32"),
            *TILE_MAP,
        )  # fmt: skip
        main = make_build(module, function, signature, names, constants, config, target)
        return (main,) if is_up else (main, combine_build(gemm, out_dtype or dtype, target))

    def programs(self, plan: Plan, max_tiles: int) -> int:
        """Return the size of the grid for a bound on the row tiles."""
        return max_tiles * plan.columns

    def launch_up(
        self, plan: Plan, hidden: torch.Tensor, weights: GemmWeights, route: DeviceLayout, out: torch.Tensor
    ) -> None:
        """Launch the up GEMM; its rows come out expert-sorted."""
        tiles = route.tiles(plan.config.integer("block_m"))
        arguments = (hidden, *plan.weights, plan.bias, out, route.slots, tiles.count, *tile_arguments(tiles))
        plan.builds[0].launch((self.programs(plan, tiles.max_tiles),), out.device, *arguments)

    def launch_down(
        self,
        plan: Plan,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: DeviceLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Launch the down GEMM into float32 rows by slot, then the combine."""
        tiles = route.tiles(plan.config.integer("block_m"))
        partial = float32_like(out, intermediate.shape[0], out.shape[1])
        operands = (intermediate, *plan.weights, plan.bias, partial, route.slots, topk_weights)
        arguments = (*operands, *tile_arguments(tiles))
        plan.builds[0].launch((self.programs(plan, tiles.max_tiles),), out.device, *arguments)
        launch_combine(plan.builds[1], partial, route, out)


class Persistent(Grouped):
    """As `triton.moe_gemm`, on one grid of `waves` programs for each SM that walks over all tiles."""

    name = "triton.moe_persistent"
    function = "persistent"
    domain: Domain = {**Grouped.domain, "waves": (1, 2, 3, 4)}  # noqa: RUF012

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield the configs of large token counts: elsewhere there is no second tile for a program to walk to."""
        target = target_of(environment)
        if target is None or rows_per_expert(gemm, tokens) < 16:
            return
        for tile in tile_space(gemm, tokens, target):
            for waves in (1, 2):
                yield TileConfig(self.name, {**tile, "swap": 0, "waves": waves})

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return the grouped kernel's tile; with `like`, of the same numerics class."""
        target = target_of(environment)
        assert target is not None, "asked for a default in an environment that was rejected"
        tile = sorted_tile(gemm, tokens, target, like)
        if crowds(gemm, target, walks=True, warps=tile["num_warps"]):
            tile["block_n"] = min(tile["block_n"], 128)
        return TileConfig(self.name, {**tile, "swap": swapped(like), "waves": 1})

    def programs(self, plan: Plan, max_tiles: int) -> int:
        """Return the size of the grid, at most one program a tile."""
        return min(plan.units * plan.config.integer("waves"), max_tiles * plan.columns)


def stage_range(target: Target) -> tuple[int, ...]:
    """Return the pipeline depths worth trying."""
    if target.kind == "hip":
        return (2,)
    return (3, 4, 5) if target.shared_bytes > 128 << 10 else (2, 3, 4)


def tile_space(gemm: ExpertGemm, tokens: int, target: Target) -> Iterator[dict[str, int]]:
    """Yield the tiles with rows on the left worth considering, in a fixed order (docs/gpu-kernels.md)."""
    rows = block_rows(rows_per_expert(gemm, tokens))
    few = rows <= 32
    heights = sorted({rows, max(16, rows // 2), min(128, 2 * rows)})
    widths, depths = ((32, 64, 128), (64, 128, 256)) if few else ((64, 128, 256), (32, 64, 128))
    if gemm.layer.dtype == "fp32":
        heights, widths, depths = [min(h, 64) for h in heights], (32, 64, 128), (16, 32, 64)
    stages = stage_range(target) if few else tuple(s for s in (2, 3, 4) if target.kind == "cuda" or s == 2)
    for block_m, block_n, block_k, group_m, warps, depth in product(
        dict.fromkeys(heights), widths, depths, (1, 8) if few else (4, 8, 16), (4, 8), stages
    ):
        if warps == 8 and block_m * block_n < 64 * 64:
            continue
        yield {
            "block_m": block_m, "block_n": block_n, "block_k": block_k, "group_m": group_m,
            "num_warps": warps, "num_stages": depth,
        }  # fmt: skip
