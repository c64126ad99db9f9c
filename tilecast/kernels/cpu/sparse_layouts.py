"""How `llvm.sparse_experts` holds weights: what is always read lies in panels, what may be skipped neuron by neuron.

Up: gate rows as panels of columns, as an ungated up projection's; up rows neuron by neuron, the chains of
each interleaved (`_dots`). Down: transposed, one neuron's H elements behind each other, padded as panels' columns are.
Neurons begin an odd number of cache lines apart: a power of two apart, rows read side by side would share a cache set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tilecast.kernels.cpu.columns import gate_gemm, padded_columns, pitch
from tilecast.kernels.cpu.layouts import empty_on_large_pages, pack_panels, pack_rows, unpack_panels, unpack_rows
from tilecast.problem import ExpertGemm


@dataclass(frozen=True, eq=False)
class SparseStack:
    """A gated up projection. gate: panels as `pack_panels` makes them of the gate rows; up: [E, I, pitch of K]."""

    gate: torch.Tensor
    up: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.gate.nbytes + self.up.nbytes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.gate.device


def pack_gated(weights: torch.Tensor, gemm: ExpertGemm, panel: int, lanes: int) -> SparseStack:
    """Return plain up weights [E, 2I, K], gate rows first, in two parts."""
    width = gemm.layer.intermediate
    gate = pack_panels(weights[:, :width], gate_gemm(gemm), panel, lanes)
    return SparseStack(gate=gate, up=pack_rows(weights[:, width:], lanes))


def unpack_gated(packed: SparseStack, gemm: ExpertGemm, lanes: int) -> torch.Tensor:
    """Return the plain weights [E, 2I, K] behind the two parts, bit for bit."""
    return torch.cat([unpack_panels(packed.gate, gate_gemm(gemm), lanes), unpack_rows(packed.up, gemm.k, lanes)], 1)


def pack_neurons(weights: torch.Tensor, gemm: ExpertGemm, lanes: int) -> torch.Tensor:
    """Return plain down weights [E, H, I] as [E, I, pitch of the padded columns], zero past H."""
    shape = (gemm.layer.experts, gemm.k, pitch(padded_columns(gemm, lanes), gemm.layer.dtype))
    packed = empty_on_large_pages(shape, weights.dtype)
    order = neuron_order(gemm, lanes)
    packed[:, :, len(order) :] = 0
    for expert in range(gemm.layer.experts):
        packed[expert, :, : len(order)] = weights[expert].index_select(0, order.clamp(max=gemm.n - 1)).T
        packed[expert, :, : len(order)][:, order >= gemm.n] = 0
    return packed


def unpack_neurons(packed: torch.Tensor, gemm: ExpertGemm, lanes: int) -> torch.Tensor:
    """Return the plain weights [E, H, I] behind neurons, bit for bit."""
    places = neuron_order(gemm, lanes).argsort()[: gemm.n]
    return torch.stack([packed[expert].index_select(1, places).T.contiguous() for expert in range(len(packed))])


def neuron_order(gemm: ExpertGemm, lanes: int) -> torch.Tensor:
    """Return the column of H (those past it are padding) at each place of a neuron's row. int64 [columns].

    bf16 columns stand in words of (c, c + lanes): a shift and a mask then give two vectors of neighbours.
    """
    columns = torch.arange(padded_columns(gemm, lanes), device="cpu")
    if gemm.layer.dtype != "bf16":
        return columns
    return columns.view(-1, 2, lanes).transpose(1, 2).flatten()
