"""`triton.moe_decode`: few tokens, two launches, no sorting and no scratch.

Up takes one slot and column tile a program and reads the expert from the routing; down takes one token and column
tile and walks over all its experts in slot order, so that the combine is part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

from tilecast.environment import Environment
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.defaults import DECODE, MAX_TOP_K, default_config, least_rows
from tilecast.kernels.gpu.moe import Domain, TritonExperts, gemm_constants, make_build, weight_signature
from tilecast.kernels.gpu.quantized import CODE_CONSTANTS, code_constants, quantized
from tilecast.kernels.gpu.target import Target, target_of
from tilecast.kernels.gpu.work import decode_work
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.kernels.work import Work
from tilecast.problem import WEIGHT_FORMATS, ExpertGemm, TileConfig

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.gpu.launch import Plan
    from tilecast.kernels.gpu.sorting import DeviceLayout

UP_CONSTANTS = (
    "EXPERTS", "K", "WIDTH", "TOP_K", "EXPERT_STRIDE", "COLUMN_STRIDE", "UP_STRIDE", "K_STRIDE", "ACTIVATION", "GATED",
    "HAS_BIAS", "BIAS_EXPERT", "BIAS_COLUMN", "BIAS_UP", "EVEN_N", "BLOCK_M", "BLOCK_N", "BLOCK_K", "SWAP",
)  # fmt: skip
DOWN_CONSTANTS = (
    "EXPERTS", "K", "WIDTH", "TOP_K", "SLOTS", "EXPERT_STRIDE", "COLUMN_STRIDE", "K_STRIDE", "HAS_BIAS", "BIAS_EXPERT",
    "EVEN_N", "BLOCK_N", "BLOCK_K", "SWAP",
)  # fmt: skip
CODED_UP = (
    "EXPERTS", "K", "WIDTH", "TOP_K", "EXPERT_STRIDE", "COLUMN_STRIDE", "UP_STRIDE", *CODE_CONSTANTS, "ACTIVATION",
    "GATED", "HAS_BIAS", "BIAS_EXPERT", "BIAS_COLUMN", "BIAS_UP", "BLOCK_M", "BLOCK_N", "BLOCK_K", "SWAP",
)  # fmt: skip
CODED_DOWN = (
    "EXPERTS", "K", "WIDTH", "TOP_K", "SLOTS", "EXPERT_STRIDE", "COLUMN_STRIDE",
    *(name for name in CODE_CONSTANTS if name != "SCALE_UP"), "HAS_BIAS", "BIAS_EXPERT", "BLOCK_N", "BLOCK_K", "SWAP",
)  # fmt: skip
SLOTS_PER_EXPERT = 4
"""With more routed slots than this for each expert, weights are read too often."""


class Decode(TritonExperts):
    """Both GEMMs for few tokens. Parameters:

    block_m: rows of the tile, one of them real (8 only with swap; down holds a token's slots in it); block_n,
    block_k: weight columns and K of a step; swap 1: weights are the left operand.
    """

    name = DECODE
    row_order = "slot"
    formats = WEIGHT_FORMATS
    domain: Domain = {  # noqa: RUF012  # the protocol wants an instance's view
        "block_m": (8, 16, 32),
        "block_n": (16, 32, 64, 128),
        "block_k": (16, 32, 64, 128, 256, 512),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4, 5, 6, 7, 8),
        "swap": (0, 1),
    }

    def refuses(self, gemm: ExpertGemm, target: Target) -> str | None:
        """Return why this variant cannot run `gemm` on `target`."""
        if gemm.layer.top_k > MAX_TOP_K:
            return f"top-k is {gemm.layer.top_k}, at most {MAX_TOP_K} slots fit a tile"
        return None

    def unfit(self, gemm: ExpertGemm, config: TileConfig, target: Target) -> str | None:
        """Return why a tile does not hold a token's slots, or the matrix unit does not take it."""
        block_m = config.integer("block_m")
        if block_m < least_rows(gemm, swap=bool(config["swap"]), target=target):
            return f"a tile of {block_m} rows does not hold {gemm.layer.top_k} slots, or needs swapped operands"
        if config["swap"] and gemm.layer.dtype == "fp32":
            return "swapped operands feed tensor cores, fp32 has none"
        return None

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield every config worth considering: none where slots are many for the experts there are."""
        target, layer = target_of(environment), gemm.layer
        if target is None or tokens * layer.top_k > SLOTS_PER_EXPERT * max(16, layer.experts):
            return
        swaps = (0,) if layer.dtype == "fp32" else (0, 1)
        depths = (2,) if target.kind == "hip" else (3, 4, 6, 8)
        for swap, block_n, block_k, warps, stages in product(swaps, (16, 32, 64, 128), (64, 128, 256), (2, 4), depths):
            block_m = least_rows(gemm, swap=bool(swap), target=target)
            yield self._config(
                block_m=block_m, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages, swap=swap
            )

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return the heuristic config, for more than a few tokens a sorted kernel's; with `like`, one of its class."""
        target = target_of(environment)
        assert target is not None, "asked for a default in an environment that was rejected"
        return default_config(gemm, tokens, target, like)

    def _config(self, **params: int) -> TileConfig:
        return TileConfig(self.name, params)

    def work(self, gemm: ExpertGemm, config: TileConfig, environment: Environment, counts: Sequence[int]) -> Work:
        """Return what a launch of a valid config does; counts are the rows of each local expert."""
        return decode_work(gemm, config, environment, counts)

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
        """Return what a launch of `config` compiles: one kernel."""
        dtype, is_up = gemm.layer.dtype, gemm.name == "up"
        constants = gemm_constants(gemm, config, layout, bias=gemm.layer.bias)
        constants |= {"SWAP": bool(config["swap"]), "SLOTS": config["block_m"]}
        names: tuple[str, ...] = UP_CONSTANTS if is_up else DOWN_CONSTANTS
        coded = quantized(gemm)
        if coded:
            names, constants = CODED_UP if is_up else CODED_DOWN, constants | code_constants(gemm, target)
        operands = (
            ("rows", f"*{dtype}"), *weight_signature(gemm, scale_dtype, bias_dtype),
            ("out", f"*{dtype if is_up else out_dtype or dtype}"), ("ids", "*i32"),
        )  # fmt: skip
        if not is_up:
            operands = (*operands, ("topk_weights" if coded else "scale", "*fp32"))
        module, prefix = ("_quantized", "code_") if coded else ("_decode", "")
        return (make_build(module, f"{prefix}decode_{gemm.name}", operands, names, constants, config, target),)

    def launch_up(
        self, plan: Plan, hidden: torch.Tensor, weights: GemmWeights, route: DeviceLayout, out: torch.Tensor
    ) -> None:
        """Launch the up GEMM; row s of `out` is slot s."""
        grid = (out.shape[0], plan.columns)
        plan.builds[0].launch(grid, out.device, hidden, *plan.weights, plan.bias, out, route.ids)

    def launch_down(
        self,
        plan: Plan,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: DeviceLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Launch the down GEMM with its combine."""
        grid = (out.shape[0], plan.columns)
        operands = (intermediate, *plan.weights, plan.bias, out, route.ids, topk_weights)
        plan.builds[0].launch(grid, out.device, *operands)
