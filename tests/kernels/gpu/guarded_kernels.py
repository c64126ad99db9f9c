# mypy: ignore-errors
"""A kernel that copies, for the test of the device guard."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy(source, target, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(target + places, tl.load(source + places))
