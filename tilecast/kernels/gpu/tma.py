"""`triton.moe_tma`: weights, and down's expert-sorted rows, through tensor descriptors of the copy engine (sm_90+)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tilecast.environment import Environment
from tilecast.errors import ConfigError, InputError
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.defaults import sorted_tile
from tilecast.kernels.gpu.grouped import tile_space
from tilecast.kernels.gpu.layouts import strides
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
)
from tilecast.kernels.gpu.target import Target, target_of
from tilecast.kernels.gpu.tiles import rows_per_expert
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertGemm, TileConfig

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.gpu.launch import Plan
    from tilecast.kernels.gpu.sorting import DeviceLayout

CONSTANTS = (
    "UP", "K", "WIDTH", "TOP_K", "N_TILES", "ACTIVATION", "GATED", "HAS_BIAS", "BIAS_EXPERT", "BIAS_COLUMN", "BIAS_UP",
    "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "PERSISTENT", "SPECIALIZE",
)  # fmt: skip
ALIGNMENT = 16
"""Bytes to which a descriptor's base and strides are aligned (CUDA driver API, cuTensorMapEncodeTiled)."""


class Tma(TritonExperts):
    """Grouped GEMM on descriptors. Parameters: those of a tile, and

    waves: 0 for one tile a program, else programs for each SM that walk over all tiles; specialize 1: the loop of the
    down GEMM is split into a producer and consumers by the compiler, where it can (sm_100).
    """

    name = "triton.moe_tma"
    domain: Domain = {  # noqa: RUF012  # the protocol wants an instance's view
        "block_m": BLOCKS[1:5],
        "block_n": BLOCKS[2:],
        "block_k": (32, 64, 128, 256),
        "group_m": (1, 4, 8, 16, 32),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5, 6),
        "waves": (0, 1, 2),
        "specialize": (0, 1),
    }

    def refuses(self, gemm: ExpertGemm, target: Target) -> str | None:
        """Return why this variant cannot run `gemm` on `target`."""
        layer = gemm.layer
        if not target.tma:
            return f"{target.name} has no tensor descriptors"
        if layer.dtype == "fp32":
            return "fp32 has no tensor cores to feed"
        if gemm.k * 2 % ALIGNMENT:
            return f"rows of {gemm.k} elements are not aligned to {ALIGNMENT} bytes"
        if layer.experts * gemm.n >= 1 << 31:
            return f"{layer.experts} experts of {gemm.n} columns pass the descriptor's 32-bit coordinates"
        return None

    def unfit(self, gemm: ExpertGemm, config: TileConfig, target: Target) -> str | None:
        """Return why warps cannot be specialised."""
        if not config["specialize"]:
            return None
        if target.arch != "100":
            return f"Triton specialises no warps of this loop on {target.name}"
        if gemm.name == "up":
            return "rows gathered by pointer cannot be produced by a specialised warp"
        return None

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield every config worth considering for this many tokens, in a fixed order; some may be invalid."""
        target = target_of(environment)
        if target is None or self.refuses(gemm, target) is not None:
            return
        specialised = (0, 1) if target.arch == "100" and gemm.name == "down" else (0,)
        waves = (0, 1) if rows_per_expert(gemm, tokens) >= 64 else (0,)
        for tile in tile_space(gemm, tokens, target):
            if tile["block_n"] < 64:
                continue
            for wave in waves:
                for specialize in specialised:
                    yield TileConfig(self.name, {**tile, "waves": wave, "specialize": specialize})

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return the heuristic config, the pointer form's tile; with `like`, one of the same class."""
        target = target_of(environment)
        assert target is not None, "asked for a default in an environment that was rejected"
        return TileConfig(self.name, {**sorted_tile(gemm, tokens, target, like), "waves": 0, "specialize": 0})

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
        constants |= {
            "GROUP_M": config["group_m"],
            "PERSISTENT": bool(config["waves"]),
            "SPECIALIZE": bool(config["specialize"]),
        }
        block_m, block_k = config["block_m"], config["block_k"]
        weight_block = ",".join(str(size) for size in weight_blocks(gemm, config))
        signature = (
            ("rows", f"*{dtype}" if is_up else f"tensordesc<{dtype}[{block_m},{block_k}]>"),
            ("weights", f"tensordesc<{dtype}[{weight_block}]>"), ("bias", f"*{bias_dtype or dtype}"),
            ("out", f"*{dtype}" if is_up else "*fp32"), ("slots", "*i32"), ("scale", "*i32" if is_up else "*fp32"),
            *TILE_MAP,
        )  # fmt: skip
        main = make_build("_tma", "tma_tiles", signature, CONSTANTS, constants, config, target)
        return (main,) if is_up else (main, combine_build(gemm, out_dtype or dtype, target))

    def launch_up(
        self, plan: Plan, hidden: torch.Tensor, weights: GemmWeights, route: DeviceLayout, out: torch.Tensor
    ) -> None:
        """Launch the up GEMM; its rows come out expert-sorted."""
        tiles = route.tiles(plan.config.integer("block_m"))
        described = self._weights(plan, weights)
        arguments = (hidden, described, plan.bias, out, route.slots, tiles.count, *tile_arguments(tiles))
        plan.builds[0].launch((self._programs(plan, tiles.max_tiles),), out.device, *arguments)

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
        config = plan.config
        tiles = route.tiles(config.integer("block_m"))
        partial = float32_like(out, intermediate.shape[0], out.shape[1])
        rows = describe(intermediate, intermediate.shape, (config.integer("block_m"), config.integer("block_k")))
        described = self._weights(plan, weights)
        arguments = (rows, described, plan.bias, partial, route.slots, topk_weights, *tile_arguments(tiles))
        plan.builds[0].launch((self._programs(plan, tiles.max_tiles),), out.device, *arguments)
        launch_combine(plan.builds[1], partial, route, out)

    @staticmethod
    def _programs(plan: Plan, max_tiles: int) -> int:
        waves, tiles = plan.config.integer("waves"), max_tiles * plan.columns
        return min(plan.units * waves, tiles) if waves else tiles

    @staticmethod
    def _weights(plan: Plan, weights: GemmWeights) -> Any:
        """Return the descriptor of the stack, made once for each plan. Raises ConfigError for transposed weights."""
        known = plan.descriptors.get("weights")
        if known is None:
            gemm, layer = weights.gemm, weights.gemm.layer
            where = strides(gemm, weights.layout)
            if where.k != 1:
                raise ConfigError(f"{Tma.name} reads weights with K contiguous, these are in layout {weights.layout}")
            block = weight_blocks(gemm, plan.config)
            shape: tuple[int, ...]
            steps: tuple[int, ...]
            if len(block) == 4:
                shape = (layer.experts, 2, layer.intermediate, gemm.k)
                steps = (where.expert, where.up, where.column, 1)
            else:
                shape, steps = (layer.experts * gemm.n, gemm.k), (gemm.k, 1)
            known = plan.descriptors["weights"] = describe(weights.data, shape, block, steps)
        return known


def weight_blocks(gemm: ExpertGemm, config: TileConfig) -> tuple[int, ...]:
    """Return the block of a weight descriptor: [1, 2, N/2, K] of a gated up stack, else [N, K]."""
    block_n, block_k = config.integer("block_n"), config.integer("block_k")
    return (1, 2, block_n // 2, block_k) if gemm.name == "up" and gemm.layer.gated else (block_n, block_k)


def describe(
    tensor: torch.Tensor, shape: tuple[int, ...], block: tuple[int, ...], steps: tuple[int, ...] | None = None
) -> Any:
    """Return Triton's tensor descriptor over a tensor's memory. Raises InputError unless that is aligned."""
    if tensor.data_ptr() % ALIGNMENT:
        raise InputError(f"{Tma.name} reads from addresses that are multiples of {ALIGNMENT}; pass a clone")
    # Imported where it is used: importing the kernels does not import Triton.
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(shape), list(steps or (shape[1], 1)), list(block))
