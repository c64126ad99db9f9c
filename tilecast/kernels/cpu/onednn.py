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
from contextlib import AbstractContextManager, ExitStack
from itertools import pairwise
from typing import Any

import torch

from tilecast.canonical import Json
from tilecast.environment import Environment, cpu_environment
from tilecast.errors import ConfigError, DeviceError
from tilecast.kernels.cpu.work import onednn_work
from tilecast.kernels.reference import activate
from tilecast.kernels.routing import ExpertLayout, ordered_sum
from tilecast.kernels.spec import PLAIN, GemmWeights, outside_domain
from tilecast.kernels.work import Work
from tilecast.problem import ExpertGemm, ParamValue, TileConfig

ONEDNN = "onednn"
"""The layout of prepacked weights: a tuple of E opaque oneDNN tensors, one [N, K] weight each."""

PACK_ROWS = 64
"""Row count that the library packs for. With hints of 4 to 256 rows, 1 to 256 rows took the same time within
noise (fp32, N=2048, K=1024, AVX2); packed for 1 row, 4 rows took twice as long."""

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
        with torch.no_grad():
            data = tuple(prepack(weight, PACK_ROWS) for weight in weights.data)
        return GemmWeights(gemm=weights.gemm, layout=layout, data=data, bias=weights.bias)

    def unpack(self, weights: GemmWeights) -> GemmWeights:
        """Return weights in any of this kernel's layouts as `plain` ones, bit for bit."""
        if weights.layout == PLAIN:
            return weights
        with torch.no_grad():
            data = torch.stack([weight.to_dense() for weight in weights.data])
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
        layer = weights.gemm.layer
        with _exact_library():
            for slots, product in self._products(config, hidden, weights, route, rows_per_token=route.top_k):
                gate = product[:, : layer.intermediate]
                value = activate(gate, product[:, layer.intermediate :] if layer.gated else None, layer.activation)
                out.index_copy_(0, slots, value.to(out.dtype))

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
        scale = topk_weights.reshape(-1, 1)
        with _exact_library():
            partial = torch.zeros(route.tokens * route.top_k, weights.gemm.n, dtype=torch.float32)
            for slots, product in self._products(config, intermediate, weights, route, rows_per_token=1):
                partial.index_copy_(0, slots, product * scale[slots])
            by_token = partial.view(route.tokens, route.top_k, weights.gemm.n)
            # ordered_sum works on the last dimension.
            out.copy_(ordered_sum(by_token.transpose(1, 2)).squeeze(-1))

    def _products(
        self, config: TileConfig, rows: torch.Tensor, weights: GemmWeights, route: ExpertLayout, *, rows_per_token: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (slots int64 [n], product float32 [n, N] with bias) per block; slot s reads row s // rows_per_token."""
        expected = self.layout(weights.gemm, config)
        if weights.layout != expected:
            raise ConfigError(f"{config.label} reads layout {expected!r}, the weights are {weights.layout!r}")
        offsets = route.offsets.tolist()
        slots = route.slots[: offsets[-1]].long()
        gathered = rows.index_select(0, slots.div(rows_per_token, rounding_mode="floor"))
        block = config.integer("row_block")
        for expert, (begin, end) in enumerate(pairwise(offsets)):
            step = block or max(1, end - begin)
            for start in range(begin, end, step):
                stop = min(start + step, end)
                product = _linear(_padded(gathered[start:stop], block), weights.data, expert)[: stop - start].float()
                if weights.bias is not None:
                    product = product + weights.bias[expert].float()
                yield slots[start:stop], product


def prepack(weight: torch.Tensor, rows: int | None) -> torch.Tensor:
    """Return one weight [N, K] in oneDNN's blocked layout for about `rows` rows: an opaque tensor, a copy.

    Raises RuntimeError where the library cannot; ask `cannot_prepack_here` first.
    """
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def prepacked_linear(rows: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Return rows [n, K] times a prepacked weight [N, K] transposed, [n, N] in the rows' dtype."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    return product


def cannot_prepack_here(dtype: str) -> str | None:
    """Return why this process cannot use oneDNN's blocked weights for a dtype."""
    library = torch.ops.mkldnn
    if not torch._C._has_mkldnn or not hasattr(library, "_reorder_linear_weight"):
        return "this PyTorch has no oneDNN linear on prepacked weights"
    checks = {"bf16": library._is_mkldnn_bf16_supported, "fp16": library._is_mkldnn_fp16_supported}
    if dtype in checks and not checks[dtype]():
        return f"oneDNN has no {dtype} linear on prepacked weights for this CPU"
    return None


def _cannot_prepack(dtype: str, environment: Environment) -> str | None:
    if environment.arch in ("x86_64", "AMD64"):
        missing = [name for name in PACK_FEATURES[dtype] if name not in environment.features.split(",")]
        if missing:
            return f"oneDNN prepacks {dtype} weights only on CPUs with {' and '.join(missing)}"
    # The library can be asked about this machine alone, not about the one that a foreign table names.
    return cannot_prepack_here(dtype) if cpu_environment().accepts(environment) else None


def _linear(rows: torch.Tensor, data: torch.Tensor | Sequence[torch.Tensor], expert: int) -> torch.Tensor:
    if isinstance(data, torch.Tensor):
        return torch.mm(rows, data[expert].t())
    return prepacked_linear(rows, data[expert])


def _padded(rows: torch.Tensor, block: int) -> torch.Tensor:
    """Return `rows` with zero rows added up to `block` (0: as they are)."""
    missing = block - rows.shape[0]
    if missing <= 0:
        return rows
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])


def _exact_library() -> AbstractContextManager[object]:
    """Return a context without autograd and autocast, in which float32 products are not narrowed.

    A process may have asked for bf16 inside float32 products (`torch.set_float32_matmul_precision`) or be in an
    autocast region; both would change this kernel's numerics class behind its back.
    """
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if torch.is_autocast_enabled("cpu"):
        stack.enter_context(torch.autocast("cpu", enabled=False))
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    narrowed = getattr(matmul, "fp32_precision", "none")
    if narrowed in ("bf16", "tf32"):
        stack.callback(setattr, matmul, "fp32_precision", narrowed)
        matmul.fp32_precision = "ieee"
    return stack


KERNEL = OneDnnLinear()
"""The one instance; it has no state."""
