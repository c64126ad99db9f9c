"""How weights are stored for the CPU kernels: panels of columns, K-major, so that a core reads one stream.

A packed stack has the shape [E, panels, steps, panel columns(, 2)]: float32 and fp16 hold one k a step, bf16
holds words of (k, k + 1). For a gated up projection columns alternate by one vector: `lanes` gate columns,
then the `lanes` up columns that belong to them. Columns are padded with zeros to a multiple of 8 vectors and of 64.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from tilecast.kernels.cpu._dots import chain_length, interleaved_length
from tilecast.kernels.cpu.columns import padded_columns, padded_k, row_pitch
from tilecast.kernels.dtypes import DTYPE_NAMES
from tilecast.problem import ExpertGemm

PAGE_BYTES = 4096
MADV_HUGEPAGE = 14
"""From Linux's uapi/asm-generic/mman-common.h; the same number on every architecture Tilecast runs on."""


def column_order(gemm: ExpertGemm, lanes: int) -> torch.Tensor:
    """Return, for each packed column, the plain weight row behind it; -1 for padding. int64 [columns]."""
    columns = torch.arange(padded_columns(gemm, lanes), device="cpu")
    if gemm.name == "down" or not gemm.layer.gated:
        return torch.where(columns < gemm.n, columns, -1)
    width = gemm.layer.intermediate
    rows = columns // (2 * lanes) * lanes + columns % lanes
    is_up = columns // lanes % 2
    return torch.where(rows < width, rows + is_up * width, -1)


def pack_panels(weights: torch.Tensor, gemm: ExpertGemm, panel: int, lanes: int) -> torch.Tensor:
    """Return plain weights [E, N, K] as panels. One expert is packed at a time, to bound the extra memory."""
    experts, _, k = weights.shape
    pairs = weights.dtype == torch.bfloat16
    order = column_order(gemm, lanes)
    columns, depth, per_step = len(order), padded_k(gemm, pairs=pairs), 2 if pairs else 1
    shape = (experts, columns // panel, depth // per_step, panel, per_step)
    packed = empty_on_large_pages(shape, weights.dtype)
    present, rows = order >= 0, order.clamp(min=0)
    for expert in range(experts):
        padded = torch.zeros(columns, depth, dtype=weights.dtype, device="cpu")
        padded[:, :k] = weights[expert].index_select(0, rows)
        padded[~present] = 0
        packed[expert] = padded.view(columns // panel, panel, depth // per_step, per_step).transpose(1, 2)
    return packed


def unpack_panels(packed: torch.Tensor, gemm: ExpertGemm, lanes: int) -> torch.Tensor:
    """Return the plain weights [E, N, K] behind panels, exactly as they were packed. One expert at a time."""
    experts, panels, steps, panel, per_step = packed.shape
    order = column_order(gemm, lanes)
    present = order >= 0
    plain = torch.empty((experts, gemm.n, gemm.k), dtype=packed.dtype, device="cpu")
    for expert in range(experts):
        columns = packed[expert].transpose(1, 2).reshape(panels * panel, steps * per_step)
        plain[expert].index_copy_(0, order[present], columns[present, : gemm.k])
    return plain


def empty_on_large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Allocate, and ask Linux for large pages before the first touch: weights are streamed, page walks cost."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    begin = -(-tensor.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    size = tensor.data_ptr() + tensor.numel() * tensor.itemsize - begin
    if sys.platform == "linux" and size > 0:
        # Advice only: where it is refused, everything works as before.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), MADV_HUGEPAGE)
    return tensor


def pack_bias(bias: torch.Tensor, gemm: ExpertGemm, lanes: int) -> torch.Tensor:
    """Return a bias [E, N] as float32 [E, columns] in packed column order, zero in the padding."""
    order = column_order(gemm, lanes)
    gathered = bias.to(torch.float32).index_select(1, order.clamp(min=0))
    return torch.where(order >= 0, gathered, 0.0).contiguous()


def pack_rows(rows: torch.Tensor, lanes: int) -> torch.Tensor:
    """Return weight rows [E, N, K] neuron by neuron, [E, N, pitch], chains interleaved as `_dots` multiplies them."""
    experts, count, k = rows.shape
    packed = empty_on_large_pages((experts, count, row_pitch(k, DTYPE_NAMES[rows.dtype], lanes)), rows.dtype)
    length = chain_length(k)
    chains = interleaved_length(k) // length
    # Negative zeros: their products leave every sum as it is, −0 too.
    packed[:, :, chains * length :] = -0.0
    for expert in range(experts):
        padded = torch.full((count, chains * length), -0.0, dtype=rows.dtype, device="cpu")
        padded[:, :k] = rows[expert]
        for first, part in _side_by_side(padded.view(count, chains, length), lanes):
            target = packed[expert, :, first * length : first * length + part.numel() // count]
            target.copy_(_interleaved(part).reshape(count, -1))
    return packed


def unpack_rows(packed: torch.Tensor, k: int, lanes: int) -> torch.Tensor:
    """Return the weight rows [E, N, K] behind `pack_rows`, bit for bit."""
    experts, count, _ = packed.shape
    length = chain_length(k)
    chains = interleaved_length(k) // length
    plain = torch.empty((experts, count, k), dtype=packed.dtype, device="cpu")
    for expert in range(experts):
        padded = torch.empty((count, chains, length), dtype=packed.dtype, device="cpu")
        for first, part in _side_by_side(padded, lanes):
            source = packed[expert, :, first * length : first * length + part.numel() // count]
            _interleaved(part).copy_(source.view(_interleaved(part).shape))
        plain[expert] = padded.view(count, -1)[:, :k]
    return plain


def _side_by_side(chains: torch.Tensor, lanes: int) -> list[tuple[int, torch.Tensor]]:
    """Return the chains [N, chains, length] that stand side by side, each with the number of its first one."""
    return [(first, chains[:, first : first + lanes]) for first in range(0, chains.shape[1], lanes)]


def _interleaved(part: torch.Tensor) -> torch.Tensor:
    """Return a view of chains side by side [N, n, length] in the order in which they lie; bf16 in pairs of elements."""
    if part.dtype != torch.bfloat16:
        return part.transpose(1, 2)
    return part.view(*part.shape[:2], -1, 2).transpose(1, 2)
