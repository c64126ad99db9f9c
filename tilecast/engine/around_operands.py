"""Which operands of a forward the kernels around the experts take: plain tensors of one dtype, nothing recorded."""

from __future__ import annotations

from typing import Any

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_plain(rows: Any, weight: Any) -> bool:
    """Whether rows and a weight are ordinary tensors of one dtype on the CPU, with no gradients and no autocast."""
    return (
        type(rows) is torch.Tensor
        and isinstance(weight, torch.Tensor)
        and rows.dtype is weight.dtype
        and rows.is_cpu
        and weight.is_cpu
        and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )
