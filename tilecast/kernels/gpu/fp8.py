"""`triton.moe_fp8`: fp8 weights on fp8 tensor cores, with rows rounded to e4m3 inside up and down.

A row is rounded by itself, 128 of K at a time, so its codes do not depend on the batch. It is another numerics class
than `triton.moe_gemm` on the same weights, whose rows keep their dtype, and less exact: docs/gpu-kernels.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from tilecast.canonical import Json
from tilecast.environment import Environment
from tilecast.errors import DeviceError
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.grouped import Grouped
from tilecast.kernels.gpu.moe import (
    TILE_MAP,
    Domain,
    combine_build,
    float32_like,
    gemm_constants,
    launch_combine,
    make_build,
    tile_arguments,
    weight_signature,
)
from tilecast.kernels.gpu.quantized import code_constants
from tilecast.kernels.gpu.target import Target, target_of
from tilecast.kernels.gpu.tiles import FP8, block_rows, instruction, likely_rows, rows_per_expert
from tilecast.kernels.spec import FP8_ROWS, PLAIN, ROWS_GROUP, GemmWeights
from tilecast.problem import WEIGHT_FORMATS, ExpertGemm, TileConfig

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.gpu.launch import Plan
    from tilecast.kernels.gpu.sorting import DeviceLayout

SUMS = {"89": "groups of 16, 13 fraction bits", "90": "groups of 32, 13 fraction bits"}
"""How a tensor core sums products of e4m3, where that was measured (docs/numerics.md)."""
MULTIPLIES_E4M3 = ("89", "90", "100", "120", "gfx950")
"""Targets whose matrix units take OCP's e4m3; that of gfx942 is another one, with zero and NaN elsewhere."""
CONSTANTS = (
    "UP", "K", "WIDTH", "TOP_K", "N_TILES", "EXPERT_STRIDE", "COLUMN_STRIDE", "UP_STRIDE", "GROUP", "SCALE_EXPERT",
    "SCALE_ROW", "SCALE_BLOCK", "SCALE_UP", "ACTIVATION", "GATED", "HAS_BIAS", "BIAS_EXPERT", "BIAS_COLUMN",
    "BIAS_UP", "BLOCK_M", "BLOCK_N", "GROUP_M", "SWAP",
)  # fmt: skip
ROUNDED_GROUPS = 16
"""Groups of a row that one program rounds, at most."""


