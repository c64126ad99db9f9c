"""How `llvm.sparse_experts` holds an up projection with a screen: what proves most gates dead in half of the bytes.

Gate rows and up rows lie neuron by neuron, chains interleaved (`_dots`); beside them int8 codes of the gate rows, a
scale for each group of K, and two numbers that bound what the codes leave out (docs/sparse.md has the proof).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilecast.errors import InputError
from tilecast.kernels.cpu._screen import GROUP, LARGEST_WEIGHT, SMALLEST, groups_of, padded_groups
from tilecast.kernels.cpu._variant import FLUSH_K
from tilecast.kernels.cpu.columns import gate_gemm, padded_columns, row_pitch
from tilecast.kernels.cpu.isa import Isa
from tilecast.kernels.cpu.launch import check_stored
from tilecast.kernels.cpu.layouts import empty_on_large_pages, pack_rows, unpack_rows
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.spec import GemmWeights
from tilecast.problem import ExpertGemm

MOST = 127
"""The largest code."""
UNIT_ROUNDOFF = 2.0**-24
ROW_ERROR = 0.51
"""What an element of a row, in units of its group, differs from its integer by at most."""
UPWARDS = 1 + 2.0**-16
"""More than the relative error of computing a bound, and of keeping it as float32."""
ROWS_AT_ONCE = 256
"""Rows whose errors are computed at once: they are float64."""


@dataclass(frozen=True, eq=False)
class ScreenedStack:
    """A gated up projection. codes: int8 [E, columns, K padded to groups]; scales: bf16 [E, columns, groups padded];
    bounds: float32 [E, columns, 2], ρ and κ; gate, up: [E, I, pitch of K]."""

    codes: torch.Tensor
    scales: torch.Tensor
    bounds: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All parts."""
        return self.codes, self.scales, self.bounds, self.gate, self.up

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.gate.device


def pack_screened(weights: torch.Tensor, gemm: ExpertGemm, lanes: int) -> ScreenedStack:
    """Return plain up weights [E, 2I, K], gate rows first, with a screen of the gate rows."""
    layer, k = gemm.layer, gemm.k
    experts, width = layer.experts, layer.intermediate
    columns = padded_columns(gate_gemm(gemm), lanes)
    depth = groups_of(k) * GROUP
    codes = empty_on_large_pages((experts, columns, depth), torch.int8)
    scales = torch.zeros((experts, columns, padded_groups(k, lanes)), dtype=torch.bfloat16, device="cpu")
    bounds = torch.zeros((experts, columns, 2), device="cpu")
    codes[:, width:] = 0
    for expert in range(experts):
        for start in range(0, width, ROWS_AT_ONCE):
            stop = min(width, start + ROWS_AT_ONCE)
            rows = weights[expert, start:stop]
            codes[expert, start:stop], found, bounds[expert, start:stop] = screen_of(rows)
            scales[expert, start:stop, : found.shape[1]] = found
    return ScreenedStack(
        codes=codes,
        scales=scales,
        bounds=bounds,
        gate=pack_rows(weights[:, :width], lanes),
        up=pack_rows(weights[:, width:], lanes),
    )


def unpack_screened(packed: ScreenedStack, gemm: ExpertGemm, lanes: int) -> torch.Tensor:
    """Return the plain weights [E, 2I, K], bit for bit."""
    return torch.cat([unpack_rows(part, gemm.k, lanes) for part in (packed.gate, packed.up)], 1)


def check_screened(kernel: str, isa: Isa, weights: GemmWeights) -> None:
    """Raise InputError unless weights are a stack with a screen, as this instruction set wants it."""
    gemm, stack = weights.gemm, weights.data
    if not isinstance(stack, ScreenedStack):
        raise InputError(
            f"{kernel}: weights in layout {weights.layout} are {type(stack).__name__}, expected a ScreenedStack"
        )
    experts, width, dtype = gemm.layer.experts, gemm.layer.intermediate, TORCH_DTYPES[gemm.layer.dtype]
    rows = experts * padded_columns(gate_gemm(gemm), isa.lanes)
    neurons = experts * width * row_pitch(gemm.k, gemm.layer.dtype, isa.lanes)
    for what, tensor, count, kind in (
        ("codes", stack.codes, rows * GROUP * groups_of(gemm.k), torch.int8),
        ("scales", stack.scales, rows * padded_groups(gemm.k, isa.lanes), torch.bfloat16),
        ("bounds", stack.bounds, 2 * rows, torch.float32),
        ("gate rows", stack.gate, neurons, dtype),
        ("up rows", stack.up, neurons, dtype),
    ):
        check_stored(kernel, what, tensor, count, weights, kind)


def screen_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [N, K padded], scales [N, groups] and bounds [N, 2] of gate rows [N, K].

    A group whose weights are not finite, or very large, has an infinite scale, which leaves its neuron undecided.
    """
    count, k = rows.shape
    groups = groups_of(k)
    exact = torch.zeros((count, groups * GROUP), dtype=torch.float64, device="cpu")
    exact[:, :k] = rows
    exact = exact.view(count, groups, GROUP)
    largest = exact.abs().amax(2)
    # NaN compares false.
    good = largest <= MOST * LARGEST_WEIGHT
    exact = torch.where(good[..., None], exact, 0.0)
    wanted = (largest / MOST).clamp(min=SMALLEST).float() * (1 + 2.0**-22)
    # Rounded up to bf16: no code is above MOST.
    scales = ((wanted.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
    scales = torch.where(good, scales, 1.0)
    codes = (exact / scales[..., None]).round_()
    bounds = _bounds(exact / scales[..., None], codes, k)
    scales = torch.where(good, scales, torch.inf)
    return codes.to(torch.int8).view(count, -1), scales.to(torch.bfloat16), bounds


def _bounds(weights: torch.Tensor, codes: torch.Tensor, k: int) -> torch.Tensor:
    """Return ρ and κ [N, 2] of gate rows and their codes [N, groups, GROUP], both in units of the scales."""
    chains, groups = -(-k // FLUSH_K), codes.shape[1]
    # Of the exact computation: a chain of products and sums, each rounded, then the chains; of the screen: sums of
    # groups and bounds over K, then over lanes.
    roundings = (2 * FLUSH_K + chains) + (2 * groups + 32)
    gamma = 1.01 * roundings * UNIT_ROUNDOFF
    left_out = (weights - codes).square().sum(2).sqrt()
    norms = weights.square().sum(2).sqrt()
    rho = (left_out + gamma * (norms + left_out)).amax(1)
    kappa = ROW_ERROR * codes.abs().sum(2).amax(1)
    return (torch.stack([rho, kappa], 1) * UPWARDS + 2.0**-20).float()
