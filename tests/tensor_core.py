"""A model of tensor-core arithmetic for Triton's interpreter, whose own `tl.dot` is no oracle for bits.

The interpreter's `tl.dot` is `numpy.matmul`: its order of summation depends on the block's shape, and it reads
bfloat16, which the interpreter holds as uint16, as integers. Its conversions between float32 and bfloat16 truncate
and lose subnormals, and its `tl.fma` rounds twice. `tensor_core` replaces all of these.

The model of one 16-bit instruction, as measured by Fasi et al., "Numerical behavior of NVIDIA tensor cores" (PeerJ
CS 7:e330, 2021), Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores" (arXiv 2512.07004, 2025) and Xie et
al., "MMA-Sim" (arXiv 2511.10909, 2025): `group` products and the accumulator are added at once. Every addend is
shifted to the largest exponent among them and truncated towards zero to `fraction_bits` fraction bits; the sum of
those is exact; it is truncated to float32. A product's exponent is the sum of its operands' (its significand lies in
[1, 4) and is not normalised first). Subnormals are kept. float32 operands run on no tensor core here: with
`input_precision="ieee"` Triton emits one ascending chain of `fma.rn.f32` for each element.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[Any]

CANONICAL_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
SMALLEST_NORMAL = {"bf16": 2.0**-126, "fp16": 2.0**-14, "fp32": 2.0**-126, "fp8": 2.0**-6}
FP8_CORE = (32, 13)
"""(g, F) of one instruction on e4m3 of sm_90 (docs/numerics.md)."""
_EXPONENT = np.int64(0x7FF << 52)


def tensor_core_dot(a: Floats, b: Floats, c: Floats, dtype: str, group: int, fraction_bits: int) -> Floats:
    """Return c + a·b, float32 [..., M, N], as tensor cores sum it: groups of K in ascending order.

    a: [..., M, K], b: [..., K, N], values of `dtype` (`bf16`, `fp16`) in any float type that holds them; c: float32
    [..., M, N]. Raises ValueError for a group and fraction_bits whose sums this model would not take exactly.
    """
    # Aligned addends are integers below 2^(F+2), so their sums, integers below 2^53, are exact in float64.
    if group < 1 or fraction_bits < 1 or (group + 1) << (fraction_bits + 2) > 1 << 53:
        raise ValueError(f"group is {group}, fraction_bits {fraction_bits}: not a tensor core that this model can sum")
    left = np.moveaxis(a.astype(np.float64), -1, 0)[..., :, None]
    right = np.moveaxis(b.astype(np.float64), -2, 0)[..., None, :]
    left_power, right_power = _power(left, SMALLEST_NORMAL[dtype]), _power(right, SMALLEST_NORMAL[dtype])
    finite = bool(np.isfinite(left).all() and np.isfinite(right).all())
    total = c.astype(np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, len(left), group):
            step = slice(start, start + group)
            # Exact in float64: significands of at most 11 + 11 bits, exponents of at least -133 - 133.
            products = left[step] * right[step]
            largest = (left_power[step] * right_power[step]).max(axis=0)
            fused = _fused_sum(products, largest, total, fraction_bits)
            if not (finite and np.isfinite(total).all()):
                plain = products.sum(axis=0) + total
                fused = np.where(np.isfinite(plain), fused, plain.astype(np.float32))
            total = np.where(np.isnan(fused), CANONICAL_NAN, fused)
    return total


def _fused_sum(products: Floats, largest: Floats, total: Floats, fraction_bits: int) -> Floats:
    """Return float32 total + sum of products [group, ...], aligned to a power of two no less than `largest`."""
    # Khattak and Mikaitis give the least exponent that addends are aligned to: -132 for F = 24, -133 for F = 25.
    least = 2.0 ** (-108 - fraction_bits)
    power = np.maximum(np.maximum(largest, _power(total.astype(np.float64), SMALLEST_NORMAL["fp32"])), least)
    # A power of two within 2^-133 … 2^255: scaling by it is exact, and trunc drops what a shifter drops.
    scale = 2.0**fraction_bits / power
    aligned = np.trunc(products * scale).sum(axis=0) + np.trunc(total * scale)
    return _truncated(aligned / scale)


def _power(values: Floats, smallest_normal: float) -> Floats:
    """Return the power of two that each value's significand multiplies: 2^⌊log2|x|⌋, a subnormal's the least; 0 for 0.

    No frexp: what is left of a float64 without sign and fraction bits is that power.
    """
    bits = np.ascontiguousarray(values).view(np.int64) & _EXPONENT
    return np.where(values == 0, 0.0, np.maximum(bits.view(np.float64), smallest_normal))


def _truncated(exact: Floats) -> Floats:
    """Return float64 values cut to float32, towards zero. From 2^128 on they are infinite."""
    nearest = (exact + 0.0).astype(np.float32)  # The sum is +0 where everything cancels.
    beyond = (np.abs(nearest.astype(np.float64)) > np.abs(exact)) & (np.abs(exact) < 2.0**128)
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


def fma(x: Floats, y: Floats, z: Floats) -> Floats:
    """Return x·y + z of float32 arrays, rounded once to nearest even."""
    with np.errstate(all="ignore"):
        product = x.astype(np.float64) * y.astype(np.float64)  # Exact: 24 + 24 bits.
        addend = z.astype(np.float64)
        rounded = product + addend
        # Knuth's TwoSum: `lost` is exactly what the addition in float64 rounded away.
        part = rounded - product
        lost = (product - (rounded - part)) + (addend - part)
        # Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd"
        # (2008): rounded to odd in 53 ≥ 24 + 2 bits first, the second rounding gives what a single one would.
        even = (rounded.view(np.int64) & 1) == 0
        away = (lost > 0) == (rounded > 0)
        odd = rounded.view(np.int64) + np.where(away, 1, -1)
        inexact = (lost > 0) | (lost < 0)  # False for NaN, which TwoSum gives for infinities.
        return np.where(inexact & even, odd.view(np.float64), rounded).astype(np.float32)


def fma_dot(a: Floats, b: Floats, c: Floats) -> Floats:
    """Return c + a·b of float32 arrays [..., M, K] and [..., K, N]: one chain of FMAs, K ascending."""
    total = c.astype(np.float32)
    for k in range(a.shape[-1]):
        total = fma(a[..., :, k, None], b[..., k, None, :], total)
    return total


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Floats, truncate: bool = False) -> NDArray[np.uint16]:
    """Return float32 values as bfloat16 bits, to nearest even (or towards zero), as `cvt.rn.bf16.f32` rounds."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Adding just under half a unit, and one more where the kept part is odd, carries exactly when it must.
    carry = np.uint32(0) if truncate else np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    kept = np.where(np.isnan(values), np.uint32(0), bits) + carry >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), kept.astype(np.uint16))


