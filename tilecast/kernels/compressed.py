"""Rows of a `QuantizedStack` from tensors as compressed-tensors and fp8 checkpoints store a linear layer.

compressed-tensors packs integers along K, the lowest bits first and 2^(bits-1) added: weight_packed int32
[N, K·bits/32], weight_scale [N, K/group] and, unless symmetric, weight_zero_point int32 [N·bits/32, K/group] packed
along N; or it stores int8 [N, K] as they are. fp8 weights are e4m3 [N, K] with a scale for every block of 128 by 128
(weight_scale_inv of DeepSeek and Qwen, which multiplies in spite of its name), for every row, or one for all.
"""

from __future__ import annotations

import math

import torch

from tilecast.errors import InputError
from tilecast.kernels.awq import SCALE_DTYPES, Rows
from tilecast.problem import GROUPS, weight_format

BLOCK = 128
OFFSET_BITS = 0x80
"""What makes an unsigned byte out of a signed one, and back, when its highest bit is turned over."""


def rows_of_packed(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    *,
    shape: tuple[int, int],
    group: int,
    form: str,
    what: str,
) -> Rows:
    """Return the rows of a weight [N, K] in `form` (`int4_g…`, `int8_g…`, `int8_channel` or `awq_g…`).

    `group` is the checkpoint's, 0 for all of K; what a longer one than the form's shares is said again for each part.
    Raises InputError, naming `what`, for tensors of other shapes or dtypes.
    """
    rows, width = shape
    bits = weight_format(form).bits
    _expect(packed, (rows, -(-width * bits // 32)), torch.int32, f"{what}.weight_packed", shape)
    groups = _groups(group, width, what)
    scales = _group_scales(scale, shape, groups, form, what)
    # Little-endian words whose lowest bits come first are bytes whose lower half comes first: nothing moves.
    codes = packed.contiguous().view(torch.uint8)[:, : width * bits // 8].contiguous()
    if bits == 8:
        codes = (codes ^ OFFSET_BITS).view(torch.int8)
    if (zero_point is None) == form.startswith("awq"):
        raise InputError(f"{what} {'lacks a' if zero_point is None else 'has a'} weight_zero_point, expected otherwise")
    if zero_point is None:
        return Rows(codes, scales)
    _expect(zero_point, (-(-rows * bits // 32), groups), torch.int32, f"{what}.weight_zero_point", shape)
    # Packed along N: word n/8 of a column holds its rows, the lowest bits first.
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=zero_point.device)
    zeros = ((zero_point[:, None, :] >> shifts[:, None]) & (1 << bits) - 1).flatten(0, 1)[:rows].to(torch.uint8)
    return Rows(codes, scales, _spread(zeros, shape, form))


def rows_of_int8(
    weight: torch.Tensor, scale: torch.Tensor, *, shape: tuple[int, int], group: int, form: str, what: str
) -> Rows:
    """Return the rows of a symmetric int8 weight [N, K] with scales. Raises InputError, naming `what`."""
    _expect(weight, shape, torch.int8, f"{what}.weight", shape)
    return Rows(weight.contiguous(), _group_scales(scale, shape, _groups(group, shape[1], what), form, what))


def rows_of_fp8(weight: torch.Tensor, scale: torch.Tensor, *, shape: tuple[int, int], form: str, what: str) -> Rows:
    """Return the rows of an e4m3 weight [N, K], its scales as float32. Raises InputError, naming `what`."""
    _expect(weight, shape, torch.float8_e4m3fn, f"{what}.weight", shape)
    rows, width = shape
    wanted = {
        "fp8_block128": (-(-rows // BLOCK), -(-width // BLOCK)), "fp8_channel": (rows, 1), "fp8_tensor": (1, 1),
    }[form]  # fmt: skip
    scales = scale if scale.dim() == 2 else scale.reshape(-1, 1)
    # A byte may be a number or the exponent of one: only e8m0 says which.
    known = scale.dtype.is_floating_point and scale.dtype is not torch.float8_e5m2
    if tuple(scales.shape) != wanted or not known:
        raise InputError(
            f"{what}: its scale is {scale.dtype} {tuple(scale.shape)}, expected floats {wanted} for {form} of {rows} "
            f"outputs and {width} inputs"
        )
    return Rows(weight.contiguous(), scales.to(torch.float32).contiguous())


def stored_group(group: int, *widths: int) -> int:
    """Return the group of our formats that stands for a checkpoint's in weights of `widths` inputs.

    A group of another length, 0 for all of K, is cut into equal ones as long as possible. Raises InputError where
    none does.
    """
    common = math.gcd(*(group or width for width in widths))
    found = next((size for size in reversed(GROUPS) if common % size == 0), 0)
    if not found:
        raise InputError(
            f"groups are of {group or 'all'} of {', '.join(map(str, widths))} inputs, expected a multiple of one of "
            f"{', '.join(map(str, GROUPS))}"
        )
    return found


def _groups(group: int, width: int, what: str) -> int:
    if group and width % group:
        raise InputError(f"{what} has {width} inputs, which cut a group of {group} in two")
    return width // group if group else 1


def _group_scales(scale: torch.Tensor, shape: tuple[int, int], groups: int, form: str, what: str) -> torch.Tensor:
    if tuple(scale.shape) != (shape[0], groups) or scale.dtype not in SCALE_DTYPES:
        raise InputError(
            f"{what}.weight_scale is {scale.dtype} {tuple(scale.shape)}, expected floats {(shape[0], groups)}"
        )
    return _spread(scale, shape, form)


def _spread(tensor: torch.Tensor, shape: tuple[int, int], form: str) -> torch.Tensor:
    """Return scales or zero points [N, groups] for each group of `form`: again for each part of a longer one."""
    group = weight_format(form).group
    wanted = shape[1] // group if group else 1
    return tensor.repeat_interleave(wanted // tensor.shape[1], dim=1).contiguous()


def _expect(
    tensor: torch.Tensor, wanted: tuple[int, int], dtype: torch.dtype, what: str, shape: tuple[int, int]
) -> None:
    if tensor.dtype is not dtype or tuple(tensor.shape) != wanted:
        raise InputError(
            f"{what} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {wanted} for a weight of {shape[0]} "
            f"outputs and {shape[1]} inputs"
        )
