"""What the Triton expert kernels share: what they refuse, their numerics class, launching up, down and combine.

Numerics (docs/numerics.md): every output is one chain of tensor-core sums along K, ascending, into a float32
accumulator; bias, activation, gate product, routing weight and the sum over slots follow in float32. Block sizes,
stages, warps, program order, TMA and the unsorted form change none of that. Swapped operands and split-K do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tilecast.canonical import Json
from tilecast.environment import Environment, gpu_toolchain
from tilecast.errors import ConfigError, DeviceError
from tilecast.kernels.gpu.build import Build, Constant
from tilecast.kernels.gpu.layouts import Strides, plain_again, relayout, strides
from tilecast.kernels.gpu.quantized import code_numerics, code_signature, quantized
from tilecast.kernels.gpu.target import Target, target_of
from tilecast.kernels.gpu.tiles import MAX_EXPERTS, instruction, tile_reason
from tilecast.kernels.gpu.work import sorted_work
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.kernels.work import Work
from tilecast.problem import ExpertGemm, ParamValue, TileConfig

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.gpu.launch import Plan
    from tilecast.kernels.gpu.sorting import DeviceLayout, TileMap
    from tilecast.kernels.routing import ExpertLayout

Domain = dict[str, tuple[ParamValue, ...] | range]
BLOCKS: tuple[ParamValue, ...] = (8, 16, 32, 64, 128, 256)
TILE_MAP = (("tile_count", "*i32"), ("tile_experts", "*i32"), ("tile_starts", "*i32"), ("tile_ends", "*i32"))
COMBINE_BLOCK = 512
"""Columns of one program of the combine, at most: with 1024, adds come between the loads of eight slots."""


class TritonExperts(ABC):
    """Base of the Triton kernels: one grouped GEMM a launch, on an NVIDIA or AMD GPU."""

    name: str
    device_kind = "cuda"
    domain: Domain
    row_order = "sorted"
    formats: tuple[str, ...] = ("dense",)
    """Weight formats that it reads."""
    formats_text = "dense"

    # What is asked before anything runs ----------------------------------------------

    def rejects(self, gemm: ExpertGemm, environment: Environment) -> str | None:
        """Return why this kernel cannot run `gemm` in `environment` at all."""
        if environment.device_kind != "cuda":
            return f"runs on GPUs, not on {environment.device_kind}"
        target = target_of(environment)
        if target is None:
            return f"{environment.arch} is none of the architectures that kernels are checked on"
        if gemm.layer.weight_format not in self.formats:
            return f"weight format {gemm.layer.weight_format} is not {self.formats_text}"
        if gemm.misfit is not None:
            return gemm.misfit
        if gemm.layer.experts > MAX_EXPERTS:
            return f"{gemm.layer.experts} experts, at most {MAX_EXPERTS} are sorted"
        if gpu_toolchain()["triton"] == "absent":
            return "Triton is not installed"
        return self.refuses(gemm, target)

    def refuses(self, gemm: ExpertGemm, target: Target) -> str | None:
        """Return why this variant cannot run `gemm` on `target`."""
        return None

    def invalid(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str | None:
        """Return why `config` cannot run `gemm` in `environment`."""
        target = target_of(environment)
        if target is None:
            return f"{environment.arch} is none of the architectures that kernels are checked on"
        if target.kind == "hip" and config.integer("num_stages") > 2:
            return "on AMD more than 2 stages are not pipelined"
        return tile_reason(gemm, config, target) or self.unfit(gemm, config, target)

    def unfit(self, gemm: ExpertGemm, config: TileConfig, target: Target) -> str | None:
        """Return what else this variant does not take."""
        return None

    @abstractmethod
    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield every config worth considering for this many tokens, in a fixed order; some may be invalid."""

    @abstractmethod
    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return the heuristic config; with `like`, one of the same weight layout and numerics class."""

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        """Return the fields of the numerics class; kernels of this package share classes."""
        target = target_of(environment)
        if target is None:
            raise DeviceError(f"{environment.arch} is none of the architectures that kernels are checked on")
        return {
            **(code_numerics(gemm, config, target) if quantized(gemm) else {}),
            "kernel": "triton",
            "dtype": gemm.layer.dtype,
            "accumulator": "fp32",
            "multiply_add": multiply_add(gemm, config, target),
            "operands": "swapped" if dict(config.params).get("swap") else "rows left",
            "k_order": "ascending",
            "chunk": 0,
            "fp_fusion": False,
            "rounding": "intermediate once, output once",
            "combine": "slot order",
        }

    def batch_invariant(self, gemm: ExpertGemm, config: TileConfig) -> bool:
        """Return True: no sum involves two rows, and no order depends on the batch."""
        return True

    def layout(self, gemm: ExpertGemm, config: TileConfig) -> str:
        """Return `plain`: the kernels read checkpoints' weights as they are, also in `layouts.LAYOUTS`."""
        return PLAIN

    def order(self, gemm: ExpertGemm, config: TileConfig) -> str:
        """Return the order of the intermediate's rows."""
        return self.row_order

    def pack(self, weights: GemmWeights, layout: str) -> GemmWeights:
        """Return `plain` weights stored in another layout. The plain tensor is left as it was."""
        return relayout(weights, layout)

    def unpack(self, weights: GemmWeights) -> GemmWeights:
        """Return weights in any of this kernel's layouts as `plain` ones, bit for bit."""
        return plain_again(weights)

    def work(self, gemm: ExpertGemm, config: TileConfig, environment: Environment, counts: Sequence[int]) -> Work:
        """Return what a launch of a valid config does; counts are the rows of each local expert."""
        return sorted_work(gemm, config, environment, counts)

    # What is compiled -------------------------------------------------------------------

    @abstractmethod
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
        """Return what a launch of `config` compiles, in the order of launching.

        out_dtype is down's, `fp32` for a partial sum; bias_dtype that of the bias; by default the layer's. scale_dtype
        is that of quantised weights' scales, by default `scale_type`.
        """

    # Launching ----------------------------------------------------------------------------

    def up(
        self,
        config: TileConfig,
        hidden: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        out: torch.Tensor,
    ) -> None:
        """Run the up GEMM: hidden [T, H] to out [T·k, I] in the config's `order`, activation applied, one rounding."""
        from tilecast.kernels.gpu import launch

        launch.up(self, config, hidden, weights, route, out)

    def down(
        self,
        config: TileConfig,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Run the down GEMM and the ordered combine: intermediate [T·k, I] in the config's `order` to out [T, H]."""
        from tilecast.kernels.gpu import launch

        launch.down(self, config, intermediate, weights, route, topk_weights, out)

    @abstractmethod
    def launch_up(
        self, plan: Plan, hidden: torch.Tensor, weights: GemmWeights, route: DeviceLayout, out: torch.Tensor
    ) -> None:
        """Launch with checked operands, at least one token."""

    @abstractmethod
    def launch_down(
        self,
        plan: Plan,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: DeviceLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Launch with checked operands, at least one token."""


def multiply_add(gemm: ExpertGemm, config: TileConfig, target: Target) -> str:
    """Return how products are summed, as far as bits go: the tensor core's (g, F) where they are known."""
    kind = instruction(gemm, config, target)
    if kind == "fma":
        return "fma"
    if target.group:
        return f"tensor core, groups of {target.group}, {target.fraction_bits} fraction bits"
    return f"{kind} of {target.environment_arch}"


def columns_of(gemm: ExpertGemm, config: TileConfig) -> int:
    """Return how many column tiles an expert's output has."""
    block_n = config.integer("block_n")
    width = gemm.layer.intermediate if gemm.name == "up" else gemm.layer.hidden
    return -(-width // (block_n // 2 if gemm.name == "up" and gemm.layer.gated else block_n))


def gemm_constants(gemm: ExpertGemm, config: TileConfig, layout: str, *, bias: bool) -> dict[str, Constant]:
    """Return the constants that the GEMM kernels share."""
    layer, is_up = gemm.layer, gemm.name == "up"
    if quantized(gemm) and layout != PLAIN:
        raise ConfigError(f"{layer.weight_format} weights are in layout {layout}, the GPU kernels read {PLAIN} ones")
    where: Strides = strides(gemm, layout)
    block_n, block_k = config.integer("block_n"), config.integer("block_k")
    width = layer.intermediate if is_up else layer.hidden
    return {
        "UP": is_up, "K": gemm.k, "WIDTH": width, "TOP_K": layer.top_k, "N_TILES": columns_of(gemm, config),
        "EXPERTS": layer.experts, "EXPERT_STRIDE": where.expert, "COLUMN_STRIDE": where.column,
        "UP_STRIDE": where.up, "K_STRIDE": where.k, "ACTIVATION": layer.activation, "GATED": layer.gated,
        "HAS_BIAS": bias, "BIAS_EXPERT": gemm.n, "BIAS_COLUMN": where.bias_column, "BIAS_UP": where.bias_up,
        "EVEN_K": gemm.k % block_k == 0,
        "EVEN_N": width % (block_n // 2 if is_up and layer.gated else block_n) == 0,
        "BLOCK_M": config.integer("block_m"), "BLOCK_N": block_n, "BLOCK_K": block_k,
    }  # fmt: skip


def weight_signature(gemm: ExpertGemm, scale_dtype: str | None, bias_dtype: str | None) -> tuple[tuple[str, str], ...]:
    """Return the arguments for weights and bias; without one, the weights stand in its place."""
    dtype, layer = gemm.layer.dtype, gemm.layer
    weights = code_signature(gemm, scale_dtype) if quantized(gemm) else (("weights", f"*{dtype}"),)
    return (*weights, ("bias", f"*{bias_dtype or dtype}" if layer.bias or bias_dtype else weights[0][1]))


def make_build(
    module: str,
    function: str,
    signature: tuple[tuple[str, str], ...],
    names: tuple[str, ...],
    constants: dict[str, Constant],
    config: TileConfig,
    target: Target,
) -> Build:
    """Return a build of a function that takes the constants called `names`."""
    return Build(
        module=module,
        function=function,
        signature=signature,
        constants=tuple((name, constants[name]) for name in names),
        num_warps=config.integer("num_warps"),
        num_stages=config.integer("num_stages"),
        options=target_options(target),
    )


def target_options(target: Target) -> tuple[tuple[str, Constant], ...]:
    """Return what must be said on AMD, where the size of the matrix instruction would follow the tile's."""
    return (("matrix_instr_nonkdim", 16), ("kpack", 1)) if target.kind == "hip" else ()


def combine_build(gemm: ExpertGemm, out_dtype: str, target: Target) -> Build:
    """Return the build of the ordered combine that follows a sorted down GEMM."""
    layer = gemm.layer
    return Build(
        module="_combine",
        function="combine",
        signature=(("partial", "*fp32"), ("ids", "*i32"), ("out", f"*{out_dtype}")),
        constants=(
            ("EXPERTS", layer.experts), ("TOP_K", layer.top_k), ("WIDTH", layer.hidden),
            ("BLOCK", combine_block(layer.hidden)),
        ),
        num_warps=4,
        num_stages=1,
    )  # fmt: skip


def combine_block(hidden: int) -> int:
    """Return the columns of one program of the combine."""
    return min(COMBINE_BLOCK, 1 << max(5, (hidden - 1).bit_length()))


def launch_combine(build: Build, partial: torch.Tensor, route: DeviceLayout, out: torch.Tensor) -> None:
    """Sum float32 partial [T·k, H] over each token's present slots into out [T, H]."""
    hidden = out.shape[1]
    build.launch((route.tokens, -(-hidden // combine_block(hidden))), out.device, partial, route.ids, out)


def float32_like(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return float32 memory on a tensor's device, contents undefined."""
    import torch

    return torch.empty(shape, dtype=torch.float32, device=tensor.device)


def tile_arguments(tiles: TileMap) -> tuple[torch.Tensor, ...]:
    """Return the arguments that `TILE_MAP` names."""
    return tiles.count, tiles.experts, tiles.starts, tiles.ends
