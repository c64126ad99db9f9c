# mypy: ignore-errors
"""Small kernels for the static analysis; compiled, never launched."""

import triton
import triton.language as tl


@triton.jit
def multiply(
    a, b, c, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr
):
    rows, columns, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(a + rows[:, None] * K + start + depth[None, :])
        y = tl.load(b + columns[None, :] * K + start + depth[:, None])
        if SCALED:
            total += tl.dot(x, y) * 1.25
        else:
            total = tl.dot(x, y, total)
    tl.store(c + rows[:, None] * BLOCK_N + columns[None, :], total.to(c.dtype.element_ty))


@triton.jit
def copy(source, target, count, BLOCK: tl.constexpr, UNUSED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


@triton.jit
def copy_again(source, target, count, BLOCK: tl.constexpr, UNUSED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


@triton.jit
def broken(source, BLOCK: tl.constexpr):
    tl.store(source + tl.arange(0, BLOCK), no_such_name)  # noqa: F821
