"""Sums and RMS norms of rows, whose bits depend on nothing but the row (`_rows.py`)."""

from __future__ import annotations

import ctypes
import struct
from functools import cache

import torch

from tilecast.errors import InputError
from tilecast.kernels.cpu._rows import ARGS, ENTRY, FORMS, SUM, Rows
from tilecast.kernels.cpu.isa import host_isa
from tilecast.kernels.cpu.jit import available_threads, load, run
from tilecast.kernels.dtypes import DTYPE_NAMES

ELEMENTS_OF_A_JOB = 1 << 14
"""Elements below which waking another thread costs more than it gives; bits do not depend on it."""

_Block = ctypes.c_int64 * len(ARGS)


@cache
def _address(dtype: torch.dtype, form: str) -> int:
    name, isa = DTYPE_NAMES[dtype], host_isa()
    if dtype == torch.float16 and not isa.half:
        raise InputError(f"llvm.rows: {isa.name} has no fp16 conversion instruction; use float32 or bfloat16")
    return load(lambda module: Rows(module, name, form, isa.fma).build(), {"rows": name, "form": form}, ENTRY)


def row_sum(rows: torch.Tensor) -> torch.Tensor:
    """Return the sums [...] of contiguous float32 rows [..., N] on the CPU. Raises InputError for others."""
    if rows.dtype is not torch.float32 or rows.dim() == 0 or not rows.is_contiguous() or not rows.is_cpu:
        raise InputError(
            f"llvm.rows: rows are {rows.dtype} {tuple(rows.shape)} on {rows.device}, expected contiguous float32"
        )
    out = torch.empty(rows.shape[:-1], dtype=torch.float32, device="cpu")
    if rows.numel() == 0:
        return out.zero_()
    PreparedNorm(torch.float32, SUM, rows.shape[-1], 0.0).run(rows, out, 0)
    return out


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float, form: str) -> torch.Tensor:
    """Return x̂ · weight [..., N], x̂ = x / sqrt(mean(x²) + epsilon): rows [..., N] and weight [N] of one dtype.

    Both are contiguous, float32, bfloat16 or float16, on the CPU; `form` of FORMS says where is rounded, and whether
    the weight counts from one. Computed in float32. Raises InputError for operands that do not fit.
    """
    if (
        form not in FORMS
        or rows.dtype not in DTYPE_NAMES
        or weight.dtype is not rows.dtype
        or rows.dim() == 0
        or weight.shape != rows.shape[-1:]
        or not (rows.is_contiguous() and weight.is_contiguous() and rows.is_cpu and weight.is_cpu)
    ):
        raise InputError(
            f"llvm.rows: rows are {rows.dtype} {tuple(rows.shape)}, weight {weight.dtype} {tuple(weight.shape)}, form "
            f"{form!r}; expected contiguous [..., N] and [N] of one dtype on the CPU, form one of {', '.join(FORMS)}"
        )
    out = torch.empty(rows.shape, dtype=rows.dtype, device="cpu")
    if out.numel():
        PreparedNorm(rows.dtype, form, rows.shape[-1], epsilon).run(rows, out, weight.data_ptr())
    return out


class PreparedNorm:
    """A norm that looks at nothing: rows [..., N] and weight [N] are what `rms_norm` wants, of its dtype and width."""

    def __init__(self, dtype: torch.dtype, form: str, width: int, epsilon: float) -> None:
        """Load the code. Raises InputError for a dtype that this CPU lacks."""
        self.dtype, self.width = dtype, width
        self._address = _address(dtype, form)
        self._chunk = max(1, ELEMENTS_OF_A_JOB // width)
        self._bits: int = struct.unpack("I", struct.pack("f", epsilon))[0]

    def __call__(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the rows normalised, fresh."""
        out = torch.empty_like(rows)
        self.run(rows, out, weight.data_ptr())
        return out

    def run(self, rows: torch.Tensor, out: torch.Tensor, weight: int) -> None:
        """Write what becomes of at least one row."""
        count = rows.numel() // self.width
        block = _Block(0, rows.data_ptr(), out.data_ptr(), weight, count, self.width, self._chunk, self._bits)
        chunks = -(-count // self._chunk)
        run(self._address, ctypes.addressof(block), 1 if chunks == 1 else min(available_threads(), chunks))


__all__ = ["FORMS", "PreparedNorm", "rms_norm", "row_sum"]