def from_e4m3(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the values of e4m3 numbers given by their bits."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.float8_e4m3fn).float().numpy()


def to_e4m3(values: Floats) -> NDArray[np.uint8]:
    """Return the bits of float32 values rounded to e4m3, to nearest even; values beyond its range become NaN."""
    rounded = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy()


@contextmanager
def tensor_core(group: int, fraction_bits: int) -> Iterator[None]:
    """Within it, Triton's interpreter computes `tl.dot`, `tl.fma` and conversions of bfloat16 and e4m3 as the model.

    `tl.dot` takes bf16, fp16, e4m3 (always as sm_90 sums it), and float32 with `input_precision="ieee"`, and
    accumulates in float32; it raises TypeError for anything else. Arithmetic on bfloat16 itself stays wrong in the
    interpreter: convert to float32.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _ir

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        kinds = (a.dtype.scalar, b.dtype.scalar, d.dtype.scalar)
        if kinds == (tl.float32, tl.float32, tl.float32) and input_precision == _ir.INPUT_PRECISION.IEEE:
            result = fma_dot(a.data, b.data, d.data)
        elif kinds == (tl.bfloat16, tl.bfloat16, tl.float32):
            operands = (from_bfloat16(a.data), from_bfloat16(b.data), d.data)
            result = tensor_core_dot(*operands, "bf16", group, fraction_bits)
        elif kinds == (tl.float16, tl.float16, tl.float32):
            result = tensor_core_dot(a.data, b.data, d.data, "fp16", group, fraction_bits)
        elif kinds == (tl.float8e4nv, tl.float8e4nv, tl.float32):
            result = tensor_core_dot(from_e4m3(a.data), from_e4m3(b.data), d.data, "fp8", *FP8_CORE)
        else:
            names = " × ".join(str(kind) for kind in kinds[:2])
            raise TypeError(f"no model of tl.dot for {names} into {kinds[2]} with {input_precision}")
        return TensorHandle(result, tl.float32)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar != tl.float32:
            raise TypeError(f"no model of tl.fma for {z.dtype.scalar}")
        return TensorHandle(fma(x.data, y.data, z.data), tl.float32)

    def converted(src: Any, target: Any, truncate: bool) -> Any:
        """The handle of a conversion between float32 and bfloat16 or e4m3, None for any other."""
        pair = (src.dtype.scalar, target.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(from_bfloat16(src.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(src.data, truncate), tl.bfloat16)
        if pair == (tl.float8e4nv, tl.float32):
            return TensorHandle(from_e4m3(src.data), tl.float32)
        if pair == (tl.float32, tl.float8e4nv):
            return TensorHandle(to_e4m3(src.data), tl.float8e4nv)
        return None

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        result = converted(src, dst_type, False)  # Compared with None: a handle is false where it holds a zero.
        return kept["cast_impl"](self, src, dst_type) if result is None else result

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        result = converted(src, dst_type, rounding_mode == _ir.ROUNDING_MODE.RTZ)
        return kept["create_fp_to_fp"](self, src, dst_type, rounding_mode) if result is None else result

    replacements = (create_dot, create_fma, cast_impl, create_fp_to_fp)
    kept = {function.__name__: getattr(InterpreterBuilder, function.__name__) for function in replacements}
    for function in replacements:
        setattr(InterpreterBuilder, function.__name__, function)
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(InterpreterBuilder, name, original)
