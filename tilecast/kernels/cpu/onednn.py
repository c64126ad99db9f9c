"""`onednn.linear`: one library call per expert, the rest of the layer in float32 torch around it.

The matrix products are PyTorch's own: `torch.mm` on plain weights (oneDNN for bf16 and fp16 where the CPU has
the instructions, MKL or ATen's loops elsewhere), or oneDNN on weights stored in its blocked layout.

Rounding. Neither library call can return float32 for bf16 or fp16 operands, so such a product is rounded to
the layer's dtype *before* the bias, the activation and the routing weight, which are float32. That is one
rounding more than other kernels make, and is named in the numerics class.

Batch invariance is not claimed. The libraries choose a kernel, and with it the sum order, by shape. A constant
`row_block` shows them one shape only. Seen with torch 2.13 on an AVX2 CPU, wide-exponent operands, ten shapes
from K=7 to K=8191, row blocks 1, 4, 16, 64 and 256, one and two threads, a row alone against the same row
among others and at the block's first, second, middle and last position: all bits were equal, but fp32 on plain
weights changed bits with the *address* of the operand (4-byte offsets, K of 7, 33 and 2048), and two packing
hints of one weight differed at one row. What a closed choice of kernels did on one CPU is no construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tilecast.canonical import Json
from tilecast.environment import Environment, cpu_environment
from tilecast.errors import ConfigError, DeviceError
from tilecast.kernels.cpu.work import onednn_work
from tilecast.kernels.spec import PLAIN, GemmWeights, outside_domain
from tilecast.kernels.work import Work
from tilecast.problem import ExpertGemm, ParamValue, TileConfig

if TYPE_CHECKING:
    import torch

    from tilecast.kernels.routing import ExpertLayout

ONEDNN = "onednn"
"""The layout of prepacked weights: a tuple of E opaque oneDNN tensors, one [N, K] weight each."""

ROW_BLOCKS = (0, 1, 4, 16, 64, 256)
PACK_FEATURES = {"fp32": (), "bf16": ("avx512bw", "avx512vl"), "fp16": ("avx512_fp16",)}
"""What `mkldnn_reorder_linear_weight` asks of an x86 CPU (its avx512dq comes with avx512bw on every CPU)."""


class OneDnnLinear:
    """The `onednn.linear` kernel for CPUs; follows `tilecast.kernels.spec.Kernel`.

    Parameters: `prepack` (`no`: weights as loaded, layout `plain`; `yes`: layout `onednn`) and `row_block`
    (0: one call with an expert's actual rows; otherwise blocks of that many rows, the last padded with zeros).
    """

    name = "onednn.linear"
    device_kind = "cpu"
    domain: dict[str, tuple[ParamValue, ...] | range] = {"prepack": ("no", "yes"), "row_block": ROW_BLOCKS}  # noqa: RUF012

    def rejects(self, gemm: ExpertGemm, environment: Environment) -> str | None:
        """Return why this kernel cannot run `gemm` in `environment` at all."""
        if environment.device_kind != self.device_kind:
            return f"runs on CPUs, the device is {environment.device_kind}"
        if gemm.layer.weight_format != "dense":
            return f"reads dense weights, the layer's are {gemm.layer.weight_format}"
        return None

    def space(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> Iterator[TileConfig]:
        """Yield both layouts, each with the actual rows and with blocks near an expert's mean row count."""
        mean_rows = math.ceil(tokens * gemm.layer.top_k / gemm.layer.global_experts)
        for prepack in ("no", "yes"):
            for block in ROW_BLOCKS:
                if block == 0 or mean_rows / 16 <= block <= mean_rows * 4:
                    yield TileConfig(self.name, {"prepack": prepack, "row_block": block})

    def invalid(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> str | None:
        """Return why `config` cannot run `gemm` in `environment`."""
        reason = outside_domain(self, config)
        if reason is None and config["prepack"] == "yes":
            reason = _cannot_prepack(gemm.layer.dtype, environment)
        return reason

    def default(
        self, gemm: ExpertGemm, tokens: int, environment: Environment, like: TileConfig | None = None
    ) -> TileConfig:
        """Return plain weights with the actual rows; with `like`, that very config, its class being its own."""
        if like is not None and like.kernel == self.name:
            return like
        return TileConfig(self.name, {"prepack": "no", "row_block": 0})

    def numerics(self, gemm: ExpertGemm, config: TileConfig, environment: Environment) -> dict[str, Json]:
        """Return the class: each config on each shape, CPU and library version is one of its own."""
        dtype = gemm.layer.dtype
        return {
            "kernel": self.name,
            "source": environment.kernel_source,
            "library": environment.torch,
            "device": environment.device,
            "features": environment.features,
            "layer": gemm.layer.digest,
            "gemm": gemm.name,
            "config": config.to_json(),
            "k_order": "chosen by the library from shape and address",
            "accumulator": "float32",
            "product_rounding": "none" if dtype == "fp32" else f"{dtype}, before bias and activation or routing weight",
            "epilogue": "float32, slots added in slot order, one rounding",
        }

    def batch_invariant(self, gemm: ExpertGemm, config: TileConfig) -> bool:
        """Return False: the libraries' choice of kernels is closed (see the module's text)."""
        return False

    def layout(self, gemm: ExpertGemm, config: TileConfig) -> str:
        """Return `onednn` for prepacked weights, else `plain`."""
        return ONEDNN if config["prepack"] == "yes" else PLAIN

    def order(self, gemm: ExpertGemm, config: TileConfig) -> str:
        """Return `slot`: row s of the intermediate belongs to slot s."""
        return "slot"

    def pack(self, weights: GemmWeights, layout: str) -> GemmWeights:
        """Return plain weights [E, N, K] as E oneDNN tensors. Raises ConfigError or, here unable, DeviceError."""
        if weights.layout != PLAIN:
            raise ConfigError(f"{self.name} packs plain weights, got layout {weights.layout!r}")
        if layout == PLAIN:
            return weights
        if layout != ONEDNN:
            raise ConfigError(f"{self.name} has no weight layout {layout!r}; known: {PLAIN}, {ONEDNN}")
        reason = _cannot_prepack(weights.gemm.layer.dtype, cpu_environment())
        if reason is not None:
            raise DeviceError(f"{self.name}: {reason}; use prepack=no")
        from tilecast.kernels.cpu import onednn_launch

        data = onednn_launch.packed(weights)
        return GemmWeights(gemm=weights.gemm, layout=layout, data=data, bias=weights.bias)

    def unpack(self, weights: GemmWeights) -> GemmWeights:
        """Return weights in any of this kernel's layouts as `plain` ones, bit for bit."""
        if weights.layout == PLAIN:
            return weights
        from tilecast.kernels.cpu import onednn_launch

        data = onednn_launch.unpacked(weights)
        return GemmWeights(gemm=weights.gemm, layout=PLAIN, data=data, bias=weights.bias)

    def work(self, gemm: ExpertGemm, config: TileConfig, environment: Environment, counts: Sequence[int]) -> Work:
        """Return what a launch of a valid config does; counts are the rows of each local expert."""
        return onednn_work(gemm, config, environment, counts)

    def up(
        self,
        config: TileConfig,
        hidden: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        out: torch.Tensor,
    ) -> None:
        """Run the up GEMM: hidden [T, H] to out [T·k, I] in slot order; rows of absent slots are left as is."""
        from tilecast.kernels.cpu import onednn_launch

        self._check_layout(config, weights)
        onednn_launch.up(config, hidden, weights, route, out)

    def down(
        self,
        config: TileConfig,
        intermediate: torch.Tensor,
        weights: GemmWeights,
        route: ExpertLayout,
        topk_weights: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Run the down GEMM and the ordered combine: intermediate [T·k, I] to out [T, H] (its dtype or float32)."""
        from tilecast.kernels.cpu import onednn_launch

        self._check_layout(config, weights)
        onednn_launch.down(config, intermediate, weights, route, topk_weights, out)

    def _check_layout(self, config: TileConfig, weights: GemmWeights) -> None:
        expected = self.layout(weights.gemm, config)
        if weights.layout != expected:
            raise ConfigError(f"{config.label} reads layout {expected!r}, the weights are {weights.layout!r}")


def _cannot_prepack(dtype: str, environment: Environment) -> str | None:
    if environment.arch in ("x86_64", "AMD64"):
        missing = [name for name in PACK_FEATURES[dtype] if name not in environment.features.split(",")]
        if missing:
            return f"oneDNN prepacks {dtype} weights only on CPUs with {' and '.join(missing)}"
    # The library can be asked about this machine alone, not about the one that a foreign table names.
    if not cpu_environment().accepts(environment):
        return None
    from tilecast.kernels.cpu import onednn_launch

    return onednn_launch.cannot_prepack_here(dtype)


KERNEL = OneDnnLinear()
"""The one instance; it has no state."""
