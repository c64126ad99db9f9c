"""What is compiled, and how it is launched: one description serves both, so that they cannot differ.

A `Build` fixes everything that a compiled kernel depends on. The static analysis compiles builds for any target;
a launch hands the same constants and options to Triton. Whatever changes with the number of tokens is an ordinary
argument that Triton is told not to specialise on, so a launch never compiles what the analysis did not see.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tilecast.canonical import Json, digest
from tilecast.errors import InputError

if TYPE_CHECKING:
    import torch

PACKAGE = "tilecast.kernels.gpu"
Constant = int | bool | str | None
MAX_PROGRAMS = (1 << 31) - 1
"""Triton's launcher multiplies a grid's sides in 32 bits and launches nothing, silently, where that is not above 0."""
MAX_SIDE = (1 << 16) - 1
"""The longest second and third side of a grid (CUDA C++ Programming Guide, "Technical Specifications")."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """One kernel function with everything that is compiled into it.

    module, function: `_grouped`, `up_tiles`: a `@triton.jit` function in this package; a module named with dots may
    be anywhere. `signature` gives the run-time arguments in the function's order, with Triton's type names (`*bf16`,
    `i32`, `tensordesc<bf16[1,128,64]>`); pointers are 16-byte aligned. `constants` are its `tl.constexpr` arguments.
    options beyond warps and stages are Triton's, by name.
    """

    module: str
    function: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int
    num_stages: int
    options: tuple[tuple[str, Constant], ...] = ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form; with the kernels' source and a target it names the machine code."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return {
            "module": self.module,
            "function": self.function,
            "signature": [list(pair) for pair in self.signature],
            "constants": dict(self.constants),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "options": dict(self.options),
        }

    @property
    def triton_options(self) -> dict[str, Constant]:
        """What Triton gets beside the arguments. FP fusion is always off: whether a multiply and an add are
        fused would change bits between kernels of one class, and its default changes between releases."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": False,
            **dict(self.options),
        }

    @cached_property
    def kernel(self) -> Any:
        """The `@triton.jit` function (the interpreter's where `TRITON_INTERPRET=1` was set at import)."""
        module = self.module if "." in self.module else f"{PACKAGE}.{self.module}"
        return getattr(importlib.import_module(module), self.function)

    @cached_property
    def _keywords(self) -> dict[str, Constant]:
        return {**dict(self.constants), **self.triton_options}

    def launch(self, grid: tuple[int, ...], device: torch.device, *args: Any) -> None:
        """Launch on `device`'s current stream. `args` follow `signature`. Nothing is launched for an empty grid.

        Raises InputError for a grid that no device takes.
        """
        programs = math.prod(grid)
        if programs == 0:
            return
        if programs > MAX_PROGRAMS or max(grid[1:], default=1) > MAX_SIDE:
            sides = "×".join(map(str, grid))
            raise InputError(f"{self.function} needs a grid of {sides} programs; take larger tiles or split the batch")
        with device_guard(device):
            self.kernel[grid](*args, **self._keywords)


def cuda_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Return what makes `device` the current one; nothing to do on the CPU, where the interpreter runs."""
    import torch

    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


device_guard: Callable[[torch.device], AbstractContextManager[Any]] = cuda_guard
"""What every launch runs under; tests put their own here to see that it does."""
