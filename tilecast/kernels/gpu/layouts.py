"""How weights lie in memory, as strides: the GPU kernels read every checkpoint's layout as it is.

`plain` is [E, N, K] with all gate rows before all up rows; `interleaved` has gate and up rows alternate; `kn` and
`kn_interleaved` are the same transposed, [E, K, N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilecast.errors import ConfigError
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertGemm

if TYPE_CHECKING:
    import torch

LAYOUTS = (PLAIN, "interleaved", "kn", "kn_interleaved")


@dataclass(frozen=True, kw_only=True)
class Strides:
    """Elements between experts, output columns, a gate column and its up column, and steps of K; the same of a bias."""

    expert: int
    column: int
    up: int
    k: int
    bias_column: int
    bias_up: int


def strides(gemm: ExpertGemm, layout: str) -> Strides:
    """Return where a layout puts the weights of `gemm`. Raises ConfigError for a layout that is not read."""
    if layout not in LAYOUTS:
        raise ConfigError(f"weights are in layout {layout}, the GPU kernels read {', '.join(LAYOUTS)}")
    pairs = gemm.name == "up" and gemm.layer.gated
    alternate = pairs and layout.endswith("interleaved")
    step, jump = (2, 1) if alternate else (1, gemm.layer.intermediate if pairs else 0)
    column, k = (1, gemm.n) if layout.startswith("kn") else (gemm.k, 1)
    return Strides(
        expert=gemm.n * gemm.k, column=step * column, up=jump * column, k=k, bias_column=step, bias_up=jump
    )  # fmt: skip


def relayout(weights: GemmWeights, layout: str) -> GemmWeights:
    """Return `plain` weights and bias stored in another layout. Raises ConfigError."""
    from tilecast.kernels.formats import QuantizedStack

    gemm = weights.gemm
    strides(gemm, layout)
    if weights.layout == layout:
        return weights
    if weights.layout != PLAIN:
        raise ConfigError(f"weights in layout {weights.layout} cannot be stored as {layout}; start from plain ones")
    data, bias = weights.data, weights.bias
    if isinstance(data, QuantizedStack):
        raise ConfigError(f"weights of {data.format} are read as {PLAIN}, not as {layout}")
    if layout.endswith("interleaved") and gemm.name == "up" and gemm.layer.gated:
        data = _alternate(data)
        bias = None if bias is None else _alternate(bias)
    if layout.startswith("kn"):
        data = data.transpose(1, 2).contiguous()
    return GemmWeights(gemm=gemm, layout=layout, data=data, bias=bias)


def plain_again(weights: GemmWeights) -> GemmWeights:
    """Return weights and bias of any layout here as `plain` ones, bit for bit."""
    import torch

    gemm, layout = weights.gemm, weights.layout
    strides(gemm, layout)
    data, bias = weights.data, weights.bias
    if layout.startswith("kn"):
        data = data.transpose(1, 2).contiguous()
    if layout.endswith("interleaved") and gemm.name == "up" and gemm.layer.gated:
        data = torch.cat((data[:, ::2], data[:, 1::2]), dim=1)
        bias = None if bias is None else torch.cat((bias[:, ::2], bias[:, 1::2]), dim=1)
    return GemmWeights(gemm=gemm, layout=PLAIN, data=data, bias=bias)


def _alternate(stack: torch.Tensor) -> torch.Tensor:
    """Return [E, 2I, …] with rows g0, u0, g1, u1, … from one with all gate rows first."""
    import torch

    gate, up = stack.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2).contiguous()
