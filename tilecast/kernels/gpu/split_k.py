"""`triton.moe_split_k`: K cut into stretches of fixed length, so that few tiles still occupy every SM.

Each stretch is a chain of its own; float32 partial sums are added in the order of K. The length of a stretch, not the
number of programs, is what bits depend on, and makes the numerics class.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from tilecast.canonical import Json
from tilecast.environment import Environment
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.defaults import sorted_tile
from tilecast.kernels.gpu.grouped import stage_range
from tilecast.kernels.gpu.moe import (
    BLOCKS,
    TILE_MAP,
    Domain,
    TritonExperts,
    combine_block,
    float32_like,
    gemm_constants,
    make_build,
    tile_arguments,
)
from tilecast.kernels.gpu.target import Target, target_of
from tilecast.kernels.gpu.tiles import block_rows, rows_per_expert
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertGemm, TileConfig

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.gpu.launch import Plan
    from tilecast.kernels.gpu.sorting import DeviceLayout

CHUNKS = (256, 512, 1024, 2048, 4096)
DEFAULT_CHUNK = 1024
MAX_ROWS = 64
"""With more rows an expert there are tiles enough, and partial sums are traffic."""
TILE_CONSTANTS = (
    "UP", "K", "WIDTH", "TOP_K", "N_TILES", "EXPERT_STRIDE", "COLUMN_STRIDE", "UP_STRIDE", "K_STRIDE", "GATED", "CHUNK",
    "EVEN_K", "EVEN_N", "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M",
)  # fmt: skip
UP_CONSTANTS = (
    "SPLITS", "EXPERTS", "WIDTH", "ACTIVATION", "GATED", "HAS_BIAS", "BIAS_EXPERT", "BIAS_COLUMN", "BIAS_UP", "BLOCK",
)  # fmt: skip
DOWN_CONSTANTS = ("SPLITS", "EXPERTS", "TOP_K", "WIDTH", "HAS_BIAS", "BIAS_EXPERT", "BLOCK")


class SplitK(TritonExperts):
    """Sorted tiles times stretches of K. Parameters: those of a tile, and chunk, the K of one stretch."""

    name = "triton.moe_split_k"
    domain: Domain = {  # noqa: RUF012  # the protocol wants an instance's view
        "block_m": BLOCKS[1:5],
        "block_n": BLOCKS[1:],
        "block_k": (16, 32, 64, 128, 256),
        "group_m": (1, 4, 8, 16, 32),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5, 6),
        "chunk": CHUNKS,
    }

    def unfit(self, gemm: ExpertGemm, config: TileConfig, target: Target) -> str | None:
        """Return why a stretch does not cut K, or is not made of whole steps."""
        chunk = config.integer("chunk")
        if chunk >= gemm.k:
            return f"a stretch of {chunk} does not cut K={gemm.k}"
        if chunk % config.integer("block_k"):
            return f"a stretch of {chunk} is not made of steps of {config['block_k']}"
        return None

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield every config worth considering: none where rows are many."""
        target = target_of(environment)
        rows = rows_per_expert(gemm, tokens)
        if target is None or rows > MAX_ROWS:
            return
        blocks = (32,) if gemm.layer.dtype == "fp32" else (64, 128)
        for chunk, block_n, block_k, stages in product(CHUNKS, (32, 64, 128), blocks, stage_range(target)):
            if chunk < gemm.k <= 8 * chunk:
                yield self._config(
                    block_m=block_rows(rows), block_n=block_n, block_k=block_k, group_m=1, num_warps=4,
                    num_stages=stages, chunk=chunk,
                )  # fmt: skip

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return the heuristic config; with `like`, one of the same numerics class."""
        target = target_of(environment)
        assert target is not None, "asked for a default in an environment that was rejected"
        shorter = [chunk for chunk in CHUNKS if chunk < gemm.k and chunk <= DEFAULT_CHUNK]
        chunk = max(shorter, default=CHUNKS[0]) if like is None else like.integer("chunk")
        return self._config(**sorted_tile(gemm, tokens, target, like, most_rows=MAX_ROWS), chunk=chunk)

    def _config(self, **params: int) -> TileConfig:
        return TileConfig(self.name, params)

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        """Return the fields of the numerics class: the stretch is one of them."""
        return {**super().numerics(gemm, config, environment), "chunk": config["chunk"]}

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
        """Return what a launch of `config` compiles: the tiles, and the sum over stretches."""
        layer, is_up = gemm.layer, gemm.name == "up"
        chunk = config.integer("chunk")
        splits = -(-gemm.k // chunk)
        constants = gemm_constants(gemm, config, layout, bias=layer.bias)
        constants |= {"GROUP_M": config["group_m"], "CHUNK": chunk, "SPLITS": splits}
        constants["BLOCK"] = combine_block(layer.intermediate if is_up else layer.hidden)
        dtype, bias = layer.dtype, ("bias", f"*{bias_dtype or layer.dtype}")
        partial, stride = ("partial", "*fp32"), ("split_stride", "i64")
        operands = ("rows", f"*{dtype}"), ("weights", f"*{dtype}"), partial, ("slots", "*i32"), *TILE_MAP, stride
        tiles = make_build("_split_k", "split_tiles", operands, TILE_CONSTANTS, constants, config, target)
        signature: tuple[tuple[str, str], ...]
        names: tuple[str, ...]
        if is_up:
            signature = (partial, bias, ("out", f"*{dtype}"), ("slots", "*i32"), ("ids", "*i32"), ("offsets", "*i32"))
            names, module, function = UP_CONSTANTS, "_split_k", "finish_up"
        else:
            signature = (partial, bias, ("ids", "*i32"), ("scale", "*fp32"), ("out", f"*{out_dtype or dtype}"))
            names, module, function = DOWN_CONSTANTS, "_combine", "combine_splits"
        finish = Build(
            module=module,
            function=function,
            signature=(*signature, stride),
            constants=tuple((name, constants[name]) for name in names),
            num_warps=4,
            num_stages=1,
        )
        return tiles, finish

    def launch_up(
        self, plan: Plan, hidden: torch.Tensor, weights: GemmWeights, route: DeviceLayout, out: torch.Tensor
    ) -> None:
        """Launch the stretches, then the sum with bias and activation; rows come out expert-sorted."""
        partial = self._launch_tiles(plan, hidden, weights, route, out.shape[0])
        block = combine_block(out.shape[1])
        grid = (out.shape[0], -(-out.shape[1] // block))
        plan.builds[1].launch(
            grid, out.device, partial, plan.bias, out, route.slots, route.ids, route.offsets, partial.stride(0)
        )

    def launch_down(
        self,
        plan: Plan,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: DeviceLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Launch the stretches, then the sum with bias, routing weight and combine."""
        partial = self._launch_tiles(plan, intermediate, weights, route, intermediate.shape[0])
        grid = (out.shape[0], -(-out.shape[1] // combine_block(out.shape[1])))
        plan.builds[1].launch(
            grid, out.device, partial, plan.bias, route.ids, topk_weights, out, partial.stride(0)
        )  # fmt: skip

    @staticmethod
    def _launch_tiles(
        plan: Plan, rows: torch.Tensor, weights: GemmWeights, route: DeviceLayout, slots: int
    ) -> torch.Tensor:
        """Return float32 partial sums [splits, T·k, N]; rows of absent slots have no meaning."""
        gemm = weights.gemm
        splits = -(-gemm.k // plan.config.integer("chunk"))
        partial = float32_like(rows, splits, slots, gemm.n)
        tiles = route.tiles(plan.config.integer("block_m"))
        plan.builds[0].launch(
            (tiles.max_tiles * plan.columns, splits), rows.device,
            rows, weights.data, partial, route.slots, *tile_arguments(tiles), partial.stride(0),
        )  # fmt: skip
        return partial
