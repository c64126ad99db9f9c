"""Batch-invariant attention and matrix products, by the operands' device."""

from __future__ import annotations

import torch

from tilecast.errors import DeviceError
from tilecast.kernels.cpu import attention as cpu_attention
from tilecast.kernels.cpu import linear as cpu_linear
from tilecast.kernels.gpu import rowwise
from tilecast.kernels.ranges import KeyRanges


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: KeyRanges,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention's result [B, Hq, Tq, Dv]; operands as in `tilecast.kernels.cpu.attention.attend`.

    Raises InputError for operands that do not fit, DeviceError for a device without such a kernel.
    """
    if query.device.type == "cpu":
        return cpu_attention.attend(query, key, value, ranges, scale=scale, softcap=softcap, sinks=sinks)
    if query.device.type == "cuda":
        cpu_attention.check_operands("triton attention", query, key, value, ranges, sinks)
        return rowwise.attend(query, key, value, ranges, scale=scale, softcap=softcap, sinks=sinks)
    raise DeviceError(f"no batch-invariant attention runs on {query.device}")


def multiply(rows: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return rows · weightsᵀ + bias, [B, T, N]; operands as in `tilecast.kernels.cpu.linear.multiply`.

    Raises InputError for operands that do not fit, DeviceError for a device without such a kernel.
    """
    if rows.device.type == "cpu":
        return cpu_linear.multiply(rows, weights, bias)
    if rows.device.type == "cuda":
        return rowwise.multiply(rows, weights, bias)
    raise DeviceError(f"no batch-invariant matrix product runs on {rows.device}")
