"""y = x · wᵀ + b with the bits of `llvm.moe_gemm`: the up GEMM of one expert without activation, on plain weights.

A row's bits do not depend on how many rows there are. Weights are read where they are: nothing is packed or kept, so
a weight that changes in place needs no care.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tilecast.environment import cpu_environment
from tilecast.errors import InputError
from tilecast.kernels.cpu.columns import padded_columns
from tilecast.kernels.cpu.launch import INDEX, Launch, threads_for
from tilecast.kernels.cpu.moe_gemm import MoeGemm
from tilecast.kernels.cpu.moe_launch import Plan
from tilecast.kernels.dtypes import DTYPE_NAMES
from tilecast.kernels.spec import PLAIN, GemmWeights
from tilecast.problem import ExpertLayer

WORK_OF_A_THREAD = 1 << 19
"""Multiply-adds below which waking another thread costs more than it gives; bits do not depend on it."""


class _Shape(NamedTuple):
    """What launches of one shape share: the plan, columns with padding, and the slots, one expert after another."""

    plan: Plan
    columns: int
    slots: torch.Tensor
    offsets: torch.Tensor


@lru_cache(maxsize=4096)
def _shape(batch: int, rows: int, n: int, k: int, dtype: str, bias: bool) -> _Shape:
    layer = ExpertLayer(
        hidden=k, intermediate=n, experts=batch, top_k=1, dtype=dtype, activation="identity", gated=False, bias=bias
    )
    kernel = MoeGemm()
    here = cpu_environment()
    reason = kernel.rejects(layer.up, here)
    if reason is not None:
        raise InputError(f"{kernel.name}: {reason}; use float32 or bfloat16")
    base = kernel.default(layer.up, 1, here).with_params(layout=PLAIN)
    config = kernel.default(layer.up, batch * rows, here, like=base)
    # The plan wants weights to check; what it takes from them is put in at each launch.
    shape = torch.empty(batch, n, k, dtype=next(d for d, name in DTYPE_NAMES.items() if name == dtype), device="cpu")
    some_bias = shape.new_empty(batch, n) if bias else None
    plan = Plan(kernel.isa, config, GemmWeights(gemm=layer.up, layout=PLAIN, data=shape, bias=some_bias), dtype)
    return _Shape(
        plan=plan, columns=padded_columns(layer.up, kernel.isa.lanes),
        slots=torch.arange(batch * rows, dtype=torch.int32, device="cpu"),
        offsets=torch.arange(0, batch * rows + 1, rows, dtype=torch.int32, device="cpu"),
    )  # fmt: skip


def multiply(rows: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return rows · weightsᵀ + bias, [B, T, N]: rows [B, T, K], weights [B, N, K], bias [B, N] or None, of one dtype.

    Accumulated in float32 and rounded once. Raises InputError for operands that do not fit.
    """
    batch, count, k = rows.shape
    n = weights.shape[1]
    if weights.shape != (batch, n, k) or weights.dtype != rows.dtype or rows.dtype not in DTYPE_NAMES:
        raise InputError(
            f"linear: rows are {rows.dtype} {tuple(rows.shape)}, weights {weights.dtype} {tuple(weights.shape)}; "
            f"expected [B, T, K] and [B, N, K] of one dtype, {', '.join(DTYPE_NAMES.values())}"
        )
    if bias is not None and bias.shape != (batch, n):
        raise InputError(f"linear: bias is {tuple(bias.shape)}, expected {(batch, n)}")
    out = torch.empty(batch, count, n, dtype=rows.dtype, device="cpu")
    if out.numel() == 0:
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias.unsqueeze(1))
    rows, weights = rows.contiguous(), weights.contiguous()
    shared = _shape(batch, count, n, k, DTYPE_NAMES[rows.dtype], bias is not None)
    launch = Launch(shared.plan, threads_for(batch * count * n * k, WORK_OF_A_THREAD))
    padded = None if bias is None else F.pad(bias.float(), (0, shared.columns - n)).contiguous()
    words = {
        "tokens": batch * count, "top_k": 1, "rows": batch * count,
        "slots": shared.slots.data_ptr(), "offsets": shared.offsets.data_ptr(),
        "source": rows.data_ptr(), "weights": weights.data_ptr(), "out": out.data_ptr(),
        "bias": 0 if padded is None else padded.data_ptr(),
    }  # fmt: skip
    if shared.plan.widens:
        words["widened"] = launch.scratch("widened", batch * count * shared.plan.row_bytes)
    for name, word in words.items():
        launch.block[INDEX[name]] = word
    launch.run()
    return out