class Fp8(Grouped):
    """One tile a program over rounded rows. Parameters: those of `triton.moe_gemm`; a step is 128 of K, as a scale is.

    On sm_90 and sm_100 only the large instructions multiply e4m3, others would multiply float16 made of it: fewer than
    64 rows need swap 1, where 64 or more weight columns are on the left.
    """

    name = FP8
    formats = tuple(name for name in WEIGHT_FORMATS if name.startswith("fp8"))
    formats_text = "fp8"
    domain: Domain = {  # noqa: RUF012  # the protocol wants an instance's view
        **Grouped.domain,
        "block_m": (16, 32, 64, 128),
        "block_n": (32, 64, 128, 256),
        "block_k": (ROWS_GROUP,),
    }

    def refuses(self, gemm: ExpertGemm, target: Target) -> str | None:
        """Return why a target has no unit for these operands."""
        if target.arch not in MULTIPLIES_E4M3:
            return f"the matrix units of {target.name} do not multiply e4m3 of OCP's kind"
        if gemm.layer.dtype == "fp32":
            return "rows of fp32 lose too much by rounding to e4m3"
        return None

    def unfit(self, gemm: ExpertGemm, config: TileConfig, target: Target) -> str | None:
        """Return why a tile would not be multiplied as e4m3."""
        kind = instruction(gemm, config, target)
        if kind != target.mma[0]:
            return f"{target.name} multiplies e4m3 in tiles of 64 rows and 16 columns by {target.mma[0]} only"
        return super().unfit(gemm, config, target)

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        """Return the fields of the numerics class."""
        target = target_of(environment)
        if target is None:
            raise DeviceError(f"{environment.arch} is none of the architectures that kernels are checked on")
        kind = instruction(gemm, config, target)
        sums = SUMS.get(target.arch, f"{kind} of {target.environment_arch}")
        after = "by row and weight" if gemm.layer.weight_format == "fp8_block128" else "by row, by weight at the end"
        return {
            **super().numerics(gemm, config, environment),
            "activations": FP8_ROWS,
            "weights": f"{gemm.layer.weight_format}: codes",
            "multiply_add": f"e4m3 in {kind}, {sums}",
            "chunk": ROWS_GROUP,
            "scales": f"sums of {ROWS_GROUP} of K scaled {after}, added in fp32",
        }

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield every config worth considering for this many tokens, in a fixed order; some may be invalid."""
        target = target_of(environment)
        if target is None or self.refuses(gemm, target) is not None:
            return
        rows = block_rows(rows_per_expert(gemm, tokens))
        heights = sorted({rows, max(16, rows // 2), min(128, 2 * rows)})
        stages = (2,) if target.kind == "hip" else (2, 3, 4)
        for swap, block_m, block_n, group_m, warps, depth in product(
            (0, 1), heights, (64, 128, 256), (1, 8), (4, 8), stages
        ):
            yield self._config(block_m, block_n, group_m, warps, depth, swap)

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return the heuristic config: swapped where that lets every number of rows be of one class."""
        target = target_of(environment)
        assert target is not None, "asked for a default in an environment that was rejected"
        large = target.mma[0] in ("wgmma", "tcgen05")
        swap = int(large) if like is None else int(dict(like.params).get("swap", 0))
        rows = rows_per_expert(gemm, tokens)
        # Sums wait for the scales of each step: what overlaps are several programs on an SM, so none is large.
        block_m = 64 if large and not swap else min(64, block_rows(likely_rows(rows)))
        stages = 2 if target.kind == "hip" else 3 if target.shared_bytes > 128 << 10 else 2
        warps = 8 if block_m == 64 and target.mma[0] == "tcgen05" else 4
        return self._config(block_m, 64 if not large and block_m >= 32 else 128, 8, warps, stages, swap)

    def _config(self, block_m: int, block_n: int, group_m: int, warps: int, stages: int, swap: int) -> TileConfig:
        return TileConfig(
            self.name,
            {
                "block_m": block_m, "block_n": block_n, "block_k": ROWS_GROUP, "group_m": group_m,
                "num_warps": warps, "num_stages": stages, "swap": swap,
            },
        )  # fmt: skip

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
        """Return what a launch of `config` compiles: rounding, the GEMM, and for down the combine."""
        dtype, is_up = gemm.layer.dtype, gemm.name == "up"
        constants = gemm_constants(gemm, config, layout, bias=gemm.layer.bias) | code_constants(gemm, target)
        constants |= {"GROUP_M": config.integer("group_m"), "SWAP": bool(config["swap"])}
        operands = dict(weight_signature(gemm, scale_dtype, bias_dtype))
        signature = (
            ("rows", "*fp8e4nv"), ("row_scales", "*fp32"), ("weights", "*fp8e4nv"), ("scales", operands["scales"]),
            ("bias", operands["bias"] if gemm.layer.bias else "*fp8e4nv"), ("out", f"*{dtype}" if is_up else "*fp32"),
            ("slots", "*i32"), ("topk_weights", "*i32" if is_up else "*fp32"), *TILE_MAP,
        )  # fmt: skip
        main = make_build("_fp8", "fp8_tiles", signature, CONSTANTS, constants, config, target)
        both = (rounding_build(gemm), main)
        return both if is_up else (*both, combine_build(gemm, out_dtype or dtype, target))

    def launch_up(
        self, plan: Plan, hidden: torch.Tensor, weights: GemmWeights, route: DeviceLayout, out: torch.Tensor
    ) -> None:
        """Round the rows, then launch the up GEMM; its rows come out expert-sorted."""
        tiles = route.tiles(plan.config.integer("block_m"))
        arguments = (*self._operands(plan, hidden, weights), out, route.slots, tiles.count, *tile_arguments(tiles))
        plan.builds[1].launch((self.programs(plan, tiles.max_tiles),), out.device, *arguments)

    def launch_down(
        self,
        plan: Plan,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: DeviceLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Round the rows, launch the down GEMM into float32 rows by slot, then the combine."""
        tiles = route.tiles(plan.config.integer("block_m"))
        partial = float32_like(out, intermediate.shape[0], out.shape[1])
        operands = (*self._operands(plan, intermediate, weights), partial, route.slots, topk_weights)
        grid = (self.programs(plan, tiles.max_tiles),)
        plan.builds[1].launch(grid, out.device, *operands, *tile_arguments(tiles))
        launch_combine(plan.builds[2], partial, route, out)

    def _operands(self, plan: Plan, rows: torch.Tensor, weights: GemmWeights) -> tuple[torch.Tensor, ...]:
        """Launch the rounding of rows [R, K]; return its codes and scales, and the weights, scales and bias."""
        import torch

        groups = -(-rows.shape[1] // ROWS_GROUP)
        codes = torch.empty((len(rows), groups * ROWS_GROUP), dtype=torch.float8_e4m3fn, device=rows.device)
        row_scales = float32_like(rows, len(rows), groups)
        grid = (len(rows), -(-groups // rounded_block(groups)))
        plan.builds[0].launch(grid, rows.device, rows, codes, row_scales)
        stack = weights.data
        bias = stack.codes if weights.bias is None else weights.bias
        return codes, row_scales, stack.codes, stack.scales, bias


def rounded_block(groups: int) -> int:
    """Return how many groups of a row one program rounds, a power of two."""
    return min(ROUNDED_GROUPS, 1 << (groups - 1).bit_length())


def rounding_build(gemm: ExpertGemm) -> Build:
    """Return the build that rounds rows [R, K]."""
    groups = -(-gemm.k // ROWS_GROUP)
    return Build(
        module="_fp8",
        function="round_rows",
        signature=(("rows", f"*{gemm.layer.dtype}"), ("codes", "*fp8e4nv"), ("row_scales", "*fp32")),
        constants=(("K", gemm.k), ("GROUPS", groups), ("BLOCK", rounded_block(groups))),
        num_warps=4,
        num_stages=1,
    )
